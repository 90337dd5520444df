"""Reports of a sweep: its table, the flags of the best trial, plots."""

import csv
import io
import math
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from rich import box, table
from rich.console import Console
from rich.text import Text

_WORDS = {
  TrialState.COMPLETE: "done",
  TrialState.PRUNED: "pruned",
  TrialState.FAIL: "failed",
  TrialState.RUNNING: "unfinished",
  TrialState.WAITING: "waiting",
}


def short(value: Any) -> Any:
  """Rounds a float to three digits; returns anything else unchanged."""
  return float(f"{value:.3g}") if isinstance(value, float) else value


def best_trial(study: optuna.Study) -> FrozenTrial | None:
  """Best trial among those that meet all constraints; None if there is none."""
  try:
    return study.best_trial
  except ValueError:
    return None


def default_trial(study: optuna.Study) -> FrozenTrial | None:
  """Trial with the script's default settings, if it is complete."""
  for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
    if trial.user_attrs.get("default"):
      return trial
  return None


def ordered(study: optuna.Study) -> list[FrozenTrial]:
  """Sorts the trials that have begun: complete ones, best first, then the others, longest first."""
  down = -1 if study.direction == StudyDirection.MAXIMIZE else 1

  def key(trial: FrozenTrial) -> tuple:
    done = trial.state == TrialState.COMPLETE
    value = down * trial.value if done and trial.value is not None else 0.0
    return not done, is_infeasible(trial), value, -(trial.last_step or -1), trial.number

  begun = [t for t in study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]
  return sorted(begun, key=key)


def is_infeasible(trial: FrozenTrial) -> bool:
  """True if a trial violates a constraint."""
  return any(violation > 0 for violation in trial.constraints.values())


def describe(trial: FrozenTrial) -> str:
  """Describes the outcome of a trial in a word or two."""
  if trial.state == TrialState.PRUNED and "pruned_at" in trial.user_attrs:
    return f"pruned at {trial.user_attrs['pruned_at']}"
  if broken := [text for text, violation in trial.constraints.items() if violation > 0]:
    return f"not {', '.join(broken)}"
  return _WORDS[trial.state]


def write_files(study: optuna.Study, folder: pathlib.Path) -> None:
  """Rewrites `table.csv` and `best/flags`, each atomically."""
  begun = study.get_trials(deepcopy=False)
  begun = [trial for trial in begun if trial.state != TrialState.WAITING]
  metrics = _names(trial.user_attrs.get("figures", {}) for trial in begun)
  flags = _names(trial.user_attrs.get("flags", {}) for trial in begun)
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(
    ["trial", "state", *metrics, *flags, "default", "feasible", "pruned_at", "seconds", "reason"]
  )
  for trial in begun:
    done = trial.state == TrialState.COMPLETE
    seconds = round(trial.duration.total_seconds(), 1) if trial.duration else ""
    writer.writerow(
      [
        trial.number,
        _WORDS[trial.state],
        *(trial.user_attrs.get("figures", {}).get(name, "") for name in metrics),
        *(trial.user_attrs.get("flags", {}).get(name, "") for name in flags),
        "yes" if trial.user_attrs.get("default") else "no",
        ("no" if is_infeasible(trial) else "yes") if done else "",
        trial.user_attrs.get("pruned_at", "") if trial.state == TrialState.PRUNED else "",
        seconds,
        trial.user_attrs.get("reason", ""),
      ]
    )
  _write(folder / "table.csv", text.getvalue())
  best = best_trial(study)
  if best is not None:
    source = folder / "trials" / f"{best.number:04d}" / "flags"
    if source.exists():
      lines = source.read_text().splitlines(keepends=True)
      kept = [line for line in lines if not line.startswith("--workdir=")]
      _write(folder / "best" / "flags", "".join(kept))


def _names(dicts) -> list[str]:
  return list(dict.fromkeys(name for each in dicts for name in each))


