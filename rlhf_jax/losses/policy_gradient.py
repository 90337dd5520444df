"""Policy-gradient losses over response tokens, and the reward PPO optimises."""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked

# exp of anything larger overflows float32 long after the clip has cut the gradient.
_MAX_LOG_RATIO = 20.0


@masked.elementwise
def ppo_policy_loss(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  *,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = None,
) -> jax.Array:
  """Clipped surrogate (Schulman et al., 2017, https://arxiv.org/abs/1707.06347, eq. 7), negated.

  With `rho = exp(logprobs - old_logprobs)`: `max(-A rho, -A clip(rho, 1 - low, 1 + high))`.
  Different bounds are DAPO's clip-higher (https://arxiv.org/abs/2503.14476, eq. 10).

  Args:
    logprobs: [B, T] of the sampled tokens under the policy being trained.
    old_logprobs: [B, T] under the policy that sampled them.
    advantages: [B, T].
    clip_low: How far the ratio may fall below 1.
    clip_high: How far the ratio may rise above 1.
    dual_clip: Caps the loss of a negative advantage at `-dual_clip * A` (Ye et al., 2020,
      https://arxiv.org/abs/1912.09729, eq. 5); must be above 1.

  Returns:
    [B, T] loss. The gradient flows through `logprobs` only.
  """
  chex.assert_rank([logprobs, old_logprobs, advantages], 2)
  chex.assert_equal_shape([logprobs, old_logprobs, advantages])
  old_logprobs, advantages = jax.lax.stop_gradient((old_logprobs, advantages))
  ratio = jnp.exp(jnp.clip(logprobs - old_logprobs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
  clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  loss = jnp.maximum(-advantages * ratio, -advantages * clipped)
  if dual_clip is None:
    return loss
  return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


@masked.elementwise
def ppo_value_loss(
  values: jax.Array, old_values: jax.Array, returns: jax.Array, *, clip: float = 0.2
) -> jax.Array:
  """`0.5 max((V - R)^2, (clip(V, V_old +- clip) - R)^2)`.

  Args:
    values: [B, T] under the critic being trained.
    old_values: [B, T] when the rollout was made.
    returns: [B, T] targets.
    clip: How far a value may move before its gradient stops.

  Returns:
    [B, T] loss. The gradient flows through `values` only.
  """
  chex.assert_rank([values, old_values, returns], 2)
  chex.assert_equal_shape([values, old_values, returns])
  old_values, returns = jax.lax.stop_gradient((old_values, returns))
  clipped = jnp.clip(values, old_values - clip, old_values + clip)
  return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))


@masked.elementwise
def reinforce_loss(logprobs: jax.Array, rewards_minus_baseline: jax.Array) -> jax.Array:
  """`-(R - b) log pi(y_t)`: the policy gradient (Williams, 1992).

  Args:
    logprobs: [B, T] of the sampled tokens.
    rewards_minus_baseline: [B, T], constant in the gradient.

  Returns:
    [B, T] loss.
  """
  chex.assert_rank([logprobs, rewards_minus_baseline], 2)
  chex.assert_equal_shape([logprobs, rewards_minus_baseline])
  return -jax.lax.stop_gradient(rewards_minus_baseline) * logprobs


def kl_shaped_rewards(
  scores: jax.Array,
  logprobs: jax.Array,
  ref_logprobs: jax.Array,
  mask: jax.Array,
  *,
  kl_coef: float | jax.Array,
) -> jax.Array:
  """Token rewards of RLHF: a KL penalty on every token, the score on the last real one.

  `r_t = -kl_coef (log pi_t - log ref_t) + 1[t last] score` (Ouyang et al., 2022,
  https://arxiv.org/abs/2203.02155, eq. 2). They sum to the score minus the penalty.

  Args:
    scores: [B] reward of the whole response.
    logprobs: [B, T] of the sampled tokens under the policy that sampled them.
    ref_logprobs: [B, T] under the reference.
    mask: [B, T] bool, True on response tokens (the stop token included).
    kl_coef: Strength of the penalty.

  Returns:
    [B, T] float, 0 where masked, no gradient.
  """
  chex.assert_rank([scores, logprobs, ref_logprobs, mask], [1, 2, 2, 2])
  chex.assert_equal_shape([logprobs, ref_logprobs, mask])
  chex.assert_equal_shape_prefix([scores, mask], 1)
  scores, logprobs, ref_logprobs = map(masked.widen, (scores, logprobs, ref_logprobs))
  penalty = jnp.where(mask, kl_coef * (logprobs - ref_logprobs), 0.0)
  # The last unmasked position is the only one with an index equal to the row's maximum.
  position = jax.lax.broadcasted_iota(jnp.int32, mask.shape, 1)
  last = position == jnp.max(jnp.where(mask, position, -1), axis=1, keepdims=True)
  rewards = jnp.where(last & mask, scores[:, None], 0.0) - penalty
  return jax.lax.stop_gradient(rewards)


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
  """`1 - Var(returns - values) / Var(returns)`; 1 is a perfect critic, 0 a constant one.

  Args:
    values: [B, T].
    returns: [B, T].
    mask: [B, T] bool.

  Returns:
    [] float; 0 where the returns do not vary.
  """
  values, returns = (jnp.where(mask, masked.widen(x), 0.0) for x in (values, returns))
  variance = masked.masked_var(returns, mask)
  residual = masked.masked_var(returns - values, mask)
  return jnp.where(variance > 0, 1 - residual / jnp.where(variance > 0, variance, 1.0), 0.0)
