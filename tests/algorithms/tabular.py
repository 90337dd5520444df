"""A policy on nine sequences of two tokens, behind an empty prompt of one column."""

import jax
import jax.numpy as jnp

from rlhf_jax.types import Rollout

V, T = 3, 2


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
