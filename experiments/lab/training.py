"""State, step and start panel of a training script."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments import records
from experiments.lab import evaluating, judges, models
from rlhf_jax import data, flags, generation, loop, plots, processes, reporting
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.algorithms import reward_model
from rlhf_jax.models import Model, count_params, lora
from rlhf_jax.train_step import freeze, init_state, join, make_optimizer, make_schedule
from rlhf_jax.types import Metrics, Params, TrainState, TrainStep


def place_state(run: loop.Run, params: Params, tx: optax.GradientTransformation) -> TrainState:
  """Train state with buffers of its own, each moment sharded like its parameter."""
  return models.create(run, lambda params: init_state(params, tx), params)


class Trainer(NamedTuple):
  """What trains a model.

  Attributes:
    state: Before the first step, in buffers of its own.
    step: `(state, ...) -> (state, metrics)`.
    frozen: Params that no step changes, which the state lacks.
  """

  state: TrainState
  step: Callable[..., Any]
  frozen: Params

  def params(self, state: TrainState) -> Params:
    """The whole params of a state."""
    return join(self.frozen, state.params)


def make_trainer(
  run: loop.Run,
  config: Any,
  model: Model,
  params: Params,
  make_step: Callable[..., Any],
  settings: Any,
  **options: Any,
) -> Trainer:
  """Opens the training of a model.

  Args:
    run: Where to run.
    config: Of the script: RunConfig, `optim`, and `lora`, the adapters that are trained in place of
      the params if they have a rank.
    model: What is trained.
    params: Its start.
    make_step: `(apply_fn, tx, config, *, state_shardings, **options) -> step`.
    settings: Of the algorithm.
    **options: Further ones of `make_step`.
  """
  frozen, trained = lora.split(models.add_adapters(run, config.lora, params))
  tx = make_optimizer(config.optim, config.steps)
  state = place_state(run, trained, tx)
  make_step = functools.partial(make_step, tx=tx, config=settings, **options)
  step = freeze(make_step, model.apply, frozen, state_shardings=shardings_of(state))
  return Trainer(state, step, frozen)


def shardings_of(tree: Any) -> Any:
  """Where each array of a tree is."""
  return jax.tree.map(lambda x: x.sharding, tree)


def describe(
  run: loop.Run,
  title: str,
  model: Model,
  state: Any,
  rows: Mapping[str, object],
  *,
  frozen: Params | None = None,
) -> None:
  """The panel at the start of a run; `frozen` are params that no step changes."""
  params = state.params if isinstance(state, TrainState) else state
  state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((state, frozen)))
  gradient_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
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
      "memory": f"{reporting.human_bytes(state_bytes + gradient_bytes)} for parameters, gradients"
      " and optimizer state, activations not counted",
      **rows,
    },
  )


def step_tokens(config: Any, dataset: data.Dataset) -> str:
  """Tokens of a batch of a script, and what part of them is padding, for the panel at the start."""
  packed = config.data.packed_length
  tokens = config.batch_size * max(dataset.width, 1) * (packed or dataset.padded_length)
  return f"{tokens}, {data.padding_fraction(dataset, config.batch_size, packed):.0%} padding"


def run_stage(train: Callable[..., dict[str, Any]], session: loop.Session, config: Any) -> Any:
  """Runs a script as a stage of another one, with the flags that repeat it alone in its workdir."""
  path = workdir_lib.local_path(session.workdir) / "flags"
  if processes.is_first() and not path.exists():
    flags.save_configs(path, session, config)
  summary = train(session, config)
  if processes.is_first():
    flags.save_configs(path, session, config)
  return summary


def finish(run: loop.Run, summary: Mapping[str, Any]) -> None:
  """Ends a run whose model has been exported: plots, the card of the model, summary.json last."""
  plots.plot_metrics(run.workdir)
  if processes.is_first():
    records.write_card(run.workdir, run.workdir / models.EXPORT, summary)
  reporting.write_summary(run.workdir, summary)


def make_refer(
  model: Model, reference: Callable[..., jax.Array], settings: Any
) -> Callable[..., Metrics]:
  """Jitted `(params, rows) -> {"ref": log-probabilities}`, see `train_offline`."""
  return jax.jit(lambda params, rows: {"ref": reference(model.apply, params, rows, settings)})


def train_offline(
  session: loop.Session,
  config: Any,
  settings: Any,
  *,
  kind: data.Kind,
  title: str,
  make_batch: Callable[[Any, jax.Array], Any],
  reference: Callable[..., jax.Array],
  row_figures: Callable[..., Metrics],
  make_step: Callable[..., TrainStep],
) -> dict[str, float]:
  """Trains a policy on judged responses against fixed log-probabilities of its start.

  Args:
    session: Where to run.
    config: Of the script: RunConfig, `model`, `lora`, `data`, `optim`, `sampling` and `reward`.
    settings: Of the algorithm.
    kind: Of the data.
    title: Shown; in lower case the name of the script.
    make_batch: `(rows, ref_logprobs [B, ...]) -> batch` of the loss.
    reference: `(apply_fn, params, rows, settings) -> ref_logprobs [B, ...]`.
    row_figures: `(params, batch, *, apply_fn, config) -> metrics`, [B] each, NaN where undefined.
    make_step: `(apply_fn, tx, config, *, state_shardings) -> step`.

  Returns:
    The figures of summary.json.
  """
  folder = models.source_folder(config.model, config.init_from)
  tokenizer = models.open_tokenizer(folder, config.data.end_token)
  train_set, heldout = data.load(kind, config.data, tokenizer, seed=session.seed)
  with loop.open_run(session) as run:
    records.identify(
      run,
      title.lower(),
      config,
      tokenizer,
      train_set,
      heldout,
      **models.frozen_digest(config.lora, folder),
    )
    model, ref_params = models.open_model(run, config.model, folder, tokenizer)
    trainer = make_trainer(run, config, model, ref_params, make_step, settings)
    state = trainer.state
    describe(
      run,
      title,
      model,
      state,
      {
        "data": f"{len(train_set.examples)} examples ({kind})",
        "tokens per step": step_tokens(config, train_set),
      },
      frozen=trainer.frozen,
    )
    refer = make_refer(model, reference, settings)
    measure = functools.partial(
      evaluating.measure_rows, run, batch_size=config.batch_size, pad_id=tokenizer.pad_id
    )
    refs = [
      measure(dataset, measure=functools.partial(refer, ref_params), show=name)["ref"]
      for name, dataset in {"reference": train_set, "reference, held out": heldout}.items()
      if dataset.examples
    ]

    @jax.jit
    def figures(params, rows, ref):
      found = row_figures(params, make_batch(rows, ref), apply_fn=model.apply, config=settings)
      return {f"eval/{name}": values for name, values in found.items()}

    @functools.cache
    def judge() -> (
      evaluating.Judge
    ):  # Opened when first asked: a reward model takes no memory before.
      prompts = evaluating.as_prompts(heldout, len(heldout.examples))
      reward_fns = judges.gold_rewards(config.data, prompts, tokenizer)
      if config.reward.path or config.reward.name:
        reward_fns["reward"] = judges.open_reward(run, config.reward, config.model, tokenizer)(
          prompts
        )
      return evaluating.Judge(
        run, model, tokenizer, prompts, config.sampling, reward_fns, ref_params
      )

    @evaluating.once_per_step
    def evaluate(state: TrainState, step: int) -> dict[str, float]:
      found = measure(
        heldout, columns=refs[1], measure=lambda batch: figures(trainer.params(state), *batch)
      )
      means = {name: float(np.nanmean(values)) for name, values in found.items()}
      if config.eval_every:
        means |= judge().measure(trainer.params(state), step)
      return means

    batches = data.batches(
      train_set,
      config.batch_size,
      seed=session.seed,
      pad_id=tokenizer.pad_id,
      columns=refs[0],
      packed_length=config.data.packed_length,
    )
    state = loop.fit(
      run,
      config,
      lambda state, batch, key: trainer.step(state, make_batch(*batch), key),
      state,
      batches,
      evaluate=evaluate if heldout.examples else None,
      learning_rate=make_schedule(config.optim, config.steps),
      title=title,
    )
    more = dict(evaluate(state, config.steps)) if heldout.examples else {}
    if heldout.examples and kind == "preferences":
      # What preferring the longer response would reach of `eval/reward/accuracy`.
      by_length = reward_model.pair_metrics(evaluating.compared_lengths(heldout))
      more["eval/length_baseline"] = float(by_length["reward/accuracy"])
      reporting.note(
        f"held-out pairs in the right order: {more['eval/reward/accuracy']:.3f}, by length alone:"
        f" {more['eval/length_baseline']:.3f}"
      )
    return judge().finish(trainer.params(state), config.steps, title, more)


class Zipped:
  """Batches from several sources at once, as one source with one position to save."""

  def __init__(self, combine: Callable[..., Any], sources: Sequence[Any]):
    self._combine, self._sources = combine, sources

  def __next__(self) -> Any:
    return self._combine(*(next(source) for source in self._sources))

  def get_state(self) -> list[Any]:
    return [source.get_state() for source in self._sources]

  def set_state(self, states: Sequence[Any]) -> None:
    for source, state in zip(self._sources, states, strict=True):
      source.set_state(state)


def require_random(sampling: generation.SamplingConfig) -> None:
  """Refuses to learn from samples of another distribution than the one that is trained."""
  if sampling.temperature == 0:
    raise ValueError("sampling.temperature must be positive: this learns from random samples")
  if sampling.top_k or sampling.top_p < 1:
    raise ValueError(
      "sampling.top_k and top_p must be off: they sample from another distribution than the one"
      " that is trained"
    )
