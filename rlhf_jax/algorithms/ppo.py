"""Policy-gradient RLHF: PPO with a critic, or RLOO, GRPO and REINFORCE without one.

Schulman et al., 2017, https://arxiv.org/abs/1707.06347; Ziegler et al., 2019,
https://arxiv.org/abs/1909.08593. An iteration is: sample a `Rollout`, score it, turn both into a
`PPOBatch` (`make_experience`), update (`make_ppo_step`). Params are `{"policy": ..., "value": ...}`
and `apply_fn(params, tokens, *, segment_ids, last) -> (logits [B, last, V], values [B, last])`;
without a critic there is no "value" and the values are None. For packed rows `last` is left out,
and the results are those of all T positions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algorithms import rollouts, sft
from rlhf_jax.losses import advantages as advantages_lib
from rlhf_jax.losses import kl, masked, packing, policy_gradient, reward, shaping
from rlhf_jax.train_step import jit_step, merge_metrics, split_epochs, update_epochs
from rlhf_jax.types import (
  ApplyFn,
  Metrics,
  Params,
  Rollout,
  TokenBatch,
  TrainState,
  TrainStep,
)

# (params, tokens, *, segment_ids, last) -> logits [B, last, V] and values [B, last] or None.
ActorCriticFn = Callable[..., tuple[jax.Array, jax.Array | None]]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
  """PPO and its relatives; the defaults are PPO.

  Attributes:
    advantage: What a token is credited with. gae: a critic's estimate. Without a critic, for a
      whole response: rloo, its reward less the mean of the other samples of the prompt; grpo,
      standardised over the samples of the prompt; reinforce, less the mean of the batch.
    objective: Loss of a token: ppo, gspo (one ratio for a response), cispo (clipped weight), or
      reinforce (no ratio: for one update per batch).
    aggregation: How tokens are averaged: dapo, over all tokens; grpo, over each response, then
      over responses; dr_grpo, sums divided by the longest length, then over responses.
    scale_groups: grpo only: divide by the standard deviation of the group (False is Dr. GRPO).
    kl_in: Whether the penalty is part of the reward, or a term of the loss.
    kl_estimator: Of the term of the loss. k2 has the gradient of each token's KL(policy ||
      reference), k3 that of KL(reference || policy); both leave out what a token does to later
      ones. reverse_kl has that of whole responses, with aggregation=dr_grpo.
    kl_coef: Weight of the KL penalty to the reference, per nat; the first one if it adapts.
    kl_target: KL to the reference to hold, nats per response; 0 keeps `kl_coef` fixed.
    kl_horizon: Responses over which an adaptive `kl_coef` changes.
    entropy_coef: Weight of an entropy bonus.
    gamma: Discount per token.
    lam: Weight of longer returns in the advantage.
    segment: gae only: tokens per macro action (MA-RLHF); 1 credits every token on its own.
    clip_low: How far the probability ratio may fall below 1.
    clip_high: How far the probability ratio may rise above 1.
    dual_clip: Bound on the ratio for negative advantages, above 1; 0 is none.
    value_clip: How far a value may move in one iteration.
    value_coef: Weight of the value loss.
    normalize_values: Let the critic predict returns in running standard deviations.
    ptx_coef: Weight of the loss on demonstrations (PPO-ptx).
    importance_cap: Largest weight that makes up for a sampler with other probabilities than the
      trainer's; 0 takes the sampler's as they are.
    epochs: Passes over each batch of responses.
    minibatches: Optimizer steps per pass; divides the number of responses.
    microbatches: Pieces each minibatch is cut into; saves memory, does not change the result.
    packed_length: Update on rows of so many tokens that hold several prompts with their responses,
      one behind the other; saves the time that padding takes, does not change the result. The
      update is compiled again when a batch needs a number of rows that is new, of which there are
      eight from each power of two to the next. 0 gives each response a row of its own.
    whiten: Scale gae's advantages to mean 0 and variance 1 over the whole batch.
    shaping: What is made of a score first. none; par, how often it beats the reference's own
      responses to the prompt; center, its distance from their mean; log_sigmoid, of that distance.
    normalize_scores: Divide scores by the running standard deviation around the running mean.
    score_clip: Scores are held in [-score_clip, score_clip]; 0 does not clip.
    missing_eos_penalty: Taken off the score of a response that was cut at the longest length.
  """

  advantage: Literal["gae", "rloo", "grpo", "reinforce"] = "gae"
  objective: Literal["ppo", "gspo", "cispo", "reinforce"] = "ppo"
  aggregation: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
  scale_groups: bool = True
  kl_in: Literal["reward", "loss"] = "reward"
  kl_estimator: Literal["k2", "k3", "reverse_kl"] = "k2"
  kl_coef: float = 0.1
  kl_target: float = 0.0
  kl_horizon: int = 10000
  entropy_coef: float = 0.0
  gamma: float = 1.0
  lam: float = 0.95
  segment: int = 1
  clip_low: float = 0.2
  clip_high: float = 0.2
  dual_clip: float = 0.0
  value_clip: float = 0.2
  value_coef: float = 0.5
  normalize_values: bool = False
  ptx_coef: float = 0.0
  importance_cap: float = 0.0
  epochs: int = 1
  minibatches: int = 2
  microbatches: int = 1
  packed_length: int = 0
  whiten: bool = True
  shaping: Literal["none", "par", "center", "log_sigmoid"] = "none"
  normalize_scores: bool = False
  score_clip: float = 0.0
  missing_eos_penalty: float = 1.0

  def __post_init__(self):
    not_negative = (
      *("kl_coef", "kl_target", "entropy_coef", "clip_low", "clip_high", "dual_clip"),
      *("value_clip", "value_coef", "ptx_coef", "importance_cap", "score_clip"),
      "packed_length",
    )
    for name in not_negative:
      if getattr(self, name) < 0:
        raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
    for name in ("kl_horizon", "segment", "epochs", "minibatches", "microbatches"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
    for name in ("gamma", "lam"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
    if self.kl_target and self.kl_in == "loss":
      raise ValueError("kl_target adapts a penalty in the reward; use it with kl_in=reward")
    if 0 < self.dual_clip <= 1:
      raise ValueError(f"dual_clip must be above 1, or 0 for none, got {self.dual_clip}")

  @property
  def has_critic(self) -> bool:
    """Whether a value function is trained."""
    return self.advantage == "gae"

  @property
  def is_grouped(self) -> bool:
    """Whether advantages compare the samples of one prompt."""
    return self.advantage in ("rloo", "grpo")

  @property
  def reads_reference_scores(self) -> bool:
    """Whether scores are shaped by those of the reference's responses."""
    return self.shaping != "none"


