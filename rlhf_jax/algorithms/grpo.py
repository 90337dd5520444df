"""GRPO: the baseline of a response is the mean reward of its prompt, so there is no critic.

Shao et al., 2024, https://arxiv.org/abs/2402.03300, eq. 3 and 4: a clipped policy gradient on
standardised rewards, plus the k3 estimate of the KL to the reference as a term of the loss.

Two later methods are settings of it. Dr. GRPO (Liu et al., 2025, https://arxiv.org/abs/2503.20783)
is `scale=False, average="length"`. DAPO (Yu et al., 2025, https://arxiv.org/abs/2503.14476) is
`kl_coef=0, clip_high=0.28, average="tokens"`.
"""

import dataclasses
import functools
from typing import Any

import jax
import optax

from rlhf_jax.algorithms import epochs, groups, reading
from rlhf_jax.losses import policy_gradient
from rlhf_jax.types import ApplyFn, TrainStep

GRPOBatch = groups.GroupBatch
make_batch = groups.make_batch


@dataclasses.dataclass(frozen=True)
class GRPOConfig(groups.GroupConfig):
  """GRPO."""


def loss_fn(params, batch: GRPOBatch, key: jax.Array, *, read: reading.Read, config: GRPOConfig):
  """Clipped policy loss plus `kl_coef` times k3; see `groups.loss_fn`."""

  def token_loss(logprobs, old_logprobs, advantages, mask):
    del mask  # Ratios are per token.
    return policy_gradient.ppo_policy_loss(logprobs, old_logprobs, advantages, **config.clips())

  return groups.loss_fn(params, batch, key, read=read, config=config, token_loss=token_loss)


def make_grpo_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: GRPOConfig,
  *,
  temperature: float = 1.0,
  packed: reading.Packing | None = None,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, GRPOBatch, key) -> (state, metrics)`; see `make_epochs_step`."""
  read = reading.make_read(apply_fn, temperature, packed)
  loss = functools.partial(loss_fn, read=read, config=config)
  return epochs.make_epochs_step(loss, tx, config, packed=packed, state_shardings=state_shardings)
