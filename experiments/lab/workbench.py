"""Workbench of a training script: a run, its data, and the initial model."""

import contextlib
import dataclasses
import functools
import io
import math
import pathlib
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import (
  checkpoint,
  data,
  defaults,
  flags,
  generation,
  hub,
  loop,
  processes,
  reporting,
  rewards,
  sharding,
)
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.algorithms import epochs
from rlhf_jax.models import Model, ModelConfig
from rlhf_jax.models.families import Head
from rlhf_jax.train_step import reported
from rlhf_jax.types import Metrics, Params, Rollout
from .. import records
from . import costs, evaluating, given_rows, judges, limits, models, training

Extra = Mapping[str, tuple[data.KindName, str]]  # Name -> kind and file of a data set.


class Workbench(NamedTuple):
  """Value that the parts of a training script share.

  Attributes:
    run: Opened run: workdir, mesh, key, writer.
    config: Config of the script.
    tokenizer: Tokenizer of the model.
    train_set: Rows to train on.
    heldout: Rows to evaluate on; may be empty.
    model: Model to train.
    start: Initial params, which are the reference, in `config.model.frozen_dtype`; no step donates
      them.
    folder: Folder that the params were read from; None for a new model.
    extra: Further data sets by name.
    initial: Initial params to train, which a trainer takes over; None if they are those of `start`.
    script: Name of the script, also of its progress bar.
  """

  run: loop.Run
  config: Any
  tokenizer: data.Tokenizer
  train_set: data.Dataset
  heldout: data.Dataset
  model: Model
  start: Params
  folder: pathlib.Path | None
  extra: Mapping[str, data.Dataset] = types.MappingProxyType({})
  initial: Params | None = None
  script: str = ""

  def batches(self, dataset: data.Dataset | None = None, **options: Any) -> Any:
    """Returns an endless, resumable source of training batches; see `data.batches`."""
    config = self.config
    return data.batches(
      self.train_set if dataset is None else dataset,
      options.pop("batch_size", config.batch_size),
      seed=self.run.session.seed,
      pad_id=self.tokenizer.pad_id,
      **options,
    )

  def trainer(
    self,
    make_step: Callable[..., Callable[..., Any]],
    updates: epochs.UpdateConfig | None = None,
    *,
    keep_start: bool = True,
    teacher: Model | None = None,
  ) -> training.Trainer:
    """Builds the state and the step of the model or its adapters; the optimizer is `config.optim`.

    Args:
      make_step: `(apply_fn, tx, *, state_shardings) -> step`, a `make_x_step` with its config.
      updates: Division of a batch of sampled responses; None makes one update per step.
      keep_start: False frees the memory of `start`, except with adapters, which share it.
      teacher: Model that is not trained and reads the same rows in the step.
    """
    config = self.config
    per_step = 1 if updates is None else updates.updates
    trainer = training.make_trainer(
      self.run,
      self.model.apply,
      self.trained(),
      training.one_optimizer(config.optim, config.steps, per_step),
      make_step,
      given=self.initial,
      updates=updates,
      packed_length=0 if updates is None else config.rollout.packed_length,
      flops=self.flops(updates, teacher=teacher),
    )
    if not (keep_start or config.lora.rank or sharding.is_absent(self.run.mesh)):
      for leaf in jax.tree.leaves(self.start):
        leaf.delete()
    return trainer

  def flops(
    self,
    updates: epochs.UpdateConfig | None = None,
    *,
    critic: ModelConfig | None = None,
    teacher: Model | None = None,
  ) -> Callable[..., float] | None:
    """Returns `(batch, *, packed) -> operations of a step`, `costs.training_flops`; None if absent.

    Args:
      updates: Division of a batch of sampled responses.
      critic: Architecture of a critic with a model of its own.
      teacher: Model that is not trained and reads the same rows in the step.
    """
    if sharding.is_absent(self.run.mesh):
      return None
    scored = None  # Of a scalar head.
    if "score" not in self.start:
      scored = scored_tokens(self.config, [self.train_set, *self.extra.values()])
    return functools.partial(
      costs.training_flops,
      self.model.config,
      scored=scored,
      updates=updates,
      frozen=self.config.lora.rank > 0,
      critic=critic,
      teacher=None if teacher is None else teacher.config,
    )

  def trained(self) -> Params:
    """Returns the initial params to train, with adapters if there are any."""
    initial = self.start if self.initial is None else self.initial
    return models.add_adapters(self.run, self.config.lora, initial)

  def describe(self, title: str, trainer: training.Trainer, **rows: object) -> None:
    """Shows the panel at the start of a run: sources of model, data and judge, and further rows."""
    sets = self.config.data, self.train_set, self.heldout
    named = {name.replace("_", " "): value for name, value in rows.items()}
    start = self.folder or "new, with random weights"
    rates = defaults.describe(self.config)
    lines = {"initial model": start, **data.describe(*sets)}
    for name, dataset in self.extra.items():
      lost = f", left out: {dataset.dropped}" if dataset.dropped else ""
      lines[f"{name} data"] = f"{len(dataset.examples)} {dataset.kind}{lost}"
    if hasattr(self.config, "judge"):
      lines["judge"] = self.config.judge.title
    lines |= {**named, **rates}
    idle = models.judge_shapes(self.config)
    if not (self.config.lora.rank or jax.tree.leaves(self.start)[0].is_deleted()):
      idle["start"] = self.start
    training.describe(self.run, title, self.model, trainer, lines, idle)
    given_rows.warn(*sets)

  def sampler(self, *, mixture: bool = False, **changes: Any) -> Callable[..., Rollout]:
    """Builds `sample(params, tokens, mask, prompt_id, key)`; `params` come from `reshard`.

    A prompt that is in a batch several times, as where an epoch ends, is answered anew each time.

    Args:
      mixture: True to sample from a mixture of two models.
      **changes: Settings of `config.sampling` to change, such as `temperature=0.0`.
    """
    sampling = dataclasses.replace(self.config.sampling, **changes)
    sample = models.make_sampler(self.model, self.tokenizer, sampling, mixture=mixture)
    return models.with_distinct_ids(sample, self.run.mesh)

  def usage(self, rollout: Rollout) -> dict[str, float]:
    """Returns metrics of the sampler's loop: its steps, and their share that drew a token."""
    lengths = sharding.to_host(rollout.response_mask.sum(axis=1))
    steps, occupancy = generation.usage(lengths, self.config.sampling.slots)
    return {"sampling/steps": float(steps), "sampling/occupancy": occupancy}

  def reshard(self) -> Callable[[Params], Params]:
    """Builds `reshard(params)`: moves params from the training layout to the sampling layout."""
    return sharding.make_reshard(self.run.mesh, self.model.config.dtype)

  def ended(self, rollout: Rollout) -> jax.Array:
    """Returns bools [B], True on responses that ended in a stop token or string."""
    return generation.ended(rollout, *models.stops(self.tokenizer, self.config.sampling))

  def open_reward(self) -> Callable[[data.Dataset], rewards.RewardFn]:
    """Opens the reward of `config.reward` and returns `(prompts) -> reward` of responses."""
    config = self.config
    return judges.open_reward(self.run, config.reward, config.model, self.tokenizer)

  def open_scores(self) -> judges.Scores:
    """Opens the judge of `config`; a single sample of a prompt meets one of the initial policy.

    That response is the same each time: it depends on the prompt alone.
    """
    sampling = dataclasses.replace(self.config.sampling, samples_per_prompt=1)
    sample = models.make_sampler(self.model, self.tokenizer, sampling)
    reshard = self.reshard()
    rows, key = sharding.batch_sharding(self.run.mesh), self.run.key_for(4)

    def anchors(rollout: Rollout, prompt_ids: np.ndarray) -> Rollout:
      prompt = np.s_[:, : rollout.tokens.shape[1] - rollout.logprobs.shape[1]]
      ids = sharding.put(np.asarray(prompt_ids, np.int32), rows)
      return sample(
        reshard(self.start), rollout.tokens[prompt], rollout.prompt_mask[prompt], ids, key
      )

    return judges.open_scores(self.run, self.config, self.tokenizer, anchors)

  def open_preference(self) -> Callable[[data.Dataset], rewards.PreferenceFn]:
    """Opens the judge of `config.preference` and returns `(prompts) -> preference` of pairs."""
    config = self.config
    return judges.open_preference(self.run, config.preference, config.model, self.tokenizer)

  def gold(self, prompts: data.Dataset) -> dict[str, rewards.RewardFn]:
    """Returns the gold reward, if the prompts are those of the built-in task."""
    return judges.gold_rewards(self.config.data, prompts, self.tokenizer)

  def over(
    self,
    dataset: data.Dataset,
    measure: Callable[[Any], Any],
    columns: np.ndarray | None = None,
    show: str = "",
    only: np.ndarray | None = None,
  ) -> Any:
    """Runs `measure(batch)` on every row of a data set; see `evaluating.measure_rows`."""
    size, pad_id = self.config.batch_size, self.tokenizer.pad_id
    return evaluating.measure_rows(self.run, dataset, size, pad_id, measure, columns, show, only)

  def references(
    self, ref_logprobs: Callable[[Params, Any], jax.Array]
  ) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Computes `ref_logprobs(start, rows)` for the training and the held-out set.

    Training rows that `config.steps` batches do not reach are NaN. Those of the held-out set are
    followed by those of named sets. A run that goes on from a checkpoint reads those of its
    training rows from `workdir/reference.npy`.
    """
    config, measure = self.config, functools.partial(ref_logprobs, self.start)
    train = heldout = None
    if rows := len(self.train_set.examples):
      packed, seed = config.data.packed_length, self.run.session.seed
      only = data.first_rows(
        self.train_set, config.batch_size, config.steps, seed=seed, packed_length=packed
      )
      path = self.run.workdir / "reference.npy"
      with checkpoint.Checkpointer(self.run.workdir / "checkpoints") as saver:
        begun = processes.agree(lambda: saver.latest_step() is not None and path.exists())
      if begun:
        train = np.load(path)
        only = only[np.isnan(train[only]).reshape(len(only), -1).any(axis=1)]
      if len(only):
        refs = self.over(self.train_set, measure, show="reference", only=only)
        if train is None:
          train = np.full([rows, *refs.shape[1:]], np.nan, np.float32)
        train[only] = refs
        if processes.is_first():
          content = io.BytesIO()
          np.save(content, train)
          workdir_lib.atomic_write(path, content.getvalue())
    if self.heldout.examples:
      sets = (self.heldout, *self.heldout.named.values())
      refs = [self.over(of, measure, show="reference, held out") for of in sets]
      heldout = np.concatenate(refs)
    return train, heldout

  def evaluator(
    self,
    trainer: training.Trainer,
    measure: Callable[[Params, Any], Any],
    summarize: Callable[..., tuple[jax.Array, Metrics]],
    judge: Callable[[], evaluating.Judge] | None = None,
    refs: np.ndarray | None = None,
  ) -> Callable[[Any, int], dict[str, float]]:
    """Builds `evaluate(state, step)` of a model that is trained on rows of data.

    Args:
      trainer: Trainer of the model.
      measure: `(params, batch) -> tree` of [B, ...] arrays.
      summarize: `(tree) -> (loss, metrics)` of all rows of a held-out set at once, normalised as in
        training; metrics that are NaN are undefined. With `refs` it is `(tree, refs)`.
      judge: Function that opens the judge, whose metrics are added with `--eval_every`.
      refs: Held-out rows of `references`.

    Returns:
      A function of the metrics of the held-out rows, `eval/...`, and of those of named sets,
      `eval/NAME/...`; empty if there are no rows.
    """

    @evaluating.once_per_step
    def evaluate(state: Any, step: int) -> dict[str, float]:
      if not self.heldout.examples:
        return {}
      params = trainer.params(state)
      defined, start = {}, 0
      for prefix, of in evaluating.prefixed(self.heldout).items():
        stop = start + len(of.examples)
        rows = self.over(of, functools.partial(measure, params))
        loss, metrics = summarize(rows) if refs is None else summarize(rows, refs[start:stop])
        start = stop
        metrics = {n: x for n, x in reported(metrics).items() if n not in ("weight", "tokens")}
        values = {name: float(x) for name, x in (metrics | {"loss": loss}).items()}
        kept = {n: x for n, x in values.items() if n == "loss" or not math.isnan(x)}
        defined |= {f"{prefix}/{name}": x for name, x in kept.items()}
      return defined | (judge().measure(params, step) if judge and self.config.eval_every else {})

    return evaluate

  def judge(
    self,
    reward_of: Callable[[data.Dataset], rewards.RewardFn] | None = None,
    prefer_of: Callable[[data.Dataset], rewards.PreferenceFn] | None = None,
    *,
    batch_size: int = 128,
  ) -> evaluating.Judge:
    """Builds the judge of the trained and the initial policy; see `evaluating.Judge`.

    It also answers the prompts of named sets where prompts are what the script reads.
    """

    def make(prompts: data.Dataset, **options: Any) -> evaluating.Judge:
      fns = {} if reward_of is None else {"reward": reward_of(prompts)}
      return evaluating.Judge(
        self.run,
        self.model,
        self.tokenizer,
        prompts,
        self.config.sampling,
        fns | self.gold(prompts),
        self.start,
        batch_size=batch_size,
        export=self.export,
        **options,
      )

    prompts, named = self.heldout, {}
    if prompts.kind == "prompts":
      named = {name: make(of) for name, of in prompts.named.items()}
    else:
      prompts = evaluating.as_prompts(prompts, len(prompts.examples))
    return make(prompts, prefer=None if prefer_of is None else prefer_of(prompts), named=named)

  def later_judge(self) -> Callable[[], evaluating.Judge]:
    """Returns a function that opens the judge, with `config.reward` if given, at its first call.

    A reward model takes no memory before.
    """
    is_given = self.config.reward.is_given
    return functools.cache(lambda: self.judge(self.open_reward() if is_given else None))

  def fit(
    self,
    step: Callable[..., Any],
    trainer: training.Trainer,
    batches: Any,
    *,
    state: Any = None,
    evaluate: Callable[[Any, int], Mapping[str, float]] | None = None,
  ) -> Any:
    """Runs `config.steps` steps; see `loop.fit`.

    Args:
      step: `(state, batch, key) -> (state, metrics)`.
      trainer: Trainer with the learning rate, and with the initial state if `state` is None.
      batches: Resumable source of batches.
      state: State before the first iteration.
      evaluate: `(state, step) -> metrics`, if there are held-out rows.
    """
    return loop.fit(
      self.run,
      self.config,
      step,
      trainer.state if state is None else state,
      batches,
      evaluate=evaluate if self.heldout.examples else None,
      learning_rate=trainer.learning_rate,
      title=self.script,
    )

  def show_samples(self, params: Params, title: str, count: int = 8) -> None:
    """Shows a few responses to held-out prompts and writes them to `samples/`."""
    prompts = evaluating.as_prompts(self.heldout, count)
    if not prompts.examples:
      return
    sample = evaluating.heldout_sampler(
      self.run,
      self.model,
      prompts,
      self.tokenizer,
      self.config.sampling,
      reward_fns=self.gold(prompts),
    )
    rows = evaluating.sample_rows(sample(params))
    self.run.writer.table(self.config.steps, "samples", rows)
    reporting.show_samples(rows, title)

  def export(self, params: Params, label: str = "reward") -> None:
    """Writes `workdir/export`; `label` is the name of the scalar of a judge."""
    dtype, folder = self.config.export_dtype, self.run.workdir / models.EXPORT
    given = self.model, self.tokenizer, label, dtype, self.folder, [self.folder]
    models.export(folder, params, *given)

  def start_of(self, workdir: str) -> list[str]:
    """Flags of a script that starts from the same model as this one, and from its own data."""
    config = self.config
    start = config.init_from or config.model.path or "runs/sft"
    words = [f"--workdir={workdir}", f"--init_from={start}"]
    return words + (["--data.path=PROMPTS.jsonl"] if config.data.path else [])

  def finish(self, summary: Mapping[str, Any], *following: str) -> None:
    """Ends the run after its export: plots, model card, summary.json.

    Args:
      summary: Metrics of summary.json.
      *following: Script that may follow, and its flags.
    """
    training.finish(self.run, self.tokenizer, summary, *following)


@contextlib.contextmanager
def open(
  session: loop.Session,
  config: Any,
  script: str,
  kind: data.KindName,
  head: Head = "language",
  *,
  adapted: tuple[str, ...] = (),
  spare: int = 0,
  extra: Extra = types.MappingProxyType({}),
) -> Generator[Workbench]:
  """Reads the data, locks the workdir, refuses that of another run, and places the model.

  Args:
    session: Workdir, seed, devices and dashboards.
    config: Config of the script: RunConfig with `model`, `lora` and `data`.
    script: Name of the script.
    kind: Kind of the rows.
    head: Head of the model.
    adapted: Folders of further models that get adapters.
    spare: Number of devices to leave out of the mesh.
    extra: Name -> kind and file of further data sets; an empty file name is the built-in task.
  """
  reporting.note(f"{script}: reading the model and the data")
  hub.settle(session.workdir, flags.flatten(flags.to_dict(config)).values())
  folder = models.source_folder(config.model, config.init_from)
  models.require_other_folder(session.workdir, folder)
  tokenizer = models.open_tokenizer(folder, config.data)
  checks = config.reward.checks if hasattr(config, "reward") else {}
  # A reward reads only the held-out rows of a method that samples nothing to learn from.
  of_all = checks if kind == "prompts" else {}
  train_set, heldout = given_rows.read(session, kind, config.data, tokenizer, of_all)
  settle_steps(config, train_set)
  models.require_base(config.lora, folder, *map(models.model_folder, adapted))
  further = {}
  for name, (other, path) in extra.items():
    # --data.rows counts those of --data.path, not of another file.
    source = given_rows.of_file(config.data, path, 0 if path else config.data.rows)
    further[name], _ = given_rows.read(session, other, source, tokenizer)
    size = config.batch_size * config.sampling.samples_per_prompt  # One for each response.
    if (rows := len(further[name].examples)) < size:
      raise flags.UsageError(
        f"{path}: {rows} rows, and each step takes {size} of them, --batch_size *"
        " --sampling.samples_per_prompt; lower one of the two, or give more rows"
      )
  held = (heldout, *heldout.named.values())
  for of in held:
    judges.check_rows(checks, of)
  answered = (train_set, *held) if kind == "prompts" else held
  limits.require_length(config, folder, (train_set, *held, *further.values()), answered)
  with loop.open_run(session, spare=spare) as run:
    digests = models.digests(flags.flatten(flags.to_dict(config)))
    digests |= {f"{name} data": of.digest for name, of in further.items()}
    digests |= {f"held-out {name} data": of.digest for name, of in heldout.named.items()}
    records.identify(run, script, config, tokenizer, train_set, heldout, digests=digests)
    if not processes.agree((run.workdir / "flags").exists):
      save_flags(run, config)
    scored = scored_tokens(config, [train_set, *further.values()])
    model, start, initial = place(run, config, folder, tokenizer, head, scored)
    sets = train_set, heldout
    yield Workbench(run, config, tokenizer, *sets, model, start, folder, further, initial, script)
    save_flags(run, config)  # A continued run may have been given more steps.


def place(
  run: loop.Run,
  config: Any,
  folder: pathlib.Path | None,
  tokenizer: data.Tokenizer,
  head: Head,
  scored: int,
) -> tuple[Model, Params, Params | None]:
  """Opens `model`, `start` and `initial` of a workbench.

  Losses of given responses compute logits of `scored` tokens, the most of a response, and not of
  the prompt.
  """
  frozen = config.lora.rank > 0  # Params below adapters are not trained.
  model, first = models.open_model(run, config.model, folder, tokenizer, head, frozen=frozen)
  start = first if frozen else models.freeze(run, config.model, first)
  model = model._replace(apply=functools.partial(model.apply, scored=scored))
  return model, start, None if start is first else first


def scored_tokens(config: Any, sets: Sequence[data.Dataset]) -> int:
  """Returns the most response tokens of a row of the data sets, or of the responses to sample."""
  longest = max(of.scored for of in sets)
  if config.data.packed_length:  # Held-out rows are not packed.
    return max(longest, data.packed_scored(sets[0], config.data.packed_length))
  return max(longest, config.sampling.max_new_tokens if sets[0].kind == "prompts" else 0)


def settle_steps(config: Any, train_set: data.Dataset) -> None:
  """Sets the steps of a config that has epochs, by the number of its rows, and says so.

  Raises:
    UsageError: The warm-up of a critic takes all of these steps.
  """
  if not config.epochs:
    return
  rows, epochs = len(train_set.examples), config.epochs
  batches = rows / config.batch_size
  if packed := config.data.packed_length:
    one = data.batches(
      train_set, config.batch_size, seed=0, pad_id=0, epochs=1, packed_length=packed
    )
    batches = max(sum(1 for _ in one), 1)
  steps = math.ceil(epochs * batches - 1e-9)
  if "critic" in vars(config) and config.critic.warmup >= steps:
    raise flags.UsageError(
      f"--critic.warmup={config.critic.warmup} takes all {steps} steps of --epochs={epochs:g} over"
      f" {rows} rows, so that no step trains the policy; lower it, or raise --epochs"
    )
  config.settle_steps(steps)
  reporting.note(f"--epochs={epochs:g} over {rows} rows: {config.steps} steps")


def save_flags(run: loop.Run, config: Any) -> None:
  """Writes the flags that repeat a run, also of one that was started from Python."""
  processes.agree(lambda: flags.save_configs(run.workdir / "flags", run.session, config))
