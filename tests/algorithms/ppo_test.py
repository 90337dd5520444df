"""PPO against exact answers on problems small enough to enumerate."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import ppo
from rlhf_jax.generation import SamplingConfig, make_generate
from rlhf_jax.models import ModelConfig, actor_critic, build
from rlhf_jax.train_step import init_state
from rlhf_jax.types import Rollout

V, T = 3, 2  # Nine sequences of two tokens behind an empty prompt of one column.


def tabular_apply(params, tokens, *, segment_ids=None, last):
  """Logits and values that depend on the prefix through a table."""
  del segment_ids
  first, second = tokens[:, 1], tokens[:, 2]
  policy, value = params["policy"], params["value"]
  batch = tokens.shape[0]

  def after(table, x):  # [B] prefix entries: empty, after one token, after two.
    start = jnp.broadcast_to(table["start"], (batch, *table["start"].shape))
    one = table["one"][first]
    return jnp.stack([start, one, jnp.zeros_like(one)], axis=1)[:, -last:]

  return after(policy, second), after(value, second)


def tabular_params(key):
  a, b = jax.random.split(key)
  return {
    "policy": {"start": jax.random.normal(a, (V,)), "one": jax.random.normal(b, (V, V))},
    "value": {"start": jnp.zeros(()), "one": jnp.zeros((V,))},
  }


def sequence_logprobs(policy):
  start, one = jax.nn.log_softmax(policy["start"]), jax.nn.log_softmax(policy["one"])
  return (start[:, None] + one).reshape(-1)  # [9], ordered as itertools.product.


def sample_rollout(policy, key, rows):
  first_key, second_key = jax.random.split(key)
  start, one = jax.nn.log_softmax(policy["start"]), jax.nn.log_softmax(policy["one"])
  first = jax.random.categorical(first_key, jnp.broadcast_to(start, (rows, V)))
  second = jax.random.categorical(second_key, one[first])
  tokens = jnp.stack([jnp.zeros_like(first), first, second], axis=1)
  response = jnp.broadcast_to(jnp.array([[False, True, True]]), tokens.shape)
  logprobs = jnp.stack([start[first], one[first, second]], axis=1)
  return Rollout(tokens, ~response, response, logprobs)


def test_reaches_the_exact_optimum_of_the_regularised_objective():
  beta, rows = 0.5, 512
  sequences = np.array(list(itertools.product(range(V), repeat=T)))
  reward = np.random.default_rng(0).normal(size=V**T).astype(np.float32)
  ref_params = tabular_params(jax.random.key(1))
  ref = sequence_logprobs(ref_params["policy"])
  optimum = jax.nn.log_softmax(ref + reward / beta)
  start_kl = jnp.sum(jnp.exp(ref) * (ref - optimum))
  assert start_kl > 0.3, "the problem must not start at its solution"

  config = ppo.PPOConfig(kl_coef=beta, epochs=2, minibatches=4, missing_eos_penalty=0.0)
  steps = 150
  tx = optax.adam(optax.linear_schedule(0.03, 0.0, steps * 8))
  step = ppo.make_ppo_step(tabular_apply, tx, config)
  experience = ppo.make_experience(
    tabular_apply,
    lambda params, tokens, **kwargs: tabular_apply(params, tokens, **kwargs)[0],
    config,
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
