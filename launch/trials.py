"""Processes of trials. They outlive the controller that started them, and the next one finds them.

A place to run trials is an object with two methods, `start(argv, folder)` and `find(folder)`. They
return a handle with two methods, `poll()` and `stop()`. A folder has at most one process: `start`
returns an existing one. Its output is appended to `folder/log`.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from typing import Protocol

from . import job as jobs

# Exit code of a process whose controller died before it could wait for it.
LOST = 256


class PlaceError(RuntimeError):
  """Trials cannot be started, found or stopped here now; the message gives the reason."""


class Handle(Protocol):
  """A process that was started."""

  def poll(self) -> int | None:
    """Returns None while it runs, then its exit code, or LOST."""
    ...

  def stop(self) -> None:
    """Tells it to save and end."""
    ...


class Place(Protocol):
  """A place to run trials, which are polled every `poll_seconds`."""

  poll_seconds: float

  def start(self, argv: Sequence[str], folder: pathlib.Path) -> Handle:
    """Returns the process that runs in `folder`; starts one if there is none."""
    ...

  def find(self, folder: pathlib.Path) -> Handle | None:
    """Returns the process that runs in `folder`, if there is one."""
    ...


def try_lock(path: pathlib.Path) -> int | None:
  """Locks a file, creating it if needed; returns its descriptor, or None if it is locked already.

  The lock is held until the last copy of the descriptor is closed, however its owner ends. A
  process that inherits it holds the lock as long as it lives.
  """
  fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(fd)
    return None
  except BaseException:
    os.close(fd)
    raise
  return fd


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Waits for the lock of a file and holds it."""
  fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  try:
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield
  finally:
    os.close(fd)


class Local:
  """Processes on this machine.

  Each process has its own session, so that neither Ctrl-C nor a closed terminal reaches it. It
  holds the lock of `folder/.process`, which contains its process id and machine.
  """

  poll_seconds = 0.2

  def __init__(self, study: pathlib.Path, gpus: int = 0):
    """Gives each trial `gpus` GPUs, or all of them if 0; `study` has the locks of those in use."""
    self._study, self._per_trial = study, gpus
    self.gpus = visible_gpus() if gpus else []

  def find(self, folder: pathlib.Path) -> "LocalProcess | None":
    process = LocalProcess(folder)
    return process if process.poll() is None else None

  def start(self, argv: Sequence[str], folder: pathlib.Path) -> "LocalProcess":
    lock = try_lock(folder / ".process")
    if lock is None:
      return LocalProcess(folder)
    kept, env = [lock], dict(os.environ)
    try:
      if self._per_trial:
        gpus, slot = self._take_gpus()
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        kept.append(slot)
      os.ftruncate(lock, 0)
      with open(folder / "log", "ab") as log:
        process = subprocess.Popen(
          list(argv),
          stdin=subprocess.DEVNULL,
          stdout=log,
          stderr=subprocess.STDOUT,
          env=env,
          pass_fds=kept,
          start_new_session=True,
        )
      os.pwrite(lock, f"{process.pid} {socket.gethostname()}\n".encode(), 0)
    finally:
      for fd in kept:
        os.close(fd)
    return LocalProcess(folder, process)

  def _take_gpus(self) -> tuple[list[str], int]:
    """Takes GPUs that no trial of this study uses; also returns the descriptor of their lock."""
    for first in range(0, len(self.gpus) - self._per_trial + 1, self._per_trial):
      gpus = self.gpus[first : first + self._per_trial]
      name = re.sub(r"[^A-Za-z0-9]+", "-", f"{socket.gethostname()}-{'-'.join(gpus)}")
      slot = try_lock(self._study / f".gpus-{name}")
      if slot is not None:
        return gpus, slot
    raise PlaceError(
      f"--gpus={self._per_trial}: none of the {len(self.gpus)} GPUs of this machine is free for"
      " another trial; lower --parallel here or in the other controllers of this study"
    )


