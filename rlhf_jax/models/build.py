"""Turns a config into pure functions; NNX is not used beyond this module.

`build(config)` returns `Model(init, apply, decode, init_cache)`. Params are a plain nested dict:

    embed/embedding [V, D]
    layers/attention/{q,k,v,o}/kernel, layers/mlp/{gate,up,down}/kernel  [L, in, out]
    layers/{attention_norm,mlp_norm}/scale [L, D], final_norm/scale [D]
    lm_head/kernel [D, V]  (untied models)   or   score/{kernel [D, 1], bias [1]}

Depending on the config there are also `bias` beside a kernel or scale, embed/positions
[max_length, D], layers/{attention_post_norm,mlp_post_norm}/scale [L, D] and
layers/attention/{q_norm,k_norm}/scale [L, K]. Beside a kernel there may be an adapter (`lora.py`).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from rlhf_jax import sharding
from rlhf_jax.losses import packing
from rlhf_jax.losses.logprobs import LazyLogits
from rlhf_jax.models import attention, experts, lora, precision, quantized
from rlhf_jax.models.heads import LanguageHead, ScalarHead
from rlhf_jax.models.transformer import (
  REMAT,
  Block,
  Cache,
  Embedding,
  ModelConfig,
  Norm,
  Rotation,
  matmul_on_cpu,
  rope_frequencies,
  rotation,
)
from rlhf_jax.types import Decode, Params

# So many logits, of all rows, are held at a time on a CPU: a product that makes more is no faster.
_CPU_LOGITS = 2**25


class Model(NamedTuple):
  """A decoder as pure functions.

  Attributes:
    config: Architecture.
    init: `key -> params`.
    apply: `(params, tokens [B, T], *, segment_ids=None, positions=None, places=None, last=None,
      scored=0)` -> logits [B, T, V] float32 (lazy ones with `logit_chunk`), or scores [B, T]
      float32 for a scalar head, or the pair for both heads. `segment_ids` [B, T] int is 0 on
      padding (left or right) and numbers packed sequences; attention stays inside a segment.
      `positions` [B, T] are by default counted per segment; windows count tokens and ignore them.
      `places` [B, K, S] are those of a `SharedBatch`, whose results [B * K, S, ...] are those of a
      row per response. `last` computes only the final `last` positions; `scored` is that of
      `LazyLogits`. ValueError for more tokens than there are learned positions.
    decode: `(params, tokens [B, T], cache, *, mask)` -> logits [B, V] of the last position and
      the cache after writing `tokens`; `mask` [B, T] is False on padding. `decode.prepare(params)`
      casts matrices and cuts layers apart, which every step would do again.
    init_cache: `(batch, slots, dtype)` -> empty cache. ValueError as for `apply`.
  """

  config: ModelConfig
  init: Callable[[jax.Array], Params]
  apply: Callable[..., Any]
  decode: Decode
  init_cache: Callable[..., Cache]


def segment_positions(segment_ids: jax.Array) -> jax.Array:
  """Position of every token in its segment, counted from 0.

  Args:
    segment_ids: [B, T] int, 0 on padding; equal ids are contiguous.

  Returns:
    [B, T] int32; positions of padding are never read.
  """
  index = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
  previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  start = jnp.where(segment_ids != previous, index, 0)
  return index - jax.lax.cummax(start, axis=1)


def _layer_arrays(config: ModelConfig) -> tuple[jax.Array | None, jax.Array | None]:
  """Arrays that differ between layers, besides params, to be scanned with the params.

  Returns:
    Windows [L] int32 and rows [L] int32 of `_frequencies`; None if equal in all layers.
  """
  if not config.windows:
    return None, None
  windows = jnp.array([size or attention.NO_WINDOW for size in config.windows], jnp.int32)
  if config.rope_local_theta is None:
    return windows, None
  return windows, jnp.array([size is not None for size in config.windows], jnp.int32)


def _frequencies(config: ModelConfig) -> jax.Array:
  """Rotary frequencies [R / 2], or [2, R / 2] of layers without and with a window."""
  if config.rope_local_theta is None:
    return rope_frequencies(config)
  return jnp.stack([rope_frequencies(config, local=local) for local in (False, True)])


def _pure(module: Callable[..., nnx.Module], *args):
  """Builds `init(key) -> params` and `call(params, *inputs)` of one module."""
  abstract = nnx.eval_shape(lambda: module(*args, rngs=nnx.Rngs(0)))
  graph, _ = nnx.split(abstract, nnx.Param)

  def init(key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.state(module(*args, rngs=nnx.Rngs(key)), nnx.Param))

  def call(params: Params, *inputs):
    built = nnx.merge(graph, quantized.decode(lora.base(params)))
    for (*path, name), value in lora.leaves(params):
      setattr(functools.reduce(getattr, path, built), name, nnx.Param(value))
    return built(*inputs)

  return init, call


def build(
  config: ModelConfig,
  head: Literal["language", "scalar", "both"] = "language",
  *,
  known_tokens: int | None = None,
  logit_chunk: int | None = None,
  mesh: Mesh | None = None,
) -> Model:
  """Builds the pure functions of a decoder with a language-model head, a scalar head, or both.

  Args:
    config: Architecture.
    head: Head over the final hidden states.
    known_tokens: Number of ids in the tokenizer, if the embedding has more rows. The logits of the
      other ids are -inf, so that neither sampling nor training gives them probability.
    logit_chunk: Approximate number of logits per row (tokens times V) that a loss holds at a time:
      `apply` returns `LazyLogits`. None returns the array.
    mesh: Devices that the model runs on; see `attention.make_attend`. Activations and caches are
      constrained to be split by rows. Without this constraint XLA shards activations like the fsdp
      weights, and every device computes every row.

  Raises:
    ValueError: If `config.attention` cannot be used on these devices.
  """
  attend = attention.make_attend(config, mesh)
  init_embed, embed = _pure(Embedding, config)
  one_cpu = sharding.is_one_cpu(mesh)
  # A partitioner might gather what it splits to flatten it.
  matmul = matmul_on_cpu if one_cpu else jnp.matmul
  mix = experts.make_mix(config, mesh) if config.experts else None
  init_block, block = _pure(Block, config, matmul, mix)
  init_norm, norm = _pure(Norm, config, config.width)
  init_lm_head, lm_head = _pure(LanguageHead, config, matmul)
  init_score, score = _pure(ScalarHead, config)
  compute = jnp.dtype(config.dtype)
  passes = precision.of_device(config.precision, mesh)
  score = precision.within(passes, score)  # In float32 whatever the dtype of the model.
  passes = passes if compute == jnp.float32 else None
  block = precision.within(passes, block)
  attend_cache = functools.partial(
    attention.attend_to_cache, scale=config.score_scale, softcap=config.attention_softcap
  )
  # A loop over so few layers costs more time than it saves in compilation.
  unroll = config.layers if config.layers <= 4 else 1

  def init(key: jax.Array) -> Params:
    embed_key, layers_key, head_key = jax.random.split(key, 3)
    params = {
      "embed": init_embed(embed_key),
      "layers": jax.vmap(init_block)(jax.random.split(layers_key, config.layers)),
      "final_norm": init_norm(head_key),
    }
    if head != "language":
      params["score"] = init_score(head_key)
    if head != "scalar" and not config.tied:
      params["lm_head"] = init_lm_head(head_key)
    return params

  def by_rows(x: jax.Array) -> jax.Array:
    return sharding.constrain(x, mesh, sharding.ROWS)

  def to_logits(params: Params, hidden: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T, V] by the embedding of a tied model, else by the head."""
    if config.tied:
      table = params["embedding"].astype(hidden.dtype)
      if one_cpu and compute == jnp.float32:
        logits = matmul(hidden, table.T)
      else:
        logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
    else:
      logits = lm_head(params, hidden)
    if config.logit_softcap is not None:
      logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    if known_tokens is None or known_tokens >= config.vocab_size:
      return logits
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    return jnp.where(ids < known_tokens, logits, -jnp.inf)

  to_logits = precision.within(passes, to_logits)
  parts = 1 if mesh is None else sharding.row_parts(mesh)

  def to_logits_by_part(copies: Params, hidden: jax.Array) -> jax.Array:
    """`to_logits` by a copy of the params for each part of the rows; see `rows_copies`."""
    by_part = hidden.reshape(parts, -1, *hidden.shape[1:])
    logits = jax.vmap(to_logits)(copies, sharding.constrain(by_part, mesh, sharding.ROWS))
    return logits.reshape(*hidden.shape[:2], -1)

  def read_out(params: Params, hidden: jax.Array, chunk: int | None = None, scored: int = 0) -> Any:
    hidden = norm(params["final_norm"], hidden)
    scores = None if head == "language" else score(params["score"], hidden)
    if head == "scalar":
      return scores
    output = {"embedding": params["embed"]["embedding"]} if config.tied else params["lm_head"]
    logits: jax.Array | LazyLogits
    if chunk is None:
      logits = to_logits(output, hidden)
    else:
      to_some = to_logits
      # The table of a tied model is split over V: a device computes its part of the logits of all
      # rows, and weights stay where they are.
      if not config.tied and mesh and mesh.shape["fsdp"] > 1 and len(hidden) % parts == 0:
        copies = sharding.rows_copies({"lm_head": output}, mesh, compute)
        to_some, output = to_logits_by_part, copies["lm_head"]
      kept = max(1, chunk // config.vocab_size)
      size = max(1, _CPU_LOGITS // config.vocab_size // len(hidden)) if one_cpu else kept
      logits = LazyLogits(hidden, output, to_some, min(size, kept), kept, scored, one_cpu)
    return logits if head == "language" else (logits, scores)

  def require_positions(length: int) -> None:
    if config.positions == "learned" and length > config.max_length:
      raise ValueError(
        f"{length} tokens, but the model has learned {config.max_length} positions; make prompts"
        " and responses, or packed rows, shorter"
      )

  def turns(positions: jax.Array) -> Rotation | None:
    if config.positions != "rope":
      return None
    several = positions.shape[1] > 1  # For a single token a loop costs more than it saves.
    return rotation(positions, _frequencies(config), on_cpu=one_cpu and several)

  def run_layer(x, turned, xs, attend_within, cache=None):
    """Runs one block; `attend_within(window)` attends within the window of the layer."""
    layer_params, window, kind = xs
    if kind is not None:
      turned = jax.tree.map(lambda kinds: kinds[kind], turned)
    return block(layer_params, x, turned, attend_within(window), cache)

  def apply(
    params: Params,
    tokens: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    places: jax.Array | None = None,
    last: int | None = None,
    scored: int = 0,
  ) -> Any:
    require_positions((tokens if places is None else places).shape[-1])
    if places is not None:
      first = packing.first_places(places, tokens.shape[1])
      positions = first % places.shape[2]
    if positions is None:
      segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
      positions = segment_positions(segments)
    turned = turns(positions)

    def attend_within(window):
      within = lambda q, k, v: attend(q, k, v, segment_ids, window)  # noqa: E731
      # As in rows of single responses; everything else is computed once per token.
      return within if places is None else packing.apart(within, places, first)

    def layer(x: jax.Array, xs):
      return by_rows(run_layer(x, turned, xs, attend_within)[0]), None

    layer = REMAT[config.remat](layer)
    x = by_rows(embed(params["embed"], tokens, positions))
    x, _ = jax.lax.scan(layer, x, (params["layers"], *_layer_arrays(config)), unroll=unroll)
    if places is not None:
      x = by_rows(packing.separate(x, places))
    return read_out(params, x if last is None else x[:, -last:], logit_chunk, scored)

  def init_cache(batch: int, slots: int, dtype=compute) -> Cache:
    require_positions(slots)
    shape = (batch, config.kv_heads, slots, config.head_dim)

    def zeros() -> tuple[jax.Array, ...]:
      if unroll > 1:
        spec, dims = sharding.CACHE, shape
      else:
        spec, dims = sharding.P(None, *sharding.CACHE), (config.layers, *shape)
      return tuple(sharding.constrain(jnp.zeros(dims, dtype), mesh, spec) for _ in range(unroll))

    nothing = by_rows(jnp.full((batch, slots), -1, jnp.int32))
    return Cache(zeros(), zeros(), nothing, jnp.int32(0))

  def cut(layers: Params | tuple[Params, ...]) -> tuple[Params, ...]:
    """Cuts the stacked params of the layers apart, if they are not yet."""
    if isinstance(layers, tuple):
      return layers
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(config.layers))

  def prepare(params: Params) -> Params:
    params = round_matrices(params, compute)
    return params | {"layers": cut(params["layers"])} if unroll > 1 else params

  def decode(
    params: Params, tokens: jax.Array, cache: Cache, *, mask: jax.Array
  ) -> tuple[jax.Array, Cache]:
    length = tokens.shape[1]
    seen = jnp.max(cache.positions, axis=1, keepdims=True) + 1
    positions = seen + jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    stored = jax.lax.dynamic_update_slice_in_dim(
      cache.positions, jnp.where(mask, positions, -1), cache.index, axis=1
    )
    queries = positions, cache.index + jnp.arange(length)[None]
    turned = turns(positions)

    def attend_within(window):
      return lambda q, k, v: attend_cache(q, k, v, queries, stored, window)

    def layer(x: jax.Array, xs, *state):
      x, written = run_layer(x, turned, xs, attend_within, state)
      return by_rows(x), written

    x = by_rows(embed(params["embed"], tokens, positions))
    arrays = _layer_arrays(config)
    if len(cache.k) > 1:
      written = []
      for i, of_layer in enumerate(zip(cut(params["layers"]), cache.k, cache.v, strict=True)):
        layer_params, *kv = of_layer
        layer_arrays = jax.tree.map(lambda x, i=i: x[i], arrays)
        x, kv = layer(x, (layer_params, *layer_arrays), *kv, (), cache.index)
        written.append(kv)
    else:

      def looped(carry, xs):
        number, xs = xs
        x, kv = layer(carry[0], xs, *carry[1:], (number,), cache.index)
        return (x, *kv), None

      xs = jnp.arange(config.layers), (params["layers"], *arrays)
      (x, *kv), _ = jax.lax.scan(looped, (x, *cache.k, *cache.v), xs)
      written = [kv]
    k, v = zip(*written, strict=True)
    logits = jax.tree.map(lambda x: x[:, 0], read_out(params, x[:, -1:]))
    return logits, Cache(k, v, stored, cache.index + length)

  return Model(config, init, apply, Decode(decode, prepare), init_cache)


def round_matrices(params: Params, dtype: Any) -> Params:
  """Casts the matrices and embeddings, which a model rounds to its computation dtype anyway.

  Norms, biases, adapters and scalar heads, which are computed in float32, keep their dtype. With a
  key of `quantized.FORMATS` the matrices of layers are encoded, and all others are bfloat16.
  """
  if dtype in quantized.FORMATS:
    return quantized.encode(round_matrices(params, jnp.bfloat16), dtype)

  def cast(path, leaf: jax.Array) -> jax.Array:
    *_, group, name = (key.key for key in path)
    is_rounded = name in ("kernel", "embedding", "positions") and group != "score"
    return leaf.astype(dtype) if is_rounded and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

  return jax.tree_util.tree_map_with_path(cast, params)


def count_params(params: Params) -> int:
  """Number of scalars in a tree of arrays or shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def actor_critic(policy: Model, critic: Model) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Builds one apply function of `{"policy": ..., "value": ...}` -> (logits, values)."""

  def apply(params: Params, tokens: jax.Array, **kwargs) -> tuple[jax.Array, jax.Array]:
    logits = policy.apply(params["policy"], tokens, **kwargs)
    return logits, critic.apply(params["value"], tokens, **kwargs)

  return apply


def shared_actor_critic(model: Model) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """`actor_critic` of `{"policy": ..., "value": {"score": ...}}`, for a model with both heads."""

  def apply(params: Params, tokens: jax.Array, **kwargs) -> tuple[jax.Array, jax.Array]:
    return model.apply(params["policy"] | params["value"], tokens, **kwargs)

  return apply
