"""Rows from JSON Lines, TFDS or the built-in task: plain dicts with their origin.

A source is strict: it refuses anything that it cannot read as text and names the file, line and
field. A row that is silently wrong costs more than a run that does not start.
"""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, Literal, NamedTuple

import numpy as np

MAX_LINE_BYTES = 8 * 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# NAME, NAME/CONFIG, either with a :VERSION, either with a :SPLIT such as train[:10%].
_TFDS_SPEC = re.compile(
  r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?(:\d+\.\d+\.\d+)?)"
  r"(:(?P<split>[A-Za-z_]\S*))?"
)
_UNPAIRED_SURROGATE = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
  """Data that cannot be used. The message is "where: field: problem; fix"."""

  exit_code = os.EX_DATAERR


class Row(NamedTuple):
  """One row.

  Attributes:
    where: Origin of the row for messages, such as "pairs.jsonl:12".
    fields: Column name -> value: text, numbers, lists and dicts.
    source: Index of its source among those that are mixed by weights.
  """

  where: str
  fields: dict[str, Any]
  source: int = 0

  def without(self, columns: Sequence[str]) -> "Row":
    """Returns the row without columns that are to be ignored."""
    return self._replace(fields={n: value for n, value in self.fields.items() if n not in columns})


# Called with the error of a bad row: raises it, or returns to skip the row.
OnBadRow = Callable[[DataError], None]


def raise_error(error: DataError) -> None:
  """The strict `OnBadRow`."""
  raise error


def read_jsonl(file: IO[bytes], name: str, on_bad_row: OnBadRow = raise_error) -> Iterator[Row]:
  """Reads JSON Lines: UTF-8, one object per line, blank lines ignored.

  Args:
    file: The open file.
    name: Name of the file, for messages.
    on_bad_row: Function called for every line that is not an object of clean text.

  Yields:
    The rows in order.

  Raises:
    DataError: From `on_bad_row`.
  """
  number = 0
  # Lines are cut at "\n" bytes only: str.splitlines would also cut at U+2028 inside a text.
  while line := file.readline(MAX_LINE_BYTES + 1):
    number += 1
    where = f"{name}:{number}"
    too_long = len(line) > MAX_LINE_BYTES
    while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
      line = file.readline(MAX_LINE_BYTES + 1)
    try:
      if too_long:
        raise DataError(
          f"{where}: the line is longer than {MAX_LINE_BYTES} bytes; "
          "put one JSON object on each line"
        )
      if number == 1:
        line = line.removeprefix(BYTE_ORDER_MARK)
      if line.strip():
        yield Row(where, _parse_line(line, where))
    except DataError as error:
      on_bad_row(error)


def as_row(value: Any, where: str) -> Row:
  """Returns a decoded JSON value as a row, if it is an object of clean text.

  Raises:
    DataError: It is not.
  """
  if not isinstance(value, dict):
    raise DataError(
      f"{where}: expected a JSON object such as "
      f'{{"prompt": "..."}}, found {_json_type(value)}; put one object on each line'
    )
  for key, item in value.items():
    check_text(item, where, key)
  return Row(where, value)


def read_tfds(
  spec: str, data_dir: str = "", on_bad_row: OnBadRow = raise_error, ignore: Sequence[str] = ()
) -> Iterator[Row]:
  """Reads a prepared TFDS data set stored as ArrayRecord; TensorFlow is not needed.

  Args:
    spec: `NAME[/CONFIG][:VERSION][:SPLIT]`; the default split is "train".
    data_dir: Folder with the prepared data set; "" is the TFDS default.
    on_bad_row: Function called for every row whose text is not clean.
    ignore: Columns that may hold what is not text; see `plain_row`.

  Yields:
    The rows in stored order, with bytes decoded to text and arrays turned into lists.

  Raises:
    DataError: If the name is malformed or the data set is not there, or from `on_bad_row`.
  """
  name, split = parse_tfds(spec)
  with _of_tfds(name, split, data_dir) as builder:
    source: Any = builder.as_data_source(split=split)
  for i in range(len(source)):
    where = f"tfds:{name}:{split}[{i}]"
    try:
      yield plain_row(source[i], where, ignore)
    except DataError as error:
      on_bad_row(error)


