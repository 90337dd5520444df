"""Plots as PNG files: panels of the metrics of one run, and charts that compare runs.

Only the first process writes files.
"""

import dataclasses
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath

from rlhf_jax import processes, writers
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.reporting import escape


@dataclasses.dataclass(frozen=True)
class Panel:
  """Plot of a few metrics.

  Attributes:
    title: Heading.
    metrics: Names in `metrics.jsonl`, one line each; metrics that a run lacks are left out.
    ylabel: Label of the y axis, with the unit.
    labels: Names of the metrics in the legend; if empty, those in `metrics`.
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
  "loss": Panel(
    "Loss", ("loss", "eval/loss"), "Loss", labels=("Training batches", "Held-out rows")
  ),
  "reward": Panel(
    "Reward",
    ("reward/mean", "gold_reward/mean"),
    "Reward",
    labels=("Proxy (trained on)", "Gold (never trained on)"),
  ),
  "reward_held_out": Panel(
    "Reward on held-out prompts",
    ("eval/reward", "eval/gold"),
    "Reward",
    labels=("Proxy (trained on)", "Gold (never trained on)"),
  ),
  "gold_vs_proxy": Panel(
    "Over-optimisation: reward against KL",
    ("reward/mean", "gold_reward/mean"),
    "Reward",
    labels=("Proxy (trained on)", "Gold (never trained on)"),
    x="kl/ref",
    xlabel="KL to the reference (nats)",
  ),
  "kl": Panel("Distance from the reference", ("kl/ref",), "KL to the reference (nats)"),
  "accuracy": Panel(
    "Preference accuracy",
    ("reward/accuracy", "eval/reward/accuracy"),
    "Fraction of pairs",
    labels=("Training batches", "Held-out rows"),
  ),
  "margin": Panel(
    "Rewards of both responses in training batches",
    ("reward/chosen", "reward/rejected", "reward/margin"),
    "Reward",
    labels=("Chosen", "Rejected", "Margin"),
  ),
  "margin_held_out": Panel(
    "Rewards of both responses on held-out rows",
    ("eval/reward/chosen", "eval/reward/rejected", "eval/reward/margin"),
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
  "axes.titley": 1.0,  # Found by measuring otherwise, a tenth of the time of a panel.
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
  """Returns the finite points [n, 2], ordered by x. Rows of the same step are merged."""
  steps: dict[float, dict[str, float]] = {}
  for row in rows:
    steps.setdefault(row["step"], {}).update(row)
  pairs = [(row[x], row[y]) for _, row in sorted(steps.items()) if x in row and y in row]
  points = np.asarray(pairs, np.float64).reshape(-1, 2)
  points = points[np.isfinite(points).all(axis=1)]
  return points[np.argsort(points[:, 0], kind="stable")]


def _smooth(y: np.ndarray) -> np.ndarray:
  """Centred moving average [n] over about a twentieth of the points; it does not lag behind."""
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
    # Fast compression: files are a third larger in a third of the time.
    figure.savefig(png, format="png", dpi=150, pil_kwargs={"compress_level": 1})
  return png.getvalue()


def render_panel(panel: Panel, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes | None:
  """Renders a panel as PNG: logged values are faint, with a moving average drawn over them.

  Args:
    panel: Panel to render.
    runs: Rows of `metrics.jsonl` by the name of the run; names are shown if there are several runs.

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
    if len(lines) > 1 or panel.labels:
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
    folder: Folder to write to; created if missing.
    panels: Panels to render, by file name.

  Returns:
    Paths of the files that were written.

  Raises:
    ValueError: The name of a panel is not a plain file name.
  """
  written = []
  for name, panel in panels.items():
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
      raise ValueError(f"the panel name {name!r} is not a plain file name")
    png = render_panel(panel, runs)
    if png is not None and processes.is_first():
      path = epath.Path(folder) / f"{name}.png"
      workdir_lib.atomic_write(path, png)
      written.append(path)
  return written


def plot_metrics(workdir: epath.PathLike, panels: Mapping[str, Panel] = PANELS) -> list[epath.Path]:
  """Draws `WORKDIR/plots/*.png` from `WORKDIR/metrics.jsonl`; see `save_panels`."""
  if not processes.is_first():
    return []
  workdir = epath.Path(workdir)
  rows = writers.read_metrics(workdir / "metrics.jsonl")
  return save_panels({workdir.name: rows}, workdir / "plots", panels)


class Line(NamedTuple):
  """Line of a chart.

  Attributes:
    label: Name in the legend.
    x: [n] positions, ascending.
    y: [n] heights.
    low: [n] lower end of a band around the line; None draws no band.
    high: [n] upper end of the band.
    peak: Text at the highest point, with {x} and {y} for its position; empty marks no peak.
  """

  label: str
  x: np.ndarray
  y: np.ndarray
  low: np.ndarray | None = None
  high: np.ndarray | None = None
  peak: str = ""


class Point(NamedTuple):
  """Labelled point of a chart.

  Attributes:
    label: Text beside the point.
    x: Value on the x axis.
    y: Value on the y axis.
    x_range: Ends of the horizontal error bar; None draws no bar.
    y_range: Ends of the vertical error bar; None draws no bar.
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
    lines: Lines to draw.
    points: Points to draw, with labels.
    root_x: True for a square-root x axis, as is usual for a KL: rewards rise nearly in proportion
      to the root.
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
  """Averages runs that differ in their seed, with a band from the lowest to the highest run.

  The points of each run are averaged within intervals of x. Intervals in which a run has no point
  are left out, so the line ends with the shortest run.

  Args:
    label: Name in the legend.
    runs: Rows of `metrics.jsonl` of each run.
    x: Metric of the x axis, or "step".
    y: Metric of the y axis.
    root_x: True for intervals of equal width in the square root of x.
    peak: Text at the highest point; see `Line`.

  Returns:
    The line, or None if a run has fewer than two points, or no interval has one of every run.
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
  if not means.shape[1]:
    return None
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
    workdir_lib.atomic_write(path, render_charts(charts))
  return path
