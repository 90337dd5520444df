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
  Params,
  RankingBatch,
  TokenBatch,
  TrainStep,
)

# Pairs: tokens [B, 2, T] right padded, index 0 chosen and 1 rejected; mask [B, 2, T] on responses.
# Or several pairs packed in a row, or rankings of K responses, each of which is scored once.
RewardModelBatch = TokenBatch | PackedBatch | RankingBatch


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
    is no such pair. M is 1 for pairs and K * K for rankings; all packed pairs are one row.
  """
  if isinstance(batch, PackedBatch):  # All pairs in one row, so that each counts the same.
    return scores[None], batch.real.reshape(1, -1)
  if not isinstance(batch, RankingBatch):
    return scores[:, None], jnp.ones((scores.shape[0], 1), bool)
  rows, responses = scores.shape
  better = batch.ranks[:, :, None] < batch.ranks[:, None, :]
  mask = better & batch.real[:, :, None] & batch.real[:, None, :]
  square = (rows, responses, responses)
  sides = jnp.broadcast_to(scores[:, :, None], square), jnp.broadcast_to(scores[:, None], square)
  return jnp.stack(sides, axis=-1).reshape(rows, -1, 2), mask.reshape(rows, -1)


def loss_fn(
  params: Params,
  batch: RewardModelBatch,
  key: jax.Array,
  *,
  apply_fn: ApplyFn,
  config: RewardModelConfig,
) -> tuple[jax.Array, Metrics]:
  """Bradley-Terry loss, averaged over the pairs of each prompt and then over prompts.

  The metrics are `pair_metrics`, the number of response tokens and, for packed pairs, the number of
  pairs as `weight`. Settings for pairs raise ValueError with rankings.
  """
  del key  # The loss is deterministic given the batch.
  scores = given.read_scores(apply_fn, params, batch)
  if isinstance(batch, RankingBatch):
    if config.margin or config.label_smoothing:
      raise ValueError("margin and label_smoothing are for pairs; set them to 0 for rankings")
    losses = reward.ranking_loss(scores, batch.ranks, batch.real)
  else:
    losses = reward.bradley_terry_loss(
      scores[:, 0], scores[:, 1], margin=config.margin, label_smoothing=config.label_smoothing
    )
  pairs, mask = ordered_pairs(scores, batch)
  tokens = jnp.sum(batch.mask).astype(jnp.float32)
  if isinstance(batch, PackedBatch):
    losses += config.centering_coef * reward.centering_penalty(scores[:, 0], scores[:, 1])
    loss = masked.masked_mean(losses, batch.real.reshape(-1))
    count = jnp.sum(batch.real).astype(jnp.float32)
    return loss, pair_metrics(pairs, mask) | {"tokens": tokens, "weight": count}
  penalty = reward.centering_penalty(pairs[..., 0].ravel(), pairs[..., 1].ravel())
  losses += config.centering_coef * masked.masked_mean(penalty.reshape(mask.shape), mask, axis=1)
  return jnp.mean(losses), pair_metrics(pairs, mask) | {"tokens": tokens}


@jax.jit
def pair_metrics(pairs: jax.Array, mask: jax.Array | None = None) -> Metrics:
  """`reward/*` metrics; a tie counts as half a correct pair.

  Args:
    pairs: [..., 2] scores of the better and of the worse response.
    mask: [B, M] bool for pairs [B, M, 2]: averages over the pairs of each prompt, then over
      prompts, as in the loss. None averages over all pairs.
  """

  def mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x if mask is None else masked.masked_mean(x, mask, axis=1))

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
