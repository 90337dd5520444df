"""One decoder-only transformer, defined with flax NNX and run as pure functions.

NNX is a definition language here: a block is built once to get its graph, its weights live in a
plain nested dict, and `build.py` merges the two inside a pure function. Weight matrices are
[in, out], so that `x @ kernel` reads as the mathematics; layers are stacked on a leading axis `L`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from rlhf_jax import ranges


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Scaling of rotary frequencies to a longer context.

  Attributes:
    kind: "linear" divides every frequency by `factor`; "llama3" divides only the low ones, with a
      smooth transition (Llama 3.1).
    factor: Factor by which the context is extended.
    low_freq_factor: llama3: frequencies with wavelengths above `original_length / low_freq_factor`
      are divided.
    high_freq_factor: llama3: frequencies with wavelengths below `original_length /
      high_freq_factor` are kept.
    original_length: llama3: context length of pretraining, tokens.
  """

  kind: Literal["linear", "llama3"]
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192


NormName = Literal["rms", "rms_plus_one", "layer"]
PositionsName = Literal["rope", "learned"]
AttentionName = Literal["auto", "xla", "splash", "cudnn"]
PrecisionName = Literal["default", "high", "highest"]
RematName = Literal["none", "full", "dots"]
REMAT = {
  "none": lambda block: block,
  "full": jax.checkpoint,
  "dots": functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
}
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def _computation(default: Any) -> Any:
  """A field that says how to compute. It is no part of the architecture, so no folder says it."""
  return dataclasses.field(default=default, metadata={"computation": True})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Architecture of a decoder, and how to compute it. The defaults follow Llama.

  Attributes:
    vocab_size: Rows of the embedding, V.
    width: Width of the residual stream, D.
    layers: Number of blocks, L.
    heads: Query heads, H.
    kv_heads: Key and value heads; divides `heads`.
    head_dim: Width of a head, K.
    mlp_width: Width of the MLP, or of each expert.
    experts: Number of expert MLPs (see `experts.py`); 0 is one MLP for all tokens.
    experts_per_token: Number of experts that each token goes through.
    normalized_router: Divide the router's weights of the chosen experts by their sum.
    max_length: Longest sequence the model was made for, tokens.
    family: Format of the model's folder (`hf.FAMILIES`); it does not change the computation.
    norm: "rms" multiplies by a scale, "rms_plus_one" by one plus the scale (Gemma), "layer" also
      subtracts the mean and adds a bias.
    norm_eps: Constant added to the mean square, or to the variance, in norms.
    post_norms: Norms also after attention and MLP, before the residual connection.
    qk_norm: Norms over the width of every query and key head, before the rotation.
    activation: Activation of the MLP; "gelu_tanh" is the tanh approximation.
    gated_mlp: `down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` without gate.
    positions: "rope" rotates queries and keys, "learned" adds one of `max_length` vectors to the
      embedding.
    rope_theta: Base of the rotary frequencies.
    rope_scaling: Scaling of the rotary frequencies, or None.
    rope_local_theta: Base in layers with a window, which have no scaling; None uses the same
      frequencies in all layers.
    rotary_fraction: Fraction of each head that is rotated, from its start.
    windows: Number of tokens that a token attends to, including itself, for each layer; None is
      all before it. Empty if no layer has a window.
    query_width: Width whose square root divides the attention scores; None is `head_dim`.
    attention_softcap: Cap of the attention scores s, `cap * tanh(s / cap)`, or None.
    logit_softcap: Cap of the logits over the vocabulary, likewise.
    embed_scale: Multiply embeddings by sqrt(D).
    tied: Use the embedding as the output projection.
    qkv_bias: Biases on query, key and value projections.
    out_bias: Bias on the output projection of attention.
    mlp_bias: Biases in the MLP.
    init_std: Standard deviation of initial weights.
    dtype: Computation dtype; params are float32 unless loaded otherwise.
    precision: Precision of matrix products in float32; see `precision.of_device`.
    attention: Implementation of attention over whole sequences; see `attention.make_attend`.
    remat: Activations that the backward pass recomputes: "full" is all of a block, "dots" all
      except the outputs of products with weights, "none" nothing.

  Raises:
    ValueError: If the fields are inconsistent.
  """

  vocab_size: int
  width: int = 128
  layers: int = 4
  heads: int = 4
  kv_heads: int = 4
  head_dim: int = 32
  mlp_width: int = 384
  experts: int = 0
  experts_per_token: int = 2
  normalized_router: bool = True
  max_length: int = 1024
  family: str = "llama"
  norm: NormName = "rms"
  norm_eps: float = 1e-5
  post_norms: bool = False
  qk_norm: bool = False
  activation: Literal["silu", "gelu_tanh"] = "silu"
  gated_mlp: bool = True
  positions: PositionsName = "rope"
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  rope_local_theta: float | None = None
  rotary_fraction: float = 1.0
  windows: tuple[int | None, ...] = ()
  query_width: int | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  embed_scale: bool = False
  tied: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  init_std: float = 0.02
  dtype: Literal["float32", "bfloat16"] = _computation("float32")
  precision: PrecisionName = _computation("high")
  attention: AttentionName = _computation("auto")
  remat: RematName = _computation("full")

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
    ranges.check(
      self,
      above_zero=("rotary_fraction",),
      positive=("attention_softcap", "logit_softcap", "query_width"),
      one_of={
        "norm": get_args(NormName),
        "activation": ACTIVATIONS,
        "positions": get_args(PositionsName),
        "attention": get_args(AttentionName),
        "precision": get_args(PrecisionName),
        "remat": REMAT,
      },
    )
    if self.experts and not 0 < self.experts_per_token <= self.experts:
      raise ValueError(f"experts_per_token is {self.experts_per_token} of {self.experts} experts")
    if self.experts and (self.mlp_bias or not self.gated_mlp):
      raise ValueError("experts have a gate and no bias; set gated_mlp and not mlp_bias")
    if self.windows and len(self.windows) != self.layers:
      raise ValueError(f"windows has {len(self.windows)} entries for {self.layers} layers")
    if any(size is not None and size < 1 for size in self.windows):
      raise ValueError(f"windows is {self.windows}; a token sees at least itself, or use None")
    if self.windows and not any(self.windows):
      raise ValueError("windows holds no window; leave it empty")
    if self.rope_local_theta is not None and not self.windows:
      raise ValueError("rope_local_theta is for layers with a window, but windows is empty")
    rotary = (self.rope_scaling, self.rope_local_theta, self.rotary_fraction)
    if self.positions == "learned" and rotary != (None, None, 1.0):
      raise ValueError(
        "learned positions leave no use for rope_scaling, rope_local_theta, rotary_fraction"
      )
    if self.positions == "rope" and (not self.rotary_width or self.rotary_width % 2):
      raise ValueError(
        f"rotary_fraction {self.rotary_fraction} of head_dim {self.head_dim} is"
        f" {self.rotary_width} dimensions, expected an even number"
      )

  @property
  def rotary_width(self) -> int:
    """Number of dimensions of a head that are rotated."""
    return int(self.head_dim * self.rotary_fraction)

  @property
  def score_scale(self) -> float:
    """Factor of the attention scores."""
    return (self.query_width or self.head_dim) ** -0.5


# Fields that say how to compute; each has a flag of the same name.
COMPUTATION = tuple(
  field.name for field in dataclasses.fields(ModelConfig) if "computation" in field.metadata
)


class Cache(NamedTuple):
  """Keys and values of the tokens seen so far.

  They are written in place, in the layout that attention multiplies, so a new token only costs
  reading them once.

  Attributes:
    k: Rotated keys: one [B, kv_heads, S, K] per layer, or one [L, B, kv_heads, S, K] if a loop runs
      the layers; S slots.
    v: Values, likewise.
    positions: [B, S] int32, position of the token in each slot, from 0; -1 where there is none.
    index: [] int32, next slot to write, common to all rows.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  positions: jax.Array
  index: jax.Array

  def repeat(self, n: int) -> "Cache":
    """Repeats every row n times; the copies are adjacent."""
    k, v = jax.tree.map(lambda x: jnp.repeat(x, n, axis=-4), (self.k, self.v))
    return Cache(k, v, jnp.repeat(self.positions, n, axis=0), self.index)

  def seek(self, index: jax.Array) -> "Cache":
    """Returns the cache with `index` as the next slot to write."""
    return self._replace(index=index)

  def seat(self, row: jax.Array, prompts: "Cache", prompt: jax.Array) -> "Cache":
    """Replaces one row by a row of a cache with fewer slots.

    Args:
      row: [] int32, row to replace.
      prompts: Cache to copy from.
      prompt: [] int32, row to copy.
    """
    row, prompt = row[None], prompt[None]

    def copy(to: jax.Array, of: jax.Array) -> jax.Array:
      part = (*[slice(None)] * (to.ndim - 4), row, slice(None), slice(of.shape[-2]))
      return to.at[part].set(jnp.take(of, prompt, axis=-4, mode="clip"))

    k, v = jax.tree.map(copy, (self.k, self.v), (prompts.k, prompts.v))
    seen = jnp.take(prompts.positions, prompt, axis=0, mode="clip")
    rest = ((0, 0), (0, self.positions.shape[1] - seen.shape[1]))
    seen = jnp.pad(seen, rest, constant_values=-1)
    return Cache(k, v, self.positions.at[row].set(seen), self.index)


