"""Supervised fine-tuning: next-token loss on response tokens, the end-of-sequence token included.

Ouyang et al., 2022, https://arxiv.org/abs/2203.02155, section 3.5.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import ranges
from rlhf_jax.algorithms import given
from rlhf_jax.losses import masked
from rlhf_jax.train_step import make_train_step
from rlhf_jax.types import ApplyFn, Metrics, PackedBatch, Params, TokenBatch, TrainStep

# tokens [B, T] right padded, or packed; mask [B, T] on response tokens with their EOS.
SFTBatch = TokenBatch | PackedBatch


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """Supervised fine-tuning.

  Attributes:
    microbatches: Micro-batches per batch; more of them save memory and give the same result.
  """

  microbatches: int = 1

  def __post_init__(self):
    ranges.check(self, at_least_one=("microbatches",))


def loss_fn(
  params: Params, batch: SFTBatch, key: jax.Array, *, apply_fn: ApplyFn
) -> tuple[jax.Array, Metrics]:
  """Mean negative log-likelihood over the scored tokens of the batch.

  Args:
    params: Policy.
    batch: Right-padded or packed sequences.
    key: Random key, unused.
    apply_fn: `(params, tokens) -> logits [B, T, V]`; packed rows come with `segment_ids`.

  Returns:
    Loss in nats per token, and metrics; `weight` is the number of scored tokens.
  """
  del key  # The loss is deterministic given the batch.
  loss, scores, mask = given.read_nll(apply_fn, params, batch, hits=True)
  tokens = jnp.sum(mask).astype(jnp.float32)
  return loss, {
    "token_accuracy": masked.masked_mean(scores.hits, mask),
    "weight": tokens,
    "tokens": tokens,
  }


def row_sums(apply_fn: ApplyFn, params: Params, batch: SFTBatch) -> Metrics:
  """Sums [B] over the scored tokens of each row: `loss`, `token_accuracy`, and their number."""
  scores, mask = given.read_rows(apply_fn, params, batch, hits=True)
  sums = {"loss": -scores.logprobs, "token_accuracy": scores.hits, "tokens": mask}
  return {name: masked.masked_sum(x, mask, axis=1) for name, x in sums.items()}


def mean_metrics(rows: Metrics) -> tuple[jax.Array, Metrics]:
  """Loss and metrics of rows from their `row_sums`: means over tokens, as in `loss_fn`."""
  totals = {name: jnp.sum(jnp.asarray(x)) for name, x in rows.items()}
  tokens = totals.pop("tokens")
  means = {name: x / jnp.maximum(tokens, 1) for name, x in totals.items()}
  return means.pop("loss"), means


def make_sft_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: SFTConfig,
  *,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, SFTBatch, key) -> (state, metrics)`."""
  loss = functools.partial(loss_fn, apply_fn=apply_fn)
  return make_train_step(
    loss, tx, microbatches=config.microbatches, state_shardings=state_shardings
  )
