"""Adapters against the same model with its matrices changed by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import sharding
from rlhf_jax.algorithms import sft
from rlhf_jax.losses import logprobs
from rlhf_jax.models import build, hf, lora
from rlhf_jax.train_step import freeze, init_state, join
from rlhf_jax.types import TokenBatch
from tests.testing import FAMILY_MODELS, TINY_MODEL, tiny_params

MODEL = build(TINY_MODEL)
APPLY = jax.jit(MODEL.apply)
CONFIG = lora.LoRAConfig(rank=3, alpha=6.0)
TOKENS = jax.random.randint(jax.random.key(5), (4, 9), 0, TINY_MODEL.vocab_size)


@functools.cache
def adapted(seed=0, config=CONFIG, model=TINY_MODEL):
  """Params with adapters that change the output: B is not 0, as it is at the start."""
  params = tiny_params() if model is TINY_MODEL else build(model).init(jax.random.key(1))
  adapters = lora.init(jax.random.key(seed), params, config)
  rng = np.random.default_rng(seed)
  filled = [
    (path, value if path[-1] != "lora_b" else 0.3 * rng.normal(size=value.shape))
    for path, value in lora.leaves(adapters)
  ]
  for (*path, name), value in filled:
    functools.reduce(dict.get, path, adapters)[name] = jnp.asarray(value, jnp.float32)
  return join(params, adapters)


def changed_by_hand(params, factor):
  """The base with `W + factor * A B`, layer by layer in float64."""
  plain = jax.tree.map(np.asarray, lora.base(params))
  for (*path, name), a in lora.leaves(params):
    if name == "lora_a":
      layer = functools.reduce(dict.get, path, params)
      kernel = functools.reduce(dict.get, path, plain)["kernel"].copy()
      for i in range(len(kernel)):
        kernel[i] += factor * (np.float64(a[i]) @ np.float64(layer["lora_b"][i]))
      functools.reduce(dict.get, path, plain)["kernel"] = kernel
  return plain


def test_a_fresh_adapter_changes_no_bit():
  adapters = lora.init(jax.random.key(0), tiny_params(), CONFIG)
  params = join(tiny_params(), adapters)
  np.testing.assert_array_equal(APPLY(params, TOKENS), APPLY(tiny_params(), TOKENS))
  spread = [
    np.std(x) * x.shape[1] ** 0.5 for path, x in lora.leaves(adapters) if path[-1] == "lora_a"
  ]
  np.testing.assert_allclose(np.mean(spread), 1, rtol=0.1)


def test_the_base_is_the_model_from_before():
  base = lora.base(adapted())
  jax.tree.map(lambda a, b: np.testing.assert_equal(a is b, True), base, tiny_params())
  want = jax.jit(logprobs.next_token_logprobs)(APPLY(tiny_params(), TOKENS), TOKENS)
  found = jax.jit(logprobs.next_token_logprobs)(APPLY(base, TOKENS), TOKENS)
  np.testing.assert_array_equal(found, want)


def test_adapters_compute_what_changed_matrices_do():
  want = APPLY(changed_by_hand(adapted(), 6.0 / 3), TOKENS)
  assert np.abs(want - APPLY(tiny_params(), TOKENS)).max() > 0.1
  np.testing.assert_allclose(APPLY(adapted(), TOKENS), want, atol=1e-5)
  np.testing.assert_allclose(APPLY(lora.merge(adapted()), TOKENS), want, atol=1e-5)
  merged = lora.merge(adapted())
  assert jax.tree.structure(merged) == jax.tree.structure(tiny_params())
  # The decoder with a cache has them as well.
  cache = MODEL.init_cache(4, 9)
  mask = jnp.ones((4, 9), bool)
  decoded, _ = jax.jit(MODEL.decode)(adapted(), TOKENS, cache, mask=mask)
  np.testing.assert_allclose(decoded, want[:, -1], atol=1e-5)


def test_only_adapters_and_a_new_head_are_trained():
  config = dataclasses.replace(CONFIG, targets=("q", "down"))
  scalar = tiny_params("scalar")
  params = join(scalar, lora.init(jax.random.key(0), scalar, config))
  frozen, trained = lora.split({"policy": adapted(), "value": params})
  names = {
    "/".join(key.key for key in path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained["value"])
  }
  assert names == {
    "layers/attention/q/lora_a": (2, 16, 3),
    "layers/attention/q/lora_b": (2, 3, 16),
    "layers/mlp/down/lora_a": (2, 32, 3),
    "layers/mlp/down/lora_b": (2, 3, 16),
    "score/kernel": (16, 1),
    "score/bias": (1,),
  }
  assert not {"lora_a", "lora_b"} & {path[-1] for path, _ in lora.leaves(frozen)}
  whole = join(frozen, trained)
  jax.tree.map(
    lambda a, b: np.testing.assert_equal(a is b, True),
    whole,
    {"policy": adapted(), "value": params},
  )
  assert lora.split(tiny_params()) == ({}, tiny_params())


def batch():
  return TokenBatch(TOKENS, jnp.ones(TOKENS.shape, bool))


def make_step(tx):
  return functools.partial(sft.make_sft_step, tx=tx, config=sft.SFTConfig())


def test_a_step_moves_the_adapters_along_their_gradient():
  frozen, trained = lora.split(adapted())
  tx = optax.sgd(0.1)

  def loss(trained):
    whole = join(frozen, trained)
    return sft.loss_fn(whole, batch(), jax.random.key(0), apply_fn=MODEL.apply)[0]

  grads = jax.jit(jax.grad(loss))(trained)
  want = jax.tree.map(lambda x, g: x - 0.1 * g, trained, grads)
  step = freeze(make_step(tx), MODEL.apply, frozen)
  before = jax.device_get(frozen)
  state, metrics = step(init_state(jax.tree.map(jnp.copy, trained), tx), batch(), jax.random.key(0))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), state.params, want)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
  assert metrics["grad_norm"] > 1e-3


def test_a_step_on_a_mesh_holds_the_base_once_and_moves_nothing():
  mesh, tx = sharding.make_mesh("fsdp:4,tensor:2"), optax.adam(1e-3)
  places = sharding.named_shardings(adapted(), mesh, sharding.DECODER_RULES)
  frozen, trained = lora.split(jax.device_put(adapted(), places))
  state = init_state(trained, tx)
  where = sharding.named_shardings(state, mesh, sharding.DECODER_RULES)
  state = jax.device_put(state, where)
  assert state.params["layers"]["mlp"]["up"]["lora_a"].sharding.spec[1] == "fsdp"
  step = freeze(make_step(tx), MODEL.apply, frozen, state_shardings=where)
  for _ in range(2):
    before = state
    state, _ = step(state, sharding.place_batch(batch(), mesh), jax.random.key(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
    moved = [
      x.sharding
      for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True)
      if not x.sharding.is_equivalent_to(place, x.ndim)
    ]
    assert moved == []
  assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2"])
def test_a_merged_folder_computes_the_same(family, tmp_path):
  config = FAMILY_MODELS[family]
  params = adapted(model=config)
  hf.save_folder(tmp_path, lora.merge(params), config, token_ids={"eos_token_id": 1})
  read, _ = hf.parse_config(tmp_path)
  model = build(read)
  again = hf.load_params(tmp_path, model)
  tokens = TOKENS % config.vocab_size
  want = jax.jit(build(config).apply)(params, tokens)
  np.testing.assert_allclose(jax.jit(model.apply)(again, tokens), want, atol=2e-5)


@pytest.mark.parametrize(
  ("settings", "message"),
  [({"rank": -1}, "rank"), ({"alpha": 0.0}, "alpha"), ({"alpha": float("nan")}, "alpha")],
)
def test_impossible_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    lora.LoRAConfig(**settings)


def test_an_unknown_target_is_refused_with_those_there_are():
  config = lora.LoRAConfig(rank=2, targets=("q", "gate", "embed"))
  with pytest.raises(ValueError, match=r"--lora\.targets names embed; .* k, o, q, v, down"):
    lora.init(jax.random.key(0), tiny_params(), config)
