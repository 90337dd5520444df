"""Forward passes over sampled responses: the interface of policy-gradient methods and models.

A method calls `read(params, rollout)` and gets one number per response token. The function hides
temperature, segment ids and packing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.losses import kl, masked, packing
from rlhf_jax.losses import logprobs as logprobs_lib
from rlhf_jax.types import ApplyFn, Metrics, Params, Rollout

# (params, tokens, *, segment_ids, last) -> logits [B, last, V] and values [B, last] or None.
# Without `last` both cover all positions.
ActorCriticFn = Callable[..., tuple[jax.Array, jax.Array | None]]


class Reading(NamedTuple):
  """One number per response token. Entries past the end of a response are undefined.

  Attributes:
    logprobs: [B, R] float32, log-probability of each token at the sampling temperature.
    entropy: [B, R] float32, entropy in nats of the distribution that each token is drawn from; None
      if it is not asked for.
    values: [B, R] float32, value before each token; zeros without a critic.
  """

  logprobs: jax.Array
  entropy: Any
  values: jax.Array


Read = Callable[[Params, Rollout], Reading]


class Packing(NamedTuple):
  """Layout in which one row holds several prompts with their responses.

  Attributes:
    length: Tokens per row.
    rows: Rows per micro-batch; None takes enough rows for any lengths. Responses that do not fit
      get log-probabilities of NaN.
  """

  length: int
  rows: int | None = None

  def shape(self, sequences: int, longest: int) -> tuple[int, int]:
    """Returns rows and tokens per row for `sequences`, the `longest` of which must fit into one."""
    if self.length < longest:
      raise ValueError(
        f"packed_length must be at least {longest}, a prompt and a response of maximum length,"
        f" got {self.length}"
      )
    return self.rows or -(-sequences // (self.length // longest)), self.length


def make_read(
  apply_fn: ApplyFn, temperature: float = 1.0, packed: Packing | None = None, **ask: Any
) -> Read:
  """Builds `read(params, rollout) -> Reading` for a language model.

  Args:
    apply_fn: `(params, tokens, *, segment_ids, last) -> logits`; packed rows come without `last`.
    temperature: Sampling temperature, which divides the logits; 0, which is greedy, counts as 1.
    packed: Packing of the sequences; None reads them padded, as they were sampled.
    **ask: `entropy=True` to compute the entropy, which takes as long as the log-probabilities.
  """
  return make_actor_critic_read(
    lambda *args, **kwargs: (apply_fn(*args, **kwargs), None), temperature, packed, **ask
  )


def make_actor_critic_read(
  apply_fn: ActorCriticFn, temperature: float = 1.0, packed: Packing | None = None, **ask: Any
) -> Read:
  """Builds `read(params, rollout) -> Reading` for a policy with a critic; see `make_read`."""
  temperature = temperature or 1.0  # As the sampler does.

  def score(logits: logprobs_lib.Logits, tokens: jax.Array, values: jax.Array | None) -> Reading:
    scores = logprobs_lib.next_token_scores(logits, tokens, temperature=temperature, **ask)
    values = jnp.zeros_like(scores.logprobs) if values is None else values
    return Reading(scores.logprobs, scores.entropy, values)

  def read_padded(params: Params, rollout: Rollout) -> Reading:
    segment_ids = (rollout.prompt_mask | rollout.response_mask).astype(jnp.int32)
    length = rollout.logprobs.shape[1]
    # The output before a token predicts it and holds the value of the state it is sampled in.
    logits, values = apply_fn(params, rollout.tokens, segment_ids=segment_ids, last=length + 1)
    scored = score(logits, rollout.tokens[:, -length - 1 :], values)
    after = jax.tree.map(lambda x: x[:, 1:], scored)
    return after._replace(values=scored.values[:, :-1])

  if packed is None:
    return read_padded

  def read_packed(params: Params, rollout: Rollout) -> Reading:
    shape, length = packed.shape(*rollout.tokens.shape), rollout.logprobs.shape[1]
    places = packing.places(rollout.prompt_mask | rollout.response_mask, shape)
    numbers = jnp.broadcast_to(1 + jnp.arange(places.shape[0])[:, None], places.shape)
    tokens, segment_ids = (packing.pack(x, places, shape) for x in (rollout.tokens, numbers))
    logits, values = apply_fn(params, tokens, segment_ids=segment_ids)
    before, at = places[:, -length - 1 : -1], places[:, -length:]
    scored = score(logits, tokens, values)
    taken = jax.tree.map(lambda x: packing.take(x, at), scored)
    return taken._replace(values=packing.take(scored.values, before))

  return read_packed


def finite_rows(
  rollout: Rollout, scores: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns rows [B] and their mask [B, R], without rows of which anything is NaN or infinite.

  Read are scores [B], and log-probabilities and `arrays` [B, R] of response tokens.
  """
  mask, rows = rollout.response_mask[:, -rollout.logprobs.shape[1] :], jnp.isfinite(scores)
  for x in (rollout.logprobs, *arrays):
    rows &= jnp.all(jnp.isfinite(x) | ~mask, axis=1)
  return rows, mask & rows[:, None]


def in_groups(x: jax.Array, samples_per_prompt: int) -> jax.Array:
  """Reshapes [B] to groups [B / N, N]; N of 1 makes the batch one group."""
  return x.reshape((-1, samples_per_prompt) if samples_per_prompt > 1 else (1, -1))


def mean_over_tokens(metrics: Metrics, mask: jax.Array) -> Metrics:
  """Means of metrics [B, R] over the tokens of a mask [B, R], and their number as `weight/NAME`."""
  count = jnp.sum(mask).astype(jnp.float32)
  means = {name: masked.defined_mean(x, mask) for name, x in metrics.items()}
  return means | {f"weight/{name}": count for name in metrics}


def ratio_metrics(
  logprobs: jax.Array, old: jax.Array, mask: jax.Array, clip_low: float, clip_high: float
) -> Metrics:
  """Metrics of the ratio of the policy to the old policy, from log-probabilities [B, R] of both."""
  ratio = jnp.exp(logprobs - old)
  clipped = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
  means = {"clip_fraction": clipped, "kl/old": kl.k3(old, logprobs), "ratio/mean": ratio}
  return mean_over_tokens(means, mask) | {
    "ratio/max": jnp.max(jnp.where(mask, ratio, 0.0)),
    "ratio/deviation/max": jnp.max(jnp.where(mask, jnp.abs(ratio - 1), 0.0)),
  }
