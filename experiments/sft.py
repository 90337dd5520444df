"""Fine-tunes a language model on demonstrations.

Built-in task (a minute on a laptop CPU; held-out loss falls to about 1.1 nats per token):
  python -m experiments.sft --workdir=runs/sft
Your model and data (rows with prompt and response, instruction and output, or messages):
  python -m experiments.sft --workdir=runs/sft --model.path=FOLDER --data.path=FILE.jsonl

With --data.packed_length=2048 a row holds as many demonstrations as fit into 2048 tokens, instead
of one demonstration and padding. The panel at the start shows the share of padding.

The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools

import jax

from rlhf_jax import defaults, entry, loop
from rlhf_jax.algorithms import sft
from rlhf_jax.algorithms.sft import SFTConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig
from .lab import models, training, workbench
from .lab.case import Case


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """Supervised fine-tuning."""

  steps: int = 540
  batch_size: int = 32
  log_every: int = 10
  eval_every: int = 90
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(defaults.count(40, 256))
  sft: SFTConfig = SFTConfig()
  optim: OptimConfig = OptimConfig(defaults.rate(3e-3, 2e-5))
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    super().__post_init__()
    models.require_one_sample(self.sampling, "held-out prompts are answered once")


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the model to `workdir/export` and returns the metrics of summary.json."""
  with workbench.open(session, config, "sft", "demonstrations") as bench:
    make_step = functools.partial(sft.make_sft_step, config=config.sft)
    trainer = bench.trainer(make_step, keep_start=False)
    bench.describe(
      "Supervised fine-tuning",
      trainer,
      tokens_per_step=training.step_tokens(config, bench.train_set),
    )

    measure = jax.jit(functools.partial(sft.row_sums, bench.model.apply))
    evaluate = bench.evaluator(trainer, measure, sft.mean_metrics)
    state = bench.fit(
      trainer.step,
      trainer,
      bench.batches(packed_length=config.data.packed_length),
      evaluate=evaluate,
    )
    params = trainer.params(state)
    bench.export(params)
    summary = evaluate(state, config.steps)
    bench.show_samples(params, "Samples of the fine-tuned model")
    pairs = ["--data.path=PAIRS.jsonl"] if config.data.path else []
    start = f"--init_from={session.workdir}"
    bench.finish(summary, "reward_model", "--workdir=runs/rm", start, *pairs)
  return summary


def programs(case: Case) -> None:
  """Compiles the train step, for `experiments.compile`."""
  trainer = case.bench.trainer(functools.partial(sft.make_sft_step, config=case.config.sft))
  case.offline(trainer, case.tokens(case.length), scored=True)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
