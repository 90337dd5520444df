"""Memory, collectives and minimum time of programs compiled for a TPU slice that need not be there.

XLA compiles for a TPU topology on any machine that has libtpu. The compiler reports the memory per
chip, or that it does not suffice, and the collectives. It does not report time: its count of
operations counts the body of a loop once. So operations are counted here from the architecture. The
time is a roofline, a lower bound and not a prediction.
"""

import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from rlhf_jax import hlo, sharding
from rlhf_jax.models import ModelConfig

_GIB = 2**30


class Chip(NamedTuple):
  """Peak capabilities of one TPU device.

  Attributes:
    hbm_bytes: Memory available to the compiler.
    flops: bfloat16 operations per second.
    hbm_bandwidth: Bytes per second.
    ici_bandwidth: Bytes per second that a ring along one axis of the torus sends, both ways.
  """

  hbm_bytes: float
  flops: float
  hbm_bandwidth: float
  ici_bandwidth: float


# Numbers from https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, by the name before the
# shape in a topology. Memory is the amount that the compiler reports as available. A chip of tpu7x
# is two devices, with half of its resources each.
CHIPS = {
  "v5e": Chip(15.75 * _GIB, 197e12, 819e9, 100e9),
  "v5p": Chip(95.73 * _GIB, 459e12, 2765e9, 200e9),
  "v6e": Chip(31.24 * _GIB, 918e12, 1640e9, 224e9),
  "tpu7x": Chip(94.74 * _GIB, 1153e12, 3690e9, 200e9),
}


def topology_devices(topology: str) -> tuple[Sequence[Any], Chip]:
  """Returns the devices of a slice, which need not be there, and the capabilities of one.

  Args:
    topology: Generation and shape, such as `v5e:4x4` or `v5p:4x4x8`.

  Raises:
    ValueError: If there is no such slice, or no libtpu to compile for it.
  """
  chip = CHIPS.get(topology.split(":")[0])
  if chip is None:
    known = ", ".join(CHIPS)
    raise ValueError(f"--topology={topology} must be one of {known}, then its shape: v5e:4x4")
  # Otherwise libtpu queries the network for the machine type and allows only one process at a time.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_WORKER_ID", "0")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    return topologies.get_topology_desc(topology, platform="tpu").devices, chip
  except Exception as error:  # Of various types; not all of them name the cause.
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(
      f"--topology={topology} cannot be compiled for ({reason}); it needs a shape that exists and"
      " libtpu: pip install 'rlhf_jax[tpu]'"
    ) from error


def forward_flops(
  config: ModelConfig, rows: int, length: int, *, scored: int | None = None
) -> float:
  """Counts the operations of one forward pass: two per weight that a token uses, plus attention.

  Attention counts half, because of the causal mask. Norms and elementwise operations do not count.

  Args:
    config: Architecture.
    rows: Number B of rows.
    length: Number T of tokens per row.
    scored: Positions per row whose logits are computed; None for a scalar head.
  """
  c = config
  weights = matrices(c, c.experts_per_token)
  scores = 2 * c.layers * c.heads * c.head_dim * length**2
  head = 2 * c.width * c.vocab_size * (scored or 0)
  return float(rows * (2 * weights * length + scores + head))


def matrices(config: ModelConfig, experts: int) -> int:
  """Counts the weights in the layers' matrices, with `experts` experts if the model has any."""
  c = config
  attention = c.head_dim * (2 * c.heads + 2 * c.kv_heads)
  mlp = (3 if c.gated_mlp else 2) * c.mlp_width
  if c.experts:
    mlp = c.experts + experts * mlp
  return c.layers * c.width * (attention + mlp)


class Work(NamedTuple):
  """Minimum work of a program, counted from the architecture.

  Attributes:
    flops: Operations of all devices together.
    steps: Trip count of a loop whose end depends on data, such as the loop over new tokens.
    bytes_per_step: Bytes that each device reads in each of these steps.
  """

  flops: float = 0.0
  steps: int = 1
  bytes_per_step: float = 0.0


def training(config: ModelConfig, flops: float, *, frozen: bool = False) -> Work:
  """Work of a train step; gradients of weights and of activations each cost a forward pass.

  Args:
    config: Architecture and rematerialization.
    flops: Operations of the forward passes.
    frozen: Count gradients of activations only; those of adapters are negligible.
  """
  return Work(((2 if frozen else 3) + (config.remat == "full")) * flops)


def sampling(
  config: ModelConfig, mesh: Mesh, prompts: int, samples: int, length: int, new: int
) -> Work:
  """Work to sample `samples` responses of `new` tokens to each prompt of `length` tokens."""
  rows, context = prompts * samples, length + new / 2
  prefill = forward_flops(config, prompts, length, scored=1)
  grown = forward_flops(config, rows, length + new, scored=new)
  width = 2 if config.dtype == "bfloat16" else 4
  # Each row chooses its experts; together the rows read most of them.
  weights = matrices(config, min(config.experts, rows * config.experts_per_token))
  weights = (weights + config.width * config.vocab_size) * width / mesh.shape["tensor"]
  cached = 2 * config.layers * config.kv_heads * config.head_dim * width * rows * context
  decode = grown - forward_flops(config, rows, length)
  return Work(prefill + decode, new, weights + cached / mesh.size)


def network_bytes(config: ModelConfig, mesh: Mesh, tokens: int) -> float:
  """Estimates the bytes that a chip sends per train step, to rank meshes before compiling.

  Weights are gathered twice in bfloat16 over `fsdp`. Gradients are scattered in float32 over `fsdp`
  and summed over `data`. Activations are summed over `tensor` twice per layer and pass.

  Args:
    config: Architecture.
    mesh: Absent devices.
    tokens: Number of tokens in a batch.
  """
  data, fsdp, tensor = (mesh.shape[axis] for axis in sharding.AXES)
  weights = (matrices(config, config.experts) + config.width * config.vocab_size) / tensor
  gathered = 8 * weights * (fsdp - 1) / fsdp
  summed = 8 * weights / fsdp * (data - 1) / data
  hidden = 2 * config.width * tokens / (data * fsdp)
  return gathered + summed + 8 * config.layers * hidden * (tensor - 1) / tensor


