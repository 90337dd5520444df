"""Model definitions and Hugging Face folders. The only package that imports flax."""

from rlhf_jax.models.build import (
  Model,
  actor_critic,
  build,
  count_params,
  round_matrices,
  shared_actor_critic,
)
from rlhf_jax.models.heads import shift_scores, zero_scores
from rlhf_jax.models.transformer import ModelConfig

__all__ = [
  "Model",
  "ModelConfig",
  "actor_critic",
  "build",
  "count_params",
  "round_matrices",
  "shared_actor_critic",
  "shift_scores",
  "zero_scores",
]
