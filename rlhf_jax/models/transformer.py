"""One decoder-only transformer, defined with flax NNX and run as pure functions.

NNX is a definition language here: a block is built once to get its graph, its weights live in a
plain nested dict, and `build.py` merges the two inside a pure function. Weight matrices are
[in, out], so that `x @ kernel` reads as the mathematics; layers are stacked on a leading axis `L`.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched to a longer context.

  Attributes:
    kind: "linear" divides every frequency by `factor`; "llama3" only the low ones, with a smooth
      transition (Llama 3.1).
    factor: Stretch of the context.
    low_freq_factor: llama3: wavelengths above `original_length / low_freq_factor` are divided.
    high_freq_factor: llama3: wavelengths below `original_length / high_freq_factor` are kept.
    original_length: llama3: context length of pretraining, tokens.
  """

  kind: Literal["linear", "llama3"]
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Architecture of a decoder of the Llama family.

  Attributes:
    vocab_size: Rows of the embedding, V.
    width: Width of the residual stream, D.
    layers: Number of blocks, L.
    heads: Query heads, H.
    kv_heads: Key and value heads; divides `heads`.
    head_dim: Width of a head, K.
    mlp_width: Width of the gated MLP.
    max_length: Longest sequence the model was made for, tokens.
    rope_theta: Base of the rotary frequencies.
    rope_scaling: Stretching of the rotary frequencies, or None.
    norm_eps: Added to the mean square in RMSNorm.
    tied: Whether the output projection is the embedding.
    attention_bias: Biases on query, key, value and output projections.
    mlp_bias: Biases in the MLP.
    init_std: Standard deviation of initial weights.
    dtype: Computation dtype; params are float32 unless loaded otherwise.
    remat: Recompute each block in the backward pass instead of keeping its activations.
  """

  vocab_size: int
  width: int = 128
  layers: int = 4
  heads: int = 4
  kv_heads: int = 4
  head_dim: int = 32
  mlp_width: int = 384
  max_length: int = 1024
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5
  tied: bool = True
  attention_bias: bool = False
  mlp_bias: bool = False
  init_std: float = 0.02
  dtype: Literal["float32", "bfloat16"] = "float32"
  remat: bool = True

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")


class Cache(NamedTuple):
  """Keys and values of the tokens seen so far.

  Attributes:
    k: [L, B, S, kv_heads, K] keys, already rotated; S slots.
    v: [L, B, S, kv_heads, K] values.
    mask: [B, S] bool, True on slots that hold a real token.
    index: [] int32, next free slot, common to all rows.
  """

  k: jax.Array
  v: jax.Array
  mask: jax.Array
  index: jax.Array

  def repeat(self, n: int) -> "Cache":
    """Every row n times, the copies next to each other."""
    k, v = (jnp.repeat(x, n, axis=1) for x in (self.k, self.v))
    return Cache(k, v, jnp.repeat(self.mask, n, axis=0), self.index)


def rope_frequencies(config: ModelConfig) -> jax.Array:
  """Rotary frequencies, [K / 2] float32 (Su et al., 2021, https://arxiv.org/abs/2104.09864)."""
  exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
  frequencies = 1.0 / config.rope_theta**exponent
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  if scaling.kind == "linear":
    return frequencies / scaling.factor
  wavelength = 2 * math.pi / frequencies
  smooth = (scaling.original_length / wavelength - scaling.low_freq_factor) / (
    scaling.high_freq_factor - scaling.low_freq_factor
  )
  smooth = jnp.clip(smooth, 0.0, 1.0)
  return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
  """Rotates halves of each head by the token's position.

  Args:
    x: [B, T, heads, K].
    positions: [B, T] int.
    frequencies: [K / 2] float32.

  Returns:
    [B, T, heads, K], dtype of `x`.
  """
  angle = positions[:, :, None].astype(jnp.float32) * frequencies[None, None]  # [B, T, K / 2]
  cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class RMSNorm(nnx.Module):
  """`x / rms(x) * scale`, statistics in float32."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    del rngs  # Starts at one; taken so that every module is made the same way.
    self.scale = nnx.Param(jnp.ones((config.width,), jnp.float32))
    self.eps = config.norm_eps

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
    scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
    return (wide * inverse).astype(x.dtype) * scale.astype(x.dtype)


class Linear(nnx.Module):
  """`x @ kernel (+ bias)` in the dtype of `x`."""

  def __init__(self, fan_in: int, fan_out: int, std: float, bias: bool, *, rngs: nnx.Rngs):
    shape = (fan_in, fan_out)
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
    if bias:
      self.bias = nnx.Param(jnp.zeros((fan_out,), jnp.float32))

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x @ self.kernel[...].astype(x.dtype)
    if hasattr(self, "bias"):
      y += self.bias[...].astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    c, std = config, config.init_std
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    self.q = Linear(c.width, queries, std, c.attention_bias, rngs=rngs)
    self.k = Linear(c.width, keys, std, c.attention_bias, rngs=rngs)
    self.v = Linear(c.width, keys, std, c.attention_bias, rngs=rngs)
    # Residual branches start small enough that their sum over layers keeps unit scale.
    self.o = Linear(queries, c.width, std / math.sqrt(2 * c.layers), c.attention_bias, rngs=rngs)

  def __call__(self, x, positions, mask, frequencies, cache):
    c = self.config
    batch, length = x.shape[:2]
    q = self.q(x).reshape(batch, length, c.heads, c.head_dim)
    k = self.k(x).reshape(batch, length, c.kv_heads, c.head_dim)
    v = self.v(x).reshape(batch, length, c.kv_heads, c.head_dim)
    q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
    if cache is not None:
      keys, values, index = cache
      k = jax.lax.dynamic_update_slice_in_dim(keys, k.astype(keys.dtype), index, axis=1)
      v = jax.lax.dynamic_update_slice_in_dim(values, v.astype(values.dtype), index, axis=1)
    out = jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=mask)
    out = self.o(out.reshape(batch, length, c.heads * c.head_dim))
    return out, None if cache is None else (k, v)


class MLP(nnx.Module):
  """Gated MLP (SwiGLU, Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    c, std = config, config.init_std
    self.gate = Linear(c.width, c.mlp_width, std, c.mlp_bias, rngs=rngs)
    self.up = Linear(c.width, c.mlp_width, std, c.mlp_bias, rngs=rngs)
    self.down = Linear(c.mlp_width, c.width, std / math.sqrt(2 * c.layers), c.mlp_bias, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
  """Attention and MLP, each behind its norm and added to the residual stream."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config, rngs=rngs)
    self.attention = Attention(config, rngs=rngs)
    self.mlp_norm = RMSNorm(config, rngs=rngs)
    self.mlp = MLP(config, rngs=rngs)

  def __call__(self, x, positions, mask, frequencies, cache=None):
    """[B, T, D] -> [B, T, D] and the updated (keys, values) of this layer, None without cache."""
    out, cache = self.attention(self.attention_norm(x), positions, mask, frequencies, cache)
    x = x + out
    return x + self.mlp(self.mlp_norm(x)), cache


class Embedding(nnx.Module):
  """Token embedding, also the output projection of a tied model."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    shape = (config.vocab_size, config.width)
    self.embedding = nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape))

  def __call__(self, tokens: jax.Array) -> jax.Array:
    return self.embedding[...][tokens]
