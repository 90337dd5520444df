"""Tests of every algorithm: neither mesh nor micro-batches change the trained params."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import generation, sharding
from rlhf_jax.algorithms import (
  dpo,
  nash_md,
  ppo,
  preference_model,
  rest,
  reward_model,
  rollouts,
  sft,
)
from rlhf_jax.models import actor_critic, build
from rlhf_jax.train_step import OptimConfig, init_state, make_optimizer
from rlhf_jax.types import ComparisonBatch, Rollout, TokenBatch
from tests.testing import TINY_MODEL as CONFIG
from tests.testing import compilations, tiny_params

ROWS, PROMPT, T = 16, 3, 8
STEPS = 3
STOPS = (2,)
SAMPLING = generation.SamplingConfig(max_new_tokens=T - PROMPT, temperature=0.7)


def optimizer():
  # A larger eps than usual: Adam turns the rounding of a gradient near 0 into a full step.
  return make_optimizer(OptimConfig(learning_rate=3e-3, eps=1e-4, weight_decay=0.01), STEPS)


def token_batch(*leading, seed=0) -> TokenBatch:
  """Responses of unequal lengths."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, 16, size=(*leading, T)).astype(np.int32)
  end = rng.integers(PROMPT + 1, T + 1, size=(*leading, 1))
  return TokenBatch(tokens, (np.arange(T) >= PROMPT) & (np.arange(T) < end))


