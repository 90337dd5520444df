"""The table of methods as data, the results of its runs, and the tables that pages show.

A method is one line of methods.csv. `experiments.methods` runs the lines; tests run their commands
shortened, and check that the pages show them.
"""

import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from . import stages


class Method(NamedTuple):
  """A line of the table.

  Attributes:
    title: Name of the method.
    paper: Number of the paper at arXiv.
    command: Script with its flags; see `stages`.
    test: File in tests/ and name of the test that holds the method against an oracle.
  """

  title: str
  paper: str
  command: str
  test: str


METHODS: Mapping[str, Method] = {
  line.pop("name"): Method(**line) for line in stages.lines("methods.csv")
}


class Result(NamedTuple):
  """Metrics of a policy on the held-out prompts of a seed, and the CPU minutes of its run."""

  gold: float
  win_rate: float
  low: float
  high: float
  kl: float
  cpu_minutes: float


# Seed -> result, of one method.
Results = Mapping[int, Result]


def read(workdir: pathlib.Path) -> dict[str, dict[int, Result]]:
  """Returns the results of all finished runs below a workdir, by method and seed."""
  results: dict[str, dict[int, Result]] = {name: {} for name in METHODS}
  for seed, folder in stages.seeds(workdir).items():
    for name in METHODS:
      summary = stages.read_summary(folder, name)
      if summary is None or name == stages.START:
        continue
      keys = ("gold/mean", "gold/win_rate", "gold/win_rate_low", "gold/win_rate_high", "kl")
      gold, rate, low, high, kl = (summary[key] for key in keys)
      minutes, of_start = (
        math.nan if (used := stages.read_record(folder, of).get("cpu_minutes")) is None else used
        for of in (name, stages.START)
      )
      results[name][seed] = Result(gold, rate, low, high, kl, minutes)
      before = summary["gold/mean_before"]
      results[stages.START][seed] = Result(before, 0.5, 0.5, 0.5, 0.0, of_start)
  return results


def mean_win_rate(results: Results) -> str:
  """Returns the mean over the seeds with its 95 % interval."""
  rate = sum(result.win_rate for result in results.values()) / len(results)
  width = math.hypot(*((result.high - result.low) / 2 for result in results.values()))
  return f"{rate:.2f} ± {width / len(results):.2f}" if width else f"{rate:.2f}"


def by_seed(values: Mapping[int, float], digits: int) -> str:
  """Returns a number of seed 0, 1 and so on, with a dash for one that was not run."""
  found = (values.get(seed, math.nan) for seed in range(max(values) + 1))
  return " / ".join("–" if math.isnan(x) else f"{x:.{digits}f}" for x in found)


def _metric(results: Results, field: str, digits: int) -> str:
  return by_seed({seed: getattr(result, field) for seed, result in results.items()}, digits)


class Table(NamedTuple):
  """A table of a page, with a row for each method.

  Attributes:
    head: Names of the columns.
    known: Returns the first cells of a method.
    measured: Returns the other cells, from its results. A table keeps those of a method without
      results, and a method that never had any is left out.
  """

  head: Sequence[str]
  known: Callable[[Method], tuple[str, ...]]
  measured: Callable[[Results], tuple[str, ...]] | None = None


def _link(method: Method) -> str:
  return f"[{method.title}](https://arxiv.org/abs/{method.paper})"


def _test(method: Method) -> str:
  file, _, test = method.test.partition("::")
  return f"[{test}](../tests/{file})"


# Name of a place in a page -> its table.
TABLES: Mapping[str, Table] = {
  "methods": Table(
    ("method", "command", "test"), lambda of: (_link(of), f"`{of.command}`", _test(of))
  ),
  "results": Table(
    ("method", "gold reward", "win rate", "its mean, 95 %", "KL to SFT, nats", "CPU minutes"),
    lambda of: (of.title,),
    lambda results: (
      _metric(results, "gold", 2),
      _metric(results, "win_rate", 2),
      mean_win_rate(results),
      _metric(results, "kl", 1),
      _metric(results, "cpu_minutes", 1),
    ),
  ),
  "short": Table(
    ("method", "command", "win rate against SFT"),
    lambda of: (_link(of), f"`{of.command}`"),
    lambda results: (mean_win_rate(results),),
  ),
}


def rows(
  table: Table, results: Mapping[str, Results], old: Sequence[Sequence[str]] = ()
) -> list[tuple[str, ...]]:
  """Returns the rows of a table; results that are not given are those of the old rows."""
  before = {row[0]: tuple(row) for row in old}
  new = []
  for name, method in METHODS.items():
    known = table.known(method)
    measured = before.get(known[0], ())[len(known) :]
    if table.measured is not None and results.get(name):
      measured = table.measured(results[name])
    missing = len(table.head) - len(known) - len(measured)
    if len(known) > 1 or not missing:
      new.append((*known, *measured, *[""] * missing))
  return new


def fill(page: str, results: Mapping[str, Results]) -> str:
  """Returns a page with new tables at the places of `TABLES`."""
  for name, table in TABLES.items():
    page = fill_table(page, name, table.head, lambda old, of=table: rows(of, results, old))
  return page


def fill_table(
  page: str,
  name: str,
  head: Sequence[str],
  rows_of: Callable[[list[list[str]]], Sequence[Sequence[str]]],
) -> str:
  """Returns a page with a new table between `<!-- NAME -->` and `<!-- end of NAME -->`.

  Args:
    page: Text of the page.
    name: Name of the place; a page without it stays as it is.
    head: Names of the columns.
    rows_of: `(old rows) -> rows`; the old ones are those that the page shows, its head included.
  """

  def place(found: re.Match[str]) -> str:
    lines = [head, ["---"] * len(head), *rows_of(read_rows(found["old"]))]
    return found["begin"] + "".join(f"| {' | '.join(line)} |\n" for line in lines) + found["end"]

  pattern = rf"(?P<begin><!-- {name} -->\n)(?P<old>.*?)(?P<end><!-- end of {name} -->)"
  return re.sub(pattern, place, page, flags=re.DOTALL)


def read_rows(text: str) -> list[list[str]]:
  """Returns the cells of the rows of a table in Markdown, its head included."""
  return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
