"""The first commands of a user with a model: the defaults lower the loss on held-out rows."""

import importlib
import json
import pathlib
import random
import re
import types

import pytest

from experiments.lab import models, workbench
from rlhf_jax import data, loop, writers
from tests.testing import on_devices

README = pathlib.Path(__file__).resolve().parents[2] / "README.md"


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
  """What a run does after its last step is left out."""
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


def commands():
  """The commands of README on a model of the reader."""
  section = README.read_text(encoding="utf-8").partition("## A model of yours")[2]
  block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
  return [line for line in block[1].splitlines() if line.startswith("python -m")], block[1]
