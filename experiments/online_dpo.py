r"""Improves a policy by DPO on pairs of its own responses, judged during training.

Built-in task, after SFT and a reward model; pairs are the best and the worst of four samples:
  python -m experiments.online_dpo --workdir=runs/online --init_from=runs/sft --reward.path=runs/rm
Judged by a preference model:
  --preference.path=runs/pm
Judged by a Python function:
  --preference.name=panel
CODPO, whose pairs are of a response that satisfies the constraints and one that does not (CGPO):
  --online.pick=constrained --reward.constraints=no_filler --dpo.sft_coef=0.1
XPO, which explores by a bonus on responses of the initial policy:
  --online.bonus_coef=1e-3
Iterative DPO, in rounds of 20 steps whose reference is the policy of the previous round:
  --online.round_steps=20

--dpo.loss takes every loss of experiments.dpo.
At the end the trained and the initial policy answer the held-out prompts, and both are scored.
The same command, run again, resumes a run that was stopped.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax import defaults, entry, loop
from rlhf_jax.algorithms.dpo import DPOConfig
from rlhf_jax.algorithms.online_dpo import OnlineConfig
from rlhf_jax.algorithms.pairs import PairConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.losses.reward import RunningMoments
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.rewards.shaped import ShapingConfig
from rlhf_jax.train_step import OptimConfig
from .lab import models, pairing, responses, workbench
from .lab.case import Case
from .lab.judges import JudgedConfig, PreferenceOptions, RewardOptions


@dataclasses.dataclass(frozen=True)
class Config(JudgedConfig):
  """Online DPO. `batch_size` counts prompts; give a reward or a preference."""

  steps: int = 80
  batch_size: int = 32
  checkpoint_every: int = 20
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  reward: RewardOptions = RewardOptions()
  preference: PreferenceOptions = PreferenceOptions()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256), samples_per_prompt=4)
  online: OnlineConfig = OnlineConfig()
  dpo: DPOConfig = DPOConfig()
  pairs: PairConfig = PairConfig()
  optim: OptimConfig = OptimConfig(defaults.rate(3e-4, 5e-7), schedule="linear")
  shaping: ShapingConfig = ShapingConfig(missing_eos_penalty=0.0)
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    super().__post_init__()
    responses.check(self, group=2)
    if self.online.pick == "constrained" and not self.reward.constraints:
      raise ValueError("online.pick=constrained needs reward.constraints")


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the metrics of summary.json."""
  config.require()
  samples = config.sampling.samples_per_prompt
  with workbench.open(session, config, "online_dpo", "prompts") as bench:
    trainer, make_batch = pairing.make_trainer(bench), pairing.make_batch(bench)
    scores = bench.open_scores()
    bench.describe(
      "Online DPO",
      trainer,
      responses_per_step=f"{config.batch_size * samples}, of which {config.batch_size * 2} are"
      " trained on",
    )
    respond = responses.Responder(bench, scores.score_of, config.shaping)
    sample = bench.sampler(samples_per_prompt=1)

    def iteration(state: responses.IterationState, prompts, key):
      pick_key, bonus_key = jax.random.split(jax.random.fold_in(key, state.train.step))
      scored, _, metrics = respond(trainer.params(state.train), state, prompts, key)
      calibration = None
      if config.online.bonus_coef:
        calibration = sample(respond.reshard(bench.start), *prompts, bonus_key)
      reference = state.carry.method
      against = bench.start if reference is None else trainer.params(state.train, reference)
      inputs = against, state.carry.moments, scored, calibration, pick_key
      batch, moments, of_batch = make_batch(*inputs)
      train, of_step = trainer.step(state.train, batch, key)
      if reference is not None and int(train.step) % config.online.round_steps == 0:
        reference = jax.tree.map(jnp.copy, train.params)
      # Of two responses; `metrics` has the tokens of all.
      of_step.pop("tokens")
      # The implicit rewards of DPO get another name, since there is an actual reward here.
      of_step = {name.replace("reward/", "implicit_reward/"): v for name, v in of_step.items()}
      carry = responses.Carry(moments, reference)
      return responses.IterationState(train, carry), metrics | of_batch | of_step

    def policy_of(state: responses.IterationState):
      return trainer.params(state.train)

    first = models.copy(bench.run, trainer.state.params) if config.online.round_steps else None
    state = respond.init(trainer.state, RunningMoments.zero())
    judge = bench.judge(scores.reward_of, scores.prefer_of)
    state = bench.fit(
      iteration,
      trainer,
      bench.batches(),
      state=state._replace(carry=responses.Carry(state.carry, first)),
      evaluate=judge.evaluate(policy_of) if config.eval_every else None,
    )
    return judge.finish(policy_of(state), config.steps, "Online DPO")


def programs(case: Case) -> None:
  """Compiles the programs of an iteration, for `experiments.compile`."""
  pairing.programs(case)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
