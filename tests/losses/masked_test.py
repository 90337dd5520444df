import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.losses import masked
from tests.losses.case import B, Case, T, squash


def random_masked(shape=(4, 6), seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(2.0, 3.0, size=shape).astype(np.float32)
  return x, rng.random(shape) < 0.6


def kept(x, mask, axis):
  """Lists of unmasked values, one per entry of the result."""
  if axis is None:
    return [[float(x[i]) for i in np.ndindex(x.shape) if mask[i]]]
  x, mask = np.moveaxis(x, axis, -1), np.moveaxis(mask, axis, -1)
  return [
    [float(v) for v, on in zip(x[i], mask[i], strict=True) if on] for i in np.ndindex(x.shape[:-1])
  ]


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("seed", range(3))
def test_sum_and_mean_match_loops(axis, seed):
  x, mask = random_masked(seed=seed)
  mask[0] = mask[:, 0] = False  # A row and a column without any.
  groups = kept(x, mask, axis)
  total = [sum(g) for g in groups]
  mean = [sum(g) / len(g) if g else 0.0 for g in groups]
  np.testing.assert_allclose(np.ravel(masked.masked_sum(x, mask, axis)), total, atol=1e-5)
  np.testing.assert_allclose(np.ravel(masked.masked_mean(x, mask, axis)), mean, atol=1e-5)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("ddof", [0, 1])
def test_var_matches_loops(axis, ddof):
  x, mask = random_masked((5, 7))
  mask[0] = False
  mask[1] = np.arange(7) == 3  # A row with a single value.
  want = []
  for group in kept(x, mask, axis):
    mean = sum(group) / max(len(group), 1)
    want.append(sum((v - mean) ** 2 for v in group) / max(len(group) - ddof, 1))
  np.testing.assert_allclose(np.ravel(masked.masked_var(x, mask, axis, ddof)), want, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "bool"])
def test_counts_are_exact_whatever_the_dtype(dtype):
  x = np.random.default_rng(0).integers(2, size=1001)
  for ddof in (0, 1):
    got = masked.masked_var(jnp.asarray(x, dtype), jnp.ones(1001, bool), ddof=ddof)
    np.testing.assert_allclose(got, x.var(ddof=ddof), rtol=1e-6)
  white = masked.whiten(jnp.asarray(x, dtype), jnp.ones(1001, bool))
  np.testing.assert_allclose(white, (x - x.mean()) / x.std(), rtol=1e-5)


def test_reducing_two_of_three_axes():
  x, mask = random_masked((2, 3, 4))
  for n in range(3):
    on = mask[:, n]
    np.testing.assert_allclose(
      masked.masked_mean(x, mask, (0, 2))[n], x[:, n][on].mean(), rtol=1e-5
    )
    np.testing.assert_allclose(
      masked.masked_var(x, mask, (0, 2), 1)[n], x[:, n][on].var(ddof=1), rtol=1e-5
    )


def test_variance_far_from_zero():
  x = np.float32([10000.0, 10001.0, 10002.0, 5.0])
  on = np.array([True, True, True, False])
  np.testing.assert_allclose(masked.masked_var(x, on), 2 / 3, rtol=1e-3)


