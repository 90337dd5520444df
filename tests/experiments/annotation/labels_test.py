"""Answers that are there already, and the rows that they belong to."""

import json

import pytest

from experiments.annotation import labels
from experiments.annotation.items import answer_row
from rlhf_jax import data, loop, workdir

ROWS = [{"prompt": f"p{i}", "chosen": f"x{i}", "rejected": f"y{i}"} for i in range(4)]
NAMED = [row | {"id": f"row {i}"} for i, row in enumerate(ROWS)]
CHATS = [
  {"messages": [{"role": "user", "content": f"p{i}"}], "chosen": "x", "rejected": "y"}
  for i in range(3)
]
NEW = {"prompt": "new", "chosen": "x", "rejected": "y"}


@pytest.fixture
def open_rows(tmp_path):
  """`open_rows(rows, limit=0) -> (items, store)`, of one file and one workdir."""

  def open_rows(rows, limit=0):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = labels.LabelConfig(limit, data.DataConfig(path=str(path)))
    with loop.open_run(loop.Session(str(tmp_path / "out"))) as run:
      return labels.open_labels(run, config)

  return open_rows


def answer_all(open_rows, rows):
  items, store = open_rows(rows)
  store.add([answer_row(item, "ada", (0, 1)) for item in items])


@pytest.mark.parametrize(
  ("rows", "changed", "named"),
  [
    (ROWS, [NEW, *ROWS], "'0'"),
    (ROWS, ROWS[1:], "'0'"),
    (ROWS, [*ROWS[:2], *ROWS[3:]], "'2'"),
    (NAMED, [*NAMED[:2], NAMED[2] | {"rejected": "another"}, NAMED[3]], "'row 2'"),
    (NAMED, [NAMED[0] | {"prompt": "another"}, *NAMED[1:]], "'row 0'"),
    (NAMED, [NAMED[0] | {"chosen": "y0", "rejected": "x0"}, *NAMED[1:]], "'row 0'"),
    (CHATS, CHATS[1:], "'0'"),
  ],
  ids=["one before", "the first gone", "one gone", "a response", "a prompt", "exchanged", "chats"],
)
def test_answers_to_other_texts_are_refused(open_rows, rows, changed, named):
  answer_all(open_rows, rows)
  with pytest.raises(workdir.WorkdirError, match="--workdir") as error:
    open_rows(changed)
  assert f"pairs.jsonl: the row {named} is not the one that ada has answered" in str(error.value)


@pytest.mark.parametrize("answered", [NAMED, CHATS], ids=["texts", "chats"])
def test_rows_may_be_appended_and_left_out(open_rows, answered):
  answer_all(open_rows, answered)
  whole = len(answered)
  for rows, limit, count in (
    (answered, 0, whole),
    ([*answered, NEW], 0, whole + 1),
    (answered, 2, 2),
  ):
    items, store = open_rows(rows, limit)
    assert len(items) == count and len(store.rows()) == whole
