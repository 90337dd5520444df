import os
import signal

import optuna
import pytest

from launch import controller, sweep, trials
from tests.launch.conftest import open_study, starts, steps_of, table, wait_until

pytestmark = pytest.mark.usefixtures("quick")


def test_poor_trials_are_stopped_early(study, run):
  code, output = run("--trials=12", "--prune_on=eval/score", script=("--pause=0.05",))
  assert code == 0, output
  pruned = [row for row in table(study) if row["state"] == "pruned"]
  assert 3 <= len(pruned) < 12
  for row in pruned:
    number = int(row["trial"])
    assert steps_of(study, number)[-1] < 9
    assert not (controller.trial_folder(study, number) / "summary.json").exists()
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


@pytest.fixture
def held(study, start):
  """`held(*flags, script=(...))`: a controller whose first two trials wait for a file, and it."""

  def begin(*flags, script):
    process = start("--parallel=2", *flags, script=script)
    wait_until(lambda: all(n in starts(study) and steps_of(study, n) == [1, 2, 3] for n in (0, 1)))
    return process

  return begin


@pytest.mark.parametrize("children_live", [True, False])
def test_a_killed_controller_is_continued(study, held, run, children_live):
  flags = ("--trials=4", "--sampler=random")
  script = (f"--hold={study.parent / 'go'}",)
  process = held(*flags, script=script)
  process.kill()
  process.wait()
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
  process = held("--prune_after=5", *flags, script=script)
  process.terminate()
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 75
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
  processes = [start(*flags, script=(hold,)) for _ in range(2)]
  wait_until(lambda: all(n in starts(study) and len(steps_of(study, n)) == 3 for n in range(4)))
  (study.parent / "go").touch()
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
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
  late = controller.Controller(args, space, kept, trials.Local(study))
  kept.ask()
  seen = kept.get_trials()[0]  # While the other one still had it.
  kept.tell(0, 1.0)
  assert late._own(seen) is None


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


@pytest.mark.parametrize("count", [1, 2])
def test_a_sweep_whose_trials_all_fail_is_a_failure(study, run, count):
  code, output = run(f"--trials={count}", script=("--fail_above=-1",))
  assert code == 1
  assert f"all {count} trials failed" in output
  assert run(f"--trials={count}", script=("--fail_above=-1",))[0] == 1  # Nothing is left to try.


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


@pytest.mark.parametrize("signal_name", ["KILL", "ABRT", "TERM"])
def test_a_job_that_is_killed_goes_on(study, run, slurm, signal_name):
  """As by a lack of memory, a neighbour that is lost, or the time limit before it listens."""
  script = ("--kill_at=", f"--kill_by={getattr(signal, f'SIG{signal_name}'):d}")
  code, output = run("--to=slurm", "--trials=1", script=script)
  assert code == 0, output
  assert table(study)[0]["state"] == "done" and len(starts(study)[0]) == 2
  assert steps_of(study, 0) == list(range(1, 10))


def test_a_job_that_fails_is_told(study, run, slurm):
  run("--to=slurm", "--trials=1", script=("--fail_above=-1",))
  assert table(study)[0]["reason"] == "exit code 70" and len(starts(study)[0]) == 1


@pytest.mark.parametrize(
  ("code", "words"),
  [
    (-9, "killed by SIGKILL"),
    (137, "killed by SIGKILL"),
    (134, "killed by SIGABRT"),
    (75, "exit code 75"),
    (255, "exit code 255"),
  ],
)
def test_codes_in_words(code, words):
  assert controller.describe_exit(code) == words


