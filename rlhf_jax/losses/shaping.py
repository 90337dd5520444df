"""Reward shaping: turns the scores of reward models into the rewards of a policy gradient.

Everything is computed in float32 or wider, and no gradient flows. Shape the scores of responses
first. The KL penalty is added afterwards and is not shaped (`policy_gradient.kl_shaped_rewards`).
Running normalisation is `reward.normalize_scores`; PPO-max (https://arxiv.org/abs/2307.04964,
eq. 15) clips its result.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked
from rlhf_jax.losses.reward import RunningMoments

Arguments = ParamSpec("Arguments")


def _on_constants(shaping: Callable[Arguments, jax.Array]) -> Callable[Arguments, jax.Array]:
  """Widens every float array among the arguments and stops its gradient."""

  @functools.wraps(shaping)
  def on_constants(*args: Arguments.args, **kwargs: Arguments.kwargs) -> jax.Array:
    def constant(x: Any) -> Any:
      if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.stop_gradient(masked.widen(x))
      return x

    args, kwargs = jax.tree.map(constant, (args, kwargs))
    return shaping(*args, **kwargs)

  return on_constants


# Functions of one score per response.


@_on_constants
def preference_as_reward(
  scores: jax.Array, ref_scores: jax.Array, *, scale: float | jax.Array = 1.0
) -> jax.Array:
  """`mean_m sigmoid(scale (r - r_ref_m))`: probability that the response beats the reference.

  PAR (Fu et al., 2025, https://arxiv.org/abs/2502.18770). The reward is bounded, steep at first and
  flat later, so errors of the reward model at high scores are not worth exploiting. With one
  reference response it is CGPO's calibrated reward (https://arxiv.org/abs/2409.20370).

  Args:
    scores: [B] scores of the responses.
    ref_scores: [B, M] scores of the reference's responses to the same prompts; M = 1 is enough.
    scale: Steepness; 1 gives the probability according to the reward model.

  Returns:
    [B] in [0, 1]. Shifting scores and reference scores together does not change it.
  """
  chex.assert_rank([scores, ref_scores], [1, 2])
  chex.assert_equal_shape_prefix([scores, ref_scores], 1)
  return jnp.mean(jax.nn.sigmoid(scale * (scores[:, None] - ref_scores)), axis=1)


@_on_constants
def log_sigmoid_reward(scores: jax.Array, anchors: jax.Array) -> jax.Array:
  """`log sigmoid(r - anchor)`: linear below the anchor, flat above it.

  Wang et al., 2024, https://arxiv.org/abs/2402.00742. Summed over reward models, it is the log of
  the probability that a response is good according to all of them.

  Args:
    scores: [B] scores of the responses.
    anchors: [B] score that is good enough for the prompt, such as a high quantile of the
      reference's scores.

  Returns:
    [B], at most 0.
  """
  chex.assert_rank([scores, anchors], 1)
  chex.assert_equal_shape([scores, anchors])
  return jax.nn.log_sigmoid(scores - anchors)


@_on_constants
def min_max(scores: jax.Array, low: float | jax.Array, high: float | jax.Array) -> jax.Array:
  """Scales scores linearly, from 0 at `low` to 1 at `high`.

  Args:
    scores: [B].
    low: Scalar, for example the lowest score seen so far.
    high: Scalar, for example the highest score seen so far.

  Returns:
    [B] in [0, 1]; 0 where `high` is not above `low`.
  """
  chex.assert_rank([scores, low, high], [1, 0, 0])
  width = jnp.where(high > low, high - low, jnp.inf)
  return jnp.clip((scores - low) / width, 0.0, 1.0)


@_on_constants
def clip_to_moments(
  scores: jax.Array, moments: RunningMoments, *, width: float | jax.Array = 1.0
) -> jax.Array:
  """Clips scores to within `width` standard deviations of the running mean.

  Args:
    scores: [B].
    moments: Moments of the scores seen so far; see `reward.update_moments`.
    width: Number of standard deviations.

  Returns:
    [B].
  """
  chex.assert_rank(scores, 1)
  reach = width * jnp.sqrt(moments.variance)
  return jnp.clip(scores, moments.mean - reach, moments.mean + reach)


@_on_constants
def constrained_reward(
  rewards: jax.Array,
  satisfied: jax.Array,
  log_ratios: jax.Array,
  *,
  kl_max: float | jax.Array,
) -> jax.Array:
  """`max(1 - KL / kl_max, 0) J R`: zero if a response violates a constraint or its KL is too large.

  CGPO's CRPG (Xu et al., 2024, https://arxiv.org/abs/2409.20370) uses positive rewards
  (`preference_as_reward`), and judges that decide which responses satisfy all constraints. After
  centring over the samples of a prompt, violations are pushed down like the worst response.

  Args:
    rewards: [B], >= 0.
    satisfied: [B] bool, the judges' verdict.
    log_ratios: [B] sums of `log pi - log ref` over the tokens of each response, nats.
    kl_max: Log-ratio at which the reward of a response reaches 0.

  Returns:
    [B].
  """
  chex.assert_rank([rewards, satisfied, log_ratios], 1)
  chex.assert_equal_shape([rewards, satisfied, log_ratios])
  return jnp.where(satisfied, jnp.maximum(1 - log_ratios / kl_max, 0.0) * rewards, 0.0)


def length_penalty(
  mask: jax.Array, *, start: float | jax.Array, coef: float | jax.Array
) -> jax.Array:
  """`-coef max(length - start, 0)`, in tokens.

  DAPO's soft overlong punishment (https://arxiv.org/abs/2503.14476, eq. 13) starts `n` tokens
  before the maximum length and has `coef = 1 / n`.

  Args:
    mask: [B, T] bool, True on response tokens.
    start: Number of tokens without a penalty.
    coef: Penalty per token beyond `start`.

  Returns:
    [B] float32, at most 0; add it to the scores.
  """
  chex.assert_rank(mask, 2)
  return -coef * jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.float32) - start, 0.0)


# Functions of several reward models, or several groups of raters. Bring them to one scale first.


@_on_constants
def variance_penalized(rewards: jax.Array, *, coef: float | jax.Array) -> jax.Array:
  """Mean over reward models minus `coef` times their variance.

  Uncertainty-weighted optimisation (Coste et al., 2023, https://arxiv.org/abs/2310.02743).

  Args:
    rewards: [B, G] rewards of each response from G reward models.
    coef: Price of disagreement; 0 is the mean.

  Returns:
    [B].
  """
  chex.assert_rank(rewards, 2)
  return jnp.mean(rewards, axis=1) - coef * jnp.var(rewards, axis=1)


@_on_constants
def nominal_min(rewards: jax.Array, nominal: jax.Array, *, alpha: float | jax.Array) -> jax.Array:
  """`alpha nominal + (1 - alpha) min_g r_g`: between the best guess and the worst case.

  Reward-robust RLHF (Yan et al., 2024, https://arxiv.org/abs/2409.15360). The minimum is taken for
  each response; its average is at most the minimum of the averages (`worst_group`).

  Args:
    rewards: [B, G] rewards of each response from G reward models.
    nominal: [B] rewards from the most trusted model, or the mean over models.
    alpha: 1 is ordinary RLHF with the nominal reward, 0 the worst case.

  Returns:
    [B].
  """
  chex.assert_rank([rewards, nominal], [2, 1])
  chex.assert_equal_shape_prefix([rewards, nominal], 1)
  return alpha * nominal + (1 - alpha) * jnp.min(rewards, axis=1)


@_on_constants
def worst_group(rewards: jax.Array, mask: jax.Array) -> jax.Array:
  """Rewards of all responses according to the group with the lowest mean reward in the batch.

  MaxMin-RLHF (Chakraborty et al., 2024, https://arxiv.org/abs/2402.08925): `max_pi min_g E[r_g]`.
  The minimum is over averages. (The released code takes it for each response, which is a different,
  lower objective.)

  Args:
    rewards: [B, G] rewards of each response from the reward models of G groups.
    mask: [B] bool, True on responses that count.

  Returns:
    [B] column of `rewards` with the smallest mean.
  """
  chex.assert_rank([rewards, mask], [2, 1])
  chex.assert_equal_shape_prefix([rewards, mask], 1)
  rewards = jnp.where(mask[:, None], rewards, 0.0)
  # The mask is the same for all groups: sums are in the order of means.
  worst = jax.nn.one_hot(jnp.argmin(jnp.sum(rewards, axis=0)), rewards.shape[1], dtype=bool)
  return jnp.sum(rewards, axis=1, where=worst[None, :])


@_on_constants
def selection_weights(rewards: jax.Array, mask: jax.Array, rule: str) -> jax.Array:
  """Weights of the samples of a prompt when training uses only a selection of them.

  Policy filtration (PF-PPO, https://arxiv.org/abs/2409.06957): a reward model is more often right
  about the best and the worst of several responses than about those in between.

  - "best": the best one, as in best-of-n, RAFT and SuperHF.
  - "best_worst": the best and the worst one.
  - "best_random": the best one and a random other one, replaced by its expectation.

  Args:
    rewards: [B, N] rewards of N samples per prompt.
    mask: [B, N] bool, True on samples that may be selected, for example by CGPO's judges.
    rule: One of the names above.

  Returns:
    [B, N] weights that sum to 1 in each row; all 0 in a row without selectable samples. Of equal
    rewards the first is selected, and one that is not finite never is.

  Raises:
    KeyError: If there is no rule of this name.
  """
  chex.assert_rank([rewards, mask], 2)
  chex.assert_equal_shape([rewards, mask])
  mask = mask & jnp.isfinite(rewards)
  sample = jax.lax.broadcasted_iota(jnp.int32, rewards.shape, 1)

  def highest(x: jax.Array) -> jax.Array:
    return mask & (sample == jnp.argmax(jnp.where(mask, x, -jnp.inf), axis=1, keepdims=True))

  best, worst = highest(rewards), highest(-rewards)
  others = mask & ~best
  count = jnp.maximum(jnp.sum(others, axis=1, keepdims=True), 1)
  weights = {
    "best": best.astype(rewards.dtype),
    "best_worst": best.astype(rewards.dtype) + worst,
    "best_random": best + others / count.astype(rewards.dtype),
  }[rule]
  return weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1)


# Rewards of tokens.


@_on_constants
def dense_rewards(
  dpo_logprobs: jax.Array,
  ref_logprobs: jax.Array,
  mask: jax.Array,
  *,
  scale: float | jax.Array = 0.05,
  clip: float | jax.Array = 0.05,
) -> jax.Array:
  """`clip(scale (log pi_dpo - log ref), +-clip)`: token rewards learnt by DPO.

  RTO (Zhong et al., 2024, https://arxiv.org/abs/2404.18922) adds them to `kl_shaped_rewards`.
  Without the clip they sum to `scale` times the implicit reward of the response. With a KL penalty
  of the same scale and no score, the optimal policy is then the one of DPO.

  Args:
    dpo_logprobs: [B, T] log-probabilities of the sampled tokens under a policy trained by DPO.
    ref_logprobs: [B, T] log-probabilities under its reference.
    mask: [B, T] bool, True on response tokens.
    scale: Reward per nat.
    clip: Largest absolute reward of one token.

  Returns:
    [B, T], 0 where masked.
  """
  chex.assert_rank([dpo_logprobs, ref_logprobs, mask], 2)
  chex.assert_equal_shape([dpo_logprobs, ref_logprobs, mask])
  return jnp.where(mask, jnp.clip(scale * (dpo_logprobs - ref_logprobs), -clip, clip), 0.0)


@_on_constants
def segment_rewards(scores: jax.Array, ends: jax.Array, mask: jax.Array, length: int) -> jax.Array:
  """Puts the score of each segment on its last token.

  Fine-grained RLHF (Wu et al., 2023, https://arxiv.org/abs/2306.01693) has several reward models of
  sentences or other spans, each with its own segments. Add their results with weights. The sum over
  tokens is the sum of the scores.

  Args:
    scores: [B, J] scores of J segments of each response.
    ends: [B, J] int, index of the last token of each segment, in `[0, length)`.
    mask: [B, J] bool, True on real segments.
    length: Tokens per row, T; static.

  Returns:
    [B, T].
  """
  chex.assert_rank([scores, ends, mask], 2)
  chex.assert_equal_shape([scores, ends, mask])
  shape = (*ends.shape, length)
  here = jax.lax.broadcasted_iota(jnp.int32, shape, 2) == ends[:, :, None]
  return jnp.sum(jnp.where(mask, scores, 0.0)[:, :, None], axis=1, where=here)
