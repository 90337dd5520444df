r"""Improves a policy against a reward with PPO, held near its start by a KL penalty.

Built-in task, after SFT and reward model (two minutes on a laptop CPU):
  python -m experiments.ppo --workdir=runs/ppo --init_from=runs/sft --reward.path=runs/rm
Your model and prompts, against a Python reward function of rlhf_jax/rewards/functions.py:
  python -m experiments.ppo --workdir=runs/ppo --init_from=FOLDER --data.path=PROMPTS.jsonl \
    --reward.name=sentiment

The default learning rates suit the built-in task; a pretrained model wants about 1e-6.
At the end the policy and its start answer the held-out prompts, and both are scored.
Starting the same command again continues a run that was stopped.
"""

import dataclasses
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common
from rlhf_jax import data, flags, generation, loop, reporting
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms.ppo import PPOConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import actor_critic, zero_scores
from rlhf_jax.train_step import OptimConfig, make_optimizer, make_schedule
from rlhf_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """PPO. `batch_size` counts prompts; each step has one iteration of sampling and updates."""

  steps: int = 50
  batch_size: int = 128
  eval_every: int = 0
  checkpoint_every: int = 25
  model: common.ModelOptions = common.ModelOptions()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(max_new_tokens=40)
  reward: common.RewardOptions = common.RewardOptions()
  ppo: PPOConfig = PPOConfig()
  optim: OptimConfig = OptimConfig(learning_rate=5e-4, schedule="linear")
  value_optim: OptimConfig = OptimConfig(learning_rate=2e-3, schedule="constant")

  def __post_init__(self):
    super().__post_init__()
    if self.sampling.temperature == 0:
      raise ValueError("sampling.temperature must be positive: PPO learns from random samples")
    if self.sampling.top_k or self.sampling.top_p < 1:
      raise ValueError(
        "sampling.top_k and top_p must be off: they sample from another distribution than the"
        " one that is trained"
      )
    rows = self.batch_size * self.sampling.samples_per_prompt
    parts = self.ppo.minibatches * self.ppo.microbatches
    if rows % parts:
      raise ValueError(
        f"batch_size {self.batch_size} * sampling.samples_per_prompt does not split into"
        f" {parts} = ppo.minibatches * ppo.microbatches equal parts"
      )


