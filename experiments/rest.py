r"""Self-training on filtered samples: ReST, and as settings of the same loop RAFT and SuperHF.

Built-in task, after SFT and reward model:
  python -m experiments.rest --workdir=runs/rest --init_from=runs/sft --reward.path=runs/rm
The best of 8 samples of each prompt (RAFT), with a forward KL to the start (SuperHF):
  --rest.keep=best --rest.quantiles=0 --grow_steps=3
  --rest.keep=best --rest.quantiles=0 --grow_steps=3 --rest.kappa=0.3
Your model and prompts, on the samples that a Python function of rlhf_jax/rewards/functions.py
finds right (ReST-EM):
  python -m experiments.rest --workdir=runs/rest --init_from=FOLDER --data.path=PROMPTS.jsonl \
    --reward.name=exact_answer --rest.keep=threshold --rest.quantiles=0.5

Each Grow step samples `--sampling.samples_per_prompt` responses to `--prompts` prompts and scores
them once, into `workdir/grow_0/responses.jsonl`. Each Improve step, one per `--rest.quantiles`,
fine-tunes on those above its threshold, as a run of its own in `workdir/grow_0_improve_0` and on.
`metrics.jsonl` has a line per Improve step and `plots/quality.png` shows what was kept.

The default learning rate suits the built-in task; a pretrained model wants about 1e-5.
Starting the same command again continues where it was stopped; no scored sample is lost.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np

from experiments import records
from experiments.lab import evaluating, judges, line_files, models, training
from rlhf_jax import data, entry, flags, generation, loop, plots, processes, reporting, sharding
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.algorithms import rest
from rlhf_jax.algorithms.rest import RestConfig
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.rewards import RewardFn
from rlhf_jax.train_step import OptimConfig, make_schedule

_GROWN = "responses.jsonl"


@dataclasses.dataclass(frozen=True)
class Config(loop.RunConfig):
  """ReST. `steps` and `batch_size` are those of each Improve step.

  Attributes:
    grow_steps: How often new responses are sampled.
    prompts: Prompts of each Grow step, every time other ones while there are any.
    learning_rate_decay: What the learning rate is multiplied by after each Improve step of a Grow
      step.
    missing_eos_penalty: Taken off the reward of a response that was cut at the longest length.
  """

  steps: int = 60
  batch_size: int = 32
  log_every: int = 10
  grow_steps: int = 2
  prompts: int = 512
  learning_rate_decay: float = 0.7
  missing_eos_penalty: float = 1.0
  model: models.ModelOptions = models.ModelOptions()
  lora: LoRAConfig = LoRAConfig()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(max_new_tokens=40, samples_per_prompt=8)
  reward: judges.RewardOptions = judges.RewardOptions()
  rest: RestConfig = RestConfig()
  optim: OptimConfig = OptimConfig(learning_rate=5e-4)

  def __post_init__(self):
    super().__post_init__()
    training.require_random(self.sampling)
    for name in ("grow_steps", "prompts"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
    if self.rest.keep != "threshold" and self.sampling.samples_per_prompt < 2:
      raise ValueError(
        f"sampling.samples_per_prompt must be at least 2 for rest.keep={self.rest.keep}"
      )
    candidates = self.prompts
    if self.rest.keep != "best":
      candidates *= self.sampling.samples_per_prompt
    fewest = int(candidates * (1 - self.rest.quantiles[-1]))
    if fewest < self.batch_size:
      raise ValueError(
        f"batch_size {self.batch_size} is larger than the {fewest} responses that the last of"
        " rest.quantiles keeps; raise prompts, or lower one of the two"
      )
    if not 0 < self.learning_rate_decay <= 1:
      raise ValueError(f"learning_rate_decay must be in (0, 1], got {self.learning_rate_decay}")


def train(session: loop.Session, config: Config) -> dict[str, float]:
  """Runs the steps that have not finished, exports the last policy; returns summary.json."""
  config.reward.require()
  folder = models.source_folder(config.model, config.init_from)
  if folder is None:
    raise flags.UsageError("--init_from is needed: a policy that nothing has trained samples noise")
  tokenizer = models.open_tokenizer(folder, config.data.end_token)
  train_set, heldout = data.load("prompts", config.data, tokenizer, seed=session.seed)
  workdir = workdir_lib.local_path(session.workdir)
  if not jax.config.jax_compilation_cache_dir:
    # Every step runs the programs of the one before, as a run of its own.
    jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
  rows: list[dict[str, float]] = []
  start = folder
  for g in range(config.grow_steps):
    grown = workdir / f"grow_{g}"
    some = take_prompts(train_set, g, config.prompts)
    own = dataclasses.replace(session, workdir=str(grown), seed=session.seed * 1000 + 100 * g)
    responses = grow(own, config, start, tokenizer, some)
    rewards = np.asarray([row["reward"] for row in responses]).reshape(len(some.examples), -1)
    for i, quantile in enumerate(config.rest.quantiles):
      weights = rest.kept_weights(rewards, quantile, config.rest)
      kept = weights > 0
      if np.sum(kept) < config.batch_size:
        raise flags.UsageError(
          f"{grown / _GROWN}: {np.sum(kept)} responses lie above quantile {quantile} with"
          f" --rest.keep={config.rest.keep}, fewer than --batch_size={config.batch_size}; raise"
          " --prompts"
        )
      stage = workdir / f"grow_{g}_improve_{i}"
      own = dataclasses.replace(
        session, workdir=str(stage), seed=session.seed * 1000 + 100 * g + i + 1
      )
      after = improve(
        own,
        config,
        i,
        start,
        folder,
        tokenizer,
        kept_examples(responses, weights.ravel()),
        heldout,
      )
      rows.append(
        {
          "grown_reward/mean": float(np.mean(rewards)),
          "kept_reward/mean": float(np.mean(rewards[kept])),
          "kept_reward/min": float(np.min(rewards[kept])),
          "kept_share": float(np.mean(kept)),
          **{f"eval/{name}": value for name, value in after.items() if name != "responses"},
        }
      )
      start = stage / models.EXPORT
  with loop.open_run(session) as run:
    records.identify(run, "rest", config, tokenizer, train_set, heldout)
    run.writer.open(resume_step=0, config=loop.hyperparameters(run, config))
    for step, row in enumerate(rows):
      run.writer.write(step + 1, row)
    draw(workdir, rows, len(config.rest.quantiles))
    model, ref_params = models.open_model(run, config.model, folder, tokenizer)
    _, params = models.open_model(run, config.model, start, tokenizer)
    reward_fns = {
      "reward": judges.open_reward(run, config.reward, config.model, tokenizer)(heldout)
    }
    reward_fns |= judges.gold_rewards(config.data, heldout, tokenizer)
    judge = evaluating.Judge(
      run, model, tokenizer, heldout, config.sampling, reward_fns, ref_params
    )
    return judge.finish(
      params, len(rows), "ReST", {"kept_reward/mean": rows[-1]["kept_reward/mean"]}
    )


def take_prompts(dataset: data.Dataset, step: int, count: int) -> data.Dataset:
  """The prompts of a Grow step: the next `count`, from the front again after the last."""
  size = len(dataset.examples)
  chosen = [(step * count + i) % size for i in range(min(count, size))]
  return dataset._replace(
    examples=[dataset.examples[i] for i in chosen], rows=[dataset.rows[i] for i in chosen]
  )


def grow(
  session: loop.Session,
  config: Config,
  start: pathlib.Path,
  tokenizer: data.Tokenizer,
  prompts: data.Dataset,
) -> list[dict[str, Any]]:
  """Samples and scores what has not been yet, appended to a file; returns all of it, in order.

  A line is written whole or, if the process was killed, dropped and written again; the samples of
  a prompt depend on its number alone, so the others need not be drawn again.
  """
  count = config.sampling.samples_per_prompt
  wanted = len(prompts.examples) * count
  with loop.open_run(session) as run:
    settings = {
      name: flags.to_dict(config)[name] for name in ("sampling", "reward", "missing_eos_penalty")
    }
    loop.identify(
      run, "grow", settings | {"start": str(start)}, data=prompts.digest, tokenizer=tokenizer.digest
    )
    path = run.workdir / _GROWN
    done = line_files.read_lines(path)
    if len(done) >= wanted:
      return done
    model, params = models.open_model(run, config.model, start, tokenizer)
    stops = (tokenizer.eos_id,)
    params = sharding.make_reshard(run.mesh, model.config.dtype)(params)
    generate = models.make_sampler(model, tokenizer, config.sampling)
    reward_fn: RewardFn = judges.open_reward(run, config.reward, config.model, tokenizer)(prompts)
    batch_size = evaluating.heldout_batch_size(run, prompts, max(128 // count, 1))
    key = run.key_for(0)
    if done:
      reporting.note(f"continuing from response {len(done)} of {path}")
    with reporting.Progress(wanted, len(done), "grow") as progress:
      position = 0
      for batch, valid in data.eval_batches(prompts, batch_size, tokenizer.pad_id):
        size = int(np.sum(valid)) * count
        position += size
        if position <= len(done):
          continue
        placed = sharding.place_batch(batch, run.mesh)
        rollout = generate(params, placed.tokens, placed.mask, placed.prompt_id, key)
        ids = np.repeat(batch.prompt_id, count)
        scores, ended, tokens, mask = sharding.to_host(
          (
            reward_fn(rollout, ids),
            generation.ended(rollout, stops),
            rollout.tokens,
            rollout.response_mask,
          )
        )
        answers = [row[on].tolist() for row, on in zip(tokens, mask, strict=True)]
        texts = tokenizer.batch_decode(answers)
        lines = [
          {
            "prompt": prompts.rows[ids[n]]["prompt_text"],
            "response": texts[n],
            "reward": float(scores[n]) - config.missing_eos_penalty * (not ended[n]),
            "ended": bool(ended[n]),
            "sample": n % count,
            "prompt_tokens": prompts.examples[ids[n]]["prompt"].tolist(),
            "tokens": answers[n],
          }
          for n in range(size)
        ][len(done) - position + size :]
        line_files.append_lines(path, lines)
        done += lines
        progress.update(len(done), {"reward/mean": np.mean([line["reward"] for line in lines])})
    rewards = [row["reward"] for row in done]
    reporting.write_summary(
      run.workdir, {"responses": len(done), "reward/mean": float(np.mean(rewards))}
    )
  return done


def kept_examples(
  responses: list[dict[str, Any]], weights: np.ndarray
) -> tuple[data.Dataset, np.ndarray]:
  """The grown responses of positive weight as demonstrations, and their weights."""
  places = np.flatnonzero(weights > 0)
  examples = [
    {
      "prompt": np.asarray(responses[i]["prompt_tokens"], np.int32),
      "response": np.asarray(responses[i]["tokens"], np.int32),
    }
    for i in places
  ]
  rows = [{"prompt_text": responses[i]["prompt"], **responses[i]} for i in places]
  return data.from_examples("demonstrations", examples, rows), weights[places].astype(np.float32)


def improve(
  session: loop.Session,
  config: Config,
  index: int,
  start: pathlib.Path,
  ref_folder: pathlib.Path,
  tokenizer: data.Tokenizer,
  kept: tuple[data.Dataset, np.ndarray],
  heldout: data.Dataset,
) -> dict[str, float]:
  """Fine-tunes `start` on the kept responses; exports it and returns its held-out rewards."""
  dataset, weights = kept
  path = workdir_lib.local_path(session.workdir) / "summary.json"
  read = lambda: json.loads(path.read_text()) if path.exists() else None  # noqa: E731
  with loop.open_run(session) as run:
    records.identify(
      run,
      "improve",
      config,
      tokenizer,
      dataset,
      heldout,
      more={"improve": index, "start": str(start)},
      **models.frozen_digest(config.lora, start),
    )
    if (finished := processes.agree(read)) is not None:
      return finished
    model, params = models.open_model(run, config.model, start, tokenizer)
    ref_params = params
    if config.rest.kappa:
      _, ref_params = models.open_model(run, config.model, ref_folder, tokenizer)
    rate = config.optim.learning_rate * config.learning_rate_decay**index
    optim = dataclasses.replace(config.optim, learning_rate=rate)
    slower = dataclasses.replace(config, optim=optim)
    make_step = functools.partial(rest.make_rest_step, ref_apply_fn=model.apply)
    trainer = training.make_trainer(run, slower, model, params, make_step, config.rest)
    state = trainer.state
    training.describe(
      run,
      f"Improve {index}",
      model,
      state,
      {"data": f"{len(dataset.examples)} kept responses"},
      frozen=trainer.frozen,
    )
    state = loop.fit(
      run,
      config,
      lambda state, batch, key: trainer.step(state, rest.RestBatch(*batch), ref_params, key),
      state,
      data.batches(
        dataset, config.batch_size, seed=session.seed, pad_id=tokenizer.pad_id, columns=weights
      ),
      learning_rate=make_schedule(optim, config.steps),
      title="improve",
    )
    params = trainer.params(state)
    models.export(run.workdir / models.EXPORT, params, model, tokenizer)
    summary = {"responses": float(len(dataset.examples))}
    if heldout.examples:
      reward_fns = {
        "reward": judges.open_reward(run, config.reward, config.model, tokenizer)(heldout)
      }
      reward_fns |= judges.gold_rewards(config.data, heldout, tokenizer)
      sample = evaluating.heldout_sampler(
        run, model, heldout, tokenizer, config.sampling, reward_fns=reward_fns
      )
      summary |= {f"{name}/mean": float(np.mean(r)) for name, r in sample(params).rewards.items()}
    training.finish(run, summary)
  return processes.agree(read)


def draw(workdir: pathlib.Path, rows: list[dict[str, float]], improve_steps: int) -> None:
  """`plots/quality.png`: what was grown and kept, and what the policy earns after each step."""
  steps = np.arange(1, len(rows) + 1)

  def line(label: str, name: str) -> plots.Line:
    return plots.Line(label, steps, np.asarray([row[name] for row in rows]))

  quality = [line("Grown", "grown_reward/mean"), line("Kept", "kept_reward/mean")]
  if "eval/reward/mean" in rows[0]:
    quality.append(line("Policy after the step (held out)", "eval/reward/mean"))
  xlabel = f"Improve step ({improve_steps} per Grow step)"
  plots.save_chart(
    workdir / "plots" / "quality.png",
    plots.Chart("Quality of the data", xlabel, "Mean reward", lines=quality),
    plots.Chart(
      "Share of the grown responses that was kept",
      xlabel,
      "Share",
      lines=[line("Kept", "kept_share")],
    ),
  )


if __name__ == "__main__":
  entry.run_script(train, loop.Session, Config)
