"""Sampled and scored responses: what an iteration of a method that samples learns from."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import models
from experiments.lab.workbench import Workbench
from rlhf_jax import data, flags, ranges, rewards, sharding
from rlhf_jax.algorithms import reading
from rlhf_jax.losses import kl, masked, policy_gradient, reward
from rlhf_jax.rewards import shaped
from rlhf_jax.types import Metrics, Params, Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
  """Sampling beside learning, and packing of sampled responses.

  Attributes:
    devices: Number of devices, the last ones, that only sample. They sample the next batch while
      those of --mesh learn from the one that the policy before the last update sampled. 0 samples
      on all devices in turn with learning.
    importance_cap: Upper bound on the importance weights that correct for a sampler with other
      probabilities than the trainer's; 0 disables the correction.
    packed_length: Tokens of a row that holds several prompts with their responses in the update;
      saves the time that padding takes, does not change the result. Recompiles for each new number
      of rows, at most eight per power of two. 0 gives each response a row.
  """

  devices: int = 0
  importance_cap: float = 0.0
  packed_length: int = 0

  def __post_init__(self):
    ranges.check(self, non_negative=("devices", "importance_cap", "packed_length"))
    if self.devices and not self.importance_cap:
      raise ValueError(
        "devices sample from the policy before the last update; set rollout.importance_cap, such as"
        " 2, to weigh their responses as if from the present one"
      )


def check(
  config: Any, *, parts: int = 1, shaping: shaped.ShapingConfig | None = None, group: int = 1
) -> None:
  """Refuses settings that a method cannot sample with; for `__post_init__` of a script's config.

  Args:
    config: Config with `sampling`, `batch_size` and `data`.
    parts: Equal parts that the responses of a batch are cut into.
    shaping: Shaping of the scores.
    group: Least number of samples per prompt.
  """
  sampling = config.sampling
  if sampling.temperature == 0:
    raise ValueError("sampling.temperature must be positive: this learns from random samples")
  if sampling.top_k or sampling.top_p < 1:
    raise ValueError(
      "sampling.top_k and top_p must be off: they sample from another distribution than the one"
      " that is trained"
    )
  if sampling.samples_per_prompt < group:
    raise ValueError(f"sampling.samples_per_prompt must be at least {group} for this method")
  if config.batch_size * sampling.samples_per_prompt % parts:
    raise ValueError(
      f"batch_size {config.batch_size} * sampling.samples_per_prompt does not split into {parts} ="
      " minibatches * microbatches equal parts"
    )
  if config.data.packed_length:
    raise ValueError(
      "data.packed_length packs rows of data; rollout.packed_length packs sampled responses"
    )
  if shaping is not None and shaping.function and config.rollout.devices:
    raise ValueError(f"rollout.devices does not go with shaping.function={shaping.function}")


def require_fit(bench: Workbench) -> None:
  """Refuses packed rows that are too short for the longest sequence."""
  config = bench.config
  length = bench.train_set.padded_length + config.sampling.max_new_tokens
  if 0 < config.rollout.packed_length < length:
    raise flags.UsageError(
      f"--rollout.packed_length={config.rollout.packed_length} is too short for the longest"
      f" sequence, of up to {length} tokens; raise it, or lower --data.max_prompt_length or"
      " --sampling.max_new_tokens"
    )


def require_devices(options: RolloutOptions) -> None:
  """Refuses devices for sampling alone that are not there."""
  if options.devices and jax.process_count() > 1:
    raise flags.UsageError("--rollout.devices is for a single process; leave it at 0")
  if options.devices >= jax.device_count():
    raise flags.UsageError(
      f"--rollout.devices={options.devices} leaves none of the {jax.device_count()} devices to"
      " learn with"
    )


class Responses(NamedTuple):
  """Scored responses, B of them.

  Attributes:
    rollout: The responses; those to a prompt stand next to each other.
    scores: [B] float, scores before shaping.
    ended: [B] bool, True on responses that ended in a stop token.
    ref_scores: [B, M] scores of responses of the reference to the same prompt, or None.
  """

  rollout: Rollout
  scores: jax.Array
  ended: jax.Array
  ref_scores: jax.Array | None = None


class Sampled(NamedTuple):
  """Responses that are not scored yet, and the ids of their prompts."""

  rollout: Rollout
  prompt_id: jax.Array


class IterationState(NamedTuple):
  """State of an iteration that samples, scores and learns.

  Attributes:
    train: Policy, and critic if there is one, with their optimizers.
    carry: State of the experience, such as running moments of the scores.
    sampled: Responses that the next iteration learns from, if they are sampled ahead.
  """

  train: TrainState
  carry: Any
  sampled: Sampled | None = None


class Responder:
  """Samples and scores the responses of an iteration.

  Args:
    bench: Table of the script, with `sampling` in its config.
    reward_of: Prompts -> reward of responses to them.
    shaping: Shaping of the scores, which may ask for responses of the reference.
    options: Devices to sample on.
  """

  def __init__(
    self,
    bench: Workbench,
    reward_of: Callable[[data.Dataset], rewards.RewardFn],
    shaping: shaped.ShapingConfig,
    options: RolloutOptions | None = None,
  ):
    self._bench, self._shaping = bench, shaping
    self._reward = reward_of(bench.train_set)
    self._gold = bench.gold(bench.train_set)
    self.ahead = options is not None and options.devices > 0
    self.reshard, self.generate = bench.reshard(), bench.sampler()
    if self.ahead:
      self.reshard, self.generate = sample_away(bench)
    self.refer = bench.sampler(samples_per_prompt=shaping.reference_samples)

  def init(self, train: TrainState, carry: Any) -> IterationState:
    """Returns the state before the first iteration."""
    carry = sharding.put(carry, sharding.replicated(self._bench.run.mesh))
    return IterationState(train, carry, nothing_sampled(self._bench) if self.ahead else None)

  def __call__(
    self, policy: Params, state: IterationState, prompts: data.PromptBatch, key: jax.Array
  ) -> tuple[Responses, Sampled | None, Metrics]:
    """Returns scored responses, those sampled ahead for the next iteration, and metrics.

    Args:
      policy: Params of the policy.
      state: State of the iteration.
      prompts: Prompts of a batch.
      key: Random key of the run.
    """
    bench, step = self._bench, state.train.step
    keys = [jax.random.fold_in(jax.random.fold_in(key, purpose), step) for purpose in (1, 2, 3)]
    policy = jax.block_until_ready(policy)
    start = time.monotonic()
    policy = self.reshard(policy)
    present, following, metrics = state.sampled, None, {}
    if present is None or int(step) == 0:
      present = Sampled(self.generate(policy, *prompts, keys[0]), prompts.prompt_id)
    if self.ahead:  # Nothing waits for it: it is sampled while this iteration learns.
      following = Sampled(self.generate(policy, *prompts, keys[2]), prompts.prompt_id)
      metrics["staleness"] = float(present is state.sampled)
    del policy  # Room for the update.
    rollout = jax.block_until_ready(present.rollout)
    sampled = time.monotonic()
    ids, scores = self._score(rollout, present.prompt_id)
    golds = {name: np.mean(fn(rollout, ids)) for name, fn in self._gold.items()}
    metrics |= {f"{name}_reward/mean": float(gold) for name, gold in golds.items()}
    ref_scores = None
    if self._shaping.function:
      answers = self.refer(bench.reshard()(bench.start), *prompts, keys[1])
      ref_scores = self._score(answers, prompts.prompt_id)[1].reshape(bench.config.batch_size, -1)
      ref_scores = jnp.repeat(ref_scores, bench.config.sampling.samples_per_prompt, axis=0)
    metrics |= {
      "tokens": jnp.sum(rollout.response_mask),
      "time/generate": sampled - start,
      "time/reward": time.monotonic() - sampled,
    }
    return Responses(rollout, scores, bench.ended(rollout), ref_scores), following, metrics

  def _score(self, rollout: Rollout, prompt_id: jax.Array) -> tuple[np.ndarray, jax.Array]:
    """Ids of the prompts and scores of responses, [B] each."""
    repeats = rollout.tokens.shape[0] // prompt_id.shape[0]
    ids = np.repeat(sharding.to_host(prompt_id), repeats)
    return ids, jnp.asarray(self._reward(rollout, ids))


def make_experience(
  read: reading.Read,
  refer: reading.Read,
  make_batch: Callable[..., Any],
  shaping: shaped.ShapingConfig,
  *,
  importance_cap: float = 0.0,
) -> Callable[..., Any]:
  """Builds jitted `(params, ref_params, moments, responses) -> (batch, moments, metrics)`.

  Args:
    read: Reading of the policy, and of the critic if there is one.
    refer: Reading of the reference.
    make_batch: `(rollout, scores, policy: Reading, ref_logprobs) -> (batch, metrics)` of a method.
    shaping: Shaping of the scores.
    importance_cap: Upper bound on importance weights, which multiply the advantages; 0 is none.
  """

  @jax.jit
  def experience(
    params: Params, ref_params: Params, moments: reward.RunningMoments, responses: Responses
  ):
    rollout, scores, ended, ref_scores = responses
    shaped_scores, moments = shaped.shape(scores, ended, moments, shaping, ref_scores)
    policy, ref = read(params, rollout), refer(ref_params, rollout).logprobs
    rollout, weights, metrics = correct(rollout, policy.logprobs, importance_cap)
    batch, of_batch = make_batch(rollout, shaped_scores, policy, ref)
    if importance_cap:
      batch = batch._replace(advantages=weights * batch.advantages)
    return batch, moments, metrics | of_batch | response_metrics(responses, rollout, ref)

  return experience


def correct(
  rollout: Rollout, logprobs: jax.Array, cap: float
) -> tuple[Rollout, jax.Array, Metrics]:
  """Corrects for a sampler with other probabilities than the trainer's.

  Args:
    rollout: B responses.
    logprobs: [B, R] of their tokens, as the trainer computes them.
    cap: Upper bound on the weights; 0 is a no-op.

  Returns:
    The rollout with the trainer's log-probabilities, weights [B, R] of the tokens, and metrics.
  """
  if not cap:
    return rollout, jnp.ones_like(logprobs), {}
  mask = rollout.response_mask[:, -logprobs.shape[1] :]
  logprobs, sampled = (jnp.where(mask, x, 0.0) for x in (logprobs, rollout.logprobs))
  weights = policy_gradient.truncated_importance_weights(logprobs, sampled, cap=cap)
  metrics = {"importance/mean": masked.masked_mean(weights, mask)}
  return rollout._replace(logprobs=logprobs), weights, metrics


def response_metrics(responses: Responses, rollout: Rollout, ref_logprobs: jax.Array) -> Metrics:
  """Metrics of scored responses; `kl/ref` is the mean log-ratio of a response, in nats."""
  scores, mask = responses.scores, reading.response_mask(rollout, responses.scores)
  finite = jnp.isfinite(scores)
  sequence_kl = masked.masked_sum(kl.k1(rollout.logprobs, ref_logprobs), mask, axis=1)
  lengths = jnp.sum(rollout.response_mask, axis=1)
  return {
    "reward/mean": masked.masked_mean(scores, finite),
    "reward/std": jnp.sqrt(masked.masked_var(scores, finite)),
    "reward/nonfinite": jnp.sum(~finite).astype(jnp.float32),
    "kl/ref": masked.masked_mean(sequence_kl, finite),
    "response_length/mean": jnp.mean(lengths.astype(jnp.float32)),
    "eos_fraction": jnp.mean(responses.ended.astype(jnp.float32)),
  }


def sample_away(bench: Workbench) -> tuple[Callable[..., Params], Callable[..., Rollout]]:
  """Moves params to the devices for sampling, and samples there; both return at once.

  Weights are split over `tensor` as they are on the other devices, rows over the rest.
  """
  run, config, model = bench.run, bench.config, bench.model
  tensor, devices = run.mesh.shape["tensor"], jax.devices()[-config.rollout.devices :]
  if len(devices) % tensor:
    raise flags.UsageError(
      f"--rollout.devices={len(devices)} must be a multiple of tensor:{tensor} of --mesh"
    )
  away = sharding.make_mesh(f"data:-1,tensor:{tensor}", devices)
  sampler = models.build_model(run._replace(mesh=away), config.model, model.config, bench.tokenizer)
  generate = models.make_sampler(sampler, bench.tokenizer, config.sampling)

  def generate_away(params: Params, *inputs: jax.Array) -> Rollout:
    *prompts, key = inputs
    prompts = jax.device_put(prompts, sharding.batch_sharding(away))
    rollout = generate(params, *prompts, jax.device_put(key, sharding.replicated(away)))
    return jax.device_put(rollout, sharding.batch_sharding(run.mesh))

  return sharding.make_reshard(run.mesh, model.config.dtype, away), generate_away


def nothing_sampled(bench: Workbench) -> Sampled:
  """Placeholder for responses sampled ahead in the initial state; nothing reads it."""
  config = bench.config
  rows, new = config.batch_size * config.sampling.samples_per_prompt, config.sampling.max_new_tokens
  shape = (rows, bench.train_set.padded_length + new)
  nothing = Rollout(
    tokens=np.zeros(shape, np.int32),
    prompt_mask=np.zeros(shape, bool),
    response_mask=np.zeros(shape, bool),
    logprobs=np.zeros((rows, new), np.float32),
  )
  return sharding.place_batch(
    Sampled(nothing, np.zeros(config.batch_size, np.int32)), bench.run.mesh
  )
