r"""Improves a policy by PPO-max: PPO with additions that keep long runs stable.

Built-in task, after SFT and a reward model (three minutes on a laptop CPU; win rate about 0.72):
  python -m experiments.ppo_max --workdir=runs/ppo_max --init_from=runs/sft --reward.path=runs/rm
Your model and prompts, with demonstrations for the ptx term:
  python -m experiments.ppo_max --workdir=runs/ppo_max --init_from=FOLDER \
    --data.path=PROMPTS.jsonl --reward.path=runs/rm --ptx_path=DEMONSTRATIONS.jsonl
Advantages per macro action (MA-RLHF), of five tokens or, by --ppo_max.cut=sentence, of a sentence:
  --ppo_max.segment=5
Scores are normalised and clipped, and only the critic trains at first; --ppo_max.kl_target=6 adapts
the KL coefficient. The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools

import jax

from rlhf_jax import data, defaults, entry, loop
from rlhf_jax.algorithms import ppo_max, reading, sft, terms
from rlhf_jax.algorithms.ppo_max import PPOMaxConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.losses.reward import RunningMoments
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.rewards.shaped import ShapingConfig
from rlhf_jax.train_step import OptimConfig
from .lab import critics, models, responses, training, workbench
from .lab.case import Case
from .lab.judges import JudgedConfig, RewardOptions
from .lab.responses import Carry, IterationState, RolloutOptions


@dataclasses.dataclass(frozen=True)
class Config(JudgedConfig):
  """PPO-max. `batch_size` counts prompts; each step samples responses and updates on them.

  Attributes:
    ptx_path: File of demonstrations for --ppo_max.ptx_coef; empty is the built-in task.
  """

  steps: int = 45
  batch_size: int = 64
  checkpoint_every: int = 20
  ptx_path: str = ""
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  reward: RewardOptions = RewardOptions()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256))
  ppo_max: PPOMaxConfig = PPOMaxConfig(kl_coef=defaults.weight(0.2, 0.05), ptx_coef=0.1)
  optim: OptimConfig = OptimConfig(defaults.rate(1e-3, 1e-6), schedule="linear", eps=1e-5)
  critic: critics.CriticOptions = critics.CriticOptions(warmup=5)
  shaping: ShapingConfig = ShapingConfig(normalize=True, clip=2.0)
  rollout: RolloutOptions = RolloutOptions()
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    super().__post_init__()
    responses.check(self, parts=self.ppo_max.parts)
    if self.ptx_path and not self.ppo_max.ptx_coef:
      raise ValueError("ptx_path is not read without ppo_max.ptx_coef; set both")
    if self.ppo_max.ptx_coef and not self.ptx_path and data.is_given(self.data):
      raise ValueError("ptx_path must name a file of demonstrations for ppo_max.ptx_coef")


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the metrics of summary.json."""
  config.require()
  responses.require_devices(config.rollout)
  extra: workbench.Extra = {}
  if config.ppo_max.ptx_coef:
    extra = {"ptx": ("demonstrations", config.ptx_path)}
  adapted, spare = config.critic.adapted(config.reward), config.rollout.devices
  with workbench.open(
    session, config, "ppo_max", "prompts", adapted=adapted, spare=spare, extra=extra
  ) as bench:
    responses.require_fit(bench)
    actor = critics.open_actor(bench, normalized=config.ppo_max.normalize_values)
    trainer, experience = make_trainer(bench, actor), make_experience(bench, actor)
    bench.describe("PPO-max", trainer)
    reward_of = bench.open_reward()
    respond = responses.Responder(bench, reward_of, config.shaping, config.rollout)
    control = ppo_max.Control.init(config.ppo_max)
    size = config.batch_size * config.sampling.samples_per_prompt

    def iteration(state: IterationState, batch, key):
      (prompts, *demonstrations), params = batch, trainer.params(state.train)
      scored, following, metrics = respond(params["policy"], state, prompts, key)
      experienced, carry, of_batch = experience(params, bench.start, state.carry, scored)
      if demonstrations:  # One sequence per response.
        experienced = terms.WithSequences(experienced, *demonstrations)
      train, of_update = trainer.step(state.train, experienced, key)
      return IterationState(train, carry, following), metrics | of_batch | of_update

    def policy_of(state: IterationState):
      return trainer.params(state.train)["policy"]

    texts = [bench.batches(rows, batch_size=size) for rows in bench.extra.values()]
    judge = bench.judge(reward_of, batch_size=size)
    state = bench.fit(
      iteration,
      trainer,
      training.Zipped(respond.batches, *texts),
      state=respond.init(trainer.state, Carry(RunningMoments.zero(), control)),
      evaluate=judge.evaluate(policy_of) if config.eval_every else None,
    )
    return judge.finish(policy_of(state), config.steps, "PPO-max", critics.first_explained(bench))


def make_trainer(bench: workbench.Workbench, actor: critics.Actor) -> training.Trainer:
  """Builds the state and step of policy and critic; the policy waits for the critic's warm-up."""

  def step(apply_fn, tx, config=bench.config.ppo_max, **options):
    ptx = functools.partial(sft.loss_fn, apply_fn=lambda params, ids: apply_fn(params, ids)[0])
    return ppo_max.make_ppo_max_step(apply_fn, tx, config, demonstration_loss=ptx, **options)

  return critics.make_trainer(bench, actor, step, bench.config.ppo_max)


def make_experience(bench: workbench.Workbench, actor: critics.Actor) -> responses.Experience:
  """Jitted `(params, ref_params, carry, responses) -> (PPOBatch, carry, metrics)`."""
  config, temperature = bench.config, bench.config.sampling.temperature
  read = reading.make_actor_critic_read(actor.apply, temperature)
  prepare = responses.make_prepare(config, read, reading.make_read(bench.model.apply, temperature))
  ends = responses.sentence_ends(bench) if config.ppo_max.cut == "sentence" else lambda _: None

  @jax.jit
  def experience(params, ref_params, carry, answers):
    ready = prepare(params, ref_params, carry.moments, answers)
    inputs = ready.rollout, ready.scores, ready.policy.values, ready.ref_logprobs, carry.method
    inputs = *inputs, config.ppo_max, ready.token_rewards, ends(ready.rollout)
    batch, control, metrics = ppo_max.make_batch(*inputs)
    batch = batch._replace(advantages=ready.weights * batch.advantages)
    return batch, Carry(ready.moments, control), ready.metrics | metrics

  return experience


def programs(case: Case) -> None:
  """Compiles the programs of an iteration, for `experiments.compile`."""
  actor = critics.open_actor(case.bench)
  trainer, experience = make_trainer(case.bench, actor), make_experience(case.bench, actor)
  critic, ptx = not case.config.critic.share_trunk, bool(case.config.ppo_max.ptx_coef)
  carry = Carry(RunningMoments.zero(), ppo_max.Control.init(case.config.ppo_max))
  case.policy_gradient(trainer, experience, carry, critic=critic, ptx=ptx)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
