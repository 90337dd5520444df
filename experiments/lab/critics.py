"""Critics of actor-critic methods."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.lab import models, training
from experiments.lab.workbench import Workbench
from rlhf_jax.algorithms import epochs
from rlhf_jax.models import actor_critic, shared_actor_critic, zero_scores
from rlhf_jax.types import Params


class Actor(NamedTuple):
  """A policy with a critic.

  Attributes:
    apply: `(params, tokens, *, segment_ids, last) -> (logits, values)`.
    params: `{"policy": ..., "value": ...}`, adapters among them.
  """

  apply: Callable[..., Any]
  params: Params


def open_actor(bench: Workbench, *, share_trunk: bool = False) -> Actor:
  """Opens a critic beside the policy.

  It starts as the reward model, or else as the policy with a head of zeros.

  Args:
    bench: Table of the script, with `reward` in its config.
    share_trunk: The critic is a head of zeros on the policy.
  """
  run, config = bench.run, bench.config
  policy = models.add_adapters(run, config.lora, bench.start)
  if share_trunk:
    both = models.build_model(run, config.model, bench.model.config, bench.tokenizer, "both")
    head = lambda key: zero_scores({"score": both.init(key)["score"]})  # noqa: E731
    value = models.create(run, head, run.key_for(1))
    return Actor(shared_actor_critic(both), {"policy": policy, "value": value})
  if config.reward.paths:
    path = config.reward.paths[0]
    critic, value = models.open_reward_model(run, path, config.model, bench.tokenizer)
  else:
    critic, value = models.open_model(run, config.model, bench.folder, bench.tokenizer, "scalar")
    value |= models.create(run, zero_scores, {"score": value["score"]})
  value = models.add_adapters(run, config.lora, value)
  return Actor(actor_critic(bench.model, critic), {"policy": policy, "value": value})


def make_trainer(
  bench: Workbench,
  actor: Actor,
  make_step: Callable[..., Any],
  updates: epochs.UpdateConfig,
  *,
  wait: int = 0,
) -> training.Trainer:
  """State and step of policy and critic, with the optimizers `optim` and `value_optim`.

  Args:
    bench: Table of the script.
    actor: Policy and critic.
    make_step: `(apply_fn, tx, *, packed, state_shardings) -> step`, a `make_x_step` with its
      config bound.
    updates: Division of a batch of sampled responses.
    wait: Steps of the script at the start that train the critic alone.
  """
  config = bench.config
  optimizer = training.actor_critic_optimizer(
    config.optim, config.value_optim, config.steps, updates.updates, wait=wait
  )
  return training.make_trainer(
    bench.run,
    actor.apply,
    actor.params,
    optimizer,
    functools.partial(make_step, temperature=config.sampling.temperature),
    updates=updates,
    packed_length=config.rollout.packed_length,
  )
