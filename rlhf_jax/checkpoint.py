"""Checkpoints that are complete, verified and never mixed up.

A step is one orbax composite: every item of the run (params, optimizer state, ...) and its metadata
become visible in one rename or not at all. Orbax does not notice a flipped bit, so a manifest
`<step>.digest.json` is written next to the step, with its number, the digest of its run, and the
size and SHA-256 of every file. A step is restored only if all of them still match. A record
`<directory>.json` beside the directory has the newest step that was saved, so that steps that are
gone are missed. A run holds `workdir.run_lock` while it saves, because orbax would let a second
process overwrite committed steps.

Directories are local or on a shared POSIX file system: the durable rename needs one. Those of a run
in a bucket are copied there when a step is complete. With several
processes, call everything here from all of them, after `jax.distributed.initialize`. Process 0
looks and decides, for all of them.
"""

import concurrent.futures
import contextlib
import errno
import functools
import itertools
import json
import logging as standard_logging
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging

from rlhf_jax import bucket, processes, replicas
from rlhf_jax import workdir as workdir_lib

PyTree = Any

_META = "meta"
_DIGEST_SUFFIX = ".digest.json"
_TMP_MARK = ".orbax-checkpoint-tmp"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NUMBERS = itertools.count()  # Of the saves of this process, the same ones on all of a group.


class CheckpointError(RuntimeError):
  """A checkpoint does not fit this run, or none in the directory is usable."""

  exit_code = os.EX_CONFIG


class CheckpointWriteError(RuntimeError):
  """A checkpoint could not be written; the steps committed before it are untouched."""

  exit_code = os.EX_IOERR


class NonFiniteError(FloatingPointError):
  """A NaN or infinity was about to be saved."""

  exit_code = os.EX_SOFTWARE


class Restored(NamedTuple):
  """A step as `Checkpointer.restore` read it.

  Attributes:
    step: The step the checkpoint was saved at.
    items: Item name -> tree, with the structure, dtypes, shapes and shardings asked for.
    meta: The metadata given to `save`, as JSON gives it back (tuples become lists).
  """

  step: int
  items: dict[str, PyTree]
  meta: dict[str, Any]


def _is_repetition(record: standard_logging.LogRecord) -> bool:
  """Returns whether a record repeats, with its traceback, the error of a save that fails."""
  from_orbax = "orbax" in record.pathname and record.levelno >= standard_logging.ERROR
  return bool(from_orbax or "exception was never retrieved" in record.getMessage())


@functools.cache
def _report_a_failure_once() -> None:
  """Drops what the threads of orbax and asyncio log of a failed save: `save` raises its reason."""
  for logger in (standard_logging.getLogger("absl"), standard_logging.getLogger("asyncio")):
    logger.addFilter(lambda record: not _is_repetition(record))


def _require_room(directory: pathlib.Path, arrays: PyTree) -> None:
  """Refuses to begin a save that the disk has no room for."""
  needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
  status = os.statvfs(next(path for path in (directory, *directory.parents) if path.exists()))
  left = status.f_bavail * status.f_frsize
  if needed > left:
    reason = os.strerror(errno.ENOSPC)
    raise OSError(
      errno.ENOSPC, f"{reason}: {needed / 1e9:.3g} GB are needed, {left / 1e9:.3g} left"
    )


