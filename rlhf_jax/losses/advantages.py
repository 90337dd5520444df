"""Advantage estimators. None of them whitens: that is `masked.whiten`, over the global batch."""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked


def gae(
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  *,
  gamma: float = 1.0,
  lam: float = 0.95,
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation (Schulman et al., 2015, https://arxiv.org/abs/1506.02438).

  With `delta_t = r_t + gamma V_{t+1} - V_t` (eq. 10) and `A_t = delta_t + gamma lam A_{t+1}`
  (eq. 16); both successors are 0 after the last unmasked token, where the episode ends.

  Args:
    rewards: [B, T] reward of each token.
    values: [B, T] value before each token.
    mask: [B, T] bool, True on response tokens, which must be contiguous in each row.
    gamma: Discount per token.
    lam: Weight of longer returns; 1 is Monte Carlo, 0 the one-step error.

  Returns:
    Advantages and returns (`advantages + values`), [B, T] each, 0 where masked. No gradient is
    stopped.
  """
  chex.assert_rank([rewards, values, mask], 2)
  chex.assert_equal_shape([rewards, values, mask])
  rewards = jnp.where(mask, masked.widen(rewards), 0.0)
  values = jnp.where(mask, masked.widen(values), 0.0)

  def backward(carry: tuple[jax.Array, jax.Array], now: tuple[jax.Array, jax.Array, jax.Array]):
    next_advantage, next_value = carry
    reward, value, on = now
    advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
    advantage = jnp.where(on, advantage, 0.0)
    return (advantage, value), advantage

  end = jnp.zeros_like(values[:, 0])
  # Padding has value 0 and advantage 0, so scanning over it is the same as ending before it.
  _, advantages = jax.lax.scan(backward, (end, end), (rewards.T, values.T, mask.T), reverse=True)
  return advantages.T, advantages.T + values


def leave_one_out(rewards: jax.Array) -> jax.Array:
  """Reward minus the mean reward of the other samples of the same prompt (RLOO).

  Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740, eq. 7.

  Args:
    rewards: [B, N] with N >= 2 samples per prompt.

  Returns:
    [B, N] advantages; each row sums to 0.
  """
  chex.assert_rank(rewards, 2)
  chex.assert_axis_dimension_gteq(rewards, 1, 2)
  rewards, n = masked.widen(rewards), rewards.shape[1]
  return (rewards - jnp.mean(rewards, axis=1, keepdims=True)) * (n / (n - 1))


def group_normalize(rewards: jax.Array, *, eps: float = 1e-4, scale: bool = True) -> jax.Array:
  """Reward standardised over the samples of the same prompt (GRPO).

  Shao et al., 2024, https://arxiv.org/abs/2402.03300, section 4.1.2. The standard deviation has
  Bessel's correction. A group of equal rewards has advantage 0.

  Args:
    rewards: [B, N] with N >= 2 samples per prompt.
    eps: Added to the standard deviation.
    scale: False only centres (Dr. GRPO, https://arxiv.org/abs/2503.20783).

  Returns:
    [B, N] advantages.
  """
  chex.assert_rank(rewards, 2)
  chex.assert_axis_dimension_gteq(rewards, 1, 2)
  rewards = masked.widen(rewards)
  centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
  if not scale:
    return centred
  # The square root has no finite gradient at 0, where all rewards of a group are equal.
  variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / (rewards.shape[1] - 1)
  std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
  return centred / (std + eps)
