"""Policy-gradient losses over response tokens, and the reward PPO optimises.

A method is an advantage, a loss per token and a weight per token; the objective is
`sum(loss * weights)`. Below, `adv` is the module `advantages`, [B, N] groups are rows [B * N], and
the advantage of a response is repeated at each of its tokens:

| method      | advantage                                      | loss              | weights    |
|-------------|------------------------------------------------|-------------------|------------|
| REINFORCE   | reward minus any baseline, a batch mean say    | `reinforce_loss`  | "dr_grpo"  |
| ReMax       | reward minus that of the greedy response       | `reinforce_loss`  | "dr_grpo"  |
| RLOO        | `adv.leave_one_out`                            | `reinforce_loss`  | "dr_grpo"  |
| PPO         | `adv.gae` of `kl_shaped_rewards`, whitened     | `ppo_policy_loss` | "dapo"     |
| GRPO        | `adv.group_normalize`                          | `ppo_policy_loss` | "grpo"     |
| Dr. GRPO    | `adv.group_normalize(scale=False)`             | `ppo_policy_loss` | "dr_grpo"  |
| DAPO, BNPO  | `adv.group_normalize`                          | `ppo_policy_loss` | "dapo"     |
| CISPO       | `adv.group_normalize`                          | `cispo_loss`      | "dapo"     |
| GSPO        | `adv.group_normalize`                          | `gspo_loss`       | "grpo"     |
| CGPO's CRPG | `group_normalize(scale=False)` of              | `reinforce_loss`  | "dr_grpo"  |
|             | `shaping.constrained_reward`                   |                   |            |

A penalty `beta KL` enters the reward (`kl_shaped_rewards`, RLOO, PPO) or is added to the loss
(`kl.k3`, GRPO); see `kl` for which gradient each has. PPO-ptx (Ouyang et al., 2022, eq. 2) adds
`coef * supervised.nll` of a batch of pretraining text to the PPO loss. Where the sampler's
probabilities differ from the trainer's, multiply the loss by `truncated_importance_weights`.
"""

import math

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked

# Of ratios that are weights, which have no gradient to lose, and are multiplied by others.
_MAX_LOG_WEIGHT = 20.0


