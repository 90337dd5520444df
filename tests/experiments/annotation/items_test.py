"""Rows as items, the order in which they are shown, answers as rows."""

import json

import numpy as np
import pytest

from experiments.annotation import items
from experiments.annotation.items import Item
from rlhf_jax import data


@pytest.mark.parametrize(
  ("fields", "labels"),
  [
    ({"chosen": "x", "rejected": "y"}, ((0, 1, 1.0),)),
    ({"responses": ["x", "y"]}, ()),
    ({"responses": [{"text": "x"}, {"text": "y"}]}, ()),
    ({"responses": ["x", "y"], "annotations": []}, ()),
    ({"responses": ["x", "y"], "annotations": [{"preferred": 1}]}, ((0, 1, 0.0),)),
    ({"responses": ["x", "y"], "preferences": [{"preferred": None}]}, ((0, 1, 0.5),)),
  ],
)
def test_pairs_judged_or_not(fields, labels):
  item = items.read_item(data.Row("r", {"prompt": "p", **fields}), 3)
  assert item == Item("3", "p", ("x", "y"), labels)


def test_a_row_of_several_responses():
  texts = ["x", "y", "z"]
  item = items.read_item(data.Row("r", {"prompt": "p", "responses": texts, "id": 7}), 3)
  assert item == Item("7", "p", ("x", "y", "z"))
  ranked = [{"text": text, "rank": rank} for text, rank in zip(texts, (1, 0, 1), strict=True)]
  item = items.read_item(data.Row("r", {"prompt": "p", "responses": ranked}), 3)
  assert item.labels == ((0, 1, 0.0), (0, 2, 0.5), (1, 2, 1.0))


@pytest.mark.parametrize("responses", [["x"], [], ["x", 3], [{"text": "x"}, {}]])
def test_what_cannot_be_compared_is_refused(responses):
  with pytest.raises(data.DataError, match="r: responses"):
    items.read_item(data.Row("r", {"prompt": "p", "responses": responses}), 0)


def test_an_id_is_taken_once(tmp_path):
  path = tmp_path / "pairs.jsonl"
  row = '{"id": "7", "prompt": "p", "chosen": "x", "rejected": "y"}\n'
  path.write_text(row * 2)
  with pytest.raises(data.DataError, match=r"pairs.jsonl:2: id: '7' is taken"):
    items.read_items(data.DataConfig(path=str(path)), 0, 0)


def test_columns_are_left_out_and_turns_of_tools_are_shown(tmp_path):
  turns = [("user", "sum"), ("assistant", "call"), ("tool", "result")]
  prompt = [{"role": role, "content": text} for role, text in turns]
  row = {"prompt": prompt, "chosen": "x", "rejected": "y", "context": "c", "id": 7}
  path = tmp_path / "pairs.jsonl"
  path.write_text(json.dumps(row) + "\n")
  with pytest.raises(data.DataError, match="data.ignore=context"):
    items.read_items(data.DataConfig(path=str(path)), 0, 0)
  config = data.DataConfig(path=str(path), ignore=("context", "id"))
  ((item,), _) = items.read_items(config, 0, 0)
  assert item.id == "0" and item.prompt.split("\n\n")[1:] == [
    *("Human: sum", "Assistant: call", "Tool: result", "Assistant:")
  ]


ASKED = [{"role": "user", "content": "Who?"}]
CHAT = [{"role": "system", "content": "Be brief."}, *ASKED]
HELLO = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(
  "fields",
  [
    {"prompt": "Who?"},
    {"prompt": "Who?", "system": "Be brief."},
    {"prompt": HELLO, "system": "Be brief."},
    {"prompt": "Who?", "history": [["Hi", "Hello"]]},
    {"messages": CHAT},
    {"prompt": [*ASKED, {"role": "tool", "content": "Ada"}]},
    {"prompt": "Who?", "messages": ASKED},
    {"chosen": f"{HELLO} x", "rejected": f"{HELLO} y"},
  ],
)
def test_what_learns_from_labels_reads_the_prompt_of_the_row(fields):
  row = data.Row("r", {"chosen": "x", "rejected": "y", **fields})
  item = items.read_item(row, 0)
  assert isinstance(item.prompt, str)
  labelled = data.Row("labels", json.loads(json.dumps(items.answer_row(item, "ada", (1, 0)))))
  for on in (False, True):
    (wanted,) = data.parse_row("preferences", row, prefer_messages=on)
    (found,) = data.parse_row("preferences", labelled, prefer_messages=on)
    assert found.prompt == wanted.prompt
    assert found.answers == ("y", "x")


@pytest.mark.parametrize("count", [2, 4])
def test_the_order_tells_nothing(count):
  orders = [items.shown_order(f"p{i}", [f"{i}{j}" for j in range(count)]) for i in range(400)]
  assert all(sorted(order) == list(range(count)) for order in orders)
  # Each response is on each place equally often; 5 standard deviations.
  for place in range(count):
    seen = np.bincount([order[place] for order in orders], minlength=count)
    assert np.abs(seen - 400 / count).max() < 5 * np.sqrt(400 / count)
  assert orders[0] == items.shown_order("p0", [f"0{j}" for j in range(count)])


def test_ranks_become_votes_on_every_pair():
  item = Item("7", "p", ("w", "x", "y", "z"))
  row = items.answer_row(item, "ada", (2, 0, 1, 1))
  found = data.parse_row("preferences", data.Row("r", row), prefer_messages=False)
  pairs = {example.answers for example in found if not example.skip}
  assert pairs == {("x", "w"), ("y", "w"), ("z", "w"), ("x", "y"), ("x", "z")}
  assert [example.skip for example in found].count("ties") == 1
  (ranking,) = data.parse_row("rankings", data.Row("r", row), prefer_messages=False)
  assert ranking.answers[0] == "x" and ranking.answers[-1] == "w"
  (skipped,) = data.parse_row(
    "preferences",
    data.Row("r", items.answer_row(item, "ada", None)),
    prefer_messages=False,
  )
  assert skipped.skip == "not_judged"


@pytest.mark.parametrize("name", ["", "a b", "-a", "<b>", "a/b", "label", "x" * 65])
def test_names_that_are_refused(name):
  with pytest.raises(ValueError, match="annotator must"):
    items.check_annotator(name)
