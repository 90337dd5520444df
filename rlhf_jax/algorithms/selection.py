"""Selection of scored responses to learn from, on the host."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses import shaping


def rank_by_advantage(rewards: np.ndarray, fine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Ranks rewards [P, N] by their distance from the mean of their prompt."""
  count = np.maximum(fine.sum(axis=1, keepdims=True), 1)
  return rewards - rewards.sum(axis=1, keepdims=True) / count, fine


def rank_all(rewards: np.ndarray, fine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Ranks rewards [P, N] as they are."""
  return rewards, fine


def rank_best(rewards: np.ndarray, fine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Ranks the best reward [P, N] of each prompt."""
  best = shaping.selection_weights(jnp.asarray(rewards), jnp.asarray(fine), "best")
  return rewards, np.asarray(best > 0)


class Rule(NamedTuple):
  """A way to rank responses.

  Attributes:
    rank: `(rewards, fine)` [P, N], 0 where not finite -> values to compare with the threshold, and
      the responses that may be kept.
    one_per_prompt: True if at most one response to a prompt may be kept.
    least_samples: Least number of responses to a prompt.
  """

  rank: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
  one_per_prompt: bool = False
  least_samples: int = 1


RULES = {
  "advantage": Rule(rank_by_advantage, least_samples=2),
  "threshold": Rule(rank_all),
  "best": Rule(rank_best, one_per_prompt=True, least_samples=2),
}


def kept_weights(
  rewards: np.ndarray, quantile: float, *, keep: str = "threshold", temperature: float = 0.0
) -> np.ndarray:
  """Weights of scored responses of which those above a quantile are kept.

  A reward that many responses share, such as 0 for a wrong answer, can be the threshold itself.
  Those at it are left out if any lies above.

  Args:
    rewards: [P, N] of N responses to each of P prompts; those that are not finite are left out.
    quantile: Share of the candidates below the threshold.
    keep: Key of `RULES`.
    temperature: Temperature of the weights exp(reward / temperature), in standard deviations of the
      rewards; 0 gives all that is kept the same weight.

  Returns:
    [P, N] float32, 0 on those left out; the largest is 1. All 0 only if no reward is finite.
  """
  rewards = np.asarray(rewards, np.float64)
  fine = np.isfinite(rewards)
  if not fine.any():
    return np.zeros(rewards.shape, np.float32)
  values, candidates = RULES[keep].rank(np.where(fine, rewards, 0.0), fine)
  spread = max(float(np.std(values[fine])), 1e-9)
  threshold = np.quantile(values[candidates], quantile)
  kept = candidates & (values > threshold + 1e-9 * spread)  # Equal ones may be rounded apart.
  if quantile == 0 or not kept.any():
    kept = candidates & (values >= threshold)
  if not temperature:
    return kept.astype(np.float32)
  excess = np.where(kept, values - values[kept].max(), -np.inf)
  return np.exp(excess / (spread * temperature)).astype(np.float32)
