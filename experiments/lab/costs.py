"""Operations of the updates of a script, counted from the architecture."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from rlhf_jax import preflight
from rlhf_jax.algorithms import epochs
from rlhf_jax.algorithms.reading import Packing
from rlhf_jax.models import ModelConfig
from rlhf_jax.types import Rollout, SharedBatch


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
  updates: epochs.UpdateConfig | None = None,
  packed: Packing | None = None,
  frozen: bool = False,
  critic: ModelConfig | None = None,
  teacher: ModelConfig | None = None,
) -> float:
  """Counts the operations of the updates on a batch; what remat computes again does not count.

  Args:
    config: Architecture of the model.
    batch: Batch of an update; its arrays called `tokens` are what the model reads.
    scored: Positions per row whose logits are computed, of packed rows all; None for a scalar head.
    updates: Division of the batch; None is one pass.
    packed: Packing of the sampled responses, with its number of rows; None reads them padded.
    frozen: True if adapters are trained.
    critic: Architecture of a critic with a model of its own, which reads the sampled responses.
    teacher: Architecture of a model that is not trained and reads the same rows in the update.
  """
  flops, passes = 0.0, 2 if frozen else 3
  for rows in _rows(batch):
    count, length, scores = rows.count, rows.length, scored and min(scored, rows.length)
    if packed is not None and rows.sampled:
      assert updates is not None and packed.rows is not None
      count, length = updates.parts * packed.rows, packed.length
      scores = scored and length
    forward = preflight.forward_flops(config, count, length, scored=scores)
    forward -= shared_flops(config, rows.shared)
    if critic is not None and rows.sampled:
      forward += preflight.forward_flops(critic, count, length)
    flops += (1 if rows.constant else passes) * forward
    if teacher is not None:
      flops += preflight.forward_flops(teacher, count, length, scored=scores)
  return (1 if updates is None else updates.epochs) * flops


def shared_flops(config: ModelConfig, tokens: int) -> float:
  """Operations of a forward pass that some tokens save, which rows share; attention saves none."""
  return 2.0 * tokens * preflight.matrices(config, config.experts_per_token)


def shared_tokens(batch: SharedBatch) -> int:
  """Number of tokens that a row for each response would have more."""
  return math.prod(batch.mask.shape) - math.prod(batch.tokens.shape)


class _Rows(NamedTuple):
  """Rows of an array of tokens.

  Attributes:
    count: Number of rows.
    length: Tokens per row.
    shared: Tokens that rows share; see `shared_tokens`.
    sampled: True for sampled responses.
    constant: True if no gradient flows through them.
  """

  count: int
  length: int
  shared: int = 0
  sampled: bool = False
  constant: bool = False


def _rows(batch: Any) -> Iterator[_Rows]:
  """Rows of each array of tokens."""
  leaves = jax.tree_util.tree_leaves_with_path(
    batch, is_leaf=lambda x: isinstance(x, SharedBatch | Rollout)
  )
  for path, leaf in leaves:
    names = [getattr(entry, "name", getattr(entry, "key", "")) for entry in path]
    if isinstance(leaf, SharedBatch):
      *shape, length = leaf.mask.shape
      yield _Rows(math.prod(shape), length, shared_tokens(leaf))
    elif isinstance(leaf, Rollout):
      *shape, length = leaf.tokens.shape
      yield _Rows(math.prod(shape), length, sampled=True)
    elif names[-1:] == ["tokens"] and len(leaf.shape) > 1:
      *shape, length = leaf.shape
      yield _Rows(math.prod(shape), length, constant="mismatched" in names)  # Of `UnpairedBatch`.
