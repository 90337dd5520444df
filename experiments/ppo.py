r"""Improves a policy against a reward by PPO, with a KL penalty to the initial policy.

Built-in task, after SFT and a reward model (two minutes on a laptop CPU; win rate about 0.8):
  python -m experiments.ppo --workdir=runs/ppo --init_from=runs/sft --reward.path=runs/rm
Your model and prompts, against a Python reward function:
  python -m experiments.ppo --workdir=runs/ppo --init_from=FOLDER --data.path=PROMPTS.jsonl \
    --reward.name=sentiment
Updates on packed rows, which save time if the lengths of responses differ much:
  --rollout.packed_length=512
Paid by a judge of pairs, with a response of the initial policy as the other one:
  --preference.path=runs/pm
A critic that is a head on the policy:
  --critic.share_trunk
RTO, which adds rewards of tokens that DPO has learnt, to be trained from the same --init_from:
  --dense.path=runs/dpo
Two devices that sample while the others train:
  --rollout.devices=2 --rollout.importance_cap=2

At the end the trained and the initial policy answer the held-out prompts, and both are scored.
The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools

from rlhf_jax import defaults, entry, loop
from rlhf_jax.algorithms import ppo, reading
from rlhf_jax.algorithms.ppo import PPOConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.losses.reward import RunningMoments
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.rewards.shaped import ShapingConfig
from rlhf_jax.train_step import OptimConfig
from .lab import critics, models, responses, training, workbench
from .lab.case import Case
from .lab.critics import CriticOptions
from .lab.dense import DenseOptions
from .lab.judges import JudgedConfig, PreferenceOptions, RewardOptions
from .lab.responses import IterationState, RolloutOptions


@dataclasses.dataclass(frozen=True)
class Config(JudgedConfig):
  """PPO. `batch_size` counts prompts; each step samples responses and updates on them."""

  steps: int = 60
  batch_size: int = 64
  checkpoint_every: int = 20
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  reward: RewardOptions = RewardOptions()
  preference: PreferenceOptions = PreferenceOptions()
  dense: DenseOptions = DenseOptions()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256))
  ppo: PPOConfig = PPOConfig(kl_coef=defaults.weight(0.15, 0.05))
  # With eps=1e-5, as in https://arxiv.org/abs/2403.17031, gradients of mere rounding errors move
  # nothing, so an update is the same on one device and on many, up to rounding.
  optim: OptimConfig = OptimConfig(defaults.rate(1e-3, 1e-6), schedule="linear", eps=1e-5)
  critic: CriticOptions = CriticOptions()
  shaping: ShapingConfig = ShapingConfig()
  rollout: RolloutOptions = RolloutOptions()
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    super().__post_init__()
    responses.check(self, parts=self.ppo.parts)


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the metrics of summary.json."""
  config.require()
  responses.require_devices(config.rollout)
  adapted, spare = config.critic.adapted(config.reward), config.rollout.devices
  with workbench.open(session, config, "ppo", "prompts", adapted=adapted, spare=spare) as bench:
    responses.require_fit(bench)
    actor = critics.open_actor(bench)
    trainer = make_trainer(bench, actor)
    bench.describe("PPO", trainer)
    scores = bench.open_scores()
    trained_by = config.dense.added_to(scores.score_of, bench)
    respond = responses.Responder(bench, trained_by, config.shaping, config.rollout)
    experience = make_experience(bench, actor)

    def iteration(state: IterationState, prompts, key):
      params = trainer.params(state.train)
      scored, following, metrics = respond(params["policy"], state, prompts, key)
      batch, moments, of_batch = experience(params, bench.start, state.carry, scored)
      train, of_update = trainer.step(state.train, batch, key)
      return IterationState(train, moments, following), metrics | of_batch | of_update

    def policy_of(state: IterationState):
      return trainer.params(state.train)["policy"]

    size = config.batch_size * config.sampling.samples_per_prompt
    judge = bench.judge(scores.reward_of, scores.prefer_of, batch_size=size)
    state = bench.fit(
      iteration,
      trainer,
      respond.batches,
      state=respond.init(trainer.state, RunningMoments.zero()),
      evaluate=judge.evaluate(policy_of) if config.eval_every else None,
    )
    return judge.finish(policy_of(state), config.steps, "PPO", critics.first_explained(bench))


def make_trainer(bench: workbench.Workbench, actor: critics.Actor) -> training.Trainer:
  """Builds the state and the step of policy and critic."""
  settings = bench.config.ppo
  make_step = functools.partial(ppo.make_ppo_step, config=settings)
  return critics.make_trainer(bench, actor, make_step, settings)


def make_experience(bench: workbench.Workbench, actor: critics.Actor) -> responses.Experience:
  """Jitted `(params, ref_params, moments, responses) -> (PPOBatch, moments, metrics)`."""
  config, temperature = bench.config, bench.config.sampling.temperature
  return responses.make_experience(
    config,
    reading.make_actor_critic_read(actor.apply, temperature),
    reading.make_read(bench.model.apply, temperature),
    lambda ready: ppo.make_batch(
      ready.rollout,
      ready.scores,
      ready.policy.values,
      ready.ref_logprobs,
      config.ppo,
      token_rewards=ready.token_rewards,
    ),
  )


def programs(case: Case) -> None:
  """Compiles the programs of an iteration, for `experiments.compile`."""
  actor = critics.open_actor(case.bench)
  trainer, experience = make_trainer(case.bench, actor), make_experience(case.bench, actor)
  critic, dense = not case.config.critic.share_trunk, case.config.dense.scorer(case.bench)
  case.policy_gradient(trainer, experience, RunningMoments.zero(), critic=critic, dense=dense)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
