"""Online preference optimisation: trains on pairs of the policy's samples, judged during training.

Guo et al., 2024, https://arxiv.org/abs/2402.04792. The loss is any of `algorithms.dpo`. With the
policy of the previous round as reference it is the RLHF Workflow
(https://arxiv.org/abs/2405.07863). With a bonus on samples of the reference
(`terms.make_value_bonus`) it is XPO. Pairs of a response that satisfies all constraints and of one
that does not are CGPO's CODPO (https://arxiv.org/abs/2409.20370).
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax import ranges
from rlhf_jax.algorithms import picks
from rlhf_jax.losses import packing
from rlhf_jax.types import Rollout, TokenBatch


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
  """Choice of the pairs and of the reference.

  Attributes:
    pick: Rule that picks a pair from the samples of a prompt. `best_worst` takes the highest and
      the lowest score, `best_random` the highest score and a random other sample, `first_two` the
      first two samples. `constrained` takes the highest score of the samples that satisfy all
      constraints and the lowest of those that do not, or of all if all do.
    round_steps: Steps between updates of the reference to the current policy; 0 keeps the initial
      policy as the reference.
    bonus_coef: Weight of the exploration bonus, a function of the log-probability of samples of the
      reference (XPO; for VPO, its alpha times beta).
  """

  pick: str = "best_worst"
  round_steps: int = 0
  bonus_coef: float = 0.0

  def __post_init__(self):
    ranges.check(self, non_negative=("round_steps", "bonus_coef"), one_of={"pick": picks.PICKS})


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
