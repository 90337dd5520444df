"""Scores of sampled responses: a reward model on device, or a Python function of the text.

Both become a `RewardFn`: `(rollout, prompt_ids) -> [B] scores`.
"""

from rlhf_jax.rewards.functions import REWARDS, TextReward
from rlhf_jax.rewards.rollouts import (
  RewardFn,
  ensemble_reward,
  model_reward,
  response_texts,
  text_reward,
)

__all__ = [
  "REWARDS",
  "RewardFn",
  "TextReward",
  "ensemble_reward",
  "model_reward",
  "response_texts",
  "text_reward",
]
