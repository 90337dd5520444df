"""The batch script on a real Slurm: controller and node are this machine."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from launch import run
from launch.job import Job, JobError
from launch.targets import slurm
from tests.testing import full, wait_for

_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={d}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP
"""


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  """A Slurm of one node; its folder. `SLURM_CONF` leads to it."""
  if os.geteuid() != 0:
    pytest.skip("starting a Slurm needs root")
  names = ("munged", "slurmctld", "slurmd")
  missing = [name for name in names if shutil.which(name) is None]
  if missing:
    pytest.skip(f"{missing[0]} is not installed: apt-get install slurm-wlm munge")
  folder = tmp_path_factory.mktemp("slurm")
  folder.chmod(0o755)
  (folder / "key").write_bytes(os.urandom(128))
  (folder / "key").chmod(0o600)
  for name in ("state", "spool"):
    (folder / name).mkdir()
  host = socket.gethostname().split(".")[0]
  ports = {"ctld": free_port(), "d": free_port()}
  config = folder / "slurm.conf"
  config.write_text(_CONFIG.format(folder=folder, host=host, **ports))
  munged = {"key-file": "key", "socket": "munge.socket", "pid-file": "pid", "log-file": "log"}
  commands = [
    ["munged", "--foreground", "--force", *(f"--{k}={folder}/{v}" for k, v in munged.items())],
    ["slurmctld", "-D", "-c"],
    ["slurmd", "-D", "-c"],
  ]
  with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
    patch.setenv("SLURM_CONF", str(config))
    for command in commands:
      daemon = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
      stack.callback(daemon.terminate)
      if command[0] == "munged":
        wait_for((folder / "munge.socket").exists, 10)
    wait_for(lambda: "idle" in told("sinfo", "-h", "-o", "%T"), 30)
    stack.callback(end_jobs)
    yield folder


def end_jobs() -> None:
  """Those of tests that failed: they would outlive the Slurm."""
  if left := told("squeue", "-h", "-o", "%i").split():
    told("scancel", *left)
    wait_for(lambda: not told("squeue", "-h", "-o", "%i"), 30)


def told(*command: str) -> str:
  return subprocess.run(command, capture_output=True, text=True).stdout


def submit(job: Job) -> Callable[[], dict[str, str]]:
  """Submits; returns a function that says what Slurm knows of the job."""
  plan = slurm.render(job)
  assert run.submit(plan) == 0
  [number] = told("squeue", "-h", "-o", "%i", f"--name={job.name}").split()
  return lambda: dict(re.findall(r"(\w+)=(\S*)", told("scontrol", "show", "job", number)))


def process_of(workdir: pathlib.Path, number: int) -> int | None:
  """The id of a process of a script."""
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      words, environ = ((folder / n).read_text().split("\0") for n in ("cmdline", "environ"))
      own = f"--workdir={workdir}" in words and words[0] == sys.executable
      if own and f"SLURM_PROCID={number}" in environ:
        return int(folder.name)
    except OSError:  # It has ended.
      continue
  return None


@full
def test_a_killed_ppo_is_requeued_and_finishes(cluster, tmp_path, repository):
  workdir, start = tmp_path / "ppo", tmp_path / "sft"
  small = ("--batch_size=8", "--data.rows=64", "--data.eval_rows=8", "--sampling.max_new_tokens=8")
  model = ("--model.layers=1", "--model.width=32", "--model.heads=2", "--model.mlp_width=32")
  sft = (f"--workdir={start}", "--steps=1", *small, *model)
  subprocess.run([sys.executable, "-m", "experiments.sft", *sft], check=True, cwd=repository)
  flags = (
    f"--workdir={workdir}",
    *(f"--init_from={start}", "--mesh=data:2", "--reward.name=gold", "--ppo.minibatches=2"),
    *("--steps=8", "--checkpoint_every=2", *small),
  )
  job = Job(module="experiments.ppo", flags=flags, processes=2, devices=1)
  state = submit(job)

  def log() -> str:
    return "".join(path.read_text(errors="replace") for path in workdir.glob("slurm-*.log"))

  second = wait_for(lambda: process_of(workdir, 1), 120, or_say=log)
  wait_for((workdir / "checkpoints" / "2.digest.json").exists, 400, or_say=log, pause=0.01)
  os.kill(second, signal.SIGKILL)
  wait_for(lambda: state()["Restarts"] == "1", 60, or_say=log)
  wait_for(lambda: state()["JobState"] in ("COMPLETED", "FAILED"), 400, or_say=log)
  assert state()["JobState"] == "COMPLETED", log()
  assert "continuing from step" in log()
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == list(range(1, 9))
  assert (workdir / "summary.json").exists() and (workdir / "export").is_dir()


_SCRIPT = """#!/bin/bash
# Ends with the codes that are asked for, one after the other; 0 waits to be stopped.
code=$(head -n 1 {codes})
sed -i 1d {codes}
echo "started with $*" >>{log}
[ "$code" != 0 ] || sleep 60
exit "$code"
"""


@pytest.fixture
def scripted(cluster, tmp_path):
  """Submits a job whose script ends with these codes, one a start; job, state and log."""

  def make(*codes: int, **settings):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    script, log = tmp_path / "script", tmp_path / "log"
    log.write_text("")
    script.write_text(_SCRIPT.format(codes=tmp_path / "codes", log=log))
    script.chmod(0o755)
    flags = (f"--workdir={tmp_path}/run", "--init_from=a b")
    settings = {"extra": ("--comment=a b",)} | settings
    job = Job(module="experiments.ppo", flags=flags, python=str(script), **settings)
    return job, submit(job), log

  return make


def test_only_what_may_go_away_is_tried_again(scripted):
  _, state, log = scripted(75, 64)
  wait_for(lambda: state()["JobState"] == "FAILED" and state()["Restarts"] == "1", 60)
  assert state()["ExitCode"] == "64:0"
  assert len(log.read_text().splitlines()) == 2
  assert "--init_from=a b" in log.read_text()


def test_restarts_end(scripted):
  _, state, log = scripted(75, 75, 75, restarts=1)
  wait_for(lambda: state()["JobState"] == "FAILED" and state()["Restarts"] == "1", 60)
  assert state()["ExitCode"] == "75:0"
  assert len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize("outlives", [False, True], ids=["ends", "outlives the step"])
def test_a_cancelled_job_stays_cancelled(scripted, monkeypatch, outlives):
  if outlives:  # As the batch script may on a busy machine.
    monkeypatch.setattr(
      slurm, "_SCRIPT", slurm._SCRIPT.replace("{exports}", "trap : TERM\n{exports}")
    )
  job, state, log = scripted(0, 0)
  wait_for(log.read_text, 30)
  later = slurm.render(job).later
  assert job.name in subprocess.check_output(shlex.split(later["state"]), text=True)
  subprocess.run(shlex.split(later["stop"]), check=True)
  # Until the node is free, the batch script may still be running.
  wait_for(lambda: told("sinfo", "-h", "-o", "%T").strip() == "idle", 30)
  assert (state()["JobState"], state()["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"accelerator": "v5litepod-16"}, "--to=slurm is for GPUs and CPUs"),
    ({"accelerator": "H100:8", "slices": 2}, "the 2 hosts have to see the same folder"),
    ({"slices": 2, "shared": "/mnt"}, "--workdir=runs/ppo is not inside --shared=/mnt"),
    ({"spot": True}, "--spot means nothing for --to=slurm"),
  ],
)
def test_refuses(settings, message):
  with pytest.raises(JobError, match=re.escape(message)):
    slurm.render(Job(module="experiments.ppo", flags=("--workdir=runs/ppo",), **settings))
