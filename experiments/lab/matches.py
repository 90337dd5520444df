"""Matches of a policy and an opponent: both answer the same prompts, and a judge compares them."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import data, generation, preflight, rewards, sharding
from rlhf_jax.algorithms import opponents, reading
from rlhf_jax.types import Params, Rollout, TrainState
from . import judges
from .case import Case
from .training import Trainer
from .workbench import Workbench


class MatchState(NamedTuple):
  """State of an iteration.

  Attributes:
    train: Policy with its optimizer.
    average: Moving average of the policy, if it is the opponent; else None.
  """

  train: TrainState
  average: Params | None


class Match:
  """Samples responses of a policy and of its opponent, and has a judge compare them.

  Args:
    bench: Workbench of the script, with `sampling` in its config.
    prefer: Preference between responses to the training prompts.
    settings: Settings of the method.
    count: Number of responses of the policy per prompt.
    mixed: True if the responses of the policy are sampled from the mixture too.
  """

  def __init__(
    self,
    bench: Workbench,
    prefer: rewards.PreferenceFn | None,
    settings: opponents.OpponentConfig,
    *,
    count: int,
    mixed: bool = False,
  ):
    self._bench, self._prefer, self._settings = bench, prefer, settings
    self._gold = bench.gold(bench.train_set) if prefer else {}
    self._watch = judges.watch(prefer)
    self.count, self.mixed = count, mixed
    self.reshard = bench.reshard()
    self.sample = bench.sampler(mixture=mixed, samples_per_prompt=count)
    self.sample_opponent = bench.sampler(mixture=True, samples_per_prompt=1)
    read = reading.make_read(bench.model.apply, bench.config.sampling.temperature)
    self.ref_logprobs: Callable[[Params, Rollout], jax.Array] = jax.jit(
      lambda params, rollout: read(params, rollout).logprobs
    )

  def __call__(
    self,
    policy: Params,
    opponent: Params | None,
    prompts: data.PromptBatch,
    key: jax.Array,
    *,
    mix: jax.typing.ArrayLike,
    tau: jax.typing.ArrayLike,
  ) -> tuple[opponents.OpponentBatch, dict[str, Any]]:
    """Returns judged responses of the policy, and metrics.

    Args:
      policy: Params of the policy.
      opponent: Params that are mixed with the initial policy; None is the policy.
      prompts: Prompts of a batch.
      key: Random key.
      mix: [] weight of the initial policy in the opponent.
      tau: [] weight of the KL penalty.
    """
    bench, mix, keys = self._bench, jnp.asarray(mix), jax.random.split(key)
    jax.block_until_ready((policy, opponent))  # The update before is timed apart.
    start = time.monotonic()
    policy, ref = self.reshard(policy), self.reshard(bench.start)
    rival = policy if opponent is None else self.reshard(opponent)
    source = generation.MixtureParams(policy, ref, mix) if self.mixed else policy
    sampled = self.sample(source, *prompts, keys[0])
    other = self.sample_opponent(generation.MixtureParams(rival, ref, mix), *prompts, keys[1])
    del policy, ref, rival, source  # Room for the update.
    other = jax.tree.map(lambda x: jnp.repeat(x, self.count, axis=0), other)
    sampled, other = jax.block_until_ready((sampled, other))
    between = time.monotonic()
    ids = np.repeat(sharding.to_host(prompts.prompt_id), self.count)
    assert self._prefer is not None
    preference = self._prefer(sampled, other, ids)
    self._watch.check(preference)
    preference, usable = jnp.asarray(preference), jnp.isfinite(jnp.asarray(preference))
    judged, cut = time.monotonic(), ~bench.ended(sampled)
    rows = (prompts.tokens.shape[0], self.count)
    batch = opponents.OpponentBatch(
      rollout=jax.tree.map(lambda x: x.reshape(*rows, *x.shape[1:]), sampled),
      ref_logprobs=self.ref_logprobs(bench.start, sampled).reshape(*rows, -1),
      preference=(preference - self._settings.missing_eos_penalty * cut).reshape(rows),
      tau=jnp.full([rows[0]], tau, jnp.float32),
    )
    return batch, {
      "preference/mean": jnp.mean(preference, where=usable),
      "preference/nonfinite": jnp.sum(~usable).astype(jnp.float32),
      "eos_fraction": 1 - jnp.mean(cut),
      **bench.usage(sampled),
      **judges.mean_rewards(self._gold, sampled, ids),
      "time/generate": between - start,
      "time/preference": judged - between,
      "mix": mix,
      "tau": tau,
    }


def programs(case: Case, match: Match, trainer: Trainer) -> None:
  """Checks the programs of an iteration: both rollouts, preference, reference, update."""
  config, bench = case.config, case.bench
  held = {"state": trainer.state, "reference": bench.start}
  judge, held["preference"] = case.open_judge(config.preference)
  policy, ref = (
    case.check(f"reshard{name}", match.reshard, params, held=held)
    for name, params in (("", trainer.params(trainer.state)), (" reference", bench.start))
  )
  mix = sharding.put(np.float32(0.5), sharding.replicated(bench.run.mesh))
  mixture = generation.MixtureParams(policy, ref, mix)
  inputs, copies = (*case.prompts(), case.key), (held, policy, ref)
  sampled = case.check(
    "rollout",
    match.sample,
    mixture if match.mixed else policy,
    *inputs,
    work=case.sampling_work(match.count),
    held=copies,
  )
  one = case.sampling_work(1)
  both = preflight.Work(2 * one.flops, one.steps, 2 * one.bytes_per_step)
  case.check("opponent", match.sample_opponent, mixture, *inputs, work=both, held=(copies, sampled))
  rows, length = sampled.tokens.shape
  if judge is not None:
    prefer = rewards.make_preferrer(judge.apply, bench.tokenizer.stop_ids)
    joined = length + config.sampling.max_new_tokens
    work = preflight.Work(case.forward(judge, 2 * rows, joined))
    case.check("preference", prefer, held["preference"], sampled, sampled, work=work, held=held)
  forward = case.forward(bench.model, rows, length, scored=config.sampling.max_new_tokens + 1)
  work = preflight.Work(forward)
  refs = case.check("reference", match.ref_logprobs, bench.start, sampled, work=work, held=held)
  split = lambda x: x.reshape(config.batch_size, match.count, *x.shape[1:])  # noqa: E731
  batch = opponents.OpponentBatch(
    rollout=case.placed(lambda rollout: jax.tree.map(split, rollout), sampled),
    ref_logprobs=case.placed(split, refs),
    preference=case.column(match.count),
    tau=case.column(),
  )
  inputs, work = (trainer.state, batch, case.key), case.training_work(forward)
  case.check("train", trainer.step, *inputs, work=work, held=held)
