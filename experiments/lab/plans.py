"""Plans of a script on absent devices: its programs compiled for a mesh, and a search of meshes."""

import dataclasses
import importlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_jax import flags, preflight, reporting, sharding, user
from rlhf_jax.models.families import Head
from . import scripts
from .case import TRAINING, Case, open_case

HEADS: dict[str, Head] = {"reward_model": "scalar", "preference_model": "scalar"}


def methods() -> list[str]:
  """Names of the scripts that have a function `programs`."""
  pages = scripts.FOLDER.glob("*.py")
  return sorted(path.stem for path in pages if "def programs(" in path.read_text("utf-8"))


def script_of(name: str) -> Any:
  """Returns the module of a script in `methods()`, or one of a user that is like them.

  Raises:
    ValueError: There is no such script, or it does not say which programs it compiles.
  """
  if name in methods():
    return importlib.import_module(scripts.module_name(name))
  try:
    module = user.load("algorithm", name)
  except ValueError as error:
    known = ", ".join(methods())
    raise ValueError(
      f"algorithm must be one of {known}, or a module of your own; {error}"
    ) from error
  for part in ("Config", "programs"):
    if not hasattr(module, part):
      raise ValueError(
        f"algorithm={name}: {module.__file__} has no {part}, which experiments.dpo has"
      )
  return module


class Plan(NamedTuple):
  """Programs that were compiled, and the message of the compiler.

  Attributes:
    mesh: Devices per mesh axis.
    remat: Remat policy of the model.
    microbatches: Micro-batches per batch.
    programs: Programs that fit.
    refused: Message about the first program that does not fit; empty if all fit.
    stopped_at: Name of that program.
  """

  mesh: str
  remat: str
  microbatches: int
  programs: list[preflight.Program]
  refused: str = ""
  stopped_at: str = ""

  def to_dict(self) -> dict[str, Any]:
    """Returns the plan and its programs as plain values."""
    return self._asdict() | {"programs": [program._asdict() for program in self.programs]}

  @property
  def seconds(self) -> float:
    """Roofline of all programs, one after the other."""
    return sum(max(program.seconds.values()) for program in self.programs)


class Slice(NamedTuple):
  """The absent devices, and the programs that were compiled for them."""

  devices: Sequence[Any]
  chip: preflight.Chip
  known: dict[str, Any]


def open_plan(algorithm: str, mesh: str, config: Any, absent: Slice) -> Case:
  """Opens a script on a mesh of the absent devices."""
  check = lambda on: preflight.Preflight(on, absent.chip, absent.known)  # noqa: E731
  head = HEADS.get(algorithm, "language")
  return open_case(config, mesh, absent.devices, check, head)


def compile_plan(algorithm: str, mesh: str, config: Any, absent: Slice) -> Plan:
  """Compiles every program, up to the first one that does not fit."""
  case = open_plan(algorithm, mesh, config, absent)
  name = settings_name(config)
  microbatches = getattr(config, name).microbatches if name else 1
  plan = Plan(mesh, config.model.remat, microbatches, case.check.programs)
  try:
    script_of(algorithm).programs(case)
  except preflight.TooLargeError as error:
    return plan._replace(refused=str(error), stopped_at=error.program)
  return plan


def settings_name(config: Any) -> str:
  """Name of the settings with the number of micro-batches; empty without micro-batches."""
  names = (field.name for field in dataclasses.fields(config))
  return next((name for name in names if hasattr(getattr(config, name), "microbatches")), "")


# Each rung takes less memory than the one before, and more time.
LADDER = (("none", 1), ("dots", 1), ("full", 1), ("full", 2), ("full", 4), ("full", 8))


