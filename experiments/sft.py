"""Fine-tunes a language model on demonstrations.

Built-in task (a minute on a laptop CPU; held-out loss falls to about 1.2 nats per token):
  python -m experiments.sft --workdir=runs/sft
Your model and data (rows with prompt and response, instruction and output, or messages):
  python -m experiments.sft --workdir=runs/sft --model.path=FOLDER --data.path=FILE.jsonl

With --data.packed_length=2048 a row holds as many demonstrations as fit into 2048 tokens, instead
of one demonstration and padding. The panel at the start shows the share of padding.

The default learning rate is for the built-in task; a pretrained model needs about 1e-5.
The same command, run again, resumes a run that was stopped.
"""

import dataclasses
import functools

import jax
import numpy as np

from experiments.lab import evaluating, models, training, workbench
from experiments.lab.case import Case
from rlhf_jax import entry, loop
from rlhf_jax.algorithms import sft
from rlhf_jax.algorithms.sft import SFTConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.losses import masked, supervised
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """Supervised fine-tuning."""

  steps: int = 540
  batch_size: int = 32
  log_every: int = 10
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(max_new_tokens=40)
  sft: SFTConfig = SFTConfig()
  optim: OptimConfig = OptimConfig(learning_rate=3e-3)
  lora: LoRAConfig = LoRAConfig()


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

    @jax.jit
    def measure(params, batch):
      losses = supervised.nll(bench.model.apply(params, batch.tokens), batch.tokens)
      return {"eval/loss": masked.masked_mean(losses, batch.mask, axis=1)}

    @evaluating.once_per_step
    def evaluate(state, step):
      del step
      rows = bench.over(bench.heldout, functools.partial(measure, trainer.params(state)))
      return {name: float(np.mean(values)) for name, values in rows.items()}

    state = bench.fit(
      trainer.step,
      trainer,
      bench.batches(packed_length=config.data.packed_length),
      evaluate=evaluate,
      title="sft",
    )
    params = trainer.params(state)
    bench.export(params)
    summary = evaluate(state, config.steps) if bench.heldout.examples else {}
    bench.show_samples(params, "Samples of the fine-tuned model")
    bench.finish(summary)
  return summary


def programs(case: Case) -> None:
  """Compiles the train step, for `experiments.compile`."""
  trainer = case.bench.trainer(functools.partial(sft.make_sft_step, config=case.config.sft))
  case.offline(trainer, case.tokens(case.length), rows=case.config.batch_size, scored=True)


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
