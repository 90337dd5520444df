"""Losses and estimators: arrays in, unreduced arrays out. Needs jax, chex and optax only.

Everything here runs under `jit`, `vmap`, `grad` and on any mesh. Masked positions may hold
anything, NaN included: they change neither a value nor a gradient.
"""

from rlhf_jax.losses import (
  advantages,
  game,
  kl,
  listwise,
  logprobs,
  masked,
  packing,
  policy_gradient,
  preference,
  reward,
  shaping,
  supervised,
)

__all__ = [
  "advantages",
  "game",
  "kl",
  "listwise",
  "logprobs",
  "masked",
  "packing",
  "policy_gradient",
  "preference",
  "reward",
  "shaping",
  "supervised",
]
