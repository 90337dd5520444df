"""The Improve step of ReST: fine-tunes on the kept responses, in a separate run."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np

from rlhf_jax import data, flags, loop, preflight, processes
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.algorithms import rest
from rlhf_jax.models import quantized
from .. import records
from . import evaluating, judges, models, training
from .case import Case
from .workbench import Workbench, settle_steps


def check(config: Any) -> None:
  """Refuses what Improve steps cannot use; for `__post_init__` of the script's config."""
  for name in ("keep_best", "eval_every"):
    if value := getattr(config, name):
      raise ValueError(
        f"{name}={value} does not apply: each policy is evaluated at the end of its Improve step;"
        " leave it out"
      )
  if config.lora.rank and config.model.frozen_dtype in quantized.FORMATS:
    raise ValueError(
      f"model.frozen_dtype={config.model.frozen_dtype} does not go with lora.rank here: each"
      " Improve step starts from the last one, whose adapters would be rounded away; take bfloat16"
    )
  if config.reward.ensemble == "worst_group":
    raise ValueError(
      "reward.ensemble=worst_group chooses a group for each batch of a Grow step, and ReST compares"
      " the scores of all; take another one"
    )


def stage(
  session: loop.Session, workdir: pathlib.Path, *, grow: int, improve: int = -1
) -> loop.Session:
  """Makes the session of a Grow step, or of one of the Improve steps after it."""
  name = f"grow_{grow}" if improve < 0 else f"grow_{grow}_improve_{improve}"
  seed = (session.seed * 1000 + 100 * grow + improve + 1) % loop.SEEDS
  return dataclasses.replace(session, workdir=str(workdir / name), seed=seed)


def improve(
  session: loop.Session,
  config: Any,
  index: int,
  start: pathlib.Path,
  reference: pathlib.Path,
  tokenizer: data.Tokenizer,
  kept: tuple[data.Dataset, np.ndarray],
  heldout: data.Dataset,
  heldout_seed: int,
) -> dict[str, float]:
  """Fine-tunes `start` on the kept responses; exports it and returns its held-out rewards.

  Args:
    session: Workdir, seed and devices of the Improve step.
    config: Config of the script.
    index: Number of the Improve step after its Grow step.
    start: Folder of the policy to start from.
    reference: Folder of the reference policy, for the forward KL.
    tokenizer: Tokenizer of both policies.
    kept: Kept responses and their weights.
    heldout: Held-out prompts to evaluate on.
    heldout_seed: Seed of the responses to them, the same for all Improve steps of a run, so that
      these differ by little else than their params.
  """
  dataset, weights = kept
  config = dataclasses.replace(config)  # Each has steps of its own with --epochs.
  settle_steps(config, dataset)
  path = workdir_lib.local_path(session.workdir) / "summary.json"
  read = lambda: json.loads(path.read_text()) if path.exists() else None  # noqa: E731
  models.require_base(config.lora, start)
  extra = {"improve": index, "start": str(start)}
  with loop.open_run(session) as run:
    digests = models.digests(flags.flatten(flags.to_dict(config)) | extra)
    records.identify(
      run,
      "improve",
      config,
      tokenizer,
      dataset,
      heldout,
      extra=extra,
      # What follows is built on this many steps; other ones would be a different run.
      digests=digests | {"number of --steps": str(config.steps)},
    )
    if (finished := processes.agree(read)) is not None:
      return finished
    model, params = models.open_model(
      run, config.model, start, tokenizer, frozen=config.lora.rank > 0
    )
    ref_params = params
    if config.rest.kappa:
      _, ref_params = models.open_model(run, config.model, reference, tokenizer, frozen=True)
    rate = config.optim.learning_rate * config.learning_rate_decay**index
    slower = dataclasses.replace(
      config, optim=dataclasses.replace(config.optim, learning_rate=rate)
    )
    bench = Workbench(run, slower, tokenizer, dataset, heldout, model, params, start)
    trainer = make_trainer(bench)
    bench.describe(f"Improve {index}", trainer, data=f"{len(dataset.examples)} kept responses")
    state = loop.fit(
      run,
      config,
      lambda state, batch, key: trainer.step(state, rest.RestBatch(*batch), ref_params, key),
      trainer.state,
      bench.batches(columns=weights),
      learning_rate=trainer.learning_rate,
      title="improve",
    )
    params = trainer.params(state)
    bench.export(params)
    summary = {"responses": float(len(dataset.examples))}
    if heldout.examples:
      reward_of = judges.open_scores(run, config, tokenizer).reward_of
      seeded = run._replace(key=jax.random.key(heldout_seed))
      for prefix, of in evaluating.prefixed(heldout).items():
        fns = ({"reward": reward_of(of)} if reward_of else {}) | bench.gold(of)
        sample = evaluating.heldout_sampler(
          seeded, model, of, tokenizer, config.sampling, reward_fns=fns
        )
        summary |= {
          f"{prefix}/{name}/mean".removeprefix("eval/"): float(np.nanmean(r))
          for name, r in sample(params).rewards.items()
        }
    bench.finish(summary)
  return processes.agree(read)


def make_trainer(bench: Workbench) -> training.Trainer:
  """Builds the state and the step of the policy."""
  settings, model = bench.config.rest, bench.model
  make_step = functools.partial(rest.make_rest_step, config=settings, ref_apply_fn=model.apply)
  return bench.trainer(make_step, teacher=model if settings.kappa else None)


def programs(case: Case) -> None:
  """Checks a Grow step, then an Improve step, whose memory holds nothing of the Grow step."""
  config, bench = case.config, case.bench
  held = {"policy": bench.start}
  judge, held["reward"] = case.open_judge(config.judge)
  samples = config.sampling.samples_per_prompt
  rollout = case.rollout("grow", bench.sampler(), bench.start, held, samples)
  case.scores(rollout, judge, held)
  trainer = make_trainer(bench)
  length = case.prompt_length + config.sampling.max_new_tokens
  batch = rest.RestBatch(case.tokens(length), case.column())
  forward = case.forward(bench.model, config.batch_size, length, scored=length)
  reference = forward if config.rest.kappa else 0.0
  work = preflight.Work(case.training_work(forward).flops + reference)
  case.check("improve", trainer.step, trainer.state, batch, bench.start, case.key, work=work)
