"""Plots of several runs, from metrics written by hand."""

import json
import math

import numpy as np
import pytest

from experiments import plot
from rlhf_jax import flags, writers

PLOTS = {"frontier", "kl", "loss", "overoptimization", "reward"}


def write_run(folder, *, seed=0, steps=60, free=False, without=()):
  """A run whose proxy rises; without a penalty the gold reward peaks at a KL of 9 nats."""
  noise = np.random.default_rng(seed).normal(scale=0.05, size=(steps, 2))
  writer = writers.make_writer(folder)
  for step in range(1, steps + 1):
    distance = 8 * step / steps if free else 2 * math.sqrt(step / steps)
    row = {
      "loss": 1 / step,
      "kl/ref": distance**2,
      "reward/mean": distance + noise[step - 1, 0],
      "gold_reward/mean": 4 + (distance - distance**2 / 6) + noise[step - 1, 1],
    }
    writer.write(step, {name: value for name, value in row.items() if name not in without})
  writer.close()
  return str(folder)


@pytest.fixture
def runs(tmp_path):
  """Three seeds of each kind."""
  for seed in range(3):
    write_run(tmp_path / "runs" / f"kl_{seed}", seed=seed)
    write_run(tmp_path / "runs" / f"free_{seed}", seed=seed + 3, free=True)
  return tmp_path / "runs"


def test_groups_of_seeds_end_in_plots_and_metrics(tmp_path, runs, capsys):
  items = (f"KL penalty={runs}/kl_0", f"{runs}/kl_1", f"{runs}/kl_2", f"none={runs}/free_*")
  summary = plot.plot(plot.Config(str(tmp_path / "out"), items))
  assert {path.stem for path in (tmp_path / "out" / "plots").glob("*.png")} == PLOTS
  written = json.loads((tmp_path / "out" / "summary.json").read_text())
  assert written.keys() == summary.keys() == {"KL penalty", "none"}
  held, free = written["KL penalty"], written["none"]
  assert held["runs"] == free["runs"] == 3
  # The law of the runs: gold = 4 + d - d^2 / 6 of the distance d, highest at d = 3.
  assert free["gold_peak"] == pytest.approx(5.5, abs=0.1)
  assert free["gold_peak_kl"] == pytest.approx(9, abs=2)
  assert free["kl/ref"] == pytest.approx(64, rel=0.15)
  assert free["diverged"] == 3 and 2 < free["diverged_at_kl"] < 20
  assert free["spearman"] < 0 < 0.9 < held["spearman"]
  assert "gold_peak" not in held  # It rises to its end.
  assert held["diverged"] == 0 and "diverged_at_kl" not in held
  output = capsys.readouterr().err
  assert "KL penalty" in output and "overoptimization.png" in output


def test_each_run_without_a_label_is_a_line_of_its_own(tmp_path, runs):
  config = plot.Config(str(tmp_path / "out"), (f"{runs}/kl_0", f"{runs}/free_0/"))
  assert plot.plot(config).keys() == {"kl_0", "free_0"}


def test_runs_without_gold_have_no_overoptimization_plot(tmp_path, runs, capsys):
  plain = write_run(tmp_path / "plain", without=("gold_reward/mean",))
  plot.plot(plot.Config(str(tmp_path / "out"), (plain,)))
  # The proxy still has a frontier.
  assert {path.stem for path in (tmp_path / "out" / "plots").iterdir()} == PLOTS - {
    "overoptimization"
  }
  assert "plain is not in every plot: no gold_reward/mean" in capsys.readouterr().err
  mixed = plot.plot(plot.Config(str(tmp_path / "mixed"), (plain, f"{runs}/free_0")))
  assert (tmp_path / "mixed" / "plots" / "overoptimization.png").exists()
  assert "gold_peak" in mixed["free_0"] and "gold_peak" not in mixed["plain"]


def test_runs_that_are_no_reinforcement_learning(tmp_path, capsys):
  folder = write_run(tmp_path / "sft", without=("gold_reward/mean", "reward/mean", "kl/ref"))
  plot.plot(plot.Config(str(tmp_path / "out"), (folder,)))
  assert [path.name for path in (tmp_path / "out" / "plots").iterdir()] == ["loss.png"]
  assert "not in every plot" not in capsys.readouterr().err


def refused(tmp_path, *items, workdir="out"):
  with pytest.raises(flags.UsageError) as error:
    plot.plot(plot.Config(str(tmp_path / workdir), items))
  assert not (tmp_path / "out").exists()
  return str(error.value)


def test_bad_input_is_refused_in_words(tmp_path, runs):
  assert "--runs must name" in refused(tmp_path)
  assert "nowhere is no workdir of a run" in refused(tmp_path, "nowhere")
  assert "no folder matches" in refused(tmp_path, f"{runs}/nothing_*")
  (tmp_path / "empty").mkdir()
  message = refused(tmp_path, str(tmp_path / "empty"))
  assert "empty" in message and "metrics.jsonl" in message and "did you mean" not in message
  assert f"{runs}/kl_0" in refused(tmp_path, str(runs))  # One level too high.
  assert "twice" in refused(tmp_path, f"{runs}/kl_0", f"a={runs}/kl_0")
  (tmp_path / "empty" / "metrics.jsonl").write_text("")
  assert "wait for the first steps" in refused(tmp_path, str(tmp_path / "empty"))
  (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1}\nloss 0.3\n')
  message = refused(tmp_path, str(tmp_path / "empty"))
  assert "metrics.jsonl:2: " in message and "delete the line" in message
  short = write_run(tmp_path / "short", steps=1)
  assert "two points" in refused(tmp_path, short)
  assert "another folder for the plots" in refused(tmp_path, f"{runs}/kl_0", workdir="runs/kl_1")


@pytest.mark.slow
def test_the_command(tmp_path, runs, run_script):
  finished = run_script("plot", tmp_path / "out", f"--runs=free={runs}/free_*,kl={runs}/kl_*")
  assert finished.code == 0, finished.output
  assert {path.stem for path in (tmp_path / "out" / "plots").iterdir()} == PLOTS
