"""What holds for every algorithm: neither mesh nor micro-batches change what is learnt."""

import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.algorithms import nash_md, ppo, preference_model, reward_model, sft
from rlhf_jax.models import actor_critic, build
from rlhf_jax.train_step import OptimConfig, init_state, make_optimizer
from rlhf_jax.types import ComparisonBatch, Rollout, TokenBatch
from tests.testing import TINY_MODEL as CONFIG
from tests.testing import compilations

ROWS, PROMPT, T = 16, 3, 8
STEPS = 3


def optimizer():
  # A larger eps than usual: Adam turns the rounding of a gradient near 0 into a full step.
  return make_optimizer(OptimConfig(learning_rate=3e-3, eps=1e-4, weight_decay=0.01), STEPS)


def token_batch(*leading, seed=0) -> TokenBatch:
  """Responses of unequal lengths."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, 16, size=(*leading, T)).astype(np.int32)
  end = rng.integers(PROMPT + 1, T + 1, size=(*leading, 1))
  return TokenBatch(tokens, (np.arange(T) >= PROMPT) & (np.arange(T) < end))


def run_sft(put, microbatches):
  model, tx = build(CONFIG), optimizer()
  step = sft.make_sft_step(model.apply, tx, sft.SFTConfig(microbatches=microbatches))
  state = put(init_state(jax.jit(model.init)(jax.random.key(0)), tx), is_state=True)
  return loop(step, state, lambda i, state: put(token_batch(ROWS, seed=i)))


def run_reward_model(put, microbatches):
  model, tx = build(CONFIG, head="scalar"), optimizer()
  config = reward_model.RewardModelConfig(centering_coef=0.1, microbatches=microbatches)
  step = reward_model.make_reward_model_step(model.apply, tx, config)
  state = put(init_state(jax.jit(model.init)(jax.random.key(0)), tx), is_state=True)
  return loop(step, state, lambda i, state: put(token_batch(ROWS, 2, seed=i)))


def run_ppo(put, microbatches):
  policy, critic, tx = build(CONFIG), build(CONFIG, head="scalar"), optimizer()
  config = ppo.PPOConfig(epochs=2, minibatches=2, microbatches=microbatches, normalize_scores=True)
  apply = actor_critic(policy, critic)
  step = ppo.make_ppo_step(apply, tx, config, temperature=0.7)
  experience = ppo.make_experience(apply, policy.apply, config, temperature=0.7)
  init = lambda key: {"policy": policy.init(key), "value": critic.init(key)}  # noqa: E731
  state = put(init_state(jax.jit(init)(jax.random.key(0)), tx), is_state=True)
  reference = put(jax.jit(policy.init)(jax.random.key(9)), is_state=True)  # Another model.
  control = ppo.init_control(config)

  def next_batch(i, state):
    nonlocal control
    rng = np.random.default_rng(i)
    tokens, response = token_batch(ROWS, seed=i)
    # Left padding before prompts of one to three tokens.
    prompt = np.arange(T) >= PROMPT - rng.integers(1, PROMPT + 1, size=(ROWS, 1))
    prompt &= np.arange(T) < PROMPT
    scores = rng.normal(size=ROWS).astype(np.float32)
    scores[i] = np.nan  # A row without a score.
    logprobs = np.log(rng.uniform(0.8, 1.2, (ROWS, T - PROMPT)) / 16).astype(np.float32)
    rollout = Rollout(tokens, prompt, response, logprobs)
    rollout, scores, done = put((rollout, scores, rng.random(ROWS) < 0.7))
    batch, control, metrics = experience(state.params, reference, control, rollout, scores, done)
    assert abs(metrics["kl/ref"]) > 0.1
    return batch

  return loop(step, state, next_batch)


def run_preference_model(put, microbatches):
  model, tx = build(CONFIG, head="scalar"), optimizer()
  config = preference_model.PreferenceModelConfig(microbatches=microbatches)
  step = preference_model.make_preference_model_step(model.apply, tx, config)
  state = put(init_state(jax.jit(model.init)(jax.random.key(0)), tx), is_state=True)

  def next_batch(i, state):
    del state
    shares = np.random.default_rng(i).choice([0.0, 0.3, 1.0], ROWS).astype(np.float32)
    return put(ComparisonBatch(*token_batch(ROWS, 2, seed=i), shares))

  return loop(step, state, next_batch)


def run_nash_md(put, microbatches):
  model, tx = build(CONFIG), optimizer()
  config = nash_md.NashMDConfig(objective="regression", tau=0.5, microbatches=microbatches)
  step = nash_md.make_nash_md_step(model.apply, tx, config, temperature=0.7)
  state = put(init_state(jax.jit(model.init)(jax.random.key(0)), tx), is_state=True)

  def next_batch(i, state):
    del state
    rng = np.random.default_rng(i)
    tokens, response = token_batch(ROWS, 2, seed=i)
    prompt = np.arange(T) >= PROMPT - rng.integers(1, PROMPT + 1, size=(ROWS, 1, 1))
    prompt = np.broadcast_to(prompt & (np.arange(T) < PROMPT), response.shape)
    logprobs = rng.normal(-3, 0.3, (2, ROWS, 2, T - PROMPT)).astype(np.float32)
    batch = nash_md.NashMDBatch(
      rollout=Rollout(tokens, prompt, response, logprobs[0]),
      ref_logprobs=logprobs[1],
      preference=rng.random((ROWS, 2)).astype(np.float32),
      tau=np.full(ROWS, 0.5, np.float32),
    )
    return put(batch)

  return loop(step, state, next_batch)


def loop(step, state, next_batch) -> tuple[Any, list[dict[str, float]]]:
  """Params and metrics after three steps."""
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
  return jax.device_get(state.params), metrics


RUNS = {
  "sft": run_sft,
  "reward_model": run_reward_model,
  "preference_model": run_preference_model,
  "ppo": run_ppo,
  "nash_md": run_nash_md,
}


@functools.cache
def single_device(name):
  def put(tree, is_state=False):
    del is_state
    return jax.device_put(tree, jax.devices()[0])

  return RUNS[name](put, 1)


def assert_close(a, b, atol):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=atol), a, b)


@pytest.mark.parametrize("name", RUNS)
def test_three_steps_on_one_device(name):
  params, metrics = single_device(name)
  assert all(np.isfinite(list(m.values())).all() for m in metrics)
  assert all(m["skipped_steps"] == 0 and m["grad_norm"] > 1e-3 for m in metrics)
  assert all(a["loss"] != b["loss"] for a, b in itertools.pairwise(metrics))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.parametrize("spec", ["data:8", "fsdp:4,tensor:2"])
@pytest.mark.parametrize("name", RUNS)
def test_eight_devices_equal_one(name, spec):
  mesh = sharding.make_mesh(spec)

  def put(tree, is_state=False):
    if is_state:
      return jax.device_put(tree, sharding.named_shardings(tree, mesh, sharding.DECODER_RULES))
    return sharding.place_batch(tree, mesh)

  want_params, want_metrics = single_device(name)
  params, metrics = RUNS[name](put, 1)
  assert_close(params, want_params, 1e-5)
  assert_close(metrics, want_metrics, 1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_microbatches_change_nothing(name):
  def put(tree, is_state=False):
    del is_state
    return jax.device_put(tree, jax.devices()[0])

  want_params, want_metrics = single_device(name)
  params, metrics = RUNS[name](put, 4)
  assert_close(params, want_params, 1e-5)
  assert_close(metrics, want_metrics, 1e-4)


def test_a_step_keeps_the_placement_of_its_state():
  mesh, model, tx = sharding.make_mesh("fsdp:4,tensor:2"), build(CONFIG), optimizer()
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
