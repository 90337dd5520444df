"""Reward models against loops over pairs and rankings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import given, reward_model
from rlhf_jax.losses import masked
from rlhf_jax.train_step import gradients, init_state
from rlhf_jax.types import RankingBatch, TokenBatch
from tests.algorithms import toy
from tests.algorithms.case import ROWS, Case
from tests.testing import compilations, pack

PAD, EOS, V = 0, 2, 16
GOOD = 7  # More of this token is better.
PROMPT, T = 3, 10


def make_batch(rows=16, seed=0):
  """Pairs that share a prompt, of unequal lengths; the one with more `GOOD` tokens is chosen."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(8, V, size=(rows, 2, T))
  tokens[:, 1, :PROMPT] = tokens[:, 0, :PROMPT]
  end = rng.integers(PROMPT + 2, T, size=(rows, 2, 1))
  at = np.arange(T)
  response = (at >= PROMPT) & (at < end)
  good = rng.random((rows, 2, T)) < np.array([0.6, 0.1])[None, :, None]
  tokens = np.where(response & good, GOOD, tokens)
  tokens[:, 0, PROMPT], tokens[:, 1, PROMPT] = GOOD, 8  # Never a draw.
  tokens = np.where(at == end, EOS, np.where(at > end, PAD, tokens)).astype(np.int32)
  return TokenBatch(jnp.asarray(tokens), jnp.asarray((at >= PROMPT) & (at <= end)))


K = 4


def make_rankings(rows=12, seed=0):
  """Rankings of two to `K` responses with ties; what stands in empty places is arbitrary."""
  rng = np.random.default_rng(seed)
  pairs = [make_batch(rows, seed + i) for i in range(K)]
  tokens = np.stack([pair.tokens[:, i % 2] for i, pair in enumerate(pairs)], axis=1)
  mask = np.stack([pair.mask[:, i % 2] for i, pair in enumerate(pairs)], axis=1)
  real = np.arange(K) < rng.integers(2, K + 1, size=(rows, 1))
  ranks = np.sort(rng.integers(0, 3, size=(rows, K)), axis=1)
  ranks -= ranks[:, :1]
  ranks[:, 1] = np.maximum(ranks[:, 1], 1)  # Always a pair.
  ranks = np.maximum.accumulate(ranks, axis=1)
  ranks[1, :2] = 0
  real[1] = np.arange(K) < 2  # But for this row.
  batch = RankingBatch(tokens, mask & real[:, :, None], ranks.astype(np.int32), real)
  return jax.tree.map(jnp.asarray, batch)


def loop_over_pairs(scores, batch):
  """Scores (better, worse) of every pair of every row, in float64."""
  scores, ranks, real = (np.asarray(x) for x in (scores, batch.ranks, batch.real))
  return [
    [
      (float(scores[b, i]), float(scores[b, j]))
      for i in range(K)
      for j in range(K)
      if real[b, i] and real[b, j] and ranks[b, i] < ranks[b, j]
    ]
    for b in range(len(scores))
  ]


PARAMS = toy.score_params()
scores_of = jax.jit(functools.partial(given.read_scores, toy.scores))


@functools.partial(jax.jit, static_argnums=2)
def run(params, batch, config):
  return reward_model.loss_fn(params, batch, jax.random.key(0), apply_fn=toy.scores, config=config)


def loss_of(batch, **settings):
  return run(PARAMS, batch, reward_model.RewardModelConfig(**settings))


def case(make, **settings):
  return Case(
    reward_model.make_reward_model_step,
    reward_model.RewardModelConfig(**settings),
    lambda seed: jax.device_get(make(ROWS, seed)),
    toy.scores,
    PARAMS,
  )


CASES = {
  "": case(make_batch, centering_coef=0.1),
  "terms": case(make_batch, centering_coef=0.1, margin=0.3, label_smoothing=0.1),
  "rankings": case(make_rankings, centering_coef=0.1),
}


def test_swapping_the_sides_flips_the_margin():
  batch = make_batch()
  swapped = TokenBatch(batch.tokens[:, ::-1], batch.mask[:, ::-1])
  loss, a = loss_of(batch)
  other, b = loss_of(swapped)
  np.testing.assert_allclose(a["reward/margin"], -b["reward/margin"], atol=1e-6)
  np.testing.assert_allclose(a["reward/accuracy"], 1 - b["reward/accuracy"], atol=1e-6)
  np.testing.assert_allclose(a["reward/chosen"], b["reward/rejected"], atol=1e-6)
  # -log sigmoid(d) + log sigmoid(-d) = -d.
  np.testing.assert_allclose(loss - other, -a["reward/margin"], atol=1e-5)


