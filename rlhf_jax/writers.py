"""Writers of scalars and tables: files in the workdir always, dashboards on request.

A line of `metrics.jsonl` is one object, `{"step": 120, "loss": 0.53, ...}`. The lines stay in step
order across kills and resumes, and each is on disk before the next step is logged, so sweeps,
plots and people may read the file while it grows. It is strict JSON: NaN and the infinities, which
JSON lacks, are the strings "NaN", "Infinity" and "-Infinity", which `float()` of any value undoes.

A table, such as the sampled responses, is `NAME/step_00000100.jsonl`, one object a row.
"""

import errno
import hashlib
import html
import importlib.util
import json
import math
import operator
import os
import pathlib
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging
from etils import epath

from rlhf_jax import bucket, processes
from rlhf_jax import workdir as workdir_lib

_FLUSH_SECONDS = 10.0  # A flush of the events waits for the disk.
# Rows of a table that dashboards get; the file has all.
_SHOWN_ROWS = 32

Rows = Sequence[Mapping[str, Any]]


class MetricWriter(Protocol):
  """A sink of scalars and tables."""

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Records `scalars` (host floats, or arrays of one element) as of `step`."""
    ...

  def table(self, step: int, name: str, rows: Rows) -> None:
    """Records rows of texts and numbers, a column per key, as of `step`."""
    ...

  def close(self) -> None:
    """Flushes and releases everything; `write` must not be called afterwards."""
    ...


def json_number(value: Any) -> int | float | str:
  """Converts a scalar to strict JSON: an int, a finite float, or the name of a non-finite one.

  Args:
    value: Number, or numpy or jax array with one element.

  Raises:
    TypeError: If `value` is not a scalar number.
  """
  if isinstance(value, int) and not isinstance(value, bool):
    return value
  if isinstance(value, str):
    raise TypeError(f"expected a number, got the string {value!r}")
  number = float(value)
  if math.isfinite(number):
    return number
  return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")


def json_ready(value: Any, *, digits: int | None = None) -> Any:
  """Strict JSON: keys as text, arrays as lists, floats in `digits` digits, NaN as a string."""
  if isinstance(value, Mapping):
    return {str(k): json_ready(v, digits=digits) for k, v in value.items()}
  if value is None or isinstance(value, (str, bool, int)):
    return value
  if isinstance(value, (list, tuple)) or getattr(value, "ndim", 0):
    return [json_ready(item, digits=digits) for item in value]
  if np.issubdtype(np.asarray(value).dtype, np.integer):
    return int(value)
  if np.asarray(value).dtype == np.bool_:
    return bool(value)
  number = float(value)
  return json_number(number if digits is None else float(f"{number:.{digits}g}"))


def write_table(workdir: epath.PathLike, step: int, name: str, rows: Rows) -> None:
  """Writes all rows to `WORKDIR/NAME/step_00000100.jsonl`, one object a line, atomically.

  Everything outside ASCII is escaped, so the file is safe to print on a terminal.
  """
  path = epath.Path(workdir) / name / f"step_{step:08d}.jsonl"
  lines = (json.dumps(json_ready(row), allow_nan=False) for row in rows)
  workdir_lib.atomic_write(path, "".join(line + "\n" for line in lines))


def _encode(step: int, scalars: Mapping[str, float]) -> str:
  if "step" in scalars:
    raise ValueError("a metric may not be called 'step': that is the first field of every line")
  row: dict[str, Any] = {"step": operator.index(step)}
  for name, value in scalars.items():
    try:
      row[name] = json_number(value)
    except (TypeError, ValueError) as error:
      raise TypeError(f"metric {name!r} must be one number: {error}") from error
  return json.dumps(row, allow_nan=False) + "\n"


def _decode(line: str) -> dict[str, Any]:
  """One row. Raises ValueError if `line` is not an object of numbers with an integer `step`."""
  row = json.loads(line)
  if not isinstance(row, dict) or type(row.get("step")) is not int:
    raise ValueError("not an object with an integer 'step'")
  try:
    return {k: v if isinstance(v, int) else float(v) for k, v in row.items()}
  except TypeError as error:
    raise ValueError(f"not a number: {error}") from error


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
  """Rows of a `metrics.jsonl` in file order, non-finite values as floats again.

  A last line without its newline is being written, or was torn by a kill, and is left out.

  Raises:
    FileNotFoundError: If there is no such file.
    ValueError: If another line is not a row; the message gives file and line.
  """
  rows = []
  lines = epath.Path(path).read_bytes().split(b"\n")[:-1]
  for number, line in enumerate(lines, start=1):
    try:
      rows.append(_decode(line.decode("utf-8")))
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{os.fspath(path)}:{number}: {error}") from error
  return rows


def _lines_until(path: epath.Path, resume_step: int | None) -> list[str]:
  """Lines that a run continued from `resume_step` keeps; unreadable ones are dropped, and logged.

  Reading them back is not worth refusing to train: a full disk leaves such a line.
  """
  if resume_step is None or not path.exists():
    return []
  kept = []
  *lines, torn = path.read_bytes().split(b"\n")
  if torn:
    logging.warning("%s: dropped a torn last line", os.fspath(path))
  for number, line in enumerate(lines, start=1):
    try:
      text = line.decode("utf-8")
      if _decode(text)["step"] <= resume_step:
        kept.append(text + "\n")
    except (ValueError, RecursionError) as error:
      logging.warning("%s:%d: dropped an unreadable line: %s", os.fspath(path), number, error)
  return kept


class JsonlWriter:
  """Appends one JSON object per logged step to a file.

  Every line is handed to the kernel at once, so a kill loses nothing. A copy in a bucket is made at
  most every 30 seconds.
  """

  def __init__(self, path: epath.PathLike, *, resume_step: int | None):
    """Opens `path`, rewritten atomically to hold just the steps that happened.

    Args:
      path: File to append to; its folder is created.
      resume_step: Step of the checkpoint the run continues from: later lines are dropped, for
        those steps will be taken and logged again. None starts the file anew.
    """
    self._path = epath.Path(path)
    kept = _lines_until(self._path, resume_step)
    workdir_lib.atomic_write(self._path, "".join(kept))
    # Unbuffered: one write call per line, so a concurrent reader never sees half of one.
    self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (`close` closes it)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Appends one line.

    Raises:
      TypeError: If a value is not one number.
      ValueError: If a metric is called `step`.
    """
    content = _encode(step, scalars).encode("utf-8")
    workdir_lib.require_lock(self._path)
    if self._file.write(content) < len(content):  # The disk had room for a part of it.
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(self._path))
    bucket.push_growing(pathlib.Path(self._path))

  def table(self, step: int, name: str, rows: Rows) -> None:
    """Writes a file in a folder beside; see `write_table`."""
    write_table(self._path.parent, step, name, rows)

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


