r"""Searches for good hyperparameters: runs trials of a script, stops poor ones, keeps the best.

DPO on the built-in task, 40 trials, two at a time on this machine:
  python -m launch.sweep --study=runs/sweep --space=launch/spaces/dpo.py --trials=40 --parallel=2 \
    -- experiments.dpo --init_from=runs/sft
PPO, where a trial is stopped if the gold reward falls behind that of others:
  python -m launch.sweep --study=runs/sweep --space=launch/spaces/ppo.py --trials=40 --parallel=2 \
    --prune_on=eval/gold -- experiments.ppo --init_from=runs/sft --reward.path=runs/rm \
    --eval_every=10
The same as Slurm jobs, a GPU and two hours each:
  --to=slurm --gpus=1 --minutes=120 --extra='--partition=gpu'
Every point of the grid of the space file; only settings that stay near the start:
  --sampler=grid    --constraint='kl<10'

What follows `--` is the script and the flags that all trials have in common. A trial is a run of
its own in STUDY/trials/0007. At the end STUDY has table.csv, plots/ and best/flags:
  python -m experiments.dpo --flagfile=runs/sweep/best/flags --workdir=runs/best

Starting the same command again continues a sweep that was stopped or killed; a higher --trials
adds trials. The space file is Python and is executed: use one that you have read.
launch/SWEEPS.md explains the rest.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import json
import math
import operator
import os
import pathlib
import re
import runpy
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import optuna
import sqlalchemy.exc
from optuna.trial import FrozenTrial, TrialState

from launch import sweep_report, trials

EX_USAGE = 64
# Exit code of the scripts, and of the sweep, for "stopped and saved; start again to continue".
PREEMPTED = 75
# How a process ends that was stopped from outside, not by what it computed.
_INTERRUPTED = {PREEMPTED, trials.LOST} | {
  -number for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGHUP, signal.SIGINT)
}
# After so many interruptions in a row without a new step in between a trial has failed.
_MAX_STALLED = 2
# If the first trials all fail, the others will.
_HOPELESS = 3
_LOG_LINES = 12

Flags = dict[str, Any]  # Flag name -> value.


class SweepError(Exception):
  """The sweep cannot go on. The message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Space:
  """What a space file says.

  Attributes:
    sample: `space(trial)`, from which come the flags of a trial.
    defaults: `DEFAULTS`, the script's own settings; the first trial takes them, for comparison.
    grid: `GRID`, the values of each flag for --sampler=grid.
    metric: `METRIC`, the figure of summary.json to optimise.
    direction: `DIRECTION`, maximize or minimize.
  """

  sample: Callable[[Any], Flags] | None
  defaults: Flags
  grid: dict[str, list[Any]]
  metric: str
  direction: str


def load_space(path: str) -> Space:
  """Executes a space file.

  Raises:
    SweepError: There is no such file, or it lacks what it must define.
  """
  if not pathlib.Path(path).is_file():
    shipped = sorted(file.as_posix() for file in pathlib.Path("launch/spaces").glob("*.py"))
    hint = f"; there are {', '.join(shipped)}" if shipped else ""
    raise SweepError(f"--space={path}: no such file{hint}")
  names = runpy.run_path(path)
  space = Space(
    names.get("space"),
    dict(names.get("DEFAULTS", {})),
    {name: list(values) for name, values in names.get("GRID", {}).items()},
    names.get("METRIC", ""),
    names.get("DIRECTION", "maximize"),
  )
  if space.sample is None and not space.grid:
    raise SweepError(
      f"--space={path} must define a function space(trial) that returns {{flag name: value}}, or"
      " GRID = {flag name: [values]}, or both"
    )
  if space.sample is not None and space.defaults:
    # Finds mistakes before anything is started.
    try:
      check_flags(space.sample(optuna.trial.FixedTrial(space.defaults)))
    except ValueError as error:
      raise SweepError(f"--space={path}: with DEFAULTS, {error}") from error
  return space


def check_flags(flags: Any) -> Flags:
  """What a space returned. Raises ValueError if it is no dict of flags."""
  if not isinstance(flags, dict) or not flags:
    raise ValueError(f"space(trial) must return a dict of flags, got {flags!r}")
  for name in flags:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*(\.\w+)*", name):
      raise ValueError(f"{name!r} is no name of a flag; write it as in 'optim.learning_rate'")
  return flags


