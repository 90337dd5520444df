"""The decoder against a second implementation in numpy, and its layouts against each other."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlhf_jax import hlo, sharding
from rlhf_jax.losses.logprobs import over_tokens
from rlhf_jax.models import (
  ModelConfig,
  build,
  count_params,
  round_matrices,
  shift_scores,
  zero_scores,
)
from rlhf_jax.models.attention import dense_attention
from rlhf_jax.models.build import actor_critic, segment_positions, shared_actor_critic
from rlhf_jax.models.transformer import REMAT, Block, RopeScaling, rope_frequencies, rotation
from tests.testing import FAMILY_MODELS

V = 24
SHAPE = 11, 16  # Of most batches: another one compiles the model again.
TINY = ModelConfig(
  vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_width=20, init_std=0.3
)
VARIANTS = {
  "tied": TINY,
  "untied": dataclasses.replace(TINY, tied=False),
  "biases": dataclasses.replace(TINY, qkv_bias=True, out_bias=True, mlp_bias=True, kv_heads=1),
  "llama3": dataclasses.replace(
    TINY, rope_theta=100.0, rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, 16)
  ),
  "linear": dataclasses.replace(TINY, rope_scaling=RopeScaling("linear", 2.5), kv_heads=4),
  **FAMILY_MODELS,
  # Few layers are unrolled; so many run in a loop.
  "gemma3_loop": dataclasses.replace(
    FAMILY_MODELS["gemma3"], layers=6, windows=(3, 3, None, 3, 3, None)
  ),
}


@functools.cache
def compiled(config, head="language"):
  model = build(config, head)
  return model._replace(
    init=jax.jit(model.init),
    apply=jax.jit(model.apply, static_argnames="last"),
    decode=jax.jit(model.decode),
  )


@functools.cache
def make(config, head="language", seed=0):
  """A model and params in which no leaf has its special initial value (biases 0, scales 1).

  To compile `init` for each config would take as long as to compile `apply`.
  """
  model = compiled(config, head)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    std = 0.1 if name in ("scale", "bias") else config.init_std
    mean = name == "scale" and config.norm != "rms_plus_one"
    return jnp.float32(mean + std * rng.normal(size=leaf.shape))

  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return model, jax.tree.map_with_path(draw, shapes)


def oracle(params, config: ModelConfig, tokens) -> np.ndarray:
  """Logits or scores of one row without padding, in float64, one query and one head at a time."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  half = config.rotary_width // 2

  def linear(layer, x):
    return x @ layer["kernel"] + layer.get("bias", 0.0)

  def norm(layer, x):
    x = x - x.mean(-1, keepdims=True) if config.norm == "layer" else x
    scale = layer["scale"] + (config.norm == "rms_plus_one")
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale
    return x + layer.get("bias", 0.0)

  def act(x):
    if config.activation == "silu":
      return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  def cap(x, bound):
    return x if bound is None else bound * np.tanh(x / bound)

  def turn(x, window):  # [T, K]
    if config.positions == "learned":
      return x
    # transformer_test checks the frequencies.
    frequencies = np.asarray(rope_frequencies(config, local=window is not None), np.float64)
    pairs = x[:, :half] + 1j * x[:, half : 2 * half]
    pairs = pairs * np.exp(1j * np.arange(len(x))[:, None] * frequencies)
    return np.concatenate([pairs.real, pairs.imag, x[:, 2 * half :]], -1)

  def mlp(layer, x):
    up = linear(layer["up"], x)
    up = act(linear(layer["gate"], x)) * up if config.gated_mlp else act(up)
    return linear(layer["down"], up)

  def mixture(layer, x):  # One token at a time, through its most likely experts.
    out = np.zeros_like(x)
    for t, logits in enumerate(linear(layer["router"], x)):
      probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
      chosen = np.argsort(-probs)[: config.experts_per_token]
      for e in chosen:
        weight = probs[e] / (probs[chosen].sum() if config.normalized_router else 1.0)
        out[t] += weight * mlp(jax.tree.map(lambda leaf, e=e: leaf[e], layer["experts"]), x[t])
    return out

  x = p["embed"]["embedding"][np.asarray(tokens)]
  if config.positions == "learned":
    x = x + p["embed"]["positions"][: len(x)]
  if config.embed_scale:
    x = x * np.sqrt(config.width)
  for i, window in enumerate(config.windows or (None,) * config.layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
    attention = layer["attention"]
    y = norm(layer["attention_norm"], x)
    q, k, v = (linear(attention[name], y) for name in "qkv")
    heads = []
    for h in range(config.heads):
      group = h // (config.heads // config.kv_heads)
      cut = [slice(j * config.head_dim, (j + 1) * config.head_dim) for j in (h, group)]
      qh, kh, vh = q[:, cut[0]], k[:, cut[1]], v[:, cut[1]]
      if config.qk_norm:
        qh, kh = norm(attention["q_norm"], qh), norm(attention["k_norm"], kh)
      qh, kh = turn(qh, window), turn(kh, window)
      out = []
      for t in range(len(x)):
        seen = slice(max(0, t + 1 - (window or len(x))), t + 1)
        scores = kh[seen] @ qh[t] / np.sqrt(config.query_width or config.head_dim)
        weight = np.exp(cap(scores, config.attention_softcap))
        out.append(weight @ vh[seen] / weight.sum())
      heads.append(np.stack(out))
    y = linear(attention["o"], np.concatenate(heads, -1))
    x = x + (norm(layer["attention_post_norm"], y) if config.post_norms else y)
    y = norm(layer["mlp_norm"], x)
    y = mixture(layer["mlp"], y) if config.experts else mlp(layer["mlp"], y)
    x = x + (norm(layer["mlp_post_norm"], y) if config.post_norms else y)
  x = norm(p["final_norm"], x)
  if "score" in p:
    return (x @ p["score"]["kernel"])[:, 0] + p["score"]["bias"]
  logits = x @ (p["embed"]["embedding"].T if config.tied else p["lm_head"]["kernel"])
  return cap(logits, config.logit_softcap)


def random_tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, V, shape)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layout_of_a_row_equals_the_oracle(name):
  config = VARIANTS[name]
  model, params = make(config)
  # Of seed 1, float32 rounding alone moves a logit of gemma3_loop by 1e-5, of others by 3e-6.
  row, other = random_tokens(9), random_tokens(7, seed=3)
  expected = oracle(params, config, row)
  # One batch: left padding 0 to 7, right padding, behind and before another packed sequence.
  tokens = random_tokens(*SHAPE, seed=2)  # What is not set below is padding with any ids.
  segments = np.zeros(SHAPE, np.int32)
  starts = [*range(8), 0, 7, 0]
  for i, start in enumerate(starts):
    tokens[i, start : start + 9] = row
    segments[i, start : start + 9] = 1
  tokens[9, :7], segments[9, :7], segments[9, 7:] = other, 1, 2
  tokens[10, 9:], segments[10, 9:] = other, 2
  logits = np.asarray(model.apply(params, tokens, segment_ids=segments))
  for i, start in enumerate(starts):
    np.testing.assert_allclose(logits[i, start : start + 9], expected, atol=1e-5)
  both = oracle(params, config, other)
  np.testing.assert_allclose(logits[9, :7], both, atol=1e-5)
  np.testing.assert_allclose(logits[10, 9:], both, atol=1e-5)
  # Without segment ids nothing is padding.
  np.testing.assert_allclose(model.apply(params, row[None])[0], expected, atol=1e-5)


