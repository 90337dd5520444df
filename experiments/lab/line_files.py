"""JSON Lines files that survive a kill, and short names of folders."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax import bucket, data, flags, processes
from rlhf_jax import workdir as workdir_lib


def append_lines(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Appends a line per row to a file and returns when the lines are on disk."""
  if not processes.is_first():
    return
  with open(path, "a", encoding="utf-8") as file:
    file.write("".join(json.dumps(row) + "\n" for row in rows))
    file.flush()
    os.fsync(file.fileno())
  bucket.push_growing(path)


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the rows of a file on process 0, for all processes; see `parse_lines`."""
  return processes.agree(lambda: parse_lines(path))


def parse_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the rows of a file; an incomplete last line is removed from the file.

  Raises:
    DataError: A line is not a JSON object.
  """
  if not path.exists():
    return []
  content = path.read_bytes()
  complete = content[: content.rfind(b"\n") + 1]
  if len(complete) < len(content):
    os.truncate(path, len(complete))
  rows = []
  for number, line in enumerate(complete.split(b"\n")[:-1], 1):
    fix = "fix the line, or remove it and all lines after it"
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      reason = getattr(error, "msg", error)  # Without the place, which is that in the line.
      raise data.DataError(f"{path}:{number}: malformed JSON ({reason}); {fix}") from error
    if not isinstance(row, dict):
      raise data.DataError(f"{path}:{number}: not a JSON object; {fix}")
    rows.append(row)
  return rows


def short_names(flag: str, paths: Sequence[str]) -> list[str]:
  """Shortens paths to distinct endings: `ppo`, or `seed_0/ppo` and `seed_1/ppo`.

  Raises:
    UsageError: A path is given twice; the message starts with the name of the flag.
  """
  parts = [workdir_lib.local_path(path).resolve().parts for path in paths]
  if len(set(parts)) < len(parts):
    raise flags.UsageError(f"--{flag} names a folder twice: {', '.join(paths)}")
  lengths = range(1, max(map(len, parts)) + 1)
  endings = (["/".join(part[-length:]) for part in parts] for length in lengths)
  return next(names for names in endings if len(set(names)) == len(names))
