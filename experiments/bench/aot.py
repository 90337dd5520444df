r"""Compiles train steps for TPUs that need not be there, and those of tunix for the same shape.

One model and slice (half an hour on two cores; it first installs tunix, some 2 GB):
  python -m experiments.bench.aot --presets=llama3_1b --topologies=v5e:4x4
All of it (hours):
  python -m experiments.bench.aot --json=aot.json

It needs libtpu: pip install 'rlhf_jax[tpu]'. Both sides are compiled with the same libtpu, on the
same mesh, with shapes in place of weights. Of each compiled program the table shows, for one chip,
the peak of HBM, the operations and bytes of HBM that its instructions take, the bytes that it sends
with the number of collectives, and the roofline: the least time for the largest of the three. All
are counted in the text of the program, the body of a loop as often as it runs.

Our params and optimizer state are float32 and the computation is bfloat16. tunix computes in the
dtype of its params; --peer_dtypes lists those to compile.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from rlhf_jax import flags, hlo, preflight, ranges, reporting, sharding
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models.presets import PRESETS
from ..lab import models, plans
from . import compare, measure, turns
from .works import OPTIM

WORKS = ("sft", "dpo")
PROGRAM = compare.HERE / "peers" / "tunix_programs.py"
GIB, GB = 2**30, 1e9


@dataclasses.dataclass(frozen=True)
class Config:
  """Programs to compile.

  Attributes:
    works: Methods, among sft and dpo.
    presets: Architectures; see experiments.sft.
    topologies: TPU slices, such as v5e:4x4 or v5p:4x4x8.
    mesh: Devices per mesh axis, fsdp and tensor.
    batch_size: Sequences or pairs per step; 0 is one per chip.
    prompt: Tokens of a prompt.
    response: Tokens of a response.
    remat: Activations that the backward pass recomputes; see experiments.sft.
    peer_dtypes: Dtypes of the params of tunix, among float32 and bfloat16; empty leaves tunix out.
    environments: Folder of the virtual environments; made if it does not exist.
    json: File to write the results to, after each side; empty writes none.
    show: File with results to show instead of compiling.
  """

  works: tuple[str, ...] = WORKS
  presets: tuple[str, ...] = ("llama3_1b", "llama3_8b")
  topologies: tuple[str, ...] = ("v5e:4x4", "v5p:4x4x8")
  mesh: str = "fsdp:-1"
  batch_size: int = 0
  prompt: int = 1024
  response: int = 1024
  remat: Literal["none", "full"] = "full"
  peer_dtypes: tuple[str, ...] = ("float32", "bfloat16")
  environments: str = "~/.cache/rlhf_jax_bench"
  json: str = ""
  show: str = ""

  def __post_init__(self):
    known = {"works": WORKS, "presets": PRESETS, "peer_dtypes": ("float32", "bfloat16")}
    positive, counts = ("prompt", "response"), ("batch_size",)
    ranges.check(self, at_least_one=positive, non_negative=counts, among=known)


Row = dict[str, Any]


def row_of(
  chip: preflight.Chip,
  counted: Mapping[str, float],
  sent: Mapping[str, Mapping[str, float]],
  memory: Mapping[str, float],
) -> Row:
  """Row of a program, for one chip.

  Args:
    chip: Capabilities of the chip.
    counted: Operations and bytes of `hlo.Counts`.
    sent: Collectives by kind; see `hlo.summarize`.
    memory: Fields `arguments`, `temporaries`, `peak` and `compile_seconds`.
  """
  network = sum(kind["bytes"] for kind in sent.values())
  seconds = {
    "compute": counted["flops"] / chip.flops,
    "memory": counted["bytes"] / chip.hbm_bandwidth,
    "network": network / chip.ici_bandwidth,
  }
  return {
    **memory,
    **counted,
    "collectives": sent,
    "sent": network,
    "seconds": seconds,
    "roofline": max(seconds.values()),
  }


def script_config(config: Config, work: str, preset: str, rows: int) -> Any:
  """Config of the script of a work."""
  return plans.script_of(work).Config(
    batch_size=rows,
    model=models.ModelOptions(preset=preset, dtype="bfloat16", remat=config.remat),
    data=DataConfig(max_prompt_length=config.prompt, max_response_length=config.response),
    sampling=SamplingConfig(config.response),
    optim=OPTIM,
  )


def compile_ours(config: Config, preset: str, absent: plans.Slice, rows: int) -> dict[str, Row]:
  """Compiles the programs of our scripts; returns rows by "work program"."""
  result: dict[str, Row] = {}
  for work in config.works:
    given = script_config(config, work, preset, rows)
    plan = plans.compile_plan(work, config.mesh, given, absent)
    for program in plan.programs:
      memory = {
        "arguments": program.arguments,
        "temporaries": program.temporaries,
        "peak": program.peak,
        "compile_seconds": program.compile_seconds,
      }
      row = row_of(absent.chip, program.counted, program.collectives, memory)
      result[f"{work} {program.name}"] = row | {"least_flops": program.flops / len(absent.devices)}
    if plan.refused:
      result[f"{work} {plan.stopped_at}"] = {"refused": plan.refused}
  return result


def tpu_library() -> str:
  """Path of the library of libtpu.

  Raises:
    UsageError: libtpu is not installed.
  """
  spec = importlib.util.find_spec("libtpu")
  if spec is None or not spec.origin:
    raise flags.UsageError("libtpu is not installed: pip install 'rlhf_jax[tpu]'")
  return str(pathlib.Path(spec.origin).parent / "libtpu.so")


def peer_spec(
  config: Config, preset: str, topology: str, absent: plans.Slice, rows: int, dtype: str
) -> dict[str, Any]:
  """Content of the JSON file that `peers/tunix_programs.py` reads."""
  mesh = sharding.make_mesh(config.mesh, absent.devices)
  data, fsdp, tensor = (mesh.shape[axis] for axis in sharding.AXES)
  if data > 1:
    raise flags.UsageError(f"--mesh={config.mesh}: tunix has no data axis; use fsdp and tensor")
  return {
    "model": dataclasses.asdict(PRESETS[preset]),
    "remat": config.remat,
    "dtype": dtype,
    "topology": topology,
    "mesh": [[device.id for device in row] for row in mesh.devices.reshape(fsdp, tensor)],
    "batch_size": rows,
    "prompt": config.prompt,
    "response": config.response,
    "optimizer": dataclasses.asdict(OPTIM),
  }


def compile_theirs(
  python: pathlib.Path, spec: Mapping[str, Any], works: Sequence[str], chip: preflight.Chip
) -> dict[str, Row]:
  """Lets tunix compile; returns rows by "work program", or the reason for "work"."""
  result: dict[str, Row] = {}
  variables = os.environ | {"TPU_LIBRARY_PATH": tpu_library(), "JAX_PLATFORMS": "cpu"}
  variables.pop("PYTHONPATH", None)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    path = folder / "spec.json"
    path.write_text(json.dumps({**spec, "folder": str(folder)}), encoding="utf-8")
    for work in works:
      command = [str(python), str(PROGRAM), str(path), work]
      done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
      if done.returncode:
        result[work] = {"refused": turns.last_line(done.stderr)}
        continue
      for file in sorted((folder / work).iterdir()):
        if file.suffix == ".refused":
          result[f"{work} {file.stem}"] = {"refused": _reason(file.read_text("utf-8"))}
        if file.suffix == ".hlo":
          text = file.read_text("utf-8")
          memory = json.loads(file.with_suffix(".json").read_text("utf-8"))
          sent = hlo.summarize(hlo.collectives(text))
          result[f"{work} {file.stem}"] = row_of(chip, hlo.count(text)._asdict(), sent, memory)
  return result


def _reason(message: str) -> str:
  return preflight.refusal(message) or turns.last_line(message)


def show(content: Mapping[str, Any]) -> None:
  """Shows a table for each model and slice, in at most 80 columns."""
  for place, sides in content["results"].items():
    rows = {
      f"{name} {side}": _cells(row)
      for name in sorted({name for side in sides.values() for name in side})
      for side, programs in sides.items()
      if (row := programs.get(name)) is not None
    }
    reporting.show_summary(place, rows)


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
  if "refused" in row:
    return {"GiB": "none"}
  slowest = max(row["seconds"], key=row["seconds"].__getitem__)
  count = sum(kind["count"] for kind in row["collectives"].values())
  return {
    "GiB": f"{row['peak'] / GIB:.2f}",
    "TFLOP": f"{row['flops'] / 1e12:.3g}",
    "GB": f"{row['bytes'] / GB:.0f}",
    "sent GB": f"{row['sent'] / GB:.3g} ({count:.0f})",
    "roofline, s": f"{row['roofline']:.3g} {slowest}",
  }


def note_refused(place: str, side: str, rows: Mapping[str, Row]) -> None:
  """Says why programs were not compiled."""
  for name, row in rows.items():
    if "refused" in row:
      reporting.note(f"{place}: {name}, {side}: {row['refused']}")


def run(config: Config) -> dict[str, Any]:
  """Compiles and shows what the config says; returns the content of the JSON file."""
  if config.show:
    content = json.loads(pathlib.Path(config.show).read_text(encoding="utf-8"))
    show(content)
    return content
  jax.config.update("jax_platforms", "cpu")  # JAX would look for a TPU otherwise.
  jax.config.update("jax_enable_compilation_cache", False)  # No use without the devices.
  results: dict[str, Any] = {}
  content = measure.content_of(config, results=results)
  peer = compare.PEERS["tunix"]
  environment = pathlib.Path(config.environments).expanduser() / peer.label
  for topology in config.topologies:
    absent = plans.Slice(*preflight.topology_devices(topology), known={})
    rows = config.batch_size or len(absent.devices)
    for preset in config.presets:
      place = f"{preset} on {topology}, {rows} rows"
      sides = results[place] = {"ours": compile_ours(config, preset, absent, rows)}
      note_refused(place, "ours", sides["ours"])
      measure.write_json(config.json, content)  # The next side may take hours.
      for dtype in config.peer_dtypes:
        python = compare.make_environment(environment, peer.requirements)
        spec = peer_spec(config, preset, topology, absent, rows, dtype)
        side = f"tunix {dtype}"
        sides[side] = compile_theirs(python, spec, config.works, absent.chip)
        note_refused(place, side, sides[side])
        measure.write_json(config.json, content)
  show(content)
  return content


if __name__ == "__main__":
  measure.run_script(run, Config)
