"""Held-out rows by the value of a column: metrics of each group, the worst group, the spread."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax import data, evaluation, flags, reporting, simulation
from . import comparison, evaluating

_NONE = "(none)"  # Group of the rows without a value.


def groups_of(heldout: data.Dataset, config: data.DataConfig) -> list[str]:
  """Returns the group of each held-out row; empty if no groups are asked for.

  Raises:
    UsageError: The column is in no row, holds no plain values, or gives fewer than two groups of
      two rows or more.
  """
  column = config.group
  if not column:
    return []
  rows = heldout.rows
  if not data.is_given(config):
    rows = [simulation.parse_prompt(row["prompt"])._asdict() | row for row in rows]
  values = [row.get(column) for row in rows]
  if all(value is None for value in values):
    known = sorted({str(name) for row in rows for name in row} - {"prompt_text"})
    raise flags.UsageError(
      f"--data.group={column} is no column of the held-out rows; they have {', '.join(known)}"
    )
  for value in values:
    if not isinstance(value, str | int | float | None):
      raise flags.UsageError(
        f"--data.group={column}: a group is a text or a number, and a row has {value!r:.60}"
      )
  groups = [_NONE if value is None else str(value) for value in values]
  counts = collections.Counter(groups)
  single = [name for name, count in counts.items() if count == 1]
  if len(counts) - len(single) < 2:
    raise flags.UsageError(
      f"--data.group={column} gives {len(counts)} groups in {len(groups)} held-out rows,"
      f" {len(single)} of them of one row; a comparison needs two groups of two rows or more: give"
      " more rows by --data.eval_rows, or another column"
    )
  if single:
    names = ", ".join(single[:5]) + (", ..." if len(single) > 5 else "")
    reporting.note(
      f"--data.group={column}: {len(single)} groups have one row and no interval, and are left out"
      f" of the worst group and the spread: {names}"
    )
  return groups


Metrics = dict[str, float]


def of_policies(
  metrics: Mapping[str, Metrics],
  samples: Mapping[str, evaluating.Samples],
  groups: Sequence[str],
  count: int,
) -> dict[str, Any]:
  """Shows the groups of each policy, and adds worst group and spread to its metrics.

  Args:
    metrics: Metrics of the policies by name, to add to.
    samples: Samples of the policies by name; the first of them is the baseline.
    groups: Group of each prompt; without groups nothing is done.
    count: Samples per prompt.

  Returns:
    `groups`, from policy to group to metrics; empty without groups.
  """
  if not groups:
    return {}
  found = {}
  for name, drawn in samples.items():
    found[name], together = of_policy(next(iter(samples.values())), drawn, groups, count)
    metrics[name].update(together)
    show(f"{name} by group", found[name], together)
  return {"groups": found}


def of_policy(
  before: evaluating.Samples, after: evaluating.Samples, groups: Sequence[str], count: int
) -> tuple[dict[str, Metrics], Metrics]:
  """Metrics of a policy by group, and of its groups together.

  Args:
    before: Samples of the baseline.
    after: Samples of the policy to the same prompts.
    groups: Group of each prompt.
    count: Samples per prompt.

  Returns:
    Group -> number of prompts and the metrics of `comparison.intervals`; and, for each reward, that
    of the worst group, the spread and the representativeness.
  """
  parts: dict[str, list[int]] = {}
  for i, group in enumerate(groups):
    parts.setdefault(group, []).extend(range(i * count, (i + 1) * count))
  by_group = {
    name: {"prompts": len(at) // count}
    | comparison.intervals(_take(before, at), _take(after, at), count)
    for name, at in parts.items()
  }
  together: Metrics = {}
  for name, values in after.rewards.items():
    usable = np.ma.masked_invalid(np.reshape(values, (-1, count)))
    together |= _together(f"{name}/", usable.mean(axis=1).filled(np.nan), groups)
  return by_group, together


def _take(samples: evaluating.Samples, at: Sequence[int]) -> evaluating.Samples:
  pick = lambda texts: [texts[i] for i in at]  # noqa: E731
  return evaluating.Samples(
    prompts=pick(samples.prompts),
    responses=pick(samples.responses),
    rewards={name: values[list(at)] for name, values in samples.rewards.items()},
    kl=samples.kl[list(at)],
    lengths=samples.lengths[list(at)],
    ended=samples.ended[list(at)],
    by_policy=samples.by_policy,
  )


def _together(prefix: str, values: np.ndarray, groups: Sequence[str]) -> Metrics:
  """Worst group, spread and representativeness over the groups of two usable values or more."""
  usable = [i for i, value in enumerate(values) if np.isfinite(value)]
  counts = collections.Counter(groups[i] for i in usable)
  at = [i for i in usable if counts[groups[i]] > 1]
  values, groups = values[at], [groups[i] for i in at]
  if len(set(groups)) < 2:
    return {}
  worst = min(evaluation.by_group(values, groups).values())
  spread = evaluation.group_spread(values, groups)
  metrics = {f"{prefix}representativeness": evaluation.representativeness(values, groups)}
  for name, estimate in (("worst_group", worst), ("group_spread", spread)):
    name = f"{prefix}{name}"
    metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"] = estimate
  return metrics


def of_pairs(dataset: data.Dataset, scores: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
  """Shows and returns the accuracy of a reward model by group.

  Args:
    dataset: Held-out pairs or rankings.
    scores: [rows, K] scores of the responses.
    groups: Group of each row; without groups nothing is shown.

  Returns:
    `groups`, from group to number of rows and accuracy with its interval; worst group, spread and
    representativeness of the accuracy. A row counts with the mean of its pairs.
  """
  if not groups:
    return {}
  pairs, mask = evaluating.compared(dataset, scores)
  accuracy = np.mean(judged_right(pairs), axis=1, where=mask)
  by_group = accuracies(accuracy, groups)
  together = _together("accuracy/", accuracy, groups)
  show("Held-out pairs by group", by_group, together)
  return together | {"groups": by_group}


def judged_right(pairs: np.ndarray) -> np.ndarray:
  """Returns 1 for scores [..., 2] that prefer the first response, 0.5 for equal ones, else 0."""
  return (pairs[..., 0] > pairs[..., 1]) + 0.5 * (pairs[..., 0] == pairs[..., 1])


def accuracies(right: np.ndarray, groups: Sequence[str]) -> dict[str, Metrics]:
  """Returns from group to its number of rows, and its accuracy with the interval.

  Args:
    right: [B] float, share of the pairs of a row that are judged right.
    groups: Group of each row.
  """
  counts, by_group = collections.Counter(groups), {}
  for name, (value, low, high) in evaluation.by_group(right, groups).items():
    of: Metrics = {"rows": counts[str(name)], "accuracy": value}
    by_group[str(name)] = of | {"accuracy_low": low, "accuracy_high": high}
  return by_group


def show(title: str, by_group: Mapping[str, Mapping[str, float]], together: Metrics) -> None:
  """Shows a row per group, then the worst group and the spread."""

  def pm(of: Mapping[str, float], name: str) -> str:
    half = (of[f"{name}_high"] - of[f"{name}_low"]) / 2
    return f"{of[name]:.3f} ± {half:.3f}" if np.isfinite(half) else f"{of[name]:.3f}"

  def cells(of: Mapping[str, float]) -> dict[str, str]:
    named = [name for name in of if f"{name}_low" in of]
    counted = {name: str(of[name]) for name in ("prompts", "rows") if name in of}
    return counted | {name.removesuffix("/mean"): pm(of, name) for name in named}

  table = {name: cells(of) for name, of in by_group.items()}
  for part in ("worst_group", "group_spread"):
    named = {name: name.rpartition("/")[0] for name in together if name.endswith(f"/{part}")}
    row = {reward: pm(together, name) for name, reward in named.items()}
    table |= {part.replace("_", " "): row} if row else {}
  reporting.show_summary(f"{title}: mean or share, and half of the 95 % interval", table)
