"""Responses written by hand."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.types import Rollout


def rollout_of(responses, prompt=(5,)):
  """Rollout of token lists, each behind the same prompt and padded to the longest."""
  longest = max(map(len, responses))
  shape = (len(responses), len(prompt) + longest)
  tokens, on = np.zeros(shape, np.int32), np.zeros(shape, bool)
  for row, response in enumerate(responses):
    tokens[row, : len(prompt)] = prompt
    tokens[row, len(prompt) : len(prompt) + len(response)] = response
    on[row, len(prompt) : len(prompt) + len(response)] = True
  prompts = np.zeros(shape, bool)
  prompts[:, : len(prompt)] = True
  return Rollout(tokens, prompts, on, np.zeros((len(responses), longest), np.float32))


def late(params: Any) -> tuple[Any, float]:
  """Returns params as after an update that the devices have yet to do, and its seconds."""

  @jax.jit
  def update(params, x):
    x = jax.lax.fori_loop(0, 40, lambda i, x: x @ x / 1000, x)
    return jax.tree.map(lambda leaf: leaf + 0 * x[0, 0].astype(leaf.dtype), params)

  square = jnp.ones((1000, 1000))
  jax.block_until_ready(update(params, square))
  start = time.monotonic()
  jax.block_until_ready(update(params, square))
  seconds = time.monotonic() - start
  return update(params, square), seconds
