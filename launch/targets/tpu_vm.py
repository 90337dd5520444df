"""TPU VMs of Google Cloud: a queued resource whose hosts install and start the job by themselves.

There is no need to wait for capacity. The start-up script of each host mounts the shared folder if
there is one, installs `--source` and runs the script as a systemd service, which also restarts it.
The same happens after a reboot.
"""

import pathlib
import re
import shlex

from .. import job as jobs
from ..job import Job, Plan

_STARTUP = pathlib.Path(__file__).parents[1] / "files" / "tpu_vm_startup.sh"
_FOLDER = "/opt/rlhf_jax"
_SERVICE = "rlhf_jax"

# systemd counts starts in an interval. It is longer than any job, so that all starts count.
_UNIT = """\
[Unit]
Description=The job {name}: {module}
StartLimitIntervalSec=100d
StartLimitBurst={starts}

[Service]
ExecStart=/bin/bash {folder}/job.sh
{restart}TimeoutStopSec={grace}
"""


def render(job: Job) -> Plan:
  """Renders the start-up script and `gcloud compute tpus queued-resources create`."""
  job.refuse("tpu_vm", "processes", "devices", "image", "cluster")
  job.need("tpu_vm", accelerator="v5litepod-16", zone="us-west4-a", project="my-project")
  job.need("tpu_vm", source="git+https://HOST/REPOSITORY@COMMIT")
  if not job.in_bucket or job.source.startswith("/"):
    job.need("tpu_vm", mount="10.0.0.2:/runs")
  if not re.fullmatch(r"git\+https://\S+@\S+|/\S+\.whl", job.source):
    # All hosts would build a folder at the same time, in the same place.
    raise jobs.JobError(f"--source={job.source} is neither git+https://...@COMMIT nor /....whl")
  hardware = job.hardware
  if not hardware.runtime:
    what = "exists on GKE only, use --to=xpk" if hardware.is_tpu else "is no TPU"
    raise jobs.JobError(f"--accelerator={job.accelerator} {what}")
  job.require_shared("the hosts of a TPU VM lose their disks with the VM")
  several = job.slices > 1
  nodes = [f"{job.name}-{i}" for i in range(job.slices)] if several else [job.name]
  place = (f"--zone={job.zone}", f"--project={job.project}")
  resources = ("gcloud", "compute", "tpus", "queued-resources")
  path = f"runs/launch/{job.name}.sh"
  create = (
    *(*resources, "create", job.name, *place),
    f"--accelerator-type={job.accelerator}",
    f"--runtime-version={hardware.runtime}",
    *((f"--node-count={job.slices}", f"--node-prefix={job.name}") if several else ()),
    *(() if several else (f"--node-id={job.name}",)),
    *(("--spot",) if job.spot else ()),
    f"--metadata-from-file=startup-script={path}",
    *job.extra,
  )
  log = f"sudo journalctl -fu {_SERVICE} -u google-startup-scripts"
  ssh = ("gcloud", "compute", "tpus", "tpu-vm", "ssh")
  later = {
    "state": shlex.join((*resources, "describe", job.name, *place, "--format=value(state.state)")),
    **{
      f"hosts of {node}": shlex.join(
        (*ssh, node, *place, "--worker=all", f"--command=systemctl status {_SERVICE}")
      )
      for node in nodes
    },
    "output": shlex.join((*ssh, nodes[0], *place, "--worker=0", f"--command={log}")),
    "stop, and stop paying": shlex.join((*resources, "delete", job.name, *place, "--force")),
  }
  return Plan({path: _script(job)}, (create,), later)


def _script(job: Job) -> str:
  restart = ""
  if job.restarts:
    codes = " ".join(map(str, jobs.RETRIED))
    # on-abnormal restarts after signals; exit codes that are not listed end the job.
    restart = f"Restart=on-abnormal\nRestartForceExitStatus={codes}\nRestartSec=30\n"
  unit = _UNIT.format(
    module=job.module,
    name=job.name,
    folder=_FOLDER,
    starts=job.restarts + 1,
    restart=restart,
    grace=jobs.GRACE_SECONDS,
  )
  command = job.command(f"{_FOLDER}/bin/python", "--coordinator=auto")
  source = f"file://{job.source}" if job.source.startswith("/") else job.source
  settings = {
    "SHARED": job.shared,
    "MOUNT": job.mount,
    "SOURCE": source,
    "FOLDER": _FOLDER,
    "SERVICE": _SERVICE,
    "JOB": shlex.join(("exec", "env", *job.env, *command)),
    "UNIT": unit,
  }
  lines = [f"{name}={shlex.quote(value)}\n" for name, value in settings.items()]
  return "".join(["#!/bin/bash\n", *lines, "\n", _STARTUP.read_text(encoding="utf-8")])
