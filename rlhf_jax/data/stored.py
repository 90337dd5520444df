"""Tokenised data sets in a file, which a later start maps into memory instead of reading the rows.

The name of the file is the digest of all that the tokens depend on: the contents of the data
files, the settings, the tokenizer, and the code that reads rows. The file ends in the digest of its
own content, so that one that is damaged or half written is never used. It appears at once, and
several processes may write the same one. It holds numbers and JSON, and nothing that can run.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from rlhf_jax import workdir
from rlhf_jax.data.kinds import Arrays, Dataset, Share
from rlhf_jax.data.tokenizer import Tokenizer

_MAGIC = b"rlhf_jax tokens: "
_ALIGNMENT = 64  # Bytes; the first line has so many, and the size of the header behind it.
_DIGEST_BYTES = 32
_LIBRARIES = (
  "array_record",
  "jinja2",
  "pyarrow",
  "tensorflow-datasets",
  "tokenizers",
  "transformers",
)


class Stored(NamedTuple):
  """Result of reading rows.

  Attributes:
    train: Training set.
    heldout: Held-out set.
    notices: Lines about the rows, for the log.
  """

  train: Dataset
  heldout: Dataset
  notices: list[str]


def key(
  kind: str,
  config: Any,
  paths: Sequence[pathlib.Path],
  tokenizer: Tokenizer,
  checks: Sequence[str],
) -> str:
  """Returns the digest of all that the tokens depend on; empty if there is no file to read.

  Args:
    kind: Kind of the rows.
    config: Dataclass of the sources and limits.
    paths: Files of the rows.
    tokenizer: Tokenizer of the rows.
    checks: Names of the further checks of the rows.
  """
  if not paths or not all(path.is_file() for path in paths):
    return ""  # Whoever reads them says what is wrong.
  code = sorted(pathlib.Path(__file__).parent.glob("*.py"))
  parts = [
    kind,
    dataclasses.asdict(config),
    workdir.files_digest(paths),
    workdir.files_digest(code),
    tokenizer.digest,
    tokenizer.further_stop_ids,
    tokenizer.hf.special_tokens_map,
    [*checks],
    platform.python_version(),
    [_version(name) for name in _LIBRARIES],
  ]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _version(name: str) -> str:
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return importlib.metadata.version(name)
  return ""


def read(path: pathlib.Path) -> Stored | None:
  """Maps a file into memory; returns None if there is none, or if it is damaged."""
  try:
    return _read(path)
  except FileNotFoundError:
    return None
  except _UNUSABLE as error:
    logging.warning("%s: not usable (%s); the rows are tokenised again", path, error)
    return None


# Of a file that is no file of tokens, or that another program wrote.
_UNUSABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)


def _read(path: pathlib.Path) -> Stored:
  header, arrays = _open(path)
  train, heldout, *named = [
    _dataset(about, {name: arrays[f"{i}.{name}"] for name in _ARRAYS})
    for i, about in enumerate(header["sets"])
  ]
  heldout = heldout._replace(named=dict(zip(header["named"], named, strict=True)))
  return Stored(train, heldout, header["notices"])


def write(path: pathlib.Path, stored: Stored) -> bool:
  """Writes a file; returns whether it is there. A folder without room or rights is no error."""
  sets = [stored.train, stored.heldout, *stored.heldout.named.values()]
  arrays: dict[str, np.ndarray] = {}
  abouts = []
  try:
    for i, dataset in enumerate(sets):
      about, of_set = _parts(dataset)
      abouts.append(about)
      arrays |= {f"{i}.{name}": array for name, array in of_set.items()}
    header = {"sets": abouts, "named": [*stored.heldout.named], "notices": stored.notices}
    _save(path, header, arrays)
  except (OSError, TypeError, ValueError) as error:  # Of a disk, or of values that are not JSON.
    logging.warning("%s: tokens are not kept (%s)", path.parent, error)
    return False
  return True


class _Examples(Sequence[Arrays]):
  """Examples of a mapped file."""

  def __init__(self, layouts: Sequence[Sequence[tuple[str, str]]], arrays: Mapping[str, Any]):
    self._layouts = [[(name, np.dtype(dtype)) for name, dtype in layout] for layout in layouts]
    self._layout, self._first = arrays["layout"], arrays["first"]
    self._bounds, self._values = arrays["bounds"], arrays["values"]

  def __len__(self) -> int:
    return len(self._layout)

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return [self[i] for i in range(len(self))[index]]
    i = range(len(self))[index]
    columns, first = self._layouts[self._layout[i]], self._first[i]
    bounds = self._bounds[first : first + len(columns) + 1].tolist()
    return {
      name: self._values[start:stop].view(dtype)
      for (name, dtype), (start, stop) in zip(columns, itertools.pairwise(bounds), strict=True)
    }


class _Rows(Sequence[dict[str, Any]]):
  """Rows of a mapped file, each decoded when it is asked for."""

  def __init__(self, arrays: Mapping[str, Any]):
    self._row, self._bounds, self._text = arrays["row"], arrays["row_bounds"], arrays["text"]

  def __len__(self) -> int:
    return len(self._row)

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return [self[i] for i in range(len(self))[index]]
    row = self._row[range(len(self))[index]]
    start, stop = self._bounds[row : row + 2]
    return json.loads(self._text[start:stop].tobytes())


# Names of the arrays of a set -> dtype.
_ARRAYS = {
  "layout": "<i4",  # Layout of each example.
  "first": "<i8",  # Index of its first column among all columns.
  "bounds": "<i8",  # Bounds of the values of all columns.
  "values": "<i4",  # Token ids, and labels, bit by bit.
  "row": "<i8",  # Row of each example.
  "row_bounds": "<i8",  # Bounds of the text of all rows.
  "text": "|u1",  # Rows as JSON in UTF-8.
}


def _parts(dataset: Dataset) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns what a header says about a set, and the arrays of the set."""
  layouts: dict[tuple[tuple[str, str], ...], int] = {}
  layout, counts, values = [], [], []
  for example in dataset.examples:
    columns = tuple((name, array.dtype.str) for name, array in example.items())
    layout.append(layouts.setdefault(columns, len(layouts)))
    counts.append(len(columns))
    values += [array.view(np.int32) for array in example.values()]
  numbers: dict[int, int] = {}  # The examples of a row share it.
  texts = []
  for row in dataset.rows:
    if id(row) not in numbers:
      numbers[id(row)] = len(texts)
      texts.append(json.dumps(row, ensure_ascii=False).encode())
  arrays = {
    "layout": layout,
    "first": _bounds(counts)[:-1],
    "bounds": _bounds([len(array) for array in values]),
    "values": np.concatenate(values) if values else [],
    "row": [numbers[id(row)] for row in dataset.rows],
    "row_bounds": _bounds([len(text) for text in texts]),
    "text": np.frombuffer(b"".join(texts), np.uint8),
  }
  about = dataset._asdict() | {"layouts": [*layouts]}
  for name in ("examples", "rows", "named"):
    del about[name]
  return about, {name: np.asarray(arrays[name], dtype) for name, dtype in _ARRAYS.items()}


