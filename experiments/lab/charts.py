"""Charts and tables of runs, in groups whose runs differ only in their seed."""

import glob
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax import evaluation, flags, plots, reporting, writers
from rlhf_jax import workdir as workdir_lib
from . import line_files

PROXY, GOLD, KL = "reward/mean", "gold_reward/mean", "kl/ref"
_TITLES = {PROXY: "Proxy reward (trained on)", GOLD: "Gold reward (never trained on)"}
_KL_LABEL = "KL to the reference (nats per response, root scale)"

Rows = list[dict[str, Any]]
Groups = dict[str, list[Rows]]  # Label -> rows of metrics.jsonl of each run.
Charts = dict[str, list[plots.Chart]]


def group_runs(runs: Sequence[str]) -> dict[str, list[str]]:
  """Groups folders by label; each folder before the first label is a group."""
  labelled: dict[str, list[str]] = {}
  single: list[str] = []
  label = None
  for item in runs:
    if "=" in item and not pathlib.Path(item).exists():
      label, _, item = item.partition("=")
    item = os.path.expanduser(item)
    folders = sorted(glob.glob(item)) if "*" in item else [item]
    if not folders:
      raise flags.UsageError(f"--runs: no folder matches {item}")
    (single if label is None else labelled.setdefault(label, [])).extend(folders)
  if not (single or labelled):
    raise flags.UsageError("--runs must name at least one folder")
  every = [*single, *(folder for of_label in labelled.values() for folder in of_label)]
  names = line_files.short_names("runs", every)
  return {name: [folder] for name, folder in zip(names, single, strict=False)} | labelled


def read_run(folder: str) -> Rows:
  """Reads the rows of `metrics.jsonl` of a run.

  Raises:
    UsageError: The file is missing or empty, or a row cannot be read.
  """
  path = workdir_lib.local_path(folder) / "metrics.jsonl"
  if not path.exists():
    inside = sorted(child.parent.name for child in path.parent.glob("*/metrics.jsonl"))
    hint = f"; did you mean {', '.join(f'{folder}/{name}' for name in inside)}?" if inside else ""
    raise flags.UsageError(f"--runs: {folder} is no workdir of a run: no metrics.jsonl{hint}")
  try:
    rows = writers.read_metrics(path)
  except ValueError as error:
    raise flags.UsageError(f"--runs: {error}; delete the line, or continue the run") from error
  if not rows:
    raise flags.UsageError(f"--runs: {path} is empty; wait for the first steps of the run")
  return rows


def charts_of(groups: Groups) -> Charts:
  """Makes all charts that the metrics allow, by the name of their file.

  Raises:
    UsageError: There is no chart.
  """
  charts = {
    name: curves(panel, groups) for name, panel in plots.PANELS.items() if panel.x == "step"
  }
  if not any(charts.values()):
    raise flags.UsageError("--runs: no run has logged two points of a known metric yet")
  charts |= {"frontier": frontier(groups), "overoptimization": overoptimization(groups)}
  return {name: of_name for name, of_name in charts.items() if of_name}


def draw(workdir: pathlib.Path, groups: Groups, charts: Charts | None = None) -> dict[str, Any]:
  """Writes all plots that the metrics allow, and summary.json; returns its content."""
  charts = charts_of(groups) if charts is None else charts
  written = [
    plots.save_chart(workdir / "plots" / f"{name}.png", *of_name)
    for name, of_name in charts.items()
  ]
  for label, runs in groups.items():
    missing = [name for name in (PROXY, GOLD, KL) if not has(runs, name)]
    if 0 < len(missing) < 3:  # Runs without any of the three are no reinforcement learning.
      reporting.note(f"{label} is not in every plot: no {' and no '.join(missing)} in every run")
  summary = {label: group_metrics(runs) for label, runs in groups.items()}
  reporting.show_summary("At the end of training", table(summary))
  reporting.note("plots: " + ", ".join(str(path) for path in written))
  reporting.write_summary(workdir, summary)
  return summary


def has(runs: Sequence[Rows], *names: str) -> bool:
  """True if every run has logged all of these metrics."""
  return all(any(name in row for row in rows) for rows in runs for name in names)


def curves(panel: plots.Panel, groups: Groups) -> list[plots.Chart]:
  """Makes a chart for each metric of a panel, side by side."""
  charts = []
  for i, name in enumerate(panel.metrics):
    lines = [plots.mean_line(label, runs, "step", name) for label, runs in groups.items()]
    title = f"{panel.title}: {panel.labels[i].lower()}" if panel.labels else panel.title
    if any(lines):
      charts.append(
        plots.Chart(title, "Step", panel.ylabel, [line for line in lines if line is not None])
      )
  return charts


