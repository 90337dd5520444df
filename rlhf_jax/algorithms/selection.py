"""Selection of scored responses to learn from, on the host."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses import shaping


def rank_by_advantage(rewards: np.ndarray, finite: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Ranks rewards [P, N] by their distance from the mean of their prompt."""
  count = np.maximum(finite.sum(axis=1, keepdims=True), 1)
  # Distances from the best are averaged, so that equal rewards have a distance of exactly 0.
  best = np.where(finite, rewards, -np.inf).max(axis=1, keepdims=True)
  below = np.where(finite, rewards - np.where(np.isfinite(best), best, 0.0), 0.0)
  return np.where(finite, below - below.sum(axis=1, keepdims=True) / count, 0.0), finite


def rank_all(rewards: np.ndarray, finite: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Ranks rewards [P, N] as they are."""
  return rewards, finite


def rank_best(rewards: np.ndarray, finite: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Ranks the best reward [P, N] of each prompt."""
  best = shaping.selection_weights(jnp.asarray(rewards), jnp.asarray(finite), "best")
  return rewards, np.asarray(best > 0)


class Rule(NamedTuple):
  """Rule that ranks responses.

  Attributes:
    rank: `(rewards, finite) -> (values, candidates)`, [P, N] each: the values are compared with the
      threshold, and only candidates may be kept. Rewards are 0 where not finite.
    one_per_prompt: True if at most one response per prompt may be kept.
    least_samples: Minimum number of responses per prompt.
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
  rewards: np.ndarray,
  quantile: float,
  *,
  keep: str = "threshold",
  temperature: float = 0.0,
  satisfied: np.ndarray | None = None,
) -> np.ndarray:
  """Weights of scored responses: positive above a quantile, 0 below it.

  Many responses may share a reward, such as 0 for a wrong answer, and that reward may be the
  threshold. Responses at the threshold are dropped if any response lies above it.

  Args:
    rewards: [P, N] rewards of N responses to each of P prompts; non-finite ones are left out.
    quantile: Share of the candidates below the threshold; 0 keeps all candidates.
    keep: Key of `RULES`.
    temperature: Temperature of the weights exp(reward / temperature), in standard deviations of the
      rewards; 0 gives all kept responses the same weight.
    satisfied: [P, N] bool, False on responses that violate a constraint, which are left out as
      well; None keeps them.

  Returns:
    [P, N] float32 weights, 0 for dropped responses; the largest is 1. All are 0 only if no reward
    of a response that may be kept is finite.
  """
  rewards = np.asarray(rewards, np.float64)
  finite = np.isfinite(rewards)
  if satisfied is not None:
    finite &= satisfied
  if not finite.any():
    return np.zeros(rewards.shape, np.float32)
  values, candidates = RULES[keep].rank(np.where(finite, rewards, 0.0), finite)
  spread = max(float(np.std(values[finite])), 1e-9)
  threshold = np.quantile(values[candidates], quantile)
  kept = candidates & (values > threshold + 1e-9 * spread)  # Equal rewards may differ by rounding.
  if quantile == 0 or not kept.any():
    kept = candidates & (values >= threshold)
  if not temperature:
    return kept.astype(np.float32)
  excess = np.where(kept, values - values[kept].max(), -np.inf)
  return np.exp(excess / (spread * temperature)).astype(np.float32)
