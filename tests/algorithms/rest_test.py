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
from rlhf_jax.train_step import init_state
from rlhf_jax.types import TokenBatch


def test_thresholds_are_quantiles_of_all_responses():
  rewards = np.random.default_rng(0).normal(size=(50, 8))
  shares = []
  for quantile in (0.0, 0.5, 0.9):
    weights = rest.kept_weights(rewards, quantile, RestConfig(keep="threshold"))
    assert set(np.unique(weights)) <= {0.0, 1.0}
    threshold = np.quantile(rewards, quantile)
    np.testing.assert_array_equal(weights > 0, rewards >= threshold)
    shares.append(weights.mean())
  np.testing.assert_allclose(shares, [1.0, 0.5, 0.1], atol=0.01)


def test_advantages_do_not_depend_on_how_good_a_prompt_is():
  """Bradley-Terry determines a reward up to a function of the prompt."""
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=(50, 8))
  centred = rewards - rewards.mean(axis=1, keepdims=True)
  shifted = rewards + 5 * rng.normal(size=(50, 1))
  for loss in ("bc", "weighted"):
    config = RestConfig(loss=loss)
    weights = rest.kept_weights(rewards, 0.7, config)
    np.testing.assert_array_equal(weights > 0, centred >= np.quantile(centred, 0.7))
    np.testing.assert_allclose(rest.kept_weights(shifted, 0.7, config), weights, rtol=1e-5)


def test_wrong_answers_are_left_out_where_most_are_wrong():
  """The median of the rewards is then that of a wrong answer."""
  rewards = np.zeros((4, 4))
  rewards[0, 1] = rewards[2, :2] = 1.0
  for keep in ("threshold", "advantage"):
    weights = rest.kept_weights(rewards, 0.5, RestConfig(keep=keep))
    np.testing.assert_array_equal(weights, rewards)
  # Equal rewards of a prompt are no advantage, however their mean is rounded.
  weights = rest.kept_weights(np.array([[0.1, 0.1, 0.1], [0.7, 0.7, 0.4]]), 0.5, RestConfig())
  np.testing.assert_array_equal(weights, [[0, 0, 0], [1, 1, 0]])
  everything = rest.kept_weights(np.ones((2, 2)), 0.5, RestConfig(keep="threshold"))
  np.testing.assert_array_equal(everything, 1.0)


def test_the_best_of_each_prompt():
  rewards = np.random.default_rng(0).normal(size=(50, 8))
  weights = rest.kept_weights(rewards, 0.0, RestConfig(keep="best", quantiles=(0.0,)))
  np.testing.assert_array_equal(weights.argmax(axis=1), rewards.argmax(axis=1))
  np.testing.assert_array_equal(weights.sum(axis=1), 1.0)
  half = rest.kept_weights(rewards, 0.5, RestConfig(keep="best"))
  best = rewards.max(axis=1)
  np.testing.assert_array_equal(half.sum(axis=1) > 0, best >= np.median(best))


def test_weights_grow_exponentially_with_the_reward():
  rewards = np.random.default_rng(0).normal(size=(50, 8)) * 7
  config = RestConfig(keep="threshold", loss="weighted", temperature=0.5)
  weights = rest.kept_weights(rewards, 0.5, config)
  kept = rewards >= np.median(rewards)
  want = np.where(kept, np.exp((rewards - rewards.max()) / (0.5 * rewards.std())), 0.0)
  np.testing.assert_allclose(weights, want, rtol=1e-5)
  assert weights.max() == 1.0


def test_rewards_that_are_no_numbers_are_left_out():
  rewards = np.array([[np.nan, 1.0, 2.0], [np.inf, -np.inf, np.nan]])
  for keep in ("advantage", "threshold", "best"):
    weights = rest.kept_weights(rewards, 0.0, RestConfig(keep=keep))
    assert (weights[1] == 0).all()
    assert weights[0].tolist() == ([0, 0, 1] if keep == "best" else [0, 1, 1])
  assert (rest.kept_weights(np.full((2, 2), np.nan), 0.0, RestConfig()) == 0).all()


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


