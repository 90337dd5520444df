"""PPO against exact answers on problems small enough to enumerate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import ppo, reading
from rlhf_jax.train_step import init_state
from tests.algorithms import tabular, toy
from tests.algorithms.case import sampled
from tests.algorithms.tabular import T, stopped_rollout, tabular_apply
from tests.testing import compilations

READ = reading.make_actor_critic_read(tabular_apply, entropy=True)


def case(**settings):
  config = ppo.PPOConfig(epochs=2, minibatches=2, **settings)
  return sampled(
    ppo.make_ppo_step,
    config,
    lambda *args, samples: ppo.make_batch(*args, config)[0],
    lambda read: functools.partial(ppo.loss_fn, read=read, config=config),
    critic=True,
  )


CASES = {"": case(), "entropy": case(entropy_coef=0.2, dual_clip=1.5, gamma=0.9)}


@pytest.mark.parametrize("settings", [{}, {"dual_clip": 3.0}], ids=["ppo", "dual_clip"])
def test_reaches_the_exact_optimum_of_the_regularised_objective(settings):
  beta, steps = 0.5, 150
  optimum = tabular.optimum(beta)
  start = tabular.sequence_logprobs(tabular.REF["policy"])
  assert tabular.divergence(start, optimum) > 0.3, "the problem must not start at its solution"
  config = ppo.PPOConfig(kl_coef=beta, epochs=2, minibatches=4, **settings)
  tx = optax.adam(optax.linear_schedule(0.03, 0.0, steps * config.updates))

  def make_batch(_, params, rollout, scores, ref_logprobs):
    values = READ(params, rollout).values
    return ppo.make_batch(rollout, scores, values, ref_logprobs, config)[0], None

  step = ppo.make_ppo_step(tabular_apply, tx, config)
  policy, _ = tabular.improve(
    step, make_batch, tabular.REF, tx, policy_of=lambda params: params["policy"], steps=steps
  )
  assert tabular.divergence(policy, optimum) < 0.01


# One program instead of many small ones: most of the time of these tests is compilation.
to_batch = jax.jit(ppo.make_batch, static_argnames="config")


@functools.partial(jax.jit, static_argnames="config")
def tabular_loss(params, batch, config):
  return ppo.loss_fn(params, batch, jax.random.key(0), read=READ, config=config)


def arrays(rows, seed=5):
  """Scores [B], values [B, T] and log-probabilities under a reference [B, T]."""
  rng = np.random.default_rng(seed)
  return tuple(rng.normal(size=s).astype(np.float32) for s in (rows, (rows, T), (rows, T)))


def test_make_batch_matches_loops():
  _, rollout, _ = stopped_rollout(32)
  scores, values, ref = arrays(32)
  config = ppo.PPOConfig(kl_coef=0.3, gamma=0.9, lam=0.8)
  batch, metrics = to_batch(rollout, scores, values, ref, config)
  want, returns, totals = [], [], []
  for b in range(32):
    n = int(rollout.response_mask[b].sum())
    rewards = [-0.3 * (float(rollout.logprobs[b, t]) - float(ref[b, t])) for t in range(n)]
    rewards[-1] += float(scores[b])
    errors = [
      rewards[t] + (0.9 * values[b, t + 1] if t + 1 < n else 0.0) - values[b, t] for t in range(n)
    ]
    a = [sum(0.72 ** (s - t) * errors[s] for s in range(t, n)) for t in range(n)]
    want += a
    returns += [a[t] + values[b, t] for t in range(n)]
    totals.append(sum(rewards))
  mask = np.asarray(batch.mask)
  np.testing.assert_array_equal(mask, rollout.response_mask[:, 1:])
  # Returns are made before the advantages are whitened.
  np.testing.assert_allclose(np.asarray(batch.returns)[mask], returns, atol=1e-5)
  want = (np.array(want) - np.mean(want)) / np.std(want)
  np.testing.assert_allclose(np.asarray(batch.advantages)[mask], want, atol=1e-4)
  np.testing.assert_array_equal(np.asarray(batch.values)[mask], values[mask])
  for x in (batch.advantages, batch.returns, batch.values, batch.rollout.logprobs):
    assert (np.asarray(x)[~mask] == 0).all()
  np.testing.assert_allclose(metrics["reward/shaped"], np.mean(totals), atol=1e-5)
  r, v = np.array(returns), values[mask]
  np.testing.assert_allclose(
    metrics["value/explained_variance"], 1 - np.var(r - v) / np.var(r), atol=1e-4
  )


def test_a_given_kl_coefficient_replaces_that_of_the_config():
  _, rollout, _ = stopped_rollout(16)
  batches = [
    to_batch(rollout, *arrays(16), ppo.PPOConfig(kl_coef=coef), kl_coef=given)
    for coef, given in ((0.3, None), (0.1, jnp.float32(0.3)))
  ]
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), *batches)


def test_whitening_is_over_the_batch_and_not_per_minibatch():
  params, rollout, _ = stopped_rollout(64)
  scores, values, ref = arrays(64)
  config = ppo.PPOConfig()
  # Sorted, so that the halves have different means.
  batch, _ = to_batch(rollout, np.sort(scores), values, ref, config)
  a, mask = np.asarray(batch.advantages), np.asarray(batch.mask)
  np.testing.assert_allclose(a[mask].mean(), 0, atol=1e-5)
  np.testing.assert_allclose(a[mask].std(), 1, rtol=1e-5)
  assert abs(a[:32][mask[:32]].mean()) > 0.3
  # The loss takes them as they are: in a minibatch, at ratio 1, it is minus their mean.
  half = jax.tree.map(lambda x: x[:32], batch)
  _, metrics = tabular_loss(params, half, config)
  np.testing.assert_allclose(metrics["loss/policy"], -a[:32][mask[:32]].mean(), rtol=1e-4)


def test_first_gradient_is_that_of_reinforce():
  params, rollout, _ = stopped_rollout(32)
  config = ppo.PPOConfig(value_coef=0.0)
  batch, _ = to_batch(rollout, *arrays(32), config)

  def reinforce(params):
    gains = batch.advantages * tabular.token_logprobs(params["policy"], rollout)
    return -jnp.sum(jnp.where(batch.mask, gains, 0.0)) / jnp.sum(batch.mask)

  grad = jax.grad(lambda p: tabular_loss(p, batch, config)[0])(params)
  want = jax.grad(reinforce)(params)
  for name in ("start", "one"):
    np.testing.assert_allclose(grad["policy"][name], want["policy"][name], atol=1e-6)
    assert not np.any(grad["value"][name])


def test_terms_add_up():
  params, rollout, _ = stopped_rollout(32)
  config = ppo.PPOConfig(value_coef=0.7, entropy_coef=0.3)
  batch, _ = to_batch(rollout, *arrays(32), config)
  moved = jax.tree.map(lambda x: 0.8 * x, params)
  loss, metrics = tabular_loss(moved, batch, config)
  want = metrics["loss/policy"] + 0.7 * metrics["loss/value"] - 0.3 * metrics["entropy"]
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  table = jax.tree.map(jax.nn.log_softmax, moved["policy"])
  first, both = -np.sum(np.exp(table["start"]) * table["start"]), np.asarray(batch.mask[:, 1])
  second = -np.sum(np.exp(table["one"]) * table["one"], axis=1)[rollout.tokens[:, 1]]
  entropy = (32 * first + second[both].sum()) / (32 + both.sum())
  np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)
  assert metrics["weight"] == batch.mask.sum()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_step_moves_towards_the_reward(sign):
  params = tabular.tabular_params(jax.random.key(0))
  rollout = tabular.sample_rollout(params["policy"], jax.random.key(1), 64)
  scores = sign * (rollout.tokens[:, 1] == 1)
  config = ppo.PPOConfig(minibatches=1, lam=1.0)
  batch, _ = to_batch(rollout, scores, jnp.zeros((64, T)), rollout.logprobs, config)
  tx = optax.sgd(1e-2)
  before = jax.nn.log_softmax(params["policy"]["start"])[1]
  state, _ = ppo.make_ppo_step(tabular_apply, tx, config)(
    init_state(params, tx), batch, jax.random.key(0)
  )
  after = jax.nn.log_softmax(state.params["policy"]["start"])[1]
  assert sign * (after - before) > 1e-5


def test_critic_learns_to_explain_the_returns():
  params = toy.actor_critic_params()
  rollout = toy.rollout_of(params["policy"], noise=0)
  scores = np.float32(rollout.tokens[:, toy.P - 1] > 8) + 3  # Of the last token of the prompt.
  # The policy stands still, so that the returns do.
  config = ppo.PPOConfig(epochs=4, minibatches=1, lam=1.0, value_clip=10.0)
  tx = optax.partition(
    {"policy": optax.set_to_zero(), "value": optax.adam(3e-2)},
    {"policy": "policy", "value": "value"},
  )
  read = jax.jit(reading.make_actor_critic_read(toy.actor_critic))
  step = ppo.make_ppo_step(toy.actor_critic, tx, config)
  state = init_state(jax.tree.map(jnp.array, params), tx)
  explained = []
  with compilations() as names:
    for _ in range(250):
      values = read(state.params, rollout).values
      batch, metrics = to_batch(rollout, scores, values, rollout.logprobs, config)
      explained.append(float(metrics["value/explained_variance"]))
      state, _ = step(state, batch, jax.random.key(0))
  assert explained[0] < 0.2
  assert explained[-1] > 0.9
  assert names.count("step") == 1
  # Nothing has touched the policy.
  jax.tree.map(np.testing.assert_array_equal, state.params["policy"], params["policy"])


@pytest.mark.parametrize(
  "settings",
  [
    {"kl_coef": -0.1},
    {"clip": -0.1},
    {"value_clip": -0.1},
    {"value_coef": -0.1},
    {"entropy_coef": -0.1},
    {"dual_clip": 1.0},
    {"dual_clip": -2.0},
    {"gamma": 1.5},
    {"lam": -0.1},
    {"epochs": 0},
  ],
  ids=str,
)
def test_impossible_settings_are_refused(settings):
  with pytest.raises(ValueError, match=f"^{next(iter(settings))} must"):
    ppo.PPOConfig(**settings)
