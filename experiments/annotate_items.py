"""What annotators compare and what they answer: rows as items, answers as rows, agreement."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import data, evaluation, flags, simulation
from rlhf_jax.data import DataConfig

_ANNOTATOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_LABEL = "label"  # In figures, what the rows themselves say.


class Item(NamedTuple):
  """Responses to one prompt, to compare.

  Attributes:
    id: Of the row.
    prompt: As text.
    responses: Two or more.
    labels: What the row itself says: `(a, b, share)`, with a < b, prefers response `a` of the two
      by a share in [0, 1]. Empty if nobody has judged it.
  """

  id: str
  prompt: str
  responses: tuple[str, ...]
  labels: tuple[tuple[int, int, float], ...] = ()


def check_annotator(name: str) -> None:
  """Refuses a name that could be mistaken for something else in files and figures.

  Raises:
    ValueError: The name is not fit.
  """
  if not _ANNOTATOR.fullmatch(name):
    raise ValueError(
      f"annotator must be up to 64 letters, digits and . _ @ -, the first a letter or digit; got"
      f" {name!r}"
    )
  if name == _LABEL:
    raise ValueError(f"annotator must not be {_LABEL!r}: that is what the rows say; take another")


def read_items(config: DataConfig, limit: int, seed: int) -> list[Item]:
  """The items of the data, each once.

  Raises:
    DataError: A row is not an item, or two have the same id.
  """
  if config.tfds:
    raise flags.UsageError("--data.tfds is not read here; write the rows to a file for --data.path")
  if config.path:
    rows = list(data.read_jsonl(config.path))
  else:
    who = config.annotator or "expert"
    count = config.rows or config.eval_rows
    rows = [
      data.Row(f"built-in preferences[{i}]", row)
      for i, row in enumerate(simulation.preferences("eval", count, seed, who))
    ]
  items: dict[str, Item] = {}
  for number, row in enumerate(rows[: limit or config.rows or len(rows)]):
    item = read_item(row, number)
    if item.id in items:
      raise data.DataError(f"{row.where}: id: {item.id!r} is taken by an earlier row; rename one")
    items[item.id] = item
  return list(items.values())


def read_item(row: data.Row, number: int) -> Item:
  """A row as an item; responses that nobody has judged are fine.

  Args:
    row: The row.
    number: Its id if it has none.

  Raises:
    DataError: It does not hold a prompt and two or more responses.
  """
  (asked,) = data.parse_row("prompts", row, prefer_messages=False)
  prompt = asked.prompt if isinstance(asked.prompt, str) else data.transcript(asked.prompt)
  responses: Any = row.fields.get("responses")
  judged: list[data.Example] = []
  if row.fields.get("chosen") or not isinstance(responses, list):
    judged = data.parse_row("comparisons", row, prefer_messages=False, votes="each")
    responses = list(judged[0].answers)
  texts = [text.get("text") if isinstance(text, Mapping) else text for text in responses]
  if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
    raise data.DataError(f"{row.where}: responses: two or more texts are needed to compare")
  if not judged and is_judged(row.fields):
    judged = data.parse_row("comparisons", row, prefer_messages=False, votes="each")
  labels = []
  for example in judged:
    if example.labels:
      # Responses of the same text are the same answer, whichever of them was judged.
      a, b = (texts.index(answer) for answer in example.answers)
      if a != b:
        labels.append((a, b, example.labels[0]) if a < b else (b, a, 1 - example.labels[0]))
  return Item(str(row.fields.get("id", number)), prompt, tuple(texts), tuple(labels))


def is_judged(fields: Mapping[str, Any]) -> bool:
  """Whether a row with `responses` says which of them are better."""
  if fields.get("annotations") or fields.get("preferences"):
    return True
  first = fields["responses"][0]
  values = ("rank", "score", "correct")
  return isinstance(first, Mapping) and any(first.get(name) is not None for name in values)


def shown_order(prompt: str, responses: Sequence[str]) -> tuple[int, ...]:
  """Indices of the responses in the order in which they are shown, the same for everybody.

  It depends on nothing but the texts: the order of a file may tell which response is better.
  """

  def digest(index: int) -> bytes:
    return hashlib.sha256(json.dumps([prompt, *responses, index]).encode()).digest()

  return tuple(sorted(range(len(responses)), key=digest))


def answer_row(
  item: Item, annotator: str, ranks: Sequence[int] | None, **more: Any
) -> dict[str, Any]:
  """An answer as the reward and preference models read it.

  Args:
    item: What was asked.
    annotator: Who answered.
    ranks: Rank of each response, 0 is best and equal ones are tied; None if it was skipped.
    **more: Further columns.
  """
  votes = []
  for a, b in itertools.combinations(range(len(item.responses)) if ranks else (), 2):
    preferred = None if ranks[a] == ranks[b] else min(a, b, key=lambda i: ranks[i])
    votes.append({"annotator": annotator, "a": a, "b": b, "preferred": preferred})
  row = {"id": item.id, "prompt": item.prompt, "responses": list(item.responses)}
  return row | {"annotations": votes, "by": annotator, **more}


class Agreement(NamedTuple):
  """How far two annotators agree.

  Attributes:
    one: An annotator.
    other: Another one, or "label" for the labels that the rows had.
    count: Pairs of responses that both have judged.
    share: Of them, those on which both say the same.
    kappa: The same beyond chance, Cohen's.
  """

  one: str
  other: str
  count: int
  share: float
  kappa: float


def agreements(items: Sequence[Item], rows: Sequence[Mapping[str, Any]]) -> list[Agreement]:
  """The agreement of every two annotators with each other and with the labels of the rows.

  Verdicts are compared as they were shown: where a file always has the better response first, its
  labels would all be the same and agreement beyond chance would mean nothing.
  """
  verdicts: dict[str, dict[tuple[str, int, int], bool | None]] = {}
  for row in rows:
    order = shown_order(row["prompt"], row["responses"])
    for vote in row["annotations"]:
      a, b = vote["a"], vote["b"]
      of = verdicts.setdefault(vote["annotator"], {})
      of[row["id"], a, b] = _as_shown(order, a, b, vote["preferred"])
  labels = {}
  for item in items:
    order = shown_order(item.prompt, item.responses)
    for a, b, share in item.labels:
      preferred = None if share == 0.5 else a if share > 0.5 else b
      labels[item.id, a, b] = _as_shown(order, a, b, preferred)
  found = []
  for one, other in itertools.combinations([*verdicts, *([_LABEL] if labels else [])], 2):
    first, second = verdicts[one], labels if other == _LABEL else verdicts[other]
    if common := [key for key in first if key in second]:
      x, y = ([of[key] for key in common] for of in (first, second))
      share = float(np.mean([i == j for i, j in zip(x, y, strict=True)]))
      found.append(Agreement(one, other, len(common), share, evaluation.cohen_kappa(x, y)))
  return found


def _as_shown(order: Sequence[int], a: int, b: int, preferred: int | None) -> bool | None:
  """Whether the response that is shown first was preferred; None for a tie."""
  return None if preferred is None else preferred == min(a, b, key=order.index)


def summarize(items: Sequence[Item], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Counts of the answers, and their agreement with the rows' labels and with each other."""
  votes = [row["annotations"] for row in rows if row["annotations"]]
  summary: dict[str, Any] = {
    "answers": len(votes),
    "ties": sum(all(vote["preferred"] is None for vote in some) for some in votes),
    "skipped": len(rows) - len(votes),
  }
  for found in agreements(items, rows):
    summary[f"agreement/{found.one}/{found.other}"] = found.share
    summary[f"kappa/{found.one}/{found.other}"] = found.kappa
  return summary
