import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.generation import MixtureParams, SamplingConfig, make_generate, make_mixture, sample
from rlhf_jax.losses import game
from rlhf_jax.models import ModelConfig, build
from tests.testing import compilations

V, P, R, EOS, PAD = 16, 8, 10, 3, 0
MIX = 0.3
CONFIG = SamplingConfig(max_new_tokens=R, samples_per_prompt=2)
TINY = ModelConfig(
  vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp_width=24, init_std=0.25
)


class Case(NamedTuple):
  model: object
  params: MixtureParams
  tokens: np.ndarray  # [8, P], left padded by 0 to 7.
  mask: np.ndarray


@pytest.fixture(scope="module")
def case():
  model = build(TINY)
  policy, ref = (jax.jit(model.init)(jax.random.key(seed)) for seed in range(2))
  rng = np.random.default_rng(0)
  mask = np.arange(P)[None] >= np.arange(8)[:, None]
  tokens = np.where(mask, rng.integers(4, V, (8, P)), PAD).astype(np.int32)
  return Case(model, MixtureParams(policy, ref, jnp.float32(MIX)), tokens, mask)


def generate(case, decode, init_cache, params, config=CONFIG):
  make = make_generate(decode, init_cache, config, stop_ids=(EOS,), pad_id=PAD)
  rollout = make(params, case.tokens, case.mask, np.arange(8, dtype=np.int32), jax.random.key(5))
  return jax.device_get(rollout)


def mixed(case, params=None, config=CONFIG):
  decode, init_cache = make_mixture(case.model.decode, case.model.init_cache)
  return generate(case, decode, init_cache, case.params if params is None else params, config)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_are_those_of_the_teacher_forced_mixture(case, temperature):
  """Same keys, same tokens, from full forward passes of both models without a cache."""
  config = dataclasses.replace(CONFIG, temperature=temperature)
  rollout = mixed(case, config=config)
  apply = jax.jit(case.model.apply)
  compared = 0
  for row in range(16):
    prompt = case.tokens[row // 2][case.mask[row // 2]]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), row // 2), row % 2)
    tokens = np.zeros((1, P + R), np.int32)
    tokens[0, : len(prompt)] = prompt
    response = rollout.tokens[row, P:][rollout.response_mask[row, P:]]
    for t, drawn in enumerate(response):
      at = len(prompt) + t
      segments = (np.arange(P + R)[None] < at).astype(np.int32)
      policy, ref = (
        apply(params, tokens, segment_ids=segments)[:, at - 1] for params in case.params[:2]
      )
      logits = game.mixture_logits(policy, ref, MIX)
      token, logprob = sample(logits, jax.random.fold_in(key, t)[None], config)
      assert int(token[0]) == drawn
      np.testing.assert_allclose(rollout.logprobs[row, t], logprob[0], atol=1e-5)
      tokens[0, at] = drawn
      compared += 1
    assert len(response) == R or response[-1] == EOS
  assert compared > 50


@pytest.mark.parametrize(("mix", "alone"), [(0.0, 0), (1.0, 1)])
def test_the_ends_are_the_two_models(case, mix, alone):
  rollout = mixed(case, case.params._replace(mix=jnp.float32(mix)))
  want = generate(case, case.model.decode, case.model.init_cache, case.params[alone])
  np.testing.assert_array_equal(rollout.tokens, want.tokens)
  np.testing.assert_allclose(rollout.logprobs, want.logprobs, atol=1e-5)


def test_a_token_costs_two_forward_passes_and_two_caches(case):
  decode, init_cache = make_mixture(case.model.decode, case.model.init_cache)
  slots = 32

  def cost(decode, init_cache, params):
    cache = jax.eval_shape(lambda: init_cache(8, slots))
    token, mask = jnp.zeros((8, 1), jnp.int32), jnp.ones((8, 1), bool)
    compiled = jax.jit(decode).lower(params, token, cache, mask=mask).compile()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return compiled.cost_analysis()["flops"], size

  one = cost(case.model.decode, case.model.init_cache, case.params.policy)
  two = cost(decode, init_cache, case.params)
  np.testing.assert_allclose(two[0] / one[0], 2.0, atol=0.1)
  assert two[1] == 2 * one[1]
  heads_and_depth = TINY.layers * TINY.kv_heads * TINY.head_dim
  # Keys and values of each model in float32, and a position, for each row and slot; one counter
  # each.
  assert two[1] == 2 * (8 * slots * (2 * 4 * heads_and_depth + 4) + 4)


def test_another_mixture_compiles_nothing(case):
  decode, init_cache = make_mixture(case.model.decode, case.model.init_cache)
  make = make_generate(decode, init_cache, CONFIG, stop_ids=(EOS,), pad_id=PAD)
  with compilations() as names:
    for mix in (0.1, 0.9):
      params = case.params._replace(mix=jnp.float32(mix))
      make(params, case.tokens, case.mask, np.arange(8, dtype=np.int32), jax.random.key(5))
  assert names.count("generate") == 1
