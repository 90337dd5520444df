"""Rows that hold several sequences, one behind the other, told apart by segment ids."""

import functools

import chex
import jax
import jax.numpy as jnp


def predicted(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """A mask without the first token of each sequence, which no token of it predicts.

  Args:
    mask: [..., T] bool.
    segment_ids: [..., T] int, equal and contiguous within a sequence; None: a row is a sequence.

  Returns:
    [..., T] bool.
  """
  if segment_ids is None:
    return mask.at[..., 0].set(False)
  chex.assert_equal_shape([mask, segment_ids])
  follows = segment_ids[..., 1:] == segment_ids[..., :-1]
  return mask & jnp.pad(follows, [(0, 0)] * (mask.ndim - 1) + [(1, 0)])


def unpack(
  segment_ids: jax.Array, segments: int, mask: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
  """Gives each sequence a row of its own, in which it stands where it stood.

  What reduces along T under the mask (a sum, a mean, the last value) then does so per sequence and
  need not know of packing.

  Args:
    segment_ids: [B, ..., T] int, counted from 1 in each row; 0 on padding.
    segments: S, the most sequences that a row has.
    mask: [B, ..., T] bool.
    *arrays: [B, ..., T] each.

  Returns:
    The mask and the arrays, [B * S, ..., T] each. Row `b * S + s` is for segment `s + 1` of row b;
    its mask is empty if there is none.
  """
  chex.assert_equal_shape([segment_ids, mask, *arrays])
  repeat = functools.partial(jnp.repeat, repeats=segments, axis=0)
  own = 1 + jnp.tile(jnp.arange(segments), mask.shape[0])
  own = own.reshape(-1, *(1,) * (mask.ndim - 1))
  return repeat(mask) & (repeat(segment_ids) == own), *map(repeat, arrays)
