import csv
import math
import os
import signal

import optuna
import pytest

from launch import sweep, sweep_report, trials
from tests.launch.conftest import SCRIPT, starts, wait_until


@pytest.fixture
def plots():
  """For the tests that look at them."""


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
  monkeypatch.setattr(trials.Local, "poll_seconds", 0.01)
  if "plots" not in request.fixturenames:  # They would take most of the time.
    monkeypatch.setattr(sweep_report, "draw", lambda *unused: [])


@pytest.fixture
def run(command, capsys):
  """`run(*flags, script=(...)) -> (exit code, output)` of a controller in this process."""

  def call(*flags, script=()):
    code = sweep.main(command(*flags, script=script))
    return code, capsys.readouterr().err

  return call


def open_study(study) -> optuna.Study:
  backend = optuna.storages.journal.JournalFileBackend(str(study / "journal.log"))
  return optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))


def table(study) -> list[dict[str, str]]:
  with open(study / "table.csv", newline="") as file:
    return list(csv.DictReader(file))


def steps_of(study, number: int) -> list[int]:
  path = sweep.trial_folder(study, number) / "metrics.jsonl"
  return [row["step"] for row in sweep.read_rows(path)]


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


def test_poor_trials_are_stopped_early(study, run):
  code, output = run("--trials=12", "--prune_on=eval/score", script=("--pause=0.05",))
  assert code == 0, output
  pruned = [row for row in table(study) if row["state"] == "pruned"]
  assert 3 <= len(pruned) < 12
  for row in pruned:
    number = int(row["trial"])
    assert steps_of(study, number)[-1] < 9
    assert not (sweep.trial_folder(study, number) / "summary.json").exists()
    assert f"trial {number} pruned at step {row['pruned_at']}: eval/score" in output
  done = [float(row["score"]) for row in table(study) if row["state"] == "done"]
  assert max(done) > 0.9


def test_prunes_by_a_metric_of_the_other_direction(study, run):
  pruned = []
  for flags in (["--prune_on=eval/score"], ["--prune_on=eval/loss", "--prune_direction=minimize"]):
    own = f"--study={study}_{len(pruned)}"
    code, output = run(own, "--trials=6", "--sampler=random", *flags, script=("--pause=0.05",))
    assert code == 0, output
    rows = table(study.with_name(own.rpartition("/")[2]))
    pruned.append([row["trial"] for row in rows if row["state"] == "pruned"])
  assert pruned[0] and pruned[0] == pruned[1]


def test_the_default_settings_are_never_pruned(study, run):
  # They are worse than all the others.
  run("--trials=4", "--parallel=4", "--prune_on=eval/score", script=("--pause=0.02",))
  assert table(study)[0]["state"] == "done"


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


@pytest.fixture
def held(study, start):
  """`held(*flags, script=(...))`: a controller whose first two trials wait for a file, and it."""

  def begin(*flags, script):
    controller = start("--parallel=2", *flags, script=script)
    wait_until(lambda: all(n in starts(study) and steps_of(study, n) == [1, 2, 3] for n in (0, 1)))
    return controller

  return begin


@pytest.mark.parametrize("children_live", [True, False])
def test_a_killed_controller_is_continued(study, held, run, children_live):
  flags = ("--trials=4", "--sampler=random")
  script = (f"--hold={study.parent / 'go'}",)
  controller = held(*flags, script=script)
  controller.kill()
  controller.wait()
  assert [t.state.name for t in open_study(study).get_trials()] == ["RUNNING"] * 2
  if not children_live:
    for [[number, _]] in starts(study).values():
      os.kill(int(number), signal.SIGKILL)
  (study.parent / "go").touch()
  code, output = run("--parallel=2", *flags, script=script)
  assert code == 0, output
  # None is lost, none is repeated, and of none a step.
  assert [row["state"] for row in table(study)] == ["done"] * 4
  assert [steps_of(study, number) for number in range(4)] == [list(range(1, 10))] * 4
  begun = [len(each) for each in starts(study).values()]
  assert begun == ([1, 1, 1, 1] if children_live else [2, 2, 1, 1])


