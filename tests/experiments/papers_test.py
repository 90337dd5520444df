"""The map of the field in METHODS.md: numbers, commands and tests of papers, feedback, settings."""

import pathlib
import re
import shlex

import numpy as np
import pytest

from experiments.lab import methods
from rlhf_jax import data
from tests.testing import read_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "experiments" / "METHODS.md").read_text(encoding="utf-8")
ABSENT = ("not there yet", "no command yet", "it proposes no method")


def table(name):
  """Cells of the rows of a table between its marks, without the head."""
  (text,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end of {name} -->", PAGE, re.DOTALL)
  return methods.read_rows(text)[2:]


PAPERS = table("papers")


def code(cell):
  return re.findall(r"`([^`]+)`", cell)


def accepts(command):
  """Reads the flags of a command as its script does."""
  words = re.sub(r"\$\w+", "runs/any", command)
  words = words.replace("$DPO", "runs/dpo")
  script, *flags = shlex.split(words)
  if script != "compile":
    flags.append("--workdir=runs/x")
  return read_flags(f"experiments.{script}", flags)


def test_the_numbers_are_those_of_all_papers_and_core_methods():
  assert [row[0] for row in PAPERS] == [*map(str, range(1, 59)), *(f"C{i}" for i in range(1, 11))]
  links = [
    re.fullmatch(r"\[[^]]+\]\(https://arxiv\.org/abs/\d{4}\.\d{5}\)|TAMER", row[1])
    for row in PAPERS
  ]
  assert all(links)


@pytest.mark.parametrize("row", PAPERS, ids=lambda row: row[0])
def test_a_paper_has_a_command_and_a_test_or_says_what_is_missing(row):
  number, _, command, tests, rest = row
  assert rest
  found = re.findall(r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)", tests)
  assert (tests == "–") == (not found)
  for name, path in found:
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text("utf-8"), re.M), (number, name)
  if command == "–":
    assert any(words in rest for words in ABSENT), number
    assert not found or "not there yet" not in rest, number
  else:
    (text,) = code(command)
    assert found and command == f"`{text}`", number
    accepts(text)


def test_what_has_no_command_is_no_method_of_the_table_above():
  """A method that is measured has its paper in the map, with a command."""
  linked = {re.search(r"\d{4}\.\d{5}", row[1])[0] for row in PAPERS if row[2] != "–"}
  absent = {
    re.search(r"\d{4}\.\d{5}", row[1])[0] for row in PAPERS if row[2] == "–" and "[" in row[1]
  }
  papers = {method.paper for method in methods.METHODS.values()}
  assert not papers & (absent - linked)


@pytest.mark.parametrize("name", ["feedback", "settings"])
def test_commands_of_the_other_tables(name):
  rows = table(name)
  commands = [
    command for row in rows for command in code(row[-1]) if "=" in command or " " not in command
  ]
  assert len(commands) > len(rows) - 3
  for command in commands:
    if "=" in command:
      accepts(command)
    assert (ROOT / "experiments" / f"{command.split()[0]}.py").is_file()


RESPONSES = {
  "rank": [{"text": "good", "rank": 0}, {"text": "bad", "rank": 1}],
  "score": [{"text": "good", "score": 2.0}, {"text": "bad", "score": 1.0}],
}
# Column of the table -> further columns of a row with it.
ROWS = {
  "`response`": {"response": "good"},
  "`chosen`, `rejected`": {"chosen": "good", "rejected": "bad"},
  "`responses` with `rank`": {"responses": RESPONSES["rank"]},
  "`responses` with `score`": {"responses": RESPONSES["score"]},
  "`annotations`": {
    "responses": ["good", "bad"],
    "annotations": [{"annotator": "ada", "a": 0, "b": 1, "preferred": 0}],
  },
  "`label`": {"response": "good", "label": True},
  "`answer`": {"answer": "4"},
}
# Kinds of data by the script that reads them; the others read prompts.
KINDS = {
  "sft": ["demonstrations"],
  "ppo_max": ["demonstrations"],  # By `--ptx_path`.
  "dpo": ["preferences"],
  "simpo": ["preferences"],
  "reward_model": ["preferences", "rankings"],
  "preference_model": ["comparisons"],
  "kto": ["unpaired"],
}


@pytest.mark.parametrize("row", table("feedback"), ids=lambda row: row[0])
def test_a_command_reads_the_feedback_that_is_named(row):
  _, column, commands = row
  if column not in ROWS:
    assert column.startswith(("any", "`prompt`"))
    return
  fields = data.Row("row", {"prompt": "p"} | ROWS[column])
  for command in code(commands):
    for kind in KINDS.get(command.split()[0], ["prompts"]):
      examples = data.parse_row(kind, fields, prefer_messages=False)
      assert examples and not any(example.skip for example in examples), (command, kind)


def test_errors_of_a_clone_compound():
  """Follows the distribution over places on and off the path, with an error of 0.01 per step."""
  rows = [[float(cell) for cell in row] for row in table("compounding")]
  assert [row[0] for row in rows] == [10, 40, 160]
  for steps, clone, corrected in rows:
    for back, expected in ((0.0, clone), (1.0, corrected)):
      # Off the path a clone stays there; a learner that is corrected there is back at once.
      move, at, cost = (
        np.array([[0.99, 0.01], [back * 0.99, 1 - back * 0.99]]),
        np.array([1.0, 0]),
        0.0,
      )
      for _ in range(int(steps)):
        at = at @ move
        cost += at[1]
      digits = 2 if expected < 1 and back == 0 else 1
      assert round(cost, digits) == expected
