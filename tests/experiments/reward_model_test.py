"""Training on rankings."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from experiments import reward_model
from experiments.lab import evaluating, models
from rlhf_jax import flags, loop, simulation
from rlhf_jax.algorithms.reward_model import RewardModelConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.train_step import OptimConfig

PROMPT = "write a brief review of the film"
# The better a response, the fewer of its words are "terrible".
WORDS = ["wonderful", "was", "the", "film"]
NAMES = [word for word in simulation.WORDS if word.isalpha()]


def write_rankings(folder, rows=100):
  path = folder / "rankings.jsonl"
  rng = np.random.default_rng(0)
  with path.open("w") as file:
    for i in range(rows):
      bad = rng.permutation(5)[: rng.integers(2, 5)]
      responses = [
        {"text": " ".join(["terrible"] * n + list(rng.choice(WORDS, 5 - n))), "rank": int(n)}
        for n in bad
      ]
      row = {"prompt": f"{PROMPT} {NAMES[i]}", "responses": responses, "source": "ab"[i % 2]}
      file.write(json.dumps(row) + "\n")
  return str(path)


def config_of(path, **settings):
  return reward_model.Config(
    steps=60,
    batch_size=8,
    model=models.ModelOptions(layers=1, width=32, heads=2, mlp_width=32),
    data=DataConfig(path=path, eval_fraction=0.3, group="source"),
    optim=OptimConfig(learning_rate=1e-2),
    **settings,
  )


def test_learns_from_rankings(tmp_path):
  config = config_of(write_rankings(tmp_path))
  session = loop.Session(str(tmp_path / "run"), mesh="data:8")
  summary = reward_model.train(session, config)
  assert summary["accuracy"] > 0.8
  assert summary["length_baseline"] == pytest.approx(0.5)  # All of one length.
  assert summary["log_loss"] < np.log(2)
  assert 0 <= summary["calibration_error"] <= 1
  written = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert written["pairs"] == summary["pairs"]
  accuracies = [of["accuracy"] for of in written["groups"].values()]
  assert written["groups"].keys() == {"a", "b"}
  assert written["accuracy/worst_group"] == pytest.approx(min(accuracies))


@pytest.mark.parametrize("weights", [("", ""), (":0.5", ":0.5")])
def test_scores_are_centred_over_rows_of_every_file(tmp_path, monkeypatch, weights):
  whole = pathlib.Path(write_rankings(tmp_path, 80)).read_text().splitlines(keepends=True)
  paths = []
  for name, rows, weight in zip("ab", (whole[:70], whole[70:]), weights, strict=True):
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(rows))
    paths.append(f"{file}{weight}")
  seen, mean = [], evaluating.mean_score

  def mean_score(part, scores):
    seen.extend(part.examples)
    return mean(part, scores)

  monkeypatch.setattr(evaluating, "mean_score", mean_score)
  config = config_of(",".join(paths))
  given = dataclasses.replace(config.data, eval_rows=40, eval_fraction=0.0, group="")
  config = dataclasses.replace(config, steps=1, eval_every=0, data=given)
  reward_model.train(loop.Session(str(tmp_path / "run")), config)
  tokenizer = models.open_tokenizer(None)
  last = {tokenizer.token_id(name) for name in NAMES[70:80]}
  share = np.mean([bool(last & {*example["prompt"].tolist()}) for example in seen])
  assert (0.03 < share < 0.3) if not weights[0] else share > 0.2


@pytest.mark.parametrize("setting", ["margin", "label_smoothing"])
def test_settings_of_pairs_are_refused_for_rankings(tmp_path, setting):
  settings = RewardModelConfig(**{setting: 0.1})
  config = config_of(write_rankings(tmp_path), reward_model=settings)
  with pytest.raises(flags.UsageError, match=f"reward_model.{setting}.*holds rankings"):
    reward_model.train(loop.Session(str(tmp_path / "run")), config)
