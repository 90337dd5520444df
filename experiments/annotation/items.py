"""Rows as items to compare, and answers as rows to train on."""

import collections
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax import data, flags, simulation
from rlhf_jax.data import DataConfig

_ANNOTATOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
LABEL = "label"  # In metrics, what the rows themselves say.


class Item(NamedTuple):
  """Prompt with responses to compare.

  Attributes:
    id: Id of the row.
    prompt: Prompt as text, for a reader.
    responses: Texts of two or more responses.
    labels: Judgements in the row: `(a, b, share)`, with a < b, prefers response `a` to `b` by a
      share in [0, 1]. Empty if the row is not judged.
    asked: Columns of the prompt for a model, which keep its turns; None if the text is all.
  """

  id: str
  prompt: str
  responses: tuple[str, ...]
  labels: tuple[tuple[int, int, float], ...] = ()
  asked: Mapping[str, Any] | None = None


def check_annotator(name: str) -> None:
  """Refuses a name that could be mistaken for something else in files and metrics.

  Raises:
    ValueError: The name is not fit.
  """
  if not _ANNOTATOR.fullmatch(name):
    raise ValueError(
      f"annotator must be up to 64 letters, digits and . _ @ -, the first a letter or digit; got"
      f" {name!r}"
    )
  if name == LABEL:
    raise ValueError(f"annotator must not be {LABEL!r}: that is what the rows say; take another")


def read_items(
  config: DataConfig, limit: int, seed: int
) -> tuple[list[Item], collections.Counter[str]]:
  """Reads the items of the data, each once, and counts the rows left out by the reason.

  Raises:
    DataError: A row is not an item, or two items have the same id.
  """
  if config.tfds:
    raise flags.UsageError("--data.tfds is not read here; write the rows to a file for --data.path")
  if config.path:
    read = [row.without(config.ignore) for row in data.read_file(config.path, ignore=config.ignore)]
    rows = data.joined("comparisons", read)
  else:
    who = config.annotator or "expert"
    count = config.rows or config.eval_rows
    rows = [
      data.Row(f"built-in preferences[{i}]", row)
      for i, row in enumerate(simulation.preferences("eval", count, seed, who))
    ]
  items: dict[str, Item] = {}
  left_out: collections.Counter[str] = collections.Counter()
  for number, row in enumerate(rows[: limit or config.rows or len(rows)]):
    try:
      item = read_item(row, number)
    except data.Skip as skip:
      left_out[skip.reason.replace("_", " ")] += 1
      continue
    if item.id in items:
      raise data.DataError(f"{row.where}: id: {item.id!r} is taken by an earlier row; rename one")
    items[item.id] = item
  if not items:
    raise data.DataError(f"{config.path}: no rows are left of {len(rows)}; give other rows")
  return list(items.values()), left_out


def read_item(row: data.Row, number: int) -> Item:
  """Reads a row as an item, whether or not its responses are judged.

  Args:
    row: Row of the data.
    number: Id of the item if the row has none.

  Raises:
    DataError: The row does not hold a prompt and two or more responses.
    Skip: The row is left out.
  """
  row, _ = data.normalized(row, chat=True)
  data.parse_row("prompts", row, prefer_messages=False)  # Refuses what is not read of the prompt.
  asked = data.prompt_columns(row)
  responses: Any = row.fields.get("responses")
  judged: list[data.Example] = []
  if row.fields.get("chosen") or not isinstance(responses, list):
    judged = data.parse_row("comparisons", row, prefer_messages=False, votes="each")
    responses = list(judged[0].answers)
  texts: list[Any] = [text.get("text") if isinstance(text, Mapping) else text for text in responses]
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
  id_of, prompt = str(row.fields.get("id", number)), prompt_text(asked)
  turns = asked if "messages" in asked else None
  return Item(id_of, prompt, tuple(texts), tuple(labels), turns)


def prompt_text(fields: Mapping[str, Any]) -> str:
  """Returns the prompt of columns that `data.prompt_columns` gave, as text for a reader."""
  return fields["prompt"] if "prompt" in fields else data.readable(fields["messages"])


def is_judged(fields: Mapping[str, Any]) -> bool:
  """Returns True if a row with `responses` has judgements of them."""
  if fields.get("annotations") or fields.get("preferences"):
    return True
  first = fields["responses"][0]
  values = ("rank", "score", "correct")
  return isinstance(first, Mapping) and any(first.get(name) is not None for name in values)


def shown_order(prompt: str, responses: Sequence[str]) -> tuple[int, ...]:
  """Indices of the responses in the order in which they are shown to all annotators.

  The order depends only on the texts, since the order in a file may tell which response is better.
  """

  def digest(index: int) -> bytes:
    return hashlib.sha256(json.dumps([prompt, *responses, index]).encode()).digest()

  return tuple(sorted(range(len(responses)), key=digest))


def answer_row(
  item: Item, annotator: str, ranks: Sequence[int] | None, **columns: Any
) -> dict[str, Any]:
  """Makes the row of an answer, as reward and preference models read it.

  Args:
    item: Item that was answered.
    annotator: Name of the annotator.
    ranks: Rank of each response; 0 is best, equal ranks are tied. None if the item was skipped.
    **columns: Further columns of the row.
  """
  votes = []
  if ranks:
    for a, b in itertools.combinations(range(len(item.responses)), 2):
      preferred = None if ranks[a] == ranks[b] else min(a, b, key=ranks.__getitem__)
      votes.append({"annotator": annotator, "a": a, "b": b, "preferred": preferred})
  asked = item.asked or {"prompt": item.prompt}
  row = {"id": item.id, **asked, "responses": list(item.responses)}
  return row | {"annotations": votes, "by": annotator, **columns}


def first_share(item: Item) -> float:
  """Share by which the row of a pair prefers its first response; 0.5 without judgements."""
  return item.labels[0][2] if item.labels else 0.5
