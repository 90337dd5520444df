"""Names of accelerators, and their hosts, devices, topologies and images.

https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and the pages of each generation.
"""

import difflib
import math
import re
from typing import NamedTuple


class Generation(NamedTuple):
  """A generation of TPUs.

  Attributes:
    prefix: First part of an accelerator's name.
    counted: Count of one chip in the second part of the name: 1 for chips, 2 for TensorCores.
    devices: JAX devices per chip.
    topologies: Shapes of the generation's slices.
    gke: Value of the node selector `cloud.google.com/gke-tpu-accelerator`.
    runtime: Image of a TPU VM; empty if the generation is only on GKE.
  """

  prefix: str
  counted: int
  devices: int
  topologies: tuple[str, ...]
  gke: str
  runtime: str


class Accelerator(NamedTuple):
  """A slice of TPUs, or a host with GPUs.

  Attributes:
    name: Name in Google Cloud and xpk, or MODEL:COUNT for GPUs.
    hosts: Number of hosts in a slice.
    devices: Number of JAX devices in a slice, over all hosts.
    chips: Number of TPU chips or GPUs in a slice.
    topology: Generation and shape, such as v5e:4x4; empty for GPUs.
    gke: Value of the node selector `cloud.google.com/gke-tpu-accelerator`; empty for GPUs.
    runtime: Image of a TPU VM; empty if there are none.
  """

  name: str
  hosts: int
  devices: int
  chips: int
  topology: str = ""
  gke: str = ""
  runtime: str = ""

  @property
  def is_tpu(self) -> bool:
    return bool(self.topology)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
  *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
  *("16x16x16", "16x16x24"),
)

GENERATIONS = {
  "v4": Generation("v4", 2, 1, _CUBES[:10], "tpu-v4-podslice", "tpu-ubuntu2204-base"),
  "v5e": Generation("v5litepod", 1, 1, _FLAT, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite"),
  "v5p": Generation("v5p", 2, 1, _CUBES, "tpu-v5p-slice", "v2-alpha-tpuv5"),
  "v6e": Generation("v6e", 1, 1, _FLAT, "tpu-v6e-slice", "v2-alpha-tpuv6e"),
  "tpu7x": Generation("tpu7x", 2, 2, _CUBES[:11], "tpu7x", ""),
}

# Models that SkyPilot knows; a cloud rents hosts of 1, 2, 4, 8 or 16 of them.
GPUS = (
  *("T4", "V100", "V100-32GB", "A10G", "L4", "L40", "L40S", "A100", "A100-80GB"),
  *("H100", "H200", "B200", "B300", "GB200"),
)


def _slice(name: str, generation: Generation, topology: str) -> Accelerator:
  chips = math.prod(map(int, topology.split("x")))
  # Small flat slices are one host; all others are made of hosts of four chips.
  single_host = chips <= 8 if generation.topologies is _FLAT else chips <= 4
  return Accelerator(
    name=f"{generation.prefix}-{chips * generation.counted}",
    hosts=1 if single_host else chips // 4,
    devices=chips * generation.devices,
    chips=chips,
    topology=f"{name}:{topology}",
    gke=generation.gke,
    runtime=generation.runtime,
  )


SLICES = {
  made.name: made
  for name, generation in GENERATIONS.items()
  for topology in generation.topologies
  for made in [_slice(name, generation, topology)]
}


def find(name: str) -> Accelerator:
  """Finds an accelerator by a name such as `v5litepod-16`, `v5p-256` or `H100:8`.

  Raises:
    ValueError: If there is none; the message lists similar names.
  """
  if name in SLICES:
    return SLICES[name]
  gpu = re.fullmatch(r"([\w-]+):([1-9][0-9]?)", name)
  if gpu and gpu[1] in GPUS and int(gpu[2]) in (1, 2, 4, 8, 16):
    return Accelerator(name, hosts=1, devices=int(gpu[2]), chips=int(gpu[2]))
  raise ValueError(f"accelerator={name} is not known; {_hint(name)}")


def _hint(name: str) -> str:
  # Other spellings: generation and shape, or generation and number.
  spelled = {f"{gpu}:8".lower(): f"{gpu}:8" for gpu in GPUS}
  for one in SLICES.values():
    generation = one.topology.split(":")[0]
    number = one.name.rpartition("-")[2]
    spelled |= dict.fromkeys((one.topology, f"{generation}-{number}", one.name), one.name)
  words = re.split("[-:]", name.lower())
  if name.lower() not in spelled:
    for generation, facts in GENERATIONS.items():
      if {generation, facts.prefix} & set(words):
        return f"there are {', '.join(n for n in SLICES if n.startswith(f'{facts.prefix}-'))}"
  close = difflib.get_close_matches(name.lower(), spelled, n=1)
  if close:
    return f"did you mean {spelled[close[0]]}?"
  families = ", ".join(f"{generation.prefix}-N" for generation in GENERATIONS.values())
  return f"give {families}, or a GPU as MODEL:COUNT, such as H100:8"
