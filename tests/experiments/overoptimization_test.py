"""The over-optimisation experiment, with stages that only write metrics."""

import dataclasses
import json

import pytest

from experiments import overoptimization, ppo
from experiments.lab import judges
from rlhf_jax import loop, writers

KINDS = ("reward_model", "kl", "no_kl", "par")


def test_overoptimization_runs_every_stage_once_per_seed(tmp_path, monkeypatch):
  stages = []

  def train(session, config):
    stages.append((session, config))
    writer = writers.make_writer(session.workdir)
    for step in range(1, 31):
      gold = 5 - step / 10 if "no_kl" in session.workdir else 5 + step / 10
      writer.write(step, {"reward/mean": step, "gold_reward/mean": gold, "kl/ref": step / 3})
    writer.close()
    return {"accuracy": 0.6}

  for script in ("sft", "reward_model", "ppo"):
    monkeypatch.setattr(getattr(overoptimization, script), "train", train)
  config = overoptimization.Config(seeds=2)
  summary = overoptimization.train(loop.Session(str(tmp_path), seed=1), config)
  names = ["sft"] + [f"{kind}_{s}" for s in (0, 1) for kind in KINDS]
  assert [session.workdir for session, _ in stages] == [str(tmp_path / name) for name in names]
  by_name = dict(zip(names, stages, strict=True))
  for kind, coef, function in (("kl", 0.3, ""), ("no_kl", 0.0, ""), ("par", 0.0, "par")):
    session, stage = by_name[f"{kind}_1"]
    assert (stage.ppo.kl_coef, stage.shaping.function) == (coef, function)
    assert stage.init_from == str(tmp_path / "sft")
    assert stage.reward.path == str(tmp_path / "reward_model_1")
    # The kinds differ in nothing but the penalty and the shaping.
    assert session.seed == by_name["kl_1"][0].seed != by_name[f"{kind}_0"][0].seed
    shaping = dataclasses.replace(stage.shaping, function="")
    assert dataclasses.replace(stage, ppo=config.ppo.ppo, shaping=shaping) == dataclasses.replace(
      config.ppo, init_from=stage.init_from, reward=stage.reward
    )
  assert summary["reward_model/accuracy"] == [0.6, 0.6]
  assert summary["no KL penalty"]["diverged"] == 2
  assert summary["KL penalty 0.3"]["diverged"] == 0
  assert json.loads((tmp_path / "summary.json").read_text()).keys() == summary.keys()
  assert (tmp_path / "plots" / "overoptimization.png").stat().st_size > 0


def test_overoptimization_refuses_what_it_sets_itself():
  config = overoptimization.Config()
  for changes, message in (
    ({"seeds": 0}, "seeds must be"),
    ({"ppo": dataclasses.replace(config.ppo, init_from="x")}, "ppo.init_from"),
    ({"ppo": ppo.Config(reward=judges.RewardOptions(name="gold"))}, "ppo.reward"),
    ({"ppo": ppo.Config(ppo=dataclasses.replace(config.ppo.ppo, kl_coef=0.0))}, "kl_coef"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(config, **changes)
