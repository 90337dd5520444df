"""SkyPilot: a managed job on any cloud that it supports, with GPUs or one TPU slice."""

import json
import shlex

from .. import job as jobs
from ..job import Job, Plan

_TASK = """\
name: {name}
num_nodes: {nodes}
workdir: .
resources:
  accelerators: {accelerators}
{resources}{envs}setup: |
{setup}
run: |
{run}
"""

# SkyPilot restarts on listed codes, without a limit: those of the scripts, and those of a process
# that ended by abort, kill, segmentation fault or termination.
_CODES = [*jobs.RETRIED, *(jobs.FIRST_SIGNAL + number for number in (6, 9, 11, 15))]


def render(job: Job) -> Plan:
  """Renders the task and `sky jobs launch`, which copies the current folder to the hosts."""
  job.refuse("sky", "processes", "devices", "source", "image", "cluster", "project")
  job.need("sky", accelerator="H100:8")
  if not job.in_bucket:
    job.need("sky", mount="10.0.0.2:/runs")
  hardware = job.hardware
  if hardware.is_tpu and (job.slices > 1 or not hardware.runtime):
    raise jobs.JobError(
      f"--accelerator={job.accelerator} --slices={job.slices}: SkyPilot takes one slice of TPU VMs;"
      " use --to=xpk"
    )
  job.require_shared("the hosts of a managed job lose their disks with it")
  resources = [f"use_spot: {str(job.spot).lower()}"]
  if job.zone:
    resources.append(f"zone: {json.dumps(job.zone)}")
  if hardware.is_tpu:
    resources.append(f"accelerator_args: {{runtime_version: {hardware.runtime}}}")
  if job.restarts:
    resources.append(f"job_recovery: {{recover_on_exit_codes: {_CODES}}}")
  name = f"tpu-{job.accelerator}" if hardware.is_tpu else job.accelerator
  path = f"runs/launch/{job.name}.yaml"
  pairs = [pair.split("=", 1) for pair in job.env]
  text = _TASK.format(
    name=job.name,
    nodes=job.slices,
    accelerators=json.dumps(name),
    resources="".join(f"  {line}\n" for line in resources),
    envs="envs:\n" * bool(pairs) + "".join(f"  {k}: {json.dumps(v)}\n" for k, v in pairs),
    setup=_indent(_setup(job)),
    run=_indent(_run(job)),
  )
  submit = ("sky", "jobs", "launch", f"--name={job.name}", *job.extra, path)
  later = {
    "state": "sky jobs queue",
    "output": f"sky jobs logs --follow --name {job.name}",
    "stop": f"sky jobs cancel --name {job.name}",
  }
  return Plan({path: text}, (submit,), later)


def _indent(lines: list[str]) -> str:
  return "\n".join(f"  {line}" for line in lines)


def _setup(job: Job) -> list[str]:
  folder = shlex.quote(job.shared)
  extra = "tpu" if job.hardware.is_tpu else "cuda"
  mount = [
    "command -v mount.nfs || { sudo apt-get update -q; sudo apt-get install -qy nfs-common; }",
    f"sudo mkdir -p {folder}",
    f"mountpoint -q {folder} || sudo mount -t nfs -o hard {shlex.quote(job.mount)} {folder}",
  ]
  return [
    "set -e",
    *(mount if job.mount else []),
    "python3 -m pip install --quiet uv",  # The Python of the image may be too old; uv brings one.
    "python3 -m uv venv --allow-existing --python 3.12 ~/rlhf_jax",
    f"python3 -m uv pip install --python ~/rlhf_jax/bin/python '.[{extra}]'",
  ]


def _run(job: Job) -> list[str]:
  command = f"exec ~/rlhf_jax/bin/{shlex.join(job.command('python'))}"
  if job.hardware.is_tpu:
    return [f"{command} --coordinator=auto"]
  if job.slices == 1:
    return [command]
  return [
    'first=$(head -n 1 <<<"$SKYPILOT_NODE_IPS")',
    f'{command} --coordinator="$first:8476" --processes="$SKYPILOT_NUM_NODES"'
    ' --process_id="$SKYPILOT_NODE_RANK"',
  ]