def test_scalar_head_equals_the_oracle():
  model, params = make(dataclasses.replace(TINY, tied=False), "scalar")
  assert "lm_head" not in params
  row = random_tokens(10)
  scores = model.apply(params, row[None])
  assert scores.shape == (1, 10) and scores.dtype == jnp.float32
  expected = oracle(params, TINY, row)
  np.testing.assert_allclose(scores[0], expected, atol=1e-5)
  shifted = shift_scores(params, jnp.float32(-2.5))
  np.testing.assert_allclose(model.apply(shifted, row[None])[0], expected - 2.5, atol=1e-5)
  zeroed = zero_scores(params)
  np.testing.assert_array_equal(model.apply(zeroed, row[None]), np.zeros((1, 10)))
  for changed in (shifted, zeroed):  # The trunk is the same, and so is the argument.
    rest = [{k: v for k, v in tree.items() if k != "score"} for tree in (changed, params)]
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, *rest))
  np.testing.assert_allclose(model.apply(params, row[None])[0], expected, atol=1e-5)


def test_segment_positions():
  segments = jnp.array([[0, 0, 1, 1, 1, 2, 2, 0], [3, 3, 3, 1, 2, 2, 2, 2]])
  positions = segment_positions(segments)
  np.testing.assert_array_equal(positions[0, 2:7], [0, 1, 2, 0, 1])
  np.testing.assert_array_equal(positions[1], [0, 1, 2, 0, 0, 1, 2, 3])
  assert positions.dtype == jnp.int32


