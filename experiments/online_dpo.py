r"""Preference optimisation on pairs of the policy's own responses, judged while it trains.

Built-in task, after SFT and reward model; pairs are the best and the worst of four samples:
  python -m experiments.online_dpo --workdir=runs/online --init_from=runs/sft --reward.path=runs/rm
Judged by a preference model or function instead:
  --reward.path= --preference.path=runs/pm    --reward.path= --preference.name=panel
XPO, which explores by a bonus on responses of the start; rounds against the round before:
  --dpo.bonus_coef=1e-3    --online.reference=previous --online.round_steps=20
`--dpo.loss` takes every loss of experiments.dpo.

The default learning rate suits the built-in task; a pretrained model wants about 1e-6.
At the end the policy and its start answer the held-out prompts, and both are scored.
Starting the same command again continues a run that was stopped.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import records
from experiments.lab import evaluating, judges, models, training
from rlhf_jax import data, entry, flags, generation, loop, rewards, sharding
from rlhf_jax.algorithms import dpo, online_dpo
from rlhf_jax.algorithms.dpo import DPOConfig
from rlhf_jax.algorithms.online_dpo import OnlineConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import Model
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig, join, make_schedule
from rlhf_jax.types import Metrics, Params, Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """Online DPO. `batch_size` counts prompts; give a reward or a preference."""

  steps: int = 80
  batch_size: int = 32
  eval_every: int = 0
  checkpoint_every: int = 20
  model: models.ModelOptions = models.ModelOptions()
  lora: LoRAConfig = LoRAConfig()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(max_new_tokens=40, samples_per_prompt=4)
  reward: judges.RewardOptions = judges.RewardOptions()
  preference: judges.PreferenceOptions = judges.PreferenceOptions()
  online: OnlineConfig = OnlineConfig()
  dpo: DPOConfig = DPOConfig()
  optim: OptimConfig = OptimConfig(learning_rate=3e-4, schedule="linear")

  def __post_init__(self):
    super().__post_init__()
    training.require_random(self.sampling)
    if self.sampling.samples_per_prompt < 2:
      raise ValueError("sampling.samples_per_prompt must be at least 2 to make pairs")


class OnlineState(NamedTuple):
  """What an iteration carries on: the policy with its optimizer, and the one before, if read."""

  train: TrainState
  previous: Params | None


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the figures of summary.json."""
  by_preference = bool(config.preference.path or config.preference.name)
  if by_preference == bool(config.reward.path or config.reward.name):
    raise flags.UsageError("give --reward.path or --reward.name, or else --preference.path or name")
  folder = models.source_folder(config.model, config.init_from)
  tokenizer = models.open_tokenizer(folder, config.data.end_token)
  train_set, heldout = data.load("prompts", config.data, tokenizer, seed=session.seed)
  samples = config.sampling.samples_per_prompt
  with loop.open_run(session) as run:
    records.identify(
      run,
      "online_dpo",
      config,
      tokenizer,
      train_set,
      heldout,
      **models.frozen_digest(config.lora, folder),
    )
    model, ref_params = models.open_model(run, config.model, folder, tokenizer)
    if by_preference:
      prefer_of = judges.open_preference(run, config.preference, config.model, tokenizer)
      judge_responses = tournament(prefer_of(train_set), samples)
    else:
      reward_of = judges.open_reward(run, config.reward, config.model, tokenizer)
      judge_responses = reward_of(train_set)
    gold_fns = judges.gold_rewards(config.data, train_set, tokenizer)
    state, programs = open_programs(run, config, model, ref_params, tokenizer)
    training.describe(
      run,
      "Online DPO",
      model,
      state.train,
      {
        "judge": config.reward.path
        or config.reward.name
        or config.preference.path
        or config.preference.name,
        "data": f"{len(train_set.examples)} prompts",
        "responses per step": f"{config.batch_size * samples}, of which {config.batch_size * 2}"
        " are learnt from",
      },
      frozen=programs.trainer.frozen,
    )
    stops = (tokenizer.eos_id,)
    whole = functools.partial(join, programs.trainer.frozen)

    def iteration(state: OnlineState, prompts: data.PromptBatch, key: jax.Array):
      keys = jax.random.split(jax.random.fold_in(key, state.train.step), 3)
      inputs = prompts.tokens, prompts.mask, prompts.prompt_id
      start = time.monotonic()
      rollout = programs.generate(programs.reshard(whole(state.train.params)), *inputs, keys[0])
      free = None
      if config.dpo.bonus_coef:
        free = programs.alone(programs.reshard(ref_params), *inputs, keys[1])
      rollout = jax.block_until_ready(rollout)
      sampled = time.monotonic()
      ids = np.repeat(sharding.to_host(prompts.prompt_id), samples)
      scores = jnp.asarray(judge_responses(rollout, ids))
      scored = time.monotonic()
      previous = state.previous
      reference = ref_params if previous is None else whole(previous)
      batch, figures = programs.make_batch(reference, rollout, scores, free, keys[2])
      new, metrics = programs.trainer.step(state.train, batch, key)
      if previous is not None and int(new.step) % config.online.round_steps == 0:
        previous = jax.tree.map(jnp.copy, new.params)
      ended = generation.ended(rollout, stops)
      lengths = jnp.sum(rollout.response_mask, axis=1)
      # The implicit rewards of DPO go by another name here, where there is a real one.
      metrics = {name.replace("reward/", "implicit_reward/"): v for name, v in metrics.items()}
      metrics |= figures | {
        **{f"{name}_reward/mean": np.mean(fn(rollout, ids)) for name, fn in gold_fns.items()},
        "eos_fraction": jnp.mean(ended),
        "response_length/mean": jnp.mean(lengths),
        "time/generate": sampled - start,
        "time/reward": scored - sampled,
      }
      return OnlineState(new, previous), metrics

    heldout_fns = {} if by_preference else {"reward": reward_of(heldout)}
    heldout_fns |= judges.gold_rewards(config.data, heldout, tokenizer)
    judge = evaluating.Judge(
      run,
      model,
      tokenizer,
      heldout,
      config.sampling,
      heldout_fns,
      ref_params,
      prefer=prefer_of(heldout) if by_preference else None,
    )
    state = loop.fit(
      run,
      config,
      iteration,
      state,
      data.batches(train_set, config.batch_size, seed=session.seed, pad_id=tokenizer.pad_id),
      # The end is judged by `finish`.
      evaluate=judge.evaluate(lambda s: whole(s.train.params)) if config.eval_every else None,
      learning_rate=make_schedule(config.optim, config.steps),
      title="online dpo",
    )
    return judge.finish(whole(state.train.params), config.steps, "Online DPO")


