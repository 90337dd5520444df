"""Trains a reward model on preference pairs or rankings.

Built-in task, from the SFT model (under a minute on a laptop CPU; held-out accuracy about 0.85):
  python -m experiments.reward_model --workdir=runs/rm --init_from=runs/sft
Your model and data (rows with prompt, chosen, rejected; rlhf_jax/data/schema.py lists others):
  python -m experiments.reward_model --workdir=runs/rm --init_from=runs/sft --data.path=FILE.jsonl

A row may rank a list of responses: each response is scored once, and the loss is over all pairs of
the prompt. Votes of several annotators on two responses become pairs; see --data.votes and
--data.annotator. The prompt of a pair is run once for both responses where this saves tokens; with
--data.packed_length a row holds several pairs. Rankings have a row per response.
The held-out accuracy is shown beside the accuracy of preferring the longer response. After training
the scores are centred: their mean over --data.eval_rows training rows is 0.
--data.group=COLUMN adds the accuracy by language, source or annotator, and that of the worst group.
The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import data, defaults, entry, flags, loop
from rlhf_jax.algorithms import given, reward_model
from rlhf_jax.algorithms.reward_model import RewardModelConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.models import shift_scores
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig
from .lab import evaluating, grouping, models, training, verdicts, workbench
from .lab.case import Case


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """Reward model."""

  steps: int = 225
  batch_size: int = 32
  log_every: int = 10
  eval_every: int = 45
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig(share_prompts=True)
  reward_model: RewardModelConfig = RewardModelConfig()
  optim: OptimConfig = OptimConfig(defaults.rate(1e-3, 1e-5))
  lora: LoRAConfig = LoRAConfig()


def train(session: loop.Session, config: Config) -> dict[str, Any]:
  """Trains, centres, exports to `workdir/export` and returns the metrics of summary.json."""
  kind, settings = data.comparison_kind(config.data), config.reward_model
  if kind == "rankings" and (settings.margin or settings.label_smoothing):
    raise flags.UsageError(
      "--reward_model.margin and --reward_model.label_smoothing are for pairs, and"
      f" {config.data.path or config.data.tfds} holds rankings; set them to 0"
    )
  with workbench.open(session, config, "reward_model", kind, "scalar") as bench:
    heldout, train_set = bench.heldout, bench.train_set
    groups = grouping.groups_of(heldout, config.data)
    make_step = functools.partial(reward_model.make_reward_model_step, config=settings)
    trainer = bench.trainer(make_step, keep_start=False)
    bench.describe(
      "Reward model",
      trainer,
      tokens_per_step=training.step_tokens(config, train_set),
    )

    @jax.jit
    def measure(params, batch):  # Tokens and mask are not needed further on.
      scores = given.read_scores(bench.model.apply, params, batch)
      return scores, batch._replace(tokens=batch.tokens[..., :0], mask=batch.mask[..., :0])

    @jax.jit
    def summarize(rows):
      return reward_model.mean_metrics(*rows, config=settings)

    evaluate = bench.evaluator(trainer, measure, summarize)
    state = bench.fit(
      trainer.step,
      trainer,
      bench.batches(packed_length=config.data.packed_length),
      evaluate=evaluate,
    )
    measure = functools.partial(measure, trainer.params(state))
    count = min(config.data.eval_rows, len(train_set.examples))
    only = np.arange(count)
    if data.is_given(config.data):  # Rows of files may be sorted.
      only = data.first_rows(train_set, 1, count, seed=session.seed)
    part = train_set._replace(examples=[train_set.examples[i] for i in only.tolist()])
    scores, _ = bench.over(part, measure)
    seen = reward_model.pair_metrics(*evaluating.compared(part, scores))
    centre = evaluating.mean_score(part, scores)
    bench.export(shift_scores(trainer.params(state), -jnp.float32(centre)))
    summary: dict[str, Any] = {"train/accuracy": float(seen["reward/accuracy"])}
    if heldout.examples:
      scores, _ = bench.over(heldout, measure)
      summary |= verdicts.of_pairs(heldout, scores)
      verdicts.show("reward model", summary, "pairs")
      summary |= grouping.of_pairs(heldout, scores, groups)
    bench.finish(summary, "ppo", *bench.start_of("runs/ppo"), f"--reward.path={session.workdir}")
  return summary


def programs(case: Case) -> None:
  """Compiles the train step, for `experiments.compile`."""
  settings = case.config.reward_model
  make_step = functools.partial(reward_model.make_reward_model_step, config=settings)
  case.offline(case.bench.trainer(make_step), case.pairs(), scored=False)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
