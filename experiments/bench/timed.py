"""Scripts that time some of the pieces of work of `works`: their flags, table and JSON."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax import flags, ranges
from . import measure
from .shapes import Setup, Shape, set_up


@dataclasses.dataclass(frozen=True)
class Config(Shape):
  """Sizes, and the measurement.

  Attributes:
    works: Names of the pieces of work to time, in turn; empty times all.
    rounds: Timed runs of each.
    json: File to write the results to; empty writes none.
  """

  works: tuple[str, ...] = ()
  rounds: int = 5
  json: str = ""

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, at_least_one=("rounds",))


Table = Mapping[str, Callable[[Setup], measure.Work]]


def time_works(config: Config, title: str, table: Table) -> dict[str, Any]:
  """Times pieces of work, shows the table and returns the content of the JSON file."""
  unknown = set(config.works) - set(table)
  if unknown:
    raise flags.UsageError(f"--works: {', '.join(sorted(unknown))} is none of {', '.join(table)}")
  setup = set_up(config)
  rows = measure.interleaved(
    {name: table[name](setup) for name in config.works or table}, config.rounds
  )
  limits = measure.measure_limits(config.dtype)
  measure.compare_with(limits, rows)
  measure.show(title, rows, limits)
  return measure.keep(config, limits=limits._asdict(), works=rows)


def run(title: str, table: Table) -> None:
  """Runs a script that times the pieces of work of its table."""
  measure.run_script(lambda config: time_works(config, title, table), Config)