class NullWriter:
  """Writer of processes other than the first; it writes nothing."""

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Does nothing."""

  def table(self, step: int, name: str, rows: Rows) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


def _grid(rows: Rows) -> tuple[list[str], list[list[Any]]]:
  """Columns and cells of the first rows; None where a row lacks a column, and for NaN.

  Dashboards want one type in a column.
  """
  rows = rows[:_SHOWN_ROWS]
  columns = list(dict.fromkeys(name for row in rows for name in row))

  def cell(value: Any) -> Any:
    ready = json_ready(value)
    return None if isinstance(ready, str) and not isinstance(value, str) else ready

  return columns, [[cell(row.get(name)) for name in columns] for row in rows]


def _markdown(columns: Sequence[str], cells: Sequence[Sequence[Any]]) -> str:
  """A table whose texts stay in their cells."""

  def line(row: Sequence[Any]) -> str:
    # An entity is no markup, and a line break would end the table.
    texts = ("" if x is None else html.escape(str(x)).replace("|", "&#124;") for x in row)
    return "| " + " | ".join(" ".join(text.split()) for text in texts) + " |"

  return "\n".join(map(line, (columns, ["---"] * len(columns), *cells)))


class TensorBoardWriter:
  """Event files under `WORKDIR/tensorboard`, through tensorboardX (no TensorFlow).

  Events are written by the caller: the thread of tensorboardX dies of a full disk, and whoever
  writes next waits for it for ever.
  """

  def __init__(
    self, workdir: epath.PathLike, *, run_name: str, resume_step: int | None, config: Mapping
  ):
    """Opens the folder; steps after `resume_step` disappear from the charts."""
    del run_name  # TensorBoard names a run by its folder.
    from tensorboardX import record_writer, summary
    from tensorboardX.proto import event_pb2

    folder = epath.Path(workdir) / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    self._summary, self._event = summary, event_pb2.Event
    name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
    self._records = record_writer.RecordWriter(os.fspath(folder / name))
    self._flushed = time.monotonic()
    self._add(0, file_version="brain.Event:2")
    if resume_step is not None:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._add(resume_step + 1, session_log=start)
    if config:
      self._text("config", _markdown(["flag", "value"], list(config.items())), 0)

  def _add(self, step: int, **content: Any) -> None:
    event = self._event(wall_time=time.time(), step=step, **content)
    self._records.write(event.SerializeToString())
    if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
      self._records.flush()
      self._flushed = time.monotonic()

  def _text(self, name: str, text: str, step: int) -> None:
    self._add(step, summary=self._summary.text(name, text))

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Adds one point to each chart."""
    for name, value in scalars.items():
      self._add(step, summary=self._summary.scalar(name, float(value)))

  def table(self, step: int, name: str, rows: Rows) -> None:
    """Adds the first rows to the texts."""
    self._text(name, _markdown(*_grid(rows)), step)

  def close(self) -> None:
    """Flushes the event file."""
    self._records.close()


