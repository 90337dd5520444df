"""What people see: start panel, progress, samples, summary and plots.

Messages go to stderr. On a terminal they are drawn with rich; anywhere else (a log file, a pod's
log collector) the same facts are plain lines. Only the first process speaks. Text that a model or
a data file wrote is made harmless before it is shown: it can neither move the cursor nor be read
as markup.
"""

import dataclasses
import io
import json
import math
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from etils import epath
from rich import box, table
from rich.console import Console
from rich.panel import Panel as RichPanel
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from rlhf_jax import metrics as metrics_lib
from rlhf_jax import processes

Cell = str | float

# rich looks up sys.stderr at each use, and one console for everything lets it print above a bar.
_CONSOLE = Console(stderr=True, markup=False, highlight=False, emoji=False)


def _on_terminal() -> bool:
  return sys.stderr.isatty() and not _CONSOLE.is_dumb_terminal


def _plain(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def note(text: str) -> None:
  """One plain line for the person who watches."""
  if processes.is_first():
    _plain(escape(text))


def escape(text: str, *, newlines: bool = False) -> str:
  r"""`text` with every character that a terminal might obey written as `\n`, `\x1b`, `\u202e`.

  Those are the control characters, the invisible ones that reorder or hide text, and halves of
  surrogate pairs.

  Args:
    text: Text from outside.
    newlines: Whether line feeds may stay.
  """

  def visible(char: str) -> str:
    if char == "\n" and newlines:
      return char
    # Cc control, Cf format (bidirectional overrides, zero width), Cs surrogate, Co private,
    # Zl and Zp line and paragraph separator.
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
      return char.encode("unicode_escape", "surrogatepass").decode("ascii")
    return char

  return "".join(map(visible, text))


def human(n: float) -> str:
  """A count in three digits: 512, 1.05M, 8.03B."""
  if abs(n) < 1000:
    return f"{n:.3g}"
  for unit in ("K", "M", "B", "T"):
    n /= 1000
    if abs(n) < 999.5 or unit == "T":
      break
  decimals = max(0, 2 - math.floor(math.log10(max(abs(n), 1))))
  return f"{n:.{decimals}f}{unit}"


def human_bytes(n: float) -> str:
  """A size in binary units: 512 B, 1.50 KiB, 15.75 GiB."""
  if abs(n) < 1024:
    return f"{n:.0f} B"
  for unit in ("KiB", "MiB", "GiB", "TiB"):
    n /= 1024
    if abs(n) < 1023.995 or unit == "TiB":
      break
  return f"{n:.2f} {unit}"


def duration(seconds: float) -> str:
  """A time in its two largest units: 42s, 3m 05s, 2h 10m, 3d 04h."""
  if not math.isfinite(seconds):
    return "?"
  seconds = round(max(seconds, 0))
  if seconds < 60:
    return f"{seconds}s"
  if seconds < 3600:
    return f"{seconds // 60}m {seconds % 60:02d}s"
  if seconds < 86400:
    return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
  return f"{seconds // 86400}d {seconds % 86400 // 3600:02d}h"


def cell(value: Cell) -> str:
  """A cell of a table as text: made harmless, numbers in four digits."""
  if isinstance(value, str):
    return escape(value, newlines=True)
  if isinstance(value, int):
    return str(value)
  value = float(value)
  if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
    return f"{value:.3e}"
  return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3f}"


def start_panel(title: str, rows: Mapping[str, object]) -> None:
  """Shows what is about to run: model, parameters, mesh, tokens per step, memory."""
  if not processes.is_first():
    return
  if not _on_terminal():
    _plain(f"== {escape(title)} ==")
    for name, value in rows.items():
      _plain(f"  {escape(name)}: {escape(str(value))}")
    return
  grid = table.Table.grid(padding=(0, 2))
  grid.add_column(style="bold")
  grid.add_column(overflow="fold")
  for name, value in rows.items():
    grid.add_row(Text(escape(name)), Text(escape(str(value), newlines=True)))
  _CONSOLE.print(
    RichPanel(grid, title=Text(escape(title)), title_align="left", expand=False, box=box.ROUNDED)
  )


