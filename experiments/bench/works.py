"""Pieces of work of the scripts: train steps, sampling, and whole iterations.

They are built from what the scripts are built from: `make_x_step`, `make_generate`, `make_read` and
the parts of `experiments.lab`. Each trains a copy of the params.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import data, generation, preflight, rewards, sharding
from rlhf_jax.algorithms import (
  dpo,
  epochs,
  grpo,
  kto,
  nash_md,
  opponents,
  pairs,
  ppo,
  reading,
  reward_model,
  sft,
)
from rlhf_jax.data import DataConfig
from rlhf_jax.losses.reward import RunningMoments
from rlhf_jax.models import actor_critic
from rlhf_jax.rewards.shaped import ShapingConfig
from rlhf_jax.train_step import OptimConfig
from rlhf_jax.types import PairBatch, Params, Rollout, SharedBatch, TokenBatch, UnpairedBatch
from ..lab import matches, responses, training, workbench
from .measure import Work
from .shapes import Setup

STEPS = 10_000  # Length of the schedule of the learning rate, which no benchmark reaches.
OPTIM = OptimConfig(learning_rate=1e-5, schedule="constant", warmup=0.0)
MIX = 0.25  # Weight of the reference in the opponent of Nash-MD.


class _NoTokenizer(NamedTuple):
  """Part of a tokenizer that sampling reads. No sampled token ends a response."""

  vocab_size: int
  pad_id: int = 0

  @property
  def stop_ids(self) -> tuple[int, ...]:
    return (self.vocab_size,)


class _Settings(NamedTuple):
  """Config of a script that samples."""

  batch_size: int
  sampling: generation.SamplingConfig
  shaping: ShapingConfig = ShapingConfig(missing_eos_penalty=0.0)
  rollout: responses.RolloutOptions = responses.RolloutOptions()
  data: DataConfig = DataConfig(path="none")  # Not the built-in task.


def _bench(setup: Setup, samples: int = 1) -> workbench.Workbench:
  """Workbench of a script that samples `samples` responses per prompt."""
  shape = setup.shape
  sampling = generation.SamplingConfig(shape.response, samples_per_prompt=samples)
  nothing: Any = None  # No data.
  return workbench.Workbench(
    setup.run,
    _Settings(shape.batch_size // samples, sampling),
    cast(data.Tokenizer, _NoTokenizer(shape.vocab_size)),
    nothing,
    nothing,
    setup.policy,
    setup.params,
    None,
  )


def _prompts(setup: Setup, samples: int = 1) -> data.PromptBatch:
  tokens = setup.tokens[: setup.shape.batch_size // samples, 0, : setup.shape.prompt]
  ids = setup.place({"ids": np.arange(len(tokens), dtype=np.int32)})["ids"]
  return data.PromptBatch(tokens, jnp.ones(tokens.shape, bool), ids)


def _trainer(
  setup: Setup,
  apply_fn: Callable[..., Any],
  params: Params,
  make_step: Callable[..., Any],
  updates: epochs.UpdateConfig | None = None,
) -> training.Trainer:
  optimizer = training.one_optimizer(OPTIM, STEPS, updates.updates if updates else 1)
  return training.make_trainer(setup.run, apply_fn, params, optimizer, make_step, updates=updates)


def _repeat(trainer: training.Trainer, make_batch: Callable[..., Any]) -> Callable[[], Any]:
  """Builds a function that makes a batch and takes a step, from the state of the last call."""
  state, key = trainer.state, jax.random.key(0)

  def run() -> Any:
    nonlocal state
    state, metrics = trainer.step(state, make_batch(trainer.params(state)), key)
    return state, metrics

  return run


def _forward(setup: Setup, rows: int, *, scored: int | None = None, length: int = 0) -> float:
  """FLOPs of a forward pass of rows."""
  length = length or setup.shape.length
  return preflight.forward_flops(setup.shape.model, rows, length, scored=scored)


def _training(setup: Setup, flops: float) -> float:
  return preflight.training(setup.shape.model, flops).flops


def _pairs(setup: Setup) -> TokenBatch:
  shape = setup.shape
  mask = np.zeros((shape.batch_size, 2, shape.length), bool)
  mask[..., shape.prompt :] = True
  return TokenBatch(setup.tokens, setup.place({"mask": mask})["mask"])


def _shared_pairs(setup: Setup) -> tuple[PairBatch, float]:
  """Pairs, with the prompt once if the shape says so, and the FLOPs that it saves per forward."""
  shape, pairs = setup.shape, _pairs(setup)
  if not shape.share_prompts:
    return pairs, 0.0
  own = np.arange(shape.prompt, shape.length)
  places = np.arange(shape.length) * np.ones((shape.batch_size, 2, 1), np.int32)
  places[:, 1, shape.prompt :] = own + shape.response
  tokens = jnp.concatenate([pairs.tokens[:, 0], pairs.tokens[:, 1, shape.prompt :]], axis=1)
  placed = setup.place({"places": places.astype(np.int32)})["places"]
  weights = preflight.matrices(shape.model, 0)
  return SharedBatch(tokens, pairs.mask, placed), 2.0 * weights * shape.prompt * shape.batch_size


def _rollout(setup: Setup) -> Rollout:
  """Responses of full length, with the log-probabilities of a uniform policy."""
  shape = setup.shape
  prompt = np.zeros((shape.batch_size, shape.length), bool)
  prompt[:, : shape.prompt] = True
  logprobs = np.full((shape.batch_size, shape.response), -np.log(shape.vocab_size), np.float32)
  placed = setup.place({"prompt": prompt, "response": ~prompt, "logprobs": logprobs})
  return Rollout(setup.tokens[:, 0], placed["prompt"], placed["response"], placed["logprobs"])


def sft_step(setup: Setup) -> Work:
  """SFT on all tokens of full rows."""
  shape = setup.shape
  tokens = setup.tokens[:, 0]
  batch = TokenBatch(tokens, jnp.ones(tokens.shape, bool))
  apply = functools.partial(setup.policy.apply, scored=shape.length)
  make_step = functools.partial(sft.make_sft_step, config=sft.SFTConfig())
  trainer = _trainer(setup, apply, setup.params, make_step)
  flops = _training(setup, _forward(setup, shape.batch_size, scored=shape.length))
  return Work(_repeat(trainer, lambda params: batch), tokens.size, flops)


def reward_model_step(setup: Setup) -> Work:
  """Reward model on pairs."""
  (batch, saved), shape = _shared_pairs(setup), setup.shape
  make_step = functools.partial(
    reward_model.make_reward_model_step, config=reward_model.RewardModelConfig()
  )
  trainer = _trainer(setup, setup.scorer.apply, setup.reward_params, make_step)
  flops = _training(setup, _forward(setup, 2 * shape.batch_size) - saved)
  return Work(_repeat(trainer, lambda params: batch), setup.tokens.size, flops)


def dpo_step(setup: Setup) -> Work:
  """DPO on pairs, with the forward pass of the reference."""
  apply, shape = setup.policy.apply, setup.shape
  batch, saved = _shared_pairs(setup)
  read = pairs.make_read_pairs(apply)
  reference = jax.jit(lambda params, rows: read(params, rows).totals)
  make_step = functools.partial(dpo.make_dpo_step, config=dpo.DPOConfig())
  trainer = _trainer(setup, apply, setup.params, make_step)
  forward = _forward(setup, 2 * shape.batch_size, scored=shape.response) - saved
  run = _repeat(trainer, lambda params: dpo.DPOBatch(batch, reference(setup.params, batch)))
  return Work(run, setup.tokens.size, _training(setup, forward) + forward)


def kto_step(setup: Setup) -> Work:
  """KTO on single responses, with the forward passes of the reference and for the KL."""
  apply, both, shape = setup.policy.apply, _pairs(setup), setup.shape
  (tokens, mismatched), (mask, other) = (jnp.swapaxes(x, 0, 1) for x in both)
  desirable = jnp.arange(shape.batch_size) % 2 == 0
  batch = UnpairedBatch(tokens, mask, desirable, TokenBatch(mismatched, other))
  reference = jax.jit(functools.partial(kto.read_responses, apply))
  make_step = functools.partial(kto.make_kto_step, config=kto.KTOConfig())
  trainer = _trainer(setup, apply, setup.params, make_step)
  forward = _forward(setup, shape.batch_size, scored=shape.response)
  run = _repeat(trainer, lambda params: kto.KTOBatch(batch, reference(setup.params, batch)))
  return Work(run, setup.tokens.size, _training(setup, forward) + 3 * forward)


def _ppo(setup: Setup) -> tuple[ppo.PPOConfig, Callable[..., Any], training.Trainer]:
  """Settings, apply function and trainer of PPO, with the reward model as the critic."""
  settings = ppo.PPOConfig(epochs=setup.shape.epochs, minibatches=setup.shape.minibatches)
  apply = actor_critic(setup.policy, setup.scorer)
  params = {"policy": setup.params, "value": setup.reward_params}
  optimizer = training.actor_critic_optimizer(OPTIM, OPTIM, STEPS, settings.updates)
  make_step = functools.partial(ppo.make_ppo_step, config=settings)
  trainer = training.make_trainer(setup.run, apply, params, optimizer, make_step, updates=settings)
  return settings, apply, trainer


def _ppo_flops(setup: Setup) -> float:
  """FLOPs of all epochs of an update of policy and critic."""
  rows = setup.shape.batch_size
  forward = _forward(setup, rows, scored=setup.shape.response) + _forward(setup, rows)
  return setup.shape.epochs * _training(setup, forward)


def ppo_update(setup: Setup) -> Work:
  """All epochs of PPO on a batch of scored responses."""
  _, _, trainer = _ppo(setup)
  rollout = _rollout(setup)
  zeros = jnp.zeros_like(rollout.logprobs)
  mask = rollout.response_mask[:, setup.shape.prompt :]
  signs = zeros + jnp.where(jnp.arange(len(zeros)) % 2, 1.0, -1.0)[:, None]
  batch = ppo.PPOBatch(rollout, mask, values=zeros, advantages=signs, returns=signs)
  run = _repeat(trainer, lambda params: batch)
  return Work(run, setup.shape.epochs * rollout.tokens.size, _ppo_flops(setup))


def _nash_md(setup: Setup) -> tuple[nash_md.NashMDConfig, training.Trainer]:
  settings = nash_md.NashMDConfig(mix=MIX)
  make_step = functools.partial(nash_md.make_nash_md_step, config=settings)
  return settings, _trainer(setup, setup.policy.apply, setup.params, make_step)


def nash_md_update(setup: Setup) -> Work:
  """Nash-MD step on a batch of judged responses."""
  _, trainer = _nash_md(setup)
  rollout, shape = _rollout(setup), setup.shape
  batch = opponents.OpponentBatch(
    rollout=jax.tree.map(lambda x: x[:, None], rollout),
    ref_logprobs=rollout.logprobs[:, None],
    preference=(jnp.arange(shape.batch_size) % 2).astype(jnp.float32)[:, None],
    tau=jnp.full([shape.batch_size], 0.01, jnp.float32),
  )
  run = _repeat(trainer, lambda params: batch)
  forward = _forward(setup, shape.batch_size, scored=shape.response)
  return Work(run, rollout.tokens.size, _training(setup, forward))


def _sampling(setup: Setup, samples: int = 1) -> preflight.Work:
  shape = setup.shape
  prompts = shape.batch_size // samples
  return preflight.sampling(
    shape.model, setup.run.mesh, prompts, samples, shape.prompt, shape.response
  )


def generate(setup: Setup) -> Work:
  """Sampling of one response per prompt; all have full length."""
  bench, prompts = _bench(setup), _prompts(setup)
  sample, reshard, key = bench.sampler(), bench.reshard(), jax.random.key(1)
  work = _sampling(setup)
  tokens = setup.shape.batch_size * setup.shape.response
  return Work(
    lambda: sample(reshard(setup.params), *prompts, key),
    tokens,
    work.flops,
    work.steps * work.bytes_per_step,
  )


def _iterate(
  setup: Setup,
  bench: workbench.Workbench,
  trainer: training.Trainer,
  reward: rewards.RewardFn,
  experience: responses.Experience,
) -> Callable[[], Any]:
  """Builds an iteration of a method that samples, scores and updates."""
  prompts = _prompts(setup, bench.config.sampling.samples_per_prompt)
  respond = responses.Responder(bench, lambda _: reward, bench.config.shaping)
  key = jax.random.key(2)
  state = respond.init(trainer.state, RunningMoments.zero())

  def run() -> Any:
    nonlocal state
    params = trainer.params(state.train)
    scored, following, metrics = respond(params.get("policy", params), state, prompts, key)
    batch, moments, of_batch = experience(params, bench.start, state.carry, scored)
    train, of_update = trainer.step(state.train, batch, key)
    state = responses.IterationState(train, moments, following)
    return state, metrics | of_batch | of_update

  return run


def ppo_iteration(setup: Setup) -> Work:
  """PPO iteration: sampling, reward model, reference, critic, and all epochs of the update."""
  bench = _bench(setup)
  settings, apply, trainer = _ppo(setup)
  experience = responses.make_experience(
    bench.config,
    reading.make_actor_critic_read(apply),
    reading.make_read(setup.policy.apply),
    lambda ready: ppo.make_batch(
      ready.rollout, ready.scores, ready.policy.values, ready.ref_logprobs, settings
    ),
  )
  reward = rewards.model_reward(setup.scorer.apply, setup.reward_params)
  rows = setup.shape.batch_size
  # Reward model and critic, and the reference.
  scoring = 2 * _forward(setup, rows) + _forward(setup, rows, scored=setup.shape.response)
  flops = _sampling(setup).flops + scoring + _ppo_flops(setup)
  run = _iterate(setup, bench, trainer, reward, experience)
  return Work(run, rows * setup.shape.response, flops)


def even_tokens(rollout: Rollout, prompt_ids: np.ndarray) -> np.ndarray:
  """Share of even tokens in each response: a reward that takes no time."""
  del prompt_ids
  tokens = sharding.to_host(rollout.tokens)[:, -rollout.logprobs.shape[1] :]
  return (tokens % 2 == 0).mean(axis=1).astype(np.float32)


def grpo_iteration(setup: Setup) -> Work:
  """GRPO iteration: sampling, a Python reward, the reference, and one update."""
  shape = setup.shape
  samples = shape.samples_per_prompt
  bench, settings = _bench(setup, samples), grpo.GRPOConfig(minibatches=1)
  make_step = functools.partial(grpo.make_grpo_step, config=settings)
  trainer = _trainer(setup, setup.policy.apply, setup.params, make_step, settings)
  read = reading.make_read(setup.policy.apply)
  experience = responses.make_experience(
    bench.config,
    read,
    read,
    lambda ready: grpo.make_batch(
      ready.rollout, ready.scores, ready.ref_logprobs, settings, samples_per_prompt=samples
    ),
  )
  forward = _forward(setup, shape.batch_size, scored=shape.response)
  flops = _sampling(setup, samples).flops + forward + _training(setup, forward)
  run = _iterate(setup, bench, trainer, even_tokens, experience)
  return Work(run, shape.batch_size * shape.response, flops)


def nash_md_iteration(setup: Setup) -> Work:
  """Nash-MD iteration: policy and mixture sample, the reward model compares, and one update."""
  bench, shape = _bench(setup), setup.shape
  settings, trainer = _nash_md(setup)
  reward = rewards.model_reward(setup.scorer.apply, setup.reward_params)
  match = matches.Match(bench, rewards.reward_preference(reward), settings, count=1)
  prompts, key, state = _prompts(setup), jax.random.key(3), trainer.state

  def run() -> Any:
    nonlocal state
    of_step = jax.random.fold_in(key, state.step)
    policy = trainer.params(state)
    batch, metrics = match(policy, None, prompts, of_step, mix=settings.mix, tau=settings.tau)
    state, of_update = trainer.step(state, batch, of_step)
    return state, metrics | of_update

  forward = _forward(setup, shape.batch_size, scored=shape.response)
  judged = 2 * _forward(setup, shape.batch_size)
  flops = 3 * _sampling(setup).flops + judged + forward + _training(setup, forward)
  return Work(run, 2 * shape.batch_size * shape.response, flops)


TRAIN_STEPS: Mapping[str, Callable[[Setup], Work]] = {
  "sft": sft_step,
  "reward_model": reward_model_step,
  "dpo": dpo_step,
  "kto": kto_step,
  "ppo": ppo_update,
  "nash_md": nash_md_update,
}
SAMPLING: Mapping[str, Callable[[Setup], Work]] = {"generate": generate}
ITERATIONS: Mapping[str, Callable[[Setup], Work]] = {
  "ppo": ppo_iteration,
  "grpo": grpo_iteration,
  "nash_md": nash_md_iteration,
}
