"""The device mesh, and the placement of params and batches on it.

Three axes always exist, whatever their sizes: `data` splits the batch and replicates the params,
`fsdp` splits both, `tensor` splits the width of the model. Axes are Auto: the compiler propagates
the placement of the inputs, and model code names no axis.

With several processes, the host code of each works on full arrays, the same on all: `put` and
`place_batch` keep the shards of a process's devices, `to_host` gathers the full array. So neither
the rows of a batch nor their order depend on the number of processes.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
Rules = Sequence[tuple[str, P]]

ROWS = P(("data", "fsdp"))  # [B, ...]
CACHE = P(("data", "fsdp"), "tensor")  # [B, kv_heads, S, K]

# Rules match the end of a path, so that optimizer moments follow their parameter.
DECODER_RULES: Rules = (
  # The width of the embedding is not on fsdp: the token gather would rebuild the whole table.
  (r"(^|/)embed/embedding$", P("fsdp", "tensor")),  # [V, D]
  (r"(^|/)embed/positions$", P("fsdp", "tensor")),  # [max_length, D]
  (r"(^|/)layers/attention/[qkv]/kernel$", P(None, "fsdp", "tensor")),  # [L, D, H * K]
  (r"(^|/)layers/attention/o/kernel$", P(None, "tensor", "fsdp")),  # [L, H * K, D]
  (r"(^|/)layers/mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),  # [L, D, F]
  (r"(^|/)layers/mlp/down/kernel$", P(None, "tensor", "fsdp")),  # [L, F, D]
  # Experts are not split, so that each device multiplies its own.
  (r"(^|/)layers/mlp/router/kernel$", P(None, "fsdp")),  # [L, D, E]
  (r"(^|/)layers/mlp/experts/(gate|up)/kernel$", P(None, "tensor", None, "fsdp")),  # [L, E, D, F]
  (r"(^|/)layers/mlp/experts/down/kernel$", P(None, "tensor", "fsdp")),  # [L, E, F, D]
  (r"(^|/)lm_head/kernel$", P("fsdp", "tensor")),  # [D, V]
  # Scales of quantized kernels, [L, tiles, out].
  (r"(^|/)layers/.*/kernel_scale$", P(None, None, ("fsdp", "tensor"))),
  # Adapters, [L, in, rank] and [L, rank, out], follow their kernel.
  (r"(^|/)layers/(attention/[qkv]|mlp/(gate|up))/lora_a$", P(None, "fsdp")),
  (r"(^|/)layers/(attention/[qkv]|mlp/(gate|up))/lora_b$", P(None, None, "tensor")),
  (r"(^|/)layers/(attention/o|mlp/down)/lora_a$", P(None, "tensor")),
  (r"(^|/)layers/(attention/o|mlp/down)/lora_b$", P(None, None, "fsdp")),
)
# Tables with a row per id or position, whose number belongs to the tokenizer and not to the mesh.
_TABLES = re.compile(r"(^|/)(embed/(embedding|positions)|lm_head/kernel)$")


def make_mesh(spec: str = "", devices: Sequence[Any] | None = None) -> Mesh:
  """Builds the (data, fsdp, tensor) mesh over all devices of all processes.

  Args:
    spec: Size of each axis, such as `data:8,fsdp:4,tensor:2`. The default size is 1; one axis may
      be -1 and takes the remaining devices. Empty puts all devices on `data`.
    devices: Devices to use; all devices by default. They may be absent ones to compile for.

  Raises:
    ValueError: If the spec is malformed or does not fit the number of devices.
  """
  count = jax.device_count() if devices is None else len(devices)
  sizes = _parse_mesh(spec or "data:-1")
  named = ",".join(f"{axis}:{size}" for axis, size in sizes.items())
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if -1 in sizes.values():
    if count % fixed:
      raise ValueError(
        f"--mesh={named}: {fixed} does not divide the {count} devices, nothing fits -1;"
        " change the fixed sizes"
      )
    sizes = {axis: count // fixed if size == -1 else size for axis, size in sizes.items()}
  elif fixed != count:
    unused = next((axis for axis in AXES if axis not in sizes), None)
    fix = f"--mesh={named},{unused}:-1 takes the rest" if unused else "use -1 for one axis"
    raise ValueError(
      f"--mesh={named} needs {fixed} devices, there are {count};"
      f" {fix if fixed < count else 'make an axis smaller'}"
    )
  shape = tuple(sizes.get(axis, 1) for axis in AXES)
  if devices is None:
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  # An axis of the mesh may be part of an axis of the torus.
  grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def is_absent(mesh: Any) -> bool:
  """True if the devices of a mesh can be compiled for, but cannot hold arrays."""
  return mesh.devices.flat[0] not in jax.devices()


def is_one_cpu(mesh: Mesh | None) -> bool:
  """True if a mesh consists of one CPU; for None, if the default device is a CPU."""
  devices = jax.devices()[:1] if mesh is None else mesh.devices.ravel()
  return len(devices) == 1 and devices[0].platform == "cpu"


def _parse_mesh(spec: str) -> dict[str, int]:
  sizes = {}
  for part in spec.split(","):
    match = re.fullmatch(r"\s*(\w+)\s*:\s*(-1|[1-9][0-9]*)\s*", part)
    if not match:
      raise ValueError(f"--mesh={spec}: {part!r} is not AXIS:SIZE, such as fsdp:4 or data:-1")
    axis, size = match.groups()
    if axis not in AXES:
      raise ValueError(f"--mesh={spec}: unknown axis {axis!r}; the axes are {', '.join(AXES)}")
    if axis in sizes:
      raise ValueError(f"--mesh={spec}: axis {axis!r} is given twice; keep one")
    sizes[axis] = int(size)
  if list(sizes.values()).count(-1) > 1:
    raise ValueError(f"--mesh={spec}: only one axis can be -1; give the others a size")
  return sizes


def named_shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
  """Assigns every leaf a sharding by the first rule that matches its '/'-joined path.

  A leaf without a matching rule is replicated. So is a leaf of lower rank than its rule, such as
  the factored moments that some optimizers keep under the path of a parameter. Embeddings and
  output layers are not split over axes that do not divide them: each device has all of their ids.

  Args:
    tree: Arrays or `jax.ShapeDtypeStruct`; params, or an optimizer state that mirrors them.
    mesh: A mesh with the axes that the rules name.
    rules: Pairs of a regular expression for `re.search` and a spec for the leaf.

  Returns:
    The same tree of NamedSharding.

  Raises:
    ValueError: If a dimension of another leaf does not split evenly.
  """

  def place(path, leaf) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = next((spec for pattern, spec in rules if re.search(pattern, name)), P())
    if len(spec) > len(leaf.shape):
      spec = P()
    if _TABLES.search(name):
      spec = fitting(mesh, leaf.shape, spec)
    for dimension, axes in enumerate(spec):
      _check_divides(name, dimension, leaf.shape[dimension], axes, mesh)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(place, tree)


def _names(axes: Any) -> tuple[str, ...]:
  """Names of the axes in one entry of a spec."""
  return (axes,) if isinstance(axes, str) else axes or ()


def _check_divides(name: str, dimension: int, size: int, axes: Any, mesh: Mesh) -> None:
  axes = _names(axes)
  if size % math.prod(mesh.shape[axis] for axis in axes):
    sizes = " * ".join(f"{axis}:{mesh.shape[axis]}" for axis in axes)
    raise ValueError(
      f"--mesh: dimension {dimension} of {name} has size {size}, which is not divisible by {sizes};"
      " change --mesh or the model size"
    )


def rollout_shardings(params: Any, mesh: Mesh, rules: Rules = DECODER_RULES) -> Any:
  """Shardings of params for sampling: those of the rules, but split over `tensor` only.

  Params that `fsdp` splits are gathered before use. A train step does that once for thousands of
  tokens; a sampler would do it for every token of a response.
  """

  def kept(axes: Any) -> Any:
    return tuple(axis for axis in _names(axes) if axis != "fsdp") or None

  without_fsdp = [(pattern, P(*map(kept, spec))) for pattern, spec in rules]
  return named_shardings(params, mesh, without_fsdp)


def rows_copies(params: Any, mesh: Mesh, dtype: Any, rules: Rules = DECODER_RULES) -> Any:
  """Copies params for each part of the rows, once, for a loop that reads them at every turn.

  Such a loop would gather params that `fsdp` splits, and reduce their gradient, at every turn. The
  copies are gathered before the loop, and the gradients of the copies are summed after it.

  Args:
    params: Params with their paths, placed by the rules.
    mesh: Mesh that splits rows into S parts, over `data` and `fsdp`.
    dtype: Dtype to round params to, in which they are sent. Gradients keep the dtype of the params.
    rules: Rules that placed the params.

  Returns:
    The same tree of [S, ...] arrays, one copy per part; `tensor` splits each like the params.
  """
  parts = row_parts(mesh)
  held, used = named_shardings(params, mesh, rules), rollout_shardings(params, mesh, rules)

  def copy(x: jax.Array, place: NamedSharding) -> jax.Array:
    rounded = jax.lax.with_sharding_constraint(x.astype(dtype), place)
    copies = jnp.broadcast_to(rounded[None], (parts, *x.shape))
    split = NamedSharding(mesh, P(*ROWS, *place.spec))
    return jax.lax.with_sharding_constraint(copies, split).astype(x.dtype)

  @jax.custom_vjp
  def copies(params: Any) -> Any:
    return jax.tree.map(copy, params, used)

  def backward(_: None, by: Any) -> tuple[Any]:
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), by)
    return (jax.tree.map(jax.lax.with_sharding_constraint, total, held),)

  copies.defvjp(lambda params: (copies(params), None), backward)
  return copies(params)


@functools.lru_cache(maxsize=16)
def make_reshard(mesh: Mesh, dtype: Any, onto: Mesh | None = None) -> Callable[[Any], Any]:
  """Builds `reshard(params)`: moves params from the training layout to the sampling layout.

  The same arguments give the same function, which is compiled once.

  Args:
    mesh: Mesh that holds the params, placed by `DECODER_RULES`.
    dtype: Dtype of the matrices. A model rounds them to its computation dtype anyway, and a copy in
      that dtype is read faster. Norms, biases, heads and codes of weights keep theirs, and so does
      `lora_b`, which a model scales before it rounds.
    onto: Mesh of the sampler, if it runs on other devices.

  Returns:
    A jitted function, or the identity if there is nothing to change. With `onto`, a function that
    returns before the copy is complete.
  """

  def cast(path: Any, x: jax.Array, place: NamedSharding) -> jax.Array:
    kept = place.spec == P() or path[-1].key == "lora_b"
    return x if kept or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)

  def over(function: Callable[..., jax.Array], params: Any, onto: Mesh) -> Any:
    return jax.tree_util.tree_map_with_path(function, params, rollout_shardings(params, onto))

  if onto is not None:
    cast_all = jax.jit(lambda params: over(cast, params, onto))
    return lambda params: jax.device_put(cast_all(params), rollout_shardings(params, onto))
  if mesh.shape["fsdp"] == 1 and jnp.dtype(dtype) == jnp.float32:
    return lambda params: params

  def move(path: Any, x: jax.Array, place: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(cast(path, x, place), place)

  return jax.jit(lambda params: over(move, params, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that is replicated on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of [B, ...] arrays: the leading axis over data and fsdp."""
  return NamedSharding(mesh, ROWS)


