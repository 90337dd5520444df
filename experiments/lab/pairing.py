"""Pairs of the policy's responses, for online DPO."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import preflight, rewards
from rlhf_jax.algorithms import dpo, online_dpo, pairs, picks, terms
from rlhf_jax.losses.reward import RunningMoments
from rlhf_jax.rewards import shaped
from rlhf_jax.train_step import make_train_step
from rlhf_jax.types import Params, Rollout
from .case import Case
from .responses import Responses, part_metrics
from .training import Trainer
from .workbench import Workbench


def make_trainer(bench: Workbench) -> Trainer:
  """Builds the state and the step of the policy, with the value bonus if `bonus_coef` is not 0."""
  config = bench.config
  if not config.online.bonus_coef:
    make_step = functools.partial(dpo.make_dpo_step, config=config.dpo, weighting=config.pairs)
    return bench.trainer(make_step)

  def make_bonus_step(apply_fn: Any, tx: Any, state_shardings: Any):
    read = pairs.make_read_pairs(apply_fn, config.pairs)
    loss = terms.with_term(
      functools.partial(dpo.loss_fn, read=read, config=config.dpo),
      terms.make_value_bonus(apply_fn),
      config.online.bonus_coef,
      "loss/bonus",
    )
    microbatches = config.dpo.microbatches
    return make_train_step(loss, tx, microbatches=microbatches, state_shardings=state_shardings)

  return bench.trainer(make_bonus_step)


def make_batch(bench: Workbench) -> Callable[..., Any]:
  """Builds jitted `(ref_params, moments, responses, calibration, key)` of a batch.

  It returns `(batch, moments, metrics)`. `calibration` is a rollout of the reference for the value
  bonus, or None.
  """
  config, samples = bench.config, bench.config.sampling.samples_per_prompt
  read = pairs.make_read_pairs(bench.model.apply, config.pairs)

  @jax.jit
  def batch_of(
    ref_params: Params,
    moments: RunningMoments,
    responses: Responses,
    calibration: Rollout | None,
    key: jax.Array,
  ):
    rollout, raw, ended, ref_scores, tokens, satisfied = responses
    scores, moments = shaped.shape(raw, ended, moments, config.shaping, ref_scores)
    scores, raw = (jnp.asarray(rewards.total(rewards.Parts(x, tokens))) for x in (scores, raw))
    scores = scores.reshape(-1, samples)
    verdicts = None if satisfied is None else satisfied.reshape(-1, samples)
    chosen, rejected = picks.pick_pairs(scores, key, config.online.pick, verdicts)
    rows = online_dpo.make_pairs(rollout, chosen, rejected)
    batch: Any = dpo.DPOBatch(rows, read(ref_params, rows).totals)
    if calibration is not None:
      batch = terms.WithSequences(batch, online_dpo.right_padded(calibration))
    lengths = jnp.sum(rollout.response_mask, axis=1)
    usable = jnp.isfinite(raw)
    groups = usable.reshape(-1, samples)
    spread = jnp.std(jnp.where(groups, raw.reshape(-1, samples), 0.0), axis=1, where=groups)
    return (
      batch,
      moments,
      {
        "reward/mean": jnp.mean(raw, where=usable),
        "reward/std": jnp.mean(spread, where=groups.any(axis=1)),
        "reward/nonfinite": jnp.sum(~usable).astype(jnp.float32),
        **part_metrics(rewards.Parts(raw, tokens, satisfied)),
        "ties": jnp.mean(chosen == rejected),
        "eos_fraction": jnp.mean(ended),
        "response_length/mean": jnp.mean(lengths),
      },
    )

  return batch_of


def programs(case: Case) -> None:
  """Checks the programs of an iteration: rollout, reward, pairs, update."""
  config, bench = case.config, case.bench
  trainer = make_trainer(bench)
  held = {"state": trainer.state, "reference": bench.start}
  judge, held["reward"] = case.open_judge(config.judge)
  policy, samples = trainer.params(trainer.state), config.sampling.samples_per_prompt
  rollout = case.rollout("rollout", bench.sampler(), policy, held, samples)
  calibration = None
  if config.online.bonus_coef:
    sampler = bench.sampler(samples_per_prompt=1)
    calibration = case.rollout("bonus", sampler, bench.start, held, 1, "reshard reference")
  scores, ended = case.scores(rollout, judge, held), case.bools(rollout)
  length = rollout.tokens.shape[1]
  forward = case.forward(bench.model, 2 * config.batch_size, length, scored=length)
  responses = Responses(rollout, scores, ended)
  inputs = (bench.start, case.carried(RunningMoments.zero()), responses, calibration, case.key)
  work = preflight.Work(forward)
  batch, _, _ = case.check("pairs", make_batch(bench), *inputs, work=work, held=held)
  inputs, work = (trainer.state, batch, case.key), case.training_work(forward)
  case.check("train", trainer.step, *inputs, work=work, held=held)
