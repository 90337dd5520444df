"""Means and variances over the positions where a mask is True. Other values may even be NaN."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import chex
import jax
import jax.numpy as jnp

# exp(89) overflows float32.
MAX_EXPONENT = 80.0

Axis = int | tuple[int, ...] | None
Arguments = ParamSpec("Arguments")


def widen(x: jax.Array) -> jax.Array:
  """`x` in float32, or in float64 if it was. bfloat16 has only 8 bits; sums need more."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def elementwise(loss: Callable[Arguments, jax.Array]) -> Callable[Arguments, jax.Array]:
  """Makes a loss without a mask safe to use under one.

  For elementwise functions: output `i` depends only on inputs at `i`. The loss is computed in
  float32 or wider. Entries that are not finite (padding may hold anything) pass no gradient;
  otherwise the zero gradient from a mask would become 0 * NaN by the chain rule.

  Args:
    loss: Function from arrays of one shape, and scalars, to an array of that shape.

  Returns:
    A function with the same signature and values.
  """

  def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, chex.ArrayNumpy)) and x.ndim > 0

  def wide(x: Any) -> Any:
    return widen(jnp.asarray(x)) if is_array(x) and jnp.issubdtype(x.dtype, jnp.floating) else x

  @functools.wraps(loss)
  def contained(*args: Arguments.args, **kwargs: Arguments.kwargs) -> jax.Array:
    args, kwargs = jax.tree.map(wide, (args, kwargs))
    value = jax.lax.stop_gradient(loss(*args, **kwargs))
    arrays = [x for x in jax.tree.leaves((args, kwargs)) if is_array(x) and x.shape == value.shape]
    fine = functools.reduce(jnp.logical_and, map(jnp.isfinite, arrays), jnp.isfinite(value))

    def safe(x: Any) -> Any:
      if is_array(x) and x.shape == value.shape:
        return jnp.where(fine, x, jnp.zeros((), x.dtype))
      return x

    args, kwargs = jax.tree.map(safe, (args, kwargs))
    return jnp.where(fine, loss(*args, **kwargs), value)

  return contained


def _keep(x: jax.Array, mask: jax.Array) -> jax.Array:
  # `where` and not `x * mask`: 0 * NaN is NaN, in the value and in the gradient.
  x = widen(x)
  return jnp.where(mask, x, jnp.zeros((), x.dtype))


def masked_sum(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
  """Sum of `x` where `mask` is set.

  Args:
    x: [...] float.
    mask: Same shape, bool.
    axis: Axes to reduce; all when None.

  Returns:
    `x` reduced over `axis`; 0 where everything is masked.
  """
  chex.assert_equal_shape([x, mask])
  return jnp.sum(_keep(x, mask), axis=axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
  """Mean of `x` where `mask` is set; 0, with zero gradient, where nothing is.

  Args:
    x: [...] float.
    mask: Same shape, bool.
    axis: Axes to reduce; all when None.

  Returns:
    `x` reduced over `axis`.
  """
  total = masked_sum(x, mask, axis)
  count = jnp.sum(mask, axis=axis)
  return total / jnp.maximum(count, 1).astype(total.dtype)


def defined_mean(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
  """`masked_mean` for metrics: NaN, which says that it is undefined, where nothing is unmasked.

  Args:
    x: [...] float.
    mask: Same shape, bool.
    axis: Axes to reduce; all when None.

  Returns:
    `x` reduced over `axis`.
  """
  return jnp.where(jnp.any(mask, axis=axis), masked_mean(x, mask, axis), jnp.nan)


def deviations(x: jax.Array, mask: jax.Array, axis: Axis = None) -> tuple[jax.Array, jax.Array]:
  """`x` minus its mean where `mask` is set, exactly 0 where all of it is equal.

  The mean of equal numbers in floating point differs from them by rounding, which a division by a
  small standard deviation would turn into a signal. So it is bounded by the least and the largest
  number, and then corrected by the mean of the distances from it.

  Args:
    x: [...] float.
    mask: Same shape, bool.
    axis: Axes to average over; all when None.

  Returns:
    The deviations, 0 where masked, and the mean, whose reduced axes have length 1.
  """
  chex.assert_equal_shape([x, mask])
  x = _keep(x, mask)
  axes = tuple(range(x.ndim)) if axis is None else axis
  count = jnp.maximum(jnp.sum(mask, axis=axes, keepdims=True), 1).astype(x.dtype)

  def mean_of(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=axes, keepdims=True) / count

  constant = jax.lax.stop_gradient(x)
  low = jnp.min(constant, axis=axes, keepdims=True, where=mask, initial=jnp.inf)
  high = jnp.max(constant, axis=axes, keepdims=True, where=mask, initial=-jnp.inf)
  rough = jnp.where(low <= high, jnp.clip(mean_of(constant), low, high), 0.0)
  x = _keep(x - rough, mask)
  return _keep(x - mean_of(x), mask), rough + mean_of(x)


def masked_var(x: jax.Array, mask: jax.Array, axis: Axis = None, ddof: int = 0) -> jax.Array:
  """Variance of `x` where `mask` is set, from deviations (no catastrophic cancellation).

  Args:
    x: [...] float.
    mask: Same shape, bool.
    axis: Axes to reduce; all when None.
    ddof: 1 for Bessel's correction. With `count <= ddof` unmasked entries the result is 0.

  Returns:
    `x` reduced over `axis`.
  """
  squares = jnp.square(deviations(x, mask, axis)[0])
  degrees = jnp.maximum(jnp.sum(mask, axis=axis) - ddof, 1)
  return jnp.sum(squares, axis=axis) / degrees.astype(squares.dtype)


def whiten(
  x: jax.Array, mask: jax.Array, *, shift_mean: bool = True, ddof: int = 0, eps: float = 1e-8
) -> jax.Array:
  """Scales `x` to unit variance where `mask` is set (and to zero mean if `shift_mean`).

  Under `jit` the statistics are those of the global batch, however it is sharded.

  Args:
    x: [...] float.
    mask: Same shape, bool.
    shift_mean: False keeps the mean.
    ddof: 1 for Bessel's correction.
    eps: Constant added to the variance.

  Returns:
    Same shape; 0 where masked.
  """
  centred, mean = deviations(x, mask)
  scaled = centred * jax.lax.rsqrt(masked_var(x, mask, ddof=ddof) + eps)
  return _keep(scaled if shift_mean else scaled + mean, mask)


def last_real(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Value of `x` at the last position where `mask` is set, whatever the padding side.

  Args:
    x: [..., T] float.
    mask: [..., T] bool.

  Returns:
    [...]; 0 for a row without unmasked position.
  """
  chex.assert_equal_shape([x, mask])
  # Unmasked positions to the right of each position, itself included: 1 at the last one only.
  remaining = jnp.flip(jnp.cumsum(jnp.flip(mask, -1), axis=-1), -1)
  return jnp.sum(_keep(x, mask & (remaining == 1)), axis=-1)
