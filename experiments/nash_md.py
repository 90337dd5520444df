r"""Improves a policy by preferences between its responses and an opponent's: Nash-MD and relatives.

Built-in task, after SFT, judged by a panel whose majority is intransitive:
  python -m experiments.nash_md --workdir=runs/nash --init_from=runs/sft --preference.name=panel
By a trained preference model, or by a reward model whose scores are compared:
  python -m experiments.nash_md --workdir=runs/nash --init_from=runs/sft --preference.path=runs/pm
Self-play, best response to the start, Nash-EMA, Mirror Prox, IPO-MD, EGPO:
  --nash_md.mix=0    --nash_md.mix=1    --nash_md.mix=0 --nash_md.ema=0.95
  --nash_md.mix=0 --nash_md.extragradient
  --nash_md.objective=regression --nash_md.tau=0.1
  --nash_md.objective=regression --nash_md.tau=0.1 --nash_md.mix=0 --nash_md.extragradient
What a policy can lose to (exploitability): the best response to it, from the same start:
  --nash_md.mix=0 --opponent=runs/nash

The default learning rate suits the built-in task; a pretrained model wants about 1e-6.
At the end the policy and its start answer the held-out prompts and are compared by the preference.
Starting the same command again continues a run that was stopped.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import records
from experiments.lab import evaluating, judges, models, training
from rlhf_jax import data, entry, generation, loop, sharding
from rlhf_jax.algorithms import nash_md, rollouts
from rlhf_jax.algorithms.nash_md import NashMDConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import Model
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig, join, make_schedule
from rlhf_jax.types import Params, Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """Nash-MD. `batch_size` counts prompts; each step samples and makes one update.

  Attributes:
    opponent: Workdir or Hugging Face folder of a fixed policy to play against; empty plays against
      the policy itself.
  """

  steps: int = 120
  batch_size: int = 64
  eval_every: int = 0
  checkpoint_every: int = 20
  opponent: str = ""
  model: models.ModelOptions = models.ModelOptions()
  lora: LoRAConfig = LoRAConfig()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(max_new_tokens=40)
  preference: judges.PreferenceOptions = judges.PreferenceOptions()
  nash_md: NashMDConfig = NashMDConfig()
  optim: OptimConfig = OptimConfig(learning_rate=3e-4, schedule="linear")

  def __post_init__(self):
    super().__post_init__()
    training.require_random(self.sampling)
    if self.sampling.samples_per_prompt != 1:
      raise ValueError("sampling.samples_per_prompt must be 1: nash_md.objective sets the number")
    if self.opponent and (self.nash_md.ema or self.nash_md.extragradient):
      raise ValueError("opponent is fixed; leave nash_md.ema and nash_md.extragradient off")
    if self.lora.rank and self.nash_md.ema:
      raise ValueError("nash_md.ema averages params, not their factors; leave lora.rank at 0")


class NashState(NamedTuple):
  """What an iteration carries on: the policy with its optimizer, and its moving average, if any."""

  train: TrainState
  average: Params | None


class Programs(NamedTuple):
  """What an iteration runs on the devices."""

  reshard: Callable[[Params], Params]
  sample: Callable[..., Rollout]  # Of the policy, or with objective=regression of the mixture.
  oppose: Callable[..., Rollout]
  refer: Callable[[Params, Rollout], jax.Array]
  trainer: training.Trainer


def open_programs(
  run: loop.Run, config: Config, model: Model, ref_params: Params, tokenizer: data.Tokenizer
) -> tuple[NashState, Programs]:
  """The first state and the programs, none of which is compiled yet."""
  settings, temperature = config.nash_md, config.sampling.temperature
  trainer = training.make_trainer(
    run,
    config,
    model,
    ref_params,
    nash_md.make_nash_md_step,
    settings,
    temperature=temperature,
  )
  average = models.copy(run, ref_params) if settings.ema else None

  @jax.jit
  def refer(ref_params: Params, rollout: Rollout) -> jax.Array:
    return rollouts.rollout_logprobs(model.apply, ref_params, rollout, temperature)[0]

  def sampler(samples: int, mixture: bool) -> Callable[..., Rollout]:
    sampling = dataclasses.replace(config.sampling, samples_per_prompt=samples)
    return models.make_sampler(model, tokenizer, sampling, mixture=mixture)

  sample = sampler(settings.responses, settings.objective == "regression")
  programs = Programs(
    sharding.make_reshard(run.mesh, model.config.dtype),
    sample,
    sampler(1, True),
    refer,
    trainer,
  )
  return NashState(trainer.state, average), programs


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the figures of summary.json."""
  config.preference.require()
  settings = config.nash_md
  folder = models.source_folder(config.model, config.init_from)
  tokenizer = models.open_tokenizer(folder, config.data.end_token)
  train_set, heldout = data.load("prompts", config.data, tokenizer, seed=session.seed)
  with loop.open_run(session) as run:
    records.identify(
      run,
      "nash_md",
      config,
      tokenizer,
      train_set,
      heldout,
      **models.frozen_digest(config.lora, folder),
    )
    model, ref_params = models.open_model(run, config.model, folder, tokenizer)
    fixed = None
    if config.opponent:
      fixed = models.open_policy(run, config.opponent, config.model, tokenizer)
    preference_of = judges.open_preference(run, config.preference, config.model, tokenizer)
    gold_fns = judges.gold_rewards(config.data, train_set, tokenizer)
    state, programs = open_programs(run, config, model, ref_params, tokenizer)
    length = train_set.padded_length + config.sampling.max_new_tokens
    training.describe(
      run,
      "Nash-MD",
      model,
      state.train,
      {
        "preference": config.preference.path or config.preference.name,
        "data": f"{len(train_set.examples)} prompts",
        "tokens per step": f"{config.batch_size * (settings.responses + 1) * length}",
      },
      frozen=programs.trainer.frozen,
    )
    stops = (tokenizer.eos_id,)
    prefer = preference_of(train_set)
    mixes, taus = (
      optax.linear_schedule(first, last, max(config.steps - 1, 1))
      for first, last in ((settings.mix, settings.last_mix), (settings.tau, settings.last_tau))
    )

    def whole(params: Params) -> Params:
      return params if params is fixed else join(programs.trainer.frozen, params)

    def iteration(state: NashState, prompts: data.PromptBatch, key: jax.Array):
      key = jax.random.fold_in(key, state.train.step)
      mix, tau = mixes(state.train.step), taus(state.train.step)
      inputs = prompts.tokens, prompts.mask, prompts.prompt_id
      seconds = dict.fromkeys(("time/generate", "time/preference"), 0.0)
      metrics = {}

      def against(current: TrainState, opponent: Params, key: jax.Array):
        """One step of `current` on fresh responses, judged against the mixture of `opponent`."""
        start = time.monotonic()
        keys = jax.random.split(key)
        policy, ref = programs.reshard(whole(current.params)), programs.reshard(ref_params)
        rival = policy if opponent is current.params else programs.reshard(whole(opponent))
        mixed = settings.objective == "regression"
        source = generation.MixtureParams(policy, ref, mix) if mixed else policy
        own = programs.sample(source, *inputs, keys[0])
        other = programs.oppose(generation.MixtureParams(rival, ref, mix), *inputs, keys[1])
        del policy, ref, rival, source  # Room for the update.
        other = jax.tree.map(lambda x: jnp.repeat(x, settings.responses, axis=0), other)
        own, other = jax.block_until_ready((own, other))
        sampled = time.monotonic()
        ids = np.repeat(sharding.to_host(prompts.prompt_id), settings.responses)
        preference = jnp.asarray(prefer(own, other, ids))
        seconds["time/generate"] += sampled - start
        seconds["time/preference"] += time.monotonic() - sampled
        cut = ~generation.ended(own, stops)
        metrics.update(
          {
            "preference/mean": jnp.mean(preference),
            "eos_fraction": 1 - jnp.mean(cut),
            **{f"{name}_reward/mean": np.mean(fn(own, ids)) for name, fn in gold_fns.items()},
          }
        )
        rows = (config.batch_size, settings.responses)
        batch = nash_md.NashMDBatch(
          rollout=jax.tree.map(lambda x: x.reshape(*rows, *x.shape[1:]), own),
          ref_logprobs=programs.refer(ref_params, own).reshape(*rows, -1),
          preference=(preference - settings.missing_eos_penalty * cut).reshape(rows),
          tau=jnp.full([config.batch_size], tau, jnp.float32),
        )
        return programs.trainer.step(current, batch, key)

      opponent = state.train.params if state.average is None else state.average
      if fixed is not None:
        opponent = fixed
      stepped = nash_md.extragradient(against) if settings.extragradient else against
      new, of_step = stepped(state.train, opponent, key)
      average = state.average
      if average is not None:
        average = nash_md.moving_average(average, new.params, settings.ema)
      return NashState(new, average), of_step | metrics | seconds | {"mix": mix, "tau": tau}

    judge = evaluating.Judge(
      run,
      model,
      tokenizer,
      heldout,
      config.sampling,
      judges.gold_rewards(config.data, heldout, tokenizer),
      ref_params,
      prefer=preference_of(heldout),
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
      title="nash-md",
    )
    more = {}
    if fixed is not None and heldout.examples:
      more["preference/over_opponent"] = judge.preference(whole(state.train.params), fixed).value
    return judge.finish(whole(state.train.params), config.steps, "Nash-MD", more)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
