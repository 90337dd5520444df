"""GSPO: GRPO with one probability ratio per response, the geometric mean of its token ratios.

Zheng et al., 2025, https://arxiv.org/abs/2507.18071, eq. 5 to 7. The clip range is far narrower
than that of a token ratio.
"""

import dataclasses
import functools
from typing import Any

import jax
import optax

from rlhf_jax.algorithms import epochs, groups, reading
from rlhf_jax.losses import policy_gradient
from rlhf_jax.types import ApplyFn, TrainStep

GSPOBatch = groups.GroupBatch
make_batch = groups.make_batch


@dataclasses.dataclass(frozen=True)
class GSPOConfig(groups.GroupConfig):
  """GSPO. The paper leaves out the KL penalty."""

  kl_coef: float = 0.0
  clip_low: float = 3e-4
  clip_high: float = 4e-4


def loss_fn(params, batch: GSPOBatch, key: jax.Array, *, read: reading.Read, config: GSPOConfig):
  """Clipped sequence-level policy loss plus `kl_coef` times k3; see `groups.loss_fn`."""
  token_loss = functools.partial(policy_gradient.gspo_loss, **config.clips())
  return groups.loss_fn(params, batch, key, read=read, config=config, token_loss=token_loss)


def make_gspo_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: GSPOConfig,
  *,
  temperature: float = 1.0,
  packed: reading.Packing | None = None,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, GSPOBatch, key) -> (state, metrics)`; see `make_epochs_step`."""
  read = reading.make_read(apply_fn, temperature, packed)
  loss = functools.partial(loss_fn, read=read, config=config)
  return epochs.make_epochs_step(loss, tx, config, packed=packed, state_shardings=state_shardings)
