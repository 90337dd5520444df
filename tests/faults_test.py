"""The table of faults names each fault once, and tests and mutants that exist."""

import ast
import functools

import pytest

from tests.faults import scoreboard
from tests.faults.scoreboard import Row
from tests.mutants import planting

ROWS = scoreboard.read()


@functools.cache
def functions(path):
  tree = ast.parse(path.read_text(encoding="utf-8"))
  return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_table_has_every_fault_once():
  assert [row.name for row in ROWS] == scoreboard.NAMES
  assert all(row.words and not (row.tests and row.reason) for row in ROWS)


def test_every_fault_is_held_or_has_a_reason():
  assert not [row.name for row in ROWS if not row.tests and not row.reason]
  faults = [row for row in ROWS if row.name.startswith("F")]
  assert sum(bool(row.tests) for row in faults) >= 38
  pitfalls = [row for row in ROWS if row.name.startswith("N")]
  assert not [row.name for row in pitfalls if not scoreboard.mutants_of(row)]


def test_what_the_table_names_exists(repository):
  for row in ROWS:
    for test in row.tests:
      file, name = test.split("::")
      assert name in functions(repository / "tests" / file), f"{row.name}: {test}"
  planted = {fault for mutant in planting.read_table() for fault in mutant.faults}
  assert planted <= {row.name for row in ROWS}


MUTANTS = scoreboard.mutants_of(Row("N1", "x"))


@pytest.mark.parametrize(
  ("row", "outcomes", "killed", "verdict"),
  [
    (Row("F1", "x", ("a::b",)), {"a::b": ["passed", "passed"]}, (), "survived"),
    (Row("F1", "x", ("a::b",)), {"a::b": ["passed", "skipped"]}, (), "survived"),
    (Row("F1", "x", ("a::b",)), {"a::b": ["passed", "failed"]}, (), "failed"),
    (Row("F1", "x", ("a::b",)), {}, (), "failed"),
    (Row("F1", "x", ("a::b", "a::c")), {"a::b": ["passed"]}, (), "failed"),
    (Row("F1", "x", ("a::b",)), {"a::b": ["skipped"]}, (), "not testable here"),
    (Row("F1", "x", reason="no device"), {}, (), "not testable here"),
    (Row("F1", "x"), {}, (), "missing"),
    (Row("N1", "x", ("a::b",)), {"a::b": ["passed"]}, MUTANTS, "survived"),
    (Row("N1", "x", ("a::b",)), {"a::b": ["passed"]}, MUTANTS[1:], "failed"),
  ],
)
def test_verdicts(row, outcomes, killed, verdict):
  assert scoreboard.judge(row, outcomes, killed) == verdict


def test_sums():
  rows = [Row("F1", "x", ("a::b",)), Row("F2", "y"), Row("F3", "z", reason="no device")]
  verdicts = ["survived", "missing", "not testable here"]
  assert scoreboard.show(rows, verdicts, {"kills": 9, "bit flips": 3}) == (
    "F2   missing: y\nF3   not testable here: z (no device)\n"
    "1 faults survived, 1 not testable here, 1 missing; 0 of 0 that are planted were noticed\n"
    "9 kills, 3 bit flips"
  )
