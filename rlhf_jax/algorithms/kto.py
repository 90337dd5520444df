"""Kahneman-Tversky optimisation: trains a policy on single responses with a thumbs up or down.

Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import ranges
from rlhf_jax.algorithms import given
from rlhf_jax.losses import masked, preference
from rlhf_jax.train_step import make_train_step
from rlhf_jax.types import ApplyFn, Metrics, Params, TokenBatch, TrainStep, UnpairedBatch


@dataclasses.dataclass(frozen=True)
class KTOConfig:
  """KTO.

  Attributes:
    beta: Strength of the implicit KL penalty to the reference.
    desirable_weight: Weight of responses with a thumbs up.
    undesirable_weight: Weight of responses with a thumbs down; the two weights balance unequal
      numbers of both.
  """

  beta: float = 0.1
  desirable_weight: float = 1.0
  undesirable_weight: float = 1.0

  def __post_init__(self):
    ranges.check(self, positive=("beta", "desirable_weight", "undesirable_weight"))


class KTOBatch(NamedTuple):
  """Labelled responses.

  Attributes:
    responses: B responses; `mismatched` has the same prompts with responses to other prompts.
    ref_logprobs: [B, 2] float32, `read_responses` under the reference.
  """

  responses: UnpairedBatch
  ref_logprobs: jax.Array


def read_responses(apply_fn: ApplyFn, params: Params, batch: UnpairedBatch) -> jax.Array:
  """Returns log-probabilities [B, 2] of each response and of the mismatched one, sums over tokens.

  Args:
    apply_fn: `(params, tokens [B, T]) -> logits [B, T, V]`.
    params: Policy or reference.
    batch: B responses.
  """

  def total(tokens: TokenBatch) -> jax.Array:
    logprobs, mask = given.read_tokens(apply_fn, params, tokens)
    return masked.masked_sum(logprobs, mask, axis=-1)

  matched = total(TokenBatch(batch.tokens, batch.mask))
  # This one only estimates the KL, which is a constant of the loss.
  mismatched = jax.lax.stop_gradient(total(batch.mismatched))
  return jnp.stack([matched, mismatched], axis=1)


def row_metrics(
  params: Params, batch: KTOBatch, *, apply_fn: ApplyFn, config: KTOConfig
) -> Metrics:
  """Loss and metrics of each response, [B] each; NaN where a metric is for the other label.

  `reward/*` are the implicit rewards `beta * (log pi - log ref)`.

  Args:
    params: Policy.
    batch: B responses with log-probabilities under the reference; the KL is estimated from all B.
    apply_fn: `(params, tokens) -> logits [B, T, V]`.
    config: KTO settings.
  """
  desirable = batch.responses.desirable
  policy = read_responses(apply_fn, params, batch.responses)
  (logprobs, mismatched), (ref, ref_mismatched) = policy.T, batch.ref_logprobs.T
  losses = preference.kto_loss(
    logprobs,
    ref,
    desirable,
    mismatched,
    ref_mismatched,
    beta=config.beta,
    desirable_weight=config.desirable_weight,
    undesirable_weight=config.undesirable_weight,
  )
  reward = config.beta * (logprobs - ref)
  return {
    "loss": losses,
    "logprobs/chosen": jnp.where(desirable, logprobs, jnp.nan),
    "logprobs/rejected": jnp.where(desirable, jnp.nan, logprobs),
    "reward/chosen": jnp.where(desirable, reward, jnp.nan),
    "reward/rejected": jnp.where(desirable, jnp.nan, reward),
    "kl/estimate": mismatched - ref_mismatched,
  }


def loss_fn(
  params: Params, batch: KTOBatch, key: jax.Array, *, apply_fn: ApplyFn, config: KTOConfig
) -> tuple[jax.Array, Metrics]:
  """Means of `row_metrics`; the metric `tokens` is the number of response tokens."""
  del key  # The loss is deterministic given the batch.
  rows = row_metrics(params, batch, apply_fn=apply_fn, config=config)
  loss = jnp.mean(rows.pop("loss"))
  means = {name: masked.masked_mean(x, ~jnp.isnan(x)) for name, x in rows.items()}
  return loss, means | {"tokens": jnp.sum(batch.responses.mask).astype(jnp.float32)}


def make_kto_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: KTOConfig,
  *,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, KTOBatch, key) -> (state, metrics)`.

  There are no micro-batches, since the KL is estimated from all responses of a batch.
  """
  loss = functools.partial(loss_fn, apply_fn=apply_fn, config=config)
  return make_train_step(loss, tx, state_shardings=state_shardings)
