"""Mixtures of experts against one token at a time, whole and on meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.losses import logprobs
from rlhf_jax.models import build, experts, lora
from tests.testing import FAMILY_MODELS, full

CONFIG = FAMILY_MODELS["qwen3_moe"]
B, T, D, F, E, K = 4, 6, 8, 10, 4, 2


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {"x": (B, T, D), "weights": (B, T, K), "gate": (E, D, F), "up": (E, D, F)}
  shapes |= {"down": (E, F, D)}
  arrays = {name: 0.4 * rng.normal(size=shape) for name, shape in shapes.items()}
  # Two different ones each; of the last expert only one row is a customer, of the third none.
  chosen = np.stack([rng.permutation(2) for _ in range(B * T)]).reshape(B, T, K)
  chosen[1, 2, 0] = 3
  return {name: np.asarray(x, np.float32) for name, x in arrays.items()} | {"chosen": chosen}


def one_by_one(x, chosen, weights, gate, up, down):
  out = np.zeros(x.shape)
  for b, t, k in np.ndindex(chosen.shape):
    e = chosen[b, t, k]
    g, u = (np.float64(x[b, t]) @ w[e] for w in (gate, up))
    out[b, t] += weights[b, t, k] * (g / (1 + np.exp(-g)) * u @ down[e])
  return out


@pytest.mark.parametrize("spec", ["data:8", "data:2,tensor:4", "fsdp:4,tensor:2"])
def test_the_mixture_equals_one_token_at_a_time(spec):
  given = inputs()
  config = dataclasses.replace(CONFIG, width=D, mlp_width=F, experts=E, experts_per_token=K)
  mixes = {
    "whole": experts.make_mix(config),
    "split": experts.make_mix(config, sharding.make_mesh(spec)),
  }
  want = one_by_one(**given)
  floats = {name: x for name, x in given.items() if name != "chosen"}
  gradients = {}
  for name, mix in mixes.items():

    def loss(floats, mix=mix):
      out = mix(**floats, chosen=given["chosen"])
      return jnp.sum(jnp.sin(out)), out

    gradients[name], out = jax.jit(jax.grad(loss, has_aux=True))(floats)
    np.testing.assert_allclose(out, want, atol=1e-6)
  for name, gradient in gradients["split"].items():
    np.testing.assert_allclose(gradient, gradients["whole"][name], atol=1e-6, err_msg=name)
  # Of an expert that nobody chose nothing is learnt.
  for name in ("gate", "up", "down"):
    assert not gradients["whole"][name][2].any() and gradients["whole"][name][3].any()


def test_gradients_are_finite_differences():
  given = inputs(1)
  mix = experts.make_mix(dataclasses.replace(CONFIG, experts=E, experts_per_token=K))
  floats = {name: x for name, x in given.items() if name != "chosen"}
  rng = np.random.default_rng(2)
  direction = {name: rng.normal(size=x.shape) for name, x in floats.items()}

  def loss(step):  # In float64.
    moved = {name: x + step * direction[name] for name, x in floats.items()}
    return np.sin(one_by_one(chosen=given["chosen"], **moved)).sum()

  gradient = jax.grad(lambda f: jnp.sum(jnp.sin(mix(**f, chosen=given["chosen"]))))(floats)
  found = sum(np.sum(np.float64(gradient[name]) * direction[name]) for name in floats)
  np.testing.assert_allclose(found, (loss(1e-5) - loss(-1e-5)) / 2e-5, rtol=1e-4)


def test_a_token_does_not_depend_on_other_rows():
  """No expert is ever full: a sampler of few rows computes what a trainer of many does."""
  given = inputs(3)
  mix = jax.jit(experts.make_mix(dataclasses.replace(CONFIG, experts=E, experts_per_token=K)))
  whole = mix(**given)
  rows = ("x", "chosen", "weights")
  for b in range(B):
    alone = mix(**{name: x[b : b + 1] if name in rows else x for name, x in given.items()})
    np.testing.assert_allclose(alone[0], whole[b], atol=1e-6)


@pytest.mark.parametrize(
  "spec", ["data:2,fsdp:2,tensor:2", pytest.param("fsdp:4,tensor:2", marks=full)]
)
def test_a_model_on_a_mesh_computes_what_one_device_does(spec):
  mesh = sharding.make_mesh(spec)
  tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 12))
  key = jax.random.key(0)
  whole, split = build(CONFIG), build(CONFIG, mesh=mesh)
  params = jax.jit(whole.init)(key)
  shardings = sharding.named_shardings(params, mesh, sharding.DECODER_RULES)
  kernel = shardings["layers"]["mlp"]["experts"]["gate"]["kernel"]
  assert kernel.spec[1] == "tensor"  # Whole experts.

  def loss(model):
    return lambda params: (
      -jnp.mean(logprobs.next_token_logprobs(model.apply(params, tokens), tokens))
    )

  value, gradient = jax.jit(jax.value_and_grad(loss(whole)))(params)
  placed = jax.device_put(params, shardings)
  value_split, gradient_split = jax.jit(jax.value_and_grad(loss(split)))(placed)
  np.testing.assert_allclose(value_split, value, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient_split, gradient)
  # Prefill, then a token: as a sampler does it.
  logits = [
    jax.jit(lambda p, model=model: two_calls(model, p, tokens))(p)
    for model, p in ((whole, params), (split, placed))
  ]
  np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)
  np.testing.assert_allclose(logits[0], whole.apply(params, tokens)[:, -1], atol=1e-5)


def two_calls(model, params, tokens):
  mask = jnp.ones(tokens.shape, bool)
  cache = model.init_cache(*tokens.shape)
  _, cache = model.decode(params, tokens[:, :-1], cache, mask=mask[:, :-1])
  return model.decode(params, tokens[:, -1:], cache, mask=mask[:, -1:])[0]


def test_experts_get_no_adapter():
  params = jax.eval_shape(build(CONFIG).init, jax.random.key(0))
  adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2))
  assert adapters["layers"].keys() == {"attention"}
  with pytest.raises(ValueError, match="names gate; the layers of this model are k, o, q, v"):
    lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=2, targets=("gate",)))


def test_experts_that_do_not_split_are_refused():
  shapes = jax.eval_shape(build(CONFIG).init, jax.random.key(0))
  mesh = sharding.make_mesh("data:2,tensor:4")
  with pytest.raises(ValueError, match="mlp/experts/.* has size 6, which is not divisible by"):
    sharding.named_shardings(
      {"layers": {"mlp": shapes["layers"]["mlp"]}}, mesh, sharding.DECODER_RULES
    )