def rope_frequencies(config: ModelConfig, *, local: bool = False) -> jax.Array:
  """Rotary frequencies, [R / 2] float32 (Su et al., 2021, https://arxiv.org/abs/2104.09864).

  Args:
    config: Architecture; R is its `rotary_width`.
    local: Frequencies for layers with a window, if they differ.
  """
  theta, scaling = config.rope_theta, config.rope_scaling
  if local and config.rope_local_theta is not None:
    theta, scaling = config.rope_local_theta, None
  exponent = jnp.arange(0, config.rotary_width, 2, dtype=jnp.float32) / config.rotary_width
  frequencies = 1.0 / theta**exponent
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


class Rotation(NamedTuple):
  """Angles by which tokens are rotated, the same for queries and keys of all heads and layers.

  Attributes:
    cos: Cosines, [..., B, T, R / 2] float32.
    sin: Sines, likewise.
  """

  cos: jax.Array
  sin: jax.Array


def rotation(positions: jax.Array, frequencies: jax.Array, *, on_cpu: bool = False) -> Rotation:
  """Computes the rotation of tokens by their positions.

  Args:
    positions: [B, T] int.
    frequencies: [..., R / 2] float32.
    on_cpu: True to compute it once on one CPU. XLA's CPU backend computes cosines again in each
      pass that reads them, for every head, unless they come out of a loop.
  """
  shape = (1,) * (frequencies.ndim - 1) + positions.shape + (1,)
  angles = positions.reshape(shape).astype(jnp.float32) * frequencies[..., None, None, :]
  if not on_cpu:
    return Rotation(jnp.cos(angles), jnp.sin(angles))
  which = jnp.array([True, False])
  return Rotation(*jax.lax.map(lambda cos: jax.lax.cond(cos, jnp.cos, jnp.sin, angles), which))


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
  """Rotates halves of the first R dimensions of each head by the token's position.

  Args:
    x: [B, T, heads, K].
    by: Arrays [B, T, R / 2], R at most K.

  Returns:
    [B, T, heads, K], dtype of `x`.
  """
  half = by.cos.shape[-1]
  cos, sin = by.cos[:, :, None], by.sin[:, :, None]
  a, b, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
  turned = [a * cos - b * sin, b * cos + a * sin, rest]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Norm(nnx.Module):
  """Root-mean-square or layer norm over the last axis, with statistics in float32."""

  def __init__(self, config: ModelConfig, width: int, *, rngs: nnx.Rngs):
    del rngs  # Unused; every module has the same signature.
    self.kind, self.eps = config.norm, config.norm_eps
    start = jnp.zeros if self.kind == "rms_plus_one" else jnp.ones
    self.scale = nnx.Param(start((width,), jnp.float32))
    if self.kind == "layer":
      self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    if self.kind == "layer":
      wide -= jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale = self.scale[...].reshape(shape)
    if self.kind == "rms":  # Rounded before scaling, as the models were trained.
      return (wide * inverse).astype(x.dtype) * scale.astype(x.dtype)
    scale = scale.astype(jnp.float32)
    if self.kind == "rms_plus_one":
      return (wide * inverse * (1.0 + scale)).astype(x.dtype)
    return (wide * inverse * scale + self.bias[...].reshape(shape)).astype(x.dtype)


