"""Sampled and scored responses: the experience that a method with sampling trains on."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import data, flags, ranges, rewards, sharding
from rlhf_jax.algorithms import reading
from rlhf_jax.losses import kl, masked, policy_gradient, reward
from rlhf_jax.rewards import shaped
from rlhf_jax.types import Metrics, Params, Rollout, TrainState
from . import engines, judges, models, redraws
from .workbench import Workbench


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
  """Sampling and packing of responses.

  Attributes:
    devices: Number of devices, the last ones, that only sample. They sample the next batch while
      the devices of --mesh train on the current one, which the policy before the last update
      sampled. 0 alternates sampling and training on all devices.
    importance_cap: Upper bound on the importance weights that correct for sampler/trainer mismatch;
      0 disables the correction.
    packed_length: Length in tokens of packed rows of the update, each of which holds several
      prompts with their responses. Packing saves the time spent on padding and does not change the
      result. It recompiles for each new number of rows, at most eight per power of two. 0 gives
      each response a row.
    redraws: Number of times at most that a step samples further prompts to replace those whose
      responses all have the same reward (dynamic sampling of DAPO). 0 trains on what comes first.
    engine: Sampler of your own to use in place of the built-in one, as `module:function`
      (EXTENDING.md). Empty uses the built-in one.
  """

  devices: int = 0
  importance_cap: float = 0.0
  packed_length: int = 0
  redraws: int = ranges.rare(0)
  engine: str = ranges.rare("")

  def __post_init__(self):
    ranges.check(self, non_negative=("devices", "importance_cap", "packed_length", "redraws"))
    if self.redraws and self.devices:
      raise ValueError("redraws and devices are both given; keep one")
    if self.engine:
      engines.resolve(self.engine)
    if self.engine and self.devices:
      raise ValueError("engine and devices are both given; keep one")
    if self.engine and not self.importance_cap:
      raise ValueError(
        "engine computes log-probabilities of its own; set rollout.importance_cap, such as 2, to"
        " weigh its responses as if from the policy that is trained"
      )
    if self.devices and not self.importance_cap:
      raise ValueError(
        "devices sample from the policy before the last update; set rollout.importance_cap, such as"
        " 2, to weigh their responses as if from the present one"
      )


def check(config: Any, *, parts: int = 1, group: int = 1, kept: int = 0) -> None:
  """Refuses sampling settings that a method cannot use; for `__post_init__` of a script's config.

  Args:
    config: Config with `sampling`, `batch_size` and `data`, and with `shaping` if with `rollout`.
    parts: Number of equal parts that the responses of a batch are split into.
    group: Minimum number of samples per prompt.
    kept: Number of responses or groups of them that a prompt adds to a batch; 0 for all samples.
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
  # The number of rows settles the steps of epochs; see `workbench.settle_steps`.
  settled = "critic" in vars(config) and not config.epochs
  if settled and config.critic.warmup >= config.steps:
    raise ValueError(f"critic.warmup must be below steps, got {config.critic.warmup}")
  if config.batch_size * (kept or sampling.samples_per_prompt) % parts:
    count = kept or "sampling.samples_per_prompt"
    raise ValueError(
      f"batch_size {config.batch_size} * {count} does not split into {parts} ="
      " minibatches * microbatches equal parts"
    )
  if config.data.packed_length:
    raise ValueError(
      "data.packed_length packs rows of data; rollout.packed_length packs sampled responses"
    )
  function = "shaping" in vars(config) and config.shaping.function
  worst = "reward" in vars(config) and config.reward.ensemble == "worst_group"
  if "rollout" in vars(config):
    if config.rollout.redraws and sampling.samples_per_prompt < 2:
      raise ValueError(
        "rollout.redraws compares the responses to a prompt; set sampling.samples_per_prompt to 2"
        " or more"
      )
    if config.rollout.redraws and worst:
      raise ValueError(
        "rollout.redraws joins the responses of several draws, each with a worst group of its own;"
        " leave it out with reward.ensemble=worst_group"
      )
    if config.rollout.redraws and config.shaping.clip:
      raise ValueError(
        "rollout.redraws compares rewards before shaping.clip; leave one of them out"
      )
    if function and config.rollout.devices:
      raise ValueError(f"rollout.devices does not go with shaping.function={function}")
  if function and "preference" in vars(config) and config.preference.is_given:
    raise ValueError("shaping.function must be empty: a preference gives no scores to compare")
  if function and worst:
    raise ValueError(
      f"shaping.function={function} does not go with reward.ensemble=worst_group:"
      " the worst group of the reference may be another one than that of the policy"
    )


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
  """Refuses more sampling devices than there are."""
  for name in ("devices", "engine"):
    if getattr(options, name) and jax.process_count() > 1:
      raise flags.UsageError(f"--rollout.{name} is for a single process; leave it out")
  if options.devices >= jax.device_count():
    raise flags.UsageError(
      f"--rollout.devices={options.devices} leaves none of the {jax.device_count()} devices to"
      " learn with"
    )


