"""Log-probabilities of given tokens, and entropy, in float32 or wider.

Logits are arrays or `LazyLogits`, which are computed for a few tokens at a time. With a vocabulary
of 128 thousand, the logits of a batch, their softmax and their gradients would dominate memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("hidden", "params"),
  meta_fields=("read_out", "chunk"),
)
@dataclasses.dataclass(frozen=True)
class LazyLogits:
  """Logits [B, T, V] that are computed when they are read (`over_tokens`).

  Attributes:
    hidden: [B, T, D] hidden states that the logits are computed from.
    params: Params of `read_out`.
    read_out: `(params, hidden [B, t, D]) -> logits [B, t, V]`.
    chunk: Number t of tokens per row whose logits are held at a time.
  """

  hidden: jax.Array
  params: Any
  read_out: Callable[[Any, jax.Array], jax.Array]
  chunk: int


Logits = jax.Array | LazyLogits


def over_tokens(fn: Callable[..., Any], *inputs: Logits) -> Any:
  """`fn(*inputs)`, computed for a few tokens at a time if an input is lazy.

  The backward pass recomputes each chunk. Chunks are cut along T only, so that rows stay where
  they are on a mesh.

  Args:
    fn: Function from arrays [B, t, ...] to a tree of arrays [B, t, ...] that treats each token
      independently.
    *inputs: [B, T, ...] each; lazy ones reach `fn` as arrays [B, t, V]. If none is lazy, they may
      have any shape and are passed to `fn` unchanged.

  Returns:
    Tree of [B, T, ...].

  Raises:
    AssertionError: If an input is lazy and B or T differ between inputs.
  """
  lazy = [x for x in inputs if isinstance(x, LazyLogits)]
  if not lazy:
    return fn(*inputs)
  arrays = [x.hidden if isinstance(x, LazyLogits) else x for x in inputs]
  chex.assert_equal_shape_prefix(arrays, 2)

  def piece(arrays):
    read = [
      x.read_out(x.params, array) if isinstance(x, LazyLogits) else array
      for x, array in zip(inputs, arrays, strict=True)
    ]
    return fn(*read)

  length = arrays[0].shape[1]
  pieces = max(-(-length // x.chunk) for x in lazy)
  if pieces == 1:
    return piece(arrays)
  size = -(-length // pieces)

  def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [pieces, B, size, ...]
    x = jnp.pad(x, ((0, 0), (0, pieces * size - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.swapaxes(x.reshape(x.shape[0], pieces, size, *x.shape[2:]), 0, 1)

  def join(x: jax.Array) -> jax.Array:
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(x.shape[0], pieces * size, *x.shape[3:])[:, :length]

  piece = jax.checkpoint(piece, prevent_cse=False)  # In a loop there is nothing to merge anyway.
  return jax.tree.map(join, jax.lax.map(piece, [cut(x) for x in arrays]))


def over_next_tokens(fn: Callable[..., Any], tokens: jax.Array, *logits: Logits) -> Any:
  """`fn(targets, *logits)`, where targets are the next tokens. This is the only place that shifts.

  Args:
    fn: See `over_tokens`.
    tokens: [B, T] int.
    *logits: [B, T, V] float each, of which `[:, t]` predicts `tokens[:, t + 1]`.

  Returns:
    Tree of [B, T, ...], where `[:, t]` is about `tokens[:, t]`. Column 0 has no prediction and
    is 0.
  """
  chex.assert_rank(tokens, 2)
  # The last position gets a wrong target here; its result is dropped below.
  results = over_tokens(fn, jnp.roll(tokens, -1, axis=1), *logits)
  return jax.tree.map(
    lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2)), results
  )


def shifted(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Logits minus their maximum, [..., V], and whether that maximum is finite, [...].

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


def token_logprobs(logits: Logits, targets: jax.Array) -> jax.Array:
  """Log-probability of each target under the logits at the same position.

  Nothing is shifted: `logits[..., t, :]` must be the distribution of `targets[..., t]`. For the
  logits of a causal model over its input, use `next_token_logprobs`.

  Args:
    logits: [..., T, V] float.
    targets: [..., T] int, each in `[0, V)`.

  Returns:
    [..., T] float32 (float64 for float64 logits).

  Raises:
    AssertionError: If the shapes do not match.
  """

  def compute(logits: jax.Array, targets: jax.Array) -> jax.Array:
    chex.assert_rank(logits, targets.ndim + 1)
    chex.assert_equal_shape_prefix([logits, targets], targets.ndim)
    logits, fine = shifted(logits)
    # A masked sum instead of a gather: it partitions over a sharded vocabulary on Auto and on
    # Explicit meshes, and needs less memory on TPU.
    # int32 whatever the dtype of the tokens: 8 bits would wrap around after 255.
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    hit = vocabulary == targets[..., None]
    logprobs = jnp.sum(logits, axis=-1, where=hit) - jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
    return jnp.where(fine, logprobs, jnp.nan)

  return over_tokens(compute, logits, targets)


def next_token_logprobs(logits: Logits, tokens: jax.Array) -> jax.Array:
  """Log-probability of every token given the ones before it.

  Args:
    logits: [B, T, V] float, `logits[:, t]` predicts `tokens[:, t + 1]`.
    tokens: [B, T] int.

  Returns:
    [B, T] float32. Column 0 has no prediction and is 0.
  """
  return over_next_tokens(lambda targets, logits: token_logprobs(logits, targets), tokens, logits)


def entropy(logits: Logits) -> jax.Array:
  """Entropy of the softmax, in nats.

  Args:
    logits: [..., V] float; -inf entries have probability 0 and add nothing.

  Returns:
    [...] float32.
  """

  def compute(logits: jax.Array) -> jax.Array:
    logits, fine = shifted(logits)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(logprobs)
    result = -jnp.sum(probs * jnp.where(probs > 0, logprobs, 0.0), axis=-1)
    return jnp.where(fine, result, jnp.nan)

  return over_tokens(compute, logits)
