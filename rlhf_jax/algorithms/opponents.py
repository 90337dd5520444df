"""Opponents, and batches of responses judged against them; shared by Nash-MD and IPO-MD."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import ranges
from rlhf_jax.algorithms import reading
from rlhf_jax.losses import kl, masked
from rlhf_jax.types import Metrics, Params, Rollout, TrainState

# (state, opponent, key) -> (state, metrics)
OpponentStep = Callable[[TrainState, Params, jax.Array], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class OpponentConfig:
  """Settings of methods that play against an opponent.

  Attributes:
    tau: Weight of the KL penalty at the first step.
    tau_end: Weight of the KL penalty at the last step, reached linearly; a negative value keeps
      `tau`.
    mix: Weight of the reference in the opponent at the first step. 0 is self-play; 1 trains a best
      response to the reference.
    mix_end: Weight of the reference at the last step, reached linearly; a negative value keeps
      `mix`.
    missing_eos_penalty: Penalty subtracted from the preference for a truncated response.
    microbatches: Micro-batches per batch; more of them save memory and give the same result.
  """

  tau: float = 0.01
  tau_end: float = -1.0
  mix: float = 0.25
  mix_end: float = -1.0
  missing_eos_penalty: float = 0.0
  microbatches: int = 1

  def __post_init__(self):
    ranges.check(self, non_negative=("tau",), fraction=("mix",), at_least_one=("microbatches",))
    if self.mix_end > 1:
      raise ValueError(f"mix_end must be in [0, 1], or negative for none, got {self.mix_end}")

  @property
  def last_tau(self) -> float:
    """Weight of the KL penalty at the last step."""
    return self.tau if self.tau_end < 0 else self.tau_end

  def schedules(self, steps: int) -> tuple[optax.Schedule, optax.Schedule]:
    """Returns the schedules of `mix` and of `tau` over a run."""
    last_mix = self.mix if self.mix_end < 0 else self.mix_end
    mixes = optax.linear_schedule(self.mix, last_mix, max(steps - 1, 1))
    return mixes, optax.linear_schedule(self.tau, self.last_tau, max(steps - 1, 1))


class OpponentBatch(NamedTuple):
  """Judged responses, K to each of B prompts. All but the tokens are constants of the loss.

  Attributes:
    rollout: Responses, with leaves [B, K, ...].
    ref_logprobs: [B, K, R] log-probabilities of their tokens under the reference.
    preference: [B, K] probability that each response beats one of the opponent. A response with NaN
      is left out, as with a log-probability that is not finite.
    tau: [B] float32, weight of the KL penalty, the same in all rows.
  """

  rollout: Rollout
  ref_logprobs: jax.Array
  preference: jax.Array
  tau: jax.Array


class Judged(NamedTuple):
  """Judged responses under the policy.

  Attributes:
    logprobs: [B * K, R] log-probabilities of their tokens.
    ref_logprobs: [B * K, R] log-probabilities under the reference.
    mask: [B * K, R] bool, True on tokens of responses with a preference.
    judged: [B, K] bool, True on responses with a preference.
    preference: [B, K], 0 without one.
    metrics: Metrics.
  """

  logprobs: jax.Array
  ref_logprobs: jax.Array
  mask: jax.Array
  judged: jax.Array
  preference: jax.Array
  metrics: Metrics


def read_batch(read: reading.Read, params: Params, batch: OpponentBatch) -> Judged:
  """Computes the log-probabilities of a batch of responses under the policy, and metrics.

  `kl/ref` and `entropy` are unbiased estimates for the sampler, which is the policy, or the mixture
  of it and the reference that IPO-MD samples.
  """
  rollout = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch.rollout)
  ref_logprobs = batch.ref_logprobs.reshape(rollout.logprobs.shape)
  rows, mask = reading.finite_rows(rollout, batch.preference.reshape(-1), ref_logprobs)
  judged = rows.reshape(batch.preference.shape)
  now = read(params, rollout)
  sampled = rollout.logprobs
  tokens = jnp.sum(mask).astype(jnp.float32)
  means = {
    "kl/ref": masked.masked_sum(kl.k1(sampled, ref_logprobs), mask, axis=1),
    "entropy": -masked.masked_mean(sampled, mask, axis=1),
    "response_length/mean": jnp.sum(mask, axis=1),
  }
  count = {f"weight/{name}": jnp.sum(rows).astype(jnp.float32) for name in means}
  return Judged(
    now.logprobs,
    ref_logprobs,
    mask,
    judged,
    jnp.where(judged, batch.preference, 0.0),
    {name: masked.defined_mean(x, rows) for name, x in means.items()} | count | {"tokens": tokens},
  )


def extragradient(step: OpponentStep) -> OpponentStep:
  """Builds a step that looks ahead: Mirror Prox (arXiv 2505.19731), EGPO (arXiv 2503.08942).

  Args:
    step: `(state, opponent, key) -> (state, metrics)`; may donate its state.

  Returns:
    A step with the same signature. It first steps against `opponent`. Then it steps again from the
    same state, with fresh samples, against the resulting policy. The optimizer state of the first
    step is discarded. Times, tokens and operations are those of both.
  """

  def twice(state: TrainState, opponent: Params, key: jax.Array) -> tuple[TrainState, Metrics]:
    # A copy, as train steps donate their state.
    ahead, first = step(jax.tree.map(jnp.copy, state), opponent, jax.random.fold_in(key, 0))
    state, metrics = step(state, ahead.params, jax.random.fold_in(key, 1))
    costs = [n for n in metrics if n in ("tokens", "model_flops") or n.startswith("time/")]
    return state, metrics | {name: first[name] + metrics[name] for name in costs}

  return twice


def moving_average(average: Params, params: Params, keep: float | jax.Array) -> Params:
  """Returns `keep * average + (1 - keep) * params`, the opponent of Nash-EMA."""
  return jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, average, params)