def test_sigterm_stops_the_trials_and_the_same_command_continues(study, held, run):
  flags = ("--trials=3", "--prune_on=eval/score")
  script = (f"--hold={study.parent / 'go'}",)
  controller = held("--prune_after=5", *flags, script=script)
  controller.terminate()
  output, _ = controller.communicate(timeout=300)
  assert controller.returncode == 75
  assert "asking 2 trials to save and stop" in output
  assert "the same command continues the sweep" in output
  assert {row["state"] for row in table(study)} == {"unfinished"}
  for [[number, _]] in starts(study).values():
    with pytest.raises(ProcessLookupError):
      os.kill(int(number), 0)
  (study.parent / "go").touch()
  code, output = run("--parallel=2", *flags, script=script)
  assert code == 0, output
  assert "trial 0 continues with the defaults" in output
  assert len(table(study)) == 3 and {row["state"] for row in table(study)} <= {"done", "pruned"}
  assert steps_of(study, 0) == list(range(1, 10))


def test_a_decision_to_prune_outlives_the_controller(study, run):
  # As if it had been killed between the decision and its execution.
  run("--trials=1")
  kept = open_study(study)
  trial = kept.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
  trial.set_user_attr("flags", {"x": 0.5})
  trial.report(0.1, 2)
  trial.set_user_attr("pruned_at", 2)
  code, output = run("--trials=2")
  assert code == 0, output
  assert table(study)[1]["state"] == "pruned" and 1 not in starts(study)


def test_controllers_do_not_collide(study, start):
  flags = ("--trials=9", "--parallel=2", "--sampler=random")
  hold = f"--hold={study.parent / 'go'}"
  controllers = [start(*flags, script=(hold,)) for _ in range(2)]
  wait_until(lambda: all(n in starts(study) and len(steps_of(study, n)) == 3 for n in range(4)))
  (study.parent / "go").touch()
  outputs = [controller.communicate(timeout=300)[0] for controller in controllers]
  assert [controller.returncode for controller in controllers] == [0, 0], outputs
  assert {number: len(each) for number, each in starts(study).items()} == dict.fromkeys(range(9), 1)
  assert [t.state.name for t in open_study(study).get_trials()] == ["COMPLETE"] * 9
  # Each was told by the one that had begun it.
  begun, ended = (
    [{line.split()[2] for line in out.splitlines() if word in line} for out in outputs]
    for word in (" starts", " ends: ")
  )
  assert begun == ended and all(len(each) >= 2 for each in ended)


def test_a_trial_that_another_controller_has_just_told_is_left_alone(study, command):
  args, space = sweep.parse(command("--trials=1"))
  kept = sweep.open_study(args, space)
  controller = sweep.Controller(args, space, kept, trials.Local(study))
  kept.ask()
  seen = kept.get_trials()[0]  # While the other one still had it.
  kept.tell(0, 1.0)
  assert controller._own(seen) is None


def test_a_failed_trial_is_told_and_shown(study, run):
  code, output = run("--trials=6", "--sampler=random", script=("--fail_above=0.8",))
  assert code == 0, output
  failed = [row for row in table(study) if row["state"] == "failed"]
  assert {row["trial"] for row in failed} == {
    row["trial"] for row in table(study) if float(row["x"]) > 0.8
  }
  assert failed and all(row["reason"] == "exit code 70" for row in failed)
  assert "trial 0 failed: exit code 70; the end of" in output
  assert "    ?[31mstep 1 went wrong" in output and "\x1b" not in output


def test_gives_up_when_the_first_trials_all_fail(study, run):
  code, output = run("--trials=9", script=("--fail_above=-1",))
  assert code == 1 and len(table(study)) == 3
  assert "the first 3 trials all failed; see" in output


def test_nan_is_a_failure(study, run):
  run("--trials=2", script=("--nan_above=0.8",))
  assert [row["state"] for row in table(study)] == ["failed", "done"]
  assert table(study)[0]["reason"] == "score is NaN"


