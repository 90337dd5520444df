"""Precision of matrix products in float32, which accelerators round to fewer bits unless told.

A TPU rounds the operands to bfloat16 and an NVIDIA GPU to TF32, with 8 and 11 significant bits of
24. Log-probabilities, values and scores then differ from float32 by more than an update changes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh


def of_device(setting: str, mesh: Mesh | None = None) -> str | None:
  """Returns the name by which JAX knows a precision on a device; None leaves it to the device.

  Args:
    setting: `default` is the device's own. `high` is three bfloat16 passes on a TPU and float32
      elsewhere: to XLA the precision HIGH means TF32 on an NVIDIA GPU. `highest` is float32.
    mesh: Devices; None is the default device.
  """
  if setting == "default":
    return None
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  return "high" if setting == "high" and device.platform == "tpu" else "highest"


def within(precision: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a function whose matrix products have a precision; None changes nothing.

  The precision becomes a part of each traced product, hence also of its derivatives. An exception
  is a product in the backward pass of a `jax.custom_vjp`, which is traced later; see `both_passes`.
  """
  if precision is None:
    return function

  @functools.wraps(function)
  def call(*args, **kwargs):
    with jax.default_matmul_precision(precision):
      return function(*args, **kwargs)

  return call


def both_passes(precision: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `within` for a function of arrays that is or calls a `jax.custom_vjp`."""
  if precision is None:
    return function
  call = jax.custom_vjp(within(precision, function))
  call.defvjp(
    within(precision, lambda *args: jax.vjp(function, *args)),
    within(precision, lambda pullback, cotangents: pullback(cotangents)),
  )
  return call


def exact(x: jax.Array) -> jax.lax.Precision | None:
  """Returns the precision of a product with `x` on a CPU, which never rounds float32."""
  return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
