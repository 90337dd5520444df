"""Losses on K responses to one prompt: [B, K] in, [B] losses out.

Rows may be ragged: `mask` [B, K] is True on real responses. A row without any has loss 0.
"""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked


def _after(mask: jax.Array) -> jax.Array:
  """[B, K, K] bool, True where both responses are real and the second follows the first."""
  place = jnp.arange(mask.shape[1])
  return (place[:, None] < place[None, :])[None] & mask[:, :, None] & mask[:, None, :]


def _staged_choice(logits: jax.Array, after: jax.Array) -> jax.Array:
  """`sum_k [logsumexp_{i = k or i after k} logits[k, i] - logits[k, k]]`, [B, K, K] -> [B].

  Stage k chooses response k among those not chosen before.
  """
  diagonal = jnp.eye(logits.shape[1], dtype=bool)[None]
  chosen = jnp.sum(logits, axis=2, where=diagonal)
  total = jax.nn.logsumexp(logits, axis=2, where=diagonal | after)
  return jnp.sum(total - chosen, axis=1)


def plackett_luce_loss(scores: jax.Array, mask: jax.Array) -> jax.Array:
  """Negative log-likelihood of a full ranking (Plackett, 1975; Luce, 1959).

  `sum_k [logsumexp_{i >= k} s_i - s_k]`. With the scores of a reward model it trains that model.
  With `beta * (log pi - log pi_ref)` it is DPO on rankings (https://arxiv.org/abs/2305.18290,
  appendix A.3). With two responses it is the Bradley-Terry loss.

  Args:
    scores: [B, K] scores of K responses, ranked best first.
    mask: [B, K] bool, True on real responses.

  Returns:
    [B] loss, nats.
  """
  chex.assert_rank([scores, mask], 2)
  chex.assert_equal_shape([scores, mask])
  scores = jnp.where(mask, masked.widen(scores), 0.0)
  later = jnp.broadcast_to(scores[:, None, :], (*scores.shape, scores.shape[1]))
  return _staged_choice(later, _after(mask))


def pro_loss(logprobs: jax.Array, rewards: jax.Array, mask: jax.Array) -> jax.Array:
  """Preference ranking optimisation: a ranking likelihood sharpened by reward differences.

  Song et al., 2023, https://arxiv.org/abs/2306.17492. Stage k is a softmax over response k, with
  logit `s_k max_i (r_k - r_i)`, and the responses i after it, with logits `s_i (r_k - r_i)`. The
  method adds the negative log-likelihood of the best response.

  Args:
    logprobs: [B, K] **mean** log-probability per token, `s`; responses ranked best first.
    rewards: [B, K] scores that do not increase along a row, constant in the gradient. Their scale
      is a hyperparameter; their offset has no effect.
    mask: [B, K] bool, True on real responses.

  Returns:
    [B] loss, nats.
  """
  chex.assert_rank([logprobs, rewards, mask], 2)
  chex.assert_equal_shape([logprobs, rewards, mask])
  rewards = jax.lax.stop_gradient(rewards)
  logprobs, rewards = (jnp.where(mask, masked.widen(x), 0.0) for x in (logprobs, rewards))
  after = _after(mask)
  gap = jnp.where(after, rewards[:, :, None] - rewards[:, None, :], 0.0)
  diagonal = jnp.eye(mask.shape[1], dtype=bool)[None]
  sharpness = jnp.where(diagonal, jnp.max(gap, axis=2, keepdims=True), gap)
  return _staged_choice(sharpness * logprobs[:, None, :], after)


