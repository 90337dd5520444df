"""PPO on sampled responses, with a separate critic and a KL penalty inside the reward.

Schulman et al., 2017, https://arxiv.org/abs/1707.06347; Ziegler et al., 2019,
https://arxiv.org/abs/1909.08593. An iteration is: sample a `Rollout`, score it, turn both into a
`PPOBatch` (`make_experience`), update (`make_ppo_step`). Params are `{"policy": ..., "value": ...}`
and `apply_fn(params, tokens, *, segment_ids, last) -> (logits [B, last, V], values [B, last])`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.losses import advantages as advantages_lib
from rlhf_jax.losses import kl, masked, policy_gradient, reward
from rlhf_jax.losses import logprobs as logprobs_lib
from rlhf_jax.train_step import jit_step, merge_metrics, update_epochs
from rlhf_jax.types import ApplyFn, Metrics, Params, Rollout, TrainState, TrainStep

# (params, tokens, *, segment_ids, last) -> logits [B, last, V] and values [B, last].
ActorCriticFn = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
  """PPO.

  Attributes:
    kl_coef: Weight of the KL penalty to the reference, per nat; the first one if it adapts.
    kl_target: KL to the reference to hold, nats per response; 0 keeps `kl_coef` fixed.
    kl_horizon: Responses over which an adaptive `kl_coef` changes.
    gamma: Discount per token.
    lam: Weight of longer returns in the advantage.
    clip_low: How far the probability ratio may fall below 1.
    clip_high: How far the probability ratio may rise above 1.
    value_clip: How far a value may move in one iteration.
    value_coef: Weight of the value loss.
    epochs: Passes over each batch of responses.
    minibatches: Optimizer steps per pass; divides the number of responses.
    microbatches: Pieces each minibatch is cut into; saves memory, does not change the result.
    whiten: Scale advantages to mean 0 and variance 1 over the whole batch.
    normalize_scores: Divide scores by the running standard deviation around the running mean.
    score_clip: Scores are held in [-score_clip, score_clip]; 0 does not clip.
    missing_eos_penalty: Taken off the score of a response that was cut at the longest length.
  """

  kl_coef: float = 0.05
  kl_target: float = 0.0
  kl_horizon: int = 10000
  gamma: float = 1.0
  lam: float = 0.95
  clip_low: float = 0.2
  clip_high: float = 0.2
  value_clip: float = 0.2
  value_coef: float = 0.5
  epochs: int = 1
  minibatches: int = 2
  microbatches: int = 1
  whiten: bool = True
  normalize_scores: bool = False
  score_clip: float = 0.0
  missing_eos_penalty: float = 1.0

  def __post_init__(self):
    for name in ("kl_coef", "kl_target", "clip_low", "clip_high", "value_clip", "score_clip"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
    for name in ("kl_horizon", "epochs", "minibatches", "microbatches"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
    for name in ("gamma", "lam"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


class PPOBatch(NamedTuple):
  """What the update reads. All but `rollout` are constants of the loss.

  Attributes:
    rollout: B sampled responses with the log-probabilities they were sampled with.
    mask: [B, R] bool, response tokens that count (rows without a finite score do not).
    values: [B, R] float32, critic before each response token when the rollout was made.
    advantages: [B, R] float32, whitened if the config says so.
    returns: [B, R] float32, targets of the critic.
  """

  rollout: Rollout
  mask: jax.Array
  values: jax.Array
  advantages: jax.Array
  returns: jax.Array


class Control(NamedTuple):
  """What PPO carries from one iteration to the next beside the train state.

  Attributes:
    kl_coef: [] float32.
    moments: Running moments of the raw scores.
  """

  kl_coef: jax.Array
  moments: reward.RunningMoments


def init_control(config: PPOConfig) -> Control:
  """Control before the first iteration."""
  return Control(jnp.float32(config.kl_coef), reward.RunningMoments.zero())


def response_outputs(
  apply_fn: ActorCriticFn, params: Params, rollout: Rollout, temperature: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What a model says about the response tokens of a rollout.

  Args:
    apply_fn: See the module docstring.
    params: Its params.
    rollout: B responses of up to R tokens.
    temperature: Divides the logits, as it did when sampling.

  Returns:
    Log-probabilities [B, R], entropies [B, R] and values [B, R] of the response positions.
  """
  length = rollout.logprobs.shape[1]
  segment_ids = (rollout.prompt_mask | rollout.response_mask).astype(jnp.int32)
  logits, values = apply_fn(params, rollout.tokens, segment_ids=segment_ids, last=length + 1)
  logits = logits / temperature
  logprobs = logprobs_lib.next_token_logprobs(logits, rollout.tokens[:, -length - 1 :])
  # The output before a token is what predicts it, and the value of the state it is drawn in.
  return logprobs[:, 1:], logprobs_lib.entropy(logits[:, :-1]), values[:, :-1]