class Progress:
  """A progress bar on a terminal; elsewhere a plain line now and then.

  Use it as a context manager around the loop and call `update` after each step. The rate leaves
  out the first step, most of which is compilation.
  """

  # What a line has room for, most wanted first.
  SHOWN = ("loss", "reward/mean", "gold_reward/mean", "reward/accuracy", "kl/ref", "win_rate")
  MAX_SHOWN = 4

  def __init__(
    self,
    total: int,
    initial: int = 0,
    description: str = "train",
    *,
    every_seconds: float = 60.0,
    tenths: bool = True,
    clock=time.monotonic,
  ):
    """Prepares the bar; nothing is shown before `__enter__`.

    Args:
      total: Number of steps of the whole run.
      initial: Steps already taken (a resumed run).
      description: What the steps are.
      every_seconds: Off a terminal, a line comes after this time at the latest; the first and
        last step have one too.
      tenths: So has every tenth of the run.
      clock: For tests.
    """
    self._total, self._step, self._description = total, initial, escape(description)
    self._every_seconds, self._tenths, self._clock = every_seconds, tenths, clock
    self._timed_from: tuple[int, float] | None = None
    self._last_line: tuple[int, float] | None = None
    self._bar: RichProgress | None = None
    self._task: Any = None

  def __enter__(self) -> Self:
    if processes.is_first() and _on_terminal():
      self._bar = RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
        TextColumn("{task.fields[rate]}", markup=False, style="cyan"),
        TextColumn("{task.fields[left]}", markup=False),
        TextColumn("{task.fields[shown]}", markup=False, style="green"),
        console=_CONSOLE,
        refresh_per_second=4,
      )
      self._task = self._bar.add_task(
        self._description, total=self._total, completed=self._step, rate="", left="", shown=""
      )
      self._bar.start()
    return self

  def __exit__(self, *exception: object) -> None:
    if self._bar is not None:
      self._bar.stop()
      self._bar = None

  def _rate(self, now: float) -> float:
    """Steps a second, 0 while unknown."""
    if self._timed_from is None:
      self._timed_from = (self._step, now)
    step, then = self._timed_from
    return (self._step - step) / (now - then) if self._step > step and now > then else 0.0

  def _due(self, now: float) -> bool:
    if self._last_line is None or self._step >= self._total:
      return True
    step, then = self._last_line
    tenth = 10 * self._step // self._total > 10 * step // self._total
    return (self._tenths and tenth) or now - then >= self._every_seconds

  def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
    """Shows that `step` steps have been taken, and a few of `metrics`."""
    if not processes.is_first():
      return
    metrics = metrics or {}
    now, self._step = self._clock(), step
    rate = self._rate(now)
    names = [name for name in self.SHOWN if name in metrics][: self.MAX_SHOWN]
    shown = "  ".join(f"{name} {cell(float(metrics[name]))}" for name in names)
    per_second = ""
    left = ""
    if rate:
      per_second = f"{rate:.3g} steps/s" if rate >= 0.1 else f"{1 / rate:.3g} s/step"
      left = f"{duration((self._total - step) / rate)} left"
    if self._bar is not None:
      self._bar.update(self._task, completed=step, rate=per_second, left=left, shown=shown)
    elif self._due(now):
      self._last_line = (step, now)
      percent = 100 * step // self._total if self._total else 100
      parts = [f"{self._description}: step {step}/{self._total} ({percent}%)", per_second, left]
      _plain("  ".join(part for part in [*parts, shown] if part))


