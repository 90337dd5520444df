"""KL(policy || ref): per-token estimators from tokens sampled by the policy, and exact.

Schulman, "Approximating KL divergence" (2020), http://joschu.net/blog/kl-approx.html. With
`l = log pi(y_t) - log ref(y_t)` for `y_t ~ pi`:

| function          | value         | expectation | gradient in expectation when used as a loss    |
|-------------------|---------------|-------------|------------------------------------------------|
| `k1`              | l             | KL          | 0: put it into the reward, never into the loss |
| `k2`              | l^2 / 2       | about KL    | that of KL(pi || ref) at this token            |
| `k3`              | e^-l - 1 + l  | KL, >= 0    | that of KL(ref || pi) at this token            |
| `reverse_kl_loss` | l             | KL          | that of KL(pi || ref) of the whole response    |
| `full_kl`         | sum over V    | exact KL    | of either side, at this token                  |
| `full_jsd`        | sum over V    | exact JSD   | of either side, at this token                  |

"At this token" takes the tokens before it as given. A token also changes the distribution of later
tokens. Only `reverse_kl_loss` accounts for this, and so does `k1` inside the reward of a policy
gradient. `k3` times `exp(logprobs - sg(logprobs))`, which is 1, has the gradient of `k2`.
"""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses import logprobs as logprobs_lib
from rlhf_jax.losses import masked

# Logarithm of a probability that is 0 in float32 and in float64.
_LOG_ZERO = -1e4


@masked.elementwise
def k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """Log-ratio: unbiased, may be negative.

  Args:
    logprobs: [...] log-probabilities of the sampled tokens under the policy.
    ref_logprobs: Same shape, log-probabilities under the reference.

  Returns:
    Same shape, nats.
  """
  chex.assert_equal_shape([logprobs, ref_logprobs])
  return logprobs - ref_logprobs


@masked.elementwise
def k2(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """Half the squared log-ratio: biased, small variance, true gradient of the reverse KL.

  Args:
    logprobs: [...] log-probabilities of the sampled tokens under the policy.
    ref_logprobs: Same shape, log-probabilities under the reference.

  Returns:
    Same shape, nats, >= 0.
  """
  return 0.5 * jnp.square(k1(logprobs, ref_logprobs))


@masked.elementwise
def k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """`exp(-l) - 1 + l`: unbiased and never negative.

  The exponent is clipped at 80, where float32 ends.

  Args:
    logprobs: [...] log-probabilities of the sampled tokens under the policy.
    ref_logprobs: Same shape, log-probabilities under the reference.

  Returns:
    Same shape, nats, >= 0.
  """
  log_ratio = k1(logprobs, ref_logprobs)
  return jnp.expm1(jnp.minimum(-log_ratio, masked.MAX_EXPONENT)) + log_ratio


def reverse_kl_loss(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
  """KL(policy || ref) of whole responses, with its unbiased policy gradient.

  The gradient of a row's sum is `sum_t (sum_{s >= t} l_s) grad log pi_t`, with `l` the log-ratio.
  Each token is credited with its own log-ratio and all later ones (reward-to-go); earlier ones have
  no gradient in expectation. Crediting a token with its own log-ratio only would be biased.

  Args:
    logprobs: [B, T] log-probabilities of the sampled tokens under the policy that sampled them.
    ref_logprobs: [B, T] log-probabilities under the reference.
    mask: [B, T] bool, True on response tokens.

  Returns:
    [B, T] log-ratios, nats, 0 where masked. Sum them over tokens: with any other weights the
    gradient is not the gradient of the KL.
  """
  chex.assert_rank([logprobs, ref_logprobs, mask], 2)
  chex.assert_equal_shape([logprobs, ref_logprobs, mask])
  logprobs, ref_logprobs = (jnp.where(mask, masked.widen(x), 0.0) for x in (logprobs, ref_logprobs))
  log_ratio = jax.lax.stop_gradient(logprobs - ref_logprobs)
  to_go = jax.lax.cumsum(log_ratio, axis=1, reverse=True)
  return log_ratio + to_go * (logprobs - jax.lax.stop_gradient(logprobs))


def full_kl(logits: jax.Array, ref_logits: jax.Array) -> jax.Array:
  """Exact KL between the next-token distributions at each position.

  Swapping the arguments gives KL(ref || policy), the forward KL. Its gradient is the gradient of a
  cross-entropy with the reference as target (SuperHF's penalty, https://arxiv.org/abs/2310.16763).

  Args:
    logits: [..., V] logits of the first distribution; an entry of -inf has probability 0.
    ref_logits: [..., V] logits of the second distribution, which must have support wherever the
      first has it.

  Returns:
    [...] nats, >= 0 up to rounding.
  """
  chex.assert_equal_shape([logits, ref_logits])
  (logits, fine), (ref_logits, ref_fine) = map(logprobs_lib.shifted, (logits, ref_logits))
  logprobs, ref_logprobs = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
  probs = jnp.exp(logprobs)
  # Both may be -inf where probs is 0, and -inf - (-inf) is NaN.
  log_ratio = jnp.where(probs > 0, logprobs - ref_logprobs, 0.0)
  return jnp.where(fine & ref_fine, jnp.sum(probs * log_ratio, axis=-1), jnp.nan)


def full_jsd(logits: jax.Array, ref_logits: jax.Array, *, weight: float = 0.5) -> jax.Array:
  """Exact generalised Jensen-Shannon divergence between the next-token distributions.

  With p of the first logits, q of the second and `m = weight p + (1 - weight) q`, it is
  `weight KL(p || m) + (1 - weight) KL(q || m)`, equation 1 of https://arxiv.org/abs/2306.13649.
  Divided by its weight it tends to KL(p || q) for a weight near 0. Divided by one minus its weight
  it tends to KL(q || p) for a weight near 1.

  Args:
    logits: [..., V] logits of the first distribution; an entry of -inf has probability 0.
    ref_logits: [..., V] logits of the second distribution.
    weight: Weight of the first distribution in the mixture, between 0 and 1.

  Returns:
    [...] nats, >= 0 up to rounding, and at most log 2.
  """
  chex.assert_equal_shape([logits, ref_logits])
  (logits, fine), (ref_logits, ref_fine) = map(logprobs_lib.shifted, (logits, ref_logits))
  # Where both are -inf, so would be the mixture, whose gradient is undefined.
  sides = [jnp.maximum(jax.nn.log_softmax(x), _LOG_ZERO) for x in (logits, ref_logits)]
  weights = (weight, 1 - weight)
  shares = [jnp.log(w) + side for w, side in zip(weights, sides, strict=True)]
  mixture = jnp.logaddexp(*shares)
  terms = [w * jnp.exp(x) * (x - mixture) for w, x in zip(weights, sides, strict=True)]
  return jnp.where(fine & ref_fine, jnp.sum(sum(terms), axis=-1), jnp.nan)
