"""Rows that hold several sequences one after another, distinguished by segment ids.

Data that is packed when it is read comes as a `PackedBatch`; `unpack` separates its per-token
arrays by sequence. Padded sequences that are already on the devices are packed for one forward pass
by `places`, `pack` and `take`. Rows of a `SharedBatch`, whose sequences share a prompt, become rows
of single sequences by `separate`, and such rows again by `reunite`.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp


def predicted(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
  """Clears the mask on the first token of each sequence, which no earlier token predicts.

  Args:
    mask: [..., T] bool.
    segment_ids: [..., T] int, equal and contiguous within a sequence. None if each row is one
      sequence.

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
  """Gives each sequence its own row, without moving it along T.

  Masked reductions along T (a sum, a mean, the last value) then work per sequence and need not know
  about packing.

  Args:
    segment_ids: [B, ..., T] int, counted from 1 in each row; 0 on padding.
    segments: Maximum number S of sequences in a row.
    mask: [B, ..., T] bool.
    *arrays: [B, ..., T] each.

  Returns:
    The mask and the arrays, [B * S, ..., T] each. Row `b * S + s` belongs to segment `s + 1` of row
    b; its mask is all False if there is no such segment.
  """
  chex.assert_equal_shape([segment_ids, mask, *arrays])

  def repeat(x: jax.Array) -> jax.Array:
    rows = jnp.broadcast_to(x[:, None], (x.shape[0], segments, *x.shape[1:]))
    return rows.reshape(-1, *x.shape[1:])

  index = 1 + jnp.arange(segments).reshape(1, -1, *(1,) * (mask.ndim - 1))
  here = mask[:, None] & (segment_ids[:, None] == index)  # [B, S, ..., T]
  return here.reshape(-1, *mask.shape[1:]), *map(repeat, arrays)


def separate(x: jax.Array, places: jax.Array) -> jax.Array:
  """Gives each of the K sequences of a `SharedBatch` a row.

  Args:
    x: [B, T, ...], about each token of the shared rows.
    places: [B, K, S] int32, places of the tokens of each sequence; T stands for padding.

  Returns:
    [B * K, S, ...]; padding holds what any token has.
  """
  chex.assert_rank(places, 3)
  index = jnp.minimum(places, x.shape[1] - 1).reshape(len(x), -1, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1).reshape(-1, places.shape[2], *x.shape[2:])


def first_places(places: jax.Array, length: int) -> jax.Array:
  """Finds each token of a shared row in its first sequence.

  Args:
    places: [B, K, S] int32; see `separate`.
    length: Number T of tokens of a shared row.

  Returns:
    [B, T] int32, index into [K * S]; modulo S it is the position in the sequence. Padding has the
    last index.
  """
  chex.assert_rank(places, 3)
  count = places.shape[1] * places.shape[2]

  def of_row(places: jax.Array) -> jax.Array:
    return jnp.full(length, count - 1, jnp.int32).at[places].min(jnp.arange(count), mode="drop")

  return jax.vmap(of_row)(places.reshape(-1, count))


def reunite(x: jax.Array, first: jax.Array) -> jax.Array:
  """[B * K, S, ...] -> [B, T, ...]: reads each token of shared rows at its `first_places`."""
  chex.assert_rank(first, 2)
  x = x.reshape(len(first), -1, *x.shape[2:])
  return jnp.take_along_axis(x, first.reshape(*first.shape, *(1,) * (x.ndim - 2)), axis=1)


def apart(
  function: Callable[..., jax.Array], places: jax.Array, first: jax.Array
) -> Callable[..., jax.Array]:
  """Turns a function of arrays [B * K, S, ...] into one of arrays [B, T, ...] of shared rows."""
  return lambda *arrays: reunite(function(*(separate(x, places) for x in arrays)), first)


def first_fit(lengths: jax.Array, row_length: int) -> tuple[jax.Array, jax.Array]:
  """Assigns sequences to rows: longest first, each into the first row that has room.

  The number of rows is at most 11/9 of the minimum plus four (Johnson, 1974,
  https://doi.org/10.1137/0203025). Sequences of up to T tokens never need more than
  `ceil(N / (row_length // T))` rows.

  Args:
    lengths: [N] int, each at most `row_length`.
    row_length: Tokens per row.

  Returns:
    Row of each sequence, and its first position in that row, [N] int32 each. Rows are filled from
    row 0 on.
  """
  chex.assert_rank(lengths, 1)
  order = jnp.argsort(-lengths)

  def place(used: jax.Array, length: jax.Array):
    row = jnp.argmax(used + length <= row_length)
    return used.at[row].add(length), (row.astype(jnp.int32), used[row])

  empty = jnp.zeros(lengths.shape, jnp.int32)
  _, placed = jax.lax.scan(place, empty, lengths[order].astype(jnp.int32))
  rows, starts = (empty.at[order].set(x) for x in placed)
  return rows, starts


def places(real: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Finds the place of each token when the sequences of a batch are packed into fewer rows.

  Args:
    real: [N, T] bool, False on padding, on either side.
    shape: (M, L), M rows of L tokens; L is at least T.

  Returns:
    [N, T] int32, index into [M * L]. It is out of range for padding, and for a sequence that does
    not fit into M rows.
  """
  chex.assert_rank(real, 2)
  rows, starts = first_fit(jnp.sum(real, axis=1), shape[1])
  first = rows * shape[1] + starts
  index = first[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
  return jnp.where(real, index, shape[0] * shape[1])


def pack(x: jax.Array, places: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """[N, T] -> [M, L]: moves each token to its place in `places`; empty places are 0."""
  chex.assert_equal_shape([x, places])
  packed = jnp.zeros(shape[0] * shape[1], x.dtype)
  return packed.at[places].set(x, mode="drop").reshape(shape)


def take(packed: jax.Array, places: jax.Array) -> jax.Array:
  """[M, L] float -> [N, T]: reads the entry at each of the `places`; NaN where out of range."""
  return packed.reshape(-1).at[places].get(mode="fill", fill_value=jnp.nan)


def move_padding_right(real: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Moves the entries of arrays [B, T] that are not `real` [B, T] to the right, keeping order."""
  order = jnp.argsort(~real, axis=1, stable=True)
  return tuple(jnp.take_along_axis(x, order, axis=1) for x in arrays)


def positions(mask: jax.Array, capacity: int) -> jax.Array:
  """Positions where a mask [B, T] is True, [B, capacity] int32; T fills up a row."""
  order = jnp.argsort(~mask, axis=-1, stable=True)[..., :capacity].astype(jnp.int32)
  return jnp.where(jnp.take_along_axis(mask, order, axis=-1), order, mask.shape[-1])


def round_up(rows: int, multiple: int = 1) -> int:
  """Rounds a row count up to one of few values, to limit recompilation.

  The result has four significant binary digits: there are eight values per power of two, and at
  most an eighth is added.

  Args:
    rows: Number of rows needed.
    multiple: Number that the result must be a multiple of, such as the number of devices that share
      the rows.
  """
  unit = 1 << max(rows.bit_length() - 4, 0)
  rows += -rows % unit
  return rows + -rows % multiple
