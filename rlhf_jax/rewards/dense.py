"""Rewards of tokens that are learnt by DPO."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhf_jax.losses import shaping
from rlhf_jax.rewards import parts
from rlhf_jax.types import Params, Rollout

# (params, ref_params, rollout) -> rewards of tokens [B, R].
DenseScorer = Callable[[Params, Params, Rollout], jax.Array]


def make_dense_scorer(read: Callable[..., Any], *, scale: float, clip: float) -> DenseScorer:
  """Builds the jitted `(params, ref_params, rollout) -> [B, R]` rewards of tokens.

  Args:
    read: `(params, rollout) -> reading` of a policy, with `logprobs` [B, R].
    scale: Reward per nat.
    clip: Bound on the absolute reward of a token.
  """

  @jax.jit
  def score(params: Params, ref_params: Params, rollout: Rollout) -> jax.Array:
    mask = rollout.response_mask[:, -rollout.logprobs.shape[1] :]
    dpo, ref = read(params, rollout).logprobs, read(ref_params, rollout).logprobs
    return shaping.dense_rewards(dpo, ref, mask, scale=scale, clip=clip)

  return score


def dense_reward(
  read: Callable[..., Any], params: Params, ref_params: Params, *, scale: float, clip: float
) -> Callable[[Rollout, np.ndarray], parts.Parts]:
  """Rewards of tokens by a policy that DPO has trained, beside a score of 0.

  RTO (Zhong et al., 2024, https://arxiv.org/abs/2404.18922); see `shaping.dense_rewards`.

  Args:
    read: See `make_dense_scorer`; it should read at the sampling temperature.
    params: Params of the policy that DPO has trained.
    ref_params: Params of its reference.
    scale: Reward per nat.
    clip: Bound on the absolute reward of a token.
  """
  score = make_dense_scorer(read, scale=scale, clip=clip)

  def reward(rollout: Rollout, prompt_ids: np.ndarray) -> parts.Parts:
    del prompt_ids
    return parts.Parts(
      np.zeros(rollout.tokens.shape[0], np.float32), score(params, ref_params, rollout)
    )

  return reward
