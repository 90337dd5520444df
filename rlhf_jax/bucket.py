"""Copies of run folders in a bucket, `gs://BUCKET/FOLDER`, and of data files.

A run works in a folder of this machine, with the locks, renames and syncs of every other run, and
its files are copied to the bucket when they are complete. Where the two differ at the start, the
bucket is right: what was not copied before a kill has not happened. The object `.lock` is created
only if it is absent. Its owner renews it, so that one which is no longer renewed can be taken over.

The client is that of tensorstore, with its credentials, variables and retries.
"""

import concurrent.futures
import contextlib
import datetime
import fcntl
import functools
import json
import os
import pathlib
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from absl import logging

PREFIX = "gs://"
_ADDRESS = re.compile(r"gs://(?P<bucket>[a-z0-9][a-z0-9._-]*[a-z0-9])/(?P<folder>.+)")
_PART = re.compile(r"[^\x00-\x1f\x7f]+")
_INDEX, _LOCK, _SYNC = ".bucket.json", ".lock", ".bucket.lock"  # Files of this machine alone.
_TOKENS = ".tokens"  # Folder of tokenised data files, which can be made again.
_TEMPORARY = re.compile(r"(^|/)([^/]*\.orbax-checkpoint-tmp[^/]*(/|$)|\.[^/]*\.(tmp|mode)$)")
_STEPS = re.compile(r"(^|/)(checkpoints|black_box)/[^/]+/")
_THREADS = 4  # Each has a file in memory.
# Objects in a bucket cannot be appended to, only replaced, and replacing is rate limited.
_SPACED_SECONDS = 30.0
_RENEW_SECONDS = 20.0
_STALE_SECONDS = 90.0  # Without a renewal in this time the owner of a lock is gone.
# Of the first request. The later ones of a run are sent again for a quarter of an hour.
_FIRST_RETRIES = {"max_retries": 4, "initial_delay": "0.5s", "max_delay": "4s"}


class BucketError(RuntimeError):
  """A bucket cannot be read or written."""

  exit_code = os.EX_IOERR


class BucketNameError(ValueError):
  """A name of no folder in a bucket."""

  exit_code = os.EX_CONFIG


class LockedError(RuntimeError):
  """The run directory belongs to another process or cannot be locked."""

  exit_code = os.EX_CANTCREAT


