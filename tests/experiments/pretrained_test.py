"""The first commands of a user with a model: the defaults lower the loss on held-out rows."""

import importlib
import json
import math
import pathlib
import random
import types

import pytest

from experiments.lab import models, workbench
from rlhf_jax import data, loop, writers
from tests.experiments.documents_test import SCRIPTS, publish_hh
from tests.testing import full, on_devices


def heldout(workdir, name="eval/loss"):
  rows = writers.read_metrics(pathlib.Path(workdir) / "metrics.jsonl")
  return [row[name] for row in rows if name in row]


@pytest.fixture
def pairs(shared, tmp_path):
  """Continuations of stories, as they are and with their words shuffled."""
  lines = (shared / "data/stories/tinystories_train.jsonl").read_text("utf-8").splitlines()[:60]
  rng = random.Random(0)
  path = tmp_path / "pairs.jsonl"
  with path.open("w") as file:
    for line in lines:
      words = json.loads(line)["text"].split()[:20]
      chosen, shuffled = words[12:], rng.sample(words[12:], 8)
      row = {"prompt": " ".join(words[:12]), "chosen": " ".join(chosen)}
      file.write(json.dumps(row | {"rejected": " ".join(shuffled)}) + "\n")
  return path


@pytest.mark.parametrize("script", ["sft", "reward_model", "dpo"])
def test_defaults_lower_the_held_out_loss(script, pairs, shared, tmp_path, monkeypatch):
  """Trains without what a run does after its last step."""
  nothing = lambda *args, **kwargs: {}  # noqa: E731
  judge = types.SimpleNamespace(finish=nothing, measure=nothing)
  monkeypatch.setattr(workbench.Workbench, "judge", lambda *args, **kwargs: judge)
  for name in ("show_samples", "export", "finish"):
    monkeypatch.setattr(workbench.Workbench, name, nothing)
  module = importlib.import_module(f"experiments.{script}")
  config = module.Config(
    model=models.ModelOptions(path=str(shared / "models/stories260k")),
    data=data.DataConfig(path=str(pairs), end_token="<s>", eval_fraction=0.3),
    steps=6,
    batch_size=8,
    eval_every=1,
  )
  with on_devices(1):
    module.train(loop.Session(str(tmp_path / "run")), config)
  losses = heldout(tmp_path / "run")
  assert len(losses) == 6
  assert losses == sorted(losses, reverse=True), losses
  assert losses[0] > losses[-1]


@full
@pytest.mark.slow
def test_the_commands_of_readme_lower_held_out_losses(
  smollm2, shared, tmp_path, monkeypatch, start_script
):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("model").symlink_to(smollm2)
  publish_hh(shared, pathlib.Path("hh"))
  commands = [command for command in SCRIPTS if "hh/train.jsonl" in " ".join(command)]
  assert [command[0] for command in commands] == [
    f"experiments.{script}" for script in ("sft", "reward_model", "dpo", "ppo")
  ]
  for script, *flags in commands:
    flags = dict(flag.split("=", 1) for flag in flags)
    workdir = flags.pop("--workdir")
    words = [f"{name}={value}" for name, value in flags.items()]
    finished = start_script(script.removeprefix("experiments."), workdir, *words).end(timeout=3600)
    assert finished.code == 0, finished.output
  for run in ("sft", "rm"):
    losses = heldout(f"runs/hh/{run}")
    assert len(losses) > 1 and losses[-1] < losses[0]
  assert heldout("runs/hh/dpo")[-1] < math.log(2)  # That of the start.