def clip_range(low: float, high: float) -> dict[str, float]:
  """Returns `clip_low` and `clip_high` of the losses below; a distance of 0 does not clip."""
  return {"clip_low": low or math.inf, "clip_high": high or math.inf}


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
    logprobs: [B, T] log-probabilities of the sampled tokens under the policy being trained.
    old_logprobs: [B, T] log-probabilities under the policy that sampled them.
    advantages: [B, T].
    clip_low: Distance of the lower bound of the ratio from 1.
    clip_high: Distance of the upper bound of the ratio from 1.
    dual_clip: Factor above 1 that caps the loss of a negative advantage at `-dual_clip * A` (Ye et
      al., 2020, https://arxiv.org/abs/1912.09729, eq. 5). None for no cap.

  Returns:
    [B, T] loss. The gradient flows through `logprobs` only.
  """
  chex.assert_rank([logprobs, old_logprobs, advantages], 2)
  chex.assert_equal_shape([logprobs, old_logprobs, advantages])
  old_logprobs, advantages = jax.lax.stop_gradient((old_logprobs, advantages))
  ratio = jnp.exp(jnp.clip(logprobs - old_logprobs, -masked.MAX_EXPONENT, masked.MAX_EXPONENT))
  clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  loss = jnp.maximum(-advantages * ratio, -advantages * clipped)
  if dual_clip is None:
    return loss
  return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


@masked.elementwise
def ppo_value_loss(
  values: jax.Array, old_values: jax.Array, returns: jax.Array, *, clip: float | None = 0.2
) -> jax.Array:
  """`0.5 max((V - R)^2, (clip(V, V_old +- clip) - R)^2)`.

  Args:
    values: [B, T] values from the critic being trained.
    old_values: [B, T] values at the time of the rollout.
    returns: [B, T] targets.
    clip: Distance that a value may move from its old value before its gradient stops; None does
      not clip.

  Returns:
    [B, T] loss. The gradient flows through `values` only.
  """
  chex.assert_rank([values, old_values, returns], 2)
  chex.assert_equal_shape([values, old_values, returns])
  old_values, returns = jax.lax.stop_gradient((old_values, returns))
  if clip is None:
    return 0.5 * jnp.square(values - returns)
  clipped = jnp.clip(values, old_values - clip, old_values + clip)
  return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))


@masked.elementwise
def reinforce_loss(logprobs: jax.Array, rewards_minus_baseline: jax.Array) -> jax.Array:
  """`-(R - b) log pi(y_t)`: the policy gradient (Williams, 1992).

  Args:
    logprobs: [B, T] log-probabilities of the sampled tokens.
    rewards_minus_baseline: [B, T], constant in the gradient.

  Returns:
    [B, T] loss.
  """
  chex.assert_rank([logprobs, rewards_minus_baseline], 2)
  chex.assert_equal_shape([logprobs, rewards_minus_baseline])
  return -jax.lax.stop_gradient(rewards_minus_baseline) * logprobs


@masked.elementwise
def cispo_loss(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  *,
  clip_low: float = 1.0,
  clip_high: float = 4.0,
) -> jax.Array:
  """Clipped importance weight times log-probability: no token loses its gradient.

  CISPO (MiniMax-M1, 2025, https://arxiv.org/abs/2506.13585, eq. 4 and 5), negated, with `sg` the
  stopped gradient: `-sg(clip(rho, 1 - low, 1 + high)) A log pi(y_t)`.

  Args:
    logprobs: [B, T] log-probabilities of the sampled tokens under the policy being trained.
    old_logprobs: [B, T] log-probabilities under the policy that sampled them.
    advantages: [B, T].
    clip_low: Distance of the lower bound of the weight from 1; 1 is no bound.
    clip_high: Distance of the upper bound of the weight from 1.

  Returns:
    [B, T] loss. The gradient flows through `logprobs` only.
  """
  chex.assert_rank([logprobs, old_logprobs, advantages], 2)
  chex.assert_equal_shape([logprobs, old_logprobs, advantages])
  ratio = jnp.exp(jnp.clip(logprobs - old_logprobs, -masked.MAX_EXPONENT, masked.MAX_EXPONENT))
  weight = jax.lax.stop_gradient(jnp.clip(ratio, 1 - clip_low, 1 + clip_high))
  return reinforce_loss(logprobs, weight * advantages)


def gspo_loss(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  clip_low: float = 3e-4,
  clip_high: float = 4e-4,
) -> jax.Array:
  """Clipped surrogate with one ratio per response, the geometric mean of its token ratios.

  GSPO-token (Zheng et al., 2025, https://arxiv.org/abs/2507.18071, eq. 13 and 14): the ratio of
  token t has the value `s = exp(mean_t (log pi_t - log old_t))` and the gradient
  `s grad log pi_t`. With one advantage for all tokens, the mean over tokens is GSPO (eq. 5 to 7).

  Args:
    logprobs: [B, T] log-probabilities of the sampled tokens under the policy being trained.
    old_logprobs: [B, T] log-probabilities under the policy that sampled them.
    advantages: [B, T].
    mask: [B, T] bool, True on response tokens.
    clip_low: Distance of the lower bound of the ratio from 1; far smaller than for token ratios.
    clip_high: Distance of the upper bound of the ratio from 1.

  Returns:
    [B, T] loss. The gradient flows through `logprobs` only.
  """
  chex.assert_rank([logprobs, old_logprobs, advantages, mask], 2)
  chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
  old_logprobs = jax.lax.stop_gradient(masked.widen(old_logprobs))
  log_ratio = jnp.where(mask, masked.widen(logprobs) - old_logprobs, 0.0)
  mean = masked.masked_mean(log_ratio, mask, axis=1)[:, None]
  shared = jax.lax.stop_gradient(mean) + log_ratio - jax.lax.stop_gradient(log_ratio)
  return ppo_policy_loss(
    shared, jnp.zeros_like(shared), advantages, clip_low=clip_low, clip_high=clip_high
  )


def _pairs(
  logprobs: jax.Array, old_logprobs: jax.Array, rewards: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Checks the arrays; returns log-ratios [B, 2] and the difference of the rewards [B]."""
  chex.assert_rank([logprobs, old_logprobs, rewards], 2)
  chex.assert_equal_shape([logprobs, old_logprobs, rewards])
  chex.assert_axis_dimension(logprobs, 1, 2)
  logprobs, old_logprobs, rewards = map(masked.widen, (logprobs, old_logprobs, rewards))
  return logprobs - jax.lax.stop_gradient(old_logprobs), rewards[:, 0] - rewards[:, 1]


@masked.elementwise
def _joint_clip(first: jax.Array, second: jax.Array, gap: jax.Array, *, clip: float) -> jax.Array:
  product = jnp.exp(jnp.clip(first + second, -_MAX_LOG_WEIGHT, _MAX_LOG_WEIGHT))
  weight = jax.lax.stop_gradient(product * gap)
  bound = jnp.log1p(clip)
  moved = first - second
  return 0.5 * jnp.maximum(-weight * moved, -weight * jnp.clip(moved, -bound, bound))


def p3o_loss(
  logprobs: jax.Array, old_logprobs: jax.Array, rewards: jax.Array, *, clip: float = 0.2
) -> jax.Array:
  """Pairwise PPO with one clip on the ratio of the two ratios: a trust region without a critic.

  P3O (Wu et al., 2023, https://arxiv.org/abs/2310.00212), variant 2. With
  `v = log rho_1 - log rho_2`, `d = r_1 - r_2` and `c = log(1 + clip)`:
  `-sg(rho_1 rho_2) min(d v, d clip(v, -c, c)) / 2`. At ratio 1 it is RLOO with two samples. It is
  invariant to a shift of both rewards. Inside the clip both variants have the gradient of the
  paper; where exactly the clip acts is our reading of the paper.

  Args:
    logprobs: [B, 2] log-probabilities of two responses to one prompt under the policy being
      trained, summed over tokens.
    old_logprobs: [B, 2] log-probabilities under the policy that sampled them.
    rewards: [B, 2] rewards minus the KL penalty: `r - beta (log old - log ref)`.
    clip: Bound on the ratio of the two ratios: it stays between `1 / (1 + clip)` and `1 + clip`.

  Returns:
    [B] loss. The gradient flows through `logprobs` only.
  """
  log_ratios, gap = _pairs(logprobs, old_logprobs, rewards)
  return _joint_clip(log_ratios[:, 0], log_ratios[:, 1], gap, clip=clip)


def p3o_separate_loss(
  logprobs: jax.Array, old_logprobs: jax.Array, rewards: jax.Array, *, clip: float = 0.2
) -> jax.Array:
  """Pairwise PPO with a clip on the ratio of each response: P3O, variant 1; see `p3o_loss`.

  It is half the sum of two clipped surrogates, with advantages `sg(rho_2) (r_1 - r_2)` and
  `sg(rho_1) (r_2 - r_1)`.

  Args:
    logprobs: [B, 2] log-probabilities of two responses to one prompt under the policy being
      trained, summed over tokens.
    old_logprobs: [B, 2] log-probabilities under the policy that sampled them.
    rewards: [B, 2] rewards minus the KL penalty.
    clip: Distance of the bounds of each ratio from 1.

  Returns:
    [B] loss. The gradient flows through `logprobs` only.
  """
  log_ratios, gap = _pairs(logprobs, old_logprobs, rewards)
  gaps = jnp.stack([gap, -gap], axis=1)
  other = jnp.exp(jnp.clip(log_ratios[:, ::-1], -_MAX_LOG_WEIGHT, _MAX_LOG_WEIGHT))
  losses = ppo_policy_loss(
    log_ratios, jnp.zeros_like(log_ratios), gaps * other, clip_low=clip, clip_high=clip
  )
  return 0.5 * jnp.sum(losses, axis=1)


@masked.elementwise
def truncated_importance_weights(
  logprobs: jax.Array, sampler_logprobs: jax.Array, *, cap: float = 2.0
) -> jax.Array:
  """`min(pi(y_t) / mu(y_t), cap)`: corrects for a sampler that differs slightly from the policy.

  Espeholt et al., 2018, https://arxiv.org/abs/1802.01561, eq. 1 (`rho` there). A sampler with other
  kernels or another precision gives the same token a different probability. Without the weight the
  policy drifts; without the cap the weight of a rare token is unbounded.

  Args:
    logprobs: [...] log-probabilities of the sampled tokens, computed by the trainer.
    sampler_logprobs: Same shape, log-probabilities computed by the sampler.
    cap: Largest weight.

  Returns:
    Same shape, in (0, cap], a constant in the gradient. Multiply any per-token loss by it.
  """
  chex.assert_equal_shape([logprobs, sampler_logprobs])
  log_ratio = jnp.clip(logprobs - sampler_logprobs, -_MAX_LOG_WEIGHT, _MAX_LOG_WEIGHT)
  return jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio), cap))


