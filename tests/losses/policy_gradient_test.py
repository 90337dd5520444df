import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import advantages, masked, policy_gradient
from tests.losses.case import B, Case, T, per_token, squash

LOW, HIGH = 0.2, 0.3


def arrays(n, shape=(3, 5), seed=0):
  return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)


def policy_loss(ratio, advantage, **kwargs):
  """Loss and gradient with respect to the log-probability of one token."""

  def loss(logprob):
    x = logprob.reshape(1, 1)
    a = jnp.full((1, 1), advantage)
    out = policy_gradient.ppo_policy_loss(
      x, jnp.zeros((1, 1)), a, clip_low=LOW, clip_high=HIGH, **kwargs
    )
    return out[0, 0]

  return jax.value_and_grad(loss)(jnp.log(jnp.float32(ratio)))


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_policy_loss_matches_loops(dual_clip, seed):
  logprobs, old, advantage = arrays(3, seed=seed)
  want = np.zeros((3, 5))
  for i in np.ndindex(3, 5):
    ratio = np.exp(float(logprobs[i]) - float(old[i]))
    a = float(advantage[i])
    want[i] = -min(a * ratio, a * min(max(ratio, 1 - LOW), 1 + HIGH))
    if dual_clip is not None and a < 0:
      want[i] = min(want[i], -dual_clip * a)
  result = policy_gradient.ppo_policy_loss(
    logprobs, old, advantage, clip_low=LOW, clip_high=HIGH, dual_clip=dual_clip
  )
  np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.29, 1.31, 2.0])
def test_gradient_is_zero_in_exactly_two_corners(ratio, advantage):
  _, grad = policy_loss(ratio, advantage)
  clipped = ratio > 1 + HIGH if advantage > 0 else ratio < 1 - LOW
  if clipped:
    assert grad == 0
  else:  # Moves the log-probability in the direction of the advantage, by -A rho.
    np.testing.assert_allclose(grad, -advantage * ratio, rtol=1e-5)


@pytest.mark.parametrize("advantage", [-2.0, 2.0])
@pytest.mark.parametrize("ratio", [0.5, 2.9, 3.1, 20.0])
def test_dual_clip_only_caps_negative_advantages(ratio, advantage):
  value, grad = policy_loss(ratio, advantage, dual_clip=3.0)
  plain, plain_grad = policy_loss(ratio, advantage)
  if advantage < 0 and ratio > 3:
    assert (value, grad) == (6.0, 0.0)
  else:
    assert (value, grad) == (plain, plain_grad)


def test_at_ratio_one_the_gradient_is_that_of_reinforce():
  logprobs, advantage = arrays(2)
  grad = jax.grad(
    lambda x: jnp.sum(policy_gradient.ppo_policy_loss(x, jnp.asarray(logprobs), advantage))
  )(logprobs)
  np.testing.assert_array_equal(grad, -advantage)
  reinforce = jax.grad(lambda x: jnp.sum(policy_gradient.reinforce_loss(x, advantage)))(logprobs)
  np.testing.assert_array_equal(grad, reinforce)