def show_samples(
  rows: Sequence[Mapping[str, Cell]], title: str = "Samples", limit: int = 4
) -> None:
  """Shows the first `limit` rows: one column per key, such as prompt, response, reward."""
  if not processes.is_first() or not rows:
    return
  rows = rows[:limit]
  columns = list(dict.fromkeys(name for row in rows for name in row))
  if not _on_terminal():
    _plain(f"== {escape(title)} ==")
    for i, row in enumerate(rows, start=1):
      for name in columns:
        if name in row:
          _plain(f"  [{i}] {escape(name)}: {cell(row[name])}".replace("\n", "\\n"))
    return
  out = table.Table(title=Text(escape(title)), box=box.ROUNDED, show_lines=True, title_style="bold")
  for name in columns:
    is_text = any(isinstance(row.get(name), str) for row in rows)
    out.add_column(
      Text(escape(name)),
      justify="left" if is_text else "right",
      no_wrap=not is_text,
      overflow="fold",
      ratio=None if not is_text else (1 if name == "prompt" else 2),
    )
  for row in rows:
    out.add_row(*[Text(cell(row[name])) if name in row else Text("–") for name in columns])
  _CONSOLE.print(out)


def show_pair(prompt: str, left: str, right: str, title: str, keys: Mapping[str, str]) -> None:
  """Shows two responses side by side, and the keys that answer the question which is better."""
  if not processes.is_first():
    return
  hint = "   ".join(f"[{key}] {meaning}" for key, meaning in keys.items())
  if not _on_terminal():
    _plain(f"== {escape(title)} ==")
    for name, text in (("request", prompt), ("a", left), ("b", right), ("keys", hint)):
      _plain(f"  {name}: {escape(text)}")
    return
  responses = table.Table.grid(expand=True, padding=(0, 1))
  responses.add_column(ratio=1)
  responses.add_column(ratio=1)
  responses.add_row(
    *(
      RichPanel(Text(escape(text, newlines=True)), title=name, title_align="left")
      for name, text in (("a", left), ("b", right))
    )
  )
  _CONSOLE.clear()
  _CONSOLE.print(
    RichPanel(Text(escape(prompt, newlines=True)), title=Text(escape(title)), title_align="left")
  )
  _CONSOLE.print(responses)
  _CONSOLE.print(Text(hint))


def save_samples(workdir: epath.PathLike, step: int, rows: Sequence[Mapping[str, Cell]]) -> None:
  """Writes all rows to `WORKDIR/samples/step_00000100.jsonl`; see `metrics.write_table`."""
  if processes.is_first():
    metrics_lib.write_table(workdir, step, "samples", rows)


def write_summary(workdir: epath.PathLike, summary: Mapping[str, Any]) -> None:
  """Writes the final figures to `WORKDIR/summary.json`, atomically.

  Keys are sorted and floats keep six digits: two summaries can be compared line by line.
  """
  if not processes.is_first():
    return
  ready = metrics_lib.json_ready(summary, digits=6)
  text = json.dumps(ready, indent=2, sort_keys=True, allow_nan=False)
  metrics_lib.write_atomic(epath.Path(workdir) / "summary.json", text + "\n")


def show_summary(title: str, rows: Mapping[str, Mapping[str, Cell]]) -> None:
  """Shows the final table, for example `{"gold reward": {"SFT": 0.41, "PPO": 0.73}}`.

  Args:
    title: Heading.
    rows: Metric to policy to figure; a policy without a figure gets a dash.
  """
  if not processes.is_first():
    return
  policies = list(dict.fromkeys(name for row in rows.values() for name in row))
  cells = [
    [escape(metric), *[escape(cell(row[name])) if name in row else "–" for name in policies]]
    for metric, row in rows.items()
  ]
  header = ["", *map(escape, policies)]
  if not _on_terminal():
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    _plain(f"== {escape(title)} ==")
    for first, *rest in [header, *cells]:
      figures = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
      _plain("  ".join(["", first.ljust(widths[0]), *figures]).rstrip())
    return
  out = table.Table(title=Text(escape(title)), box=box.ROUNDED, title_style="bold")
  out.add_column("")
  for name in policies:
    out.add_column(Text(escape(name)), justify="right")
  for row in cells:
    out.add_row(*map(Text, row))
  _CONSOLE.print(out)


