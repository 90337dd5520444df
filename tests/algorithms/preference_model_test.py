"""The preference model: antisymmetric whatever the weights, and able to learn a cycle."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import preference_model
from rlhf_jax.models import build
from rlhf_jax.train_step import init_state
from rlhf_jax.types import ComparisonBatch
from tests.testing import TINY_MODEL as CONFIG
from tests.testing import tiny_params

EOS = 2


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
def model():
  model = build(CONFIG, "scalar")
  return model._replace(apply=jax.jit(model.apply))


@pytest.fixture(scope="module")
def comparisons():
  rng = np.random.default_rng(0)
  texts = [[*rng.integers(3, CONFIG.vocab_size, n), EOS] for n in (1, 2, 3, 4)]
  return [([5, 6], a, b, 0.5) for a, b in itertools.permutations(texts, 2)]


def test_exchanging_the_responses_changes_the_sign(model, comparisons):
  params = tiny_params("scalar")
  batch = batch_of(comparisons)
  swapped = batch_of([(p, b, a, 1 - y) for p, a, b, y in comparisons])
  logits, back = (
    preference_model.preference_logits(model.apply, params, b.tokens, b.mask)
    for b in (batch, swapped)
  )
  assert np.abs(logits).max() > 1e-3
  np.testing.assert_array_equal(logits, -back)
  np.testing.assert_allclose(jax.nn.sigmoid(logits) + jax.nn.sigmoid(back), 1.0, atol=1e-7)


def test_padding_changes_nothing(model, comparisons):
  params = tiny_params("scalar")
  short, long = batch_of(comparisons), batch_of(comparisons, 24)
  long.tokens[~np.pad(short.tokens != 0, ((0, 0), (0, 0), (0, 8)))] = 7
  want, got = (
    preference_model.preference_logits(model.apply, params, b.tokens, b.mask) for b in (short, long)
  )
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_loss_is_the_cross_entropy_with_the_share_of_the_votes(model, comparisons):
  params = tiny_params("scalar", 1)
  rng = np.random.default_rng(1)
  batch = batch_of(comparisons)._replace(
    preference=rng.choice([0.0, 0.5, 2 / 3, 1.0], len(comparisons)).astype(np.float32)
  )
  loss, metrics = preference_model.loss_fn(params, batch, jax.random.key(0), apply_fn=model.apply)
  logits = preference_model.preference_logits(model.apply, params, batch.tokens, batch.mask)
  p = 1 / (1 + np.exp(-np.float64(logits)))
  want = -np.mean(batch.preference * np.log(p) + (1 - batch.preference) * np.log(1 - p))
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  untied = batch.preference != 0.5
  right = (logits > 0) == (batch.preference > 0.5)
  np.testing.assert_allclose(metrics["preference/accuracy"], np.mean(right[untied]), rtol=1e-6)
  np.testing.assert_allclose(metrics["preference/ties"], np.mean(~untied), rtol=1e-6)
  assert metrics["tokens"] == batch.mask.sum()


def test_learns_a_cycle_and_a_tie(model):
  """Paper beats rock, scissors beat paper, rock beats scissors; two of a kind are tied."""
  rock, paper, scissors = [3, EOS], [4, EOS], [5, EOS]
  beats = [(paper, rock), (scissors, paper), (rock, scissors)]
  comparisons = [([6], a, b, 0.9) for a, b in beats]
  comparisons += [([6], [7, EOS], x, 0.5) for x in (rock, paper, scissors)]
  batch = batch_of(comparisons, 8)
  tx = optax.adam(1e-2)
  config = preference_model.PreferenceModelConfig()
  step = preference_model.make_preference_model_step(model.apply, tx, config)
  state = init_state(jax.tree.map(jnp.copy, tiny_params("scalar")), tx)
  for _ in range(150):
    state, metrics = step(state, batch, jax.random.key(0))
  logits = preference_model.preference_logits(
    model.apply, state.params, jnp.asarray(batch.tokens), batch.mask
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


def test_microbatches_change_nothing(model, comparisons):
  batch = batch_of(comparisons)
  results = []
  for parts in (1, 4):
    tx = optax.sgd(0.1)
    config = preference_model.PreferenceModelConfig(microbatches=parts)
    step = preference_model.make_preference_model_step(model.apply, tx, config)
    state = init_state(jax.tree.map(jnp.copy, tiny_params("scalar")), tx)
    state, metrics = step(state, batch, jax.random.key(0))
    results.append((state.params, metrics["loss"]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *results)