class Checkpointer:
  """Saves and restores named trees of arrays, one atomic unit per step.

  Attributes:
    directory: Folder of the steps, `<directory>/<step>/` and `<directory>/<step>.digest.json`.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    keep: int = 2,
    every: int = 0,
    best: str = "",
    run: str = "",
  ):
    """Opens a directory, creating nothing until the first `save`.

    Left-overs of killed saves are removed if this process holds the `run_lock` of the directory or
    of one above it; otherwise another process may still be writing them.

    Args:
      directory: The folder of the steps, `<workdir>/checkpoints` for a run.
      keep: Number of newest steps that stay on disk. With 1 there is no older step to fall back to
        when the newest is damaged.
      every: Interval of further steps that stay, by their number; 0 for none.
      best: Name of the score whose best step stays as well; empty for none. See `save`.
      run: Digest of the identity of the run; steps of other runs count as damaged.
    """
    if keep < 1:
      raise ValueError(f"keep must be at least 1, got {keep}")
    self.directory = workdir_lib.run_folder(directory)
    self._keep, self._every, self._best, self._run = keep, every, best, run
    self._manager: ocp.CheckpointManager | None = None
    # One thread waits for the commit and hashes the files, so that training does not.
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint_digest")
    self._commit: concurrent.futures.Future[None] | None = None
    self._last: int | None = None  # New steps must be greater; None before a restore or save.
    if workdir_lib.holds_lock(self.directory):
      self._remove_leftovers()

  def save(
    self,
    step: int,
    items: Mapping[str, PyTree],
    meta: Mapping[str, Any],
    score: float | None = None,
  ) -> None:
    """Saves a step; returns once the arrays are copied and may be donated or changed.

    Steps newer than the restored one (damaged, or of a run continued from an older step) are
    deleted first. The step counts as saved after `wait`, `close` or the next `save`.

    Args:
      step: Greater than the restored or last saved step.
      items: Item name -> tree of arrays. Typed PRNG keys are not accepted: save
        `jax.random.key_data`, or better the seed in `meta`.
      meta: JSON-able values.
      score: Score of the step by the name `best`, higher is better; None if it has none.

    Raises:
      NonFiniteError: A float leaf holds NaN or infinity; nothing is written.
      ReplicaError: Devices hold different copies of a leaf; nothing is written.
      CheckpointError: The directory holds `step` or a newer one that was not restored from.
      CheckpointWriteError: This or the previous step could not be written.
      TypeError: A leaf is not an array that jax holds without a cast.
    """
    flat = {}
    for name, tree in items.items():
      if name == _META or not _NAME.fullmatch(name):
        raise ValueError(f"item name {name!r} must match {_NAME.pattern} and not be {_META!r}")
      flat[name] = _flatten(name, tree)
      for path, leaf in flat[name].items():
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
          raise TypeError(f"item {name!r}, leaf {path!r}: jax would cast {leaf.dtype} on restore")
    _check_finite(flat)
    replicas.check(
      {
        f"item {name!r}, leaf {path!r}": leaf
        for name, tree in flat.items()
        for path, leaf in tree.items()
        if isinstance(leaf, jax.Array)
      }
    )
    leaves = {
      name: {path: _kind(leaf) for path, leaf in tree.items()} for name, tree in flat.items()
    }
    meta = json.loads(json.dumps({"leaves": leaves, "user": dict(meta)}, allow_nan=False))

    self.wait()
    if self._last is None:
      self._last = max(processes.agree(self._known_steps), default=-1)
    if step <= self._last:
      raise CheckpointError(
        f"{self.directory} already holds step {self._last}, so step {step} cannot be saved;"
        " restore from it, or use another --workdir"
      )
    processes.agree(lambda: workdir_lib.require_lock(self.directory))
    name = f"manifest {next(_NUMBERS)}"
    try:
      self._discard_from(step)
      processes.agree(lambda: _require_room(self.directory, flat))
      manager = self._open()
      # A save may outlive the call, so what the caller can still write to is copied.
      arrays = {
        name: {
          path: leaf if isinstance(leaf, jax.Array) else np.array(leaf)
          for path, leaf in tree.items()
          if leaf.size
        }
        for name, tree in flat.items()
      }
      args: dict[str, ocp.args.CheckpointArgs] = {
        name: ocp.args.StandardSave(tree) for name, tree in arrays.items() if tree
      }
      args[_META] = ocp.args.JsonSave(meta)
      manager.save(step, args=ocp.args.Composite(**args), force=True)
    except Exception as error:
      raise self._failed(step, error) from error
    self._last = step
    contents = {item: list(tree) for item, tree in arrays.items()}
    self._commit = self._worker.submit(self._finish, step, manager, contents, score, name)

  def restore(
    self,
    like: Mapping[str, PyTree],
    *,
    step: int | None = None,
    donate: bool = False,
    parts: bool = False,
  ) -> Restored | None:
    """Reads the newest step that is undamaged, bit for bit as it was saved.

    A damaged step is logged with the reason and the next older one is tried. Damaged are also a
    step of another number or another run, and one without a manifest. A save that was killed
    before it wrote the manifest has not happened.

    Args:
      like: Item name -> tree of arrays or `jax.ShapeDtypeStruct` with a sharding. Gives the
        structure, dtypes, shapes and shardings; nothing is ever cast. Items of the checkpoint that
        are not named here are not read.
      step: Read exactly this step.
      donate: True to delete the arrays of `like` before a step is read, so that the devices never
        hold them and those of the step at once. They stay if nothing has been saved yet.
      parts: True to read only the leaves of `like` where an item has more.

    Returns:
      The step, its items and metadata; None if nothing has been saved yet.

    Raises:
      CheckpointError: An item or leaf is missing, extra or of another shape or dtype. Or steps were
        saved, but none is usable, or not the one asked for.
      JaxRuntimeError: A device has no room for the step.
    """
    self.wait()
    wanted = {name: _flatten(name, tree) for name, tree in like.items()}
    steps = processes.agree(self._known_steps) if step is None else [step]
    if not steps:
      return None
    rejected: dict[int, str] = {}
    while (chosen := self._choose(steps, rejected)) is not None:
      if donate:  # What is wanted is still known by the shapes and places of deleted arrays.
        for leaf in jax.tree.leaves(wanted):
          if isinstance(leaf, jax.Array):
            leaf.delete()
      try:
        items, meta = self._read(chosen, wanted, parts)
      except CheckpointError:
        raise
      except Exception as error:
        if processes.lacks_memory(error):  # The step is as good as it was.
          raise
        if jax.process_count() > 1:
          raise CheckpointError(f"step {chosen} of {self.directory} cannot be read") from error
        self._reject(chosen, f"cannot be read: {_first_line(error)}", rejected)
        continue
      self._last = chosen
      trees = {name: _unflatten(like[name], items[name]) for name in like}
      return Restored(chosen, trees, meta)
    reasons = "".join(f"\n  step {s}: {rejected.get(s, 'not usable')}" for s in steps)
    raise CheckpointError(
      f"{self.directory} holds no usable checkpoint; put a copy back, or start afresh with another"
      f" --workdir{reasons}"
    )

  def leaves(self, step: int) -> dict[str, dict[str, str]]:
    """Returns item name -> path of a leaf -> its dtype and shape, such as float32[3,4].

    Raises:
      CheckpointError: There is no such step.
    """
    path = self.directory / str(step) / _META / "metadata"
    try:
      return json.loads(path.read_text(encoding="utf-8"))["leaves"]
    except (OSError, ValueError, KeyError, TypeError) as error:
      steps = ", ".join(map(str, self._committed_steps())) or "none"
      raise CheckpointError(
        f"{self.directory} holds no step {step} that can be read; steps there: {steps}"
      ) from error

  def latest_step(self, at_most: int | None = None) -> int | None:
    """Returns the newest committed step, up to `at_most`; None if there is none."""
    steps = self._committed_steps()
    return max((s for s in steps if at_most is None or s <= at_most), default=None)

  def wait(self) -> None:
    """Blocks until the last save is committed and its manifest written.

    Raises:
      CheckpointWriteError: The save failed, for example because the disk is full.
    """
    commit, self._commit = self._commit, None
    if commit is not None:
      try:
        commit.result()
      except Exception as error:
        failed, self._last = self._last, None
        raise self._failed(failed, error) from error

  def close(self) -> None:
    """Waits for the last save and releases the threads."""
    try:
      self.wait()
    finally:
      self._worker.shutdown()
      self._close_manager()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      _report_a_failure_once()
      # It keeps all steps: `_finish` deletes older ones once the new one has been read.
      self._manager = ocp.CheckpointManager(self.directory)
    return self._manager

  def _close_manager(self) -> None:
    manager, self._manager = self._manager, None
    if manager is not None:
      manager.close()

  def _finish(
    self,
    step: int,
    manager: ocp.CheckpointManager,
    contents: Mapping[str, Sequence[str]],
    score: float | None,
    name: str,
  ) -> None:
    """Runs on the worker: waits for the commit of `step` and for its manifest.

    No process may end before process 0 has written the manifest: a launcher would end that one too.

    Args:
      step: The step.
      manager: The manager that saves it.
      contents: Item name -> names of its leaves.
      score: Score of the step.
      name: Name of this save, that of no other one.
    """
    manager.wait_until_finished()
    processes.do_first(name, lambda: self._complete(step, contents, score))

  def _complete(
    self, step: int, contents: Mapping[str, Sequence[str]], score: float | None
  ) -> None:
    """Writes the manifest of a committed step and deletes old steps."""
    bucket.push(self._record_path)  # It says that what follows is not complete yet.
    bucket.push(self.directory.parent)  # A step never has less than its metrics.
    folder = self.directory / str(step)
    try:
      _require_contents(folder, contents)
    except Exception:
      shutil.rmtree(folder, ignore_errors=True)
      raise
    files = _files(folder)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      digests = pool.map(workdir_lib.file_digest, files.values())
      content = {n: [p.stat().st_size, d] for (n, p), d in zip(files.items(), digests, strict=True)}
    # The rename of the step itself, which orbax does not sync.
    workdir_lib.sync_directory(self.directory)
    manifest: dict[str, Any] = {"step": step, "run": self._run, "files": content}
    if self._best and score is not None:
      manifest["score"] = {self._best: score}
    workdir_lib.atomic_write(self._digest_path(step), json.dumps(manifest, indent=1))
    self._write_record(step)
    for other in self._superseded():
      self._delete(other)
    bucket.push(self.directory)
    bucket.push(self._record_path)

  def _superseded(self) -> list[int]:
    """Returns the steps that need not stay, now that the newest one was verified."""
    steps = sorted(self._present_steps(), reverse=True)
    best = best_step(self.directory, self._best) if self._best else None
    spaced = lambda step: self._every and step % self._every == 0  # noqa: E731
    return [step for step in steps[self._keep :] if step != best and not spaced(step)]

  def _failed(self, step: int | None, error: Exception) -> CheckpointWriteError:
    # Orbax counts a failed step as saved and leaves its data, which may be what fills the disk.
    with contextlib.suppress(Exception):
      self._close_manager()
    self._remove_leftovers()
    reason = workdir_lib.no_room(error) or _first_line(error)
    return CheckpointWriteError(
      f"step {step} could not be saved in {self.directory}: {reason};"
      f" steps still there: {self._committed_steps()}"
    )

  def _committed_steps(self) -> list[int]:
    return sorted(s for s in self._known_steps() if (self.directory / str(s)).is_dir())

  def _present_steps(self) -> set[int]:
    """Returns the steps with a directory or a manifest."""
    if not self.directory.is_dir():
      return set()
    names = {p.name.removesuffix(_DIGEST_SUFFIX) for p in self.directory.iterdir()}
    return {int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name)}

  def _known_steps(self) -> list[int]:
    """Returns the steps that were saved: one that lost its directory or manifest is not forgotten.

    A step without a manifest that is newer than the record is left by a save that was killed.
    """
    recorded, steps = self._read_record(), self._present_steps()
    if recorded is not None:
      steps = {s for s in steps if s <= recorded or self._digest_path(s).exists()}
      steps |= {recorded} if recorded >= 0 else set()
    return sorted(steps)

  @property
  def _record_path(self) -> pathlib.Path:
    return _record_path(self.directory)

  def _read_record(self) -> int | None:
    """Returns the newest saved step: -1 if none was saved yet, None if there is no record."""
    try:
      step = json.loads(self._record_path.read_text(encoding="utf-8"))["newest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
      return None
    return step if type(step) is int else None

  def _write_record(self, step: int) -> None:
    workdir_lib.atomic_write(self._record_path, json.dumps({"newest": step}) + "\n")

  def _delete(self, step: int) -> None:
    # The manifest goes last: while a part of the step is there, it is known as damaged.
    shutil.rmtree(self.directory / str(step), ignore_errors=True)
    self._digest_path(step).unlink(missing_ok=True)

  def _digest_path(self, step: int) -> pathlib.Path:
    return self.directory / f"{step}{_DIGEST_SUFFIX}"

  def _remove_leftovers(self) -> None:
    if processes.is_first() and self.directory.is_dir():
      for path in self.directory.iterdir():
        if _TMP_MARK in path.name:
          logging.info("Removing %s, left by a save that did not finish", path)
          shutil.rmtree(path, ignore_errors=True)

  def _discard_from(self, step: int) -> None:
    """Deletes the steps from `step` on, and those of saves that did not finish."""

    def look() -> dict[str, list[int]]:
      known, present = self._known_steps(), self._present_steps()
      return {
        "stale": [other for other in known if other >= step],
        "gone": sorted({s for s in present if s >= step} | (present - {*known})),
      }

    found = processes.agree(look)
    if found["stale"]:
      logging.warning(
        "Deleting steps %s of %s to save step %d", found["stale"], self.directory, step
      )
    if found["gone"]:
      self._close_manager()  # It keeps a list of the steps.

    def delete() -> None:
      older = [other for other in self._known_steps() if other < step]
      if found["stale"] or self._read_record() is None:
        self._write_record(max(older, default=-1))
      for other in found["gone"]:
        self._delete(other)

    processes.agree(delete)

  def _reject(self, step: int, reason: str, rejected: dict[int, str]) -> None:
    rejected[step] = reason
    logging.warning("Rejected step %d of %s: %s", step, self.directory, reason)

  def _choose(self, steps: list[int], rejected: dict[int, str]) -> int | None:
    """Returns the newest step whose files match its manifest."""

    def choose() -> int | None:
      for step in sorted(set(steps) - rejected.keys(), reverse=True):
        reason = _damage(self.directory / str(step), self._digest_path(step), step, self._run)
        if not reason:
          return step
        self._reject(step, reason, rejected)
      return None

    return processes.agree(choose)

  def _read(self, step: int, wanted: Mapping[str, Mapping[str, Any]], parts: bool):
    manager = self._open()
    meta_args = ocp.args.Composite(**{_META: ocp.args.JsonRestore()})
    meta = manager.restore(step, args=meta_args)[_META]
    saved: dict[str, dict[str, str]] = meta["leaves"]
    if parts:
      saved = {n: {p: k for p, k in saved[n].items() if p in wanted.get(n, ())} for n in saved}
    _check_leaves(self.directory / str(step), saved, wanted)
    abstract = {}
    for name, tree in wanted.items():
      if sized := {path: _abstract(leaf) for path, leaf in tree.items() if leaf.size}:
        abstract[name] = sized
    restored: Mapping[str, Any] = {}
    if parts:
      restored = {n: _read_parts(self.directory / str(step) / n, abstract[n]) for n in abstract}
    elif abstract:
      args = {name: ocp.args.StandardRestore(abstract[name]) for name in abstract}
      restored = manager.restore(step, args=ocp.args.Composite(**args))
    items = {}
    for name, tree in wanted.items():
      items[name] = {
        path: _like(restored[name].pop(path), leaf) if leaf.size else _empty(leaf)
        for path, leaf in tree.items()
      }
      # Not a mismatch of this run's config, which `_check_leaves` names, but of the stored arrays.
      for path, leaf in tree.items():
        if _kind(items[name][path]) != _kind(leaf):
          raise ValueError(f"item {name!r}, leaf {path!r} was read as {_kind(items[name][path])}")
    return items, meta["user"]


def _read_parts(folder: pathlib.Path, abstract: dict[str, Any]) -> dict[str, Any]:
  """Reads some leaves of an item; a checkpoint manager reads all of them."""
  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  with ocp.PyTreeCheckpointer() as reader:
    args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
    return reader.restore(folder, args=args)


def _flatten(name: str, tree: PyTree) -> dict[str, Any]:
  """Returns path -> leaf, so that what is stored depends on no container type."""
  flat = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    key = jax.tree_util.keystr(path, simple=True, separator="/") or "value"
    where = f"item {name!r}, leaf {key!r}"
    if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
      raise TypeError(f"{where} is a {type(leaf).__name__}, not an array")
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      raise TypeError(f"{where} is a typed PRNG key; save jax.random.key_data of it")
    if key in flat:
      raise ValueError(f"{where}: two leaves have this path")
    flat[key] = leaf
  return flat


def _unflatten(like: PyTree, flat: Mapping[str, Any]) -> PyTree:
  return jax.tree.unflatten(jax.tree.structure(like), list(flat.values()))


def _kind(leaf: Any) -> str:
  return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


@jax.jit
def _all_finite_on_devices(leaves: Sequence[jax.Array]) -> list[jax.Array]:
  return [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]


def _all_finite(leaves: Sequence[Any]) -> list[Any]:
  """Returns a bool per leaf, True if it is finite. All leaves are on the same devices."""
  first = leaves[0]
  if not isinstance(first, jax.Array) or (
    first.is_fully_addressable and {device.platform for device in first.devices()} == {"cpu"}
  ):
    # Nothing to compile, which takes a second where there are many leaves.
    return [np.all(np.isfinite(np.asarray(leaf))) for leaf in leaves]
  return jax.device_get(_all_finite_on_devices(leaves))


def _check_finite(flat: Mapping[str, Mapping[str, Any]]) -> None:
  # One program for all leaves on the same devices: many small ones with a collective each, in
  # flight at once, can wait for each other for ever on CPUs. Items may live on different devices.
  groups: dict[Any, dict[str, Any]] = {}
  for name, tree in flat.items():
    for path, leaf in tree.items():
      if jnp.issubdtype(leaf.dtype, jnp.inexact):
        devices = leaf.sharding.device_set if isinstance(leaf, jax.Array) else ()
        groups.setdefault(frozenset(devices), {})[f"item {name!r}, leaf {path!r}"] = leaf
  finite: dict[str, Any] = {}
  for group in groups.values():
    finite |= dict(zip(group, _all_finite(list(group.values())), strict=True))
  if bad := [where for where, ok in finite.items() if not ok]:
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    raise NonFiniteError(f"NaN or infinity in {'; '.join(bad[:3])}{more}: not saved")


def _check_leaves(
  where: pathlib.Path,
  saved: Mapping[str, Mapping[str, str]],
  wanted: Mapping[str, Mapping[str, Any]],
) -> None:
  lines = []
  for name, tree in wanted.items():
    if name not in saved:
      lines.append(f"item {name!r} missing; saved are {sorted(saved)}")
      continue
    for path in [*tree, *(p for p in saved[name] if p not in tree)]:
      expected = _kind(tree[path]) if path in tree else "nothing"
      actual = saved[name].get(path, "missing")
      if actual != expected:
        lines.append(f"item {name!r}, leaf {path!r}: saved {actual}, expected {expected}")
  if lines:
    shown = lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else [])
    raise CheckpointError(
      f"{where} does not fit this run; use the flags it was written with, or another --workdir\n  "
      + "\n  ".join(shown)
    )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _like(restored: jax.Array, leaf: Any) -> jax.Array:
  # Orbax pins every array to its devices. A scalar that was free to follow the other arguments of
  # a jitted step must stay so, or the step fails on a mesh that this device is not all of.
  if isinstance(leaf, jax.Array) and not leaf.committed:
    return jnp.asarray(np.asarray(restored))
  return restored


def _empty(leaf: Any) -> jax.Array:
  abstract = _abstract(leaf)
  return jax.device_put(np.zeros(abstract.shape, abstract.dtype), abstract.sharding)


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
  return {
    path.relative_to(directory).as_posix(): path
    for path in sorted(directory.rglob("*"))
    if path.is_file()
  }


def _require_contents(folder: pathlib.Path, contents: Mapping[str, Sequence[str]]) -> None:
  """Refuses a step in which a reader would not find every leaf of every item.

  Args:
    folder: Folder of the step.
    contents: Item name -> names of its leaves.
  """
  json.loads((folder / _META / "metadata").read_text(encoding="utf-8"))
  for name, leaves in contents.items():
    if leaves:
      base = {"driver": "file", "path": f"{folder / name}/"}
      store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
      stored = {key.decode() for key in store.list().result()}
      # Of the second and the third version of the format.
      heads = [(f"{leaf}/.zarray", f"{leaf}/zarr.json") for leaf in leaves]
      if lost := [leaf for leaf, head in zip(leaves, heads, strict=True) if not stored & {*head}]:
        raise OSError(f"item {name!r} was written without leaf {lost[0]!r}")


def best_step(directory: str | os.PathLike[str], name: str = "") -> int | None:
  """Returns the step with the highest score, the newest of equal ones; None without scores.

  Args:
    directory: Folder of the steps.
    name: Name of the score; empty takes that of the newest step that has one.
  """
  scores: dict[int, tuple[str, float]] = {}
  for path in pathlib.Path(directory).glob(f"*{_DIGEST_SUFFIX}"):
    # What is damaged here is found when the step is read.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
      manifest = json.loads(path.read_text(encoding="utf-8"))
      ((found, score),) = manifest["score"].items()
      if path.with_name(str(manifest["step"])).is_dir():
        scores[int(manifest["step"])] = str(found), float(score)
  if not scores:
    return None
  name = name or scores[max(scores)][0]
  of_name = [(score, step) for step, (found, score) in scores.items() if found == name]
  return max(of_name)[1] if of_name else None


def remove(directory: str | os.PathLike[str]) -> None:
  """Deletes all steps of a directory, with the record of them beside it."""
  shutil.rmtree(directory, ignore_errors=True)
  _record_path(pathlib.Path(directory)).unlink(missing_ok=True)


def _record_path(directory: pathlib.Path) -> pathlib.Path:
  return directory.with_name(f"{directory.name}.json")


def _damage(directory: pathlib.Path, digest_path: pathlib.Path, step: int, run: str) -> str:
  """Returns why the files of a step cannot be trusted; empty if they can."""
  if not directory.is_dir():
    return f"folder {directory.name}/ missing"
  if not digest_path.exists():
    return f"{digest_path.name} missing"
  try:
    manifest = json.loads(digest_path.read_text(encoding="utf-8"))
    files = manifest["files"]
    if manifest["step"] != step:
      return f"it was saved as step {manifest['step']}"
    if manifest["run"] != run:
      return "it belongs to another run"
    if more := sorted(_files(directory).keys() - files.keys()):
      return f"{more[0]} is not in {digest_path.name}"
    for name, (size, _) in files.items():
      path = directory / name
      if not path.is_file():
        return f"{name} missing"
      if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes, {size} were written"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      digests = pool.map(lambda name: workdir_lib.file_digest(directory / name), files)
      for (name, (_, digest)), now in zip(files.items(), digests, strict=True):
        if now != digest:
          return f"{name} has changed since it was written (SHA-256 differs)"
  except OSError as error:
    return f"cannot be read: {error}"
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    return f"{digest_path.name} is not a digest manifest: {_first_line(error)}"
  return ""


def _first_line(error: BaseException) -> str:
  return f"{type(error).__name__}: {error}".splitlines()[0][:300]
