"""Nash-MD and its relatives: learning from preferences between a policy and an opponent.

Munos et al., 2023, https://arxiv.org/abs/2312.00886. One iteration samples responses of the policy
and of the opponent to the same prompts, asks for `P(y > y')`, and takes one step. What differs:

| method        | objective       | opponent of y                | settings                     |
|---------------|-----------------|------------------------------|------------------------------|
| Nash-MD       | policy_gradient | policy^(1 - mix) ref^mix     | 0 < mix < 1                  |
| self-play     | policy_gradient | the policy                   | mix = 0                      |
| best response | policy_gradient | the reference                | mix = 1                      |
| Nash-EMA      | policy_gradient | moving average of the policy | ema > 0, mix = 0             |
| Mirror Prox   | policy_gradient | the policy, half a step on   | extragradient, mix = 0       |
| online IPO    | regression      | the policy                   | mix = 0                      |
| IPO-MD        | regression      | the mixture, as are y and y2 | 0 < mix < 1                  |
| EGPO          | regression      | the policy, half a step on   | extragradient, mix = 0       |

Responses are as they were sampled; nothing is differentiated through them or the preference.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algorithms.rollouts import rollout_logprobs
from rlhf_jax.losses import game, kl, masked, preference
from rlhf_jax.train_step import make_train_step
from rlhf_jax.types import ApplyFn, Metrics, Params, Rollout, TrainState, TrainStep


@dataclasses.dataclass(frozen=True)
class NashMDConfig:
  """Nash-MD.

  Attributes:
    objective: policy_gradient is Nash-MD-PG: one response of the policy meets one of the opponent;
      regression is IPO's: the log-ratios of two responses of the sampler differ by how much more
      often the one beats the opponent.
    tau: Weight of the KL penalty, at the start.
    tau_end: At the end, linearly; negative keeps `tau`.
    mix: Weight of the reference in the opponent, at the start: 0 is self-play, 1 the best response
      to the reference.
    mix_end: At the end, linearly; negative keeps `mix`.
    ema: How much of the moving average that is the opponent stays at each step; 0 takes the policy
      itself.
    extragradient: Take each step twice from the same policy, the second time against the opponent
      that the first one made.
    normalize_lengths: regression: divide log-ratios by the number of tokens, as EGPO's code does;
      `tau` is then per token.
    missing_eos_penalty: Taken off the preference for a response that was cut at the longest length.
    microbatches: Pieces each batch is cut into; saves memory, does not change the result.
  """

  objective: Literal["policy_gradient", "regression"] = "policy_gradient"
  tau: float = 0.01
  tau_end: float = -1.0
  mix: float = 0.25
  mix_end: float = -1.0
  ema: float = 0.0
  extragradient: bool = False
  normalize_lengths: bool = False
  missing_eos_penalty: float = 0.0
  microbatches: int = 1

  def __post_init__(self):
    if self.objective not in ("policy_gradient", "regression"):
      raise ValueError(f"objective must be policy_gradient or regression, got {self.objective!r}")
    if not self.tau >= 0:
      raise ValueError(f"tau must not be negative, got {self.tau}")
    if self.objective == "regression" and not min(self.tau, self.last_tau) > 0:
      raise ValueError("tau must be positive for objective=regression, which divides by it")
    for name in ("mix", "mix_end"):
      if getattr(self, name) > 1 or self.mix < 0:
        raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
    if not 0 <= self.ema < 1:
      raise ValueError(f"ema must be in [0, 1), got {self.ema}")
    if self.ema and self.extragradient:
      raise ValueError("ema and extragradient both choose the opponent; keep one")
    if self.normalize_lengths and self.objective != "regression":
      raise ValueError("normalize_lengths is for objective=regression")

  @property
  def last_tau(self) -> float:
    """Weight of the KL penalty at the end."""
    return self.tau if self.tau_end < 0 else self.tau_end

  @property
  def last_mix(self) -> float:
    """Weight of the reference in the opponent at the end."""
    return self.mix if self.mix_end < 0 else self.mix_end

  @property
  def responses(self) -> int:
    """Responses to each prompt that are trained on."""
    return 1 if self.objective == "policy_gradient" else 2


class NashMDBatch(NamedTuple):
  """Judged responses: K = 1 (policy_gradient) or 2 (regression) to each of B prompts.

  Attributes:
    rollout: The responses, leaves [B, K, ...].
    ref_logprobs: [B, K, R] log-probabilities of their tokens under the reference.
    preference: [B, K] probability that each beats a response of the opponent.
    tau: [B] float32, the same everywhere.
  """

  rollout: Rollout
  ref_logprobs: jax.Array
  preference: jax.Array
  tau: jax.Array


def loss_fn(
  params: Params,
  batch: NashMDBatch,
  key: jax.Array,
  *,
  apply_fn: ApplyFn,
  config: NashMDConfig,
  temperature: float,
) -> tuple[jax.Array, Metrics]:
  """Mean over the prompts of the loss of the objective.

  Args:
    params: Policy.
    batch: Judged responses.
    key: Unused.
    apply_fn: `(params, tokens, *, segment_ids, last) -> logits`.
    config: Settings.
    temperature: That of the sampler.

  Returns:
    Loss and metrics.
  """
  del key
  rollout = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch.rollout)
  ref_logprobs = batch.ref_logprobs.reshape(rollout.logprobs.shape)
  mask = rollout.response_mask[:, -ref_logprobs.shape[1] :]
  logprobs, entropy = rollout_logprobs(apply_fn, params, rollout, temperature)
  if config.objective == "policy_gradient":
    gain = batch.preference.reshape(-1)
    losses = jnp.sum(
      game.nash_md_loss(logprobs, ref_logprobs, mask, gain, tau=batch.tau[0]), axis=1
    )
  else:
    total = masked.masked_mean if config.normalize_lengths else masked.masked_sum
    policy, ref = (
      total(x, mask, axis=1).reshape(batch.preference.shape) for x in (logprobs, ref_logprobs)
    )
    target = (batch.preference[:, 0] - batch.preference[:, 1]) / batch.tau
    losses = preference.pair_regression_loss(
      policy[:, 0], policy[:, 1], ref[:, 0], ref[:, 1], target
    )
  divergence = masked.masked_sum(kl.k1(logprobs, ref_logprobs), mask, axis=1)
  tokens = jnp.sum(mask).astype(jnp.float32)
  return jnp.mean(losses), {
    "kl/ref": jnp.mean(divergence),
    "entropy": jnp.mean(masked.masked_mean(entropy, mask, axis=1)),
    "response_length/mean": tokens / mask.shape[0],
    "tokens": tokens,
  }


def make_nash_md_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: NashMDConfig,
  *,
  temperature: float = 1.0,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, NashMDBatch, key) -> (state, metrics)`."""
  loss = functools.partial(loss_fn, apply_fn=apply_fn, config=config, temperature=temperature)
  return make_train_step(
    loss, tx, microbatches=config.microbatches, state_shardings=state_shardings
  )


def extragradient(
  step: Callable[[TrainState, Params, jax.Array], tuple[TrainState, Metrics]],
) -> Callable[[TrainState, Params, jax.Array], tuple[TrainState, Metrics]]:
  """Makes a step that looks ahead: Mirror Prox (arXiv 2505.19731), EGPO (arXiv 2503.08942).

  Args:
    step: `(state, opponent, key) -> (state, metrics)`; may donate its state.

  Returns:
    A function of the same kind: it takes the step against `opponent`, and then the step from the
    same state, with fresh samples, against the policy that this gave. The optimizer state of the
    first one is dropped.
  """

  def twice(state: TrainState, opponent: Params, key: jax.Array) -> tuple[TrainState, Metrics]:
    # A copy, as train steps donate their state.
    ahead, _ = step(jax.tree.map(jnp.copy, state), opponent, jax.random.fold_in(key, 0))
    return step(state, ahead.params, jax.random.fold_in(key, 1))

  return twice


def moving_average(average: Params, params: Params, keep: float | jax.Array) -> Params:
  """`keep` of the average and the rest of the new params: the opponent of Nash-EMA."""
  return jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, average, params)