def test_explicit_positions_are_used_and_only_distances_matter():
  model, params = make(TINY)
  tokens = random_tokens(*SHAPE)
  positions = np.broadcast_to(np.arange(SHAPE[1]), SHAPE)
  plain = model.apply(params, tokens)
  np.testing.assert_allclose(model.apply(params, tokens, positions=positions), plain, atol=1e-6)
  np.testing.assert_allclose(
    model.apply(params, tokens, positions=positions + 50), plain, atol=2e-4
  )
  stretched = model.apply(params, tokens, positions=3 * positions)
  assert np.abs(stretched - plain).max() > 1e-2
  other = compiled(dataclasses.replace(TINY, rope_theta=10.0))  # The base is not ignored.
  assert np.abs(other.apply(params, tokens) - plain).max() > 1e-2


def test_ids_of_padding_change_nothing():
  model, params = make(TINY)
  tokens = random_tokens(*SHAPE)
  segments = np.zeros(SHAPE, np.int32)
  segments[0, 4:], segments[1, :6], segments[2, 2:7], segments[2, 7:9] = 1, 1, 1, 2
  before = model.apply(params, tokens, segment_ids=segments)
  for seed in range(3):
    changed = np.where(segments > 0, tokens, random_tokens(*SHAPE, seed=seed))
    after = model.apply(params, changed, segment_ids=segments)
    np.testing.assert_array_equal(after[segments > 0], before[segments > 0])


def test_causality():
  model, params = make(TINY)
  tokens = random_tokens(*SHAPE)
  before = np.asarray(model.apply(params, tokens))
  for t in range(SHAPE[1]):
    changed = tokens.copy()
    changed[0, t] = (changed[0, t] + 1) % V
    after = np.asarray(model.apply(params, changed))
    np.testing.assert_array_equal(after[0, :t], before[0, :t])
    assert (np.abs(after[0, t:] - before[0, t:]).max(-1) > 1e-4).all()


def test_params_are_a_plain_dict_with_the_documented_paths():
  c = dataclasses.replace(TINY, tied=False)
  expected = {
    "embed/embedding": (V, c.width),
    "layers/attention/q/kernel": (2, c.width, 24),
    "layers/attention/k/kernel": (2, c.width, 12),
    "layers/attention/v/kernel": (2, c.width, 12),
    "layers/attention/o/kernel": (2, 24, c.width),
    "layers/attention_norm/scale": (2, c.width),
    "layers/mlp_norm/scale": (2, c.width),
    "layers/mlp/gate/kernel": (2, c.width, 20),
    "layers/mlp/up/kernel": (2, c.width, 20),
    "layers/mlp/down/kernel": (2, 20, c.width),
    "final_norm/scale": (c.width,),
    "lm_head/kernel": (c.width, V),
  }
  params = compiled(c).init(jax.random.key(0))

  def walk(tree, prefix=""):
    assert type(tree) is dict
    for name, value in tree.items():
      if isinstance(value, dict):
        yield from walk(value, f"{prefix}{name}/")
      else:
        assert isinstance(value, jax.Array) and value.dtype == jnp.float32
        yield prefix + name, value.shape

  assert dict(walk(params)) == expected
  size = sum(math.prod(shape) for shape in expected.values())
  assert count_params(params) == size
  assert count_params(jax.eval_shape(build(c).init, jax.random.key(0))) == size

  def shapes(config, head="language"):
    return jax.eval_shape(build(config, head).init, jax.random.key(0))

  assert "lm_head" not in shapes(TINY)
  scalar = shapes(c, "scalar")
  assert "lm_head" not in scalar
  assert scalar["score"]["kernel"].shape == (c.width, 1) and scalar["score"]["bias"].shape == (1,)
  biased = shapes(VARIANTS["biases"])["layers"]
  assert biased["attention"]["o"]["bias"].shape == (2, c.width)
  assert biased["mlp"]["up"]["bias"].shape == (2, 20)
  gemma, gpt = shapes(FAMILY_MODELS["gemma3"])["layers"], shapes(FAMILY_MODELS["gpt2"])
  assert gemma["attention"]["k_norm"]["scale"].shape == (3, 6)
  assert gemma["attention_post_norm"]["scale"].shape == (3, 16)
  assert gemma["mlp_post_norm"]["scale"].shape == (3, 16)
  assert gpt["embed"]["positions"].shape == (40, 16)
  assert gpt["final_norm"]["bias"].shape == (16,)
  assert "gate" not in gpt["layers"]["mlp"]
  assert "bias" not in shapes(FAMILY_MODELS["qwen2"])["layers"]["attention"]["o"]


