"""REINFORCE++: PPO's clipped update without a critic, on advantages normalised over the batch.

Hu, 2025, https://arxiv.org/abs/2501.03262, sections 2.2 to 2.4. The advantage of a token is the
score minus the KL penalties of this token and of all later ones. Unlike GRPO it is normalised over
all tokens of the batch, so one response per prompt is enough.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import ranges
from rlhf_jax.algorithms import epochs, reading
from rlhf_jax.losses import advantages as advantages_lib
from rlhf_jax.losses import masked, policy_gradient
from rlhf_jax.types import ApplyFn, Metrics, Params, Rollout, TrainStep


@dataclasses.dataclass(frozen=True)
class ReinforcePPConfig(epochs.UpdateConfig):
  """REINFORCE++.

  Attributes:
    kl_coef: Weight of the KL penalty to the reference, in reward per nat.
    gamma: Discount per token.
    clip: Clip range of the probability ratio around 1; 0 does not clip.
  """

  kl_coef: float = 0.1
  gamma: float = 1.0
  clip: float = 0.2

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, non_negative=("kl_coef", "clip"), fraction=("gamma",))


class ReinforcePPBatch(NamedTuple):
  """Responses with advantages. All but the tokens are constants of the loss.

  Attributes:
    rollout: B responses, with the old log-probabilities of the probability ratio.
    mask: [B, R] bool, True on response tokens of the rows of `reading.finite_rows`.
    advantages: [B, R] float32, with mean 0 and variance 1 over the batch.
  """

  rollout: Rollout
  mask: jax.Array
  advantages: jax.Array


def make_batch(
  rollout: Rollout, scores: jax.Array, ref_logprobs: jax.Array, config: ReinforcePPConfig
) -> tuple[ReinforcePPBatch, Metrics]:
  """Turns B scored responses of up to R tokens into advantages.

  Args:
    rollout: The responses, with their log-probabilities under the policy.
    scores: [B] float, reward of each response; a row with NaN or Inf in any input is left out.
    ref_logprobs: [B, R] log-probabilities under the reference, at the sampling temperature.
    config: REINFORCE++ settings.
  """
  finite, mask = reading.finite_rows(rollout, scores, ref_logprobs)
  rollout = rollout._replace(logprobs=jnp.where(mask, rollout.logprobs, 0.0))
  rewards = policy_gradient.kl_shaped_rewards(
    scores, rollout.logprobs, ref_logprobs, mask, kl_coef=config.kl_coef
  )
  # With values of 0 and lambda 1 the advantage is the discounted sum of future rewards.
  returns, _ = advantages_lib.gae(
    rewards, jnp.zeros_like(rewards), mask, gamma=config.gamma, lam=1.0
  )
  batch = ReinforcePPBatch(rollout, mask, masked.whiten(returns, mask))
  return batch, {"reward/shaped": masked.defined_mean(jnp.sum(rewards, axis=1), finite)}


def loss_fn(
  params: Params,
  batch: ReinforcePPBatch,
  key: jax.Array,
  *,
  read: reading.Read,
  config: ReinforcePPConfig,
) -> tuple[jax.Array, Metrics]:
  """Clipped policy loss, averaged over the tokens of `mask`; the metric `weight` counts them."""
  del key  # The loss is deterministic given the batch.
  mask, old = batch.mask, batch.rollout.logprobs
  now = read(params, batch.rollout)
  logprobs = jnp.where(mask, now.logprobs, 0.0)
  clips = policy_gradient.clip_range(config.clip, config.clip)
  losses = policy_gradient.ppo_policy_loss(logprobs, old, batch.advantages, **clips)
  loss = masked.masked_mean(losses, mask)
  return loss, {
    "loss/policy": loss,
    "weight": jnp.sum(mask).astype(jnp.float32),
    **reading.ratio_metrics(logprobs, old, mask, **clips),
  }


def make_reinforce_pp_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: ReinforcePPConfig,
  *,
  temperature: float = 1.0,
  packed: reading.Packing | None = None,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, ReinforcePPBatch, key) -> (state, metrics)`; see `make_epochs_step`."""
  read = reading.make_read(apply_fn, temperature, packed)
  loss = functools.partial(loss_fn, read=read, config=config)
  return epochs.make_epochs_step(loss, tx, config, packed=packed, state_shardings=state_shardings)
