"""The kernels against attention in float64, one query and one head at a time."""

import dataclasses
import functools
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.models import ModelConfig, attention, build
from rlhf_jax.models.attention import (
  NO_WINDOW,
  attend_to_cache,
  cached_attention,
  choose,
  cudnn_attention,
  make_attend,
  splash_attention,
  visible,
  xla_attention,
)
from tests.testing import FAMILY_MODELS, TINY_MODEL, full

T = 40
# Left padding 0 to 7, padding on both sides, packed segments, an empty row.
_LAYOUTS = [
  *([0] * n + [1] * (T - n) for n in range(8)),
  [0] * 5 + [1] * 20 + [0] * (T - 25),
  [1] * 9 + [2] * 17 + [3] * (T - 26),
  [7] * 13 + [2] * 4 + [0] * (T - 17),
  [0] * T,
]
SEGMENTS = np.array(_LAYOUTS, np.int32)
ROWS = len(SEGMENTS)


def random_arrays(heads=4, kv_heads=2, width=16, rows=ROWS, length=T):
  rng = np.random.default_rng(0)
  q, k, v, g = (
    rng.normal(size=(rows, length, h, width)).astype(np.float32)
    for h in (heads, kv_heads, kv_heads, heads)
  )
  return (q, k, v), g


def oracle(q, k, v, segments, window, scale, softcap):
  """Row by row in float64, NaN at padding."""
  out = np.full(q.shape, np.nan)
  group = q.shape[2] // k.shape[2]
  for b, t, h in np.ndindex(q.shape[:3]):
    if not segments[b, t]:
      continue
    seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t] and t - s < window]
    keys = k[b, seen, h // group].astype(np.float64)
    scores = keys @ q[b, t, h].astype(np.float64) * scale
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max())
    out[b, t, h] = weights @ v[b, seen, h // group] / weights.sum()
  return out


def outputs_and_gradients(attend, arrays, g, segments, window=None):
  """Outputs, and gradients of what a loss that reads no padding sees; zeros for its own."""
  real = np.ones((1, T, 1, 1), bool) if segments is None else segments[..., None, None] > 0

  @jax.jit
  def run(*arrays):
    def loss(q, k, v):
      out = attend(q, k, v, segments, window)
      return jnp.sum(jnp.where(real, out * g, 0.0)), jnp.where(real, out, 0.0)

    gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return out, *gradients

  return run(*arrays)


@pytest.mark.parametrize("window", [NO_WINDOW, 7])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_all_equal_the_oracle(monkeypatch, window, softcap):
  monkeypatch.setattr(attention, "_SMALLEST", 8)  # Four parts of 10 queries.
  arrays, g = random_arrays()
  options = {"scale": 0.3, "softcap": softcap}
  xla = functools.partial(xla_attention, **options)
  splash = functools.partial(
    splash_attention, windows=(window,), mesh=None, interpret=True, **options
  )
  expected = oracle(*arrays, SEGMENTS, window, **options)
  want = outputs_and_gradients(xla, arrays, g, SEGMENTS, jnp.int32(window))
  on_cpu = functools.partial(xla, on_cpu=True)
  got = outputs_and_gradients(splash, arrays, g, SEGMENTS)
  got_on_cpu = outputs_and_gradients(on_cpu, arrays, g, SEGMENTS, jnp.int32(window))
  for out, *gradients in (want, got, got_on_cpu):
    np.testing.assert_allclose(out, np.nan_to_num(expected), atol=2e-6)
    for a, b in zip(gradients, want[1:], strict=True):
      assert np.abs(b).max() > 0.1
      np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("length", [63, 64, 129, 255, 256, 515])
def test_parts_of_queries_read_no_keys_after_them(length):
  arrays, _ = random_arrays(rows=2, length=length)
  attend = jax.jit(functools.partial(xla_attention, scale=0.3, softcap=None))
  on_cpu = jax.jit(functools.partial(xla_attention, scale=0.3, softcap=None, on_cpu=True))
  want = attend(*arrays, None, None)
  np.testing.assert_allclose(on_cpu(*arrays, None, None), want, atol=2e-6)
  size = max(64, -(-length // 4))
  last = (length - 1) // size * size  # Start of the last part.
  q, k, v = (np.where(np.arange(length)[:, None, None] < last, x, np.nan) for x in arrays)
  np.testing.assert_allclose(on_cpu(q, k, v, None, None)[:, :last], want[:, :last], atol=2e-6)


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_bfloat16_on_a_cpu_keeps_what_values_have_in_common_out_of_gradients(offset):
  (q, k, v), g = random_arrays(rows=1, length=200)
  arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v + offset))
  attend = functools.partial(xla_attention, scale=0.3, softcap=None)

  def gradients(on_cpu, dtype):
    loss = lambda *x: jnp.sum(attend(*x, None, None, on_cpu=on_cpu).astype(jnp.float32) * g)  # noqa: E731
    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*(x.astype(dtype) for x in arrays))
    return [np.asarray(x, np.float32) for x in found]

  exact = gradients(False, jnp.float32)
  for got, want in zip(gradients(True, jnp.bfloat16), exact, strict=True):
    assert np.linalg.norm(got - want) < 0.006 * np.linalg.norm(want)


