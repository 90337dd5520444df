"""Files of rows: JSON Lines, JSON, CSV and Parquet, compressed or not.

The content of a file says what it is; only the two formats of plain columns go by their suffix. A
file that holds something else is refused by its name, with the way to convert it.
"""

import bz2
import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import lzma
import math
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple

from rlhf_jax import bucket, hub, workdir
from rlhf_jax.data import sources
from rlhf_jax.data.sources import DataError, OnBadRow, Row, raise_error

# A JSON array is decoded as a whole.
MAX_ARRAY_BYTES = 2 * 2**30

_COMPRESSED: dict[bytes, Callable[..., Any]] = {
  b"\x1f\x8b": gzip.open,
  b"BZh": bz2.open,
  b"\xfd7zXZ\x00": lzma.open,
}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Columns of a table that hold numbers, true or false; all others hold texts.
_JUDGEMENTS = (
  *("label", "labels", "score", "helpfulness", "preference_strength", "choice"),
  *("score_0", "score_1", "better_response_id", "correct"),
  *("score_chosen", "score_rejected", "chosen_score", "rejected_score"),
  *("chosen_rating", "rejected_rating", "chosen-rating", "rejected-rating"),
)
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")
_TAR = slice(257, 262)  # Place of b"ustar" in an archive.
# First bytes -> name and fix.
_OTHER = {
  b"\x28\xb5\x2f\xfd": ("a zstd archive", "unpack it with `zstd -d`"),
  b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or save it as CSV"),
  b"\xd0\xcf\x11\xe0": ("an Office document", "save it as CSV"),
  b"SQLite format 3": ("an SQLite database", "export the table as CSV"),
  b"ARROW1": ("an Arrow file", "save it with `datasets.Dataset.to_json` or as Parquet"),
  b"\xff\xff\xff\xff": ("an Arrow stream", "save it with `datasets.Dataset.to_json` or as Parquet"),
  b"\x89HDF": ("an HDF5 file", "save it as JSON Lines"),
  b"\x93NUMPY": ("a NumPy array", "save it as JSON Lines"),
  b"\x80": ("a pickle, which may hold code", "save it as JSON Lines"),
  b"%PDF": ("a PDF document", "save its text as JSON Lines"),
  b"version https://git-lfs": ("a pointer of Git LFS, not the data", "run `git lfs pull`"),
  b"<": ("a web page or XML", "download the file itself"),
}
_LONGEST_MAGIC = 512
_WEIGHTED = re.compile(r"(?P<name>.+):(?P<weight>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|nan|-?inf)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Source(NamedTuple):
  """Files that are read one after the other.

  Attributes:
    name: Text that names them.
    paths: Paths of the files.
    weight: Weight of their rows among those of other sources; None without weights.
  """

  name: str
  paths: list[str]
  weight: float | None = None


def sources_of(spec: str) -> list[Source]:
  """Returns the sources that a path, a glob or a list of them, separated by commas, names.

  Each part of a list may end in a weight, as in `a.jsonl:0.7,b.parquet:0.3`; it is then a source of
  its own. Files without weights are one source.

  Raises:
    DataError: A glob matches nothing, a name is empty, or a weight is not a positive number.
  """
  names = [spec] if os.path.exists(os.path.expanduser(spec)) else spec.split(",")
  parts = [_weighted(name.strip()) for name in names]
  weighted = [weight is not None for _, weight in parts]
  if any(weighted) and not all(weighted):
    plain = next(name for name, weight in parts if weight is None)
    raise DataError(f"{spec}: {plain} has no weight and another file has one; give all of them one")
  found = [Source(name, _matches(name, spec), weight) for name, weight in parts]
  if any(weighted):
    return found
  return [Source(spec, [path for source in found for path in source.paths])]


def _weighted(name: str) -> tuple[str, float | None]:
  """Splits NAME:WEIGHT; the weight is None if there is none."""
  match = _WEIGHTED.fullmatch(name)
  if not match or os.path.exists(os.path.expanduser(name)):
    return name, None
  weight = float(match["weight"])
  if not 0 < weight < math.inf:
    raise DataError(f"{name}: the weight must be a positive number, got {match['weight']}")
  return match["name"], weight


def _matches(name: str, spec: str) -> list[str]:
  """Returns the files that a path or a glob names."""
  path = os.path.expanduser(name)
  if not path:
    raise DataError(
      f"{spec!r}: the name of a file is empty; write names with one comma between them, in"
      " data.path and data.eval_path"
    )
  if hub.is_name(path):
    return hub.data_files(path)
  if bucket.is_address(path):
    if not (copied := bucket.pull_file(path)).exists():
      raise DataError(f"{name}: the bucket has no such object; check data.path and data.eval_path")
    return [str(copied)]
  if os.path.exists(path) or not glob.has_magic(path):
    return [path]
  matches = sorted(glob.glob(path, recursive=True))
  if not matches:
    raise DataError(f"{name}: no file matches; check data.path and data.eval_path")
  return matches


def paths_of(spec: str) -> list[str]:
  """Returns the files of all `sources_of` a text."""
  return [path for source in sources_of(spec) for path in source.paths]


def read_file(
  path: str | os.PathLike[str],
  on_bad_row: OnBadRow = raise_error,
  limit: int = 0,
  ignore: Sequence[str] = (),
) -> Iterator[Row]:
  """Reads the rows of one or more files.

  Args:
    path: A file, a glob, or several of them separated by commas, with weights or without.
    on_bad_row: Function called for every row that is not an object of clean text.
    limit: Maximum number of rows of each source; 0 reads all.
    ignore: Columns of Parquet that may hold what is not text; see `sources.plain_row`.

  Yields:
    The rows in order.

  Raises:
    DataError: If a file cannot be read, or from `on_bad_row`.
  """
  for i, source in enumerate(sources_of(os.fspath(path))):
    rows = itertools.chain.from_iterable(_read(name, on_bad_row, ignore) for name in source.paths)
    for row in itertools.islice(rows, limit or None):
      yield row._replace(source=i) if i else row


def _read(name: str, on_bad_row: OnBadRow, ignore: Sequence[str]) -> Iterator[Row]:
  with contextlib.ExitStack() as stack:
    file, start = _open(name, stack)
    found = _format_of(name, start)
    if found == "Parquet":
      yield from _read_parquet(file, name, on_bad_row, ignore)
    else:
      yield from _READERS[found](file, name, on_bad_row)


def _open(name: str, stack: contextlib.ExitStack) -> tuple[IO[bytes], bytes]:
  """Opens a file, unpacks it, and returns it with its first bytes, which are still to be read."""
  kind = workdir.kind_of(name)
  if kind and kind != "a folder":
    raise DataError(f"{name}: {kind}, which cannot be read twice; write its content to a file")
  try:
    file: Any = stack.enter_context(open(name, "rb"))  # noqa: SIM115
  except OSError as error:
    raise DataError(f"{name}: cannot be read ({error.strerror}); {_advice(name)}") from error
  try:
    start = file.peek(_LONGEST_MAGIC)
    unpack = next(
      (function for magic, function in _COMPRESSED.items() if start.startswith(magic)), None
    )
    if unpack:
      file = io.BufferedReader(_Unpacked(stack.enter_context(unpack(file)), name))
      start = file.peek(_LONGEST_MAGIC)
  except OSError as error:
    raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error
  return file, start.removeprefix(sources.BYTE_ORDER_MARK).lstrip()[:_LONGEST_MAGIC]


class _Unpacked(io.RawIOBase):
  """Stream of a compressed file whose errors name the file."""

  def __init__(self, file: IO[bytes], name: str):
    self._file, self._name = file, name

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    try:
      content = self._file.read(len(buffer))
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
      raise DataError(
        f"{self._name}: broken or cut off where it is unpacked ({error}); copy it again"
      ) from error
    buffer[: len(content)] = content
    return len(content)


def _advice(name: str) -> str:
  if os.path.isdir(name):
    inside = sorted(p.name for p in pathlib.Path(name).iterdir() if not p.name.startswith("."))
    return f"give a file in it, such as {inside[0]}" if inside else "the folder is empty"
  if "://" in name:
    return (
      "an address is not looked up, but for hf://datasets/ORG/NAME/FILE: download the file first"
    )
  if _HUB_NAME.fullmatch(name) and not os.path.exists(os.path.dirname(name)):
    return (
      f"write hf://datasets/{name}/FILE for a file of a hub, or download the files first, with"
      f" `hf download --repo-type dataset {name}`"
    )
  return "check data.path and data.eval_path"


def _format_of(name: str, start: bytes) -> str:
  """Returns "Parquet" or the key in `_READERS` of a file by its first bytes and its name.

  Raises:
    DataError: There is no reader.
  """
  if start.startswith(b"PAR1"):
    return "Parquet"
  if start.startswith(tuple(_COMPRESSED)):
    raise DataError(f"{name}: packed twice; unpack it once")
  if start[_TAR] == b"ustar":
    raise DataError(f"{name}: a tar archive; unpack it with `tar -xf`")
  for magic, (kind, fix) in _OTHER.items():
    if start.startswith(magic):
      raise DataError(f"{name}: {kind}; {fix}")
  if re.match(rb"\{\s*\n", start):
    raise DataError(f"{name}: a JSON object over several lines; put each on one, as `jq -c .` does")
  if start.startswith(b"["):
    return "JSON"
  if not start.startswith(b"{") and _delimiter(name):
    return "columns"
  return "JSON Lines"


def _delimiter(name: str) -> str | None:
  suffixes = [suffix.lower() for suffix in pathlib.PurePath(name).suffixes[-2:]]
  return next((_DELIMITERS[suffix] for suffix in suffixes if suffix in _DELIMITERS), None)


def _read_array(file: IO[bytes], name: str, on_bad_row: OnBadRow) -> Iterator[Row]:
  """Reads a JSON array of objects."""
  content = file.read(MAX_ARRAY_BYTES + 1)
  if len(content) > MAX_ARRAY_BYTES:
    raise DataError(f"{name}: a JSON array of more than {MAX_ARRAY_BYTES} bytes; {_TO_LINES}")
  text = _decoded(content.removeprefix(sources.BYTE_ORDER_MARK), name)
  if "\0" in text:
    raise DataError(f"{name}: byte {content.index(0) + 1}: a NUL byte; remove it")
  try:
    rows = sources.load_json(text)
  except json.JSONDecodeError as error:
    if error.msg == "Extra data":  # Lines that are lists.
      yield from sources.read_jsonl(io.BytesIO(content), name, on_bad_row)
      return
    raise DataError(
      f"{name}:{error.lineno}: column {error.colno}: malformed JSON ({error.msg}); {_TO_LINES}"
    ) from error
  except RecursionError as error:
    raise DataError(f"{name}: nested too deeply") from error
  except ValueError as error:
    raise DataError(f"{name}: malformed JSON ({error})") from error
  for i, value in enumerate(rows):
    try:
      yield sources.as_row(value, f"{name}[{i}]")
    except DataError as error:
      on_bad_row(error)


def _read_columns(file: IO[bytes], name: str, on_bad_row: OnBadRow) -> Iterator[Row]:
  """Reads CSV or TSV with a header; all values but judgements are texts."""
  lines = (
    _decoded(line, f"{name}:{i + 1}").removeprefix("" if i else "\ufeff")
    for i, line in enumerate(file)
  )
  limit = csv.field_size_limit(sources.MAX_LINE_BYTES)
  reader = csv.reader(lines, delimiter=_delimiter(name) or ",", strict=True)
  header: list[str] | None = None
  try:
    while (values := _next_line(reader, name)) is not None:
      where = f"{name}:{reader.line_num}"
      if header is None:
        header = [column.strip() for column in values]
        if len(set(header)) < len(header) or not all(header):
          raise DataError(f"{where}: the header {header} has a name twice or an empty one; fix it")
        continue
      if not values:
        continue
      try:
        if len(values) != len(header):
          raise DataError(
            f"{where}: {len(values)} values for {len(header)} columns; quote texts with"
            f" delimiters, or save the file as JSON Lines"
          )
        fields = {key: _cell(key, cell) for key, cell in zip(header, values, strict=True)}
        yield sources.as_row(fields, where)
      except DataError as error:
        on_bad_row(error)
  finally:
    csv.field_size_limit(limit)


def _cell(column: str, text: str) -> Any:
  """Returns the value of a cell; a judgement is a number, true or false, or else null."""
  if column not in _JUDGEMENTS:
    return text
  word = text.strip().lower()
  if _NUMBER.fullmatch(word):
    return float(word) if set(word) & set(".e") else int(word)
  return {"true": True, "false": False, "": None}.get(word, text)


def _next_line(reader: Any, name: str) -> list[str] | None:
  try:
    return next(reader, None)
  except csv.Error as error:
    raise DataError(f"{name}:{reader.line_num}: not CSV ({error}); {_TO_LINES}") from error


def _read_parquet(
  file: IO[bytes], name: str, on_bad_row: OnBadRow, ignore: Sequence[str]
) -> Iterator[Row]:
  """Reads the rows of a Parquet file."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise DataError(
      f"{name}: Parquet needs pyarrow: pip install pyarrow, or {_TO_LINES}"
    ) from error
  try:
    table = pyarrow.parquet.ParquetFile(file)
    number = 0
    for batch in table.iter_batches(batch_size=1024):
      for fields in batch.to_pylist():
        where = f"{name}[{number}]"
        number += 1
        try:
          yield sources.plain_row(fields, where, ignore)
        except DataError as error:
          on_bad_row(error)
  except (pyarrow.ArrowException, OSError) as error:
    raise DataError(f"{name}: not a readable Parquet file ({error}); copy it again") from error


def _decoded(content: bytes, where: str) -> str:
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise DataError(
      f"{where}: byte {error.start + 1}: not UTF-8 (0x{content[error.start]:02x}); save the file as"
      " UTF-8"
    ) from error


_TO_LINES = "save it as JSON Lines, one object per line"
_READERS: dict[str, Callable[[IO[bytes], str, OnBadRow], Iterator[Row]]] = {
  "JSON Lines": sources.read_jsonl,
  "JSON": _read_array,
  "columns": _read_columns,
}
