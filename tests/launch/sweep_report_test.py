import csv

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from launch import sweep_report

_SPACE = {
  "optim.lr": FloatDistribution(1e-5, 1e-1, log=True),
  "beta": FloatDistribution(0, 1),
  "loss": CategoricalDistribution(["dpo", "ipo"]),
}


def study_of(*rows, direction="maximize") -> optuna.Study:
  """A study of trials (value, lr, beta, loss, more); more may have state, kl, default, curve."""
  study = optuna.create_study(direction=direction)
  identity = {"direction": direction, "prune_direction": "maximize", "prune_on": "eval/accuracy"}
  study.set_user_attr("identity", identity)
  for value, lr, beta, loss, more in rows:
    flags = {"optim.lr": lr, "beta": beta, "loss": loss}
    attrs = {"flags": flags, "default": more.get("default", False)}
    if value is not None:
      attrs["figures"] = {"win_rate": value, "kl": more.get("kl", 1.0)}
    state = more.get("state", TrialState.COMPLETE)
    if state == TrialState.PRUNED:
      attrs["pruned_at"] = max(more["curve"])
    if state == TrialState.FAIL:
      attrs["reason"] = "exit code 70"
    study.add_trial(
      optuna.trial.create_trial(
        state=state,
        value=value,
        params=flags,
        distributions=_SPACE,
        user_attrs=attrs,
        system_attrs={"constraints:kl<10": more.get("kl", 1.0) - 10},
        intermediate_values=more.get("curve", {}),
      )
    )
  return study


@pytest.fixture(scope="module")
def study() -> optuna.Study:
  return study_of(
    (0.60, 3e-4, 0.1, "dpo", {"default": True, "curve": {20: 0.6, 60: 0.65}}),
    (0.90, 3e-2, 0.2, "dpo", {"kl": 30.0, "curve": {20: 0.7, 60: 0.8}}),
    (None, 1e-5, 0.3, "ipo", {"state": TrialState.PRUNED, "curve": {20: 0.5}}),
    (0.70, 1e-3, 0.2, "ipo", {"curve": {20: 0.65, 60: 0.7}}),
    (None, 1e-1, 0.9, "dpo", {"state": TrialState.FAIL}),
    (0.65, 5e-4, 0.5, "ipo", {}),
    (0.62, 4e-4, 0.4, "dpo", {}),
  )


def test_best_and_order_respect_the_constraints(study):
  assert sweep_report.best_trial(study).number == 3
  assert sweep_report.default_trial(study).number == 0
  assert [t.number for t in sweep_report.ordered(study)] == [3, 5, 6, 0, 1, 2, 4]
  down = study_of((0.2, 1e-3, 0.1, "dpo", {}), (0.1, 1e-3, 0.2, "dpo", {}), direction="minimize")
  assert [t.number for t in sweep_report.ordered(down)] == [1, 0]


def test_table_and_flags_of_the_best(study, tmp_path):
  own = tmp_path / "trials" / "0003"
  own.mkdir(parents=True)
  (own / "flags").write_text("--beta=0.2\n--workdir=runs/trials/0003\n--workdirs=kept\n")
  sweep_report.write_files(study, tmp_path)
  assert (tmp_path / "best" / "flags").read_text() == "--beta=0.2\n--workdirs=kept\n"
  with open(tmp_path / "table.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["state"] for row in rows] == ["done"] * 2 + ["pruned", "done", "failed"] + [
    "done"
  ] * 2
  assert [row["feasible"] for row in rows] == ["yes", "no", "", "yes", "", "yes", "yes"]
  assert rows[2]["pruned_at"] == "20" and rows[4]["reason"] == "exit code 70"
  assert float(rows[1]["kl"]) == 30 and rows[3]["loss"] == "ipo"
  assert not list(tmp_path.glob(".*.tmp"))


def test_show(study, tmp_path, capsys):
  sweep_report.show(study, tmp_path, "win_rate")
  lines = capsys.readouterr().err.splitlines()
  rows = [line.split() for line in lines]
  assert ["trial", "win_rate", "kl", "lr", "beta", "loss"] in rows
  assert ["3", "0.7", "1", "0.001", "0.2", "ipo", "best"] in rows
  assert ["1", "0.9", "30", "0.03", "0.2", "dpo", "not", "kl<10"] in rows
  assert ["2", "–", "–", "1e-05", "0.3", "ipo", "pruned", "at", "20"] in rows
  assert "best: trial 3, win_rate 0.7; the default settings, trial 0, have 0.6" in lines
  plots = {file.stem for file in (tmp_path / "plots").glob("*.png")}
  assert plots == {"history", "slice", "parallel", "importances", "learning"}


def test_importance_needs_trials_that_differ():
  few = study_of((0.1, 1e-3, 0.1, "dpo", {}), (0.2, 1e-2, 0.1, "dpo", {}))
  same = study_of(*[(0.5, 1e-3 * i, 0.1, "dpo", {}) for i in range(1, 6)])
  assert sweep_report.importances(few) == sweep_report.importances(same) == {}
  # Only the learning rate matters.
  lrs = [10 ** -(1 + i / 4) for i in range(16)]
  rows = [(lr**0.5, lr, (7 * i) % 16 / 16, "dpo", {}) for i, lr in enumerate(lrs)]
  shares = sweep_report.importances(study_of(*rows))
  assert next(iter(shares)) == "optim.lr" and sum(shares.values()) == pytest.approx(1)


def test_nothing_to_show(tmp_path, capsys):
  sweep_report.show(study_of(), tmp_path, "win_rate")
  assert capsys.readouterr().err == "" and not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
  "names, shown",
  [
    (["optim.lr", "dpo.beta"], ["lr", "beta"]),
    (["optim.lr", "value_optim.lr", "x"], ["optim.lr", "value_optim.lr", "x"]),
  ],
)
def test_short_names_stay_different(names, shown):
  assert sweep_report._shortest(names) == shown
