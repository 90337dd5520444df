"""Copies of arrays that several devices hold: they have the same bits, unless a device fails."""

import collections
import functools
import math
import os
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


class ReplicaError(RuntimeError):
  """Devices hold different copies of an array; the newest checkpoint is from before that."""

  exit_code = os.EX_TEMPFAIL


def check(arrays: Mapping[str, jax.Array]) -> None:
  """Compares the copies of each array that a mesh holds several times, by a sum of their bits.

  A flipped bit always changes that sum. With several processes, all of them call this. GPUs are
  compared only with `--xla_gpu_deterministic_ops=true`: what several of them compute may differ by
  the order of atomic additions otherwise.

  Args:
    arrays: Name -> array; those of other kinds of sharding are not looked at.

  Raises:
    ReplicaError: Copies differ, with the name of the first array and the devices in the minority.
  """
  groups = collections.defaultdict(dict)
  for name, array in arrays.items():
    sharding = array.sharding
    exact = _is_exact(next(iter(sharding.device_set)).platform)
    if exact and isinstance(sharding, NamedSharding) and _copies(array) > 1:
      groups[sharding.mesh][name] = array
  for mesh, group in groups.items():
    shardings = tuple(array.sharding for array in group.values())
    sums = np.asarray(jax.device_get(_sums(list(group.values()), shardings)))
    for column, (name, array) in enumerate(group.items()):
      places = array.sharding.devices_indices_map(array.shape)
      rows = collections.defaultdict(lambda: collections.defaultdict(list))
      for device, digest in zip(mesh.devices.flat, sums[:, column], strict=True):
        rows[str(places[device])][int(digest)].append(device)
      for copies in rows.values():
        if len(copies) > 1:
          few = min(copies.values(), key=len)
          raise ReplicaError(
            f"{', '.join(map(str, few))}: not the bits that the other devices hold of {name};"
            " a device has computed or kept them wrongly. The same command continues from the"
            " newest checkpoint; leave out a device that does so again"
          )


def _is_exact(platform: str) -> bool:
  """True if devices that run the same program on the same inputs get the same bits."""
  flags = os.environ.get("XLA_FLAGS", "")
  return platform != "gpu" or "--xla_gpu_deterministic_ops=true" in flags


def _copies(array: jax.Array) -> int:
  """Number of devices that hold the same part; 0 for an array without an entry."""
  part = math.prod(array.sharding.shard_shape(array.shape))
  return len(array.sharding.device_set) * part // array.size if array.size else 0


@functools.partial(jax.jit, static_argnums=1)
def _sums(arrays: Sequence[jax.Array], shardings: tuple[NamedSharding, ...]) -> jax.Array:
  """Sums of the bits of what each device holds of each array, [devices, arrays] uint32."""
  mesh = shardings[0].mesh

  def of_device(parts: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.sum(_bits(part), dtype=jnp.uint32) for part in parts])[None]

  every = jax.shard_map(
    of_device,
    mesh=mesh,
    in_specs=([sharding.spec for sharding in shardings],),
    out_specs=P(mesh.axis_names),
    check_vma=False,
  )
  return jax.lax.with_sharding_constraint(every(arrays), NamedSharding(mesh, P()))


def _bits(x: jax.Array) -> jax.Array:
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    return x.astype(jnp.uint32)
  width = min(32, 8 * x.dtype.itemsize)  # A wider number becomes two.
  return jax.lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)
