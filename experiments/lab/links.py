"""Links between a reward model and what a policy becomes that is trained on it.

Lambert and Calandra, 2023, https://arxiv.org/abs/2311.00168: it is assumed that an accurate reward
model gives a policy of high reward, and that this policy is good. Each link may break.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import evaluation, reporting
from . import charts


class Links(NamedTuple):
  """Metrics of a reward model and of a policy that was trained on it.

  Attributes:
    heldout: Accuracy of the reward model on held-out pairs.
    on_policy: Accuracy on samples of the policy and of its start; NaN if it is not known.
    proxy: Reward at the end of training.
    gold: Gold reward at the end of training.
    spearman: Rank correlation of reward and gold reward over the steps.
    diverged: True if the reward rose while the gold reward fell.
  """

  heldout: float
  on_policy: float
  proxy: float
  gold: float
  spearman: float
  diverged: bool


def read(accuracy: float, summary: Mapping[str, Any], rows: charts.Rows) -> Links:
  """Returns the links of a policy.

  Args:
    accuracy: Held-out accuracy of its reward model.
    summary: Content of summary.json of the policy.
    rows: Rows of metrics.jsonl of the policy.
  """
  of = charts.group_metrics([rows])
  return Links(
    heldout=accuracy,
    on_policy=summary.get("reward/accuracy", math.nan),
    proxy=of[charts.PROXY],
    gold=of[charts.GOLD],
    spearman=of["spearman"],
    diverged=bool(of["diverged"]),
  )


def correlations(links: Sequence[Links]) -> dict[str, float]:
  """Rank correlations over reward models: each assumed link; empty for fewer than three."""
  if len(links) < 3:
    return {}
  columns = {name: np.array([getattr(of, name) for of in links]) for name in Links._fields[:4]}
  pairs = (("heldout", "proxy"), ("proxy", "gold"), ("heldout", "gold"))
  return {f"{a}-{b}": evaluation.spearman(columns[a], columns[b]) for a, b in pairs}


def show(links: Mapping[str, Sequence[Links]]) -> dict[str, Any]:
  """Shows a row per policy, and per group the rank correlations; returns both for summary.json."""
  rows, summary = {}, {}
  for label, group in links.items():
    for i, of in enumerate(group):
      rows[f"{label}, {i}"] = {
        "accuracy, held out": of.heldout,
        "accuracy on its samples": of.on_policy,
        "proxy": of.proxy,
        "gold": of.gold,
        "Spearman of the two": of.spearman,
        "diverged": "yes" if of.diverged else "no",
      }
    found = correlations(group)
    summary[label] = {"policies": [of._asdict() for of in group], "spearman": found}
    titles = {"heldout": "accuracy", "proxy": "proxy", "gold": "gold"}
    for pair, value in found.items():
      a, b = (titles[name] for name in pair.split("-"))
      reporting.note(
        f"{label}: Spearman of {a} and {b} over {len(group)} reward models {value:.2f}"
      )
  reporting.show_summary("Links from a reward model to its policy", rows)
  return summary
