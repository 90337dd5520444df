"""Opening and report of labels, shared by the scripts that label."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rlhf_jax import data, flags, loop, ranges, reporting
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.data import DataConfig
from . import agreement
from .items import Item, prompt_text, read_items
from .store import Store


@dataclasses.dataclass(frozen=True)
class LabelConfig:
  """Rows to label.

  Attributes:
    limit: Maximum number of rows to label; 0 labels all.
  """

  limit: int = 0
  data: DataConfig = DataConfig()

  def __post_init__(self):
    ranges.check(self, non_negative=("limit",))


def open_labels(run: loop.Run, config: LabelConfig) -> tuple[list[Item], Store]:
  """Opens the items of the data, and the answers in the workdir, also those of another script.

  Raises:
    DataError: A row is not an item.
    WorkdirError: The workdir holds answers to other data.
  """
  items, left_out = read_items(config.data, config.limit, run.session.seed)
  loop.identify(run, "annotate", {"data": flags.to_dict(config.data)})
  reporting.start_panel(
    "Labels",
    {
      "workdir": run.workdir,
      "data": f"{config.data.path or 'built-in task, toy reviews'}: {len(items)} items",
      "left out": ", ".join(f"{count} {why}" for why, count in left_out.items()) or "nothing",
    },
  )
  store = Store(run.workdir)
  require_same_texts(items, store.rows(), config.data.path)
  return items, store


def require_same_texts(items: Sequence[Item], rows: Sequence[Mapping[str, Any]], path: str) -> None:
  """Refuses items whose ids are those of answers to other texts; items without answers are fine.

  Args:
    items: Items to label.
    rows: Answers.
    path: File of the items.

  Raises:
    WorkdirError: An answer belongs to other texts.
  """
  texts = {item.id: (item.prompt, item.responses) for item in items}
  for row in rows:
    answered = prompt_text(row), tuple(row["responses"])
    if texts.get(row["id"], answered) != answered:
      raise workdir_lib.WorkdirError(
        f"--data.path={path}: the row {row['id']!r} is not the one that {row['by']} has answered;"
        " give the rows as they were, to which others may be appended, or use another --workdir"
      )


def require_one_process() -> None:
  """Refuses several processes, since each would ask the same person."""
  if jax.process_count() > 1:
    raise flags.UsageError("people label in one process: leave --coordinator empty")


def require_pairs(items: Sequence[Item]) -> None:
  """Refuses items of more than two responses.

  Raises:
    DataError: An item has more than two responses.
  """
  for item in items:
    if len(item.responses) > 2:
      raise data.DataError(
        f"the row {item.id!r} has {len(item.responses)} responses, and two are compared here; rank"
        " them with experiments.label_page"
      )


def report(
  run: loop.Run, items: Sequence[Item], store: Store, metrics: Mapping[str, float] | None = None
) -> dict[str, Any]:
  """Shows and writes counts and agreement of all answers; returns summary.json.

  Args:
    run: Opened run.
    items: Items to label.
    store: Answers to them.
    metrics: Further metrics for the summary.
  """
  summary = agreement.summarize(items, store.rows()) | dict(metrics or {})
  reporting.show_summary("Labels", {name: {"": value} for name, value in summary.items()})
  reporting.write_summary(run.workdir, summary)
  return summary
