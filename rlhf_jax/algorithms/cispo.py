"""CISPO: REINFORCE with clipped importance weights, so every token keeps its gradient.

MiniMax-M1, 2025, https://arxiv.org/abs/2506.13585, eq. 4 and 5. The advantages are those of GRPO.
As in the paper there is no KL penalty and no lower bound on the weights.
"""

import dataclasses
import functools
from typing import Any

import jax
import optax

from rlhf_jax.algorithms import epochs, groups, reading
from rlhf_jax.losses import policy_gradient
from rlhf_jax.types import ApplyFn, TrainStep

CISPOBatch = groups.GroupBatch
make_batch = groups.make_batch


@dataclasses.dataclass(frozen=True)
class CISPOConfig(groups.GroupConfig):
  """CISPO."""

  kl_coef: float = 0.0
  clip_low: float = 1.0
  clip_high: float = 4.0
  average: groups.AverageName = "tokens"


def loss_fn(params, batch: CISPOBatch, key: jax.Array, *, read: reading.Read, config: CISPOConfig):
  """Weighted log-probabilities plus `kl_coef` times k3; see `groups.loss_fn`."""

  def token_loss(logprobs, old_logprobs, advantages, mask):
    del mask  # Weights are per token.
    return policy_gradient.cispo_loss(logprobs, old_logprobs, advantages, **config.clips())

  return groups.loss_fn(params, batch, key, read=read, config=config, token_loss=token_loss)


def make_cispo_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: CISPOConfig,
  *,
  temperature: float = 1.0,
  packed: reading.Packing | None = None,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, CISPOBatch, key) -> (state, metrics)`; see `make_epochs_step`."""
  read = reading.make_read(apply_fn, temperature, packed)
  loss = functools.partial(loss_fn, read=read, config=config)
  return epochs.make_epochs_step(loss, tx, config, packed=packed, state_shardings=state_shardings)
