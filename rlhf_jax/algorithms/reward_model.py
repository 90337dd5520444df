"""Reward model from comparisons, with the score read at the last real token.

Stiennon et al., 2020, https://arxiv.org/abs/2009.01325, section 3.4.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.losses import masked, reward
from rlhf_jax.train_step import make_train_step
from rlhf_jax.types import ApplyFn, Metrics, Params, TokenBatch, TrainStep

# tokens [B, 2, T] right padded, index 0 chosen and 1 rejected; mask [B, 2, T] on responses.
RewardModelBatch = TokenBatch


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
  """Reward model.

  Attributes:
    label_smoothing: Assumed probability that a comparison is labelled the wrong way round.
    margin: Score difference asked of every pair.
    centering_coef: Weight of the penalty on the squared sum of a pair's scores.
    microbatches: Pieces each batch is cut into; saves memory, does not change the result.
  """

  label_smoothing: float = 0.0
  margin: float = 0.0
  centering_coef: float = 0.0
  microbatches: int = 1

  def __post_init__(self):
    if not 0 <= self.label_smoothing < 0.5:
      raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")


def pair_scores(apply_fn: ApplyFn, params: Params, batch: RewardModelBatch) -> jax.Array:
  """Scores of both responses, from one forward pass over all sequences.

  Args:
    apply_fn: `(params, tokens [B, T]) -> scores [B, T]`.
    params: Reward model.
    batch: B pairs.

  Returns:
    [B, 2] float32.
  """
  pairs, two, length = batch.tokens.shape
  scores = apply_fn(params, batch.tokens.reshape(pairs * two, length))
  return masked.last_real(scores.reshape(pairs, two, length), batch.mask)


def loss_fn(
  params: Params,
  batch: RewardModelBatch,
  key: jax.Array,
  *,
  apply_fn: ApplyFn,
  config: RewardModelConfig,
) -> tuple[jax.Array, Metrics]:
  """Mean Bradley-Terry loss of the batch, `pair_metrics`, and the number of response tokens."""
  del key  # The loss is deterministic given the batch.
  scores = pair_scores(apply_fn, params, batch)
  chosen, rejected = scores[:, 0], scores[:, 1]
  loss = reward.bradley_terry_loss(
    chosen, rejected, margin=config.margin, label_smoothing=config.label_smoothing
  )
  loss += config.centering_coef * reward.centering_penalty(chosen, rejected)
  tokens = jnp.sum(batch.mask).astype(jnp.float32)
  return jnp.mean(loss), pair_metrics(scores) | {"tokens": tokens}


def pair_metrics(scores: jax.Array) -> Metrics:
  """`reward/*` metrics from scores [B, 2]; a tie counts as half a correct pair."""
  margin = scores[:, 0] - scores[:, 1]
  return {
    "reward/chosen": jnp.mean(scores[:, 0]),
    "reward/rejected": jnp.mean(scores[:, 1]),
    "reward/margin": jnp.mean(margin),
    "reward/accuracy": jnp.mean((margin > 0) + 0.5 * (margin == 0)),
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
