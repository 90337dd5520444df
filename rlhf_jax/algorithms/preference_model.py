"""Preference model: the probability that one response is preferred to another.

Munos et al., 2023, https://arxiv.org/abs/2312.00886. A model with a scalar head reads both
responses in one sequence, in both orders: `P(a > b) = sigmoid(f(a, b) - f(b, a))`. So
`P(a > b) + P(b > a) = 1` for any weights, and there is no position bias. Unlike with a score per
response, `a > b`, `b > c` and `c > a` can all be likely.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import ranges
from rlhf_jax.algorithms import given
from rlhf_jax.losses import masked, reward
from rlhf_jax.train_step import make_train_step
from rlhf_jax.types import ApplyFn, ComparisonBatch, Metrics, Params, TrainStep

PreferenceModelBatch = ComparisonBatch


@dataclasses.dataclass(frozen=True)
class PreferenceModelConfig:
  """Preference model.

  Attributes:
    microbatches: Micro-batches per batch; more of them save memory and give the same result.
  """

  microbatches: int = 1

  def __post_init__(self):
    ranges.check(self, at_least_one=("microbatches",))


def loss_fn(
  params: Params,
  batch: PreferenceModelBatch,
  key: jax.Array,
  *,
  apply_fn: ApplyFn,
) -> tuple[jax.Array, Metrics]:
  """Mean cross entropy between the predicted preference and the share of the votes.

  Args:
    params: Preference model.
    batch: B comparisons; a tie is a preference of 1/2.
    key: Random key, unused.
    apply_fn: `(params, tokens [B, T]) -> scores [B, T]`.

  Returns:
    Loss and metrics.
  """
  del key  # The loss is deterministic given the batch.
  logits = given.read_preferences(apply_fn, params, batch.tokens, batch.mask)
  loss, metrics = mean_metrics(logits, batch.preference)
  return loss, metrics | {"tokens": jnp.sum(batch.mask).astype(jnp.float32)}


def mean_metrics(logits: jax.Array, preference: jax.Array) -> tuple[jax.Array, Metrics]:
  """Loss and `preference_metrics` of log-odds [B] and shares of the votes [B]."""
  untied = jnp.sum(preference != 0.5).astype(jnp.float32)
  metrics = preference_metrics(logits, preference) | {"weight/preference/accuracy": untied}
  return jnp.mean(reward.binary_loss(logits, preference)), metrics


def preference_metrics(logits: jax.Array, preference: jax.Array) -> Metrics:
  """Agreement with the votes.

  Args:
    logits: [B] log-odds of the first response.
    preference: [B] share of the votes for the first response.

  Returns:
    `preference/accuracy`: share of the untied comparisons whose majority is predicted;
    `preference/confidence`: mean of `max(P, 1 - P)`; `preference/ties`: share of tied comparisons.
  """
  untied = preference != 0.5
  right = jnp.where(logits == 0, 0.5, (logits > 0) == (preference > 0.5))
  return {
    "preference/accuracy": masked.defined_mean(right, untied),
    "preference/confidence": jnp.mean(jax.nn.sigmoid(jnp.abs(logits))),
    "preference/ties": jnp.mean(~untied),
  }


def transitivity_violations(preferences: np.ndarray) -> float:
  """Share of triples of responses whose majorities form a cycle.

  Args:
    preferences: [N, K, K] probability that response i of a prompt is preferred to response j.

  Returns:
    A number in [0, 1]: 0 if one score per response explains all majorities, 1/4 if majorities are
    coin tosses. NaN without triples.
  """
  wins = np.asarray(preferences) > 0.5
  cycles = [
    (wins[:, i, j] & wins[:, j, k] & wins[:, k, i])
    | (wins[:, j, i] & wins[:, k, j] & wins[:, i, k])
    for i, j, k in itertools.combinations(range(wins.shape[1]), 3)
  ]
  return float(np.mean(cycles)) if cycles and len(wins) else float("nan")


def make_preference_model_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: PreferenceModelConfig,
  *,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, PreferenceModelBatch, key) -> (state, metrics)`."""
  loss = functools.partial(loss_fn, apply_fn=apply_fn)
  return make_train_step(
    loss, tx, microbatches=config.microbatches, state_shardings=state_shardings
  )
