"""PPO on sampled responses: a clipped policy gradient, a critic, and a KL penalty in the reward.

Schulman et al., 2017, https://arxiv.org/abs/1707.06347; for language models Ziegler et al., 2019,
https://arxiv.org/abs/1909.08593. Scored responses become a `PPOBatch`, which is learnt from.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import ranges
from rlhf_jax.algorithms import epochs, reading
from rlhf_jax.losses import advantages, masked, policy_gradient
from rlhf_jax.types import Metrics, Params, Rollout, TrainStep


@dataclasses.dataclass(frozen=True)
class PPOConfig(epochs.UpdateConfig):
  """PPO.

  Attributes:
    kl_coef: Weight of the KL penalty to the reference, in reward per nat.
    gamma: Discount per token.
    lam: Lambda of GAE. 1 is the Monte-Carlo return, 0 the one-step temporal difference.
    clip: Clip range of the probability ratio around 1; 0 does not clip.
    dual_clip: Upper bound on the ratio for negative advantages, above 1; 0 does not bound it.
    value_clip: Clip range of a value around that at the start of the iteration; 0 does not clip.
    value_coef: Weight of the value loss.
    entropy_coef: Weight of the entropy bonus.
  """

  kl_coef: float = 0.1
  gamma: float = ranges.rare(1.0)
  lam: float = 0.95
  clip: float = 0.2
  dual_clip: float = ranges.rare(0.0)
  value_clip: float = 0.2
  value_coef: float = ranges.rare(0.5)
  entropy_coef: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    not_negative = ("kl_coef", "clip", "value_clip", "value_coef", "entropy_coef")
    ranges.check(self, non_negative=not_negative, fraction=("gamma", "lam"))
    if self.dual_clip and not self.dual_clip > 1:
      raise ValueError(f"dual_clip must be above 1, or 0 for none, got {self.dual_clip}")


class PPOBatch(NamedTuple):
  """Responses with advantages and returns. All but the tokens are constants of the loss.

  Attributes:
    rollout: B responses, with the old log-probabilities of the probability ratio.
    mask: [B, R] bool, True on response tokens of the rows of `reading.finite_rows`.
    values: [B, R] float32, old value before each token.
    advantages: [B, R] float32, whitened over the batch.
    returns: [B, R] float32, targets of the critic.
  """

  rollout: Rollout
  mask: jax.Array
  values: jax.Array
  advantages: jax.Array
  returns: jax.Array


def make_batch(
  rollout: Rollout,
  scores: jax.Array,
  values: jax.Array,
  ref_logprobs: jax.Array,
  config: PPOConfig,
  *,
  kl_coef: float | jax.Array | None = None,
  token_rewards: jax.Array | None = None,
  estimate: Callable[..., tuple[jax.Array, jax.Array]] = advantages.gae,
) -> tuple[PPOBatch, Metrics]:
  """Turns B scored responses of up to R tokens into advantages and returns.

  Args:
    rollout: The responses, with their log-probabilities under the policy.
    scores: [B] float, reward of each response; a row with NaN or Inf is left out.
    values: [B, R] values before each token.
    ref_logprobs: [B, R] log-probabilities under the reference, at the sampling temperature.
    config: PPO settings.
    kl_coef: [] weight of the KL penalty; overrides `config.kl_coef`.
    token_rewards: [B, R] rewards of tokens, in addition to the scores; None for none.
    estimate: `(rewards, values, mask, *, gamma, lam) -> (advantages, returns)`.
  """
  finite, mask = reading.finite_rows(rollout, scores, values, ref_logprobs)
  kl_coef = config.kl_coef if kl_coef is None else kl_coef
  # Entries of padding are undefined; those of the batch are zero.
  arrays = rollout.logprobs, values, 0.0 if token_rewards is None else token_rewards
  old, values, given = (jnp.where(mask, x, 0.0) for x in arrays)
  rewards = policy_gradient.kl_shaped_rewards(scores, old, ref_logprobs, mask, kl_coef=kl_coef)
  advantage, returns = estimate(rewards + given, values, mask, gamma=config.gamma, lam=config.lam)
  rollout, advantage = rollout._replace(logprobs=old), masked.whiten(advantage, mask)
  return PPOBatch(rollout, mask, values, advantage, returns), {
    "reward/shaped": masked.defined_mean(jnp.sum(rewards + given, axis=1), finite),
    "value/explained_variance": policy_gradient.explained_variance(values, returns, mask),
  }


def loss_fn(
  params: Params, batch: PPOBatch, key: jax.Array, *, read: reading.Read, config: PPOConfig
) -> tuple[jax.Array, Metrics]:
  """Clipped policy loss plus `value_coef` times the value loss, averaged over tokens of `mask`."""
  del key  # The loss is deterministic given the batch.
  mask, old = batch.mask, batch.rollout.logprobs
  now = read(params, batch.rollout)
  logprobs, values = jnp.where(mask, now.logprobs, 0.0), jnp.where(mask, now.values, 0.0)
  clips = policy_gradient.clip_range(config.clip, config.clip)
  policy_losses = policy_gradient.ppo_policy_loss(
    logprobs, old, batch.advantages, dual_clip=config.dual_clip or None, **clips
  )
  value_losses = policy_gradient.ppo_value_loss(
    values, batch.values, batch.returns, clip=config.value_clip or None
  )
  policy_loss, value_loss = (masked.masked_mean(x, mask) for x in (policy_losses, value_losses))
  loss, entropy = policy_loss + config.value_coef * value_loss, {}
  if config.entropy_coef:
    loss -= config.entropy_coef * masked.masked_mean(now.entropy, mask)
    entropy = reading.mean_over_tokens({"entropy": now.entropy}, mask)
  return loss, {
    "loss/policy": policy_loss,
    "loss/value": value_loss,
    "weight": jnp.sum(mask).astype(jnp.float32),
    **entropy | reading.ratio_metrics(logprobs, old, mask, **clips),
  }


def make_ppo_step(
  apply_fn: reading.ActorCriticFn,
  tx: optax.GradientTransformation,
  config: PPOConfig,
  *,
  temperature: float = 1.0,
  packed: reading.Packing | None = None,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, PPOBatch, key) -> (state, metrics)`; see `make_epochs_step`."""
  ask = {"entropy": config.entropy_coef > 0}
  read = reading.make_actor_critic_read(apply_fn, temperature, packed, **ask)
  loss = functools.partial(loss_fn, read=read, config=config)
  return epochs.make_epochs_step(loss, tx, config, packed=packed, state_shardings=state_shardings)
