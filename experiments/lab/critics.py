"""Critics of actor-critic methods: opening one, and training it beside its policy."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from rlhf_jax import defaults, ranges, writers
from rlhf_jax.algorithms import epochs
from rlhf_jax.models import ModelConfig, actor_critic, shared_actor_critic, zero_scores
from rlhf_jax.types import Params
from . import judges, models, training
from .workbench import Workbench

EXPLAINED = "value/explained_variance"


@dataclasses.dataclass(frozen=True)
class CriticOptions:
  """Critic. It starts as the reward model, or as the policy with a head of zeros.

  The latter is without a reward model, or with one whose tokenizer is not that of the policy. A
  critic of normalised returns is the reward model with a head of zeros.

  Attributes:
    learning_rate: Learning rate of the critic, constant after the warm-up. The other settings of
      its optimizer are those of `optim`.
    share_trunk: Critic as a head on the policy, not as a separate model. It takes no extra memory,
      but its loss also updates the policy.
    warmup: Number of first steps that train only the critic.
  """

  learning_rate: float = defaults.rate(1e-3, 1e-5)
  share_trunk: bool = False
  warmup: int = 0

  def __post_init__(self):
    ranges.check(self, positive=("learning_rate",), non_negative=("warmup",))

  def adapted(self, reward: judges.RewardOptions) -> tuple[str, ...]:
    """Returns the folders of the models that get adapters besides the policy."""
    return () if self.share_trunk else reward.paths[:1]


class Actor(NamedTuple):
  """Policy with a critic.

  Attributes:
    apply: `(params, tokens, *, segment_ids, last) -> (logits, values)`.
    params: `{"policy": ..., "value": ...}`, with their adapters; the trainer takes over all but
      those of the reference.
    critic: Architecture of a critic with a model of its own; None if it shares that of the policy.
  """

  apply: Callable[..., Any]
  params: Params
  critic: ModelConfig | None = None


def first_explained(bench: Workbench) -> dict[str, float]:
  """Explained variance of the critic when the policy is first updated, after the warm-up."""
  rows = writers.read_metrics(bench.run.workdir / "metrics.jsonl")
  after = [row for row in rows if row["step"] > bench.config.critic.warmup]
  values = [row[EXPLAINED] for row in after if EXPLAINED in row]
  return {f"{EXPLAINED}/first": values[0]} if values else {}


def open_actor(bench: Workbench, *, normalized: bool = False) -> Actor:
  """Opens the critic of `config.critic` for the policy of a workbench; see `CriticOptions`.

  Args:
    bench: Workbench of the script.
    normalized: True for a critic of normalised returns, in whose units no reward model scores.
  """
  run, config = bench.run, bench.config
  policy, frozen = bench.trained(), config.lora.rank > 0
  if config.critic.share_trunk:
    both = models.build_model(run, config.model, bench.model.config, bench.tokenizer, "both")
    head = lambda key: zero_scores({"score": both.init(key)["score"]})  # noqa: E731
    value = models.create(run, head, run.key_for(1))
    return Actor(shared_actor_critic(both), {"policy": policy, "value": value})
  path = next(iter(config.reward.paths), "")
  scored = path and models.reads_tokens_of(path, bench.tokenizer)
  if scored:
    critic, value, *_ = models.open_reward_model(
      run, path, config.model, bench.tokenizer, frozen=frozen
    )
  else:
    critic, value = models.open_model(
      run, config.model, bench.folder, bench.tokenizer, "scalar", frozen=frozen
    )
  if normalized or not scored:
    value = value | models.create(run, zero_scores, {"score": value["score"]})
  value = models.add_adapters(run, config.lora, value)
  params = {"policy": policy, "value": value}
  return Actor(actor_critic(bench.model, critic), params, critic.config)


def make_trainer(
  bench: Workbench,
  actor: Actor,
  make_step: Callable[..., Any],
  updates: epochs.UpdateConfig,
) -> training.Trainer:
  """Builds the state and the step of policy and critic, with an optimizer for each.

  Args:
    bench: Workbench of the script.
    actor: Policy and critic.
    make_step: `(apply_fn, tx, *, packed, state_shardings) -> step`, a `make_x_step` with its
      config bound.
    updates: Division of a batch of sampled responses.
  """
  config = bench.config
  value = dataclasses.replace(
    config.optim, learning_rate=config.critic.learning_rate, schedule="constant"
  )
  optimizer = training.actor_critic_optimizer(
    config.optim, value, config.steps, updates.updates, wait=config.critic.warmup
  )
  return training.make_trainer(
    bench.run,
    actor.apply,
    actor.params,
    optimizer,
    functools.partial(make_step, temperature=config.sampling.temperature),
    given=(bench.initial, actor.params["value"]),
    updates=updates,
    packed_length=config.rollout.packed_length,
    flops=bench.flops(updates, critic=actor.critic),
  )
