"""GKE through xpk: one JobSet, with a job for each slice and a pod for each host.

The workdir is on a storage of the cluster (`xpk storage attach`), mounted in every pod. If it is
not mounted automatically, name it with `--extra=--storage=NAME`.
"""

import shlex

from .. import job as jobs
from ..job import Job, Plan

_TOO_SMALL = ("v5litepod-1", "v5litepod-4")  # xpk has no machine types for them.


def render(job: Job) -> Plan:
  """Renders `xpk workload create`, with the image built from launch/files/Dockerfile."""
  job.refuse("xpk", "processes", "devices", "mount", "source")
  job.need("xpk", accelerator="v5litepod-16", cluster="my-cluster", zone="us-west4-a")
  job.need("xpk", project="my-project", image="us-docker.pkg.dev/my-project/images/rlhf_jax:COMMIT")
  hardware = job.hardware
  if not hardware.is_tpu:
    raise jobs.JobError(f"--accelerator={job.accelerator} is no TPU: use --to=slurm or --to=sky")
  if job.accelerator in _TOO_SMALL:
    raise jobs.JobError(f"--accelerator={job.accelerator}: xpk starts at v5litepod-8")
  job.require_shared("pods lose their disks when they end")
  place = (f"--cluster={job.cluster}", f"--zone={job.zone}", f"--project={job.project}")
  script = job.command("python", "--coordinator=auto")
  create = (
    *("xpk", "workload", "create", f"--workload={job.name}", *place),
    f"--tpu-type={job.accelerator}",
    f"--num-slices={job.slices}",
    f"--docker-image={job.image}",
    f"--max-restarts={job.restarts}",
    # xpk adds signals; every other exit code ends the JobSet.
    f"--restart-on-exit-codes={','.join(map(str, jobs.RETRIED))}",
    f"--termination-grace-period-seconds={jobs.GRACE_SECONDS}",
    *(("--spot",) if job.spot else ()),
    *job.extra,
    # exec: xpk sends SIGTERM to the process that it started, which would otherwise be a shell.
    f"--command={shlex.join(('exec', 'env', *job.env, *script))}",
  )
  label = "cloud.google.com/gke-tpu"
  nodes = f"{label}-accelerator={hardware.gke},{label}-topology={hardware.topology.split(':')[1]}"
  later = {
    "state": shlex.join(("xpk", "workload", "list", *place, f"--filter-by-job={job.name}")),
    "nodes that fit": f"kubectl get nodes -l {nodes}",
    "output": f"kubectl logs -f -l xpk.google.com/workload={job.name} --prefix",
    "stop": shlex.join(("xpk", "workload", "delete", f"--workload={job.name}", *place)),
  }
  return Plan({}, (create,), later)
