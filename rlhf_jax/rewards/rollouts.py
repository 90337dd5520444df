"""Turns scorers of text or of tokens into scorers of a `Rollout`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.losses import masked, shaping
from rlhf_jax.rewards import checks, parts, segments
from rlhf_jax.rewards.functions import TextConstraint, TextReward, ask_constraint, ask_parts
from rlhf_jax.types import ApplyFn, Params, Rollout

# (rollout, prompt_ids [B]) -> scores [B] float32, NaN where they cannot be used, or `Parts`. Each
# of several processes scores the whole batch; process 0 alone calls functions of texts.
RewardFn = Callable[[Rollout, np.ndarray], jax.Array | np.ndarray | parts.Parts]


def make_scorer(apply_fn: ApplyFn) -> Callable[[Params, Rollout], jax.Array]:
  """Builds the jitted `(params, rollout) -> [B]` scores of a reward model.

  Args:
    apply_fn: `(params, tokens, *, segment_ids) -> scores [B, T]`; the score of a response is the
      one at its last token.
  """

  @jax.jit
  def score(params: Params, rollout: Rollout) -> jax.Array:
    segment_ids = (rollout.prompt_mask | rollout.response_mask).astype(jnp.int32)
    scores = apply_fn(params, rollout.tokens, segment_ids=segment_ids)
    return checks.mark(masked.last_real(scores, rollout.response_mask))

  return score


def model_reward(apply_fn: ApplyFn, params: Params) -> RewardFn:
  """Scores of a reward model, which reads the sampled tokens themselves.

  Args:
    apply_fn: See `make_scorer`.
    params: Params of a reward model that shares the policy's tokenizer.
  """
  score = make_scorer(apply_fn)
  return lambda rollout, prompt_ids: score(params, rollout)


def _worst_group(scores: jax.Array) -> jax.Array:
  """Scores of all responses by the model with the lowest mean in the batch, [B, G] -> [B]."""
  usable = jnp.all(checks.usable(scores), axis=1)
  return jnp.where(usable, shaping.worst_group(scores, usable), jnp.nan)


# (scores [B, G], coef) -> score [B].
ENSEMBLES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
  "mean": lambda scores, coef: shaping.variance_penalized(scores, coef=0.0),
  "min": lambda scores, coef: jnp.min(scores, axis=1),
  "uwo": lambda scores, coef: shaping.variance_penalized(scores, coef=coef),
  "nominal_min": lambda scores, coef: shaping.nominal_min(
    scores, jnp.mean(scores, axis=1), alpha=coef
  ),
  "worst_group": lambda scores, coef: _worst_group(scores),
}


def ensemble_reward(scorers: Mapping[str, RewardFn], rule: str, coef: float = 0.5) -> RewardFn:
  """Reduces the scores of several reward models to one, against errors that only one of them makes.

  Coste et al., 2023, https://arxiv.org/abs/2310.02743, and Yan et al., 2024,
  https://arxiv.org/abs/2409.15360. With the rule `worst_group` the models are those of groups of
  raters: MaxMin-RLHF, https://arxiv.org/abs/2402.08925.

  Args:
    scorers: The reward models by name; they should score on one scale.
    rule: Key of `ENSEMBLES`: the mean, the minimum, the mean minus `coef` times the variance,
      `coef` times the mean plus `1 - coef` times the minimum, or the model with the lowest mean.
    coef: Weight of the variance, or of the mean.
  """
  reduce = ENSEMBLES[rule]

  def score(rollout: Rollout, prompt_ids: np.ndarray) -> parts.Parts:
    named = {name: jnp.asarray(parts.total(s(rollout, prompt_ids))) for name, s in scorers.items()}
    return parts.Parts(reduce(jnp.stack([*named.values()], axis=1), coef), named=named)

  return score


def weighted_reward(scorers: Mapping[str, RewardFn], weights: Sequence[float]) -> RewardFn:
  """Sums rewards with weights; see `parts.weighted`.

  Args:
    scorers: The rewards by name.
    weights: Weight of each of them.
  """

  def score(rollout: Rollout, prompt_ids: np.ndarray) -> parts.Parts:
    given = {name: parts.parts_of(s(rollout, prompt_ids)) for name, s in scorers.items()}
    return parts.weighted(given, weights)

  return score


def response_texts(rollout: Rollout, decode: Callable[[list[list[int]]], list[str]]) -> list[str]:
  """Decodes every response, without special tokens.

  Args:
    rollout: B sampled responses.
    decode: Function from the token ids of several texts to the texts.
  """
  return decode(response_tokens(rollout))


def response_tokens(rollout: Rollout) -> list[list[int]]:
  """Returns the token ids of every response."""
  tokens, mask = sharding.to_host((rollout.tokens, rollout.response_mask))
  return [row[on].tolist() for row, on in zip(tokens, mask, strict=True)]


def text_reward(
  function: TextReward,
  rows: Sequence[Mapping[str, Any]],
  decode: Callable[[list[list[int]]], list[str]],
) -> RewardFn:
  """Scores of a Python function of prompt and response, or of the segments of a response.

  Args:
    function: The scorer.
    rows: Data rows, indexed by prompt id, with the prompt under "prompt_text".
    decode: Function from the token ids of several texts to the texts.
  """

  def score(rollout: Rollout, prompt_ids: np.ndarray) -> np.ndarray | parts.Parts:
    tokens = response_tokens(rollout)
    responses = decode(tokens)
    chosen = [rows[i] for i in np.asarray(prompt_ids).tolist()]
    given = ask_parts(function, [row["prompt_text"] for row in chosen], responses, rows=chosen)
    if not isinstance(given, segments.Segments):
      return given
    length = rollout.logprobs.shape[1]
    earned = segments.on_tokens(given, tokens, responses, decode, length)
    return parts.Parts(np.zeros(len(tokens), np.float32), earned)

  return score


def constrained_reward(
  reward_fn: RewardFn,
  constraints: Sequence[TextConstraint],
  rows: Sequence[Mapping[str, Any]],
  decode: Callable[[list[list[int]]], list[str]],
) -> RewardFn:
  """Adds the verdict of constraints to a reward, whose scores stay as they are.

  Args:
    reward_fn: The reward.
    constraints: Python functions of prompt and response.
    rows: See `text_reward`.
    decode: See `text_reward`.
  """

  def score(rollout: Rollout, prompt_ids: np.ndarray) -> parts.Parts:
    reward = parts.parts_of(reward_fn(rollout, prompt_ids))
    responses = response_texts(rollout, decode)
    chosen = [rows[i] for i in np.asarray(prompt_ids).tolist()]
    prompts = [row["prompt_text"] for row in chosen]
    verdicts = [
      ask_constraint(function, prompts, responses, rows=chosen) for function in constraints
    ]
    return reward._replace(satisfied=np.all(verdicts, axis=0))

  return score
