r"""Times a start: from the start of the process to the end of its first step.

  python -m experiments.bench.start_up --works=sft,ppo --json=start.json

Each work is started twice, the second time with the compilation cache of the first. The names are
those of train steps sft, reward_model and dpo, generate, and the iterations ppo, grpo and nash_md.
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
  """Sizes, and what to start.

  Attributes:
    works: Works to start.
    json: File to write the results to; empty writes none.
  """

  works: tuple[str, ...] = ("sft", "dpo", "generate", "ppo")
  json: str = ""

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, among={"works": WORKS})


def time_start(shape: Shape, work: str, folder: pathlib.Path) -> dict[str, Any]:
  """Starts a work, with the compilation cache in `folder`, and returns what it says."""
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  with turns.started_ours(shape, work, folder, cache) as process:
    return dict(process.facts)


def run(config: Config) -> dict[str, Any]:
  """Starts each work with a cold and with a warm cache; returns the content of the JSON file."""
  rows: dict[str, Any] = {}
  for work in config.works:
    with tempfile.TemporaryDirectory() as name:
      cold, warm = (time_start(part_of(config), work, pathlib.Path(name)) for _ in ("cold", "warm"))
    rows[work] = {"cold": cold, "warm": warm}
  reporting.show_summary(
    "Seconds from the start of the process",
    {
      work: {
        "ready to compile": f"{row['warm']['set_up_seconds']:.1f}",
        "first step": f"{row['cold']['first_seconds']:.1f}",
        "first step, warm cache": f"{row['warm']['first_seconds']:.1f}",
      }
      for work, row in rows.items()
    },
  )
  return measure.keep(config, works=rows)


if __name__ == "__main__":
  measure.run_script(run, Config)