def rrhf_loss(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
  """Ranking term of RRHF: `sum_{i before j} max(0, p_j - p_i)`.

  Yuan et al., 2023, https://arxiv.org/abs/2304.05302, eq. 2. The method adds the negative
  log-likelihood of the best response.

  Args:
    logprobs: [B, K] **mean** log-probability per token, `p`; responses ranked best first.
    mask: [B, K] bool, True on real responses.

  Returns:
    [B] loss, nats.
  """
  chex.assert_rank([logprobs, mask], 2)
  chex.assert_equal_shape([logprobs, mask])
  logprobs = jnp.where(mask, masked.widen(logprobs), 0.0)
  wrong = jax.nn.relu(logprobs[:, None, :] - logprobs[:, :, None])
  return jnp.sum(wrong, axis=(1, 2), where=_after(mask))


def brain_loss(
  policy: jax.Array,
  ref: jax.Array,
  proposal: jax.Array,
  rewards: jax.Array,
  mask: jax.Array,
  *,
  beta: float = 0.1,
) -> jax.Array:
  """Cross-entropy from the reward-weighted posterior to the policy, both over K samples.

  Pandey et al., 2024 (BRAIn), https://arxiv.org/abs/2402.02479, with self-normalised importance
  weights over samples from a proposal q. The target is `softmax(r / beta + log pi_ref - log q)`,
  the model `softmax(log pi - log q)`. The optimum is `pi_ref exp(r / beta) / Z`. For two samples
  from the reference and a one-hot target it is `dpo_loss` with beta 1.

  Args:
    policy: [B, K] log pi(y | x), summed over tokens.
    ref: [B, K] log pi_ref(y | x).
    proposal: [B, K] log q(y | x) of the distribution that the responses were sampled from.
    rewards: [B, K]; only their differences within a row matter.
    mask: [B, K] bool, True on real responses.
    beta: Strength of the implied KL penalty.

  Returns:
    [B] loss, nats. The gradient flows through `policy` only.
  """
  arrays = [policy, ref, proposal, rewards, mask]
  chex.assert_rank(arrays, 2)
  chex.assert_equal_shape(arrays)
  ref, proposal, rewards = jax.lax.stop_gradient((ref, proposal, rewards))
  policy, ref, proposal, rewards = (
    jnp.where(mask, masked.widen(x), 0.0) for x in (policy, ref, proposal, rewards)
  )
  # An empty row is normalised over all its slots, so that its gradient is finite.
  real = mask | ~jnp.any(mask, axis=1, keepdims=True)

  def log_softmax(x: jax.Array) -> jax.Array:
    return x - jax.nn.logsumexp(x, axis=1, keepdims=True, where=real)

  target = jnp.exp(log_softmax(rewards / beta + ref - proposal))
  return -jnp.sum(target * log_softmax(policy - proposal), axis=1, where=mask)


def all_pairs_regression_loss(
  policy: jax.Array, ref: jax.Array, target: jax.Array, mask: jax.Array
) -> jax.Array:
  """Mean of `preference.pair_regression_loss` over all pairs of one prompt's responses.

  Calandriello et al., 2024 (online IPO), https://arxiv.org/abs/2403.08635, with
  `target[i, j] = (P(y_i > y_j) - 1/2) / tau`. K forward passes serve K (K - 1) / 2 pairs.

  Args:
    policy: [B, K] log pi(y | x), summed over tokens.
    ref: [B, K] log pi_ref(y | x).
    target: [B, K, K], read where the first index is below the second; constant in the gradient.
    mask: [B, K] bool, True on real responses.

  Returns:
    [B] loss; 0 for a row without a pair.
  """
  chex.assert_rank([policy, ref, target, mask], [2, 2, 3, 2])
  chex.assert_equal_shape([policy, ref, mask])
  chex.assert_equal_shape_prefix([policy, target], 2)
  chex.assert_axis_dimension(target, 2, policy.shape[1])
  pair = _after(mask)
  log_ratio = jnp.where(mask, masked.widen(policy) - masked.widen(ref), 0.0)
  target = jnp.where(pair, masked.widen(jax.lax.stop_gradient(target)), 0.0)
  error = log_ratio[:, :, None] - log_ratio[:, None, :] - target
  return masked.masked_mean(jnp.square(error), pair, axis=(1, 2))
