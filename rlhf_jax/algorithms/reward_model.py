"""Reward model trained on comparisons or rankings; the score is read at the last real token.

Stiennon et al., 2020, https://arxiv.org/abs/2009.01325, section 3.4; rankings as in Ouyang et al.,
2022, https://arxiv.org/abs/2203.02155, eq. 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import ranges
from rlhf_jax.algorithms import given
from rlhf_jax.losses import masked, reward
from rlhf_jax.train_step import make_train_step
from rlhf_jax.types import (
  ApplyFn,
  Metrics,
  PackedBatch,
  PairBatch,
  Params,
  RankingBatch,
  TrainStep,
)

# Pairs, index 0 chosen and 1 rejected, or rankings of K responses, each of which is scored once.
RewardModelBatch = PairBatch | RankingBatch


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
  """Reward model.

  Attributes:
    label_smoothing: Assumed probability that the label of a pair is flipped; not for rankings.
    margin: Margin by which the chosen score should exceed the rejected one; not for rankings.
    centering_coef: Weight of the penalty on the squared sum of a pair's two scores, which keeps
      scores near 0.
    microbatches: Micro-batches per batch; more of them save memory and give the same result.
  """

  label_smoothing: float = 0.0
  margin: float = 0.0
  centering_coef: float = 0.0
  microbatches: int = 1

  def __post_init__(self):
    ranges.check(self, non_negative=("centering_coef",), at_least_one=("microbatches",))
    if not 0 <= self.label_smoothing < 0.5:
      raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")


def ordered_pairs(scores: jax.Array, batch: RewardModelBatch) -> tuple[jax.Array, jax.Array]:
  """Arranges the scores of a batch in pairs, the better response first.

  Args:
    scores: [B, K] scores of the responses.
    batch: Pairs or rankings.

  Returns:
    [B, M, 2] scores of the better and of the worse response, and [B, M] bool, False where there
    is no such pair. M is 1 for pairs, K * K for rankings.
  """
  if isinstance(batch, PackedBatch):
    return scores[:, None], batch.real.reshape(-1, 1)
  if not isinstance(batch, RankingBatch):
    return scores[:, None], jnp.ones((scores.shape[0], 1), bool)
  rows, responses = scores.shape
  better = batch.ranks[:, :, None] < batch.ranks[:, None, :]
  mask = better & batch.real[:, :, None] & batch.real[:, None, :]
  square = (rows, responses, responses)
  sides = jnp.broadcast_to(scores[:, :, None], square), jnp.broadcast_to(scores[:, None], square)
  return jnp.stack(sides, axis=-1).reshape(rows, -1, 2), mask.reshape(rows, -1)


def mean_metrics(
  scores: jax.Array, batch: RewardModelBatch, *, config: RewardModelConfig
) -> tuple[jax.Array, Metrics]:
  """Bradley-Terry loss, averaged over the pairs of each prompt and then over prompts, and metrics.

  Of the batch only the order is read. Settings for pairs raise ValueError with rankings.
  """
  if isinstance(batch, RankingBatch):
    if config.margin or config.label_smoothing:
      raise ValueError("margin and label_smoothing are for pairs; set them to 0 for rankings")
    losses = reward.ranking_loss(scores, batch.ranks, batch.real)
  else:
    losses = reward.bradley_terry_loss(
      scores[:, 0], scores[:, 1], margin=config.margin, label_smoothing=config.label_smoothing
    )
  pairs, mask = ordered_pairs(scores, batch)
  penalty = reward.centering_penalty(pairs[..., 0].ravel(), pairs[..., 1].ravel())
  losses += config.centering_coef * masked.masked_mean(penalty.reshape(mask.shape), mask, axis=1)
  rows = mask.any(axis=1)
  metrics = pair_metrics(pairs, mask) | {"weight": jnp.sum(rows).astype(jnp.float32)}
  return masked.masked_mean(losses, rows), metrics


def loss_fn(
  params: Params,
  batch: RewardModelBatch,
  key: jax.Array,
  *,
  apply_fn: ApplyFn,
  config: RewardModelConfig,
) -> tuple[jax.Array, Metrics]:
  """Computes `mean_metrics`; the metric `weight` counts the prompts with a pair."""
  del key  # The loss is deterministic given the batch.
  scores = given.read_scores(apply_fn, params, batch)
  loss, metrics = mean_metrics(scores, batch, config=config)
  return loss, metrics | {"tokens": jnp.sum(batch.mask).astype(jnp.float32)}


@jax.jit
def pair_metrics(pairs: jax.Array, mask: jax.Array | None = None) -> Metrics:
  """`reward/*` metrics of [..., 2] better and worse scores; a tie counts as half a correct pair.

  With a mask [B, M] of pairs [B, M, 2] they are means over prompts with a pair, as in the loss.
  """

  def mean(x: jax.Array) -> jax.Array:
    if mask is None:
      return jnp.mean(x)
    return masked.defined_mean(masked.masked_mean(x, mask, axis=1), mask.any(axis=1))

  margin = pairs[..., 0] - pairs[..., 1]
  return {
    "reward/chosen": mean(pairs[..., 0]),
    "reward/rejected": mean(pairs[..., 1]),
    "reward/margin": mean(margin),
    "reward/accuracy": mean((margin > 0) + 0.5 * (margin == 0)),
  }


def make_reward_model_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: RewardModelConfig,
  *,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, RewardModelBatch, key) -> (state, metrics)`."""
  loss = functools.partial(loss_fn, apply_fn=apply_fn, config=config)
  return make_train_step(
    loss, tx, microbatches=config.microbatches, state_shardings=state_shardings
  )
