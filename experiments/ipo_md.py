r"""Improves a policy by a regression on judged pairs of samples: IPO-MD, online IPO, EGPO.

Built-in task, after SFT and a reward model, whose scores are compared:
  python -m experiments.ipo_md --workdir=runs/ipo_md --init_from=runs/sft --preference.path=runs/rm
Judged by a preference model:
  --preference.path=runs/pm
Judged by a Python function:
  --preference.name=panel
Online IPO:
  --ipo_md.mix=0
EGPO:
  --ipo_md.mix=0 --extragradient

At the end the trained and the initial policy answer the held-out prompts, and the judge compares
their responses. The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools

import jax

from rlhf_jax import defaults, entry, loop
from rlhf_jax.algorithms import ipo_md, opponents
from rlhf_jax.algorithms.ipo_md import IPOMDConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig
from .lab import matches, models, responses, training, workbench
from .lab.case import Case
from .lab.judges import JudgedConfig, PreferenceOptions
from .lab.matches import Match


@dataclasses.dataclass(frozen=True)
class Config(JudgedConfig):
  """IPO-MD. `batch_size` counts prompts; each step samples two responses to each.

  Attributes:
    extragradient: Steps that look ahead (EGPO). Each is taken twice from the same policy, the
      second time against the policy that the first one gave.
  """

  steps: int = 120
  batch_size: int = 64
  checkpoint_every: int = 20
  extragradient: bool = False
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  preference: PreferenceOptions = PreferenceOptions()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256))
  ipo_md: IPOMDConfig = IPOMDConfig()
  optim: OptimConfig = OptimConfig(defaults.rate(3e-4, 5e-7), schedule="linear")
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    super().__post_init__()
    responses.check(self)
    models.require_one_sample(self.sampling, "IPO-MD samples pairs anyway")


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the metrics of summary.json."""
  config.require()
  with workbench.open(session, config, "ipo_md", "prompts") as bench:
    trainer, prefer_of = make_trainer(bench), bench.open_preference()
    match = Match(bench, prefer_of(bench.train_set), config.ipo_md, count=2, mixed=True)
    bench.describe("IPO-MD", trainer)
    mixes, taus = config.ipo_md.schedules(config.steps)

    def iteration(state, prompts, key):
      odds = {"mix": mixes(state.step), "tau": taus(state.step)}

      def against(current, opponent, key):
        rival = None if opponent is current.params else trainer.params(current, opponent)
        batch, metrics = match(trainer.params(current), rival, prompts, key, **odds)
        current, of_step = trainer.step(current, batch, key)
        return current, metrics | of_step

      take = opponents.extragradient(against) if config.extragradient else against
      return take(state, state.params, jax.random.fold_in(key, state.step))

    judge = bench.judge(prefer_of=prefer_of)
    state = bench.fit(
      iteration,
      trainer,
      bench.batches(),
      evaluate=judge.evaluate(trainer.params) if config.eval_every else None,
    )
    return judge.finish(trainer.params(state), config.steps, "IPO-MD")


def make_trainer(bench: workbench.Workbench) -> training.Trainer:
  """Builds the state and the step of the policy."""
  settings, temperature = bench.config.ipo_md, bench.config.sampling.temperature
  return bench.trainer(
    functools.partial(ipo_md.make_ipo_md_step, config=settings, temperature=temperature)
  )


def programs(case: Case) -> None:
  """Compiles the programs of an iteration, for `experiments.compile`."""
  match = Match(case.bench, None, case.config.ipo_md, count=2, mixed=True)
  matches.programs(case, match, make_trainer(case.bench))


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
