import contextlib
import json
import os
import pathlib
import threading
import time

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoint, processes, writers
from rlhf_jax import workdir as workdir_lib
from tests.testing import forked, wait_for


def hold_lock(workdir: pathlib.Path) -> None:
  with workdir_lib.run_lock(workdir):
    (workdir / "held").touch()
    time.sleep(60)


def test_lock_names_its_holder_and_dies_with_it(tmp_path):
  child = forked(hold_lock, tmp_path)
  try:
    wait_for((tmp_path / "held").exists, 60, pause=0.01)
    locked = pytest.raises(workdir_lib.LockedError, match=f"pid {child.pid} on host .* since 2")
    with locked as e, workdir_lib.run_lock(tmp_path):
      pass
    assert e.value.exit_code == 73
  finally:
    child.kill()
    child.join()
  locked = pytest.raises(workdir_lib.LockedError, match=f"pid {os.getpid()} ")
  with workdir_lib.run_lock(tmp_path), locked, workdir_lib.run_lock(tmp_path):
    pass
  with workdir_lib.run_lock(tmp_path):
    pass


def released_after(seconds, child):
  """Kills the process that holds a lock, later."""
  timer = threading.Timer(seconds, child.kill)
  timer.start()
  return timer


@pytest.mark.parametrize("way", ["crashed", "alive", "patient"])
def test_a_lock_that_may_be_released_is_waited_for(tmp_path, monkeypatch, caplog, way):
  """A file server keeps the lock of a host that has crashed for a while."""
  child = forked(hold_lock, tmp_path)
  try:
    wait_for((tmp_path / "held").exists, 60, pause=0.01)
    if way != "patient":
      owner = json.loads((tmp_path / ".lock").read_text())
      (tmp_path / ".lock").write_text(json.dumps(owner | {"host": "another"}))
    monkeypatch.setattr(workdir_lib, "_LEASE_SECONDS", {"crashed": 60.0}.get(way, 0.1))
    timer = released_after(1000 if way == "alive" else 1, child)
    began = time.monotonic()
    with caplog.at_level("WARNING"), contextlib.ExitStack() as stack:
      if way == "alive":
        stack.enter_context(pytest.raises(workdir_lib.LockedError, match="on host another since"))
      with workdir_lib.run_lock(tmp_path, patient=way == "patient"):
        assert not child.is_alive() or not child.join(1)
    assert time.monotonic() - began < 30
    assert f"{tmp_path} is in use by pid {child.pid} on host" in caplog.text
    assert ("in case that host is gone" in caplog.text) == (way != "patient")
  finally:
    timer.cancel()
    child.kill()
    child.join()


def test_a_lock_that_was_left_is_taken_over_with_a_word(tmp_path, caplog):
  (tmp_path / ".lock").write_text('{"host": "h", "pid": 7, "start": "2026"}')
  with caplog.at_level("WARNING"), workdir_lib.run_lock(tmp_path):
    pass
  assert "was not closed by pid 7 on host h since 2026" in caplog.text
  caplog.clear()
  with caplog.at_level("WARNING"), workdir_lib.run_lock(tmp_path):
    pass
  assert not caplog.text


@pytest.mark.parametrize("again", [None, "folder", "run"])
def test_a_run_whose_folder_is_gone_writes_nothing_more(tmp_path, again):
  run = tmp_path / "run"
  with contextlib.ExitStack() as stack:
    stack.enter_context(workdir_lib.run_lock(run))
    writer = stack.enter_context(
      contextlib.closing(writers.JsonlWriter(run / "metrics.jsonl", resume_step=None))
    )
    writer.write(1, {"loss": 1.0})
    saver = stack.enter_context(checkpoint.Checkpointer(run / "checkpoints"))
    saver.save(1, {"x": {"a": np.ones(2, np.float32)}}, {})
    saver.wait()
    run.rename(tmp_path / "removed")
    if again == "folder":
      run.mkdir()
    if again == "run":  # Another one starts in the same place.
      workdir_lib._LOCKED.pop(run)
      run.mkdir()
      (run / ".lock").touch()
      workdir_lib._LOCKED[run] = os.open(tmp_path / "removed" / ".lock", os.O_RDONLY)
    for write in (
      lambda: workdir_lib.atomic_write(run / "summary.json", "{}"),
      lambda: workdir_lib.atomic_write(run / "plots" / "loss.png", b""),
      lambda: writer.write(2, {"loss": 1.0}),
      lambda: writer.table(2, "samples", [{"a": 1}]),
      lambda: saver.save(2, {"x": {"a": np.ones(2, np.float32)}}, {}),
    ):
      with pytest.raises(workdir_lib.LostError, match="was removed, or replaced") as e:
        write()
      assert e.value.exit_code == 74
    assert sorted(p.name for p in run.glob("*")) == ([".lock"] if again == "run" else [])
    workdir_lib.atomic_write(tmp_path / "elsewhere.json", "{}")


def test_lock_of_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  locked = pytest.raises(workdir_lib.LockedError, match="cannot be written")
  with locked, workdir_lib.run_lock(tmp_path / "file" / "run"):
    pass