def test_order_of_the_pairs_changes_nothing():
  batch = make_batch()
  order = np.random.default_rng(0).permutation(16)
  want = scores_of(PARAMS, batch)
  shuffled = jax.tree.map(lambda x: x[order], batch)
  np.testing.assert_allclose(scores_of(PARAMS, shuffled), want[order], atol=1e-6)


@pytest.mark.parametrize(
  "settings", [{}, {"label_smoothing": 0.1}, {"margin": 0.5}, {"centering_coef": 0.3}]
)
def test_loss_matches_numpy(settings):
  batch = make_batch()
  scores = np.asarray(scores_of(PARAMS, batch), np.float64)
  d = scores[:, 0] - scores[:, 1] - settings.get("margin", 0.0)
  smoothing = settings.get("label_smoothing", 0.0)
  want = (1 - smoothing) * np.logaddexp(0, -d) + smoothing * np.logaddexp(0, d)
  want += settings.get("centering_coef", 0.0) * scores.sum(axis=1) ** 2
  loss, _ = loss_of(batch, **settings)
  np.testing.assert_allclose(loss, want.mean(), rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_packing_changes_no_loss_and_no_gradient(parts):
  batch = make_batch(rows=6)
  packed = pack(batch, [[3, 0, 5], [1], [2], [4]], length=3 * T)
  config = reward_model.RewardModelConfig(margin=0.2, label_smoothing=0.1, centering_coef=0.3)
  loss = functools.partial(reward_model.loss_fn, apply_fn=toy.scores, config=config)
  run = jax.jit(functools.partial(gradients, loss), static_argnums=3)
  want, expected = run(PARAMS, batch, jax.random.key(0), 1)
  got, metrics = run(PARAMS, packed, jax.random.key(0), parts)
  assert metrics["weight"] == 6
  for a, b in ((got, want), (metrics, expected)):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), a, b)


@pytest.mark.parametrize("centering", [0.0, 0.3])
def test_rankings_are_learnt_by_all_pairs_of_a_prompt(centering):
  batch = make_rankings()
  scores = np.zeros((12, K))
  for b, k in np.ndindex(12, K):
    if batch.real[b, k]:
      last = int(np.flatnonzero(batch.mask[b, k])[-1])
      scores[b, k] = toy.scores(PARAMS, batch.tokens[b, k][None])[0, last]
  pairs = loop_over_pairs(scores, batch)
  assert [len(row) for row in pairs].count(0) == 1  # A tie, which counts for nothing.

  def mean(value):
    return np.mean([np.mean([value(*pair) for pair in row]) for row in pairs if row])

  loss, metrics = loss_of(batch, centering_coef=centering)
  want = mean(lambda a, b: np.logaddexp(0, b - a) + centering * (a + b) ** 2)
  np.testing.assert_allclose(loss, want, rtol=1e-4)
  np.testing.assert_allclose(metrics["reward/margin"], mean(lambda a, b: a - b), atol=1e-5)
  np.testing.assert_allclose(metrics["reward/accuracy"], mean(lambda a, b: a > b), atol=1e-6)
  np.testing.assert_allclose(metrics["reward/chosen"], mean(lambda a, b: a), atol=1e-5)
  np.testing.assert_allclose(metrics["reward/rejected"], mean(lambda a, b: b), atol=1e-5)
  assert metrics["tokens"] == batch.mask.sum()


def test_a_ranking_of_two_is_a_pair():
  pairs = make_batch()
  ranks = jnp.tile(jnp.int32([0, 1]), (16, 1))
  rankings = RankingBatch(*pairs, ranks, jnp.ones((16, 2), bool))

  config = reward_model.RewardModelConfig(centering_coef=0.1)
  both = jax.value_and_grad(run, has_aux=True)
  (want, want_metrics), want_grad = both(PARAMS, pairs, config)
  (loss, metrics), grad = both(PARAMS, rankings, config)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  close(loss, want)
  jax.tree.map(close, metrics, want_metrics)
  jax.tree.map(close, grad, want_grad)


@pytest.mark.parametrize("settings", [{"margin": 0.5}, {"label_smoothing": 0.1}])
def test_settings_of_pairs_are_refused_for_rankings(settings):
  with pytest.raises(ValueError, match="are for pairs"):
    loss_of(make_rankings(), **settings)