def prompts(seed=0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Tokens and mask of prompts of one to three tokens, padded on the left, and their ids."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, 16, size=(ROWS, PROMPT)).astype(np.int32)
  mask = np.arange(PROMPT) >= PROMPT - rng.integers(1, PROMPT + 1, size=(ROWS, 1))
  return tokens, mask, np.arange(ROWS, dtype=np.int32)


def make_sampler(model, wrap=lambda *functions: functions):
  decode, init_cache = wrap(model.decode, model.init_cache)
  return generation.make_generate(decode, init_cache, SAMPLING, stop_ids=STOPS, pad_id=0)


def judged(rollout) -> np.ndarray:
  """[B] float32, different for different responses."""
  tokens, on = jax.device_get((rollout.tokens, rollout.response_mask))
  return np.where(on, np.sin(tokens), 0).sum(1).astype(np.float32)


def placer(mesh):
  """`put(tree, is_state=False)` on a mesh, or on the first device for None."""

  def put(tree, is_state=False):
    if mesh is None:
      return jax.device_put(tree, jax.devices()[0])
    if is_state:
      return jax.device_put(tree, sharding.named_shardings(tree, mesh, sharding.DECODER_RULES))
    return sharding.place_batch(tree, mesh)

  return put


def run_sft(mesh, microbatches):
  model, tx, put = build(CONFIG, mesh=mesh), optimizer(), placer(mesh)
  step = sft.make_sft_step(model.apply, tx, sft.SFTConfig(microbatches=microbatches))
  state = put(init_state(jax.jit(model.init)(jax.random.key(0)), tx), is_state=True)
  return loop(step, state, lambda i, state: put(token_batch(ROWS, seed=i)))


def run_reward_model(mesh, microbatches):
  model, tx, put = build(CONFIG, "scalar", mesh=mesh), optimizer(), placer(mesh)
  config = reward_model.RewardModelConfig(centering_coef=0.1, microbatches=microbatches)
  step = reward_model.make_reward_model_step(model.apply, tx, config)
  state = put(init_state(jax.jit(model.init)(jax.random.key(0)), tx), is_state=True)
  return loop(step, state, lambda i, state: put(token_batch(ROWS, 2, seed=i)))


def run_dpo(mesh, microbatches):
  model, tx, put = build(CONFIG, mesh=mesh), optimizer(), placer(mesh)
  config = dpo.DPOConfig(microbatches=microbatches)
  step = dpo.make_dpo_step(model.apply, tx, config)
  state = put(init_state(jax.jit(model.init)(jax.random.key(0)), tx), is_state=True)
  reference = put(jax.jit(model.init)(jax.random.key(9)), is_state=True)  # Another model.
  refer = jax.jit(functools.partial(dpo.reference_logprobs, model.apply, config=config))

  def next_batch(i, state):
    del state
    pairs = put(token_batch(ROWS, 2, seed=i))
    return dpo.DPOBatch(pairs, refer(reference, pairs))

  return loop(step, state, next_batch)


def run_ppo(mesh, microbatches):
  policy, critic = build(CONFIG, mesh=mesh), build(CONFIG, "scalar", mesh=mesh)
  tx, put = optimizer(), placer(mesh)
  config = ppo.PPOConfig(epochs=2, minibatches=2, microbatches=microbatches, normalize_scores=True)
  apply = actor_critic(policy, critic)
  step = ppo.make_ppo_step(apply, tx, config, temperature=SAMPLING.temperature)
  experience = ppo.make_experience(apply, policy.apply, config, temperature=SAMPLING.temperature)
  generate = make_sampler(policy)
  init = lambda key: {"policy": policy.init(key), "value": critic.init(key)}  # noqa: E731
  state = put(init_state(jax.jit(init)(jax.random.key(0)), tx), is_state=True)
  reference = put(jax.jit(policy.init)(jax.random.key(9)), is_state=True)  # Another model.
  control = ppo.init_control(config)
  sampled = []

  def next_batch(i, state):
    nonlocal control
    rollout = generate(state.params["policy"], *put(prompts(i)), jax.random.key(i))
    sampled.append(np.asarray(rollout.tokens))
    scores = judged(rollout)
    scores[i] = np.nan  # A row without a score.
    ended = generation.ended(rollout, STOPS)
    batch, control, metrics = experience(
      state.params, reference, control, rollout, put(scores), ended
    )
    assert abs(metrics["kl/ref"]) > 0.1
    return batch

  return loop(step, state, next_batch, sampled)


def run_preference_model(mesh, microbatches):
  model, tx, put = build(CONFIG, "scalar", mesh=mesh), optimizer(), placer(mesh)
  config = preference_model.PreferenceModelConfig(microbatches=microbatches)
  step = preference_model.make_preference_model_step(model.apply, tx, config)
  state = put(init_state(jax.jit(model.init)(jax.random.key(0)), tx), is_state=True)

  def next_batch(i, state):
    del state
    shares = np.random.default_rng(i).choice([0.0, 0.3, 1.0], ROWS).astype(np.float32)
    return put(ComparisonBatch(*token_batch(ROWS, 2, seed=i), shares))

  return loop(step, state, next_batch)


def run_nash_md(mesh, microbatches):
  model, tx, put = build(CONFIG, mesh=mesh), optimizer(), placer(mesh)
  config = nash_md.NashMDConfig(objective="regression", tau=0.5, microbatches=microbatches)
  step = nash_md.make_nash_md_step(model.apply, tx, config, temperature=SAMPLING.temperature)
  state = put(init_state(jax.jit(model.init)(jax.random.key(0)), tx), is_state=True)

  reference = put(jax.jit(model.init)(jax.random.key(9)), is_state=True)  # Another model.
  generate = make_sampler(model, generation.make_mixture)
  refer = jax.jit(functools.partial(rollouts.rollout_logprobs, model.apply))
  sampled = []

  def next_batch(i, state):
    own, other = (
      generation.MixtureParams(state.params, reference, mix) for mix in (0.0, config.mix)
    )
    pair = [
      generate(params, *put(prompts(i)), jax.random.key(10 * i + n))
      for n, params in enumerate((own, other, own))
    ]
    sampled.extend(np.asarray(rollout.tokens) for rollout in pair)
    wins = [np.float32(judged(rollout) > judged(pair[1])) for rollout in pair[::2]]
    stack = lambda *x: jnp.stack(x, axis=1)  # noqa: E731
    refs = [refer(reference, rollout, SAMPLING.temperature)[0] for rollout in pair[::2]]
    return nash_md.NashMDBatch(
      rollout=jax.tree.map(stack, *pair[::2]),
      ref_logprobs=stack(*refs),
      preference=put(np.stack(wins, axis=1)),
      tau=put(np.full(ROWS, 0.5, np.float32)),
    )

  return loop(step, state, next_batch, sampled)


def run_rest(mesh, microbatches):
  model, tx, put = build(CONFIG, mesh=mesh), optimizer(), placer(mesh)
  config = rest.RestConfig(kappa=0.3, microbatches=microbatches)
  improve = rest.make_rest_step(model.apply, tx, config)
  state = put(init_state(jax.jit(model.init)(jax.random.key(0)), tx), is_state=True)
  reference = put(jax.jit(model.init)(jax.random.key(9)), is_state=True)  # Another model.
  generate = make_sampler(model)
  sampled = []

  def next_batch(i, state):
    tokens, mask, ids = prompts(i)
    whole = np.ones_like(mask)  # Nothing on the left, so sequences are padded on the right only.
    rollout = generate(state.params, *put((tokens, whole, ids)), jax.random.key(i))
    sampled.append(np.asarray(rollout.tokens))
    weights = rest.kept_weights(judged(rollout)[:, None], 0.5, config)[:, 0]
    return rest.RestBatch(TokenBatch(rollout.tokens, rollout.response_mask), put(weights))

  def step(state, batch, key):
    return improve(state, batch, reference, key)

  return loop(step, state, next_batch, sampled)


def loop(step, state, next_batch, sampled=()) -> tuple[Any, list[dict[str, float]], list]:
  """Params, metrics and what was sampled after three steps."""
  metrics, on_one = [], len(state.step.sharding.device_set) == 1
  with compilations() as names:
    for i in range(STEPS):
      batch, before = next_batch(i, state), state
      state, now = step(state, batch, jax.random.key(0))
      metrics.append({name: float(value) for name, value in now.items()})
      if on_one:  # On a mesh see test_a_step_keeps_the_placement_of_its_state.
        assert all(x.is_deleted() for x in jax.tree.leaves(before)), "the state is not donated"
  assert state.step == STEPS
  if on_one:
    assert names.count("step") == 1
  return jax.device_get(state.params), metrics, list(sampled)


RUNS = {
  "sft": run_sft,
  "reward_model": run_reward_model,
  "preference_model": run_preference_model,
  "dpo": run_dpo,
  "ppo": run_ppo,
  "nash_md": run_nash_md,
  "rest": run_rest,
}


@functools.cache
def single_device(name):
  return RUNS[name](None, 1)


def assert_close(a, b, atol):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=atol), a, b)


