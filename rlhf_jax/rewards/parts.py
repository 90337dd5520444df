"""Rewards with parts: a score of the response, rewards of its tokens, and a verdict.

A `RewardFn` that gives more than a score returns `Parts`. Methods with a critic put the rewards of
tokens where they are earned. The others add them to the score.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.rewards import checks


class Parts(NamedTuple):
  """Reward of B responses of up to R tokens.

  Attributes:
    scores: [B] float, score of each response, NaN where it cannot be used.
    tokens: [B, R] float, rewards of tokens in addition to the score, 0 past the end of a response;
      None without such rewards.
    satisfied: [B] bool, True on responses that violate no constraint; None without constraints.
    named: Name -> [B] float, each of several rewards in one; None of a single reward.
  """

  scores: Any
  tokens: Any = None
  satisfied: Any = None
  named: Mapping[str, Any] | None = None


def parts_of(reward: Any) -> Parts:
  """Returns what a `RewardFn` gave as `Parts`; a score is NaN where any part cannot be used."""
  if not isinstance(reward, Parts):
    return Parts(reward)
  if reward.tokens is None:
    return reward
  usable = checks.usable(reward.tokens)
  where = jnp.where if isinstance(reward.tokens, jax.Array) else np.where
  scores = where(usable.all(axis=1), reward.scores, np.float32(np.nan))
  return reward._replace(scores=scores, tokens=where(usable, reward.tokens, np.float32(0)))


def total(reward: Any) -> Any:
  """Returns what a `RewardFn` gave as one number [B] per response: score plus rewards of tokens."""
  parts = parts_of(reward)
  return parts.scores if parts.tokens is None else parts.scores + parts.tokens.sum(axis=1)


def weighted(rewards: Mapping[str, Parts], weights: Sequence[float]) -> Parts:
  """Sums rewards with weights, scores and rewards of tokens alike, and keeps each by name.

  Args:
    rewards: Rewards of the same responses by name.
    weights: Weight of each of them.

  Returns:
    The sum; a response satisfies the constraints of all.
  """
  pairs = list(zip(rewards.values(), weights, strict=True))
  tokens = [weight * of.tokens for of, weight in pairs if of.tokens is not None]
  verdicts = [of.satisfied for of, _ in pairs if of.satisfied is not None]
  named: dict[str, Any] = {}
  for name, of in rewards.items():
    named |= of.named or {name: total(of)}
  return Parts(
    functools.reduce(operator.add, [weight * of.scores for of, weight in pairs]),
    functools.reduce(operator.add, tokens) if tokens else None,
    functools.reduce(operator.and_, verdicts) if verdicts else None,
    named,
  )


def columns(reward: Any, name: str = "reward") -> dict[str, Any]:
  """Returns the total of a reward as NAME, and each of several rewards in it as NAME/ITS_NAME."""
  parts = parts_of(reward)
  return {name: total(parts)} | {f"{name}/{of}": x for of, x in (parts.named or {}).items()}
