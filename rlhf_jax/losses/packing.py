"""Rows that hold several sequences, one behind the other, told apart by segment ids."""

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
    return jnp.asarray(mask).at[..., 0].set(False)
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

  def repeat(x: jax.Array) -> jax.Array:
    rows = jnp.broadcast_to(x[:, None], (x.shape[0], segments, *x.shape[1:]))
    return rows.reshape(-1, *x.shape[1:])

  own = 1 + jnp.arange(segments).reshape(1, -1, *(1,) * (mask.ndim - 1))
  here = mask[:, None] & (segment_ids[:, None] == own)  # [B, S, ..., T]
  return here.reshape(-1, *mask.shape[1:]), *map(repeat, arrays)
