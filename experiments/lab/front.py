"""The table of what PPO costs: its policy, mixtures of it with SFT, and what each has kept.

Two comparisons of arms.csv measure it: of the policies on held-out prompts, and on prompts that are
worded as no training prompt is.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from . import claims, methods, stages

COMPARED, SHIFTED = "front", "shifted"  # Stages of the comparisons.
GOLD = "gold reward"
# Column of a metric of a comparison -> its key in summary.json.
COLUMNS = {
  "KL to SFT, nats": "kl",
  "loss on demonstrations": "nll",
  "EAD across prompts": "diversity/ead",
  "EAD per prompt": "diversity_per_input/ead",
}
HEAD = ("policy", GOLD, "on shifted prompts", *COLUMNS)

# Metrics of a policy in a comparison, of several seeds.
Metrics = Sequence[Mapping[str, Any]]


def read(workdir: pathlib.Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
  """Returns both summaries of each seed that has them, by policy."""
  read_both = (
    tuple(stages.read_summary(folder, name) for name in (COMPARED, SHIFTED))
    for folder in stages.seeds(workdir).values()
  )
  return [(on, shifted) for on, shifted in read_both if on is not None and shifted is not None]


def rows(summaries: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[str, ...]]:
  """Returns the rows of the table: means over the seeds, of rewards with 95 % intervals."""
  new: list[tuple[str, ...]] = []
  for name in [stages.START, *(x for x in stages.read_by(COMPARED) if x != stages.START)]:
    on, shifted = ([summary[name] for summary in of] for of in zip(*summaries, strict=True))
    means = (_shown(_mean(on, key), 1 if key == "kl" else 2) for key in COLUMNS.values())
    new.append((claims.TITLES[name], _gold(on), _gold(shifted), *means))
  return new


def _mean(metrics: Metrics, key: str) -> float:
  return sum(of[key] for of in metrics) / len(metrics)


def _shown(value: float, digits: int) -> str:
  return f"{round(value, digits) + 0.0:.{digits}f}"  # No -0.0.


def _gold(metrics: Metrics) -> str:
  """Mean and interval of independent samples, prompts drawn by seed."""
  widths = ((of["gold/mean_high"] - of["gold/mean_low"]) / 2 for of in metrics)
  return f"{_mean(metrics, 'gold/mean'):.2f} ± {math.hypot(*widths) / len(metrics):.2f}"


def fill(page: str, summaries: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
  """Returns a page with a new table; without summaries it stays as it is."""
  return methods.fill_table(page, "tax", HEAD, lambda old: rows(summaries)) if summaries else page