def flag(name: str, value: Any) -> str:
  """A flag as the scripts read it: `--dpo.reweight=true`, `--rest.quantiles=0.5,0.7`."""
  if isinstance(value, bool):
    value = str(value).lower()
  elif value is None:
    value = "none"
  elif isinstance(value, list | tuple):
    value = ",".join(map(str, value))
  return f"--{name}={value}"


def grid_points(grid: Mapping[str, Sequence[Any]]) -> list[Flags]:
  """Every combination of the values; those of the last flag change fastest."""
  points: list[Flags] = [{}]
  for name, values in grid.items():
    points = [{**point, name: value} for point in points for value in values]
  return points


_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclasses.dataclass(frozen=True)
class Constraint:
  """A bound that a trial has to keep, such as kl<10."""

  text: str
  name: str
  comparison: str
  bound: float

  @classmethod
  def parse(cls, text: str) -> "Constraint":
    match = re.fullmatch(r"\s*([\w./-]+)\s*(<=|>=|<|>)\s*(\S+)\s*", text)
    try:
      bound = float(match[3]) if match else math.nan
    except ValueError:
      bound = math.nan
    if not match or not math.isfinite(bound):
      raise argparse.ArgumentTypeError(
        f"{text!r} is no comparison of a metric with a number; write 'kl<10' or 'gold/mean>=5'"
      )
    return cls(f"{match[1]}{match[2]}{bound:g}", match[1], match[2], bound)

  def violation(self, value: float) -> float:
    """How far `value` is beyond the bound: positive if it is, as Optuna wants it."""
    if math.isnan(value):
      return math.inf
    distance = value - self.bound if self.comparison.startswith("<") else self.bound - value
    if _COMPARISONS[self.comparison](value, self.bound):
      return distance
    return distance or math.ulp(0.0)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Rows of a `metrics.jsonl` that may be growing; what is no row is left out."""
  try:
    lines = path.read_bytes().split(b"\n")[:-1]
  except FileNotFoundError:
    return []
  rows = []
  for line in lines:
    try:
      row = json.loads(line)
    except ValueError:
      continue
    if isinstance(row, dict) and isinstance(row.get("step"), int):
      rows.append(row)
  return rows


def read_summary(folder: pathlib.Path) -> dict[str, float] | None:
  """Figures of `summary.json`, which a script writes when it has finished; None before."""
  try:
    summary = json.loads((folder / "summary.json").read_text())
  except (FileNotFoundError, ValueError):
    return None
  figures = {}
  for name, value in summary.items():
    try:
      figures[name] = float(value)  # NaN and the infinities are strings in strict JSON.
    except (TypeError, ValueError):
      continue
  return figures


class Active:
  """A trial that this controller looks after; nobody else does while it holds `owner`.

  Attributes:
    trial: Optuna's.
    folder: Its workdir.
    owner: Descriptor of the lock that says so.
    handle: The process, if there is one.
    asked: Whether the process was asked to stop.
    size: Of metrics.jsonl when it was read.
    step: The newest step in it.
    started_at: The newest step when the process was started.
    stalled: Starts in a row that were interrupted before a new step.
  """

  def __init__(self, trial: optuna.Trial, folder: pathlib.Path, owner: int):
    self.trial, self.folder, self.owner = trial, folder, owner
    self.handle: trials.Handle | None = None
    self.asked = False
    self.size, self.step, self.started_at, self.stalled = -1, 0, 0, 0

  @property
  def is_pruned(self) -> bool:
    return "pruned_at" in self.trial.user_attrs

  @property
  def is_default(self) -> bool:
    return self.trial.user_attrs.get("default", False)

  def stop(self) -> None:
    if self.handle is not None and not self.asked:
      self.asked = True
      self.handle.stop()


class Controller:
  """Asks for trials, starts them, watches their metrics and tells how they ended.

  All that it knows is in the study and in the folders of the trials, so that it may be killed at
  any time. Several controllers may work on one study: a lock of the study makes asking atomic, and
  a lock of each trial says who looks after it. The operating system frees the locks of the dead.
  """

  def __init__(
    self, args: argparse.Namespace, space: Space, study: optuna.Study, place: trials.Place
  ):
    self._args, self._space, self._study, self._place = args, space, study, place
    self._active: list[Active] = []
    self._stopping = False
    self._error = ""

  @property
  def was_stopped(self) -> bool:
    """Whether a signal ended the sweep before it was complete."""
    return self._stopping

  def run(self) -> None:
    """Runs trials until there are enough of them, or a signal comes.

    Raises:
      SweepError: It makes no sense to go on.
    """
    previous = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
      while self._fill() or self._active:
        for active in list(self._active):
          if self._stopping:
            active.stop()
          if self._advance(active):
            self._active.remove(active)
            os.close(active.owner)
        self._wait()
    except Exception:
      for active in self._active:
        active.stop()
      raise
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)
    if self._error:
      raise SweepError(self._error)

  def _on_signal(self, number: int, frame: Any) -> None:
    del frame
    if self._stopping:
      raise KeyboardInterrupt  # They have been asked; whoever continues the sweep finds them.
    self._stopping = True
    say(f"{signal.Signals(number).name}: asking {len(self._active)} trials to save and stop")

  def _wait(self) -> None:
    """Until it is time to look again, or a signal has come since the last look."""
    was_stopping, until = self._stopping, time.monotonic() + self._place.poll_seconds
    while (rest := until - time.monotonic()) > 0 and self._stopping == was_stopping:
      time.sleep(min(rest, 0.2))

  def _give_up(self, message: str) -> None:
    self._error = self._error or message
    self._stopping = True

  def _fill(self) -> bool:
    """Starts trials while there is room; True if it has started any."""
    before = len(self._active)
    while not self._stopping and len(self._active) < self._args.parallel:
      active = self._take()
      if active is None:
        break
      self._active.append(active)
      self._start(active)
    return len(self._active) > before

  def _take(self) -> Active | None:
    """A trial whose controller is dead, else a new one, else None."""
    with trials.locked(self._args.study / ".lock"):
      all_trials = self._study.get_trials(deepcopy=False)
      begun = [frozen for frozen in all_trials if frozen.state != TrialState.WAITING]
      # Anew for each trial: what is drawn depends neither on stops nor on other controllers.
      self._study.sampler = make_sampler(self._args, len(begun))
      for frozen in begun:
        if frozen.state == TrialState.RUNNING and (active := self._own(frozen)):
          return active
      if len(begun) >= self._args.trials:
        return None
      return self._own(self._study.ask())

  def _own(self, trial: optuna.Trial | FrozenTrial) -> Active | None:
    """The trial, if no other controller has it."""
    folder = trial_folder(self._args.study, trial.number)
    folder.mkdir(parents=True, exist_ok=True)
    owner = trials.try_lock(folder / ".controller")
    if owner is None:
      return None
    if self._look_up(trial).state != TrialState.RUNNING:  # It was told a moment ago.
      os.close(owner)
      return None
    if isinstance(trial, FrozenTrial):
      trial = optuna.Trial(self._study, trial._trial_id)
    return Active(trial, folder, owner)

  def _look_up(self, trial: optuna.Trial | FrozenTrial) -> FrozenTrial:
    """What the study knows of a trial now."""
    return self._study.get_trials(deepcopy=False)[trial.number]

  def _define(self, trial: optuna.Trial) -> Flags:
    """The flags of a trial, kept, so that they are the same whenever it is continued."""
    if "flags" not in trial.user_attrs:
      if trial.user_attrs.get("grid"):
        grid = self._space.grid
        flags = {name: trial.suggest_categorical(name, grid[name]) for name in grid}
      else:
        assert self._space.sample is not None
        try:
          flags = check_flags(self._space.sample(trial))
        except ValueError as error:
          raise SweepError(f"--space={self._args.space}: {error}") from error
      refuse_twice(flags, self._args.script)
      trial.set_user_attr("flags", flags)
    return trial.user_attrs["flags"]

  def _start(self, active: Active) -> None:
    """Starts or continues a trial, or finds the process that its last controller left behind."""
    trial, folder = active.trial, active.folder
    flags = self._define(trial)
    self._read(active)
    active.started_at = active.step
    if active.is_pruned or read_summary(folder) is not None:
      # It is over, and nobody has told yet; the process may be about to end.
      active.handle = self._place.find(folder)
      if active.is_pruned:
        active.stop()
      return
    where = "continues" if (folder / "log").exists() else "starts"
    settings = " ".join(flag(name, sweep_report.short(value)) for name, value in flags.items())
    say(
      f"trial {trial.number} {where}{' with the defaults' if active.is_default else ''}: {settings}"
    )
    module, *common = self._args.script
    command = [sys.executable, "-m", module, *common, f"--workdir={folder}"]
    command += [flag(name, value) for name, value in flags.items()]
    active.handle, active.asked = self._place.start(command, folder), False

  def _advance(self, active: Active) -> bool:
    """Looks at a trial; True if this controller is done with it."""
    code = trials.LOST if active.handle is None else active.handle.poll()
    was_pruned = active.is_pruned
    self._read(active)
    if code is None:
      if active.is_pruned and not was_pruned:
        active.stop()
      return False
    summary = read_summary(active.folder)
    if summary is not None and code in (0, trials.LOST):
      self._complete(active, summary)
    elif active.is_pruned:
      self._prune(active)
    elif code not in _INTERRUPTED:
      self._fail(active, describe_exit(code))
    elif self._stopping:
      say(f"trial {active.trial.number} stopped at step {active.step}")
    else:
      active.stalled = 0 if active.step > active.started_at else active.stalled + 1
      if active.stalled < _MAX_STALLED:
        self._start(active)
        return False
      self._fail(active, f"{describe_exit(code)}, {_MAX_STALLED} times without a step in between")
    return True

  def _read(self, active: Active) -> None:
    """Reports the new rows of metrics.jsonl, and marks the trial if it is to be pruned."""
    path = active.folder / "metrics.jsonl"
    size = path.stat().st_size if path.exists() else -1
    if size == active.size:
      return
    active.size = size
    reported = self._look_up(active.trial).intermediate_values
    for row in read_rows(path):
      active.step = max(active.step, row["step"])
      if self._args.prune_on not in row or row["step"] in reported or active.is_pruned:
        continue
      active.trial.report(self._sign * float(row[self._args.prune_on]), row["step"])
      if self._is_poor(active):
        # Kept first: the decision of a controller that dies now is carried out by the next one.
        active.trial.set_user_attr("pruned_at", row["step"])

  @property
  def _sign(self) -> int:
    """Optuna compares intermediate values in the direction of the final one."""
    return 1 if self._args.prune_direction == self._args.direction else -1

  def _is_poor(self, active: Active) -> bool:
    """Whether successive halving drops a trial. That with the default settings always goes on."""
    every = self._study.get_trials(deepcopy=False)
    first = self._args.prune_after or min(
      step for frozen in every for step in frozen.intermediate_values
    )
    self._study.pruner = optuna.pruners.SuccessiveHalvingPruner(
      min_resource=max(first, 1), reduction_factor=self._args.reduction_factor
    )
    return active.trial.should_prune() and not active.is_default

  def _complete(self, active: Active, summary: Mapping[str, float]) -> None:
    trial = active.trial
    logged = {
      name: value
      for row in read_rows(active.folder / "metrics.jsonl")
      for name, value in row.items()
    }
    names = [self._args.metric, *(constraint.name for constraint in self._args.constraint)]
    figures = {}
    for name in dict.fromkeys(names):
      if name not in summary and (name == self._args.metric or name not in logged):
        flag_name = "metric" if name == self._args.metric else "constraint"
        self._give_up(
          missing(f"--{flag_name}={name}", name, active.folder / "summary.json", summary)
        )
        return
      figures[name] = float(summary.get(name, logged.get(name)))
    value = figures[self._args.metric]
    if math.isnan(value):
      self._fail(active, f"{self._args.metric} is NaN")
      return
    broken = []
    for constraint in self._args.constraint:
      violation = constraint.violation(figures[constraint.name])
      broken += [constraint.text] if violation > 0 else []
      if constraint.text not in trial.constraints:
        trial.set_constraint(constraint.text, violation)
    trial.set_user_attr("figures", figures)
    self._tell(active, TrialState.COMPLETE, value)
    shown = ", ".join(f"{name} {number:.4g}" for name, number in figures.items())
    best = sweep_report.best_trial(self._study)
    note = f"  (not {', not '.join(broken)})" if broken else ""
    note += "  (best so far)" if best is not None and best.number == trial.number else ""
    say(f"trial {trial.number} ends: {shown}{note}")
    if self._args.prune_on and not self._look_up(trial).intermediate_values:
      say(
        missing(
          f"--prune_on={self._args.prune_on}",
          self._args.prune_on,
          active.folder / "metrics.jsonl",
          logged,
        )
        + "; nothing will be pruned"
      )

  def _prune(self, active: Active) -> None:
    at = active.trial.user_attrs["pruned_at"]
    self._tell(active, TrialState.PRUNED)
    value = self._sign * self._look_up(active.trial).intermediate_values[at]
    say(f"trial {active.trial.number} pruned at step {at}: {self._args.prune_on} {value:.4g}")

  def _fail(self, active: Active, reason: str) -> None:
    active.trial.set_user_attr("reason", reason)
    self._tell(active, TrialState.FAIL)
    log = active.folder / "log"
    say(f"trial {active.trial.number} failed: {reason}; the end of {log}:")
    for line in last_lines(log):
      print(f"    {line}", file=sys.stderr)
    ended = [t.state for t in self._study.get_trials(deepcopy=False) if t.state.is_finished()]
    if len(ended) >= _HOPELESS and set(ended) == {TrialState.FAIL}:
      self._give_up(
        f"the first {len(ended)} trials all failed; see {log}, then begin another --study"
      )

  def _tell(self, active: Active, state: TrialState, value: float | None = None) -> None:
    self._study.tell(active.trial, value, state)
    sweep_report.write_files(self._study, self._args.study)


def trial_folder(study: pathlib.Path, number: int) -> pathlib.Path:
  """The workdir of a trial."""
  return study / "trials" / f"{number:04d}"


def refuse_twice(flags: Flags, script: Sequence[str]) -> None:
  """Raises SweepError if the command of the script has a flag that the space sets."""
  given = {word.split("=")[0] for word in script}
  if both := sorted({f"--{name}" for name in flags} & given):
    raise SweepError(f"{both[0]} is set by the space; take it out of the command of the script")


def missing(flag_text: str, name: str, path: pathlib.Path, names: Mapping[str, Any]) -> str:
  """Says that a file has no such figure, and which it has."""
  close = difflib.get_close_matches(name, names, 1)
  hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(names)) or 'none'}"
  return f"{flag_text}: {path} has no {name}; {hint}"


def describe_exit(code: int) -> str:
  """An exit code in words."""
  if code == 0:
    return "it ended without a summary.json"
  if code == trials.LOST:
    return "it ended while no controller was watching"
  if code < 0:
    return f"killed by {signal.Signals(-code).name}"
  return f"exit code {code}"


def last_lines(path: pathlib.Path) -> list[str]:
  """The end of a log, without what a terminal might obey."""
  try:
    text = path.read_bytes()[-20_000:].decode(errors="replace")
  except FileNotFoundError:
    return []
  lines = [line.split("\r")[-1].rstrip() for line in text.split("\n")]
  lines = [line for line in lines if line][-_LOG_LINES:]
  return ["".join(c if c.isprintable() else "?" for c in line)[:300] for line in lines]


def say(text: str) -> None:
  """A line for the person who watches."""
  print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def make_sampler(args: argparse.Namespace, number: int) -> optuna.samplers.BaseSampler:
  """The sampler of trial `number`. Points of a grid are queued, so that it draws nothing."""
  seed = (args.seed * 100_003 + number) % 2**32
  if args.sampler == "tpe":
    # A few at random first; ten, as is the default, would be most of a small sweep.
    return optuna.samplers.TPESampler(
      seed=seed, n_startup_trials=min(10, max(4, args.trials // 4)), multivariate=True
    )
  return optuna.samplers.RandomSampler(seed=seed)


def open_study(args: argparse.Namespace, space: Space) -> optuna.Study:
  """Creates or continues the study; queues what is to be tried first. Settles `args.trials`.

  Raises:
    SweepError: The folder holds another study, or the storage cannot be reached.
  """
  args.study.mkdir(parents=True, exist_ok=True)
  if (args.study / "metrics.jsonl").exists():
    raise SweepError(f"--study={args.study} is a run; give the sweep a folder of its own")
  with trials.locked(args.study / ".lock"):
    if args.storage:
      name, storage = str(args.study.resolve()), args.storage
    else:
      backend = optuna.storages.journal.JournalFileBackend(str(args.study / "journal.log"))
      name, storage = "sweep", optuna.storages.JournalStorage(backend)
    try:
      study = optuna.create_study(
        storage=storage, study_name=name, direction=args.direction, load_if_exists=True
      )
    except ImportError as error:
      raise SweepError(
        f"--storage: {error}; for postgresql+psycopg://USER@HOST/DATABASE, pip install"
        " 'psycopg[binary]'"
      ) from error
    except sqlalchemy.exc.SQLAlchemyError as error:
      raise SweepError(f"--storage cannot be used: {error}") from error
    check_identity(study, args)
    known = study.get_trials(deepcopy=False)
    if args.sampler == "grid":
      for point in grid_points(space.grid):
        default = all(space.defaults.get(name) == value for name, value in point.items())
        study.enqueue_trial(point, {"grid": True, "default": default}, skip_if_exists=True)
    elif space.defaults and not known:
      study.enqueue_trial(space.defaults, {"default": True})
    if args.trials is None:
      args.trials = len(study.get_trials(deepcopy=False)) if args.sampler == "grid" else 20
  return study


def check_identity(study: optuna.Study, args: argparse.Namespace) -> None:
  """Refuses to continue a study with trials that could not be compared with its first ones.

  What is read off the trials may be corrected until the first one has ended.
  """
  own = {
    "script": list(args.script),
    "direction": args.direction,
    "metric": args.metric,
    "constraint": [constraint.text for constraint in args.constraint],
    "prune_on": args.prune_on,
    "prune_direction": args.prune_direction,
  }
  kept = study.user_attrs.get("identity", own)
  told = any(t.state.is_finished() for t in study.get_trials(deepcopy=False))
  for name in own:
    if kept[name] != own[name] and (told or name in ("script", "direction")):
      old, new = (shlex.join(v) if isinstance(v, list) else v for v in (kept[name], own[name]))
      which = "the command of the script" if name == "script" else f"--{name}"
      raise SweepError(
        f"--study={args.study} was begun with another value of {which}:\n"
        f"    {old or 'none'}\n  not\n    {new or 'none'}\n"
        "  Give the old one to continue it, or another --study to begin a new one."
      )
  study.set_user_attr("identity", own)


class _Parser(argparse.ArgumentParser):
  """Its errors are one line, without the usage, and end with the scripts' exit code for them."""

  def error(self, message: str) -> NoReturn:
    self.exit(EX_USAGE, f"{message}\nSee python -m launch.sweep --help\n")


