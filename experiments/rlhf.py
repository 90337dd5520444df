"""The whole chain on the built-in task: demonstrations -> SFT -> reward model -> PPO.

  python -m experiments.rlhf --workdir=runs/rlhf

No network and no download; about four minutes on two CPU cores. It ends with a table of the SFT
and the PPO policy side by side on 512 held-out prompts, judged by the gold reward that no stage
was trained on; expect a win rate of PPO against SFT of 0.8 or more. Every stage is a run of its own
in `workdir/sft`, `workdir/reward_model` and `workdir/ppo`. Starting the same command again
continues where it was stopped.
"""

import dataclasses
import json
import pathlib

from experiments import common, evaluate, ppo, reward_model, sft
from rlhf_jax import flags, loop, reporting
from rlhf_jax.data import DataConfig


@dataclasses.dataclass(frozen=True)
class Config:
  """The three stages. `--sft.steps`, `--ppo.kl_coef` and so on change one of them."""

  sft: sft.Config = sft.Config()
  reward_model: reward_model.Config = reward_model.Config()
  ppo: ppo.Config = ppo.Config()

  def __post_init__(self):
    for name in ("reward_model", "ppo"):
      if getattr(self, name).init_from:
        raise ValueError(f"{name}.init_from is set by the chain; leave it empty")


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Runs the stages that have not finished, then compares; returns summary.json."""
  workdir = pathlib.Path(session.workdir)

  def stage(name, script, stage_config, seed_offset):
    # Each stage draws its own rows of the built-in task.
    own = dataclasses.replace(
      session, workdir=str(workdir / name), seed=session.seed * 10 + seed_offset
    )
    return script(own, stage_config)

  start = str(workdir / "sft")
  stage("sft", sft.train, config.sft, 1)
  of_reward = stage(
    "reward_model", reward_model.train, dataclasses.replace(config.reward_model, init_from=start), 2
  )
  options = ppo.RewardOptions(path=str(workdir / "reward_model"))
  stage(
    "ppo", ppo.train, dataclasses.replace(config.ppo, init_from=start, reward=options), 3
  )
  judged = stage(
    "evaluate",
    evaluate.evaluate,
    evaluate.Config(
      policy=str(workdir / "ppo"),
      baseline=start,
      data=DataConfig(eval_rows=512),
      sampling=config.ppo.sampling,
      reward=options,
    ),
    4,
  )
  summary = {
    "reward_model/accuracy": of_reward["accuracy"],
    "sft/gold_reward": judged["gold/mean_before"],
    "sft/length": judged["length_before"],
    "ppo/gold_reward": judged["gold/mean"],
    "ppo/win_rate": judged["gold/win_rate"],
    "ppo/reward": judged["reward/mean"],
    "ppo/kl": judged["kl"],
    "ppo/length": judged["length"],
  }
  show(summary)
  reporting.write_summary(workdir, summary)
  return summary
