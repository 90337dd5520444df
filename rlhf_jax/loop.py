"""The host loop of every training script: dispatch, log one step late, evaluate, save, resume."""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import (
  checkpoint,
  defaults,
  flags,
  nonfinite,
  processes,
  profiling,
  ranges,
  replay,
  reporting,
  sharding,
  user,
  watch,
  writers,
)
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.train_step import OptimConfig

SEEDS = 2**32  # Number of seeds; the random keys have no more of them.


@dataclasses.dataclass(frozen=True)
class Session(processes.Group):
  """Workdir, seed, devices and dashboards of a run.

  Attributes:
    workdir: Folder of the run: flags, metrics, samples, checkpoints, plots. An unfinished run in it
      is resumed. gs://BUCKET/FOLDER is a folder in a bucket.
    seed: Random seed.
    mesh: Devices per mesh axis, such as data:8 or fsdp:4,tensor:2. -1 takes the remaining devices;
      empty puts all devices on data.
    trackers: Dashboards to log to in addition to metrics.jsonl: tensorboard, wandb, trackio.
    grace_seconds: Seconds from SIGTERM or Ctrl-C to the end. A run that has not stopped by then
      says where it hangs and exits with code 75, so that a launcher starts it again. The clusters
      of `launch` allow 120.
    hang_seconds: Seconds in which a step has to end, compilation and evaluation included. A run in
      which none does says where it hangs and exits with code 75. 0 waits for ever.
    replay_step: Step to run again, operation by operation, to find its first NaN or infinity;
      writes nothing. 0 trains.
    profile_steps: Steps to trace into WORKDIR/profile, for xprof and Perfetto: 20:23 traces the
      steps 20, 21 and 22.
    token_cache: Folder of tokenised data files, which a later start with the same files, data flags
      and tokenizer maps into memory. Empty is the folder `.tokens` beside the workdir; `none` keeps
      nothing.
  """

  workdir: str
  seed: int = 0
  mesh: str = ""
  trackers: tuple[str, ...] = ()
  grace_seconds: float = ranges.rare(110.0)
  hang_seconds: float = ranges.rare(0.0)
  replay_step: int = ranges.rare(0)
  profile_steps: str = ranges.rare("")
  token_cache: str = ranges.rare("")

  @property
  def tokens(self) -> pathlib.Path | None:
    """Folder of tokenised data files; None for none."""
    if self.token_cache:
      return None if self.token_cache == "none" else workdir_lib.local_path(self.token_cache)
    return workdir_lib.local_path(self.workdir).parent / ".tokens"

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, positive=("grace_seconds",), non_negative=("hang_seconds", "replay_step"))
    profiling.parse_steps(self.profile_steps)
    if not self.workdir.strip():
      raise ValueError("workdir is empty; give the folder of the run, or . for the current one")
    if not 0 <= self.seed < SEEDS:
      raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
    if "://" in self.token_cache:
      raise ValueError(
        "token_cache must be none or a folder of this machine, whose files are mapped into memory;"
        f" got {self.token_cache}"
      )
    for name in self.trackers:
      if name not in writers.TRACKERS:
        known = ", ".join(sorted(writers.TRACKERS))
        raise ValueError(f"trackers must be some of {known}, got {name!r}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Length of a training run and its reporting intervals.

  Attributes:
    init_from: Initial params: the workdir of a finished run, RUN@STEP or RUN@best for one of its
      checkpoints, a Hugging Face folder or hf://ORG/NAME, also of adapters of PEFT.
    steps: Number of steps; `epochs` says it as passes over the training rows.
    epochs: Number of passes over the training rows, in place of `steps`; 0 takes `steps`.
    batch_size: Rows per step, over all devices; prompts per step for a method that samples.
    log_every: Steps between lines in metrics.jsonl.
    eval_every: Steps between evaluations on held-out rows; 0 evaluates only at the end.
    checkpoint_every: Steps between checkpoints; the last step is always saved.
    keep: Number of newest checkpoints that stay; older ones are deleted once a newer one has been
      verified.
    keep_every: Interval of checkpoints that stay as well: 100 keeps those of the steps 100, 200 and
      so on that are saved. 0 for none.
    keep_best: Metric of the evaluations, such as eval/reward, whose best checkpoint stays as well;
      every evaluation is then followed by a checkpoint. The highest is the best, with a minus in
      front the lowest, as in -eval/loss.
    export_dtype: Dtype of the exported model; bfloat16 halves its size.
  """

  init_from: str = ""
  steps: int = 100
  epochs: float = dataclasses.field(default=0.0, metadata={"rare": True, "yields": True})
  batch_size: int = 32
  log_every: int = 1
  eval_every: int = 0
  checkpoint_every: int = 100
  keep: int = ranges.rare(2)
  keep_every: int = ranges.rare(0)
  keep_best: str = ranges.rare("")
  export_dtype: Literal["float32", "bfloat16"] = ranges.rare("float32")

  def __post_init__(self):
    ranges.check(
      self,
      at_least_one=("steps", "batch_size", "log_every", "checkpoint_every", "keep"),
      non_negative=("eval_every", "epochs", "keep_every"),
    )
    if self.keep_best == "-":
      raise ValueError("keep_best=- names no metric; write one after the minus, as in -eval/loss")
    if self.keep_best and not self.eval_every:
      raise ValueError(
        f"keep_best={self.keep_best} is a metric of evaluations; give --eval_every too"
      )
    defaults.settle(self)
    for field in dataclasses.fields(self):
      settings = getattr(self, field.name)
      if isinstance(settings, OptimConfig) and isinstance(field.default, OptimConfig):
        _require_optimizer(field.name, settings, field.default, self)
      parts = getattr(settings, "microbatches", 1)
      if not hasattr(settings, "minibatches") and self.batch_size % parts:
        raise ValueError(
          f"{field.name}.microbatches={parts} does not divide --batch_size={self.batch_size}; take"
          " a divisor"
        )

  def settle_steps(self, steps: int) -> None:
    """Replaces `epochs` by a number of steps; for the place that knows the number of rows."""
    object.__setattr__(self, "steps", steps)
    object.__setattr__(self, "epochs", 0.0)

  def require(self) -> None:
    """Refuses settings that lack what a run needs, though each of them is fine."""


def _require_optimizer(name: str, given: OptimConfig, default: OptimConfig, config: Any) -> None:
  """Refuses settings of an optimizer that it does not read, and matrices that are not trained."""
  try:
    given.require_read(default)
  except ValueError as error:
    raise ValueError(f"{name}.{error}") from error
  if given.name == "muon" and getattr(config, "lora").rank:  # noqa: B009, methods have it.
    raise ValueError(
      f"{name}.name=muon is for the matrices of layers, which adapters leave as they are; choose"
      " another, or leave lora.rank at 0"
    )


# Settings that may change when a run is continued. Only `steps` changes what the steps compute, if
# the learning rate is scheduled over them: `fit` then says what becomes of it.
FREE_SETTINGS = frozenset(
  {"log_every", "eval_every", "checkpoint_every", "export_dtype", "steps", "epochs"}
  | {"keep", "keep_every", "keep_best"}
)
# A run without finite gradients has nothing left to save.
_MAX_BROKEN_IN_A_ROW = 5
# A few batches without anything to learn from are normal: pairs tie while right answers are rare.
_MAX_EMPTY_IN_A_ROW = 50


class Preempted(RuntimeError):
  """The process was told to stop and has saved its state; start it again to continue."""

  exit_code = os.EX_TEMPFAIL


class NumericsError(RuntimeError):
  """Several consecutive steps were skipped."""

  exit_code = os.EX_SOFTWARE


class Run(NamedTuple):
  """An opened run.

  Attributes:
    workdir: Folder of the run, locked while the run is open.
    session: Flags of the session.
    mesh: Device mesh.
    key: Random key of the run.
    writer: Writer of metrics and tables; `fit` opens it, the end of the run closes it.
  """

  workdir: pathlib.Path
  session: Session
  mesh: jax.sharding.Mesh
  key: jax.Array
  writer: writers.RunWriter

  def key_for(self, purpose: int) -> jax.Array:
    """Derives a separate key for each purpose, such as initialisation or sampling."""
    return jax.random.fold_in(self.key, purpose)


def require_no_steps(session: Session) -> None:
  """Refuses flags of the session that only training steps read, for a script that takes none."""
  for name in ("trackers", "grace_seconds", "hang_seconds", "replay_step", "profile_steps"):
    if getattr(session, name) != Session.__dataclass_fields__[name].default:
      raise flags.UsageError(f"--{name} is for a script that trains; leave it out here")


@contextlib.contextmanager
def open_run(session: Session, spare: int = 0) -> Iterator[Run]:
  """Creates and locks the workdir, and builds the mesh of all devices but the last `spare`.

  On exit it waits for all processes, so that each sees what the run has written.

  Raises:
    LockedError: If another run is in the workdir, or the processes do not share it.
  """
  workdir = workdir_lib.run_folder(session.workdir)
  mesh = sharding.make_mesh(session.mesh, jax.devices()[:-spare] if spare else None)
  writers.require_packages(session.trackers)
  writer = writers.RunWriter(workdir, session.trackers)
  looking = nonfinite.looking() if session.replay_step else contextlib.nullcontext()
  with workdir_lib.run_lock(workdir), contextlib.closing(writer), looking:
    yield Run(workdir, session, mesh, jax.random.key(session.seed), writer)
    processes.agree(lambda: workdir_lib.require_lock(workdir))
    processes.wait()


def identity(
  run: Run, name: str, settings: Mapping[str, Any], digests: Mapping[str, str] | None = None
) -> dict[str, Any]:
  """Returns what tells a run from others: JSON-able values by the names of flags, and `script`.

  Args:
    run: The run.
    name: Name of the script.
    settings: Config of the script as a plain dict; `FREE_SETTINGS` are ignored. The files of the
      user's functions that it names are fingerprinted too.
    digests: Fingerprints of what the config only points to. The name of one that belongs to a flag
      ends in the flag: `files of --init_from`.
  """
  flat = {"seed": run.session.seed} | flags.flatten(settings)
  fixed = {f"--{key}": value for key, value in flat.items() if key not in FREE_SETTINGS}
  found = user.digests(flat) | dict(digests or {})
  return {"script": name} | fixed | found


def identify(
  run: Run, name: str, settings: Mapping[str, Any], digests: Mapping[str, str] | None = None
) -> None:
  """Refuses a workdir that holds another run than the one being opened; see `identity`."""
  workdir_lib.check_identity(run.workdir, identity(run, name, settings, digests))


def hyperparameters(run: Run, config: Any) -> dict[str, Any]:
  """Settings of a run for dashboards, by the names of the flags."""
  session = {"seed": run.session.seed, "mesh": run.session.mesh}
  return session | flags.flatten(flags.to_dict(config))


class _SharedStop:
  """A stop event that becomes set on all processes in the same step.

  Each call reads the result that was dispatched one step before, so that no step waits.
  """

  def __init__(self, event: threading.Event, mesh: jax.sharding.Mesh):
    self._event, self._mesh, self._sent = event, mesh, None
    self._any = jax.jit(jnp.any)

  def is_set(self) -> bool:
    sent, flag = self._sent, np.full([1], self._event.is_set())
    shards = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec(sharding.AXES))
    flags = jax.make_array_from_callback((self._mesh.size,), shards, lambda index: flag)
    self._sent = self._any(flags)
    return sent is not None and bool(sent)


class _Log:
  """Turns the device metrics of a step into a written line, one step later."""

  def __init__(
    self,
    writer: writers.RunWriter,
    progress: reporting.Progress,
    every: int,
    mesh: jax.sharding.Mesh,
  ):
    self._writer, self._progress, self._every, self._mesh = writer, progress, every, mesh
    self._pending: tuple[int, Mapping[str, Any], bool, float] | None = None
    self._last_time = time.monotonic()
    self._broken = self._empty = 0

  @property
  def skipping(self) -> bool:
    """True if the newest written step had no finite gradient."""
    return self._broken > 0

  def push(self, step: int, values: Mapping[str, Any], *, keep: bool) -> None:
    """Takes the values of a step and writes those of the step before it."""
    self.flush()
    now = time.monotonic()  # Taken once per step: a line may be written early, before a save.
    seconds, self._last_time = now - self._last_time, now
    self._pending = (step, values, keep or step == 1 or step % self._every == 0, seconds)

  def flush(self) -> None:
    """Writes the values that were pushed last."""
    if self._pending is not None:
      pending, self._pending = self._pending, None
      self._write(*pending)

  def _write(self, step: int, values: Mapping[str, Any], keep: bool, seconds: float) -> None:
    scalars = {name: float(value) for name, value in jax.device_get(dict(values)).items()}
    # Undefined in this batch, such as the reward of chosen responses in a batch without any.
    absent = [n for n, x in scalars.items() if math.isnan(x) and n not in ("loss", "grad_norm")]
    for name in absent:
      del scalars[name]
    scalars["step_seconds"] = seconds
    scalars |= profiling.rates(scalars, seconds, self._mesh) | profiling.memory(self._mesh)
    for name in ("tokens", "tokens/drawn", "weight", "model_flops"):
      scalars.pop(name, None)
    self._progress.update(step, scalars)
    if keep:
      self._writer.write(step, scalars)
    skipped = scalars.get("skipped_steps", 0) >= 1
    finite = all(math.isfinite(scalars.get(name, math.nan)) for name in ("loss", "grad_norm"))
    broken = skipped and not finite
    self._broken = self._broken + 1 if broken else 0
    self._empty = self._empty + 1 if skipped and not broken else 0
    if self._broken >= _MAX_BROKEN_IN_A_ROW:
      raise NumericsError(
        f"no finite gradient in {self._broken} steps up to {step}; lower --optim.learning_rate or"
        " look at the batches of these steps; the same command with"
        f" --replay_step={step} names the operation that fails"
      )
    if self._empty >= _MAX_EMPTY_IN_A_ROW:
      raise NumericsError(
        f"nothing to learn from in {self._empty} steps up to {step}, as if all rewards were equal;"
        " look at the batches and rewards of these steps"
      )


def fit(
  run: Run,
  config: RunConfig,
  step: Callable[[Any, Any, jax.Array], tuple[Any, Mapping[str, Any]]],
  state: Any,
  batches,
  *,
  evaluate: Callable[[Any, int], Mapping[str, float]] | None = None,
  learning_rate: Callable[[int], Any] | None = None,
  title: str = "train",
) -> Any:
  """Runs `config.steps` steps, from the newest checkpoint of the workdir if there is one.

  If a step raises before it has donated its state, as a reward function may, the state before it is
  saved first, and if an evaluation raises, the state that it was to evaluate.

  A run that is killed at any time and started again ends with bitwise the same state as one that
  is not. State, step and position in the data are saved as one unit, and every key derives from the
  seed and the step.

  Args:
    run: The opened run.
    config: Length and intervals.
    step: `(state, batch, key) -> (state, metrics)`; it may donate the state. `metrics["tokens"]`
      becomes `tokens_per_second`, `metrics["model_flops"]` the operations per second and MFU.
    state: State before the first step, a tree of jax arrays. It is donated.
    batches: Iterator of numpy batches with `get_state` and `set_state`.
    evaluate: `(state, step) -> scalars`, on held-out rows.
    learning_rate: Function from step to learning rate, for the log.
    title: Title of the progress bar.

  Returns:
    The state after the last step.

  Raises:
    Preempted: If SIGTERM or Ctrl-C arrived; the state was saved.
    Interrupted: If a second one arrived; what follows the last checkpoint is lost.
    Replayed: With `run.session.replay_step`, which runs one step again and writes nothing.
    NumericsError: If five consecutive steps had no finite gradient, or 50 nothing to learn from.
  """
  key = run.key_for(0)
  if wanted := run.session.replay_step:
    raise replay.again(run.workdir, run.mesh, wanted, step, state, batches, key)
  with (
    checkpoint.Checkpointer(
      run.workdir / "checkpoints",
      keep=config.keep,
      every=config.keep_every,
      best=config.keep_best,
      run=workdir_lib.identity_digest(run.workdir),
    ) as saver,
    watch.Watch(
      run.session.grace_seconds, run.session.hang_seconds, lambda: _name_last(saver)
    ) as watcher,
    contextlib.closing(replay.BlackBox(run.workdir)) as black_box,
    contextlib.ExitStack() as stack,
  ):
    restored = saver.restore({"state": state}, donate=True)
    start = 0
    if restored is not None:
      start, state = restored.step, restored.items["state"]
      batches.set_state(restored.meta["data"])
      _say_where(run, config, restored, learning_rate)
    if start >= config.steps:
      return state
    run.writer.open(resume_step=start, config=hyperparameters(run, config))
    progress = stack.enter_context(reporting.Progress(config.steps, start, title))
    log = _Log(run.writer, progress, config.log_every, run.mesh)
    if config.keep_best and evaluate is None:
      raise flags.UsageError(
        f"--keep_best={config.keep_best} needs evaluations, and there are no held-out rows"
      )
    traced = profiling.parse_steps(run.session.profile_steps)
    if traced and traced.start > config.steps:
      reporting.note(f"--profile_steps={run.session.profile_steps} is past the last step")
    profiler = stack.enter_context(contextlib.closing(profiling.Profiler(run.workdir, traced)))
    stop = _SharedStop(watcher.stop, run.mesh) if jax.process_count() > 1 else watcher.stop

    def save(done: int, position: Any, score: float | None = None) -> None:
      meta = {"data": position, "steps": config.steps}
      if learning_rate is not None:
        meta["next_rate"] = float(learning_rate(done))
      saver.save(done, {"state": state}, meta, score)

    saved = start
    # A metric that was there once may be undefined later, also in a run that continues.
    best = functools.partial(checkpoint.best_step, saver.directory, config.keep_best)
    scored = bool(config.keep_best) and processes.agree(best) is not None

    def rescue(done: int, position: Any) -> None:
      # One process may be the only one that fails, and a save needs all of them.
      if done == saved or jax.process_count() > 1 or _is_lost(state):
        return
      log.flush()
      if not log.skipping:
        save(done, position)
        saver.wait()
        reporting.note(f"saved step {done} of {config.steps}, the last one before the error")

    for index in range(start, config.steps):
      position = batches.get_state()
      batch = sharding.place_batch(next(batches), run.mesh)
      if log.skipping:
        black_box.keep(index, state, batch, key, position)
      try:
        with profiler.step(index + 1):
          state, values = step(state, batch, key)
      except Exception:
        rescue(index, position)
        raise
      profiler.after(index + 1, state)
      if run.mesh.devices.flat[0].platform == "cpu":
        # Otherwise the next step would allocate temporaries while this one still holds its own.
        jax.block_until_ready(state)
      done = index + 1
      last = done == config.steps
      if learning_rate is not None:
        values = {**values, "lr": learning_rate(index)}
      due = last or (config.eval_every > 0 and done % config.eval_every == 0)
      score = None
      if evaluate is not None and due:
        log.flush()  # Trackers need the steps in order, and `evaluate` may write a table.
        try:
          evaluated = evaluate(state, done)
          score = _score(config.keep_best, evaluated, required=not scored)
          scored = True
          values = {**values, **evaluated}
        except Exception:
          log.push(done, values, keep=due)
          rescue(done, batches.get_state())
          raise
      log.push(done, values, keep=due)
      stopping = stop.is_set() and not last  # Read only once: it may change at any time.
      wanted = done % config.checkpoint_every == 0 or score is not None
      if last or stopping or wanted:
        # Before the save: a process that continues from it does not write this line again.
        log.flush()
        # After a skipped step there is nothing new to save, and `NumericsError` may follow.
        if last or stopping or not log.skipping:
          save(done, batches.get_state(), score)
          saved = done
      watcher.beat()
      if stopping:
        saver.wait()
        raise Preempted(f"saved step {done} of {config.steps}; run the same command to continue")
    log.flush()
  return state


def _score(name: str, evaluated: Mapping[str, float], *, required: bool) -> float | None:
  """Returns the metric of an evaluation that chooses the best checkpoint, higher is better.

  Raises:
    UsageError: There is no such metric, which is required; later ones may be undefined.
  """
  metric = name.removeprefix("-")
  if not metric:
    return None
  if metric not in evaluated and required:
    known = ", ".join(sorted(evaluated))
    raise flags.UsageError(f"--keep_best={name} is no metric of the evaluations; they have {known}")
  value = float(evaluated.get(metric, math.nan))
  if not math.isfinite(value):
    return None
  return -value if name.startswith("-") else value


def _name_last(saver: checkpoint.Checkpointer) -> str:
  step = saver.latest_step()
  if step is None:
    return "there is no checkpoint yet"
  return f"the last checkpoint is step {step}, and the same command continues from it"


def _is_lost(state: Any) -> bool:
  """Returns whether a step that failed has already donated its state."""
  return any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def _say_where(
  run: Run,
  config: RunConfig,
  restored: checkpoint.Restored,
  learning_rate: Callable[[int], Any] | None,
) -> None:
  """Says from which step a run continues, and what another number of steps changes."""
  done, planned = restored.step, restored.meta["steps"]
  if done >= config.steps:
    reporting.note(
      f"this run has already finished, with step {done}: nothing is trained, and its end is written"
      " again; more --steps train on"
    )
    return
  reporting.note(f"continuing from step {done} of {run.workdir}")
  if planned == config.steps or learning_rate is None:
    return
  was, now = restored.meta["next_rate"], float(learning_rate(done))
  if was == now:
    return
  reporting.note(
    f"--steps was {planned}, now {config.steps}: the learning rate is scheduled over the steps, so"
    f" that of step {done + 1} is {now:.3g} and not {was:.3g}; a run of {config.steps} steps from"
    " its start would differ"
  )
