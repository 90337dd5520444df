"""Fine-tunes a policy on single responses with a thumbs up or down: KTO.

Built-in task, from the SFT model (two minutes on a laptop CPU; win rate about 0.72):
  python -m experiments.kto --workdir=runs/kto --init_from=runs/sft
Your model and data (rows with prompt, response, label; a pair counts as two rows):
  python -m experiments.kto --workdir=runs/kto --init_from=FOLDER --data.path=FILE.jsonl

The initial policy is the reference; its log-probabilities are computed once per response.
At the end the trained and the initial policy answer the held-out prompts. With --eval_every=50 the
policy in training also answers them every 50 steps.
The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax

from rlhf_jax import defaults, entry, loop
from rlhf_jax.algorithms import kto
from rlhf_jax.algorithms.kto import KTOBatch, KTOConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig
from rlhf_jax.types import UnpairedBatch
from .lab import models, training, workbench
from .lab.case import Case
from .lab.judges import RewardOptions


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """KTO. `reward`, if given, judges the policies at the end."""

  steps: int = 250
  batch_size: int = 32
  log_every: int = 10
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  reward: RewardOptions = RewardOptions()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256))
  kto: KTOConfig = KTOConfig()
  optim: OptimConfig = OptimConfig(defaults.rate(3e-4, 5e-7))
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    super().__post_init__()
    models.require_one_sample(self.sampling, "held-out prompts are answered once")


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the policy to `workdir/export` and returns the metrics of summary.json."""
  with workbench.open(session, config, "kto", "unpaired") as bench:
    trainer = make_trainer(bench)
    bench.describe(
      "KTO",
      trainer,
      tokens_per_step=training.step_tokens(config, bench.train_set),
    )
    refs, heldout_refs = bench.references(make_ref_logprobs(bench))

    @jax.jit
    def measure(params, batch):
      return kto.read_responses(bench.model.apply, params, batch), batch.desirable

    @jax.jit
    def summarize(rows, refs):
      policy, desirable = rows
      return kto.mean_metrics(policy, refs, desirable, config=config.kto)

    judge = bench.later_judge()
    evaluate = bench.evaluator(trainer, measure, summarize, judge, heldout_refs)
    state = bench.fit(
      lambda state, batch, key: trainer.step(state, KTOBatch(*batch), key),
      trainer,
      bench.batches(columns=refs),
      evaluate=evaluate,
    )
    summary = evaluate(state, config.steps)
    return judge().finish(trainer.params(state), config.steps, "KTO", summary)


def make_trainer(bench: workbench.Workbench) -> training.Trainer:
  """Builds the state and the step of the policy."""
  return bench.trainer(functools.partial(kto.make_kto_step, config=bench.config.kto))


def make_ref_logprobs(bench: workbench.Workbench) -> Callable[..., jax.Array]:
  """Jitted `(params, rows) -> [B, 2]`, log-probabilities under the reference."""
  return jax.jit(functools.partial(kto.read_responses, bench.model.apply))


def programs(case: Case) -> None:
  """Compiles the forward pass of the reference and the train step, for `experiments.compile`."""
  rows = UnpairedBatch(*case.tokens(case.length), case.column(dtype=bool), case.tokens(case.length))
  case.against_reference(make_trainer(case.bench), make_ref_logprobs(case.bench), rows, KTOBatch)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