def promising(algorithm: str, config: Any, absent: Slice) -> list[str]:
  """Meshes that divide the batch and the model, those with the least estimated waiting first."""
  case = open_plan(algorithm, "", config, absent)
  model = case.bench.model
  sizes = [n for n in range(1, len(absent.devices) + 1) if len(absent.devices) % n == 0]
  ranked = []
  for fsdp, tensor in itertools.product(sizes, sizes):
    rows, uneven = divmod(len(absent.devices), tensor)
    if uneven or rows % fsdp or config.batch_size % rows or model.config.kv_heads % tensor:
      continue
    spec = ",".join(
      f"{axis}:{n}"
      for axis, n in zip(sharding.AXES, (rows // fsdp, fsdp, tensor), strict=True)
      if n > 1
    )
    try:
      case = open_plan(algorithm, spec or "data:1", config, absent)
    except ValueError:  # A width does not divide.
      continue
    run = case.bench.run
    sent = preflight.network_bytes(model.config, run.mesh, config.batch_size * case.length)
    seconds = sent / absent.chip.ici_bandwidth
    if case.samples:
      work = case.sampling_work(config.sampling.samples_per_prompt)
      seconds += work.steps * work.bytes_per_step / absent.chip.hbm_bandwidth
    ranked.append((seconds, run.session.mesh))
  return [spec for _, spec in sorted(ranked)]


def climb(algorithm: str, mesh: str, config: Any, absent: Slice) -> Plan:
  """Returns the plan of the first rung of the ladder that fits on a mesh, or of the last rung."""
  name, plan = settings_name(config), None
  for remat, microbatches in LADDER:
    changed: dict[str, Any] = {"model": dataclasses.replace(config.model, remat=remat)}
    if not name and microbatches > 1:
      continue
    try:
      if name:
        changed[name] = dataclasses.replace(getattr(config, name), microbatches=microbatches)
      rung = dataclasses.replace(config, **changed)
    except ValueError:  # The batch does not split so, or the loss compares its rows.
      continue
    plan = compile_plan(algorithm, mesh, rung, absent)
    verdict = plan.refused or f"fits, roofline {plan.seconds:.3g} s"
    reporting.note(f"{mesh}, remat {remat}, microbatches {microbatches}: {verdict}")
    if plan.stopped_at not in TRAINING:  # It fits, or no rung helps.
      break
  assert plan is not None
  return plan


def search(algorithm: str, mesh: str, count: int, config: Any, absent: Slice) -> list[Plan]:
  """Returns the plans of the most promising meshes: those that fit first, sorted by their time."""
  specs = [mesh] if mesh else promising(algorithm, config, absent)
  if not specs:
    raise flags.UsageError(
      f"no mesh of {len(absent.devices)} chips divides --batch_size={config.batch_size} and the"
      " model; change the batch size or the topology"
    )
  plans = [climb(algorithm, spec, config, absent) for spec in specs[:count]]
  return sorted(plans, key=lambda plan: (bool(plan.refused), plan.seconds))


def by_hand(algorithm: str, config: Any, absent: Slice) -> Plan | None:
  """Compiles what one would write without a search: all chips on `fsdp`, with full remat.

  Where the chips do not divide the batch, the rest is on `tensor`; None if the model is too narrow.
  """
  chips = len(absent.devices)
  splits = (n for n in range(1, chips + 1) if chips % n == 0)
  split = next(n for n in splits if config.batch_size % (chips // n) == 0)
  mesh = f"fsdp:{chips // split}" + (f",tensor:{split}" if split > 1 else "")
  full = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
  try:
    return compile_plan(algorithm, mesh, full, absent)
  except ValueError:
    return None


def show_search(found: Sequence[Plan], hand: Plan | None) -> None:
  """Shows the table of a search, with the plan that one would write by hand below."""

  def row(plan: Plan) -> dict[str, Any]:
    return {
      "remat": plan.remat,
      "microbatches": plan.microbatches,
      "peak, GiB": max((p.peak + p.beside for p in plan.programs), default=0) / 2**30,
      "roofline, s": "does not fit" if plan.refused else f"{plan.seconds:.3g}",
    }

  rows = {plan.mesh: row(plan) for plan in found}
  if hand is not None:
    rows[f"by hand: {hand.mesh}"] = row(hand)
  reporting.show_summary("Plans, the fastest first", rows)
