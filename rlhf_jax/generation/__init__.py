"""Sampling on device: one jitted program with prefill and a decode loop."""

from rlhf_jax.generation.generate import ended, make_generate
from rlhf_jax.generation.mixture import MixtureParams, make_mixture
from rlhf_jax.generation.sampling import SamplingConfig, adjust_logits, sample

__all__ = [
  "MixtureParams",
  "SamplingConfig",
  "adjust_logits",
  "ended",
  "make_generate",
  "make_mixture",
  "sample",
]
