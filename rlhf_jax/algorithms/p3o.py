"""P3O: pairwise PPO, whose trust region is on the ratio of two responses to a prompt; no critic.

Wu et al., 2023, https://arxiv.org/abs/2310.00212. The KL penalty is part of the reward. A reward
that is shifted by any number per prompt gives the same updates. The loss is
`policy_gradient.p3o_loss`, variant 2 of the paper.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import ranges
from rlhf_jax.algorithms import epochs, reading
from rlhf_jax.losses import masked, policy_gradient
from rlhf_jax.types import ApplyFn, Metrics, Params, Rollout, TrainStep


@dataclasses.dataclass(frozen=True)
class P3OConfig(epochs.UpdateConfig):
  """P3O.

  Attributes:
    kl_coef: Weight of the KL penalty to the reference, in reward per nat.
    clip: Bound on the ratio of the two probability ratios of a pair, which stays between
      1 / (1 + clip) and 1 + clip; 0 does not clip.
  """

  kl_coef: float = 0.1
  clip: float = 0.2

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, non_negative=("kl_coef", "clip"))


class P3OBatch(NamedTuple):
  """C pairs of responses to a prompt. All but the tokens are constants of the loss.

  Attributes:
    rollout: Responses [C, 2, ...], with the old log-probabilities of the probability ratio.
    mask: [C, 2, R] bool, True on response tokens of pairs that are both rows of
      `reading.finite_rows`.
    rewards: [C, 2] float32, rewards minus the KL penalty.
  """

  rollout: Rollout
  mask: jax.Array
  rewards: jax.Array


def make_batch(
  rollout: Rollout,
  scores: jax.Array,
  ref_logprobs: jax.Array,
  config: P3OConfig,
  *,
  samples_per_prompt: int,
) -> tuple[P3OBatch, Metrics]:
  """Pairs B scored responses of up to R tokens with their neighbours.

  Args:
    rollout: The responses, with their log-probabilities under the policy.
    scores: [B] float, reward of each response; a pair with NaN or Inf in any input is left out.
    ref_logprobs: [B, R] log-probabilities under the reference, at the sampling temperature.
    config: P3O settings.
    samples_per_prompt: Responses per prompt, in adjacent rows; an even number.
  """
  if samples_per_prompt % 2:
    raise ValueError(f"samples_per_prompt must be even, got {samples_per_prompt}")
  finite, mask = reading.finite_rows(rollout, scores, ref_logprobs)
  rollout = rollout._replace(logprobs=jnp.where(mask, rollout.logprobs, 0.0))
  rewards = policy_gradient.kl_shaped_rewards(
    scores, rollout.logprobs, ref_logprobs, mask, kl_coef=config.kl_coef
  )
  totals = jnp.sum(rewards, axis=1)
  metrics = {"reward/shaped": masked.defined_mean(totals, finite)}
  parts = rollout, mask, totals
  batch = P3OBatch(*jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), parts))
  both = finite.reshape(-1, 2).all(axis=1)
  return batch._replace(mask=batch.mask & both[:, None, None]), metrics


def loss_fn(
  params: Params, batch: P3OBatch, key: jax.Array, *, read: reading.Read, config: P3OConfig
) -> tuple[jax.Array, Metrics]:
  """Pairwise loss of whole responses, averaged over pairs and divided by the maximum length R.

  The metric `weight` counts the pairs, and `clip_fraction` is that of pairs.
  """
  del key  # The loss is deterministic given the batch.
  rollout, mask = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (batch.rollout, batch.mask))
  old, logprobs = rollout.logprobs, jnp.where(mask, read(params, rollout).logprobs, 0.0)
  new, before = (masked.masked_sum(x, mask, axis=1).reshape(-1, 2) for x in (logprobs, old))
  clip = policy_gradient.clip_range(config.clip, config.clip)
  losses = policy_gradient.p3o_loss(new, before, batch.rewards, clip=clip["clip_high"])
  pairs = batch.mask.any(axis=(1, 2))
  loss, count = masked.masked_mean(losses, pairs) / mask.shape[1], jnp.sum(pairs) * 1.0
  log_ratios = new - before
  moved = jnp.abs(log_ratios[:, 0] - log_ratios[:, 1])  # A product might round them.
  return loss, {
    "loss/policy": loss,
    "weight": count,
    **reading.ratio_metrics(logprobs, old, mask, **clip),
    "clip_fraction": masked.defined_mean(moved > jnp.log1p(clip["clip_high"]), pairs),
    "weight/clip_fraction": count,
  }


def make_p3o_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: P3OConfig,
  *,
  temperature: float = 1.0,
  packed: reading.Packing | None = None,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, P3OBatch, key) -> (state, metrics)`; see `make_epochs_step`."""
  read = reading.make_read(apply_fn, temperature, packed)
  loss = functools.partial(loss_fn, read=read, config=config)
  return epochs.make_epochs_step(loss, tx, config, packed=packed, state_shardings=state_shardings)
