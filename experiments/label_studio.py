r"""Writes pairs as tasks for Label Studio, and reads its answers.

Write the tasks, and the labelling interface to paste into the settings of a
project:
  python -m experiments.label_studio --workdir=runs/hand \
    --data.path=PAIRS.jsonl
Read the answers from a JSON export:
  python -m experiments.label_studio --workdir=runs/hand \
    --data.path=PAIRS.jsonl --answers=EXPORT.json

The tasks are in `label_studio.json`, the interface is in `label_studio.xml`. Rows,
`labels.jsonl` and the report are those of experiments.label. An answer that the
same annotator has given before is kept.
"""

import dataclasses
from typing import Any

from rlhf_jax import entry, loop, reporting
from .annotation import label_studio, labels


@dataclasses.dataclass(frozen=True)
class Config(labels.LabelConfig):
  """Pairs to label in Label Studio.

  Attributes:
    answers: JSON export of Label Studio to read; empty writes the tasks.
  """

  answers: str = ""


def exchange(session: loop.Session, config: Config) -> dict[str, Any]:
  """Writes the tasks or reads the answers, reports on all answers; returns summary.json."""
  loop.require_no_steps(session)
  with loop.open_run(session) as run:
    labels.require_one_process()
    items, store = labels.open_labels(run, config)
    if config.answers:
      answers = label_studio.read(config.answers, items)
      for name in {row["by"] for row in answers}:
        store.require_same(name)
      new = store.add(answers)
      reporting.note(f"{new} answers are new")
    else:
      label_studio.export(items, run.workdir)
    return labels.report(run, items, store)


if __name__ == "__main__":
  entry.run_script(exchange, loop.Session, Config)