@pytest.mark.parametrize("log_ratio", [-200.0, -89.0, 89.0, 200.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_extreme_ratios_are_finite(log_ratio, advantage):
  x = jnp.full((1, 1), log_ratio)
  a = jnp.full((1, 1), advantage)
  value, grad = jax.value_and_grad(
    lambda x: jnp.sum(policy_gradient.ppo_policy_loss(x, jnp.zeros((1, 1)), a))
  )(x)
  assert np.isfinite(value)
  assert np.isfinite(grad).all()


def test_only_the_new_logprobs_get_a_gradient():
  inputs = arrays(3)
  grads = jax.grad(lambda *x: jnp.sum(policy_gradient.ppo_policy_loss(*x)), (0, 1, 2))(*inputs)
  assert [bool(np.any(g)) for g in grads] == [True, False, False]
  grads = jax.grad(lambda *x: jnp.sum(policy_gradient.ppo_value_loss(*x)), (0, 1, 2))(*inputs)
  assert [bool(np.any(g)) for g in grads] == [True, False, False]
  grads = jax.grad(lambda *x: jnp.sum(policy_gradient.reinforce_loss(*x)), (0, 1))(*inputs[:2])
  assert [bool(np.any(g)) for g in grads] == [True, False]


@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_value_loss_matches_loops(clip):
  values, old, returns = arrays(3, (6, 10))
  want, want_grad = np.zeros((6, 10)), np.zeros((6, 10))
  for i in np.ndindex(6, 10):
    v, o, r = (float(x[i]) for x in (values, old, returns))
    c = min(max(v, o - clip), o + clip)
    want[i] = 0.5 * max((v - r) ** 2, (c - r) ** 2)
    # Inside the clip both branches are the same; outside, only the plain one moves.
    want_grad[i] = v - r if c == v or (v - r) ** 2 > (c - r) ** 2 else 0.0
  value, grad = jax.value_and_grad(
    lambda v: jnp.sum(policy_gradient.ppo_value_loss(v, old, returns, clip=clip))
  )(values)
  np.testing.assert_allclose(value, want.sum(), rtol=1e-5)
  np.testing.assert_allclose(grad, want_grad, atol=1e-5)
  assert 0 < (want_grad == 0).sum() < 60


# All nine sequences of two tokens out of three, weighed by their probability.
SEQUENCES = np.array(list(itertools.product(range(3), repeat=2)))


def sequence_logprobs(params):
  """[9, 2] log-probabilities of each token of each sequence."""
  first, second = SEQUENCES.T
  start = jax.nn.log_softmax(params["start"])[first]
  return jnp.stack([start, jax.nn.log_softmax(params["one"])[first, second]], axis=1)


@pytest.mark.parametrize("baseline", [0.0, 1.3, -20.0])
def test_reinforce_with_shaped_rewards_is_the_exact_gradient(baseline):
  rng = np.random.default_rng(0)

  def draw():
    start, one = rng.normal(size=3), rng.normal(size=(3, 3))
    return {"start": jnp.asarray(start, jnp.float32), "one": jnp.asarray(one, jnp.float32)}

  params, ref = draw(), draw()
  score, beta = rng.normal(size=9).astype(np.float32), 0.3
  ref_logprobs = sequence_logprobs(ref)
  mask = jnp.ones((9, 2), bool)

  def objective(params):
    logprobs = jnp.sum(sequence_logprobs(params), axis=1)
    gain = score - beta * (logprobs - jnp.sum(ref_logprobs, axis=1))
    return -jnp.sum(jnp.exp(logprobs) * gain)

  def surrogate(params):
    logprobs = sequence_logprobs(params)
    rewards = policy_gradient.kl_shaped_rewards(score, logprobs, ref_logprobs, mask, kl_coef=beta)
    total = jnp.sum(rewards, axis=1, keepdims=True) - baseline
    losses = policy_gradient.reinforce_loss(logprobs, jnp.broadcast_to(total, (9, 2)))
    probability = jax.lax.stop_gradient(jnp.exp(jnp.sum(logprobs, axis=1)))
    return jnp.sum(probability * jnp.sum(losses, axis=1))

  exact, result = jax.grad(objective)(params), jax.grad(surrogate)(params)
  for name in params:
    np.testing.assert_allclose(result[name], exact[name], atol=1e-5)


MASK = np.array(
  [
    [1, 0, 0, 0, 0],  # The stop token comes first.
    [1, 1, 1, 0, 0],
    [1, 1, 1, 1, 1],
    [0, 1, 1, 1, 0],  # Behind a prompt.
    [0, 0, 0, 0, 0],
  ],
  bool,
)


@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 2.0])
def test_shaped_rewards_match_loops_and_conserve_the_score(kl_coef):
  logprobs, ref = arrays(2, MASK.shape)
  scores = np.float32([0.7, -0.9, 1e-3, 12.0, 5.0])
  want = np.zeros(MASK.shape)
  for b in range(5):
    real = np.flatnonzero(MASK[b])
    for t in real:
      want[b, t] = -kl_coef * (float(logprobs[b, t]) - float(ref[b, t]))
      want[b, t] += scores[b] if t == real[-1] else 0
  result = policy_gradient.kl_shaped_rewards(scores, logprobs, ref, MASK, kl_coef=kl_coef)
  np.testing.assert_allclose(result, want, atol=1e-6)
  kl = np.where(MASK, logprobs - ref, 0).sum(axis=1)
  conserved = np.where(MASK.any(axis=1), scores - kl_coef * kl, 0)
  np.testing.assert_allclose(np.sum(result, axis=1), conserved, atol=1e-5)


@pytest.mark.parametrize("logprob_dtype", [np.float32, np.int32])
@pytest.mark.parametrize("mask_dtype", [bool, np.int32])
@pytest.mark.parametrize("kl_coef", [0, 0.0, 1])
def test_a_fractional_score_stays_fractional(logprob_dtype, mask_dtype, kl_coef):
  zeros = np.zeros((2, 3), logprob_dtype)
  mask = np.array([[1, 1, 0], [1, 0, 0]]).astype(mask_dtype)
  result = policy_gradient.kl_shaped_rewards(
    jnp.float32([0.7, -0.9]), zeros, zeros, mask, kl_coef=kl_coef
  )
  np.testing.assert_allclose(result, [[0, 0.7, 0], [-0.9, 0, 0]], rtol=1e-6)