@pytest.mark.parametrize("name", RUNS)
def test_three_steps_on_one_device(name):
  params, metrics, sampled = single_device(name)
  assert all(np.isfinite(list(m.values())).all() for m in metrics)
  assert all(m["skipped_steps"] == 0 and m["grad_norm"] > 1e-3 for m in metrics)
  assert all(a["loss"] != b["loss"] for a, b in itertools.pairwise(metrics))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
  assert len({tokens.tobytes() for tokens in sampled}) == len(sampled)


@pytest.mark.parametrize("spec", ["data:8", "fsdp:8", "fsdp:4,tensor:2"])
@pytest.mark.parametrize("name", RUNS)
def test_eight_devices_equal_one(name, spec):
  want_params, want_metrics, want_sampled = single_device(name)
  params, metrics, sampled = RUNS[name](sharding.make_mesh(spec), 1)
  for tokens, want in zip(sampled, want_sampled, strict=True):
    np.testing.assert_array_equal(tokens, want)
  assert_close(params, want_params, 1e-5)
  assert_close(metrics, want_metrics, 1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_microbatches_change_nothing(name):
  want_params, want_metrics, _ = single_device(name)
  params, metrics, _ = RUNS[name](None, 4)
  assert_close(params, want_params, 1e-5)
  assert_close(metrics, want_metrics, 1e-4)


def language_losses(model, critic):
  """Losses over the vocabulary: name -> `(params, batch, key) -> (loss, metrics)`."""
  apply = model.apply

  def of_policy(loss_fn, **settings):
    return lambda params, *args: loss_fn(params["policy"], *args, apply_fn=apply, **settings)

  def forward_kl(params, *args):  # To another model.
    ref_params = jax.tree.map(lambda x: x + 0.1, params["policy"])
    loss = of_policy(rest.loss_fn, config=rest.RestConfig(kappa=0.5), ref_params=ref_params)
    return loss(params, *args)

  return {
    "sft": of_policy(sft.loss_fn),
    "dpo": of_policy(dpo.loss_fn, config=dpo.DPOConfig(reweight=True, sft_coef=0.3)),
    "ppo": functools.partial(
      ppo.loss_fn,
      apply_fn=actor_critic(model, critic),
      config=ppo.PPOConfig(entropy_coef=0.2),
      temperature=0.7,
    ),
    "rest": forward_kl,
    "nash_md": of_policy(nash_md.loss_fn, config=nash_md.NashMDConfig(), temperature=0.7),
  }


def language_batch(name, rows, length):
  """Random rows, whose second half is the response."""
  rng = np.random.default_rng(0)
  half = length // 2

  def tokens(*leading):
    mask = np.broadcast_to(np.arange(length) >= half, (*leading, length))
    return TokenBatch(rng.integers(3, 16, (*leading, length)).astype(np.int32), mask)

  def floats(*shape):
    return rng.normal(-2, 0.3, shape).astype(np.float32)

  def rollout(*leading):
    ids, mask = tokens(*leading)
    return Rollout(ids, ~mask, mask, floats(*leading, half))

  if name == "sft":
    return tokens(rows)
  if name == "dpo":
    return dpo.DPOBatch(tokens(rows // 2, 2), floats(rows // 2, 2))
  if name == "rest":
    return rest.RestBatch(tokens(rows), rng.random(rows).astype(np.float32))
  if name == "nash_md":
    return nash_md.NashMDBatch(
      rollout(rows, 1), floats(rows, 1, half), -floats(rows, 1), np.full(rows, 0.5, np.float32)
    )
  arrays = [floats(rows, half) for _ in range(5)]
  return ppo.PPOBatch(rollout(rows), np.ones((rows, half), bool), *arrays)


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo", "rest", "nash_md"])
def test_logits_of_a_few_tokens_at_a_time_change_nothing(name):
  batch, critic, found = language_batch(name, 4, 10), build(CONFIG, "scalar"), []
  params = {"policy": tiny_params(), "value": tiny_params("scalar")}
  key = jax.random.key(0)
  for chunk in (None, 3 * CONFIG.vocab_size):
    loss = language_losses(build(CONFIG, logit_chunk=chunk), critic)[name]
    found.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, key))
  ((want, want_metrics), want_grads), ((value, metrics), grads) = found
  largest = max(np.abs(x).max() for x in jax.tree.leaves(want_grads))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  jax.tree.map(functools.partial(close, atol=1e-6), (value, metrics), (want, want_metrics))
  jax.tree.map(functools.partial(close, atol=1e-6 * largest), grads, want_grads)


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo"])
def test_memory_does_not_grow_with_the_logits(name):
  config = dataclasses.replace(CONFIG, vocab_size=2**17)
  policy, critic = build(config), build(config, "scalar")
  init = lambda key: {"policy": policy.init(key), "value": critic.init(key)}  # noqa: E731
  params, key = jax.eval_shape(init, jax.random.key(0)), jax.random.key(0)
  batch, found = language_batch(name, 4, 512), []
  for chunk in (None, 2**22):
    loss = language_losses(build(config, logit_chunk=chunk), critic)[name]
    step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, batch, key)
    found.append(step.compile().memory_analysis().temp_size_in_bytes)
  assert found[0] > 5 * found[1], found


def test_a_step_keeps_the_placement_of_its_state():
  mesh, tx = sharding.make_mesh("fsdp:4,tensor:2"), optimizer()
  model = build(CONFIG, mesh=mesh)
  before = init_state(jax.jit(model.init)(jax.random.key(0)), tx)
  places = sharding.named_shardings(before, mesh, sharding.DECODER_RULES)
  step = sft.make_sft_step(model.apply, tx, sft.SFTConfig(), state_shardings=places)
  before = jax.device_put(before, places)
  batch = sharding.place_batch(token_batch(ROWS), mesh)
  after, _ = step(before, batch, jax.random.key(0))
  moved = [
    jax.tree_util.keystr(path)
    for (path, x), place in zip(
      jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(places), strict=True
    )
    if not x.sharding.is_equivalent_to(place, x.ndim)
  ]
  assert moved == []
  assert all(x.is_deleted() for x in jax.tree.leaves(before))
