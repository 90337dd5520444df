"""PF-PPO: PPO on a selection of the responses to each prompt.

Policy filtration (Shen and Zhang, 2024, https://arxiv.org/abs/2409.06957): a reward model is more
often right about the best and the worst of several responses than about those in between.
Responses are selected before advantages are whitened. (The released code selects afterwards.)
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax import ranges
from rlhf_jax.algorithms import ppo, reading
from rlhf_jax.losses import shaping
from rlhf_jax.types import Metrics, Rollout

# Rule of `shaping.selection_weights` -> responses that it selects from each group.
RULES = {"best_worst": 2, "best_random": 2, "best": 1}


@dataclasses.dataclass(frozen=True)
class PFPPOConfig(ppo.PPOConfig):
  """PF-PPO.

  Attributes:
    keep: Responses to each prompt that are trained on: the one with the highest reward and the one
      with the lowest (`best_worst`), or a random other one (`best_random`), or no other (`best`).
  """

  keep: Literal["best_worst", "best_random", "best"] = "best_worst"

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, one_of={"keep": RULES})

  @property
  def kept(self) -> int:
    """Number of responses to a prompt that are trained on."""
    return RULES[self.keep]


def select(
  rewards: jax.Array,
  finite: jax.Array,
  key: jax.Array,
  config: PFPPOConfig,
  *,
  samples_per_prompt: int,
) -> tuple[jax.Array, jax.Array]:
  """Selects K of the N responses of each group.

  Args:
    rewards: [B] reward of each response.
    finite: [B] bool, True on responses that may be selected.
    key: Random key, for `best_random`.
    config: PF-PPO settings.
    samples_per_prompt: Responses N per prompt, in adjacent rows.

  Returns:
    [B / N, K] indices within the groups, and bools of that shape, False on those that only fill up
    a group with too few responses.
  """
  shape = (-1, samples_per_prompt)
  weights = shaping.selection_weights(rewards.reshape(shape), finite.reshape(shape), config.keep)
  ranks = weights
  if config.keep == "best_random":  # The others have equal weights.
    ranks *= jax.random.uniform(key, ranks.shape, minval=1.0, maxval=2.0)
  _, indices = jax.lax.top_k(ranks, config.kept)
  return indices, jnp.take_along_axis(weights, indices, axis=1) > 0


def make_batch(
  rollout: Rollout,
  scores: jax.Array,
  values: jax.Array,
  ref_logprobs: jax.Array,
  config: PFPPOConfig,
  *,
  samples_per_prompt: int,
  key: jax.Array,
  token_rewards: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> tuple[ppo.PPOBatch, Metrics]:
  """Turns the selected of B scored responses into advantages and returns; see `ppo.make_batch`.

  Args:
    rollout: The responses; those to a prompt are adjacent rows.
    scores: [B] float, reward of each response.
    values: [B, R] values before each token.
    ref_logprobs: [B, R] log-probabilities under the reference.
    config: PF-PPO settings.
    samples_per_prompt: Responses per prompt.
    key: Random key, for `best_random`.
    token_rewards: [B, R] rewards of tokens, in addition to the scores; None for none.
    weights: [B, R] weights of the tokens, which multiply the advantages; None for none.

  Returns:
    The batch, of `config.kept` rows per prompt, and metrics.
  """
  finite, mask = reading.finite_rows(rollout, scores, values, ref_logprobs)
  totals = scores
  if token_rewards is not None:
    totals = scores + jnp.sum(jnp.where(mask, token_rewards, 0.0), axis=1)
  indices, kept = select(totals, finite, key, config, samples_per_prompt=samples_per_prompt)

  def take(x: Any) -> jax.Array:
    groups = x.reshape(-1, samples_per_prompt, *x.shape[1:])
    return jax.vmap(lambda group, at: group[at])(groups, indices).reshape(-1, *x.shape[1:])

  parts = rollout, scores, values, ref_logprobs, token_rewards, weights
  rollout, scores, values, ref_logprobs, token_rewards, weights = jax.tree.map(take, parts)
  scores = jnp.where(kept.reshape(-1), scores, jnp.nan)
  inputs = rollout, scores, values, ref_logprobs, config
  batch, metrics = ppo.make_batch(*inputs, token_rewards=token_rewards)
  if weights is not None:
    batch = batch._replace(advantages=weights * batch.advantages)
  return batch, metrics
