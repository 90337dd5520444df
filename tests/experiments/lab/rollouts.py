"""Responses written by hand."""

import time
from typing import Any

import jax
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


def late(params: Any, seconds: float = 2.0) -> Any:
  """Copies params as an update does that the devices have not finished: seconds later."""

  def wait(x: np.ndarray) -> np.ndarray:
    time.sleep(seconds)
    return np.zeros_like(x)

  @jax.jit
  def updated(params):
    zero = jax.pure_callback(wait, jax.ShapeDtypeStruct((), np.float32), np.float32(0))
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), params)

  compiled = updated.lower(params).compile()
  return compiled(params)
