"""Operations of the updates of a script, counted from the architecture."""

import math
from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax import preflight
from rlhf_jax.models import ModelConfig


class Counted:
  """A step whose metrics have `model_flops`, the operations of its forward and backward passes."""

  def __init__(self, step: Callable[..., Any], flops: Callable[[Any], float]):
    self._step, self._flops = step, flops

  def __call__(self, state: Any, batch: Any, *inputs: Any) -> tuple[Any, dict[str, Any]]:
    flops = self._flops(batch)
    state, metrics = self._step(state, batch, *inputs)
    return state, {**metrics, "model_flops": flops}

  def __getattr__(self, name: str) -> Any:
    return getattr(self._step, name)


def training_flops(
  config: ModelConfig,
  batch: Any,
  *,
  scored: int | None,
  epochs: int = 1,
  frozen: bool = False,
  critic: ModelConfig | None = None,
) -> float:
  """Counts the operations of the updates on a batch; what remat computes again does not count.

  Args:
    config: Architecture of the model.
    batch: Batch of an update; its arrays called `tokens` are what the model reads.
    scored: Positions per row whose logits are computed; None for a scalar head.
    epochs: Passes over the batch.
    frozen: True if adapters are trained.
    critic: Architecture of a critic with a model of its own, which reads the same rows.
  """
  flops = 0.0
  for rows, length in _rows(batch):
    flops += preflight.forward_flops(config, rows, length, scored=scored and min(scored, length))
    if critic is not None:
      flops += preflight.forward_flops(critic, rows, length)
  return (2 if frozen else 3) * epochs * flops


def _rows(batch: Any) -> list[tuple[int, int]]:
  """Number and length of the rows of each array of tokens."""
  leaves = jax.tree_util.tree_leaves_with_path(batch)
  shapes = [
    leaf.shape
    for path, leaf in leaves
    if path and getattr(path[-1], "name", getattr(path[-1], "key", "")) == "tokens"
  ]
  return [(math.prod(shape[:-1]), shape[-1]) for shape in shapes if len(shape) > 1]
