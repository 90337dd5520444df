r"""Measures the peak memory of methods, each in a process of its own, for several vocabularies.

  python -m experiments.bench.memory --works=sft,dpo --vocabularies=32000,128000 --json=memory.json

`program` is the largest program: its arguments, results and temporaries, as the compiler counts
them. `process` is the peak of the whole process, with its code, the models and the optimizer state.
The names are those of experiments.bench.start_up.
"""

import dataclasses
import pathlib
import tempfile
from typing import Any

from rlhf_jax import ranges, reporting
from . import measure, turns
from .ours import WORKS
from .shapes import Shape, part_of


@dataclasses.dataclass(frozen=True)
class Config(Shape):
  """Sizes, and what to measure.

  Attributes:
    works: Works to measure.
    vocabularies: Sizes of the vocabulary.
    json: File to write the results to; empty writes none.
  """

  works: tuple[str, ...] = ("sft", "dpo", "ppo")
  vocabularies: tuple[int, ...] = (32000, 128000)
  json: str = ""

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, among={"works": WORKS})
    for size in self.vocabularies:
      if size < 1:
        raise ValueError(f"vocabularies must be at least 1, got {size}")


def measure_work(shape: Shape, work: str) -> dict[str, Any]:
  """Runs a work in a process of its own and returns the bytes of its largest program and peak."""
  with tempfile.TemporaryDirectory() as name:
    with turns.started_ours(shape, work, pathlib.Path(name)) as process:
      answer = process.run()
      if answer.get("compiles"):
        raise measure.Recompiled(f"{work} compiled after the warm-up")
      return dict(process.facts["largest_program"]) | {"process": answer["peak_bytes"]}


def run(config: Config) -> dict[str, Any]:
  """Measures each work with each vocabulary; returns the content of the JSON file."""
  rows: dict[str, Any] = {}
  for work in config.works:
    for size in config.vocabularies:
      shape = dataclasses.replace(part_of(config), vocab_size=size)
      rows[f"{work} {size}"] = measure_work(shape, work)
  reporting.show_summary(
    "Peak memory, MiB",
    {
      name: {
        key: f"{row[key] / measure.MIB:.0f}"
        for key in ("arguments", "temporaries", "program", "process")
      }
      for name, row in rows.items()
    },
  )
  return measure.keep(config, works=rows)


if __name__ == "__main__":
  measure.run_script(run, Config)
