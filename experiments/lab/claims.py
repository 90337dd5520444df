"""The claims of papers as data: a number of a run with the method, and of one without.

A claim is one line of claims.csv. Its runs are methods, or lines of arms.csv, which says how to run
those that are no methods, and what they read. `experiments.methods` runs both.
"""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rlhf_jax import reporting, writers
from . import methods, stages

WINDOW = 5  # Steps that a metric of training is averaged over: that of one step is noisy.


class Claim(NamedTuple):
  """A line of the table.

  Attributes:
    paper: Name of the paper.
    arxiv: Number of the paper at arXiv.
    claim: Effect of the method, in words.
    metric: Key of summary.json; or `KEY when KEY>=LEVEL`, of the first step in metrics.jsonl at
      which this holds, both averaged over the last steps.
    plain: Stage without the method.
    method: Stage with it.
    judgement: Stage whose summary.json has both by their names; empty takes that of each.
  """

  paper: str
  arxiv: str
  claim: str
  metric: str
  plain: str
  method: str
  judgement: str

  @property
  def digits(self) -> int:
    """Number of decimals of the metric."""
    return 0 if self.metric.startswith("step ") else 2


CLAIMS = [Claim(**line) for line in stages.lines("claims.csv")]
TITLES = {line["name"]: line["title"] for line in stages.lines("arms.csv")}
TITLES |= {name: method.title for name, method in methods.METHODS.items()}

# Seed -> number without the method, and with it. A step that was not reached is infinite.
Numbers = Mapping[int, tuple[float, float]]


def read(workdir: pathlib.Path) -> dict[Claim, dict[int, tuple[float, float]]]:
  """Returns the numbers of each claim for the seeds that have both runs."""
  numbers: dict[Claim, dict[int, tuple[float, float]]] = {}
  for claim in CLAIMS:
    numbers[claim] = {}
    for seed, folder in stages.seeds(workdir).items():
      plain, method = (number(claim, folder, name) for name in (claim.plain, claim.method))
      if plain is not None and method is not None:
        numbers[claim][seed] = plain, method
  return numbers


def number(claim: Claim, folder: pathlib.Path, name: str) -> float | None:
  """Returns the metric of a stage of a seed; None if it has not finished."""
  summary = stages.read_summary(folder, claim.judgement or name)
  if summary is None:
    return None
  found = re.fullmatch(r"(\S+) when (\S+)>=(\S+)", claim.metric)
  if not found:
    return float((summary[name] if claim.judgement else summary)[claim.metric])
  key, of, level = found.groups()
  return when(writers.read_metrics(folder / name / "metrics.jsonl"), key, of, float(level))


def when(rows: Sequence[Mapping[str, float]], key: str, of: str, level: float) -> float:
  """Returns metric `key` at the first step at which metric `of` is at least `level`.

  Args:
    rows: Rows of metrics.jsonl.
    key: Metric to return, averaged over `WINDOW` steps, or `step` itself.
    of: Metric to compare, averaged likewise, or `step`.
    level: Number to compare with.

  Returns:
    The metric, infinite if no step reaches the level.
  """
  steps = {row["step"]: row for row in rows}
  rows = [row for _, row in sorted(steps.items()) if key in row and of in row]

  def mean(last: Sequence[Mapping[str, float]], name: str) -> float:
    return last[-1]["step"] if name == "step" else sum(row[name] for row in last) / len(last)

  windows = (rows[i - WINDOW : i] for i in range(WINDOW, len(rows) + 1))
  return next((mean(last, key) for last in windows if mean(last, of) >= level), math.inf)


HEAD = ("paper", "claim", "without", "by seed", "mean", "with", "by seed", "mean")


def rows(
  numbers: Mapping[Claim, Numbers], old: Sequence[Sequence[str]] = ()
) -> list[tuple[str, ...]]:
  """Returns the rows of the table; a claim without numbers keeps its old row, if it has one."""
  before = {tuple(row[:2]): tuple(row) for row in old}
  new = (row(of, numbers[of]) if numbers.get(of) else before.get(known(of)) for of in CLAIMS)
  return [cells for cells in new if cells]


def known(claim: Claim) -> tuple[str, str]:
  """Returns the cells of a row that do not depend on the runs."""
  return f"[{claim.paper}](https://arxiv.org/abs/{claim.arxiv})", claim.claim


def row(claim: Claim, numbers: Numbers) -> tuple[str, ...]:
  """Returns the cells of a row; a step that was not reached is `never`."""
  cells = [*known(claim)]
  for side, name in enumerate((claim.plain, claim.method)):
    values = {seed: pair[side] for seed, pair in numbers.items()}
    mean = {0: sum(values.values()) / len(values)}
    shown = methods.by_seed(values, claim.digits), methods.by_seed(mean, claim.digits or 1)
    cells += [TITLES[name], *(text.replace("inf", "never") for text in shown)]
  return tuple(cells)


def show(numbers: Mapping[Claim, Numbers]) -> None:
  """Shows the means of the claims that have numbers."""
  cells = {}
  for claim, of in numbers.items():
    if of:
      _, _, _, _, plain, _, _, method = row(claim, of)
      cells[f"{claim.paper}: {claim.claim}"] = {"without": plain, "with": method}
  if cells:
    reporting.show_summary("Claims, means over the seeds", cells)


def fill(page: str, numbers: Mapping[Claim, Numbers]) -> str:
  """Returns a page with new tables of claims and of their arms."""
  arms = [
    (line["title"], f"`{line['command']}`", line["name"]) for line in stages.lines("arms.csv")
  ]
  page = methods.fill_table(page, "claims", HEAD, lambda old: rows(numbers, old))
  return methods.fill_table(page, "arms", ("run", "command", "`--rows`"), lambda old: arms)