@pytest.mark.parametrize("heads, kv_heads, width", [(3, 1, 8), (4, 4, 64), (2, 1, 80), (2, 2, 128)])
def test_splash_takes_any_heads(heads, kv_heads, width):
  arrays, g = random_arrays(heads, kv_heads, width, rows=3)
  splash = functools.partial(
    splash_attention, windows=(NO_WINDOW,), mesh=None, interpret=True, scale=0.2, softcap=None
  )
  xla = functools.partial(xla_attention, scale=0.2, softcap=None)
  for segments in (None, SEGMENTS[8:11]):
    got = outputs_and_gradients(splash, arrays, g, segments)
    want = outputs_and_gradients(xla, arrays, g, segments)
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("length", [128, 384, 641])
def test_splash_pads_to_whole_blocks(length):
  arrays, _ = random_arrays(1, 1, 8, rows=1, length=length)
  segments = (np.arange(length)[None] > 100).astype(np.int32)
  splash = functools.partial(
    splash_attention, windows=(130,), mesh=None, interpret=True, scale=0.2, softcap=None
  )
  xla = functools.partial(xla_attention, scale=0.2, softcap=None)
  got = jax.jit(splash)(*arrays, segments, None)
  want = jax.jit(xla)(*arrays, segments, jnp.int32(130))
  np.testing.assert_allclose(got[:, 101:], want[:, 101:], atol=1e-6)