def adapt_kl_coef(
  kl_coef: jax.Array, sequence_kl: jax.Array, responses: int, config: PPOConfig
) -> jax.Array:
  """Proportional controller of Ziegler et al., 2019, section 2.2; fixed without a target."""
  if not config.kl_target:
    return kl_coef
  error = jnp.clip(sequence_kl / config.kl_target - 1, -0.2, 0.2)
  return kl_coef * (1 + error * responses / config.kl_horizon)


def rollout_to_batch(
  rollout: Rollout,
  scores: jax.Array,
  ended: jax.Array,
  ref_logprobs: jax.Array,
  values: jax.Array,
  control: Control,
  config: PPOConfig,
) -> tuple[PPOBatch, Control, Metrics]:
  """Rewards, advantages and returns of scored responses.

  Args:
    rollout: B responses of up to R tokens.
    scores: [B] float, reward of each response; a row with NaN or Inf is left out of everything.
    ended: [B] bool, whether the response ended in a stop token.
    ref_logprobs: [B, R] under the reference, at the sampling temperature.
    values: [B, R] of the critic.
    control: KL coefficient and score moments before this batch.
    config: PPO settings.

  Returns:
    The batch, the control for the next iteration, and metrics of the responses.
  """
  rows, length = rollout.logprobs.shape
  finite = jnp.isfinite(scores)
  raw = jnp.where(finite, scores, 0.0).astype(jnp.float32)
  mask = rollout.response_mask[:, -length:] & finite[:, None]
  # Padding may hold anything; from here on it is zero.
  logprobs, ref_logprobs, values = (
    jnp.where(mask, x, 0.0) for x in (rollout.logprobs, ref_logprobs, values)
  )
  moments = reward.update_moments(control.moments, raw, finite)
  shaped = reward.normalize_scores(raw, moments) if config.normalize_scores else raw
  if config.score_clip:
    shaped = jnp.clip(shaped, -config.score_clip, config.score_clip)
  shaped = shaped - config.missing_eos_penalty * ~ended

  rewards = policy_gradient.kl_shaped_rewards(
    shaped, logprobs, ref_logprobs, mask, kl_coef=control.kl_coef
  )
  advantages, returns = advantages_lib.gae(
    rewards, values, mask, gamma=config.gamma, lam=config.lam
  )
  explained = policy_gradient.explained_variance(values, returns, mask)
  if config.whiten:
    advantages = masked.whiten(advantages, mask)

  sequence_kl = jnp.sum(kl.k1(logprobs, ref_logprobs), axis=1)  # [B], nats per response.
  mean_kl = masked.masked_mean(sequence_kl, finite)
  lengths = jnp.sum(rollout.response_mask, axis=1)
  metrics = {
    "reward/mean": masked.masked_mean(raw, finite),
    "reward/std": jnp.sqrt(masked.masked_var(raw, finite)),
    "reward/shaped": masked.masked_mean(jnp.sum(rewards, axis=1), finite),
    "reward/nonfinite": jnp.sum(~finite).astype(jnp.float32),
    "kl/ref": mean_kl,
    "kl/coef": control.kl_coef,
    "value/explained_variance": explained,
    "response_length/mean": jnp.mean(lengths.astype(jnp.float32)),
    "eos_fraction": jnp.mean(ended.astype(jnp.float32)),
  }
  kl_coef = adapt_kl_coef(control.kl_coef, mean_kl, rows, config)
  batch = PPOBatch(rollout._replace(logprobs=logprobs), mask, values, advantages, returns)
  return batch, Control(kl_coef, moments), metrics