def test_initial_weights():
  config = dataclasses.replace(TINY, width=64, head_dim=16, mlp_width=96, init_std=0.02, layers=2)
  params = compiled(config).init(jax.random.key(3))
  kernels = params["layers"]["attention"] | params["layers"]["mlp"]
  for name, layer in kernels.items():
    # Branches that are added to the residual stream start smaller.
    std = 0.01 if name in ("o", "down") else 0.02
    np.testing.assert_allclose(np.std(layer["kernel"], axis=(1, 2)), std, rtol=0.1)
    assert not np.array_equal(layer["kernel"][0], layer["kernel"][1])
  score = compiled(config, "scalar").init(jax.random.key(3))["score"]
  np.testing.assert_allclose(np.std(score["kernel"]), 65**-0.5, rtol=0.3)
  np.testing.assert_array_equal(score["bias"], 0.0)


def loss(model, params, tokens, segments):
  logits = model.apply(params, tokens, segment_ids=segments)
  scored = jnp.where(segments[..., None] > 0, jax.nn.log_softmax(logits), 0.0)
  return jnp.mean(jnp.square(scored))


def test_remat_changes_no_gradient_and_every_weight_has_one():
  tokens, segments = random_tokens(2, 7), np.ones((2, 7), np.int32)
  config = dataclasses.replace(VARIANTS["biases"], tied=False)
  params = compiled(config).init(jax.random.key(0))  # As initialised: no branch may start at zero.
  grads = []
  for remat in REMAT:
    model = compiled(dataclasses.replace(config, remat=remat))
    grads.append(jax.jit(jax.grad(functools.partial(loss, model)))(params, tokens, segments))
  # The two programs are fused differently: round-off of gradients of size 1.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  for others in grads[1:]:
    jax.tree.map(close, grads[0], others)
  key_bias = grads[0]["layers"]["attention"]["k"].pop("bias")
  assert jax.tree.all(jax.tree.map(lambda g: float(jnp.abs(g).max()) > 1e-7, grads[0]))
  # Not exactly 0 because of the rotation, but small: a softmax ignores a common shift.
  assert np.isfinite(key_bias).all()


def test_the_more_is_computed_again_the_less_is_kept():
  config = dataclasses.replace(TINY, layers=12, width=32, mlp_width=128)
  tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)
  found = []
  for remat in ("none", "dots", "full"):
    model = build(dataclasses.replace(config, remat=remat))
    params = jax.eval_shape(model.init, jax.random.key(0))
    step = jax.jit(jax.grad(functools.partial(loss, model))).lower(params, tokens, tokens)
    found.append(step.compile().memory_analysis().temp_size_in_bytes)
  none, dots, full = found
  assert none > 1.2 * dots > 1.2**2 * full, found


def test_scan_equals_block_by_block():
  config = VARIANTS["biases"]
  model, params = make(config)
  tokens = jnp.asarray(random_tokens(*SHAPE))
  graph, _ = nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))), nnx.Param)
  mask = jnp.tri(SHAPE[1], dtype=bool)[None]
  attend = functools.partial(dense_attention, mask=mask, scale=config.head_dim**-0.5)
  positions = jnp.broadcast_to(jnp.arange(SHAPE[1]), SHAPE)
  turned = rotation(positions, rope_frequencies(config))

  @jax.jit
  def run_block(layer, x):
    return nnx.merge(graph, layer)(x, turned, attend)[0]

  x = params["embed"]["embedding"][tokens]
  for i in range(config.layers):
    x = run_block(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]), x)
  x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + config.norm_eps)
  logits = x * params["final_norm"]["scale"].reshape(1, 1, -1) @ params["embed"]["embedding"].T
  np.testing.assert_allclose(model.apply(params, tokens), logits, atol=1e-5)


