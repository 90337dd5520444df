r"""Times checkpoints of params and optimizer state: saving, and restoring.

  python -m experiments.bench.save --folder=/mnt/disk --vocab_size=128000 --json=save.json

`blocked` is the time that training waits for a save, `saved` the time until the checkpoint is on
disk with its digests. Files that were just written are read from memory: a restore after a restart
may take longer.
"""

import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax

from rlhf_jax import checkpoint, ranges, reporting
from rlhf_jax.train_step import init_state, make_optimizer
from . import measure
from .shapes import Shape, part_of, set_up
from .works import OPTIM


@dataclasses.dataclass(frozen=True)
class Config(Shape):
  """Sizes, and the measurement.

  Attributes:
    folder: Folder to write below, on the disk to measure; empty is that of temporary files.
    rounds: Number of saves.
    json: File to write the results to; empty writes none.
  """

  folder: str = ""
  rounds: int = 5
  json: str = ""

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, at_least_one=("rounds",))


def run(config: Config) -> dict[str, Any]:
  """Saves and restores several times; returns the content of the JSON file."""
  setup = set_up(part_of(config))
  state = jax.jit(functools.partial(init_state, tx=make_optimizer(OPTIM, 1)))(setup.params)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  seconds: dict[str, list[float]] = {"blocked": [], "saved": [], "restored": []}
  with tempfile.TemporaryDirectory(dir=config.folder or None) as name:
    with checkpoint.Checkpointer(pathlib.Path(name) / "checkpoints", keep=1) as checkpointer:
      for step in range(1 + config.rounds):  # The first one is a warm-up.
        start = time.perf_counter()
        checkpointer.save(step, {"state": state}, {})
        blocked = time.perf_counter()
        checkpointer.wait()
        saved = time.perf_counter()
        restored = checkpointer.restore({"state": state})
        assert restored is not None
        jax.block_until_ready(restored.items)
        if step:
          seconds["blocked"].append(blocked - start)
          seconds["saved"].append(saved - start)
          seconds["restored"].append(time.perf_counter() - saved)
  rows = {
    key: {
      "median": statistics.median(times),
      "min": min(times),
      "seconds": times,
      "bytes_per_second": size / statistics.median(times),
    }
    for key, times in seconds.items()
  }
  reporting.show_summary(
    f"Checkpoints of {reporting.human_bytes(size)}",
    {
      key: {
        "median s": f"{row['median']:.3g}",
        "min s": f"{row['min']:.3g}",
        "MiB/s": f"{row['bytes_per_second'] / measure.MIB:.0f}",
      }
      for key, row in rows.items()
    },
  )
  content = measure.content_of(config, bytes=size, works=rows)
  measure.write_json(config.json, content)
  return content


if __name__ == "__main__":
  measure.run_script(run, Config)
