"""Compiled programs, read from the text that XLA prints: collectives, operations, bytes moved."""

import collections
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Collective(NamedTuple):
  """One collective operation of a program.

  Attributes:
    kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute.
    result: Type of the result on one device, such as bf16[4096,3584].
    bytes: Bytes that each device sends per execution, with the ring algorithm.
    trips: Trip count of each loop around it, outermost first; None if it is not known statically.
  """

  kind: str
  result: str
  bytes: float
  trips: tuple[int | None, ...]

  def total_bytes(self, unknown_trips: int = 1) -> float:
    """Bytes that each device sends per run of the program, with a count for unknown loops."""
    return self.bytes * math.prod(unknown_trips if n is None else n for n in self.trips)


_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# The TPU compiler spreads an asynchronous collective over fusions that compute meanwhile. Each
# fusion names the collective again, as do its start and its end.
_PIECE = "async_collective_fusion"
_HEADER = re.compile(r"(ENTRY\s+)?%?([^\s(]+) .*\{$")
# A type never contains a space, a word and "(" in a row, so the first such word is the kind.
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([^\s=]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"\b(body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*\w*)\[([0-9,]*)\]")


class Instruction(NamedTuple):
  """Line of a computation.

  Attributes:
    root: True if it is the result of the computation.
    name: Name of its result.
    result: Type of its result.
    kind: Operation.
    rest: Operands and attributes.
  """

  root: bool
  name: str
  result: str
  kind: str
  rest: str


def collectives(hlo: str) -> list[Collective]:
  """Lists the collectives of a compiled program, `compiled.as_text()`, in call order.

  The text may come from the CPU or the TPU compiler. The TPU compiler writes a reduce-scatter as an
  all-reduce in a computation of that name; it counts as a reduce-scatter.
  """
  computations, entry = parse(hlo)
  return list(_walk(computations, entry, ()))


def parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
  """Reads the text of a compiled program into its computations and the name of the first one."""
  computations: dict[str, list[Instruction]] = {}
  entry = name = ""
  for line in hlo.splitlines():
    if not line.startswith(" "):
      header = _HEADER.match(line)
      if header and not line.startswith("HloModule"):
        name = header[2]
        computations[name] = []
        entry = name if header[1] else entry
    elif name and (match := _INSTRUCTION.match(line)):
      computations[name].append(Instruction(bool(match[1]), *match.groups()[1:]))
  if not entry:
    raise ValueError("the text has no ENTRY computation; it is not that of a compiled program")
  return computations, entry


def _walk(
  computations: dict[str, list[Instruction]], name: str, trips: tuple[int | None, ...]
) -> Iterator[Collective]:
  for instruction in computations[name]:
    kind = instruction.kind.removesuffix("-start")
    if kind in _KINDS and name.startswith(_PIECE):
      continue  # It started elsewhere.
    if instruction.name.startswith("async-collective-done"):
      continue
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
      inside += (trip_count(computations, instruction.rest),)
    for other in called_by(instruction.rest, computations):
      yield from _walk(computations, other, inside)


def called_by(attributes: str, computations: Mapping[str, Any]) -> list[str]:
  """Names of the computations that an instruction calls; of a loop, its body."""
  called = [match[1] for match in _CALLED.findall(attributes)]
  for names in _CALLED_LISTS.findall(attributes):
    called += [other.strip().lstrip("%") for other in names.split(",")]
  return [name for name in called if name in computations]


