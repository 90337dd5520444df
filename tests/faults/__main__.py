"""Runs the tests of all faults and prints what survived: `python -m tests.faults F5 N7`.

Words select rows of the table; without words all are run, also the long ones. `--basetemp=FOLDER`
runs them on the file system of that folder. It exits with 1 if a row fails.
"""

import os
import re
import subprocess
import sys
from collections.abc import Collection

os.environ.setdefault("FULL", "1")  # Before the tests are imported, which read it.

import pytest

from tests.faults import scoreboard
from tests.mutants import planting


class _Results:
  """Plugin that keeps the outcome of each test."""

  def __init__(self):
    self.outcomes: dict[str, list[str]] = {}

  def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
      test = report.nodeid.removeprefix("tests/").partition("[")[0]
      self.outcomes.setdefault(test, []).append(report.outcome)


def _killed(mutants: Collection[planting.Mutant]) -> set[planting.Mutant]:
  """Returns the mutants that their tests notice, in a process that forks before it computes."""
  if not mutants:
    return set()
  names = sorted(mutant.name for mutant in mutants)
  command = [sys.executable, "-m", "tests.mutants", *names]
  shown = subprocess.run(command, cwd=planting.ROOT, capture_output=True, text=True, check=False)
  print(shown.stdout, shown.stderr, sep="", flush=True)
  found = re.findall(r"^killed +[0-9.]+ s  (\S+)", shown.stdout, re.MULTILINE)
  return {mutant for mutant in mutants if mutant.name in found}


def main(words: list[str]) -> int:
  """Runs the rows that the words select."""
  options = [word for word in words if word.startswith("-")]
  names = {word for word in words if not word.startswith("-")}
  rows = [row for row in scoreboard.read() if not names or row.name in names]
  tests = dict.fromkeys(f"tests/{test}" for row in rows for test in row.tests)
  results = _Results()
  if tests:
    pytest.main([*tests, "-q", "-p", "no:cacheprovider", *options], plugins=[results])
  killed = _killed({mutant for row in rows for mutant in scoreboard.mutants_of(row)})
  verdicts = [scoreboard.judge(row, results.outcomes, killed) for row in rows]
  print(scoreboard.show(rows, verdicts))
  return int("failed" in verdicts)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
