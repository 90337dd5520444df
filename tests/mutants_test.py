"""Mutants, single lines of the package with a fault, fail the tests that are named for them."""

import functools
import os
import subprocess
import sys
import types

import pytest

from tests.mutants import planting
from tests.testing import full

MUTANTS = planting.read_table()
PARTS = (
  *("losses", "algorithms", "train_step", "generation", "models", "rewards", "evaluation"),
  *("data", "experiments", "checkpoint", "loop", "workdir", "ranges", "sharding"),
)
# One in a compiled loss and one on the host.
FEW = ("algorithms/nash_md/1", "evaluation/1")


def program(source):
  """Instructions, names and constants of a source, without its places."""

  def parts(code):
    constants = [
      parts(x) if isinstance(x, types.CodeType) else (type(x), x) for x in code.co_consts
    ]
    return code.co_code, code.co_names, code.co_varnames, constants

  return parts(compile(source, "mutant", "exec", optimize=2))


def test_table_is_that_of_the_source():
  wrong = []
  of_file = functools.cache(lambda file: program((planting.ROOT / file).read_text("utf-8")))
  for mutant in MUTANTS:
    try:
      if program(mutant.source) == of_file(mutant.file):
        wrong.append(f"{mutant.name}: the same program")
    except (ValueError, SyntaxError) as error:
      wrong.append(f"{mutant.name}: {error}")
    for test in mutant.tests:
      path, _, name = test.partition("::")
      source = (planting.ROOT / "tests" / path).read_text(encoding="utf-8")
      if name and f"\ndef {name.partition('[')[0]}(" not in source:
        wrong.append(f"{mutant.name}: {path} has no test {name}")
  assert not wrong, "\n".join(wrong)
  assert len(MUTANTS) > 75
  assert {mutant.name.partition("/")[0] for mutant in MUTANTS} == set(PARTS)


def run(*words):
  command = [sys.executable, "-m", "tests.mutants", *words]
  result = subprocess.run(
    command,
    cwd=planting.ROOT,
    env={name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},
    capture_output=True,
    text=True,
    check=False,
    timeout=3600,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  return result.stdout


def test_a_few_mutants_are_killed():
  assert f"{len(FEW)} of {len(FEW)} mutants killed" in run(*FEW)


@full
@pytest.mark.parametrize("part", PARTS)
def test_no_mutant_survives(part):
  run(f"{part}")


def test_table_is_read():
  text = (
    "# About it.\n\na/b.py\n- x = 1\n+ x = 2\n~ N1 F2\n! c_test.py::test[d e] & f_test.py\n"
    "# Why.\n- y\n+ z\n! f_test.py\n"
  )
  assert planting.read_table(text) == [
    planting.Mutant(
      "a/b/1", "a/b.py", "x = 1", "x = 2", ("c_test.py::test[d e]", "f_test.py"), ("N1", "F2")
    ),
    planting.Mutant("a/b/2", "a/b.py", "y", "z", ("f_test.py",)),
  ]
