"""The folder of a run: its lock, its identity, digests of what it was given, durable writes.

A workdir is local or on a shared POSIX file system: the lock and the atomic rename need one. One in
a bucket, `gs://BUCKET/FOLDER`, is a local folder whose files are copied; see `bucket`. With
several processes, call everything here from all of them, after `jax.distributed.initialize`.
Process 0 looks and decides, for all of them.
"""

import concurrent.futures
import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from rlhf_jax import bucket, processes
from rlhf_jax.bucket import LockedError as LockedError

_LOCKED: dict[
  pathlib.Path, int
] = {}  # Directory -> descriptor of the lock that this process holds.
_SEEN_SECONDS = 20.0  # How long a write may take to be seen by another host.
# How long a file server may keep the lock of a host that has crashed; a lease of NFS has 90 s.
_LEASE_SECONDS = 120.0


class WorkdirError(RuntimeError):
  """A workdir holds another run, or is no folder of a file system."""

  exit_code = os.EX_CONFIG


class LostError(RuntimeError):
  """The run directory was removed or replaced while this process worked in it."""

  exit_code = os.EX_IOERR


def local_path(path: epath.PathLike) -> pathlib.Path:
  """Returns an absolute path, with `~` expanded.

  For a folder in a bucket it is the local one with its files, without those of checkpoints, which
  are copied at the first call.

  Raises:
    WorkdirError: The path is empty, a URL such as `s3://bucket/run`, or in the home of nobody.
    BucketError: The bucket cannot be read.
  """
  text = os.fspath(path)
  if bucket.is_address(text):
    return _copied(bucket.folder_of(text))
  if "://" in text:
    raise WorkdirError(
      f"{text} is not a path of a file system, nor a folder in a bucket, gs://BUCKET/FOLDER; mount"
      " the share and give the mounted folder"
    )
  if not text.strip():
    raise WorkdirError("a path is empty; write . for the current folder")
  try:
    return pathlib.Path(path).expanduser().absolute()
  except RuntimeError as error:  # There is no such user.
    raise WorkdirError(f"{text}: {error}; write the folder in full") from error


@functools.cache
def _copied(folder: pathlib.Path) -> pathlib.Path:
  bucket.pull(folder, steps=False)
  return folder


_KINDS = {
  stat.S_IFDIR: "a folder",
  stat.S_IFIFO: "a FIFO",
  stat.S_IFCHR: "a device",
  stat.S_IFBLK: "a device",
  stat.S_IFSOCK: "a socket",
}


def kind_of(path: epath.PathLike) -> str:
  """Returns the kind of what is no file: a folder, a FIFO, a device, a socket; empty for a file.

  To read from some of them takes for ever, or can be done once only. Empty too if nothing is there.
  """
  try:
    return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "")
  except (OSError, ValueError):
    return ""


_OF_MODELS = {".json", ".jinja", ".safetensors", ".txt", ".model"}


def irregular(folder: pathlib.Path) -> str:
  """Names the first entry of a model folder that should be a file and is none; empty if all are."""
  try:
    names = sorted(path for path in folder.iterdir() if path.suffix in _OF_MODELS)
  except OSError:
    return ""
  return next((f"{p.name} is {kind}, not a file" for p in names if (kind := kind_of(p))), "")


_PATTERN = re.compile(r"[*?\[\\]")


def split_step(path: epath.PathLike) -> tuple[pathlib.Path, str | None]:
  """Returns the folder of a run and the step of `RUN@STEP`; for every other path no step."""
  folder = local_path(path)
  if "@" in folder.name and not bucket.is_there(folder):
    name, _, step = os.fspath(path).rpartition("@")
    return local_path(name), step
  return folder, None


def run_folder(path: epath.PathLike) -> pathlib.Path:
  """Returns the absolute path of a folder for a run; nothing is created.

  Raises:
    LockedError: Checkpoints in it could not be read again: orbax looks for the files of a step by a
      pattern, in which a part of the path has a meaning.
    WorkdirError: See `local_path`.
  """
  directory = local_path(path)
  if found := _PATTERN.search(os.fspath(directory)):
    raise LockedError(
      f"--workdir={directory}: checkpoints below a folder with {found[0]} in its name could not be"
      " read again; give a path without * ? [ and \\"
    )
  return directory