class PPOBatch(NamedTuple):
  """What the update reads. All but the tokens are constants of the loss.

  Attributes:
    rollout: B sampled responses with the log-probabilities that the ratio starts from.
    mask: [B, R] bool, response tokens that count (rows without a finite score do not).
    values: [B, R] float32, critic before each response token when the rollout was made.
    advantages: [B, R] float32, whitened if the config says so.
    returns: [B, R] float32, targets of the critic.
    ref_logprobs: [B, R] float32 under the reference.
    importance: [B, R] float32, factor of each token's policy loss.
    demonstrations: B right-padded sequences of the ptx term, or None.
  """

  rollout: Rollout
  mask: jax.Array
  values: jax.Array
  advantages: jax.Array
  returns: jax.Array
  ref_logprobs: jax.Array
  importance: jax.Array
  demonstrations: TokenBatch | None = None


class Control(NamedTuple):
  """What is carried from one iteration to the next beside the train state.

  Attributes:
    kl_coef: [] float32.
    moments: Running moments of the scores.
    returns: Running moments of the returns.
  """

  kl_coef: jax.Array
  moments: reward.RunningMoments
  returns: reward.RunningMoments


def init_control(config: PPOConfig) -> Control:
  """Control before the first iteration."""
  zero = reward.RunningMoments.zero
  return Control(jnp.float32(config.kl_coef), zero(), zero())


