"""Forward passes over given responses, padded or packed: log-probabilities and scores."""

from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax.losses import logprobs as logprobs_lib
from rlhf_jax.losses import masked, packing
from rlhf_jax.types import ApplyFn, PackedBatch, Params, RankingBatch, TokenBatch


def read_rows(
  apply_fn: ApplyFn, params: Params, batch: TokenBatch | PackedBatch, score: Callable[..., Any]
) -> tuple[Any, jax.Array]:
  """Scores the tokens of given sequences, with the logits of only a few tokens in memory.

  Args:
    apply_fn: `(params, tokens [B, T]) -> logits [B, T, V]`; packed rows come with `segment_ids`.
    params: Policy.
    batch: Tokens and mask of any leading shape, [..., T].
    score: `(targets, logits [..., V]) -> tree` of numbers per token.

  Returns:
    Tree of [..., T] arrays, and the mask [..., T], False on first tokens, which nothing predicts.
  """
  flat = batch.tokens.reshape(-1, batch.tokens.shape[-1])
  ids = batch.segment_ids if isinstance(batch, PackedBatch) else None
  inputs = {} if ids is None else {"segment_ids": ids.reshape(flat.shape)}
  scored = logprobs_lib.over_next_tokens(score, flat, apply_fn(params, flat, **inputs))
  scored = jax.tree.map(lambda x: x.reshape(batch.tokens.shape), scored)
  return scored, packing.predicted(batch.mask, ids)


def read_tokens(
  apply_fn: ApplyFn, params: Params, batch: TokenBatch | PackedBatch, *, collision: bool = False
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

  def score(targets: jax.Array, logits: jax.Array) -> tuple[jax.Array, ...]:
    logprobs = logprobs_lib.token_logprobs(logits, targets)
    if not collision:
      return (logprobs,)
    squared = jax.nn.logsumexp(2 * jax.nn.log_softmax(masked.widen(logits)), axis=-1)
    return logprobs, jax.lax.stop_gradient(squared)

  scored, mask = read_rows(apply_fn, params, batch, score)
  if isinstance(batch, PackedBatch):
    mask, *scored = packing.unpack(batch.segment_ids, batch.real.shape[1], mask, *scored)
  return scored[0], mask, *scored[1:]


def read_scores(
  apply_fn: ApplyFn, params: Params, batch: TokenBatch | PackedBatch | RankingBatch
) -> jax.Array:
  """Scores [B, K] float32 of the K responses to each prompt, from one forward pass.

  Args:
    apply_fn: `(params, tokens [B, T]) -> scores [B, T]`; packed rows come with `segment_ids`.
    params: Reward model.
    batch: B prompts with their responses, two for pairs; packed pairs give B * S rows of scores.
      Empty slots get 0.
  """
  shape, tokens = batch.tokens.shape, batch.tokens.reshape(-1, batch.tokens.shape[-1])
  if not isinstance(batch, PackedBatch):
    return masked.last_real(apply_fn(params, tokens).reshape(shape), batch.mask)
  scores = apply_fn(params, tokens, segment_ids=batch.segment_ids.reshape(tokens.shape))
  mask, scores = packing.unpack(
    batch.segment_ids, batch.real.shape[1], batch.mask, scores.reshape(shape)
  )
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