def test_gradient_of_mean():
  x, mask = random_masked()
  grad = jax.grad(masked.masked_mean)(x, mask)
  np.testing.assert_allclose(grad, mask / mask.sum(), rtol=1e-6)
  nothing = np.zeros_like(mask)
  value, grad = jax.value_and_grad(masked.masked_mean)(x, nothing)
  assert value == 0
  np.testing.assert_array_equal(grad, np.zeros_like(x))


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
def test_whiten_matches_numpy_over_the_real_tokens(shift_mean, ddof):
  x, mask = random_masked((6, 9))
  mask[2:4] = False  # Padded rows.
  x[2:4] = 1e4
  values = x[mask].astype(np.float64)
  want = (values - values.mean()) / np.sqrt(values.var(ddof=ddof) + 1e-8)
  want = want if shift_mean else want + values.mean()
  result = np.asarray(masked.whiten(x, mask, shift_mean=shift_mean, ddof=ddof))
  np.testing.assert_allclose(result[mask], want, atol=1e-5)
  assert (result[~mask] == 0).all()
  # Without the padded rows nothing changes.
  rows = mask.any(axis=1)
  alone = masked.whiten(x[rows], mask[rows], shift_mean=shift_mean, ddof=ddof)
  np.testing.assert_allclose(result[rows], alone, atol=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_whiten_few_values_is_finite(n, ddof):
  x, _ = random_masked((2, 3))
  mask = np.arange(6).reshape(2, 3) < n
  value, grad = jax.value_and_grad(lambda x: jnp.sum(masked.whiten(x, mask, ddof=ddof) ** 2))(x)
  assert np.isfinite(value)
  assert np.isfinite(grad).all()
  if n == 1:
    np.testing.assert_array_equal(masked.whiten(x, mask, ddof=ddof), np.zeros((2, 3)))


def test_whiten_equal_values_are_zero():
  x, mask = np.full((2, 3), 3.0, np.float32), np.ones((2, 3), bool)
  grad = jax.grad(lambda x: jnp.sum(jnp.sin(masked.whiten(x, mask))))(x)
  np.testing.assert_allclose(masked.whiten(x, mask), np.zeros((2, 3)), atol=1e-6)
  assert np.isfinite(grad).all()


# Numbers whose mean in float32 differs from them for several of these counts.
EQUAL = [(value, n) for value in (0.1, 103.3, 1000.7, -3e4, 1e-3, 7e20) for n in (2, 3, 7, 11, 13)]


@pytest.mark.parametrize(("value", "n"), EQUAL)
def test_equal_values_have_no_deviation_at_all(value, n):
  x, mask = np.full((2, n + 3), np.nan, np.float32), np.zeros((2, n + 3), bool)
  x[0, 2 : 2 + n], mask[0, 2 : 2 + n] = value, True
  for axis in (None, 1):
    deviations, mean = masked.deviations(x, mask, axis)
    assert not np.any(deviations)
    assert np.ravel(mean)[0] == np.float32(value)
    assert not np.any(masked.masked_var(x, mask, axis, ddof=1))
  assert not np.any(masked.whiten(x, mask))


@pytest.mark.parametrize("value", [0.1, 103.3, 1000.7])
def test_millions_of_equal_values_have_none_either(value):
  x = np.full(3_000_000, value, np.float32)
  deviations, mean = masked.deviations(x, x > 0)
  assert not np.any(deviations) and mean[0] == np.float32(value)


@pytest.mark.parametrize("value", [0.1, 103.3, 1000.7, -3e4])
def test_equal_values_whose_mean_and_distances_from_it_are_rounded(value):
  # With a mask that it knows, the compiler multiplies by the rounded 1 / 61.
  centred = jax.jit(lambda x: masked.deviations(x, jnp.ones_like(x, bool))[0])
  assert not np.any(centred(np.full((1, 61), value, np.float32)))


@pytest.mark.parametrize("offset", [1.0, 103.3, 1000.7, -3e4])
def test_nearly_equal_values_are_told_apart(offset):
  x = np.float32(offset) + np.spacing(np.float32(offset)) * np.arange(7, dtype=np.float32) ** 2
  mask = np.arange(7) != 4
  want = np.float64(x) - np.float64(x)[mask].mean()
  deviations, _ = masked.deviations(x, mask)
  np.testing.assert_allclose(deviations, np.where(mask, want, 0), rtol=1e-5)
  whitened = want / np.sqrt(np.float64(x)[mask].var() + 1e-8)
  np.testing.assert_allclose(masked.whiten(x, mask), np.where(mask, whitened, 0), rtol=1e-5)


def test_a_mean_of_nothing_is_undefined_for_metrics():
  x, mask = random_masked((2, 3))
  mask = np.array([[True, False, True], [False, False, False]])
  result = masked.defined_mean(x, mask, axis=1)
  np.testing.assert_allclose(result[0], (x[0, 0] + x[0, 2]) / 2, rtol=1e-6)
  assert np.isnan(result[1]) and np.isnan(masked.defined_mean(x, mask & False))


@pytest.mark.parametrize("spec", ["data:8", "data:2,fsdp:4"])
def test_statistics_are_those_of_the_global_batch(spec):
  x, mask = random_masked((16, 5))
  x += np.arange(16, dtype=np.float32)[:, None]  # Every device holds another mean.
  want = jax.jit(masked.whiten)(x, mask)
  placed = sharding.place_batch((x, mask), sharding.make_mesh(spec))
  np.testing.assert_allclose(jax.jit(masked.whiten)(*placed), want, atol=1e-6)
  np.testing.assert_allclose(
    jax.jit(masked.masked_mean)(*placed), masked.masked_mean(x, mask), rtol=1e-6
  )


@pytest.mark.parametrize(
  "row",
  [
    [1, 1, 1, 0, 0],  # Right padding.
    [0, 0, 1, 1, 1],  # Left padding.
    [0, 1, 1, 0, 0],  # Both.
    [1, 0, 1, 0, 1],  # Gaps.
    [1, 0, 0, 0, 0],
    [0, 0, 0, 0, 1],
    [1, 1, 1, 1, 1],
    [0, 0, 0, 0, 0],  # Empty.
  ],
)
def test_last_real(row):
  x, _ = random_masked((3, 5))
  mask = np.tile(np.array(row, bool), (3, 1))
  want, want_grad = np.zeros(3, np.float32), np.zeros((3, 5), np.float32)
  for b in range(3):
    for t in range(5):
      if row[t]:
        want[b], want_grad[b] = x[b, t], np.arange(5) == t
  np.testing.assert_array_equal(masked.last_real(x, mask), want)
  grad = jax.grad(lambda x: jnp.sum(masked.last_real(x, mask)))(x)
  np.testing.assert_array_equal(grad, want_grad)


def test_last_real_of_several_leading_axes():
  x, mask = random_masked((2, 3, 5))
  each = [[masked.last_real(x[i, j], mask[i, j]) for j in range(3)] for i in range(2)]
  np.testing.assert_array_equal(masked.last_real(x, mask), np.array(each))


@pytest.mark.parametrize("function", [masked.masked_mean, masked.whiten, masked.last_real])
def test_bad_shapes_are_refused(function):
  with pytest.raises(AssertionError):
    function(jnp.zeros((3, 4)), jnp.ones((3, 1), bool))


def with_mask(function, **hyper):
  """A function of one array [B, T] that reads the mask itself."""
  return Case(lambda m, x, **hyper: squash(function(x, m, **hyper)), ((B, T),), hyper=hyper)


CASES = {
  "widen": Case(lambda m, x: squash(jnp.where(m, masked.widen(x), 0.0)), ((B, T),)),
  "masked_sum": with_mask(lambda x, m: masked.masked_sum(x, m, 1)),
  "masked_mean": with_mask(lambda x, m: masked.masked_mean(x, m, 1)),
  "defined_mean": with_mask(lambda x, m: jnp.nan_to_num(masked.defined_mean(x, m, 1))),
  "deviations": with_mask(lambda x, m: masked.deviations(x, m, 1)[0]),
  "masked_var": with_mask(lambda x, m: masked.masked_var(x, m, 1)),
  "masked_var/all": Case(lambda m, x: masked.masked_var(x, m, ddof=1), ((B, T),)),
  "whiten": with_mask(lambda x, m, eps: masked.whiten(x, m, eps=eps), eps=1e-3),
  "last_real": with_mask(masked.last_real),
}