def tfds_files(spec: str, data_dir: str = "") -> list[pathlib.Path]:
  """Returns the files that the rows of a prepared TFDS data set are read from.

  Args:
    spec: `NAME[/CONFIG][:VERSION][:SPLIT]`; the default split is "train".
    data_dir: Folder with the prepared data set; "" is the TFDS default.

  Raises:
    DataError: If the name is malformed or the data set is not there.
  """
  name, split = parse_tfds(spec)
  with _of_tfds(name, split, data_dir) as builder:
    shards = {*builder.info.splits[split].filepaths}
    return [pathlib.Path(path) for path in sorted({*builder.data_path.glob("*.json"), *shards})]


@contextlib.contextmanager
def _of_tfds(name: str, split: str, data_dir: str) -> Iterator[Any]:
  """Yields the builder of a prepared data set, and raises a DataError where it cannot be used."""
  from tensorflow_datasets.core import read_only_builder

  try:
    # From the files only: `tfds.data_source` would first import the code that built them, and on a
    # pod every host would try to download missing files.
    yield read_only_builder.builder_from_files(name, data_dir=data_dir or None)
  except Exception as error:  # TFDS raises AssertionError, ValueError and its own types.
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise DataError(
      f"tfds:{name}:{split}: cannot be read ({reason}); check data.tfds and data.tfds_dir, and "
      f"prepare it once with `tfds build {name} --file_format=array_record`"
    ) from error


def parse_tfds(spec: str) -> tuple[str, str]:
  """Splits "NAME[:SPLIT]" into the name and the split.

  Raises:
    DataError: If the spec is malformed. Names with a namespace are refused: they would import code.
  """
  match = _TFDS_SPEC.fullmatch(spec)
  if not match:
    raise DataError(f"tfds: {spec!r} is not NAME[/CONFIG][:VERSION][:SPLIT], as in imdb:train")
  return match["name"], match["split"] or "train"


HeldoutSplit = Literal["eval", "shift"]  # Of the built-in task.


def read_builtin(kind: str, split: str, n: int, seed: int, annotator: str = "") -> Iterator[Row]:
  """Writes rows of the built-in task.

  Args:
    kind: "demonstrations", "prompts", or a kind that compares responses.
    split: "train" or a `HeldoutSplit`.
    n: Number of rows.
    seed: Seed of the rows.
    annotator: Annotator that compares; "" is the expert.

  Yields:
    The rows.

  Raises:
    DataError: If there is no such annotator.
  """
  from rlhf_jax import simulation

  if annotator and annotator not in simulation.ANNOTATORS:
    raise DataError(
      f"data.annotator: {annotator!r} does not judge the built-in task; "
      f"choose one of {', '.join(simulation.ANNOTATORS)}"
    )
  if kind == "demonstrations":
    rows = simulation.demonstrations(split, n, seed)
  elif kind == "prompts":
    rows = simulation.prompts(split, n, seed)
  else:
    rows = simulation.preferences(split, n, seed, annotator or "expert")
  for i, fields in enumerate(rows):
    yield Row(f"built-in {kind}:{split}[{i}]", fields)


