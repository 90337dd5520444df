"""Agreement between simulated processes; `tests/experiments/multiprocess_test.py` has real ones."""

import errno
import json

import jax
import numpy as np
import pytest

from rlhf_jax import entry, flags, processes
from rlhf_jax import workdir as workdir_lib

ADDRESS = "10.0.0.1:1234"


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"processes": 2}, "processes needs the address"),
    ({"coordinator": "auto", "process_id": 0}, "process_id needs the address"),
    ({"coordinator": "host"}, "coordinator must be auto or HOST:PORT"),
    ({"coordinator": "host:70000", "processes": 1, "process_id": 0}, "coordinator must be"),
    ({"coordinator": ADDRESS}, "processes must be at least 1"),
    ({"coordinator": ADDRESS, "processes": 0, "process_id": 0}, "processes must be at least 1"),
    ({"coordinator": ADDRESS, "processes": 2}, r"process_id must be in \[0, 2\).*got None"),
    ({"coordinator": ADDRESS, "processes": 2, "process_id": 2}, r"process_id must be in \[0, 2\)"),
  ],
)
def test_groups_that_cannot_meet_are_refused(fields, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    processes.Group(**fields)


def test_how_the_processes_meet(monkeypatch):
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append(args))
  processes.Group().connect()
  assert not calls, "alone, nothing is looked for"
  processes.Group(coordinator="auto").connect()
  processes.Group(coordinator=ADDRESS, processes=2, process_id=1).connect()
  assert calls == [(), (ADDRESS, 2, 1)]


def test_auto_finds_nothing(monkeypatch):
  def initialize(**unused):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  with pytest.raises(ValueError, match="^--coordinator=auto finds neither"):
    processes.Group(coordinator="auto").connect()


def test_alone_everything_is_agreed():
  assert processes.is_first()
  assert processes.agree(lambda: {"a": (1, 2)}) == {"a": (1, 2)}
  assert processes.gather("é" * 3) == ["ééé"]
  processes.wait()
  processes.do_first("alone", lambda: None)
  with pytest.raises(OSError, match="planted"):
    processes.agree(fails)


def fails():
  raise OSError("planted")


@pytest.fixture
def two_processes(monkeypatch):
  """Plays one of two processes; what process 0 has to say is in the list that is returned."""
  said = []

  def broadcast(content):
    if jax.process_index() == 0:
      said.append(content)
    return said[-1]

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes, "_broadcast", broadcast)
  return said


def test_the_first_decides(two_processes, monkeypatch):
  assert processes.agree(lambda: [3, None]) == [3, None]
  assert json.loads(two_processes[0]) == {"result": [3, None]}
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert processes.agree(fails) == [3, None]


class Store:
  """The values that the processes of a group share."""

  def __init__(self):
    self._values = {}

  def key_value_set(self, name, value):
    assert name not in self._values
    self._values[name] = value

  def blocking_key_value_get(self, name, milliseconds):
    assert milliseconds > 60_000
    return self._values[name]


@pytest.mark.parametrize(
  ("error", "code"),
  [
    (workdir_lib.LockedError("--workdir=x is in use, planted"), 73),
    (OSError("planted"), None),
    (OSError(errno.ESTALE, "planted"), 74),
    (OSError(errno.ETIMEDOUT, "planted"), 74),
    (OSError(errno.ENOSPC, "planted"), 74),
    (PermissionError(errno.EACCES, "planted"), 73),
    (MemoryError("planted"), 69),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: planted"), 69),
    (flags.UsageError("--a is planted"), 64),
    (KeyError("planted"), None),
  ],
)
def test_an_error_of_the_first_is_that_of_all(two_processes, monkeypatch, error, code):
  def raising():
    raise error

  monkeypatch.setattr(processes.distributed.global_state, "client", Store())
  for call in (processes.agree, lambda function: processes.do_first("planted", function)):
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(type(error)) as of_first:
      call(raising)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(processes.FirstProcessError, match="planted") as of_other:
      call(fails)
    codes = [(entry.verdict(e.value) or [None])[0] for e in (of_first, of_other)]
    assert codes == [code, code]


def test_what_the_first_does_is_done_once(two_processes, monkeypatch):
  done = []
  monkeypatch.setattr(processes.distributed.global_state, "client", Store())
  processes.do_first("a", lambda: done.append(1))
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  processes.do_first("a", fails)
  assert done == [1]


def test_bytes_survive_the_devices():
  content = np.random.default_rng(0).bytes(300)
  assert processes._broadcast(content) == content
