r"""Improves a policy by preferences between its responses and an opponent's: Nash-MD.

Built-in task, after SFT, judged by a panel whose majority is intransitive:
  python -m experiments.nash_md --workdir=runs/nash --init_from=runs/sft --preference.name=panel
Judged by a preference model, or by a reward model whose scores are compared:
  python -m experiments.nash_md --workdir=runs/nash --init_from=runs/sft --preference.path=runs/pm
Self-play:
  --nash_md.mix=0
Best response to the initial policy:
  --nash_md.mix=1
Nash-EMA:
  --nash_md.mix=0 --nash_md.ema=0.95
Mirror Prox:
  --nash_md.mix=0 --extragradient
Best response to a trained policy, which measures its exploitability:
  --nash_md.mix=0 --opponent=runs/nash

At the end the trained and the initial policy answer the held-out prompts, and the judge compares
their responses. The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools

import jax

from rlhf_jax import defaults, entry, loop
from rlhf_jax.algorithms import nash_md, opponents
from rlhf_jax.algorithms.nash_md import NashMDConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig
from .lab import matches, models, responses, training, workbench
from .lab.case import Case
from .lab.judges import JudgedConfig, PreferenceOptions
from .lab.matches import Match, MatchState


@dataclasses.dataclass(frozen=True)
class Config(JudgedConfig):
  """Nash-MD. `batch_size` counts prompts; each step samples responses and makes one update.

  Attributes:
    opponent: Workdir or Hugging Face folder of a fixed policy to play against; empty plays against
      the policy in training.
    extragradient: Steps that look ahead (Mirror Prox). Each is taken twice from the same policy,
      the second time against the policy that the first one gave.
  """

  steps: int = 120
  batch_size: int = 64
  checkpoint_every: int = 20
  opponent: str = ""
  extragradient: bool = False
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  preference: PreferenceOptions = PreferenceOptions()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256))
  nash_md: NashMDConfig = NashMDConfig()
  optim: OptimConfig = OptimConfig(defaults.rate(3e-4, 5e-7), schedule="linear")
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    super().__post_init__()
    responses.check(self)
    models.require_one_sample(self.sampling, "each response meets another one")
    if bool(self.opponent) + bool(self.nash_md.ema) + self.extragradient > 1:
      raise ValueError("opponent, nash_md.ema and extragradient all choose the opponent; keep one")
    if self.lora.rank and self.nash_md.ema:
      raise ValueError("nash_md.ema averages params, not their factors; leave lora.rank at 0")


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the metrics of summary.json."""
  config.require()
  with workbench.open(session, config, "nash_md", "prompts") as bench:
    settings, trainer = config.nash_md, make_trainer(bench)
    fixed = None
    if config.opponent:
      given = bench.run, config.opponent, config.model, bench.tokenizer, bench.start
      fixed = models.open_policy(*given, "opponent")
    prefer_of = bench.open_preference()
    match = Match(bench, prefer_of(bench.train_set), settings, count=1)
    bench.describe("Nash-MD", trainer)
    mixes, taus = settings.schedules(config.steps)

    def iteration(state: MatchState, prompts, key):
      step = state.train.step
      odds = {"mix": mixes(step), "tau": taus(step)}

      def against(current, opponent, key):
        rival = opponent
        if opponent is not fixed:
          rival = None if opponent is current.params else trainer.params(current, opponent)
        batch, metrics = match(trainer.params(current), rival, prompts, key, **odds)
        current, of_step = trainer.step(current, batch, key)
        return current, metrics | of_step

      opponent = state.train.params if state.average is None else state.average
      take = opponents.extragradient(against) if config.extragradient else against
      key = jax.random.fold_in(key, step)
      train, metrics = take(state.train, opponent if fixed is None else fixed, key)
      average = state.average
      if average is not None:
        average = opponents.moving_average(average, train.params, settings.ema)
      return MatchState(train, average), metrics

    def policy_of(state: MatchState):
      return trainer.params(state.train)

    average = models.copy(bench.run, trainer.state.params) if settings.ema else None
    judge = bench.judge(prefer_of=prefer_of)
    state = bench.fit(
      iteration,
      trainer,
      bench.batches(),
      state=MatchState(trainer.state, average),
      evaluate=judge.evaluate(policy_of) if config.eval_every else None,
    )
    summary = {}
    if fixed is not None and bench.heldout.examples:
      rate = judge.preference(policy_of(state), config.steps, fixed)
      summary["preference/over_opponent"] = rate.value
    return judge.finish(policy_of(state), config.steps, "Nash-MD", summary)


def make_trainer(bench: workbench.Workbench) -> training.Trainer:
  """Builds the state and the step of the policy."""
  settings, temperature = bench.config.nash_md, bench.config.sampling.temperature
  return bench.trainer(
    functools.partial(nash_md.make_nash_md_step, config=settings, temperature=temperature)
  )


def programs(case: Case) -> None:
  """Compiles the programs of an iteration, for `experiments.compile`."""
  match = Match(case.bench, None, case.config.nash_md, count=1)
  matches.programs(case, match, make_trainer(case.bench))


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
