"""Operations of the updates of a script, counted from the architecture."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from rlhf_jax import preflight
from rlhf_jax.models import ModelConfig
from rlhf_jax.types import SharedBatch


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
  for rows, length, shared in _rows(batch):
    flops += preflight.forward_flops(config, rows, length, scored=scored and min(scored, length))
    flops -= shared_flops(config, shared)
    if critic is not None:
      flops += preflight.forward_flops(critic, rows, length)
  return (2 if frozen else 3) * epochs * flops


def shared_flops(config: ModelConfig, tokens: int) -> float:
  """Operations of a forward pass that some tokens save, which rows share; attention saves none."""
  return 2.0 * tokens * preflight.matrices(config, config.experts_per_token)


def shared_tokens(batch: SharedBatch) -> int:
  """Number of tokens that a row for each response would have more."""
  return math.prod(batch.mask.shape) - math.prod(batch.tokens.shape)


def _rows(batch: Any) -> Iterator[tuple[int, int, int]]:
  """Number and length of the rows of each array of tokens, and the number of shared tokens."""
  leaves = jax.tree_util.tree_leaves_with_path(batch, is_leaf=lambda x: isinstance(x, SharedBatch))
  for path, leaf in leaves:
    if isinstance(leaf, SharedBatch):
      *shape, length = leaf.mask.shape
      yield math.prod(shape), length, shared_tokens(leaf)
      continue
    name = getattr(path[-1], "name", getattr(path[-1], "key", "")) if path else ""
    if name == "tokens" and len(leaf.shape) > 1:
      yield math.prod(leaf.shape[:-1]), leaf.shape[-1], 0
