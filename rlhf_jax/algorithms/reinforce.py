"""Loss of the sequence-level policy gradient, which RLOO and CGPO share; it has no ratio."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algorithms import epochs, groups, reading
from rlhf_jax.losses import policy_gradient
from rlhf_jax.types import ApplyFn, Metrics, Params, TrainStep


def loss_fn(
  params: Params, batch: groups.GroupBatch, key: jax.Array, *, read: reading.Read
) -> tuple[jax.Array, Metrics]:
  """Policy-gradient loss, summed over the tokens of a response and averaged over responses.

  The sums are divided by the maximum length R. The metric `weight` counts the responses.
  """
  del key  # The loss is deterministic given the batch.
  mask, old = batch.mask, batch.rollout.logprobs
  now = read(params, batch.rollout)
  logprobs = jnp.where(mask, now.logprobs, 0.0)
  losses = policy_gradient.reinforce_loss(logprobs, batch.advantages)
  loss = jnp.sum(groups.AVERAGES["length"].weights(mask) * losses)
  return loss, {
    "loss/policy": loss,
    "weight": jnp.sum(mask.any(axis=1)).astype(jnp.float32),
    **reading.ratio_metrics(logprobs, old, mask, 0.2, 0.2),
  }


def make_reinforce_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: epochs.UpdateConfig,
  *,
  temperature: float = 1.0,
  packed: reading.Packing | None = None,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, GroupBatch, key) -> (state, metrics)`; see `make_epochs_step`."""
  read = reading.make_read(apply_fn, temperature, packed)
  loss = functools.partial(loss_fn, read=read)
  return epochs.make_epochs_step(loss, tx, config, packed=packed, state_shardings=state_shardings)