@pytest.mark.parametrize("window", [0, 1])
def test_splash_of_layers_with_different_windows(window):
  windows = (5, NO_WINDOW)
  arrays, g = random_arrays(rows=3)
  options = {"scale": 0.2, "softcap": None}
  splash = functools.partial(
    splash_attention, windows=windows, mesh=None, interpret=True, **options
  )
  size = jnp.int32(windows[window])
  got = outputs_and_gradients(splash, arrays, g, SEGMENTS[8:11], size)
  want = outputs_and_gradients(
    functools.partial(xla_attention, **options), arrays, g, SEGMENTS[8:11], size
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("spec, kv_heads", [("data:2,fsdp:2,tensor:2", 2), ("fsdp:4,tensor:2", 1)])
def test_splash_on_a_mesh(spec, kv_heads):
  # One key head is on both devices of the axis that would split heads.
  mesh = sharding.make_mesh(spec)
  arrays, g = random_arrays(kv_heads=kv_heads)
  options = {"scale": 0.2, "softcap": None}
  splash = functools.partial(
    splash_attention, windows=(NO_WINDOW,), mesh=mesh, interpret=True, **options
  )
  placed = sharding.place_batch(arrays, mesh)
  got = outputs_and_gradients(splash, placed, g, SEGMENTS)
  want = outputs_and_gradients(functools.partial(xla_attention, **options), arrays, g, SEGMENTS)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  rows = {shard.data.shape[0] for shard in got[0].addressable_shards}
  assert rows == {ROWS // 4}, "each device computes its own rows"


@pytest.mark.parametrize(
  "name", [*(pytest.param(name, marks=full) for name in ("gemma2", "mistral")), "gemma3", "gpt2"]
)
def test_a_model_by_splash(name):
  config = FAMILY_MODELS[name]
  if name == "gemma3":  # One layer of each kind: the kernels take long to compile here.
    config = dataclasses.replace(config, layers=2, windows=(3, None))
  tokens = np.random.default_rng(1).integers(0, 24, (3, 20))
  segments = SEGMENTS[8:11, :20]
  params = jax.jit(build(config).init)(jax.random.key(0))

  def loss(params, model):
    logits = model.apply(params, tokens, segment_ids=segments)
    return jnp.mean(jnp.where(segments[..., None] > 0, jax.nn.log_softmax(logits), 0.0) ** 2)

  got, want = (
    jax.jit(functools.partial(jax.value_and_grad(loss), model=build(model)))(params)
    for model in (dataclasses.replace(config, attention=name) for name in ("splash", "xla"))
  )
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("length", [T, T - 1])
@pytest.mark.parametrize("windows", [(NO_WINDOW,), (6,), (6, NO_WINDOW)])
@pytest.mark.parametrize("segmented", [True, False])
def test_what_cudnn_is_asked_for(monkeypatch, segmented, windows, length):
  (q, k, v), _ = random_arrays()
  q, k, v = (x[:, :length] for x in (q, k, v))
  segments = SEGMENTS[:, :length] if segmented else None
  real = jax.nn.dot_product_attention
  calls = []

  def on_a_gpu(*args, implementation, **kwargs):
    calls.append((implementation, args[0].shape[1], kwargs))
    return real(*args, implementation="xla", **kwargs)

  window = jnp.int32(windows[0])
  expected = xla_attention(q, k, v, segments, window, scale=0.2, softcap=None)
  monkeypatch.setattr(jax.nn, "dot_product_attention", on_a_gpu)
  out = cudnn_attention(q, k, v, segments, window, scale=0.2, windows=windows, mesh=None)
  np.testing.assert_allclose(out, expected, atol=1e-6)
  ((implementation, rows, kwargs),) = calls
  assert implementation == "cudnn"
  # A mask costs memory, and its backward pass wants an even length.
  assert ("mask" in kwargs) == (segmented or len(windows) == 2)
  assert "mask" not in kwargs or rows % 2 == 0


MESHES = [("data:4,tensor:2", 2), ("fsdp:4,tensor:2", 1), ("data:2,tensor:4", 2)]


@pytest.mark.parametrize("spec, kv_heads", MESHES)
@pytest.mark.parametrize("segmented", [True, False])
def test_cudnn_on_a_mesh(monkeypatch, spec, kv_heads, segmented):
  # Heads of keys that the tensor axis does not divide are on each of its devices.
  mesh = sharding.make_mesh(spec)
  (q, k, v), g = random_arrays(kv_heads=kv_heads)
  segments, windows = SEGMENTS if segmented else None, (6,)
  want = outputs_and_gradients(
    functools.partial(xla_attention, scale=0.2, softcap=None), (q, k, v), g, segments, 6
  )
  real, heads = jax.nn.dot_product_attention, []

  def on_a_gpu(q, k, *args, implementation, **kwargs):
    assert implementation == "cudnn" and len(q) == ROWS // sharding.row_parts(mesh)
    heads.append((q.shape[2], k.shape[2]))
    return real(q, k, *args, implementation="xla", **kwargs)

  monkeypatch.setattr(jax.nn, "dot_product_attention", on_a_gpu)
  cudnn = functools.partial(cudnn_attention, scale=0.2, windows=windows, mesh=mesh)
  placed = sharding.place_batch((q, k, v), mesh)
  got = outputs_and_gradients(cudnn, placed, g, segments, 6)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  parts = mesh.shape["tensor"] if kv_heads % mesh.shape["tensor"] == 0 else 1
  assert set(heads) == {(q.shape[2] // parts, kv_heads // parts)}


@pytest.mark.parametrize("spec, kv_heads", MESHES)
def test_the_compiler_splits_cudnn(monkeypatch, spec, kv_heads):
  """Compiles for a GPU, up to its kernels, which a CPU lacks."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
  monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
  monkeypatch.setattr(attention, "choose", lambda config, device: "cudnn")
  mesh = sharding.make_mesh(spec)
  model = build(dataclasses.replace(BFLOAT16, heads=4, kv_heads=kv_heads, width=32), mesh=mesh)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  places = sharding.named_shardings(shapes, mesh, sharding.DECODER_RULES)
  tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32, sharding=sharding.batch_sharding(mesh))
  traced = jax.jit(jax.grad(lambda params, tokens: jnp.mean(model.apply(params, tokens)))).trace(
    sharding.abstract(shapes, places), tokens
  )
  with pytest.raises(jax.errors.JaxRuntimeError, match=r"No registered .* call to __cudnn\$fmha"):
    traced.lower(lowering_platforms=("cuda",)).compile()


def device(platform, capability=None):
  return types.SimpleNamespace(
    platform=platform, device_kind=f"a {platform}", compute_capability=capability
  )


BFLOAT16 = dataclasses.replace(TINY_MODEL, dtype="bfloat16")
H100, A100 = device("gpu", "9.0"), device("gpu", "8.0")


@pytest.mark.parametrize(
  "of, changes, expected",
  [
    (device("cpu"), {}, "xla"),
    (device("tpu"), {}, "splash"),
    (device("tpu"), {"dtype": "float32"}, "splash"),
    (H100, {}, "cudnn"),
    (H100, {"dtype": "float32"}, "xla"),
    (H100, {"attention_softcap": 30.0}, "xla"),
    (H100, {"head_dim": 12}, "xla"),
    (H100, {"head_dim": 256}, "cudnn"),
    (H100, {"head_dim": 264}, "xla"),
    (A100, {"head_dim": 128}, "cudnn"),
    (A100, {"head_dim": 136}, "xla"),
    (device("gpu", "7.5"), {}, "xla"),
    (device("gpu", "gfx942"), {}, "xla"),  # Made by AMD.
  ],
)
def test_auto(of, changes, expected):
  assert choose(dataclasses.replace(BFLOAT16, **changes), of) == expected
  named = dataclasses.replace(BFLOAT16, attention=expected, **changes)
  assert choose(named, of) == expected


@pytest.mark.parametrize(
  "attention, of, changes, words",
  [
    ("cudnn", H100, {"dtype": "float32"}, "set --model.dtype=bfloat16; use auto or xla"),
    ("cudnn", H100, {"attention_softcap": 3.0}, "does not cap attention scores"),
    ("cudnn", device("cpu"), {}, "needs an NVIDIA GPU .* not a cpu"),
    ("cudnn", A100, {"head_dim": 160}, "up to 128 dimensions, and the model's have 160"),
    ("splash", H100, {}, "--model.attention=splash: it is made for TPUs"),
  ],
)
def test_what_a_device_cannot_is_refused(attention, of, changes, words):
  config = dataclasses.replace(BFLOAT16, attention=attention, **changes)
  with pytest.raises(ValueError, match=words):
    choose(config, of)


def test_the_model_says_so_when_it_is_built():
  with pytest.raises(ValueError, match="--model.attention=cudnn"):
    build(dataclasses.replace(TINY_MODEL, attention="cudnn"))
  with pytest.raises(ValueError, match="attention must be one of .*, got 'flash'"):
    ModelConfig(vocab_size=8, attention="flash")
  assert make_attend(TINY_MODEL).func is xla_attention


def test_visible():
  expected = np.zeros((2, 4, 4), bool)
  for b, ids in enumerate(([0, 1, 1, 1], [1, 1, 2, 2])):
    for t in range(4):
      for s in range(t + 1):
        expected[b, t, s] = ids[t] == ids[s] and t - s < 2
  np.testing.assert_array_equal(visible(4, jnp.array([[0, 1, 1, 1], [1, 1, 2, 2]]), 2), expected)
  np.testing.assert_array_equal(visible(3)[0], np.tri(3, dtype=bool))


# The larger the blocks are, the longer the compiler takes: those of one model are large enough.
@pytest.mark.parametrize("name, length", [pytest.param("gemma2", 600, marks=full), ("llama", 200)])
def test_splash_compiles_for_tpus(name, length, monkeypatch):
  pytest.importorskip("libtpu")
  # Without these the compiler asks for the machine it is on, and for nobody else to use it.
  monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  from jax.experimental import topologies

  topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
  mesh = topologies.make_mesh(topology, (1, 2, 2), sharding.AXES)
  base = dataclasses.replace(_TPU_MODELS[name], dtype="bfloat16")
  model = build(base, mesh=mesh)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  shardings = sharding.named_shardings(shapes, mesh, sharding.DECODER_RULES)

  def abstract(x, where):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  params = jax.tree.map(abstract, shapes, shardings)
  ids = abstract(jax.ShapeDtypeStruct((4, length), jnp.int32), sharding.batch_sharding(mesh))

  def loss(params, tokens, segments):
    return jnp.mean(model.apply(params, tokens, segment_ids=segments) ** 2)

  forward = jax.jit(model.apply).lower(params, ids).compile().as_text()
  assert "tpu_custom_call" in forward
  backward = jax.jit(jax.grad(loss)).lower(params, ids, ids).compile().as_text()
  kernels = [line for line in backward.splitlines() if "tpu_custom_call" in line]
  for kernel in ("fwd", "dq", "dkv"):
    assert any(f"splash_mha_{kernel}" in line for line in kernels), kernels


_TPU_MODELS = {
  "llama": ModelConfig(vocab_size=64, width=256, layers=6, heads=4, kv_heads=2, head_dim=64),
  "gemma2": dataclasses.replace(
    FAMILY_MODELS["gemma2"], width=256, heads=4, kv_heads=2, head_dim=128, windows=(64, None)
  ),
}


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, 5.0)])
@pytest.mark.parametrize("length", [1, 3, 40])
def test_attention_to_a_cache_in_pieces(monkeypatch, window, softcap, length):
  """Slots in any order, some empty, and queries of which some are padding."""
  rng = np.random.default_rng(length)
  rows, slots = 3, 48
  q = rng.normal(size=(rows, length, 4, 8)).astype(np.float32)
  k, v = rng.normal(size=(2, rows, 2, slots, 8)).astype(np.float32)
  positions = np.argsort(rng.random((rows, slots)), axis=1) - 5
  own = np.arange(length)[None] + 4
  at = np.take_along_axis(positions, np.repeat(own, rows, axis=0), axis=1)
  distance = at[:, :, None] - positions[:, None]
  mask = (positions[:, None] >= 0) & (distance >= 0)
  mask &= distance < (slots if window is None else window)
  mask |= np.arange(slots)[None, None] == own[..., None]
  options = {"scale": 0.3, "softcap": softcap}
  expected = cached_attention(q, k, v, jnp.asarray(mask), **options)
  monkeypatch.setattr("rlhf_jax.models.attention._QUERIES", 16)
  positions = np.maximum(positions, -1)
  got = attend_to_cache(q, k, v, (jnp.asarray(at), jnp.asarray(own)), positions, window, **options)
  np.testing.assert_allclose(got, expected, atol=1e-5)
