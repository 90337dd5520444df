import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import masked, packing
from tests.losses.case import B, Case, T, squash

SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 3, 3, 3, 3], [0] * 7])
MASK = np.array([[0, 1, 1, 1, 1, 0, 1], [1, 0, 1, 0, 1, 1, 0], [0] * 7], bool)


def test_what_no_token_predicts_is_not_scored():
  mask = jnp.ones((3, 7), bool)
  expected = np.array([[0, 1, 1, 0, 1, 0, 1], [0, 0, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]], bool)
  np.testing.assert_array_equal(packing.predicted(mask, jnp.asarray(SEGMENTS)), expected)
  np.testing.assert_array_equal(packing.predicted(jnp.asarray(MASK), SEGMENTS), MASK & expected)
  unpacked = packing.predicted(mask)
  assert not unpacked[:, 0].any() and unpacked[:, 1:].all()


def test_reductions_of_unpacked_rows_are_those_of_segments():
  rng = np.random.default_rng(0)
  x = np.where(SEGMENTS > 0, rng.normal(size=SEGMENTS.shape), np.nan).astype(np.float32)
  rows = packing.unpack(jnp.asarray(SEGMENTS), 4, jnp.asarray(MASK), jnp.asarray(x))
  mask, values = rows
  assert mask.shape == values.shape == (12, 7)
  sums, last = masked.masked_sum(values, mask, axis=1), masked.last_real(values, mask)
  for b in range(3):
    for s in range(4):
      places = [t for t in range(7) if SEGMENTS[b, t] == s + 1 and MASK[b, t]]
      np.testing.assert_allclose(sums[4 * b + s], x[b, places].sum(), rtol=1e-6)
      np.testing.assert_allclose(last[4 * b + s], x[b, places[-1]] if places else 0.0)


def test_pairs_are_unpacked_side_by_side():
  segments = np.stack([SEGMENTS, SEGMENTS[:, ::-1]], axis=1)
  mask = np.ones(segments.shape, bool)
  unpacked, again = packing.unpack(jnp.asarray(segments), 3, jnp.asarray(mask), segments)
  np.testing.assert_array_equal(unpacked, again == 1 + np.arange(9).reshape(9, 1, 1) % 3)


