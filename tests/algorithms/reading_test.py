"""Numbers that a model gives for sampled responses: padded, packed, and as the sampler had them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.algorithms import reading
from rlhf_jax.generation import SamplingConfig, ended, make_generate
from rlhf_jax.models import actor_critic, build
from tests.algorithms import toy
from tests.testing import TINY_MODEL as CONFIG
from tests.testing import tiny_params

P, R = 4, 6


@functools.cache
def transformer():
  """A policy and a critic, and the params of both."""
  policy, critic = build(CONFIG), build(CONFIG, head="scalar")
  params = {"policy": tiny_params(), "value": tiny_params("scalar", 1)}
  return policy, jax.jit(actor_critic(policy, critic), static_argnames="last"), params


@functools.cache
def sampled(temperature):
  """16 samples behind left-padded prompts of one to four tokens."""
  policy, _, params = transformer()
  generate = make_generate(
    policy.decode,
    policy.init_cache,
    SamplingConfig(max_new_tokens=R, temperature=temperature),
    stop_ids=(1, 2),
    pad_id=0,
  )
  rng = np.random.default_rng(0)
  mask = np.arange(P) >= P - rng.integers(1, P + 1, size=(16, 1))
  tokens = np.where(mask, rng.integers(3, 16, size=(16, P)), 0).astype(np.int32)
  rollout = generate(params["policy"], tokens, mask, np.arange(16), jax.random.key(3))
  done = ended(rollout, (1, 2))
  assert 0 < done.sum() < 16
  return rollout


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_sampler(temperature):
  policy, _, params = transformer()
  params, rollout = params["policy"], sampled(temperature)
  mask = np.asarray(rollout.response_mask[:, P:])
  for packed in (None, reading.Packing(13)):
    now = jax.jit(reading.make_read(policy.apply, temperature, packed))(params, rollout)
    result = np.where(mask, now.logprobs, 0)
    np.testing.assert_allclose(result, rollout.logprobs, atol=1e-5)
  # At another temperature this would show.
  wrong = jax.jit(reading.make_read(policy.apply, 1.3))(params, rollout)
  assert np.abs(np.where(mask, wrong.logprobs - rollout.logprobs, 0)).max() > 0.1


@pytest.mark.parametrize("packed", [None, reading.Packing(13)], ids=["padded", "packed"])
def test_each_row_is_read_as_if_alone(packed):
  _, apply, params = transformer()
  rollout = sampled(0.7)
  read = reading.make_actor_critic_read(apply, 0.7, packed, entropy=True)
  now = jax.jit(read)(params, rollout)
  assert all(x.shape == (16, R) and x.dtype == jnp.float32 for x in now)
  for b in range(4):
    real = np.asarray(rollout.prompt_mask[b] | rollout.response_mask[b])
    tokens = np.asarray(rollout.tokens[b])[real]
    n, prompt = len(tokens), int(rollout.prompt_mask[b].sum())
    padded = np.pad(tokens, (0, P + R - n))[None]
    out, value = apply(params, padded, last=P + R)
    out = np.asarray(out[0], np.float64) / 0.7
    table = out - np.log(np.exp(out).sum(axis=-1, keepdims=True))
    for i in range(n - prompt):
      at = prompt + i - 1  # The position whose output draws response token i.
      np.testing.assert_allclose(now.logprobs[b, i], table[at, tokens[at + 1]], atol=1e-5)
      want = -(np.exp(table[at]) * table[at]).sum()
      np.testing.assert_allclose(now.entropy[b, i], want, atol=1e-5)
      np.testing.assert_allclose(now.values[b, i], value[0, at], atol=1e-5)


@pytest.mark.parametrize("packed", [None, reading.Packing(13)], ids=["padded", "packed"])
def test_without_a_critic_values_are_zero(packed):
  policy = toy.params_of()
  params = {"policy": policy, "value": toy.score_params()}
  rollout = toy.rollout_of(policy, 4)
  ask = {"temperature": 0.7, "packed": packed, "entropy": True}
  single = jax.jit(reading.make_read(toy.language, **ask))(policy, rollout)
  both = jax.jit(reading.make_actor_critic_read(toy.actor_critic, **ask))(params, rollout)
  mask = rollout.response_mask[:, toy.P :]
  single, both = (reading.Reading(*(np.asarray(x)[mask] for x in now)) for now in (single, both))
  assert not single.values.any() and both.values.all()
  np.testing.assert_array_equal(single.logprobs, both.logprobs)
  np.testing.assert_array_equal(single.entropy, both.entropy)


def test_packing_changes_no_number_and_no_gradient_on_a_mesh():
  mesh = sharding.make_mesh("data:2,fsdp:2,tensor:2")
  apply = actor_critic(build(CONFIG, mesh=mesh), build(CONFIG, head="scalar", mesh=mesh))
  _, _, params = transformer()
  rollout = jax.device_get(sampled(0.7))
  cut = P + np.random.default_rng(1).integers(1, R + 1, size=(16, 1))
  short = rollout.response_mask & (np.arange(P + R) < cut)
  rollout = sharding.place_batch(rollout._replace(response_mask=short), mesh)
  places = sharding.named_shardings(params, mesh, sharding.DECODER_RULES)
  params = jax.device_put(jax.device_get(params), places)
  mask, results = rollout.response_mask[:, P:], []
  for packed in (None, reading.Packing(13, 8)):
    read = reading.make_actor_critic_read(apply, 0.7, packed, entropy=True)

    def total(params, read=read):
      now = [jnp.where(mask, x, 0.0) for x in read(params, rollout)]
      return sum(jnp.sum(jnp.sin(x)) for x in now), now

    results.append(jax.jit(jax.value_and_grad(total, has_aux=True))(params))
  ((_, want), _), _ = results
  assert all(np.abs(x).max() > 0.1 for x in want)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *results)


def test_sequences_without_room_are_not_numbers():
  policy = toy.params_of()
  rollout = toy.rollout_of(policy, 8)
  mask = rollout.response_mask[:, toy.P :]
  enough, few = (
    jax.jit(reading.make_read(toy.language, 1.0, reading.Packing(13, rows)))(policy, rollout)
    for rows in (None, 3)
  )
  assert np.isfinite(np.asarray(enough.logprobs)[mask]).all()
  lost = np.isnan(np.asarray(few.logprobs))
  assert 0 < lost.all(axis=1).sum() < 8
  assert lost[mask].sum() == mask[lost.all(axis=1)].sum()


def test_rows_of_a_packing():
  assert reading.Packing(10).shape(4, 10) == (4, 10)
  assert reading.Packing(21).shape(4, 10) == (2, 21)
  assert reading.Packing(21).shape(5, 10) == (3, 21)
  assert reading.Packing(21, 7).shape(5, 10) == (7, 21)
  with pytest.raises(ValueError, match="packed_length must be at least 10, .* got 8"):
    reading.Packing(8).shape(4, 10)


def test_rows_without_a_finite_score_do_not_count():
  rollout = toy.rollout_of(toy.params_of(), 4)
  scores = jnp.array([0.0, jnp.nan, jnp.inf, -1.0])
  rows, mask = reading.finite_rows(rollout, scores)
  want = rollout.response_mask[:, toy.P :].copy()
  want[1:3] = False
  np.testing.assert_array_equal(mask, want)
  assert rows.tolist() == [True, False, False, True]
  # What stands behind the end of a response may be anything.
  ref = np.where(rollout.response_mask[:, toy.P :], 0.0, np.nan)
  np.testing.assert_array_equal(reading.finite_rows(rollout, scores, ref)[1], want)
  ref[3, 0] = -np.inf
  assert reading.finite_rows(rollout, scores, ref)[0].tolist() == [True, False, False, False]


@pytest.mark.parametrize("bad", [0.0, np.nan, 1e30])
def test_ratio_metrics_are_those_of_loops(bad):
  rng = np.random.default_rng(0)
  mask = rng.random((5, 6)) < 0.6
  old = rng.normal(size=(5, 6)).astype(np.float32)
  new = old + 0.2 * rng.normal(size=(5, 6)).astype(np.float32)
  metrics = reading.ratio_metrics(
    np.where(mask, new, bad), np.where(mask, old, bad), mask, 0.1, 0.2
  )
  ratio = np.exp(np.float64(new - old))[mask]
  want = {
    "clip_fraction": np.mean((ratio < 0.9) | (ratio > 1.2)),
    "kl/old": np.mean(ratio - 1 - np.log(ratio)),
    "ratio/mean": ratio.mean(),
    "ratio/max": ratio.max(),
    "ratio/deviation/max": np.abs(ratio - 1).max(),
  }
  units = {name: metrics.pop(name) for name in list(metrics) if name.startswith("weight/")}
  assert units == dict.fromkeys((f"weight/{n}" for n in want if not n.endswith("/max")), mask.sum())
  assert metrics.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
