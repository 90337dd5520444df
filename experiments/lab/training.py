"""State, optimizer, step and panel of a training script."""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from rlhf_jax import data, loop, plots, preflight, processes, reporting, sharding
from rlhf_jax.algorithms import epochs, reading
from rlhf_jax.models import Model, count_params, lora, quantized, round_matrices
from rlhf_jax.train_step import OptimConfig, freeze, init_state, join, make_optimizer, make_schedule
from rlhf_jax.types import Params, TrainState
from .. import records
from . import costs, models, scripts


class Trainer(NamedTuple):
  """State and step of a model in training.

  Attributes:
    state: State before the first step, in buffers that can be donated.
    step: `(state, ...) -> (state, metrics)`.
    frozen: Params that no step changes; they are not part of the state.
    learning_rate: `(step of the script) -> learning rate`.
  """

  state: TrainState
  step: Callable[..., Any]
  frozen: Params
  learning_rate: Callable[[int], Any]

  def params(self, state: TrainState, trained: Params | None = None) -> Params:
    """Returns the params of a state, or `trained` params, joined with the frozen params."""
    return join(self.frozen, state.params if trained is None else trained)


class Optimizer(NamedTuple):
  """Optax transformation, and its learning rate as a function of the step of the script."""

  tx: optax.GradientTransformation
  learning_rate: Callable[[int], Any]


def one_optimizer(config: OptimConfig, steps: int, updates_per_step: int = 1) -> Optimizer:
  """Builds the optimizer of all params.

  Args:
    config: Settings of the optimizer.
    steps: Steps of the script.
    updates_per_step: Optimizer steps per step of the script.
  """
  updates = steps * updates_per_step
  schedule = make_schedule(config, updates)
  return Optimizer(make_optimizer(config, updates), lambda step: schedule(step * updates_per_step))


def actor_critic_optimizer(
  policy: OptimConfig, value: OptimConfig, steps: int, updates_per_step: int, *, wait: int = 0
) -> Optimizer:
  """Builds the optimizer of params `{"policy": ..., "value": ...}`, with settings for each.

  Args:
    policy: Optimizer settings of the policy.
    value: Optimizer settings of the critic.
    steps: Steps of the script.
    updates_per_step: Optimizer steps per step of the script.
    wait: First steps of the script with a learning rate of 0 for the policy, whose params then stay
      bitwise the same.
  """
  updates, waiting = steps * updates_per_step, wait * updates_per_step
  schedule = optax.join_schedules(
    [optax.constant_schedule(0.0), make_schedule(policy, updates - waiting)], [waiting]
  )
  tx = optax.partition(
    {
      "policy": make_optimizer(policy, updates, schedule=schedule),
      "value": make_optimizer(value, updates),
    },
    lambda params: {name: jax.tree.map(lambda _, n=name: n, part) for name, part in params.items()},
  )
  return Optimizer(tx, lambda step: schedule(step * updates_per_step))


def make_trainer(
  run: loop.Run,
  apply_fn: Callable[..., Any],
  params: Params,
  optimizer: Optimizer,
  make_step: Callable[..., Callable[..., Any]],
  *,
  given: Params = (),
  updates: epochs.UpdateConfig | None = None,
  packed_length: int = 0,
  flops: Callable[..., float] | None = None,
) -> Trainer:
  """Places the state of a model on the mesh and builds its step.

  Args:
    run: Opened run.
    apply_fn: Function of all params.
    params: Initial params. If there are adapters among them, only the adapters are trained.
    optimizer: Optimizer of the trained params.
    make_step: `(apply_fn, tx, *, state_shardings) -> step`, a `make_x_step` with its config bound.
    given: Arrays among the params that the state takes over; it copies the others.
    updates: Division of a batch of sampled responses, for packing.
    packed_length: Tokens per packed row of sampled responses; 0 does not pack. With packing
      `make_step` also takes `packed`.
    flops: `(batch, *, packed) -> operations of a step`, for its metrics; None does not count them.
  """
  frozen, trained = lora.split(params)
  state = _init(run, trained, optimizer.tx, given)
  shardings = jax.tree.map(lambda x: x.sharding, state)

  def make(packed: reading.Packing | None = None) -> Callable[..., Any]:
    options = {} if packed is None else {"packed": packed}
    bound = functools.partial(make_step, tx=optimizer.tx, **options)
    step = freeze(bound, apply_fn, frozen, state_shardings=shardings)
    return step if flops is None else costs.Counted(step, functools.partial(flops, packed=packed))

  if not packed_length:
    step = make()
  elif sharding.is_absent(run.mesh):  # Compiled for the largest number of packed rows.
    step = make(reading.Packing(packed_length))
  else:
    assert updates is not None
    parts = sharding.row_parts(run.mesh)
    step = epochs.make_packed_step(make, updates, packed_length, multiple=parts)
  return Trainer(state, step, frozen, optimizer.learning_rate)