def _bounds(lengths: Sequence[int]) -> np.ndarray:
  return np.cumsum([0, *lengths], dtype=np.int64)


def _dataset(about: dict[str, Any], arrays: Mapping[str, Any]) -> Dataset:
  """Returns a set of a mapped file."""
  layouts = about.pop("layouts")
  about |= {name: tuple(about[name]) for name in ("unread", "ignored", "checked", "columns")}
  about["mixture"] = tuple(Share(*share) for share in about["mixture"])
  return Dataset(examples=_Examples(layouts, arrays), rows=_Rows(arrays), **about)


def _save(path: pathlib.Path, header: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
  """Writes header and arrays, unless another process has done so meanwhile."""
  path.parent.mkdir(parents=True, exist_ok=True)
  header["arrays"] = {name: [array.dtype.str, len(array)] for name, array in arrays.items()}
  about = json.dumps(header).encode()
  about += b" " * (-len(about) % _ALIGNMENT)
  start = b"%s%*d\n%s" % (_MAGIC, _ALIGNMENT - len(_MAGIC) - 1, len(about), about)
  digest = hashlib.sha256()
  prefix = f".{path.stem[:8]}."
  with tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, delete=False) as file:
    temporary = pathlib.Path(file.name)
    try:
      for part in (memoryview(start), *(array.data for array in arrays.values())):
        for piece in (part, bytes(-part.nbytes % _ALIGNMENT)):
          file.write(piece)
          digest.update(piece)
      file.write(digest.digest())
      file.flush()
      workdir.follow_umask(temporary)
      try:  # One that others have mapped stays: on a network file system its pages would be gone.
        _read(path)
      except _UNUSABLE:
        os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)


def _open(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Maps the header and the arrays of a file.

  Raises:
    ValueError: It is damaged.
  """
  # A plain view: each slice of a memmap would be an object with attributes of its own.
  content: Any = np.asarray(np.memmap(path, np.uint8, "r"))
  body, ending = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
  if hashlib.sha256(body).digest() != ending.tobytes() or body[: len(_MAGIC)].tobytes() != _MAGIC:
    raise ValueError("damaged or cut off")
  place = _ALIGNMENT + int(body[len(_MAGIC) : _ALIGNMENT].tobytes())
  header = json.loads(body[_ALIGNMENT:place].tobytes())
  arrays = {}
  for name, (dtype, count) in header["arrays"].items():
    size = np.dtype(dtype).itemsize * count
    arrays[name] = body[place : place + size].view(dtype)
    place += size + -size % _ALIGNMENT
  return header, arrays
