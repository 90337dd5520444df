"""What several test files share."""

from rlhf_jax.models import ModelConfig

# Small enough to compile in seconds; large weights, so that its outputs differ between tokens.
TINY_MODEL = ModelConfig(
  vocab_size=16,
  width=16,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=8,
  mlp_width=32,
  init_std=0.3,
  remat=False,
)
