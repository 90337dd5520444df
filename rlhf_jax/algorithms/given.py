"""Forward passes over given responses, padded or packed: log-probabilities and scores."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.losses import logprobs as logprobs_lib
from rlhf_jax.losses import masked, packing
from rlhf_jax.types import (
  ApplyFn,
  PackedBatch,
  PairBatch,
  Params,
  RankingBatch,
  SharedBatch,
  TokenBatch,
)


def read_rows(
  apply_fn: ApplyFn, params: Params, batch: PairBatch, **ask: Any
) -> tuple[logprobs_lib.TokenScores, jax.Array]:
  """Scores the tokens of given sequences, with the logits of only a few tokens in memory.

  Args:
    apply_fn: `(params, tokens [B, T]) -> logits [B, T, V]`; packed rows come with `segment_ids`,
      shared ones with `places`.
    params: Policy.
    batch: Tokens and mask of any leading shape, [..., T].
    **ask: Numbers to compute; see `losses.logprobs.token_scores`.

  Returns:
    Arrays [..., T], and the mask [..., T], False on first tokens, which nothing predicts.
  """
  logits, flat, mask = _run(apply_fn, params, batch)
  scores = logprobs_lib.next_token_scores(logits, flat, mask, **ask)
  return jax.tree.map(lambda x: x.reshape(batch.mask.shape), (scores, mask))


def read_nll(
  apply_fn: ApplyFn, params: Params, batch: TokenBatch | PackedBatch, **ask: Any
) -> tuple[jax.Array, logprobs_lib.TokenScores, jax.Array]:
  """Mean negative log-likelihood of the tokens of the mask, whose gradient costs no second pass.

  Args:
    apply_fn: See `read_rows`.
    params: Policy.
    batch: Tokens and mask, [B, T].
    **ask: Numbers to compute; see `losses.logprobs.token_scores`.

  Returns:
    Mean in nats per token; arrays [B, T] without a gradient, and the mask as in `read_rows`.
  """
  logits, flat, mask = _run(apply_fn, params, batch)
  weights = mask / jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
  nll, scores = logprobs_lib.next_token_nll(logits, flat, weights, **ask)
  return nll, scores, mask


def _run(
  apply_fn: ApplyFn, params: Params, batch: PairBatch | RankingBatch
) -> tuple[Any, jax.Array, jax.Array]:
  """Output of the model, and tokens and mask [N, T], False on first tokens."""
  length = batch.mask.shape[-1]
  mask = batch.mask.reshape(-1, length)
  if isinstance(batch, SharedBatch):
    flat = packing.separate(batch.tokens, batch.places)
    output = apply_fn(params, batch.tokens, places=batch.places)
    return output, flat, packing.predicted(mask)
  flat = batch.tokens.reshape(-1, length)
  if not isinstance(batch, PackedBatch):
    return apply_fn(params, flat), flat, packing.predicted(mask)
  ids = batch.segment_ids.reshape(flat.shape)
  return apply_fn(params, flat, segment_ids=ids), flat, packing.predicted(mask, ids)


def read_tokens(
  apply_fn: ApplyFn, params: Params, batch: PairBatch, *, collision: bool = False
) -> tuple[jax.Array, ...]:
  """Returns the token log-probabilities of given responses, one response per row.

  Args:
    apply_fn: See `read_rows`.
    params: Policy.
    batch: Tokens and mask of any leading shape, [..., T].
    collision: True to also return log sum_v pi(v)^2, without a gradient.

  Returns:
    Log-probability of each token [..., T], the mask [..., T] as in `read_rows` and, with
    `collision`, log sum_v pi(v)^2 at each token [..., T]. Packed sequences are unpacked into B * S
    rows; the mask of an empty slot is all False.
  """
  scores, mask = read_rows(apply_fn, params, batch, collision=collision)
  scored = [x for x in scores if x is not None]
  if isinstance(batch, PackedBatch):
    mask, *scored = packing.unpack(batch.segment_ids, batch.real.shape[1], mask, *scored)
  return scored[0], mask, *scored[1:]


def read_scores(apply_fn: ApplyFn, params: Params, batch: PairBatch | RankingBatch) -> jax.Array:
  """Scores [B, K] float32 of the K responses to each prompt, from one forward pass.

  Args:
    apply_fn: `(params, tokens [B, T]) -> scores [B, T]`; packed rows come with `segment_ids`.
    params: Reward model.
    batch: B prompts with their responses, two for pairs; packed pairs give B * S rows of scores.
      Empty slots get 0.
  """
  scores, _, _ = _run(apply_fn, params, batch)
  mask, scores = batch.mask, scores.reshape(batch.mask.shape)
  if isinstance(batch, PackedBatch):
    mask, scores = packing.unpack(batch.segment_ids, batch.real.shape[1], mask, scores)
  return masked.last_real(scores, mask)


def read_preferences(
  apply_fn: ApplyFn, params: Params, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
  """Log-odds [B] float32 that the first response is preferred; swapping the orders flips the sign.

  Args:
    apply_fn: `(params, tokens [B, T]) -> scores [B, T]`.
    params: Preference model.
    tokens: [B, 2, T] int32, right padded: (prompt, a, b) and (prompt, b, a).
    mask: [B, 2, T] bool, True on response tokens.
  """
  scores = read_scores(apply_fn, params, TokenBatch(tokens, mask))
  return scores[:, 0] - scores[:, 1]
