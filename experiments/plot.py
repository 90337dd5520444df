r"""Compares runs: curves with seeds as bands, reward over KL, settings, samples.

Each run a line:
  python -m experiments.plot --workdir=runs/plots --runs=runs/ppo,runs/ppo_free
Seeds together, a line each for two settings:
  python -m experiments.plot --workdir=runs/plots \
    --runs="KL penalty=runs/kl_0,runs/kl_1,runs/kl_2,none=runs/free_*"
With win rates, and the answers of all policies to the same prompts:
  python -m experiments.plot --workdir=runs/plots --runs=runs/ppo,runs/nash \
    --evaluation=runs/eval

`LABEL=DIR` starts a group of runs that differ in their seed only, every `DIR`
after it joins it, and `*` stands for what the shell would put there. A group is
drawn as the mean of its runs in a band from the lowest to the highest. Runs may
still be going on. It takes ten seconds or so.

Writes, for what the runs have logged:
  report.html                all of it on one page that opens without a network,
                             with the final metrics, the settings that differ,
                             answers side by side and lineage
  plots/NAME.png             each metric over the steps
  plots/frontier.png         reward over the KL at the end of training
  plots/overoptimization.png proxy and gold reward over the KL during training
  plots/win_rates.png        win rates, from an evaluation by pairs
  summary.json               the same as numbers, by group

A proxy that keeps rising while the gold reward peaks and falls is
over-optimised. `diverged` counts the runs in which proxy and gold are rank
correlated negatively over a third of the training, far beyond chance;
`diverged_at_kl` is the KL from which they are.
"""

import dataclasses
from typing import Any

from experiments.lab import charts
from experiments.records import report
from rlhf_jax import entry, flags, plots, reporting
from rlhf_jax import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class Config:
  """Runs to draw.

  Attributes:
    workdir: Folder for the plots.
    runs: Workdirs of the runs: DIR,DIR draws each on its own, LABEL=DIR,DIR,LABEL=DIR groups them.
    evaluation: Workdir of experiments.evaluate, for its metrics, win rates and samples.
  """

  workdir: str
  runs: tuple[str, ...]
  evaluation: str = ""


def plot(config: Config) -> dict[str, Any]:
  """Reads the runs, writes plots, report.html and summary.json, returns the latter."""
  workdir = workdir_lib.local_path(config.workdir)
  if (workdir / "metrics.jsonl").exists():
    raise flags.UsageError(f"--workdir={workdir} is a run; give the plots a folder of their own")
  folders = charts.group_runs(config.runs)
  groups = {label: [charts.read_run(run) for run in runs] for label, runs in folders.items()}
  evaluation = workdir_lib.local_path(config.evaluation) if config.evaluation else None
  matrix = report.win_rates(report.read_evaluation(evaluation)) if evaluation else {}
  drawn = charts.charts_of(groups)
  summary = charts.draw(workdir, groups, drawn)
  if matrix:
    png = plots.render_matrix("Share of prompts on which the row is preferred", matrix)
    (workdir / "plots" / "win_rates.png").write_bytes(png)
  page = report.render(report.Comparison(folders, drawn, charts.table(summary), evaluation))
  workdir_lib.atomic_write(workdir / "report.html", page)
  reporting.note(f"report: {workdir / 'report.html'}")
  return summary


if __name__ == "__main__":
  entry.run_script(plot, Config)
