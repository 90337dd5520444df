"""Judges of sampled responses: models on device, or Python functions of the text.

A judge of single responses becomes a `RewardFn`, `(rollout, prompt_ids) -> [B] scores or Parts`. A
judge of pairs becomes a `PreferenceFn`, `(a, b, prompt_ids) -> [B] P(a > b)`.
"""

from rlhf_jax.rewards.checks import UnusableScoresError, Watch, require
from rlhf_jax.rewards.dense import DenseScorer, dense_reward, make_dense_scorer
from rlhf_jax.rewards.functions import (
  CONSTRAINTS,
  REFERENCES,
  REWARDS,
  TextConstraint,
  TextReward,
  ask,
  ask_constraint,
)
from rlhf_jax.rewards.judge import PRINCIPLES, JudgeModel, Verdicts
from rlhf_jax.rewards.parts import Parts, columns, parts_of, total, weighted
from rlhf_jax.rewards.preferences import (
  PREFERENCES,
  PreferenceFn,
  TextPreference,
  anchored_reward,
  join_pairs,
  make_preferrer,
  model_preference,
  reward_preference,
  text_preference,
  tournament_reward,
)
from rlhf_jax.rewards.remote import Service, ServiceError, remote_preference, remote_reward
from rlhf_jax.rewards.rendered import rendered_reward
from rlhf_jax.rewards.rollouts import (
  ENSEMBLES,
  RewardFn,
  constrained_reward,
  ensemble_reward,
  make_scorer,
  model_reward,
  response_texts,
  text_reward,
  weighted_reward,
)

__all__ = [
  "CONSTRAINTS",
  "ENSEMBLES",
  "PREFERENCES",
  "PRINCIPLES",
  "REFERENCES",
  "REWARDS",
  "DenseScorer",
  "JudgeModel",
  "Parts",
  "PreferenceFn",
  "RewardFn",
  "Service",
  "ServiceError",
  "TextConstraint",
  "TextPreference",
  "TextReward",
  "UnusableScoresError",
  "Verdicts",
  "Watch",
  "anchored_reward",
  "ask",
  "ask_constraint",
  "columns",
  "constrained_reward",
  "dense_reward",
  "ensemble_reward",
  "join_pairs",
  "make_dense_scorer",
  "make_preferrer",
  "make_scorer",
  "model_preference",
  "model_reward",
  "parts_of",
  "remote_preference",
  "remote_reward",
  "rendered_reward",
  "require",
  "response_texts",
  "reward_preference",
  "text_preference",
  "text_reward",
  "total",
  "tournament_reward",
  "weighted",
  "weighted_reward",
]
