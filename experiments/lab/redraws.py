"""Dynamic sampling: responses to further prompts in place of those that teach nothing.

Yu et al., 2025, DAPO, https://arxiv.org/abs/2503.14476, section 3.2. A batch keeps its size, so no
program is compiled again: a group whose responses all have the same reward gives its place to one
of a later draw.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import rewards, sharding
from rlhf_jax.losses import advantages
from rlhf_jax.rewards import checks
from rlhf_jax.types import Rollout


class Draw(NamedTuple):
  """B scored responses; those to a prompt are adjacent rows.

  Attributes:
    rollout: Responses.
    prompt_ids: [B] ids of the prompts.
    reward: Reward of the responses.
    ended: [B] bool, True on responses that ended in a stop token.
    ref_scores: [B, M] scores of responses of the reference to the same prompt, or None.
  """

  rollout: Rollout
  prompt_ids: np.ndarray
  reward: rewards.Parts
  ended: jax.Array
  ref_scores: jax.Array | None = None


class Filled:
  """A batch that is filled with groups of later draws.

  Attributes:
    draw: Responses of the batch.
    lacking: [groups] bool, True on groups of the batch whose rewards are all equal.
    draws: Number of draws so far.
  """

  def __init__(self, first: Draw, samples: int, penalty: float, constrained: bool = False):
    """Takes the first draw.

    Args:
      first: Responses of the first draw.
      samples: Number of responses to a prompt.
      penalty: Penalty of a response that did not end.
      constrained: True if responses that violate a constraint are worth the same.
    """
    self._samples, self._penalty, self._constrained = samples, penalty, constrained
    rows = np.arange(first.prompt_ids.size)
    _make_take(_layout(first))(first.rollout, first.rollout, rows)  # Compiled in the first step.
    self.draw, self.draws, self._tokens = first, 1, _tokens(first)
    self.lacking, values = self._look(first)
    self._without, self._values = [self.lacking.copy()], [values]

  def add(self, more: Draw) -> None:
    """Puts the groups of a draw that have a signal in place of those that lack one, in order."""
    without, values = self._look(more)
    self.draws += 1
    self._tokens += _tokens(more)
    self._without.append(without)
    self._values.append(values)
    places, groups = np.flatnonzero(self.lacking), np.flatnonzero(~without)
    count = min(len(places), len(groups))
    if not count:
      return
    source = np.arange(len(self.lacking))
    source[places[:count]] = len(source) + groups[:count]
    self.lacking[places[:count]] = False
    rows = (source[:, None] * self._samples + np.arange(self._samples)).reshape(-1)
    rollout = _make_take(_layout(self.draw))(self.draw.rollout, more.rollout, rows)
    small = [draw[1:] for draw in (self.draw, more)]
    self.draw = Draw(rollout, *jax.tree.map(lambda a, b: _take(a, b, rows), *small))

  def metrics(self) -> dict[str, float]:
    """Numbers of draws and tokens; groups without signal and mean reward in all that was drawn."""
    values = np.concatenate(self._values)
    return {
      "groups/draws": float(self.draws),
      "tokens/drawn": self._tokens,
      "groups/zero_std/drawn": float(np.mean(np.concatenate(self._without))),
      "reward/drawn": float(np.mean(values)) if values.size else np.nan,
    }

  def _look(self, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Returns bools [groups], True without signal, and the rewards that can be used."""
    totals, ended = sharding.to_host((rewards.total(draw.reward), draw.ended))
    usable = np.asarray(checks.usable(totals))
    compared = np.where(usable, totals, 0) - self._penalty * ~ended
    if self._constrained and draw.reward.satisfied is not None:
      satisfied = sharding.to_host(draw.reward.satisfied)
      compared = np.where(satisfied, compared, np.min(compared) - 1)
    shape = (-1, self._samples)
    groups = jnp.asarray(compared).reshape(shape), jnp.asarray(usable).reshape(shape)
    equal = advantages.equal_groups(groups[0], mask=groups[1])
    return np.array(equal), np.asarray(totals)[usable]


def _tokens(draw: Draw) -> float:
  return float(jnp.sum(draw.rollout.response_mask))


def _layout(draw: Draw) -> Rollout:
  return jax.tree.map(lambda x: x.sharding, draw.rollout)


@functools.cache
def _make_take(layout: Rollout) -> Callable[[Rollout, Rollout, np.ndarray], Rollout]:
  """Jitted `(old, new, rows)`: rows of two rollouts behind each other, in a layout."""

  def take_rows(old: Rollout, new: Rollout, rows: np.ndarray) -> Rollout:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[rows], old, new)

  return jax.jit(take_rows, out_shardings=layout)


def _take(old: Any, new: Any, rows: np.ndarray) -> Any:
  """Rows of two arrays behind each other, laid out like the first."""
  rows = np.concatenate(sharding.to_host([old, new]))[rows]
  if not isinstance(old, jax.Array):
    return rows
  layout = old.sharding
  return (
    sharding.put(rows, layout) if isinstance(layout, jax.NamedSharding) else jax.device_put(rows)
  )
