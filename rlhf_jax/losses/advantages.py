"""Advantage estimators. None of them whitens; use `masked.whiten` over the global batch."""

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
  bootstrap: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation (Schulman et al., 2015, https://arxiv.org/abs/1506.02438).

  Computes `delta_t = r_t + gamma V_{t+1} - V_t` (eq. 10) and `A_t = delta_t + gamma lam A_{t+1}`
  (eq. 16). After the last unmasked token `A` is 0. `V` is `bootstrap` there, or 0 without one,
  because the episode has ended.

  Args:
    rewards: [B, T] reward of each token.
    values: [B, T] value before each token.
    mask: [B, T] bool, True on response tokens, which must be contiguous in each row.
    gamma: Discount per token.
    lam: Weight of longer returns; 1 is Monte Carlo, 0 the one-step error.
    bootstrap: [B] value after the last token: the critic's value for a truncated response, 0 for a
      finished one. All 0 when None.

  Returns:
    Advantages and returns (`advantages + values`), [B, T] each, 0 where masked. Gradients are not
    stopped.
  """
  chex.assert_rank([rewards, values, mask], 2)
  chex.assert_equal_shape([rewards, values, mask])
  rewards = jnp.where(mask, masked.widen(rewards), 0.0)
  values = masked.widen(values)
  end = jnp.zeros_like(values[:, 0])
  after = end if bootstrap is None else masked.widen(bootstrap)
  chex.assert_equal_shape([end, after])
  values = jnp.where(mask, values, after[:, None])

  def backward(carry: tuple[jax.Array, jax.Array], now: tuple[jax.Array, jax.Array, jax.Array]):
    next_advantage, next_value = carry
    reward, value, on = now
    advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
    advantage = jnp.where(on, advantage, 0.0)
    return (advantage, value), advantage

  # Padding has the value after the end and advantage 0, so scanning over it changes nothing.
  _, advantages = jax.lax.scan(backward, (end, after), (rewards.T, values.T, mask.T), reverse=True)
  return advantages.T, jnp.where(mask, advantages.T + values, 0.0)


def ngram_segments(mask: jax.Array, n: int | jax.Array) -> jax.Array:
  """Cuts each response into macro actions of n tokens for `macro_gae`; the last may be shorter.

  Args:
    mask: [B, T] bool, True on response tokens.
    n: Tokens per macro action, at least 1.

  Returns:
    [B, T] int32, index of the macro action of each response token.
  """
  chex.assert_rank(mask, 2)
  return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0) // n


def segments_from(mask: jax.Array, starts: jax.Array) -> jax.Array:
  """Numbers the macro actions of each response for `macro_gae`, given their first tokens.

  Args:
    mask: [B, T] bool, True on response tokens.
    starts: [B, T] bool, True on tokens that start a macro action; the first token always does.

  Returns:
    [B, T] int32, index of the macro action of each response token.
  """
  chex.assert_rank([mask, starts], 2)
  chex.assert_equal_shape([mask, starts])
  first = jnp.cumsum(mask, axis=1) == 1
  return jnp.maximum(jnp.cumsum(mask & (starts | first), axis=1, dtype=jnp.int32) - 1, 0)


def macro_gae(
  rewards: jax.Array,
  values: jax.Array,
  segment_ids: jax.Array,
  mask: jax.Array,
  *,
  gamma: float = 1.0,
  lam: float = 0.95,
  bootstrap: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`gae` over macro actions instead of tokens.

  MA-RLHF (Chai et al., 2024, https://arxiv.org/abs/2410.02743). The reward of a macro action is the
  sum of its tokens' rewards, so the return of a response does not depend on how it is cut. (The
  released code takes the mean, which shrinks the KL penalty.) Its value is the mean of its tokens'
  values. Ratio, clip and losses stay per token. With one token per macro action this is `gae`.

  Args:
    rewards: [B, T] reward of each token.
    values: [B, T] value before each token.
    segment_ids: [B, T] int, index of the macro action of each response token. It starts at 0 and
      grows by 0 or 1 from one token to the next.
    mask: [B, T] bool, True on response tokens.
    gamma: Discount per macro action.
    lam: Weight of longer returns.
    bootstrap: [B] value after the last token; see `gae`.

  Returns:
    Advantages and returns of each token's macro action, [B, T] each, 0 where masked.
  """
  chex.assert_rank([rewards, values, segment_ids, mask], 2)
  chex.assert_equal_shape([rewards, values, segment_ids, mask])
  length = mask.shape[1]
  segment_ids = jnp.where(mask, segment_ids, 0)

  @jax.vmap
  def total(x: jax.Array, ids: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(x, ids, num_segments=length)

  tokens = total(mask.astype(jnp.int32), segment_ids)
  rewards, values = (
    total(jnp.where(mask, masked.widen(x), 0.0), segment_ids) for x in (rewards, values)
  )
  values = values / jnp.maximum(tokens, 1).astype(values.dtype)
  per_segment = gae(rewards, values, tokens > 0, gamma=gamma, lam=lam, bootstrap=bootstrap)
  advantages, returns = (
    jnp.where(mask, jnp.take_along_axis(x, segment_ids, axis=1), 0.0) for x in per_segment
  )
  return advantages, returns


def _group(rewards: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  chex.assert_rank(rewards, 2)
  chex.assert_axis_dimension_gteq(rewards, 1, 2)
  mask = jnp.ones_like(rewards, dtype=bool) if mask is None else mask
  chex.assert_equal_shape([rewards, mask])
  return jnp.where(mask, masked.widen(rewards), 0.0), mask


def leave_one_out(rewards: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
  """Reward minus the mean reward of the other samples of the same prompt (RLOO).

  Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740, eq. 7.

  Args:
    rewards: [B, N] with N >= 2 samples per prompt.
    mask: [B, N] bool, False on samples to ignore; all count when None.

  Returns:
    [B, N] advantages; each row sums to 0. 0 where masked, and for a prompt's only sample.
  """
  rewards, mask = _group(rewards, mask)
  n = jnp.sum(mask, axis=1, keepdims=True).astype(rewards.dtype)
  return masked.deviations(rewards, mask, axis=1)[0] * (n / jnp.maximum(n - 1, 1))


def group_normalize(
  rewards: jax.Array, *, eps: float = 1e-4, scale: bool = True, mask: jax.Array | None = None
) -> jax.Array:
  """Reward standardised over the samples of the same prompt (GRPO).

  Shao et al., 2024, https://arxiv.org/abs/2402.03300, section 4.1.2. The standard deviation has
  Bessel's correction. Advantages are 0 in a group of equal rewards.

  Args:
    rewards: [B, N] with N >= 2 samples per prompt.
    eps: Constant added to the standard deviation.
    scale: False only centres the rewards (Dr. GRPO, https://arxiv.org/abs/2503.20783).
    mask: [B, N] bool, False on samples to ignore; all count when None.

  Returns:
    [B, N] advantages; 0 where masked, and for a prompt's only sample.
  """
  rewards, mask = _group(rewards, mask)
  centred, _ = masked.deviations(rewards, mask, axis=1)
  if not scale:
    return centred
  # The square root has no finite gradient at 0, where all rewards of a group are equal.
  variance = masked.masked_var(rewards, mask, axis=1, ddof=1)[:, None]
  std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
  return centred / (std + eps)


def equal_groups(rewards: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
  """Bools [B], True on prompts whose samples teach nothing by comparison: no two rewards differ.

  DAPO (Yu et al., 2025, https://arxiv.org/abs/2503.14476, section 3.2) samples these again.

  Args:
    rewards: [B, N] with N samples per prompt.
    mask: [B, N] bool, False on samples to ignore; all count when None.
  """
  rewards, mask = _group(rewards, mask)
  lowest = jnp.min(jnp.where(mask, rewards, jnp.inf), axis=1)
  return lowest >= jnp.max(jnp.where(mask, rewards, -jnp.inf), axis=1)