class Programs(NamedTuple):
  """What an iteration runs on the devices."""

  reshard: Callable[[Params], Params]
  generate: Callable[..., Rollout]  # Of the policy: several responses to each prompt.
  alone: Callable[..., Rollout]  # Of the reference: one.
  make_batch: Callable[..., tuple[dpo.DPOBatch, Metrics]]
  trainer: training.Trainer


def open_programs(
  run: loop.Run, config: Config, model: Model, ref_params: Params, tokenizer: data.Tokenizer
) -> tuple[OnlineState, Programs]:
  """The first state and the programs, none of which is compiled yet."""
  trainer = training.make_trainer(run, config, model, ref_params, dpo.make_dpo_step, config.dpo)
  previous = None
  if config.online.reference == "previous":
    previous = models.copy(run, trainer.state.params)
  samples = config.sampling.samples_per_prompt

  @jax.jit
  def make_batch(
    params: Params, rollout: Rollout, scores: jax.Array, free: Rollout | None, key: jax.Array
  ):
    scores = scores.reshape(-1, samples)
    chosen, rejected = online_dpo.pick_pairs(scores, key, config.online.pick)
    pairs = online_dpo.make_pairs(rollout, chosen, rejected)
    refs = dpo.reference_logprobs(model.apply, params, pairs, config.dpo)
    calibration = None if free is None else online_dpo.right_padded(free)
    figures = {
      "reward/mean": jnp.mean(scores),
      "reward/std": jnp.mean(jnp.std(scores, axis=1)),
      "ties": jnp.mean(chosen == rejected),
    }
    return dpo.DPOBatch(pairs, refs, calibration), figures

  generate, alone = (
    models.make_sampler(
      model, tokenizer, dataclasses.replace(config.sampling, samples_per_prompt=count)
    )
    for count in (samples, 1)
  )
  reshard = sharding.make_reshard(run.mesh, model.config.dtype)
  programs = Programs(reshard, generate, alone, make_batch, trainer)
  return OnlineState(trainer.state, previous), programs


def tournament(prefer: rewards.PreferenceFn, samples: int) -> rewards.RewardFn:
  """Scores each sample of a prompt by how often it is preferred to the others, on average."""

  def score(rollout: Rollout, prompt_ids: np.ndarray) -> jax.Array:
    ids = prompt_ids[::samples]
    nth = [jax.tree.map(lambda x, n=n: x[n::samples], rollout) for n in range(samples)]
    total = jnp.zeros([len(ids), samples])
    for a, b in itertools.combinations(range(samples), 2):
      wins = jnp.asarray(prefer(nth[a], nth[b], ids))
      total = total.at[:, a].add(wins).at[:, b].add(1 - wins)
    return total.ravel() / (samples - 1)

  return score


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