def trip_count(computations: Mapping[str, Sequence[Instruction]], attributes: str) -> int | None:
  """Trip count of a loop: as given by the compiler, or from the bound of a counter from 0."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', attributes):
    return int(known[1])
  condition = re.search(r"\bcondition=%?([\w.\-]+)", attributes)
  test = computations[condition[1]] if condition else []
  root = next((i for i in test if i.root), None)
  if root is None or root.kind != "compare" or "direction=LT" not in root.rest:
    return None
  bounds = [i for i in test if i.kind == "constant" and f"%{i.name}" in root.rest]
  counters = [i for i in test if i.kind == "get-tuple-element" and f"%{i.name}" in root.rest]
  if len(bounds) != 1:
    return None
  step = _step(computations, attributes, _index(counters[0])) if len(counters) == 1 else 1
  return -(-_constant(bounds[0]) // step)


def _constant(instruction: Instruction) -> int:
  return int(instruction.rest.split(")")[0])


def _index(instruction: Instruction) -> int:
  """Place of a get-tuple-element."""
  match = re.search(r"\bindex=(\d+)", instruction.rest)
  return int(match[1]) if match else 0


def _step(computations: Mapping[str, Sequence[Instruction]], attributes: str, place: int) -> int:
  """Number that the body of a loop adds to a counter: 2 after it was unrolled once, say."""
  called = re.search(r"\bbody=%?([\w.\-]+)", attributes)
  body = {i.name: i for i in computations[called[1]]} if called else {}
  root = next((i for i in body.values() if i.root), None)
  if root is None or root.kind != "tuple" or place >= len(operands(root)):
    return 1
  counter = body.get(operands(root)[place])
  if counter is None or counter.kind != "add":
    return 1
  added = [body[name] for name in operands(counter) if name in body]
  steps = [_constant(i) for i in added if i.kind == "constant"]
  return steps[0] if len(steps) == 1 and steps[0] > 0 else 1


def _collective(kind: str, instruction: Instruction, trips: tuple[int | None, ...]) -> Collective:
  sizes = [(text, size) for text, size in arrays(instruction.result) if text != "u32[]"]
  if instruction.kind.endswith("-start") and kind != "all-reduce":
    sizes = sizes[len(sizes) // 2 :]  # Operands come before results.
  size = sum(size for _, size in sizes)
  group = _group_size(instruction.rest)
  sent = {
    "all-gather": (group - 1) / group,
    "all-reduce": 2 * (group - 1) / group,
    "reduce-scatter": group - 1,
    "all-to-all": (group - 1) / group,
    "collective-permute": 1,
  }[kind]
  return Collective(kind, " ".join(text for text, _ in sizes), size * sent, trips)


def arrays(types: str) -> Iterator[tuple[str, float]]:
  """Yields type and bytes of each array in the text of a type."""
  for name, dimensions in _ARRAY.findall(types):
    bits = re.search(r"\d+", name)
    width = 8 if name == "pred" else int(bits[0]) if bits else 0
    elements = math.prod(int(n) for n in dimensions.split(",") if n)
    yield f"{name}[{dimensions}]", elements * width / 8


def _group_size(attributes: str) -> int:
  """Number of devices in one group of a collective; irrelevant for a permute."""
  if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
    return int(match[1])
  if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return len(match[1].split(","))
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
  return 2


def summarize(items: Iterable[Collective], unknown_trips: int = 1) -> dict[str, dict[str, float]]:
  """Sums up collectives by kind: `count`, `in_loops`, and `bytes` that each device sends."""
  rows: dict[str, dict[str, float]] = collections.defaultdict(
    lambda: {"count": 0, "in_loops": 0, "bytes": 0.0}
  )
  for collective in items:
    row = rows[collective.kind]
    row["count"] += 1
    row["in_loops"] += bool(collective.trips)
    row["bytes"] += collective.total_bytes(unknown_trips)
  return dict(rows)


class Counts(NamedTuple):
  """Work of one device in a run of a program.

  Attributes:
    flops: Operations of matrix products and convolutions, of splash attention, and of kernels that
      state theirs.
    bytes: Bytes of HBM that its instructions read and write. A slice counts as its own size.
  """

  flops: float = 0.0
  bytes: float = 0.0

  def plus(self, other: "Counts", times: int = 1) -> "Counts":
    """Adds the counts of something that runs `times` times."""
    return Counts(self.flops + times * other.flops, self.bytes + times * other.bytes)


def count(hlo: str, unknown_trips: int = 1) -> Counts:
  """Counts operations and bytes of a compiled program, the bodies of loops as often as they run.

  Args:
    hlo: Text of the program, `compiled.as_text()`.
    unknown_trips: Trip count of loops whose end depends on data.
  """
  computations, entry = parse(hlo)
  return _Counter(computations, unknown_trips).run(entry)


# They move nothing, or their other half does.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "get-dimension-size"}
_FREE_TARGETS = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast|Assume\w+)"')
# Products in each kernel. A product takes T * S * K operations per head, half of what it would take
# without the causal mask.
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
_CALLS = {"call", "async-start", "conditional", "while"}
_ATTRIBUTE = re.compile(r"\bcalls=%?([\w.\-]+)")
_ON_CHIP = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\([1-9]\d*\)[^}]*\}")


class _Counter:
  """Counts of the computations of a program."""

  def __init__(self, computations: Mapping[str, list[Instruction]], unknown_trips: int):
    self._computations = computations
    self._unknown = unknown_trips
    self._named = {name: {i.name: i for i in body} for name, body in computations.items()}
    self._known: dict[str, Counts] = {}

  def run(self, name: str) -> Counts:
    """Counts of one run of a computation whose results are kept in memory."""
    if name not in self._known:
      total = Counts()
      for instruction in self._computations[name]:
        total = total.plus(self._instruction(name, instruction))
      self._known[name] = total
    return self._known[name]

  def _instruction(self, name: str, instruction: Instruction) -> Counts:
    kind = instruction.kind
    if kind in _FREE or kind.endswith(("-done", "-update")):
      return Counts()
    if kind in _CALLS:
      return self._called(instruction)
    if kind == "custom-call" and _FREE_TARGETS.search(instruction.rest):
      return Counts()
    flops = self._flops(name, instruction)
    if kind == "custom-call":
      flops += self._kernel(name, instruction)
    read, written = self._read(name, instruction), self._written(name, instruction)
    if kind.endswith("-start") and kind != "all-reduce-start":  # Its result has its operands, too.
      written = max(written - read, 0.0)
      if kind == "slice-start":
        given = sum(_all_bytes(self._named[name][o].result) for o in operands(instruction))
        read = min(read, _all_bytes(instruction.result) - given)
    return Counts(flops, read + written)

  def _called(self, instruction: Instruction) -> Counts:
    called = called_by(instruction.rest, self._computations)
    runs = [self.run(name) for name in called]
    if instruction.kind == "conditional":
      return max(runs, default=Counts())
    times = 1
    if instruction.kind == "while":
      times = trip_count(self._computations, instruction.rest)
      times = self._unknown if times is None else times
    return functools.reduce(lambda total, run: total.plus(run, times), runs, Counts())

  def _flops(self, name: str, instruction: Instruction) -> float:
    """Operations of an instruction, and of those inside it if it is a fusion."""
    if instruction.kind == "fusion" and (inside := _ATTRIBUTE.search(instruction.rest)):
      return sum(self._flops(inside[1], inner) for inner in self._computations[inside[1]])
    if instruction.kind not in ("dot", "convolution"):
      return 0.0
    shapes = [_shape(self._named[name][o].result) for o in operands(instruction)[:2]]
    result = _shape(instruction.result)
    if instruction.kind == "dot":
      axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
      contracted = [int(n) for n in axes[1].split(",") if n] if axes else []
      return 2.0 * math.prod(result) * math.prod(shapes[0][n] for n in contracted)
    return _convolution(instruction.rest, shapes[0], shapes[1], result)

  def _kernel(self, name: str, instruction: Instruction) -> float:
    """Operations that a kernel states, and those of causal splash attention."""
    if stated := re.search(r'"cost_estimate".*?"flops":\s*"?(\d+)', instruction.rest):
      return float(stated[1])
    products = next((n for kind, n in _SPLASH.items() if instruction.name.startswith(kind)), 0)
    if not products:
      return 0.0
    given = [self._named[name][o].result for o in operands(instruction)]
    # Queries, keys and values; the arrays before them are of the mask.
    query, key = [_shape(text) for text in given if text.startswith(("bf16[", "f32["))][:2]
    return float(products * math.prod(query) * key[-2])

  def _written(self, name: str, instruction: Instruction) -> float:
    """Bytes that the result takes in HBM; of an update in place, those of the update."""
    if instruction.kind == "fusion" and (inside := _ATTRIBUTE.search(instruction.rest)):
      if instruction.name.startswith("async-collective-done"):
        return 0.0
      root = next(i for i in self._computations[inside[1]] if i.root)
      if root.kind == "tuple":
        return sum(self._part(inside[1], operand) for operand in operands(root))
      if root.kind in ("dynamic-update-slice", "scatter"):
        return self._update(inside[1], root)
      return _bytes(instruction.result)
    return self._update(name, instruction)

  def _part(self, name: str, operand: str) -> float:
    """Bytes of a part of the result of a fusion."""
    part = self._source(name, operand)
    if part.kind == "parameter" or (name.startswith(_PIECE) and part.kind in _KINDS):
      return 0.0  # It is passed on.
    if part.kind in ("dynamic-update-slice", "scatter"):
      return self._update(name, part)
    return _bytes(self._named[name][operand].result)

  def _update(self, name: str, instruction: Instruction) -> float:
    place = {"dynamic-update-slice": 1, "scatter": 2}.get(instruction.kind)
    if place is None:
      return _bytes(instruction.result)
    return _bytes(self._named[name][operands(instruction)[place]].result)

  def _source(self, name: str, operand: str) -> Instruction:
    """The instruction behind bitcasts."""
    instruction = self._named[name][operand]
    while instruction.kind in ("bitcast", "copy") and operands(instruction):
      instruction = self._named[name][operands(instruction)[0]]
    return instruction

  def _read(self, name: str, instruction: Instruction) -> float:
    """Bytes of HBM that an instruction reads."""
    return sum(
      self._read_operand(name, instruction, place, self._named[name][operand].result)
      for place, operand in enumerate(operands(instruction))
      if operand in self._named[name]
    )

  def _read_operand(self, name: str, user: Instruction, place: int, text: str) -> float:
    """Bytes that a user reads of one operand, whose type is `text`."""
    size = _bytes(text)
    if user.kind in ("dynamic-slice", "slice", "gather") and place == 0:
      return min(size, _all_bytes(user.result))
    if user.kind in ("dynamic-update-slice", "scatter") and place == 0:
      return 0.0
    if user.name.startswith("async-collective-done"):
      return 0.0
    if user.kind != "fusion" or not (inside := _ATTRIBUTE.search(user.rest)):
      return size
    body = self._computations[inside[1]]
    wanted = f"{place})"
    parameter = next(i for i in body if i.kind == "parameter" and i.rest.startswith(wanted))
    return min(size, self._read_inside(inside[1], parameter, text))

  def _read_inside(self, name: str, value: Instruction, text: str) -> float:
    """Bytes that the users of a value inside a fusion read of it."""
    total = 0.0
    for user in self._computations[name]:
      if value.name not in (names := operands(user)):
        continue
      if user.kind == "tuple" or (name.startswith(_PIECE) and user.kind in _KINDS):
        continue  # It is passed on.
      if user.kind == "bitcast":
        total += self._read_inside(name, user, text)
      else:
        total += self._read_operand(name, user, names.index(value.name), text)
    return total


@functools.lru_cache(maxsize=2**16)
def _operand_names(rest: str) -> tuple[str, ...]:
  depth = 1
  for end, letter in enumerate(rest):
    depth += (letter in "([{") - (letter in ")]}")
    if depth == 0:
      return tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
  return tuple(re.findall(r"%([\w.\-]+)", rest))


def operands(instruction: Instruction) -> tuple[str, ...]:
  """Names of the operands of an instruction."""
  return _operand_names(instruction.rest)


def _bytes(types: str) -> float:
  """Bytes of the arrays in the text of a type that are in HBM."""
  return _all_bytes(_ON_CHIP.sub("", types))


def _all_bytes(types: str) -> float:
  return sum(size for _, size in arrays(types))


def _shape(types: str) -> tuple[int, ...]:
  match = _ARRAY.search(types)
  assert match is not None, types
  return tuple(int(n) for n in match[2].split(",") if n)


def _convolution(
  attributes: str, left: Sequence[int], right: Sequence[int], result: Sequence[int]
) -> float:
  """Operations of a convolution, which is how the TPU compiler writes products."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
  assert labels is not None, attributes
  lhs, rhs, out = labels.groups()
  window = re.search(r"window=\{([^}]*)\}", attributes)
  fields = dict(part.split("=") for part in window[1].split()) if window else {}
  groups = {
    name: int(found[1]) if (found := re.search(rf"{name}_group_count=(\d+)", attributes)) else 1
    for name in ("feature", "batch")
  }
  total = 2.0 * left[lhs.index("f")] / groups["feature"] * right[rhs.index("o")]
  total *= left[lhs.index("b")] / groups["batch"]
  for n, digit in enumerate(sorted(letter for letter in lhs if letter.isdigit())):
    values = {key: field.split("x")[n] for key, field in fields.items()}
    low = int(values.get("pad", "0_0").split("_")[0])
    total *= _positions(
      left[lhs.index(digit)],
      right[rhs.index(digit)],
      result[out.index(digit)],
      int(values.get("stride", 1)),
      low,
      int(values.get("lhs_dilate", 1)),
      int(values.get("rhs_dilate", 1)),
    )
  return total


@functools.cache
def _positions(
  length: int, kernel: int, result: int, stride: int, low: int, dilated: int, spread: int
) -> int:
  """Pairs of an output and a kernel position, in one dimension, that meet an input."""
  at = np.arange(result)[:, None] * stride - low + np.arange(kernel) * spread
  return int(np.sum((at >= 0) & (at <= (length - 1) * dilated) & (at % dilated == 0)))
