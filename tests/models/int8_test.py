"""Codes of 8 bits: their error and size, and models that read them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import generation, sharding
from rlhf_jax.models import build, int8, lora, round_matrices
from tests.models.build_test import FAMILY_MODELS
from tests.testing import TINY_MODEL, full


@pytest.mark.parametrize("inputs", [1, 13, 96, 128, 257, 576, 1536])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_weights_come_back_to_half_a_level_of_their_tile(inputs, lead):
  rng = np.random.default_rng(0)
  kernel = (rng.normal(size=(*lead, inputs, 5)) * 10.0 ** rng.integers(-4, 4, 5)).astype(np.float32)
  kernel[..., 0] = 0.0
  encoded = int8.encode({"layers": {"q": {"kernel": jnp.array(kernel), "bias": jnp.ones(3)}}})
  layer = encoded["layers"]["q"]
  assert layer["kernel"].dtype == jnp.int8 and layer["kernel"].shape == kernel.shape
  decoded = int8.decode(encoded)["layers"]["q"]
  assert decoded.keys() == {"kernel", "bias"}
  tiles = kernel.reshape(*lead, layer["kernel_scale"].shape[-2], -1, 5)
  level = np.abs(tiles).max(axis=-2, keepdims=True) / 127
  error = np.abs(np.asarray(decoded["kernel"]).reshape(tiles.shape) - tiles)
  assert np.all(error <= 0.51 * level)
  again = int8.decode(int8.encode(int8.decode(encoded)))["layers"]["q"]["kernel"]
  np.testing.assert_allclose(again, decoded["kernel"], atol=level.max() * 0.51)


def test_only_the_kernels_of_layers_are_encoded():
  model = build(FAMILY_MODELS["mixtral"], "both")
  other = {"layers": {"kernel": jnp.ones((4, 4))}}
  make = lambda key: round_matrices({"policy": model.init(key), "n": other}, "int8")  # noqa: E731
  encoded = jax.eval_shape(make, jax.random.key(0))
  assert encoded["n"]["layers"].keys() == {"kernel", "kernel_scale"}
  policy = encoded["policy"]
  assert policy["embed"]["embedding"].dtype == jnp.bfloat16
  assert policy["score"]["kernel"].dtype == policy["final_norm"]["scale"].dtype == jnp.float32
  dtypes = {
    group: {str(x.dtype) for x in jax.tree.leaves(policy["layers"][group])}
    for group in ("attention", "mlp")
  }
  assert "int8" in dtypes["attention"] and "int8" not in dtypes["mlp"]
  once = round_matrices(other, "int8")
  jax.tree.map(np.testing.assert_array_equal, round_matrices(once, "int8"), once)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("gemma2", marks=full)])
def test_a_model_reads_codes_as_the_weights_that_they_stand_for(name):
  model = build(FAMILY_MODELS[name], "both")
  encoded = jax.jit(lambda key: round_matrices(model.init(key), "int8"))(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 6)).astype(np.int32)
  apply = jax.jit(model.apply)
  want, got = (apply(params, tokens) for params in (int8.decode(encoded), encoded))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


def test_a_sampler_and_adapters_read_them_too():
  model = build(TINY_MODEL)
  key = jax.random.key(0)
  encoded = jax.jit(lambda key: round_matrices(model.init(key), "int8"))(key)
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
  given, plain = join(encoded), join(int8.decode(encoded))
  tokens = np.random.default_rng(0).integers(0, 16, (2, 6)).astype(np.int32)
  frozen, trained = lora.split(given)
  assert {str(x.dtype) for x in jax.tree.leaves(trained)} == {"float32"}
  assert any(x.dtype == jnp.int8 for x in jax.tree.leaves(frozen))
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


def test_codes_and_scales_are_split_on_a_mesh():
  model = build(TINY_MODEL)
  params = jax.jit(model.init)(jax.random.key(0))
  mesh = sharding.make_mesh("fsdp:2,tensor:2", jax.devices()[:4])
  make = lambda params: round_matrices(params, "int8")  # noqa: E731
  shardings = sharding.named_shardings(jax.eval_shape(make, params), mesh, sharding.DECODER_RULES)
  split = jax.jit(make, out_shardings=shardings)(params)
  jax.tree.map(np.testing.assert_array_equal, split, jax.jit(make)(params))
  query = split["layers"]["attention"]["q"]
  parts = [x.size // x.addressable_shards[0].data.size for x in query.values()]
  assert parts == [4, 4]
  moved = sharding.make_reshard(mesh, jnp.bfloat16)(split)
  assert moved["layers"]["attention"]["q"]["kernel"].dtype == jnp.int8
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(np.float32(x), np.float32(y)),
    moved["layers"]["attention"]["q"],
    dict(query),
  )
