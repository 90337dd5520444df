"""Several processes with a device each are one process, also halfway through a run."""

import errno
import functools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoint, processes, writers
from rlhf_jax import workdir as workdir_lib
from tests.experiments.small_runs import small
from tests.testing import full, wait_for

pytestmark = pytest.mark.slow

STEPS = 12
# SFT and PPO split the batch over the processes, DPO the model; four processes of DPO split both.
MESHES = {
  ("sft", 2): "data:2",
  ("ppo", 2): "data:2",
  ("ppo", 4): "data:4",
  ("dpo", 2): "tensor:2",
  ("dpo", 4): "data:2,tensor:2",
}


def first_flags(script, sft_run, devices=2):
  every = (f"--steps={STEPS}", "--checkpoint_every=3", "--log_every=1")
  own = ("--reward.name=gold", "--rollout.packed_length=64") if script == "ppo" else ()
  mesh = MESHES.get((script, devices), "data:1")
  return (f"--init_from={sft_run}", f"--mesh={mesh}", *every, *own)


@pytest.fixture(scope="session")
def whole(shared_run, sft_run):
  """Script -> its run in one process, this one, which nothing interrupts."""

  def run(script, devices=2) -> pathlib.Path:
    flags = first_flags(script, sft_run, devices)
    return shared_run(f"whole_{script}_{devices}", script, *flags, devices=devices)

  return run


def metrics(workdir):
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in row.items() if "second" not in k and "time/" not in k} for row in rows]


def assert_same_run(workdir, whole):
  """Bitwise: the sum of two numbers does not depend on their order, nor on who adds them."""
  assert metrics(workdir) == metrics(whole)
  for path in ("export/model.safetensors", "summary.json"):
    assert (workdir / path).read_bytes() == (whole / path).read_bytes(), path


def texts_of(workdir):
  return {path.name: path.read_text() for path in (workdir / "samples").iterdir()}


def test_one_process_ends_what_two_began(tmp_path, start_group, run_script, whole, sft_run):
  flags = first_flags("ppo", sft_run)
  group = start_group("ppo", tmp_path / "run", *flags)
  deadline = time.monotonic() + 240
  while (
    not (tmp_path / "run" / "checkpoints" / "3.digest.json").exists()
    and time.monotonic() < deadline
  ):
    time.sleep(0.01)
  os.kill(group[1].process.pid, signal.SIGTERM)  # One of the two is asked to stop.
  stopped = [running.end(timeout=60) for running in group]
  assert [process.code for process in stopped] == [75, 75], stopped[0].output + stopped[1].output
  saved = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.is_dir())
  assert f"saved step {saved} of {STEPS}" in stopped[0].output
  assert metrics(tmp_path / "run") == metrics(whole("ppo"))[:saved]
  # What is told is told once.
  assert "== PPO ==" in stopped[0].output and "2 processes" in stopped[0].output
  assert "== PPO ==" not in stopped[1].output and "ppo: step" not in stopped[1].output

  again = run_script("ppo", tmp_path / "run", *flags, devices=2)
  assert again.code == 0, again.output
  assert f"continuing from step {saved}" in again.output
  assert_same_run(tmp_path / "run", whole("ppo"))
  assert texts_of(tmp_path / "run") == texts_of(whole("ppo"))


@full
def test_two_processes_end_what_one_began(tmp_path, run_group, kill_script, whole, sft_run):
  flags = first_flags("dpo", sft_run)
  kill_script("dpo", tmp_path / "run", *flags, after_step=3, devices=2)
  for finished in run_group("dpo", tmp_path / "run", *flags):
    assert finished.code == 0, finished.output
  assert_same_run(tmp_path / "run", whole("dpo"))
  assert texts_of(tmp_path / "run") == texts_of(whole("dpo"))


@full
@pytest.mark.parametrize("script", ["ppo", "dpo"])
def test_four_processes_learn_what_one_learns(script, tmp_path, run_group, whole, sft_run):
  """Up to rounding, against a process with a single device, which sums in another order."""
  flags = first_flags(script, sft_run, devices=4)
  for finished in run_group(script, tmp_path / "run", *flags, processes=4):
    assert finished.code == 0, finished.output
  of_four, of_one = metrics(tmp_path / "run"), metrics(whole(script, devices=1))
  assert len(of_four) == len(of_one) == STEPS
  for name, rtol, atol in (("loss", 0, 1e-6), ("grad_norm", 1e-5, 0)):
    four, one = ([row[name] for row in rows] for rows in (of_four, of_one))
    np.testing.assert_allclose(four, one, rtol=rtol, atol=atol, err_msg=name)


