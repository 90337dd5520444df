"""A policy over the nine sequences of two tokens out of three: small enough to enumerate.

An expectation over its samples is a sum over rows, weighed by `probabilities`, without noise.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

SEQUENCES = np.array(list(itertools.product(range(3), repeat=2)))
MASK = np.ones((9, 2), bool)
# Every ordered pair of sequences: two independent samples of one prompt.
PAIRS = np.array(list(itertools.product(range(9), repeat=2)))


def draw(seed):
  """Random logits of the first token and of the second one after each first."""
  rng = np.random.default_rng(seed)
  shapes = {"start": (3,), "one": (3, 3)}
  return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def logprobs(params):
  """[9, 2] log-probability of each token of each sequence."""
  first, second = SEQUENCES.T
  start = jax.nn.log_softmax(params["start"])[first]
  return jnp.stack([start, jax.nn.log_softmax(params["one"])[first, second]], axis=1)


def probabilities(params):
  """[9] of the sequences, constants: samples carry no gradient."""
  return jax.lax.stop_gradient(jnp.exp(jnp.sum(logprobs(params), axis=1)))


def pair_probabilities(params):
  """[81] of `PAIRS`."""
  return jnp.prod(probabilities(params)[PAIRS], axis=1)


def objective(params, ref, score, beta):
  """`E[score] - beta KL(policy || ref)`, what the policy gradients climb; exact."""
  ours, theirs = (jnp.sum(logprobs(x), axis=1) for x in (params, ref))
  return jnp.sum(jnp.exp(ours) * (score - beta * (ours - theirs)))


def assert_same_gradient(result, exact, scale=1.0, atol=1e-5):
  for name in exact:
    np.testing.assert_allclose(result[name], scale * exact[name], atol=atol)