def at_end(rows: Rows, name: str) -> float:
  """Mean of a metric over the last tenth of a run."""
  values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
  return float(np.mean(values[-max(len(values) // 10, 1) :])) if values else math.nan


def frontier(groups: Groups) -> list[plots.Chart]:
  """Plots each group at its final KL and reward, with bars from the lowest to the highest seed."""
  charts = []
  for name, title in _TITLES.items():
    points = []
    for label, runs in groups.items():
      if has(runs, name, KL):
        x, y = (np.array([at_end(rows, metric) for rows in runs]) for metric in (KL, name))
        ends = [(v.min(), v.max()) if len(runs) > 1 else None for v in (x, y)]
        points.append(plots.Point(label, x.mean(), y.mean(), *ends))
    if points:
      charts.append(
        plots.Chart(f"{title} at the end", _KL_LABEL, "Mean reward", points=points, root_x=True)
      )
  return charts


def overoptimization(groups: Groups) -> list[plots.Chart]:
  """Plots proxy and gold reward over the KL, side by side, with a peak before the end of gold."""
  shown = {label: runs for label, runs in groups.items() if has(runs, PROXY, GOLD, KL)}
  charts = []
  for name, title in _TITLES.items():
    lines = []
    for label, runs in shown.items():
      turns = name == GOLD and "gold_peak" in group_metrics(runs)
      peak = "peak {y:.2f}\nat {x:.1f} nats" if turns else ""
      lines.append(plots.mean_line(label, runs, KL, name, root_x=True, peak=peak))
    if any(lines):
      lines = [line for line in lines if line is not None]
      charts.append(plots.Chart(title, _KL_LABEL, "Mean reward", lines, root_x=True))
  return charts


def group_metrics(runs: Sequence[Rows]) -> dict[str, Any]:
  """Metrics of a group: means over its runs, and the relation of proxy and gold reward."""
  summary: dict[str, Any] = {"runs": len(runs)}
  for name in (PROXY, GOLD, KL, "loss", "eval/loss", "reward/accuracy", "response_length/mean"):
    if has(runs, name):
      summary[name] = float(np.mean([at_end(rows, name) for rows in runs]))
  if not has(runs, PROXY, GOLD, KL):
    return summary
  line = plots.mean_line("", runs, KL, GOLD, root_x=True)
  if line is not None:
    highest = int(np.argmax(line.y))
    if line.y[highest] > summary[GOLD] and highest < len(line.y) - 1:  # It falls afterwards.
      summary |= {"gold_peak": line.y[highest], "gold_peak_kl": line.x[highest]}
    # The law of Gao et al. for the gain over the first point, where the KL is nearly 0.
    distance, gain = np.sqrt(np.maximum(line.x, 0)), line.y - line.y[0]
    if len(np.unique(distance[distance > 0])) > 1:
      law = evaluation.fit_overoptimization(distance, gain, "rl")
      summary |= {"law/alpha": law.alpha, "law/beta": law.beta}
  correlations, diverged_at = [], []
  for rows in runs:
    rows = [row for row in rows if {PROXY, GOLD, KL} <= row.keys()]
    proxy, gold, kl = (np.array([row[name] for row in rows]) for name in (PROXY, GOLD, KL))
    correlations.append(evaluation.spearman(proxy, gold))
    start = evaluation.first_divergence(proxy, gold, window=max(len(rows) // 3, 8))
    diverged_at += [] if start is None else [max(kl[start], 0.0)]
  summary |= {"spearman": float(np.mean(correlations)), "diverged": len(diverged_at)}
  if diverged_at:
    summary["diverged_at_kl"] = float(np.mean(diverged_at))
  return summary


def table(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """Arranges the metrics of each group as a row of the final table."""
  columns = {
    "runs": "runs",
    "KL, nats": KL,
    "proxy": PROXY,
    "gold": GOLD,
    "gold at its peak": "gold_peak",
    "KL of the peak": "gold_peak_kl",
    "Spearman of proxy and gold": "spearman",
    "runs that diverge": "diverged",
    "loss": "loss",
  }
  return {
    label: {title: of[name] for title, name in columns.items() if name in of}
    for label, of in summary.items()
  }
