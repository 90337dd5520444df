"""HTML report that compares runs: curves, final metrics, settings, samples, lineage.

The file needs neither a network nor scripts, and follows the light or dark mode of the browser. All
text from runs, models and data files is escaped.
"""

import base64
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np

from rlhf_jax import flags, plots, reporting
from rlhf_jax import workdir as workdir_lib
from .record import Record, metric_texts, numbers, read, source_name

Table = dict[str, dict[str, Any]]  # Row -> column -> cell.
_PROMPTS = 6  # Prompts whose answers are shown.
_METRICS_NOTE = (
  "summary.json of each run. In brackets stands the 95 % interval of one run, or the lowest and the"
  " highest of several runs, behind their mean."
)
_LONGEST = 2000  # Characters of a text that are shown.


class Comparison(NamedTuple):
  """Content of a report.

  Attributes:
    folders: Workdirs of the runs of each group, by label.
    charts: Charts by name.
    ends: Metrics at the end of training, by group.
    evaluation: Workdir of experiments.evaluate, or None.
  """

  folders: Mapping[str, Sequence[str]]
  charts: Mapping[str, Sequence[plots.Chart]]
  ends: Table
  evaluation: pathlib.Path | None = None


def columns_of(table: Table) -> list[str]:
  """Returns the columns of a table, in the order in which its rows have them."""
  return list(dict.fromkeys(name for cells in table.values() for name in cells))


def render(comparison: Comparison) -> str:
  """Renders the report."""
  runs = {
    label: [read(folder) for folder in folders] for label, folders in comparison.folders.items()
  }
  evaluation = comparison.evaluation
  of_policies = read_evaluation(evaluation) if evaluation else {}
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters |= {"text": show_text, "cell": reporting.cell, "metric_texts": metric_texts}
  return environment.get_template("report.html", globals={"columns_of": columns_of}).render(
    groups=list(runs),
    count=sum(map(len, runs.values())),
    images=[
      (chart.title, data_uri(chart)) for charts in comparison.charts.values() for chart in charts
    ],
    tables=[
      ("metrics", "Final metrics", _METRICS_NOTE, held_out(runs)),
      ("ends", "At the end of training", "Means over the last tenth of each run.", comparison.ends),
      ("evaluation", "Evaluation", f"From {evaluation}.", policy_table(of_policies)),
      ("settings", "Settings that differ", "Flags that not all runs share.", differences(runs)),
    ],
    matrix=win_rates(of_policies),
    samples=samples(comparison.folders, runs, evaluation),
    runs=runs,
    source_name=source_name,
    as_line=flags.as_line,
  )


def data_uri(chart: plots.Chart) -> str:
  """Renders a chart as an image in a data URI."""
  png = base64.b64encode(plots.render_charts([chart])).decode("ascii")
  return f"data:image/png;base64,{png}"


def show_text(text: Any) -> str:
  """Removes characters that reorder or hide text, and truncates long text."""
  text = reporting.escape(str(text), newlines=True)
  return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def held_out(runs: Mapping[str, Sequence[Record]]) -> Table:
  """Metrics of summary.json by group: with intervals for one run, with ranges for several."""
  table: Table = {}
  for label, of in runs.items():
    texts = [metric_texts(record["summary"]) for record in of]
    for name in dict.fromkeys(name for metrics in texts for name in metrics):
      if len(of) == 1:
        text = texts[0][name]
      else:
        values = [record["summary"][name] for record in of if name in record["summary"]]
        text = f"{np.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})"
      table.setdefault(name, {})[label] = text
  return table


def differences(runs: Mapping[str, Sequence[Record]]) -> Table:
  """Flags whose values differ between the runs that have them, by group."""

  def settings(record: Record) -> dict[str, Any]:
    script = {name: record[name] for name in ("script", "seed") if name in record}
    return script | record.get("settings", {})

  flat = {label: [settings(record) for record in of] for label, of in runs.items()}
  every = [of_run for of in flat.values() for of_run in of]
  table: Table = {}
  for name in dict.fromkeys(name for of_run in every for name in of_run):
    texts = {
      label: list(dict.fromkeys(written(of_run[name]) for of_run in of if name in of_run))
      for label, of in flat.items()
    }
    if len({text for values in texts.values() for text in values}) > 1:
      table[name] = {label: ", ".join(values) for label, values in texts.items() if values}
  return table


def written(value: Any) -> str:
  """Formats a setting as on the command line."""
  return flags.as_line("", value).removeprefix("--=") or "(empty)"


def read_evaluation(folder: pathlib.Path) -> dict[str, Any]:
  """Reads the metrics of experiments.evaluate, by policy; a single policy has no name.

  Raises:
    UsageError: There are no metrics.
  """
  path = folder / "summary.json"
  try:
    summary = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise flags.UsageError(
      f"--evaluation={folder} is no workdir of experiments.evaluate that has finished: {error}"
    ) from error
  named = {name: of for name, of in summary.items() if isinstance(of, dict)}
  single = numbers(summary)
  return named | ({"policy": single} if single else {})


def policy_table(of_policies: Mapping[str, Mapping[str, Any]]) -> Table:
  """Makes a table of the metrics of policies with their intervals, a row per metric."""
  table: Table = {}
  for name, of in of_policies.items():
    for metric, text in metric_texts(numbers(of)).items():
      table.setdefault(metric, {})[name] = text
  return table


def win_rates(of_policies: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
  """Shares of prompts on which the policy of the row is preferred; empty if unknown."""
  matrix = of_policies.get("preference/win_rates", {})
  return {name: {other: rate["value"] for other, rate in of.items()} for name, of in matrix.items()}


def samples(
  folders: Mapping[str, Sequence[str]],
  runs: Mapping[str, Sequence[Record]],
  evaluation: pathlib.Path | None,
) -> list[tuple[str, dict[str, dict[str, Any]]]]:
  """Prompts and their answers by policy: those of an evaluation, or the last ones of each group.

  If a run has saved the answers of its initial policy, they are shown beside its last answers.
  """
  files: dict[str, pathlib.Path] = {}
  if evaluation:
    for path in sorted((evaluation / "samples").glob("step_*.jsonl")):
      for row in read_rows(path)[:1]:
        files[str(row.get("policy", path.stem))] = path
  else:
    for label, (folder, *_) in folders.items():
      paths = sorted((workdir_lib.local_path(folder) / "samples").glob("step_*.jsonl"))
      start = str(runs[label][0]["settings"].get("init_from", ""))
      if start and paths and paths[0].stem == "step_00000000":
        files.setdefault(f"{pathlib.PurePath(start).name} (start)", paths[0])
      if paths:
        files[label] = paths[-1]
  answers: dict[str, dict[str, dict[str, Any]]] = {}
  for label, path in files.items():
    for row in read_rows(path):
      if "response" in row:
        answers.setdefault(str(row.get("prompt", "")), {}).setdefault(label, row)
  # Those that most have answered; among them the first. Every policy is there at least once.
  ordered = sorted(answers.items(), key=lambda item: -len(item[1]))
  shown = ordered[:_PROMPTS]
  for label in files:
    if not any(label in of for _, of in shown):
      shown += [item for item in ordered if label in item[1]][:1]
  return shown


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the objects of a file of samples, one per line.

  Raises:
    UsageError: A line is not an object.
  """
  rows = []
  for number, line in enumerate(path.read_bytes().splitlines(), start=1):
    try:
      row = json.loads(line)
    except ValueError as error:
      raise flags.UsageError(f"{path}:{number}: {error}; delete the line or the file") from error
    rows += [row] if isinstance(row, dict) else []
  return rows
