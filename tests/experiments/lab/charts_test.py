"""Groups of runs, by the words on the command line."""

from experiments.lab import charts
from rlhf_jax import plots


def test_runs_before_the_first_label_are_groups_of_their_own(tmp_path):
  for name in ("kl_0", "kl_1", "free_0", "free_1"):
    (tmp_path / name).mkdir()
  items = (f"{tmp_path}/kl_0", f"both={tmp_path}/kl_1", f"{tmp_path}/free_*")
  assert charts.group_runs(items) == {
    "kl_0": [f"{tmp_path}/kl_0"],
    "both": [f"{tmp_path}/{name}" for name in ("kl_1", "free_0", "free_1")],
  }


def test_a_folder_may_have_an_equals_sign(tmp_path):
  folder = tmp_path / "lr=0.1"
  folder.mkdir()
  assert charts.group_runs((str(folder),)) == {"lr=0.1": [str(folder)]}
  assert charts.group_runs((f"low={folder}",)) == {"low": [str(folder)]}


def test_no_two_charts_have_the_same_title():
  names = {name for panel in plots.PANELS.values() for name in panel.metrics}
  groups = {"run": [[{"step": step} | dict.fromkeys(names, 1.0) for step in range(4)]]}
  shown = [panel for panel in plots.PANELS.values() if panel.x == "step"]
  titles = [chart.title for panel in shown for chart in charts.curves(panel, groups)]
  assert len(set(titles)) == len(titles) > len(shown)
