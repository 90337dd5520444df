"""RLOO: sequence-level policy gradient; the baseline is the mean of the prompt's other samples.

Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740, eq. 6 and 7. The KL penalty is part of the
reward. With one sample per prompt the baseline is the mean of the rest of the batch, which is
REINFORCE.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax import ranges
from rlhf_jax.algorithms import epochs, groups, reading, reinforce
from rlhf_jax.losses import advantages, policy_gradient
from rlhf_jax.types import Metrics, Rollout

RLOOBatch = groups.GroupBatch
make_rloo_step = reinforce.make_reinforce_step


@dataclasses.dataclass(frozen=True)
class RLOOConfig(epochs.UpdateConfig):
  """RLOO. It has no probability ratio, so it is on-policy only with one update per batch.

  Attributes:
    kl_coef: Weight of the KL penalty to the reference, in reward per nat.
  """

  kl_coef: float = 0.1
  minibatches: int = 1

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, non_negative=("kl_coef",))


def make_batch(
  rollout: Rollout,
  scores: jax.Array,
  ref_logprobs: jax.Array,
  config: RLOOConfig,
  *,
  samples_per_prompt: int,
) -> tuple[RLOOBatch, Metrics]:
  """Computes leave-one-out advantages of B responses from their KL-penalised rewards.

  Args:
    rollout: The responses, with their log-probabilities under the policy.
    scores: [B] float, reward of each response; a row with NaN or Inf in any input is left out.
    ref_logprobs: [B, R] log-probabilities under the reference, at the sampling temperature.
    config: RLOO settings.
    samples_per_prompt: Responses per prompt, in adjacent rows; 1 makes the batch one group.
  """
  finite, mask = reading.finite_rows(rollout, scores, ref_logprobs)
  rewards = policy_gradient.kl_shaped_rewards(
    scores, rollout.logprobs, ref_logprobs, mask, kl_coef=config.kl_coef
  )
  totals = jnp.where(finite, jnp.sum(rewards, axis=1), jnp.nan)
  batch, metrics = groups.compare_responses(
    rollout, totals, ref_logprobs, samples_per_prompt, advantages.leave_one_out
  )
  before, on = (reading.in_groups(x, samples_per_prompt) for x in (scores, finite))  # The penalty.
  return batch, metrics | {"groups/zero_std": jnp.mean(advantages.equal_groups(before, mask=on))}
