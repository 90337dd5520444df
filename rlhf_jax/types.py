"""The vocabulary every module shares. Nothing here imports another rlhf_jax module.

Dimension letters, everywhere: `B` batch, `T` tokens, `P` prompt tokens, `R` response tokens,
`V` vocabulary, `D` width, `H` heads, `K` head width, `L` layers, `N` samples per prompt.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

Params = Any  # A nested dict of jax.Array.
Metrics = dict[str, jax.Array]  # Scalars, already reduced over the global batch.


class TokenBatch(NamedTuple):
  """Right-padded sequences and the positions a loss may score.

  Attributes:
    tokens: [B, T] int32, prompt then response then padding.
    mask: [B, T] bool, True on scored tokens (the response with its end-of-sequence token).
  """

  tokens: jax.Array
  mask: jax.Array


class PackedBatch(NamedTuple):
  """Rows that hold several sequences one after another, then padding.

  Pairs are packed side by side: the k-th sequences of both sides of a row belong together.

  Attributes:
    tokens: [B, T] int32, or [B, 2, T] for pairs, where 0 is chosen and 1 rejected.
    mask: Same shape, bool, True on scored tokens.
    segment_ids: Same shape, int32: 1, 2 and so on for the sequences of a row, 0 on padding.
    real: [B, S] bool, True if the row has an s-th sequence or pair.
  """

  tokens: jax.Array
  mask: jax.Array
  segment_ids: jax.Array
  real: jax.Array


class SharedBatch(NamedTuple):
  """K responses to each prompt in one row: the prompt once, then each response, then padding.

  Attributes:
    tokens: [B, T] int32.
    mask: [B, K, S] bool for separate rows of S tokens, prompt and response: True on the response.
    places: [B, K, S] int32, places in `tokens` of the tokens of separate rows; T is padding.
  """

  tokens: jax.Array
  mask: jax.Array
  places: jax.Array


class ComparisonBatch(NamedTuple):
  """Two responses a and b to each prompt, one after the other in both orders.

  Attributes:
    tokens: [B, 2, T] int32: 0 is prompt, a, b; 1 is prompt, b, a; then padding. The end token of a
      response separates the two.
    mask: [B, 2, T] bool, True on the tokens of both responses.
    preference: [B] float32, probability that a is preferred to b; 0.5 is a tie.
  """

  tokens: jax.Array
  mask: jax.Array
  preference: jax.Array


class RankingBatch(NamedTuple):
  """K responses to each prompt, best first, and their order.

  Attributes:
    tokens: [B, K, T] int32, prompt then response then padding.
    mask: [B, K, T] bool, True on the tokens of the response.
    ranks: [B, K] int32, 0 is best, equal ranks are ties.
    real: [B, K] bool, False on the empty places of a row with fewer than K responses.
  """

  tokens: jax.Array
  mask: jax.Array
  ranks: jax.Array
  real: jax.Array


class UnpairedBatch(NamedTuple):
  """Responses judged one at a time.

  Attributes:
    tokens: [B, T] int32, prompt then response then padding.
    mask: [B, T] bool, True on the tokens of the response.
    desirable: [B] bool.
    mismatched: Same prompts, each with the response to another prompt of the data, [B, T] each.
      KTO estimates its KL from them.
  """

  tokens: jax.Array
  mask: jax.Array
  desirable: jax.Array
  mismatched: TokenBatch


# Two responses to each prompt: tokens [B, 2, T] right padded, index 0 chosen and 1 rejected, mask
# [B, 2, T] on responses; or several pairs packed in a row; or the prompt once for both.
PairBatch = TokenBatch | PackedBatch | SharedBatch


class TrainState(NamedTuple):
  """Everything a train step reads and writes.

  Attributes:
    step: [] int32, number of steps taken.
    params: Nested dict of arrays.
    opt_state: State of the optax transformation.
  """

  step: jax.Array
  params: Params
  opt_state: optax.OptState


class Rollout(NamedTuple):
  """Prompts with sampled responses: columns `[:P]` are the prompt, `[P:]` the response.

  Attributes:
    tokens: [B, P + R] int32; prompts are left padded to P, responses right padded to R.
    prompt_mask: [B, P + R] bool, True on prompt tokens.
    response_mask: [B, P + R] bool, True on sampled tokens, including the stop token.
    logprobs: [B, R] float32, log-probability of each sampled token at the sampling temperature;
      0 after the stop token.
  """

  tokens: jax.Array
  prompt_mask: jax.Array
  response_mask: jax.Array
  logprobs: jax.Array


@dataclasses.dataclass(frozen=True)
class Decode:
  """A function that reads tokens into a cache, `(params, tokens, cache, *, mask)`.

  Attributes:
    step: The function. It takes params, or prepared ones.
    prepare: Function that brings params into the form that many steps read fastest.
  """

  step: Callable[..., tuple[Any, Any]]
  prepare: Callable[[Params], Params]

  def __call__(self, params: Params, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Calls `step`."""
    return self.step(params, *args, **kwargs)


# (params, tokens, ...) -> logits [B, T, V], or scores [B, T] for a model with a scalar head.
ApplyFn = Callable[..., jax.Array]
# (params, batch, key) -> (loss, metrics). `loss` is a mean. If it is not a mean over rows,
# `metrics["weight"]` is the number of units that it averages, so that gradient accumulation over
# micro-batches stays exact. `metrics["tokens"]` is the number of tokens trained on. Further entries
# are for micro-batches alone, and a train step does not return them:
#   weight/NAME  number of units that metric NAME averages, if it is another one
#   term/NAME    part of `loss` that averages weight/NAME units, such as the loss on demonstrations
#   whole_batch  present if the loss compares the rows of a batch, which is then not cut
# A metric is NaN if nothing in the batch defines it; the log leaves it out.
LossFn = Callable[[Params, Any, jax.Array], tuple[jax.Array, Metrics]]
TrainStep = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]