@contextlib.contextmanager
def creating(directory: pathlib.Path) -> Iterator[None]:
  """Turns the error of a workdir that cannot be made or written into a LockedError."""
  try:
    yield
  except OSError as error:
    if no_room(error):
      raise
    raise LockedError(
      f"--workdir={directory} cannot be written: {error.strerror or error}; give a folder of yours"
    ) from error


def make(directory: pathlib.Path) -> None:
  """Makes the folder of a run, and writes nothing into it: another run may hold its lock.

  Raises:
    LockedError: It cannot be made or written.
  """
  with creating(directory):
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
      raise OSError(errno.EACCES, os.strerror(errno.EACCES))


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_room(error: BaseException | None) -> str:
  """Returns the words of the system for an error of a disk without room; empty for others.

  Libraries that write by themselves have exceptions of their own, with the words of the system.
  What an error comes from counts.
  """
  while error is not None:
    for code in _FULL:
      if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
        return os.strerror(code)
    error = error.__cause__ or error.__context__
  return ""


def atomic_write(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file so that a reader, a crash or a power loss sees the old file or the new one.

  Its folder is created. An OSError names the file. What belongs to a folder in a bucket, and not to
  an open run, is copied there at once.

  Raises:
    LostError: The file belongs to a run whose folder is gone.
  """
  path = epath.Path(path)
  require_lock(path)
  content = content.encode() if isinstance(content, str) else content
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
  try:
    with open(temporary, "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    if isinstance(error, OSError) and error.errno is not None:
      error.filename, error.filename2 = os.fspath(path), None
    raise
  sync_directory(path.parent)
  if not holds_lock(pathlib.Path(path)):
    bucket.push(pathlib.Path(path))


def follow_umask(path: pathlib.Path) -> None:
  """Gives a file that a library wrote for its owner alone the mode of all other new files."""
  probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
  with contextlib.suppress(OSError):  # Of a file system without modes.
    try:
      probe.touch(0o666)
      path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
      probe.unlink(missing_ok=True)


def sync_directory(path: epath.PathLike) -> None:
  """Makes the renames within a folder survive a power loss."""
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


@contextlib.contextmanager
def run_lock(workdir: epath.PathLike, *, patient: bool = False) -> Iterator[None]:
  """Holds `<workdir>/.lock`, so that no second process works in the same directory.

  The operating system releases the lock when its owner dies, however it dies. If a host dies, its
  file server does so later, and that is waited for. Process 0 of a multi-process run holds it for
  all.

  Args:
    workdir: The directory; created if missing.
    patient: True to wait for another process that holds the lock, however long.

  Raises:
    LockedError: Another process holds it (named with host, pid and start time), or `workdir`
      cannot be written, or is not the same directory for all processes of the run.
  """
  directory = run_folder(workdir)
  with contextlib.ExitStack() as stack:
    owner = processes.agree(lambda: stack.enter_context(_lock(directory, patient)))
    if jax.process_count() > 1:
      _require_shared(directory, owner)
    yield


def _require_shared(directory: pathlib.Path, owner: str) -> None:
  """Refuses a directory in which not every process finds the lock that process 0 has written."""
  deadline = time.monotonic() + _SEEN_SECONDS
  while not (found := _read(directory / ".lock") == owner) and time.monotonic() < deadline:
    time.sleep(0.2)
  alone = [host for host in processes.gather("" if found else socket.gethostname()) if host]
  if alone:
    raise LockedError(
      f"--workdir={directory} is another folder on {', '.join(alone)} than for process 0;"
      " several processes need one on a file system that they share"
      + (", and for a bucket XDG_CACHE_HOME there" if bucket.address_of(directory) else "")
    )


def _read(path: pathlib.Path) -> str:
  """Returns the text of a file, empty if it cannot be read."""
  try:
    return path.read_text(encoding="utf-8")
  except OSError:
    return ""


@contextlib.contextmanager
def _lock(directory: pathlib.Path, patient: bool) -> Iterator[str]:
  """Locks a directory and yields the text of `.lock`, which names the owner."""
  with creating(directory):
    directory.mkdir(parents=True, exist_ok=True)
    fd = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
  with os.fdopen(fd, "r+", encoding="utf-8") as file:
    _acquire(file, directory, patient)
    if previous := _named(_owner(file)):
      logging.warning(
        "--workdir=%s was not closed by %s, which no longer runs; its run goes on here",
        directory,
        previous,
      )
    start = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    file.seek(0)
    file.truncate()
    owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": start})
    file.write(owner)
    file.flush()
    os.fsync(fd)  # For other hosts, which do not see what is only in memory here.
    try:
      with bucket.held(directory, patient=patient):
        _LOCKED[directory] = fd
        try:
          yield owner
        finally:
          del _LOCKED[directory]
    finally:
      # The file stays: unlinking it would let two processes lock two files of the same name.
      os.ftruncate(fd, 0)


def _acquire(file, directory: pathlib.Path, patient: bool) -> None:
  """Locks the open file `.lock` of a directory.

  On this host the lock of a process that is gone is gone too. That of another host may be kept for
  a while after it has crashed.
  """
  deadline, is_told = time.monotonic() + _LEASE_SECONDS, False
  while True:
    try:
      return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno not in (errno.EAGAIN, errno.EACCES):
        raise LockedError(f"--workdir={directory} cannot be locked: {error}") from error
      owner = _owner(file)
      named = _named(owner) or "another process"
      is_elsewhere = owner.get("host", socket.gethostname()) != socket.gethostname()
      if not patient and not (is_elsewhere and time.monotonic() < deadline):
        raise LockedError(
          f"--workdir={directory} is in use by {named}; stop it first, or use another --workdir"
        ) from error
    if not is_told:
      limit = "" if patient else f" at most {_LEASE_SECONDS:g} seconds, in case that host is gone"
      logging.warning("%s is in use by %s; waiting%s", directory, named, limit)
      is_told = True
    time.sleep(0.5)


def holds_lock(directory: pathlib.Path) -> bool:
  """Returns whether this process holds the `run_lock` of a directory or of one above it."""
  return bool(_LOCKED.keys() & {directory, *directory.parents})


def require_lock(path: epath.PathLike) -> None:
  """Refuses to go on in a locked directory that was removed, or replaced by another one.

  What is written there would be a part of a run, or would mix with another run.

  Args:
    path: Any path; a no-op for those in no directory whose `run_lock` this process holds.

  Raises:
    LostError: The lock file is not the one that was locked.
  """
  place = pathlib.Path(path).absolute()
  for directory, fd in [*_LOCKED.items()]:  # Other threads write files too.
    if directory == place or directory in place.parents:
      try:
        same = os.path.samestat(os.stat(directory / ".lock"), os.fstat(fd))
      except FileNotFoundError:
        same = False
      if bucket.is_lost(directory):
        raise LostError(
          f"--workdir={bucket.address_of(directory)} was taken over by another process, as if this"
          " one had died; the run stops and writes nothing more there"
        )
      if not same:
        raise LostError(
          f"--workdir={directory} was removed, or replaced by another one, while this run was in"
          " it; the run stops and writes nothing more there. Put it back, or start anew"
        )


def _owner(file) -> dict[str, Any]:
  """Returns what the file `.lock` says of its owner; empty if it says nothing."""
  file.seek(0)
  try:
    owner = json.load(file)
  except ValueError:
    return {}
  return owner if isinstance(owner, dict) and {"pid", "host", "start"} <= owner.keys() else {}


def _named(owner: Mapping[str, Any]) -> str:
  return f"pid {owner['pid']} on host {owner['host']} since {owner['start']}" if owner else ""


def check_identity(workdir: epath.PathLike, identity: Mapping[str, Any]) -> None:
  """Refuses to continue a run under another identity than it was started with.

  The first call writes `<workdir>/identity.json`; later calls compare with it.

  Args:
    workdir: The run directory; created if missing.
    identity: JSON-able values that must not change over the life of a run, by name. A name with
      `--` belongs to a flag. The others follow from flags and files, and are named in the error
      only if no flag differs. The value of `script` decides which names there are.

  Raises:
    WorkdirError: A value differs from its first one, or between processes. The message is one line.
  """
  path = local_path(workdir) / "identity.json"
  now = json.loads(json.dumps(identity))

  def read() -> Any:
    if not path.exists():
      atomic_write(path, json.dumps(now, indent=2) + "\n")
      return now
    try:
      return _read_identity(path)
    except WorkdirError as error:
      raise WorkdirError(f"{error}; use another --workdir") from error

  found = _differences(processes.agree(read), now)
  if jax.process_count() > 1:  # The data of a process may differ from that of process 0.
    found = next(filter(None, processes.gather(found)), "")
  if found:
    raise WorkdirError(
      f"--workdir={path.parent} holds another run: {found}; use another --workdir, or what it was"
    )


def require_identity(workdir: epath.PathLike, found: Mapping[str, Any]) -> None:
  """Refuses what is not as the identity of a run has it. The run itself may go on.

  Args:
    workdir: The run directory.
    found: Values of now, by some of the names of the identity.

  Raises:
    WorkdirError: A value differs. The message is one line.
  """
  path = local_path(workdir) / "identity.json"
  was = _read_identity(path)
  differing = _differences({name: was[name] for name in found if name in was}, found)
  if differing:
    raise WorkdirError(
      f"{path.parent} was started with something else: {differing}; put back what it was"
    )


def _read_identity(path: pathlib.Path) -> dict[str, Any]:
  try:
    identity = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise WorkdirError(f"{path} cannot be read: {error}") from error
  if not isinstance(identity, dict):
    raise WorkdirError(f"{path} is not the identity of a run")
  return identity


def identity_digest(workdir: epath.PathLike) -> str:
  """Returns the SHA-256 of the identity of a run; empty if it has none yet."""
  path = local_path(workdir) / "identity.json"
  return file_digest(path) if path.exists() else ""


_MOST_DIFFERENCES = 4


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
  """Names what differs between two identities, with the old and the new value."""
  names = [name for name in {**now, **was} if _show(was, name) != _show(now, name)]
  if "script" in names:
    names = ["script"]
  names = [name for name in names if "--" in name] or names
  shown = [
    f"{name} was {_show(was, name, short=True)}, now {_show(now, name, short=True)}"
    for name in names[:_MOST_DIFFERENCES]
  ]
  more = [f"and {len(names) - len(shown)} more"] if len(names) > len(shown) else []
  return "; ".join([*shown, *more])


def _show(values: Mapping[str, Any], name: str, *, short: bool = False) -> str:
  if name not in values:
    return "absent"
  text = json.dumps(values[name], sort_keys=True)
  if not short:
    return text
  if re.fullmatch('"[0-9a-f]{64}"', text):  # A digest.
    return text[1:9]
  return text if len(text) <= 60 else f"{text[:57]}..."


def files_digest(files: Iterable[pathlib.Path]) -> str:
  """Returns the SHA-256 of the names and contents of files, in their order.

  A core reads about 1 GB in a second, and four files are read at a time. Within a process a file
  that has not changed is read once.
  """
  files = list(files)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    digests = list(pool.map(_digest_once, files))
  digest = hashlib.sha256()
  for path, of_file in zip(files, digests, strict=True):
    digest.update(f"{path.name}\0{of_file}\0".encode())
  return digest.hexdigest()


def _digest_once(path: pathlib.Path) -> str:
  status = path.stat()
  return _digest_as_of(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=4096)
def _digest_as_of(path: pathlib.Path, *status: int) -> str:
  del status  # It tells one content of the file from another.
  return file_digest(path)


def file_digest(path: pathlib.Path) -> str:
  """Returns the SHA-256 of the content of a file."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
