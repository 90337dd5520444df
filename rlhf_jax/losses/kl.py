"""Per-token estimators of KL(policy || ref) from tokens sampled by the policy.

Schulman, "Approximating KL divergence" (2020), http://joschu.net/blog/kl-approx.html. With
`l = log pi(y_t) - log ref(y_t)` for `y_t ~ pi`:

| function | value    | expectation | gradient in expectation when used as a loss            |
|----------|----------|-------------|--------------------------------------------------------|
| `k1`     | l        | KL          | 0: put it into the reward, never into the loss         |
| `k2`     | l^2 / 2  | about KL    | that of KL(pi || ref)                                  |
| `k3`     | e^-l-1+l | KL, >= 0    | that of KL(ref || pi), the forward KL                  |
"""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked

# exp(89) overflows float32; at a log-ratio of 20 the estimate is already 5e8 nats.
_MAX_LOG_RATIO = 20.0


@masked.elementwise
def k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """Log-ratio: unbiased, may be negative.

  Args:
    logprobs: [...] log-probabilities of the sampled tokens under the policy.
    ref_logprobs: Same shape, under the reference.

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
    ref_logprobs: Same shape, under the reference.

  Returns:
    Same shape, nats, >= 0.
  """
  return 0.5 * jnp.square(k1(logprobs, ref_logprobs))


@masked.elementwise
def k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
  """`exp(-l) - 1 + l`: unbiased and never negative.

  The exponent is held below 20, where the value is past any use and its gradient would overflow.

  Args:
    logprobs: [...] log-probabilities of the sampled tokens under the policy.
    ref_logprobs: Same shape, under the reference.

  Returns:
    Same shape, nats, >= 0.
  """
  log_ratio = k1(logprobs, ref_logprobs)
  return jnp.expm1(jnp.minimum(-log_ratio, _MAX_LOG_RATIO)) + log_ratio