@pytest.mark.parametrize("name", ["tied", "untied", "gemma2"])
def test_lazy_logits_are_the_logits(name):
  _, params = make(VARIANTS[name])
  tokens = random_tokens(2, 9)
  size = VARIANTS[name].vocab_size
  for known, last in ((None, None), (size - 3, 4)):
    models = [
      build(VARIANTS[name], known_tokens=known, logit_chunk=chunk)
      for chunk in (None, 1, 2 * size, 100 * size)
    ]

    @jax.jit
    def read(params, tokens, models=models, last=last):
      return [over_tokens(lambda y: y, m.apply(params, tokens, last=last)) for m in models]

    want, *chunked = read(params, tokens)
    for got in chunked:
      np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head", ["language", "scalar"])
def test_last_equals_slicing(head):
  model, params = make(TINY, head)
  rows, width = SHAPE
  tokens = random_tokens(*SHAPE)
  segments = (np.arange(width)[None] >= np.arange(rows)[:, None]).astype(np.int32)
  full = model.apply(params, tokens, segment_ids=segments)
  for k in (1, 4, width):
    part = model.apply(params, tokens, segment_ids=segments, last=k)
    np.testing.assert_allclose(part, full[:, -k:], atol=1e-6)
    assert part.shape[1] == k


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_equals_teacher_forcing(name):
  model, params = make(VARIANTS[name])
  rows, width = SHAPE
  tokens = random_tokens(*SHAPE)
  mask = np.arange(width)[None] >= np.arange(rows)[:, None]  # Left padding 0 to 10.
  full = np.asarray(model.apply(params, tokens, segment_ids=mask.astype(np.int32)))

  def run(*cuts):
    """Feeds the tokens in chunks and checks the logits after each."""
    cache = model.init_cache(rows, width)
    for start, stop in zip((0, *cuts), (*cuts, width), strict=True):
      part = slice(start, stop)
      logits, cache = model.decode(params, tokens[:, part], cache, mask=mask[:, part])
      # A row that has not begun yet gives no logits to compare.
      begun = mask[:, stop - 1]
      np.testing.assert_allclose(logits[begun], full[begun, stop - 1], atol=1e-5)
      assert np.isfinite(logits).all()
      assert int(cache.index) == stop
    np.testing.assert_array_equal(cache.positions, np.where(mask, mask.cumsum(axis=1) - 1, -1))

  run(4, *range(5, width))  # A prefill, then one token at a time.
  run(4, 8, 12)  # A prefill in chunks.
  run(*range(1, width))  # One at a time from the start.


@pytest.mark.parametrize("name", ["tied", "gemma2", "gpt2"])
def test_padding_between_decoded_tokens_changes_nothing(name):
  # A window counts tokens, not the slots between them.
  model, params = make(VARIANTS[name])
  rows, width = SHAPE
  tokens = random_tokens(*SHAPE)
  mask = np.random.default_rng(1).random(SHAPE) < 0.6
  mask[:, -1] = True
  together, segments = np.zeros_like(tokens), np.zeros(SHAPE, np.int32)
  for row, here in enumerate(mask):
    together[row, -here.sum() :], segments[row, -here.sum() :] = tokens[row, here], 1
  expected = model.apply(params, together, segment_ids=segments)[:, -1]
  cache = model.init_cache(rows, width)
  for start, stop in itertools.pairwise((0, 4, 8, 12, 13, 14, 15, 16)):
    part = slice(start, stop)
    logits, cache = model.decode(params, tokens[:, part], cache, mask=mask[:, part])
  np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_prefill_takes_memory_linear_in_the_prompt():
  config = dataclasses.replace(TINY, layers=1, windows=(), positions="rope")
  model = build(config)
  params = jax.eval_shape(model.init, jax.random.key(0))

  def temporaries(length):
    prompts = jnp.zeros((2, length), jnp.int32), jnp.ones((2, length), bool)

    def prefill(params, tokens, mask):
      return model.decode(params, tokens, model.init_cache(2, length), mask=mask)

    return jax.jit(prefill).lower(params, *prompts).compile().memory_analysis().temp_size_in_bytes

  assert temporaries(2048) <= 2.2 * temporaries(1024)


