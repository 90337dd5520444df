"""Supervised fine-tuning of a language model on demonstrations.

Built-in task (a minute on a laptop CPU; held-out loss falls to about 1.2 nats per token):
  python -m experiments.sft --workdir=runs/sft
Your model and data (rows with prompt and response, instruction and output, or messages):
  python -m experiments.sft --workdir=runs/sft --model.path=FOLDER --data.path=FILE.jsonl

With --data.packed_length=2048 a row holds as many demonstrations as fit into 2048 tokens, instead
of one and padding. The start panel says how much is padding.

The default learning rate suits the built-in task; a pretrained model wants about 1e-5.
Starting the same command again continues a run that was stopped.
"""

import dataclasses
import functools

import jax

from experiments import records
from experiments.lab import evaluating, judges, models, training
from rlhf_jax import data, entry, loop, reporting
from rlhf_jax.algorithms import sft
from rlhf_jax.algorithms.sft import SFTConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.losses import masked, supervised
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.train_step import OptimConfig, make_schedule


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """Supervised fine-tuning."""

  steps: int = 540
  batch_size: int = 32
  log_every: int = 10
  model: models.ModelOptions = models.ModelOptions()
  lora: LoRAConfig = LoRAConfig()
  data: DataConfig = DataConfig()
  sft: SFTConfig = SFTConfig()
  optim: OptimConfig = OptimConfig(learning_rate=3e-3)
  sampling: SamplingConfig = SamplingConfig(max_new_tokens=40)


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, exports the model to `workdir/export` and returns the figures of summary.json."""
  folder = models.source_folder(config.model, config.init_from)
  tokenizer = models.open_tokenizer(folder, config.data.end_token)
  train_set, heldout = data.load("demonstrations", config.data, tokenizer, seed=session.seed)
  with loop.open_run(session) as run:
    records.identify(
      run,
      "sft",
      config,
      tokenizer,
      train_set,
      heldout,
      **models.frozen_digest(config.lora, folder),
    )
    model, params = models.open_model(run, config.model, folder, tokenizer)
    trainer = training.make_trainer(run, config, model, params, sft.make_sft_step, config.sft)
    state = trainer.state
    del params  # The trainer has its own copy.
    training.describe(
      run,
      "Supervised fine-tuning",
      model,
      state,
      {
        "data": f"{len(train_set.examples)} demonstrations",
        "tokens per step": training.step_tokens(config, train_set),
      },
      frozen=trainer.frozen,
    )

    @jax.jit
    def measure(params, batch):
      losses = supervised.nll(model.apply(params, batch.tokens), batch.tokens)
      return {"eval/loss": masked.masked_mean(losses, batch.mask, axis=1)}

    @evaluating.once_per_step
    def evaluate(state, step):
      del step
      return evaluating.evaluate_batches(
        run,
        heldout,
        config.batch_size,
        tokenizer.pad_id,
        functools.partial(measure, trainer.params(state)),
      )

    batches = data.batches(
      train_set,
      config.batch_size,
      seed=session.seed,
      pad_id=tokenizer.pad_id,
      packed_length=config.data.packed_length,
    )
    state = loop.fit(
      run,
      config,
      trainer.step,
      state,
      batches,
      evaluate=evaluate if heldout.examples else None,
      learning_rate=make_schedule(config.optim, config.steps),
      title="sft",
    )
    params = trainer.params(state)
    models.export(run.workdir / models.EXPORT, params, model, tokenizer)
    summary = evaluate(state, config.steps) if heldout.examples else {}
    if heldout.examples:
      show_samples(run, config, model, params, heldout, tokenizer)
    training.finish(run, summary)
  return summary


def show_samples(run, config, model, params, heldout, tokenizer) -> None:
  """A few responses to held-out prompts, on the terminal and in `samples/`."""
  prompts = evaluating.as_prompts(heldout, 8)
  sample = evaluating.heldout_sampler(
    run,
    model,
    prompts,
    tokenizer,
    config.sampling,
    reward_fns=judges.gold_rewards(config.data, prompts, tokenizer),
  )
  rows = evaluating.sample_rows(sample(params))
  run.writer.table(config.steps, "samples", rows)
  reporting.show_samples(rows, "Samples of the fine-tuned model")


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
