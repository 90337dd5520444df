"""Reads pairs of responses with a policy: the seam between DPO-like methods and models.

Padding, packing and segment ids stay behind `read(params, pairs)`. A method gets a row per pair.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import ranges
from rlhf_jax.algorithms import given
from rlhf_jax.losses import masked, preference
from rlhf_jax.types import ApplyFn, Metrics, PackedBatch, Params, TokenBatch


@dataclasses.dataclass(frozen=True)
class PairConfig:
  """Weights of the tokens and of the pairs that a policy is trained on.

  Attributes:
    length_alpha: Weight of tokens past the length of the shorter response of a pair (LD-DPO).
    reweight: Weights of pairs that make off-policy data look on-policy (WPO).
  """

  length_alpha: float = 1.0
  reweight: bool = False

  def __post_init__(self):
    ranges.check(self, fraction=("length_alpha",))


class Pairs(NamedTuple):
  """N pairs that a policy has read: B of a padded batch, B * S of a packed one.

  Attributes:
    logprobs: [N, 2, T] float32 of the tokens, 0 chosen and 1 rejected.
    mask: [N, 2, T] bool, True on response tokens that something predicts.
    totals: [N, 2] float32, log-probabilities of the responses.
    weights: [N] float32, weight of the loss of each pair, a constant; None is 1.
    real: [N] bool, False on rows of a packed batch that hold no pair.
  """

  logprobs: jax.Array
  mask: jax.Array
  totals: jax.Array
  weights: jax.Array | None
  real: jax.Array

  @property
  def means(self) -> jax.Array:
    """[N, 2] log-probability of a response per token."""
    return self.totals / jnp.maximum(jnp.sum(self.mask, axis=-1), 1)

  @property
  def nll(self) -> jax.Array:
    """[N] mean negative log-likelihood of a token of the chosen response."""
    return -masked.masked_mean(self.logprobs[:, 0], self.mask[:, 0], axis=1)


ReadPairs = Callable[[Params, TokenBatch | PackedBatch], Pairs]


def make_read_pairs(apply_fn: ApplyFn, config: PairConfig | None = None) -> ReadPairs:
  """Builds `read(params, pairs) -> Pairs` of a language model.

  Args:
    apply_fn: `(params, tokens [B, T]) -> logits [B, T, V]`; packed rows come with `segment_ids`.
    config: Weights of tokens and pairs; None is all equal.
  """
  config = config or PairConfig()

  def read(params: Params, pairs: TokenBatch | PackedBatch) -> Pairs:
    logprobs, mask, *collision = given.read_tokens(
      apply_fn, params, pairs, collision=config.reweight
    )
    chosen, rejected = preference.length_desensitized_logprobs(
      logprobs[:, 0], logprobs[:, 1], mask[:, 0], mask[:, 1], alpha=config.length_alpha
    )
    weights = None
    if config.reweight:
      first, second = (
        preference.wpo_weights(logprobs[:, i], collision[0][:, i], mask[:, i]) for i in range(2)
      )
      weights = first * second
    packed = isinstance(pairs, PackedBatch)
    real = pairs.real.reshape(-1) if packed else jnp.ones(mask.shape[0], bool)
    return Pairs(logprobs, mask, jnp.stack([chosen, rejected], axis=1), weights, real)

  return read


def row_metrics(
  loss: jax.Array, policy: Pairs, logprobs: jax.Array, rewards: jax.Array
) -> tuple[Metrics, jax.Array]:
  """Loss and metrics of each pair, [N] each, and [N] bool, False on rows that hold no pair.

  Args:
    loss: [N] loss of each pair, which is multiplied by `policy.weights`.
    policy: The pairs.
    logprobs: [N, 2] log-probabilities that the loss compares.
    rewards: [N, 2] implicit rewards. Equal ones count as half a correct pair.
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
    rows: Metrics of each row, [N], `loss` among them.
    real: [N] bool; the metric `weight` is their number.
    mask: [..., T] bool; the metric `tokens` is their number.
  """
  means = {name: masked.masked_mean(values, real) for name, values in rows.items()}
  counts = {"weight": jnp.sum(real), "tokens": jnp.sum(mask)}
  return means.pop("loss"), means | {n: count.astype(jnp.float32) for n, count in counts.items()}
