import os
import pathlib
import signal
import subprocess
import sys

import pytest

from launch import trials
from tests.launch.conftest import wait_until

_SLEEP = [sys.executable, "-c", "print('hello', flush=True); import time; time.sleep(60)"]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  (tmp_path / "0007").mkdir()
  return tmp_path / "0007"


def test_a_lock_is_free_again_when_its_process_has_died(tmp_path):
  fd = trials.try_lock(tmp_path / "lock")
  assert fd is not None and trials.try_lock(tmp_path / "lock") is None
  child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[fd])
  os.close(fd)
  assert trials.try_lock(tmp_path / "lock") is None
  child.kill()
  child.communicate()
  fd = trials.try_lock(tmp_path / "lock")
  assert fd is not None
  os.close(fd)


def test_a_folder_has_one_process(tmp_path, folder):
  # Two places are two controllers.
  first = trials.Local(tmp_path).start(_SLEEP, folder)
  other = trials.Local(tmp_path)
  second = other.start(_SLEEP, folder)
  wait_until(lambda: (folder / "log").read_text() == "hello\n")
  assert first.poll() is None and second.poll() is None and other.find(folder) is not None
  second.stop()
  wait_until(lambda: first.poll() is not None)
  assert first.poll() == -signal.SIGTERM and second.poll() == trials.LOST
  assert other.find(folder) is None
  assert (folder / "log").read_text() == "hello\n"
  second.stop()  # Of a process that has ended: nothing to do.


def test_exit_code_and_output(tmp_path, folder):
  (folder / "log").write_text("before\n")
  process = trials.Local(tmp_path).start([sys.executable, "-c", "print(1); exit(70)"], folder)
  wait_until(lambda: process.poll() is not None)
  assert process.poll() == 70 and (folder / "log").read_text() == "before\n1\n"


def test_each_trial_has_gpus_of_its_own(tmp_path, monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7,8")
  place = trials.Local(tmp_path, gpus=2)
  code = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(60)"
  running = []
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    running.append(place.start([sys.executable, "-c", code], tmp_path / name))
  (tmp_path / "c").mkdir()
  with pytest.raises(trials.PlaceError, match="none of the 5 GPUs of this machine is free"):
    place.start([sys.executable, "-c", code], tmp_path / "c")
  assert place.find(tmp_path / "c") is None
  wait_until(lambda: (tmp_path / "a" / "log").read_text() == "2,3\n")
  wait_until(lambda: (tmp_path / "b" / "log").read_text() == "5,7\n")
  running[0].stop()
  wait_until(lambda: running[0].poll() is not None)
  running.append(place.start([sys.executable, "-c", code], tmp_path / "c"))
  wait_until(lambda: (tmp_path / "c" / "log").read_text() == "2,3\n")
  for process in running[1:]:
    process.stop()
    wait_until(lambda process=process: process.poll() is not None)


def test_slurm_command(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  place = trials.Slurm(gpus=1, minutes=90, options=["--partition=gpu"])
  argv = ["python", "-m", "experiments.dpo", "--data.path=a file.jsonl"]
  command = place.command(argv, pathlib.Path("trials/0007"))
  name = command.pop(2)
  assert name.startswith("--job-name=trial-0007-")
  assert command == [
    "sbatch",
    "--parsable",
    f"--output={tmp_path}/trials/0007/log",
    "--open-mode=append",
    "--signal=TERM@120",
    "--gpus-per-node=1",
    "--time=90",
    "--partition=gpu",
    "--wrap=srun python -m experiments.dpo '--data.path=a file.jsonl'; code=$?;"
    f" echo $code >{tmp_path}/trials/0007/.exit_code; exit $code",
  ]
  assert trials.job_name(pathlib.Path("other/0007")) != trials.job_name(pathlib.Path("trials/0007"))


def test_slurm_that_is_not_there(tmp_path, folder, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(trials.PlaceError, match="--to=slurm needs the command squeue"):
    trials.Slurm().start(_SLEEP, folder)
