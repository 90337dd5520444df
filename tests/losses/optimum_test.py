"""Policy gradients end at `ref exp(score / beta)`, on every sequence there is.

Expectations are sums over the nine sequences, so nothing is left to luck. A wrong sign of the KL
penalty, a mask that is off by one or a value that leaks into a return ends somewhere else.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.losses import advantages, kl, policy_gradient
from tests.losses import tabular

BETA = 0.5
SCORE = np.random.default_rng(0).normal(size=9).astype(np.float32)
REF = tabular.draw(1)


def log_optimum():
  unnormalised = np.float64(jnp.sum(tabular.logprobs(REF), axis=1)) + SCORE / BETA
  return unnormalised - np.log(np.exp(unnormalised).sum())


def divergence(log_p, log_q):
  return float(np.sum(np.exp(log_p) * (log_p - log_q)))


def climb(loss, steps=1500, epochs=1):
  """Adam on `loss(params, old_params)`, `epochs` updates for each set of samples."""
  tx = optax.adam(0.03)

  def iteration(carry, _):
    old, _ = carry

    def update(carry, _):
      params, state = carry
      updates, state = tx.update(jax.grad(loss)(params, old), state)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(update, carry, None, length=epochs)[0], None

  start = (REF, tx.init(REF))
  run = jax.jit(lambda: jax.lax.scan(iteration, start, None, length=steps // epochs)[0][0])
  return np.float64(jnp.sum(tabular.logprobs(run()), axis=1))


def shaped(params):
  """[9, 2] token rewards: the score on the last token, the KL penalty on both."""
  return policy_gradient.kl_shaped_rewards(
    SCORE, tabular.logprobs(params), tabular.logprobs(REF), tabular.MASK, kl_coef=BETA
  )


def values_of(params):
  """[9, 2] exact value before each token of `shaped`: what a perfect critic says."""
  later = shaped(params)[:, 1].reshape(3, 3)
  second = jnp.sum(jax.nn.softmax(params["one"]) * later, axis=1)
  first = jnp.sum(tabular.probabilities(params) * jnp.sum(shaped(params), axis=1))
  return jnp.stack([jnp.full(9, first), jnp.repeat(second, 3)], axis=1)


def mean_over(params, losses):
  return jnp.sum(tabular.probabilities(params) * jnp.sum(losses, axis=1))


def ppo(lam, critic):
  """Advantages of the old policy, several clipped updates from them."""

  def loss(params, old):
    values = values_of(old) if critic else jnp.zeros((9, 2))
    gain, _ = advantages.gae(shaped(old), values, tabular.MASK, lam=lam)
    losses = policy_gradient.ppo_policy_loss(
      tabular.logprobs(params), tabular.logprobs(old), jax.lax.stop_gradient(gain)
    )
    return mean_over(old, losses)

  return loss


def of_groups(policy_loss, advantage, penalty):
  """A loss over every pair of samples of the old policy, the KL in the reward or in the loss."""

  def loss(params, old):
    total = jnp.sum(shaped(old), axis=1) if penalty is None else jnp.asarray(SCORE)
    gain = jax.lax.stop_gradient(advantage(total[tabular.PAIRS])).reshape(162, 1)
    logprobs, behaviour = (
      tabular.logprobs(x)[tabular.PAIRS].reshape(162, 2) for x in (params, old)
    )
    losses = policy_loss(logprobs, behaviour, jnp.broadcast_to(gain, (162, 2)))
    losses = jnp.mean(jnp.sum(losses, axis=1).reshape(81, 2), axis=1)
    result = jnp.sum(tabular.pair_probabilities(old) * losses)
    if penalty is not None:
      result += mean_over(old, penalty(tabular.logprobs(params), tabular.logprobs(REF)))
    return result

  return loss


def centred(rewards):
  return 2 * advantages.group_normalize(rewards, scale=False)  # Of 2 samples: N / (N - 1).


def reinforce(logprobs, behaviour, gain):
  return policy_gradient.reinforce_loss(logprobs, gain)


def gspo(logprobs, behaviour, gain):
  return policy_gradient.gspo_loss(logprobs, behaviour, gain, np.ones(logprobs.shape, bool))


def p3o(function):
  def loss(params, old):
    rewards = jnp.sum(shaped(old), axis=1)[tabular.PAIRS]
    logprobs, behaviour = (
      jnp.sum(tabular.logprobs(x), axis=1)[tabular.PAIRS] for x in (params, old)
    )
    return jnp.sum(tabular.pair_probabilities(old) * function(logprobs, behaviour, rewards))

  return loss


def reverse_kl(logprobs, ref_logprobs):
  return BETA * kl.reverse_kl_loss(logprobs, ref_logprobs, tabular.MASK)


METHODS = {
  "ppo": (ppo(0.95, critic=True), 4),
  "ppo without critic": (ppo(1.0, critic=False), 4),
  "rloo": (of_groups(reinforce, advantages.leave_one_out, None), 1),
  "rloo, penalty in the loss": (of_groups(reinforce, advantages.leave_one_out, reverse_kl), 1),
  "grpo": (of_groups(policy_gradient.ppo_policy_loss, centred, None), 4),
  "grpo, penalty in the loss": (of_groups(policy_gradient.ppo_policy_loss, centred, reverse_kl), 1),
  "cispo": (of_groups(policy_gradient.cispo_loss, centred, None), 1),
  "gspo": (of_groups(gspo, centred, None), 1),
  "p3o": (p3o(policy_gradient.p3o_loss), 4),
  "p3o, separate clips": (p3o(policy_gradient.p3o_separate_loss), 4),
}


@pytest.mark.parametrize("name", METHODS)
def test_ends_at_the_optimum(name):
  loss, epochs = METHODS[name]
  result = climb(loss, epochs=epochs)
  assert divergence(np.float64(jnp.sum(tabular.logprobs(REF), axis=1)), log_optimum()) > 0.3
  assert divergence(result, log_optimum()) < 1e-3


def token_level(estimator):
  """Distributions [3] and [3, 3] of both tokens after training with a penalty per token."""

  def penalty(logprobs, ref_logprobs):
    return BETA * estimator(logprobs, ref_logprobs)

  result = climb(of_groups(reinforce, advantages.leave_one_out, penalty))
  assert divergence(result, log_optimum()) > 5e-3
  joint = np.exp(result).reshape(3, 3)
  return joint.sum(axis=1), joint / joint.sum(axis=1, keepdims=True)


def gains(first, second):
  """Centred score of each first token, and of each second token after it."""
  score = np.float64(SCORE).reshape(3, 3)
  means = np.sum(second * score, axis=1)
  return means - first @ means, score - means[:, None]


def test_k2_in_the_loss_does_not_ask_the_first_token_about_the_second():
  """Each token ends at `ref exp(expected score / beta)`: right for the last one only."""
  first, second = token_level(kl.k2)
  ref = {name: np.float64(jax.nn.log_softmax(x)) for name, x in REF.items()}
  for policy, log_ref, gain in zip(
    (first, second), ref.values(), gains(first, second), strict=True
  ):
    residual = np.log(policy) - log_ref - gain / BETA
    np.testing.assert_allclose(np.ptp(residual, axis=-1), np.zeros(policy.shape[:-1]), atol=0.01)


def test_k3_in_the_loss_pulls_by_the_forward_kl():
  """Each token ends where `p (score - mean) = beta (p - ref)`: GRPO's penalty, as published."""
  first, second = token_level(kl.k3)
  ref = {name: np.float64(jax.nn.softmax(x)) for name, x in REF.items()}
  for policy, other, gain in zip((first, second), ref.values(), gains(first, second), strict=True):
    np.testing.assert_allclose(policy * gain, BETA * (policy - other), atol=2e-3)
