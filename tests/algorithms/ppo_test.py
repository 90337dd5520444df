"""PPO against exact answers on problems small enough to enumerate."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import sharding
from rlhf_jax.algorithms import ppo
from rlhf_jax.generation import SamplingConfig, ended, make_generate
from rlhf_jax.models import actor_critic, build, shared_actor_critic
from rlhf_jax.train_step import gradients, init_state
from tests.algorithms.tabular import (
  T,
  V,
  sample_rollout,
  sequence_logprobs,
  tabular_apply,
  tabular_params,
)
from tests.testing import TINY_MODEL as CONFIG
from tests.testing import compilations


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"normalize_values": True, "importance_cap": 2.0, "dual_clip": 3.0},
    {"advantage": "rloo", "objective": "reinforce", "aggregation": "dr_grpo"},
    {"advantage": "grpo", "scale_groups": False, "aggregation": "grpo"},
    {
      "advantage": "rloo",
      "objective": "reinforce",
      "aggregation": "dr_grpo",
      "kl_in": "loss",
      "kl_estimator": "reverse_kl",
    },
    {"advantage": "reinforce", "objective": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    {"advantage": "rloo", "objective": "gspo"},
  ],
  ids=lambda settings: "-".join(str(value) for value in settings.values()) or "ppo",
)
def test_reaches_the_exact_optimum_of_the_regularised_objective(settings):
  beta, rows, samples = 0.5, 512, 8
  sequences = np.array(list(itertools.product(range(V), repeat=T)))
  reward = np.random.default_rng(0).normal(size=V**T).astype(np.float32)
  ref_params = tabular_params(jax.random.key(1))
  ref = sequence_logprobs(ref_params["policy"])
  optimum = jax.nn.log_softmax(ref + reward / beta)
  start_kl = jnp.sum(jnp.exp(ref) * (ref - optimum))
  assert start_kl > 0.3, "the problem must not start at its solution"

  epochs = 1 if settings.get("objective") == "reinforce" else 2
  config = ppo.PPOConfig(
    kl_coef=beta, epochs=epochs, minibatches=4, missing_eos_penalty=0.0, **settings
  )
  steps = 150
  tx = optax.adam(optax.linear_schedule(0.03, 0.0, steps * epochs * 4))
  step = ppo.make_ppo_step(tabular_apply, tx, config)
  experience = ppo.make_experience(
    tabular_apply,
    lambda params, tokens, **kwargs: tabular_apply(params, tokens, **kwargs)[0],
    config,
    samples_per_prompt=samples,
  )
  draw = jax.jit(functools.partial(sample_rollout, rows=rows))
  state = init_state(jax.tree.map(jnp.copy, ref_params), tx)
  control = ppo.init_control(config)
  scores_of = jnp.asarray(reward).reshape(V, V)
  for i in range(steps):
    rollout = draw(state.params["policy"], jax.random.fold_in(jax.random.key(2), i))
    scores = scores_of[rollout.tokens[:, 1], rollout.tokens[:, 2]]
    batch, control, metrics = experience(
      state.params, ref_params, control, rollout, scores, jnp.ones(rows, bool)
    )
    state, _ = step(state, batch, jax.random.key(3))
  policy = sequence_logprobs(state.params["policy"])
  kl = float(jnp.sum(jnp.exp(policy) * (policy - optimum)))
  assert kl < 0.01, kl
  # The estimate that is reported agrees with the exact divergence to the reference.
  exact = float(jnp.sum(jnp.exp(policy) * (policy - ref)))
  np.testing.assert_allclose(float(metrics["kl/ref"]), exact, atol=0.15)
  assert len(sequences) == V**T


# Below: the same tables, responses that stop after token 0, and a small transformer.

EOS = 0
PROMPT, LENGTH = 4, 6  # Columns of the transformer's rollouts.


def stopped_rollout(rows, seed=0):
  """Tabular params with a critic, and a rollout of responses of one or two tokens."""
  params = tabular_params(jax.random.key(seed))
  start_key, one_key = jax.random.split(jax.random.key(seed + 1))
  params["value"] = {
    "start": jax.random.normal(start_key, ()),
    "one": jax.random.normal(one_key, (V,)),
  }
  rollout = sample_rollout(params["policy"], jax.random.key(seed + 2), rows)
  goes_on = rollout.tokens[:, 1] != EOS
  mask = rollout.response_mask.at[:, 2].set(goes_on)
  logprobs = jnp.where(mask[:, 1:], rollout.logprobs, 0.0)
  rollout = rollout._replace(response_mask=mask, logprobs=logprobs)
  ended = jnp.any((rollout.tokens[:, 1:] == EOS) & mask[:, 1:], axis=1)
  assert 0 < ended.sum() < rows
  return params, rollout, ended


# One program instead of many small ones: most of the time of these tests is compilation.
to_batch = jax.jit(ppo.rollout_to_batch, static_argnames="config")


@jax.jit
def tabular_values(params, rollout):
  return ppo.response_outputs(tabular_apply, params, rollout, 1.0)[2]


@functools.partial(jax.jit, static_argnames="config")
def tabular_loss(params, batch, config):
  return ppo.loss_fn(params, batch, jax.random.key(0), apply_fn=tabular_apply, config=config)


def random_arrays(rows, seed=5):
  rng = np.random.default_rng(seed)
  return rng.normal(size=rows).astype(np.float32), rng.normal(size=(rows, T)).astype(np.float32)


@functools.cache
def transformer():
  """Policy and critic with a jitted `apply`, and their params."""
  policy, critic = build(CONFIG), build(CONFIG, head="scalar")
  params = {
    "policy": jax.jit(policy.init)(jax.random.key(0)),
    "value": jax.jit(critic.init)(jax.random.key(1)),
  }
  apply = jax.jit(actor_critic(policy, critic), static_argnames="last")
  return policy, apply, params


@functools.cache
def sampled(temperature, rows=16):
  """A rollout behind left-padded prompts of one to four tokens."""
  policy, _, params = transformer()
  generate = make_generate(
    policy.decode,
    policy.init_cache,
    SamplingConfig(max_new_tokens=LENGTH, temperature=temperature),
    stop_ids=(1, 2),
    pad_id=0,
  )
  rng = np.random.default_rng(0)
  mask = np.arange(PROMPT) >= PROMPT - rng.integers(1, PROMPT + 1, size=(rows, 1))
  tokens = np.where(mask, rng.integers(3, 16, size=(rows, PROMPT)), 0).astype(np.int32)
  rollout = generate(params["policy"], tokens, mask, np.arange(rows), jax.random.key(3))
  done = ended(rollout, (1, 2))
  assert 0 < done.sum() < rows
  return rollout, done


def copy(tree):
  return jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trainer_agrees_with_the_sampler(temperature):
  policy, apply, params = transformer()
  rollout, done = sampled(temperature)
  config = ppo.PPOConfig(epochs=1, minibatches=1)
  experience = ppo.make_experience(apply, policy.apply, config, temperature=temperature)
  scores = jax.random.normal(jax.random.key(1), (16,))
  batch, _, metrics = experience(
    params, params["policy"], ppo.init_control(config), rollout, scores, done
  )
  # The KL to an identical reference is 0, whatever the temperature.
  np.testing.assert_allclose(metrics["kl/ref"], 0.0, atol=1e-5)
  tx = optax.sgd(1e-3)
  step = ppo.make_ppo_step(apply, tx, config, temperature=temperature)
  _, metrics = step(init_state(copy(params), tx), batch, jax.random.key(0))
  assert metrics["ratio/first_deviation"] < 1e-5
  assert metrics["clip_fraction"] == 0
  np.testing.assert_allclose(metrics["ratio/mean"], 1.0, atol=1e-5)
  np.testing.assert_allclose(metrics["kl/old"], 0.0, atol=1e-6)
  assert metrics["skipped_steps"] == 0
  assert metrics["weight"] == np.sum(rollout.response_mask)

  # At another temperature all of this would show.
  wrong = ppo.make_experience(apply, policy.apply, config, temperature=1.3)
  _, _, metrics = wrong(params, params["policy"], ppo.init_control(config), rollout, scores, done)
  assert abs(metrics["kl/ref"]) > 0.01
  wrong = ppo.make_ppo_step(apply, tx, config, temperature=1.3)
  _, metrics = wrong(init_state(copy(params), tx), batch, jax.random.key(0))
  assert metrics["ratio/first_deviation"] > 0.01


def test_response_outputs_are_those_of_each_row_alone():
  _, apply, params = transformer()
  rollout, _ = sampled(0.7)
  logprobs, entropies, values = ppo.response_outputs(apply, params, rollout, 0.7)
  for b in range(4):
    real = np.asarray(rollout.prompt_mask[b] | rollout.response_mask[b])
    tokens = np.asarray(rollout.tokens[b])[real]
    n, prompt = len(tokens), int(rollout.prompt_mask[b].sum())
    padded = np.pad(tokens, (0, PROMPT + LENGTH - n))[None]
    out, value = apply(params, padded, last=PROMPT + LENGTH)
    out = np.asarray(out[0], np.float64) / 0.7
    table = out - np.log(np.exp(out).sum(axis=-1, keepdims=True))
    for i in range(n - prompt):
      at = prompt + i - 1  # The position whose output draws response token i.
      np.testing.assert_allclose(logprobs[b, i], table[at, tokens[at + 1]], atol=1e-5)
      want = -(np.exp(table[at]) * table[at]).sum()
      np.testing.assert_allclose(entropies[b, i], want, atol=1e-5)
      np.testing.assert_allclose(values[b, i], value[0, at], atol=1e-5)


@pytest.mark.parametrize("whiten", [True, False])
def test_rollout_to_batch_matches_loops(whiten):
  params, rollout, done = stopped_rollout(32)
  scores, ref = random_arrays(32)
  values = np.asarray(tabular_values(params, rollout))
  config = ppo.PPOConfig(
    kl_coef=0.3, gamma=0.9, lam=0.8, whiten=whiten, missing_eos_penalty=0.6, score_clip=1.0
  )
  batch, control, metrics = to_batch(
    rollout, scores, done, ref, values, ppo.init_control(config), config
  )
  want, returns, kls, totals = [], [], [], []
  for b in range(32):
    n = int(rollout.response_mask[b].sum())
    ratio = [float(rollout.logprobs[b, t]) - float(ref[b, t]) for t in range(n)]
    rewards = [-0.3 * x for x in ratio]
    rewards[-1] += min(max(float(scores[b]), -1.0), 1.0) - (0.0 if done[b] else 0.6)
    errors = [
      rewards[t] + (0.9 * values[b, t + 1] if t + 1 < n else 0.0) - values[b, t] for t in range(n)
    ]
    a = [sum(0.72 ** (s - t) * errors[s] for s in range(t, n)) for t in range(n)]
    want += a
    returns += [a[t] + values[b, t] for t in range(n)]
    kls.append(sum(ratio))
    totals.append(sum(rewards))
  mask = np.asarray(batch.mask)
  # Returns are made before the advantages are whitened.
  np.testing.assert_allclose(np.asarray(batch.returns)[mask], returns, atol=1e-5)
  if whiten:
    want = (np.array(want) - np.mean(want)) / np.std(want)
  np.testing.assert_allclose(np.asarray(batch.advantages)[mask], want, atol=1e-4)
  for x in (batch.advantages, batch.returns, batch.values, batch.rollout.logprobs):
    assert (np.asarray(x)[~mask] == 0).all()
  np.testing.assert_allclose(metrics["kl/ref"], np.mean(kls), atol=1e-5)
  np.testing.assert_allclose(metrics["reward/mean"], scores.mean(), atol=1e-6)
  np.testing.assert_allclose(metrics["reward/std"], scores.std(), rtol=1e-5)
  np.testing.assert_allclose(metrics["reward/shaped"], np.mean(totals), atol=1e-5)
  np.testing.assert_allclose(metrics["eos_fraction"], np.mean(done), rtol=1e-6)
  np.testing.assert_allclose(metrics["response_length/mean"], mask.sum() / 32, rtol=1e-6)
  r, v = np.array(returns), values[mask]
  np.testing.assert_allclose(
    metrics["value/explained_variance"], 1 - np.var(r - v) / np.var(r), atol=1e-4
  )
  assert control.kl_coef == np.float32(0.3)


def test_whitening_is_over_the_batch_and_not_per_minibatch():
  params, rollout, done = stopped_rollout(64)
  scores, ref = random_arrays(64)
  scores = np.sort(scores)  # The halves have different means.
  config = ppo.PPOConfig()
  batch, _, _ = to_batch(
    rollout, scores, done, ref, tabular_values(params, rollout), ppo.init_control(config), config
  )
  a, mask = np.asarray(batch.advantages), np.asarray(batch.mask)
  np.testing.assert_allclose(a[mask].mean(), 0, atol=1e-5)
  np.testing.assert_allclose(a[mask].std(), 1, rtol=1e-5)
  assert abs(a[:32][mask[:32]].mean()) > 0.3
  # The loss takes them as they are: in a minibatch, at ratio 1, it is minus their mean.
  half = jax.tree.map(lambda x: x[:32], batch)
  _, metrics = tabular_loss(params, half, config)
  np.testing.assert_allclose(metrics["loss/policy"], -a[:32][mask[:32]].mean(), rtol=1e-4)


def test_first_gradient_is_that_of_reinforce():
  params, rollout, done = stopped_rollout(32)
  scores, ref = random_arrays(32)
  config = ppo.PPOConfig(value_coef=0.0)
  batch, _, _ = to_batch(
    rollout, scores, done, ref, tabular_values(params, rollout), ppo.init_control(config), config
  )

  def reinforce(params):
    first, second = rollout.tokens[:, 1], rollout.tokens[:, 2]
    start = jax.nn.log_softmax(params["policy"]["start"])[first]
    one = jax.nn.log_softmax(params["policy"]["one"])[first, second]
    gain = jnp.sum(batch.advantages[:, 0] * start)
    gain += jnp.sum(jnp.where(batch.mask[:, 1], batch.advantages[:, 1] * one, 0.0))
    return -gain / jnp.sum(batch.mask)

  grad = jax.grad(lambda p: tabular_loss(p, batch, config)[0])(params)
  want = jax.grad(reinforce)(params)
  for name in ("start", "one"):
    np.testing.assert_allclose(grad["policy"][name], want["policy"][name], atol=1e-6)
    assert not np.any(grad["value"][name])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_row_without_a_finite_score_is_as_if_it_were_not_there(bad, normalize):
  params, rollout, done = stopped_rollout(12)
  scores, ref = random_arrays(12)
  scores[5] = bad
  config = ppo.PPOConfig(normalize_scores=normalize, score_clip=1.5)
  others = np.arange(12) != 5
  values = tabular_values(params, rollout)
  everything = (rollout, scores, done, ref, values)
  results = []
  for rows in (slice(None), others):
    inputs = jax.tree.map(lambda x, rows=rows: jnp.asarray(x)[rows], everything)
    batch, control, metrics = to_batch(*inputs, ppo.init_control(config), config)
    # Away from the policy that sampled, so that nothing is 0 by chance.
    moved = jax.tree.map(lambda x: 0.8 * x, params)
    loss, grads = jax.value_and_grad(lambda p: tabular_loss(p, batch, config)[0])(moved)  # noqa: B023
    shared = ("reward/mean", "reward/std", "reward/shaped", "kl/ref", "value/explained_variance")
    results.append((loss, grads, control.moments, {name: metrics[name] for name in shared}))
    assert metrics["reward/nonfinite"] == (batch.mask.shape[0] == 12)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))


@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_poisoned_padding_changes_nothing(bad):
  rows = 8
  _, rollout, done = stopped_rollout(rows)
  scores, ref = random_arrays(rows)
  rng = np.random.default_rng(0)
  # One table entry for each row and position; the last column is never read.
  logits = rng.normal(size=(rows, T + 1, V)).astype(np.float32)
  values = rng.normal(size=(rows, T + 1)).astype(np.float32)
  config = ppo.PPOConfig(normalize_scores=True)
  mask = np.asarray(rollout.response_mask[:, 1:])

  def apply(params, tokens, *, segment_ids, last):
    del tokens, segment_ids, last
    return params["logits"], params["values"]

  @jax.jit
  def function(params, rollout, ref, values):
    batch, control, metrics = to_batch(
      rollout, scores, done, ref, values, ppo.init_control(config), config
    )
    loss = lambda p: ppo.loss_fn(p, batch, jax.random.key(0), apply_fn=apply, config=config)  # noqa: E731
    return jax.value_and_grad(loss, has_aux=True)(params), batch, control, metrics

  def poison(x):
    used = np.pad(mask, ((0, 0), (0, x.shape[1] - T))).reshape(mask.shape[0], x.shape[1])
    return np.where(used.reshape(used.shape + (1,) * (x.ndim - 2)), x, bad).astype(np.float32)

  old = np.array(rollout.logprobs) + 0.1
  clean = ({"logits": logits, "values": values}, rollout._replace(logprobs=old), ref, values[:, :T])
  dirty = (
    {"logits": poison(logits), "values": poison(values)},
    rollout._replace(logprobs=poison(old)),
    poison(ref),
    poison(values[:, :T]),
  )
  (want, want_grad), *want_rest = function(*clean)
  (result, grad), *rest = function(*dirty)
  jax.tree.map(np.testing.assert_array_equal, (result, rest[1:]), (want, want_rest[1:]))
  for name in ("values", "advantages", "returns", "mask"):
    np.testing.assert_array_equal(getattr(rest[0], name), getattr(want_rest[0], name))
  for name in ("logits", "values"):
    np.testing.assert_array_equal(grad[name][:, :T][mask], want_grad[name][:, :T][mask])
    assert np.any(np.asarray(grad[name][:, :T])[mask])
  assert (np.asarray(grad["values"][:, :T])[~mask] == 0).all()


@pytest.mark.parametrize("penalty", [0.0, 2.5])
def test_missing_eos_penalty(penalty):
  params, rollout, done = stopped_rollout(16)
  scores, _ = random_arrays(16)
  config = ppo.PPOConfig(
    kl_coef=0.0, lam=1.0, whiten=False, missing_eos_penalty=penalty, score_clip=0.5
  )
  batch, _, metrics = to_batch(
    rollout,
    scores,
    done,
    rollout.logprobs,
    tabular_values(params, rollout),
    ppo.init_control(config),
    config,
  )
  # The clip is on the score alone: it must not swallow the penalty.
  want = np.clip(scores, -0.5, 0.5) - penalty * ~np.asarray(done)
  np.testing.assert_allclose(batch.returns[:, 0], want, atol=1e-6)
  np.testing.assert_allclose(metrics["reward/mean"], scores.mean(), atol=1e-6)


def test_scores_are_normalized_by_history_then_clipped():
  params, rollout, done = stopped_rollout(16)
  config = ppo.PPOConfig(
    kl_coef=0.0, lam=1.0, whiten=False, normalize_scores=True, score_clip=0.8, missing_eos_penalty=0
  )
  control, seen = ppo.init_control(config), []
  for i in range(3):
    scores = 37 * random_arrays(16, seed=i)[0] - 12
    seen.append(scores)
    values = tabular_values(params, rollout)
    batch, control, metrics = to_batch(
      rollout, scores, done, rollout.logprobs, values, control, config
    )
    history = np.concatenate(seen)
    want = np.clip((scores - history.mean()) / history.std(), -0.8, 0.8)
    np.testing.assert_allclose(batch.returns[:, 0], want, atol=1e-5)
    np.testing.assert_allclose(metrics["reward/mean"], scores.mean(), rtol=1e-5)


@pytest.mark.parametrize(
  "kl, factor", [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (60.0, 1.02), (0.0, 0.98), (-3.0, 0.98)]
)
def test_adaptive_kl_coefficient(kl, factor):
  config = ppo.PPOConfig(kl_target=6.0, kl_horizon=1000)
  result = ppo.adapt_kl_coef(jnp.float32(0.2), jnp.float32(kl), 100, config)
  np.testing.assert_allclose(result, 0.2 * factor, rtol=1e-5)
  fixed = ppo.adapt_kl_coef(jnp.float32(0.2), jnp.float32(kl), 100, ppo.PPOConfig())
  assert fixed == np.float32(0.2)


@pytest.mark.parametrize("start", [0.01, 5.0])
def test_adaptive_kl_coefficient_settles_at_the_target(start):
  config = ppo.PPOConfig(kl_coef=start, kl_target=6.0, kl_horizon=1000)

  def iteration(carry, _):
    coef, kl = carry
    # A policy that moves a tenth of the way to its optimum, which is nearer for a larger penalty.
    kl = kl + 0.1 * (3.0 / coef - kl)
    return (ppo.adapt_kl_coef(coef, kl, 128, config), kl), kl

  (coef, _), kls = jax.lax.scan(iteration, (jnp.float32(start), jnp.float32(0)), length=1000)
  np.testing.assert_allclose(kls[-50:], np.full(50, 6.0), rtol=0.05)
  np.testing.assert_allclose(coef, 0.5, rtol=0.05)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_step_moves_towards_the_reward(sign):
  policy, apply, params = transformer()
  rollout, done = sampled(1.0)
  good = jnp.bincount(rollout.tokens[:, PROMPT], length=16).argmax()
  scores = sign * (rollout.tokens[:, PROMPT] == good)
  config = ppo.PPOConfig(epochs=1, minibatches=1, missing_eos_penalty=0.0, gamma=1.0, lam=1.0)
  experience = ppo.make_experience(apply, policy.apply, config)
  batch, _, _ = experience(
    params, params["policy"], ppo.init_control(config), rollout, scores, done
  )
  tx = optax.sgd(1e-2)
  step = ppo.make_ppo_step(apply, tx, config)
  state, _ = step(init_state(copy(params), tx), batch, jax.random.key(0))

  def logprob(params):
    prompts = rollout.tokens[:, :PROMPT]
    segment_ids = rollout.prompt_mask[:, :PROMPT].astype(jnp.int32)
    logits, _ = apply(params, prompts, segment_ids=segment_ids, last=1)
    return jnp.mean(jax.nn.log_softmax(logits[:, 0])[:, good])

  assert sign * (logprob(state.params) - logprob(params)) > 1e-5


def test_critic_learns_to_explain_the_returns():
  policy, apply, params = transformer()
  rollout, done = sampled(1.0)
  scores = (rollout.tokens[:, PROMPT] > 8).astype(jnp.float32) + 3
  # The policy stands still, so that the returns do.
  config = ppo.PPOConfig(epochs=4, minibatches=1, lam=1.0, value_clip=10.0, missing_eos_penalty=0.0)
  tx = optax.partition(
    {"policy": optax.set_to_zero(), "value": optax.adam(1e-2)},
    {"policy": "policy", "value": "value"},
  )
  experience = ppo.make_experience(apply, policy.apply, config)
  step = ppo.make_ppo_step(apply, tx, config)
  state, reference = init_state(copy(params), tx), copy(params["policy"])
  explained = []
  with compilations() as names:
    for _ in range(30):
      batch, _, metrics = experience(
        state.params, reference, ppo.init_control(config), rollout, scores, done
      )
      explained.append(float(metrics["value/explained_variance"]))
      state, _ = step(state, batch, jax.random.key(0))
  assert explained[0] < 0.2
  assert explained[-1] > 0.9
  assert names.count("step") == 1
  # Nothing has touched the policy or its reference.
  jax.tree.map(np.testing.assert_array_equal, state.params["policy"], params["policy"])
  jax.tree.map(np.testing.assert_array_equal, reference, params["policy"])


def test_a_batch_without_any_finite_score_trains_nothing():
  params, rollout, done = stopped_rollout(8)
  _, ref = random_arrays(8)
  config = ppo.PPOConfig(epochs=1, minibatches=2, kl_target=6.0)
  values = tabular_values(params, rollout)
  batch, control, metrics = to_batch(
    rollout, jnp.full(8, jnp.nan), done, ref, values, ppo.init_control(config), config
  )
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((batch, control, metrics)))
  loss, grads = jax.value_and_grad(lambda p: tabular_loss(p, batch, config)[0])(params)
  assert loss == 0
  assert not any(np.any(g) for g in jax.tree.leaves(grads))


@functools.cache
def uneven_batch():
  """A batch of responses of very different lengths, and params that are not those it is from."""
  policy, apply, params = transformer()
  rollout, done = sampled(0.7, rows=32)
  cut = PROMPT + np.random.default_rng(1).integers(1, LENGTH + 1, size=(32, 1))
  rollout = rollout._replace(
    response_mask=rollout.response_mask & (np.arange(PROMPT + LENGTH) < cut)
  )
  scores = jax.random.normal(jax.random.key(1), (32,)).at[3].set(jnp.nan)
  config = ppo.PPOConfig()
  experience = ppo.make_experience(apply, policy.apply, config, temperature=0.7)
  ref_params = jax.tree.map(lambda x: 0.9 * x, params["policy"])
  batch, _, _ = experience(params, ref_params, ppo.init_control(config), rollout, scores, done)
  return batch, jax.tree.map(lambda x: 0.97 * x, params)


@pytest.mark.parametrize(
  ("settings", "spec"),
  [
    ({"entropy_coef": 0.1}, "data:2,fsdp:2,tensor:2"),
    ({"advantage": "grpo", "aggregation": "grpo", "kl_in": "loss", "objective": "gspo"}, None),
  ],
  ids=["ppo", "grpo"],
)
def test_packing_changes_no_loss_and_no_gradient(settings, spec):
  config = ppo.PPOConfig(**settings)
  batch, params = uneven_batch()
  mesh = sharding.make_mesh(spec) if spec else None
  if mesh is not None:
    batch = sharding.place_batch(jax.device_get(batch), mesh)
    places = sharding.named_shardings(params, mesh, sharding.DECODER_RULES)
    params = jax.device_put(params, places)
  apply = actor_critic(build(CONFIG, mesh=mesh), build(CONFIG, head="scalar", mesh=mesh))
  found = []
  for length in (0, 13):
    loss = functools.partial(
      ppo.loss_fn,
      apply_fn=apply,
      config=dataclasses.replace(config, packed_length=length),
      temperature=0.7,
    )
    run = jax.jit(functools.partial(gradients, loss, microbatches=2))
    found.append(run(params, batch, jax.random.key(0)))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *found)
  assert abs(found[0][1]["kl/old"]) > 1e-4


def test_a_packed_update_is_that_of_padded_rows():
  config = ppo.PPOConfig(epochs=2, minibatches=2, microbatches=2)
  batch, params = uneven_batch()
  apply = shared_actor_critic(build(CONFIG, head="both"))
  params = params | {"value": {"score": params["value"]["score"]}}
  packed = dataclasses.replace(config, packed_length=12)
  tx, numbers = optax.sgd(0.1), []

  def make_step(rows):
    numbers.append(rows)
    return ppo.make_ppo_step(apply, tx, packed, temperature=0.7, packed_rows=rows)

  steps = (
    ppo.make_ppo_step(apply, tx, config, temperature=0.7),
    ppo.make_packed_ppo_step(make_step, packed),
  )
  found = []
  for step in steps:
    state = init_state(copy(params), tx)
    for _ in range(2):
      state, metrics = step(state, batch, jax.random.key(0))
    found.append((state, metrics))
  before, after = (metrics.pop("padding") for _, metrics in found)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *found)
  assert found[1][1]["skipped_steps"] == 0
  real = np.sum(batch.rollout.prompt_mask | batch.rollout.response_mask)
  np.testing.assert_allclose(before, 1 - real / (32 * (PROMPT + LENGTH)), rtol=1e-5)
  np.testing.assert_allclose(after, 1 - real / (4 * numbers[-1] * 12), rtol=1e-5)
  assert after < before


def test_packed_rows_too_short_for_a_sequence_are_refused():
  with pytest.raises(ValueError, match="packed_length must be at least 10, .* got 8"):
    ppo.packed_shape(4, 10, ppo.PPOConfig(packed_length=8), None)


@pytest.mark.parametrize(
  "settings",
  [
    {"packed_length": -1},
    {"kl_coef": -0.1},
    {"clip_low": -0.1},
    {"kl_horizon": 0},
    {"epochs": 0},
    {"minibatches": 0},
    {"gamma": 1.5},
    {"lam": -0.1},
  ],
)
def test_impossible_settings_are_refused(settings):
  with pytest.raises(ValueError, match=f"^{next(iter(settings))} must"):
    ppo.PPOConfig(**settings)


def test_minibatches_must_divide_the_responses():
  params, rollout, done = stopped_rollout(10)
  scores, ref = random_arrays(10)
  config = ppo.PPOConfig(minibatches=4)
  batch, _, _ = to_batch(
    rollout, scores, done, ref, tabular_values(params, rollout), ppo.init_control(config), config
  )
  tx = optax.sgd(0.1)
  step = ppo.make_ppo_step(tabular_apply, tx, config)
  with pytest.raises(ValueError, match="10 rows cannot be cut into 4 equal parts"):
    step(init_state(params, tx), batch, jax.random.key(0))
