"""Processes that do a piece of work by order: starting them, and speaking with them."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import rlhf_jax
from .shapes import Shape

ROOT = pathlib.Path(rlhf_jax.__file__).resolve().parents[1]  # On the path of what is started.


class Unavailable(RuntimeError):
  """A library cannot be installed, fails, or does other work."""


def last_line(text: str) -> str:
  """Last line of a log that says something."""
  lines = [line for line in text.splitlines() if line.strip()]
  return lines[-1].strip() if lines else "no message"


def ours(spec: pathlib.Path, work: str) -> list[str]:
  """Command of our side of a work."""
  return [sys.executable, "-m", f"{__package__}.ours", str(spec), work]


class Started:
  """Program of `peers/protocol.py` after its warm-up.

  Attributes:
    facts: Numbers that it says about itself.
  """

  def __init__(self, process: subprocess.Popen[str], log: pathlib.Path):
    self._process, self._log = process, log
    self.facts: Mapping[str, Any] = self._read()["ready"]

  def _read(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      self._process.wait()
      raise Unavailable(last_line(self._log.read_text(encoding="utf-8", errors="replace")))
    return json.loads(line)

  def run(self) -> dict[str, Any]:
    """Runs the work once and returns the answer."""
    assert self._process.stdin is not None
    try:
      self._process.stdin.write("\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # It has ended, and the log says why.
    return self._read()


@contextlib.contextmanager
def started(
  command: Sequence[str],
  log: pathlib.Path,
  cores: Sequence[int],
  env: Mapping[str, str] | None = None,
) -> Generator[Started]:
  """Starts a program on some cores, and ends it.

  Args:
    command: Program with its arguments.
    log: File for what it says besides its answers.
    cores: Numbers of the cores; where a process cannot be bound to cores, it uses all.
    env: Further variables of its environment.

  Raises:
    Unavailable: It ends before its warm-up is over.
  """
  variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(len(cores))}
  variables.pop("PYTHONPATH", None)
  if command[0] == sys.executable:
    variables["PYTHONPATH"] = str(ROOT)
  pipe = subprocess.PIPE
  with open(log, "w", encoding="utf-8") as file, _bound(cores):
    process = subprocess.Popen(
      command, stdin=pipe, stdout=pipe, stderr=file, text=True, env=variables | dict(env or {})
    )
  try:
    yield Started(process, log)
  finally:
    process.kill()
    process.communicate()


def started_ours(
  shape: Shape, work: str, folder: pathlib.Path, env: Mapping[str, str] | None = None
) -> contextlib.AbstractContextManager[Started]:
  """Starts our side of a work, by itself on all cores, with its files in a folder."""
  spec = folder / "spec.json"
  content = {"shape": dataclasses.asdict(shape), "started": time.time()}
  spec.write_text(json.dumps(content), encoding="utf-8")
  return started(ours(spec, work), folder / "log", available_cores(), env)


@contextlib.contextmanager
def _bound(cores: Sequence[int]) -> Generator[None]:
  """Binds this thread to cores; a process that it starts inherits it."""
  if not hasattr(os, "sched_setaffinity"):
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


def available_cores() -> list[int]:
  """Numbers of the cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))
