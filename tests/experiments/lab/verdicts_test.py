"""Agreement of reward and preference models, and cycles among triples of responses."""

import itertools

import numpy as np
import pytest

from experiments.lab import verdicts
from rlhf_jax import data, loop, simulation
from rlhf_jax.data import DataConfig
from tests.experiments.rows import RANKINGS, dataset

TOKENIZER = data.word_level_tokenizer(simulation.WORDS)


def comparisons(*rows):
  """Comparisons of responses of some lengths, with the preference for the first one."""
  examples = [
    {
      "prompt": np.int32([1]),
      "response_a": np.int32([1] * a),
      "response_b": np.int32([2] * b),
      "preference": np.float32([p]),
    }
    for a, b, p in rows
  ]
  return data.from_examples("comparisons", examples, [{}] * len(examples))


def test_metrics_of_pairs():
  heldout = dataset(
    "preferences",
    {"prompt": [1], "chosen": [1, 2, 3], "rejected": [1]},
    {"prompt": [1], "chosen": [1], "rejected": [1, 2]},
    {"prompt": [1], "chosen": [1, 2], "rejected": [2, 1]},
    {"prompt": [1], "chosen": [1, 2], "rejected": [3]},
  )
  scores = np.float32([[1, 0], [2, 0], [1, 1], [0, 3]])
  metrics = verdicts.of_pairs(heldout, scores)
  assert metrics["accuracy"] == (1 + 1 + 0.5 + 0) / 4
  assert metrics["length_baseline"] == (1 + 0 + 0.5 + 1) / 4
  assert metrics["longer_wins"] == 2 / 4
  assert metrics["margin"] == 0
  assert metrics["pairs"] == 4


def test_metrics_of_rankings():
  scores = np.float32([[3, 2, 4], [1, 0, 9]])  # The last place is empty.
  metrics = verdicts.of_pairs(RANKINGS, scores)
  # Prompts count the same, as in training: one has two pairs, the other one.
  assert metrics["accuracy"] == (1 / 2 + 1) / 2
  assert metrics["length_baseline"] == (0 + 1) / 2
  assert metrics["longer_wins"] == pytest.approx(1 / 3)
  assert metrics["pairs"] == 3


def test_accuracy_leaves_out_ties_and_the_loss_does_not():
  rows = comparisons((3, 1, 1.0), (1, 2, 1.0), (2, 1, 0.0), (1, 1, 0.5))
  logits = np.float32([2.0, -1.0, -3.0, 4.0])
  summary = verdicts.of_comparisons(rows, logits)
  assert summary["accuracy"] == pytest.approx(2 / 3)
  assert summary["length_baseline"] == pytest.approx(1 / 3)
  assert (summary["comparisons"], summary["ties"]) == (4, 1)
  share = np.array([1, 1, 0, 0.5])
  right = 1 / (1 + np.exp(-logits.astype(float)))
  loss = -(share * np.log(right) + (1 - share) * np.log(1 - right))
  assert summary["log_loss"] == pytest.approx(loss.mean(), rel=1e-5)
  assert summary["confidence_in_ties"] == pytest.approx(1 / (1 + np.exp(-4)))
  assert "confidence_in_ties" not in verdicts.of_comparisons(comparisons((1, 2, 1.0)), logits[:1])


def test_a_cycle_is_a_violation():
  places = [tuple((i, False) for i in triple) for triple in ((0, 1, 2), (3, 4, 5))]
  # a > b, b > c, c > a; and a > b, b > c, a > c.
  assert verdicts.violations(places, np.array([1, 1, 0, 1, 1, 1])) == 0.5
  assert verdicts.violations(places[1:], np.array([1, 1, 0, 1, 1, 1])) == 0.0


@pytest.mark.parametrize(("annotator", "cyclic"), [("panel", True), ("expert", False)])
def test_majorities_of_the_panel_are_cyclic_and_those_of_the_expert_are_not(annotator, cyclic):
  config = DataConfig(eval_rows=256, annotator=annotator)
  none = comparisons()
  met = []

  def logits_of(dataset):
    met.append(dataset)
    return np.ones(len(dataset.examples))  # It always prefers the first.

  shares = verdicts.cycles(loop.Session("x"), config, none, TOKENIZER, logits_of)
  assert shares["triples"] > 10
  assert (shares["violations_of_votes"] > 0) == cyclic
  assert 0 <= shares["violations"] <= 1
  assert len(met[0].examples) >= 3


@pytest.mark.parametrize("turns", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("cyclic", [True, False])
def test_triples_are_found_whichever_response_of_a_comparison_is_first(cyclic, turns):
  """Three responses of lengths 1, 2 and 3: each beats the next one, and the last one the first."""
  config = DataConfig(path="rows.jsonl")
  pairs = [(1, 2), (2, 3), (3, 1) if cyclic else (1, 3)]  # Better, worse.
  examples = [
    {
      "prompt": np.int32([1]),
      "response_a": np.int32([1] * (worse if turned else better)),
      "response_b": np.int32([1] * (better if turned else worse)),
      "preference": np.float32([0.0 if turned else 1.0]),
    }
    for (better, worse), turned in zip(pairs, turns, strict=True)
  ]
  rows = data.from_examples("comparisons", examples, [{}] * 3)
  logits_of = lambda of: np.array([3 * e["preference"][0] - 1 for e in of.examples])  # noqa: E731
  shares = verdicts.cycles(loop.Session("x"), config, rows, TOKENIZER, logits_of)
  assert shares == {"triples": 1, "violations": cyclic, "violations_of_votes": cyclic}
  undecided = verdicts.cycles(loop.Session("x"), config, rows, TOKENIZER, lambda of: np.zeros(3))
  assert undecided["violations"] == 0


def test_rows_without_triples_have_no_cycles():
  config = DataConfig(path="rows.jsonl")
  assert verdicts.cycles(loop.Session("x"), config, comparisons(), TOKENIZER, len) == {}
