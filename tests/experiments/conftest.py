"""Small runs of the scripts, shared by the tests of this folder."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
_TINY = (
  "--model.layers=1",
  "--model.width=32",
  "--model.heads=2",
  "--model.mlp_width=32",
  "--data.rows=64",
  "--data.eval_rows=8",
)
_SMALL = ("--data.rows=64", "--data.eval_rows=8", "--batch_size=8")
_SAMPLED = (*_SMALL, "--sampling.max_new_tokens=8", "--steps=3")
_BASE = {
  "sft": (*_TINY, "--steps=4", "--batch_size=8", "--sampling.max_new_tokens=8"),
  "reward_model": (*_SMALL, "--steps=4"),
  "preference_model": (*_SMALL, "--steps=4"),
  "dpo": (*_SMALL, "--steps=4"),
  "kto": (*_SMALL, "--steps=4"),
  "ppo": (*_SAMPLED, "--ppo.minibatches=2"),
  "nash_md": _SAMPLED,
  "online_dpo": _SAMPLED,
  "rest": (
    *_SAMPLED,
    "--prompts=16",
    "--sampling.samples_per_prompt=4",
    "--rest.quantiles=0.3,0.6",
  ),
}


def _start(script, workdir, flags) -> subprocess.Popen:
  # One device, as a user has it; a flag given by the test replaces the one of the base.
  given = {flag.split("=")[0] for flag in flags}
  base = [flag for flag in _BASE.get(script, ()) if flag.split("=")[0] not in given]
  env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  command = [sys.executable, "-m", f"experiments.{script}", f"--workdir={workdir}", *base, *flags]
  return subprocess.Popen(
    command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


class Finished:
  """What a script left behind."""

  def __init__(self, code: int, output: str, workdir: pathlib.Path):
    self.code, self.output, self.workdir = code, output, workdir


@pytest.fixture(scope="session")
def run_script():
  """`run_script(name, workdir, *flags) -> Finished`, in a process of its own."""

  def run(script, workdir, *flags) -> Finished:
    process = _start(script, workdir, flags)
    output, _ = process.communicate(timeout=300)
    return Finished(process.returncode, output, pathlib.Path(workdir))

  return run


@pytest.fixture(scope="session")
def kill_script():
  """Starts a script and kills it with SIGKILL once a file is there: by default a checkpoint."""

  def kill(script, workdir, *flags, after_step: int = 0, mark: pathlib.Path | None = None) -> None:
    process = _start(script, workdir, flags)
    mark = mark or pathlib.Path(workdir) / "checkpoints" / str(after_step)
    deadline = time.monotonic() + 240
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, f"it ended before it was killed:\n{output}"
    assert not (pathlib.Path(workdir) / "export").exists(), "it was killed too late to tell"

  return kill


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory, run_script) -> pathlib.Path:
  finished = run_script("sft", tmp_path_factory.mktemp("runs") / "sft")
  assert finished.code == 0, finished.output
  return finished.workdir


@pytest.fixture(scope="session")
def reward_run(tmp_path_factory, run_script, sft_run) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("runs") / "reward_model"
  finished = run_script("reward_model", workdir, f"--init_from={sft_run}")
  assert finished.code == 0, finished.output
  return finished.workdir


@pytest.fixture(scope="session")
def preference_run(tmp_path_factory, run_script, sft_run) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("runs") / "preference_model"
  finished = run_script("preference_model", workdir, f"--init_from={sft_run}")
  assert finished.code == 0, finished.output
  return finished.workdir