class PPOState(NamedTuple):
  """What an iteration carries on: policy and critic with their optimizers, and the controller."""

  train: TrainState
  control: ppo.Control


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the figures of summary.json."""
  config.reward.require()
  folder = common.source_folder(config.model, config.init_from)
  tokenizer = common.open_tokenizer(folder, config.data.end_token)
  train_set, heldout = data.load("prompts", config.data, tokenizer, seed=session.seed)
  with loop.open_run(session) as run:
    loop.identify(
      run, "ppo", flags.to_dict(config), data=train_set.digest, tokenizer=tokenizer.digest
    )
    model, ref_params = common.open_model(run, config.model, folder, tokenizer)
    critic, critic_params = open_critic(run, config, folder, tokenizer)
    reward_of = common.open_reward(run, config.reward, config.model, tokenizer)
    reward_fn = reward_of(train_set)
    gold_fns = common.gold_rewards(config.data, train_set, tokenizer)

    apply_fn = actor_critic(model, critic)
    updates = config.steps * config.ppo.epochs * config.ppo.minibatches
    tx = optax.partition(
      {
        "policy": make_optimizer(config.optim, updates),
        "value": make_optimizer(config.value_optim, updates),
      },
      lambda params: {name: jax.tree.map(lambda _, n=name: n, params[name]) for name in params},
    )
    params = {"policy": ref_params, "value": critic_params}
    state = PPOState(common.place_state(run, params, tx), ppo.init_control(config.ppo))
    del params, critic_params  # The state has its own copy.
    responses = config.batch_size * config.sampling.samples_per_prompt
    length = train_set.padded_length + config.sampling.max_new_tokens
    common.describe(
      run,
      "PPO",
      model,
      state.train,
      {
        "reward": config.reward.path or config.reward.name,
        "data": f"{len(train_set.examples)} prompts",
        "tokens per step": f"{responses * length} in {responses} responses,"
        f" {config.ppo.epochs} epochs of {config.ppo.minibatches} minibatches",
      },
    )

    temperature, stops = config.sampling.temperature, (tokenizer.eos_id,)
    generate = generation.make_generate(
      model.decode, model.init_cache, config.sampling, stop_ids=stops, pad_id=tokenizer.pad_id
    )
    experience = ppo.make_experience(apply_fn, model.apply, config.ppo, temperature=temperature)
    update = ppo.make_ppo_step(
      apply_fn,
      tx,
      config.ppo,
      temperature=temperature,
      state_shardings=common.shardings_of(state.train),
    )

    def iteration(state: PPOState, prompts: data.PromptBatch, key: jax.Array):
      policy = jax.block_until_ready(state.train.params["policy"])
      start = time.monotonic()
      sample_key = jax.random.fold_in(jax.random.fold_in(key, 1), state.train.step)
      rollout = jax.block_until_ready(
        generate(policy, prompts.tokens, prompts.mask, prompts.prompt_id, sample_key)
      )
      sampled = time.monotonic()
      prompt_ids = np.repeat(np.asarray(prompts.prompt_id), config.sampling.samples_per_prompt)
      scores = jnp.asarray(reward_fn(rollout, prompt_ids))
      metrics = {
        f"{name}_reward/mean": float(np.mean(fn(rollout, prompt_ids)))
        for name, fn in gold_fns.items()
      }
      scored = time.monotonic()
      batch, control, of_rollout = experience(
        state.train.params,
        ref_params,
        state.control,
        rollout,
        scores,
        generation.ended(rollout, stops),
      )
      new, of_update = update(state.train, batch, key)
      metrics |= of_rollout | of_update
      metrics |= {
        "tokens": jnp.sum(rollout.response_mask),
        "time/generate": sampled - start,
        "time/reward": scored - sampled,
      }
      return PPOState(new, control), metrics

    sample = common.heldout_sampler(
      run,
      model,
      heldout,
      tokenizer,
      config.sampling,
      reward_fns={"reward": reward_of(heldout)}
      | common.gold_rewards(config.data, heldout, tokenizer),
      ref_params=ref_params,
    )

    def evaluate(state: PPOState, step: int) -> dict[str, float]:
      samples = sample(state.train.params["policy"])
      rows = common.sample_rows(samples)
      reporting.save_samples(run.workdir, step, rows)
      return {
        "eval/kl": float(np.mean(samples.kl)),
        **{f"eval/{name}": float(np.mean(r)) for name, r in samples.rewards.items()},
      }

    batches = data.batches(train_set, config.batch_size, seed=session.seed, pad_id=tokenizer.pad_id)
    schedule = make_schedule(config.optim, updates)
    state = loop.fit(
      run,
      config,
      iteration,
      state,
      batches,
      evaluate=evaluate if heldout.examples and config.eval_every else None,
      learning_rate=lambda step: schedule(step * updates // config.steps),
      title="ppo",
    )
    common.export(run.workdir / common.EXPORT, state.train.params["policy"], model, tokenizer)
    summary: dict[str, float] = {}
    if heldout.examples:
      before, after = sample(ref_params), sample(state.train.params["policy"])
      summary = common.compare(before, after)
      reporting.save_samples(run.workdir, 0, common.sample_rows(before))
      reporting.save_samples(run.workdir, config.steps, common.sample_rows(after))
      reporting.show_samples(common.side_by_side(before, after), "Before and after")
      reporting.show_summary("PPO, held-out prompts", common.comparison_table(before, after))
    reporting.plot_metrics(run.workdir)
    reporting.write_summary(run.workdir, summary)
  return summary


def open_critic(run, config, folder, tokenizer):
  """The critic with its first params: the reward model, or else the policy with a head of zeros."""
  if config.reward.path:
    return common.open_reward_model(run, config.reward.path, config.model, tokenizer)
  critic, params = common.open_model(run, config.model, folder, tokenizer, "scalar")
  return critic, zero_scores(params)


if __name__ == "__main__":
  flags.run_script(train, loop.Session, Config)
