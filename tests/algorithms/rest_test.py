"""ReST against numpy and against what its papers prove about small problems."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import rest
from rlhf_jax.algorithms.rest import RestConfig
from rlhf_jax.algorithms.selection import kept_weights
from rlhf_jax.train_step import init_state
from rlhf_jax.types import TokenBatch
from tests.algorithms import toy
from tests.algorithms.case import ROWS, Case


def weighted_batch(seed):
  weights = np.random.default_rng(seed).random(ROWS).astype(np.float32)
  weights[seed % ROWS] = 0.0
  return rest.RestBatch(toy.token_batch(ROWS, seed=seed), weights)


def case(**settings):
  def make_step(apply_fn, tx, config):
    improve, ref_params = rest.make_rest_step(apply_fn, tx, config), toy.params_of(1)
    return lambda state, batch, key: improve(state, batch, ref_params, key)

  return Case(make_step, RestConfig(**settings), weighted_batch)


CASES = {"": case(), "trust": case(trust=True, kappa=0.3)}


V, T = 5, 6


def table_apply(params, tokens):
  """Logits of the next token from a table of the token at hand."""
  return params[tokens]


@pytest.fixture
def problem():
  rng = np.random.default_rng(1)
  params, ref = rng.normal(size=(2, V, V)).astype(np.float32)
  tokens = rng.integers(0, V, (7, T)).astype(np.int32)
  lengths = rng.integers(2, T + 1, 7)
  column = np.arange(T)[None]
  mask = (column >= 1) & (column < lengths[:, None])
  weights = rng.random(7).astype(np.float32)
  weights[3] = 0.0
  return jax.tree.map(jnp.asarray, (params, ref, rest.RestBatch(TokenBatch(tokens, mask), weights)))


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("kappa", [0.0, 0.7])
def test_loss_is_a_double_loop(problem, trust, kappa):
  params, ref, batch = problem
  log = lambda table: np.float64(jax.nn.log_softmax(table))  # noqa: E731
  policy, start = log(params), log(ref)
  top = bottom = 0.0
  for row in range(7):
    for t in range(1, T):
      if batch.sequences.mask[row, t]:
        last, token = batch.sequences.tokens[row, t - 1], batch.sequences.tokens[row, t]
        nll = -policy[last, token]
        share = np.exp(-nll) if trust else 1.0
        forward = np.sum(np.exp(start[last]) * (start[last] - policy[last]))
        top += batch.weights[row] * (share * nll + kappa * forward)
        bottom += batch.weights[row]
  config = RestConfig(trust=trust, kappa=kappa)
  loss = functools.partial(rest.loss_fn, ref_params=ref, apply_fn=table_apply, config=config)
  value, metrics = jax.jit(loss)(params, batch, jax.random.key(0))
  np.testing.assert_allclose(value, top / bottom, rtol=1e-5)
  np.testing.assert_allclose(metrics["weight"], bottom, rtol=1e-6)


def test_gold_follows_the_probability_and_not_its_logarithm(problem):
  """The gradient of -p is -p times that of log p: the weight is a constant."""
  params, ref, batch = problem
  options = {"ref_params": ref, "apply_fn": table_apply, "config": RestConfig(trust=True)}
  got = jax.jit(jax.grad(lambda p: rest.loss_fn(p, batch, None, **options)[0]))(params)

  def probability(params):
    tokens, mask = batch.sequences
    probs = jax.nn.softmax(params)[tokens[:, :-1], tokens[:, 1:]]
    weights = jnp.where(mask[:, 1:], batch.weights[:, None], 0.0)
    return -jnp.sum(weights * probs) / jnp.sum(weights)

  np.testing.assert_allclose(got, jax.jit(jax.grad(probability))(params), atol=1e-6)


def test_nothing_kept_gives_a_gradient_of_zero(problem):
  params, ref, batch = problem
  batch = batch._replace(weights=jnp.zeros(7))
  options = {"ref_params": ref, "apply_fn": table_apply, "config": RestConfig(kappa=0.5)}
  loss, grads = jax.value_and_grad(lambda p: rest.loss_fn(p, batch, None, **options)[0])(params)
  assert loss == 0
  np.testing.assert_array_equal(grads, 0.0)


@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_poisoned_logits_outside_the_responses_change_nothing(problem, bad):
  _, _, batch = problem
  logits, ref = np.random.default_rng(2).normal(size=(2, 7, T, V)).astype(np.float32)
  config = RestConfig(trust=True, kappa=0.3)
  apply = lambda params, tokens: params  # noqa: E731
  used = np.pad(np.asarray(batch.sequences.mask), ((0, 0), (0, 1)))[:, 1:, None]

  @jax.jit
  def run(logits, ref):
    return jax.value_and_grad(rest.loss_fn, has_aux=True)(
      logits, batch, jax.random.key(0), ref_params=ref, apply_fn=apply, config=config
    )

  want, want_grads = run(logits, ref)
  got, grads = run(*(np.where(used, x, np.float32(bad)) for x in (logits, ref)))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  np.testing.assert_array_equal(np.where(used, grads, 0), want_grads)


def test_a_reference_can_have_a_model_of_its_own(problem):
  params, ref, batch = problem
  config = RestConfig(kappa=1.0)
  shifted = lambda params, tokens: 2 * params[tokens]  # noqa: E731
  want, got = (
    rest.loss_fn(
      params, batch, None, ref_params=r, apply_fn=table_apply, config=config, ref_apply_fn=apply
    )
    for r, apply in ((2 * ref, None), (ref, shifted))
  )
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)


BITS = 10


def bits_apply(params, tokens):
  """Independent bits: [B, 1 + BITS, 2] logits of the next one; nothing follows the last."""
  logits = jnp.concatenate([params, jnp.zeros((1, 2))])
  return jnp.broadcast_to(logits, (*tokens.shape, 2))


def share_of_ones(params):
  return float(jnp.mean(jax.nn.softmax(params)[:, 1]))


def run_rest(grow_steps, quantiles):
  """Share of ones after ReST on ten-bit strings whose reward is that share, from 0.4."""
  config = RestConfig(quantiles=quantiles)
  params = jnp.broadcast_to(jnp.log(jnp.array([0.6, 0.4])), (BITS, 2))
  tx = optax.adam(0.05)
  step = rest.make_rest_step(bits_apply, tx, config)
  for g in range(grow_steps):
    draws = jax.random.bernoulli(
      jax.random.key(g), jax.nn.softmax(params)[None, :, 1], (512, BITS)
    ).astype(jnp.int32)
    tokens = jnp.pad(draws, ((0, 0), (1, 0)))
    mask = jnp.broadcast_to(jnp.arange(1 + BITS) > 0, tokens.shape)
    rewards = np.asarray(draws.mean(axis=1)).reshape(64, 8)
    for quantile in quantiles:
      weights = jnp.asarray(kept_weights(rewards, quantile, keep="advantage").ravel())
      batch = rest.RestBatch(TokenBatch(tokens, mask), weights)
      state = init_state(params, tx)
      for _ in range(60):
        state, _ = step(state, batch, params, jax.random.key(0))
      params = jnp.copy(state.params)
  return share_of_ones(params)


def test_more_grow_and_more_improve_steps_earn_more():
  shares = [
    run_rest(1, (0.5,)),
    run_rest(1, (0.5, 0.7, 0.85)),
    run_rest(2, (0.5, 0.7, 0.85)),
    run_rest(3, (0.5, 0.7, 0.85)),
  ]
  assert shares[0] > 0.45
  assert all(a + 0.02 < b for a, b in itertools.pairwise(shares)), shares


def arm_apply(params, tokens):
  return jnp.broadcast_to(params, (*tokens.shape, params.shape[0]))


def test_forward_kl_keeps_a_share_of_every_response():
  """SuperHF's fixed point (best-of-n + kappa ref) / (1 + kappa), on a bandit of 20 arms."""
  arms, samples = 20, 16
  rng = np.random.default_rng(0)
  reward = rng.normal(size=arms)
  ref = jnp.asarray(rng.normal(size=arms), jnp.float32)
  earned, floors = [], []
  for kappa in (0.1, 0.35, 1.0):
    tx = optax.adam(optax.linear_schedule(0.2, 0.0, 150))
    config = RestConfig(keep="best", quantiles=(0.0,), kappa=kappa)
    step = rest.make_rest_step(arm_apply, tx, config)
    state = init_state(jnp.copy(ref), tx)
    for _ in range(150):
      odds = np.exp(np.float64(state.params))
      drawn = rng.choice(arms, (256, samples), p=odds / odds.sum())
      kept = np.int32(drawn[kept_weights(reward[drawn], 0.0, keep="best") > 0])
      tokens = np.stack([np.zeros_like(kept), kept], axis=1)
      mask = np.broadcast_to([False, True], tokens.shape)
      batch = rest.RestBatch(TokenBatch(tokens, mask), np.ones(len(kept), np.float32))
      state, _ = step(state, batch, ref, jax.random.key(0))
    policy = np.asarray(jax.nn.softmax(state.params))
    earned.append(policy @ reward)
    floors.append((policy / np.asarray(jax.nn.softmax(ref))).min() / (kappa / (1 + kappa)))
  assert earned[0] > earned[1] > earned[2]
  np.testing.assert_allclose(floors, 1.0, atol=0.1)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"keep": "all"}, "keep must be one of"),
    ({"quantiles": ()}, "quantiles must rise"),
    ({"quantiles": (0.5, 0.5)}, "quantiles must rise"),
    ({"quantiles": (0.5, 1.0)}, "quantiles must rise"),
    ({"temperature": -1.0}, "temperature must not be negative"),
    ({"microbatches": 0}, "microbatches must be at least 1"),
    ({"quantiles": (-0.1, 0.5)}, "quantiles must rise"),
    ({"kappa": -1.0}, "kappa must not be negative"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    RestConfig(**settings)
