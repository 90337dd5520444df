"""The preference model: its loss and metrics, and a cycle that it can learn."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import given, preference_model
from rlhf_jax.models import build
from rlhf_jax.train_step import init_state
from rlhf_jax.types import ComparisonBatch
from tests.algorithms import toy
from tests.algorithms.case import ROWS, Case
from tests.testing import TINY_MODEL, tiny_params

EOS = 2
PARAMS = toy.score_params()
read = jax.jit(functools.partial(given.read_preferences, toy.scores))


def random_batch(seed):
  shares = np.random.default_rng(seed).choice([0.0, 0.3, 1.0], ROWS).astype(np.float32)
  return ComparisonBatch(*toy.token_batch(ROWS, 2, seed=seed), shares)


CASES = {
  "": Case(
    preference_model.make_preference_model_step,
    preference_model.PreferenceModelConfig(),
    random_batch,
    toy.scores,
    PARAMS,
  )
}


def both_orders(prompt, a, b, length):
  tokens, mask = np.zeros((2, length), np.int32), np.zeros((2, length), bool)
  for row, answers in enumerate(([*a, *b], [*b, *a])):
    ids = [*prompt, *answers]
    tokens[row, : len(ids)] = ids
    mask[row, len(prompt) : len(ids)] = True
  return tokens, mask


def batch_of(comparisons, length=16):
  """From (prompt, a, b, preference)."""
  tokens, mask = zip(*(both_orders(*c[:3], length) for c in comparisons), strict=True)
  preference = np.float32([c[3] for c in comparisons])
  return ComparisonBatch(np.stack(tokens), np.stack(mask), preference)


@pytest.fixture(scope="module")
def comparisons():
  rng = np.random.default_rng(0)
  texts = [[*rng.integers(3, toy.V, n), EOS] for n in (1, 2, 3, 4)]
  return [([5, 6], a, b, 0.5) for a, b in itertools.permutations(texts, 2)]


def test_loss_is_the_cross_entropy_with_the_share_of_the_votes(comparisons):
  rng = np.random.default_rng(1)
  batch = batch_of(comparisons)._replace(
    preference=rng.choice([0.0, 0.5, 2 / 3, 1.0], len(comparisons)).astype(np.float32)
  )
  loss_fn = functools.partial(preference_model.loss_fn, apply_fn=toy.scores)
  loss, metrics = jax.jit(loss_fn)(PARAMS, batch, jax.random.key(0))
  logits = read(PARAMS, batch.tokens, batch.mask)
  p = 1 / (1 + np.exp(-np.float64(logits)))
  want = -np.mean(batch.preference * np.log(p) + (1 - batch.preference) * np.log(1 - p))
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  untied = batch.preference != 0.5
  right = (logits > 0) == (batch.preference > 0.5)
  np.testing.assert_allclose(metrics["preference/accuracy"], np.mean(right[untied]), rtol=1e-6)
  np.testing.assert_allclose(metrics["preference/ties"], np.mean(~untied), rtol=1e-6)
  np.testing.assert_allclose(
    metrics["preference/confidence"], np.mean(np.maximum(p, 1 - p)), rtol=1e-5
  )
  assert metrics["tokens"] == batch.mask.sum()


def test_learns_a_cycle_and_a_tie():
  """Paper beats rock, scissors beat paper, rock beats scissors; two of a kind are tied."""
  rock, paper, scissors = [3, EOS], [4, EOS], [5, EOS]
  beats = [(paper, rock), (scissors, paper), (rock, scissors)]
  comparisons = [([6], a, b, 0.9) for a, b in beats]
  comparisons += [([6], [7, EOS], x, 0.5) for x in (rock, paper, scissors)]
  batch = batch_of(comparisons, 8)
  tx = optax.adam(1e-2)
  config = preference_model.PreferenceModelConfig()
  model = build(TINY_MODEL, "scalar")  # Of a transformer, as the toy can hardly compare.
  step = preference_model.make_preference_model_step(model.apply, tx, config)
  state = init_state(jax.tree.map(jnp.copy, tiny_params("scalar")), tx)
  for _ in range(150):
    state, metrics = step(state, batch, jax.random.key(0))
  logits = jax.jit(functools.partial(given.read_preferences, model.apply))(
    state.params, batch.tokens, batch.mask
  )
  np.testing.assert_allclose(jax.nn.sigmoid(logits), batch.preference, atol=0.03)
  assert metrics["preference/accuracy"] == 1.0
  matrix = np.full((1, 3, 3), 0.5)
  for (i, j), p in zip(((1, 0), (2, 1), (0, 2)), jax.nn.sigmoid(logits[:3]), strict=True):
    matrix[0, i, j], matrix[0, j, i] = p, 1 - p
  assert preference_model.transitivity_violations(matrix) == 1.0


def test_scores_have_no_violations_and_coins_have_a_quarter():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(200, 4))
  ordered = 1 / (1 + np.exp(scores[:, None, :] - scores[:, :, None]))
  assert preference_model.transitivity_violations(ordered) == 0.0
  upper = np.triu(rng.random((20_000, 3, 3)), 1)
  coins = upper + np.tril(1 - np.swapaxes(upper, 1, 2), -1)
  np.testing.assert_allclose(preference_model.transitivity_violations(coins), 0.25, atol=0.01)
  assert np.isnan(preference_model.transitivity_violations(np.zeros((5, 2, 2))))
