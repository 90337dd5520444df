"""Runs the tests of all faults and prints what survived: `python -m tests.faults F5 N7`.

Words select rows of the table; without words all are run, also the long ones. `--trials=20` takes
20 kills, and 20 of each kind of damage to a checkpoint, and not 200. Other options are those of
pytest: `--basetemp=FOLDER` runs the tests on the file system of that folder, `-n0` in one process,
which is the default on one core. It exits with 1 if a row fails.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Collection

os.environ.setdefault("FULL", "1")  # Before the tests are imported, which read it.

import pytest

from tests.faults import scoreboard
from tests.mutants import planting

_TRIALS = 200


class _Results:
  """Plugin that keeps the outcome of each test, and sums the figures that tests record."""

  def __init__(self):
    self.outcomes: dict[str, list[str]] = {}
    self.figures: dict[str, int] = {}

  def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
      test = report.nodeid.removeprefix("tests/").partition("[")[0]
      self.outcomes.setdefault(test, []).append(report.outcome)
    if report.when == "call" and report.outcome == "passed":
      for name, count in report.user_properties:
        self.figures[name] = self.figures.get(name, 0) + count


def _killed(mutants: Collection[planting.Mutant], jobs: int) -> set[planting.Mutant]:
  """Returns the mutants that their tests notice, in a process that forks before it computes."""
  if not mutants:
    return set()
  names = sorted(mutant.name for mutant in mutants)
  command = [sys.executable, "-m", "tests.mutants", f"--jobs={jobs}", *names]
  running = subprocess.Popen(command, cwd=planting.ROOT, stdout=subprocess.PIPE, text=True)
  assert running.stdout is not None
  found = set()
  for line in running.stdout:
    print(line, end="", flush=True)
    if killed := re.match(r"killed +[0-9.]+ s  (\S+)", line):
      found.add(killed[1])
  running.wait()
  return {mutant for mutant in mutants if mutant.name in found}


def main(words: list[str]) -> int:
  """Runs the rows that the words select."""
  begin, cores = time.monotonic(), os.cpu_count() or 1
  if hasattr(os, "sched_getaffinity"):  # Not on macOS.
    cores = len(os.sched_getaffinity(0))
  trials = [word.removeprefix("--trials=") for word in words if word.startswith("--trials=")]
  os.environ.setdefault("TRIALS", trials[-1] if trials else str(_TRIALS))
  options = [word for word in words if word.startswith("-") and "--trials=" not in word]
  names = {word for word in words if not word.startswith("-")}
  rows = [row for row in scoreboard.read() if not names or row.name in names]
  if cores > 1:
    options = ["-n", str(cores), "--dist=worksteal", *options]
  tests = dict.fromkeys(f"tests/{test}" for row in rows for test in row.tests)
  mutants = {mutant for row in rows for mutant in scoreboard.mutants_of(row)}
  print(f"{len(rows)} faults, {len(tests)} tests, {len(mutants)} mutants", flush=True)
  results = _Results()
  if tests:
    pytest.main([*tests, "-v", "-p", "no:cacheprovider", *options], plugins=[results])
  killed = _killed(mutants, cores)
  verdicts = [scoreboard.judge(row, results.outcomes, killed) for row in rows]
  minutes = (time.monotonic() - begin) / 60
  print(scoreboard.show(rows, verdicts, results.figures), f"{minutes:.0f} minutes", sep="\n")
  return int("failed" in verdicts)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