def require_scores(
  shaping: shaped.ShapingConfig, reward: rewards.Parts, constrained: bool = False
) -> None:
  """Refuses rewards of segments where a method or the shaping of scores has no use for them.

  Args:
    shaping: Shaping of the scores.
    reward: Reward of responses.
    constrained: True for a method to which a violation is worth 0, and no score less.
  """
  if constrained and reward.tokens is not None:
    raise flags.UsageError(
      "this method takes scores of whole responses, calibrated to be positive, and the reward gives"
      " some to segments of them; leave that reward out"
    )
  given = [name for name in ("function", "normalize", "clip") if getattr(shaping, name)]
  if not given or reward.tokens is None or reward.named is not None:
    return
  if not np.any(np.nan_to_num(sharding.to_host(reward.scores))):
    raise flags.UsageError(
      f"--shaping.{given[0]} changes the scores of responses, and the reward gives none, but"
      " rewards of their segments; leave it out"
    )


class Responses(NamedTuple):
  """B scored responses.

  Attributes:
    rollout: Responses; those to a prompt are adjacent rows.
    scores: [B] float, scores before shaping.
    ended: [B] bool, True on responses that ended in a stop token.
    ref_scores: [B, M] scores of responses of the reference to the same prompt, or None.
    token_rewards: [B, R] rewards of tokens in addition to the scores, or None.
    satisfied: [B] bool, True on responses that violate no constraint, or None.
  """

  rollout: Rollout
  scores: jax.Array
  ended: jax.Array
  ref_scores: jax.Array | None = None
  token_rewards: jax.Array | None = None
  satisfied: jax.Array | None = None


class Sampled(NamedTuple):
  """Responses before scoring, and the ids of their prompts."""

  rollout: Rollout
  prompt_id: jax.Array | np.ndarray


# (params, ref_params, carry, responses, ...) -> (batch, carry, metrics)
Experience = Callable[..., tuple[Any, Any, Metrics]]


class Carry(NamedTuple):
  """State of an experience, for methods with a state of their own.

  Attributes:
    moments: Running moments of the scores.
    method: State of the method.
  """

  moments: reward.RunningMoments
  method: Any


class IterationState(NamedTuple):
  """State of an iteration that samples, scores and updates.

  Attributes:
    train: Policy, and critic if there is one, with their optimizers.
    carry: State of the experience, such as running moments of the scores.
    sampled: Responses for the next iteration, if they are sampled ahead.
  """

  train: TrainState
  carry: Any
  sampled: Sampled | None = None


