"""Terms to add to the loss of a method: demonstrations (PPO-ptx), a value bonus (XPO, VPO)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import given
from rlhf_jax.losses import masked, preference
from rlhf_jax.types import ApplyFn, LossFn, Metrics, Params, Rollout, TokenBatch


class WithSequences(NamedTuple):
  """Batch of a method, with token sequences for an added term.

  Attributes:
    batch: Batch of the method, with B rows.
    sequences: B right-padded sequences.
  """

  batch: Any
  sequences: TokenBatch

  @property
  def rollout(self) -> Rollout:
    """Responses of the batch, for a method that samples."""
    return self.batch.rollout


def with_term(loss_fn: LossFn, term_fn: LossFn, coef: float, name: str) -> LossFn:
  """Builds the loss of a `WithSequences`: `loss_fn` of its batch plus a term on its sequences.

  The term may average other units than the loss, so it is reported as a term of its own.

  Args:
    loss_fn: `(params, batch, key) -> (loss, metrics)`.
    term_fn: `(params, sequences, key) -> (loss, metrics)`.
    coef: Weight of the term.
    name: Name of the term's metric.
  """

  def total(params: Params, batch: WithSequences, key: jax.Array) -> tuple[jax.Array, Metrics]:
    loss, metrics = loss_fn(params, batch.batch, key)
    term, of_term = term_fn(params, batch.sequences, key)
    weight = of_term.get("weight", jnp.ones(()))  # Else a mean over rows: all parts have as many.
    term_metrics = {name: term, f"term/{name}": coef * term, f"weight/{name}": weight}
    return loss + coef * term, metrics | term_metrics

  return total


def make_value_bonus(apply_fn: ApplyFn) -> LossFn:
  """Builds the mean log-probability of calibration responses, a term of XPO and VPO.

  A positive weight explores away from samples of the reference (XPO; for online VPO, its alpha
  times beta). A negative weight stays near responses of the data (offline VPO). See
  `losses.preference.value_bonus`.
  """

  def bonus(params: Params, batch: TokenBatch, key: jax.Array) -> tuple[jax.Array, Metrics]:
    del key
    logprobs, mask = given.read_tokens(apply_fn, params, batch)
    totals = masked.masked_sum(logprobs, mask, axis=1)
    return jnp.mean(preference.value_bonus(totals, coef=1.0)), {}

  return bonus