def row_parts(mesh: Mesh) -> int:
  """Returns the number of parts that `batch_sharding` splits rows into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain(x: jax.Array, mesh: Mesh | None, spec: P) -> jax.Array:
  """Constrains the sharding of an array in a jitted function; a no-op on one device or no mesh.

  Axes that do not divide their dimension are dropped.
  """
  if mesh is None or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting(mesh, x.shape, spec)))


def fitting(mesh: Mesh, shape: Sequence[int], spec: P) -> P:
  """Drops the axes of a spec that do not divide their dimension."""

  def fits(size: int, axes: Any) -> bool:
    return size % math.prod(mesh.shape[axis] for axis in _names(axes)) == 0

  return P(*(axes if fits(n, axes) else None for n, axes in zip(shape, spec, strict=False)))


def heads_spec(mesh: Mesh, rows: int, heads: int) -> P:
  """Returns the spec of [B, H, ...] arrays: rows over data and fsdp, heads over tensor.

  If the axes do not divide the rows or the heads, each device holds all of them.
  """
  return fitting(mesh, (rows, heads), P(("data", "fsdp"), ("tensor",)))


def abstract(tree: Any, shardings: Any) -> Any:
  """Replaces arrays by shapes with shardings, to compile with.

  Args:
    tree: Arrays or shapes.
    shardings: A tree of the same structure, or one sharding for all.
  """
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _, where=shardings: where, tree)
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
  )


def put(tree: Any, sharding: NamedSharding) -> Any:
  """Puts full arrays, the same on every process, on devices; returns shapes for absent ones."""
  if is_absent(sharding.mesh):
    return abstract(jax.tree.map(np.asarray, tree), sharding)

  def place(x: Any) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
  """Copies full arrays to numpy on every process; all processes must call it."""

  def gather(x: Any) -> Any:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
      return multihost_utils.process_allgather(x, tiled=True)
    return x

  return jax.device_get(jax.tree.map(gather, tree))


def place_batch(tree: Any, mesh: Mesh) -> Any:
  """Puts a batch on the mesh.

  Args:
    tree: Numpy arrays [B, ...], the full batch on every process.
    mesh: Mesh from `make_mesh`.

  Returns:
    The same tree of jax.Array [B, ...], split by `batch_sharding`.

  Raises:
    ValueError: If B does not split evenly.
  """
  sharding = batch_sharding(mesh)
  shards = row_parts(mesh)

  def place(path, x) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if x.ndim == 0:
      raise ValueError(f"batch array {name!r} is a scalar; batch arrays are [B, ...]")
    if x.shape[0] % shards:
      raise ValueError(
        f"--batch_size={x.shape[0]} is not divisible by data:{mesh.shape['data']} *"
        f" fsdp:{mesh.shape['fsdp']} = {shards} of --mesh (array {name!r});"
        f" use a multiple of {shards}"
      )
    return put(x, sharding)

  return jax.tree_util.tree_map_with_path(place, tree)
