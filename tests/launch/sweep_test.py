import pytest

from launch import sweep
from tests.launch.conftest import SCRIPT, open_study, starts, table

pytestmark = pytest.mark.usefixtures("quick")


def test_finds_better_settings_than_the_defaults(study, run, plots):
  code, output = run("--trials=16", "--parallel=2")
  assert code == 0, output
  rows = table(study)
  assert [row["state"] for row in rows] == ["done"] * 16
  assert [row["default"] for row in rows] == ["yes"] + ["no"] * 15
  default, best = float(rows[0]["score"]), max(rows, key=lambda row: float(row["score"]))
  assert default == pytest.approx(0.64) and float(best["score"]) > 0.95
  assert f"best: trial {best['trial']}, score" in output
  assert "the default settings, trial 0, have 0.64" in output
  # The flags of the best one, without its folder.
  flags = dict(line[2:].split("=") for line in (study / "best/flags").read_text().splitlines())
  assert flags == {"x": best["x"], "y": best["y"]}
  for name in ("history", "slice", "parallel", "importances"):
    assert (study / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_grid_tries_each_point_once(study, run):
  code, output = run("--sampler=grid", "--parallel=3")
  assert code == 0, output
  points = [(float(row["x"]), float(row["y"])) for row in table(study)]
  assert points == [(x, y) for x in (0.0, 0.3, 0.9) for y in (1.0, 2.0)]
  assert [row["trial"] for row in table(study) if row["default"] == "yes"] == ["5"]
  code, output = run("--sampler=grid")
  assert code == 0 and len(table(study)) == 6
  assert all(len(each) == 1 for each in starts(study).values())


def test_more_trials_can_be_added(study, run):
  run("--trials=2", "--sampler=random")
  first = table(study)
  assert run("--trials=4", "--sampler=random")[0] == 0
  assert table(study)[:2] == first and len(table(study)) == 4
  assert len({(row["x"], row["y"]) for row in table(study)}) == 4


def test_what_is_drawn_does_not_depend_on_stops(study, run):
  run("--trials=3", "--sampler=random")
  run("--trials=5", "--sampler=random")
  drawn = [(row["x"], row["y"]) for row in table(study)]
  other = study.with_name("other")
  run(f"--study={other}", "--trials=5", "--sampler=random")
  assert [(row["x"], row["y"]) for row in table(other)] == drawn


def test_constraints_decide_what_is_best(study, run):
  code, output = run("--sampler=grid", "--constraint=kl<2", "--constraint=length<=7")
  assert code == 0, output
  assert "best: trial 1, score 0.91" in output  # x = 0; x = 0.3 is better and has kl = 3.
  assert [row["feasible"] for row in table(study)] == ["yes"] * 2 + ["no"] * 4
  assert "(not kl<2)" in output and float(table(study)[1]["length"]) == 7
  assert open_study(study).best_trial.number == 1


def test_says_when_no_trial_keeps_the_constraints(study, run):
  code, output = run("--trials=2", "--constraint=kl<-1")
  assert code == 0 and "no trial keeps the constraints" in output
  assert not (study / "best").exists()


def test_a_real_script(study, repository, capsys):
  tiny = ["--model.layers=1", "--model.width=32", "--model.heads=2", "--model.mlp_width=32"]
  tiny += ["--data.rows=64", "--data.eval_rows=8", "--batch_size=8", "--steps=3"]
  code = sweep.main(
    [
      f"--study={study}",
      f"--space={repository / 'launch' / 'spaces' / 'sft.py'}",
      "--trials=1",
      "--prune_on=eval/loss",
      "--constraint=grad_norm<100",
      *("--", "experiments.sft", *tiny, "--eval_every=1", "--sampling.max_new_tokens=8"),
    ]
  )
  output = capsys.readouterr().err
  assert code == 0, output
  [row] = table(study)
  assert row["state"] == "done" and row["default"] == row["feasible"] == "yes"
  assert float(row["eval/loss"]) > 0
  assert list(open_study(study).trials[0].intermediate_values) == [1, 2, 3]
  flags = (study / "best/flags").read_text().splitlines()
  assert "--optim.learning_rate=0.003" in flags and "--steps=3" in flags
  assert not [line for line in flags if line.startswith("--workdir")]


def test_a_database_keeps_the_study(study, run):
  database = f"--storage=sqlite:///{study.parent}/trials.db"
  assert run(database, "--trials=1")[0] == 0
  assert run(database, "--trials=3", "--sampler=random")[0] == 0
  assert [row["state"] for row in table(study)] == ["done"] * 3
  assert not (study / "journal.log").exists()


def test_a_database_that_cannot_be_reached(run):
  code, output = run("--storage=sqlite:////nowhere/trials.db", "--trials=1")
  assert code == 64 and "--storage cannot be used: " in output


def test_refuses_to_continue_another_study(study, run):
  assert run("--trials=1", script=("--steps=3",))[0] == 0
  code, output = run("--trials=2", script=("--steps=4",))
  assert code == 64 and f"{SCRIPT} --steps=3" in output and f"{SCRIPT} --steps=4" in output
  code, output = run("--trials=2", "--metric=length", script=("--steps=3",))
  assert code == 64 and "another value of --metric" in output
  assert len(starts(study)) == 1


@pytest.mark.parametrize(
  "flags, script, message",
  [
    ([], ["--workdir=runs"], "--workdir is not for the script"),
    ([], ["--x=1"], "--x is set by the space"),
    (["--to=xpk"], [], "--to=xpk: a sweep runs its trials local or by slurm"),
    (
      ["--space=nowhere.py"],
      [],
      "--space=nowhere.py: no such file; the package has cgpo, cispo, dpo, ",
    ),
    (["--minutes=5"], [], "are for --to=slurm"),
    (["--gpus=1", "--parallel=3"], [], "more than the 2 GPUs of this machine"),
  ],
)
def test_refuses(run, study, monkeypatch, flags, script, message):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
  code, output = run(*flags, script=script)
  assert code == 64 and message in output
  assert not (study / "trials").exists()


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--constraint=kl"], "'kl' is no comparison of a metric with a number"),
    (["--trials=0"], "must be a whole number from 1"),
    (["--sampler=best"], "invalid choice: 'best'"),
    (["--trial=3"], "unrecognized arguments: --trial=3"),
  ],
)
def test_refuses_flags(run, capsys, flags, message):
  with pytest.raises(SystemExit) as exit_info:
    run(*flags)
  assert exit_info.value.code == 64 and message in capsys.readouterr().err


def test_refuses_a_command_without_script(study, capsys):
  assert sweep.main([f"--study={study}", "--space=space.py"]) == 64
  assert "the script is missing" in capsys.readouterr().err
  assert sweep.main([f"--study={study}", "--space=space.py", "--", "experiments.dppo"]) == 64
  assert "there is no module experiments.dppo" in capsys.readouterr().err
