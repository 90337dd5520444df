import dataclasses
import os
import re
import signal

import pytest

from launch import job as jobs
from launch.job import Job, JobError
from launch.targets import slurm


def job_of(*flags: str, **settings) -> Job:
  settings = {"module": "experiments.ppo", "flags": ("--workdir=/mnt/runs/ppo", *flags)} | settings
  return Job(**settings)


@pytest.mark.parametrize(
  "workdir, name",
  [
    ("runs/ppo", "ppo"),
    ("/mnt/runs/PPO_max.v2/", "ppo-max-v2"),
    ("runs/7b-ppo", "b-ppo"),
    ("runs/" + "long-" * 20, ("long-" * 8)[:-1]),
  ],
)
def test_is_named_after_its_workdir(workdir, name):
  assert Job(module="a.b", flags=(f"--workdir={workdir}",)).name == name


def test_is_frozen_and_plain():
  job = job_of("--mesh=fsdp:4", accelerator="v5litepod-4")
  assert Job(**dataclasses.asdict(job)) == job
  with pytest.raises(dataclasses.FrozenInstanceError):
    job.name = "other"


def test_command_keeps_every_word():
  job = job_of("--init_from=a b; c", "--noshuffle")
  wanted = ("--workdir=/mnt/runs/ppo", "--init_from=a b; c", "--noshuffle", "--coordinator=auto")
  assert job.command("python", "--coordinator=auto") == ("python", "-m", "experiments.ppo", *wanted)


@pytest.mark.parametrize(
  "flags, settings",
  [
    (("--mesh=data:4,fsdp:4", "--batch_size=32"), {"accelerator": "v5litepod-16"}),
    (("--mesh=fsdp:-1,tensor:4", "--batch_size=4"), {"accelerator": "v5litepod-16"}),
    (("--mesh=fsdp:32", "--batch_size=32"), {"accelerator": "v5litepod-16", "slices": 2}),
    (("--batch_size=16",), {"accelerator": "H100:8", "slices": 2}),
    (("--mesh=data:16",), {"accelerator": "tpu7x-16"}),
    (("--mesh=data:12", "--rollout.devices=4"), {"accelerator": "v5litepod-16"}),
    (("--mesh=data:4",), {"processes": 2, "devices": 2}),
    (("--mesh=data:99", "--batch_size=7"), {}),  # Nobody knows the devices of this machine yet.
  ],
)
def test_meshes_that_fit(flags, settings):
  job_of(*flags, **settings)


@pytest.mark.parametrize(
  "flags, settings, message",
  [
    (
      ("--mesh=data:8,fsdp:4",),
      {"accelerator": "v5litepod-16"},
      "--mesh=data:8,fsdp:4 needs 32 devices, v5litepod-16 has 16",
    ),
    (
      ("--mesh=data:16",),
      {"accelerator": "v5litepod-16", "slices": 2},
      "--mesh=data:16 needs 16 devices, 2 x v5litepod-16 has 32",
    ),
    (
      ("--mesh=data:-1,tensor:3",),
      {"accelerator": "v5litepod-16"},
      "--mesh=data:-1,tensor:3 needs a multiple of 3 devices, v5litepod-16 has 16",
    ),
    (
      ("--mesh=data:16", "--rollout.devices=4"),
      {"accelerator": "v5litepod-16"},
      "--mesh=data:16 needs 16 devices, v5litepod-16 has 12 to learn with",
    ),
    (("--mesh=data:-1,fsdp:-1",), {"devices": 4}, "only one axis can be -1"),
    (("--mesh=model:4",), {"devices": 4}, "the axes are data, fsdp, tensor"),
    (("--mesh=data:2,data:2",), {"devices": 4}, "--mesh=data:2,data:2 is not AXIS:SIZE"),
    (
      ("--batch_size=24", "--mesh=data:4,fsdp:-1"),
      {"accelerator": "v5litepod-16"},
      "--batch_size=24 is not divisible by the 16 devices of data and fsdp",
    ),
    (("--batch_size=24",), {"accelerator": "v5litepod-16"}, "--batch_size=24 is not divisible by"),
  ],
)
def test_meshes_that_do_not_fit(flags, settings, message):
  with pytest.raises(JobError, match=re.escape(message)):
    job_of(*flags, **settings)