class LocalProcess:
  """A process on this machine: a child, or a process started by an earlier controller."""

  def __init__(self, folder: pathlib.Path, child: subprocess.Popen | None = None):
    self._lock, self._child = folder / ".process", child

  def poll(self) -> int | None:
    if self._child is not None:
      return self._child.poll()
    fd = try_lock(self._lock)
    if fd is None:
      return None
    os.close(fd)
    return LOST

  def stop(self) -> None:
    # While it runs, no other process of its machine can have its id. The file has no id if the
    # controller died right after starting the process.
    number, _, host = self._lock.read_text().strip().partition(" ")
    if number and host == socket.gethostname() and self.poll() is None:
      with contextlib.suppress(ProcessLookupError):
        os.kill(int(number), signal.SIGTERM)


def visible_gpus() -> list[str]:
  """Names of the GPUs that a process of this machine may use."""
  given = os.environ.get("CUDA_VISIBLE_DEVICES")
  if given is not None:
    return [name for name in given.split(",") if name]
  try:
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return []
  return [str(i) for i in range(len(re.findall(r"^GPU \d+:", listed.stdout, re.M)))]


class Slurm:
  """Slurm jobs, through sbatch, squeue and scancel.

  A job is found again by its name, which derives from the path of the folder. If it reaches its
  time limit or is preempted, the script saves, and the controller submits it again.
  """

  poll_seconds = 10.0

  def __init__(self, gpus: int = 0, minutes: int = 0, options: Sequence[str] = ()):
    """Builds the options of sbatch; `options` are passed on unchanged."""
    self._options = [
      *([f"--gpus-per-node={gpus}"] if gpus else []),
      *([f"--time={minutes}"] if minutes else []),
      *options,
    ]

  def command(self, argv: Sequence[str], folder: pathlib.Path) -> list[str]:
    """Builds the sbatch command of a trial."""
    code = shlex.quote(str(folder.resolve() / ".exit_code"))
    return [
      "sbatch",
      "--parsable",
      f"--job-name={job_name(folder)}",
      f"--output={str(folder.resolve() / 'log').replace('%', '%%')}",
      "--open-mode=append",
      f"--signal=TERM@{jobs.GRACE_SECONDS}",  # Reaches the script, which then saves.
      *self._options,
      f"--wrap=srun {shlex.join(argv)}; code=$?; echo $code >{code}; exit $code",
    ]

  def find(self, folder: pathlib.Path) -> "SlurmJob | None":
    job = SlurmJob(folder)
    return job if job.queued() else None

  def start(self, argv: Sequence[str], folder: pathlib.Path) -> "SlurmJob":
    if (job := self.find(folder)) is not None:
      return job
    (folder / ".exit_code").unlink(missing_ok=True)
    _call(*self.command(argv, folder))
    return SlurmJob(folder)


class SlurmJob:
  """The job of a trial."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  def queued(self) -> list[list[str]]:
    """Lists id and state of the job of this trial, if it has not ended: one entry or none."""
    name = f"--name={job_name(self._folder)}"
    listed = _call("squeue", "--me", "--noheader", name, "--format=%A %T")
    return [line.split() for line in listed.splitlines()]

  def poll(self) -> int | None:
    try:
      if self.queued():
        return None
    except PlaceError:  # The daemon restarts now and then; jobs survive that.
      return None
    try:
      return int((self._folder / ".exit_code").read_text())
    except (FileNotFoundError, ValueError):
      return LOST

  def stop(self) -> None:
    for number, state in self.queued():
      # Without the signal it would be killed half a minute later, saved or not.
      _call("scancel", *(["--signal=TERM"] if state == "RUNNING" else []), number)


def job_name(folder: pathlib.Path) -> str:
  """Name of the Slurm job of a trial, unique for every folder."""
  digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
  return f"trial-{folder.name}-{digest}"


def _call(*command: str) -> str:
  """Runs a command and returns its output. Raises PlaceError with its message if it fails."""
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
  except FileNotFoundError as error:
    raise PlaceError(f"--to=slurm needs the command {command[0]}, which is not here") from error
  except subprocess.CalledProcessError as error:
    raise PlaceError(f"{command[0]}: {error.stderr.strip()}") from error
