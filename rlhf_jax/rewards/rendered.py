"""Scores of a reward model with another tokenizer or chat template than the policy's.

Responses are decoded. Each is put behind its prompt, rendered by the template of the reward model,
and encoded by its tokenizer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from rlhf_jax.data import DataError, Prompt
from rlhf_jax.rewards.rollouts import RewardFn, make_scorer, response_texts
from rlhf_jax.types import ApplyFn, Params, Rollout

_SHORTEST = 32  # Tokens of the shortest row.

# (prompts, responses) -> ids of each prompt with its response.
Encode = Callable[[Sequence[Prompt], Sequence[str]], list[list[int]]]


def rendered_reward(
  apply_fn: ApplyFn,
  params: Params,
  prompts: Sequence[Prompt],
  decode: Callable[[list[list[int]]], list[str]],
  encode: Encode,
  *,
  place: Callable[[Any], Any],
  limit: int | None = None,
) -> RewardFn:
  """Scores of a reward model that reads texts by a tokenizer of its own.

  Rows are padded to a power of two, so that few shapes are compiled. A text beyond `limit` gets
  NaN.

  Args:
    apply_fn: See `make_scorer`.
    params: Params of the reward model.
    prompts: Prompts, indexed by prompt id.
    decode: Function from the token ids of several responses of the policy to their texts.
    encode: Function from prompts and responses to the ids that the reward model reads.
    place: Function that puts arrays of a batch on the devices of the params.
    limit: Maximum number of tokens that the model reads; None is no limit.

  Raises:
    DataError: A prompt is beyond `limit` with an empty response, or the template refuses it.
  """
  longest = max(map(len, encode(prompts, [""] * len(prompts))), default=0)
  if limit and longest > limit:
    raise DataError(
      f"the longest prompt has {longest} tokens by the tokenizer of the reward model, made"
      f" for {limit} (its max_position_embeddings); lower --data.max_prompt_length"
    )
  score = make_scorer(apply_fn)

  def reward(rollout: Rollout, prompt_ids: np.ndarray) -> jax.Array:
    asked = [prompts[i] for i in np.asarray(prompt_ids).tolist()]
    ids = encode(asked, response_texts(rollout, decode))
    fits = np.array([0 < len(row) <= (limit or len(row)) for row in ids])
    if not fits.all():
      logging.warning("%d texts are beyond the %s tokens of the reward model", sum(~fits), limit)
    rows = Rollout(*place(_rows([row[:limit] for row in ids], limit)))
    return jnp.where(place(fits), score(params, rows), jnp.nan)

  return reward


def _rows(ids: Sequence[Sequence[int]], limit: int | None) -> tuple[np.ndarray, ...]:
  """Pads rows of ids on the right to one of few lengths, as fields of a `Rollout` of responses."""
  longest, length = max(map(len, ids)), _SHORTEST
  while length < longest:
    length *= 2
  tokens = np.zeros((len(ids), max(longest, min(length, limit or length))), np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, of in enumerate(ids):
    tokens[row, : len(of)], mask[row, : len(of)] = of, True
  return tokens, np.zeros_like(mask), mask, np.zeros((len(ids), 1), np.float32)