@pytest.mark.parametrize("loss", ["bc", "gold"])
@pytest.mark.parametrize("kappa", [0.0, 0.7])
def test_loss_is_a_double_loop(problem, loss, kappa):
  params, ref, batch = problem
  log = lambda table: np.float64(jax.nn.log_softmax(table))  # noqa: E731
  policy, start = log(params), log(ref)
  top = bottom = 0.0
  for row in range(7):
    for t in range(1, T):
      if batch.sequences.mask[row, t]:
        last, token = batch.sequences.tokens[row, t - 1], batch.sequences.tokens[row, t]
        nll = -policy[last, token]
        trust = np.exp(-nll) if loss == "gold" else 1.0
        forward = np.sum(np.exp(start[last]) * (start[last] - policy[last]))
        top += batch.weights[row] * (trust * nll + kappa * forward)
        bottom += batch.weights[row]
  value, metrics = rest.loss_fn(
    params,
    batch,
    jax.random.key(0),
    ref_params=ref,
    apply_fn=table_apply,
    config=RestConfig(loss=loss, kappa=kappa),
  )
  np.testing.assert_allclose(value, top / bottom, rtol=1e-5)
  np.testing.assert_allclose(metrics["weight"], bottom, rtol=1e-6)


def test_gold_follows_the_probability_and_not_its_logarithm(problem):
  """The gradient of -p is -p times that of log p: the weight is a constant."""
  params, ref, batch = problem
  options = {"ref_params": ref, "apply_fn": table_apply, "config": RestConfig(loss="gold")}
  got = jax.grad(lambda p: rest.loss_fn(p, batch, None, **options)[0])(params)

  def probability(params):
    tokens, mask = batch.sequences
    probs = jax.nn.softmax(params)[tokens[:, :-1], tokens[:, 1:]]
    weights = jnp.where(mask[:, 1:], batch.weights[:, None], 0.0)
    return -jnp.sum(weights * probs) / jnp.sum(weights)

  np.testing.assert_allclose(got, jax.grad(probability)(params), atol=1e-6)


def test_nothing_kept_gives_a_gradient_of_zero(problem):
  params, ref, batch = problem
  batch = batch._replace(weights=jnp.zeros(7))
  options = {"ref_params": ref, "apply_fn": table_apply, "config": RestConfig(kappa=0.5)}
  loss, grads = jax.value_and_grad(lambda p: rest.loss_fn(p, batch, None, **options)[0])(params)
  assert loss == 0
  np.testing.assert_array_equal(grads, 0.0)


def test_microbatches_change_nothing(problem):
  params, ref, batch = problem
  batch = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), batch)
  results = []
  for parts in (1, 4):
    tx = optax.sgd(0.1)
    step = rest.make_rest_step(table_apply, tx, RestConfig(microbatches=parts, kappa=0.3))
    state, _ = step(init_state(jnp.copy(params), tx), batch, ref, jax.random.key(0))
    results.append(state.params)
  np.testing.assert_allclose(*results, atol=1e-6)


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
      weights = jnp.asarray(rest.kept_weights(rewards, quantile, config).ravel())
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
    draw = jax.jit(functools.partial(jax.random.categorical, shape=(256, samples)))
    for i in range(150):
      drawn = np.asarray(draw(jax.random.key(i), state.params))
      weights = rest.kept_weights(reward[drawn], 0.0, config)
      tokens = np.stack([np.zeros(drawn.size, np.int32), drawn.ravel()], axis=1)
      mask = np.broadcast_to([False, True], tokens.shape)
      batch = rest.RestBatch(TokenBatch(tokens, mask), weights.ravel())
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
    ({"loss": "dpo"}, "loss must be one of"),
    ({"quantiles": ()}, "quantiles must rise"),
    ({"quantiles": (0.5, 0.5)}, "quantiles must rise"),
    ({"quantiles": (0.5, 1.0)}, "quantiles must rise"),
    ({"temperature": 0.0}, "temperature must be positive"),
    ({"kappa": -1.0}, "kappa must not be negative"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    RestConfig(**settings)
