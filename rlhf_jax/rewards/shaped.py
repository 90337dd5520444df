"""Shapes scores before a method sees them: comparison with the reference, normalisation, clipping.

Every method that samples can use it. The running moments belong in the state of an iteration.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax import ranges
from rlhf_jax.losses import reward, shaping
from rlhf_jax.rewards import checks


def center(scores: jax.Array, ref_scores: jax.Array) -> jax.Array:
  """Distance [B] of scores from the mean score [B, M] of the reference's responses."""
  return jnp.mean(scores[:, None] - ref_scores, axis=1)


def log_sigmoid(scores: jax.Array, ref_scores: jax.Array) -> jax.Array:
  """Log-sigmoid [B] of the distance from the mean score of the reference's responses [B, M]."""
  return shaping.log_sigmoid_reward(scores, jnp.mean(ref_scores, axis=1))


# (scores [B], scores of M responses of the reference to the same prompt [B, M]) -> scores [B].
SHAPINGS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "par": shaping.preference_as_reward,
  "center": center,
  "log_sigmoid": log_sigmoid,
}


@dataclasses.dataclass(frozen=True)
class ShapingConfig:
  """Changes to scores before a method sees them. Rewards of segments stay as they are.

  Attributes:
    function: Function that compares a score to the scores of the reference's responses to the
      prompt. `par` is the probability of beating them, `center` the distance from their mean,
      `log_sigmoid` the log-sigmoid of that distance. Empty for none.
    reference_samples: Number of responses of the reference to each prompt, for `function`.
    normalize: Normalisation of scores by their running mean and standard deviation.
    clip: Bound on the absolute value of a score; 0 does not clip.
    missing_eos_penalty: Penalty subtracted from the score of a truncated response.
  """

  function: str = ""
  reference_samples: int = 1
  normalize: bool = False
  clip: float = 0.0
  missing_eos_penalty: float = 1.0

  def __post_init__(self):
    ranges.check(self, non_negative=("clip",), at_least_one=("reference_samples",))
    if self.function and self.function not in SHAPINGS:
      known = ", ".join(SHAPINGS)
      raise ValueError(f"function must be one of {known}, or empty, got {self.function!r}")
    if self.reference_samples > 1 and not self.function:
      raise ValueError("reference_samples is not read without shaping.function; set both")


def shape(
  scores: jax.Array,
  ended: jax.Array,
  moments: reward.RunningMoments,
  config: ShapingConfig,
  ref_scores: jax.Array | None = None,
) -> tuple[jax.Array, reward.RunningMoments]:
  """Shapes the scores of a batch.

  Args:
    scores: [B] float. Entries that cannot be used are excluded from the moments.
    ended: [B] bool, True if the response ended in a stop token.
    moments: Running moments of the scores before this batch.
    config: Changes to make.
    ref_scores: [B, M] scores of M responses of the reference to the same prompt, for
      `config.function`.

  Returns:
    [B] float32 shaped scores, NaN where the score or that of the reference cannot be used, and the
    moments with this batch.

  Raises:
    ValueError: If `config.function` needs scores of the reference, and there are none.
  """
  finite = checks.usable(scores)
  scores = jnp.where(finite, scores, 0.0).astype(jnp.float32)
  if config.function:
    if ref_scores is None:
      raise ValueError(f"function={config.function} needs scores of the reference's responses")
    finite &= jnp.all(jnp.isfinite(ref_scores), axis=1)
    ref_scores = jnp.where(finite[:, None], ref_scores, 0.0)
    scores = SHAPINGS[config.function](scores, ref_scores)
    scores = jnp.where(finite, scores, 0.0)
  moments = reward.update_moments(moments, scores, finite)
  if config.normalize:
    scores = reward.normalize_scores(scores, moments)
  if config.clip:
    scores = jnp.clip(scores, -config.clip, config.clip)
  return jnp.where(finite, scores - config.missing_eos_penalty * ~ended, jnp.nan), moments
