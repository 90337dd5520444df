"""What compiled programs ask of a slice of TPUs, which need not be there.

XLA compiles for a TPU topology on any machine that has libtpu. The compiler then knows the memory
of a chip, or that it does not suffice, and which collectives there are. It does not know the time:
its count of operations takes the body of a loop once. So operations are counted here from the
architecture, and the time is a roofline: what the chip cannot beat, not what it will reach.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_GIB = 2**30


class Chip(NamedTuple):
  """What one device of a TPU can do at best.

  Attributes:
    hbm_bytes: Memory that the compiler hands out.
    flops: bfloat16 operations per second.
    hbm_bandwidth: Bytes per second.
    ici_bandwidth: Bytes per second that a ring along one axis of the torus sends, both ways.
  """

  hbm_bytes: float
  flops: float
  hbm_bandwidth: float
  ici_bandwidth: float


# Figures of https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, by the name in front of
# the shape of a topology. Memory is what the compiler says is available. A chip of tpu7x is two
# devices, which get half of it each.
CHIPS = {
  "v5e": Chip(15.75 * _GIB, 197e12, 819e9, 100e9),
  "v5p": Chip(95.73 * _GIB, 459e12, 2765e9, 200e9),
  "v6e": Chip(31.24 * _GIB, 918e12, 1640e9, 224e9),
  "tpu7x": Chip(94.74 * _GIB, 1153e12, 3690e9, 200e9),
}


class Collective(NamedTuple):
  """One collective operation of a program.

  Attributes:
    kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute.
    result: Its type on one device, such as bf16[4096,3584].
    bytes: What each device sends every time, by the algorithm of a ring.
    trips: How often each loop around it runs, the outermost first; None if only the run will tell.
  """

  kind: str
  result: str
  bytes: float
  trips: tuple[int | None, ...]

  def total_bytes(self, unknown_trips: int = 1) -> float:
    """What each device sends in one run of the program, if the other loops run so often."""
    return self.bytes * math.prod(unknown_trips if n is None else n for n in self.trips)


_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HEADER = re.compile(r"(ENTRY\s+)?%?([^\s(]+) .*\{$")
# A type never has a word in front of a parenthesis after a space.
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([^\s=]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"\b(body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*\w*)\[([0-9,]*)\]")


class _Instruction(NamedTuple):
  root: bool
  name: str
  result: str
  kind: str
  rest: str  # Operands and attributes.


def collectives(hlo: str) -> list[Collective]:
  """The collectives of a compiled program, `compiled.as_text()`, in the order of its calls.

  The text may be that of the CPU or of the TPU compiler. A reduce-scatter, which the latter writes
  as an all-reduce in a computation of that name, is counted as one.
  """
  computations, entry = _parse(hlo)
  return list(_walk(computations, entry, ()))


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
  computations: dict[str, list[_Instruction]] = {}
  entry = name = ""
  for line in hlo.splitlines():
    if not line.startswith(" "):
      header = _HEADER.match(line)
      if header and not line.startswith("HloModule"):
        name = header[2]
        computations[name] = []
        entry = name if header[1] else entry
    elif name and (match := _INSTRUCTION.match(line)):
      computations[name].append(_Instruction(bool(match[1]), *match.groups()[1:]))
  if not entry:
    raise ValueError("the text has no ENTRY computation; it is not that of a compiled program")
  return computations, entry


def _walk(
  computations: dict[str, list[_Instruction]], name: str, trips: tuple[int | None, ...]
) -> Iterator[Collective]:
  for instruction in computations[name]:
    kind = instruction.kind.removesuffix("-start")
    if kind in _KINDS and not (kind == "all-reduce" and name.startswith("all-reduce-scatter")):
      yield _collective(kind, instruction, trips)
      continue
    if "calls=%all-reduce-scatter" in instruction.rest:
      called = re.search(r"calls=%([\w.\-]+)", instruction.rest)
      inner = computations[called[1]] if called else []
      reduce = next(i for i in inner if i.kind == "all-reduce")
      scattered = instruction._replace(rest=reduce.rest)
      yield _collective("reduce-scatter", scattered, trips)
      continue
    inside = trips
    if kind == "while":
      inside += (_trip_count(computations, instruction.rest),)
    called = [match[1] for match in _CALLED.findall(instruction.rest)]
    for names in _CALLED_LISTS.findall(instruction.rest):
      called += [other.strip().lstrip("%") for other in names.split(",")]
    for other in called:
      if other in computations:
        yield from _walk(computations, other, inside)


def _trip_count(computations: dict[str, list[_Instruction]], attributes: str) -> int | None:
  """How often a loop runs: said by the compiler, or the bound of a counter that starts at 0."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', attributes):
    return int(known[1])
  condition = re.search(r"\bcondition=%?([\w.\-]+)", attributes)
  body = computations[condition[1]] if condition else []
  root = next((i for i in body if i.root), None)
  if root is None or root.kind != "compare" or "direction=LT" not in root.rest:
    return None
  bounds = [i.rest for i in body if i.kind == "constant" and f"%{i.name}" in root.rest]
  return int(bounds[0].split(")")[0]) if len(bounds) == 1 else None


def _collective(kind: str, instruction: _Instruction, trips: tuple[int | None, ...]) -> Collective:
  arrays = [(text, size) for text, size in _arrays(instruction.result) if text != "u32[]"]
  if instruction.kind.endswith("-start") and kind != "all-reduce":
    arrays = arrays[len(arrays) // 2 :]  # Operands stand in front of results.
  size = sum(size for _, size in arrays)
  group = _group_size(instruction.rest)
  sent = {
    "all-gather": (group - 1) / group,
    "all-reduce": 2 * (group - 1) / group,
    "reduce-scatter": group - 1,
    "all-to-all": (group - 1) / group,
    "collective-permute": 1,
  }[kind]
  return Collective(kind, " ".join(text for text, _ in arrays), size * sent, trips)


def _arrays(types: str) -> Iterator[tuple[str, float]]:
  """Type and bytes of each array in the text of a type."""
  for name, dimensions in _ARRAY.findall(types):
    bits = re.search(r"\d+", name)
    width = 8 if name == "pred" else int(bits[0]) if bits else 0
    elements = math.prod(int(n) for n in dimensions.split(",") if n)
    yield f"{name}[{dimensions}]", elements * width / 8


def _group_size(attributes: str) -> int:
  """Devices that take part in one instance of a collective; those of a permute do not matter."""
  if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
    return int(match[1])
  if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return len(match[1].split(","))
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
  return 2


def summarize(found: Iterable[Collective], unknown_trips: int = 1) -> dict[str, dict[str, float]]:
  """By kind of collective: how many there are, in loops too, and the bytes that a device sends."""
  rows: dict[str, dict[str, float]] = collections.defaultdict(
    lambda: {"count": 0, "in_loops": 0, "bytes": 0.0}
  )
  for collective in found:
    row = rows[collective.kind]
    row["count"] += 1
    row["in_loops"] += bool(collective.trips)
    row["bytes"] += collective.total_bytes(unknown_trips)
  return dict(rows)