def response_outputs(
  apply_fn: ActorCriticFn,
  params: Params,
  rollout: Rollout,
  temperature: float,
  packed: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What a model says about the response tokens of a rollout.

  Args:
    apply_fn: See the module docstring.
    params: Its params.
    rollout: B responses of up to R tokens, each behind a prompt of at least one.
    temperature: Divides the logits, as it did when sampling.
    packed: Rows and tokens of each in which the model is to read them; None: as they are.

  Returns:
    Log-probabilities [B, R], entropies [B, R] and values [B, R] of the response positions; zeros
    for the values without a critic. What stands after the end of a response means nothing.
  """
  if packed is None:
    logits, values = apply_fn(params, rollout.tokens, **rollouts.response_inputs(rollout))
    logprobs, entropy = rollouts.response_logprobs(logits, rollout, temperature)
    return logprobs, entropy, jnp.zeros_like(logprobs) if values is None else values[:, :-1]
  places = packing.places(rollout.prompt_mask | rollout.response_mask, packed)
  numbers = jnp.broadcast_to(1 + jnp.arange(places.shape[0])[:, None], places.shape)
  tokens, segment_ids = (packing.pack(x, places, packed) for x in (rollout.tokens, numbers))
  logits, values = apply_fn(params, tokens, segment_ids=segment_ids)
  length = rollout.logprobs.shape[1]
  logprobs, entropy = (
    packing.take(x, places[:, -length:])
    for x in rollouts.token_figures(logits, tokens, temperature)
  )
  if values is None:
    return logprobs, entropy, jnp.zeros_like(logprobs)
  return logprobs, entropy, packing.take(values, places[:, -length - 1 : -1])


def packed_shape(
  rows: int, length: int, config: PPOConfig, packed_rows: int | None
) -> tuple[int, int] | None:
  """Packed rows and tokens of each in which the update reads sequences; None if it does not pack.

  Args:
    rows: Number of sequences, of a micro-batch.
    length: Tokens of the longest possible one.
    config: PPO settings.
    packed_rows: How many; None takes as many as suffice whatever the lengths are.
  """
  if not config.packed_length:
    return None
  if config.packed_length < length:
    raise ValueError(
      f"packed_length must be at least {length}, a prompt and a response of the greatest length,"
      f" got {config.packed_length}"
    )
  return packed_rows or -(-rows // (config.packed_length // length)), config.packed_length


def adapt_kl_coef(
  kl_coef: jax.Array, sequence_kl: jax.Array, responses: int, config: PPOConfig
) -> jax.Array:
  """Proportional controller of Ziegler et al., 2019, section 2.2; fixed without a target."""
  if not config.kl_target:
    return kl_coef
  error = jnp.clip(sequence_kl / config.kl_target - 1, -0.2, 0.2)
  return kl_coef * (1 + error * responses / config.kl_horizon)


def shape_scores(
  scores: jax.Array,
  ended: jax.Array,
  ref_scores: jax.Array | None,
  moments: reward.RunningMoments,
  config: PPOConfig,
) -> tuple[jax.Array, reward.RunningMoments]:
  """What the policy is trained on in place of the raw scores.

  Args:
    scores: [B] float; entries that are not finite are left out of the moments.
    ended: [B] bool, whether the response ended in a stop token.
    ref_scores: [B, M] scores of M responses of the reference to the same prompt, or None.
    moments: Running moments of the scores before this batch.
    config: Which steps to take.

  Returns:
    [B] shaped scores, and the moments with this batch.
  """
  finite = jnp.isfinite(scores)
  scores = jnp.where(finite, scores, 0.0).astype(jnp.float32)
  if config.reads_reference_scores:
    if ref_scores is None:
      raise ValueError(f"shaping={config.shaping} needs scores of the reference's responses")
    typical = jnp.mean(ref_scores, axis=1)
    if config.shaping == "par":
      scores = shaping.preference_as_reward(scores, ref_scores)
    elif config.shaping == "log_sigmoid":
      scores = shaping.log_sigmoid_reward(scores, typical)
    else:
      scores = scores - typical
  moments = reward.update_moments(moments, scores, finite)
  if config.normalize_scores:
    scores = reward.normalize_scores(scores, moments)
  if config.score_clip:
    scores = jnp.clip(scores, -config.score_clip, config.score_clip)
  return scores - config.missing_eos_penalty * ~ended, moments


def response_advantages(
  rewards: jax.Array, valid: jax.Array, samples_per_prompt: int, config: PPOConfig
) -> jax.Array:
  """[B] advantages of whole responses, from their rewards alone.

  Args:
    rewards: [B] reward of each response; the samples of a prompt are next to each other.
    valid: [B] bool, False on responses to leave out.
    samples_per_prompt: N; B is a multiple of it.
    config: Which baseline.
  """
  groups = 1 if config.advantage == "reinforce" else rewards.shape[0] // samples_per_prompt
  rewards, valid = rewards.reshape(groups, -1), valid.reshape(groups, -1)
  if config.advantage == "grpo":
    result = advantages_lib.group_normalize(rewards, scale=config.scale_groups, mask=valid)
  else:
    result = advantages_lib.leave_one_out(rewards, mask=valid)
  return result.reshape(-1)


def rollout_to_batch(
  rollout: Rollout,
  scores: jax.Array,
  ended: jax.Array,
  ref_logprobs: jax.Array,
  values: jax.Array,
  control: Control,
  config: PPOConfig,
  *,
  trainer_logprobs: jax.Array | None = None,
  ref_scores: jax.Array | None = None,
  demonstrations: TokenBatch | None = None,
  samples_per_prompt: int = 1,
) -> tuple[PPOBatch, Control, Metrics]:
  """Rewards, advantages and returns of scored responses.

  Args:
    rollout: B responses of up to R tokens.
    scores: [B] float, reward of each response; a row with NaN or Inf is left out of everything.
    ended: [B] bool, whether the response ended in a stop token.
    ref_logprobs: [B, R] under the reference, at the sampling temperature.
    values: [B, R] of the critic, zeros without one.
    control: KL coefficient and moments before this batch.
    config: PPO settings.
    trainer_logprobs: [B, R] of the policy as the update computes them, for the importance
      correction.
    ref_scores: [B, M] scores of responses of the reference, for the shaping.
    demonstrations: B sequences for the ptx term.
    samples_per_prompt: Responses to one prompt, next to each other in the batch.

  Returns:
    The batch, the control for the next iteration, and metrics of the responses.
  """
  rows, length = rollout.logprobs.shape
  finite = jnp.isfinite(scores)
  mask = rollout.response_mask[:, -length:] & finite[:, None]
  # Padding may hold anything; from here on it is zero.
  sampled, ref_logprobs, values = (
    jnp.where(mask, x, 0.0) for x in (rollout.logprobs, ref_logprobs, values)
  )
  logprobs, importance = sampled, jnp.ones_like(sampled)
  if config.importance_cap:
    if trainer_logprobs is None:
      raise ValueError("importance_cap needs the log-probabilities of the trainer")
    logprobs = jnp.where(mask, trainer_logprobs, 0.0)
    importance = policy_gradient.truncated_importance_weights(
      logprobs, sampled, cap=config.importance_cap
    )

  shaped, moments = shape_scores(scores, ended, ref_scores, control.moments, config)
  rewards = policy_gradient.kl_shaped_rewards(
    shaped,
    logprobs,
    ref_logprobs,
    mask,
    kl_coef=control.kl_coef if config.kl_in == "reward" else 0.0,
  )
  totals = jnp.sum(rewards, axis=1)
  old_returns = control.returns
  metrics: Metrics = {}
  if config.has_critic:
    scale, shift = jnp.float32(1.0), jnp.float32(0.0)
    if config.normalize_values:
      variance = old_returns.m2 / jnp.maximum(old_returns.count, 1.0)
      scale = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 1.0)
      shift = old_returns.mean
    real_values = jnp.where(mask, values * scale + shift, 0.0)
    advantages, returns = advantages_lib.macro_gae(
      rewards,
      real_values,
      advantages_lib.ngram_segments(mask, config.segment),
      mask,
      gamma=config.gamma,
      lam=config.lam,
    )
    metrics["value/explained_variance"] = policy_gradient.explained_variance(
      real_values, returns, mask
    )
    new_returns = reward.update_moments(old_returns, returns.reshape(-1), mask.reshape(-1))
    returns = jnp.where(mask, (returns - shift) / scale, 0.0)
    if config.whiten:
      advantages = masked.whiten(advantages, mask)
  else:
    of_response = response_advantages(totals, finite, samples_per_prompt, config)
    advantages = jnp.where(mask, of_response[:, None], 0.0)
    returns, new_returns = jnp.zeros_like(values), old_returns

  sequence_kl = jnp.sum(kl.k1(logprobs, ref_logprobs), axis=1)  # [B], nats per response.
  mean_kl = masked.masked_mean(sequence_kl, finite)
  raw = jnp.where(finite, scores, 0.0).astype(jnp.float32)
  lengths = jnp.sum(rollout.response_mask, axis=1)
  metrics |= {
    "reward/mean": masked.masked_mean(raw, finite),
    "reward/std": jnp.sqrt(masked.masked_var(raw, finite)),
    "reward/shaped": masked.masked_mean(totals, finite),
    "reward/nonfinite": jnp.sum(~finite).astype(jnp.float32),
    "kl/ref": mean_kl,
    "kl/coef": control.kl_coef,
    "response_length/mean": jnp.mean(lengths.astype(jnp.float32)),
    "eos_fraction": jnp.mean(ended.astype(jnp.float32)),
  }
  if config.importance_cap:
    metrics["importance/mean"] = masked.masked_mean(importance, mask)
  batch = PPOBatch(
    rollout._replace(logprobs=logprobs),
    mask,
    values,
    advantages,
    returns,
    ref_logprobs,
    importance,
    demonstrations,
  )
  kl_coef = adapt_kl_coef(control.kl_coef, mean_kl, rows, config)
  return batch, Control(kl_coef, moments, new_returns), metrics


def make_experience(
  apply_fn: ActorCriticFn,
  ref_apply_fn: ApplyFn,
  config: PPOConfig,
  *,
  temperature: float = 1.0,
  samples_per_prompt: int = 1,
) -> Callable[..., tuple[PPOBatch, Control, Metrics]]:
  """Jitted `(params, ref_params, control, rollout, scores, ended, **more) -> (batch, control,
  metrics)`, where `more` may give `ref_scores` and `demonstrations` of `rollout_to_batch`.

  Args:
    apply_fn: Policy and critic; see the module docstring.
    ref_apply_fn: `(ref_params, tokens, *, segment_ids, last) -> logits` of the reference.
    config: PPO settings.
    temperature: Sampling temperature of the rollouts. It divides the reference's logits as well,
      so that the KL of a policy to itself is 0 at any temperature.
    samples_per_prompt: Responses to one prompt, next to each other in the batch.
  """

  def reference(params: Params, tokens: jax.Array, **kwargs):
    return ref_apply_fn(params, tokens, **kwargs), None

  @jax.jit
  def experience(params, ref_params, control, rollout, scores, ended, **more):
    logprobs, _, values = response_outputs(apply_fn, params, rollout, temperature)
    ref_logprobs, _, _ = response_outputs(reference, ref_params, rollout, temperature)
    return rollout_to_batch(
      rollout,
      scores,
      ended,
      ref_logprobs,
      values,
      control,
      config,
      trainer_logprobs=logprobs,
      samples_per_prompt=samples_per_prompt,
      **more,
    )

  return experience


def policy_losses(logprobs: jax.Array, batch: PPOBatch, config: PPOConfig) -> jax.Array:
  """[B, R] loss of each response token, given its log-probability under the policy [B, R]."""
  old, advantages = batch.rollout.logprobs, batch.advantages
  clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}
  if config.objective == "reinforce":
    return policy_gradient.reinforce_loss(logprobs, advantages)
  if config.objective == "cispo":
    return policy_gradient.cispo_loss(logprobs, old, advantages, **clip)
  if config.objective == "gspo":
    return policy_gradient.gspo_loss(logprobs, old, advantages, batch.mask, **clip)
  return policy_gradient.ppo_policy_loss(
    logprobs, old, advantages, dual_clip=config.dual_clip or None, **clip
  )


def loss_fn(
  params: Params,
  batch: PPOBatch,
  key: jax.Array,
  *,
  apply_fn: ActorCriticFn,
  config: PPOConfig,
  temperature: float = 1.0,
  packed_rows: int | None = None,
) -> tuple[jax.Array, Metrics]:
  """Policy loss, and the value, KL, entropy and ptx terms that the config asks for.

  Args:
    params: `{"policy": ..., "value": ...}`, without "value" for an advantage without critic.
    batch: Rows of a `PPOBatch`.
    key: Passed on to the loss on demonstrations.
    apply_fn: See the module docstring.
    config: PPO settings.
    temperature: Sampling temperature of the rollout.
    packed_rows: See `packed_shape`. If they do not suffice the loss is NaN.

  Returns:
    Loss and metrics; `weight` is the number of units it is a mean over, tokens or responses.
  """
  mask = batch.mask
  rows, length = batch.rollout.tokens.shape
  shape = packed_shape(rows, length, config, packed_rows)
  logprobs, entropy, values = response_outputs(apply_fn, params, batch.rollout, temperature, shape)
  logprobs, values = jnp.where(mask, logprobs, 0.0), jnp.where(mask, values, 0.0)
  old_logprobs = batch.rollout.logprobs
  weights = policy_gradient.token_weights(mask, config.aggregation)

  def mean(x: jax.Array) -> jax.Array:
    return jnp.sum(weights * jnp.where(mask, x, 0.0))

  policy_loss = mean(policy_losses(logprobs, batch, config) * batch.importance)
  ratio = jnp.exp(logprobs - old_logprobs)
  clipped = (ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)
  metrics = {
    "loss/policy": policy_loss,
    "entropy": masked.masked_mean(entropy, mask),
    "clip_fraction": masked.masked_mean(clipped.astype(jnp.float32), mask),
    "kl/old": masked.masked_mean(kl.k3(old_logprobs, logprobs), mask),
    "ratio/mean": masked.masked_mean(ratio, mask),
    "ratio/max": jnp.max(jnp.where(mask, ratio, 0.0)),
    "ratio/deviation/max": jnp.max(jnp.where(mask, jnp.abs(ratio - 1), 0.0)),
    "weight": jnp.sum(mask if config.aggregation == "dapo" else mask.any(axis=1)).astype(float),
  }
  loss = policy_loss
  if config.has_critic:
    metrics["loss/value"] = mean(
      policy_gradient.ppo_value_loss(values, batch.values, batch.returns, clip=config.value_clip)
    )
    loss += config.value_coef * metrics["loss/value"]
  if config.kl_in == "loss":
    if config.kl_estimator == "reverse_kl":
      estimates = kl.reverse_kl_loss(logprobs, batch.ref_logprobs, mask)
    else:
      estimator = kl.k2 if config.kl_estimator == "k2" else kl.k3
      estimates = estimator(logprobs, batch.ref_logprobs)
    metrics["loss/kl"] = mean(estimates)
    loss += config.kl_coef * metrics["loss/kl"]
  if config.entropy_coef:
    loss -= config.entropy_coef * mean(entropy)
  if config.ptx_coef:
    if batch.demonstrations is None:
      raise ValueError("ptx_coef needs demonstrations in the batch")
    policy = lambda params, tokens: apply_fn(params, tokens)[0]  # noqa: E731
    metrics["loss/ptx"], _ = sft.loss_fn(params, batch.demonstrations, key, apply_fn=policy)
    loss += config.ptx_coef * metrics["loss/ptx"]
  return loss, metrics


def make_ppo_step(
  apply_fn: ActorCriticFn,
  tx: optax.GradientTransformation,
  config: PPOConfig,
  *,
  temperature: float = 1.0,
  packed_rows: int | None = None,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, PPOBatch, key) -> (state, metrics)`: all epochs and minibatches at once.

  `ratio/first_deviation` is the largest |ratio - 1| before the first update. It is 0 up to
  rounding when sampler and trainer compute the same probabilities. `padding` is the part of what
  the model reads that is no token of a prompt or a response. `packed_rows` are those of each
  micro-batch, which `make_packed_ppo_step` finds.
  """
  loss = functools.partial(
    loss_fn, apply_fn=apply_fn, config=config, temperature=temperature, packed_rows=packed_rows
  )

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
    rows, length = batch.rollout.tokens.shape
    parts = config.minibatches * config.microbatches
    shape = packed_shape(rows // parts, length, config, packed_rows) or (rows // parts, length)
    real = jnp.sum(batch.rollout.prompt_mask | batch.rollout.response_mask)
    return state, merge_metrics(metrics) | {
      "ratio/first_deviation": first_deviation,
      "padding": 1 - real / (parts * shape[0] * shape[1]),
    }

  return jit_step(step, state_shardings)


def make_packed_ppo_step(
  make_step: Callable[[int], TrainStep], config: PPOConfig, *, multiple: int = 1
) -> TrainStep:
  """`step(state, PPOBatch, key)` on as few packed rows as the lengths of a batch allow.

  The number of rows is that of its fullest micro-batch, a little raised (`packing.round_up`); a
  program is compiled for each number, when a batch first needs it. Which responses form a
  micro-batch does not depend on it.

  Args:
    make_step: Number of rows -> step; `make_ppo_step` with the rest bound.
    config: PPO settings, with a `packed_length`.
    multiple: Number of devices that rows are split over.
  """
  step_of = functools.cache(make_step)

  @jax.jit
  def rows_of(rollout: Rollout, step: jax.Array, key: jax.Array) -> jax.Array:
    lengths = split_epochs(
      jnp.sum(rollout.prompt_mask | rollout.response_mask, axis=1),
      jax.random.fold_in(key, step),
      epochs=config.epochs,
      minibatches=config.minibatches,
      microbatches=config.microbatches,
    )
    rows, _ = jax.vmap(lambda part: packing.first_fit(part, config.packed_length))(lengths)
    return 1 + jnp.max(rows)

  def step(state: TrainState, batch: PPOBatch, key: jax.Array) -> tuple[TrainState, Metrics]:
    rows = packing.round_up(int(rows_of(batch.rollout, state.step, key)), multiple)
    return step_of(rows)(state, batch, key)

  return step
