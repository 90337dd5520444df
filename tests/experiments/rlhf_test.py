"""The chain, with stages that do nothing."""

import dataclasses
import json

import pytest

from experiments import rlhf
from experiments.lab import judges
from rlhf_jax import loop


@pytest.mark.parametrize("drawn", [(), ("sft",)])
def test_stages_too_short_to_be_plotted(drawn, tmp_path, monkeypatch):
  done = []

  def stage(session, config):
    name = session.workdir.rpartition("/")[2]
    done.append(name)
    if name in drawn:
      (tmp_path / "run" / name / "plots").mkdir(parents=True)
      (tmp_path / "run" / name / "plots" / "loss.png").touch()
    of_ppo = ["gold/mean_before", "length_before", "gold/mean", "gold/win_rate", "reward/mean"]
    return dict.fromkeys(["accuracy", *of_ppo, "kl", "length"], 0.5)

  for script in (rlhf.sft, rlhf.reward_model, rlhf.ppo):
    monkeypatch.setattr(script, "train", stage)
  rlhf.train(loop.Session(str(tmp_path / "run"), seed=2**32 - 1), rlhf.Config())
  assert done == ["sft", "reward_model", "ppo"]
  assert json.loads((tmp_path / "run" / "summary.json").read_text())["ppo/win_rate"] == 0.5
  assert [path.parent.name for path in tmp_path.glob("run/plots/*/loss.png")] == list(drawn)


@pytest.mark.parametrize(
  ("name", "given"),
  [
    ("reward", judges.RewardOptions(name="gold")),
    ("preference", judges.PreferenceOptions(name="panel")),
  ],
)
def test_another_judge_is_refused_before_the_first_stage(name, given):
  with pytest.raises(ValueError, match=f"^ppo.{name} does not apply"):
    rlhf.Config(ppo=dataclasses.replace(rlhf.Config().ppo, **{name: given}))
