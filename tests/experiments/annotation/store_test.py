"""Answers of several annotators in a database, and the file that is trained on."""

import concurrent.futures
import json
import sqlite3

import pytest

from experiments.annotation import store as answers
from experiments.annotation.items import Item, answer_row
from experiments.lab import line_files
from rlhf_jax import data

ITEMS = [Item(str(i), f"p{i}", ("x", "y")) for i in range(12)]


def file_rows(store):
  return [json.loads(line) for line in store.path.read_text().splitlines()]


def test_two_annotators_a_tie_a_skip_and_an_undo(tmp_path):
  store = answers.Store(tmp_path)
  rows = [
    answer_row(ITEMS[0], "ada", (0, 1)),
    answer_row(ITEMS[0], "bob", (0, 0)),
    answer_row(ITEMS[1], "ada", None),
    answer_row(ITEMS[1], "bob", (1, 0)),
  ]
  for row in rows:
    assert store.add([row]) == 1
    assert file_rows(store)[-1] == row
  assert store.rows() == rows
  assert store.rows("ada") == [rows[0], rows[2]]
  assert store.answered("bob") == {"0", "1"}
  # The last answer of Ada is not the last one of all.
  assert store.undo("ada")
  assert store.rows() == file_rows(store) == [rows[0], rows[1], rows[3]]
  assert store.answered("ada") == {"0"}
  assert store.undo("ada") and not store.undo("ada") and not store.undo("eve")
  assert store.rows() == file_rows(store) == [rows[1], rows[3]]


def test_an_answer_stays_as_it_was(tmp_path):
  store = answers.Store(tmp_path)
  first, second = answer_row(ITEMS[0], "ada", (0, 1)), answer_row(ITEMS[0], "ada", (1, 0))
  assert store.add([first]) == 1
  assert store.add([second]) == 0
  assert store.rows() == file_rows(store) == [first]


def test_writers_at_once_lose_nothing(tmp_path):
  names = [f"annotator{i}" for i in range(6)]

  store = answers.Store(tmp_path)

  def work(name):
    for item in ITEMS:
      store.add([answer_row(item, name, (0, 1))])
    store.undo(name)

  with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
    list(pool.map(work, names))
  for name in names:
    assert [row["id"] for row in store.rows(name)] == [item.id for item in ITEMS[:-1]]
  assert store.rows() == file_rows(store)


def test_the_file_is_made_from_the_database_again(tmp_path, monkeypatch):
  rows = [answer_row(item, "ada", (0, 1)) for item in ITEMS[:3]]
  store = answers.Store(tmp_path)
  store.add(rows[:2])
  with open(store.path, "a") as file:
    file.write('{"id": "9", "promp')  # Killed while it wrote a line.
  assert answers.Store(tmp_path).rows() == file_rows(store) == rows[:2]

  with monkeypatch.context() as context:  # Killed before that.
    context.setattr(line_files, "append_lines", lambda *unused: None)
    store.add(rows[2:])
  assert file_rows(store) == rows[:2]
  assert answers.Store(tmp_path).rows() == file_rows(store) == rows

  store.path.unlink()
  assert file_rows(answers.Store(tmp_path)) == rows


def test_a_file_alone_makes_the_database(tmp_path):
  rows = [answer_row(item, "ada", (0, 1)) for item in ITEMS]
  line_files.append_lines(tmp_path / answers.LABELS, rows)
  store = answers.Store(tmp_path)
  assert store.rows() == file_rows(store) == rows


def test_a_broken_line_is_none_of_the_database(tmp_path):
  rows = [answer_row(item, "ada", (0, 1)) for item in ITEMS[:2]]
  store = answers.Store(tmp_path)
  store.add(rows)
  broken = store.path.read_text().replace('"id"', "id", 1)
  store.path.write_text(broken)
  assert answers.Store(tmp_path).rows() == file_rows(store) == rows

  # Without the database the file is the record.
  other = tmp_path / "other"
  other.mkdir()
  for _ in range(2):
    (other / answers.LABELS).write_text(broken)
    with pytest.raises(data.DataError, match=r"labels\.jsonl:1: malformed JSON"):
      answers.Store(other)
    assert (other / answers.LABELS).read_text() == broken


def test_all_of_several_answers_are_kept_or_none(tmp_path):
  store = answers.Store(tmp_path)
  good = answer_row(ITEMS[0], "ada", (0, 1))
  with pytest.raises(TypeError):
    store.add([good, answer_row(ITEMS[1], "ada", (0, 1), bad=object())])
  assert store.rows() == file_rows(store) == []
  assert store.add([good]) == 1


def test_the_database_can_be_queried(tmp_path):
  store = answers.Store(tmp_path)
  store.add([answer_row(item, "ada", (0, 1), seconds=1.5) for item in ITEMS])
  connection = sqlite3.connect(tmp_path / "labels.sqlite")
  ((mode,),) = connection.execute("PRAGMA journal_mode")
  query = "SELECT count(*), sum(json_extract(line, '$.seconds')) FROM answers"
  ((count, seconds),) = connection.execute(query)
  connection.close()
  assert (mode, count, seconds) == ("wal", 12, 18.0)
