"""Small runs of the scripts, each in a process of its own, shared by the tests of this folder."""

import dataclasses
import os
import pathlib
import runpy
import signal
import socket
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple

import filelock
import jax
import pytest

from rlhf_jax import data, simulation
from rlhf_jax.models import build, hf
from tests.experiments.small_runs import small
from tests.testing import TINY_MODEL, forked, start


def _main(
  module: str,
  arguments: list[str],
  output: pathlib.Path,
  devices: int,
  before: Callable[[], None] | None,
) -> None:
  """In the forked process: what `python -m MODULE ARGUMENTS` does, after `before()`."""
  with open(output, "wb") as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
  sys.path.insert(0, "")
  sys.argv = [f"{module.replace('.', '/')}.py", *arguments]
  if before is not None:
    before()
  runpy.run_module(module, run_name="__main__", alter_sys=True)


class Running:
  """A script that was started."""

  def __init__(
    self,
    script: str,
    workdir: pathlib.Path,
    flags: Sequence[str],
    devices: int = 1,
    package: str = "experiments.",
    before: Callable[[], None] | None = None,
  ):
    self.workdir = pathlib.Path(workdir)
    self.workdir.parent.mkdir(parents=True, exist_ok=True)
    own = () if script == "compile" else (f"--workdir={workdir}",)
    self._output = self.workdir.with_name(f"{self.workdir.name}.{time.monotonic_ns()}.log")
    arguments = [*small(script, flags), *own]
    self.process = forked(_main, package + script, arguments, self._output, devices, before)

  def end(self, timeout: float) -> "Finished":
    """Waits for it; kills it when the time is over."""
    self.process.join(timeout)
    if self.process.is_alive():
      self.process.kill()
      self.process.join()
    output = self._output.read_text(errors="replace")
    return Finished(self.process.exitcode, output, self.workdir)


class Finished(NamedTuple):
  """Result of a script."""

  code: int | None
  output: str
  workdir: pathlib.Path


@pytest.fixture(scope="session")
def run_script():
  """`run_script(name, workdir, *flags, **options) -> Finished`, in a process of its own.

  Options are those of `Running`, such as `devices=8`.
  """

  def run(script, workdir, *flags, **options) -> Finished:
    return Running(script, workdir, flags, **options).end(timeout=300)

  return run


@pytest.fixture(scope="session")
def start_script():
  """`start_script(name, workdir, *flags) -> Running`; whoever starts it ends it."""
  return lambda script, workdir, *flags: Running(script, workdir, flags)


@pytest.fixture(scope="session")
def start_group():
  """`start_group(name, workdir, *flags, processes=2, before={}) -> [Running]`.

  Each has a device. Some call a function of `before`, by their number, before they begin.
  """

  def start(script, workdir, *flags, processes: int = 2, before=types.MappingProxyType({})):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = "127.0.0.1:{1}".format(*free.getsockname())
    group = (f"--coordinator={address}", f"--processes={processes}")
    return [
      Running(script, workdir, (*flags, *group, f"--process_id={i}"), before=before.get(i))
      for i in range(processes)
    ]

  return start


@pytest.fixture(scope="session")
def run_group(start_group):
  """`run_group(name, workdir, *flags, processes=2) -> [Finished]`."""

  def run(*args, **kwargs) -> list[Finished]:
    return [running.end(timeout=300) for running in start_group(*args, **kwargs)]

  return run


@pytest.fixture(scope="session")
def kill_script():
  """Starts a script and kills it with SIGKILL once a file is there: by default a checkpoint."""

  def kill(
    script, workdir, *flags, after_step: int = 0, mark: pathlib.Path | None = None, devices: int = 1
  ) -> None:
    running = Running(script, workdir, flags, devices)
    mark = mark or pathlib.Path(workdir) / "checkpoints" / f"{after_step}.digest.json"
    deadline = time.monotonic() + 240
    while not mark.exists() and running.process.is_alive() and time.monotonic() < deadline:
      time.sleep(0.002)
    killed = running.end(timeout=0)
    assert killed.code == -signal.SIGKILL, f"it ended before it was killed:\n{killed.output}"
    assert not (killed.workdir / "export").exists(), "it was killed too late to tell"

  return kill


@pytest.fixture(scope="session")
def start_here():
  """`start_here(name, workdir, *flags, devices=1) -> summary`, in this process."""

  def run(script, workdir, *flags, devices: int = 1):
    return start(script, f"--workdir={workdir}", *small(script, flags), devices=devices)

  return run


@pytest.fixture(scope="session")
def shared_root(tmp_path_factory) -> pathlib.Path:
  """Folder that all workers share."""
  root = tmp_path_factory.getbasetemp()
  return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def shared_run(shared_root, start_here):
  """`shared_run(name, script, *flags, devices=1)`: workdir of a run that all workers share."""

  def run(name, script, *flags, devices: int = 1) -> pathlib.Path:
    workdir = shared_root / name
    with filelock.FileLock(shared_root / f"{name}.lock"):
      if not (workdir / "summary.json").exists():
        start_here(script, workdir, *flags, devices=devices)
    return workdir

  return run


@pytest.fixture(scope="session")
def chain_run(shared_run) -> pathlib.Path:
  return shared_run("rlhf", "rlhf")


@pytest.fixture(scope="session")
def sft_run(shared_run) -> pathlib.Path:
  return shared_run("sft", "sft")


@pytest.fixture(scope="session")
def reward_run(shared_run, sft_run) -> pathlib.Path:
  return shared_run("reward_model", "reward_model", f"--init_from={sft_run}")


@pytest.fixture(scope="session")
def preference_run(shared_run, sft_run) -> pathlib.Path:
  return shared_run("preference_model", "preference_model", f"--init_from={sft_run}")


@pytest.fixture(scope="session")
def teacher_run(shared_root) -> pathlib.Path:
  """Folder of a language model with the tokenizer of the built-in task and another size."""
  folder = shared_root / "teacher"
  with filelock.FileLock(shared_root / "teacher.lock"):
    if not (folder / "config.json").exists():
      tokenizer = data.word_level_tokenizer(simulation.WORDS)
      config = dataclasses.replace(TINY_MODEL, vocab_size=tokenizer.vocab_size + 3)
      params = jax.jit(build(config).init)(jax.random.key(0))
      tokenizer.save(folder)
      ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
      hf.save_folder(folder, params, config, token_ids=ids)
  return folder


@pytest.fixture
def train_on_labels(tmp_path, start_here, sft_run, capsys):
  """`train_on_labels(script, path) -> output`, of two steps on labelled rows."""

  def train(script, path) -> str:
    capsys.readouterr()
    start_here(
      script,
      tmp_path / "model",
      f"--init_from={sft_run}",
      f"--data.path={path}",
      "--data.eval_fraction=0",
      "--data.rows=0",
      "--batch_size=4",
      "--steps=2",
    )
    return capsys.readouterr().err

  return train
