"""A job as a value: the script, its hardware, and the number of restarts.

Nothing here depends on a target. A target is a pure function from a `Job` to a `Plan`: the files to
write and the commands that submit the job.
"""

import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import NamedTuple

from . import accelerators

# Exit codes of scripts (rlhf_jax raises errors with these codes; the names are of sysexits.h). Only
# transient failures are worth another start: a save that failed (74), and a job that was told to
# stop and has saved its state (75). So are signals, which the shell reports as 128 + their number:
# out of memory, a lost machine, a lost process. The others are permanent: a wrong flag (64, or 1 if
# it is unknown), bad data (65), broken gradients (70), a workdir that cannot be locked (73) or that
# holds another run (78).
RETRIED = (74, 75)
FIRST_SIGNAL = 128
# Seconds between SIGTERM and the end, in which a script finishes its step, with several processes
# another one, and saves. The default of its --grace_seconds is a little less.
GRACE_SECONDS = 120

_AXES = ("data", "fsdp", "tensor")  # As in rlhf_jax.sharding; `data` and `fsdp` split the rows.
_GIVEN = ("coordinator", "processes", "process_id")  # Flags that the launcher sets.


def may_pass(code: int) -> bool:
  """Returns whether another start may help; a signal is 128 + its number, or negative."""
  return code in RETRIED or code > FIRST_SIGNAL or code < 0


class JobError(ValueError):
  """The job is impossible. The message names the flag and the fix."""


