r"""Fine-tunes a policy on its own best samples: ReST, and with other settings RAFT and SuperHF.

Built-in task, after SFT and a reward model (four minutes on a laptop CPU; win rate about 0.71):
  python -m experiments.rest --workdir=runs/rest --init_from=runs/sft --reward.path=runs/rm
RAFT, which keeps the best of 8 samples of each prompt:
  --rest.keep=best --rest.quantiles=0 --grow_steps=3
CRRAFT, RAFT that keeps no response which violates a constraint (CGPO):
  --rest.keep=best --rest.quantiles=0 --grow_steps=3 --reward.constraints=no_filler
SuperHF, which adds a forward KL to the initial policy (--preference.path=runs/pm judges pairs):
  --rest.keep=best --rest.quantiles=0 --grow_steps=3 --rest.kappa=0.3
ReST-EM on your prompts, which keeps the samples that a Python function finds right:
  python -m experiments.rest --workdir=runs/rest --init_from=FOLDER --data.path=PROMPTS.jsonl \
    --reward.name=exact_answer --rest.keep=threshold --rest.quantiles=0.5

A Grow step samples responses to each of --prompts prompts, scores them once and writes them to
`workdir/grow_0/responses.jsonl`. One Improve step for each of --rest.quantiles then fine-tunes on
the responses above its threshold, in a workdir such as `workdir/grow_0_improve_0`. `metrics.jsonl`
has a line per Improve step, `plots/quality.png` the rewards of sampled and of kept responses.

The same command, run again, resumes a run that was stopped; no scored sample is lost.
"""

import dataclasses

import numpy as np

from rlhf_jax import defaults, entry, flags, loop, ranges
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.algorithms import selection
from rlhf_jax.algorithms.rest import RestConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.rewards.shaped import ShapingConfig
from rlhf_jax.train_step import OptimConfig
from . import records
from .lab import given_rows, growing, improving, judges, models, responses, workbench
from .lab.case import Case


@dataclasses.dataclass(frozen=True)
class Config(judges.JudgedConfig):
  """ReST. `steps` and `batch_size` are those of each Improve step.

  Attributes:
    grow_steps: Number of Grow steps, each of which samples new responses.
    prompts: Prompts per Grow step. Each Grow step takes the next ones, and the first ones again
      after the last.
    learning_rate_decay: Factor of the learning rate from one Improve step to the next after the
      same Grow step.
  """

  steps: int = 60
  batch_size: int = 32
  log_every: int = 10
  grow_steps: int = 2
  prompts: int = 512
  learning_rate_decay: float = 0.7
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  reward: judges.RewardOptions = judges.RewardOptions()
  preference: judges.PreferenceOptions = judges.PreferenceOptions()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256), samples_per_prompt=8)
  rest: RestConfig = RestConfig()
  optim: OptimConfig = OptimConfig(defaults.rate(5e-4, 2e-5))
  shaping: ShapingConfig = ShapingConfig()
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    improving.check(self)
    super().__post_init__()
    least = selection.RULES[self.rest.keep].least_samples
    responses.check(self, group=max(least, 1 + self.preference.is_given))
    ranges.check(self, at_least_one=("grow_steps", "prompts"), positive=("learning_rate_decay",))
    if self.learning_rate_decay > 1:
      raise ValueError(f"learning_rate_decay must be in (0, 1], got {self.learning_rate_decay}")
    one = selection.RULES[self.rest.keep].one_per_prompt
    candidates = self.prompts * (1 if one else self.sampling.samples_per_prompt)
    fewest = int(candidates * (1 - self.rest.quantiles[-1]))
    if fewest < self.batch_size:
      raise ValueError(
        f"batch_size {self.batch_size} is larger than the {fewest} responses that the last of"
        " rest.quantiles keeps; raise prompts, or lower one of the two"
      )


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Runs the steps that have not finished, exports the last policy; returns summary.json."""
  config.require()
  folder = models.source_folder(config.model, config.init_from)
  assert folder is not None  # `require` refuses a policy that nothing has trained.
  tokenizer = models.open_tokenizer(folder, config.data)
  checks = config.reward.checks
  train_set, heldout = given_rows.read(session, "prompts", config.data, tokenizer, checks)
  given_rows.show("ReST", config.data, train_set, heldout, initial_model=folder)
  workdir, rows, start = workdir_lib.local_path(session.workdir), [], folder
  for g in range(config.grow_steps):
    prompts = growing.take_prompts(train_set, g, config.prompts)
    stage = improving.stage(session, workdir, grow=g)
    grown = growing.grow(stage, config, start, folder, tokenizer, prompts)
    for i, quantile in enumerate(config.rest.quantiles):
      weights = selection.kept_weights(
        grown.rewards,
        quantile,
        keep=config.rest.keep,
        temperature=config.rest.temperature,
        satisfied=grown.satisfied,
      )
      kept = weights > 0
      if np.sum(kept) < config.batch_size:
        raise flags.UsageError(
          f"{stage.workdir}/{growing.GROWN}: {np.sum(kept)} responses lie above quantile"
          f" {quantile} with --rest.keep={config.rest.keep}, fewer than"
          f" --batch_size={config.batch_size}; raise --prompts"
        )
      improve = improving.stage(session, workdir, grow=g, improve=i)
      given = tokenizer, growing.kept_examples(grown, weights), heldout, session.seed
      after = improving.improve(improve, config, i, start, folder, *given)
      rows.append(
        {
          "grown_reward/mean": float(np.nanmean(grown.rewards)),
          "kept_reward/mean": float(np.mean(grown.rewards[kept])),
          "kept_reward/min": float(np.min(grown.rewards[kept])),
          "kept_share": float(np.mean(kept)),
          **{f"eval/{name}": value for name, value in after.items() if name != "responses"},
        }
      )
      start = workdir_lib.local_path(improve.workdir) / models.EXPORT
  with loop.open_run(session) as run:
    digests = models.digests(flags.flatten(flags.to_dict(config)))
    records.identify(run, "rest", config, tokenizer, train_set, heldout, digests=digests)
    workbench.save_flags(run, config)
    run.writer.open(resume_step=0, config=loop.hyperparameters(run, config))
    for step, row in enumerate(rows):
      run.writer.write(step + 1, row)
    growing.draw(workdir, rows, len(config.rest.quantiles))
    model, first = models.open_model(run, config.model, folder, tokenizer)
    _, params = models.open_model(run, config.model, start, tokenizer)
    bench = workbench.Workbench(run, config, tokenizer, train_set, heldout, model, first, folder)
    summary = {"kept_reward/mean": rows[-1]["kept_reward/mean"]}
    return bench.judge(*bench.open_scores()[1:]).finish(params, len(rows), "ReST", summary)


def programs(case: Case) -> None:
  """Compiles a Grow step and an Improve step, for `experiments.compile`."""
  improving.programs(case)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