def _write(path: pathlib.Path, text: str) -> None:
  """Writes a file atomically: several controllers may write it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  temporary.write_text(text)
  os.replace(temporary, path)


def importances(study: optuna.Study) -> dict[str, float]:
  """Importance of each parameter by PED-ANOVA, as shares; empty if there are too few trials."""
  done = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.params]
  if len(done) < 4 or len({trial.value for trial in done}) < 2:
    return {}
  try:
    return optuna.importance.get_param_importances(study)
  except (RuntimeError, ValueError):  # No parameter differs between trials.
    return {}


def show(study: optuna.Study, folder: pathlib.Path, metric: str) -> None:
  """Prints the table and draws the plots."""
  write_files(study, folder)
  trials = ordered(study)
  if not trials:
    return
  best, default = best_trial(study), default_trial(study)
  metrics = _names(trial.user_attrs.get("figures", {}) for trial in trials)
  flags = _names(trial.user_attrs.get("flags", {}) for trial in trials)
  shown = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
  shown.add_column("trial", justify="right")
  for name in (*metrics, *_shortest(flags)):
    shown.add_column(Text(name), justify="right")  # As Text, so that it is not read as markup.
  shown.add_column("")
  for trial in trials:
    values = trial.user_attrs.get("figures", {}), trial.user_attrs.get("flags", {})
    ended = describe(trial) if trial.state != TrialState.COMPLETE or is_infeasible(trial) else ""
    notes = ["best"] if best is not None and trial.number == best.number else []
    notes += ["defaults"] if trial.user_attrs.get("default") else []
    cells = [
      *(_cell(values[0].get(name)) for name in metrics),
      *(_cell(values[1].get(name)) for name in flags),
    ]
    row = [str(trial.number), *cells, ", ".join([*notes, ended] if ended else notes)]
    shown.add_row(*map(Text, row), style="bold" if "best" in notes else None)
  console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 160)
  console.print(shown)
  lines = []
  if best is not None and best.value is not None:
    line = f"best: trial {best.number}, {metric} {best.value:.4g}"
    if default is not None and default.value is not None:
      line += f"; the default settings, trial {default.number}, have {default.value:.4g}"
    lines.append(line)
    if (replay := folder / "best" / "flags").exists():
      lines.append(f"replay it with --flagfile={replay} --workdir=DIR")
  elif any(trial.state == TrialState.COMPLETE for trial in trials):
    lines.append("no trial keeps the constraints")
  if shares := importances(study):
    lines.append("importance: " + ", ".join(f"{name} {x:.0%}" for name, x in shares.items()))
  lines.append(f"table: {folder / 'table.csv'}")
  if drawn := draw(study, folder / "plots", metric):
    lines.append(f"plots: {folder / 'plots'}: " + ", ".join(path.stem for path in drawn))
  print("\n".join(lines), file=sys.stderr)


def _cell(value: Any) -> str:
  if value is None:
    return "–"
  if isinstance(value, list):
    return ",".join(map(str, value))
  return f"{value:.3g}" if isinstance(value, float) else str(value)


def _shortest(names: Sequence[str]) -> list[str]:
  """Last part of each name, or the full name if two have the same last part."""
  ends = [name.rpartition(".")[2] for name in names]
  return [end if ends.count(end) == 1 else name for end, name in zip(ends, names, strict=True)]


# The style of the scripts' plots, whose code needs jax.
_BLUE, _RED, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
_STYLE = {
  "axes.axisbelow": True,
  "axes.edgecolor": "#888888",
  "axes.grid": True,
  "axes.labelcolor": "#222222",
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 11,
  "axes.titleweight": "bold",
  "font.size": 10,
  "grid.color": "#e6e6e6",
  "grid.linewidth": 0.8,
  "legend.frameon": False,
  "text.parse_math": False,
  "xtick.color": "#444444",
  "ytick.color": "#444444",
}


def draw(study: optuna.Study, folder: pathlib.Path, metric: str) -> list[pathlib.Path]:
  """Writes the plots that have data: history, slice, parallel, importances, learning."""
  done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
  written = []
  if len(done) >= 2:
    written += [_save(folder / "history.png", 1, lambda axes: _history(axes[0], study, metric))]
    names = [name for name in _names(t.params for t in done) if _varies(done, name)]
    if names:
      written += [
        _save(folder / "slice.png", len(names), lambda axes: _slices(axes, study, names, metric)),
        _save(folder / "parallel.png", 1, lambda axes: _parallel(axes[0], study, names, metric)),
      ]
    if shares := importances(study):
      written.append(
        _save(folder / "importances.png", 1, lambda axes: _importances(axes[0], shares, metric))
      )
  if any(len(t.intermediate_values) > 1 for t in study.get_trials(deepcopy=False)):
    written.append(_save(folder / "learning.png", 1, lambda axes: _learning(axes[0], study)))
  return written


def _save(path: pathlib.Path, count: int, paint: Callable[[Sequence[Any]], None]) -> pathlib.Path:
  import matplotlib  # Takes about a second, so only at the end of a sweep.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  columns = min(count, 3)
  rows = -(-count // columns)
  with matplotlib.rc_context(_STYLE):
    size = (6.4, 4.0) if count == 1 else (4.2 * columns, 3.6 * rows)
    figure = Figure(figsize=size, layout="tight")
    FigureCanvasAgg(figure)  # No display and no global state, whatever backend is configured.
    paint([figure.add_subplot(rows, columns, i + 1) for i in range(count)])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
  return path


def _varies(trials: Sequence[FrozenTrial], name: str) -> bool:
  return len({trial.params[name] for trial in trials if name in trial.params}) > 1


def _history(axes, study: optuna.Study, metric: str) -> None:
  done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
  feasible = [trial for trial in done if not is_infeasible(trial)]
  broken = [trial for trial in done if is_infeasible(trial)]
  better = max if study.direction == StudyDirection.MAXIMIZE else min
  axes.plot(
    [t.number for t in feasible], [t.value for t in feasible], "o", color=_BLUE, label="trial"
  )
  if broken:
    axes.plot(
      [t.number for t in broken],
      [t.value for t in broken],
      "x",
      color=_GREY,
      label="breaks a constraint",
    )
  if feasible:
    best = [better(t.value for t in feasible[: i + 1]) for i in range(len(feasible))]
    last = max(trial.number for trial in study.get_trials(deepcopy=False))
    axes.step(
      [*(t.number for t in feasible), last],
      [*best, best[-1]],
      where="post",
      color=_BLUE,
      label="best so far",
    )
  if (default := default_trial(study)) is not None:
    axes.axhline(default.value, color=_RED, linestyle="--", label="default settings")
  # Trials without a value are marks at the bottom of the chart.
  for state, colour in ((TrialState.PRUNED, _GREY), (TrialState.FAIL, _RED)):
    numbers = [t.number for t in study.get_trials(deepcopy=False, states=(state,))]
    if numbers:
      axes.plot(
        numbers,
        [0.02] * len(numbers),
        "|",
        color=colour,
        markersize=9,
        label=_WORDS[state],
        transform=axes.get_xaxis_transform(),
      )
  axes.xaxis.get_major_locator().set_params(integer=True)
  axes.set(title="Trials", xlabel="Trial", ylabel=metric)
  axes.legend(fontsize=8)


def _is_log(trials: Sequence[FrozenTrial], name: str) -> bool:
  """True if a parameter needs a logarithmic axis: it is sampled that way, or on a wide grid."""
  values = [trial.params[name] for trial in trials]
  if not _is_numeric(trials, name) or min(values) <= 0:
    return False
  distributions = [trial.distributions[name] for trial in trials]
  choices = all(isinstance(d, CategoricalDistribution) for d in distributions)
  wide = choices and max(values) >= 10 * min(values)
  return wide or any(getattr(d, "log", False) for d in distributions)


def _set_log(axes) -> None:
  """Makes the x axis logarithmic, with plain numbers as labels."""
  from matplotlib import ticker

  axes.set_xscale("log")
  low, high = axes.get_xlim()
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3) if high < 300 * low else (1,)))
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
  axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _slices(axes, study: optuna.Study, names: Sequence[str], metric: str) -> None:
  trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
  best, default = best_trial(study), default_trial(study)
  for i, (each, name) in enumerate(zip(axes, names, strict=True)):
    here = [trial for trial in trials if name in trial.params]
    value_of = (lambda v: v) if _is_numeric(here, name) else str
    for broken, marker, colour in ((False, "o", _BLUE), (True, "x", _GREY)):
      group = [trial for trial in here if is_infeasible(trial) == broken]
      each.plot(
        [value_of(t.params[name]) for t in group], [t.value for t in group], marker, color=colour
      )
    for trial, marker, colour, label in (
      (default, "D", _RED, "default settings"),
      (best, "*", _GREEN, "best"),
    ):
      if trial is not None and name in trial.params:
        each.plot(
          [value_of(trial.params[name])],
          [trial.value],
          marker,
          color=colour,
          label=label,
          markersize=13 if marker == "*" else 7,
        )
    if _is_log(here, name):
      _set_log(each)
    each.set(xlabel=name, ylabel=metric if i % 3 == 0 else "")
    if i == 0:
      each.legend(fontsize=8)


def _is_numeric(trials: Sequence[FrozenTrial], name: str) -> bool:
  values = [trial.params[name] for trial in trials]
  return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _parallel(axes, study: optuna.Study, names: Sequence[str], metric: str) -> None:
  """Draws a line per trial through an axis per parameter; better trials are darker."""
  import matplotlib

  done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
  done = [trial for trial in done if all(name in trial.params for name in names)]
  if not done:
    return
  columns = [*names, metric]
  places: list[list[float]] = []
  for name in names:
    values = [trial.params[name] for trial in done]
    if _is_numeric(done, name):
      log = _is_log(done, name)
      numbers = [math.log(v) if log else float(v) for v in values]
      low, high = min(values), max(values)
    else:
      words = sorted(set(map(str, values)))
      numbers = [float(words.index(str(v))) for v in values]
      low, high = words[0], words[-1]
    places.append(_unit(numbers))
    _ends(axes, len(places) - 1, low, high)
  results = [trial.value for trial in done]
  places.append(_unit(results))
  _ends(axes, len(places) - 1, min(results), max(results))
  # From pale to dark blue; the palest is still visible.
  colours, span = matplotlib.colormaps["Blues"], max(results) - min(results)
  worst = min(results) if study.direction == StudyDirection.MAXIMIZE else max(results)
  best = best_trial(study)
  for i, trial in enumerate(done):
    is_best = best is not None and trial.number == best.number
    axes.plot(
      range(len(columns)),
      [column[i] for column in places],
      linestyle=":" if is_infeasible(trial) else "-",
      color=colours(0.3 + 0.7 * abs(trial.value - worst) / (span or 1)),
      linewidth=3 if is_best else 1.2,
      alpha=1 if is_best else 0.7,
      zorder=3 if is_best else 2,
    )
  axes.set_xticks(range(len(columns)), [_shortest(columns)[i] for i in range(len(columns))])
  axes.set(yticks=[], ylim=(-0.1, 1.1), title="Settings: darker is better, thick is best")
  axes.spines["left"].set_visible(False)
  axes.grid(axis="x", color="#888888")


def _unit(values: Sequence[float]) -> list[float]:
  low, high = min(values), max(values)
  return [(value - low) / (high - low) if high > low else 0.5 for value in values]


def _ends(axes, place: int, low: Any, high: Any) -> None:
  """Labels the two ends of a parameter's axis."""
  for y, value, align in ((-0.02, low, "top"), (1.02, high, "bottom")):
    axes.text(place, y, _cell(value), ha="center", va=align, fontsize=8)


