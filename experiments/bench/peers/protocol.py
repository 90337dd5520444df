"""Conversation of a benchmarked program with `compare`; needs nothing but Python.

A program is started with a JSON file of sizes and the name of its work. It sets up, runs the work
twice as a warm-up, and writes one JSON line. For each line that it then reads it runs the work once
and writes the seconds. It ends when its input ends.
"""

import json
import os
import sys
import time


class Peer:
  """Side of the benchmarked program.

  Attributes:
    spec: Content of the JSON file.
    work: Name of the work.
  """

  def __init__(self, arguments=None):
    path, self.work = sys.argv[1:3] if arguments is None else arguments
    with open(path, encoding="utf-8") as file:
      self.spec = json.load(file)
    # What libraries print must not be read as an answer.
    self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    self._input = sys.stdin
    self._start = None

  def _say(self, **content):
    self._out.write(json.dumps(content) + "\n")
    self._out.flush()

  def ready(self, **facts):
    """Says that the warm-up is over, with facts that must be equal in all programs."""
    self._say(ready=facts)

  def wait(self):
    """Waits for the order to run once, and starts the clocks; ends the process if none comes."""
    if not self._input.readline():
      self._out.flush()
      os._exit(0)  # Libraries may have threads that would keep it alive.
    self._start = time.perf_counter(), time.process_time()

  def done(self, **counts):
    """Stops the clocks and says what was done: `loss`, `generated` tokens, `updates`."""
    seconds, cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
    self._say(seconds=seconds, cpu_seconds=cpu, peak_bytes=peak_bytes(), **counts)

  def serve(self, run, facts, warm_up=2):
    """Runs `run() -> counts` as a warm-up, then once for each order; `facts()` are said between."""
    for _ in range(warm_up):
      run()
    self.ready(**facts())
    while True:
      self.wait()
      self.done(**run())


class Steps:
  """Order of a loop that is not ours: call `end` at the end of each of its steps."""

  def __init__(self, peer, warm_up=2, **facts):
    self._peer, self._left, self._facts = peer, warm_up, facts

  def end(self, **counts):
    """Answers the order for this step, and waits for the next one."""
    self._left -= 1
    if self._left > 0:
      return
    if self._left == 0:
      self._peer.ready(**self._facts)
    else:
      self._peer.done(**counts)
    self._peer.wait()


def peak_bytes():
  """Peak memory of this process."""
  with open("/proc/self/status", encoding="utf-8") as file:
    return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
