"""Agreement of annotators with each other and with the labels of the rows, and position bias."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import evaluation, rewards
from .items import LABEL, Item, first_share, prompt_text, shown_order


class Agreement(NamedTuple):
  """Agreement of two annotators.

  Attributes:
    one: Name of an annotator.
    other: Name of another annotator, or "label" for the labels in the rows.
    count: Number of pairs of responses that both have judged.
    share: Share of these pairs on which both agree.
    kappa: Agreement beyond chance (Cohen's kappa).
  """

  one: str
  other: str
  count: int
  share: float
  kappa: float


def agreements(items: Sequence[Item], rows: Sequence[Mapping[str, Any]]) -> list[Agreement]:
  """Agreement of every two annotators, where the labels in the rows count as an annotator.

  Verdicts are compared in the order in which responses were shown. A file may always have the
  better response first: then all labels would be the same, and kappa would be undefined.
  """
  verdicts: dict[str, dict[tuple[str, int, int], bool | None]] = {}
  for row in rows:
    order = shown_order(prompt_text(row), row["responses"])
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
  pairs = []
  for one, other in itertools.combinations([*verdicts, *([LABEL] if labels else [])], 2):
    first, second = verdicts[one], labels if other == LABEL else verdicts[other]
    if common := [key for key in first if key in second]:
      x, y = ([of[key] for key in common] for of in (first, second))
      share = float(np.mean([i == j for i, j in zip(x, y, strict=True)]))
      pairs.append(Agreement(one, other, len(common), share, evaluation.cohen_kappa(x, y)))
  return pairs


def _as_shown(order: Sequence[int], a: int, b: int, preferred: int | None) -> bool | None:
  """Returns True if the response that was shown first was preferred; None for a tie."""
  return None if preferred is None else preferred == min(a, b, key=order.index)


def summarize(items: Sequence[Item], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Counts of the answers, and their agreement with the rows' labels and with each other."""
  votes = [row["annotations"] for row in rows if row["annotations"]]
  summary: dict[str, Any] = {
    "answers": len(votes),
    "ties": sum(all(vote["preferred"] is None for vote in of_row) for of_row in votes),
    "skipped": len(rows) - len(votes),
  }
  for one, other, _, share, kappa in agreements(items, rows):
    summary[f"agreement/{one}/{other}"] = share
    summary[f"kappa/{one}/{other}"] = kappa
  return summary


def position_metrics(items: Sequence[Item], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Returns the position bias of a judge, and its agreement with labels without swapping.

  Args:
    items: The pairs.
    rows: Answers of the judge, with its probabilities in both orders as `first` and `second`.
  """
  verdicts = rewards.Verdicts(
    *(np.array([row[name] for row in rows]) for name in ("first", "second"))
  )
  summary = {
    "position_bias": verdicts.position_bias,
    "consistency": verdicts.consistency,
    "first_wins_before_swapping": float(np.mean(verdicts.first > 0.5)),
  }
  share = {item.id: first_share(item) for item in items}
  known = np.array([share.get(row["id"], 0.5) != 0.5 for row in rows])
  if known.any():
    wanted = np.array([share[row["id"]] > 0.5 for row, on in zip(rows, known, strict=True) if on])
    for name, values in (("as_first", verdicts.first), ("as_second", verdicts.second)):
      right = (np.mean(values, axis=1)[known] > 0.5) == wanted
      summary[f"agreement/{name}"] = float(np.mean(right))
  return summary