def test_a_trial_that_is_killed_goes_on(study, run):
  code, output = run("--trials=1", script=("--kill_at=",))
  assert code == 0, output
  assert table(study)[0]["state"] == "done" and len(starts(study)[0]) == 2
  assert steps_of(study, 0) == list(range(1, 10))


def test_a_trial_that_is_always_killed_at_the_same_step_fails(study, run):
  run("--trials=1", script=("--kill_at=3",))
  assert table(study)[0]["state"] == "failed" and len(starts(study)[0]) == 3
  assert table(study)[0]["reason"] == "killed by SIGKILL, 2 times without a step in between"


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


@pytest.mark.parametrize(
  "text, value, keeps",
  [
    ("kl<10", 9.9, True),
    ("kl<10", 10.0, False),
    ("kl<=10", 10.0, True),
    ("gold/mean >= 5", 5.0, True),
    ("gold/mean>5", 5.0, False),
    ("x>-1e-3", 0.0, True),
    ("x<1", math.nan, False),
  ],
)
def test_constraint(text, value, keeps):
  assert (sweep.Constraint.parse(text).violation(value) <= 0) == keeps


def test_a_wrong_metric_costs_no_trial(study, run):
  code, output = run("--trials=2", "--metric=scor")
  assert code == 1 and "has no scor; did you mean score?" in output
  code, output = run("--trials=2", "--metric=score")
  assert code == 0, output
  assert {number: len(each) for number, each in starts(study).items()} == {0: 1, 1: 1}


def test_a_database_keeps_the_study(study, run):
  database = f"--storage=sqlite:///{study.parent}/trials.db"
  assert run(database, "--trials=1")[0] == 0
  assert run(database, "--trials=3", "--sampler=random")[0] == 0
  assert [row["state"] for row in table(study)] == ["done"] * 3
  assert not (study / "journal.log").exists()


def test_a_database_that_cannot_be_reached(run):
  code, output = run("--storage=sqlite:////nowhere/trials.db", "--trials=1")
  assert code == 64 and "--storage cannot be used: " in output


def test_warns_of_a_metric_that_is_never_logged(study, run):
  code, output = run("--trials=1", "--prune_on=eval/scores")
  assert code == 0 and "has no eval/scores; did you mean eval/score?" in output


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
      "--space=nowhere.py: no such file; there are launch/spaces/dpo.py",
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


@pytest.mark.parametrize(
  "text, message",
  [
    ("x = 1", "must define a function space"),
    ("def space(trial): return {}", None),
    ("DEFAULTS = {'x': 1.0}\ndef space(trial): return [trial]", "must return a dict of flags"),
    ("DEFAULTS = {'x': 1.0}\ndef space(trial): return {'--x': 1}", "'--x' is no name of a flag"),
    (
      "DEFAULTS = {'x': 1.0}\ndef space(trial): return {'y': trial.suggest_float('y', 0, 1)}",
      "with DEFAULTS, ",
    ),
  ],
)
def test_space_files(tmp_path, text, message):
  (tmp_path / "space.py").write_text(text)
  if message is None:
    assert sweep.load_space(str(tmp_path / "space.py")).sample is not None
    return
  with pytest.raises(sweep.SweepError, match=message):
    sweep.load_space(str(tmp_path / "space.py"))


@pytest.mark.parametrize(
  "value, text",
  [(True, "true"), (None, "none"), ((0.5, 0.7), "0.5,0.7"), (1e-05, "1e-05"), ("ipo", "ipo")],
)
def test_flag(value, text):
  assert sweep.flag("a.b", value) == f"--a.b={text}"


def test_rows_that_are_being_written_are_left_out(tmp_path):
  path = tmp_path / "metrics.jsonl"
  assert sweep.read_rows(path) == []
  path.write_text('{"step": 1, "loss": "NaN"}\nnot json\n[1]\n{"step": 2}\n{"step": 3, "lo')
  assert [row["step"] for row in sweep.read_rows(path)] == [1, 2]