class Responder:
  """Samples and scores the responses of an iteration.

  Args:
    bench: Workbench of the script, with `sampling` in its config.
    reward_of: `(prompts) -> reward` of responses to these prompts.
    shaping: Shaping of the scores, which may need responses of the reference.
    options: Devices to sample on, and further draws.
    constrained: True for a method to which all responses that violate a constraint are worth the
      same.
  """

  def __init__(
    self,
    bench: Workbench,
    reward_of: Callable[[data.Dataset], rewards.RewardFn],
    shaping: shaped.ShapingConfig,
    options: RolloutOptions | None = None,
    *,
    constrained: bool = False,
  ):
    self._bench, self._shaping, self._constrained = bench, shaping, constrained
    self._reward = reward_of(bench.train_set)
    self._watches = [judges.watch(self._reward) for _ in range(2)]
    self._gold = bench.gold(bench.train_set)
    self._redraws = 0 if options is None else options.redraws
    self.ahead = options is not None and options.devices > 0
    self.reshard, self.generate = bench.reshard(), bench.sampler()
    if options is not None and options.engine:
      self.generate = engines.make_sampler(bench)
    if self.ahead:
      self.reshard, self.generate = sample_away(bench)
    self.sample_reference = bench.sampler(samples_per_prompt=shaping.reference_samples)

  @functools.cached_property
  def batches(self) -> Any:
    """Source of the prompts of a run, of which a step may take several batches."""
    return self._bench.batches()

  def init(self, train: TrainState, carry: Any) -> IterationState:
    """Returns the state before the first iteration."""
    carry = sharding.put(carry, sharding.replicated(self._bench.run.mesh))
    return IterationState(train, carry, nothing_sampled(self._bench) if self.ahead else None)

  def __call__(
    self, policy: Params, state: IterationState, prompts: data.PromptBatch, key: jax.Array
  ) -> tuple[Responses, Sampled | None, dict[str, Any]]:
    """Returns scored responses, the responses sampled for the next iteration, and metrics.

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
    weights = self.reshard(policy)
    present, following, metrics = state.sampled, None, {}
    if present is None or int(step) == 0:
      present = Sampled(self.generate(weights, *prompts, keys[0]), prompts.prompt_id)
    if self.ahead:  # Not awaited: it is sampled while this iteration trains.
      following = Sampled(self.generate(weights, *prompts, keys[2]), prompts.prompt_id)
      metrics["staleness"] = float(present is state.sampled)
    del weights  # Room for the update.
    jax.block_until_ready(present.rollout)
    generate = time.monotonic() - start
    drawn = self._judge(present, prompts, keys[1])
    drawn, of_draws, again = self._draw_again(policy, drawn, keys)
    rollout, reward, ids = drawn.rollout, drawn.reward, drawn.prompt_ids
    metrics |= means_by_name(reward) | of_draws
    metrics |= judges.mean_rewards(self._gold, rollout, ids)
    metrics |= {
      "tokens": jnp.sum(rollout.response_mask),
      **bench.usage(present.rollout),
      "time/generate": generate + again,
      "time/reward": time.monotonic() - start - generate - again,
    }
    scores, tokens, satisfied, _ = reward
    scored = Responses(rollout, scores, drawn.ended, drawn.ref_scores, tokens, satisfied)
    return scored, following, metrics

  def _judge(self, sampled: Sampled, prompts: data.PromptBatch, key: jax.Array) -> redraws.Draw:
    """Scores responses, and with `shaping.function` those of the reference to the prompts."""
    bench = self._bench
    ids, reward = self._score(*sampled, self._watches[0])
    require_scores(self._shaping, reward, self._constrained)
    ref_scores = None
    if self._shaping.function:
      answers = self.sample_reference(bench.reshard()(bench.start), *prompts, key)
      ref_scores = self._score(answers, prompts.prompt_id, self._watches[1])[1].scores
      ref_scores = ref_scores.reshape(bench.config.batch_size, -1)
      ref_scores = jnp.repeat(ref_scores, bench.config.sampling.samples_per_prompt, axis=0)
    return redraws.Draw(sampled.rollout, ids, reward, bench.ended(sampled.rollout), ref_scores)

  def _draw_again(
    self, policy: Params, drawn: redraws.Draw, keys: Sequence[jax.Array]
  ) -> tuple[redraws.Draw, dict[str, float], float]:
    """Replaces groups without signal; returns the draw, metrics, and the seconds of sampling."""
    if not self._redraws:
      return drawn, {}, 0.0
    bench, seconds = self._bench, 0.0
    samples, penalty = bench.config.sampling.samples_per_prompt, self._shaping.missing_eos_penalty
    batch = redraws.Filled(drawn, samples, penalty, self._constrained)
    while batch.lacking.any() and batch.draws <= self._redraws:
      prompts = sharding.place_batch(next(self.batches), bench.run.mesh)
      own = [jax.random.fold_in(key, batch.draws) for key in keys]
      start = time.monotonic()
      rollout = self.generate(self.reshard(policy), *prompts, own[0])
      sampled = Sampled(jax.block_until_ready(rollout), prompts.prompt_id)
      seconds += time.monotonic() - start
      batch.add(self._judge(sampled, prompts, own[1]))
    return batch.draw, batch.metrics(), seconds

  def _score(
    self, rollout: Rollout, prompt_id: jax.Array | np.ndarray, watch: rewards.Watch
  ) -> tuple[np.ndarray, rewards.Parts]:
    """Returns the prompt ids [B] and the reward of responses, with scores of NaN if unusable."""
    repeats = rollout.tokens.shape[0] // prompt_id.shape[0]
    ids = np.repeat(sharding.to_host(prompt_id), repeats)
    reward = rewards.parts_of(self._reward(rollout, ids))
    watch.check(reward.scores, reward.named)
    return ids, jax.tree.map(jnp.asarray, reward)


class Prepared(NamedTuple):
  """Scored responses in the form that a method takes.

  Attributes:
    rollout: Responses, with the old log-probabilities of probability ratios.
    scores: [B] shaped scores, NaN on rows to leave out.
    policy: Reading of the policy, and of the critic if there is one.
    ref_logprobs: [B, R] log-probabilities under the reference.
    weights: [B, R] importance weights, which multiply the advantages.
    moments: Running moments of the scores.
    metrics: Metrics of the responses.
    token_rewards: [B, R] rewards of tokens in addition to the scores, or None.
    satisfied: [B] bool, True on responses that violate no constraint, or None.
  """

  rollout: Rollout
  scores: jax.Array
  policy: reading.Reading
  ref_logprobs: jax.Array
  weights: jax.Array
  moments: reward.RunningMoments
  metrics: Metrics
  token_rewards: jax.Array | None = None
  satisfied: jax.Array | None = None

  @property
  def totals(self) -> jax.Array:
    """Shaped scores [B] plus the rewards of tokens, for methods without a critic."""
    return jnp.asarray(rewards.total(rewards.Parts(self.scores, self.token_rewards)))


def make_prepare(
  config: Any, read: reading.Read, read_ref: reading.Read
) -> Callable[[Params, Params, reward.RunningMoments, Responses], Prepared]:
  """Builds `prepare(params, ref_params, moments, responses)`: shapes scores, computes log-probs.

  Args:
    config: Config with `shaping` and `rollout`.
    read: Function that reads responses with the policy, and with the critic if there is one.
    read_ref: Function that reads responses with the reference.
  """

  def prepare(params, ref_params, moments, responses) -> Prepared:
    rollout, scores, ended, ref_scores, *parts = responses
    scores, moments = shaped.shape(scores, ended, moments, config.shaping, ref_scores)
    policy, ref = read(params, rollout), read_ref(ref_params, rollout).logprobs
    rollout, weights, metrics = correct(rollout, policy.logprobs, config.rollout.importance_cap)
    metrics |= response_metrics(responses, rollout, ref)
    return Prepared(rollout, scores, policy, ref, weights, moments, metrics, *parts)

  return prepare


def make_experience(
  config: Any,
  read: reading.Read,
  read_ref: reading.Read,
  make_batch: Callable[..., Any],
  *,
  weigh: bool = True,
) -> Experience:
  """Builds jitted `(params, ref_params, moments, responses, ...) -> (batch, moments, metrics)`.

  Args:
    config: Config with `shaping` and `rollout`.
    read: Function that reads responses with the policy, and with the critic if there is one.
    read_ref: Function that reads responses with the reference.
    make_batch: `(prepared, ...) -> (batch, metrics)` of a method, with further arguments of the
      experience, such as a random key.
    weigh: False for a method that applies the importance weights itself, or takes none.
  """
  prepare = make_prepare(config, read, read_ref)

  @jax.jit
  def experience(params, ref_params, moments, responses, *further):
    ready = prepare(params, ref_params, moments, responses)
    batch, metrics = make_batch(ready, *further)
    if weigh:
      batch = batch._replace(advantages=ready.weights * batch.advantages)
    return batch, ready.moments, ready.metrics | metrics

  return experience


def sentence_ends(bench: Workbench) -> Callable[[Rollout], jax.Array]:
  """Builds `ends(rollout)`: bools [B, R], True on response tokens that end a sentence or a line."""
  marks = tuple(mark.encode() for mark in (".", "!", "?", "。", "！", "？"))
  texts = bench.tokenizer.token_bytes()
  ending = np.array([b"\n" in text or text.rstrip().endswith(marks) for text in texts])
  return lambda rollout: jnp.asarray(ending)[rollout.tokens[:, -rollout.logprobs.shape[1] :]]


def correct(
  rollout: Rollout, logprobs: jax.Array, cap: float
) -> tuple[Rollout, jax.Array, Metrics]:
  """Corrects for sampler/trainer mismatch by importance weights.

  Args:
    rollout: B responses.
    logprobs: [B, R] log-probabilities of their tokens under the trainer's policy.
    cap: Upper bound on the weights; 0 is a no-op.

  Returns:
    The rollout with the trainer's log-probabilities, weights [B, R] of the tokens, and metrics.
  """
  if not cap:
    return rollout, jnp.ones_like(logprobs), {}
  mask = rollout.response_mask[:, -logprobs.shape[1] :]
  logprobs, sampled = (jnp.where(mask, x, 0.0) for x in (logprobs, rollout.logprobs))
  weights = policy_gradient.truncated_importance_weights(logprobs, sampled, cap=cap)
  fine = jnp.isfinite(weights)  # A method leaves out rows whose log-probabilities are not.
  metrics = {"importance/mean": masked.masked_mean(weights, mask & fine)}
  return rollout._replace(logprobs=logprobs), jnp.where(fine, weights, 0.0), metrics


def response_metrics(responses: Responses, rollout: Rollout, ref_logprobs: jax.Array) -> Metrics:
  """Metrics of scored responses, whose tokens are samples of the policy.

  `kl/ref` is the mean log-ratio per response, in nats. `entropy`, in nats per token, is the mean of
  minus the log-probability, which estimates it without bias.
  """
  parts = rewards.Parts(responses.scores, responses.token_rewards, responses.satisfied)
  scores = jnp.asarray(rewards.total(parts))
  finite = jnp.isfinite(scores)
  rows, mask = reading.finite_rows(rollout, scores, ref_logprobs)
  sequence_kl = masked.masked_sum(kl.k1(rollout.logprobs, ref_logprobs), mask, axis=1)
  lengths = jnp.sum(rollout.response_mask, axis=1)
  return {
    "reward/mean": masked.defined_mean(scores, finite),
    "reward/std": jnp.where(finite.any(), jnp.sqrt(masked.masked_var(scores, finite)), jnp.nan),
    "reward/nonfinite": jnp.sum(~finite).astype(jnp.float32),
    **part_metrics(parts),
    "kl/ref": masked.defined_mean(sequence_kl, rows),
    "entropy": -masked.defined_mean(rollout.logprobs, mask),
    "response_length/mean": jnp.mean(lengths.astype(jnp.float32)),
    "eos_fraction": jnp.mean(responses.ended.astype(jnp.float32)),
  }


def means_by_name(reward: rewards.Parts) -> dict[str, float]:
  """Mean of each of several rewards over the responses where it can be used, as reward/NAME."""
  named = {name: np.asarray(x) for name, x in sharding.to_host(reward.named or {}).items()}
  usable = {name: x[np.isfinite(x)] for name, x in named.items()}
  return {f"reward/{name}": float(np.mean(x)) if x.size else np.nan for name, x in usable.items()}


def part_metrics(parts: rewards.Parts) -> Metrics:
  """Metrics of the parts of a reward that are given besides its scores."""
  metrics = {}
  if parts.tokens is not None:
    metrics["reward/tokens"] = jnp.mean(jnp.sum(parts.tokens, axis=1))
  if parts.satisfied is not None:
    metrics["reward/violations"] = 1 - jnp.mean(parts.satisfied.astype(jnp.float32))
  return metrics


def sample_away(bench: Workbench) -> tuple[Callable[..., Params], Callable[..., Rollout]]:
  """Builds functions that move params to the sampling devices, and that sample there.

  Both return without waiting for the result. Weights are sharded over `tensor` as on the other
  devices, and rows over the remaining axes.
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
  generate = models.with_distinct_ids(generate, away)

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
  rollout = {
    "tokens": np.zeros(shape, np.int32),
    "prompt_mask": np.zeros(shape, bool),
    "response_mask": np.zeros(shape, bool),
    "logprobs": np.zeros((rows, new), np.float32),
  }
  nothing = {"rollout": rollout, "prompt_id": np.zeros(config.batch_size, np.int32)}
  nothing = sharding.place_batch(nothing, bench.run.mesh)
  return Sampled(Rollout(**nothing["rollout"]), nothing["prompt_id"])
