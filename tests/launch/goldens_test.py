"""Golden files: the plan of every target for a job, word for word.

After a change that is meant, `python tests/launch/goldens_test.py` writes them anew; the commit
says why they changed.
"""

import pathlib

import pytest

from launch.job import Job
from launch.run import TARGETS, describe, show

GOLDENS = pathlib.Path(__file__).parent / "goldens"

_SCRIPT = {
  "module": "experiments.ppo",
  "flags": ("--workdir=/mnt/runs/ppo", "--init_from=/mnt/runs/my sft", "--batch_size=1024"),
  "shared": "/mnt/runs",
  "env": ("LIBTPU_INIT_ARGS=--a --b",),
  "python": "/venv/bin/python",
}
_NFS = {"mount": "10.0.0.2:/runs"}
_CLOUD = {"zone": "us-west4-a", "project": "my-project"}
_TPU_VM = {**_CLOUD, **_NFS, "source": "git+https://github.com/me/rlhf_jax@abc123"}
_XPK = {**_CLOUD, "cluster": "my-cluster", "image": "us-docker.pkg.dev/my-project/rlhf/jax:abc123"}
_V5E = {"accelerator": "v5litepod-16", "spot": True}
_V5P = {"accelerator": "v5p-256"}
_TWO_SLICES = {**_V5E, "slices": 2}
_TWO_HOSTS = {"accelerator": "H100:8", "slices": 2}

# (target, case) -> what the job is, besides the script.
CASES = {
  ("local", "1_host"): {},
  ("local", "fake_pod"): {"processes": 2, "devices": 2},
  ("slurm", "1_host"): {"accelerator": "H100:8"},
  ("slurm", "1_host_no_restarts"): {"restarts": 0},
  ("slurm", "2_hosts"): {**_TWO_HOSTS, "extra": ("--partition=gpu", "--time=1-0", "--comment=a b")},
  ("tpu_vm", "1_host"): {
    **_TPU_VM,
    "accelerator": "v5litepod-4",
    "source": "/mnt/runs/rlhf_jax-0.1.0-py3-none-any.whl",
  },
  ("tpu_vm", "v5e_16"): {**_TPU_VM, **_V5E},
  ("tpu_vm", "v5p_256"): {**_TPU_VM, **_V5P, "restarts": 0},
  ("tpu_vm", "2_slices"): {**_TPU_VM, **_TWO_SLICES, "extra": ("--network=mine",)},
  ("xpk", "1_host"): {**_XPK, "accelerator": "v6e-4"},
  ("xpk", "v5e_16"): {**_XPK, **_V5E, "extra": ("--storage=runs",)},
  ("xpk", "v5p_256"): {**_XPK, **_V5P, "restarts": 0},
  ("xpk", "2_slices"): {**_XPK, **_TWO_SLICES},
  ("sky", "1_host"): {**_NFS, "accelerator": "H100:8", "spot": True},
  ("sky", "2_hosts"): {**_NFS, **_TWO_HOSTS, "restarts": 0},
  ("sky", "v5e_16"): {**_NFS, **_V5E, "zone": "us-west4-a"},
  ("sky", "v5p_256"): {**_NFS, **_V5P},
}


def rendered(target: str, case: str) -> str:
  job = Job(**_SCRIPT, **CASES[target, case])
  return f"# {describe(job)}\n\n{show(TARGETS[target](job))}"


def path_of(target: str, case: str) -> pathlib.Path:
  return GOLDENS / f"{target}_{case}.txt"


@pytest.mark.parametrize("target, case", CASES)
def test_is_as_before(target, case):
  assert rendered(target, case) == path_of(target, case).read_text()


def test_none_is_left_over():
  assert {path.name for path in GOLDENS.iterdir()} == {path_of(*case).name for case in CASES}


if __name__ == "__main__":
  for name in CASES:
    path_of(*name).write_text(rendered(*name))
