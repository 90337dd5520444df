"""Attention over whole sequences, computed by XLA, by a TPU kernel or by cuDNN.

Masks are given by segment ids and a window, not as dense [T, T] arrays, which the kernels avoid. A
token attends to itself and to the tokens before it in its segment, and of those to the last
`window`. Packed sequences are separate segments. Segment 0 is padding, on either side. Padding
tokens attend to each other, so that no row of a softmax is empty; their outputs are never read.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax import sharding
from rlhf_jax.models import precision
from rlhf_jax.models.transformer import ModelConfig

# (q [B, T, H, K], k and v [B, T, kv_heads, K], segment_ids [B, T] int or None, window [] int32 or
# None) -> [B, T, H, K]. Without segment ids all tokens of a row are one segment.
Attend = Callable[..., jax.Array]

NO_WINDOW = jnp.iinfo(jnp.int32).max
_LANES = 128  # Splash takes lengths and blocks that are multiples of it.
_MAX_LANES = 4  # Longest block: 512 tokens.
_QUERIES = 128  # Number of queries per row whose scores over a cache are held at a time.
_PARTS = 4  # Number of parts that one CPU cuts the queries of a row into.
_SMALLEST = 64  # Number of queries of the smallest part.


def make_attend(config: ModelConfig, mesh: Mesh | None = None) -> Attend:
  """Builds the attention of a model, with the implementation named by `config.attention`.

  Args:
    config: Architecture. "auto" uses splash on a TPU, cuDNN on a GPU that supports it, else XLA.
    mesh: Devices that the model runs on, possibly absent ones to compile for; None is the default
      device. Splash and cuDNN need the mesh if there are several devices.

  Raises:
    ValueError: If the implementation cannot be used.
  """
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  options: dict[str, Any] = {
    "scale": config.score_scale,
    "softcap": config.attention_softcap,
    "windows": tuple(sorted({size or NO_WINDOW for size in config.windows})) or (NO_WINDOW,),
  }
  implementation = choose(config, device)
  if implementation == "splash":
    interpret = device.platform != "tpu"
    attend = functools.partial(splash_attention, mesh=mesh, interpret=interpret, **options)
    if config.dtype != "float32" or config.precision == "default":
      return attend
    return precision.both_passes("highest", attend)  # Kernels for TPUs know no other one.
  if implementation == "cudnn":
    del options["softcap"]
    return functools.partial(cudnn_attention, mesh=mesh, **options)
  del options["windows"]
  return functools.partial(xla_attention, on_cpu=sharding.is_one_cpu(mesh), **options)


def choose(config: ModelConfig, device: Any) -> str:
  """Chooses "xla", "splash" or "cudnn" for a model on a device; ValueError as in `make_attend`."""
  if config.attention == "auto":
    if device.platform == "tpu":
      return "splash"
    return "xla" if _cudnn_obstacle(config, device) else "cudnn"
  obstacle = ""
  if config.attention == "cudnn":
    obstacle = _cudnn_obstacle(config, device)
  elif config.attention == "splash" and device.platform not in ("tpu", "cpu"):
    obstacle = f"it is made for TPUs, and the device is {device.device_kind}"
  if obstacle:
    raise ValueError(f"--model.attention={config.attention}: {obstacle}; use auto or xla")
  return config.attention


def _cudnn_obstacle(config: ModelConfig, device: Any) -> str:
  """Reason why cuDNN cannot compute the attention of a model; empty if it can."""
  if config.dtype == "float32":
    return "cuDNN has no float32 attention; set --model.dtype=bfloat16"
  if config.attention_softcap is not None:
    return "cuDNN does not cap attention scores, as this model does"
  major = str(getattr(device, "compute_capability", "")).split(".")[0]
  generation = int(major) if major.isdigit() else 0  # Other vendors have other schemes.
  if generation < 8:
    return f"it needs an NVIDIA GPU of the generation of A100 or later, not {device.device_kind}"
  widest = 128 if generation < 9 else 256
  if config.head_dim > widest or config.head_dim % 8:
    return (
      f"on {device.device_kind} cuDNN takes heads of multiples of 8 up to {widest} dimensions, and"
      f" the model's have {config.head_dim}"
    )
  return ""


def visible(
  length: int, segment_ids: jax.Array | None = None, window: jax.Array | int | None = None
) -> jax.Array:
  """Dense mask of the keys that each query attends to.

  Args:
    length: T.
    segment_ids: [B, T] int, or None.
    window: [] int, number of tokens that a token attends to, including itself; None for all before
      it.

  Returns:
    [B, T, T] bool, queries before keys; B is 1 without segment ids.
  """
  index = jnp.arange(length)
  distance = (index[:, None] - index[None, :])[None]
  mask = distance >= 0
  if window is not None:
    mask &= distance < window
  if segment_ids is not None:
    mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
  return mask


def dense_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  *,
  scale: float,
  softcap: float | None = None,
) -> jax.Array:
  """Softmax attention of grouped queries under any mask, with scores in float32.

  Args:
    q: [B, T, H, K].
    k: [B, S, kv_heads, K].
    v: [B, S, kv_heads, K].
    mask: [B, T, S] bool, True where a query attends to a key; B may be 1.
    scale: Factor of the scores.
    softcap: Bound c of the scores: `c * tanh(score / c)` (Bello et al., 2016,
      https://arxiv.org/abs/1611.09940, section 5), or None.

  Returns:
    [B, T, H, K], dtype of `v`.
  """
  if softcap is None:
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale)
  k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
  return cached_attention(q, k, v, mask, scale=scale, softcap=softcap)


def cached_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  *,
  scale: float,
  softcap: float | None = None,
) -> jax.Array:
  """`dense_attention` over keys and values in the layout of a cache, which are not copied.

  Args:
    q: [B, T, H, K].
    k: [B, kv_heads, S, K].
    v: [B, kv_heads, S, K].
    mask: [B, T, S] bool; B may be 1.
    scale: Factor of the scores.
    softcap: Bound of the scores, or None; see `dense_attention`.

  Returns:
    [B, T, H, K], dtype of `v`.
  """
  batch, length, heads, width = q.shape
  q = q.reshape(batch, length, k.shape[1], -1, width)
  scores = scale * jnp.einsum("btgrk,bgsk->bgrts", q, k, preferred_element_type=jnp.float32)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("bgrts,bgsk->btgrk", weights, v).reshape(batch, length, heads, width)


def attend_to_cache(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  queries: tuple[jax.Array, jax.Array],
  positions: jax.Array,
  window: jax.Array | None,
  *,
  scale: float,
  softcap: float | None = None,
) -> jax.Array:
  """Causal attention over a cache, with memory that is linear in T.

  The kernels are not made for few queries, many keys and empty slots.

  Args:
    q: [B, T, H, K].
    k: [B, kv_heads, S, K].
    v: [B, kv_heads, S, K].
    queries: Positions [B, T] of the queries, and slots [1, T] of their own tokens.
    positions: [B, S] int32, positions of the tokens in the slots; -1 where there is none.
    window: [] int32, or None.
    scale: Factor of the scores.
    softcap: Bound of the scores, or None.

  Returns:
    [B, T, H, K], dtype of `v`.
  """

  def attend(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    q, at, slot = part
    distance = at[:, :, None] - positions[:, None]
    mask = (positions[:, None] >= 0) & (distance >= 0)
    if window is not None:
      mask &= distance < window
    # A padding query sees its own slot, so that no row of the softmax is empty.
    own = jnp.arange(k.shape[2])[None, None] == slot[:, :, None]
    return cached_attention(q, k, v, mask | own, scale=scale, softcap=softcap)

  length = q.shape[1]
  if length <= _QUERIES:
    return attend((q, *queries))

  def cut(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x.reshape(x.shape[0], -1, _QUERIES, *x.shape[2:]), 0, 1)

  parts = jax.lax.map(attend, tuple(map(cut, _lengthen(_QUERIES, q, *queries))))
  return jnp.swapaxes(parts, 0, 1).reshape(len(q), -1, *q.shape[2:])[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention_on_cpu(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float
) -> jax.Array:
  """`dense_attention` of masks that hide later keys, faster on one CPU.

  XLA's CPU backend is fast at many small matrix products if each matrix is contiguous, but does not
  choose that layout by itself. Both passes therefore put heads before tokens. They take a part of
  the queries at a time, for which they leave out the keys after it. There is no forward-mode
  derivative.
  """
  return _attention_forward(q, k, v, mask, scale)[0]


def _attention_forward(q, k, v, mask, scale):
  q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
  outs, saved = [], []
  for part, seen in _parts(q.shape[2]):
    queries = _grouped(q[:, :, part], k)
    scores = scale * _products(queries, k[:, :, seen], 3, 3)
    scores = scores.reshape(*q.shape[:2], -1, scores.shape[3])
    scores = jnp.where(mask[:, None, part, seen], scores, jnp.finfo(jnp.float32).min)
    powers = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    # Rounded before they are summed, so that each softmax sums to 1.
    powers = powers.reshape(*queries.shape[:3], -1).astype(v.dtype)
    total = jnp.sum(powers, axis=-1, keepdims=True, dtype=jnp.float32)
    out = _products(powers, v[:, :, seen], 3, 2) / total
    outs.append(out.astype(v.dtype).reshape(*q.shape[:2], -1, q.shape[3]))
    saved.append((powers, total, out))
  return jnp.swapaxes(jnp.concatenate(outs, axis=2), 1, 2), (q, k, v, saved)


def _attention_backward(scale, saved, dout):
  q, k, v, parts = saved
  dout = _heads_first(dout)
  dqs = []
  dk = dv = jnp.zeros((*k.shape[:2], k.shape[3], k.shape[2]), jnp.float32)
  for (part, seen), (powers, total, out) in zip(_parts(q.shape[2]), parts, strict=True):
    queries, by_out = _grouped(q[:, :, part], k), _grouped(dout[:, :, part], k)
    # Of the softmax only sums over rows are divided by its total, which is cheaper.
    by_sum = (by_out / total).astype(v.dtype)
    # XLA transposes the first operand of a product over rows, so it is the smaller one.
    dv = dv.at[..., seen].add(_products(by_sum, powers, 2, 2))
    dpowers = _products(by_sum, v[:, :, seen], 3, 3)
    # Mean of `dpowers` under the softmax (Dao et al., 2022, https://arxiv.org/abs/2205.14135).
    mean = jnp.sum(by_sum * out, axis=-1, keepdims=True)
    dscores = (powers * (dpowers - mean) * scale).astype(q.dtype)
    dk = dk.at[..., seen].add(_products(queries, dscores, 2, 2))
    dq = _products(dscores, k[:, :, seen], 3, 2)
    dqs.append(dq.reshape(*q.shape[:2], -1, q.shape[3]))
  dq = jnp.swapaxes(jnp.concatenate(dqs, axis=2), 1, 2)
  dk, dv = (jnp.transpose(x, (0, 3, 1, 2)) for x in (dk, dv))
  return dq.astype(q.dtype), dk.astype(q.dtype), dv.astype(q.dtype), None


def _parts(length: int) -> list[tuple[slice, slice]]:
  """Cuts queries into a few parts; returns slices of each and of the keys up to its end."""
  size = max(_SMALLEST, -(-length // _PARTS))
  starts = range(0, length, size)
  return [(slice(at, at + size), slice(min(at + size, length))) for at in starts]


def _grouped(q: jax.Array, k: jax.Array) -> jax.Array:
  """[B, H, t, K] -> [B, kv_heads, H / kv_heads * t, K]: heads that share keys become one head."""
  return q.reshape(*k.shape[:2], -1, k.shape[3])


def _products(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
  """Batched matrix products over one axis of each, for every row and head, in float32."""
  axes = (((axis_a,), (axis_b,)), ((0, 1), (0, 1)))
  return jax.lax.dot_general(
    a, b, axes, precision=precision.exact(a), preferred_element_type=jnp.float32
  )


def _heads_first(x: jax.Array) -> jax.Array:
  """[B, T, H, K] -> [B, H, T, K], also in memory."""
  return jax.lax.optimization_barrier(jnp.swapaxes(x, 1, 2))


attention_on_cpu.defvjp(_attention_forward, _attention_backward)


def xla_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array | None,
  window: jax.Array | None,
  *,
  scale: float,
  softcap: float | None,
  on_cpu: bool = False,
) -> jax.Array:
  """`Attend` that holds all scores, [B, H, T, T]. It runs anywhere and is the reference.

  With `on_cpu` it is `attention_on_cpu`, unless there is a `softcap`.
  """
  mask = visible(q.shape[1], segment_ids, window)
  if on_cpu and softcap is None:
    return attention_on_cpu(q, k, v, mask, scale)
  return dense_attention(q, k, v, mask, scale=scale, softcap=softcap)


def cudnn_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array | None,
  window: jax.Array | None,
  *,
  scale: float,
  windows: tuple[int, ...],
  mesh: Mesh | None,
) -> jax.Array:
  """`Attend` by cuDNN, for bfloat16 or float16 only.

  If rows are single segments and all layers have the same window, no mask is passed. Otherwise
  cuDNN reads a [B, T, T] mask, which still avoids the [B, H, T, T] scores.

  Args:
    q: [B, T, H, K].
    k: [B, T, kv_heads, K].
    v: [B, T, kv_heads, K].
    segment_ids: [B, T] int, or None.
    window: [] int32, one of `windows`; None if there is only one.
    scale: Factor of the scores.
    windows: Window sizes of the layers.
    mesh: Devices to split rows and heads over. JAX would leave that to the compiler, and refuses
      queries that it splits by heads where it cannot split the keys.
  """
  attend = functools.partial(_cudnn_on_a_device, scale=scale, windows=windows)
  if mesh is not None and mesh.size > 1:
    rows, heads = sharding.heads_spec(mesh, *k.shape[::2])
    attend = _on_each_device(attend, mesh, jax.P(rows, None, heads), jax.P())
  return attend(q, k, v, segment_ids, window)


def _cudnn_on_a_device(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array | None,
  window: jax.Array | None,
  *,
  scale: float,
  windows: tuple[int, ...],
) -> jax.Array:
  """`cudnn_attention` over the rows and heads of one device."""
  attend = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
  if segment_ids is None and len(windows) == 1:
    size = None if windows[0] == NO_WINDOW else (windows[0] - 1, 0)
    return attend(q, k, v, is_causal=True, local_window_size=size)
  length = q.shape[1]
  # The backward pass only supports masks of even lengths.
  q, k, v, segment_ids = _lengthen(2, q, k, v, segment_ids)
  mask = visible(q.shape[1], segment_ids, window)
  return attend(q, k, v, mask=mask[:, None])[:, :length]


def splash_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array | None,
  window: jax.Array | None,
  *,
  scale: float,
  softcap: float | None,
  windows: tuple[int, ...],
  mesh: Mesh | None,
  interpret: bool,
) -> jax.Array:
  """`Attend` by JAX's "splash" kernels for TPUs; its memory is linear in T.

  Args:
    q: [B, T, H, K].
    k: [B, T, kv_heads, K].
    v: [B, T, kv_heads, K].
    segment_ids: [B, T] int, or None.
    window: [] int32, one of `windows`; None if there is only one.
    scale: Factor of the scores.
    softcap: Bound of the scores, or None.
    windows: Window sizes of the layers. Each has its own kernel, since the size is static.
    mesh: Devices to split rows and heads over, because the compiler cannot split a kernel.
    interpret: Run the kernels as plain JAX: slow, but the same on any device.
  """
  # Imported here, so that a change of JAX's experimental modules can only break splash.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  length = q.shape[1]
  q = (q * scale).astype(q.dtype)
  q, k, v, segment_ids = _lengthen(_LANES, q, k, v, segment_ids)
  lanes = q.shape[1] // _LANES
  block = _LANES * max(n for n in range(1, _MAX_LANES + 1) if lanes % n == 0)
  blocks = kernels.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )

  def attend(size: int, q, k, v, segment_ids):
    """Runs a kernel on one device; q, k and v are [B, H, T, K]."""
    square = q.shape[2:3] * 2
    mask = masks.CausalMask(square)
    if size < length:
      mask = masks.LocalMask(square, window_size=(size - 1, 0), offset=0)
    kernel = kernels.make_splash_mha(
      masks.MultiHeadMask([mask] * q.shape[1]),
      head_shards=1,
      q_seq_shards=1,
      block_sizes=blocks,
      attn_logits_soft_cap=softcap,
      interpret=interpret,
    )
    ids = None if segment_ids is None else kernels.SegmentIds(segment_ids, segment_ids)
    return jax.vmap(kernel)(q, k, v, ids)

  arguments = (*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), segment_ids)
  branches: list[Callable[..., Any]] = [functools.partial(attend, size) for size in windows]
  if mesh is not None:
    spec = sharding.heads_spec(mesh, *k.shape[::2])
    branches = [_on_each_device(branch, mesh, spec) for branch in branches]
  which = jnp.int32(0) if window is None else jnp.sum(window > jnp.array(windows[:-1], jnp.int32))
  out = jax.lax.switch(which, branches, *arguments)
  return jnp.swapaxes(out, 1, 2)[:, :length]


def _on_each_device(
  attend: Callable[..., jax.Array], mesh: Mesh, spec: jax.P, *others: jax.P
) -> Callable[..., jax.Array]:
  """Builds `attend` that runs a kernel on each device, over its own rows and heads.

  Args:
    attend: `(q, k, v, segment_ids, ...) -> out`.
    mesh: Devices.
    spec: Spec of q, k, v and out, which begins with the axes of the rows.
    *others: Specs of the further arguments.
  """
  return jax.shard_map(
    attend,
    mesh=mesh,
    in_specs=(spec, spec, spec, jax.P(spec[0]), *others),
    out_specs=spec,
    check_vma=False,  # Kernels do not declare over which axes their results vary.
  )


def _lengthen(multiple: int, *arrays: jax.Array | None) -> list[Any]:
  """Pads the end of axis 1 with zeros: segment 0, after every token that could attend to it."""

  def pad(x: jax.Array | None) -> jax.Array | None:
    if x is None or not x.shape[1] % multiple:
      return x
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % multiple)
    return jnp.pad(x, widths)

  return [pad(x) for x in arrays]