@pytest.mark.parametrize(
  "flags, settings, message",
  [
    (("--steps", "3"), {}, "'3' is not a flag of the script: write --name=value"),
    (("-steps=3",), {}, "'-steps=3' is not a flag of the script: write --name=value"),
    (("--coordinator=auto",), {}, "the launcher gives --coordinator itself; leave it out"),
    (("--process_id=0",), {}, "the launcher gives --process_id itself"),
    (("--init_from=a\nb",), {}, "holds an unprintable character"),
    ((), {"module": "experiments/ppo.py"}, "'experiments/ppo.py' is not a module"),
    ((), {"name": "My job"}, "--name=My job: give 1 to 40 small letters, digits and dashes"),
    ((), {"slices": 0}, "--slices=0 must be at least 1"),
    ((), {"restarts": -1}, "--restarts=-1 must be at least 0"),
    ((), {"env": ("A",)}, "--env=A is not NAME=VALUE"),
    ((), {"env": ("A=1\nB=2",)}, "is not NAME=VALUE, on one line"),
    ((), {"accelerator": "v5e-16"}, "--accelerator=v5e-16 is not known; did you mean v5litepod-16"),
    ((), {"accelerator": "H100:8", "devices": 2}, "decides the processes and devices"),
    ((), {"shared": "runs"}, "--shared=runs is not an absolute path"),
    ((), {"mount": "10.0.0.2:/runs"}, "--mount=10.0.0.2:/runs needs --shared"),
    ((), {"mount": "-oremount:/x", "shared": "/runs"}, "--mount=-oremount:/x looks like an option"),
    ((), {"mount": "a:/x\nrm", "shared": "/runs"}, "holds an unprintable character"),
    ((), {"mount": ".a:/x", "shared": "/runs"}, "--mount=.a:/x is not HOST:/EXPORT"),
    ((), {"extra": ("--time=1\n#SBATCH --uid=0",)}, "holds an unprintable character"),
    (
      (),
      {
        "extra": (
          "--a",
          "b\r",
        )
      },
      "holds an unprintable character",
    ),
    ((), {"extra": ("\x1b[2J",)}, r"--extra='\x1b[2J' holds an unprintable character"),
    ((), {"source": "-r http://x"}, "--source=-r http://x looks like an option"),
    ((), {"image": "--privileged"}, "--image=--privileged looks like an option"),
    ((), {"project": "a\nb"}, "holds an unprintable character"),
    ((), {"zone": "-z"}, "--zone=-z looks like an option"),
    ((), {"cluster": "-c"}, "--cluster=-c looks like an option"),
    ((), {"python": "-c"}, "--python=-c looks like an option"),
    ((), {"mount": "gs://b", "shared": "/runs"}, "--mount=gs://b is not HOST:/EXPORT"),
  ],
)
def test_refuses(flags, settings, message):
  with pytest.raises(JobError, match=re.escape(message)):
    job_of(*flags, **settings)


@pytest.mark.parametrize(
  "flags, settings, message",
  [
    ((), {}, "the script needs --workdir=FOLDER among its flags"),
    (("--workdir=s3://bucket/ppo",), {}, "--workdir=s3://bucket/ppo is not a folder, nor one in"),
    (
      ("--workdir=gs://bucket/ppo",),
      {"accelerator": "v5litepod-16"},
      "--workdir=gs://bucket/ppo: several hosts or processes write one checkpoint",
    ),
    (("--workdir=gs://bucket/ppo",), {"processes": 2}, "several hosts or processes"),
  ],
)
def test_refuses_a_workdir(flags, settings, message):
  with pytest.raises(JobError, match=re.escape(message)):
    Job(module="experiments.ppo", flags=flags, **settings)


def test_a_bucket_needs_no_mount_where_hosts_lose_their_disks():
  job = Job(
    module="experiments.ppo", flags=("--workdir=gs://bucket/ppo",), accelerator="v5litepod-8"
  )
  job.require_shared("hosts lose their disks")
  assert job.name == "ppo"
  with pytest.raises(JobError, match="--to=slurm keeps the script of the job in the workdir"):
    slurm.render(dataclasses.replace(job, accelerator=""))


def test_a_script_uses_the_time_that_clusters_give_it_to_save():
  """And what hangs says so before it is killed."""
  from rlhf_jax import loop

  left = jobs.GRACE_SECONDS - loop.Session(workdir="run").grace_seconds
  assert 5 <= left <= 15


@pytest.mark.parametrize(
  ("code", "may_pass"),
  [
    *((code, True) for code in (74, 75, 129, 134, 137, 143, -signal.SIGABRT, -signal.SIGKILL)),
    *((code, False) for code in (0, 1, 2, 64, 65, 69, 70, 73, 78)),
  ],
)
def test_codes_that_may_pass(code, may_pass):
  assert jobs.may_pass(code) == may_pass


def test_codes_are_those_of_the_scripts():
  from rlhf_jax import checkpoint, loop
  from rlhf_jax import workdir as workdir_lib
  from rlhf_jax.data import sources

  tried_again = {checkpoint.CheckpointWriteError, loop.Preempted}
  stay = {
    *(checkpoint.CheckpointError, checkpoint.NonFiniteError),
    *(workdir_lib.WorkdirError, workdir_lib.LockedError, loop.NumericsError, sources.DataError),
  }
  assert {error.exit_code for error in tried_again} == set(jobs.RETRIED)
  for code in (os.EX_USAGE, *(error.exit_code for error in stay)):
    assert code not in jobs.RETRIED and code < jobs.FIRST_SIGNAL
