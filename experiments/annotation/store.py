"""Answers on disk: a database that several annotators share, and a file with its lines."""

import contextlib
import json
import pathlib
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_jax import processes
from rlhf_jax import workdir as workdir_lib
from ..lab import line_files

LABELS = "labels.jsonl"
_DATABASE = "labels.sqlite"
_TABLE = """
CREATE TABLE answers (
  number INTEGER PRIMARY KEY,  -- In the order in which they were given.
  item TEXT NOT NULL,
  annotator TEXT NOT NULL,
  line TEXT NOT NULL,          -- The row of labels.jsonl; json_extract(line, '$.seconds') reads it.
  UNIQUE (annotator, item)
)
"""


class Store:
  """Store of answers, at most one per annotator and item; for threads, not for processes.

  `labels.sqlite` is the record. `labels.jsonl` has a line per answer in the same order, for
  training. It is rewritten when the store is opened, since a process may have been killed before
  it was updated. If a workdir has only `labels.jsonl`, the database is made from it.
  """

  def __init__(self, workdir: pathlib.Path):
    self.path = workdir / LABELS
    self._database = workdir / _DATABASE
    self._lock = threading.Lock()  # The file has the order of the database.
    processes.agree(self._open)

  def _open(self) -> None:
    with contextlib.closing(self._connect()) as connection:
      connection.execute("PRAGMA journal_mode=WAL")  # Readers do not wait for a writer.
    with self._transaction() as connection:
      if not connection.execute("SELECT * FROM sqlite_master WHERE name = 'answers'").fetchone():
        connection.execute(_TABLE)
        _insert(connection, line_files.parse_lines(self.path))
    self._export()

  def add(self, rows: Sequence[Mapping[str, Any]]) -> int:
    """Stores answers, rows with `id`, `by` and `annotations`, and returns the number of new ones.

    An earlier answer of the same annotator to an item is kept. On return the answers are on disk.
    """
    if not processes.is_first():
      return 0
    with self._lock:
      with self._transaction() as connection:
        new = _insert(connection, rows)
      line_files.append_lines(self.path, new)
    return len(new)

  def undo(self, annotator: str) -> bool:
    """Deletes the last answer of an annotator; returns True if there was one."""
    last = "SELECT max(number) FROM answers WHERE annotator = ?"
    with self._lock:
      with self._transaction() as connection:
        undone = connection.execute(f"DELETE FROM answers WHERE number = ({last})", (annotator,))
      if undone.rowcount:
        self._export()
    return bool(undone.rowcount)

  def rows(self, annotator: str = "") -> list[dict[str, Any]]:
    """Returns the answers in the order in which they were given, of all or of one annotator."""
    return [json.loads(line) for line in processes.agree(lambda: self._lines(annotator))]

  def answered(self, annotator: str) -> set[str]:
    """Returns the ids of the items that an annotator has answered or skipped."""

    def read() -> list[str]:
      with contextlib.closing(self._connect()) as connection:
        items = connection.execute("SELECT item FROM answers WHERE annotator = ?", (annotator,))
        return [item for (item,) in items]

    return set(processes.agree(read))

  def require_same(self, annotator: str, judge: str = "") -> None:
    """Refuses a name under which somebody else has answered.

    Args:
      annotator: Name of a person or of a judge.
      judge: Fingerprint of the judge; empty for a person.

    Raises:
      WorkdirError: There are answers of another judge, or of a judge and not of a person.
    """

    def read() -> list[str]:
      judges = "SELECT DISTINCT ifnull(json_extract(line, '$.judge'), '') FROM answers"
      with contextlib.closing(self._connect()) as connection:
        found = connection.execute(f"{judges} WHERE annotator = ?", (annotator,))
        return [judge for (judge,) in found]

    others = set(processes.agree(read)) - {judge}
    if others:
      who = "a person, or a judge of an earlier version" if "" in others else "a judge"
      if judge and "" not in others:
        who = "a judge with another model, other principles or other settings"
      raise workdir_lib.WorkdirError(
        f"--workdir={self.path.parent} has answers of {annotator!r}, who is {who}; give another"
        " --annotator or another --workdir"
      )

  def _connect(self) -> sqlite3.Connection:
    # Autocommit: where a transaction begins and ends is written out below.
    connection = sqlite3.connect(self._database, timeout=60, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL")
    return connection

  @contextlib.contextmanager
  def _transaction(self) -> Iterator[sqlite3.Connection]:
    """Runs a block as one transaction, which is on disk at its end."""
    with contextlib.closing(self._connect()) as connection:
      connection.execute("BEGIN IMMEDIATE")
      try:
        yield connection
      except BaseException:
        connection.execute("ROLLBACK")
        raise
      connection.execute("COMMIT")

  def _lines(self, annotator: str = "") -> list[str]:
    chosen = "WHERE annotator = :name" if annotator else ""
    query = f"SELECT line FROM answers {chosen} ORDER BY number"
    with contextlib.closing(self._connect()) as connection:
      return [line for (line,) in connection.execute(query, {"name": annotator})]

  def _export(self) -> None:
    workdir_lib.atomic_write(self.path, "".join(line + "\n" for line in self._lines()))


def _insert(
  connection: sqlite3.Connection, rows: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
  """Inserts rows and returns those that are new."""
  query = "INSERT OR IGNORE INTO answers (item, annotator, line) VALUES (?, ?, ?)"
  return [
    row
    for row in rows
    if connection.execute(query, (row["id"], row["by"], json.dumps(row))).rowcount
  ]
