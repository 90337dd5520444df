"""Copies that differ are found, whatever bit it is and wherever it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import entry, loop, replicas, sharding
from tests import loop_test

MESH = sharding.make_mesh("data:2,fsdp:2,tensor:2")
TREE = {
  "w": ("float32", (4, 4), P("fsdp")),
  "half": ("bfloat16", (8,), P(None)),
  "whole": ("float32", (8,), P(("data", "fsdp", "tensor"))),
  "count": ("int32", (), P()),
}


def arrays():
  return {
    name: jax.device_put(jnp.ones(shape, dtype), NamedSharding(MESH, spec))
    for name, (dtype, shape, spec) in TREE.items()
  }


def flip(array, number, bit):
  """The array, with a flipped bit in what one of the devices holds."""
  parts = [np.array(shard.data) for shard in array.addressable_shards]
  parts[number].reshape(-1).view(f"uint{8 * array.dtype.itemsize}")[0] ^= 1 << bit
  parts = [
    jax.device_put(x, s.device) for x, s in zip(parts, array.addressable_shards, strict=True)
  ]
  return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def test_equal_copies_pass():
  replicas.check(arrays())
  # What is held once has no copy to differ from.
  replicas.check(arrays() | {"whole": flip(arrays()["whole"], 3, 0), "one": jnp.ones(3)})


@pytest.mark.parametrize(
  ("name", "number", "bit"), [("w", 0, 0), ("w", 7, 31), ("half", 3, 6), ("count", 5, 30)]
)
def test_one_flipped_bit_is_found(name, number, bit):
  given = arrays()
  device = given[name].addressable_shards[number].device
  with pytest.raises(replicas.ReplicaError, match=f"the other devices hold of {name};") as e:
    replicas.check(given | {name: flip(given[name], number, bit)})
  assert entry.verdict(e.value)[0] == 75
  assert str(e.value).startswith(f"{device}: not the bits")


def test_gpus_are_compared_only_where_they_are_exact(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
  assert replicas._is_exact("cpu") and not replicas._is_exact("gpu")
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
  assert replicas._is_exact("gpu")


def test_a_bit_that_a_device_got_wrong_is_not_saved(tmp_path):
  """The run ends before the next checkpoint; started again it ends as one without the fault."""

  def fit(name, wrong=False):
    def step(state, batch, key):
      state, values = loop_test.quadratic(state, batch, key)
      if wrong and int(state["step"]) == 5:
        state["velocity"] = flip(state["velocity"], 2, 3)
      return state, values

    with loop.open_run(loop.Session(str(tmp_path / name))) as run:
      everywhere = NamedSharding(run.mesh, P())
      state = jax.device_put(loop_test.start_state(), everywhere)
      return loop.fit(run, loop_test.CONFIG, step, state, loop_test.Batches())

  with pytest.raises(replicas.ReplicaError, match="item 'state', leaf 'velocity'"):
    fit("run", wrong=True)
  assert not (tmp_path / "run" / "checkpoints" / "6.digest.json").exists()
  jax.tree.map(np.testing.assert_array_equal, fit("run"), fit("whole"))
