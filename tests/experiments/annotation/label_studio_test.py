"""Pairs to Label Studio and its answers back."""

import json
import xml.etree.ElementTree

import pytest

from experiments.annotation import label_studio
from experiments.annotation.items import Item, answer_row, read_item
from rlhf_jax import data

ITEMS = [Item(str(i), f"p{i}", (f"x{i}", f"y{i}")) for i in range(12)]


def annotation(by, selected=None, **columns):
  """Makes the annotation that Label Studio adds to a task when somebody has answered."""
  pairwise = {"from_name": "comparison", "to_name": "answer1,answer2", "type": "pairwise"}
  result = [pairwise | {"id": "k", "value": {"selected": selected}}] if selected else []
  return {"id": 1, "completed_by": by, "was_cancelled": False, "result": result, **columns}


def test_answers_come_back_as_they_were_given(tmp_path):
  label_studio.export(ITEMS, tmp_path)
  tasks = json.loads((tmp_path / "label_studio.json").read_text())
  tie = {"from_name": "tie", "to_name": "prompt", "type": "choices", "value": {"choices": ["tie"]}}
  wanted = []
  for task, item in zip(tasks, ITEMS, strict=True):
    # Ada takes the response of the row's first place, wherever it is; Bob ties or skips.
    is_left = task["data"]["answer1"] == item.responses[0]
    ada = annotation(
      {"id": 3, "email": "ada@x.org"}, "left" if is_left else "right", lead_time=2.34
    )
    bob = annotation(7) | ({"was_cancelled": True} if int(item.id) % 2 else {"result": [tie]})
    task["annotations"] = [ada, bob]
    wanted += [("ada@x.org", 0, False), ("7", None, bool(int(item.id) % 2))]
  path = tmp_path / "export.json"
  path.write_text(json.dumps(tasks))
  rows = label_studio.read(str(path), ITEMS)
  assert len(rows) == len(wanted)
  for row, (by, preferred, skipped) in zip(rows, wanted, strict=True):
    item = ITEMS[int(row["id"])]
    assert (row["by"], row["prompt"], tuple(row["responses"])) == (by, item.prompt, item.responses)
    assert not row["annotations"] if skipped else row["annotations"][0]["preferred"] == preferred
  assert {row["seconds"] for row in rows if row["by"] == "ada@x.org"} == {2.3}
  assert {tuple(row["shown"]) for row in rows} == {(0, 1), (1, 0)}
  pairs = [data.parse_row("preferences", data.Row("r", row), prefer_messages=False) for row in rows]
  assert [pair.answers for (pair,) in pairs[::2]] == [item.responses for item in ITEMS]


def test_a_side_and_a_tie_are_refused_with_the_rows_and_the_annotators(tmp_path):
  tie = {"type": "choices", "value": {"choices": ["tie"]}}
  tasks = [label_studio.make_task(item) for item in ITEMS[:4]]
  for number, task in enumerate(tasks):
    ada, bob = annotation({"email": "ada@x.org"}, "left"), annotation(7, "right")
    if number == 1:
      bob["result"].append(tie)
    if number == 3:
      ada["result"].insert(0, tie)
    task["annotations"] = [ada, bob]
  path = tmp_path / "export.json"
  path.write_text(json.dumps(tasks))
  with pytest.raises(data.DataError, match="clear one of the two in Label Studio") as error:
    label_studio.read(str(path), ITEMS)
  assert "both a response and a tie are chosen in 1 by 7, 3 by ada@x.org;" in str(error.value)
  tasks[1]["annotations"][1]["was_cancelled"] = True
  tasks[3]["annotations"][0]["result"].pop()
  path.write_text(json.dumps(tasks), encoding="utf-8-sig")  # As some editors save it.
  rows = label_studio.read(str(path), ITEMS)
  assert len(rows) == 8 and rows[3]["annotations"] == []
  assert rows[6]["annotations"][0]["preferred"] is None


def test_answers_keep_the_turns_of_their_prompt(tmp_path):
  turns = [{"role": role, "content": role} for role in ("system", "user")]
  item = read_item(data.Row("r", {"messages": turns, "responses": ["x", "y"]}), 0)
  task = label_studio.make_task(item) | {"annotations": [annotation(1, "left")]}
  path = tmp_path / "export.json"
  path.write_text(json.dumps([task]))
  ((row,),) = (label_studio.read(str(path), [item]),)
  (pair,) = data.parse_row("preferences", data.Row("r", row), prefer_messages=True)
  assert pair.prompt == turns
  assert "\n\nHuman: user" in task["data"]["prompt"]  # What people read.


def test_tasks_of_others(tmp_path):
  path = tmp_path / "export.json"
  columns = {"prompt": "p", "answer1": "x", "answer2": "y"}
  task = {"id": 31, "data": columns, "annotations": [annotation(1, "right"), annotation(2)]}
  path.write_text(json.dumps([task]))
  item = Item("31", "p", ("x", "y"))
  assert label_studio.read(str(path)) == [
    answer_row(item, "1", (1, 0), shown=[0, 1]),
    answer_row(item, "2", None, shown=[0, 1]),
  ]
  with pytest.raises(data.DataError, match="not those of the row '31'"):
    label_studio.read(str(path), [Item("31", "other", ("x", "y"))])


COLUMNS = {"prompt": "p", "answer1": "x", "answer2": "y"}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("[", "is not JSON"),
    ("{}", "expected a list of tasks"),
    ([{"prompt": "p"}], "task 0: no `data`"),
    ([{"data": COLUMNS | {"answer2": None}}], "data.answer2 is not a text"),
    ([{"data": COLUMNS}], "no list of annotations"),
    ([{"data": COLUMNS | {"shown": [1, 1]}}], "data.shown"),
    ([{"data": COLUMNS, "annotations": [{}]}], "without a list `result`"),
    ([{"data": COLUMNS, "annotations": [annotation(1, "up")]}], "selected is 'up'"),
  ],
)
def test_other_files_are_refused_in_words(tmp_path, content, message):
  path = tmp_path / "export.json"
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  with pytest.raises(data.DataError, match=message):
    label_studio.read(str(path))


def test_a_ranking_is_no_task(tmp_path):
  with pytest.raises(data.DataError, match="'r' has 3 responses"):
    label_studio.export([Item("r", "p", ("x", "y", "z"))], tmp_path)
  assert not list(tmp_path.iterdir())


def test_the_interface_names_the_columns_of_the_tasks(tmp_path):
  label_studio.export(ITEMS, tmp_path)
  interface = xml.etree.ElementTree.parse(tmp_path / "label_studio.xml")
  shown = {tag.get("value") for tag in interface.iter("Text")}
  columns = json.loads((tmp_path / "label_studio.json").read_text())[0]["data"]
  assert shown == {"$prompt", "$answer1", "$answer2"}
  assert {name[1:] for name in shown} <= columns.keys()
