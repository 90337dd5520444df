"""Weights of layers in 8 bits, for models that are not trained.

A kernel becomes codes beside their scales, one for each output and each tile of inputs,

    kernel [..., in, out] int8, kernel_scale [..., in / tile, out] bfloat16

and a block multiplies them as it is read, so that one layer at a time is in full.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.types import Params

SCALE = "kernel_scale"
_LARGEST = 127
_TILE = 128  # Inputs that share a scale, at most.
_LEAST_TILE = 16


def _tile(inputs: int) -> int:
  """Returns the largest divisor up to 128, or all inputs if each divisor is small."""
  size = max(n for n in range(1, _TILE + 1) if inputs % n == 0)
  return size if size >= _LEAST_TILE else inputs


def _encode(kernel: jax.Array) -> dict[str, jax.Array]:
  *lead, inputs, outputs = kernel.shape
  tiles = jnp.float32(kernel).reshape(*lead, -1, _tile(inputs), outputs)
  largest = jnp.max(jnp.abs(tiles), axis=-2)
  # Rounded up, so that no code is beyond the largest one.
  scale = (largest / _LARGEST * (1 + 2**-7)).astype(jnp.bfloat16)
  wide = jnp.float32(scale)[..., None, :]
  codes = jnp.round(tiles / jnp.where(wide > 0, wide, 1.0)).astype(jnp.int8)
  return {"kernel": codes.reshape(kernel.shape), SCALE: scale}


def _decode(codes: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
  tiles = codes.reshape(*scale.shape[:-1], -1, codes.shape[-1])
  return (jnp.float32(tiles) * jnp.float32(scale)[..., None, :]).astype(dtype).reshape(codes.shape)


def encode(params: Params, *, inside: bool = False) -> Params:
  """Encodes the kernels of the layers in params, at any depth, but for experts and their routers.

  Args:
    params: Params of one model, or a dict of the params of several.
    inside: True for the params of layers.
  """
  encoded: Params = {}
  for name, value in params.items():
    if isinstance(value, dict):
      skipped = name in ("experts", "router")
      encoded[name] = value if skipped else encode(value, inside=inside or name == "layers")
    elif inside and name == "kernel" and jnp.issubdtype(value.dtype, jnp.floating):
      encoded |= _encode(value)
    else:
      encoded[name] = value
  return encoded


def decode(params: Params, dtype: jnp.dtype = jnp.dtype(jnp.float32)) -> Params:
  """Reverses `encode`, up to its rounding; a no-op for params without codes."""
  decoded = {
    name: decode(value, dtype) if isinstance(value, dict) else value
    for name, value in params.items()
    if name != SCALE
  }
  if SCALE in params:
    decoded["kernel"] = _decode(params["kernel"], params[SCALE], dtype)
  return decoded
