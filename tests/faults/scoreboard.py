"""Table of faults, and what the outcomes of tests say about it."""

import collections
import dataclasses
import pathlib
from collections.abc import Collection, Mapping, Sequence

from tests.mutants import planting

TABLE = pathlib.Path(__file__).with_name("table.txt")
NAMES = [*(f"F{i}" for i in range(1, 43)), *(f"N{i}" for i in range(1, 26))]


@dataclasses.dataclass(frozen=True)
class Row:
  """A fault.

  Attributes:
    name: Name, F and N with a number.
    words: Description.
    tests: Tests that hold it, below the folder `tests`.
    reason: Reason why it cannot be tested here; empty if it can.
  """

  name: str
  words: str
  tests: tuple[str, ...] = ()
  reason: str = ""


def read(text: str | None = None) -> list[Row]:
  """Reads the table: a line with name and words, then lines ! and - of that row."""
  rows: list[Row] = []
  for line in (TABLE.read_text(encoding="utf-8") if text is None else text).splitlines():
    kind, _, rest = line.partition(" ")
    if not line.strip() or kind == "#":
      continue
    if kind not in ("!", "-"):
      rows.append(Row(kind, rest))
      continue
    row = rows.pop()
    if kind == "!":
      row = dataclasses.replace(row, tests=(*row.tests, rest))
    else:
      row = dataclasses.replace(row, reason=rest)
    rows.append(row)
  return rows


def mutants_of(row: Row) -> list[planting.Mutant]:
  """Returns the mutants in which the fault of a row is planted."""
  return [mutant for mutant in planting.read_table() if row.name in mutant.faults]


def judge(
  row: Row, outcomes: Mapping[str, Sequence[str]], killed: Collection[planting.Mutant]
) -> str:
  """Returns "survived", "failed", "not testable here" or "missing".

  Args:
    row: The fault.
    outcomes: Test -> its outcomes, one for each of its parameters.
    killed: Mutants that tests have noticed.
  """
  if row.reason:
    return "not testable here"
  if not row.tests:
    return "missing"
  found = [outcomes.get(test, ["failed"]) for test in row.tests]
  if any("failed" in of_test for of_test in found) or {*mutants_of(row)} - {*killed}:
    return "failed"
  # A test that is skipped for lack of a program or a device shows nothing.
  return "survived" if any("passed" in of_test for of_test in found) else "not testable here"


def show(rows: Sequence[Row], verdicts: Sequence[str], figures: Mapping[str, int]) -> str:
  """Returns a line for each row that did not survive, and the sums.

  Args:
    rows: The faults.
    verdicts: Verdict of each of them.
    figures: Numbers of kills, stops and so on in tests that passed.
  """
  lines = [
    f"{row.name:4} {verdict}: {row.words}{f' ({row.reason})' if row.reason else ''}"
    for row, verdict in zip(rows, verdicts, strict=True)
    if verdict != "survived"
  ]
  count = collections.Counter(verdicts)
  planted = [verdict for row, verdict in zip(rows, verdicts, strict=True) if mutants_of(row)]
  sums = f"{count['survived']} faults survived, {count['not testable here']} not testable here"
  sums += "".join(f", {count[word]} {word}" for word in ("failed", "missing") if count[word])
  sums += f"; {planted.count('survived')} of {len(planted)} that are planted were noticed"
  lines.append(sums)
  if figures:
    lines.append(", ".join(f"{number} {name}" for name, number in figures.items()))
  return "\n".join(lines)
