r"""Fine-tunes a policy on preference pairs without a reference: SimPO, ORPO, CPO.

Built-in task, from the SFT model (two minutes on a laptop CPU; win rate about 0.6):
  python -m experiments.simpo --workdir=runs/simpo --init_from=runs/sft
Held to the chosen responses by their likelihood (win rate about 0.7):
  --simpo.sft_coef=1 --optim.learning_rate=1e-4
Your model and data (rows with prompt, chosen, rejected), by ORPO:
  python -m experiments.simpo --workdir=runs/orpo --init_from=FOLDER --data.path=FILE.jsonl \
    --simpo.loss=orpo
By CPO:
  --simpo.loss=cpo

Settings that are not given are those of the paper of each loss.

The prompt of a pair is run once for both responses where this saves tokens; with
--data.packed_length a row holds as many pairs as fit, instead of one pair and padding.
At the end the trained and the initial policy answer the held-out prompts. With --eval_every=50 the
policy in training also answers them every 50 steps.
The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools

import jax

from rlhf_jax import defaults, entry, loop
from rlhf_jax.algorithms import pairs, simpo
from rlhf_jax.algorithms.pairs import PairConfig
from rlhf_jax.algorithms.simpo import SimPOConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig
from .lab import evaluating, models, training, workbench
from .lab.case import Case
from .lab.judges import RewardOptions


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """SimPO on pairs. `reward`, if given, judges the policies at the end."""

  steps: int = 250
  batch_size: int = 32
  log_every: int = 10
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig(share_prompts=True)
  reward: RewardOptions = RewardOptions()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256))
  simpo: SimPOConfig = SimPOConfig()
  pairs: PairConfig = PairConfig()
  optim: OptimConfig = OptimConfig(defaults.rate(3e-5, 5e-7))
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    super().__post_init__()
    models.require_one_sample(self.sampling, "held-out prompts are answered once")


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the metrics of summary.json."""
  with workbench.open(session, config, "simpo", "preferences") as bench:
    trainer, read = make_trainer(bench), pairs.make_read_pairs(bench.model.apply, config.pairs)
    bench.describe(
      "SimPO",
      trainer,
      tokens_per_step=training.step_tokens(config, bench.train_set),
    )

    @jax.jit
    def summarize(policy):
      return pairs.mean_metrics(*simpo.row_metrics(policy, config=config.simpo), policy.real)

    judge = bench.later_judge()
    evaluate = bench.evaluator(trainer, jax.jit(read), summarize, judge)
    batches = bench.batches(packed_length=config.data.packed_length)
    state = bench.fit(trainer.step, trainer, batches, evaluate=evaluate)
    summary = evaluate(state, config.steps) | evaluating.length_baseline(bench.heldout)
    return judge().finish(trainer.params(state), config.steps, "SimPO", summary)


def make_trainer(bench: workbench.Workbench) -> training.Trainer:
  """Builds the state and the step of the policy."""
  config = bench.config
  make_step = functools.partial(simpo.make_simpo_step, config=config.simpo, weighting=config.pairs)
  return bench.trainer(make_step)


def programs(case: Case) -> None:
  """Compiles the train step, for `experiments.compile`."""
  case.offline(make_trainer(case.bench), case.pairs(), scored=True)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
