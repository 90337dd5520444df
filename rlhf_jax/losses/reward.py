"""Losses that train reward models, and normalisation of their scores."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked


@masked.elementwise
def bradley_terry_loss(
  chosen: jax.Array,
  rejected: jax.Array,
  *,
  margin: float | jax.Array = 0.0,
  label_smoothing: float | jax.Array = 0.0,
) -> jax.Array:
  """Negative log-likelihood of a comparison: `-log sigmoid(chosen - rejected - margin)`.

  Ouyang et al., 2022, https://arxiv.org/abs/2203.02155, eq. 1; margin from Touvron et al., 2023,
  https://arxiv.org/abs/2307.09288, eq. 2.

  Args:
    chosen: [B] score of the preferred response.
    rejected: [B] score of the other one.
    margin: Scalar or [B], required difference of the scores.
    label_smoothing: Scalar or [B], assumed probability that a label is flipped. For a soft label
      `p`, the probability that the first response is the better one, pass `1 - p`.

  Returns:
    [B] loss, nats.
  """
  chex.assert_rank([chosen, rejected], 1)
  chex.assert_equal_shape([chosen, rejected])
  difference = chosen - rejected - margin
  keep = -(1 - label_smoothing) * jax.nn.log_sigmoid(difference)
  return keep - label_smoothing * jax.nn.log_sigmoid(-difference)


def binary_loss(scores: jax.Array, labels: jax.Array) -> jax.Array:
  """Negative log-likelihood of a label on one response: thumbs up, a principle met, correct.

  `-y log sigmoid(r) - (1 - y) log sigmoid(-r)`. This is a comparison with a response of score 0,
  which fixes the threshold at 0; comparisons alone leave it open. See RLUF
  (https://arxiv.org/abs/2505.14946) and RLBFF (https://arxiv.org/abs/2509.21319), where the score
  is `log P(yes) - log P(no)`. If positive labels are rare, keep all of them and a share of the
  negatives, and add the log of that share to the trained scores.

  Args:
    scores: [B] score of each response.
    labels: [B] in [0, 1], 1 is good; soft labels may lie between.

  Returns:
    [B] loss, nats.
  """
  chex.assert_rank([scores, labels], 1)
  chex.assert_equal_shape([scores, labels])
  labels = masked.widen(labels)
  return bradley_terry_loss(scores, jnp.zeros_like(scores), label_smoothing=1 - labels)


def ranking_loss(scores: jax.Array, ranks: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean Bradley-Terry loss over all ordered pairs of one prompt's responses.

  Ouyang et al., 2022, https://arxiv.org/abs/2203.02155, eq. 1. The pairs of one prompt stay
  together, so each response is scored only once.

  Args:
    scores: [B, K] scores of K responses.
    ranks: [B, K] int, 0 is best; equal ranks are ties and form no pair.
    mask: [B, K] bool, True on real responses.

  Returns:
    [B] loss, nats; 0 for a row without a pair.
  """
  chex.assert_rank([scores, ranks, mask], 2)
  chex.assert_equal_shape([scores, ranks, mask])
  better = ranks[:, :, None] < ranks[:, None, :]
  pair = better & mask[:, :, None] & mask[:, None, :]
  scores = jnp.where(mask, masked.widen(scores), 0.0)
  losses = -jax.nn.log_sigmoid(scores[:, :, None] - scores[:, None, :])
  count = jnp.maximum(jnp.sum(pair, axis=(1, 2)), 1)
  return jnp.sum(losses, axis=(1, 2), where=pair) / count.astype(scores.dtype)


@masked.elementwise
def centering_penalty(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
  """Squared sum of a pair's scores, which keeps scores near mean 0.

  Eisenstein et al., 2023, https://arxiv.org/abs/2312.09244, eq. 2.

  Args:
    chosen: [B] score of the preferred response.
    rejected: [B] score of the other one.

  Returns:
    [B] penalty.
  """
  chex.assert_rank([chosen, rejected], 1)
  chex.assert_equal_shape([chosen, rejected])
  return jnp.square(chosen + rejected)


_MAX_SCORE = 1e16  # A million squares of it have a sum in float32.


class RunningMoments(NamedTuple):
  """Mean and variance of every score seen so far, as explicit state.

  Attributes:
    count: [] float32, number of scores.
    mean: [] float32.
    m2: [] float32, sum of squared deviations from the mean.
  """

  count: jax.Array
  mean: jax.Array
  m2: jax.Array

  @classmethod
  def zero(cls) -> "RunningMoments":
    return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))

  @property
  def variance(self) -> jax.Array:
    """[] float32, that of all scores; 0 without any."""
    return self.m2 / jnp.maximum(self.count, 1.0)


def update_moments(moments: RunningMoments, x: jax.Array, mask: jax.Array) -> RunningMoments:
  """Adds a batch to the moments by the parallel-variance rule of Chan et al. (1979).

  Args:
    moments: Moments of the scores seen so far.
    x: [B] new scores. Those that are not finite, or whose squares overflow, are ignored: a sum with
      one of them would stay infinite.
    mask: [B] bool, False on scores to ignore.

  Returns:
    Moments of all scores, old and new.
  """
  chex.assert_rank([x, mask], 1)
  mask &= jnp.abs(x) < _MAX_SCORE
  added = jnp.sum(mask).astype(jnp.float32)
  count = moments.count + added
  centred, mean = masked.deviations(x, mask)
  delta = jnp.where(added > 0, jnp.squeeze(mean, 0) - moments.mean, 0.0)
  share = added / jnp.maximum(count, 1.0)
  m2 = moments.m2 + jnp.sum(jnp.square(centred))
  m2 += jnp.square(delta) * moments.count * share
  return RunningMoments(count, moments.mean + delta * share, m2)


@masked.elementwise
def normalize_scores(x: jax.Array, moments: RunningMoments, *, eps: float = 1e-8) -> jax.Array:
  """`(x - mean) / std` with running moments (PPO-max, https://arxiv.org/abs/2307.04964, eq. 15).

  Args:
    x: [B] scores.
    moments: Moments, normally already updated with `x`.
    eps: Constant added to the variance.

  Returns:
    [B].
  """
  return (x - moments.mean) * jax.lax.rsqrt(moments.variance + eps)