class Plan(NamedTuple):
  """Files and commands that submit a job to a target.

  Attributes:
    files: Path -> text, written before the commands run.
    commands: Argument lists, run one after another.
    later: Purpose -> command line, for use after submission.
  """

  files: Mapping[str, str]
  commands: tuple[tuple[str, ...], ...]
  later: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One run of a script.

  Attributes:
    module: Module to run, such as experiments.ppo.
    flags: Flags of the script, as `--name=value`, including --workdir.
    name: Name of the job: small letters, digits, dashes. By default the last folder of the workdir.
    accelerator: TPU slice such as v5litepod-16, or GPUs of one host such as H100:8. Empty for CPUs.
    slices: Number of TPU slices, or of hosts, in the job.
    processes: Processes per host, without an accelerator.
    devices: CPU devices per process, without an accelerator; 0 uses the existing ones.
    shared: Folder on a file system that all hosts share and that outlives them.
    mount: HOST:/EXPORT of a Filestore or NFS server that the hosts mount on `shared`; empty if it
      is mounted already.
    restarts: Maximum number of restarts after preemptions or lost hosts.
    spot: Use cheap capacity that may be preempted.
    env: Environment variables of the processes, as `NAME=VALUE`.
    python: Python interpreter on the hosts, if the target does not create an environment.
    source: Package that a TPU VM installs: a git+https URL with a commit, or a wheel on `shared`.
    image: Container image, for xpk.
    project: Google Cloud project.
    zone: Google Cloud zone.
    cluster: GKE cluster, for xpk.
    extra: More flags for the command that submits the job, such as --partition=gpu for sbatch.
  """

  module: str
  flags: tuple[str, ...] = ()
  name: str = ""
  accelerator: str = ""
  slices: int = 1
  processes: int = 1
  devices: int = 0
  shared: str = ""
  mount: str = ""
  restarts: int = 10
  spot: bool = False
  env: tuple[str, ...] = ()
  python: str = sys.executable
  source: str = ""
  image: str = ""
  project: str = ""
  zone: str = ""
  cluster: str = ""
  extra: tuple[str, ...] = ()

  def __post_init__(self):
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", self.module):
      raise JobError(f"{self.module!r} is not a module, such as experiments.ppo")
    self._check_text()
    self._check_flags()
    if not self.name:
      made = re.sub(r"[^a-z0-9]+", "-", pathlib.PurePosixPath(self.workdir).name.lower())
      object.__setattr__(self, "name", made.strip("-").lstrip("0123456789-")[:40].rstrip("-"))
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
      raise JobError(
        f"--name={self.name}: give 1 to 40 small letters, digits and dashes, a letter first"
      )
    for name, least in (("slices", 1), ("processes", 1), ("devices", 0), ("restarts", 0)):
      if getattr(self, name) < least:
        raise JobError(f"--{name}={getattr(self, name)} must be at least {least}")
    for pair in self.env:
      if not re.fullmatch(r"[A-Za-z_]\w*=[^\n\r]*", pair):
        raise JobError(f"--env={pair} is not NAME=VALUE, on one line")
    if self.accelerator and (self.processes > 1 or self.devices):
      raise JobError(
        f"--accelerator={self.accelerator} decides the processes and devices: leave out"
        " --processes and --devices"
      )
    self.hardware  # noqa: B018 - raises if there is no such accelerator.
    self._check_places()
    self._check_mesh()
    if self.in_bucket and max(self.hosts, self.processes) > 1:
      raise JobError(
        f"--workdir={self.workdir}: several hosts or processes write one checkpoint, into a folder"
        " that all of them mount; give one (see --shared and --mount)"
      )

  @property
  def workdir(self) -> str:
    """The --workdir of the script."""
    return self.flag("workdir")

  @property
  def in_bucket(self) -> bool:
    """True for a workdir in a bucket."""
    return self.workdir.startswith("gs://")

  @property
  def hardware(self) -> accelerators.Accelerator:
    """The slice or host of the job; without an accelerator a host with CPU devices."""
    if self.accelerator:
      try:
        return accelerators.find(self.accelerator)
      except ValueError as error:
        raise JobError(f"--{error}") from None
    devices = self.processes * self.devices
    return accelerators.Accelerator("CPU", hosts=1, devices=devices, chips=0)

  @property
  def hosts(self) -> int:
    """Number of hosts over all slices."""
    return self.slices * self.hardware.hosts

  def flag(self, name: str) -> str:
    """Value of a flag of the script; empty if it is not given."""
    prefix = f"--{name}="
    return next((f.removeprefix(prefix) for f in self.flags if f.startswith(prefix)), "")

  def command(self, python: str, *extra: str) -> tuple[str, ...]:
    """Argument list that runs the script."""
    return (python, "-m", self.module, *self.flags, *extra)

  def require_shared(self, why: str) -> None:
    """Refuses a workdir that other hosts cannot see, or that is lost with the hosts."""
    if self.in_bucket:
      return
    if not self.shared:
      raise JobError(
        f"--workdir={self.workdir}: {why}; put it on a file system that all hosts mount, and give"
        " the folder of that as --shared"
      )
    inside = pathlib.PurePosixPath(self.workdir).is_relative_to(self.shared)
    if not inside or ".." in pathlib.PurePosixPath(self.workdir).parts:
      raise JobError(f"--workdir={self.workdir} is not inside --shared={self.shared}; {why}")

  def refuse(self, target: str, *names: str) -> None:
    """Refuses settings that have no meaning for a target."""
    defaults = {field.name: field.default for field in dataclasses.fields(self)}
    for name in names:
      if getattr(self, name) != defaults[name]:
        raise JobError(f"--{name} means nothing for --to={target}; leave it out")

  def need(self, target: str, **examples: str) -> None:
    """Refuses a job without the settings that a target needs."""
    for name, example in examples.items():
      if not getattr(self, name):
        raise JobError(f"--to={target} needs --{name}, such as {example}")

  def _check_text(self) -> None:
    """Refuses what would become another line of a file, or another option of a command."""
    for field in dataclasses.fields(self):
      if field.name in ("flags", "env"):  # Have checks of their own.
        continue
      value = getattr(self, field.name)
      for text in (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ():
        if not text.isprintable():
          raise JobError(f"--{field.name}={text!r} holds an unprintable character")
        if isinstance(value, str) and text.startswith("-"):
          raise JobError(f"--{field.name}={text} looks like an option; it cannot start with a dash")

  def _check_flags(self) -> None:
    for flag in self.flags:
      if not re.match("--[A-Za-z]", flag):
        raise JobError(f"{flag!r} is not a flag of the script: write --name=value")
      if not flag.isprintable():
        raise JobError(f"{flag!r} holds an unprintable character")
      name, _, value = flag.removeprefix("--").partition("=")
      if value.startswith("~"):
        raise JobError(f"{flag}: write the folder in full; ~ is another one on each host")
      if name in _GIVEN:
        raise JobError(f"{flag}: the launcher gives --{name} itself; leave it out")
    if not self.workdir:
      raise JobError("the script needs --workdir=FOLDER among its flags, after the --")
    if "://" in self.workdir and not self.in_bucket:
      raise JobError(
        f"--workdir={self.workdir} is not a folder, nor one in a bucket, gs://BUCKET/FOLDER"
      )

  def _check_places(self) -> None:
    if self.shared and not pathlib.PurePosixPath(self.shared).is_absolute():
      raise JobError(f"--shared={self.shared} is not an absolute path")
    if self.mount and not self.shared:
      raise JobError(f"--mount={self.mount} needs --shared, the folder it is mounted on")
    if self.mount and not re.fullmatch(r"\w[\w.-]*:/([\w.-][\w./-]*)?", self.mount):
      raise JobError(f"--mount={self.mount} is not HOST:/EXPORT of an NFS server")

  def _check_mesh(self) -> None:
    """Refuses a mesh or batch size that rlhf_jax.sharding would refuse on the hosts."""
    if not self.hardware.devices:
      return
    spare = self.flag("rollout.devices")
    total = self.slices * self.hardware.devices - (int(spare) if spare.isdigit() else 0)
    have = f"{self.slices} x " * (self.slices > 1) + f"{self.hardware.name}"
    spec = self.flag("mesh") or "data:-1"
    parts = [re.fullmatch(r"(data|fsdp|tensor):(-1|[1-9][0-9]*)", p) for p in spec.split(",")]
    if not all(parts) or len({part[1] for part in parts}) < len(parts):
      raise JobError(
        f"--mesh={spec} is not AXIS:SIZE, comma separated, such as data:8,fsdp:2; the axes are"
        f" {', '.join(_AXES)}"
      )
    sizes = {part[1]: int(part[2]) for part in parts}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    unset = [axis for axis, size in sizes.items() if size == -1]
    if len(unset) > 1:
      raise JobError(f"--mesh={spec}: only one axis can be -1")
    if total < 1 or (total % fixed if unset else total != fixed):
      raise JobError(
        f"--mesh={spec} needs {'a multiple of ' if unset else ''}{fixed} devices, {have} has"
        f" {total}{' to learn with' if spare else ''}"
      )
    if unset:
      sizes[unset[0]] = total // fixed
    rows = sizes.get("data", 1) * sizes.get("fsdp", 1)
    batch = self.flag("batch_size")
    if batch.isdigit() and int(batch) % rows:
      raise JobError(
        f"--batch_size={batch} is not divisible by the {rows} devices of data and fsdp"
        f" (--mesh={spec} on {have})"
      )
