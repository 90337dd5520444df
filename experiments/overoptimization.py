"""Over-optimisation of a weak reward model with a KL penalty, without, and with PAR instead.

  python -m experiments.overoptimization --workdir=runs/overoptimization

It downloads nothing and takes twenty minutes on two CPU cores. After SFT it trains, for each of
three seeds, a reward model of the built-in task on only 128 pairs. It then trains PPO against that
reward model with a KL penalty, without one, and without one on the probability of beating the SFT
policy in place of the score (PAR). Gao et al., 2022, https://arxiv.org/abs/2210.10760, and Fu et
al., 2025, https://arxiv.org/abs/2502.18770.

The result is `plots/overoptimization.png`: proxy and gold reward over the KL to the SFT policy.
Expect these means over three seeds. Without the penalty the proxy reward climbs from 0 to 7.5. The
gold reward peaks at 4.5 at a KL of 2 nats and falls to 2.9 at 40 nats; it falls for every seed.
With the penalty the gold reward rises from 3.8 to 5.1 at a KL of 5 nats and stays there.

A table has the links from each reward model to its policies: accuracy on held-out pairs and on the
samples of the policy, proxy and gold reward at the end, and their rank correlation over the steps.
With three reward models or more it says whether the more accurate one made the better policy;
--pairs=64,128,512,4096 trains reward models of four qualities, three of each, in an hour.

`plots/` and summary.json are those of experiments.plot. Each stage is a separate run, in
`workdir/sft`, `workdir/reward_model_128_pairs_0`, `workdir/no_kl_128_pairs_0` and so on. The same
command, run again, resumes where it was stopped.
"""

import dataclasses
from typing import Any

from rlhf_jax import entry, loop, ranges, reporting
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.algorithms.ppo import PPOConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.train_step import OptimConfig
from . import ppo, reward_model, sft
from .lab import charts, judges, links
from .lab.critics import CriticOptions
from .ppo import Config as PPOStage
from .reward_model import Config as RewardModelStage
from .sft import Config as SFTStage


@dataclasses.dataclass(frozen=True)
class Config:
  """The stages. `--ppo.kl_coef` sets the penalty of the runs that have one.

  Attributes:
    seeds: Number of reward models, each with one PPO run of each kind.
    pairs: Numbers of pairs that reward models are trained on, each with so many seeds.
  """

  seeds: int = 3
  pairs: tuple[int, ...] = (128,)
  sft: SFTStage = SFTStage()
  reward_model: RewardModelStage = RewardModelStage(steps=40)
  ppo: PPOStage = PPOStage(
    steps=80,
    data=DataConfig(eval_rows=128),
    ppo=PPOConfig(kl_coef=0.3),
    optim=OptimConfig(learning_rate=3e-4, schedule="constant"),
    critic=CriticOptions(learning_rate=2e-3),
  )

  def __post_init__(self):
    ranges.check(self, at_least_one=("seeds",))
    if not self.pairs or min(self.pairs) < 1 or len(set(self.pairs)) < len(self.pairs):
      raise ValueError(f"pairs must be different numbers of at least 1, got {[*self.pairs]}")
    if self.reward_model.data.rows:
      raise ValueError("reward_model.data.rows is set by this script; give --pairs")
    if not self.ppo.ppo.kl_coef:
      raise ValueError("ppo.ppo.kl_coef must be positive: runs without a penalty are there anyway")
    if self.sft.init_from or self.sft.model.path:
      name = "init_from" if self.sft.init_from else "model.path"
      raise ValueError(f"sft.{name} is empty here: this is an experiment with the built-in model")
    for name in ("reward_model", "ppo"):
      if getattr(self, name).init_from:
        raise ValueError(f"{name}.init_from is set by this script; leave it empty")
    for name in ("reward", "preference"):
      if getattr(self.ppo, name) != getattr(PPOStage(), name):
        raise ValueError(
          f"ppo.{name} does not apply: the reward models are those of this script; leave it out"
        )


def train(session: loop.Session, config: Config) -> dict[str, Any]:
  """Runs the stages that have not finished, draws the plots and returns summary.json."""
  workdir = workdir_lib.local_path(session.workdir)

  def stage(name, script, stage_config, seed):
    # Each stage has another seed, so that the built-in task generates other rows for it.
    seed = (session.seed * 1000 + seed) % loop.SEEDS
    changed = {"workdir": str(workdir / name), "seed": seed}
    return script(dataclasses.replace(session, **changed), stage_config)

  stage("sft", sft.train, config.sft, 1)
  start = str(workdir / "sft")
  free = dataclasses.replace(config.ppo, ppo=dataclasses.replace(config.ppo.ppo, kl_coef=0.0))
  par = dataclasses.replace(config.ppo.shaping, function="par")
  kinds = {
    "kl": (f"KL penalty {config.ppo.ppo.kl_coef:g}", config.ppo),
    "no_kl": ("no KL penalty", free),
    "par": ("no KL penalty, PAR", dataclasses.replace(free, shaping=par)),
  }
  groups: charts.Groups = {label: [] for label, _ in kinds.values()}
  found: dict[str, list[links.Links]] = {label: [] for label in groups}
  for number, pairs in enumerate(config.pairs):
    for seed in range(config.seeds):
      name, first = f"{pairs}_pairs_{seed}", 10 * (seed + config.seeds * number)
      rows = dataclasses.replace(config.reward_model.data, rows=pairs)
      judge = dataclasses.replace(config.reward_model, init_from=start, data=rows)
      accuracy = stage(f"reward_model_{name}", reward_model.train, judge, first + 2)["accuracy"]
      for kind, (label, arm) in kinds.items():
        reward = judges.RewardOptions(path=str(workdir / f"reward_model_{name}"))
        policy = dataclasses.replace(arm, init_from=start, reward=reward)
        summary = stage(f"{kind}_{name}", ppo.train, policy, first + 3)
        groups[label].append(charts.read_run(str(workdir / f"{kind}_{name}")))
        found[label].append(links.read(accuracy, summary, groups[label][-1]))
  summary = {**charts.draw(workdir, groups), "links": links.show(found)}
  reporting.write_summary(workdir, summary)
  return summary


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
