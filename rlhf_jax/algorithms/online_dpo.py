"""Online preference optimisation: trains on pairs of the policy's samples, judged during training.

Guo et al., 2024, https://arxiv.org/abs/2402.04792. The loss is any of `algorithms.dpo`. With the
policy of the previous round as reference it is the RLHF Workflow
(https://arxiv.org/abs/2405.07863). With a bonus on samples of the reference
(`terms.make_value_bonus`) it is XPO.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax import ranges
from rlhf_jax.losses import packing
from rlhf_jax.types import Rollout, TokenBatch


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
  """Choice of the pairs and of the reference.

  Attributes:
    pick: Rule that picks a pair from the samples of a prompt. `best_worst` takes the highest and
      the lowest score, `best_random` the highest score and a random other sample, `first_two` the
      first two samples.
    round_steps: Steps between updates of the reference to the current policy; 0 keeps the initial
      policy as the reference.
    bonus_coef: Weight of the exploration bonus, a function of the log-probability of samples of the
      reference (XPO; for VPO, its alpha times beta).
  """

  pick: str = "best_worst"
  round_steps: int = 0
  bonus_coef: float = 0.0

  def __post_init__(self):
    ranges.check(self, non_negative=("round_steps", "bonus_coef"), one_of={"pick": PICKS})


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


# (scores [B, N], key) -> indices [B] of the chosen and of the rejected sample.
PICKS: dict[str, Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]] = {
  "best_worst": best_worst,
  "best_random": best_random,
  "first_two": first_two,
}


def pick_pairs(scores: jax.Array, key: jax.Array, pick: str) -> tuple[jax.Array, jax.Array]:
  """Picks a better and a worse sample of each prompt.

  Args:
    scores: [B, N] float, N >= 2. A sample whose score is not finite is not picked.
    key: Random key, for `best_random`.
    pick: Key of `PICKS`.

  Returns:
    Index of the chosen and of the rejected sample, [B] int32 each. They are equal where there is no
    pair: the two samples are tied, or fewer than two scores are finite.
  """
  if scores.shape[1] < 2:
    raise ValueError(f"pairs need at least 2 samples per prompt, got {scores.shape[1]}")
  chosen, rejected = PICKS[pick](scores, key)
  at = lambda index: jnp.take_along_axis(scores, index[:, None], axis=1)[:, 0]  # noqa: E731
  is_pair = (at(chosen) > at(rejected)) & jnp.isfinite(at(rejected))
  rejected = jnp.where(is_pair, rejected, chosen)
  return chosen.astype(jnp.int32), rejected.astype(jnp.int32)


def right_padded(rollout: Rollout) -> TokenBatch:
  """Moves all padding of a rollout to the right, so that responses follow their prompts.

  Args:
    rollout: B responses; prompts are left padded.

  Returns:
    tokens [B, P + R], and mask [B, P + R], True on responses.
  """
  real = rollout.prompt_mask | rollout.response_mask
  return TokenBatch(*packing.move_padding_right(real, rollout.tokens, rollout.response_mask))


def make_pairs(rollout: Rollout, chosen: jax.Array, rejected: jax.Array) -> TokenBatch:
  """Gathers the picked samples of every prompt into a pair.

  Args:
    rollout: B * N responses; those to a prompt are adjacent rows.
    chosen: [B] index of the chosen sample among the N.
    rejected: [B] index of the rejected sample.

  Returns:
    tokens [B, 2, T] and mask [B, 2, T], index 0 chosen and 1 rejected. The mask is all False where
    both are the same sample, so that no loss learns from it.
  """
  samples = right_padded(rollout)
  rows = chosen.shape[0]
  picked = jnp.stack([chosen, rejected], axis=1)

  def gather(x: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x.reshape(rows, -1, x.shape[-1]), picked[..., None], axis=1)

  is_pair = (chosen != rejected)[:, None, None]
  return TokenBatch(gather(samples.tokens), gather(samples.mask) & is_pair)