def test_rows_that_share_a_prompt_are_separated_and_reunited():
  # Prompts of 2 and 1 tokens with responses of 3 and 1, and of 1 and 2; T is 7, S is 5.
  places = np.array([[[0, 1, 2, 3, 4], [0, 1, 5, 7, 7]], [[0, 1, 7, 7, 7], [0, 2, 3, 7, 7]]])
  x = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
  apart = packing.separate(jnp.asarray(x), jnp.asarray(places))
  assert apart.shape == (4, 5, 3)
  for row, sequence in enumerate(places.reshape(4, 5)):
    real = sequence < 7
    np.testing.assert_array_equal(apart[row][real], x[row // 2, sequence[real]])
  first = packing.first_places(jnp.asarray(places), 7)
  real = np.arange(7) < np.array([[6], [4]])
  want = np.array([[0, 1, 2, 3, 4, 7], [0, 1, 6, 7, 0, 0]])  # Of which rows have 6 and 4.
  np.testing.assert_array_equal(first[:, :6][real[:, :6]], want[real[:, :6]])
  np.testing.assert_array_equal(packing.reunite(apart, first)[real], x[real])
  twice = packing.apart(lambda rows: 2 * rows, jnp.asarray(places), first)(jnp.asarray(x))
  np.testing.assert_array_equal(twice[real], 2 * x[real])


def slow_first_fit(lengths, row_length):
  """Rows and starts, by a loop."""
  used, rows, starts = [], [0] * len(lengths), [0] * len(lengths)
  for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
    row = next((r for r, u in enumerate(used) if u + lengths[n] <= row_length), len(used))
    used += [0] * (row == len(used))
    rows[n], starts[n] = row, used[row]
    used[row] += lengths[n]
  return rows, starts, len(used)


@pytest.mark.parametrize(("longest", "row_length"), [(7, 7), (7, 20), (1, 5)])
def test_first_fit_is_that_of_a_loop_and_keeps_its_bound(longest, row_length):
  run = jax.jit(packing.first_fit, static_argnums=1)
  for seed in range(20):
    lengths = np.random.default_rng(seed).integers(1, longest + 1, 24)
    rows, starts, used = slow_first_fit(lengths, row_length)
    result = run(jnp.asarray(lengths), row_length)
    np.testing.assert_array_equal(result, (rows, starts))
    assert used <= -(-24 // (row_length // longest))


def test_what_is_packed_is_found_again():
  rng = np.random.default_rng(0)
  begin, end = rng.integers(0, 4, (6, 1)), rng.integers(4, 10, (6, 1))
  real = (np.arange(9) >= begin) & (np.arange(9) < end)  # Padding on both sides.
  x = np.where(real, rng.integers(1, 100, real.shape), -1)
  shape = (3, 16)
  places = packing.places(jnp.asarray(real), shape)
  packed = packing.pack(jnp.asarray(x), places, shape)
  assert sorted(packed[packed != 0].tolist()) == sorted(x[real].tolist())
  numbers = packing.pack(jnp.broadcast_to(1 + jnp.arange(6)[:, None], real.shape), places, shape)
  for n in range(6):  # In one piece, in its order.
    np.testing.assert_array_equal(packed[numbers == n + 1], x[n][real[n]])
  taken = packing.take(packed.astype(float), places)
  np.testing.assert_array_equal(taken, np.where(real, x, np.nan))


def test_what_has_no_room_is_not_a_number():
  real = jnp.ones((3, 4), bool)
  places = packing.places(real, (2, 5))
  taken = packing.take(packing.pack(jnp.ones((3, 4)), places, (2, 5)), places)
  np.testing.assert_array_equal(np.isnan(taken).all(1), [False, False, True])


def test_numbers_of_rows_are_few_and_little_raised():
  rounded = {n: packing.round_up(n) for n in range(1, 513)}
  assert all(n <= m <= n * 1.125 for n, m in rounded.items())
  assert len({m for m in rounded.values() if 256 < m <= 512}) == 8
  assert all(rounded[n] == n for n in range(1, 17))
  assert packing.round_up(17, multiple=4) == 20 and packing.round_up(1, multiple=8) == 8


def test_padding_moves_behind_the_rest_in_its_order():
  real = np.array([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]], bool)
  x = np.arange(20).reshape(4, 5)
  moved, numbers = packing.move_padding_right(jnp.asarray(real), real, jnp.asarray(x))
  np.testing.assert_array_equal(moved, np.arange(5) < real.sum(axis=1, keepdims=True))
  for row in range(4):
    want = [*x[row][real[row]], *x[row][~real[row]]]
    np.testing.assert_array_equal(numbers[row], want)


def halves(mask):
  """Two sequences in each row."""
  return jnp.broadcast_to(1 + (jnp.arange(T) >= T // 2), mask.shape)


def of_unpacked(mask, x):
  mask, x = packing.unpack(halves(mask), 2, mask, x)
  return squash(masked.masked_sum(x, mask, axis=1))


def of_moved(mask, x):
  on_the_left = jnp.flip(mask, axis=1)
  moved, x = packing.move_padding_right(on_the_left, on_the_left, jnp.flip(x, axis=1))
  return squash(masked.masked_sum(x, moved, axis=1))


def of_positions(mask, x):
  positions = packing.positions(mask, T)
  picked = jnp.take_along_axis(x, jnp.minimum(positions, T - 1), axis=1)
  return masked.masked_mean(picked, positions < T)


CASES = {
  "predicted": Case(lambda m, x: masked.masked_mean(x, packing.predicted(m, halves(m))), ((B, T),)),
  "predicted/one": Case(lambda m, x: masked.masked_mean(x, packing.predicted(m)), ((B, T),)),
  "positions": Case(of_positions, ((B, T),)),
  "unpack": Case(of_unpacked, ((B, T),)),
  "move_padding_right": Case(of_moved, ((B, T),)),
}
