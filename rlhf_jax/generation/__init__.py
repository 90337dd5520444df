"""Sampling on device: one jitted program with prefill and a decode loop."""

from rlhf_jax.generation.generate import ended, make_generate
from rlhf_jax.generation.mixture import MixtureParams, make_mixture
from rlhf_jax.generation.sampling import SamplingConfig, adjust_logits, distinct_ids, sample
from rlhf_jax.generation.slots import usage
from rlhf_jax.generation.stopping import StopText, stop_text

__all__ = [
  "MixtureParams",
  "SamplingConfig",
  "StopText",
  "adjust_logits",
  "distinct_ids",
  "ended",
  "make_generate",
  "make_mixture",
  "sample",
  "stop_text",
  "usage",
]
