r"""Labels responses on a page in the browser, for several people at once.

  python -m experiments.label_page --workdir=runs/hand --annotator=ada \
    --data.path=PAIRS.jsonl

The address of the page, with its token, is shown at the start. It can be opened from
this machine only and needs no network. It needs `pip install 'rlhf_jax[annotate]'`.
Each person labels under a different name.
The keys are a, b, t (tie), s (skip) and u (undo). More than two responses are
ranked by their numbers, from the best to the worst. Ctrl-C ends the page.

A row is a pair (`prompt`, `chosen`, `rejected`) or has two to nine `responses`,
judged or not. Without a file the rows are those of the built-in task. The files and
the report are those of experiments.label, which labels in the terminal. The same
command, run again, resumes where it was stopped.
"""

import dataclasses
from typing import Any

from rlhf_jax import entry, loop
from .annotation import labels, page
from .annotation.items import check_annotator


@dataclasses.dataclass(frozen=True)
class Config(labels.LabelConfig):
  """Rows to label, and the page.

  Attributes:
    annotator: Name of the person who labels; empty lets the page ask for it.
    port: Port of the page on 127.0.0.1.
  """

  annotator: str = ""
  port: int = 7860

  def __post_init__(self):
    super().__post_init__()
    if not 1 <= self.port <= 65535:
      raise ValueError(f"port must be from 1 to 65535, got {self.port}")
    if self.annotator:
      check_annotator(self.annotator)


def label(session: loop.Session, config: Config) -> dict[str, Any]:
  """Serves the page until it is interrupted, reports on all answers; returns summary.json."""
  loop.require_no_steps(session)
  with loop.open_run(session) as run:
    labels.require_one_process()
    items, store = labels.open_labels(run, config)
    page.serve(store, items, config.annotator, config.port, page.read_token(run.workdir))
    return labels.report(run, items, store)


if __name__ == "__main__":
  entry.run_script(label, loop.Session, Config)
