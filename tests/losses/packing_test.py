import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses import masked, packing
from tests.losses.case import B, Case, T, squash

SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 3, 3, 3, 3], [0] * 7])
MASK = np.array([[0, 1, 1, 1, 1, 0, 1], [1, 0, 1, 0, 1, 1, 0], [0] * 7], bool)


def test_what_no_token_predicts_is_not_scored():
  mask = jnp.ones((3, 7), bool)
  expected = np.array([[0, 1, 1, 0, 1, 0, 1], [0, 0, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]], bool)
  np.testing.assert_array_equal(packing.predicted(mask, jnp.asarray(SEGMENTS)), expected)
  np.testing.assert_array_equal(packing.predicted(jnp.asarray(MASK), SEGMENTS), MASK & expected)
  whole = packing.predicted(mask)
  assert not whole[:, 0].any() and whole[:, 1:].all()


def test_reductions_of_unpacked_rows_are_those_of_segments():
  rng = np.random.default_rng(0)
  x = np.where(SEGMENTS > 0, rng.normal(size=SEGMENTS.shape), np.nan).astype(np.float32)
  rows = packing.unpack(jnp.asarray(SEGMENTS), 4, jnp.asarray(MASK), jnp.asarray(x))
  mask, values = rows
  assert mask.shape == values.shape == (12, 7)
  sums, last = masked.masked_sum(values, mask, axis=1), masked.last_real(values, mask)
  for b in range(3):
    for s in range(4):
      own = [t for t in range(7) if SEGMENTS[b, t] == s + 1 and MASK[b, t]]
      np.testing.assert_allclose(sums[4 * b + s], x[b, own].sum(), rtol=1e-6)
      np.testing.assert_allclose(last[4 * b + s], x[b, own[-1]] if own else 0.0)


def test_pairs_are_unpacked_side_by_side():
  segments = np.stack([SEGMENTS, SEGMENTS[:, ::-1]], axis=1)
  mask = np.ones(segments.shape, bool)
  unpacked, again = packing.unpack(jnp.asarray(segments), 3, jnp.asarray(mask), segments)
  np.testing.assert_array_equal(unpacked, again == 1 + np.arange(9).reshape(9, 1, 1) % 3)


def halves(mask):
  """Two sequences in each row."""
  return jnp.broadcast_to(1 + (jnp.arange(T) >= T // 2), mask.shape)


def of_unpacked(mask, x):
  mask, x = packing.unpack(halves(mask), 2, mask, x)
  return squash(masked.masked_sum(x, mask, axis=1))


CASES = {
  "predicted": Case(lambda m, x: masked.masked_mean(x, packing.predicted(m, halves(m))), ((B, T),)),
  "predicted/one": Case(lambda m, x: masked.masked_mean(x, packing.predicted(m)), ((B, T),)),
  "unpack": Case(of_unpacked, ((B, T),)),
}
