r"""Measures the methods and the claims of their papers on the built-in task, into tables.

  python -m experiments.methods --workdir=runs/methods
One seed of two methods; of the runs that a claim compares; all, into the tables of the pages:
  python -m experiments.methods --workdir=runs/methods --rows=ppo,dpo --seeds=0
  python -m experiments.methods --workdir=runs/methods --rows=gold_score,fine_grained --seeds=0
  python -m experiments.methods --workdir=runs/methods --page=experiments/METHODS.md,README.md

No network and no download. A method takes one to two minutes on two CPU cores, all of them half an
hour for each seed, and the further runs of the claims a quarter of an hour. The methods are the
lines of experiments/lab/methods.csv, the claims those of claims.csv beside it, and their further
runs those of arms.csv.

For each seed it trains an SFT policy and a reward model, then each method from that policy, as runs
of their own in `workdir/seed_0/sft`, `workdir/seed_0/ppo` and so on: each is the command of the
table, in a process of its own, behind those that the command names (`$DPO` is the run `dpo`). At
its end a run samples answers to the same 512 held-out prompts from its policy and from the SFT
policy, which the gold reward judges. A claim compares a run with the method and one without it, by
a number that both have written.

Starting the same command again continues where it was stopped. Another command with other seeds may
run beside it in the same workdir. A method that fails is left out, and tried again the next time.
"""

import dataclasses
import pathlib
import resource
import signal
import subprocess
import sys

from rlhf_jax import entry, loop, reporting
from rlhf_jax import workdir as workdir_lib
from .lab import claims, front, methods, stages


@dataclasses.dataclass(frozen=True)
class Config:
  """Methods to measure.

  Attributes:
    workdir: Folder for the runs.
    rows: Names of runs, the first column of methods.csv and of arms.csv in experiments/lab; empty
      takes all.
    seeds: Seeds of the chain that each method ends.
    page: Markdown files whose tables get the results of all runs in the workdir. What they show of
      other methods stays.
  """

  workdir: str
  rows: tuple[str, ...] = ()
  seeds: tuple[int, ...] = (0, 1, 2)
  page: tuple[str, ...] = ()

  def __post_init__(self):
    for name in self.rows:
      if name not in stages.COMMANDS:
        raise ValueError(f"rows: {name} is not one of {', '.join(stages.COMMANDS)}")
    if not self.seeds or min(self.seeds) < 0:
      raise ValueError("seeds must be at least 0")
    for path in self.page:
      if not pathlib.Path(path).is_file():
        raise ValueError(f"page: there is no file {path}")


def measure(config: Config) -> None:
  """Runs what has not finished, shows the results and writes them into summary.json and pages."""
  workdir = workdir_lib.local_path(config.workdir)
  names, failed = stages.with_needed(config.rows or [*stages.COMMANDS]), []
  stages.refuse_others(workdir, config.seeds, names)
  for seed in config.seeds:
    folder = workdir / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
      code = run_stage(name, folder, seed)
      if code == loop.Preempted.exit_code:
        raise loop.Preempted("start the same command again to continue")
      if code:
        failed.append(f"seed {seed}: {name} ended with exit code {code}")
        if name in (stages.START, stages.JUDGE):
          break
  results, numbers = methods.read(workdir), claims.read(workdir)
  show(results)
  claims.show(numbers)
  summary = {name: {s: r._asdict() for s, r in of.items()} for name, of in results.items() if of}
  reporting.write_summary(workdir, summary)
  for path in map(pathlib.Path, config.page):
    page = methods.fill(path.read_text(encoding="utf-8"), results)
    page = front.fill(claims.fill(page, numbers), front.read(workdir))
    workdir_lib.atomic_write(path, page)
  if failed:
    sys.exit("\n".join(failed))


def run_stage(name: str, folder: pathlib.Path, seed: int) -> int:
  """Runs a stage unless it has finished, and keeps its CPU minutes; returns its exit code."""
  record = stages.read_record(folder, name) or {"cpu_minutes": 0.0}
  if record.get("code") == 0:
    return 0
  reporting.note(f"seed {seed}: {stages.COMMANDS[name]}")
  stages.write_record(folder, name, None, None)  # A kill leaves this: the minutes are not known.
  before = cpu_minutes()
  code = run([sys.executable, "-m", *stages.words(name, folder, seed)])
  known = record["cpu_minutes"] is not None
  minutes = record["cpu_minutes"] + cpu_minutes() - before if known else None
  stages.write_record(folder, name, minutes, code)
  return code


def cpu_minutes() -> float:
  """Returns the processor time of all programs that have ended, which other load hardly changes."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return (used.ru_utime + used.ru_stime) / 60


def run(line: list[str]) -> int:
  """Runs a program to its end and returns its exit code.

  SIGTERM is handed on to it, and the terminal sends it Ctrl-C, so that it saves. The code then is
  that of a run that has saved.
  """
  stopped = []
  with subprocess.Popen(line) as child:

    def stop(number, frame):
      del frame
      stopped.append(number)
      if number == signal.SIGTERM:
        child.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
      code = child.wait()
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)
  return loop.Preempted.exit_code if stopped else code


def show(results: dict[str, dict[int, methods.Result]]) -> None:
  """Shows the table of results."""
  table = methods.TABLES["results"]
  cells = {
    row[0]: dict(zip(table.head[1:], row[1:], strict=True)) for row in methods.rows(table, results)
  }
  reporting.show_summary("Methods, on held-out prompts", cells)


if __name__ == "__main__":
  entry.run_script(measure, Config)
