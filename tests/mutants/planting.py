"""Plants mutants, single lines of `rlhf_jax` with a fault, and runs the tests that should fail.

The source tree stays as it is: an import hook gives the mutated source to a process of its own,
forked from one that has imported the libraries.
"""

import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import os
import pathlib
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = pathlib.Path(__file__).with_name("table.txt")
_SECONDS = 600.0  # A mutant may never end.


@dataclasses.dataclass(frozen=True)
class Mutant:
  """A single line with a fault.

  Attributes:
    name: File without "rlhf_jax/" and ".py", and the number of the mutant in it.
    file: Path below the root.
    old: Part of a line, which occurs exactly once in the file.
    new: Text in its place.
    tests: Tests that fail on it, below the folder `tests`.
    faults: Names of the faults that it plants; see `tests/faults/table.txt`.
  """

  name: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]
  faults: tuple[str, ...] = ()

  @property
  def source(self) -> str:
    """Source of the file with the fault."""
    source = (ROOT / self.file).read_text(encoding="utf-8")
    if source.count(self.old) != 1:
      raise ValueError(f"{self.file} has {source.count(self.old)} times {self.old!r}, not once")
    return source.replace(self.old, self.new)


def read_table(text: str | None = None) -> list[Mutant]:
  """Reads mutants: a line with a file, then for each of its mutants the lines -, +, ~ and !."""
  mutants: list[Mutant] = []
  file, number, parts = "", 0, {}
  for line in (TABLE.read_text(encoding="utf-8") if text is None else text).splitlines():
    kind, text = line[:2].strip(), line[2:]
    if not line.strip() or kind == "#":
      continue
    if kind not in ("-", "+", "~", "!"):
      file, number = line, 0
      continue
    parts[kind] = text
    if kind == "!":
      number += 1
      name = f"{file.removeprefix('rlhf_jax/').removesuffix('.py')}/{number}"
      tests, faults = tuple(text.split(" & ")), tuple(parts.get("~", "").split())
      mutants.append(Mutant(name, file, parts["-"], parts["+"], tests, faults))
      parts = {}
  return mutants


class _Hook(importlib.abc.MetaPathFinder):
  """Finds the module of a mutant, with the source of the mutant."""

  def __init__(self, mutant: Mutant):
    self._module = mutant.file.removesuffix(".py").replace("/", ".")
    self._path = str(ROOT / mutant.file)
    self._source = mutant.source

  def find_spec(self, fullname, path, target=None):
    if fullname != self._module:
      return None
    code = compile(self._source, self._path, "exec")

    class Loader(importlib.machinery.SourceFileLoader):
      def get_code(self, fullname):
        return code

    loader = Loader(fullname, self._path)
    return importlib.util.spec_from_file_location(fullname, self._path, loader=loader)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Result of a mutant.

  Attributes:
    mutant: The mutant.
    result: "killed", "survived" or, if the tests did not run, "broken".
    seconds: Time that its tests took.
    output: Output of its tests.
  """

  mutant: Mutant
  result: str
  seconds: float
  output: str


def _test(mutant: Mutant, log: int) -> None:
  """Runs the tests of a mutant in this process, and ends it with pytest's exit code."""
  code = 70
  try:
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # They cannot be imported a second time.
    sys.meta_path.insert(0, _Hook(mutant))
    tests = [f"tests/{test}" for test in mutant.tests]
    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    sys.stdout.flush()
  except BaseException:  # The process ends in any case.
    os.write(2, traceback.format_exc().encode())
  finally:
    os._exit(code)


def run(mutants: Sequence[Mutant], *, jobs: int = 1) -> Iterator[Verdict]:
  """Runs the tests of each mutant in a process forked from this one, which must hold no device.

  Args:
    mutants: The mutants.
    jobs: Number of processes at a time.
  """
  waiting, running = list(mutants), {}
  while waiting or running:
    while waiting and len(running) < jobs:
      mutant = waiting.pop(0)
      log = tempfile.TemporaryFile()  # noqa: SIM115, closed when the process has ended.
      pid = os.fork()
      if not pid:
        _test(mutant, log.fileno())
      running[pid] = mutant, log, time.monotonic()
    for pid, (mutant, log, start) in list(running.items()):
      ended, status = os.waitpid(pid, os.WNOHANG)
      seconds = time.monotonic() - start
      if not ended and seconds > _SECONDS:
        os.kill(pid, 9)
        ended, status = os.waitpid(pid, 0)
      if ended:
        code = os.waitstatus_to_exitcode(status)
        result = {0: "survived", 1: "killed"}.get(code, "broken")
        log.seek(0)
        yield Verdict(mutant, result, seconds, log.read().decode(errors="replace"))
        log.close()
        del running[pid]
    time.sleep(0.02)