def send_at(step: int, number: int) -> None:
  """Sends this process a signal after a step, before it is saved."""
  write = writers.RunWriter.write

  def write_and_send(writer, at, scalars):
    write(writer, at, scalars)
    if at == step:
      os.kill(os.getpid(), number)

  writers.RunWriter.write = write_and_send


def verify_slowly(seconds: float) -> None:
  """Lets this process take so long for the files of each checkpoint, as for large ones."""
  require = checkpoint._require_contents

  def slow(*args):
    time.sleep(seconds)
    require(*args)

  checkpoint._require_contents = slow


def test_none_ends_before_the_last_checkpoint_is_whole(tmp_path, start_group, sft_run):
  """A launcher kills the others when one process ends; the first still verifies the files then."""
  flags = (f"--init_from={sft_run}", "--mesh=data:2", "--steps=100", "--checkpoint_every=100")
  slow = functools.partial(verify_slowly, 3.0 + processes._LEAVE_SECONDS)
  stop = functools.partial(send_at, 2, signal.SIGTERM)
  words = (*flags, "--log_every=1")
  first, second = start_group("sft", tmp_path / "run", *words, before={0: slow, 1: stop})
  ended = second.end(timeout=120)
  saved = newest(tmp_path / "run")
  first.process.kill()
  assert ended.code == 75, ended.output + first.end(timeout=60).output
  first.end(timeout=60)
  assert saved >= 2 and f"saved step {saved} of 100" in ended.output


def test_a_group_without_a_finite_gradient_leaves_its_black_box(tmp_path, run_group, sft_run):
  flags = (f"--init_from={sft_run}", "--mesh=data:2", "--steps=20", "--log_every=1")
  rate = ("--optim.learning_rate=1e30", "--optim.warmup=0")
  for finished in run_group("sft", tmp_path / "run", *flags, *rate):
    assert finished.code == 70, finished.output
    assert "black box is" not in finished.output
  key = jax.random.key_data(jax.random.fold_in(jax.random.key(0), 0))
  digest = workdir_lib.identity_digest(tmp_path / "run")
  with checkpoint.Checkpointer(tmp_path / "run" / "black_box", run=digest) as box:
    restored = box.restore({"key": key})
    assert restored is not None and restored.step == metrics(tmp_path / "run")[-1]["step"]
    assert box.leaves(restored.step).keys() == {"state", "batch", "key"}
  np.testing.assert_array_equal(restored.items["key"], key)
  step = restored.step + 1
  first, second = run_group("sft", tmp_path / "run", *flags, *rate, f"--replay_step={step}")
  assert (first.code, second.code) == (0, 0), first.output + second.output
  assert f"running step {step} again, from the state of black_box/{step - 1}" in first.output
  assert re.search(r"grad_norm is not finite by .* in \d+ of \d+ values, the first", first.output)


def test_each_process_has_a_trace(tmp_path, run_group, sft_run):
  flags = (f"--init_from={sft_run}", "--mesh=data:2", "--steps=4", "--profile_steps=2:4")
  for finished in run_group("sft", tmp_path / "run", *flags):
    assert finished.code == 0, finished.output
  (folder,) = (tmp_path / "run" / "profile").glob("plugins/profile/*")
  for kind in ("xplane.pb", "perfetto_trace.json.gz"):
    owners = [path.name.partition(".")[0] for path in sorted(folder.glob(f"*.{kind}"))]
    assert owners == ["process_0", "process_1"], kind


@full
@pytest.mark.parametrize(
  ("script", "sizes"), [("ppo", [2]), ("ppo", [2, 1]), ("dpo", [1, 2]), ("sft", [2])]
)
def test_stopped_at_every_step(
  script, sizes, tmp_path, run_script, start_group, shared_run, sft_run, record_property
):
  """One of them is stopped, by SIGTERM and SIGKILL in turn; the next start has another number."""
  steps, stops = 8, 0
  flags = [word for word in first_flags(script, sft_run) if "steps" not in word]
  flags = [word for word in flags if "every" not in word]
  flags += [f"--steps={steps}", "--checkpoint_every=1", "--log_every=1"]
  # A group that is told after a step knows it two steps later.
  while (step := newest(tmp_path / "run") + 1) < steps - 2:
    size, who = sizes[stops % len(sizes)], stops // 2 % 2
    stop = functools.partial(send_at, step, (signal.SIGTERM, signal.SIGKILL)[stops % 2])
    if size == 1:
      ended = [run_script(script, tmp_path / "run", *flags, devices=2, before=stop)]
    else:
      group = start_group(script, tmp_path / "run", *flags, before={who: stop})
      ended = [running.end(timeout=120) for running in group]
    codes = [process.code for process in ended]
    assert all(code in (74, 75) or code < 0 for code in codes), (step, stops, codes, ended)
    stops += 1
    assert stops < 10
  again = run_script(script, tmp_path / "run", *flags, devices=2)
  assert again.code == 0, again.output
  assert stops >= 3
  record_property("stops", stops)
  assert_same_run(tmp_path / "run", shared_run(f"short_{script}", script, *flags, devices=2))


