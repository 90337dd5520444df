"""Log-probabilities of pairs of responses: the interface between DPO-like methods and models.

A method calls `read(params, pairs)` and gets one row per pair. The function hides padding, packing,
shared prompts and segment ids.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import ranges
from rlhf_jax.algorithms import given
from rlhf_jax.losses import masked, preference
from rlhf_jax.types import ApplyFn, Metrics, PackedBatch, PairBatch, Params


@dataclasses.dataclass(frozen=True)
class PairConfig:
  """Weights of tokens and pairs.

  Attributes:
    length_alpha: Weight of tokens past the length of the pair's shorter response (LD-DPO); 1 gives
      all tokens the same weight.
    reweight: Reweighting of pairs that makes off-policy data look on-policy (WPO).
  """

  length_alpha: float = 1.0
  reweight: bool = False

  def __post_init__(self):
    ranges.check(self, fraction=("length_alpha",))


class Pairs(NamedTuple):
  """Log-probabilities of N pairs under a policy; N is B if padded and B * S if packed.

  Attributes:
    totals: [N, 2] float32, log-probabilities of responses; index 0 is chosen, 1 rejected.
    means: [N, 2] float32, log-probabilities per token, with the weights of tokens in `totals`.
    lengths: [N, 2] int32, tokens of responses except a first token, which nothing predicts.
    nll: [N] float32, negative log-likelihood per token of the chosen response.
    weights: [N] float32, loss weight of each pair, without a gradient; None weights all by 1.
    real: [N] bool, False on empty slots of a packed batch and on pairs without a response token.
  """

  totals: jax.Array
  means: jax.Array
  lengths: jax.Array
  nll: jax.Array
  weights: jax.Array | None
  real: jax.Array


ReadPairs = Callable[[Params, PairBatch], Pairs]


def make_read_pairs(apply_fn: ApplyFn, config: PairConfig | None = None) -> ReadPairs:
  """Builds `read(params, pairs) -> Pairs` for a language model.

  Args:
    apply_fn: `(params, tokens [B, T]) -> logits [B, T, V]`; packed rows come with `segment_ids`,
      shared ones with `places`.
    config: Weights of tokens and pairs; None weights all equally.
  """
  config = config or PairConfig()

  def read(params: Params, pairs: PairBatch) -> Pairs:
    logprobs, mask, *collision = given.read_tokens(
      apply_fn, params, pairs, collision=config.reweight
    )
    totals, counts = (
      jnp.stack(
        preference.length_desensitized_logprobs(
          x[:, 0], x[:, 1], mask[:, 0], mask[:, 1], alpha=config.length_alpha
        ),
        axis=1,
      )
      for x in (logprobs, jnp.ones_like(logprobs))
    )
    weights = None
    if config.reweight:
      first, second = (
        preference.wpo_weights(logprobs[:, i], collision[0][:, i], mask[:, i]) for i in range(2)
      )
      weights = first * second
    packed = isinstance(pairs, PackedBatch)
    real = pairs.real.reshape(-1) if packed else jnp.any(mask, axis=(1, 2))
    means, lengths = totals / jnp.where(counts > 0, counts, 1.0), jnp.sum(mask, axis=-1)
    nll = -masked.masked_mean(logprobs[:, 0], mask[:, 0], axis=1)
    return Pairs(totals, means, lengths, nll, weights, real)

  return read


def row_metrics(
  loss: jax.Array, policy: Pairs, logprobs: jax.Array, rewards: jax.Array
) -> tuple[Metrics, jax.Array]:
  """Loss and metrics of each pair, [N] each, and a mask [N], False on empty slots.

  Args:
    loss: [N] loss of each pair, before multiplication by `policy.weights`.
    policy: Pairs under the policy.
    logprobs: [N, 2] log-probabilities that the loss compares.
    rewards: [N, 2] implicit rewards. A tie counts as half correct.
  """
  margin = rewards[:, 0] - rewards[:, 1]
  return {
    "loss": loss if policy.weights is None else policy.weights * loss,
    "nll/chosen": policy.nll,
    "logprobs/chosen": logprobs[:, 0],
    "logprobs/rejected": logprobs[:, 1],
    "reward/chosen": rewards[:, 0],
    "reward/rejected": rewards[:, 1],
    "reward/margin": margin,
    "reward/accuracy": (margin > 0) + 0.5 * (margin == 0),
  }, policy.real


def mean_metrics(rows: Metrics, real: jax.Array, mask: jax.Array) -> tuple[jax.Array, Metrics]:
  """Loss and metrics of a batch: means over the rows that are `real`.

  Args:
    rows: Metrics of each row, [N] each, with `loss` among them.
    real: [N] bool; the metric `weight` is its sum.
    mask: [..., T] bool; the metric `tokens` is its sum.
  """
  means = {name: masked.masked_mean(values, real) for name, values in rows.items()}
  counts = {"weight": jnp.sum(real), "tokens": jnp.sum(mask)}
  return means.pop("loss"), means | {n: count.astype(jnp.float32) for n, count in counts.items()}
