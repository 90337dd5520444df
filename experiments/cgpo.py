r"""Improves a policy under constraints by CGPO: responses that violate one forfeit their reward.

Built-in task, after SFT and a reward model (two minutes on a laptop CPU; win rate about 0.7):
  python -m experiments.cgpo --workdir=runs/cgpo --init_from=runs/sft --reward.path=runs/rm \
    --reward.constraints=no_filler
With a bonus for what the constraint forbids:
  --reward.name=filler --reward.weights=1,4
Your model and prompts, against a Python reward and a constraint of your own:
  python -m experiments.cgpo --workdir=runs/cgpo --init_from=FOLDER --data.path=PROMPTS.jsonl \
    --reward.name=sentiment --reward.constraints=finished

A reward is calibrated: it is the probability of beating a response of the initial policy to the
same prompt. Without constraints this is a policy gradient on that reward.

With the bonus expect no violations and a gold reward of 5.8, where SFT has 3.8. Without the
constraint the policy earns the bonus: 82 % of the responses have filler, and the gold reward is
3.9. Without the bonus, under the constraint, it is 5.6.

At the end the trained and the initial policy answer the held-out prompts, and both are scored.
The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools

from rlhf_jax import defaults, entry, loop
from rlhf_jax.algorithms import cgpo, reading
from rlhf_jax.algorithms.cgpo import CGPOConfig
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
  """CGPO. `batch_size` counts prompts; each step samples responses and updates on them."""

  steps: int = 45
  batch_size: int = 16
  checkpoint_every: int = 20
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  reward: RewardOptions = RewardOptions()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256), samples_per_prompt=4)
  cgpo: CGPOConfig = CGPOConfig(kl_max=defaults.weight(20.0, 50.0))
  optim: OptimConfig = OptimConfig(defaults.rate(1e-3, 1e-6), schedule="linear", eps=1e-5)
  shaping: ShapingConfig = ShapingConfig("par", missing_eos_penalty=0.0)
  rollout: RolloutOptions = RolloutOptions()
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    super().__post_init__()
    responses.check(self, parts=self.cgpo.parts, group=2)
    if self.shaping != ShapingConfig(
      "par", self.shaping.reference_samples, missing_eos_penalty=0.0
    ):
      raise ValueError(
        "shaping takes only reference_samples here: CGPO takes parts of a reward, which must not be"
        " negative, so it needs function=par and no other change"
      )


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the metrics of summary.json."""
  config.require()
  responses.require_devices(config.rollout)
  with workbench.open(session, config, "cgpo", "prompts", spare=config.rollout.devices) as bench:
    responses.require_fit(bench)
    trainer, experience = make_trainer(bench), make_experience(bench)
    bench.describe("CGPO", trainer)
    reward_of = bench.open_reward()
    options = config.shaping, config.rollout
    respond = responses.Responder(bench, reward_of, *options, constrained=True)

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
    return judge.finish(policy_of(state), config.steps, "CGPO")


def make_trainer(bench: workbench.Workbench) -> training.Trainer:
  """Builds the state and the step of the policy."""
  settings, temperature = bench.config.cgpo, bench.config.sampling.temperature
  make_step = functools.partial(cgpo.make_cgpo_step, config=settings, temperature=temperature)
  return bench.trainer(make_step, settings)


def make_experience(bench: workbench.Workbench) -> responses.Experience:
  """Jitted `(params, ref_params, moments, responses) -> (CGPOBatch, moments, metrics)`."""
  config = bench.config
  read = reading.make_read(bench.model.apply, config.sampling.temperature)
  return responses.make_experience(
    config,
    read,
    read,
    lambda ready: cgpo.make_batch(
      ready.rollout,
      ready.totals,
      ready.satisfied,
      ready.ref_logprobs,
      config.cgpo,
      samples_per_prompt=config.sampling.samples_per_prompt,
    ),
  )


def programs(case: Case) -> None:
  """Compiles the programs of an iteration, for `experiments.compile`."""
  trainer, experience = make_trainer(case.bench), make_experience(case.bench)
  case.policy_gradient(trainer, experience, RunningMoments.zero())


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
