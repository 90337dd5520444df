"""GSPO: GRPO with one probability ratio per response, the geometric mean of its token ratios.

Zheng et al., 2025, https://arxiv.org/abs/2507.18071, eq. 5 to 7. The clip range is far narrower
than that of a token ratio.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algorithms import epochs, groups, reading
from rlhf_jax.losses import masked, policy_gradient
from rlhf_jax.types import ApplyFn, Metrics, TrainStep

GSPOBatch = groups.GroupBatch
make_batch = groups.make_batch


@dataclasses.dataclass(frozen=True)
class GSPOConfig(groups.GroupConfig):
  """GSPO. The paper leaves out the KL penalty."""

  kl_coef: float = 0.0
  clip_low: float = 3e-4
  clip_high: float = 4e-4


def ratio_metrics(logprobs: jax.Array, old: jax.Array, mask: jax.Array, **clips: float) -> Metrics:
  """Metrics of the ratios of tokens, but for `clip_fraction`, which is that of responses."""
  log_ratio = masked.masked_mean(logprobs - old, mask, axis=1)[:, None]
  rows = mask.any(axis=1, keepdims=True)
  of_rows = reading.ratio_metrics(log_ratio, jnp.zeros_like(log_ratio), rows, **clips)
  clipped = {name: x for name, x in of_rows.items() if name.endswith("clip_fraction")}
  return reading.ratio_metrics(logprobs, old, mask, **clips) | clipped


def loss_fn(params, batch: GSPOBatch, key: jax.Array, *, read: reading.Read, config: GSPOConfig):
  """Clipped sequence-level policy loss plus `kl_coef` times k3; see `groups.loss_fn`."""
  token_loss = functools.partial(policy_gradient.gspo_loss, **config.clips())
  options = {"token_loss": token_loss, "ratio_metrics": ratio_metrics}
  return groups.loss_fn(params, batch, key, read=read, config=config, **options)


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
