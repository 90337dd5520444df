"""Preference games: Nash learning from human feedback, on samples and on tables.

Munos et al., 2023, https://arxiv.org/abs/2312.00886. `P(p, q)` is the probability that a response
of policy `p` is preferred to a response of policy `q`. Policies play the game regularised towards a
reference, `P_tau(p, q) = P(p, q) - tau KL(p || ref) + tau KL(q || ref)`. It has exactly one
equilibrium, even where preferences are cyclic and no reward explains them.

The tabular functions take log-probabilities of A responses and know every preference. They show
what the sampled loss should learn, and they are the place to study the algorithms themselves.
"""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses import kl, masked, policy_gradient
from rlhf_jax.losses import logprobs as logprobs_lib


def mixture_logits(
  policy_logits: jax.Array, ref_logits: jax.Array, mix: float | jax.Array
) -> jax.Array:
  """Normalised geometric mixture `policy^(1 - mix) ref^mix`, the opponent of Nash-MD.

  Munos et al., 2023, define the mixture over whole responses, but sample from the mixture of each
  next token. That is a different distribution of responses, but one that can be sampled.

  Args:
    policy_logits: [..., V].
    ref_logits: [..., V].
    mix: Weight of the reference: 0 is the policy, 1 the reference.

  Returns:
    [..., V] log-probabilities; -inf where a distribution with nonzero weight has probability 0.
  """
  chex.assert_equal_shape([policy_logits, ref_logits])
  (policy, fine), (ref, ref_fine) = map(logprobs_lib.shifted, (policy_logits, ref_logits))

  def share(weight: float | jax.Array, logits: jax.Array) -> jax.Array:
    # 0 * -inf would be NaN.
    return jnp.where((weight == 0) & jnp.isneginf(logits), 0.0, weight * logits)

  mixed = jax.nn.log_softmax(share(1 - mix, policy) + share(mix, ref))
  return jnp.where((fine & ref_fine)[..., None], mixed, jnp.nan)


def nash_md_loss(
  logprobs: jax.Array,
  ref_logprobs: jax.Array,
  mask: jax.Array,
  preference: jax.Array,
  *,
  tau: float | jax.Array,
  baseline: float | jax.Array = 0.5,
) -> jax.Array:
  """Policy gradient of the regularised game against a fixed opponent (Nash-MD-PG).

  Munos et al., 2023. In expectation over responses of the policy, the gradient of a row's sum is
  the gradient of `-P(policy, opponent) + tau KL(policy || ref)`. All tokens share the preference,
  and each token is credited with its own and all later log-ratios (`kl.reverse_kl_loss`).
  The opponent determines the algorithm: the mixture (`mixture_logits`), the policy itself
  (self-play, where the equilibrium is stationary), its moving average (Nash-EMA), or the reference
  (best response).

  Args:
    logprobs: [B, T] log-probabilities of the response's tokens under the policy that sampled them.
    ref_logprobs: [B, T] log-probabilities under the reference.
    mask: [B, T] bool, True on response tokens.
    preference: [B] probability that the response beats one of the opponent's; a constant in the
      gradient.
    tau: Strength of the regularisation.
    baseline: Scalar or [B]; no constant changes the expected gradient.

  Returns:
    [B, T] loss, 0 where masked. Sum it over tokens and average over rows.
  """
  chex.assert_rank([logprobs, ref_logprobs, mask, preference], [2, 2, 2, 1])
  chex.assert_equal_shape([logprobs, ref_logprobs, mask])
  chex.assert_equal_shape_prefix([mask, preference], 1)
  gain = jnp.broadcast_to((masked.widen(preference) - baseline)[:, None], mask.shape)
  against = jnp.where(mask, policy_gradient.reinforce_loss(logprobs, gain), 0.0)
  return against + tau * kl.reverse_kl_loss(logprobs, ref_logprobs, mask)


def _table(log_policy: jax.Array, log_ref: jax.Array, preference: jax.Array) -> list[jax.Array]:
  """Checks the shapes of a game's arrays and widens them to float32 or wider."""
  chex.assert_rank([log_policy, log_ref, preference], [1, 1, 2])
  chex.assert_equal_shape([log_policy, log_ref])
  chex.assert_shape(preference, (*log_policy.shape, *log_policy.shape))
  return [masked.widen(x) for x in (log_policy, log_ref, preference)]


