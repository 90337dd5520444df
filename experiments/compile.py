r"""Compiles every program of an algorithm for a TPU slice, without the TPUs, and says if it fits.

  python -m experiments.compile --algorithm=ppo --topology=v5p:4x4x8 --mesh=fsdp:32,tensor:4 \
    --model.preset=llama3_8b --model.dtype=bfloat16 --model.remat=full --batch_size=128

It needs libtpu (pip install 'rlhf_jax[tpu]') but no TPU, and takes three to twenty minutes for 8B
parameters. It compiles the programs that the script of the algorithm runs with the same flags, for
the longest rows that these flags allow: --data.max_prompt_length, --data.max_response_length and
--sampling.max_new_tokens. A reward model is assumed to have the architecture of the policy, unless
--reward.name is given.

The table shows the memory per chip, the communication between chips (with the number of
collectives inside loops), and a roofline, which is the least time that the program can take. The
exit code is 0 if all programs fit. It is 69 if one does not; the message of the compiler is shown.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from rlhf_jax import entry, flags, preflight, ranges, reporting, workdir
from .lab import plans


@dataclasses.dataclass(frozen=True)
class Options:
  """Algorithm, and devices to compile for. All other flags are those of the algorithm's script.

  Attributes:
    algorithm: Name of the script, such as ppo, or of your own module, such as my_method for
      my_method.py in the working directory or on PYTHONPATH. With it, --help also lists the flags
      of the script.
    topology: TPU slice, such as v5e:4x4, v5p:4x4x8, v6e:16x16 or tpu7x:4x4x4.
    mesh: Devices per mesh axis, such as fsdp:32,tensor:4; see the script of the algorithm.
    search: Number of meshes to try, the most promising first, or only --mesh if it is given. Each
      is compiled with the fastest remat policy and micro-batches that fit, and beside them what
      one would write by hand, all chips on fsdp with full remat. 0 tries --mesh with the given
      settings.
    json: File to write the plans to; empty writes none.
  """

  algorithm: str
  topology: str
  mesh: str = ""
  search: int = 0
  json: str = ""

  def __post_init__(self):
    ranges.check(self, non_negative=("search",))
    plans.script_of(self.algorithm)


def show(options: Options, plan: plans.Plan, chip: preflight.Chip) -> None:
  """Shows the table of a plan."""
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
  """Compiles the programs, shows and writes the plans, and returns the exit code."""
  if config is None:
    raise flags.UsageError("--algorithm=NAME must be on the command line, not in a file of flags")
  jax.config.update("jax_platforms", "cpu")  # JAX would look for a TPU otherwise.
  jax.config.update("jax_enable_compilation_cache", False)  # No use without the devices.
  absent = plans.Slice(*preflight.topology_devices(options.topology), known={})
  if options.search:
    ranked = plans.search(options.algorithm, options.mesh, options.search, config, absent)
    hand = None if options.mesh else plans.by_hand(options.algorithm, config, absent)
    plans.show_search(ranked, hand)
  else:
    hand = None
    ranked = [plans.compile_plan(options.algorithm, options.mesh, config, absent)]
  best = ranked[0]
  show(options, best, absent.chip)
  if options.json:
    content = {
      "options": flags.to_dict(options),
      "config": flags.to_dict(config),
      "fits": not best.refused,
      "plans": [plan.to_dict() for plan in ranked],
      "by_hand": hand and hand.to_dict(),
    }
    workdir.atomic_write(workdir.local_path(options.json), json.dumps(content, indent=2) + "\n")
  return os.EX_UNAVAILABLE if best.refused else 0


def algorithm_of(argv: Sequence[str]) -> str:
  """Reads --algorithm, which decides which other flags there are, before they are defined."""
  for word, following in zip(argv, [*argv[1:], ""], strict=True):
    name, given, value = word.lstrip("-").partition("=")
    if name == "algorithm" and word.startswith("-"):
      return value if given else following
  return ""


def script_of(name: str) -> Any:
  """Returns the module of a script; ends the process if there is none."""
  try:
    return plans.script_of(name)
  except ValueError as error:
    sys.stderr.write(reporting.escape(f"--{error}") + "\n")
    sys.exit(os.EX_USAGE)


if __name__ == "__main__":
  read_options = flags.define(Options)
  name = algorithm_of(sys.argv)
  read_config = flags.define(script_of(name).Config) if name else lambda: None
  entry.run(lambda argv: main(read_options(), read_config()))
