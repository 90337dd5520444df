"""Trains a reward model on preference pairs or rankings.

Built-in task, from the SFT model (under a minute on a laptop CPU; held-out accuracy about 0.85):
  python -m experiments.reward_model --workdir=runs/rm --init_from=runs/sft
Your model and data (rows with prompt, chosen, rejected; rlhf_jax/data/schema.py lists others):
  python -m experiments.reward_model --workdir=runs/rm --init_from=runs/sft --data.path=FILE.jsonl

A row may rank a list of responses: each response is scored once, and the loss is over all pairs of
the prompt. Votes of several annotators on two responses become pairs; see --data.votes and
--data.annotator. With --data.packed_length a row holds several pairs; rankings are not packed.
The held-out accuracy is shown beside the accuracy of preferring the longer response. After training
the scores are centred: their mean over --data.eval_rows training rows is 0.
The default learning rate is for the built-in task; a pretrained model needs about 1e-5.
The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import evaluating, models, training, workbench
from experiments.lab.case import Case
from rlhf_jax import data, entry, evaluation, flags, loop, reporting
from rlhf_jax.algorithms import given, reward_model
from rlhf_jax.algorithms.reward_model import RewardModelConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.models import shift_scores
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """Reward model."""

  steps: int = 225
  batch_size: int = 32
  log_every: int = 10
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  reward_model: RewardModelConfig = RewardModelConfig()
  optim: OptimConfig = OptimConfig(learning_rate=1e-3)
  lora: LoRAConfig = LoRAConfig()


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, centres, exports to `workdir/export` and returns the metrics of summary.json."""
  kind, settings = data.comparison_kind(config.data), config.reward_model
  if kind == "rankings" and (settings.margin or settings.label_smoothing):
    raise flags.UsageError(
      "--reward_model.margin and --reward_model.label_smoothing are for pairs, and"
      f" {config.data.path or config.data.tfds} holds rankings; set them to 0"
    )
  with workbench.open(session, config, "reward_model", kind, "scalar") as bench:
    heldout, train_set = bench.heldout, bench.train_set
    make_step = functools.partial(reward_model.make_reward_model_step, config=settings)
    trainer = bench.trainer(make_step, keep_start=False)
    bench.describe(
      "Reward model",
      trainer,
      tokens_per_step=training.step_tokens(config, train_set),
    )

    @jax.jit
    def measure(params, batch):
      return {"score": given.read_scores(bench.model.apply, params, batch)}

    def pairs_of(dataset, params):
      scores = bench.over(dataset, functools.partial(measure, params))["score"]
      return evaluating.compared(dataset, scores)

    @evaluating.once_per_step
    def heldout_pairs(state, step):
      del step
      return pairs_of(heldout, trainer.params(state))

    def evaluate(state, step):
      metrics = reward_model.pair_metrics(heldout_pairs(state, step))
      return {f"eval/{name}": value for name, value in metrics.items()}

    state = bench.fit(
      trainer.step,
      trainer,
      bench.batches(packed_length=config.data.packed_length),
      evaluate=evaluate,
      title="reward model",
    )
    part = train_set._replace(examples=train_set.examples[: config.data.eval_rows])
    seen = reward_model.pair_metrics(pairs_of(part, trainer.params(state)))
    centre = (seen["reward/chosen"] + seen["reward/rejected"]) / 2
    bench.export(shift_scores(trainer.params(state), -jnp.float32(centre)))
    summary = {"train/accuracy": float(seen["reward/accuracy"])}
    if heldout.examples:
      summary |= judge(heldout, heldout_pairs(state, config.steps) - centre)
      show(summary)
    bench.finish(summary)
  return summary


def judge(dataset: data.Dataset, pairs: np.ndarray) -> dict[str, float]:
  """Measures a reward model, with preferring the longer response as the baseline.

  Args:
    dataset: Held-out pairs or rankings.
    pairs: [N, 2] scores of the better and the worse response of every pair.
  """
  lengths = evaluating.compared_lengths(dataset)
  metrics = reward_model.pair_metrics(pairs)
  calibration = evaluation.calibration(pairs[:, 0], pairs[:, 1])
  return {
    "accuracy": float(metrics["reward/accuracy"]),
    "margin": float(metrics["reward/margin"]),
    "pairs": len(pairs),
    "longer_wins": float(np.mean(lengths[:, 0] > lengths[:, 1])),
    "length_baseline": float(reward_model.pair_metrics(lengths)["reward/accuracy"]),
    "calibration_error": calibration.ece,
    "log_loss": calibration.log_loss,
  }


def show(summary: dict[str, float]) -> None:
  """Shows the final table."""
  model = "reward model"
  reporting.show_summary(
    f"Reward model, {summary['pairs']} held-out pairs",
    {
      "accuracy": {model: summary["accuracy"], "longer wins": summary["length_baseline"]},
      "margin": {model: summary["margin"]},
      "calibration error": {model: summary["calibration_error"]},
      "log loss, nats": {model: summary["log_loss"], "coin": float(np.log(2))},
    },
  )


def programs(case: Case) -> None:
  """Compiles the train step, for `experiments.compile`."""
  settings, rows = case.config.reward_model, 2 * case.config.batch_size
  make_step = functools.partial(reward_model.make_reward_model_step, config=settings)
  batch = case.tokens(2, case.length)
  case.offline(case.bench.trainer(make_step), batch, rows=rows, scored=False)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