def _win_rates(preference: jax.Array, log_opponent: jax.Array) -> jax.Array:
  # The matrix units of TPUs and GPUs would round both factors to 8 or 11 bits.
  return jnp.matmul(preference, jnp.exp(log_opponent), precision=jax.lax.Precision.HIGHEST)


def nash_md_step(
  log_policy: jax.Array,
  log_ref: jax.Array,
  preference: jax.Array,
  *,
  eta: float | jax.Array,
  tau: float | jax.Array,
) -> jax.Array:
  """One step of tabular Nash-MD: mirror ascent at the mixture, against the mixture.

  Munos et al., 2023: `m ~ policy^(1 - eta tau) ref^(eta tau)`, then
  `policy' ~ m exp(eta P(., m))`. With `eta_t = 2 / (tau (t + 2))` from t = 0, after T steps
  `KL(equilibrium || policy) <= 8 / (tau^2 (T + 1))`; a constant `eta` stops short of
  the equilibrium.

  Args:
    log_policy: [A] normalised log-probabilities.
    log_ref: [A] normalised log-probabilities of the reference.
    preference: [A, A], `preference[i, j]` is the probability that i beats j.
    eta: Step size, at most `1 / tau`.
    tau: Strength of the regularisation.

  Returns:
    [A] normalised log-probabilities.
  """
  log_policy, log_ref, preference = _table(log_policy, log_ref, preference)
  mixture = mixture_logits(log_policy, log_ref, eta * tau)
  return jax.nn.log_softmax(mixture + eta * _win_rates(preference, mixture))


def mirror_prox_step(
  log_policy: jax.Array,
  log_ref: jax.Array,
  preference: jax.Array,
  *,
  eta: float | jax.Array,
  tau: float | jax.Array,
) -> jax.Array:
  """One step of Nash-MP: a half step against the policy, then a step against its result.

  Tiapkin et al., 2025, https://arxiv.org/abs/2505.19731v1. Both start from the policy and maximise
  `P_tau(p, opponent) - (tau / eta) KL(p || policy)`, so
  `p ~ (policy ref^eta exp(eta / tau P(., opponent)))^(1 / (1 + eta))`. With `eta = 2 tau <= 1` each
  step divides the KL from the equilibrium by `1 + 2 tau`. EGPO (https://arxiv.org/abs/2503.08942)
  with step size `s` is this step with `eta = s tau / (1 - s tau)`.

  Args:
    log_policy: [A] normalised log-probabilities.
    log_ref: [A] normalised log-probabilities of the reference.
    preference: [A, A], `preference[i, j]` is the probability that i beats j.
    eta: Step size.
    tau: Strength of the regularisation, above 0.

  Returns:
    [A] normalised log-probabilities.
  """
  log_policy, log_ref, preference = _table(log_policy, log_ref, preference)

  def prox(log_opponent: jax.Array) -> jax.Array:
    gain = _win_rates(preference, log_opponent)
    return jax.nn.log_softmax((log_policy + eta * log_ref + eta / tau * gain) / (1 + eta))

  return prox(prox(log_policy))


def exploitability(
  log_policy: jax.Array, log_ref: jax.Array, preference: jax.Array, *, tau: float | jax.Array
) -> jax.Array:
  """`max_q P_tau(q, policy) - 1 / 2`: the gain of the best response to the policy.

  The best response is `ref exp(P(., policy) / tau)`, so the maximum is
  `tau log sum ref exp(P(., policy) / tau) + tau KL(policy || ref)`.

  Args:
    log_policy: [A] normalised log-probabilities.
    log_ref: [A] normalised log-probabilities of the reference.
    preference: [A, A], `preference[i, j]` is the probability that i beats j;
      `preference[i, j] + preference[j, i] = 1`.
    tau: Strength of the regularisation, above 0.

  Returns:
    [] >= 0 up to rounding; 0 only at the equilibrium.
  """
  log_policy, log_ref, preference = _table(log_policy, log_ref, preference)
  gain = _win_rates(preference, log_policy)
  best = tau * jax.nn.logsumexp(log_ref + gain / tau)
  return best + tau * kl.full_kl(log_policy, log_ref) - 0.5
