"""The task is YAML, its scripts are bash, and every host gets its place."""

import os
import re
import shutil
import subprocess

import pytest
import yaml

from launch.job import Job, JobError
from launch.targets import sky


def job_of(**changes) -> Job:
  settings = {
    "module": "experiments.ppo",
    "flags": ("--workdir=/mnt/runs/ppo", "--init_from=/mnt/runs/my sft"),
    "accelerator": "H100:8",
    "shared": "/mnt/runs",
    "mount": "10.0.0.2:/runs",
  }
  return Job(**settings | changes)


TWO_HOSTS = job_of(slices=2, spot=True, env=('A=x: "y" # z',))
SLICE = job_of(accelerator="v5litepod-16", zone="us-west4-a")


def task_of(job: Job) -> dict:
  [text] = sky.render(job).files.values()
  return yaml.safe_load(text)


def test_asks_for_hosts():
  task = task_of(TWO_HOSTS)
  assert task["num_nodes"] == 2
  assert task["envs"] == {"A": 'x: "y" # z'}
  assert task["resources"]["accelerators"] == "H100:8"
  assert task["resources"]["use_spot"] is True


def test_asks_for_a_slice():
  task = task_of(SLICE)
  assert task["num_nodes"] == 1  # SkyPilot counts a slice as one node and runs on all its hosts.
  assert task["resources"]["accelerators"] == "tpu-v5litepod-16"
  assert task["resources"]["accelerator_args"] == {"runtime_version": "v2-alpha-tpuv5-lite"}
  assert task["resources"]["zone"] == "us-west4-a"


def test_only_what_may_go_away_is_tried_again():
  tried_again = set(task_of(SLICE)["resources"]["job_recovery"]["recover_on_exit_codes"])
  assert tried_again >= {74, 75, 137, 143}
  assert not tried_again & {2, 64, 65, 69, 70, 73, 78}
  assert "job_recovery" not in task_of(job_of(restarts=0))["resources"]


@pytest.mark.parametrize(
  "job, place",
  [
    (job_of(), []),
    (SLICE, ["--coordinator=auto"]),
    (TWO_HOSTS, ["--coordinator=10.0.0.7:8476", "--processes=2", "--process_id=1"]),
  ],
)
def test_every_host_gets_its_place(tmp_path, job, place):
  python = tmp_path / "rlhf_jax" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
  python.chmod(0o755)
  env = os.environ | {
    "HOME": str(tmp_path),
    "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
  }
  command = ["bash", "-euc", task_of(job)["run"]]
  told = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
  assert told.splitlines() == ["-m", job.module, *job.flags, *place]


def test_a_host_that_works_in_a_bucket_mounts_nothing():
  task = task_of(job_of(flags=("--workdir=gs://bucket/ppo",), shared="", mount=""))
  assert "mount" not in task["setup"] and "uv pip install" in task["setup"]
  assert "--workdir=gs://bucket/ppo" in task["run"]
  assert "sudo mount -t nfs" in task_of(job_of())["setup"]


def test_setup_is_bash():
  subprocess.run(["bash", "-nc", task_of(TWO_HOSTS)["setup"]], check=True)


@pytest.mark.parametrize("job", [TWO_HOSTS, SLICE])
def test_skypilot_reads_it(tmp_path, job):
  if shutil.which("sky") is None:
    pytest.skip("sky is not on PATH: pip install skypilot[gcp]==0.14.1 in an own environment")
  [text] = sky.render(job).files.values()
  (tmp_path / "task.yaml").write_text(text)
  # Of the environment that `sky` is in.
  python = os.path.join(os.path.dirname(os.path.realpath(shutil.which("sky"))), "python")
  code = "import sky, sys; sky.Task.from_yaml(sys.argv[1])"
  command = [python, "-c", code, str(tmp_path / "task.yaml")]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"accelerator": "v5litepod-16", "slices": 2}, "SkyPilot takes one slice of TPU VMs"),
    ({"accelerator": "tpu7x-8"}, "SkyPilot takes one slice of TPU VMs; use --to=xpk"),
    ({"accelerator": ""}, "--to=sky needs --accelerator, such as H100:8"),
    ({"mount": ""}, "--to=sky needs --mount, such as 10.0.0.2:/runs"),
    ({"flags": ("--workdir=runs/ppo",)}, "--workdir=runs/ppo is not inside --shared=/mnt/runs"),
  ],
)
def test_refuses(changes, message):
  with pytest.raises(JobError, match=re.escape(message)):
    sky.render(job_of(**changes))
