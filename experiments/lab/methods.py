"""The table of methods as data, the results of its runs, and the tables that pages show.

A method is one line of methods.csv. `experiments.methods` runs the lines; tests run their commands
shortened, and check that the pages show them.
"""

import csv
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from . import scripts

FILE = pathlib.Path(__file__).with_name("methods.csv")
START, JUDGE = "sft", "reward_model"  # Stages of a seed that come before the methods.
STAGES = {"$RM": JUDGE, "$DPO": "dpo", "$PPO": "ppo"}  # Variable of a command -> its stage.


class Method(NamedTuple):
  """A line of the table.

  Attributes:
    title: Name of the method.
    paper: Number of the paper at arXiv.
    command: Script with its flags; the variables are those of `STAGES`.
    test: File in tests/ and name of the test that holds the method against an oracle.
  """

  title: str
  paper: str
  command: str
  test: str


METHODS: Mapping[str, Method] = {
  line.pop("name"): Method(**line)
  for line in csv.DictReader(FILE.read_text(encoding="utf-8").splitlines())
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


def with_needed(rows: Sequence[str]) -> list[str]:
  """Returns the stages of a seed: start, judge, and each row behind those that it reads."""
  stages = [START, JUDGE]
  for name in rows:
    read = [stage for variable, stage in STAGES.items() if variable in METHODS[name].command]
    stages += [stage for stage in (*read, name) if stage not in stages]
  return stages


def words(name: str, folder: pathlib.Path, seed: int) -> list[str]:
  """Returns module and flags of a stage of a seed. Each stage draws its own rows, as in the chain.

  Args:
    name: Key of `METHODS`, or `reward_model`.
    folder: Folder of the seed, with a workdir for each stage.
    seed: Seed of the chain.
  """
  command = METHODS[name].command if name in METHODS else name
  for variable, stage in STAGES.items():
    command = command.replace(variable, str(folder / stage))
  script, *flags = command.split()
  if name != START:
    flags.append(f"--init_from={folder / START}")
  stage = {START: 1, JUDGE: 2}.get(name, 3)
  session = [f"--workdir={folder / name}", f"--seed={10 * seed + stage}"]
  return [scripts.module_name(script), *session, *flags]


def read(workdir: pathlib.Path) -> dict[str, dict[int, Result]]:
  """Returns the results of all finished runs below a workdir, by method and seed."""
  results: dict[str, dict[int, Result]] = {name: {} for name in METHODS}
  for folder in workdir.glob("seed_*"):
    seed = int(folder.name.removeprefix("seed_"))
    for name in METHODS:
      record = read_record(folder / f"{name}.json")
      if record.get("code") != 0 or name == START:
        continue
      summary = json.loads((folder / name / "summary.json").read_text(encoding="utf-8"))
      keys = ("gold/mean", "gold/win_rate", "gold/win_rate_low", "gold/win_rate_high", "kl")
      gold, rate, low, high, kl = (summary[key] for key in keys)
      results[name][seed] = Result(gold, rate, low, high, kl, record["cpu_minutes"])
      start = read_record(folder / f"{START}.json")
      results[START][seed] = Result(
        summary["gold/mean_before"], 0.5, 0.5, 0.5, 0.0, start.get("cpu_minutes", math.nan)
      )
  return results


def read_record(path: pathlib.Path) -> dict[str, Any]:
  """Returns command, CPU minutes and exit code of a stage; empty before its first end."""
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def mean_win_rate(results: Results) -> str:
  """Returns the mean over the seeds with its 95 % interval."""
  rate = sum(result.win_rate for result in results.values()) / len(results)
  width = math.hypot(*((result.high - result.low) / 2 for result in results.values()))
  return f"{rate:.2f} ± {width / len(results):.2f}" if width else f"{rate:.2f}"


def by_seed(results: Results, field: str, digits: int) -> str:
  """Returns a metric of seed 0, 1 and so on, with a dash for one that was not run."""
  values = (results[i]._asdict()[field] if i in results else None for i in range(max(results) + 1))
  return " / ".join("–" if x is None or math.isnan(x) else f"{x:.{digits}f}" for x in values)


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
      by_seed(results, "gold", 2),
      by_seed(results, "win_rate", 2),
      mean_win_rate(results),
      by_seed(results, "kl", 1),
      by_seed(results, "cpu_minutes", 1),
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
  """Returns a page with new tables between `<!-- NAME -->` and `<!-- end of NAME -->`."""

  def place(found: re.Match[str]) -> str:
    table = TABLES[found["name"]]
    lines = [table.head, ["---"] * len(table.head), *rows(table, results, read_rows(found["old"]))]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return found["begin"] + text + found["end"]

  names = "|".join(TABLES)
  pattern = (
    rf"(?P<begin><!-- (?P<name>{names}) -->\n)(?P<old>.*?)(?P<end><!-- end of (?P=name) -->)"
  )
  return re.sub(pattern, place, page, flags=re.DOTALL)


def read_rows(text: str) -> list[list[str]]:
  """Returns the cells of the rows of a table in Markdown, its head included."""
  return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