def test_identity(tmp_path):
  workdir_lib.check_identity(tmp_path / "run", {"model": "tiny", "shape": (2, 3), "old": 1})
  workdir_lib.check_identity(tmp_path / "run", {"shape": [2, 3], "model": "tiny", "old": 1})
  with pytest.raises(workdir_lib.WorkdirError) as e:
    workdir_lib.check_identity(tmp_path / "run", {"model": "base", "shape": [2, 3], "new": None})
  assert e.value.exit_code == 78
  assert str(e.value) == (
    f'--workdir={tmp_path / "run"} holds another run: model was "tiny", now "base"; new was absent,'
    " now null; old was 1, now absent; use another --workdir, or what it was"
  )


def test_an_identity_names_the_flags_that_differ_and_nothing_else(tmp_path):
  first = {"script": "dpo", "--a": 1, "--b": "x" * 200, "files of --c": "a" * 64, "data": "b" * 64}
  first |= {f"--m{i}": i for i in range(9)}
  workdir_lib.check_identity(tmp_path, first)
  for changes, words in (
    ({"--a": 2}, "--a was 1, now 2"),
    ({"--a": 2, "data": "c" * 64}, "--a was 1, now 2"),
    ({"files of --c": "d" * 64, "data": "c"}, "files of --c was aaaaaaaa, now dddddddd"),
    ({"data": "c" * 64}, "data was bbbbbbbb, now cccccccc"),
    ({"script": "ppo", "--a": 2, "data": "c"}, 'script was "dpo", now "ppo"'),
    ({"--b": "y" * 200}, f'--b was "{"x" * 56}..., now "{"y" * 56}...'),
    (
      {f"--m{i}": -1 for i in range(9)},
      "--m0 was 0, now -1; --m1 was 1, now -1; --m2 was 2, now -1; --m3 was 3, now -1; and 5 more",
    ),
  ):
    with pytest.raises(workdir_lib.WorkdirError) as e:
      workdir_lib.check_identity(tmp_path, first | changes)
    given = (
      f"--workdir={tmp_path} holds another run: {words}; use another --workdir, or what it was"
    )
    assert str(e.value) == given


@pytest.mark.parametrize("text", ["", "garbage", "[]", "null", "3", "[" * 100_000])
def test_an_identity_that_cannot_be_read(tmp_path, text):
  (tmp_path / "identity.json").write_text(text)
  with pytest.raises(workdir_lib.WorkdirError, match="identity.json .*use another --workdir") as e:
    workdir_lib.check_identity(tmp_path, {"script": "dpo"})
  assert "\n" not in str(e.value)


def test_files_digest_follows_names_and_contents(tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  one.write_text("a"), two.write_text("b")
  digest = workdir_lib.files_digest([one, two])
  assert digest == workdir_lib.files_digest([one, two]) != workdir_lib.files_digest([two, one])
  times = one.stat()
  one.write_text("c")  # As long as before.
  os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))
  assert workdir_lib.files_digest([one, two]) != digest


def test_paths(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert workdir_lib.local_path("~/runs") == tmp_path / "runs"
  assert workdir_lib.local_path("~") == tmp_path
  for path in ("", " ", "s3://bucket/run", "~nobody-of-this-name/x"):
    with pytest.raises(workdir_lib.WorkdirError):
      workdir_lib.local_path(path)


@pytest.fixture
def second_of_two(monkeypatch):
  """Plays the second process: gives it what the first one says, and records what it says."""
  said, first = [], []
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes, "agree", lambda function: first[-1])
  monkeypatch.setattr(processes, "gather", lambda text: [said.append(text) or "", text])
  return first, said


def test_processes_with_other_data_or_settings_are_refused(tmp_path, second_of_two):
  first, said = second_of_two
  first.append({"data": "abc", "seed": 0})
  workdir_lib.check_identity(tmp_path, {"data": "abc", "seed": 0})
  with pytest.raises(workdir_lib.WorkdirError, match='data was "abc", now "abd"'):
    workdir_lib.check_identity(tmp_path, {"data": "abd", "seed": 0})
  assert said[0] == "" and "abd" in said[1]


def test_processes_with_another_folder_are_refused(tmp_path, second_of_two, monkeypatch):
  first, _ = second_of_two
  monkeypatch.setattr(workdir_lib, "_SEEN_SECONDS", 0.0)
  first.append('{"host": "a", "pid": 1, "start": "now"}')
  for content in (None, '{"host": "b", "pid": 1, "start": "now"}'):
    if content:
      (tmp_path / ".lock").write_text(content)
    with pytest.raises(workdir_lib.LockedError, match=f"--workdir={tmp_path} is another folder on"):
      with workdir_lib.run_lock(tmp_path):
        raise AssertionError("it was opened")
  (tmp_path / ".lock").write_text(first[-1])
  with workdir_lib.run_lock(tmp_path):
    pass


def test_atomic_write_replaces_whole_files(tmp_path):
  path = tmp_path / "x.json"
  workdir_lib.atomic_write(path, json.dumps([1]))
  workdir_lib.atomic_write(path, "é")
  assert path.read_text(encoding="utf-8") == "é"
  assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
  path = tmp_path / "file"
  workdir_lib.atomic_write(path, "old")

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(workdir_lib.os, "fsync", fail)
  with pytest.raises(OSError, match="disk full"):
    workdir_lib.atomic_write(path, "new")
  assert path.read_text() == "old"
  assert [p.name for p in tmp_path.iterdir()] == ["file"]
