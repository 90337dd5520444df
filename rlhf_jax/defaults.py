"""Defaults of settings that depend on the model: built-in or pretrained, all params or adapters.

The built-in model has 0.7 million params and learns from scratch. A learning rate that suits it
destroys a pretrained model. Such a field has as its default a number by the kind of model,

  optim: OptimConfig = OptimConfig(learning_rate=defaults.rate(3e-3, pretrained=2e-5))

which `settle` replaces by the plain number when a config is made. A number that a user gives is
plain and stays.
"""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from rlhf_jax import simulation
from rlhf_jax import workdir as workdir_lib

Kind = Literal["built-in", "pretrained", "adapters"]
KINDS: dict[Kind, str] = {
  "built-in": "the built-in model",
  "pretrained": "a pretrained model",
  "adapters": "adapters of a pretrained model",
}
# By this factor the best learning rate of adapters is higher, whatever their rank: Schulman et al.,
# 2025, https://thinkingmachines.ai/blog/lora/.
_ADAPTERS = 10
FAR_ABOVE = 30  # Times the default, above which a learning rate is warned of.
_DEEPEST = 16  # A longer chain of runs is cut off.
_LARGEST_TOKENIZER = 1 << 17  # Bytes; that of the built-in model has a tenth.


class Rate(float):
  """Learning rate by the kind of model. As a number it is that of the built-in model."""

  by_kind: dict[Kind, float]


class Weight(float):
  """Weight of a term by the kind of model. As a number it is that of the built-in model."""

  by_kind: dict[Kind, float]


class Count(int):
  """Whole number by the kind of model. As a number it is that of the built-in model."""

  by_kind: dict[Kind, int]


def rate(built_in: float, pretrained: float) -> Rate:
  """Returns a learning rate by the kind of model; that of adapters follows from `pretrained`."""
  value = Rate(built_in)
  adapters = float(f"{_ADAPTERS * pretrained:.6g}")
  value.by_kind = {"built-in": built_in, "pretrained": pretrained, "adapters": adapters}
  return value


def weight(built_in: float, pretrained: float) -> Weight:
  """Returns the weight of a term by the kind of model."""
  value = Weight(built_in)
  value.by_kind = {"built-in": built_in, "pretrained": pretrained, "adapters": pretrained}
  return value


def count(built_in: int, pretrained: int) -> Count:
  """Returns a whole number by the kind of model."""
  value = Count(built_in)
  value.by_kind = {"built-in": built_in, "pretrained": pretrained, "adapters": pretrained}
  return value


def kind_of(config: Any) -> Kind:
  """Returns the kind of the model of a config, by the folder that it starts from.

  The built-in model is a new one, or one whose folder has the tokenizer of the built-in task, or a
  step of a run that has trained it. A folder that is not there yet is that of a pretrained model.
  """
  model = getattr(config, "model", None)
  path = getattr(config, "init_from", "") or getattr(model, "path", "")
  path = path or getattr(config, "baseline", "") or getattr(config, "base", "")
  if not path:
    return "pretrained" if getattr(model, "preset", "") else "built-in"
  if _starts_from_builtin(path):
    return "built-in"
  return "adapters" if getattr(getattr(config, "lora", None), "rank", 0) else "pretrained"


def _starts_from_builtin(path: str) -> bool:
  """Returns whether a path, which may be `RUN@STEP`, is that of the built-in model."""
  for _ in range(_DEEPEST):
    if path.startswith("hf://"):
      return False
    folder, step = workdir_lib.split_step(path)
    if step is None or is_builtin(folder):
      return is_builtin(folder)
    try:  # The run may not have finished: its model is that which it started from.
      run = json.loads((folder / "identity.json").read_text(encoding="utf-8"))
      path = run["--init_from"] or run["--model.path"]
      if not path:
        return not run["--model.preset"]
    except (OSError, ValueError, LookupError, TypeError):
      return False
  return False


def is_builtin(folder: pathlib.Path) -> bool:
  """Returns whether a model folder, or the workdir of a run, has the built-in tokenizer."""
  for path in (folder / "export" / "tokenizer.json", folder / "tokenizer.json"):
    try:
      if not path.is_file() or path.stat().st_size > _LARGEST_TOKENIZER:
        continue
      model = json.loads(path.read_text(encoding="utf-8"))["model"]
      if model["type"] == "WordLevel" and set(simulation.WORDS) <= set(model["vocab"]):
        return True
    except (OSError, ValueError, LookupError, TypeError):
      continue
  return False


def settled(config: Any, kind: Kind) -> Any:
  """Returns a dataclass, or any other value, with the plain numbers for a kind of model."""
  if isinstance(config, Rate | Weight | Count):
    return config.by_kind[kind]
  if not dataclasses.is_dataclass(config):
    return config
  old = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  new = {name: settled(value, kind) for name, value in old.items()}
  changes = {name: value for name, value in new.items() if value is not old[name]}
  return dataclasses.replace(config, **changes) if changes else config  # type: ignore[type-var]


def settle(config: Any) -> None:
  """Makes the numbers of a frozen dataclass plain; for `__post_init__`."""
  kind = kind_of(config)
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    plain = settled(value, kind)
    if plain is not value:
      object.__setattr__(config, field.name, plain)


def by_name(cls: type[Any]) -> dict[str, Rate | Weight | Count]:
  """Returns the defaults of a dataclass that depend on the model, by names such as `optim.b1`."""
  found: dict[str, Rate | Weight | Count] = {}

  def collect(value: Any, name: str) -> None:
    if isinstance(value, Rate | Weight | Count):
      found[name] = value
    elif dataclasses.is_dataclass(value):
      for field in dataclasses.fields(value):
        collect(getattr(value, field.name), f"{name}.{field.name}")

  for field in dataclasses.fields(cls):
    collect(field.default, field.name)
  return found


def describe(config: Any) -> dict[str, str]:
  """Returns what the panel of a run says about its learning rates, by the title of a line."""
  kind = kind_of(config)
  lines, warnings = {}, []
  for name, default in by_name(type(config)).items():
    if not isinstance(default, Rate):
      continue
    value: Any = config
    for part in name.split("."):
      value = getattr(value, part)
    usual = default.by_kind[kind]
    line = f"{value:g}, the default for {KINDS[kind]}"
    if value != usual:
      line = f"{value:g}; the default for {KINDS[kind]} is {usual:g}"
    part = name.split(".")[0]
    lines["learning rate" if part == "optim" else f"learning rate of the {part}"] = line
    if value > FAR_ABOVE * usual:
      times = value / usual
      warnings.append(f"--{name}={value:g} is {times:.0f} times the default for {KINDS[kind]}")
  return lines | ({"WARNING": "; ".join(warnings)} if warnings else {})
