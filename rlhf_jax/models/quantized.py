"""Weights of layers in 8 or 4 bits, for models that are not trained.

A kernel becomes codes beside their scales, one for each output and each tile of inputs,

    kernel [..., in, out] int8 or uint4, kernel_scale [..., in / tile, out] bfloat16

where a scale is the largest magnitude of its tile. A block decodes its codes as they are read, so
that one layer at a time is in full.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.types import Params

SCALE = "kernel_scale"
_LEAST_TILE = 16

# NF4: quantiles of a normal distribution, in [-1, 1] and with a zero. Dettmers et al., 2023,
# https://arxiv.org/abs/2305.14314, appendix E.
_NF4 = (
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
  *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
  *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
  *(0.7229568362236023, 1.0),
)


def _nearest(values: jax.Array) -> jax.Array:
  bounds = [(low + high) / 2 for low, high in itertools.pairwise(_NF4)]
  return sum(((values > bound).astype(jnp.uint8) for bound in bounds), jnp.uint8(0))


@dataclasses.dataclass(frozen=True)
class Format:
  """Codes of weights.

  Attributes:
    dtype: Dtype of the codes; XLA packs two of 4 bits into a byte.
    tile: Number of inputs that share a scale, at most.
    encode: Function from weights over their scale, float32 in [-1, 1], to codes.
    decode: Inverse of `encode`, up to rounding.
  """

  dtype: jnp.dtype
  tile: int
  encode: Callable[[jax.Array], jax.Array]
  decode: Callable[[jax.Array], jax.Array]


FORMATS = {
  "int8": Format(jnp.dtype(jnp.int8), 128, lambda x: jnp.round(x * 127), lambda codes: codes / 127),
  "nf4": Format(jnp.dtype(jnp.uint4), 64, _nearest, lambda codes: jnp.array(_NF4)[codes]),
}
_BY_DTYPE = {of.dtype: of for of in FORMATS.values()}


def _tile(inputs: int, most: int) -> int:
  """Returns the largest divisor up to `most`, or all inputs if each divisor is small."""
  size = max(n for n in range(1, most + 1) if inputs % n == 0)
  return size if size >= _LEAST_TILE else inputs


def _encode(kernel: jax.Array, form: Format) -> dict[str, jax.Array]:
  *lead, inputs, outputs = kernel.shape
  tiles = jnp.float32(kernel).reshape(*lead, -1, _tile(inputs, form.tile), outputs)
  scale = jnp.max(jnp.abs(tiles), axis=-2).astype(jnp.bfloat16)
  wide = jnp.float32(scale)[..., None, :]
  codes = form.encode(tiles / jnp.where(wide > 0, wide, 1.0)).astype(form.dtype)
  return {"kernel": codes.reshape(kernel.shape), SCALE: scale}


def _decode(codes: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
  values = _BY_DTYPE[codes.dtype].decode(codes)
  tiles = values.reshape(*scale.shape[:-1], -1, codes.shape[-1])
  return (tiles * jnp.float32(scale)[..., None, :]).astype(dtype).reshape(codes.shape)


def encode(params: Params, name: str, *, inside: bool = False) -> Params:
  """Encodes the kernels of the layers in params, at any depth, but for experts and their routers.

  Args:
    params: Params of one model, or a dict of the params of several.
    name: Key of `FORMATS`.
    inside: True for the params of layers.
  """
  encoded: Params = {}
  for key, value in params.items():
    if isinstance(value, dict):
      skipped = key in ("experts", "router")
      within = inside or key == "layers"
      encoded[key] = value if skipped else encode(value, name, inside=within)
    elif inside and key == "kernel" and jnp.issubdtype(value.dtype, jnp.floating):
      encoded |= _encode(value, FORMATS[name])
    else:
      encoded[key] = value
  return encoded


def format_of(params: Params) -> str:
  """Returns the name of the format of the codes in params; empty without codes."""
  for value in params.values():
    if isinstance(value, dict) and (found := format_of(value)):
      return found
  if SCALE not in params:
    return ""
  return next(name for name, form in FORMATS.items() if form.dtype == params["kernel"].dtype)


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