def test_learned_positions_have_an_end():
  config = dataclasses.replace(FAMILY_MODELS["gpt2"], max_length=8)
  model, params = make(config)
  for run in (
    lambda: model.apply(params, random_tokens(1, 9)),
    lambda: model.init_cache(1, 9),
  ):
    with pytest.raises(ValueError, match="9 tokens, but the model has learned 8 positions"):
      run()
  packed = np.array([[1, 1, 1, 2, 2, 2, 2, 2]])
  tokens = random_tokens(1, 8)
  logits = model.apply(params, tokens, segment_ids=packed)[0, 3:]
  np.testing.assert_allclose(logits, oracle(params, config, tokens[0, 3:]), atol=1e-5)


@pytest.mark.parametrize("name", ["tied", "gemma2"])
def test_fully_padded_rows_are_finite(name):
  model, params = make(VARIANTS[name])
  rows, width = SHAPE
  tokens = random_tokens(*SHAPE)
  segments = np.zeros(SHAPE, np.int32)
  segments[1] = 1
  assert np.isfinite(model.apply(params, tokens, segment_ids=segments)).all()
  grad = jax.jit(jax.grad(functools.partial(loss, model)))
  grads = grad(params, tokens, segments)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  alone = grad(params, tokens[[1] * rows], segments[[1] * rows])
  # The empty rows only dilute the mean.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(rows * a, b, rtol=1e-4, atol=1e-6), grads, alone
  )
  cache = model.init_cache(rows, width)
  logits, cache = model.decode(params, tokens[:, :4], cache, mask=segments[:, :4] > 0)
  assert np.isfinite(logits).all()
  logits, _ = model.decode(params, tokens[:, :1], cache, mask=np.zeros((rows, 1), bool))
  assert np.isfinite(logits).all()


def test_bfloat16_computes_float32_logits():
  model, params = make(dataclasses.replace(TINY, dtype="bfloat16", init_std=0.2))
  assert jax.tree.leaves(params)[0].dtype == jnp.float32
  tokens = random_tokens(*SHAPE)
  logits = model.apply(params, tokens)
  assert logits.dtype == jnp.float32
  exact = compiled(TINY).apply(params, tokens)
  error = np.abs(logits - exact).max()
  assert 0 < error < 0.1 * np.abs(exact).max()
  # Not rounded to bfloat16 after the sum over the width: the low bits are used.
  assert not np.array_equal(logits, logits.astype(jnp.bfloat16).astype(jnp.float32))
  cache = model.init_cache(*SHAPE)
  assert {x.dtype for x in (*cache.k, *cache.v)} == {jnp.dtype("bfloat16")}
  last, _ = model.decode(params, tokens, cache, mask=np.ones(SHAPE, bool))
  assert last.dtype == jnp.float32
  scorer, scorer_params = make(model.config, "scalar")
  assert scorer.apply(scorer_params, tokens).dtype == jnp.float32


