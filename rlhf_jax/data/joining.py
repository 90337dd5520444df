"""Rows that are parts of one: a score of one response each, or votes on the same responses."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data import formats, schema
from rlhf_jax.data.formats import Skip
from rlhf_jax.data.schema import KindName, Verdict
from rlhf_jax.data.sources import DataError, Row


def joined(
  kind: KindName, rows: Sequence[Row], ignored: Sequence[str] = (), group: str = ""
) -> list[Row]:
  """Joins rows that are parts of one row; all others stay as they are.

  Rows that score one response each become a row with the `responses` to a prompt, as one annotator
  judged them; read as demonstrations, each stays one. Rows with votes of different annotators on
  the same responses to the same prompt become a row with all votes in `annotations`. Whoever votes
  again judges another row, and so do votes without a name.

  Args:
    kind: Kind of examples that the rows are read as.
    rows: The rows.
    ignored: Columns that are not read.
    group: Column by which results are told apart: votes stay apart by it too; "" is none.
  """
  if kind != "demonstrations":
    rows = _join_scores(rows, ignored)
  return _join_votes(rows, ignored, group)


def _join_scores(rows: Sequence[Row], ignored: Sequence[str]) -> list[Row]:
  groups: dict[bytes, Row] = {}
  result: list[Row] = []
  for row in rows:
    read = row.without(ignored).fields
    score = formats.score_of(read)
    if score is None:
      result.append(row)
      continue
    response = {"text": read["response"], "score": read[score]}
    key = _key(read, (*schema.PROMPT_COLUMNS, "annotator"), score)
    if key in groups:
      groups[key].fields["responses"].append(response)
      continue
    rest = {name: value for name, value in row.fields.items() if name not in ("response", score)}
    groups[key] = row._replace(fields={**rest, "responses": [response]})
    result.append(groups[key])
  return result


def _join_votes(rows: Sequence[Row], ignored: Sequence[str], group: str) -> list[Row]:
  result = list(rows)
  groups: dict[tuple[bytes, int], list[tuple[int, Row, list[str], list[Verdict]]]] = {}
  heard: dict[tuple[bytes, str], int] = {}
  for place, row in enumerate(rows):
    read = row.without(ignored)
    if formats.given(read.fields, "chosen"):
      continue  # It won, whatever the votes.
    try:
      plain, _ = formats.normalized(read, chat=False)
      votes = schema.votes_of(plain)
    except (DataError, Skip):  # Whoever reads the row says what is wrong.
      continue
    if votes is None or not votes[1] or any(vote.annotator is None for vote in votes[1]):
      continue
    columns = (*schema.PROMPT_COLUMNS, *schema.ANSWER_COLUMNS)
    key = _key(plain.fields, columns, sorted(votes[0]), row.fields.get(group))
    names = {(key, str(vote.annotator)) for vote in votes[1]}
    number = max(heard.get(name, 0) for name in names)  # Of a row in which none of them has voted.
    heard.update(dict.fromkeys(names, number + 1))
    groups.setdefault((key, number), []).append((place, plain, *votes))
  left_out: set[int] = set()
  for members in groups.values():
    (first, plain, texts, _), *others = members
    if others:
      left_out |= {place for place, *_ in others}
      votes = [vote for _, _, own, given in members for vote in _renumbered(given, own, texts)]
      kept = {name: value for name, value in rows[first].fields.items() if name in ignored}
      kept |= {name: x for name, x in plain.fields.items() if name not in schema.VOTE_COLUMNS}
      column = next(name for name in schema.VOTE_COLUMNS if name not in ignored)
      votes_in_row = {column: [vote._asdict() for vote in votes]}
      result[first] = plain._replace(fields=kept | votes_in_row)
  return [row for place, row in enumerate(result) if place not in left_out]


def _renumbered(votes: Sequence[Verdict], texts: list[str], wanted: list[str]) -> list[Verdict]:
  """Returns votes on texts as votes on the same texts in the order of `wanted`."""
  orders = (sorted(range(len(of)), key=of.__getitem__) for of in (texts, wanted))
  place: dict[Any, Any] = {None: None, **dict(zip(*orders, strict=True))}
  return [
    vote._replace(a=place[vote.a], b=place[vote.b], preferred=place[vote.preferred])
    for vote in votes
  ]


def _key(fields: Mapping[str, Any], columns: Sequence[str], *further: Any) -> bytes:
  """Returns a digest of the columns of a row that have a value, and of further values."""
  own = {name: fields[name] for name in columns if fields.get(name) not in (None, "", [], {})}
  content = json.dumps([own, *further], sort_keys=True, default=str)
  return hashlib.sha256(content.encode()).digest()