Matmul = Callable[[jax.Array, jax.Array], jax.Array]


def matmul_on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`x [..., D] @ kernel [D, F]` that trains faster on one CPU.

  The gradient of a product of two matrices is one too, which XLA's CPU backend computes as it
  stands. In that of a product with several leading axes it copies the operand that it transposes,
  with the computation fused into it; that takes a third of the step time. Of a tall kernel there is
  no forward-mode derivative.
  """
  kernel = _with_wide_gradient(kernel) if kernel.shape[0] > kernel.shape[1] else kernel
  return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _with_wide_gradient(kernel: jax.Array) -> jax.Array:
  """A tall matrix whose gradient is computed as a wide one, in two thirds of the time."""
  return kernel


_with_wide_gradient.defvjp(
  lambda kernel: (kernel, None),
  lambda _, gradient: (jax.lax.optimization_barrier(gradient.T).T,),
)


class Linear(nnx.Module):
  """`x @ kernel (+ bias)` in the dtype of `x`."""

  # Set if the params hold an adapter (lora.py).
  lora_a: nnx.Param
  lora_b: nnx.Param
  lora_scale: nnx.Param

  def __init__(
    self, fan_in: int, fan_out: int, std: float, bias: bool, matmul: Matmul, *, rngs: nnx.Rngs
  ):
    self.matmul = matmul
    shape = (fan_in, fan_out)
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
    if bias:
      self.bias = nnx.Param(jnp.zeros((fan_out,), jnp.float32))

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.matmul(x, self.kernel[...].astype(x.dtype))
    if hasattr(self, "bias"):
      y += self.bias[...].astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    if hasattr(self, "lora_a"):
      b = self.lora_scale[...] * self.lora_b[...]
      y += self.matmul(self.matmul(x, self.lora_a[...].astype(x.dtype)), b.astype(x.dtype))
    return y


class Attention(nnx.Module):
  """Grouped-query attention; `attend` maps q [B, T, H, K], k and v [B, S, kv_heads, K] to out."""

  def __init__(self, config: ModelConfig, matmul: Matmul = jnp.matmul, *, rngs: nnx.Rngs):
    self.config = config
    c, std = config, config.init_std
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    self.q = Linear(c.width, queries, std, c.qkv_bias, matmul, rngs=rngs)
    self.k = Linear(c.width, keys, std, c.qkv_bias, matmul, rngs=rngs)
    self.v = Linear(c.width, keys, std, c.qkv_bias, matmul, rngs=rngs)
    # Residual branches start small enough that their sum over layers keeps unit scale.
    self.o = Linear(queries, c.width, std / math.sqrt(2 * c.layers), c.out_bias, matmul, rngs=rngs)
    if c.qk_norm:
      self.q_norm = Norm(c, c.head_dim, rngs=rngs)
      self.k_norm = Norm(c, c.head_dim, rngs=rngs)

  def __call__(self, x, turned, attend, cache):
    c = self.config
    batch, length = x.shape[:2]
    q = self.q(x).reshape(batch, length, c.heads, c.head_dim)
    k = self.k(x).reshape(batch, length, c.kv_heads, c.head_dim)
    v = self.v(x).reshape(batch, length, c.kv_heads, c.head_dim)
    if c.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    if turned is not None:
      q, k = rotate(q, turned), rotate(k, turned)
    if cache is not None:
      *written, where, slot = cache
      cache = tuple(
        jax.lax.dynamic_update_slice(
          old,
          jnp.expand_dims(jnp.swapaxes(new, 1, 2), range(len(where))).astype(old.dtype),
          (*where, 0, 0, slot, 0),
        )
        for old, new in zip(written, (k, v), strict=True)
      )
      k, v = (x[where] for x in cache)
    out = attend(q, k.astype(q.dtype), v.astype(q.dtype))
    return self.o(out.reshape(batch, length, c.heads * c.head_dim)), cache


class MLP(nnx.Module):
  """MLP, gated (GLU variants, Shazeer, 2020, https://arxiv.org/abs/2002.05202) or plain."""

  def __init__(self, config: ModelConfig, matmul: Matmul = jnp.matmul, *, rngs: nnx.Rngs):
    c, std = config, config.init_std
    if c.gated_mlp:
      self.gate = Linear(c.width, c.mlp_width, std, c.mlp_bias, matmul, rngs=rngs)
    self.up = Linear(c.width, c.mlp_width, std, c.mlp_bias, matmul, rngs=rngs)
    self.down = Linear(
      c.mlp_width, c.width, std / math.sqrt(2 * c.layers), c.mlp_bias, matmul, rngs=rngs
    )
    self.activation = c.activation

  def __call__(self, x: jax.Array) -> jax.Array:
    activation = ACTIVATIONS[self.activation]
    if hasattr(self, "gate"):
      return self.down(activation(self.gate(x)) * self.up(x))
    return self.down(activation(self.up(x)))


class Stacked(nnx.Module):
  """A weight matrix of each expert, [E, in, out]."""

  def __init__(self, experts: int, fan_in: int, fan_out: int, std: float, *, rngs: nnx.Rngs):
    shape = (experts, fan_in, fan_out)
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class Experts(nnx.Module):
  """The MLPs of a mixture."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    c, std = config, config.init_std
    self.gate = Stacked(c.experts, c.width, c.mlp_width, std, rngs=rngs)
    self.up = Stacked(c.experts, c.width, c.mlp_width, std, rngs=rngs)
    self.down = Stacked(c.experts, c.mlp_width, c.width, std / math.sqrt(2 * c.layers), rngs=rngs)


class Mixture(nnx.Module):
  """A mixture of experts and the router that weighs a few of them for each token."""

  def __init__(self, config: ModelConfig, mix: Callable[..., jax.Array], *, rngs: nnx.Rngs):
    self.config, self.mix = config, mix
    self.router = Linear(
      config.width, config.experts, config.init_std, False, jnp.matmul, rngs=rngs
    )
    self.experts = Experts(config, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    probs = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(probs, self.config.experts_per_token)
    if self.config.normalized_router:
      weights /= jnp.sum(weights, axis=-1, keepdims=True)
    experts = self.experts.gate, self.experts.up, self.experts.down
    kernels = [expert.kernel[...].astype(x.dtype) for expert in experts]
    return self.mix(x, chosen, weights, *kernels)


class Block(nnx.Module):
  """Attention and MLP, each after its norm and added to the residual stream."""

  def __init__(
    self,
    config: ModelConfig,
    matmul: Matmul = jnp.matmul,
    mix: Callable[..., jax.Array] | None = None,
    *,
    rngs: nnx.Rngs,
  ):
    self.attention_norm = Norm(config, config.width, rngs=rngs)
    self.attention = Attention(config, matmul, rngs=rngs)
    self.mlp_norm = Norm(config, config.width, rngs=rngs)
    if mix is None:
      self.mlp = MLP(config, matmul, rngs=rngs)
    else:
      self.mlp = Mixture(config, mix, rngs=rngs)
    if config.post_norms:
      self.attention_post_norm = Norm(config, config.width, rngs=rngs)
      self.mlp_post_norm = Norm(config, config.width, rngs=rngs)

  def __call__(self, x, turned, attend, cache=None):
    """[B, T, D] -> [B, T, D] and the updated (keys, values), None without cache.

    `turned` is the rotation of queries and keys, or None. `cache` is (keys, values, index of the
    layer in them or (), first slot to write).
    """
    out, cache = self.attention(self.attention_norm(x), turned, attend, cache)
    x = x + (self.attention_post_norm(out) if hasattr(self, "attention_post_norm") else out)
    out = self.mlp(self.mlp_norm(x))
    return x + (self.mlp_post_norm(out) if hasattr(self, "mlp_post_norm") else out), cache


class Embedding(nnx.Module):
  """Token embedding, also the output projection of a tied model, and learned positions."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    shape = (config.vocab_size, config.width)
    self.embedding = nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape))
    if config.positions == "learned":
      shape = (config.max_length, config.width)
      self.positions = nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape))

  def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """[B, T] tokens and positions -> [B, T, D] in the computation dtype."""
    x = self.embedding[...][tokens].astype(self.config.dtype)
    if hasattr(self, "positions"):
      x += self.positions[...][positions].astype(x.dtype)
    if self.config.embed_scale:  # The factor is rounded too, as the models were trained.
      x *= jnp.asarray(math.sqrt(self.config.width), x.dtype)
    return x
