"""Picks of a better and a worse sample of each prompt, from scores and verdicts."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


def _best(scores: jax.Array) -> jax.Array:
  """Index [B] of the highest finite score [B, N] of each prompt."""
  return jnp.argmax(jnp.where(jnp.isfinite(scores), scores, -jnp.inf), axis=1)


def best_worst(scores: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Picks the samples with the highest and with the lowest score [B, N] of each prompt."""
  del key
  return _best(scores), _best(-scores)


def best_random(scores: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Picks the sample with the highest score [B, N] of each prompt and a random other one."""
  rows, samples = scores.shape
  chosen, finite = _best(scores), jnp.isfinite(scores)
  others = jnp.maximum(jnp.sum(finite, axis=1), 2)
  nth = jax.random.randint(key, [rows], 1, others)
  # Places are counted from the chosen sample on, in a circle, and only finite scores count.
  places = (chosen[:, None] + jnp.arange(1, samples)[None]) % samples
  counts = jnp.cumsum(jnp.take_along_axis(finite, places, axis=1), axis=1)
  place = jnp.argmax(counts == nth[:, None], axis=1)
  return chosen, jnp.take_along_axis(places, place[:, None], axis=1)[:, 0]


def first_two(scores: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Picks the better and the worse of the first two samples of each prompt, scores [B, N]."""
  return best_worst(scores[:, :2], key)


def as_scored(scores: jax.Array, satisfied: jax.Array | None) -> jax.Array:
  """Ranks samples by their scores [B, N] alone."""
  del satisfied
  return scores


def satisfying_first(scores: jax.Array, satisfied: jax.Array | None) -> jax.Array:
  """Ranks samples [B, N] by their scores, and below them those that violate a constraint.

  A prompt of which no sample satisfies the constraints has NaN: nothing is chosen there.
  """
  if satisfied is None:
    raise ValueError("pick=constrained needs constraints")
  usable = jnp.isfinite(scores)
  known = jnp.where(usable, scores, 0.0)
  spread = jnp.max(known, axis=1, keepdims=True) - jnp.min(known, axis=1, keepdims=True)
  ranked = jnp.where(satisfied, scores, scores - spread - 1)
  return jnp.where(jnp.any(usable & satisfied, axis=1, keepdims=True), ranked, jnp.nan)


class Pick(NamedTuple):
  """Rule that picks a pair.

  Attributes:
    choose: `(scores [B, N], key) -> indices [B]` of the chosen and of the rejected sample.
    rank: `(scores, satisfied) -> scores`, [B, N] each, by which it chooses.
  """

  choose: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
  rank: Callable[[jax.Array, jax.Array | None], jax.Array] = as_scored


PICKS = {
  "best_worst": Pick(best_worst),
  "best_random": Pick(best_random),
  "first_two": Pick(first_two),
  "constrained": Pick(best_worst, satisfying_first),
}


def pick_pairs(
  scores: jax.Array, key: jax.Array, pick: str, satisfied: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Picks a better and a worse sample of each prompt.

  Args:
    scores: [B, N] float, N >= 2. A sample whose score is not finite is not picked.
    key: Random key, for `best_random`.
    pick: Key of `PICKS`.
    satisfied: [B, N] bool, True on samples that violate no constraint; None without constraints.

  Returns:
    Index of the chosen and of the rejected sample, [B] int32 each. They are equal where there is no
    pair: the two samples are tied, or fewer than two scores are finite.
  """
  if scores.shape[1] < 2:
    raise ValueError(f"pairs need at least 2 samples per prompt, got {scores.shape[1]}")
  scores = PICKS[pick].rank(scores, satisfied)
  chosen, rejected = PICKS[pick].choose(scores, key)
  at = lambda index: jnp.take_along_axis(scores, index[:, None], axis=1)[:, 0]  # noqa: E731
  is_pair = (at(chosen) > at(rejected)) & jnp.isfinite(at(rejected))
  rejected = jnp.where(is_pair, rejected, chosen)
  return chosen.astype(jnp.int32), rejected.astype(jnp.int32)
