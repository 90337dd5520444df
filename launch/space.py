"""Space of a sweep: the definitions of a space file, flags drawn from it, bounds on its trials."""

import argparse
import dataclasses
import math
import operator
import pathlib
import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna

Flags = dict[str, Any]  # Flag name -> value.
SHIPPED = pathlib.Path(__file__).with_name("spaces")


class SweepError(Exception):
  """A sweep cannot go on. The message gives the reason and the fix."""


@dataclasses.dataclass(frozen=True)
class Space:
  """The definitions of a space file.

  Attributes:
    sample: `space(trial)`, the function that draws the flags of a trial.
    defaults: `DEFAULTS`, the script's own settings; the first trial takes them, for comparison.
    grid: `GRID`, the values of each flag for --sampler=grid.
    metric: `METRIC`, the metric of summary.json to optimise.
    direction: `DIRECTION`, maximize or minimize.
  """

  sample: Callable[[Any], Flags] | None
  defaults: Flags
  grid: dict[str, list[Any]]
  metric: str
  direction: str


def load_space(path: str) -> Space:
  """Executes a space file.

  Args:
    path: Path of the file, or the name of one in `spaces`, such as dpo or ablations/ppo_max.

  Raises:
    SweepError: There is no such file, or it lacks what it must define.
  """
  file = pathlib.Path(path)
  if re.fullmatch(r"\w+(/\w+)*", path):
    file = SHIPPED / f"{path}.py"
  if not file.is_file():
    shipped = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.py")))
    raise SweepError(f"--space={path}: no such file; the package has {shipped}")
  names = runpy.run_path(str(file))
  space = Space(
    names.get("space"),
    dict(names.get("DEFAULTS", {})),
    {name: list(values) for name, values in names.get("GRID", {}).items()},
    names.get("METRIC", ""),
    names.get("DIRECTION", "maximize"),
  )
  if space.sample is None and not space.grid:
    raise SweepError(
      f"--space={path} must define a function space(trial) that returns {{flag name: value}}, or"
      " GRID = {flag name: [values]}, or both"
    )
  if space.sample is not None and space.defaults:
    # Finds mistakes before anything is started.
    try:
      check_flags(space.sample(optuna.trial.FixedTrial(space.defaults)))
    except ValueError as error:
      raise SweepError(f"--space={path}: with DEFAULTS, {error}") from error
  return space


def check_flags(flags: Any) -> Flags:
  """Returns the flags that a space drew. Raises ValueError if they are no dict of flags."""
  if not isinstance(flags, dict) or not flags:
    raise ValueError(f"space(trial) must return a dict of flags, got {flags!r}")
  for name in flags:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*(\.\w+)*", name):
      raise ValueError(f"{name!r} is no name of a flag; write it as in 'optim.learning_rate'")
  return flags


def flag(name: str, value: Any) -> str:
  """Writes a flag as the scripts read it: `--dpo.reweight=true`, `--rest.quantiles=0.5,0.7`."""
  if isinstance(value, bool):
    value = str(value).lower()
  elif value is None:
    value = "none"
  elif isinstance(value, list | tuple):
    value = ",".join(map(str, value))
  return f"--{name}={value}"


def grid_points(grid: Mapping[str, Sequence[Any]]) -> list[Flags]:
  """Returns every combination of the values; those of the last flag change fastest."""
  points: list[Flags] = [{}]
  for name, values in grid.items():
    points = [{**point, name: value} for point in points for value in values]
  return points


def refuse_twice(flags: Flags, script: Sequence[str]) -> None:
  """Raises SweepError if the command of the script has a flag that the space sets."""
  given = {word.split("=")[0] for word in script}
  if both := sorted({f"--{name}" for name in flags} & given):
    raise SweepError(f"{both[0]} is set by the space; take it out of the command of the script")


_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclasses.dataclass(frozen=True)
class Constraint:
  """A bound that a trial has to keep, such as kl<10."""

  text: str
  name: str
  comparison: str
  bound: float

  @classmethod
  def parse(cls, text: str) -> "Constraint":
    match = re.fullmatch(r"\s*([\w./-]+)\s*(<=|>=|<|>)\s*(\S+)\s*", text)
    try:
      bound = float(match[3]) if match else math.nan
    except ValueError:
      bound = math.nan
    if not match or not math.isfinite(bound):
      raise argparse.ArgumentTypeError(
        f"{text!r} is no comparison of a metric with a number; write 'kl<10' or 'gold/mean>=5'"
      )
    return cls(f"{match[1]}{match[2]}{bound:g}", match[1], match[2], bound)

  def violation(self, value: float) -> float:
    """Returns how far `value` is beyond the bound, positive if it is, as Optuna wants."""
    if math.isnan(value):
      return math.inf
    distance = value - self.bound if self.comparison.startswith("<") else self.bound - value
    if _COMPARISONS[self.comparison](value, self.bound):
      return distance
    return distance or math.ulp(0.0)