class WandbWriter:
  """Weights & Biases. Project, entity and offline mode come from its `WANDB_*` variables."""

  def __init__(
    self, workdir: epath.PathLike, *, run_name: str, resume_step: int | None, config: Mapping
  ):
    """Starts the run, or continues the one that this workdir started before."""
    del resume_step  # The service keeps the first value of a step that is logged twice.
    import wandb

    # The same workdir is the same run, so a resumed job draws on in the same chart.
    where = bucket.address_of(workdir) or os.path.realpath(workdir)
    self._table = wandb.Table
    self._run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", "rlhf_jax"),
      name=run_name,
      id=hashlib.sha256(where.encode("utf-8")).hexdigest()[:16],
      resume="allow",  # Also anew: a job killed before its first checkpoint starts over.
      dir=os.fspath(workdir),
      config=dict(config),
    )

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Logs one row."""
    self._run.log({name: float(value) for name, value in scalars.items()}, step=step)

  def table(self, step: int, name: str, rows: Rows) -> None:
    """Logs the first rows."""
    columns, cells = _grid(rows)
    self._run.log({name: self._table(columns=columns, data=cells)}, step=step)

  def close(self) -> None:
    """Finishes the run and waits for the upload."""
    self._run.finish()


class TrackioWriter:
  """Trackio: a local SQLite dashboard (`trackio show`)."""

  def __init__(
    self, workdir: epath.PathLike, *, run_name: str, resume_step: int | None, config: Mapping
  ):
    """Starts the run, or continues the one of the same name."""
    del workdir, resume_step  # Trackio keeps its own database.
    import trackio

    self._table = trackio.Table
    self._run = trackio.init(
      project=os.environ.get("TRACKIO_PROJECT", "rlhf_jax"),
      name=run_name,
      resume="allow",
      config=dict(config),
    )

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Logs one row."""
    self._run.log({name: float(value) for name, value in scalars.items()}, step=step)

  def table(self, step: int, name: str, rows: Rows) -> None:
    """Logs the first rows."""
    columns, cells = _grid(rows)
    self._run.log({name: self._table(columns=columns, data=cells)}, step=step)

  def close(self) -> None:
    """Finishes the run."""
    self._run.finish()


def _line(error: Exception) -> str:
  return f"{type(error).__name__}: {error}".splitlines()[0][:200]