def exponentials(jaxpr):
  """Outputs of all exponentials of a program."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "exp":
      yield equation.outvars[0].aval
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from exponentials(inner)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_family_computes_in_bfloat16(name):
  model = build(dataclasses.replace(FAMILY_MODELS[name], dtype="bfloat16"))
  tokens, mask = jnp.ones((2, 5), jnp.int32), jnp.ones((2, 5), bool)

  def run(key):
    params, cache = model.init(key), model.init_cache(2, 5)
    return model.apply(params, tokens), *model.decode(params, tokens, cache, mask=mask)

  jaxpr, (logits, last, cache) = jax.make_jaxpr(run, return_shape=True)(jax.random.key(0))
  assert logits.dtype == last.dtype == jnp.float32
  assert {x.dtype for x in (*cache.k, *cache.v)} == {jnp.dtype("bfloat16")}
  # Those of a softmax.
  assert {x.dtype for x in exponentials(jaxpr.jaxpr)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_forwards_are_bitwise_equal(dtype):
  model, params = make(dataclasses.replace(TINY, dtype=dtype))
  tokens = random_tokens(*SHAPE)
  np.testing.assert_array_equal(model.apply(params, tokens), model.apply(params, tokens))


@pytest.mark.parametrize("tied", [True, False])
def test_a_shared_trunk_is_read_by_both_heads(tied):
  config, tokens = dataclasses.replace(TINY, tied=tied), random_tokens(*SHAPE)
  model, params = make(config, "both")
  trunk = {name: value for name, value in params.items() if name != "score"}
  split = {"policy": trunk, "value": {"score": params["score"]}}
  logits, values = shared_actor_critic(model)(split, tokens, last=4)
  # With one head fewer the compiler may fuse around it in another order.
  for got, head in ((logits, "language"), (values, "scalar")):
    want = compiled(config, head).apply(params, tokens, last=4)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  cache = model.init_cache(*SHAPE)
  decoded, _ = model.decode(params, tokens, cache, mask=np.ones(SHAPE, bool))
  np.testing.assert_allclose(decoded[0], logits[:, -1], atol=1e-5)
  np.testing.assert_allclose(decoded[1], values[:, -1], atol=1e-5)


def test_actor_critic_runs_both_models():
  policy, policy_params = make(TINY)
  critic, critic_params = make(TINY, "scalar", seed=5)
  tokens, segments = random_tokens(*SHAPE), np.ones(SHAPE, np.int32)
  logits, values = actor_critic(policy, critic)(
    {"policy": policy_params, "value": critic_params}, tokens, segment_ids=segments, last=4
  )
  want = policy.apply(policy_params, tokens, last=4), critic.apply(critic_params, tokens, last=4)
  # With segments the mask is another array, and the compiler may fuse around it in another order.
  np.testing.assert_allclose(logits, want[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(values, want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_the_embedding_that_no_token_has_get_no_probability(tied):
  plain, params = make(dataclasses.replace(TINY, tied=tied))
  known = build(plain.config, known_tokens=V - 5)
  tokens = random_tokens(*SHAPE) % (V - 5)
  expected = np.asarray(plain.apply(params, tokens))
  logits = jax.jit(known.apply)(params, tokens)
  np.testing.assert_allclose(logits[..., : V - 5], expected[..., : V - 5], atol=1e-6)
  assert (logits[..., V - 5 :] == -jnp.inf).all()
  last, _ = jax.jit(known.decode)(
    params, tokens, known.init_cache(*SHAPE), mask=np.ones(SHAPE, bool)
  )
  np.testing.assert_allclose(last, logits[:, -1], atol=1e-5)

  @jax.jit
  @jax.grad
  def grad(params):
    return -jnp.mean(jax.nn.log_softmax(known.apply(params, tokens))[..., 0])

  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad(params)))


def test_on_a_mesh_weights_come_to_the_rows():
  """In the loop over layers devices send weights and their gradients, and no activations."""
  config = dataclasses.replace(TINY, layers=6, width=32, heads=4, head_dim=8, mlp_width=48)
  mesh = sharding.make_mesh("fsdp:8")
  shapes = jax.eval_shape(build(config).init, jax.random.key(0))
  places = sharding.named_shardings(shapes, mesh, sharding.DECODER_RULES)
  params = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
  )
  rows = jax.ShapeDtypeStruct((16, 4), jnp.int32, sharding=sharding.batch_sharding(mesh))

  def sent_by_layers(model):
    loss = lambda params, tokens: jnp.sum(model.apply(params, tokens)[..., 0])  # noqa: E731
    step = jax.jit(jax.grad(loss), out_shardings=places)
    found = hlo.collectives(step.lower(params, rows).compile().as_text())
    assert {c.trips for c in found if c.trips} == {(6,)}
    return hlo.summarize(c for c in found if c.trips)

  layer = jax.tree.map(lambda x: 4 * x.size / config.layers, shapes["layers"])
  kernels = sum(jax.tree.leaves((layer["attention"], layer["mlp"])))
  sent = sent_by_layers(build(config, mesh=mesh))
  assert set(sent) == {"all-gather", "all-reduce"}
  assert sent["all-gather"]["bytes"] == 6 * 2 * kernels * 7 / 8  # Forward and backward.
  assert sent["all-reduce"]["bytes"] == 6 * 2 * sum(jax.tree.leaves(layer)) * 7 / 8
  assert "all-gather" not in sent_by_layers(build(config))  # What the mesh is for.


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_rounded_matrices_change_no_result_in_bfloat16(name):
  config = dataclasses.replace(FAMILY_MODELS[name], dtype="bfloat16")
  model = compiled(config, "both")
  params = model.init(jax.random.key(0))
  rounded = round_matrices(params, "bfloat16")
  assert rounded["score"]["kernel"].dtype == rounded["final_norm"]["scale"].dtype == jnp.float32
  sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (params, rounded)]
  assert sizes[1] < 0.6 * sizes[0]
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, SHAPE).astype(np.int32)
  want, got = (model.apply(of, tokens) for of in (params, rounded))
  jax.tree.map(np.testing.assert_array_equal, got, want)
