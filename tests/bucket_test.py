"""Runs in a bucket, against a small server of its API at 127.0.0.1."""

import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import pytest

from experiments.lab import exporting, line_files, models
from rlhf_jax import bucket, checkpoint, data, entry, flags, loop, writers
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.models import hf
from tests import bucket_server, loop_test
from tests.testing import full

RUN = "gs://runs/team/ppo"
CONFIG = loop.RunConfig(steps=6, batch_size=8, log_every=3, checkpoint_every=2)
STEPS = "team/ppo/checkpoints/"


@pytest.fixture(scope="module")
def server():
  with bucket_server.Server() as found:
    found.start()
    yield found
    found.shutdown()


@pytest.fixture
def machine(server, tmp_path, monkeypatch):
  """A function that makes this process one of a machine without copies, and an empty bucket."""
  server.objects.clear()
  server.history.clear()
  server.refuses = 0
  monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
  monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
  monkeypatch.setattr(bucket, "_RENEW_SECONDS", 0.1)
  monkeypatch.setattr(bucket, "_STALE_SECONDS", 0.6)

  def move(name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
    workdir_lib._copied.cache_clear()
    bucket.pull_file.cache_clear()
    return bucket.folder_of(RUN)

  move("first")
  return move


def content(server, name):
  return server.objects[f"team/ppo/{name}"][1]


def test_a_run_goes_on_from_each_state_that_a_lost_machine_can_leave(machine, server, tmp_path):
  folder = machine("first")
  state = loop_test.fit(RUN, CONFIG)
  expected = state, loop_test.lines(folder)
  assert {p.name for p in (folder / "checkpoints").iterdir()} >= {"4", "6", "6.digest.json"}
  copied = {name.removeprefix("team/ppo/") for name in server.objects}
  written = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
  assert copied == written - {".lock", ".bucket.json", ".bucket.lock"}
  assert content(server, "metrics.jsonl") == (folder / "metrics.jsonl").read_bytes()

  states, left, known = [*server.history], [], []
  for objects in states:
    record = objects.get("team/ppo/checkpoints.json", (0, b'{"newest": 0}'))[1]
    names = {name for name in objects if name.startswith(STEPS)}
    if names not in left:  # Every order of files and manifests that occurred.
      left.append(names)
      known.append((json.loads(record)["newest"], objects))
  assert len(left) > 20
  for number, (newest, objects) in enumerate(known):
    server.objects.clear()
    server.objects.update({name: found for name, found in objects.items() if ".lock" not in name})
    if number % 8 == 0:
      place = machine(f"look-{number}") / "checkpoints"
      bucket.pull(place.parent)
      with checkpoint.Checkpointer(place) as saver:
        restored = saver.restore({"state": loop_test.start_state()})
        assert (restored.step if restored else 0) >= newest
    if number == len(known) // 2:
      folder = machine("second")
      assert folder.parts[-4:] == ("buckets", "runs", "team", "ppo") and not folder.exists()
      loop_test.assert_same_end(folder, loop_test.fit(RUN, CONFIG), expected)


def test_what_a_killed_run_has_not_copied_has_not_happened(machine, server):
  folder = machine("first")
  with workdir_lib.run_lock(RUN):
    workdir_lib.atomic_write(folder / "a.json", "1")
    workdir_lib.atomic_write(folder / "checkpoints" / "2" / "x", "2")
  (folder / "a.json").write_text("9")
  (folder / "later.json").write_text("9")
  (folder / "checkpoints" / "2" / "x").unlink()
  with workdir_lib.run_lock(RUN):
    assert (folder / "a.json").read_text() == "1" and not (folder / "later.json").exists()
    assert (folder / "checkpoints" / "2" / "x").read_text() == "2"
    (folder / "a.json").unlink()
  assert "team/ppo/a.json" not in server.objects


@pytest.fixture
def other(machine, server):
  """The lock of a run on another machine."""
  lock = bucket._Lock(RUN)
  lock.acquire()
  yield lock
  lock.release()


def test_a_run_that_is_alive_elsewhere_is_named(other, server):
  before = dict(server.objects)
  with pytest.raises(workdir_lib.LockedError, match=f"pid {os.getpid()} on host .* since 2") as e:
    with workdir_lib.run_lock(RUN):
      raise AssertionError("it was opened")
  assert e.value.exit_code == 73 and "--workdir=gs://runs/team/ppo is in use by" in str(e.value)
  assert server.objects.keys() == before.keys()


def test_a_lock_of_another_machine_can_be_waited_for(machine, server):
  lock = bucket._Lock(RUN)
  lock.acquire()
  threading.Timer(1.0, lock.release).start()
  with workdir_lib.run_lock(RUN, patient=True):
    assert lock._done.is_set()
  assert "team/ppo/.lock" not in server.objects


def test_answers_and_labels_outlive_the_machine(machine, server, monkeypatch):
  folder = machine("first")
  monkeypatch.setattr(bucket, "_SPACED_SECONDS", 0.0)
  with workdir_lib.run_lock(RUN):
    for n in range(3):
      line_files.append_lines(folder / "responses.jsonl", [{"n": n}])
      assert content(server, "responses.jsonl").count(b"\n") == n + 1


def test_metrics_do_not_wait_for_a_checkpoint_that_is_copied(machine, server, monkeypatch):
  folder = machine("first")
  monkeypatch.setattr(bucket, "_SPACED_SECONDS", 0.0)
  begun, go, send = threading.Event(), threading.Event(), bucket._Copy._send

  def slow(self, name):
    if name.startswith("checkpoints/"):
      begun.set()
      assert go.wait(60)
    return send(self, name)

  monkeypatch.setattr(bucket._Copy, "_send", slow)
  with workdir_lib.run_lock(RUN):
    writer = writers.JsonlWriter(folder / "metrics.jsonl", resume_step=None)
    workdir_lib.atomic_write(folder / "checkpoints" / "8" / "x", "8")
    copying = threading.Thread(target=bucket.push, args=(folder / "checkpoints",))
    copying.start()
    assert begun.wait(60)
    for step in (1, 2):
      writer.write(step, {"loss": 1.0})  # It returns, though the copy goes on.
    assert "team/ppo/metrics.jsonl" not in server.objects
    go.set()
    copying.join()
    writer.write(3, {"loss": 1.0})
    assert content(server, "metrics.jsonl") == (folder / "metrics.jsonl").read_bytes()
    writer.close()


OWNERS = [
  {"host": "gone", "pid": 7, "start": "2026", "token": "x"},
  {"host": "here", "pid": 2**22 + 1, "start": "2026", "machine": bucket._machine()},
  {},
]


@pytest.mark.parametrize("owner", OWNERS)
def test_a_lock_that_was_left_is_taken_over_with_a_word(machine, server, caplog, owner):
  server.put("team/ppo/.lock", json.dumps(owner).encode())
  with caplog.at_level("WARNING"), workdir_lib.run_lock(RUN):
    assert json.loads(content(server, ".lock"))["pid"] == os.getpid()
  assert f"was left by pid {owner.get('pid')} on host {owner.get('host')}" in caplog.text
  assert "team/ppo/.lock" not in server.objects


def test_a_run_that_was_taken_over_writes_nothing_more(machine, server):
  folder = machine("first")
  with workdir_lib.run_lock(RUN):
    workdir_lib.atomic_write(folder / "a.json", "1")
    bucket.push(folder)
    server.put("team/ppo/.lock", b"{}")  # As if this process had been stopped for long.
    bucket.push(folder)
    with pytest.raises(workdir_lib.LostError, match="was taken over by another process") as e:
      workdir_lib.atomic_write(folder / "a.json", "2")
    assert e.value.exit_code == 74
    (folder / "a.json").write_text("2")
  assert content(server, "a.json") == b"1" and content(server, ".lock") == b"{}"


def test_a_folder_that_is_removed_here_deletes_nothing_there(machine, server, tmp_path):
  folder = machine("first")
  with workdir_lib.run_lock(RUN):
    workdir_lib.atomic_write(folder / "a.json", "1")
    bucket.push(folder)
    folder.rename(tmp_path / "removed")
    with pytest.raises(workdir_lib.LostError):
      workdir_lib.atomic_write(folder / "b.json", "2")
  assert content(server, "a.json") == b"1" and not folder.exists()


@pytest.mark.parametrize("code", [403, 404, 401])
def test_a_bucket_that_cannot_be_used_is_named_in_one_line(machine, server, code):
  server.refuses = code
  with pytest.raises(bucket.BucketError) as e, workdir_lib.run_lock(RUN):
    raise AssertionError("it was opened")
  code, message = entry.verdict(e.value) or (0, "")
  assert code == 74 and "gs://runs/team/ppo cannot be read or written" in message


@full
def test_a_bucket_that_fails_later_ends_the_run_and_loses_nothing(machine, server):
  step = loop_test.quadratic

  def refuses(*args):
    server.refuses = 403
    return step(*args)

  with pytest.raises((bucket.BucketError, checkpoint.CheckpointWriteError)) as e:
    loop_test.fit(RUN, CONFIG, refuses)
  assert e.value.exit_code == 74
  server.refuses = 0
  machine("second")
  assert int(loop_test.fit(RUN, CONFIG)["step"]) == CONFIG.steps


def test_what_others_read_and_write_in_it(machine, server):
  folder = machine("first")
  workdir_lib.atomic_write(folder / "flags", "--seed=1\n")  # After the run, so without its lock.
  assert content(server, "flags") == b"--seed=1\n"
  for name in ("export/config.json", "checkpoints/8/x", "checkpoints/8.digest.json"):
    server.put(f"team/ppo/{name}", b"{}")
  folder = machine("second")
  assert models.finished_folder(RUN) == folder / "export"
  assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["8.digest.json"]
  (folder / ".tokens").mkdir()
  (folder / ".tokens" / "rows").write_text("tokens")
  bucket.pull(folder / "checkpoints")
  assert (folder / "checkpoints" / "8" / "x").exists()
  with workdir_lib.run_lock(folder / "sub"):  # Such as a run of a chain.
    (folder / "sub" / "file").write_text("1")
    bucket.pull(folder)  # It leaves what another run works on as it is.
    assert (folder / "sub" / "file").exists() and (folder / ".tokens" / "rows").exists()
  assert content(server, "sub/file") == b"1"


def test_a_step_of_a_run_is_a_start(machine, server, monkeypatch):
  asked = []
  monkeypatch.setattr(exporting, "export_step", lambda folder, step: asked.append((folder, step)))
  server.put("team/ppo/run.json", b"{}")
  server.put("team/ppo/checkpoints/8.digest.json", b'{"step": 8, "score": {"eval/loss": 1.5}}')
  server.put("team/ppo/checkpoints/8/x", b"{}")
  for name in ("first", "second"):
    folder = machine(name)
    for step in ("@3", "@best", "@3"):  # The first time makes a folder of this name.
      models.finished_folder(RUN + step)
    assert asked == [(folder, 3), (folder, 8), (folder, 3)] and not asked.clear()
  for path, message in (
    (f"{RUN}@last", f"{RUN}: its step must be a number or best, got 'last'"),
    ("gs://runs/team/none", "gs://runs/team/none: there is no such folder"),
    ("gs://runs/team/none@best", "gs://runs/team/none: no checkpoint has a score"),
  ):
    for _ in range(2):
      with pytest.raises((hf.ModelFolderError, flags.UsageError), match=f"^{message}"):
        models.finished_folder(path)


def test_files_that_vanish_while_they_are_copied_are_left_out(machine, server, monkeypatch):
  folder = machine("first")
  walk, read = os.walk, pathlib.Path.read_bytes

  def vanishing(place):
    for found in walk(place):
      shutil.rmtree(folder / "step", ignore_errors=True)  # As when a save is renamed.
      yield found

  def read_bytes(path):
    if path.name == "gone.json":
      path.unlink()
    return read(path)

  with workdir_lib.run_lock(RUN):
    for name in ("a.json", "gone.json", "step/d/x"):
      workdir_lib.atomic_write(folder / name, "1")
    with monkeypatch.context() as patches:
      patches.setattr(os, "walk", vanishing)
      patches.setattr(pathlib.Path, "read_bytes", read_bytes)
      bucket.push(folder)
    assert {name for name in server.objects if ".lock" not in name} == {"team/ppo/a.json"}


def test_no_object_is_written_outside_of_the_folder(machine, server, tmp_path):
  folder = machine("first")
  for name in (f"/{tmp_path}/a", "../b", "x/../../c", "x//d", "x/", ".lock.d/e", "./f", "f/.lock"):
    server.put(f"team/ppo/{name}", b"1")
  bucket.pull(folder)
  found = [path for path in tmp_path.rglob("*") if path.is_file()]
  kept = {path.relative_to(folder).as_posix() for path in found if folder in path.parents}
  assert kept == {".bucket.json", ".bucket.lock", ".lock.d/e"} and len(found) == len(kept)


def test_files_of_data_are_read_as_they_are_there(machine, server):
  lines = lambda *words: "".join(json.dumps({"text": x}) + "\n" for x in words).encode()  # noqa: E731
  read = lambda spec: [row.fields["text"] for row in data.read_file(spec)]  # noqa: E731
  place = machine("first").parent
  server.put("team/a.jsonl", lines("a", "b"))
  server.put("top.jsonl.gz", gzip.compress(lines("c")))
  server.put("team/ppo/pairs.jsonl", lines("d"))
  spec = "gs://runs/team/a.jsonl:1,gs://runs/top.jsonl.gz:2"
  assert read(spec) == ["a", "b", "c"] and read("gs://runs/team/ppo/pairs.jsonl") == ["d"]
  assert data.paths_of(spec)[0] == os.fspath(place / "a.jsonl")

  server.put("team/a.jsonl", lines("new"))
  assert read(spec) == ["a", "b", "c"]  # What a process has read stays.
  unchanged = (place.parent / "top.jsonl.gz").stat().st_ino
  bucket.pull_file.cache_clear()
  assert read(spec) == ["new", "c"]
  assert (place.parent / "top.jsonl.gz").stat().st_ino == unchanged  # It was not sent again.

  bucket.pull_file.cache_clear()
  with workdir_lib.run_lock(RUN):  # Files of a run that goes on are its own.
    (place / "ppo" / "pairs.jsonl").write_bytes(lines("mine"))
    assert read("gs://runs/team/ppo/pairs.jsonl") == ["mine"]
  assert content(server, "pairs.jsonl") == lines("mine")

  server.put("team/a.jsonl", None)
  bucket.pull_file.cache_clear()
  with pytest.raises(data.DataError, match=r"gs://runs/team/a\.jsonl: the bucket has no such obj"):
    read(spec)
  server.refuses = 403
  with pytest.raises(bucket.BucketError, match="gs://runs cannot be read"):
    read("gs://runs/other.jsonl")


@pytest.mark.parametrize(
  "name", ["gs://", "gs://b", "gs://b/", "gs://b/../c", "gs://B_/c", "gs://b//c"]
)
def test_names_of_no_folder(name):
  with pytest.raises(bucket.BucketNameError, match="write gs://BUCKET/FOLDER"):
    workdir_lib.local_path(name)


# They look at all files of the folder, undo what the bucket then brings back, or count a step that
# was killed before it was copied.
_LOCAL = (
  "checkpoints_that_were_deleted or steps_of_another_run_are_not or test_paths or atomic_write"
  " or urls or keeps_the_newest or failed_write or killed_while_saving"
)


@full
@pytest.mark.parametrize("file", ["workdir_test.py", "loop_test.py", "checkpoint_test.py"])
def test_the_tests_of_local_folders(server, machine, tmp_path, file):
  folder = bucket.folder_of("gs://runs/tests")
  folder.mkdir(parents=True)
  tests = pathlib.Path(__file__).parent
  command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"-k=not ({_LOCAL})"]
  command += [f"--basetemp={folder / 'base'}", str(tests / file)]
  done = subprocess.run(command, cwd=tests.parent, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout[-3000:]
  assert server.history
