"""Codes of 8 and 4 bits: their error and size, and models that read them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import generation, preflight, sharding
from rlhf_jax.models import build, lora, quantized, round_matrices
from tests.models.build_test import FAMILY_MODELS
from tests.testing import TINY_MODEL, full

# Of a number in [-1, 1]: each level, and half of the largest distance between two beside it.
LEVELS = {"int8": np.arange(-127, 128) / 127, "nf4": np.array(quantized._NF4)}
FORMATS = pytest.mark.parametrize("form", quantized.FORMATS)


def by_loops(kernel, levels, tile):
  """Weights [in, out] as the nearest levels times the largest magnitude of their tile."""
  result = np.zeros_like(kernel)
  for column in range(kernel.shape[1]):
    for start in range(0, len(kernel), tile):
      weights = kernel[start : start + tile, column]
      scale = float(jnp.bfloat16(np.abs(weights).max()))
      for i, weight in enumerate(weights):
        nearest = min(levels, key=lambda level: abs(level * scale - weight))
        result[start + i, column] = nearest * scale
  return result


@FORMATS
@pytest.mark.parametrize(
  ("lead", "inputs"), [*(((3,), n) for n in (1, 13, 96, 128, 257, 576, 1536)), ((), 257)]
)
def test_weights_come_back_as_the_nearest_levels_of_their_tile(form, inputs, lead):
  rng = np.random.default_rng(0)
  kernel = (rng.normal(size=(*lead, inputs, 5)) * 10.0 ** rng.integers(-4, 4, 5)).astype(np.float32)
  kernel[..., 0] = 0.0
  params = {"layers": {"q": {"kernel": jnp.array(kernel), "bias": jnp.ones(3)}}}
  encoded = quantized.encode(params, form)
  layer = encoded["layers"]["q"]
  assert layer["kernel"].dtype == quantized.FORMATS[form].dtype
  assert layer["kernel"].shape == kernel.shape
  decoded = quantized.decode(encoded)["layers"]["q"]
  assert decoded.keys() == {"kernel", "bias"}
  tiles = kernel.reshape(*lead, layer["kernel_scale"].shape[-2], -1, 5)
  scale = np.abs(tiles).max(axis=-2, keepdims=True)
  error = np.abs(np.asarray(decoded["kernel"]).reshape(tiles.shape) - tiles)
  half = np.diff(LEVELS[form]).max() / 2  # The scale is rounded to 8 bits.
  assert np.all(error <= (1.02 * half if form == "int8" else half + 2**-8) * scale)
  if inputs < 128:
    want = by_loops(kernel.reshape(-1, *kernel.shape[-2:])[0], LEVELS[form], tiles.shape[-2])
    np.testing.assert_allclose(decoded["kernel"].reshape(-1, *want.shape)[0], want, rtol=1e-6)
  for dtype in (jnp.float32, jnp.bfloat16):  # What is decoded is encoded as it was.
    again = quantized.encode(quantized.decode(encoded, jnp.dtype(dtype)), form)
    jax.tree.map(np.testing.assert_array_equal, again, encoded)


@FORMATS
@pytest.mark.parametrize("largest", [1.0, 0.375, 3e-5, 2e4])
def test_the_largest_weight_of_a_tile_is_exact(form, largest):
  kernel = largest * jnp.outer(jnp.linspace(-0.9, 0.9, 64), jnp.array([1.0, -1.0]))
  largest = jnp.bfloat16(largest).astype(jnp.float32)
  kernel = kernel.at[5].set([largest, -largest])
  decoded = quantized.decode(quantized.encode({"kernel": kernel}, form, inside=True))["kernel"]
  np.testing.assert_array_equal(decoded[5], [largest, -largest])


@pytest.mark.parametrize("form, held", [("int8", 1 + 2 / 128), ("nf4", 0.5 + 2 / 64)])
def test_a_weight_takes_as_many_bytes_as_promised(form, held):
  kernel = jnp.ones((2, 256, 128), jnp.float32)
  encode = jax.jit(lambda x: quantized.encode({"kernel": x}, form, inside=True))
  encoded = encode(kernel)
  assert preflight.bytes_in_all(encoded) == held * kernel.size
  # The program that reads them is given as much.
  compiled = jax.jit(quantized.decode).lower(encoded).compile()
  assert compiled.memory_analysis().argument_size_in_bytes == held * kernel.size


@FORMATS
def test_only_the_kernels_of_layers_are_encoded(form):
  model = build(FAMILY_MODELS["mixtral"], "both")
  other = {"layers": {"kernel": jnp.ones((4, 4))}}
  make = lambda key: round_matrices({"policy": model.init(key), "n": other}, form)  # noqa: E731
  encoded = jax.eval_shape(make, jax.random.key(0))
  assert encoded["n"]["layers"].keys() == {"kernel", "kernel_scale"}
  policy = encoded["policy"]
  assert policy["embed"]["embedding"].dtype == jnp.bfloat16
  assert policy["score"]["kernel"].dtype == policy["final_norm"]["scale"].dtype == jnp.float32
  dtypes = {
    group: {str(x.dtype) for x in jax.tree.leaves(policy["layers"][group])}
    for group in ("attention", "mlp")
  }
  dtype = str(quantized.FORMATS[form].dtype)
  assert dtype in dtypes["attention"] and dtype not in dtypes["mlp"]
  once = round_matrices(other, form)
  jax.tree.map(np.testing.assert_array_equal, round_matrices(once, form), once)


@FORMATS
@pytest.mark.parametrize("name", ["gpt2", pytest.param("gemma2", marks=full)])
def test_a_model_reads_codes_as_the_weights_that_they_stand_for(name, form):
  model = build(FAMILY_MODELS[name], "both")
  encoded = jax.jit(lambda key: round_matrices(model.init(key), form))(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 6)).astype(np.int32)

  @jax.jit
  def outputs(params):
    def loss(embed):
      result = model.apply(params | {"embed": embed}, tokens)
      return sum(jnp.mean(x**2) for x in jax.tree.leaves(result)), result

    return jax.grad(loss, has_aux=True)(params["embed"])

  want, got = (outputs(params) for params in (quantized.decode(encoded), encoded))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("form", ["int8", pytest.param("nf4", marks=full)])
def test_a_sampler_and_adapters_read_them_too(form):
  model = build(TINY_MODEL)
  key = jax.random.key(0)
  encoded = jax.jit(lambda key: round_matrices(model.init(key), form))(key)
  adapters = lora.init(key, encoded, lora.LoRAConfig(rank=2))
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)
  join = lambda base: {  # noqa: E731
    **base,
    "layers": {
      group: {
        name: layer | adapters["layers"].get(group, {}).get(name, {}) for name, layer in of.items()
      }
      if group in adapters["layers"]
      else of
      for group, of in base["layers"].items()
    },
  }
  given, plain = join(encoded), join(quantized.decode(encoded))
  tokens = np.random.default_rng(0).integers(0, 16, (2, 6)).astype(np.int32)
  frozen, trained = lora.split(given)
  assert {str(x.dtype) for x in jax.tree.leaves(trained)} == {"float32"}
  assert any(x.dtype == quantized.FORMATS[form].dtype for x in jax.tree.leaves(frozen))
  merged = [lora.merge(params) for params in (given, plain)]
  shapes = jax.eval_shape(model.init, key)
  assert jax.tree.structure(merged[0]) == jax.tree.structure(shapes)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, *merged)
  close(model.apply(given, tokens), model.apply(merged[0], tokens))
  config = generation.SamplingConfig(max_new_tokens=4, temperature=0.0)
  mask = jnp.ones(tokens.shape, bool)
  sample = generation.make_generate(model.decode, model.init_cache, config, stop_ids=(0,), pad_id=0)
  rollouts = [sample(params, tokens, mask, np.arange(2), key) for params in (given, merged[0])]
  np.testing.assert_array_equal(*(rollout.tokens for rollout in rollouts))


@FORMATS
def test_codes_and_scales_are_split_on_a_mesh(form):
  model = build(TINY_MODEL)
  params = jax.jit(model.init)(jax.random.key(0))
  mesh = sharding.make_mesh("fsdp:2,tensor:2", jax.devices()[:4])
  make = lambda params: round_matrices(params, form)  # noqa: E731
  shardings = sharding.named_shardings(jax.eval_shape(make, params), mesh, sharding.DECODER_RULES)
  split = jax.jit(make, out_shardings=shardings)(params)
  jax.tree.map(np.testing.assert_array_equal, split, jax.jit(make)(params))
  query = split["layers"]["attention"]["q"]
  parts = [x.size // x.addressable_shards[0].data.size for x in query.values()]
  assert parts == [4, 4]
  moved = sharding.make_reshard(mesh, jnp.bfloat16)(split)
  assert moved["layers"]["attention"]["q"]["kernel"].dtype == quantized.FORMATS[form].dtype
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(np.float32(x), np.float32(y)),
    moved["layers"]["attention"]["q"],
    dict(query),
  )
