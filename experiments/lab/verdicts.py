"""Quality of reward and preference models: agreement, calibration, and cycles among triples."""

import itertools
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from rlhf_jax import data, evaluation, loop, reporting, simulation
from rlhf_jax.algorithms import preference_model, reward_model
from rlhf_jax.data import DataConfig
from . import evaluating


def of_pairs(dataset: data.Dataset, scores: np.ndarray) -> dict[str, float]:
  """Measures a reward model, with preferring the longer response as the baseline.

  Accuracy and margin are means over prompts of means over their pairs, as in training.

  Args:
    dataset: Held-out pairs or rankings.
    scores: [rows, K] scores of the responses.
  """
  pairs, mask = evaluating.compared(dataset, scores)
  lengths, _ = evaluating.compared_lengths(dataset)
  metrics = reward_model.pair_metrics(pairs, mask)
  calibration = evaluation.calibration(pairs[mask, 0], pairs[mask, 1])
  return {
    "accuracy": float(metrics["reward/accuracy"]),
    "margin": float(metrics["reward/margin"]),
    "pairs": int(np.sum(mask)),
    "longer_wins": float(np.mean(lengths[mask, 0] > lengths[mask, 1])),
    "length_baseline": float(reward_model.pair_metrics(lengths, mask)["reward/accuracy"]),
    "calibration_error": calibration.ece,
    "log_loss": calibration.log_loss,
  }


def of_comparisons(dataset: data.Dataset, logits: np.ndarray) -> dict[str, float]:
  """Measures a preference model on held-out comparisons, with response length as the baseline.

  Args:
    dataset: Held-out comparisons.
    logits: [N] log-odds that the first response is preferred.
  """
  preference = np.asarray([example["preference"][0] for example in dataset.examples])
  share = jnp.asarray(preference)
  metrics = preference_model.preference_metrics(jnp.asarray(logits), share)
  responses = [data.responses_of(example) for example in dataset.examples]
  longer_by = jnp.asarray([len(a) - len(b) for a, b in responses], jnp.float32)
  by_length = preference_model.preference_metrics(longer_by, share)
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


# For each triple the comparisons of responses (0, 1), (1, 2) and (0, 2): the index of each, and
# True if it has the later response first.
Places = list[tuple[tuple[int, bool], ...]]


def triples_of(
  session: loop.Session, config: DataConfig, heldout: data.Dataset, tokenizer: data.Tokenizer
) -> tuple[data.Dataset, Places] | None:
  """Finds triples of responses to a prompt that were all compared with each other; None without.

  They come from the held-out set; for the built-in task they are generated.
  """
  if not data.is_given(config):
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
  places: Places = []
  for prompt, texts in answers.items():
    for a, b, c in itertools.islice(itertools.combinations(texts, 3), 20):
      ways = [((prompt, x, y), (prompt, y, x)) for x, y in ((a, b), (b, c), (a, c))]
      found = [[(met[way], i == 1) for i, way in enumerate(two) if way in met] for two in ways]
      if all(found):
        places.append(tuple(of[0] for of in found))
  return (heldout, places) if places else None


def violations(places: Places, preferences: np.ndarray) -> float:
  """Share of triples whose majorities form a cycle, from the preferences of all comparisons."""
  at, turned = np.moveaxis(np.asarray(places), 2, 0)
  values = np.asarray(preferences, np.float32)[at]
  ab, bc, ac = np.where(turned, 1 - values, values).T
  matrices = np.full([len(places), 3, 3], 0.5)
  for (i, j), p in zip(((0, 1), (1, 2), (0, 2)), (ab, bc, ac), strict=True):
    matrices[:, i, j], matrices[:, j, i] = p, 1 - p
  return preference_model.transitivity_violations(matrices)


def cycles(
  session: loop.Session,
  config: DataConfig,
  heldout: data.Dataset,
  tokenizer: data.Tokenizer,
  logits_of: Callable[[data.Dataset], np.ndarray],
) -> dict[str, float]:
  """Shares of triples whose majorities form a cycle, by the judge and by the votes.

  Args:
    session: Session with the seed of the built-in task.
    config: Source of the comparisons.
    heldout: Held-out comparisons.
    tokenizer: Tokenizer of the judge.
    logits_of: `(dataset) -> logits [N]`, the judge's log-odds of the comparisons.
  """
  triples = triples_of(session, config, heldout, tokenizer)
  if not triples:
    return {}
  dataset, places = triples
  votes = [float(example["preference"][0]) for example in dataset.examples]
  judged = 0.5 * (1 + np.sign(logits_of(dataset)))
  return {
    "triples": len(places),
    "violations": violations(places, judged),
    "violations_of_votes": violations(places, np.asarray(votes)),
  }


def show(model: str, summary: Mapping[str, float], counted: str) -> None:
  """Shows the final table of a model; `counted` is the key of its number of rows."""
  rows = {"accuracy": {model: summary["accuracy"], "longer wins": summary["length_baseline"]}}
  if "margin" in summary:
    rows["margin"] = {model: summary["margin"]}
  rows["calibration error"] = {model: summary["calibration_error"]}
  rows["log loss, nats"] = {model: summary["log_loss"], "coin": float(np.log(2))}
  if "triples" in summary:
    shares = {model: summary["violations"], "votes": summary["violations_of_votes"]}
    rows["cycles among triples"] = shares
  reporting.show_summary(f"{model.capitalize()}, {summary[counted]} held-out {counted}", rows)