def _at_least(least: int) -> Callable[[str], int]:
  def read(text: str) -> int:
    try:
      number = int(text)
    except ValueError:
      number = least - 1
    if number < least:
      raise argparse.ArgumentTypeError(f"must be a whole number from {least}, got {text!r}")
    return number

  return read


def make_parser() -> argparse.ArgumentParser:
  """The flags of the command."""
  parser = _Parser(
    prog="python -m launch.sweep",
    usage="python -m launch.sweep --study=DIR --space=FILE [flags] -- SCRIPT [flags of the script]",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument_group("what is tried").add_argument
  add("--study", metavar="DIR", type=pathlib.Path, required=True, help="folder of the sweep")
  add("--space", metavar="FILE", required=True, help="Python file that says what is tried")
  add("--trials", metavar="N", type=_at_least(1), help="trials in all (20, or the whole grid)")
  add("--sampler", choices=["tpe", "random", "grid"], default="tpe", help="who chooses (tpe)")
  add("--seed", metavar="N", type=_at_least(0), default=0, help="of the sampler (0)")
  add = parser.add_argument_group("what is good").add_argument
  add("--metric", metavar="NAME", help="figure of summary.json (that of the space file)")
  add("--direction", choices=["maximize", "minimize"], help="(that of the space file)")
  add(
    "--constraint",
    metavar="'kl<10'",
    type=Constraint.parse,
    action="append",
    default=[],
    help="bound on a figure of summary.json or metrics.jsonl; may be given several times",
  )
  add = parser.add_argument_group(
    "which trials are stopped early (successive halving)"
  ).add_argument
  add("--prune_on", metavar="NAME", default="", help="metric of metrics.jsonl; empty stops none")
  add("--prune_direction", choices=["maximize", "minimize"], help="(that of --direction)")
  add(
    "--prune_after",
    metavar="STEP",
    type=_at_least(1),
    help="first step at which trials are compared (the first one with the metric)",
  )
  add(
    "--reduction_factor",
    metavar="N",
    type=_at_least(2),
    default=3,
    help="the best one in N goes on, and is compared again at N times the steps (3)",
  )
  add = parser.add_argument_group("where trials run").add_argument
  add("--to", metavar="PLACE", default="local", help="local or slurm (local)")
  add("--parallel", metavar="N", type=_at_least(1), default=1, help="trials at a time (1)")
  add(
    "--gpus",
    metavar="N",
    type=_at_least(0),
    default=0,
    help="GPUs of each trial; 0 leaves to a local trial all that there are (0)",
  )
  add("--minutes", metavar="N", type=_at_least(0), default=0, help="time limit of a Slurm job")
  add("--extra", metavar="FLAGS", default="", help="more flags for sbatch, in one string")
  add("--storage", metavar="URL", default="", help="database of the study (a file in its folder)")
  return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Space]:
  """Reads the command line and the space file.

  Raises:
    SweepError: They ask for something impossible.
  """
  parser = make_parser()
  cut = argv.index("--") if "--" in argv else len(argv)
  args = parser.parse_args(argv[:cut])
  args.script = list(argv[cut + 1 :])
  if args.to not in ("local", "slurm"):
    raise SweepError(f"--to={args.to}: a sweep runs its trials local or by slurm")
  if not args.script:
    raise SweepError(
      "the script is missing; write it behind the flags, as in: -- experiments.dpo --steps=100"
    )
  check_script(args.script)
  space = load_space(args.space)
  if args.sampler == "grid" and not space.grid:
    raise SweepError(f"--sampler=grid: {args.space} has no GRID = {{flag name: [values]}}")
  if args.sampler != "grid" and space.sample is None:
    raise SweepError(f"--sampler={args.sampler}: {args.space} has no function space(trial)")
  refuse_twice(space.grid if args.sampler == "grid" else space.defaults, args.script)
  args.metric = args.metric or space.metric
  if not args.metric:
    raise SweepError(f"--metric is missing, and {args.space} has no METRIC")
  args.direction = args.direction or space.direction
  args.prune_direction = args.prune_direction or args.direction
  return args, space