def test_a_tie_is_half_correct():
  scores = jnp.float32([[1, 0], [0, 1], [2, 2], [3, 1]])
  metrics = reward_model.pair_metrics(scores)
  assert metrics["reward/accuracy"] == 2.5 / 4
  assert metrics["reward/chosen"] == 1.5
  assert metrics["reward/rejected"] == 1.0
  assert metrics["reward/margin"] == 0.5
  batch = make_batch()
  same = jax.tree.map(lambda x: x.at[:, 1].set(x[:, 0]), batch)
  loss, metrics = loss_of(same)
  assert metrics["reward/accuracy"] == 0.5
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_poisoned_scores_outside_the_last_token_change_nothing(bad):
  batch = make_batch()
  shape = batch.tokens.shape
  scores = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  last = np.zeros(shape, bool)
  for i in np.ndindex(shape[:2]):
    last[i][np.flatnonzero(batch.mask[i])[-1]] = True

  @jax.jit
  def function(table):
    config = reward_model.RewardModelConfig(centering_coef=0.1)
    return jax.value_and_grad(
      lambda x: reward_model.loss_fn(
        x,
        batch,
        jax.random.key(0),
        apply_fn=lambda x, tokens: x.reshape(tokens.shape),
        config=config,
      ),
      has_aux=True,
    )(table)

  want, want_grad = function(scores)
  assert (np.asarray(want_grad)[last] != 0).all()
  (value, metrics), grad = function(np.where(last, scores, bad).astype(np.float32))
  assert (value, metrics) == want
  np.testing.assert_array_equal(grad, want_grad)
  assert (np.asarray(grad)[~last] == 0).all()


def test_learns_a_planted_preference():
  tx = optax.adam(1e-2)
  step = reward_model.make_reward_model_step(
    toy.scores, tx, reward_model.RewardModelConfig(centering_coef=0.01)
  )
  state = init_state(jax.tree.map(lambda x: 0.1 * jnp.array(x), PARAMS), tx)
  first = None
  with compilations() as names:
    for i in range(150):
      state, metrics = step(state, make_batch(32, seed=i), jax.random.key(0))
      first = metrics if first is None else first
  assert metrics["loss"] < 0.2 < first["loss"]
  assert names.count("step") == 1
  # On pairs it has not seen.
  held_out = make_batch(128, seed=1000)
  scores = scores_of(state.params, held_out)
  assert reward_model.pair_metrics(scores)["reward/accuracy"] > 0.95
  # And it does score the token, whatever the pair.
  score = lambda token: masked.last_real(  # noqa: E731
    toy.scores(state.params, jnp.full((1, 6), token).at[:, -1].set(EOS)), jnp.ones((1, 6), bool)
  )
  assert score(GOOD)[0] > score(9)[0] + 1


@pytest.mark.parametrize(
  "settings",
  [
    {"label_smoothing": -0.1},
    {"label_smoothing": 0.5},
    {"centering_coef": -0.1},
    {"microbatches": 0},
  ],
  ids=str,
)
def test_impossible_settings_are_refused(settings):
  with pytest.raises(ValueError, match=f"^{next(iter(settings))} must"):
    reward_model.RewardModelConfig(**settings)


def test_metrics_of_rankings_are_means_over_prompts_with_a_pair():
  batch = make_rankings()
  scores = np.float64(scores_of(PARAMS, batch))
  _, metrics = loss_of(batch)
  pairs = [row for row in loop_over_pairs(scores, batch) if row]
  assert metrics["weight"] == len(pairs) == 11
  want = {
    "accuracy": np.mean([np.mean([a > b for a, b in row]) for row in pairs]),
    "margin": np.mean([np.mean([a - b for a, b in row]) for row in pairs]),
    "chosen": np.mean([np.mean([a for a, _ in row]) for row in pairs]),
  }
  for name, value in want.items():
    np.testing.assert_allclose(metrics[f"reward/{name}"], value, rtol=1e-5)


@pytest.mark.parametrize("mask", [None, [[True], [True], [True], [False]]])
def test_a_tie_counts_as_half_a_correct_pair(mask):
  pairs = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
  metrics = reward_model.pair_metrics(
    pairs if mask is None else pairs[:, None], None if mask is None else jnp.array(mask)
  )
  assert metrics["reward/accuracy"] == (0.5 if mask else (1 + 0.5 + 0.5) / 4)
  assert metrics["reward/margin"] == 0
