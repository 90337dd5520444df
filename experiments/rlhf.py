"""Runs the RLHF chain on the built-in task: demonstrations -> SFT -> reward model -> PPO.

  python -m experiments.rlhf --workdir=runs/rlhf

It downloads nothing and takes three to six minutes on two CPU cores. At the end a table compares
the SFT and the PPO policy on 512 held-out prompts by the gold reward, which no stage was trained
on. Expect a win rate of PPO against SFT of about 0.8.

Each stage is a separate run, in `workdir/sft`, `workdir/reward_model` and `workdir/ppo`. Every flag
of a stage's script is a flag here, with the prefix `sft.`, `reward_model.` or `ppo.`. The same
command, run again, resumes where it was stopped.
"""

import dataclasses
import shutil

from rlhf_jax import entry, loop, processes, reporting
from rlhf_jax import workdir as workdir_lib
from . import ppo, reward_model, sft
from .lab import judges
from .ppo import Config as PPOStage
from .reward_model import Config as RewardModelStage
from .sft import Config as SFTStage


@dataclasses.dataclass(frozen=True)
class Config:
  """The three stages. Flags such as `--sft.steps` and `--ppo.kl_coef` change one of them."""

  sft: SFTStage = dataclasses.field(
    default=SFTStage(),
    metadata={
      "listed": (
        *("steps", "batch_size", "optim.learning_rate", "data.rows", "data.eval_rows"),
        *("model.layers", "model.width", "model.heads", "model.mlp_width", "model.dtype"),
      )
    },
  )
  reward_model: RewardModelStage = dataclasses.field(
    default=RewardModelStage(),
    metadata={
      "listed": ("steps", "batch_size", "optim.learning_rate", "data.rows", "data.annotator")
    },
  )
  ppo: PPOStage = dataclasses.field(
    default=PPOStage(),
    metadata={
      "listed": (
        *("steps", "batch_size", "optim.learning_rate", "critic.learning_rate", "data.eval_rows"),
        *("sampling.max_new_tokens", "ppo.kl_coef", "ppo.clip", "ppo.epochs", "ppo.minibatches"),
      )
    },
  )

  def __post_init__(self):
    for name in ("reward_model", "ppo"):
      if getattr(self, name).init_from:
        raise ValueError(f"{name}.init_from is set by the chain; leave it empty")
    if self.sft.init_from or self.sft.model.path:
      name = "init_from" if self.sft.init_from else "model.path"
      raise ValueError(
        f"sft.{name} is empty here: the defaults of the chain are those of the built-in model; run"
        " experiments.sft, reward_model and ppo on yours, one after the other"
      )
    for name in ("reward", "preference"):
      if getattr(self.ppo, name) != getattr(PPOStage(), name):
        raise ValueError(
          f"ppo.{name} does not apply: PPO learns from the reward model of the chain; leave it out"
        )


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Runs the stages that have not finished, compares SFT with PPO, and returns summary.json."""
  workdir = workdir_lib.local_path(session.workdir)

  def stage(name, script, stage_config, seed_offset):
    # Each stage has another seed, so that the built-in task generates other rows for it.
    stage_session = dataclasses.replace(
      session,
      workdir=str(workdir / name),
      seed=(session.seed * 10 + seed_offset) % loop.SEEDS,
    )
    return script(stage_session, stage_config)

  start = str(workdir / "sft")
  stage("sft", sft.train, config.sft, 1)
  of_reward = stage(
    "reward_model", reward_model.train, dataclasses.replace(config.reward_model, init_from=start), 2
  )
  options = judges.RewardOptions(path=str(workdir / "reward_model"))
  of_ppo = stage(
    "ppo", ppo.train, dataclasses.replace(config.ppo, init_from=start, reward=options), 3
  )
  summary = {
    "reward_model/accuracy": of_reward["accuracy"],
    "sft/gold_reward": of_ppo["gold/mean_before"],
    "sft/length": of_ppo["length_before"],
    "ppo/gold_reward": of_ppo["gold/mean"],
    "ppo/win_rate": of_ppo["gold/win_rate"],
    "ppo/reward": of_ppo["reward/mean"],
    "ppo/kl": of_ppo["kl"],
    "ppo/length": of_ppo["length"],
  }
  show(summary)
  if processes.is_first():
    for name in ("sft", "reward_model", "ppo"):
      if (workdir / name / "plots").exists():  # Two lines of metrics make a plot.
        shutil.copytree(workdir / name / "plots", workdir / "plots" / name, dirs_exist_ok=True)
  reporting.write_summary(workdir, summary)
  return summary


def show(summary: dict[str, float]) -> None:
  """Shows the final table."""
  reporting.show_summary(
    "The chain, on held-out prompts",
    {
      "gold reward": {"SFT": summary["sft/gold_reward"], "PPO": summary["ppo/gold_reward"]},
      "win rate against SFT": {"SFT": 0.5, "PPO": summary["ppo/win_rate"]},
      "KL to SFT, nats": {"SFT": 0.0, "PPO": summary["ppo/kl"]},
      "length, tokens": {"SFT": summary["sft/length"], "PPO": summary["ppo/length"]},
      "reward model accuracy": {"reward model": summary["reward_model/accuracy"]},
    },
  )


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
