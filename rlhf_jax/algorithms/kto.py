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
    microbatches: Micro-batches per batch, only 1: the KL is estimated from all of its responses.
  """

  beta: float = 0.1
  desirable_weight: float = 1.0
  undesirable_weight: float = 1.0
  microbatches: int = ranges.rare(1)

  def __post_init__(self):
    ranges.check(self, positive=("beta", "desirable_weight", "undesirable_weight"))
    if self.microbatches != 1:
      raise ValueError(
        "microbatches must be 1: KTO estimates its KL from all responses of a batch, got"
        f" {self.microbatches}; a smaller batch_size or model.remat=full saves memory"
      )


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


def mean_metrics(
  policy: jax.Array, ref: jax.Array, desirable: jax.Array, *, config: KTOConfig
) -> tuple[jax.Array, Metrics]:
  """Loss and metrics of a batch; `reward/*` are the implicit rewards `beta * (log pi - log ref)`.

  Args:
    policy: [B, 2], `read_responses` under the policy; the KL is estimated from all B.
    ref: [B, 2], `read_responses` under the reference.
    desirable: [B] bool.
    config: KTO settings.

  Returns:
    Loss and metrics, each a mean over the responses that it is about; NaN if there are none.
  """
  (logprobs, mismatched), (ref, ref_mismatched) = policy.T, ref.T
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
  return jnp.mean(losses), {
    "logprobs/chosen": masked.defined_mean(logprobs, desirable),
    "logprobs/rejected": masked.defined_mean(logprobs, ~desirable),
    "reward/chosen": masked.defined_mean(reward, desirable),
    "reward/rejected": masked.defined_mean(reward, ~desirable),
    "kl/estimate": jnp.mean(mismatched - ref_mismatched),
    "whole_batch": jnp.ones(()),
  }


def loss_fn(
  params: Params, batch: KTOBatch, key: jax.Array, *, apply_fn: ApplyFn, config: KTOConfig
) -> tuple[jax.Array, Metrics]:
  """Computes `mean_metrics`; the metric `tokens` is the number of response tokens."""
  del key  # The loss is deterministic given the batch.
  policy = read_responses(apply_fn, params, batch.responses)
  desirable = batch.responses.desirable
  loss, metrics = mean_metrics(policy, batch.ref_logprobs, desirable, config=config)
  return loss, metrics | {"tokens": jnp.sum(batch.responses.mask).astype(jnp.float32)}


def make_kto_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: KTOConfig,
  *,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, KTOBatch, key) -> (state, metrics)`.

  A batch is not cut into micro-batches, since the KL is estimated from all of its responses.
  """
  loss = functools.partial(loss_fn, apply_fn=apply_fn, config=config)
  return make_train_step(loss, tx, state_shardings=state_shardings)
