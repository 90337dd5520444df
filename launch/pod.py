"""Simulates a pod on this machine: runs the processes of one script, each with its CPU devices.

  python -m launch.pod --processes=2 --devices=2 -- python -m experiments.sft --workdir=runs/two

The processes find each other on 127.0.0.1. If one fails, the others are ended, because they could
only wait for it; its exit code is the exit code of the pod. With --restarts all of them are started
again after a code that is worth it. SIGTERM is forwarded to all of them and ends the restarts, as
Ctrl-C does.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import app, flags

from . import job, names

PROCESSES = flags.DEFINE_integer("processes", 2, "Number of processes.", lower_bound=1)
DEVICES = flags.DEFINE_integer(
  "devices", 0, "CPU devices per process; 0 uses the existing devices.", lower_bound=0
)
PATIENCE = flags.DEFINE_float(
  "patience", 15.0, "Seconds that the others may take to end after one failed.", lower_bound=0.0
)
RESTARTS = flags.DEFINE_integer("restarts", 0, "Maximum number of restarts.", lower_bound=0)
_PAUSE_SECONDS = 1.0  # Between an end and the next start.


def environment(devices: int) -> dict[str, str]:
  """Environment of a process with this many CPU devices; 0 changes nothing."""
  if not devices:
    return dict(os.environ)
  xla_flags = os.environ.get("XLA_FLAGS", "")
  count = f"--xla_force_host_platform_device_count={devices}"  # The last of two equal flags wins.
  return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{xla_flags} {count}".strip()}


def watch(group: Sequence[subprocess.Popen], signals: list[int], patience: float) -> int:
  """Waits until all processes have ended, or for a while after one has failed.

  Args:
    group: The processes.
    signals: Signals to forward, filled while this waits.
    patience: Seconds that the others may take to end after one has failed.

  Returns:
    The exit code of the first process that failed, 0 if none did.
  """
  failed, until = 0, float("inf")
  while time.monotonic() < until:
    codes = [process.poll() for process in group]
    if not failed and any(codes):
      failed, until = next(filter(None, codes)), time.monotonic() + patience
    if None not in codes:
      break
    while signals:
      number = signals.pop()
      for process in group:
        process.send_signal(number)
    time.sleep(0.05)
  return 128 - failed if failed < 0 else failed  # Signals are encoded as in a shell.


def run(command: Sequence[str], signals: list[int]) -> int:
  """Runs the command in several processes at once; returns the exit code."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = "127.0.0.1:{1}".format(*probe.getsockname())
  count = PROCESSES.value
  group: list[subprocess.Popen] = []
  try:
    for i in range(count):
      place = (f"--coordinator={address}", f"--processes={count}", f"--process_id={i}")
      words = [*command, *place] if count > 1 else command
      group.append(subprocess.Popen(words, env=environment(DEVICES.value)))
    return watch(group, signals, PATIENCE.value)
  finally:
    for process in group:
      process.kill()
      process.wait()


def main(argv: Sequence[str]) -> int:
  """Runs the command, again after failures that may pass; returns the last exit code."""
  command = argv[1:]
  if not command:
    raise app.UsageError("give the command after --, such as: -- python -m experiments.sft")
  signals, asked = [], []

  def forward(number: int, frame: object) -> None:
    asked.append(number)
    if number == signal.SIGTERM:  # The terminal sends Ctrl-C to all processes.
      signals.append(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, forward)
  for left in reversed(range(RESTARTS.value + 1)):
    code = run(command, signals)
    if asked or not left or not job.may_pass(code):
      break
    sys.stderr.write(f"pod: exit code {code}; starting again, {left - 1} more times at most\n")
    time.sleep(_PAUSE_SECONDS)
  return code


if __name__ == "__main__":
  __doc__ = names.as_typed(__doc__)
  app.run(main)
