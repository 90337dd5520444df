"""Slurm: a batch script that requeues itself after a preemption, a time limit or a lost process."""

import shlex

from .. import job as jobs
from ..job import Job, Plan

_SCRIPT = """\
#!/bin/bash
{directives}

{exports}# srun does not take it over from sbatch.
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
srun --kill-on-bad-exit=1 {command}
code=$?
{requeue}exit "$code"
"""

_REQUEUE = """\
# {codes} and signals may go away; a wrong flag, bad data or another run in the workdir do not.
# A cancelled job is completing while this script still runs, and stays cancelled.
if (( {retried} )) && (( ${{SLURM_RESTART_COUNT:-0}} < {restarts} )) &&
    [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != COMPLETING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
"""


def render(job: Job) -> Plan:
  """Renders the batch script and its `sbatch`, for a login node that sees the workdir."""
  job.refuse("slurm", "mount", "spot", "source", "image", "project", "zone", "cluster")
  if job.hardware.is_tpu:
    raise jobs.JobError(
      f"--accelerator={job.accelerator}: --to=slurm is for GPUs and CPUs; TPUs are reached by"
      " tpu_vm, xpk or sky"
    )
  if job.in_bucket:
    raise jobs.JobError(
      f"--workdir={job.workdir}: --to=slurm keeps the script of the job in the workdir; give a"
      " folder that the login node sees"
    )
  if job.hosts > 1:
    job.require_shared(f"the {job.hosts} hosts have to see the same folder")
  # JAX gives each process of a Slurm step the one GPU that has its number on the host.
  tasks = job.hardware.chips or job.processes
  options = {
    "job-name": job.name,
    "output": shlex.quote(f"{job.workdir}/slurm-%j.log"),
    "open-mode": "append",
    "nodes": job.slices,
    "ntasks-per-node": tasks,
    **({"gpus-per-node": job.hardware.chips} if job.accelerator else {}),
    # The signal goes to the processes, not to this script: they save and end with 75.
    "signal": f"TERM@{jobs.GRACE_SECONDS}",
  }
  words = [f"--{name}={value}" for name, value in options.items()]
  words += ["--requeue" if job.restarts else "--no-requeue", *map(shlex.quote, job.extra)]
  exports = [f"export {shlex.quote(pair)}" for pair in job.env]
  if job.devices:
    count = f"--xla_force_host_platform_device_count={job.devices}"
    exports += ["export JAX_PLATFORMS=cpu", f'export XLA_FLAGS="${{XLA_FLAGS:-}} {count}"']
  several = job.slices * tasks > 1
  requeue = _REQUEUE.format(
    codes=", ".join(map(str, jobs.RETRIED)),
    retried=" || ".join([*(f"code == {c}" for c in jobs.RETRIED), f"code > {jobs.FIRST_SIGNAL}"]),
    restarts=job.restarts,
  )
  path = f"{job.workdir}/launch.sbatch"
  text = _SCRIPT.format(
    directives="\n".join(f"#SBATCH {word}" for word in words),
    exports="".join(f"{line}\n" for line in exports),
    command=shlex.join(job.command(job.python, *(["--coordinator=auto"] if several else []))),
    requeue=requeue if job.restarts else "",
  )
  later = {
    "state": f"squeue --me --name={job.name}",
    "output": f"tail -F {shlex.quote(job.workdir)}/slurm-*.log",
    "stop": f"scancel --me --name={job.name}",
  }
  return Plan({path: text}, (("sbatch", path),), later)
