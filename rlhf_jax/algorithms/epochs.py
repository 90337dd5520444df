"""Updates on sampled responses: one program runs all epochs and minibatches of an iteration."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import ranges
from rlhf_jax.algorithms.reading import Packing
from rlhf_jax.losses import packing
from rlhf_jax.train_step import jit_step, merge_metrics, reported, split_epochs, update_epochs
from rlhf_jax.types import LossFn, Metrics, Rollout, TrainState, TrainStep


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
  """Division of a batch of responses into optimizer steps.

  Attributes:
    epochs: Passes over each batch of responses.
    minibatches: Optimizer steps per pass; must divide the number of responses.
    microbatches: Micro-batches per minibatch; more of them save memory and give the same result.
  """

  epochs: int = 1
  minibatches: int = 2
  microbatches: int = 1

  def __post_init__(self):
    ranges.check(self, at_least_one=("epochs", "minibatches", "microbatches"))

  @property
  def updates(self) -> int:
    """Optimizer steps per batch."""
    return self.epochs * self.minibatches

  @property
  def parts(self) -> int:
    """Micro-batches per pass."""
    return self.minibatches * self.microbatches


def make_epochs_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  config: UpdateConfig,
  *,
  packed: Packing | None = None,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, batch, key) -> (state, metrics)` for batches that have a `rollout`.

  `ratio/first_deviation` is the largest |ratio - 1| before the first update. It is 0 up to
  rounding when the sampler and the trainer compute the same probabilities. `padding` is the
  fraction of input positions that hold neither a prompt token nor a response token.

  Args:
    loss_fn: `(params, batch, key) -> (loss, metrics)` with `ratio_metrics` among the metrics. The
      leading axis of a batch is that of its rows, or of groups of rows that stay together.
    tx: Optimizer.
    config: Division of the batch.
    packed: Packing that `loss_fn` applies to each micro-batch.
    state_shardings: See `train_step.jit_step`.
  """

  def step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
    state, metrics = update_epochs(
      loss_fn,
      tx,
      state,
      batch,
      jax.random.fold_in(key, state.step),
      epochs=config.epochs,
      minibatches=config.minibatches,
      microbatches=config.microbatches,
    )
    first_deviation = metrics.pop("ratio/deviation/max")[0]
    rollout: Rollout = batch.rollout
    parts, (*rows, length) = config.parts, rollout.tokens.shape
    shape = (math.prod(rows) // parts, length)
    if packed is not None:
      shape = packed.shape(*shape)
    real = jnp.sum(rollout.prompt_mask | rollout.response_mask)
    return state, reported(merge_metrics(metrics)) | {
      "ratio/first_deviation": first_deviation,
      "padding": 1 - real / (parts * shape[0] * shape[1]),
    }

  return jit_step(step, state_shardings)


def make_packed_step(
  make_step: Callable[[Packing], TrainStep],
  config: UpdateConfig,
  packed_length: int,
  *,
  multiple: int = 1,
) -> TrainStep:
  """Builds `step(state, batch, key)` that packs a batch into as few rows as its lengths allow.

  The number of rows is that of the fullest micro-batch, rounded up by `packing.round_up`. The step
  recompiles for each new number of rows. The division into micro-batches does not depend on it.

  Args:
    make_step: `(packing) -> step`, a `make_x_step` with its other arguments bound.
    config: Division of the batch, the same as in the step.
    packed_length: Tokens per row.
    multiple: Number of devices that rows are split over.
  """
  step_of = functools.cache(lambda rows: make_step(Packing(packed_length, rows)))

  @jax.jit
  def count_rows(rollout: Rollout, step: jax.Array, key: jax.Array) -> jax.Array:
    lengths = split_epochs(
      jnp.sum(rollout.prompt_mask | rollout.response_mask, axis=-1),
      jax.random.fold_in(key, step),
      epochs=config.epochs,
      minibatches=config.minibatches,
      microbatches=config.microbatches,
    )
    fit = lambda part: packing.first_fit(part.reshape(-1), packed_length)  # noqa: E731, of groups.
    rows, _ = jax.vmap(fit)(lengths)
    return 1 + jnp.max(rows)

  def step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
    rows = packing.round_up(int(count_rows(batch.rollout, state.step, key)), multiple)
    return step_of(rows)(state, batch, key)

  return step
