r"""Compiles every program of an algorithm for a TPU slice that is not there, and says if it fits.

  python -m experiments.compile --algorithm=ppo --topology=v5p:4x4x8 --mesh=fsdp:32,tensor:4 \
    --model.preset=llama3_8b --model.dtype=bfloat16 --model.remat=full --batch_size=128

It needs libtpu (pip install 'rlhf_jax[tpu]') and no TPU, and takes one to ten minutes for 8B
parameters. The programs are those that the script of the algorithm runs, from the same flags, with
rows as long as the flags allow: --data.max_prompt_length, --data.max_response_length and
--sampling.max_new_tokens. A reward model, where the algorithm takes one and --reward.name is not
given, is of the policy's architecture.

The table has the memory of one chip, what the chips send each other (and how many collectives
stand in loops), and a roofline: seconds that a perfect program would still take. The exit code is 0
if all programs fit, and 69 with the words of the compiler if one does not.
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax

from experiments import programs
from experiments.lab import models
from rlhf_jax import entry, flags, loop, preflight, ranges, reporting, sharding, writers


@dataclasses.dataclass(frozen=True)
class Options:
  """What to compile for. All other flags are those of the script of the algorithm.

  Attributes:
    algorithm: Name of the script.
    topology: Slice of TPUs, such as v5e:4x4, v5p:4x4x8, v6e:16x16 or tpu7x:4x4x4.
    mesh: Devices per mesh axis, as in every script.
    search: Meshes to try, the most promising first, or --mesh alone if it is given. Each gets the
      remat policy and the micro-batches that cost the least time of those that fit.
    json: File to write the figures to.
  """

  algorithm: Literal[
    "sft", "reward_model", "preference_model", "dpo", "kto", "ppo", "nash_md", "online_dpo", "rest"
  ]
  topology: str
  mesh: str = ""
  search: int = 0
  json: str = ""

  def __post_init__(self):
    ranges.check(self, non_negative=("search",))


class Plan(NamedTuple):
  """What was compiled and what the compiler said.

  Attributes:
    mesh: Devices per axis.
    remat: What the backward pass computes again.
    microbatches: Pieces of a batch.
    programs: Those that fit.
    refused: Why the next one does not; empty if all fit.
    stopped_at: Name of the next one.
  """

  mesh: str
  remat: str
  microbatches: int
  programs: list[preflight.Program]
  refused: str = ""
  stopped_at: str = ""

  @property
  def seconds(self) -> float:
    """Roofline of all programs, one after the other."""
    return sum(max(program.seconds.values()) for program in self.programs)


class Slice(NamedTuple):
  """The absent devices, and what has been compiled for them."""

  devices: Sequence[Any]
  chip: preflight.Chip
  known: dict[str, Any]


def open_case(options: Options, config: Any, absent: Slice) -> programs.Case:
  """What the programs of an algorithm are compiled with."""
  mesh = sharding.make_mesh(options.mesh, absent.devices)
  folder = models.source_folder(config.model, config.init_from)
  tokenizer = models.open_tokenizer(folder, config.data.end_token)
  session = loop.Session(workdir="", mesh=options.mesh)
  nowhere = pathlib.Path()
  run = loop.Run(nowhere, session, mesh, jax.random.key(0), writers.RunWriter(nowhere))
  shape = jax.eval_shape(lambda: jax.random.key(0))
  key = sharding.abstract(shape, sharding.replicated(mesh))
  check = preflight.Preflight(mesh, absent.chip, absent.known)
  return programs.Case(check, run, config, tokenizer, folder, key)


def compile_plan(options: Options, config: Any, absent: Slice) -> Plan:
  """Compiles every program, up to the first that does not fit."""
  case = open_case(options, config, absent)
  name = settings_name(config)
  microbatches = getattr(config, name).microbatches if name else 1
  plan = Plan(options.mesh, config.model.remat, microbatches, case.check.programs)
  try:
    programs.ALGORITHMS[options.algorithm][1](case)
  except preflight.TooLargeError as error:
    return plan._replace(refused=str(error), stopped_at=error.program)
  return plan


def settings_name(config: Any) -> str:
  """The field of a config that has the micro-batches of its algorithm; empty if it takes none."""
  found = (field.name for field in dataclasses.fields(config))
  return next((name for name in found if hasattr(getattr(config, name), "microbatches")), "")


# Each rung takes less memory than the one before, and more time.
LADDER = (("none", 1), ("dots", 1), ("full", 1), ("full", 2), ("full", 4), ("full", 8))


def promising(options: Options, config: Any, absent: Slice) -> list[str]:
  """The meshes that divide the batch and the model, those first that seem to wait the least."""
  case = open_case(dataclasses.replace(options, mesh=""), config, absent)
  model = case.open()[0]
  sizes = [n for n in range(1, len(absent.devices) + 1) if len(absent.devices) % n == 0]
  found = []
  for fsdp, tensor in itertools.product(sizes, sizes):
    rows, uneven = divmod(len(absent.devices), tensor)
    if uneven or rows % fsdp or config.batch_size % rows or model.config.kv_heads % tensor:
      continue
    spec = ",".join(
      f"{axis}:{n}"
      for axis, n in zip(sharding.AXES, (rows // fsdp, fsdp, tensor), strict=True)
      if n > 1
    )
    case = open_case(dataclasses.replace(options, mesh=spec or "data:1"), config, absent)
    try:
      case.open()
    except ValueError:  # A width does not divide.
      continue
    sent = preflight.network_bytes(model.config, case.run.mesh, config.batch_size * case.length)
    seconds = sent / absent.chip.ici_bandwidth
    if options.algorithm in programs.SAMPLES:
      work = case.sampling(model, config.sampling.samples_per_prompt)
      seconds += work.steps * work.bytes_per_step / absent.chip.hbm_bandwidth
    found.append((seconds, case.run.session.mesh))
  return [spec for _, spec in sorted(found)]


def climb(options: Options, config: Any, absent: Slice) -> Plan:
  """The first rung of the ladder that fits on a mesh, or else the last one."""
  name, plan = settings_name(config), None
  for remat, microbatches in LADDER:
    changed: dict[str, Any] = {"model": dataclasses.replace(config.model, remat=remat)}
    if name:
      settings = getattr(config, name)
      changed[name] = dataclasses.replace(settings, microbatches=microbatches)
    elif microbatches > 1:
      continue
    try:
      rung = dataclasses.replace(config, **changed)
    except ValueError:  # The batch does not split so.
      continue
    plan = compile_plan(options, rung, absent)
    verdict = plan.refused or f"fits, roofline {plan.seconds:.3g} s"
    reporting.note(f"{options.mesh}, remat {remat}, microbatches {microbatches}: {verdict}")
    if plan.stopped_at not in programs.TRAINING:  # It fits, or no rung helps.
      break
  assert plan is not None
  return plan


def search(options: Options, config: Any, absent: Slice) -> list[Plan]:
  """The plans of the most promising meshes: those that fit first, the fastest in front."""
  specs = [options.mesh] if options.mesh else promising(options, config, absent)
  if not specs:
    raise flags.UsageError(
      f"no mesh of {len(absent.devices)} chips divides --batch_size={config.batch_size} and the"
      " model; change the batch size or the topology"
    )
  plans = [
    climb(dataclasses.replace(options, mesh=spec), config, absent)
    for spec in specs[: options.search]
  ]
  return sorted(plans, key=lambda plan: (bool(plan.refused), plan.seconds))


def show_plans(plans: Sequence[Plan]) -> None:
  """The table of a search."""
  reporting.show_summary(
    "Plans, the fastest first",
    {
      plan.mesh: {
        "remat": plan.remat,
        "microbatches": plan.microbatches,
        "peak, GiB": max((p.peak + p.beside for p in plan.programs), default=0) / 2**30,
        "roofline, s": "does not fit" if plan.refused else f"{plan.seconds:.3g}",
      }
      for plan in plans
    },
  )


def show(options: Options, plan: Plan, chip: preflight.Chip) -> None:
  """The table of a plan."""
  rows = {}
  for program in plan.programs:
    slowest = max(program.seconds, key=program.seconds.__getitem__)
    sent = [
      f"{kind} {row['count']:.0f} ({row['in_loops']:.0f}), {reporting.human_bytes(row['bytes'])}"
      for kind, row in sorted(program.collectives.items())
    ]
    rows[program.name] = {
      "peak, GiB": program.peak / 2**30,
      "beside, GiB": program.beside / 2**30,
      "arguments, GiB": program.arguments / 2**30,
      "temporaries, GiB": program.temporaries / 2**30,
      "collectives (in loops)": "; ".join(sent),
      "operations": f"{program.flops:.3g}",
      "roofline, s": f"{program.seconds[slowest]:.3g} ({slowest})",
      "compiled in, s": f"{program.compile_seconds:.0f}",
    }
  if rows:
    reporting.show_summary(
      f"{options.algorithm} on {options.topology} as {plan.mesh or 'data:-1'},"
      f" {chip.hbm_bytes / 2**30:.2f} GiB a chip",
      rows,
    )
  reporting.note(
    f"does not fit: {plan.refused}" if plan.refused else f"fits; roofline {plan.seconds:.3g} s"
  )


def main(options: Options, config: Any) -> int:
  """Compiles, shows and writes; returns the exit code."""
  jax.config.update("jax_platforms", "cpu")  # Else it looks for the TPU.
  jax.config.update("jax_enable_compilation_cache", False)  # Of no use without the devices.
  absent = Slice(*preflight.topology_devices(options.topology), known={})
  if options.search:
    plans = search(options, config, absent)
    show_plans(plans)
  else:
    plans = [compile_plan(options, config, absent)]
  best = plans[0]
  show(options, best, absent.chip)
  if options.json:
    figures = {
      "options": flags.to_dict(options),
      "config": flags.to_dict(config),
      "fits": not best.refused,
      "plans": [
        plan._asdict() | {"programs": [program._asdict() for program in plan.programs]}
        for plan in plans
      ],
    }
    pathlib.Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
  return entry.EX_UNAVAILABLE if best.refused else 0


def algorithm_of(argv: Sequence[str]) -> str:
  """The flag that decides which other flags there are, read before they are defined."""
  prefix = "--algorithm="
  given = [word.removeprefix(prefix) for word in argv if word.startswith(prefix)]
  return given[0] if given and given[0] in programs.ALGORITHMS else ""


if __name__ == "__main__":
  read_options = flags.define(Options)
  name = algorithm_of(sys.argv)
  read_config = flags.define(programs.ALGORITHMS[name][0].Config) if name else lambda: None
  entry.run(lambda argv: main(read_options(), read_config()))