def token_weights(
  mask: jax.Array, aggregation: str, *, length: float | jax.Array | None = None
) -> jax.Array:
  """Weights of the tokens, such that `sum(losses * weights)` is the objective of the batch.

  - "grpo": mean over tokens, then over responses (https://arxiv.org/abs/2402.03300, eq. 3).
    Tokens of long responses count less.
  - "dr_grpo": sum over tokens divided by a constant, then mean over responses
    (https://arxiv.org/abs/2503.20783, section 3.2): the policy gradient up to that factor.
    REINFORCE and RLOO are this with length 1.
  - "dapo": mean over all tokens (https://arxiv.org/abs/2503.14476, eq. 8).

  Call it once on the whole batch, before it is split into micro-batches: their sums then add up to
  the objective. Applying "dapo" to each micro-batch separately is BNPO.

  Args:
    mask: [B, T] bool, True on response tokens that count.
    aggregation: One of the names above.
    length: The constant of "dr_grpo"; T when None.

  Returns:
    [B, T] float32; 0 where masked. Empty responses are not counted in the means.

  Raises:
    KeyError: If there is no aggregation of this name.
  """
  chex.assert_rank(mask, 2)
  responses = jnp.sum(jnp.any(mask, axis=1))
  units = {
    "grpo": responses * jnp.sum(mask, axis=1, keepdims=True),
    "dr_grpo": responses * (mask.shape[1] if length is None else length),
    "dapo": jnp.sum(mask),
  }[aggregation]
  return jnp.where(mask, 1 / jnp.maximum(units, 1).astype(jnp.float32), 0.0)


def kl_shaped_rewards(
  scores: jax.Array,
  logprobs: jax.Array,
  ref_logprobs: jax.Array,
  mask: jax.Array,
  *,
  kl_coef: float | jax.Array,
) -> jax.Array:
  """Token rewards of RLHF: a KL penalty on every token, plus the score on the last real token.

  `r_t = -kl_coef (log pi_t - log ref_t) + 1[t last] score` (Ouyang et al., 2022,
  https://arxiv.org/abs/2203.02155, eq. 2). They sum to the score minus the penalty.

  Args:
    scores: [B] reward of the whole response.
    logprobs: [B, T] log-probabilities of the sampled tokens under the policy that sampled them.
    ref_logprobs: [B, T] log-probabilities under the reference.
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