def _importances(axes, shares: dict[str, float], metric: str) -> None:
  names = list(shares)[::-1]
  bars = axes.barh(names, [shares[name] for name in names], color=_BLUE, height=0.6)
  axes.bar_label(bars, [f"{shares[name]:.0%}" for name in names], padding=3, fontsize=8)
  axes.set(
    title=f"Parameters that {metric} depends on", xlabel="Importance (PED-ANOVA)", xlim=(0, 1)
  )
  axes.grid(axis="y", visible=False)


def _learning(axes, study: optuna.Study) -> None:
  """Draws the metric that decides about pruning, over the steps."""
  best = best_trial(study)
  identity = study.user_attrs["identity"]
  sign = 1 if identity["prune_direction"] == identity["direction"] else -1
  labels = set()
  for trial in study.get_trials(deepcopy=False):
    steps = sorted(trial.intermediate_values)
    values = [sign * trial.intermediate_values[step] for step in steps]
    is_best = best is not None and trial.number == best.number
    label, colour = (
      ("best", _GREEN)
      if is_best
      else ("pruned", _GREY)
      if trial.state == TrialState.PRUNED
      else ("default settings", _RED)
      if trial.user_attrs.get("default")
      else ("other trials", _BLUE)
    )
    axes.plot(
      steps,
      values,
      color=colour,
      marker="o",
      markersize=3,
      linewidth=2 if is_best else 1,
      zorder=3 if is_best else 2,
      label=None if label in labels else label,
    )
    labels.add(label)
  axes.set(title="Metric for pruning", xlabel="Step", ylabel=identity["prune_on"])
  axes.legend(fontsize=8)