@dataclasses.dataclass(frozen=True)
class Panel:
  """One plot.

  Attributes:
    title: Heading.
    metrics: Names in `metrics.jsonl`, one line each; those that a run lacks are left out.
    ylabel: Label of the y axis, with the unit.
    labels: What the legend calls the metrics; their names where empty.
    x: Metric of the x axis, or "step".
    xlabel: Label of the x axis, with the unit.
  """

  title: str
  metrics: tuple[str, ...]
  ylabel: str
  labels: tuple[str, ...] = ()
  x: str = "step"
  xlabel: str = "Step"


PANELS = {
  "loss": Panel("Loss", ("loss",), "Loss"),
  "reward": Panel(
    "Reward",
    ("reward/mean", "gold_reward/mean"),
    "Reward",
    labels=("Proxy (trained on)", "Gold (held out)"),
  ),
  "gold_vs_proxy": Panel(
    "Over-optimisation: reward against KL",
    ("reward/mean", "gold_reward/mean"),
    "Reward",
    labels=("Proxy (trained on)", "Gold (held out)"),
    x="kl/ref",
    xlabel="KL to the reference (nats)",
  ),
  "kl": Panel("Distance from the reference", ("kl/ref",), "KL to the reference (nats)"),
  "accuracy": Panel("Preference accuracy", ("reward/accuracy",), "Fraction of pairs"),
  "margin": Panel(
    "Rewards of preferred and other response",
    ("reward/chosen", "reward/rejected", "reward/margin"),
    "Reward",
    labels=("Chosen", "Rejected", "Margin"),
  ),
  "win_rate": Panel("Win rate", ("win_rate",), "Fraction of comparisons"),
  "entropy": Panel("Entropy of the policy", ("entropy",), "Entropy (nats per token)"),
  "response_length": Panel("Response length", ("response_length/mean",), "Tokens"),
  "grad_norm": Panel("Gradient norm", ("grad_norm",), "Global L2 norm"),
  "throughput": Panel("Throughput", ("tokens_per_second",), "Tokens per second"),
}

# Okabe and Ito's palette: distinguishable with every kind of colour vision, and in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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
  "text.parse_math": False,  # A `$` in a name is a `$`.
  "xtick.color": "#444444",
  "ytick.color": "#444444",
}


def _points(rows: Sequence[Mapping[str, float]], x: str, y: str) -> np.ndarray:
  """[n, 2] finite points, ordered by x. Rows of the same step belong together."""
  steps: dict[float, dict[str, float]] = {}
  for row in rows:
    steps.setdefault(row["step"], {}).update(row)
  found = [(row[x], row[y]) for _, row in sorted(steps.items()) if x in row and y in row]
  points = np.asarray(found, np.float64).reshape(-1, 2)
  points = points[np.isfinite(points).all(axis=1)]
  return points[np.argsort(points[:, 0], kind="stable")]


def _smooth(y: np.ndarray) -> np.ndarray:
  """[n] centred moving average over about a twentieth of the points; it does not lag behind."""
  half = len(y) // 40
  total = np.concatenate([[0.0], np.cumsum(y)])
  # At the ends half a window is left: a shrinking one would end in the noise of the last point.
  first = np.maximum(np.arange(len(y)) - half, 0)
  last = np.minimum(np.arange(len(y)) + half + 1, len(y))
  return (total[last] - total[first]) / (last - first)


def _png(
  draw: Callable[[Sequence[Any]], None], count: int = 1, layout: Literal["tight"] | None = "tight"
) -> bytes:
  """The figure that `draw` makes of `count` axes, two in a row."""
  import matplotlib  # A second or so, which only the scripts that plot should pay.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows, columns = -(-count // 2), min(count, 2)
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(6.4 * columns, 4.0 * rows), layout=layout)
    FigureCanvasAgg(figure)  # No display and no global state, whatever backend is configured.
    draw([figure.add_subplot(rows, columns, i + 1) for i in range(count)])
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
  return png.getvalue()