def test_integer_scores_become_rewards():
  zeros = np.zeros((2, 3), np.float32)
  scores, mask = np.int32([3, -2]), np.ones((2, 3), bool)
  result = policy_gradient.kl_shaped_rewards(scores, zeros + 0.5, zeros, mask, kl_coef=0.1)
  np.testing.assert_allclose(result[:, -1], [2.95, -2.05], rtol=1e-6)


def test_shaped_rewards_carry_no_gradient():
  logprobs, ref = arrays(2, MASK.shape)

  def total(scores, logprobs, ref):
    out = policy_gradient.kl_shaped_rewards(scores, logprobs, ref, MASK, kl_coef=1.0)
    return jnp.sum(out)

  grads = jax.grad(total, (0, 1, 2))(np.ones(5, np.float32), logprobs, ref)
  assert not any(np.any(g) for g in grads)


def test_shaped_rewards_to_monte_carlo_returns():
  logprobs, ref = arrays(2, MASK.shape)
  scores = arrays(1, (5,))[0]
  rewards = policy_gradient.kl_shaped_rewards(scores, logprobs, ref, MASK, kl_coef=0.1)
  _, returns = advantages.gae(rewards, arrays(1, MASK.shape, 1)[0], MASK, lam=1.0)
  kl = np.where(MASK, logprobs - ref, 0)
  for b, t in zip(*np.nonzero(MASK), strict=True):
    np.testing.assert_allclose(returns[b, t], scores[b] - 0.1 * kl[b, t:].sum(), atol=1e-5)


def test_explained_variance():
  values, returns = arrays(2, MASK.shape)
  r, v = returns[MASK].astype(np.float64), values[MASK].astype(np.float64)
  result = policy_gradient.explained_variance(values, returns, MASK)
  np.testing.assert_allclose(result, 1 - np.var(r - v) / np.var(r), rtol=1e-4)
  np.testing.assert_allclose(
    policy_gradient.explained_variance(returns, returns, MASK), 1.0, atol=1e-6
  )
  constant = np.full_like(returns, 3.0)
  np.testing.assert_allclose(
    policy_gradient.explained_variance(constant, returns, MASK), 0.0, atol=1e-5
  )
  assert policy_gradient.explained_variance(values, constant, MASK) == 0
  assert policy_gradient.explained_variance(values, returns, np.zeros_like(MASK)) == 0
  # A critic that is off by a constant explains everything: variances ignore the mean.
  np.testing.assert_allclose(
    policy_gradient.explained_variance(returns + 2, returns, MASK), 1.0, atol=1e-5
  )
  poisoned = np.where(MASK, returns, np.nan)
  assert policy_gradient.explained_variance(values, poisoned, MASK) == result


@pytest.mark.parametrize(
  "function, shapes",
  [
    (policy_gradient.ppo_policy_loss, [(2, 3), (2, 3), (2, 1)]),
    (policy_gradient.ppo_value_loss, [(2, 3), (3,), (2, 3)]),
    (policy_gradient.reinforce_loss, [(2, 3), (2, 1)]),
  ],
)
def test_bad_shapes_are_refused(function, shapes):
  with pytest.raises(AssertionError):
    function(*(jnp.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("scores, mask", [((3,), (2, 3)), ((2, 3), (2, 3)), ((2,), (2, 1))])
def test_shaped_rewards_refuse_bad_shapes(scores, mask):
  x = jnp.zeros((2, 3))
  with pytest.raises(AssertionError):
    policy_gradient.kl_shaped_rewards(jnp.zeros(scores), x, x, jnp.ones(mask, bool), kl_coef=1.0)


def shaped(mask, scores, logprobs, ref_logprobs, kl_coef):
  """The shaped rewards have no gradient: they weigh log-probabilities, as they are used."""
  rewards = policy_gradient.kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=kl_coef)
  return squash(rewards) + masked.masked_sum(
    policy_gradient.reinforce_loss(logprobs, rewards), mask
  )


CASES = {
  "ppo_policy_loss": per_token(policy_gradient.ppo_policy_loss, 3, clip_low=0.2, clip_high=0.3),
  "ppo_policy_loss/dual_clip": per_token(policy_gradient.ppo_policy_loss, 3, dual_clip=3.0),
  "ppo_value_loss": per_token(policy_gradient.ppo_value_loss, 3, clip=0.2),
  "reinforce_loss": per_token(policy_gradient.reinforce_loss, 2),
  "kl_shaped_rewards": Case(shaped, ((B,), (B, T), (B, T)), padded=(1, 2), hyper={"kl_coef": 0.3}),
  "explained_variance": Case(
    lambda m, v, r: policy_gradient.explained_variance(v, r, m), ((B, T),) * 2
  ),
}
