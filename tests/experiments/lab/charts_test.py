"""Groups of runs, by the words on the command line."""

from experiments.lab import charts


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
