"""The watch over the steps of a run: signals that stop it, and steps that never end."""

import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Self

from rlhf_jax import processes

EX_INTERRUPTED = 130  # Of a shell, for Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds in which a second SIGTERM is the first again: a cluster may send it to the launcher, which
# hands it on, and to the process.
_REPEAT_SECONDS = 2.0
_UNWIND_SECONDS = 2.0  # What the main thread may take to end after a second signal.
_STOPPING = b"\nstopping after this step, which is saved; Ctrl-C again stops at once\n"


class Interrupted(KeyboardInterrupt):
  """A second signal came: the run ends at once, as if it were killed."""

  def __init__(self, message: str, exit_code: int):
    super().__init__(message)
    self.exit_code = exit_code


class _Requests:
  """The signals of a run. The main thread counts them, and the watch does, which never hangs."""

  def __init__(self):
    self._since: float | None = None

  def is_another(self, number: int) -> bool:
    """Takes a signal and returns whether it asks for more than the ones before it."""
    if self._since is None:
      self._since = time.monotonic()
      return False
    return number == signal.SIGINT or time.monotonic() - self._since > _REPEAT_SECONDS

  def overdue(self, seconds: float) -> float:
    """Time at which the patience after the first signal ends."""
    return float("inf") if self._since is None else self._since + seconds


class Watch:
  """Sees signals and the time in a thread of its own, also while a step hangs.

  The first SIGTERM or Ctrl-C asks the run to stop, a second one ends it at once. If the run has not
  ended `grace_seconds` after the first one, or if no step ends in `hang_seconds`, the process says
  where it hangs and exits with the code of a run that may be started again.

  Attributes:
    stop: Event that the first signal sets.
  """

  def __init__(self, grace_seconds: float, hang_seconds: float, last: Callable[[], str]):
    """Watches nothing yet.

    Args:
      grace_seconds: Seconds from the first signal to the end.
      hang_seconds: Seconds from one `beat` to the next; 0 is any number.
      last: Function that names the last checkpoint.
    """
    self.stop = threading.Event()
    self._grace, self._hang, self._last = grace_seconds, hang_seconds, last
    self._seen, self._heard = _Requests(), _Requests()
    self._leave_at = float("inf")
    self._leave_code = os.EX_TEMPFAIL
    self._main = threading.get_ident()
    self.beat()

  def beat(self) -> None:
    """Says that a step has ended."""
    self._beat = time.monotonic()

  def __enter__(self) -> Self:
    self._reader, self._writer = socket.socketpair()
    self._writer.setblocking(False)
    with contextlib.ExitStack() as stack:
      stack.callback(self._reader.close)
      stack.callback(self._writer.close)
      if threading.current_thread() is threading.main_thread():
        # The interpreter writes the number of a signal at once, and calls a handler after the
        # call that is under way, which may be the one that hangs.
        fd = self._writer.fileno()
        before = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
        stack.callback(signal.set_wakeup_fd, before)
        for number in _SIGNALS:
          stack.callback(signal.signal, number, signal.signal(number, self._handle))
      thread = threading.Thread(target=self._watch, name="watch", daemon=True)
      thread.start()
      stack.callback(thread.join)
      stack.callback(self._writer.send, b"\0")  # No signal has this number.
      self._stack = stack.pop_all()
    return self

  def __exit__(self, *unused: Any) -> None:
    self._stack.close()

  def _handle(self, number: int, frame: object) -> None:
    """In the main thread, between two instructions."""
    del frame
    self.stop.set()
    if self._heard.is_another(number):
      code = EX_INTERRUPTED if number == signal.SIGINT else os.EX_TEMPFAIL
      raise Interrupted(f"stopped at once; {self._last()}", code)

  def _watch(self) -> None:
    while True:
      deadlines = (self._leave_at, self._seen.overdue(self._grace), self._overdue())
      left = min(deadlines) - time.monotonic()
      wait = None if left == float("inf") else max(0.0, left)
      if select.select([self._reader], [], [], wait)[0]:
        numbers = self._reader.recv(64)
        if b"\0" in numbers:
          return
        for number in numbers:
          if number in _SIGNALS:
            self._ask(number)
      now = time.monotonic()
      if self._leave_at <= now:
        return self._leave("stopped at once", self._leave_code)
      if self._overdue() <= now:
        return self._give_up(f"no step has ended in --hang_seconds={self._hang:g}")
      if self._seen.overdue(self._grace) <= now:
        return self._give_up(f"the run has not stopped in --grace_seconds={self._grace:g}")

  def _overdue(self) -> float:
    return self._beat + self._hang if self._hang else float("inf")

  def _ask(self, number: int) -> None:
    self.stop.set()
    if self._seen.is_another(number):
      if not (hasattr(sys, "ps1") or "ipykernel" in sys.modules):  # A notebook lives on.
        self._leave_at = time.monotonic() + _UNWIND_SECONDS
        self._leave_code = EX_INTERRUPTED if number == signal.SIGINT else os.EX_TEMPFAIL
    elif number == signal.SIGINT and processes.is_first():
      os.write(2, _STOPPING)

  def _give_up(self, why: str) -> None:
    os.write(2, b"\n")
    faulthandler.dump_traceback(2, all_threads=True)
    self._leave(f"{why}; it hangs in {self._place()}", os.EX_TEMPFAIL)

  def _leave(self, why: str, code: int) -> None:
    """Ends the process as a kill would, which loses what follows the last checkpoint only."""
    os.write(2, f"{why}; {self._last()}\n".encode(errors="replace"))
    os._exit(code)

  def _place(self) -> str:
    """Line of the main thread that is under way, outside of libraries if there is one."""
    frame = sys._current_frames().get(self._main)
    lines = traceback.extract_stack(frame)
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen")
    ours = [line for line in lines if not line.filename.startswith(libraries)]
    line = (ours or lines)[-1]
    return f"{line.filename}:{line.lineno}, {line.name}"
