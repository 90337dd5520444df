"""The real xpk, dry: it writes the JobSet that it would create."""

import copy
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import pytest
import yaml

from launch.job import Job, JobError
from launch.targets import xpk


def job_of(**changes) -> Job:
  settings = {
    "module": "experiments.ppo",
    "flags": ("--workdir=/mnt/runs/ppo", "--init_from=/mnt/runs/my sft"),
    "accelerator": "v5litepod-16",
    "shared": "/mnt/runs",
    "zone": "us-west4-a",
    "project": "my-project",
    "cluster": "my-cluster",
    "image": "us-docker.pkg.dev/my-project/images/rlhf_jax:abc123",
  }
  return Job(**settings | changes)


FULL = job_of(restarts=3, env=('A=x "y"',), extra=("--storage=runs",), spot=True)


@pytest.fixture(scope="module")
def jobset(tmp_path_factory):
  """The JobSet of a job."""
  if shutil.which("xpk") is None:
    pytest.skip("xpk is not on PATH: pip install xpk==1.16.0 in an environment of its own")

  folder = tmp_path_factory.mktemp("xpk")

  @functools.cache
  def make(job: Job) -> dict:
    [command] = xpk.render(job).commands
    file = folder / "jobset.yaml"
    dry = ("--dry-run", "--skip-validation", f"--output-manifest-file={file}")
    env = os.environ | {"HOME": str(folder)}
    done = subprocess.run((*command, *dry), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return yaml.safe_load(file.read_text())

  return make


def pods(jobset: dict) -> dict:
  return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize(
  "accelerator, slices", [("v5litepod-16", 1), ("v5p-256", 2), ("tpu7x-16", 1)]
)
def test_every_host_of_every_slice_gets_a_pod(jobset, accelerator, slices):
  job = job_of(accelerator=accelerator, slices=slices)
  made = jobset(job)
  assert made["spec"]["replicatedJobs"][0]["replicas"] == slices
  assert pods(made)["parallelism"] == pods(made)["completions"] == job.hosts // slices
  where = pods(made)["template"]["spec"]["nodeSelector"]
  assert where["cloud.google.com/gke-tpu-accelerator"] == job.hardware.gke
  assert where["cloud.google.com/gke-tpu-topology"] == job.hardware.topology.split(":")[1]


def test_only_what_may_go_away_is_tried_again(jobset):
  made = jobset(FULL)
  assert made["spec"]["failurePolicy"]["maxRestarts"] == 3
  [rule] = pods(made)["podFailurePolicy"]["rules"]
  assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
  tried_again = set(rule["onExitCodes"]["values"])
  assert tried_again >= {74, 75, 134, 137, 139, 143}
  assert not tried_again & {2, 64, 65, 69, 70, 73, 78}
  [policy] = made["spec"]["failurePolicy"]["rules"]
  assert policy["action"] == "FailJobSet"


def test_pods_are_valid(jobset, tmp_path):
  validate = shutil.which("kubernetes-validate")
  if validate is None:
    pytest.skip("kubernetes-validate is not on PATH")
  file = tmp_path / "job.yaml"

  def check(spec: dict) -> subprocess.CompletedProcess:
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "ppo"}, "spec": spec}
    file.write_text(yaml.safe_dump(job))
    return subprocess.run([validate, "--strict", file], capture_output=True, text=True)

  spec = copy.deepcopy(pods(jobset(FULL)))
  good = check(spec)
  assert good.returncode == 0, good.stdout + good.stderr
  spec["paralelism"] = spec.pop("parallelism")
  assert check(spec).returncode != 0


_PYTHON = """#!/bin/bash
trap 'echo asked; exit 75' TERM
printf '%s\\n' "$A" "$@" >"{told}"
while true; do sleep 0.05; done
"""


def test_the_script_is_asked_to_stop_and_says_how_it_ended(jobset, tmp_path):
  """The shell that xpk puts around the script hands on SIGTERM and the exit code."""
  [container] = pods(jobset(FULL))["template"]["spec"]["containers"]
  told = tmp_path / "told"
  (tmp_path / "python").write_text(_PYTHON.format(told=told))
  (tmp_path / "python").chmod(0o755)
  env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
  command = [word.replace("sleep 5;", "sleep 0.1;") for word in container["command"]]
  shell = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 20
  while not (told.exists() and told.read_text()) and time.monotonic() < deadline:
    time.sleep(0.02)
  shell.send_signal(signal.SIGTERM)
  output, _ = shell.communicate(timeout=20)
  assert shell.returncode == 75
  assert "asked" in output
  wanted = ["experiments.ppo", "--workdir=/mnt/runs/ppo", "--init_from=/mnt/runs/my sft"]
  assert told.read_text().splitlines() == ['x "y"', "-m", *wanted, "--coordinator=auto"]


def test_the_image_runs_what_the_job_runs(repository):
  text = pathlib.Path(repository, "launch/files/Dockerfile").read_text()
  assert re.search(r"^FROM python:3\.1[1-9]", text, re.M)
  copied = re.findall(r"^COPY (.*) \S+$", text, re.M)
  for name in " ".join(copied).split():
    assert (repository / name).exists(), name


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"shared": ""}, "give the folder of that as --shared"),
    ({"image": ""}, "--to=xpk needs --image, such as"),
    ({"accelerator": "v5litepod-4"}, "xpk starts at v5litepod-8"),
    ({"accelerator": "H100:8"}, "H100:8 is no TPU: use --to=slurm or --to=sky"),
    ({"mount": "10.0.0.2:/runs"}, "--mount means nothing for --to=xpk"),
  ],
)
def test_refuses(changes, message):
  with pytest.raises(JobError, match=re.escape(message)):
    xpk.render(job_of(**changes))
