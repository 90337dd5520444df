"""Losses and estimators: arrays in, unreduced arrays out. Needs jax, chex and optax only.

Everything here runs under `jit`, `vmap`, `grad` and on any mesh. Masked positions may hold
anything, NaN included: they change neither a value nor a gradient.
"""

from rlhf_jax.losses import (
  advantages,
  kl,
  logprobs,
  masked,
  policy_gradient,
  reward,
  supervised,
)

__all__ = [
  "advantages",
  "kl",
  "logprobs",
  "masked",
  "policy_gradient",
  "reward",
  "supervised",
]
