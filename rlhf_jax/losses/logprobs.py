"""Log-probabilities of given tokens, and entropy, in float32 or wider."""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked


def shifted(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Logits less their maximum, [..., V], and whether there is a finite maximum, [...].

  Next to a logit of 30, float32 keeps only five decimals of a log-probability. Logits without a
  finite maximum (padding may hold anything) become zeros, so that they pass no gradient.

  Args:
    logits: [..., V] float.

  Returns:
    [..., V] float32 and [...] bool.
  """
  logits = masked.widen(logits)
  highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  fine = jnp.isfinite(highest)
  return jnp.where(fine, logits - highest, 0.0), fine[..., 0]


def token_logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Log-probability of each target under the logits at the same position.

  Nothing is shifted: `logits[..., t, :]` must be the distribution of `targets[..., t]`. Use
  `next_token_logprobs` for the logits of a causal model over its own input.

  Args:
    logits: [..., T, V] float.
    targets: [..., T] int, each in `[0, V)`.

  Returns:
    [..., T] float32 (float64 for float64 logits).

  Raises:
    AssertionError: If the shapes do not match.
  """
  chex.assert_rank(logits, targets.ndim + 1)
  chex.assert_equal_shape_prefix([logits, targets], targets.ndim)
  logits, fine = shifted(logits)
  # A masked sum instead of a gather: it partitions over a sharded vocabulary on Auto and on
  # Explicit meshes, and needs less memory on TPU.
  # int32 whatever the type of the tokens: 8 bits would count past 255 back to 0.
  vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  hit = vocabulary == targets[..., None]
  logprobs = jnp.sum(logits, axis=-1, where=hit) - jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
  return jnp.where(fine, logprobs, jnp.nan)


def next_token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Log-probability of every token given the ones before it: the one place that shifts.

  Args:
    logits: [B, T, V] float, `logits[:, t]` predicts `tokens[:, t + 1]`.
    tokens: [B, T] int.

  Returns:
    [B, T] float32. Column 0 has no prediction and is 0.
  """
  chex.assert_rank([logits, tokens], [3, 2])
  chex.assert_equal_shape_prefix([logits, tokens], 2)
  return jnp.pad(token_logprobs(logits[:, :-1], tokens[:, 1:]), ((0, 0), (1, 0)))


def entropy(logits: jax.Array) -> jax.Array:
  """Entropy of the softmax, in nats.

  Args:
    logits: [..., V] float; -inf entries have probability 0 and add nothing.

  Returns:
    [...] float32.
  """
  logits, fine = shifted(logits)
  logprobs = jax.nn.log_softmax(logits, axis=-1)
  probs = jnp.exp(logprobs)
  result = -jnp.sum(probs * jnp.where(probs > 0, logprobs, 0.0), axis=-1)
  return jnp.where(fine, result, jnp.nan)