def is_builtin(encode: Callable[[str], list[int]]) -> bool:
  """Returns True if a tokenizer, `encode`, is that of the built-in task: a token per word."""
  from rlhf_jax import simulation

  ids = encode(" ".join(simulation.WORDS))
  return len(set(ids)) == len(ids) == len(simulation.WORDS)


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
  """Parses one line into an object of clean text."""
  torn = "" if line.endswith(b"\n") else " (the file ends here: it looks cut off; copy it again)"
  try:
    text = line.decode("utf-8")
  except UnicodeDecodeError as error:
    raise DataError(
      f"{where}: byte {error.start + 1}: not UTF-8 (0x{line[error.start]:02x}){torn}; "
      "save the file as UTF-8"
    ) from error
  if "\0" in text:
    raise DataError(f"{where}: byte {line.index(0) + 1}: a NUL byte{torn}; remove it")
  try:
    value = load_json(text)
    # Unclean characters can only come from escapes here, as the bytes are valid UTF-8.
    if isinstance(value, dict) and "\\u" not in text:
      return value
    return as_row(value, where).fields
  except json.JSONDecodeError as error:
    torn = "" if error.msg == "Extra data" else torn
    fix = "fix or remove the line"
    if not error.pos:  # Plain text, perhaps.
      fix = 'write one JSON object on each line, such as {"prompt": "..."}'
    raise DataError(
      f"{where}: column {error.colno}: malformed JSON ({error.msg}){torn}; {fix}"
    ) from error
  except RecursionError as error:
    raise DataError(f"{where}: nested too deeply; remove the line") from error
  except DataError:
    raise
  except ValueError as error:  # NaN, or an integer of thousands of digits.
    raise DataError(f"{where}: malformed JSON ({error}){torn}; fix or remove the line") from error


def load_json(text: str) -> Any:
  """Decodes JSON.

  Raises:
    ValueError: The text is not JSON, or an object has a key twice: one of the two would be lost.
  """
  return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)


def _refuse_constant(name: str) -> None:
  raise ValueError(f"{name} is not a JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  fields = dict(pairs)
  if len(fields) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"the key {twice!r} is there twice in one object; keep one")
  return fields


def check_text(value: Any, where: str, field: str) -> None:
  """Refuses NUL and unpaired surrogates in any text inside `value`."""
  if isinstance(value, str):
    if "\0" in value:
      raise DataError(f"{where}: {field}: the text has a NUL character; remove it")
    if match := _UNPAIRED_SURROGATE.search(value):
      raise DataError(
        f"{where}: {field}: the text has an unpaired surrogate (U+{ord(match[0]):04X} at "
        f"character {match.start() + 1}), which is not Unicode text; write the file as UTF-8"
      )
  elif isinstance(value, list):
    for i, item in enumerate(value):
      check_text(item, where, f"{field}[{i}]")
  elif isinstance(value, dict):
    for key, item in value.items():
      check_text(item, where, f"{field}.{key}")


def plain_row(fields: Mapping[str, Any], where: str, ignore: Sequence[str] = ()) -> Row:
  """Returns decoded columns as a row of plain Python, without columns to ignore that are no text.

  Raises:
    DataError: Another column holds bytes, such as those of an image, or text that is not clean.
  """
  plain = {}
  for key, value in fields.items():
    try:
      plain[key] = to_plain(value, where, key)
      check_text(plain[key], where, key)
    except DataError as error:
      plain.pop(key, None)
      if key not in ignore:
        raise DataError(f"{error}, or leave the column out: data.ignore={key}") from error
  return Row(where, plain)


def to_plain(value: Any, where: str, field: str) -> Any:
  """Converts a decoded value to plain Python."""
  if isinstance(value, bytes):
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError as error:
      raise DataError(f"{where}: {field}: not UTF-8 text; encode it when building") from error
  if isinstance(value, (np.ndarray, np.generic)):
    return to_plain(value.tolist(), where, field)
  if isinstance(value, (list, tuple)):
    return [to_plain(item, where, f"{field}[{i}]") for i, item in enumerate(value)]
  if isinstance(value, dict):
    plain = {key: to_plain(item, where, f"{field}.{key}") for key, item in value.items()}
    for role, content in (("role", "content"), ("from", "value")):
      if plain.keys() == {role, content} and isinstance(plain[role], list):
        # TFDS turns a list of messages into a message of lists.
        turns = zip(plain[role], plain[content], strict=True)
        return [{role: a, content: b} for a, b in turns]
    return plain
  return value


def _json_type(value: Any) -> str:
  """Name of the type of a JSON value, for a message."""
  if value is None:
    return "null"
  names = {bool: "true or false", int: "a number", float: "a number", str: "text"}
  names |= {list: "a list", dict: "an object"}
  return names.get(type(value), type(value).__name__)
