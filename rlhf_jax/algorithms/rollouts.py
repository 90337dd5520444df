"""What a policy says about responses that were sampled."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.losses import logprobs as logprobs_lib
from rlhf_jax.types import ApplyFn, Params, Rollout


def move_padding_right(real: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The arrays [B, T] with what is not `real` [B, T] moved behind the rest, in the same order."""
  order = jnp.argsort(~real, axis=1, stable=True)
  return tuple(jnp.take_along_axis(x, order, axis=1) for x in arrays)


def response_inputs(rollout: Rollout) -> dict[str, Any]:
  """Keyword arguments of `apply_fn` that compute the R + 1 last positions of a rollout.

  The output before a token is what predicts it, and the value of the state it is drawn in.
  """
  segment_ids = (rollout.prompt_mask | rollout.response_mask).astype(jnp.int32)
  return {"segment_ids": segment_ids, "last": rollout.logprobs.shape[1] + 1}


def token_figures(
  logits: logprobs_lib.Logits, tokens: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each token [B, T] given those before it, and the entropy it is drawn with.

  Args:
    logits: [B, T, V], maybe lazy; `logits[:, t]` predicts `tokens[:, t + 1]`.
    tokens: [B, T] int.
    temperature: Divides the logits, as it did when sampling.

  Returns:
    [B, T] each, 0 for the first token.
  """

  def figures(targets: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = logits / temperature
    return logprobs_lib.token_logprobs(logits, targets), logprobs_lib.entropy(logits)

  return logprobs_lib.over_next_tokens(figures, tokens, logits)


def response_logprobs(
  logits: logprobs_lib.Logits, rollout: Rollout, temperature: float
) -> tuple[jax.Array, jax.Array]:
  """Log-probabilities and entropies at the tokens of sampled responses.

  Args:
    logits: [B, R + 1, V] from `response_inputs`, maybe lazy.
    rollout: B responses of up to R tokens.
    temperature: Divides the logits, as it did when sampling.

  Returns:
    [B, R] each; what stands after the end of a response means nothing.
  """
  tokens = rollout.tokens[:, -rollout.logprobs.shape[1] - 1 :]
  logprobs, entropy = token_figures(logits, tokens, temperature)
  return logprobs[:, 1:], entropy[:, 1:]


def rollout_logprobs(
  apply_fn: ApplyFn, params: Params, rollout: Rollout, temperature: float
) -> tuple[jax.Array, jax.Array]:
  """`response_logprobs` of a language model, from one forward pass."""
  logits = apply_fn(params, rollout.tokens, **response_inputs(rollout))
  return response_logprobs(logits, rollout, temperature)
