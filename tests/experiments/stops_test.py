"""A run that is stopped at every step, by SIGTERM and SIGKILL in turn, ends with the same bits."""

import os
import shutil
import signal
from unittest import mock

import pytest

from rlhf_jax import entry, loop, user, writers
from tests.experiments import scripts_test
from tests.experiments.small_runs import METHODS, SETTINGS, judges_of
from tests.experiments.traced_once import traced_once
from tests.testing import full, wait_for

STEPS = 4
GOLD = "--reward.name=gold"
# Name -> script, further flags, devices. Every script has its row of SETTINGS too.
SETUPS: dict[str, tuple[str, tuple[str, ...], int]] = {
  **{script: (script, SETTINGS.get(script, ()), 1) for script in METHODS},
  "sft packed": ("sft", ("--data.packed_length=128",), 1),
  "sft on four": ("sft", ("--mesh=data:2,fsdp:2",), 4),
  "sft adapters, spikes": (
    "sft",
    ("--init_from={sft}", "--lora.rank=2", "--optim.max_spike=2"),
    1,
  ),
  "sft microbatches": ("sft", ("--sft.microbatches=2",), 1),
  "dpo plain": ("dpo", (), 1),
  "dpo tensor": ("dpo", ("--mesh=tensor:2",), 2),
  "kto adapters": ("kto", ("--lora.rank=2",), 1),
  "ppo two models": ("ppo", (GOLD,), 1),
  "ppo adapters": ("ppo", (GOLD, "--lora.rank=2", "--shaping.normalize"), 1),
  "ppo on four": ("ppo", (GOLD, "--mesh=data:4"), 4),
  "ppo ahead": (
    "ppo",
    (GOLD, "--mesh=data:2", "--rollout.devices=1", "--rollout.importance_cap=2"),
    3,
  ),
  "ppo_max plain": ("ppo_max", (GOLD, "--critic.warmup=1"), 1),
  "nash_md plain": ("nash_md", ("--preference.name=panel",), 1),
  "online_dpo reward": ("online_dpo", (GOLD, "--online.round_steps=2"), 1),
}


class _Killed(BaseException):
  """Ends a run without a save, as a kill would."""


def flags_of(setup, **runs):
  script, further, _ = SETUPS[setup]
  flags = [f"--steps={STEPS}", "--checkpoint_every=1", "--log_every=1"]
  flags += [word.format(**runs) for word in further]
  if script != "sft":
    flags.append(f"--init_from={runs['sft']}")
  if not any(word.startswith(("--reward.", "--preference.")) for word in flags):
    names = {"reward": "gold", "preference": "expert"}
    flags += [f"--{judge}.name={names[judge]}" for judge in judges_of(script)[:1]]
  return flags


def stop_at(workdir, fitted, step, how, start):
  """Starts a run and stops it after a step; returns whether it came to an end before.

  Args:
    workdir: Folder of the run.
    fitted: Folder whose steps count; ReST has runs in folders of its own.
    step: First step to stop after.
    how: SIGTERM or SIGKILL.
    start: Function that starts the run.
  """
  push, write, copy = loop._Log.push, writers.RunWriter.write, workdir.with_name("copy")
  sent = []

  def push_and_stop(log, at, values, *, keep):
    push(log, at, values, keep=keep)
    if how == "SIGTERM" and not sent and at >= step and log._writer._workdir == fitted:
      sent.append(at)
      os.kill(os.getpid(), signal.SIGTERM)

  def write_and_stop(writer, at, scalars):
    write(writer, at, scalars)
    if how == "SIGKILL" and at >= step and writer._workdir == fitted and not copy.exists():
      # The save before is over: half of a file is copied, and a kill leaves none.
      wait_for(lambda: at == 1 or (fitted / "checkpoints" / f"{at - 1}.digest.json").exists(), 60)
      shutil.copytree(workdir, copy)
      raise _Killed

  with (
    mock.patch.object(loop._Log, "push", push_and_stop),
    mock.patch.object(writers.RunWriter, "write", write_and_stop),
  ):
    try:
      start()
    except loop.Preempted as e:
      assert f"saved step {sent[0]} of" in str(e)
      return False
    except _Killed:  # What the run wrote while it was unwound is gone.
      shutil.rmtree(workdir)
      copy.rename(workdir)
      return False
  return True


@full
@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS)
def test_stopped_at_every_step(
  setup, tmp_path, start_here, sft_run, reward_run, teacher_run, record_property
):
  script, _, devices = SETUPS[setup]
  flags = flags_of(setup, sft=sft_run, reward=reward_run, teacher=teacher_run)

  def start(name):
    start_here(script, tmp_path / name, *flags, devices=devices)

  workdir, stops = tmp_path / "run", 0
  fitted = workdir / "grow_0_improve_0" if script == "rest" else workdir
  with traced_once():
    start("whole")
    for step in range(1, STEPS + 1):
      how = ("SIGTERM", "SIGKILL")[step % 2]
      stops += not stop_at(workdir, fitted, step, how, lambda: start("run"))
    start("run")
  assert stops == STEPS - 1
  record_property("stops", stops)
  scripts_test.assert_same_end(workdir, tmp_path / "whole")


_FUNCTIONS = """
import pathlib
calls = []
def count():
  calls.append(1)
  if len(calls) > 3 and pathlib.Path("trouble").exists():
    raise OSError("no route to host")
def score(prompts, responses, rows):
  count()
  return [len(response) for response in responses]
def prefer(prompts, first, second, rows):
  count()
  return [float(len(a) > len(b)) for a, b in zip(first, second)]
"""


@full
@pytest.mark.slow
@pytest.mark.parametrize("script", [name for name in METHODS if judges_of(name)])
def test_a_function_that_raises(script, tmp_path, start_here, sft_run, monkeypatch):
  """The state before the step is saved, and the run goes on once the function works again."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  module = f"of_{script}"  # Imported once in a process.
  (tmp_path / f"{module}.py").write_text(_FUNCTIONS)
  (tmp_path / "trouble").touch()
  judge = judges_of(script)[0]
  function = {"reward": "score", "preference": "prefer"}[judge]
  flags = [f"--init_from={sft_run}", f"--steps={STEPS}", "--checkpoint_every=100"]
  flags.append(f"--{judge}.name={module}:{function}")
  with pytest.raises(user.RaisedError, match="no route to host") as e:
    start_here(script, tmp_path / "run", *flags)
  assert entry.verdict(e.value)[0] == 70
  saved = list(tmp_path.glob("run/checkpoints/*.digest.json"))
  assert saved or list(tmp_path.glob("run/**/responses.jsonl")), "ReST keeps its responses instead"
  (tmp_path / "trouble").unlink()
  start_here(script, tmp_path / "run", *flags)
  assert (tmp_path / "run" / "summary.json").exists()


def test_there_are_enough():
  assert len(SETUPS) >= 25