def children(pid: int) -> list[int]:
  try:
    return [int(x) for x in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
  except OSError:
    return []


def newest(workdir: pathlib.Path) -> int:
  """A step is saved once its manifest is there."""
  manifests = workdir.glob("checkpoints/*.digest.json")
  return max((int(path.name.partition(".")[0]) for path in manifests), default=0)


KILLS = 10


@full
def test_ten_kills_of_one_of_four(tmp_path, start_group, sft_run, repository, record_property):
  """The launcher starts all of them again each time, and the end is that of an undisturbed run."""
  flags = [word for word in first_flags("ppo", sft_run, 4) if "--checkpoint" not in word]
  flags = [word for word in flags if "--steps" not in word]
  flags += ["--steps=30", "--checkpoint_every=1"]
  for running in start_group("ppo", tmp_path / "whole", *flags, processes=4):
    finished = running.end(timeout=900)
    assert finished.code == 0, finished.output
  run, draw, output = tmp_path / "run", random.Random(0), tmp_path / "output"
  sizes = ("--processes=4", "--devices=1", f"--restarts={KILLS}")
  script = ("--", "experiments.ppo", f"--workdir={run}", *small("ppo", flags))
  command = [sys.executable, "-m", "launch.run", "--to=local", *sizes, *script]
  with open(output, "wb") as file:
    launch = subprocess.Popen(command, cwd=repository, stdout=file, stderr=file)
  try:
    pods = wait_for(lambda: [p for p in children(launch.pid) if children(p)], 120)
    for _ in range(KILLS):
      before = newest(run)  # A step or two are lost; the next kill comes after a new one.
      wait_for(lambda done=before: newest(run) > done, 300, or_say=output.read_text, pause=0.02)
      time.sleep(0.1 * draw.random())
      victims = set(children(pods[0]))
      os.kill(draw.choice(sorted(victims)), signal.SIGKILL)
      wait_for(lambda gone=victims: not gone & {*children(pods[0])}, 60, pause=0.05)
    assert launch.wait(900) == 0, output.read_text()
  finally:
    launch.terminate()
    launch.wait()
  assert output.read_text().count("starting again") == KILLS
  record_property("kills", KILLS)
  assert_same_run(run, tmp_path / "whole")
  assert texts_of(run) == texts_of(tmp_path / "whole")


def fail_to(name: str) -> None:
  """Lets the write of a file, or the making of a folder, fail for this process alone."""
  write, make = workdir_lib.atomic_write, workdir_lib.make

  def maybe(function, path, *args):
    if pathlib.Path(path).name == name:
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
    function(path, *args)

  workdir_lib.atomic_write = functools.partial(maybe, write)
  workdir_lib.make = functools.partial(maybe, make)


@pytest.mark.parametrize(
  "name", ["run", "run.json", "flags", pytest.param("summary.json", marks=full)]
)
def test_all_end_where_the_first_cannot_write(name, tmp_path, start_group, sft_run):
  flags = (f"--init_from={sft_run}", "--mesh=data:2", "--steps=1")
  fail = functools.partial(fail_to, name)
  for running in start_group("sft", tmp_path / "run", *flags, before={0: fail}):
    finished = running.end(timeout=120)
    assert finished.code == os.EX_CANTCREAT, finished.output
    assert "Permission denied" in finished.output.splitlines()[-1]


def test_all_are_refused_what_the_first_is_refused(run_group, sft_run):
  first, second = run_group("sft", sft_run, "--optim.learning_rate=0.5")
  assert (first.code, second.code) == (78, 78), first.output + second.output
  for finished in (first, second):
    assert "learning_rate" in finished.output
    assert "Traceback" not in finished.output
