r"""Improves a policy against a reward by policy gradients, held near its start by a KL penalty.

Built-in task, after SFT and reward model (two minutes on a laptop CPU):
  python -m experiments.ppo --workdir=runs/ppo --init_from=runs/sft --reward.path=runs/rm
Your model and prompts, against a Python reward function of rlhf_jax/rewards/functions.py:
  python -m experiments.ppo --workdir=runs/ppo --init_from=FOLDER --data.path=PROMPTS.jsonl \
    --reward.name=sentiment
With several prompts and their responses in a row of the update, if lengths differ much:
  --ppo.packed_length=512
With the critic as a head on the policy; with two devices that sample while the others learn:
  --share_trunk    --rollout.devices=2 --ppo.importance_cap=2
Without a critic, from several samples per prompt:
  RLOO  --ppo.advantage=rloo --ppo.objective=reinforce --sampling.samples_per_prompt=4 ...
  GRPO  --ppo.advantage=grpo --ppo.aggregation=grpo --ppo.kl_in=loss ...
PPO-max (https://arxiv.org/abs/2307.04964):
  --ppo.normalize_scores --ppo.score_clip=... --critic_warmup=... --ppo.ptx_coef=...

The default learning rates suit the built-in task; a pretrained model wants about 1e-6.
At the end the policy and its start answer the held-out prompts, and both are scored.
Starting the same command again continues a run that was stopped.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import records
from experiments.lab import evaluating, judges, models, training
from rlhf_jax import data, entry, flags, generation, loop, sharding
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms.ppo import PPOConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import Model, actor_critic, lora, shared_actor_critic, zero_scores
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig, freeze, make_optimizer, make_schedule
from rlhf_jax.types import Metrics, Params, Rollout, TokenBatch, TrainState, TrainStep


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
  """Where responses are sampled.

  Attributes:
    devices: The last devices, which then do nothing else: they sample the next batch while the
      others, those of --mesh, learn from the one that the policy before the last update sampled.
      0 samples on all devices in turn with learning.
  """

  devices: int = 0

  def __post_init__(self):
    if self.devices < 0:
      raise ValueError(f"devices must not be negative, got {self.devices}")


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """PPO. `batch_size` counts prompts; each step has one iteration of sampling and updates.

  Attributes:
    share_trunk: The critic is a head on the policy, not a model of its own: it takes no memory, but
      its loss moves the policy too (`ppo.value_coef`).
    critic_warmup: Iterations at the start that train the critic alone.
    reference_samples: Responses of the reference to each prompt, if `ppo.shaping` compares with it.
    ptx_path: JSON Lines file of demonstrations for `ppo.ptx_coef`; empty is the built-in task's.
  """

  steps: int = 45
  batch_size: int = 64
  eval_every: int = 0
  checkpoint_every: int = 20
  share_trunk: bool = False
  critic_warmup: int = 0
  reference_samples: int = 1
  ptx_path: str = ""
  model: models.ModelOptions = models.ModelOptions()
  lora: LoRAConfig = LoRAConfig()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(max_new_tokens=40)
  rollout: RolloutOptions = RolloutOptions()
  reward: judges.RewardOptions = judges.RewardOptions()
  ppo: PPOConfig = PPOConfig(kl_coef=0.2)
  # With eps=1e-5, as in https://arxiv.org/abs/2403.17031, gradients that are all rounding move
  # nothing: up to rounding an update then is the same on one device and on many.
  optim: OptimConfig = OptimConfig(learning_rate=1e-3, schedule="linear", eps=1e-5)
  value_optim: OptimConfig = OptimConfig(learning_rate=1e-3, schedule="constant", eps=1e-5)

  def __post_init__(self):
    super().__post_init__()
    training.require_random(self.sampling)
    samples = self.sampling.samples_per_prompt
    parts = self.ppo.minibatches * self.ppo.microbatches
    if self.batch_size * samples % parts:
      raise ValueError(
        f"batch_size {self.batch_size} * sampling.samples_per_prompt does not split into"
        f" {parts} = ppo.minibatches * ppo.microbatches equal parts"
      )
    if self.ppo.is_grouped and samples < 2:
      raise ValueError(
        f"sampling.samples_per_prompt must be at least 2 for ppo.advantage={self.ppo.advantage}"
      )
    if self.data.packed_length:
      raise ValueError("data.packed_length packs what is read; ppo.packed_length, what is sampled")
    if self.rollout.devices and not self.ppo.importance_cap:
      raise ValueError(
        "rollout.devices sample from the policy before; set ppo.importance_cap, such as 2, to weigh"
        " them as if from the present one"
      )
    if self.rollout.devices and self.ppo.reads_reference_scores:
      raise ValueError(f"rollout.devices does not go with ppo.shaping={self.ppo.shaping}")
    if self.share_trunk and not self.ppo.has_critic:
      raise ValueError(f"share_trunk needs a critic; ppo.advantage={self.ppo.advantage} has none")
    if self.critic_warmup and not self.ppo.has_critic:
      raise ValueError(f"critic_warmup needs a critic; ppo.advantage={self.ppo.advantage} has none")
    if not 0 <= self.critic_warmup < self.steps:
      raise ValueError(f"critic_warmup must be in [0, steps), got {self.critic_warmup}")
    if self.reference_samples < 1:
      raise ValueError(f"reference_samples must be at least 1, got {self.reference_samples}")
    if self.ptx_path and not self.ppo.ptx_coef:
      raise ValueError("ptx_path is not read without ppo.ptx_coef; set both")
    if self.ppo.ptx_coef and not self.ptx_path and (self.data.path or self.data.tfds):
      raise ValueError("ptx_path must name a file of demonstrations for ppo.ptx_coef")

  @property
  def updates(self) -> int:
    """Optimizer steps of the whole run."""
    return self.steps * self.ppo.epochs * self.ppo.minibatches


class Sampled(NamedTuple):
  """Responses, and the ids of the prompts they answer."""

  rollout: Rollout
  prompt_id: jax.Array


class PPOState(NamedTuple):
  """What an iteration carries on.

  Attributes:
    train: Policy and critic with their optimizers.
    control: The controller of the KL coefficient and the running moments.
    sampled: What the next iteration learns from, if it is sampled while this one learns.
  """

  train: TrainState
  control: ppo.Control
  sampled: Sampled | None = None


class Batch(NamedTuple):
  """What an iteration reads.

  Attributes:
    prompts: To sample responses to.
    demonstrations: One per response, for the ptx term, or None.
  """

  prompts: data.PromptBatch
  demonstrations: TokenBatch | None = None


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the figures of summary.json."""
  config.reward.require()
  folder = models.source_folder(config.model, config.init_from)
  tokenizer = models.open_tokenizer(folder, config.data.end_token)
  train_set, heldout = data.load("prompts", config.data, tokenizer, seed=session.seed)
  responses = config.batch_size * config.sampling.samples_per_prompt
  length = train_set.padded_length + config.sampling.max_new_tokens
  if 0 < config.ppo.packed_length < length:
    raise flags.UsageError(
      f"--ppo.packed_length={config.ppo.packed_length} is too short for the longest sequence, of up"
      f" to {length} tokens; raise it, or lower --data.max_prompt_length or"
      " --sampling.max_new_tokens"
    )
  sources = [data.batches(train_set, config.batch_size, seed=session.seed, pad_id=tokenizer.pad_id)]
  digests = {}
  if config.ppo.ptx_coef:
    own = dataclasses.replace(config.data, path=config.ptx_path, tfds="", eval_path="")
    texts, _ = data.load("demonstrations", own, tokenizer, seed=session.seed)
    digests["ptx"] = texts.digest
    sources += [data.batches(texts, responses, seed=session.seed, pad_id=tokenizer.pad_id)]
  critics = config.reward.paths[:1] if config.ppo.has_critic and not config.share_trunk else ()
  digests |= models.frozen_digest(config.lora, folder, *map(models.model_folder, critics))
  ahead = config.rollout.devices
  require_devices(ahead)
  with loop.open_run(session, spare=ahead) as run:
    records.identify(run, "ppo", config, tokenizer, train_set, heldout, **digests)
    model, ref_params = models.open_model(run, config.model, folder, tokenizer)
    reward_of = judges.open_reward(run, config.reward, config.model, tokenizer)
    gold_fns = judges.gold_rewards(config.data, train_set, tokenizer)
    state, programs = open_programs(run, config, folder, model, ref_params, tokenizer)
    if ahead:
      state = state._replace(sampled=nothing_sampled(run, config, train_set.padded_length))
    training.describe(
      run,
      "PPO" if config.ppo.has_critic else config.ppo.advantage.upper(),
      model,
      state.train,
      {
        "reward": config.reward.path or config.reward.name,
        "data": f"{len(train_set.examples)} prompts",
        "tokens per step": f"{responses * length} in {responses} responses,"
        f" {config.ppo.epochs} epochs of {config.ppo.minibatches} minibatches",
      },
      frozen=programs.trainer.frozen,
    )
    stops = (tokenizer.eos_id,)
    reward_fn = reward_of(train_set)

    def iteration(state: PPOState, batch: Batch, key: jax.Array):
      prompts = batch.prompts
      inputs = prompts.tokens, prompts.mask, prompts.prompt_id
      keys = [
        jax.random.fold_in(jax.random.fold_in(key, purpose), state.train.step)
        for purpose in (1, 2, 3)
      ]

      def score(rollout: Rollout, prompt_id: jax.Array):
        repeats = rollout.tokens.shape[0] // prompts.tokens.shape[0]
        prompt_ids = np.repeat(sharding.to_host(prompt_id), repeats)
        return prompt_ids, jnp.asarray(reward_fn(rollout, prompt_ids))

      params = jax.block_until_ready(programs.trainer.params(state.train))
      start = time.monotonic()
      policy = programs.reshard(params["policy"])
      present, following, metrics = state.sampled, None, {}
      if present is None or int(state.train.step) == 0:
        present = Sampled(programs.generate(policy, *inputs, keys[0]), prompts.prompt_id)
      if ahead:  # Nothing waits for it: it is sampled while this iteration learns.
        following = Sampled(programs.generate(policy, *inputs, keys[2]), prompts.prompt_id)
        metrics["staleness"] = float(present is state.sampled)
      del policy  # Room for the update.
      rollout = jax.block_until_ready(present.rollout)
      sampled = time.monotonic()
      prompt_ids, scores = score(rollout, present.prompt_id)
      metrics |= {
        f"{name}_reward/mean": float(np.mean(fn(rollout, prompt_ids)))
        for name, fn in gold_fns.items()
      }
      more = {} if batch.demonstrations is None else {"demonstrations": batch.demonstrations}
      if config.ppo.reads_reference_scores:
        answers = programs.refer(programs.reshard(ref_params), *inputs, keys[1])
        ref_scores = score(answers, prompts.prompt_id)[1].reshape(config.batch_size, -1)
        more["ref_scores"] = jnp.repeat(ref_scores, config.sampling.samples_per_prompt, axis=0)
      scored = time.monotonic()
      experienced, control, of_rollout = programs.experience(
        params,
        ref_params,
        state.control,
        rollout,
        scores,
        generation.ended(rollout, stops),
        **more,
      )
      new, of_update = programs.trainer.step(state.train, experienced, key)
      metrics |= of_rollout | of_update
      metrics |= {
        "tokens": jnp.sum(rollout.response_mask),
        "time/generate": sampled - start,
        "time/reward": scored - sampled,
      }
      return PPOState(new, control, following), metrics

    def policy_of(state: PPOState):
      return programs.trainer.params(state.train)["policy"]

    heldout_fns = {"reward": reward_of(heldout)}
    heldout_fns |= judges.gold_rewards(config.data, heldout, tokenizer)
    judge = evaluating.Judge(
      run,
      model,
      tokenizer,
      heldout,
      config.sampling,
      heldout_fns,
      ref_params,
      batch_size=responses,
    )
    _, schedule = make_transformation(config)
    state = loop.fit(
      run,
      config,
      iteration,
      state,
      training.Zipped(Batch, sources),
      # The end is judged by `finish`.
      evaluate=judge.evaluate(policy_of) if config.eval_every else None,
      learning_rate=lambda step: schedule(step * config.updates // config.steps),
      title="ppo",
    )
    return judge.finish(policy_of(state), config.steps, "PPO")


class Programs(NamedTuple):
  """What an iteration runs on the devices."""

  reshard: Callable[[Params], Params]
  generate: Callable[..., Rollout]  # Of the policy, from params that `reshard` gave.
  refer: Callable[..., Rollout]  # Of the reference.
  experience: Callable[..., tuple[ppo.PPOBatch, ppo.Control, Metrics]]
  trainer: training.Trainer


def open_programs(
  run: loop.Run,
  config: Config,
  folder: pathlib.Path | None,
  model: Model,
  ref_params: Params,
  tokenizer: data.Tokenizer,
) -> tuple[PPOState, Programs]:
  """The first state and the programs, none of which is compiled yet."""
  apply_fn, params = open_actor(run, config, folder, tokenizer, model, ref_params)
  frozen, trained = lora.split(params)
  tx, _ = make_transformation(config)
  control = sharding.put(ppo.init_control(config.ppo), sharding.replicated(run.mesh))
  state = PPOState(training.place_state(run, trained, tx), control)
  shardings = training.shardings_of(state.train)
  temperature, samples = config.sampling.temperature, config.sampling.samples_per_prompt
  generate, refer = (
    models.make_sampler(
      model, tokenizer, dataclasses.replace(config.sampling, samples_per_prompt=count)
    )
    for count in (samples, config.reference_samples)
  )
  experience = ppo.make_experience(
    apply_fn, model.apply, config.ppo, temperature=temperature, samples_per_prompt=samples
  )

  def make_update(packed_rows: int | None = None) -> TrainStep:
    make_step = functools.partial(
      ppo.make_ppo_step,
      tx=tx,
      config=config.ppo,
      temperature=temperature,
      packed_rows=packed_rows,
    )
    return freeze(make_step, apply_fn, frozen, state_shardings=shardings)

  if config.ppo.packed_length and not sharding.is_absent(run.mesh):
    shards = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    update = ppo.make_packed_ppo_step(make_update, config.ppo, multiple=shards)
  else:  # For absent devices, with as many packed rows as there can be.
    update = make_update()
  reshard = sharding.make_reshard(run.mesh, model.config.dtype)
  if config.rollout.devices:
    reshard, generate = sample_away(run, config, model, tokenizer)
  trainer = training.Trainer(state.train, update, frozen)
  return state, Programs(reshard, generate, refer, experience, trainer)


def require_devices(ahead: int) -> None:
  """Refuses devices of their own for rollouts that are not there."""
  if ahead and jax.process_count() > 1:
    raise flags.UsageError("--rollout.devices is for a single process; leave it at 0")
  if ahead >= jax.device_count():
    raise flags.UsageError(
      f"--rollout.devices={ahead} leaves none of the {jax.device_count()} devices to learn with"
    )


def sample_away(run: loop.Run, config: Config, model: Model, tokenizer: data.Tokenizer):
  """Moves params to the devices of rollouts, and samples there; both return at once.

  Weights are split over `tensor` as they are on the others, rows over what is left.
  """
  tensor, devices = run.mesh.shape["tensor"], jax.devices()[-config.rollout.devices :]
  if len(devices) % tensor:
    raise flags.UsageError(
      f"--rollout.devices={len(devices)} must be a multiple of tensor:{tensor} of --mesh"
    )
  away = sharding.make_mesh(f"data:-1,tensor:{tensor}", devices)
  sampler = models.build_model(run._replace(mesh=away), config.model, model.config, tokenizer)
  generate = models.make_sampler(sampler, tokenizer, config.sampling)

  def generate_away(params: Params, *inputs: jax.Array) -> Rollout:
    *prompts, key = inputs
    prompts = jax.device_put(prompts, sharding.batch_sharding(away))
    rollout = generate(params, *prompts, jax.device_put(key, sharding.replicated(away)))
    return jax.device_put(rollout, sharding.batch_sharding(run.mesh))

  return sharding.make_reshard(run.mesh, model.config.dtype, away), generate_away


def nothing_sampled(run: loop.Run, config: Config, prompt_length: int) -> Sampled:
  """What stands for `PPOState.sampled` before the first iteration, and is read by none."""
  rows = config.batch_size * config.sampling.samples_per_prompt
  new = config.sampling.max_new_tokens
  shape = (rows, prompt_length + new)
  nothing = Rollout(
    tokens=np.zeros(shape, np.int32),
    prompt_mask=np.zeros(shape, bool),
    response_mask=np.zeros(shape, bool),
    logprobs=np.zeros((rows, new), np.float32),
  )
  ids = np.zeros(config.batch_size, np.int32)
  return sharding.place_batch(Sampled(nothing, ids), run.mesh)


def open_actor(run, config, folder, tokenizer, model, params):
  """Apply function and first params of the policy, with a critic where the advantage needs one.

  The critic starts as the reward model, or else as the policy with a head of zeros. With
  `config.lora` both get adapters. With `config.share_trunk` the critic is a head of zeros alone.
  """
  policy = models.add_adapters(run, config.lora, params)
  if not config.ppo.has_critic:
    apply_fn = lambda params, tokens, **kwargs: (  # noqa: E731
      model.apply(params["policy"], tokens, **kwargs),
      None,
    )
    return apply_fn, {"policy": policy}
  if config.share_trunk:
    both = models.build_model(run, config.model, model.config, tokenizer, "both")
    head = lambda key: zero_scores({"score": both.init(key)["score"]})  # noqa: E731
    value = models.create(run, head, run.key_for(1))
    return shared_actor_critic(both), {"policy": policy, "value": value}
  if config.reward.paths:
    critic, value = models.open_reward_model(run, config.reward.paths[0], config.model, tokenizer)
  else:
    critic, value = models.open_model(run, config.model, folder, tokenizer, "scalar")
    value |= models.create(run, zero_scores, {"score": value["score"]})
  value = models.add_adapters(run, config.lora, value)
  return actor_critic(model, critic), {"policy": policy, "value": value}


def make_transformation(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """One optimizer for the policy and one for the critic, and the learning rate of the policy.

  At rate 0 an update leaves the policy bitwise as it is: so it waits for the critic.
  """
  wait = config.critic_warmup * config.ppo.epochs * config.ppo.minibatches
  schedule = optax.join_schedules(
    [optax.constant_schedule(0.0), make_schedule(config.optim, config.updates - wait)], [wait]
  )
  policy = make_optimizer(config.optim, config.updates, schedule=schedule)
  if not config.ppo.has_critic:
    return optax.partition({"policy": policy}, label_parts), schedule
  value = make_optimizer(config.value_optim, config.updates)
  return optax.partition({"policy": policy, "value": value}, label_parts), schedule


def label_parts(params):
  """The name of the part that each parameter belongs to."""
  return {name: jax.tree.map(lambda _, n=name: n, part) for name, part in params.items()}


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