def is_address(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path names a folder in a bucket."""
  return os.fspath(path).startswith(PREFIX)


def root() -> pathlib.Path:
  """Returns the folder of this machine that has the copies, `~/.cache/rlhf_jax/buckets`."""
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(cache).expanduser().absolute() / "rlhf_jax" / "buckets"


def folder_of(address: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the folder of this machine for an address.

  Raises:
    BucketNameError: The address is malformed.
  """
  text = os.fspath(address)
  match = _ADDRESS.fullmatch(text.rstrip("/"))
  parts = match["folder"].split("/") if match else []
  if not match or any(part in (".", "..") or not _PART.fullmatch(part) for part in parts):
    raise BucketNameError(f"{text}: write gs://BUCKET/FOLDER for a folder in a bucket")
  return root().joinpath(match["bucket"], *parts)


def address_of(path: str | os.PathLike[str]) -> str:
  """Returns the address of a file or folder of this machine; empty if it is in no bucket."""
  place = pathlib.Path(path)
  if root() not in place.parents:
    return ""
  return PREFIX + place.relative_to(root()).as_posix()


def name_of(path: pathlib.Path) -> str:
  """Returns a path for messages: its address if it is in a bucket."""
  return address_of(path) or os.fspath(path)


def is_there(folder: pathlib.Path) -> bool:
  """Returns whether a folder exists. One of a bucket needs a file: a pull makes the folder."""
  if not address_of(folder) or not folder.is_dir():
    return folder.exists()
  return any(path.name not in (_INDEX, _LOCK, _SYNC) for path in folder.iterdir())


class _Known(NamedTuple):
  """State of a file when it was the same here and in the bucket.

  Attributes:
    size: Bytes.
    time: Time of the last change here, in ns.
    generation: Generation of the object.
  """

  size: int
  time: int
  generation: bytes


class _Copy:
  """A folder of this machine and its copy in a bucket."""

  def __init__(self, folder: pathlib.Path, **options: Any):
    self.folder, self.address = folder, address_of(folder)
    self._store = _open(self.address, **options)
    self._mutex = threading.RLock()  # Of the threads of this process.
    self._place: os.stat_result | None = None  # Of `.bucket.lock` at the first use.

  def pull(self, *, steps: bool = True) -> None:
    """Makes the folder what the bucket has; without `steps` it leaves those of checkpoints out."""
    with self._index() as index, self._said():
      keys = [key.decode() for key in self._store.list().result()]
      names = {
        name for name in keys if self._is_copied(name) and (steps or not _STEPS.search(name))
      }
      live = _live_folders(self.folder)
      names = {name for name in names if not self._is_below(name, live)}
      for name in sorted((self._present() | index.keys()) - names):
        if (steps or not _STEPS.search(name)) and not self._is_below(name, live):
          (self.folder / name).unlink(missing_ok=True)
          index.pop(name, None)
      with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        fetch = lambda name: self._fetch(name, index.get(name))  # noqa: E731
        for name, known in zip(names, pool.map(fetch, names), strict=True):
          if known is not None:
            index[name] = known
      self._remove_empty_folders()

  def pull_one(self, name: str) -> None:
    """Makes one file what the bucket has."""
    with self._index() as index, self._said():
      known = self._fetch(name, index.get(name))
      index |= {name: known} if known else {}

  def push(self, path: pathlib.Path) -> None:
    """Writes what has changed at or below a path, the innermost folders first.

    So a manifest follows the files that it lists. What is gone here is deleted then, and its
    manifest last.
    """
    if self._is_gone():
      return  # The folder was removed, which deletes nothing in the bucket.
    with self._index() as index, self._said():
      below = path.relative_to(self.folder).as_posix()
      inside = lambda name: below in (".", name) or name.startswith(f"{below}/")  # noqa: E731
      present = {name for name in self._present() if inside(name)}
      changed = [name for name in present if not self._is_same(name, index.get(name))]
      with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for depth in sorted({name.count("/") for name in changed}, reverse=True):
          names = [name for name in changed if name.count("/") == depth]
          for name, known in zip(names, pool.map(self._send, names), strict=True):
            if known is not None:
              index[name] = known
      gone = [name for name in index if inside(name) and name not in present]
      for depth in sorted({name.count("/") for name in gone}, reverse=True):
        names = [name for name in gone if name.count("/") == depth]
        for name, deleted in [(name, self._store.write(name, None)) for name in names]:
          deleted.result()
          del index[name]

  def push_if_free(self, path: pathlib.Path) -> None:
    """Does what `push` does, or nothing while another thread copies."""
    if self._mutex.acquire(blocking=False):
      try:
        self.push(path)
      finally:
        self._mutex.release()

  def _fetch(self, name: str, known: _Known | None) -> _Known | None:
    """Reads an object unless the file has it; returns the new state, None if there is no news."""
    generation = known.generation if known and self._is_same(name, known) else None
    found = self._store.read(name, if_not_equal=generation).result()
    path = self.folder / name
    if found.state == "missing":
      path.unlink(missing_ok=True)
    if found.state != "value":
      return None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(found.value)
    os.replace(temporary, path)
    return _Known(len(found.value), path.stat().st_mtime_ns, found.stamp.generation)

  def _send(self, name: str) -> _Known | None:
    try:
      status = (self.folder / name).stat()
      content = (self.folder / name).read_bytes()
    except FileNotFoundError:  # It was a temporary file.
      return None
    stamp = self._store.write(name, content).result()
    return _Known(len(content), status.st_mtime_ns, stamp.generation)

  def _is_same(self, name: str, known: _Known | None) -> bool:
    try:
      status = (self.folder / name).stat()
    except OSError:
      return False
    return known is not None and (status.st_size, status.st_mtime_ns) == (known.size, known.time)

  def _present(self) -> set[str]:
    names = set()
    for place, _, files in os.walk(self.folder):  # Another thread may remove a folder meanwhile.
      inside = pathlib.Path(place).relative_to(self.folder)
      names |= {(inside / name).as_posix() for name in files}
    return set(filter(self._is_copied, names))

  def _is_copied(self, name: str) -> bool:
    parts = name.split("/")
    # With an empty part a name would be that of a folder, or lead out of this one.
    own = parts[-1] in (_INDEX, _LOCK, _SYNC) or {"", ".", "..", _TOKENS} & {*parts}
    return not own and not _TEMPORARY.search(name)

  def _is_below(self, name: str, folders: Iterable[pathlib.Path]) -> bool:
    return any(folder in (self.folder / name).parents for folder in folders)

  def _is_gone(self) -> bool:
    """Returns whether the folder was removed, or replaced, since it was first used."""
    try:
      now = os.stat(self.folder / _SYNC)
    except OSError:
      return self._place is not None
    return self._place is not None and not os.path.samestat(now, self._place)

  def _remove_empty_folders(self) -> None:
    for folder, _, _ in os.walk(self.folder, topdown=False):
      if folder != os.fspath(self.folder):
        with contextlib.suppress(OSError):
          os.rmdir(folder)

  @contextlib.contextmanager
  def _index(self) -> Iterator[dict[str, _Known]]:
    """Yields the states of the files, and keeps them; one thread of one process at a time."""
    self.folder.mkdir(parents=True, exist_ok=True)
    with self._mutex, open(self.folder / _SYNC, "w") as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      self._place = self._place or os.fstat(file.fileno())
      path = self.folder / _INDEX
      try:
        rows = json.loads(path.read_text(encoding="utf-8")).items()
        index = {name: _Known(row[0], row[1], bytes.fromhex(row[2])) for name, row in rows}
      except (OSError, ValueError, LookupError, TypeError, AttributeError):
        index = {}  # All files are compared anew.
      try:
        yield index
      finally:
        rows = {name: [*known[:2], known.generation.hex()] for name, known in index.items()}
        temporary = path.with_name(f".{_INDEX}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(rows), encoding="utf-8")
        os.replace(temporary, path)

  def _said(self) -> contextlib.AbstractContextManager[None]:
    return _said(self.address)


class _Lock:
  """The object `.lock` of a folder in a bucket, held by this process."""

  def __init__(self, address: str):
    self._address, self._store = address, _open(address)
    self._token, self._generation, self._count = uuid.uuid4().hex, b"", 0
    self._start = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    self._mutex, self._done = threading.Lock(), threading.Event()
    self._thread = threading.Thread(target=self._keep, name="bucket_lock", daemon=True)
    self.lost = False

  def acquire(self, *, patient: bool = False) -> None:
    """Creates the object, or takes over that of an owner which is gone.

    Args:
      patient: True to wait until the owner has ended.

    Raises:
      LockedError: It is renewed by another process.
    """
    with _said(self._address):
      found = _open(self._address, gcs_request_retries=_FIRST_RETRIES).read(_LOCK).result()
      previous, deadline = _owner(found.value), time.monotonic() + _STALE_SECONDS
      if found.state == "value" and not _is_dead_here(previous):
        logging.warning(
          "%s is locked by %s; looking whether that still runs", self._address, _named(previous)
        )
      while found.state == "value" and not _is_dead_here(previous):
        if time.monotonic() > deadline:
          break
        time.sleep(min(1.0, _RENEW_SECONDS / 2))
        again = self._store.read(_LOCK).result()
        if again.state == "value" and again.stamp.generation != found.stamp.generation:
          if not patient:
            raise LockedError(_in_use(self._address, again.value))
          previous, deadline = _owner(again.value), time.monotonic() + _STALE_SECONDS
        found = again
      if not self._write(found.stamp.generation):
        if patient:
          return self.acquire(patient=True)
        raise LockedError(_in_use(self._address, self._store.read(_LOCK).result().value))
    if found.state == "value":
      logging.warning(
        "%s was left by %s, which is gone; its run goes on here", self._address, _named(previous)
      )
    self._thread.start()

  def renew(self) -> None:
    """Writes the object again; notices if it is no longer that of this process."""
    with self._mutex, _said(self._address):
      if not self.lost and not self._done.is_set():
        self.lost = not self._write(self._generation)

  def release(self) -> None:
    """Deletes the object, unless another process has it."""
    self._done.set()
    self._thread.join()
    if not self.lost:
      with _said(self._address):
        self._store.write(_LOCK, None, if_equal=self._generation).result()

  def _write(self, generation: bytes) -> bool:
    """Writes the object if it has this generation; returns whether it is now of this process."""
    self._count += 1
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "start": self._start}
    owner |= {"machine": _machine()}
    content = json.dumps(owner | {"token": self._token, "renewed": self._count}).encode()
    stamp = self._store.write(_LOCK, content, if_equal=generation).result()
    if not stamp.generation:  # Or an answer was lost, and the request was sent again.
      found = self._store.read(_LOCK).result()
      if found.value != content:
        return False
      stamp = found.stamp
    self._generation = stamp.generation
    return True

  def _keep(self) -> None:
    while not self._done.wait(_RENEW_SECONDS):
      try:
        self.renew()
      except BucketError as error:
        logging.warning("the lock is not renewed: %s", error)
      if self.lost:
        return


_HELD: dict[pathlib.Path, tuple[_Copy, _Lock]] = {}  # Folders of the runs of this process.


@contextlib.contextmanager
def held(folder: pathlib.Path, *, patient: bool = False) -> Iterator[None]:
  """Holds the lock of a folder in its bucket, with the files of the bucket; a no-op for others.

  Args:
    folder: Folder of this machine.
    patient: True to wait for another process that holds it.

  Raises:
    LockedError: Another process holds it.
  """
  address = address_of(folder)
  if not address or _holder(folder):
    yield
    return
  lock = _Lock(address)
  lock.acquire(patient=patient)
  copy = _Copy(folder)
  try:
    copy.pull()
    _HELD[folder] = copy, lock
    try:
      yield
    finally:
      push(folder)
      del _HELD[folder]
  finally:
    lock.release()


def is_lost(folder: pathlib.Path) -> bool:
  """Returns whether another process has taken over a folder that this process had locked."""
  holder = _holder(folder)
  return bool(holder and holder[1].lost)


def push(path: pathlib.Path, *, wait: bool = True) -> None:
  """Copies what has changed at or below a path to its bucket; a no-op for other paths.

  Nothing is written into a run that another process has taken over.

  Args:
    path: File or folder of this machine.
    wait: False to do nothing while another thread copies to the same folder in the bucket.
  """
  if not address_of(path):
    return
  holder = _holder(path)
  if holder is None:
    if not path.is_dir():
      _Copy(path.parent).push(path)
    return
  copy, lock = holder
  lock.renew()
  if not lock.lost:
    (copy.push if wait else copy.push_if_free)(path)


_PUSHED: dict[pathlib.Path, float] = {}  # Files that grow, and when they were last copied.


def push_growing(path: pathlib.Path) -> None:
  """Copies a file after lines were added to it, if the last time is half a minute ago.

  Nothing waits for another copy; the next time comes soon, at the latest at the end of the run.
  """
  now = time.monotonic()
  if now - _PUSHED.setdefault(path, now) >= _SPACED_SECONDS:
    _PUSHED[path] = now
    push(path, wait=False)


def pull(folder: pathlib.Path, *, steps: bool = True) -> None:
  """Copies a folder from its bucket; a no-op for other folders, and for one that a run is in.

  Args:
    folder: Folder of this machine.
    steps: True for checkpoints too.
  """
  if address_of(folder) and not any(map(_is_live, (folder, *folder.parents))):
    _Copy(folder, gcs_request_retries=_FIRST_RETRIES).pull(steps=steps)


@functools.cache  # All that this process reads of an object is of one generation.
def pull_file(address: str) -> pathlib.Path:
  """Copies an object from its bucket, unless it is here as it is there, and returns its file.

  There is no file where the bucket has no object.

  Raises:
    BucketNameError: The address is malformed.
    BucketError: The bucket cannot be read.
  """
  path = folder_of(address)
  if not any(map(_is_live, path.parents)):
    _Copy(path.parent, gcs_request_retries=_FIRST_RETRIES).pull_one(path.name)
  return path


def _holder(path: pathlib.Path) -> tuple[_Copy, _Lock] | None:
  return next((_HELD[place] for place in (path, *path.parents) if place in _HELD), None)


def _is_live(folder: pathlib.Path) -> bool:
  """Returns whether a process of this machine is in a run of this folder."""
  if folder in _HELD:
    return True
  with contextlib.suppress(OSError), open(folder / _LOCK, "rb") as file:
    if not file.read():  # It has no owner. To try the lock could be in the way of one who takes it.
      return False
    try:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
  return False


def _live_folders(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders below one that a process of this machine is in."""
  return [path.parent for path in folder.glob(f"*/**/{_LOCK}") if _is_live(path.parent)]


def _open(address: str, **options: Any) -> Any:
  import tensorstore as ts

  bucket, _, folder = address.removeprefix(PREFIX).partition("/")
  place = {"driver": "gcs", "bucket": bucket, "path": f"{folder}/" if folder else ""}
  return ts.KvStore.open(place | options).result()


@contextlib.contextmanager
def _said(address: str) -> Iterator[None]:
  """Turns an error of the client into a BucketError."""
  try:
    yield
  except (ValueError, TimeoutError) as error:
    reason = re.sub(r" \[[^\]]*=.*", "", str(error).split("\n")[0])
    raise BucketError(f"{address} cannot be read or written: {reason:.200}") from error


def _owner(content: bytes) -> dict[str, Any]:
  try:
    owner = json.loads(content)
  except ValueError:
    return {}
  return owner if isinstance(owner, dict) else {}


def _named(owner: dict[str, Any]) -> str:
  return f"pid {owner.get('pid')} on host {owner.get('host')} since {owner.get('start')}"


def _in_use(address: str, content: bytes) -> str:
  return (
    f"--workdir={address} is in use by {_named(_owner(content))};"
    " stop it first, or use another --workdir"
  )


def _machine() -> str:
  """Returns what tells the processes of this boot and container from those of others."""
  boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
  try:
    return boot.read_text(encoding="utf-8").strip() + os.readlink("/proc/self/ns/pid")
  except OSError:
    return uuid.uuid4().hex


def _is_dead_here(owner: dict[str, Any]) -> bool:
  """Returns whether the owner of a lock was a process of this machine that has ended."""
  if owner.get("machine") != _machine() or not isinstance(owner.get("pid"), int):
    return False
  try:
    os.kill(owner["pid"], 0)
  except ProcessLookupError:
    return True
  except OSError:
    return False
  return False
