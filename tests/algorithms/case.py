"""Cases for the tests that hold for every method: see common_test.py.

Each test file of a method lists it in `CASES` under "", and the optional terms of its loss under
names of their own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhf_jax.algorithms import reading
from rlhf_jax.types import LossFn, Rollout, TrainStep
from tests.algorithms import toy

ROWS = 16


@dataclasses.dataclass(frozen=True)
class Case:
  """A method on a toy model.

  Attributes:
    make_step: `(apply_fn, tx, config, **options) -> step`, a `make_x_step`.
    config: Settings of the method.
    batch: Function from a seed to a batch of `ROWS` rows.
    apply: Model.
    params: Start.
    parts: Micro-batches that the loss is cut into in the tests; 1 if it cannot be cut.
    falls: False if the value of the loss is no objective, and only its gradient means something.
  """

  make_step: Callable[..., TrainStep]
  config: Any
  batch: Callable[[int], Any]
  apply: Callable[..., Any] = toy.language
  params: Any = dataclasses.field(default_factory=toy.params_of)
  parts: int = 4
  falls: bool = True

  def step(self, tx, *, microbatches=1, **options):
    """Returns the step of the case."""
    config = self.config
    if microbatches > 1:
      config = dataclasses.replace(config, microbatches=microbatches)
    return self.make_step(self.apply, tx, config, **options)


@dataclasses.dataclass(frozen=True)
class SampledCase(Case):
  """A policy gradient on sampled responses.

  Attributes:
    make_batch: `(rollout, scores, values, ref_logprobs, *, samples) -> batch`, not jitted.
    make_loss: `read -> (params, batch, key) -> (loss, metrics)`.
    critic: True if the params have a critic.
  """

  make_batch: Callable[..., Any] = lambda *args, **kwargs: None
  make_loss: Callable[[reading.Read], LossFn] = lambda read: lambda *args: None
  critic: bool = False


def sampled(make_step, config, make_batch, make_loss, *, critic=False, wrap=None, **options):
  """Builds the case of a policy gradient.

  Args:
    make_step: See `Case`.
    config: See `Case`.
    make_batch: See `SampledCase`.
    make_loss: See `SampledCase`.
    critic: See `SampledCase`.
    wrap: Function from a batch and a seed to the batch of the step.
    **options: Further fields.
  """
  params = toy.actor_critic_params() if critic else toy.params_of()
  policy = params["policy"] if critic else params
  to_batch = jax.jit(make_batch, static_argnames="samples")

  def batch(seed):
    rng = np.random.default_rng(seed)
    rollout = toy.rollout_of(policy, ROWS, seed)
    scores, values, other = inputs_of(rollout, rng)
    scores[seed % ROWS] = np.nan
    made = to_batch(rollout, scores, values, rollout.logprobs + other, samples=4)
    return jax.device_get(made if wrap is None else wrap(made, seed))

  return SampledCase(
    make_step,
    config,
    batch,
    toy.actor_critic if critic else toy.language,
    params,
    make_batch=make_batch,
    make_loss=make_loss,
    critic=critic,
    **options,
  )


def inputs_of(rollout: Rollout, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
  """Scores [B], values [B, R], and differences of log-probabilities to the reference [B, R]."""
  rows, length = rollout.logprobs.shape
  return tuple(
    scale * rng.normal(size=shape).astype(np.float32)
    for scale, shape in ((1, rows), (1, (rows, length)), (np.float32(0.3), (rows, length)))
  )
