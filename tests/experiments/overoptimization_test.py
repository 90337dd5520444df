"""The over-optimisation experiment, with stages that only write metrics."""

import dataclasses
import json

import pytest

from experiments import overoptimization, ppo
from experiments.lab import judges
from experiments.reward_model import Config as RewardModelStage
from rlhf_jax import loop, writers
from rlhf_jax.data import DataConfig

KINDS = ("reward_model", "kl", "no_kl", "par")


def test_overoptimization_runs_every_stage_once_per_seed(tmp_path, monkeypatch, capsys):
  stages = []

  def train(session, config):
    stages.append((session, config))
    writer = writers.make_writer(session.workdir)
    for step in range(1, 31):
      gold = 5 - step / 10 if "no_kl" in session.workdir else 5 + step / 10
      writer.write(step, {"reward/mean": step, "gold_reward/mean": gold, "kl/ref": step / 3})
    writer.close()
    return {"accuracy": 0.6, "reward/accuracy": 0.4}

  for script in ("sft", "reward_model", "ppo"):
    monkeypatch.setattr(getattr(overoptimization, script), "train", train)
  config = overoptimization.Config(seeds=2, pairs=(64, 128))
  summary = overoptimization.train(loop.Session(str(tmp_path), seed=1), config)
  names = ["sft"] + [
    f"{kind}_{pairs}_pairs_{s}" for pairs in (64, 128) for s in (0, 1) for kind in KINDS
  ]
  assert [session.workdir for session, _ in stages] == [str(tmp_path / name) for name in names]
  by_name = dict(zip(names, stages, strict=True))
  for kind, coef, function in (("kl", 0.3, ""), ("no_kl", 0.0, ""), ("par", 0.0, "par")):
    session, stage = by_name[f"{kind}_128_pairs_1"]
    assert (stage.ppo.kl_coef, stage.shaping.function) == (coef, function)
    assert stage.init_from == str(tmp_path / "sft")
    assert stage.reward.path == str(tmp_path / "reward_model_128_pairs_1")
    # The kinds differ in nothing but the penalty and the shaping.
    assert session.seed == by_name["kl_128_pairs_1"][0].seed
    shaping = dataclasses.replace(stage.shaping, function="")
    assert dataclasses.replace(stage, ppo=config.ppo.ppo, shaping=shaping) == dataclasses.replace(
      config.ppo, init_from=stage.init_from, reward=stage.reward
    )
  seeds = [session.seed for session, _ in stages]
  assert len(set(seeds)) == 1 + 2 * 4  # Both kinds of a reward model have one.
  rows = [of[1].data.rows for name, of in by_name.items() if name.startswith("reward_model")]
  assert rows == [64, 64, 128, 128]
  weak = summary["links"]["no KL penalty"]
  assert [of["diverged"] for of in weak["policies"]] == [True] * 4
  assert all(of["heldout"] == 0.6 and of["on_policy"] == 0.4 for of in weak["policies"])
  assert all(of["spearman"] == -1 for of in weak["policies"])
  assert "Links from a reward model" in capsys.readouterr().err
  assert summary["no KL penalty"]["diverged"] == 4
  assert summary["KL penalty 0.3"]["diverged"] == 0
  assert json.loads((tmp_path / "summary.json").read_text()).keys() == summary.keys()
  assert (tmp_path / "plots" / "overoptimization.png").stat().st_size > 0


def test_overoptimization_refuses_what_it_sets_itself():
  config = overoptimization.Config()
  for changes, message in (
    ({"seeds": 0}, "seeds must be"),
    ({"pairs": (64, 64)}, "pairs must be different"),
    ({"pairs": ()}, "pairs must be different"),
    ({"reward_model": RewardModelStage(data=DataConfig(rows=9))}, "give --pairs"),
    ({"ppo": dataclasses.replace(config.ppo, init_from="x")}, "ppo.init_from"),
    ({"ppo": ppo.Config(reward=judges.RewardOptions(name="gold"))}, "ppo.reward"),
    ({"ppo": ppo.Config(preference=judges.PreferenceOptions(name="panel"))}, "ppo.preference"),
    ({"ppo": ppo.Config(ppo=dataclasses.replace(config.ppo.ppo, kl_coef=0.0))}, "kl_coef"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(config, **changes)
