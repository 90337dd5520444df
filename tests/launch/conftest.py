"""Sweeps over a fake script that takes milliseconds."""

import csv
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import optuna
import pytest

from launch import controller, sweep, sweep_report, trials

SCRIPT = "tests.launch.fake_script"
SPACE = """
METRIC = "score"
DEFAULTS = {"x": 0.9, "y": 2.0}
GRID = {"x": [0.0, 0.3, 0.9], "y": [1.0, 2.0]}

def space(trial):
  return {"x": trial.suggest_float("x", 0, 1), "y": trial.suggest_float("y", 1, 4, log=True)}
"""


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "it did not happen in time"
    time.sleep(0.01)


def starts(study: pathlib.Path) -> dict[int, list[list[str]]]:
  """Trial -> process and GPUs of each of its starts."""
  return {
    int(file.parent.name): [line.split() for line in file.read_text().splitlines()]
    for file in sorted(study.glob("trials/*/starts"))
  }


@pytest.fixture
def study(tmp_path, monkeypatch, repository) -> pathlib.Path:
  """The folder of a sweep; trials are started from the root of the source tree."""
  monkeypatch.chdir(repository)
  (tmp_path / "space.py").write_text(SPACE)
  return tmp_path / "study"


@pytest.fixture
def command(study) -> Callable[..., list[str]]:
  """`command(*flags, script=(...)) -> argv` of a sweep."""

  def make(*flags: str, script: tuple[str, ...] = ()) -> list[str]:
    space = study.parent / "space.py"
    return [f"--study={study}", f"--space={space}", *flags, "--", SCRIPT, *script]

  return make


def open_study(study) -> optuna.Study:
  backend = optuna.storages.journal.JournalFileBackend(str(study / "journal.log"))
  return optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))


def table(study) -> list[dict[str, str]]:
  with open(study / "table.csv", newline="") as file:
    return list(csv.DictReader(file))


def steps_of(study, number: int) -> list[int]:
  path = controller.trial_folder(study, number) / "metrics.jsonl"
  return [row["step"] for row in controller.read_rows(path)]


@pytest.fixture
def plots():
  """For the tests that look at them."""


@pytest.fixture
def quick(monkeypatch, request):
  monkeypatch.setattr(trials.Local, "poll_seconds", 0.01)
  if "plots" not in request.fixturenames:  # They would take most of the time.
    monkeypatch.setattr(sweep_report, "draw", lambda *unused: [])


# The commands of a Slurm whose jobs are processes of this machine. A call whose number is in the
# file `fails` of the command fails, as all do while the daemon is away.
_SLURM = r"""#!/bin/bash
cd {folder}
name=$(basename "$0")
if [ "$name" = srun ]; then
  cd "$OLDPWD"
  echo $$ >{folder}/$SLURM_JOB_NAME.step
  exec "$@"
fi
echo call >>$name.calls
if grep -qsx "$(wc -l <$name.calls)" $name.fails; then
  echo "$name: error: Unable to contact slurm controller (connect failure)" >&2
  exit 1
fi
for word in "$@"; do
  case "$word" in
    --job-name=*) job=${{word#*=}} ;;
    --name=*) job=${{word#*=}} ;;
    --output=*) output=${{word#*=}} ;;
    --wrap=*) wrap=${{word#*=}} ;;
    [0-9]*) number=$word ;;
  esac
done
case "$name" in
  sbatch)
    cd "$OLDPWD"
    SLURM_JOB_NAME=$job setsid bash -c "$wrap" >>"$output" 2>&1 </dev/null &
    echo $! >{folder}/$job.job
    ;;
  squeue)
    [ -e $job.job ] && kill -0 "$(cat $job.job)" 2>/dev/null && echo "$(cat $job.job) RUNNING"
    exit 0
    ;;
  scancel) kill -TERM "$(cat "$(grep -lx "$number" *.job | sed s/job$/step/)")" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Callable[..., None]:
  """A Slurm; `slurm(command, n, ...)` makes calls of a command fail, counted from 1."""
  folder = tmp_path / "slurm"
  folder.mkdir()
  for name in ("sbatch", "squeue", "scancel", "srun"):
    (folder / name).write_text(_SLURM.format(folder=folder))
    (folder / name).chmod(0o755)
  monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
  monkeypatch.setattr(trials.Slurm, "poll_seconds", 0.05)

  def fail(name: str, *calls: int) -> None:
    (folder / f"{name}.fails").write_text("".join(f"{call}\n" for call in calls))

  return fail


@pytest.fixture
def run(command, capsys):
  """`run(*flags, script=(...)) -> (exit code, output)` of a controller in this process."""

  def call(*flags, script=()):
    code = sweep.main(command(*flags, script=script))
    return code, capsys.readouterr().err

  return call


@pytest.fixture
def start(command):
  """`start(*flags, script=(...)) -> Popen` of a controller in a process of its own."""
  started = []

  def run(*flags: str, script: tuple[str, ...] = ()) -> subprocess.Popen:
    argv = [sys.executable, "-m", "launch.sweep", *command(*flags, script=script)]
    started.append(
      subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    )
    return started[-1]

  yield run
  for process in started:
    process.kill()
    process.communicate()
