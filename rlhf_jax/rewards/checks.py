"""Scores that cannot be used: they become NaN, and too many of them stop a run.

A method leaves out a response whose score is NaN. A judge that gives many of them is broken.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import sharding

# Larger scores mark failures, such as -1e9 or -1e30, and would drown all others in a mean.
TOO_LARGE = 1e9
MAX_SHARE = 0.1  # Of the scores of a batch.
MAX_BATCHES = 2  # In a row.
UNUSABLE = f"NaN, infinite, or {TOO_LARGE:g} and more in size"
_FIX = "let a function give a low number to what it cannot judge, or name another model at url"


class UnusableScoresError(RuntimeError):
  """A judge gave too many scores that cannot be used. The step that needed them was not taken."""

  exit_code = os.EX_SOFTWARE


def usable(scores: Any) -> Any:
  """Bools, True on scores of any shape that are finite and below `TOO_LARGE` in size."""
  return abs(scores) < TOO_LARGE  # False for NaN.


def mark(scores: Any) -> Any:
  """Returns NumPy or JAX scores of any shape with NaN in place of those that cannot be used."""
  where = jnp.where if isinstance(scores, jax.Array) else np.where
  return where(usable(scores), scores, np.float32(np.nan))


_count = jax.jit(lambda scores: jnp.sum(~usable(scores)))


def count(scores: Any) -> int:
  """Number of NumPy or JAX scores that cannot be used."""
  if isinstance(scores, jax.Array):
    return int(sharding.to_host(_count(scores)))
  return int(np.sum(~usable(np.asarray(scores))))


def _blame(judge: str, named: Mapping[str, Any] | None) -> str:
  """Adds to the name of a judge those of its scores that have some that cannot be used."""
  names = [name for name, scores in (named or {}).items() if count(scores)]
  return f"{judge} ({', '.join(names)})" if names else judge


def require(judge: str, scores: Any, named: Mapping[str, Any] | None = None) -> int:
  """Refuses scores of which more than `MAX_SHARE` cannot be used.

  Args:
    judge: Name of the judge, for the message.
    scores: NumPy or JAX scores of any shape.
    named: Scores by name that these are made of; the message names those that cannot be used.

  Returns:
    Number of scores that cannot be used.

  Raises:
    UnusableScoresError: There are too many of them.
  """
  bad, total = count(scores), np.size(scores)
  if bad > MAX_SHARE * total:
    raise UnusableScoresError(
      f"{_blame(judge, named)}: {bad} of {total} scores cannot be used ({UNUSABLE}), more than"
      f" {MAX_SHARE:.0%}; {_FIX}"
    )
  return bad


class Watch:
  """Check of the scores of one batch after another, on the host.

  Args:
    judge: Name of the judge, for messages.
    remote: True for a judge at an address, of which a reply may be lost now and then.
  """

  def __init__(self, judge: str, *, remote: bool = False):
    self._judge, self._remote, self._in_a_row = judge, remote, 0

  def check(self, scores: Any, named: Mapping[str, Any] | None = None) -> None:
    """Refuses a batch with too many scores that cannot be used, or a row of batches with any.

    A judge at an address may have a few of them in every batch.

    Args:
      scores: NumPy or JAX scores of a batch.
      named: Scores by name that these are made of.

    Raises:
      UnusableScoresError: More than `MAX_SHARE` of them cannot be used, or more than `MAX_BATCHES`
        batches in a row had one.
    """
    bad = require(self._judge, scores, named)
    self._in_a_row = self._in_a_row + 1 if bad and not self._remote else 0
    if self._in_a_row > MAX_BATCHES:
      raise UnusableScoresError(
        f"{_blame(self._judge, named)}: {self._in_a_row} batches in a row had scores that cannot be"
        f" used ({UNUSABLE}); {_FIX}"
      )