def test_a_daemon_that_restarts_ends_no_sweep(study, run, slurm):
  """It is away when a trial is started, when one is looked for, and when one is stopped."""
  slurm("sbatch", 3, 4, 7)
  slurm("squeue", *range(20, 30), *range(60, 64))
  slurm("scancel", 1, 2)
  flags = ("--to=slurm", "--trials=8", "--parallel=3", "--prune_on=eval/score")
  code, output = run(*flags, script=("--pause=0.2",))
  assert code == 0, output
  states = [row["state"] for row in table(study)]
  assert set(states) == {"done", "pruned"} and len(states) == 8
  assert {number: len(each) for number, each in starts(study).items()} == dict.fromkeys(range(8), 1)
  for number, state in enumerate(states):
    assert (len(steps_of(study, number)) == 9) == (state == "done")
  assert "sbatch: error: Unable to contact slurm controller (connect failure); trying" in output


def test_a_cluster_that_refuses_the_first_job_ends_the_sweep(study, run, slurm):
  slurm("sbatch", 1)
  code, output = run("--to=slurm", "--trials=2")
  assert code == 1 and not starts(study)
  assert output.count("sbatch: error: Unable to contact slurm controller") == 1


class _Place:
  """A place whose processes run until they are stopped; `fails` are those that cannot be asked."""

  poll_seconds = 0.01

  def __init__(self, fails=(), on_poll=lambda: None, on_start=lambda name: None):
    self.fails, self.asked = fails, []
    self.on_poll, self.on_start = on_poll, on_start

  def start(self, argv, folder):
    self.on_start(folder.name)
    place = self

    class Process:
      def poll(self):
        place.on_poll()
        return 75 if folder.name in place.asked else None

      def stop(self):
        if folder.name in place.fails:
          raise trials.PlaceError("the daemon is away")
        place.asked.append(folder.name)

    return Process()

  def find(self, folder):
    return None


def sweep_on(command, place, *flags):
  args, space = sweep.parse(command(*flags))
  return controller.Controller(args, space, sweep.open_study(args, space), place)


def test_an_error_stops_all_trials_that_can_be_asked(command):
  def broken():
    if len(started) == 3:
      raise OSError("the disk is gone")

  started = []
  place = _Place(["0000"], broken, started.append)
  with pytest.raises(OSError, match="the disk is gone"):
    sweep_on(command, place, "--trials=3", "--parallel=3").run()
  assert place.asked == ["0001", "0002"]


def test_a_sweep_that_waits_for_the_daemon_can_be_stopped(study, command, capsys):
  def start(name):
    tries.append(name)
    if len(tries) == 5:
      os.kill(os.getpid(), signal.SIGTERM)
    if name == "0001":
      raise trials.PlaceError("the daemon is away")

  tries = []
  place = _Place(on_start=start)
  stopped = sweep_on(command, place, "--trials=2", "--parallel=2")
  stopped.run()
  assert stopped.was_stopped and place.asked == ["0000"]
  assert tries == ["0000", *["0001"] * 4]
  assert capsys.readouterr().err.count("the daemon is away; trying again every 0.01 seconds") == 1
  # Both are there for the next controller.
  assert [t.state.name for t in open_study(study).get_trials()] == ["RUNNING"] * 2


def test_a_wrong_metric_costs_no_trial(study, run):
  code, output = run("--trials=2", "--metric=scor")
  assert code == 1 and "has no scor; did you mean score?" in output
  code, output = run("--trials=2", "--metric=score")
  assert code == 0, output
  assert {number: len(each) for number, each in starts(study).items()} == {0: 1, 1: 1}


def test_warns_of_a_metric_that_is_never_logged(study, run):
  code, output = run("--trials=1", "--prune_on=eval/scores")
  assert code == 0 and "has no eval/scores; did you mean eval/score?" in output


def test_rows_that_are_being_written_are_left_out(tmp_path):
  path = tmp_path / "metrics.jsonl"
  assert controller.read_rows(path) == []
  path.write_text('{"step": 1, "loss": "NaN"}\nnot json\n[1]\n{"step": 2}\n{"step": 3, "lo')
  assert [row["step"] for row in controller.read_rows(path)] == [1, 2]
