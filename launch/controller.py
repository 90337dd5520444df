"""Controller of a sweep: asks for trials, starts them, watches them, tells how they ended."""

import argparse
import contextlib
import difflib
import json
import math
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from . import job as jobs
from . import sweep_report, trials
from .space import Flags, Space, SweepError, check_flags, flag, refuse_twice

# Exit code of the scripts, and of the sweep, for "stopped and saved; start again to continue".
PREEMPTED = os.EX_TEMPFAIL
# After so many interruptions in a row without a new step in between a trial has failed.
_MAX_STALLED = 2
# If the first trials all fail, the others will.
_HOPELESS = 3
_LOG_LINES = 12


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the rows of a `metrics.jsonl` that may be growing, without lines that are no rows."""
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
  """Returns the metrics of `summary.json`, which a script writes at its end; None before."""
  try:
    summary = json.loads((folder / "summary.json").read_text())
  except (FileNotFoundError, ValueError):
    return None
  metrics = {}
  for name, value in summary.items():
    try:
      metrics[name] = float(value)  # NaN and the infinities are strings in strict JSON.
    except (TypeError, ValueError):
      continue
  return metrics


class Active:
  """A trial that this controller looks after; nobody else does while it holds `owner`.

  Attributes:
    trial: Trial of Optuna.
    folder: Workdir of the trial.
    owner: Descriptor of the lock of the trial.
    handle: The process, if there is one.
    asked: True once the process was asked to stop.
    waits: True while a failure of the place keeps the process from being found or started.
    size: Size of metrics.jsonl when it was last read.
    step: The newest step in metrics.jsonl.
    started_at: The newest step when the process was started.
    stalled: Starts in a row that were interrupted before a new step.
  """

  def __init__(self, trial: optuna.Trial, folder: pathlib.Path, owner: int):
    self.trial, self.folder, self.owner = trial, folder, owner
    self.handle: trials.Handle | None = None
    self.asked = self.waits = False
    self.size, self.step, self.started_at, self.stalled = -1, 0, 0, 0

  @property
  def is_pruned(self) -> bool:
    return "pruned_at" in self.trial.user_attrs

  @property
  def is_default(self) -> bool:
    return self.trial.user_attrs.get("default", False)

  def stop(self) -> None:
    if self.handle is not None and not self.asked:
      self.handle.stop()
      self.asked = True


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
    self._has_worked, self._complaint = False, ""

  @property
  def was_stopped(self) -> bool:
    """Returns whether a signal ended the sweep before it was complete."""
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
            self._stop(active)
          if self._advance(active):
            self._active.remove(active)
            os.close(active.owner)
        self._wait()
    except Exception:
      for active in self._active:
        with contextlib.suppress(trials.PlaceError):  # Others can still be asked.
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
    """Sleeps until it is time to look again, or a signal has come since the last look."""
    was_stopping, until = self._stopping, time.monotonic() + self._place.poll_seconds
    while (rest := until - time.monotonic()) > 0 and self._stopping == was_stopping:
      time.sleep(min(rest, 0.2))

  @contextlib.contextmanager
  def _patient(self) -> Iterator[None]:
    """Lets a place that has worked once fail, as it may for a while; the caller tries again."""
    try:
      yield
    except trials.PlaceError as error:
      if not self._has_worked:
        raise
      if self._complaint != str(error):
        say(f"{error}; trying again every {self._place.poll_seconds:g} seconds")
      self._complaint = str(error)
    else:
      self._has_worked, self._complaint = True, ""

  def _stop(self, active: Active) -> None:
    if active.handle is not None and not active.asked:
      with self._patient():
        active.stop()

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
    """Takes a trial whose controller is dead, else a new one, else None."""
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
    """Takes a trial, if no other controller has it."""
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
    """Reads the present record of a trial from the study."""
    return self._study.get_trials(deepcopy=False)[trial.number]

  def _define(self, trial: optuna.Trial) -> Flags:
    """Returns the flags of a trial, kept, so that they are the same whenever it is continued."""
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
    active.started_at, active.waits = active.step, True
    if active.is_pruned or read_summary(folder) is not None:
      # It is over, and nobody has told yet; the process may be about to end.
      with self._patient():
        active.handle, active.waits = self._place.find(folder), False
      return
    where = "continues" if (folder / "log").exists() else "starts"
    settings = " ".join(flag(name, sweep_report.short(value)) for name, value in flags.items())
    module, *common = self._args.script
    command = [sys.executable, "-m", module, *common, f"--workdir={folder}"]
    command += [flag(name, value) for name, value in flags.items()]
    with self._patient():
      active.handle, active.asked = self._place.start(command, folder), False
      active.waits = False
      note = " with the defaults" if active.is_default else ""
      say(f"trial {trial.number} {where}{note}: {settings}")

  def _advance(self, active: Active) -> bool:
    """Looks at a trial; True if this controller is done with it."""
    if active.waits and not self._stopping:
      self._start(active)
      return False
    if active.waits:
      say(f"trial {active.trial.number} cannot be reached; if it runs, it runs on")
      return True
    code = trials.LOST if active.handle is None else active.handle.poll()
    self._read(active)
    if code is None:
      if active.is_pruned:
        self._stop(active)
      return False
    summary = read_summary(active.folder)
    if summary is not None and code in (0, trials.LOST):
      self._complete(active, summary)
    elif active.is_pruned:
      self._prune(active)
    elif not jobs.may_pass(code):
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
    """Returns whether successive halving drops a trial; the default settings are never dropped."""
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
    metrics = {}
    for name in dict.fromkeys(names):
      if name not in summary and (name == self._args.metric or name not in logged):
        flag_name = "metric" if name == self._args.metric else "constraint"
        self._give_up(
          missing(f"--{flag_name}={name}", name, active.folder / "summary.json", summary)
        )
        return
      metrics[name] = float(summary.get(name, logged.get(name)))
    value = metrics[self._args.metric]
    if math.isnan(value):
      self._fail(active, f"{self._args.metric} is NaN")
      return
    broken = []
    for constraint in self._args.constraint:
      violation = constraint.violation(metrics[constraint.name])
      broken += [constraint.text] if violation > 0 else []
      if constraint.text not in trial.constraints:
        trial.set_constraint(constraint.text, violation)
    trial.set_user_attr("figures", metrics)
    self._tell(active, TrialState.COMPLETE, value)
    shown = ", ".join(f"{name} {number:.4g}" for name, number in metrics.items())
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
  """Returns the workdir of a trial."""
  return study / "trials" / f"{number:04d}"


def missing(flag_text: str, name: str, path: pathlib.Path, names: Mapping[str, Any]) -> str:
  """Says that a file has no such metric, and lists those it has."""
  close = difflib.get_close_matches(name, names, 1)
  hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(names)) or 'none'}"
  return f"{flag_text}: {path} has no {name}; {hint}"


def describe_exit(code: int) -> str:
  """Describes an exit code in words."""
  if code == 0:
    return "it ended without a summary.json"
  if code == trials.LOST:
    return "it ended while no controller was watching"
  number = -code if code < 0 else code - jobs.FIRST_SIGNAL  # The latter as a shell reports it.
  if number in map(int, signal.Signals):
    return f"killed by {signal.Signals(number).name}"
  return f"exit code {code}"


def last_lines(path: pathlib.Path) -> list[str]:
  """Returns the end of a log, without characters that a terminal might obey."""
  try:
    text = path.read_bytes()[-20_000:].decode(errors="replace")
  except FileNotFoundError:
    return []
  lines = [line.split("\r")[-1].rstrip() for line in text.split("\n")]
  lines = [line for line in lines if line][-_LOG_LINES:]
  return ["".join(c if c.isprintable() else "?" for c in line)[:300] for line in lines]


def say(text: str) -> None:
  """Writes a line for the person who watches."""
  print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def make_sampler(args: argparse.Namespace, number: int) -> optuna.samplers.BaseSampler:
  """Makes the sampler of trial `number`. Points of a grid are queued, so that it draws nothing."""
  seed = (args.seed * 100_003 + number) % 2**32
  if args.sampler == "tpe":
    # A few at random first; ten, as is the default, would be most of a small sweep.
    return optuna.samplers.TPESampler(
      seed=seed, n_startup_trials=min(10, max(4, args.trials // 4)), multivariate=True
    )
  return optuna.samplers.RandomSampler(seed=seed)