class Program(NamedTuple):
  """Report on one compiled program; memory is in bytes per device.

  Attributes:
    name: Name of the program.
    arguments: Size of the inputs, including donated ones.
    temporaries: Size of temporary buffers.
    peak: Peak memory, including arguments.
    beside: Size of other arrays that are in memory while it runs.
    compile_seconds: Compilation time.
    flops: Operations of all devices that it needs at least; see `Work`.
    counted: Operations and bytes of one device, counted in the compiled program.
    collectives: Sums by kind of collective; see `hlo.summarize`.
    seconds: Minimum time to compute, to read the memory, and to send.
  """

  name: str
  arguments: int
  temporaries: int
  peak: int
  beside: int
  compile_seconds: float
  flops: float
  counted: dict[str, float]
  collectives: dict[str, dict[str, float]]
  seconds: dict[str, float]


class TooLargeError(Exception):
  """A program does not fit into the memory of a chip.

  Attributes:
    program: Name of the program.
  """

  def __init__(self, program: str, reason: str):
    super().__init__(f"{program}: {reason}")
    self.program = program


class _Compiled(NamedTuple):
  refused: str  # The compiler's reason if it failed; the other fields are then unset.
  seconds: float
  memory: Any = None
  text: str = ""
  output_shardings: Any = None


class Preflight:
  """Compiles the programs of an iteration one after another, and keeps a report on each.

  Args:
    mesh: Absent devices.
    chip: Capabilities of one of them.
    known: Cache of compiled programs by their text; new ones are added.
  """

  def __init__(self, mesh: Mesh, chip: Chip, known: dict[str, _Compiled] | None = None):
    self.mesh, self.chip = mesh, chip
    self.programs: list[Program] = []
    self._known = {} if known is None else known

  def __call__(
    self,
    name: str,
    function: Callable[..., Any],
    *args: Any,
    work: Work = Work(),
    held: Any = (),
  ) -> Any:
    """Compiles a program; returns the shapes of its results, to be arguments of the next one.

    Args:
      name: Name of the program.
      function: A jitted function. A plain one (a no-op reshard) is simply called.
      *args: `jax.ShapeDtypeStruct` with shardings, in place of arrays.
      work: Minimum work of the program.
      held: Arrays that are in memory while it runs, whether or not they are arguments.

    Raises:
      TooLargeError: If the program does not fit.
    """
    if not hasattr(function, "lower"):
      return function(*args)
    lowered = function.lower(*args)
    text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    if text not in self._known:
      self._known[text] = _compile(lowered)
    compiled = self._known[text]
    if compiled.refused:
      raise TooLargeError(name, compiled.refused)
    inputs = jax.tree.leaves((args, getattr(function, "frozen", None)))
    input_ids = {id(leaf) for leaf in inputs}
    beside = bytes_per_device([x for x in jax.tree.leaves(held) if id(x) not in input_ids])
    memory = compiled.memory
    collectives = hlo.collectives(compiled.text)
    sent = sum(collective.total_bytes(work.steps) for collective in collectives)
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    moved += work.steps * work.bytes_per_step
    program = Program(
      name,
      arguments=memory.argument_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      peak=memory.peak_memory_in_bytes,
      beside=beside,
      compile_seconds=compiled.seconds,
      flops=work.flops,
      counted=hlo.count(compiled.text, work.steps)._asdict(),
      collectives=hlo.summarize(collectives, work.steps),
      seconds={
        "compute": work.flops / self.mesh.size / self.chip.flops,
        "memory": moved / self.chip.hbm_bandwidth,
        "network": sent / self.chip.ici_bandwidth,
      },
    )
    self.programs.append(program)
    if program.peak + beside > self.chip.hbm_bytes:
      raise TooLargeError(
        name,
        f"{(program.peak + beside) / _GIB:.2f} GiB, {beside / _GIB:.2f} of them beside the"
        f" program, exceed the available HBM of {self.chip.hbm_bytes / _GIB:.2f} GiB",
      )
    return sharding.abstract(lowered.out_info, compiled.output_shardings)


def _compile(lowered: jax.stages.Lowered) -> _Compiled:
  start = time.monotonic()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    reason = refusal(str(error))
    if not reason:
      raise
    return _Compiled(reason, time.monotonic() - start)
  return _Compiled(
    "",
    time.monotonic() - start,
    compiled.memory_analysis(),
    compiled.as_text() or "",
    compiled.output_shardings,
  )


def refusal(message: str) -> str:
  """Part of the compiler's message that says by how much a program is too large; else empty."""
  reason = re.search(r"[^:]*exceeds available HBM \([^)]*\)", message)
  return reason[0].strip() if reason else ""


def bytes_in_all(tree: Any) -> int:
  """Size of arrays, or of shapes, on all devices together."""
  return sum(_bytes(x.shape, x.dtype) for x in jax.tree.leaves(tree))


def bytes_per_device(tree: Any) -> int:
  """Size of arrays, or of shapes with shardings, on one device."""
  return sum(_bytes(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree))


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
  """Returns the size of an array, in which numbers of 4 bits are packed."""
  is_integer = jnp.issubdtype(dtype, jnp.integer)
  bits = jnp.iinfo(dtype).bits if is_integer else 8 * dtype.itemsize
  return math.prod(shape) * bits // 8
