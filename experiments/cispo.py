r"""Improves a policy by CISPO: REINFORCE with clipped importance weights.

Built-in task, after SFT and a reward model (two minutes on a laptop CPU):
  python -m experiments.cispo --workdir=runs/cispo --init_from=runs/sft --reward.path=runs/rm
Your model and prompts, with a reward of 1 for the right final number:
  python -m experiments.cispo --workdir=runs/cispo --init_from=FOLDER --data.path=PROMPTS.jsonl \
    --reward.name=exact_answer --sampling.samples_per_prompt=8

At the end the trained and the initial policy answer the held-out prompts, and both are scored.
The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools

from rlhf_jax import defaults, entry, loop
from rlhf_jax.algorithms import cispo, reading
from rlhf_jax.algorithms.cispo import CISPOConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.losses.reward import RunningMoments
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.rewards.shaped import ShapingConfig
from rlhf_jax.train_step import OptimConfig
from .lab import models, responses, training, workbench
from .lab.case import Case
from .lab.judges import JudgedConfig, RewardOptions
from .lab.responses import IterationState, RolloutOptions


@dataclasses.dataclass(frozen=True)
class Config(JudgedConfig):
  """CISPO. `batch_size` counts prompts; each step samples responses and updates on them."""

  steps: int = 45
  batch_size: int = 16
  checkpoint_every: int = 20
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  reward: RewardOptions = RewardOptions()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256), samples_per_prompt=4)
  cispo: CISPOConfig = CISPOConfig(kl_coef=defaults.weight(0.1, 0.0))
  optim: OptimConfig = OptimConfig(defaults.rate(1e-3, 1e-6), schedule="linear", eps=1e-5)
  shaping: ShapingConfig = ShapingConfig()
  rollout: RolloutOptions = RolloutOptions()
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    super().__post_init__()
    responses.check(self, parts=self.cispo.parts, group=2)


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the metrics of summary.json."""
  config.require()
  responses.require_devices(config.rollout)
  with workbench.open(session, config, "cispo", "prompts", spare=config.rollout.devices) as bench:
    responses.require_fit(bench)
    trainer, experience = make_trainer(bench), make_experience(bench)
    bench.describe("CISPO", trainer)
    reward_of = bench.open_reward()
    respond = responses.Responder(bench, reward_of, config.shaping, config.rollout)

    def iteration(state: IterationState, prompts, key):
      params = trainer.params(state.train)
      scored, following, metrics = respond(params, state, prompts, key)
      batch, moments, of_batch = experience(params, bench.start, state.carry, scored)
      train, of_update = trainer.step(state.train, batch, key)
      return IterationState(train, moments, following), metrics | of_batch | of_update

    def policy_of(state: IterationState):
      return trainer.params(state.train)

    size = config.batch_size * config.sampling.samples_per_prompt
    judge = bench.judge(reward_of, batch_size=size)
    state = bench.fit(
      iteration,
      trainer,
      respond.batches,
      state=respond.init(trainer.state, RunningMoments.zero()),
      evaluate=judge.evaluate(policy_of) if config.eval_every else None,
    )
    return judge.finish(policy_of(state), config.steps, "CISPO")


def make_trainer(bench: workbench.Workbench) -> training.Trainer:
  """Builds the state and the step of the policy."""
  settings, temperature = bench.config.cispo, bench.config.sampling.temperature
  make_step = functools.partial(cispo.make_cispo_step, config=settings, temperature=temperature)
  return bench.trainer(make_step, settings)


def make_experience(bench: workbench.Workbench) -> responses.Experience:
  """Jitted `(params, ref_params, moments, responses) -> (CISPOBatch, moments, metrics)`."""
  config = bench.config
  read = reading.make_read(bench.model.apply, config.sampling.temperature)
  return responses.make_experience(
    config,
    read,
    read,
    lambda ready: cispo.make_batch(
      ready.rollout,
      ready.totals,
      ready.ref_logprobs,
      config.cispo,
      samples_per_prompt=config.sampling.samples_per_prompt,
    ),
  )


def programs(case: Case) -> None:
  """Compiles the programs of an iteration, for `experiments.compile`."""
  trainer, experience = make_trainer(case.bench), make_experience(case.bench)
  case.policy_gradient(trainer, experience, RunningMoments.zero())


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
