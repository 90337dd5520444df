"""Coordination of several JAX processes that run one script.

On a TPU pod, under Slurm or by hand the same script is started once per process, and each process
owns some of the devices. All run the same program: every process must take part in each computation
on the mesh, in the same order. Decisions that depend on anything that may differ between hosts,
such as the contents of a file, are therefore made by process 0 and broadcast. Only process 0 writes
files, apart from checkpoints, and only process 0 prints.
"""

import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax._src import distributed
from jax.experimental import multihost_utils

from rlhf_jax import ranges

_AUTO = "auto"
_TEXT_BYTES = 1000
# Seconds without a sign of life after which a process counts as dead; JAX then aborts the others.
_HEARTBEAT_SECONDS = 30
# Seconds that a process which fails waits for the others to fail too.
_LEAVE_SECONDS = 5
_LONGEST_SECONDS = 24 * 60 * 60  # That process 0 may take for what it does alone in a thread.

# The disk, the network or the quota may be well again later; what the others say stays as it is.
_IO = frozenset(
  {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENOLCK, errno.ETIMEDOUT}
)
_CANNOT_CREATE = frozenset(
  {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
  | {errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY}
)
_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|Out of memory")


class FirstProcessError(RuntimeError):
  """Process 0 has stopped; the message is its error."""

  def __init__(self, message: str, exit_code: int | None):
    super().__init__(message)
    self.exit_code = exit_code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """The group of processes that run a script together.

  Attributes:
    coordinator: Address of process 0, HOST:PORT, if several processes run this script together.
      auto finds it on a TPU pod, under Slurm and under Open MPI. Empty for a single process.
    processes: Number of processes. Only with HOST:PORT.
    process_id: Index of this process, from 0. Only with HOST:PORT.
  """

  coordinator: str = ranges.rare("")
  processes: int | None = ranges.rare(None)
  process_id: int | None = ranges.rare(None)

  def __post_init__(self):
    count, number = self.processes, self.process_id
    if self.coordinator in ("", _AUTO):
      for name, value in (("processes", count), ("process_id", number)):
        if value is not None:
          raise ValueError(f"{name} needs the address of process 0: give --coordinator=HOST:PORT")
      return
    address = re.fullmatch(r"\S+:([0-9]{1,5})", self.coordinator)
    if not address or not 0 < int(address[1]) < 2**16:
      raise ValueError(f"coordinator must be auto or HOST:PORT, got {self.coordinator!r}")
    if count is None or count < 1:
      raise ValueError(f"processes must be at least 1 for --coordinator=HOST:PORT, got {count}")
    if number is None or not 0 <= number < count:
      raise ValueError(f"process_id must be in [0, {count}) of --processes, got {number}")

  def connect(self) -> None:
    """Waits for the other processes. Call it before anything uses a device."""
    if not self.coordinator:
      return
    # The loop has its own way to stop together. JAX's service would take SIGTERM at any time, count
    # steps that may never be reached, and lose a request that comes before the first of them.
    jax.config.update("jax_enable_preemption_service", False)
    # Otherwise programs with collectives could overtake each other on CPUs, and processes would
    # deadlock. Accelerators run programs in the order of dispatch.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if self.coordinator == _AUTO:
      try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
      except ValueError as error:
        raise ValueError(
          "--coordinator=auto finds neither a TPU pod nor Slurm nor Open MPI; give HOST:PORT with"
          " --processes and --process_id, or leave it empty to run alone"
        ) from error
      return
    host = self.coordinator.rpartition(":")[0]
    jax.distributed.initialize(
      self.coordinator,
      self.processes,
      self.process_id,
      cluster_detection_method="deactivate",
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      # The port has no authentication, so a group on one machine only listens locally.
      coordinator_bind_address=self.coordinator if host in ("localhost", "127.0.0.1") else None,
    )


def lacks_memory(error: BaseException) -> bool:
  """Returns whether an error says that the host or a device has too little memory."""
  of_device = isinstance(error, jax.errors.JaxRuntimeError) and _MEMORY.search(str(error))
  return isinstance(error, MemoryError) or bool(of_device)


def code_of(error: BaseException) -> int | None:
  """Returns the exit code of an error that the system or this package has foreseen.

  It is that of the error, if it has one. It is 69 if memory does not suffice, 73 if a file cannot
  be created, 74 if a disk, the network or a quota fails, and None for every other error.
  """
  for code in (getattr(error, "exit_code", None), getattr(error, "exitcode", None)):
    if isinstance(code, int):
      return code
  if lacks_memory(error):
    return os.EX_UNAVAILABLE
  number = error.errno if isinstance(error, OSError) else None
  if number in _IO:
    return os.EX_IOERR
  return os.EX_CANTCREAT if number in _CANNOT_CREATE else None


def is_first() -> bool:
  """True on process 0, which writes and prints for all."""
  return jax.process_index() == 0


def agree(function: Callable[[], Any]) -> Any:
  """Calls a function on process 0 only and returns its JSON-able result on every process.

  Raises:
    FirstProcessError: On the other processes, if the function raised on process 0.
  """
  if jax.process_count() == 1:
    return function()
  outcome, error = _outcome(function) if is_first() else ({}, None)
  outcome = json.loads(_broadcast(json.dumps(outcome).encode()))
  if error is not None:
    raise error
  return _result(outcome)


def do_first(name: str, function: Callable[[], None]) -> None:
  """Calls a function on process 0 only; the others wait until it has ended there.

  Unlike `agree` it computes nothing on the devices, so any thread may call it, and process 0 waits
  for nobody.

  Args:
    name: Name of this call, the same on all processes, and that of no other call.
    function: Function to call.

  Raises:
    FirstProcessError: On the other processes, if the function raised on process 0.
  """
  client = distributed.global_state.client
  if client is None:  # This process is alone.
    return function()
  if not is_first():
    _result(json.loads(client.blocking_key_value_get(name, 1000 * _LONGEST_SECONDS)))
    return
  outcome, error = _outcome(function)
  client.key_value_set(name, json.dumps(outcome))
  if error is not None:
    raise error


def _outcome(function: Callable[[], Any]) -> tuple[dict[str, Any], Exception | None]:
  """Calls a function; returns what the other processes are told, and its error if it raises one."""
  try:
    return {"result": function()}, None
  except Exception as error:
    told = {"error": f"{type(error).__name__}: {error}", "exit_code": code_of(error)}
    return told, error


def _result(outcome: dict[str, Any]) -> Any:
  """Returns the result that process 0 has told, or raises its error."""
  if "error" in outcome:
    raise FirstProcessError(outcome["error"], outcome["exit_code"])
  return outcome["result"]


def gather(text: str) -> list[str]:
  """Gathers a short text from each process, in their order; longer texts are truncated."""
  content = text.encode()[:_TEXT_BYTES]
  row = np.frombuffer(content.ljust(_TEXT_BYTES, b"\0"), np.uint8)
  rows = np.reshape(multihost_utils.process_allgather(row), (-1, _TEXT_BYTES))
  return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def wait() -> None:
  """Waits until every process gets here; then all see what process 0 wrote before."""
  multihost_utils.sync_global_devices("wait")


def part() -> None:
  """Leaves the group after an error, with the others if they have one too.

  Otherwise JAX would wait minutes for those that go on, and then abort this process, whose exit
  code would be lost. An error that all have, such as wrong data, is reported by each of them.
  """
  client = distributed.global_state.client
  if client is None:
    return
  try:
    # Public barriers compute on the devices, for which the others would have to come too.
    client.wait_at_barrier("part", 1000 * _LEAVE_SECONDS)
    jax.distributed.shutdown()
  except Exception as error:  # The others go on, or are dead.
    logging.debug("left alone: %s", error)


def _broadcast(content: bytes) -> bytes:
  """Returns the bytes of process 0 on every process."""
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
  buffer = np.zeros(max(256, 1 << (size - 1).bit_length()), np.uint8)  # Few shapes to compile.
  if is_first():
    buffer[:size] = np.frombuffer(content, np.uint8)
  return bytes(multihost_utils.broadcast_one_to_all(buffer)[:size])
