"""Several processes of JAX as one: how they meet and how they agree.

On a TPU pod, under Slurm or by hand the same script is started once per process, and each process
owns a part of the devices. All run the same program: a computation on the mesh needs every process
to take part, in the same order. So whatever decides what comes next and may differ between hosts,
such as what a file holds, is asked of process 0 and told to the others. Only process 0 writes
files, apart from checkpoints, and only process 0 speaks.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_AUTO = "auto"
_TEXT_BYTES = 1000


class FirstProcessError(RuntimeError):
  """Process 0 has stopped for a reason of its own, which is the message."""

  def __init__(self, message: str, exit_code: int | None):
    super().__init__(message)
    self.exit_code = exit_code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """Which processes run a script together.

  Attributes:
    coordinator: Address of process 0, HOST:PORT, if several processes run this script together;
      auto finds it on a TPU pod, under Slurm and under Open MPI; empty runs alone.
    processes: Number of processes, with an address.
    process_id: Number of this process, from 0, with an address.
  """

  coordinator: str = ""
  processes: int | None = None
  process_id: int | None = None

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
    """Waits for the other processes. To be called before anything asks for a device."""
    if not self.coordinator:
      return
    # The loop has its own way to stop together. That of JAX would take SIGTERM at any time, count
    # steps that may never be reached, and lose a request that comes before the first of them.
    jax.config.update("jax_enable_preemption_service", False)
    # On CPUs programs with collectives could else overtake each other, and processes would wait
    # for each other for ever; accelerators run them in the order in which they were sent.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if self.coordinator == _AUTO:
      try:
        jax.distributed.initialize()
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
      # Anybody who reaches the port is let in, so that of a group on one machine stays there.
      coordinator_bind_address=self.coordinator if host in ("localhost", "127.0.0.1") else None,
    )


def is_first() -> bool:
  """Whether this is process 0, which writes and speaks for all."""
  return jax.process_index() == 0


def agree(function: Callable[[], Any]) -> Any:
  """Calls a function on process 0 alone and returns its result, JSON-able, on every process.

  Raises:
    FirstProcessError: On the other processes, if the function raised on process 0.
  """
  if jax.process_count() == 1:
    return function()
  told: dict[str, Any] = {}
  error = None
  if is_first():
    try:
      told = {"result": function()}
    except Exception as caught:
      error = caught
      told = {"error": f"{type(error).__name__}: {error}"}
      told["exit_code"] = getattr(error, "exit_code", None)
  told = json.loads(_broadcast(json.dumps(told).encode()))
  if error is not None:
    raise error
  if "error" in told:
    raise FirstProcessError(told["error"], told["exit_code"])
  return told["result"]


def gather(text: str) -> list[str]:
  """A short text of each process, in their order; longer ones are cut."""
  content = text.encode()[:_TEXT_BYTES]
  row = np.frombuffer(content.ljust(_TEXT_BYTES, b"\0"), np.uint8)
  rows = np.reshape(multihost_utils.process_allgather(row), (-1, _TEXT_BYTES))
  return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def wait() -> None:
  """Returns when every process has got here: all see what process 0 wrote before."""
  multihost_utils.sync_global_devices("wait")


def _broadcast(content: bytes) -> bytes:
  """The bytes of process 0."""
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
  buffer = np.zeros(max(256, 1 << (size - 1).bit_length()), np.uint8)  # Few shapes to compile.
  if is_first():
    buffer[:size] = np.frombuffer(content, np.uint8)
  return bytes(multihost_utils.broadcast_one_to_all(buffer)[:size])
