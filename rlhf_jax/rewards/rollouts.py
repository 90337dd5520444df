"""Turns scorers of text or of tokens into scorers of a `Rollout`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.losses import masked, shaping
from rlhf_jax.rewards import checks, parts
from rlhf_jax.rewards.functions import TextReward, ask
from rlhf_jax.types import ApplyFn, Params, Rollout

# (rollout, prompt_ids [B]) -> scores [B] float32, NaN where they cannot be used, or `Parts`. Each
# of several processes scores the whole batch, so equal arguments must give equal scores.
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


# (scores [B, G], coef) -> score [B].
ENSEMBLES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
  "mean": lambda scores, coef: shaping.variance_penalized(scores, coef=0.0),
  "min": lambda scores, coef: jnp.min(scores, axis=1),
  "uwo": lambda scores, coef: shaping.variance_penalized(scores, coef=coef),
}


def ensemble_reward(scorers: Sequence[RewardFn], rule: str, coef: float = 0.5) -> RewardFn:
  """Reduces the scores of several reward models to one, against errors that only one of them makes.

  Coste et al., 2023, https://arxiv.org/abs/2310.02743.

  Args:
    scorers: The reward models; they should score on one scale.
    rule: Key of `ENSEMBLES`: the mean, the minimum, or the mean minus `coef` times the variance.
    coef: Weight of the variance.
  """
  reduce = ENSEMBLES[rule]

  def score(rollout: Rollout, prompt_ids: np.ndarray) -> jax.Array:
    scores = jnp.stack([jnp.asarray(parts.total(s(rollout, prompt_ids))) for s in scorers], axis=1)
    return reduce(scores, coef)

  return score


def response_texts(rollout: Rollout, decode: Callable[[list[list[int]]], list[str]]) -> list[str]:
  """Decodes every response, without special tokens.

  Args:
    rollout: B sampled responses.
    decode: Function from the token ids of several texts to the texts.
  """
  tokens, mask = sharding.to_host((rollout.tokens, rollout.response_mask))
  return decode([row[on].tolist() for row, on in zip(tokens, mask, strict=True)])


def text_reward(
  function: TextReward,
  rows: Sequence[Mapping[str, Any]],
  decode: Callable[[list[list[int]]], list[str]],
) -> RewardFn:
  """Scores of a Python function of prompt and response.

  Args:
    function: The scorer.
    rows: Data rows, indexed by prompt id, with the prompt under "prompt_text".
    decode: Function from the token ids of several texts to the texts.
  """

  def score(rollout: Rollout, prompt_ids: np.ndarray) -> np.ndarray:
    responses = response_texts(rollout, decode)
    chosen = [rows[i] for i in np.asarray(prompt_ids).tolist()]
    return ask(function, [row["prompt_text"] for row in chosen], responses, rows=chosen)

  return score