def _init(
  run: loop.Run, params: Params, tx: optax.GradientTransformation, given: Params
) -> TrainState:
  """Returns the state before the first step, in the buffers of `given` arrays and in new ones."""
  leaves, tree = jax.tree.flatten(params)
  taken = {id(leaf) for leaf in jax.tree.leaves(given)}
  is_given = [id(leaf) in taken for leaf in leaves]

  def init(kept: list[jax.Array], donated: list[jax.Array]) -> TrainState:
    sources = {True: iter(donated), False: iter(kept)}
    return init_state(jax.tree.unflatten(tree, [next(sources[of]) for of in is_given]), tx)

  parts = [[x for x, of in zip(leaves, is_given, strict=True) if of == on] for on in (False, True)]
  return models.create(run, init, *parts, donate=(1,))


def describe(
  run: loop.Run,
  title: str,
  model: Model,
  trainer: Trainer,
  rows: Mapping[str, object],
  idle: Mapping[str, Params] = types.MappingProxyType({}),
) -> None:
  """Shows the panel at the start of a run, with further rows.

  Args:
    run: Opened run.
    title: Title of the panel.
    model: Model that is trained.
    trainer: Trainer with the state.
    rows: Further rows.
    idle: Params, or their shapes, of models that are not trained, besides those of `trainer`.
  """
  state, frozen = trainer.state, trainer.frozen
  params = state.params
  config = model.config
  experts = ""
  if config.experts:
    experts = f" {config.experts} experts, {config.experts_per_token} per token,"
  mesh = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items() if size > 1)
  devices = f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
  if jax.process_count() > 1:
    devices += f" in {jax.process_count()} processes"
  reporting.start_panel(
    title,
    {
      "workdir": run.workdir,
      "model": f"{config.layers} layers, width {config.width}, {config.heads} heads,{experts}"
      f" vocabulary {config.vocab_size}, {config.dtype}",
      "parameters": reporting.human(count_params((params, frozen)))
      + (f", {reporting.human(count_params(params))} of them trained" if frozen else ""),
      "mesh": f"{devices}{' (' + mesh + ')' if mesh else ''}",
      "memory": memory_line(state, {"frozen": frozen, **idle}),
      **rows,
    },
  )


def memory_line(state: TrainState, idle: Params) -> str:
  """Memory of the state with its gradients, and of what is not trained, in words.

  Args:
    state: State of what is trained.
    idle: Nested dict of the arrays, or shapes, of what is not trained.
  """
  size = preflight.bytes_in_all
  trained = reporting.human_bytes(size((state, state.params)))
  line = f"{trained} for trained params, gradients and optimizer state"
  if size(idle):
    line += f", {reporting.human_bytes(size(idle))} for models that are not trained"
    ways, least = [], size(idle)
    for dtype in ("bfloat16", *quantized.FORMATS):
      less = size(jax.eval_shape(lambda tree, to=dtype: round_matrices(tree, to), idle))
      if less < least:
        ways.append(f"{reporting.human_bytes(less)} with --model.frozen_dtype={dtype}")
        least = less
    line += f" ({', '.join(ways)})" if ways else ""
  return f"{line}; activations not counted"


def step_tokens(config: Any, dataset: data.Dataset) -> str:
  """Tokens per batch and the share of padding among them, for the panel at the start."""
  packed = config.data.packed_length
  width = max(dataset.width, 1)
  tokens = config.batch_size * (width * packed if packed else dataset.batch_length)
  return f"{tokens}, {data.padding_fraction(dataset, config.batch_size, packed):.0%} padding"


def finish(
  run: loop.Run, tokenizer: data.Tokenizer, summary: Mapping[str, Any], *following: str
) -> None:
  """Ends a run after its export: writes plots, the model card and, last, summary.json.

  Args:
    run: Opened run.
    tokenizer: Tokenizer of the model.
    summary: Metrics of summary.json.
    *following: Script that may follow, and its flags; without them nothing is said of it.
  """
  plots.plot_metrics(run.workdir)
  card = run.workdir, run.workdir / models.EXPORT, tokenizer, summary
  processes.agree(lambda: records.write_card(*card))
  reporting.write_summary(run.workdir, summary)
  if following:
    script, *words = following
    reporting.note(f"model: {run.workdir / models.EXPORT}")
    reporting.note(f"next: {scripts.command(script, *words)}")


class Zipped:
  """Combines sources of batches into one source of tuples, with one state to save."""

  def __init__(self, *sources: Any):
    self._sources = sources

  def __next__(self) -> tuple[Any, ...]:
    return tuple(next(source) for source in self._sources)

  def get_state(self) -> list[Any]:
    return [source.get_state() for source in self._sources]

  def set_state(self, states: Sequence[Any]) -> None:
    for source, state in zip(self._sources, states, strict=True):
      source.set_state(state)
