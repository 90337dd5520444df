r"""Compares runs by curves, reward over KL, settings and samples.

One line per run:
  python -m experiments.plot --workdir=runs/plots --runs=runs/ppo,runs/ppo_free
One line per setting, each the mean of several seeds:
  python -m experiments.plot --workdir=runs/plots \
    --runs="KL penalty=runs/kl_0,runs/kl_1,runs/kl_2,none=runs/free_*"
With win rates, and the responses of all policies to the same prompts:
  python -m experiments.plot --workdir=runs/plots --runs=runs/ppo,runs/nash \
    --evaluation=runs/eval

`LABEL=DIR` starts a group of runs that differ only in their seed, and every `DIR`
after it joins the group. `*` is expanded as by the shell. A group is drawn as the
mean of its runs, with a band from the lowest to the highest run. Unfinished runs
can be plotted too. It takes about ten seconds.

It writes these files, from the metrics that the runs have logged:
  report.html                one page with all plots, the final metrics, the
                             settings that differ, responses side by side, and
                             the runs that each run builds on; needs no network
  plots/NAME.png             each metric over the steps
  plots/frontier.png         reward over the KL at the end of training
  plots/overoptimization.png proxy and gold reward over the KL during training
  plots/win_rates.png        win rates between policies, from --evaluation
  summary.json               the final metrics by group

A proxy reward that keeps rising while the gold reward peaks and falls is
over-optimised. `diverged` counts the runs in which proxy and gold reward have a
negative rank correlation, far beyond chance, over a third of the training.
`diverged_at_kl` is the KL at which this starts.
"""

import dataclasses
from typing import Any

from rlhf_jax import entry, flags, plots, reporting
from rlhf_jax import workdir as workdir_lib
from .lab import charts
from .records import report


@dataclasses.dataclass(frozen=True)
class Config:
  """Runs to draw.

  Attributes:
    workdir: Folder for the plots.
    runs: Workdirs of the runs. DIR,DIR draws one line per run; LABEL=DIR,DIR,LABEL=DIR draws one
      line per group.
    evaluation: Workdir of experiments.evaluate, to add its metrics, win rates and samples.
  """

  workdir: str
  runs: tuple[str, ...]
  evaluation: str = ""


def plot(config: Config) -> dict[str, Any]:
  """Reads the runs, writes plots, report.html and summary.json; returns summary.json."""
  workdir = workdir_lib.local_path(config.workdir)
  if (workdir / "metrics.jsonl").exists():
    raise flags.UsageError(f"--workdir={workdir} is a run; give another folder for the plots")
  folders = charts.group_runs(config.runs)
  groups = {label: [charts.read_run(run) for run in runs] for label, runs in folders.items()}
  evaluation = workdir_lib.local_path(config.evaluation) if config.evaluation else None
  matrix = report.win_rates(report.read_evaluation(evaluation)) if evaluation else {}
  drawn = charts.charts_of(groups)
  summary = charts.draw(workdir, groups, drawn)
  if matrix:
    png = plots.render_matrix("Share of prompts on which the row is preferred", matrix)
    workdir_lib.atomic_write(workdir / "plots" / "win_rates.png", png)
  page = report.render(report.Comparison(folders, drawn, charts.table(summary), evaluation))
  workdir_lib.atomic_write(workdir / "report.html", page)
  reporting.note(f"report: {workdir / 'report.html'}")
  return summary


if __name__ == "__main__":
  entry.run_script(plot, Config)
