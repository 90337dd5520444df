"""A run that hangs hears signals and looks at the time."""

import os
import re
import signal
import threading
import time

import pytest

from rlhf_jax import entry, watch


class Hanging:
  """A watch over a call that hangs until the watch ends the process."""

  def __init__(self, monkeypatch, grace=30.0, hang=0.0):
    self.code, self._over = None, threading.Event()
    monkeypatch.setattr(watch.os, "_exit", self._leave)
    monkeypatch.setattr(watch, "_UNWIND_SECONDS", 0.2)
    self.watch = watch.Watch(grace, hang, lambda: "the last checkpoint is step 3")

  def _leave(self, code):
    self.code = code
    self._over.set()

  def hang(self, *numbers, pause=0.0):
    """Sends signals and hangs in a call that no handler interrupts."""
    sender = threading.Thread(target=self._send, args=(numbers, pause))
    sender.start()
    assert self._over.wait(20), "it hangs"
    sender.join()

  def _send(self, numbers, pause):
    for number in numbers:
      time.sleep(pause)
      os.write(self.watch._writer.fileno(), bytes([number]))


@pytest.mark.parametrize(
  ("times", "numbers", "why"),
  [
    ({"grace": 0.2}, [signal.SIGTERM], "the run has not stopped in --grace_seconds=0.2"),
    ({"grace": 0.2}, [signal.SIGINT], "the run has not stopped in --grace_seconds=0.2"),
    ({"grace": 0.2}, [signal.SIGTERM] * 3, "the run has not stopped in --grace_seconds=0.2"),
    ({"hang": 0.2}, [], "no step has ended in --hang_seconds=0.2"),
    ({"hang": 0.2}, [signal.SIGUSR1, signal.SIGCHLD], "no step has ended in --hang_seconds=0.2"),
  ],
)
def test_it_says_where_it_hangs(monkeypatch, capfd, times, numbers, why):
  hanging = Hanging(monkeypatch, **times)
  with hanging.watch:
    hanging.hang(*numbers)
  assert hanging.code == 75
  assert hanging.watch.stop.is_set() == bool({signal.SIGTERM, signal.SIGINT} & {*numbers})
  *dump, last = capfd.readouterr().err.splitlines()
  place = rf"it hangs in {re.escape(__file__)}:\d+, hang"
  assert re.fullmatch(rf"{why}; {place}; the last checkpoint is step 3", last)
  assert any("watch_test.py" in line and "in hang" in line for line in dump)
  assert sum("most recent call first" in line for line in dump) >= 2


@pytest.mark.parametrize(
  ("numbers", "pause", "code"),
  [
    ([signal.SIGINT, signal.SIGINT], 0.0, 130),
    ([signal.SIGTERM, signal.SIGINT], 0.0, 130),
    ([signal.SIGTERM, signal.SIGTERM], 0.4, 75),
    ([signal.SIGINT, signal.SIGTERM], 0.4, 75),
  ],
)
def test_a_second_signal_ends_what_hangs(monkeypatch, capfd, numbers, pause, code):
  monkeypatch.setattr(watch, "_REPEAT_SECONDS", 0.2)
  hanging = Hanging(monkeypatch)
  with hanging.watch:
    hanging.hang(*numbers, pause=pause)
  assert hanging.code == code
  last = capfd.readouterr().err.splitlines()[-1]
  assert last == "stopped at once; the last checkpoint is step 3"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_second_signal_ends_what_does_not_hang(monkeypatch, number, code):
  monkeypatch.setattr(watch, "_REPEAT_SECONDS", -1.0)
  with pytest.raises(watch.Interrupted) as e:
    with watch.Watch(30.0, 0.0, lambda: "there is no checkpoint yet"):
      for _ in range(2):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
      raise AssertionError("it went on")
  assert entry.verdict(e.value) == (code, "stopped at once; there is no checkpoint yet")


def test_a_signal_that_comes_twice_is_one(monkeypatch):
  hanging = Hanging(monkeypatch)
  with hanging.watch as watcher:
    for _ in range(3):
      os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    assert watcher.stop.is_set()
  assert hanging.code is None


def test_steps_that_end_are_let_be(monkeypatch):
  hanging = Hanging(monkeypatch, hang=1.0)
  with hanging.watch as watcher:
    for _ in range(15):
      time.sleep(0.1)
      watcher.beat()
  assert hanging.code is None


def test_nothing_is_left_behind():
  before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  threads = threading.active_count()
  with watch.Watch(30.0, 5.0, str):
    assert threading.active_count() == threads + 1
  assert threading.active_count() == threads
  assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
  assert signal.set_wakeup_fd(-1) == -1


def test_a_thread_may_train():
  def train():
    with watch.Watch(30.0, 5.0, str) as watcher:
      assert not watcher.stop.is_set()
    done.append(True)

  done = []
  thread = threading.Thread(target=train)
  thread.start()
  thread.join()
  assert done
