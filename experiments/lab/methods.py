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
from typing import NamedTuple

FILE = pathlib.Path(__file__).with_name("methods.csv")
START, JUDGE = "sft", "reward_model"  # Stages of a seed that come before the methods.


class Method(NamedTuple):
  """A line of the table.

  Attributes:
    title: Name of the method.
    paper: Number of the paper at arXiv.
    command: Script with its flags; `$RM` is the reward model.
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
  """Metrics of a policy on the held-out prompts of a seed, and the minutes of its run."""

  gold: float
  win_rate: float
  low: float
  high: float
  kl: float
  minutes: float


# Seed -> result, of one method.
Results = Mapping[int, Result]


def words(name: str, folder: pathlib.Path, seed: int) -> list[str]:
  """Returns module and flags of a stage of a seed. Each stage draws its own rows, as in the chain.

  Args:
    name: Key of `METHODS`, or `reward_model`.
    folder: Folder of the seed, with a workdir for each stage.
    seed: Seed of the chain.
  """
  command = METHODS[name].command if name in METHODS else name
  script, *flags = command.replace("$RM", str(folder / JUDGE)).split()
  if name != START:
    flags.append(f"--init_from={folder / START}")
  stage = {START: 1, JUDGE: 2}.get(name, 3)
  session = [f"--workdir={folder / name}", f"--seed={10 * seed + stage}"]
  return [f"experiments.{script}", *session, *flags]


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
      results[name][seed] = Result(*(summary[key] for key in keys), record["minutes"])
      start = read_record(folder / f"{START}.json")
      results[START][seed] = Result(
        summary["gold/mean_before"], 0.5, 0.5, 0.5, 0.0, start.get("minutes", math.nan)
      )
  return results


def read_record(path: pathlib.Path) -> dict:
  """Returns command, minutes and exit code of a stage; empty before its first end."""
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def mean_win_rate(results: Results) -> str:
  """Returns the mean over the seeds with its 95 % interval; empty without results."""
  if not results:
    return ""
  rate = sum(result.win_rate for result in results.values()) / len(results)
  width = math.hypot(*((result.high - result.low) / 2 for result in results.values()))
  return f"{rate:.2f} ± {width / len(results):.2f}" if width else f"{rate:.2f}"


def methods_table(results: Mapping[str, Results]) -> list[Sequence[str]]:
  """Command and test of each method."""
  del results
  rows = [
    (_link(method), f"`{method.command}`", f"[{test}](../tests/{file})")
    for method in METHODS.values()
    for file, _, test in [method.test.partition("::")]
  ]
  return [("method", "command", "test"), *rows]


def results_table(results: Mapping[str, Results]) -> list[Sequence[str]]:
  """Results of each method that has any, by seed."""
  seeds = sorted({seed for of in results.values() for seed in of})

  def row(name: str) -> tuple[str, ...]:
    of = results[name]

    def cell(field: str, digits: int) -> str:
      values = (getattr(of[seed], field, math.nan) if seed in of else math.nan for seed in seeds)
      return " / ".join("–" if math.isnan(x) else f"{x:.{digits}f}" for x in values)

    cells = (cell("gold", 2), cell("win_rate", 2), mean_win_rate(of), cell("kl", 1))
    return (METHODS[name].title, *cells, cell("minutes", 1))

  reward = f"gold reward, seeds {' / '.join(map(str, seeds))}"
  head = ("method", reward, "win rate against SFT", "its mean, 95 %", "KL to SFT, nats", "minutes")
  return [head, *(row(name) for name in METHODS if results.get(name))]


def short_table(results: Mapping[str, Results]) -> list[Sequence[str]]:
  """Command and mean win rate of each method."""
  rows = [
    (_link(method), f"`{method.command}`", mean_win_rate(results.get(name, {})))
    for name, method in METHODS.items()
  ]
  return [("method", "command", "win rate against SFT"), *rows]


# Name of a place in a page -> its table.
TABLES: Mapping[str, Callable[[Mapping[str, Results]], list[Sequence[str]]]] = {
  "methods": methods_table,
  "results": results_table,
  "short": short_table,
}


def fill(page: str, results: Mapping[str, Results]) -> str:
  """Returns a page with new tables between `<!-- NAME -->` and `<!-- end of NAME -->`."""

  def place(found: re.Match[str]) -> str:
    head, *rows = TABLES[found["name"]](results)
    lines = [" | ".join(row) for row in (head, ["---"] * len(head), *rows)]
    return found["begin"] + "".join(f"| {line} |\n" for line in lines) + found["end"]

  names = "|".join(TABLES)
  pattern = rf"(?P<begin><!-- (?P<name>{names}) -->\n).*?(?P<end><!-- end of (?P=name) -->)"
  return re.sub(pattern, place, page, flags=re.DOTALL)


def _link(method: Method) -> str:
  return f"[{method.title}](https://arxiv.org/abs/{method.paper})"
