r"""Improves a policy by PPO on the best and the worst response to each prompt: policy filtration.

Built-in task, after SFT and a reward model (three minutes on a laptop CPU; win rate about 0.8):
  python -m experiments.pf_ppo --workdir=runs/pf_ppo --init_from=runs/sft --reward.path=runs/rm
Your model and prompts, against a Python reward function:
  python -m experiments.pf_ppo --workdir=runs/pf_ppo --init_from=FOLDER --data.path=PROMPTS.jsonl \
    --reward.name=sentiment
The best and a random other response of eight:
  --pf_ppo.keep=best_random --sampling.samples_per_prompt=8

At the end the trained and the initial policy answer the held-out prompts, and both are scored.
The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools

import jax

from rlhf_jax import defaults, entry, loop
from rlhf_jax.algorithms import pf_ppo, ppo, reading
from rlhf_jax.algorithms.pf_ppo import PFPPOConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.losses.reward import RunningMoments
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.rewards.shaped import ShapingConfig
from rlhf_jax.train_step import OptimConfig
from .lab import critics, models, responses, training, workbench
from .lab.case import Case
from .lab.critics import CriticOptions
from .lab.judges import JudgedConfig, RewardOptions
from .lab.responses import IterationState, RolloutOptions


@dataclasses.dataclass(frozen=True)
class Config(JudgedConfig):
  """PF-PPO. `batch_size` counts prompts; each step updates on a selection of their responses."""

  steps: int = 60
  batch_size: int = 32
  checkpoint_every: int = 20
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  reward: RewardOptions = RewardOptions()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256), samples_per_prompt=4)
  pf_ppo: PFPPOConfig = PFPPOConfig(kl_coef=defaults.weight(0.15, 0.05))
  optim: OptimConfig = OptimConfig(defaults.rate(1e-3, 1e-6), schedule="linear", eps=1e-5)
  critic: CriticOptions = CriticOptions()
  shaping: ShapingConfig = ShapingConfig()
  rollout: RolloutOptions = RolloutOptions()
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    super().__post_init__()
    kept = self.pf_ppo.kept
    responses.check(self, parts=self.pf_ppo.parts, group=2, kept=kept)


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the metrics of summary.json."""
  config.require()
  responses.require_devices(config.rollout)
  adapted, spare = config.critic.adapted(config.reward), config.rollout.devices
  with workbench.open(session, config, "pf_ppo", "prompts", adapted=adapted, spare=spare) as bench:
    responses.require_fit(bench)
    actor = critics.open_actor(bench)
    trainer = make_trainer(bench, actor)
    bench.describe("PF-PPO", trainer)
    reward_of = bench.open_reward()
    respond = responses.Responder(bench, reward_of, config.shaping, config.rollout)
    experience = make_experience(bench, actor)

    def iteration(state: IterationState, prompts, key):
      params = trainer.params(state.train)
      scored, following, metrics = respond(params["policy"], state, prompts, key)
      pick_key = jax.random.fold_in(jax.random.fold_in(key, 4), state.train.step)
      inputs = params, bench.start, state.carry, scored, pick_key
      batch, moments, of_batch = experience(*inputs)
      train, of_update = trainer.step(state.train, batch, key)
      return IterationState(train, moments, following), metrics | of_batch | of_update

    def policy_of(state: IterationState):
      return trainer.params(state.train)["policy"]

    size = config.batch_size * config.sampling.samples_per_prompt
    judge = bench.judge(reward_of, batch_size=size)
    state = bench.fit(
      iteration,
      trainer,
      respond.batches,
      state=respond.init(trainer.state, RunningMoments.zero()),
      evaluate=judge.evaluate(policy_of) if config.eval_every else None,
    )
    return judge.finish(policy_of(state), config.steps, "PF-PPO", critics.first_explained(bench))


def make_trainer(bench: workbench.Workbench, actor: critics.Actor) -> training.Trainer:
  """Builds the state and the step of policy and critic."""
  settings = bench.config.pf_ppo
  make_step = functools.partial(ppo.make_ppo_step, config=settings)
  return critics.make_trainer(bench, actor, make_step, settings)


def make_experience(bench: workbench.Workbench, actor: critics.Actor) -> responses.Experience:
  """Jitted `(params, ref_params, moments, responses, key) -> (PPOBatch, moments, metrics)`."""
  config, temperature = bench.config, bench.config.sampling.temperature
  return responses.make_experience(
    config,
    reading.make_actor_critic_read(actor.apply, temperature),
    reading.make_read(bench.model.apply, temperature),
    lambda ready, key: pf_ppo.make_batch(
      ready.rollout,
      ready.scores,
      ready.policy.values,
      ready.ref_logprobs,
      config.pf_ppo,
      samples_per_prompt=config.sampling.samples_per_prompt,
      key=key,
      token_rewards=ready.token_rewards,
      weights=ready.weights,
    ),
    weigh=False,
  )


def programs(case: Case) -> None:
  """Compiles the programs of an iteration, for `experiments.compile`."""
  actor = critics.open_actor(case.bench)
  trainer, experience = make_trainer(case.bench, actor), make_experience(case.bench, actor)
  critic = not case.config.critic.share_trunk
  case.policy_gradient(trainer, experience, RunningMoments.zero(), critic=critic, keyed=True)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
