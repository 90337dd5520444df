"""Trains a reward model on preference pairs.

Built-in task, from the SFT model (under a minute on a laptop CPU; held-out accuracy about 0.85):
  python -m experiments.reward_model --workdir=runs/rm --init_from=runs/sft
Your model and data (rows with prompt, chosen, rejected):
  python -m experiments.reward_model --workdir=runs/rm --init_from=runs/sft --data.path=FILE.jsonl

After training the scores are centred: their mean over `--data.eval_rows` training pairs is 0.
The default learning rate suits the built-in task; a pretrained model wants about 1e-5.
Starting the same command again continues a run that was stopped.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from experiments import common
from rlhf_jax import data, flags, loop, reporting
from rlhf_jax.algorithms import reward_model
from rlhf_jax.algorithms.reward_model import RewardModelConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.models import shift_scores
from rlhf_jax.train_step import OptimConfig, make_optimizer, make_schedule


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """Reward model."""

  steps: int = 250
  batch_size: int = 32
  log_every: int = 10
  model: common.ModelOptions = common.ModelOptions()
  data: DataConfig = DataConfig()
  reward_model: RewardModelConfig = RewardModelConfig()
  optim: OptimConfig = OptimConfig(learning_rate=1e-3)


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Trains, centres, exports to `workdir/export` and returns the figures of summary.json."""
  folder = common.source_folder(config.model, config.init_from)
  tokenizer = common.open_tokenizer(folder, config.data.end_token)
  train_set, heldout = data.load("preferences", config.data, tokenizer, seed=session.seed)
  with loop.open_run(session) as run:
    loop.identify(
      run, "reward_model", flags.to_dict(config), data=train_set.digest, tokenizer=tokenizer.digest
    )
    model, params = common.open_model(run, config.model, folder, tokenizer, "scalar")
    tx = make_optimizer(config.optim, config.steps)
    state = common.place_state(run, params, tx)
    del params  # The state has its own copy.
    tokens = config.batch_size * 2 * train_set.padded_length
    common.describe(
      run,
      "Reward model",
      model,
      state,
      {"data": f"{len(train_set.examples)} pairs", "tokens per step": f"{tokens}"},
    )

    @jax.jit
    def measure(params, batch):
      scores = reward_model.pair_scores(model.apply, params, batch)
      # Metrics of each pair on its own, so that their means are those of the whole set.
      each = jax.vmap(lambda pair: reward_model.pair_metrics(pair[None]))(scores)
      return {f"eval/{name}": value for name, value in each.items()}

    def evaluate_on(dataset, params):
      return common.evaluate_batches(
        run, dataset, config.batch_size, tokenizer.pad_id, functools.partial(measure, params)
      )

    def evaluate(state, step):
      del step
      return evaluate_on(heldout, state.params)

    batches = data.batches(train_set, config.batch_size, seed=session.seed, pad_id=tokenizer.pad_id)
    state = loop.fit(
      run,
      config,
      reward_model.make_reward_model_step(
        model.apply, tx, config.reward_model, state_shardings=common.shardings_of(state)
      ),
      state,
      batches,
      evaluate=evaluate if heldout.examples else None,
      learning_rate=make_schedule(config.optim, config.steps),
      title="reward model",
    )
    some = train_set._replace(examples=train_set.examples[: config.data.eval_rows])
    means = evaluate_on(some, state.params)
    centre = (means["eval/reward/chosen"] + means["eval/reward/rejected"]) / 2
    params = shift_scores(state.params, -jnp.float32(centre))
    common.export(run.workdir / common.EXPORT, params, model, tokenizer)

    summary = {"train/accuracy": means["eval/reward/accuracy"]}
    if heldout.examples:
      scores = evaluate_on(heldout, params)
      longer = [len(pair["chosen"]) > len(pair["rejected"]) for pair in heldout.examples]
      summary |= {
        "accuracy": scores["eval/reward/accuracy"],
        "margin": scores["eval/reward/margin"],
        "longer_wins": sum(longer) / len(longer),
      }
      reporting.show_summary(
        "Reward model, held-out pairs",
        {
          "accuracy": {"reward model": summary["accuracy"], "longer wins": summary["longer_wins"]},
          "margin": {"reward model": summary["margin"]},
        },
      )
    reporting.plot_metrics(run.workdir)
    reporting.write_summary(run.workdir, summary)
  return summary


if __name__ == "__main__":
  flags.run_script(train, loop.Session, Config)
