r"""Trains a preference model: P(a > b) from both responses, without a score of either.

Built-in task, from the SFT model, on the votes of a panel whose majority is intransitive:
  python -m experiments.preference_model --workdir=runs/pm --init_from=runs/sft \
    --data.annotator=panel
Your model and data (rows with prompt, chosen, rejected, or judged responses, ties among them):
  python -m experiments.preference_model --workdir=runs/pm --init_from=runs/sft \
    --data.path=FILE.jsonl --data.votes=each

With `--data.votes=each` the model learns the share of the votes, else the majority's verdict; a tie
is a preference of one half. It ends with accuracy, calibration and log loss on held-out
comparisons, and with the share of triples of responses whose majorities form a cycle, if prompts
have three responses that were all compared: 0 for any reward model.
The default learning rate suits the built-in task; a pretrained model wants about 1e-5.
Starting the same command again continues a run that was stopped.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np

from experiments import records
from experiments.lab import evaluating, models, training
from rlhf_jax import data, entry, evaluation, loop, reporting, simulation
from rlhf_jax.algorithms import preference_model
from rlhf_jax.algorithms.preference_model import PreferenceModelConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig, make_schedule


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """Preference model."""

  steps: int = 300
  batch_size: int = 32
  log_every: int = 10
  model: models.ModelOptions = models.ModelOptions()
  lora: LoRAConfig = LoRAConfig()
  data: DataConfig = DataConfig()
  preference_model: PreferenceModelConfig = PreferenceModelConfig()
  optim: OptimConfig = OptimConfig(learning_rate=1e-3)


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports to `workdir/export` and returns the figures of summary.json."""
  folder = models.source_folder(config.model, config.init_from)
  tokenizer = models.open_tokenizer(folder, config.data.end_token)
  train_set, heldout = data.load("comparisons", config.data, tokenizer, seed=session.seed)
  with loop.open_run(session) as run:
    records.identify(
      run,
      "preference_model",
      config,
      tokenizer,
      train_set,
      heldout,
      **models.frozen_digest(config.lora, folder),
    )
    model, params = models.open_model(run, config.model, folder, tokenizer, "scalar")
    make_step, settings = preference_model.make_preference_model_step, config.preference_model
    trainer = training.make_trainer(run, config, model, params, make_step, settings)
    state = trainer.state
    del params  # The trainer has its own copy.
    training.describe(
      run,
      "Preference model",
      model,
      state,
      {
        "data": f"{len(train_set.examples)} comparisons",
        "left out": train_set.dropped or "nothing",
        "tokens per step": f"{config.batch_size * 2 * train_set.padded_length}",
      },
      frozen=trainer.frozen,
    )

    @jax.jit
    def measure(params, batch):
      return {
        "logits": preference_model.preference_logits(model.apply, params, batch.tokens, batch.mask),
        "preference": batch.preference,
      }

    def rows_of(dataset, params):
      return evaluating.measure_rows(
        run, dataset, config.batch_size, tokenizer.pad_id, functools.partial(measure, params)
      )

    @evaluating.once_per_step
    def heldout_rows(state, step):
      del step
      return rows_of(heldout, trainer.params(state))

    def evaluate(state, step):
      metrics = preference_model.preference_metrics(**heldout_rows(state, step))
      return {f"eval/{name}": float(value) for name, value in metrics.items()}

    batches = data.batches(train_set, config.batch_size, seed=session.seed, pad_id=tokenizer.pad_id)
    state = loop.fit(
      run,
      config,
      trainer.step,
      state,
      batches,
      evaluate=evaluate if heldout.examples else None,
      learning_rate=make_schedule(config.optim, config.steps),
      title="preference model",
    )
    params = trainer.params(state)
    models.export(run.workdir / models.EXPORT, params, model, tokenizer, label=models.PREFERENCE)
    summary = {}
    if heldout.examples:
      summary = judge(heldout, heldout_rows(state, config.steps)["logits"])
      triples = triples_of(session, config.data, heldout, tokenizer)
      if triples:
        dataset, places = triples
        logits = rows_of(dataset, params)["logits"]
        votes = [float(example["preference"][0]) for example in dataset.examples]
        summary |= {
          "triples": len(places),
          "violations": violations(places, logits > 0),
          "violations_of_votes": violations(places, np.asarray(votes)),
        }
      show(summary)
    training.finish(run, summary)
  return summary


