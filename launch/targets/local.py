"""This machine: the script itself, or several processes that simulate a pod."""

from .. import names
from ..job import Job, Plan


def render(job: Job) -> Plan:
  """Renders a command that runs in the foreground and returns the exit code of the script."""
  job.refuse(
    "local",
    *("accelerator", "slices", "mount", "spot", "source", "image", "project", "zone"),
    *("cluster", "extra"),
  )
  command = job.command(job.python)
  if job.processes > 1 or job.devices or job.restarts:
    sizes = (f"--processes={job.processes}", f"--devices={job.devices}")
    pod = f"{names.PACKAGE}.pod"
    command = (job.python, "-m", pod, *sizes, f"--restarts={job.restarts}", "--", *command)
  if job.env:
    command = ("env", *job.env, *command)
  return Plan({}, (command,), {})
