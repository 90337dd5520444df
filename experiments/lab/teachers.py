"""Teacher of a student: how it is opened, how it answers, and the programs of a distillation."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import data, preflight, sharding
from rlhf_jax.models import Model, hf
from rlhf_jax.types import Params, Rollout
from . import evaluating, judges, models
from .case import Case
from .training import Trainer
from .workbench import Workbench


class Teacher(NamedTuple):
  """Model to learn from, of any size."""

  model: Model
  params: Params


def open_teacher(bench: Workbench) -> Teacher:
  """Opens the model of `config.teacher`, which must have the vocabulary of the student.

  For `experiments.compile`, which may be given none, it has the architecture of the student.
  """
  path, options = bench.config.teacher, bench.config.model
  if not path:
    return Teacher(
      *models.open_model(bench.run, options, bench.folder, bench.tokenizer, frozen=True)
    )
  folder = models.finished_folder(path)
  if hf.parse_config(folder)[1] != "language":
    raise hf.ModelFolderError(f"{path}: not a language model, and a teacher must be one")
  if models.tokenizer_of(folder).vocabulary != bench.tokenizer.vocabulary:
    raise hf.ModelFolderError(
      f"{path}: its vocabulary is not that of the student, so that their distributions of the next"
      " token cannot be compared; choose a teacher of the same family, or fine-tune the student on"
      " its answers: experiments.generate, then experiments.sft"
    )
  return Teacher(*models.open_model(bench.run, options, folder, bench.tokenizer, frozen=True))


def make_sampler(bench: Workbench, teacher: Teacher) -> tuple[Callable[..., Any], ...]:
  """Returns `reshard(params)` and `sample(params, tokens, mask, prompt_id, key)` of the teacher."""
  sample = models.make_sampler(teacher.model, bench.tokenizer, bench.config.sampling)
  reshard = sharding.make_reshard(bench.run.mesh, teacher.model.config.dtype)
  return reshard, models.with_distinct_ids(sample, bench.run.mesh)


def make_respond(
  bench: Workbench, teacher: Teacher
) -> Callable[..., tuple[Rollout, dict[str, Any]]]:
  """Builds `respond(params, prompts, step, key) -> (rollout, metrics)`, by student or teacher.

  Either one answers all prompts of a batch, the student with probability `gkd.student_share`:
  algorithm 1 of https://arxiv.org/abs/2306.13649.
  """
  student = bench.reshard(), bench.sampler()
  other, gold = make_sampler(bench, teacher), bench.gold(bench.train_set)

  def respond(params: Params, prompts: data.PromptBatch, step: jax.Array, key: jax.Array):
    draw_key, key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 1), step))
    is_student = float(jax.random.uniform(draw_key)) < bench.config.gkd.student_share
    reshard, sample = student if is_student else other
    jax.block_until_ready(params)  # The update before is timed apart.
    start = time.monotonic()
    rollout = sample(reshard(params if is_student else teacher.params), *prompts, key)
    jax.block_until_ready(rollout)
    sampled = time.monotonic()
    samples = bench.config.sampling.samples_per_prompt
    ids = np.repeat(sharding.to_host(prompts.prompt_id), samples)
    means = judges.mean_rewards(gold, rollout, ids)
    scored = time.monotonic()
    lengths = rollout.response_mask.sum(axis=1)
    return rollout, {
      **(means if is_student else dict.fromkeys(means, np.nan)),
      "student_share": float(is_student),
      "response_length/mean": lengths.astype(np.float32).mean(),
      "eos_fraction": bench.ended(rollout).astype(np.float32).mean(),
      **bench.usage(rollout),
      "time/generate": sampled - start,
      "time/reward": scored - sampled,
    }

  return respond


def heldout_rewards(bench: Workbench, teacher: Teacher) -> dict[str, float]:
  """Returns the mean rewards of the teacher on the held-out prompts, as far as any are known."""
  fns = bench.gold(bench.heldout)
  if not (fns and bench.heldout.examples):
    return {}
  sample = evaluating.heldout_sampler(
    bench.run,
    teacher.model,
    bench.heldout,
    bench.tokenizer,
    bench.config.sampling,
    reward_fns=fns,
  )
  found = sample(teacher.params, evaluating.BASELINE).rewards
  return {f"{name}/mean_teacher": float(np.nanmean(values)) for name, values in found.items()}


def programs(case: Case, teacher: Teacher, trainer: Trainer) -> None:
  """Checks the programs of an iteration: both rollouts, update."""
  config, bench, samples = case.config, case.bench, case.config.sampling.samples_per_prompt
  held = {"state": trainer.state, "teacher": teacher.params, "start": bench.start}
  rollout = case.rollout("rollout", bench.sampler(), trainer.params(trainer.state), held, samples)
  if config.gkd.student_share < 1:
    reshard, sample = make_sampler(bench, teacher)
    params = case.check("reshard teacher", reshard, teacher.params, held=held)
    new, mesh = config.sampling.max_new_tokens, bench.run.mesh
    rows, length = config.batch_size, case.prompt_length
    work = preflight.sampling(teacher.model.config, mesh, rows, samples, length, new)
    inputs = (*case.prompts(), case.key)
    case.check("rollout teacher", sample, params, *inputs, work=work, held=(held, params))
  forward, taught = (
    case.forward(of, *rollout.tokens.shape, scored=config.sampling.max_new_tokens + 1)
    for of in (bench.model, teacher.model)
  )
  work = preflight.Work(case.training_work(forward).flops + taught)
  inputs = (trainer.state, rollout, teacher.params, case.key)
  case.check("train", trainer.step, *inputs, work=work, held=held)
