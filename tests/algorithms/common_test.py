"""Tests that hold for every method: neither mesh nor micro-batches change what is learnt.

The cases are those of the test files of the methods, on a toy model. What depends on the model is
tested below them, on a transformer that samples the responses that it learns from.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import algorithms, generation, hlo, sharding
from rlhf_jax.algorithms import (
  dpo,
  ipo_md,
  nash_md,
  opponents,
  pairs,
  ppo,
  preference_model,
  reading,
  rest,
  reward_model,
  selection,
  sft,
)
from rlhf_jax.losses.reward import RunningMoments
from rlhf_jax.models import actor_critic, build
from rlhf_jax.rewards import shaped
from rlhf_jax.rewards.shaped import ShapingConfig
from rlhf_jax.train_step import OptimConfig, gradients, init_state, make_optimizer
from rlhf_jax.types import ComparisonBatch, Rollout, TokenBatch
from tests.algorithms import toy
from tests.algorithms.case import ROWS, Case, SampledCase, inputs_of
from tests.testing import TINY_MODEL as CONFIG
from tests.testing import compilations, full, tiny_params

FOLDER = pathlib.Path(algorithms.__file__).parent
# Files that build no step: parts that methods share, pairs of online DPO, selections of PF-PPO.
SHARED = {"epochs", "given", "groups", "macro_actions", "online_dpo", "opponents", "pairs"}
SHARED |= {"pairwise", "pf_ppo", "picks", "reading", "reinforce", "selection"}
MODULES = sorted(path.stem for path in FOLDER.glob("[!_]*.py") if path.stem not in SHARED)
CASES: dict[str, Case] = {
  "/".join(filter(None, (module, name))): case
  for module in MODULES
  for name, case in importlib.import_module(f"tests.algorithms.{module}_test").CASES.items()
}
SAMPLED = {name: case for name, case in CASES.items() if isinstance(case, SampledCase)}
STEPS = 3


class First(NamedTuple):
  """State of `keep_first`: whether there was a gradient, and the first one."""

  seen: jax.Array
  gradient: Any


def keep_first():
  """Passes gradients on, and keeps the first one."""

  def init(params):
    return First(jnp.zeros((), bool), jax.tree.map(jnp.zeros_like, params))

  def update(grads, state, params=None):
    del params
    first = jax.tree.map(lambda a, b: jnp.where(state.seen, a, b), state.gradient, grads)
    return grads, First(jnp.ones((), bool), first)

  return optax.GradientTransformation(init, update)


def optimizer():
  # A larger eps than usual: Adam turns the rounding of a gradient near 0 into a full step.
  config = OptimConfig(learning_rate=3e-3, schedule="constant", eps=1e-4, weight_decay=0.01)
  return optax.chain(keep_first(), make_optimizer(config, STEPS))


def placer(mesh):
  """Makes `put(tree, is_state=False)` on a mesh, or on the first device for None."""

  def put(tree, is_state=False):
    if mesh is None:
      return jax.device_put(tree, jax.devices()[0])
    if is_state:
      return jax.device_put(tree, sharding.named_shardings(tree, mesh, sharding.DECODER_RULES))
    return sharding.place_batch(tree, mesh)

  return put


def loop(step, state, next_batch, steps=STEPS) -> tuple[Any, list[dict[str, float]]]:
  """Takes steps, which must compile once and donate the state; returns params and metrics."""
  metrics, on_one = [], len(state.step.sharding.device_set) == 1
  with compilations() as names:
    for i in range(steps):
      batch, before = next_batch(i, state), state
      state, now = step(state, batch, jax.random.key(0))
      metrics.append({name: float(value) for name, value in now.items()})
      if on_one:  # On a mesh see test_a_step_keeps_the_placement_of_its_state.
        assert all(x.is_deleted() for x in jax.tree.leaves(before)), "the state is not donated"
  assert state.step == steps
  if on_one:
    assert names.count("step") == 1
  first = [x for x in state.opt_state if isinstance(x, First)]
  return jax.device_get(state.params), metrics, jax.device_get(first)


def assert_close(a, b, atol):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=atol), a, b)


@functools.cache
def batch_of(name, seed):
  return CASES[name].batch(seed)


@functools.cache
def step_of(name, microbatches=1):
  return CASES[name].step(optimizer(), microbatches=microbatches)


@functools.cache
def trained(name, spec=None, microbatches=1):
  """Three steps on batches of their own, and three on the last of them.

  Returns params, metrics, and the gradient of the first update.
  """
  case, tx = CASES[name], optimizer()
  put = placer(sharding.make_mesh(spec) if spec else None)
  state = put(init_state(jax.tree.map(jnp.array, case.params), tx), is_state=True)
  step = step_of(name, microbatches) if spec is None else case.step(tx, microbatches=microbatches)
  batches = [put(batch_of(name, seed)) for seed in range(STEPS)]
  return loop(step, state, lambda i, state: batches[min(i, STEPS - 1)], 2 * STEPS)


def test_every_method_has_a_case():
  assert golden_losses().keys() == CASES.keys()
  sources = {path.stem: path.read_text() for path in FOLDER.glob("*.py")}
  methods = {x for x, text in sources.items() if re.search(rf"^(def )?make_{x}_step\b", text, re.M)}
  assert {name.split("/")[0] for name in CASES} == methods - SHARED | {"terms"}


# Losses of every case, which another kind of CPU or another jax only rounds in another order.
# GOLDENS=write writes those of the cases that run; the commit message says why they have changed.
GOLDENS = pathlib.Path(__file__).with_name("goldens.json")


def golden_losses():
  return json.loads(GOLDENS.read_text()) if GOLDENS.exists() else {}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_golden_and_fall_in_steps_that_compile_once_and_donate_their_state(name):
  params, metrics, _ = trained(name)
  losses = [float(f"{m['loss']:.6g}") for m in metrics]
  if os.environ.get("GOLDENS") == "write":
    lines = [
      json.dumps({k: v})[1:-1] for k, v in sorted((golden_losses() | {name: losses}).items())
    ]
    GOLDENS.write_text("{\n  " + ",\n  ".join(lines) + "\n}\n")
  np.testing.assert_allclose(losses, golden_losses()[name], rtol=1e-5, atol=1e-6)
  assert all(np.isfinite(list(m.values())).all() for m in metrics)
  assert all(m["skipped_steps"] == 0 and m["grad_norm"] > 1e-3 for m in metrics)
  assert all(a["loss"] != b["loss"] for a, b in itertools.pairwise(metrics))
  if CASES[name].falls:
    assert metrics[-1]["loss"] < metrics[STEPS - 1]["loss"]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", [name for name in CASES if "/" not in name])
def test_rows_on_eight_devices_change_nothing(name):
  (want_params, want_metrics, _), (params, metrics, _) = trained(name), trained(name, "data:8")
  assert_close(params, want_params, 1e-5)
  assert_close(metrics, want_metrics, 1e-4)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.parts > 1])
def test_microbatches_change_nothing(name):
  want_params, want_metrics, want_first = trained(name)
  params, metrics, first = trained(name, microbatches=CASES[name].parts)
  assert_close(params, want_params, 1e-5)
  assert_close(metrics, want_metrics, 1e-4)
  assert_close(first, want_first, 1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.parts == 1])
def test_what_compares_the_rows_of_a_batch_is_not_cut(name):
  case = CASES[name]
  with pytest.raises(ValueError, match="^microbatches must be 1"):
    case.step(optimizer(), microbatches=2)


def test_every_weight_of_a_term_is_not_zero_in_a_case():
  weights = {}
  for config in (case.config for case in CASES.values()):
    for name in (f.name for f in dataclasses.fields(config) if f.name.endswith("_coef")):
      weights[name] = weights.get(name) or getattr(config, name)
  assert len(weights) > 5 and all(weights.values()), weights


# Below: methods that learn from sampled responses. Further cases of a method differ from its first
# one in settings that packing and missing scores do not meet.
METHODS = [name for name in SAMPLED if "/" not in name]


@pytest.mark.parametrize("name", [*METHODS, "p3o", "ppo/entropy", "ppo_max/ptx"])
def test_packing_and_microbatches_change_no_loss_and_no_gradient(name):
  case, batch, results = CASES[name], batch_of(name, 0), []
  tx, params = optax.chain(keep_first(), optax.sgd(1.0)), toy.near(case.params, 0.97)
  for packed, parts in ((None, 1), (reading.Packing(13), case.parts)):
    step = case.step(tx, temperature=0.7, packed=packed, microbatches=parts)
    state, metrics = step(init_state(jax.tree.map(jnp.array, params), tx), batch, jax.random.key(0))
    assert metrics.pop("padding") > 0
    results.append((state, metrics))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *results)
  assert_close(results[0][0].opt_state[0], results[1][0].opt_state[0], 1e-6)
  assert abs(results[0][1]["kl/old"]) > 1e-4


def read_of(case, apply):
  if case.critic:
    return reading.make_actor_critic_read(apply, entropy=True)
  return reading.make_read(apply)


@functools.cache
def learn(name):
  """Builds jitted `(params, rollout, scores, values, ref_logprobs) -> (batch, grads, metrics)`."""
  case = SAMPLED[name]
  loss = case.make_loss(read_of(case, case.apply))

  @jax.jit
  def run(params, *inputs):
    batch = case.make_batch(*inputs, samples=1)
    return batch, *gradients(loss, params, batch, jax.random.key(0))

  return run


def scored(case, rows):
  """Arguments of `learn` after the params."""
  rollout = toy.rollout_of(case.params["policy"] if case.critic else case.params, rows)
  scores, values, other = inputs_of(rollout, np.random.default_rng(0))
  return rollout, scores, values, rollout.logprobs + other


def unjudged(name):
  """Batch of a method that samples, without a score or a preference that can be used."""
  batch = batch_of(name, 0)
  if isinstance(batch, opponents.OpponentBatch):
    return batch._replace(preference=np.full_like(batch.preference, np.nan))
  if isinstance(batch, rest.RestBatch):
    return batch._replace(weights=np.zeros_like(batch.weights))
  return batch._replace(mask=np.zeros_like(batch.mask))


@pytest.mark.parametrize("name", [*METHODS, "p3o", "nash_md", "ipo_md", "rest"])
def test_a_batch_without_a_score_takes_no_optimizer_step(name):
  trained(name)  # Which counts the compilations of the step.
  step, state = step_of(name), init_state(jax.tree.map(jnp.array, CASES[name].params), optimizer())
  state, _ = step(state, batch_of(name, 0), jax.random.key(0))  # Moments are not 0 any more.
  before = jax.device_get(state)
  state, metrics = step(state, unjudged(name), jax.random.key(0))
  assert metrics["skipped_steps"] == 1
  assert state.step == before.step + 1
  jax.tree.map(np.testing.assert_array_equal, state[1:], before[1:])


@pytest.mark.parametrize("name", ["nash_md", "ipo_md"])
def test_a_response_without_a_preference_is_as_if_its_prompt_were_not_there(name):
  case, batch = CASES[name], batch_of(name, 0)
  results = []
  preference = batch.preference.copy()
  preference[5, 0] = np.nan
  others = jax.tree.map(lambda x: x[np.arange(ROWS) != 5], batch)
  for rows in (batch._replace(preference=preference), others):
    tx = optax.sgd(1.0)
    state, metrics = case.step(tx)(
      init_state(toy.near(case.params, 0.9), tx), rows, jax.random.key(0)
    )
    assert metrics.pop("tokens") > 0
    same = ("loss", "grad_norm", "weight", "skipped_steps")
    results.append((state.params, {key: metrics[key] for key in same}))
  assert_close(*results, 1e-6)


@pytest.mark.parametrize(
  ("bad", "where"), [(np.nan, 1), (np.inf, 1), (-np.inf, 1), (np.nan, 3), (np.inf, 2), (np.nan, 0)]
)
@pytest.mark.parametrize("name", METHODS)
def test_a_row_with_a_number_that_is_not_finite_is_as_if_it_were_not_there(name, bad, where):
  """Score (1), value (2), log-probability under the reference (3) or the sampler (0)."""
  case = SAMPLED[name]
  if where == 2 and not case.critic:
    return
  inputs = jax.tree.map(np.array, scored(case, 12))
  changed = inputs[0].logprobs if where == 0 else inputs[where]
  changed[(5, *(0,) * (changed.ndim - 1))] = bad
  moved = toy.near(case.params, 0.8)  # Away from the policy that sampled: nothing is 0 by chance.
  others = jax.tree.map(lambda x: x[np.arange(12) != 5], inputs)
  results = [learn(name)(moved, *rows)[1:] for rows in (inputs, others)]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_without_any_finite_score_trains_nothing(name):
  case = SAMPLED[name]
  inputs = scored(case, 12)
  inputs[1][:] = np.nan
  batch, grads, metrics = learn(name)(case.params, *inputs)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(batch))
  assert metrics["loss"] == 0
  assert np.isnan([metrics[n] for n in ("ratio/mean", "kl/old", "clip_fraction")]).all()
  assert not any(np.any(g) for g in jax.tree.leaves(grads))


@functools.cache
def learn_tables(name):
  """Builds `learn` of a model whose outputs are its params, and whose batch has no rollout."""
  case = SAMPLED[name]

  def apply(params, tokens, *, segment_ids, last):
    del tokens, segment_ids, last
    return (params["logits"], params["values"]) if case.critic else params["logits"]

  loss = case.make_loss(read_of(case, apply))

  @jax.jit
  def run(params, *inputs):
    batch = case.make_batch(*inputs, samples=4)
    return batch._replace(rollout=None), *gradients(loss, params, batch, jax.random.key(0))

  return run


@pytest.mark.parametrize("bad", [np.nan, 1e30])
@pytest.mark.parametrize("name", [name for name in SAMPLED if name != "ppo_max/ptx"])
def test_poisoned_padding_changes_nothing(name, bad):
  case, rows = SAMPLED[name], 8
  rollout, scores, values, ref = scored(case, rows)
  mask = rollout.response_mask[:, toy.P :]
  rng = np.random.default_rng(1)
  # One table entry for each row and position; the last column is never read.
  tables = {
    "logits": rng.normal(size=(rows, toy.R + 1, toy.V)).astype(np.float32),
    "values": rng.normal(size=(rows, toy.R + 1)).astype(np.float32),
  }

  def poison(x):
    used = np.pad(mask, ((0, 0), (0, x.shape[1] - toy.R)))
    return np.where(used.reshape(used.shape + (1,) * (x.ndim - 2)), x, np.float32(bad))

  results = []
  for change in (lambda x: x, poison):
    changed = rollout._replace(logprobs=change(rollout.logprobs))
    inputs = (jax.tree.map(change, tables), changed, scores, change(values), change(ref))
    results.append(learn_tables(name)(*inputs))
  (want_batch, want_grads, want), (batch, grads, metrics) = results
  jax.tree.map(np.testing.assert_array_equal, (batch, metrics), (want_batch, want))
  for table in ("logits", "values") if case.critic else ("logits",):
    on = grads[table][:, : toy.R][mask]
    np.testing.assert_array_equal(on, want_grads[table][:, : toy.R][mask])
    assert np.any(on)
  assert not np.any(grads["values"][:, : toy.R][~mask])


# Below: a transformer on a mesh, which samples, and learns from what it sampled.

PROMPT, T = 3, 8
STOPS = (2,)
SAMPLING = generation.SamplingConfig(max_new_tokens=T - PROMPT, temperature=0.7)


@functools.cache
def mesh_of(spec):
  return sharding.make_mesh(spec) if spec else None


@functools.cache
def model_of(spec, head="language"):
  """A model on a mesh, with a jitted `init`: the same for all methods."""
  model = build(CONFIG, head, mesh=mesh_of(spec))
  return model._replace(init=jax.jit(model.init))


@functools.cache
def sampler_of(spec, mixed=False):
  model = model_of(spec)
  functions = model.decode, model.init_cache
  decode, init_cache = generation.make_mixture(*functions) if mixed else functions
  return generation.make_generate(decode, init_cache, SAMPLING, stop_ids=STOPS, pad_id=0)


@functools.cache
def params_on(spec, head="language", seed=0):
  """Params on a mesh; do not donate them."""
  return placer(mesh_of(spec))(tiny_params(head, seed), is_state=True)


def state_on(spec, tx, params):
  return placer(mesh_of(spec))(init_state(jax.tree.map(jnp.array, params), tx), is_state=True)


def token_batch(*leading, seed=0) -> TokenBatch:
  """Responses of unequal lengths."""
  return toy.token_batch(*leading, seed=seed, prompt=PROMPT, length=T)


def prompts(seed=0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Tokens and mask of prompts of one to three tokens, padded on the left, and their ids."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, 16, size=(ROWS, PROMPT)).astype(np.int32)
  mask = np.arange(PROMPT) >= PROMPT - rng.integers(1, PROMPT + 1, size=(ROWS, 1))
  return tokens, mask, np.arange(ROWS, dtype=np.int32)


def judged(rollout) -> np.ndarray:
  """[B] float32, different for different responses."""
  tokens, on = jax.device_get((rollout.tokens, rollout.response_mask))
  return np.where(on, np.sin(tokens), 0).sum(1).astype(np.float32)


def run_sft(spec):
  tx, put = optimizer(), placer(mesh_of(spec))
  step = sft.make_sft_step(model_of(spec).apply, tx, sft.SFTConfig())
  state = state_on(spec, tx, tiny_params())
  return loop(step, state, lambda i, state: put(token_batch(ROWS, seed=i))), []


def run_reward_model(spec):
  tx, put = optimizer(), placer(mesh_of(spec))
  config = reward_model.RewardModelConfig(centering_coef=0.1)
  step = reward_model.make_reward_model_step(model_of(spec, "scalar").apply, tx, config)
  state = state_on(spec, tx, tiny_params("scalar"))
  return loop(step, state, lambda i, state: put(token_batch(ROWS, 2, seed=i))), []


def run_preference_model(spec):
  tx, put = optimizer(), placer(mesh_of(spec))
  config = preference_model.PreferenceModelConfig()
  step = preference_model.make_preference_model_step(model_of(spec, "scalar").apply, tx, config)
  state = state_on(spec, tx, tiny_params("scalar"))

  def next_batch(i, state):
    del state
    shares = np.random.default_rng(i).choice([0.0, 0.3, 1.0], ROWS).astype(np.float32)
    return put(ComparisonBatch(*token_batch(ROWS, 2, seed=i), shares))

  return loop(step, state, next_batch), []


def run_dpo(spec):
  tx, put = optimizer(), placer(mesh_of(spec))
  step = dpo.make_dpo_step(model_of(spec).apply, tx, dpo.DPOConfig())
  state = state_on(spec, tx, tiny_params())
  reference = params_on(spec, seed=9)  # Another model.
  refer = jax.jit(pairs.make_read_pairs(model_of(spec).apply))

  def next_batch(i, state):
    del state
    rows = put(token_batch(ROWS, 2, seed=i))
    return dpo.DPOBatch(rows, refer(reference, rows).totals)

  return loop(step, state, next_batch), []


def run_ppo(spec):
  policy, tx, put = model_of(spec), optimizer(), placer(mesh_of(spec))
  config = ppo.PPOConfig(epochs=2, minibatches=2)
  apply, temperature = actor_critic(policy, model_of(spec, "scalar")), SAMPLING.temperature
  step = ppo.make_ppo_step(apply, tx, config, temperature=temperature)
  read = reading.make_actor_critic_read(apply, temperature)
  refer, generate = reading.make_read(policy.apply, temperature), sampler_of(spec)
  state = state_on(spec, tx, {"policy": tiny_params(), "value": tiny_params("scalar")})
  reference = params_on(spec, seed=9)  # Another model.
  moments, sampled = RunningMoments.zero(), []

  @jax.jit
  def experience(params, ref_params, moments, rollout, scores):
    done = generation.ended(rollout, STOPS)
    scores, moments = shaped.shape(scores, done, moments, ShapingConfig(normalize=True))
    ref_logprobs = refer(ref_params, rollout).logprobs
    values = read(params, rollout).values
    batch, _ = ppo.make_batch(rollout, scores, values, ref_logprobs, config)
    gap = jnp.abs(rollout.logprobs - ref_logprobs)
    return batch, moments, jnp.mean(gap, where=batch.mask)

  def next_batch(i, state):
    nonlocal moments
    rollout = generate(state.params["policy"], *put(prompts(i)), jax.random.key(i))
    sampled.append(np.asarray(rollout.tokens))
    scores = judged(rollout)
    scores[i] = np.nan  # A row without a score.
    batch, moments, gap = experience(state.params, reference, moments, rollout, put(scores))
    assert gap > 0.1
    return batch

  return loop(step, state, next_batch), sampled


def run_opponents(spec, make_step, count):
  model, tx, put = model_of(spec), optimizer(), placer(mesh_of(spec))
  step = make_step(model.apply, tx, temperature=SAMPLING.temperature)
  state = state_on(spec, tx, tiny_params())
  reference = params_on(spec, seed=9)  # Another model.
  generate = sampler_of(spec, mixed=True)
  refer, sampled = jax.jit(reading.make_read(model.apply, SAMPLING.temperature)), []

  def next_batch(i, state):
    policy, other = (generation.MixtureParams(state.params, reference, mix) for mix in (0.0, 0.25))
    first, rival, *second = [
      generate(params, *put(prompts(i)), jax.random.key(10 * i + n))
      for n, params in enumerate((policy, other, policy)[: 1 + count])
    ]
    responses = (first, *second)
    sampled.extend(np.asarray(rollout.tokens) for rollout in (first, rival, *second))
    wins = [np.float32(judged(rollout) > judged(rival)) for rollout in responses]
    stack = lambda *x: jnp.stack(x, axis=1)  # noqa: E731
    return opponents.OpponentBatch(
      rollout=jax.tree.map(stack, *responses),
      ref_logprobs=stack(*(refer(reference, rollout).logprobs for rollout in responses)),
      preference=put(np.stack(wins, axis=1)),
      tau=put(np.full(ROWS, 0.5, np.float32)),
    )

  return loop(step, state, next_batch), sampled


def run_nash_md(spec):
  make_step = functools.partial(nash_md.make_nash_md_step, config=nash_md.NashMDConfig())
  return run_opponents(spec, make_step, 1)


def run_ipo_md(spec):
  make_step = functools.partial(ipo_md.make_ipo_md_step, config=ipo_md.IPOMDConfig())
  return run_opponents(spec, make_step, 2)


def run_rest(spec):
  model, tx, put = model_of(spec), optimizer(), placer(mesh_of(spec))
  improve = rest.make_rest_step(model.apply, tx, rest.RestConfig(kappa=0.3))
  state = state_on(spec, tx, tiny_params())
  reference = params_on(spec, seed=9)  # Another model.
  generate, sampled = sampler_of(spec), []

  def next_batch(i, state):
    tokens, mask, ids = prompts(i)
    full_prompts = np.ones_like(mask)  # Sequences are padded on the right only.
    rollout = generate(state.params, *put((tokens, full_prompts, ids)), jax.random.key(i))
    sampled.append(np.asarray(rollout.tokens))
    weights = selection.kept_weights(judged(rollout)[:, None], 0.5)[:, 0]
    return rest.RestBatch(TokenBatch(rollout.tokens, rollout.response_mask), put(weights))

  def step(state, batch, key):
    return improve(state, batch, reference, key)

  return loop(step, state, next_batch), sampled


RUNS = {
  "sft": run_sft,
  "reward_model": run_reward_model,
  "dpo": run_dpo,
  "ppo": run_ppo,
  "ipo_md": run_ipo_md,
  "rest": run_rest,
  "preference_model": run_preference_model,
  "nash_md": run_nash_md,
}
# The others read their batches as one of these does.
DIFFERENT = ("reward_model", "ppo")
# All three axes; and what is left, where only rows or only weights are split.
MESHES = ("fsdp:4,tensor:2", "data:8", "fsdp:8")


@functools.cache
def single_device(name):
  return RUNS[name](None)


@pytest.mark.parametrize(
  ("name", "spec"),
  [
    pytest.param(name, spec, marks=[full] if i or name not in DIFFERENT else [])
    for i, spec in enumerate(MESHES)
    for name in RUNS
  ],
)
def test_a_transformer_on_eight_devices_equals_one(name, spec):
  (want_params, want_metrics, _), want_sampled = single_device(name)
  assert all(m["skipped_steps"] == 0 and m["grad_norm"] > 1e-3 for m in want_metrics)
  assert all(a["loss"] != b["loss"] for a, b in itertools.pairwise(want_metrics))
  assert len({tokens.tobytes() for tokens in want_sampled}) == len(want_sampled)
  (params, metrics, _), sampled = RUNS[name](spec)
  for tokens, want in zip(sampled, want_sampled, strict=True):
    np.testing.assert_array_equal(tokens, want)
  assert_close(params, want_params, 1e-5)
  assert_close(metrics, want_metrics, 1e-4)


def language_losses(model, critic):
  """Losses over the vocabulary: name -> `(params, batch, key) -> (loss, metrics)`."""
  apply = model.apply

  def of_policy(loss_fn, **settings):
    return lambda params, *args: loss_fn(params["policy"], *args, **settings)

  def forward_kl(params, *args):  # To another model.
    ref_params = jax.tree.map(lambda x: x + 0.1, params["policy"])
    config = rest.RestConfig(kappa=0.5)
    loss = of_policy(rest.loss_fn, apply_fn=apply, config=config, ref_params=ref_params)
    return loss(params, *args)

  read_pairs = pairs.make_read_pairs(apply, pairs.PairConfig(reweight=True))
  return {
    "sft": of_policy(sft.loss_fn, apply_fn=apply),
    "dpo": of_policy(dpo.loss_fn, read=read_pairs, config=dpo.DPOConfig(sft_coef=0.3)),
    "ppo": functools.partial(
      ppo.loss_fn,
      read=reading.make_actor_critic_read(actor_critic(model, critic), 0.7, entropy=True),
      config=ppo.PPOConfig(entropy_coef=0.2),
    ),
    "rest": forward_kl,
    "nash_md": of_policy(nash_md.loss_fn, read=reading.make_read(apply, 0.7)),
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
    return opponents.OpponentBatch(
      rollout(rows, 1), floats(rows, 1, half), -floats(rows, 1), np.full(rows, 0.5, np.float32)
    )
  arrays = [floats(rows, half) for _ in range(3)]
  return ppo.PPOBatch(rollout(rows), np.ones((rows, half), bool), *arrays)


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo", "rest", "nash_md"])
def test_logits_of_a_few_tokens_at_a_time_change_nothing(name):
  batch, critic, results = language_batch(name, 4, 10), build(CONFIG, "scalar"), []
  params = {"policy": tiny_params(), "value": tiny_params("scalar")}
  key = jax.random.key(0)
  for chunk in (None, 3 * CONFIG.vocab_size):
    loss = language_losses(build(CONFIG, logit_chunk=chunk), critic)[name]
    results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, key))
  ((want, want_metrics), want_grads), ((value, metrics), grads) = results
  largest = max(np.abs(x).max() for x in jax.tree.leaves(want_grads))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  jax.tree.map(functools.partial(close, atol=1e-6), (value, metrics), (want, want_metrics))
  jax.tree.map(functools.partial(close, atol=1e-6 * largest), grads, want_grads)


@pytest.mark.parametrize("name", ["sft", "nash_md"])
def test_the_loop_over_tokens_sends_no_weights(name):
  """Devices gather the output matrix before it, and sum its gradient after it."""
  config = dataclasses.replace(CONFIG, vocab_size=48, layers=1, tied=False)
  mesh = mesh_of("fsdp:8")
  model = build(config, logit_chunk=3 * config.vocab_size, mesh=mesh)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  places = sharding.named_shardings(shapes, mesh, sharding.DECODER_RULES)
  params = {"policy": sharding.abstract(shapes, places)}
  batch = sharding.abstract(language_batch(name, ROWS, 10), sharding.batch_sharding(mesh))
  step = jax.jit(
    jax.grad(language_losses(model, None)[name], has_aux=True),
    out_shardings=({"policy": places}, None),
  )
  text = step.lower(params, batch, jax.random.key(0)).compile().as_text()
  assert " while(" in text
  found = hlo.collectives(text)
  assert not [collective for collective in found if collective.trips]
  assert [collective.result for collective in found].count("f32[16,48]") == 1


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo"])
def test_memory_does_not_grow_with_the_logits(name):
  config = dataclasses.replace(CONFIG, vocab_size=2**17)
  policy, critic = build(config), build(config, "scalar")
  init = lambda key: {"policy": policy.init(key), "value": critic.init(key)}  # noqa: E731
  params, key = jax.eval_shape(init, jax.random.key(0)), jax.random.key(0)
  batch, results = language_batch(name, 4, 512), []
  for chunk in (None, 2**22):
    loss = language_losses(build(config, logit_chunk=chunk), critic)[name]
    step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, batch, key)
    results.append(step.compile().memory_analysis().temp_size_in_bytes)
  assert results[0] > 5 * results[1], results


def test_a_step_keeps_the_placement_of_its_state():
  mesh, tx = mesh_of("fsdp:4,tensor:2"), optimizer()
  model = model_of("fsdp:4,tensor:2")
  before = init_state(jax.tree.map(jnp.array, tiny_params()), tx)
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
