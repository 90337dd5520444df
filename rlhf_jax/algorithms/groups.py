"""Group-relative advantages: each response is compared with the others to its prompt; no critic.

GRPO, GSPO, CISPO and RLOO share this. The N responses to a prompt are adjacent rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import ranges
from rlhf_jax.algorithms import epochs, reading
from rlhf_jax.losses import advantages, kl, masked, policy_gradient
from rlhf_jax.types import Metrics, Params, Rollout

AverageName = Literal["responses", "tokens", "length"]
# (rewards [B / N, N], mask [B / N, N]) -> advantages [B / N, N].
Compare = Callable[..., jax.Array]
# (logprobs, old_logprobs, advantages, mask), [B, R] each -> losses [B, R].
TokenLoss = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class Average(NamedTuple):
  """Mean over tokens: functions from the mask [B, R] to weights [B, R] and to the unit count []."""

  weights: Callable[[jax.Array], jax.Array]
  count: Callable[[jax.Array], jax.Array]


def _weigh(aggregation: str) -> Callable[[jax.Array], jax.Array]:
  return functools.partial(policy_gradient.token_weights, aggregation=aggregation)


AVERAGES = {
  "responses": Average(_weigh("grpo"), lambda mask: jnp.sum(mask.any(axis=1))),
  "tokens": Average(_weigh("dapo"), jnp.sum),
  "length": Average(_weigh("dr_grpo"), lambda mask: jnp.sum(mask.any(axis=1))),
}


@dataclasses.dataclass(frozen=True)
class GroupConfig(epochs.UpdateConfig):
  """Settings of methods that compare the responses to a prompt.

  Attributes:
    kl_coef: Weight of the KL penalty to the reference, a k3 estimate in the loss.
    clip_low: Distance below 1 at which the probability ratio is clipped; 0 does not clip.
    clip_high: Distance above 1 at which the probability ratio is clipped; 0 does not clip.
    scale: Division of advantages by the standard deviation of the rewards of their group.
    average: Average over tokens. `responses` averages within each response, then over responses.
      `length` does so with the maximum length as divisor. `tokens` averages over all tokens.
  """

  kl_coef: float = 0.04
  clip_low: float = 0.2
  clip_high: float = 0.2
  scale: bool = True
  average: AverageName = "responses"

  def __post_init__(self):
    super().__post_init__()
    not_negative = ("kl_coef", "clip_low", "clip_high")
    ranges.check(self, non_negative=not_negative, one_of={"average": AVERAGES})

  def clips(self) -> dict[str, float]:
    """Returns the arguments of a loss that clips the probability ratio."""
    return policy_gradient.clip_range(self.clip_low, self.clip_high)


class GroupBatch(NamedTuple):
  """Responses with group-relative advantages. All but the tokens are constants of the loss.

  Attributes:
    rollout: B responses, with the old log-probabilities of the probability ratio.
    mask: [B, R] bool, True on response tokens of the rows of `reading.finite_rows`.
    advantages: [B, R] float32, the same at all tokens of a response.
    ref_logprobs: [B, R] float32, log-probabilities under the reference.
  """

  rollout: Rollout
  mask: jax.Array
  advantages: jax.Array
  ref_logprobs: jax.Array


def compare_responses(
  rollout: Rollout,
  rewards: jax.Array,
  ref_logprobs: jax.Array,
  samples_per_prompt: int,
  compare: Compare,
) -> tuple[GroupBatch, Metrics]:
  """Computes the advantages of B responses, each compared with the others of its group.

  Args:
    rollout: The responses, with their log-probabilities under the policy.
    rewards: [B] float, reward of each response; a row with NaN or Inf in any input is left out.
    ref_logprobs: [B, R] log-probabilities under the reference, at the sampling temperature.
    samples_per_prompt: Size N of a group; 1 makes the batch one group.
    compare: `(rewards, *, mask) -> advantages`, [B / N, N] each.
  """
  finite, mask = reading.finite_rows(rollout, rewards, ref_logprobs)
  rewards = jnp.where(finite, rewards, 0.0)
  of_prompts, on = (reading.in_groups(x, samples_per_prompt) for x in (rewards, finite))
  compared = jnp.where(mask, compare(of_prompts, mask=on).reshape(-1, 1), 0.0)
  old, ref_logprobs = (jnp.where(mask, x, 0.0) for x in (rollout.logprobs, ref_logprobs))
  metrics = {"reward/shaped": masked.defined_mean(rewards, finite)}
  metrics["groups/zero_std"] = jnp.mean(advantages.equal_groups(of_prompts, mask=on))
  return GroupBatch(rollout._replace(logprobs=old), mask, compared, ref_logprobs), metrics


def make_batch(
  rollout: Rollout,
  scores: jax.Array,
  ref_logprobs: jax.Array,
  config: GroupConfig,
  *,
  samples_per_prompt: int,
) -> tuple[GroupBatch, Metrics]:
  """Computes GRPO's advantages, scores [B] standardised per prompt; see `compare_responses`."""
  compare = functools.partial(advantages.group_normalize, scale=config.scale)
  return compare_responses(rollout, scores, ref_logprobs, samples_per_prompt, compare)


def loss_fn(
  params: Params,
  batch: GroupBatch,
  key: jax.Array,
  *,
  read: reading.Read,
  config: GroupConfig,
  token_loss: TokenLoss,
  ratio_metrics: Callable[..., Metrics] = reading.ratio_metrics,
) -> tuple[jax.Array, Metrics]:
  """Mean of a token loss plus `kl_coef` times k3; the metric `weight` is `Average.count`."""
  del key  # The loss is deterministic given the batch.
  mask, old, average = batch.mask, batch.rollout.logprobs, AVERAGES[config.average]
  now = read(params, batch.rollout)
  logprobs, weights = jnp.where(mask, now.logprobs, 0.0), average.weights(mask)
  policy_loss = jnp.sum(weights * token_loss(logprobs, old, batch.advantages, mask))
  kl_loss = jnp.sum(weights * kl.k3(logprobs, batch.ref_logprobs))
  return policy_loss + config.kl_coef * kl_loss, {
    "loss/policy": policy_loss,
    "loss/kl": kl_loss,
    "weight": average.count(mask).astype(jnp.float32),
    **ratio_metrics(logprobs, old, mask, **config.clips()),
  }
