r"""Times checkpoints of params and optimizer state: saving, and restoring.

  python -m experiments.bench.save --folder=/mnt/disk --vocab_size=128000 --json=save.json

`blocked` is the time that training waits for a save, `saved` the time until the checkpoint is on
disk with its digests. Files that were just written are read from memory: a restore after a restart
may take longer.

`stall` is what a save adds to the steps that are taken until it is on disk, as a share of their
time: SFT steps are timed in turns, with a save at their start and without one. The stall of
CPU is the same in CPU seconds of this process: the stall on one core that nothing else uses.
"""

import dataclasses
import math
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax

from rlhf_jax import checkpoint, ranges, reporting
from . import measure, works
from .shapes import Shape, part_of, set_up


@dataclasses.dataclass(frozen=True)
class Config(Shape):
  """Sizes, and the measurement.

  Attributes:
    folder: Folder to write below, on the disk to measure; empty is that of temporary files.
    rounds: Number of saves to time, and of saves beside steps.
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
  work = works.TRAIN_STEPS["sft"](set_up(part_of(config)))
  work.run()
  start = time.perf_counter()
  state, _ = jax.block_until_ready(work.run())
  step_seconds = time.perf_counter() - start
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
        del restored
        if step:
          seconds["blocked"].append(blocked - start)
          seconds["saved"].append(saved - start)
          seconds["restored"].append(time.perf_counter() - saved)
      steps = math.ceil(max(seconds["saved"]) / step_seconds) + 1
      stall = _stall(work, checkpointer, steps, config.rounds)
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
  reporting.show_summary(
    f"A save beside {steps} steps of {step_seconds:.3g} s",
    {"stall": {"of time": f"{stall['seconds']:.1%}", "of CPU": f"{stall['cpu_seconds']:.1%}"}},
  )
  return measure.keep(config, bytes=size, works=rows, stall=stall)


def _stall(
  work: measure.Work, checkpointer: checkpoint.Checkpointer, steps: int, rounds: int
) -> dict[str, Any]:
  """Returns the share that a save adds to the median time of `steps` steps, and all times."""
  clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
  times: dict[bool, dict[str, list[float]]] = {of: {c: [] for c in clocks} for of in (False, True)}
  for number in range(2 * rounds):
    saving, before = bool(number % 2), {name: clock() for name, clock in clocks.items()}
    for index in range(steps):
      state, _ = jax.block_until_ready(work.run())
      if saving and not index:
        checkpointer.save(1000 + number, {"state": state}, {})
    checkpointer.wait()
    for name, clock in clocks.items():
      times[saving][name].append(clock() - before[name])
  medians = {of: {c: statistics.median(x) for c, x in rows.items()} for of, rows in times.items()}
  shares = {name: medians[True][name] / medians[False][name] - 1 for name in clocks}
  return {"steps": steps, **shares, "without": times[False], "with": times[True]}


if __name__ == "__main__":
  measure.run_script(run, Config)
