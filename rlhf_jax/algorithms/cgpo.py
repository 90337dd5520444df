"""CGPO's policy gradient (CRPG): a calibrated reward that violations of constraints forfeit.

Xu et al., 2024, https://arxiv.org/abs/2409.20370, section 4.1. The reward of a response is the
probability that it beats one of the reference (`shaping.preference_as_reward`). It falls with the
log-ratio to the reference and is zero for a violation (`shaping.constrained_reward`). The advantage
is its distance from the mean over the samples of the prompt, so violations are pushed down like the
worst response.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlhf_jax import ranges
from rlhf_jax.algorithms import epochs, groups, reading, reinforce
from rlhf_jax.losses import advantages, masked, shaping
from rlhf_jax.types import Metrics, Rollout

CGPOBatch = groups.GroupBatch
make_cgpo_step = reinforce.make_reinforce_step


@dataclasses.dataclass(frozen=True)
class CGPOConfig(epochs.UpdateConfig):
  """CGPO. It has no probability ratio, so it is on-policy only with one update per batch.

  Attributes:
    kl_max: Log-ratio to the reference, in nats per response, at which the reward reaches 0.
  """

  kl_max: float = 20.0
  minibatches: int = 1

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, positive=("kl_max",))


def make_batch(
  rollout: Rollout,
  scores: jax.Array,
  satisfied: jax.Array | None,
  ref_logprobs: jax.Array,
  config: CGPOConfig,
  *,
  samples_per_prompt: int,
) -> tuple[CGPOBatch, Metrics]:
  """Computes advantages of B responses from their calibrated rewards.

  Args:
    rollout: The responses, with their log-probabilities under the policy.
    scores: [B] float, calibrated reward of each response, not negative; a row with NaN or Inf in
      any input is left out.
    satisfied: [B] bool, True on responses that violate no constraint; None without constraints.
    ref_logprobs: [B, R] log-probabilities under the reference, at the sampling temperature.
    config: CGPO settings.
    samples_per_prompt: Responses per prompt, in adjacent rows; 1 makes the batch one group.
  """
  finite, mask = reading.finite_rows(rollout, scores, ref_logprobs)
  log_ratios = masked.masked_sum(rollout.logprobs - ref_logprobs, mask, axis=1)
  satisfied = jnp.ones_like(finite) if satisfied is None else satisfied
  rewards = shaping.constrained_reward(scores, satisfied, log_ratios, kl_max=config.kl_max)
  batch, metrics = groups.compare_responses(
    rollout,
    jnp.where(finite, rewards, jnp.nan),
    ref_logprobs,
    samples_per_prompt,
    functools.partial(advantages.group_normalize, scale=False),
  )
  beyond = (log_ratios >= config.kl_max).astype(jnp.float32)
  return batch, metrics | {"kl/beyond_max": masked.defined_mean(beyond, finite)}
