r"""Trains a preference model, which predicts P(a > b) from both responses to a prompt.

Built-in task, from the SFT model, on the votes of a panel whose majority is intransitive:
  python -m experiments.preference_model --workdir=runs/pm --init_from=runs/sft \
    --data.annotator=panel
Your model and data (rows with prompt, chosen, rejected, or with judged responses; ties are fine):
  python -m experiments.preference_model --workdir=runs/pm --init_from=runs/sft \
    --data.path=FILE.jsonl --data.votes=each

With --data.votes=each the model learns the share of the votes, otherwise the majority's verdict. A
tie is a preference of one half. At the end it is measured on held-out comparisons: accuracy,
calibration and log loss. If prompts have three responses that were all compared, the share of
triples whose majorities form a cycle is measured too; it is 0 for any reward model.
The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools

import jax

from rlhf_jax import defaults, entry, loop
from rlhf_jax.algorithms import given, preference_model
from rlhf_jax.algorithms.preference_model import PreferenceModelConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig
from rlhf_jax.types import ComparisonBatch
from . import records
from .lab import models, training, verdicts, workbench
from .lab.case import Case


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """Preference model."""

  steps: int = 300
  batch_size: int = 32
  log_every: int = 10
  eval_every: int = 60
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  preference_model: PreferenceModelConfig = PreferenceModelConfig()
  optim: OptimConfig = OptimConfig(defaults.rate(1e-3, 1e-5))
  lora: LoRAConfig = LoRAConfig()


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the model to `workdir/export` and returns the metrics of summary.json."""
  with workbench.open(session, config, "preference_model", "comparisons", "scalar") as bench:
    heldout, train_set = bench.heldout, bench.train_set
    trainer = make_trainer(bench)
    bench.describe(
      "Preference model",
      trainer,
      tokens_per_step=f"{config.batch_size * 2 * train_set.padded_length}",
    )

    @jax.jit
    def measure(params, batch):
      logits = given.read_preferences(bench.model.apply, params, batch.tokens, batch.mask)
      return {"logits": logits, "preference": batch.preference}

    @jax.jit
    def summarize(rows):
      return preference_model.mean_metrics(**rows)

    evaluate = bench.evaluator(trainer, measure, summarize)
    state = bench.fit(trainer.step, trainer, bench.batches(), evaluate=evaluate)
    params = trainer.params(state)
    bench.export(params, label=records.PREFERENCE)
    logits_of = lambda rows: bench.over(rows, functools.partial(measure, params))["logits"]  # noqa: E731
    summary = {}
    if heldout.examples:
      summary = verdicts.of_comparisons(heldout, logits_of(heldout))
      summary |= verdicts.cycles(
        session,
        config.data,
        heldout,
        bench.tokenizer,
        logits_of,
      )
      verdicts.show("preference model", summary, "comparisons")
    judge = f"--preference.path={session.workdir}"
    bench.finish(summary, "nash_md", *bench.start_of("runs/nash"), judge)
  return summary


def make_trainer(bench: workbench.Workbench) -> training.Trainer:
  """Builds the state and the step of the model."""
  settings = bench.config.preference_model
  make_step = functools.partial(preference_model.make_preference_model_step, config=settings)
  return bench.trainer(make_step, keep_start=False)


def programs(case: Case) -> None:
  """Compiles the train step, for `experiments.compile`."""
  tokens = case.tokens(2, case.length + case.config.data.max_response_length)
  batch = ComparisonBatch(*tokens, case.column())
  case.offline(make_trainer(case.bench), batch, scored=False)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