def check_script(script: Sequence[str]) -> None:
  """Raises SweepError if the command of the script cannot work."""
  module = script[0]
  try:
    found = importlib.util.find_spec(module) is not None
  except (ImportError, ValueError):
    found = False
  if not found:
    raise SweepError(f"there is no module {module}; write it like experiments.dpo, flags after it")
  for word in script[1:]:
    if word.split("=")[0] == "--workdir":
      raise SweepError("--workdir is not for the script: every trial gets one of its own")


def make_place(args: argparse.Namespace) -> trials.Place:
  """Where trials run."""
  if args.to == "slurm":
    return trials.Slurm(args.gpus, args.minutes, shlex.split(args.extra))
  if args.minutes or args.extra:
    raise SweepError("--minutes and --extra are for --to=slurm")
  place = trials.Local(args.study, args.gpus)
  if args.gpus * args.parallel > len(place.gpus):
    raise SweepError(
      f"--parallel={args.parallel} trials with --gpus={args.gpus} each are more than the"
      f" {len(place.gpus)} GPUs of this machine (CUDA_VISIBLE_DEVICES, or nvidia-smi, counts them)"
    )
  return place


def main(argv: Sequence[str]) -> int:
  """Runs a sweep; returns its exit code."""
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  try:
    args, space = parse(list(argv))
    place = make_place(args)
    study = open_study(args, space)
  except SweepError as error:
    print(error, file=sys.stderr)
    return EX_USAGE
  ended = sum(t.state.is_finished() for t in study.get_trials(deepcopy=False))
  say(f"{args.study}: {ended} of {args.trials} trials have ended")
  controller = Controller(args, space, study, place)
  try:
    controller.run()
    code, message = 0, ""
  except (SweepError, trials.PlaceError) as error:
    code, message = 1, str(error)
  except KeyboardInterrupt:
    print("not waiting for them; the same command continues the sweep", file=sys.stderr)
    return PREEMPTED
  sweep_report.show(study, args.study, args.metric)
  if message:
    print(message, file=sys.stderr)
  elif controller.was_stopped:
    print("stopped; the same command continues the sweep", file=sys.stderr)
    code = PREEMPTED
  return code


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