def judge(dataset: data.Dataset, logits: np.ndarray) -> dict[str, float]:
  """Figures of a preference model on held-out comparisons, beside preferring the longer response.

  Args:
    dataset: Comparisons.
    logits: [N] log-odds of the first response of each.
  """
  preference = np.asarray([example["preference"][0] for example in dataset.examples])
  metrics = preference_model.preference_metrics(logits, preference)
  lengths = np.asarray(
    [np.subtract(*map(len, data.responses_of(example))) for example in dataset.examples]
  )
  by_length = preference_model.preference_metrics(lengths.astype(np.float32), preference)
  untied = preference != 0.5
  towards = np.where(preference > 0.5, 1.0, -1.0) * logits
  calibration = evaluation.calibration(towards[untied], np.zeros(untied.sum()))
  summary = {
    "accuracy": float(metrics["preference/accuracy"]),
    "length_baseline": float(by_length["preference/accuracy"]),
    "calibration_error": calibration.ece,
    "log_loss": float(
      np.mean(
        np.logaddexp(0.0, -logits) * preference + np.logaddexp(0.0, logits) * (1 - preference)
      )
    ),
    "comparisons": len(logits),
    "ties": int(np.sum(~untied)),
  }
  if not untied.all():
    summary["confidence_in_ties"] = float(np.mean(1 / (1 + np.exp(-np.abs(logits[~untied])))))
  return summary


# For each prompt, where the comparisons of the responses (0, 1), (1, 2) and (0, 2) are.
Places = list[tuple[int, int, int]]


def triples_of(
  session: loop.Session, config: DataConfig, heldout: data.Dataset, tokenizer: data.Tokenizer
) -> tuple[data.Dataset, Places] | None:
  """Comparisons in which three responses to a prompt all met, if there are any.

  They are looked for in the held-out set; those of the built-in task are written for the purpose.
  """
  if not (config.path or config.tfds):
    count = min(config.eval_rows, 256)
    rows = simulation.votes("eval", count, session.seed, config.annotator or "expert")
    heldout = data.from_rows(
      "comparisons",
      [data.Row(f"built-in votes[{i}]", row) for i, row in enumerate(rows)],
      config,
      tokenizer,
    )
  met: dict[tuple[bytes, bytes, bytes], int] = {}
  answers: dict[bytes, dict[bytes, None]] = {}
  for i, example in enumerate(heldout.examples):
    prompt = example["prompt"].tobytes()
    a, b = (ids.tobytes() for ids in data.responses_of(example))
    met[prompt, a, b] = i
    answers.setdefault(prompt, {}).update({a: None, b: None})
  places = []
  for prompt, texts in answers.items():
    for a, b, c in itertools.islice(itertools.combinations(texts, 3), 20):
      found = [met.get((prompt, *pair)) for pair in ((a, b), (b, c), (a, c))]
      if None not in found:
        places.append(tuple(found))
  return (heldout, places) if places else None


def violations(places: Places, preferences: np.ndarray) -> float:
  """Share of triples whose majorities form a cycle, from the preference of each comparison."""
  values = np.asarray(preferences, np.float32)[np.asarray(places)]
  ab, bc, ac = values.T
  matrices = np.full([len(places), 3, 3], 0.5)
  for (i, j), p in zip(((0, 1), (1, 2), (0, 2)), (ab, bc, ac), strict=True):
    matrices[:, i, j], matrices[:, j, i] = p, 1 - p
  return preference_model.transitivity_violations(matrices)


def show(summary: dict[str, float]) -> None:
  """The table at the end."""
  model = "preference model"
  rows = {
    "accuracy": {model: summary["accuracy"], "longer wins": summary["length_baseline"]},
    "calibration error": {model: summary["calibration_error"]},
    "log loss, nats": {model: summary["log_loss"], "coin": float(np.log(2))},
  }
  if "triples" in summary:
    rows["cycles among triples"] = {
      model: summary["violations"],
      "votes": summary["violations_of_votes"],
    }
  reporting.show_summary(f"Preference model, {summary['comparisons']} held-out comparisons", rows)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
