r"""Improves a policy against a reward by policy gradients, held near its start by a KL penalty.

Built-in task, after SFT and reward model (two minutes on a laptop CPU):
  python -m experiments.ppo --workdir=runs/ppo --init_from=runs/sft --reward.path=runs/rm
Your model and prompts, against a Python reward function of rlhf_jax/rewards/functions.py:
  python -m experiments.ppo --workdir=runs/ppo --init_from=FOLDER --data.path=PROMPTS.jsonl \
    --reward.name=sentiment
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

from experiments import common
from rlhf_jax import data, flags, generation, loop, sharding
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms.ppo import PPOConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import Model, actor_critic, lora, zero_scores
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig, freeze, join, make_optimizer, make_schedule
from rlhf_jax.types import Metrics, Params, Rollout, TokenBatch, TrainState, TrainStep


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """PPO. `batch_size` counts prompts; each step has one iteration of sampling and updates.

  Attributes:
    critic_warmup: Iterations at the start that train the critic alone.
    reference_samples: Responses of the reference to each prompt, if `ppo.shaping` compares with it.
    ptx_path: JSON Lines file of demonstrations for `ppo.ptx_coef`; empty is the built-in task's.
  """

  steps: int = 80
  batch_size: int = 64
  eval_every: int = 0
  checkpoint_every: int = 20
  critic_warmup: int = 0
  reference_samples: int = 1
  ptx_path: str = ""
  model: common.ModelOptions = common.ModelOptions()
  lora: LoRAConfig = LoRAConfig()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(max_new_tokens=40)
  reward: common.RewardOptions = common.RewardOptions()
  ppo: PPOConfig = PPOConfig()
  optim: OptimConfig = OptimConfig(learning_rate=3e-4, schedule="linear")
  value_optim: OptimConfig = OptimConfig(learning_rate=2e-3, schedule="constant")

  def __post_init__(self):
    super().__post_init__()
    common.require_random(self.sampling)
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


class PPOState(NamedTuple):
  """What an iteration carries on: policy and critic with their optimizers, and the controller."""

  train: TrainState
  control: ppo.Control


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
  folder = common.source_folder(config.model, config.init_from)
  tokenizer = common.open_tokenizer(folder, config.data.end_token)
  train_set, heldout = data.load("prompts", config.data, tokenizer, seed=session.seed)
  responses = config.batch_size * config.sampling.samples_per_prompt
  sources = [data.batches(train_set, config.batch_size, seed=session.seed, pad_id=tokenizer.pad_id)]
  digests = {"data": train_set.digest, "tokenizer": tokenizer.digest}
  if config.ppo.ptx_coef:
    own = dataclasses.replace(config.data, path=config.ptx_path, tfds="", eval_path="")
    texts, _ = data.load("demonstrations", own, tokenizer, seed=session.seed)
    digests["ptx"] = texts.digest
    sources += [data.batches(texts, responses, seed=session.seed, pad_id=tokenizer.pad_id)]
  critics = config.reward.paths[:1] if config.ppo.has_critic else ()
  digests |= common.frozen_digest(config.lora, folder, *map(common.model_folder, critics))
  with loop.open_run(session) as run:
    loop.identify(run, "ppo", flags.to_dict(config), **digests)
    model, ref_params = common.open_model(run, config.model, folder, tokenizer)
    reward_of = common.open_reward(run, config.reward, config.model, tokenizer)
    gold_fns = common.gold_rewards(config.data, train_set, tokenizer)
    state, programs = open_programs(run, config, folder, model, ref_params, tokenizer)
    length = train_set.padded_length + config.sampling.max_new_tokens
    common.describe(
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
      frozen=programs.frozen,
    )
    stops = (tokenizer.eos_id,)
    reward_fn = reward_of(train_set)

    def iteration(state: PPOState, batch: Batch, key: jax.Array):
      prompts = batch.prompts
      keys = [
        jax.random.fold_in(jax.random.fold_in(key, purpose), state.train.step) for purpose in (1, 2)
      ]

      def sample_and_score(generate, params, key):
        rollout = generate(
          programs.reshard(params), prompts.tokens, prompts.mask, prompts.prompt_id, key
        )
        rollout = jax.block_until_ready(rollout)
        sampled = time.monotonic()
        repeats = rollout.tokens.shape[0] // prompts.tokens.shape[0]
        prompt_ids = np.repeat(sharding.to_host(prompts.prompt_id), repeats)
        return rollout, prompt_ids, jnp.asarray(reward_fn(rollout, prompt_ids)), sampled

      params = jax.block_until_ready(programs.params(state.train))
      start = time.monotonic()
      rollout, prompt_ids, scores, sampled = sample_and_score(
        programs.generate, params["policy"], keys[0]
      )
      metrics = {
        f"{name}_reward/mean": float(np.mean(fn(rollout, prompt_ids)))
        for name, fn in gold_fns.items()
      }
      more = {} if batch.demonstrations is None else {"demonstrations": batch.demonstrations}
      if config.ppo.reads_reference_scores:
        ref_scores = sample_and_score(programs.refer, ref_params, keys[1])[2]
        ref_scores = ref_scores.reshape(config.batch_size, -1)
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
      new, of_update = programs.update(state.train, experienced, key)
      metrics |= of_rollout | of_update
      metrics |= {
        "tokens": jnp.sum(rollout.response_mask),
        "time/generate": sampled - start,
        "time/reward": scored - sampled,
      }
      return PPOState(new, control), metrics

    def policy_of(state: PPOState):
      return programs.params(state.train)["policy"]

    heldout_fns = {"reward": reward_of(heldout)}
    heldout_fns |= common.gold_rewards(config.data, heldout, tokenizer)
    judge = common.Judge(run, model, tokenizer, heldout, config.sampling, heldout_fns, ref_params)
    _, schedule = make_transformation(config)
    state = loop.fit(
      run,
      config,
      iteration,
      state,
      common.Zipped(Batch, sources),
      # The end is judged by `finish`.
      evaluate=judge.evaluate(policy_of) if config.eval_every else None,
      learning_rate=lambda step: schedule(step * config.updates // config.steps),
      title="ppo",
    )
    return judge.finish(policy_of(state), config.steps, "PPO")


class Programs(NamedTuple):
  """What an iteration runs on the devices."""

  reshard: Callable[[Params], Params]
  generate: Callable[..., Rollout]  # Of the policy.
  refer: Callable[..., Rollout]  # Of the reference.
  experience: Callable[..., tuple[ppo.PPOBatch, ppo.Control, Metrics]]
  update: TrainStep
  frozen: Params  # What the state lacks, since no update changes it.

  def params(self, state: TrainState) -> Params:
    """The whole params of a state."""
    return join(self.frozen, state.params)


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
  state = PPOState(common.place_state(run, trained, tx), control)
  temperature, samples = config.sampling.temperature, config.sampling.samples_per_prompt
  generate, refer = (
    common.make_sampler(
      model, tokenizer, dataclasses.replace(config.sampling, samples_per_prompt=count)
    )
    for count in (samples, config.reference_samples)
  )
  experience = ppo.make_experience(
    apply_fn, model.apply, config.ppo, temperature=temperature, samples_per_prompt=samples
  )
  make_step = functools.partial(
    ppo.make_ppo_step, tx=tx, config=config.ppo, temperature=temperature
  )
  update = freeze(make_step, apply_fn, frozen, state_shardings=common.shardings_of(state.train))
  reshard = sharding.make_reshard(run.mesh, model.config.dtype)
  return state, Programs(reshard, generate, refer, experience, update, frozen)


def open_actor(run, config, folder, tokenizer, model, params):
  """Apply function and first params of the policy, with a critic where the advantage needs one.

  The critic starts as the reward model, or else as the policy with a head of zeros. With
  `config.lora` both get adapters.
  """
  policy = common.add_adapters(run, config.lora, params)
  if not config.ppo.has_critic:
    apply_fn = lambda params, tokens, **kwargs: (  # noqa: E731
      model.apply(params["policy"], tokens, **kwargs),
      None,
    )
    return apply_fn, {"policy": policy}
  if config.reward.paths:
    critic, value = common.open_reward_model(run, config.reward.paths[0], config.model, tokenizer)
  else:
    critic, value = common.open_model(run, config.model, folder, tokenizer, "scalar")
    value |= common.create(run, zero_scores, {"score": value["score"]})
  value = common.add_adapters(run, config.lora, value)
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
  flags.run_script(train, loop.Session, Config)