class CompositeWriter:
  """Writes to several writers: the first is the record, the others are conveniences.

  An error of the first propagates, and that of a disk without room. Another that fails (a dashboard
  that is down) is logged once and left out from then on: training does not stop for it.
  """

  def __init__(self, writers: Sequence[MetricWriter]):
    """Takes over `writers`; there must be at least one."""
    if not writers:
      raise ValueError("CompositeWriter needs at least one writer")
    self._record, *self._others = writers

  def _each(self, call) -> None:
    for writer in list(self._others):
      try:
        call(writer)
      except Exception as error:
        if workdir_lib.no_room(error):
          raise
        name = type(writer).__name__
        logging.warning("%s failed and is switched off: %s", name, _line(error))
        self._others.remove(writer)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes to each writer."""
    self._record.write(step, scalars)
    self._each(lambda writer: writer.write(step, scalars))

  def table(self, step: int, name: str, rows: Rows) -> None:
    """Hands the rows to each writer."""
    self._record.table(step, name, rows)
    self._each(lambda writer: writer.table(step, name, rows))

  def close(self) -> None:
    """Closes each writer, the record first."""
    self._record.close()
    self._each(lambda writer: writer.close())


TRACKERS = {"tensorboard": TensorBoardWriter, "wandb": WandbWriter, "trackio": TrackioWriter}
# Tracker -> the module that it needs, and the extra of this package that installs it.
_PACKAGES = {
  "tensorboard": ("tensorboardX", "track"),
  "wandb": ("wandb", "wandb"),
  "trackio": ("trackio", "trackio"),
}


def require_packages(trackers: Sequence[str]) -> None:
  """Refuses a tracker whose package is not installed.

  Raises:
    ValueError: A package is missing. The message names the flag and the command that installs it.
  """
  for name in trackers:
    module, extra = _PACKAGES.get(name, ("", ""))
    if module and importlib.util.find_spec(module) is None:
      raise ValueError(
        f"--trackers={name}: the package {module} is not installed; leave the tracker out, or"
        f" pip install 'rlhf_jax[{extra}]'"
      )


def make_writer(
  workdir: epath.PathLike,
  trackers: Sequence[str] = (),
  *,
  resume_step: int | None = None,
  run_name: str | None = None,
  config: Mapping[str, Any] | None = None,
) -> MetricWriter:
  """The writer of a run: `WORKDIR/metrics.jsonl`, and the named trackers.

  Args:
    workdir: The run's folder.
    trackers: Keys of `TRACKERS`.
    resume_step: See `JsonlWriter`.
    run_name: Name of the run in dashboards; by default the name of the folder.
    config: Settings of the run that dashboards show.

  Returns:
    A writer; on processes other than the first, one that does nothing. A tracker that cannot be
    opened (a service that is down) is logged and left out.

  Raises:
    ValueError: If a tracker is unknown.
  """
  if unknown := [name for name in trackers if name not in TRACKERS]:
    raise ValueError(f"unknown tracker {unknown[0]!r}: choose from {', '.join(sorted(TRACKERS))}")
  if not processes.is_first():
    return NullWriter()
  workdir = epath.Path(workdir)
  run_name = run_name or workdir.name or "run"
  writers: list[MetricWriter] = []
  for name in dict.fromkeys(trackers):
    try:
      writers.append(
        TRACKERS[name](workdir, run_name=run_name, resume_step=resume_step, config=config or {})
      )
    except Exception as error:
      if workdir_lib.no_room(error):
        raise
      logging.warning("the tracker %s cannot be opened and is left out: %s", name, _line(error))
  record = JsonlWriter(workdir / "metrics.jsonl", resume_step=resume_step)
  return CompositeWriter([record, *writers])


class RunWriter:
  """The writer of a run, which is opened once it is known from which step the run continues."""

  def __init__(self, workdir: epath.PathLike, trackers: Sequence[str] = ()):
    """Opens nothing yet; for the arguments see `make_writer`."""
    self._workdir, self._trackers = workdir, trackers
    self._writer: MetricWriter | None = None

  def open(self, *, resume_step: int | None, config: Mapping[str, Any]) -> None:
    """Opens the metrics and the trackers; see `make_writer`."""
    self.close()
    self._writer = make_writer(
      self._workdir, self._trackers, resume_step=resume_step, config=config
    )

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes to all of them."""
    if self._writer is None:
      raise ValueError("open the writer first: it has to know from which step the run continues")
    self._writer.write(step, scalars)

  def table(self, step: int, name: str, rows: Rows) -> None:
    """Hands rows to all of them; of a run that had already finished, only the file is written."""
    if self._writer is not None:
      self._writer.table(step, name, rows)
    elif processes.is_first():
      write_table(self._workdir, step, name, rows)

  def close(self) -> None:
    """Closes all of them."""
    writer, self._writer = self._writer, None
    if writer is not None:
      writer.close()