def make_experience(
  apply_fn: ActorCriticFn,
  ref_apply_fn: ApplyFn,
  config: PPOConfig,
  *,
  temperature: float = 1.0,
) -> Callable[..., tuple[PPOBatch, Control, Metrics]]:
  """Jitted `(params, ref_params, control, rollout, scores, ended) -> (batch, control, metrics)`.

  Args:
    apply_fn: Policy and critic; see the module docstring.
    ref_apply_fn: `(ref_params, tokens, *, segment_ids, last) -> logits` of the reference.
    config: PPO settings.
    temperature: Sampling temperature of the rollouts. It divides the reference's logits as well,
      so that the KL of a policy to itself is 0 at any temperature.
  """

  def with_zero_values(params: Params, tokens: jax.Array, *, last: int, **kwargs):
    logits = ref_apply_fn(params, tokens, last=last, **kwargs)
    return logits, jnp.zeros(logits.shape[:2])

  @jax.jit
  def experience(params, ref_params, control, rollout, scores, ended):
    _, _, values = response_outputs(apply_fn, params, rollout, temperature)
    ref_logprobs, _, _ = response_outputs(with_zero_values, ref_params, rollout, temperature)
    return rollout_to_batch(rollout, scores, ended, ref_logprobs, values, control, config)

  return experience


def loss_fn(
  params: Params,
  batch: PPOBatch,
  key: jax.Array,
  *,
  apply_fn: ActorCriticFn,
  config: PPOConfig,
  temperature: float = 1.0,
) -> tuple[jax.Array, Metrics]:
  """Clipped policy loss plus clipped value loss, both means over response tokens.

  Args:
    params: `{"policy": ..., "value": ...}`.
    batch: Rows of a `PPOBatch`.
    key: Unused.
    apply_fn: See the module docstring.
    config: PPO settings.
    temperature: Sampling temperature of the rollout.

  Returns:
    Loss and metrics; `weight` is the number of response tokens.
  """
  del key  # The loss is deterministic given the batch.
  mask = batch.mask
  logprobs, entropy, values = response_outputs(apply_fn, params, batch.rollout, temperature)
  logprobs, values = jnp.where(mask, logprobs, 0.0), jnp.where(mask, values, 0.0)
  old_logprobs = batch.rollout.logprobs
  policy_losses = policy_gradient.ppo_policy_loss(
    logprobs,
    old_logprobs,
    batch.advantages,
    clip_low=config.clip_low,
    clip_high=config.clip_high,
  )
  value_losses = policy_gradient.ppo_value_loss(
    values, batch.values, batch.returns, clip=config.value_clip
  )
  policy_loss = masked.masked_mean(policy_losses, mask)
  value_loss = masked.masked_mean(value_losses, mask)
  ratio = jnp.exp(logprobs - old_logprobs)
  clipped = (ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)
  return policy_loss + config.value_coef * value_loss, {
    "loss/policy": policy_loss,
    "loss/value": value_loss,
    "entropy": masked.masked_mean(entropy, mask),
    "clip_fraction": masked.masked_mean(clipped.astype(jnp.float32), mask),
    "kl/old": masked.masked_mean(kl.k3(old_logprobs, logprobs), mask),
    "ratio/mean": masked.masked_mean(ratio, mask),
    "ratio/max": jnp.max(jnp.where(mask, ratio, 0.0)),
    "ratio/deviation/max": jnp.max(jnp.where(mask, jnp.abs(ratio - 1), 0.0)),
    "weight": jnp.sum(mask).astype(jnp.float32),
  }


def make_ppo_step(
  apply_fn: ActorCriticFn,
  tx: optax.GradientTransformation,
  config: PPOConfig,
  *,
  temperature: float = 1.0,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, PPOBatch, key) -> (state, metrics)`: all epochs and minibatches at once.

  `ratio/first_deviation` is the largest |ratio - 1| before the first update. It is 0 up to
  rounding when sampler and trainer compute the same probabilities.
  """
  loss = functools.partial(loss_fn, apply_fn=apply_fn, config=config, temperature=temperature)

  def step(state: TrainState, batch: PPOBatch, key: jax.Array) -> tuple[TrainState, Metrics]:
    state, metrics = update_epochs(
      loss,
      tx,
      state,
      batch,
      jax.random.fold_in(key, state.step),
      epochs=config.epochs,
      minibatches=config.minibatches,
      microbatches=config.microbatches,
    )
    first_deviation = metrics.pop("ratio/deviation/max")[0]
    return state, merge_metrics(metrics) | {"ratio/first_deviation": first_deviation}

  return jit_step(step, state_shardings)