def render_panel(panel: Panel, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes | None:
  """One plot as PNG: the figures as logged are faint, a moving average is drawn over them.

  Args:
    panel: What to plot.
    runs: Rows of `metrics.jsonl` by the name of the run; the name matters only if there are more.

  Returns:
    The PNG, or None if no run has two points to join.
  """
  several = len(runs) > 1
  lines = []
  for r, (run, rows) in enumerate(runs.items()):
    for m, name in enumerate(panel.metrics):
      points = _points(rows, panel.x, name)
      if len(points) >= 2:
        label = panel.labels[m] if panel.labels else name
        if several:
          label = f"{run}: {label}" if len(panel.metrics) > 1 else run
        # Of several runs each has a colour, and each metric a dash; of one, each metric a colour.
        colour = _COLOURS[(r if several else m) % len(_COLOURS)]
        lines.append((label, points, colour, _DASHES[m % len(_DASHES)] if several else "-"))
  if not lines:
    return None

  def draw(all_axes: Sequence[Any]) -> None:
    (axes,) = all_axes
    for label, points, colour, dash in lines:
      x, y = points.T
      smoothed = _smooth(y)
      if panel.x != "step":
        axes.plot(x, y, ".", color=colour, alpha=0.25, markersize=4, markeredgewidth=0)
      elif not np.array_equal(smoothed, y):
        axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
      marker = "o" if len(x) <= 25 else None
      axes.plot(
        x, smoothed, dash, color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=label
      )
    axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    axes.margins(x=0.02)
    if len(lines) > 1:
      axes.legend()
    # Room for seven digits and a power of ten. A layout that measures them draws all twice.
    axes.figure.subplots_adjust(left=0.155, right=0.98, bottom=0.125, top=0.88)

  return _png(draw, layout=None)


def save_panels(
  runs: Mapping[str, Sequence[Mapping[str, float]]],
  folder: epath.PathLike,
  panels: Mapping[str, Panel] = PANELS,
) -> list[epath.Path]:
  """Writes `FOLDER/NAME.png` for each panel that a run has metrics for.

  Args:
    runs: Rows of `metrics.jsonl` by the name of the run.
    folder: Where to write; created.
    panels: What to plot, by file name.

  Returns:
    The files written.

  Raises:
    ValueError: If the name of a panel is not a plain file name.
  """
  written = []
  for name, panel in panels.items():
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
      raise ValueError(f"the panel name {name!r} is not a plain file name")
    png = render_panel(panel, runs)
    if png is not None and processes.is_first():
      path = epath.Path(folder) / f"{name}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(png)
      written.append(path)
  return written


def plot_metrics(workdir: epath.PathLike, panels: Mapping[str, Panel] = PANELS) -> list[epath.Path]:
  """Draws `WORKDIR/plots/*.png` from `WORKDIR/metrics.jsonl`; see `save_panels`."""
  if not processes.is_first():
    return []
  workdir = epath.Path(workdir)
  rows = metrics_lib.read_metrics(workdir / "metrics.jsonl")
  return save_panels({workdir.name: rows}, workdir / "plots", panels)


class Line(NamedTuple):
  """A line of a chart.

  Attributes:
    label: Name in the legend.
    x: [n], ascending.
    y: [n].
    low: [n] lower end of a band around it; None draws no band.
    high: [n] upper end.
    peak: Written at its highest point, with that point's {x} and {y}; empty marks none.
  """

  label: str
  x: np.ndarray
  y: np.ndarray
  low: np.ndarray | None = None
  high: np.ndarray | None = None
  peak: str = ""


class Point(NamedTuple):
  """A labelled point of a chart.

  Attributes:
    label: Written beside it.
    x: Figure on the x axis.
    y: Figure on the y axis.
    x_range: Ends of the error bar; None draws none.
    y_range: The same for y.
  """

  label: str
  x: float
  y: float
  x_range: tuple[float, float] | None = None
  y_range: tuple[float, float] | None = None


class Chart(NamedTuple):
  """Lines and points on one pair of axes.

  Attributes:
    title: Heading.
    xlabel: Label of the x axis, with the unit.
    ylabel: Label of the y axis, with the unit.
    lines: What to join.
    points: What to label.
    root_x: Whether distances along x are those of its square root, as is usual for a KL: rewards
      rise nearly in proportion to it.
  """

  title: str
  xlabel: str
  ylabel: str
  lines: Sequence[Line] = ()
  points: Sequence[Point] = ()
  root_x: bool = False


def mean_line(
  label: str,
  runs: Sequence[Sequence[Mapping[str, float]]],
  x: str,
  y: str,
  *,
  root_x: bool = False,
  peak: str = "",
) -> Line | None:
  """The mean of runs that differ in their seed, in a band from the lowest to the highest of them.

  The points of each run are averaged within intervals of x. Intervals in which a run has no point
  are left out, so the line ends where the first run does.

  Args:
    label: Name in the legend.
    runs: Rows of `metrics.jsonl` of each run.
    x: Metric of the x axis, or "step".
    y: Metric of the y axis.
    root_x: Whether the intervals are equal in the square root of x.
    peak: As in `Line`.

  Returns:
    The line, or None if a run has fewer than two points.
  """
  curves = [_points(rows, x, y) for rows in runs]
  fewest = min(map(len, curves))
  if fewest < 2:
    return None
  bins = min(max(fewest // 3, 5), 30)
  places = [np.sqrt(np.maximum(c[:, 0], 0)) if root_x else c[:, 0] for c in curves]
  edges = np.linspace(min(map(np.min, places)), max(map(np.max, places)), bins + 1)
  means = np.full([len(curves), bins, 2], np.nan)
  for curve, place, of_run in zip(curves, places, means, strict=True):
    which = np.searchsorted(edges[1:-1], place, side="right")
    for i in np.unique(which):
      of_run[i] = np.mean(curve[which == i], axis=0)
  means = means[:, ~np.isnan(means).any(axis=(0, 2))]
  low, high = (None, None) if len(runs) == 1 else (means[..., 1].min(0), means[..., 1].max(0))
  centre, height = np.mean(means, axis=0).T
  return Line(label, centre, height, low, high, peak)


class _Label(NamedTuple):
  x: float
  y: float
  text: str
  colour: str


def _draw_line(axes: Any, line: Line, colour: str, dash: str) -> None:
  if line.low is not None:
    axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
  marker = "o" if len(line.x) <= 25 else None
  style = {"color": colour, "linewidth": 1.8, "marker": marker, "markersize": 3.5}
  axes.plot(line.x, line.y, dash, label=escape(line.label), **style)


def _draw_point(axes: Any, point: Point, colour: str, marker: str) -> None:
  sides = (("xerr", point.x, point.x_range), ("yerr", point.y, point.y_range))
  bars = {
    name: np.maximum([[value - ends[0]], [ends[1] - value]], 0)
    for name, value, ends in sides
    if ends is not None
  }
  style = {"color": colour, "markersize": 7, "elinewidth": 1.2, "capsize": 2.5}
  axes.errorbar(point.x, point.y, **bars, fmt=marker, **style)


def _use_root_scale(axes: Any) -> None:
  """Scales x by its signed square root, with ticks at even distances."""
  from matplotlib.ticker import MaxNLocator

  root = lambda x: np.sign(x) * np.sqrt(np.abs(x))  # noqa: E731
  square = lambda x: np.sign(x) * np.square(x)  # noqa: E731
  axes.set_xscale("function", functions=(root, square))
  low, high = axes.get_xlim()
  locator = MaxNLocator(9, steps=[1, 2, 5, 10])
  ticks = square(locator.tick_values(*root(np.array([low, high]))))
  shown = ticks[(ticks >= low) & (ticks <= high)]
  axes.set_xticks(shown, [f"{tick:.3g}" for tick in shown])


def _write_labels(axes: Any, labels: Sequence[_Label]) -> None:
  """Writes each label where it covers no line, no point and no other label, if there is room."""
  if not labels:
    return
  axes.figure.draw_without_rendering()  # Lays the axes out: places are compared in pixels.
  size = 7 * axes.figure.dpi / 72
  corners = [line.get_xydata() for line in axes.get_lines()]
  centres = axes.transData.transform(np.concatenate([*corners, np.zeros((0, 2))]))
  taken = np.concatenate([centres - size, centres + size], axis=1)  # Left, bottom, right, top.
  if axes.get_legend() is not None:
    taken = np.append(taken, [axes.get_legend().get_window_extent().extents], axis=0)

  def write(label: _Label, dx: int, dy: int) -> tuple[Any, np.ndarray]:
    text = axes.annotate(
      escape(label.text, newlines=True),
      (label.x, label.y),
      xytext=(8 * dx, 8 * dy),
      textcoords="offset points",
      ha=("right", "center", "left")[np.sign(dx) + 1],
      va=("top", "center", "bottom")[np.sign(dy) + 1],
      color=label.colour,
    )
    return text, text.get_window_extent().extents

  directions = [(dx, dy) for dy in (1, -1, 0) for dx in (1, -1, 0) if dx or dy]
  places = [(reach * dx, reach * dy) for reach in (1, 2, 4) for dx, dy in directions]
  for label in labels:
    for dx, dy in places:
      text, (left, bottom, right, top) = write(label, dx, dy)
      apart = (right < taken[:, 0]) | (taken[:, 2] < left)
      apart |= (top < taken[:, 1]) | (taken[:, 3] < bottom)
      if apart.all() and axes.bbox.contains(left, bottom) and axes.bbox.contains(right, top):
        break
      text.remove()
    else:
      _, (left, bottom, right, top) = write(label, 1, 1)
    taken = np.append(taken, [[left, bottom, right, top]], axis=0)


def render_charts(charts: Sequence[Chart]) -> bytes:
  """Charts as PNG, two in a row. Lines differ in dash and points in marker, not only in colour."""

  def draw(all_axes: Sequence[Any]) -> None:
    for axes, chart in zip(all_axes, charts, strict=True):
      labels = []
      for i, line in enumerate(chart.lines):
        colour = _COLOURS[i % len(_COLOURS)]
        _draw_line(axes, line, colour, _DASHES[i % len(_DASHES)])
        if line.peak:
          x, y = line.x[np.argmax(line.y)], np.max(line.y)
          axes.plot(x, y, "*", color=colour, markersize=14, markeredgecolor="white")
          labels.append(_Label(x, y, line.peak.format(x=x, y=y), colour))
      for i, point in enumerate(chart.points):
        colour = _COLOURS[i % len(_COLOURS)]
        _draw_point(axes, point, colour, _MARKERS[i % len(_MARKERS)])
        labels.append(_Label(point.x, point.y, point.label, colour))
      axes.set(title=chart.title, xlabel=chart.xlabel, ylabel=chart.ylabel)
      axes.margins(x=0.06, y=0.14)
      if chart.root_x:
        _use_root_scale(axes)
      if chart.lines:
        axes.legend(handlelength=3)
      _write_labels(axes, labels)

  return _png(draw, len(charts))


def render_matrix(title: str, shares: Mapping[str, Mapping[str, float]]) -> bytes:
  """Shares between 0 and 1 by row and column as PNG: 0.5 is white; what is missing is empty."""
  names = list(shares)
  values = [[shares[row].get(column, math.nan) for column in names] for row in names]

  def draw(all_axes: Sequence[Any]) -> None:
    (axes,) = all_axes
    axes.imshow(np.asarray(values), cmap="RdBu", vmin=0, vmax=1, alpha=0.75)
    for (i, j), value in np.ndenumerate(values):
      if math.isfinite(value):
        axes.text(j, i, f"{value:.2f}", ha="center", va="center")
    labels = [escape(name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), labels)
    axes.set_title(title)
    axes.grid(False)

  return _png(draw)


def save_chart(path: epath.PathLike, *charts: Chart) -> epath.Path:
  """Writes charts, two in a row, to a PNG file, whose folder is created."""
  path = epath.Path(path)
  if processes.is_first():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render_charts(charts))
  return path
