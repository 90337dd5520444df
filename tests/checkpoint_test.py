import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import checkpoint, entry, sharding
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.types import TrainState
from tests.testing import forked


@pytest.fixture
def warnings_logged(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
  return lines


def save_fast(workdir: pathlib.Path) -> None:
  """Saves every step as fast as it can; the content of a step follows from its number."""
  tree = lambda step: {f"w{i}": random_array(step, i) for i in range(4)}  # noqa: E731
  with workdir_lib.run_lock(workdir), checkpoint.Checkpointer(workdir) as ckpt:
    restored = ckpt.restore({"state": tree(0)})
    start = restored.step if restored else 0
    for step in range(start + 1, start + 500):
      ckpt.save(step, {"state": tree(step)}, {"step": step})


def random_array(*seed: int) -> np.ndarray:
  return np.random.default_rng(seed).random((64, 1024), np.float32)


def weights(step: int, size: int = 4096):
  return {"w": np.random.default_rng(step).random(size, np.float32)}


def save_steps(directory, *steps, keep=3) -> None:
  with checkpoint.Checkpointer(directory, keep=keep) as ckpt:
    for step in steps:
      ckpt.save(step, {"state": weights(step), "extra": {"n": np.int32(step)}}, {"step": step})


def restore(directory, **kwargs):
  with checkpoint.Checkpointer(directory) as ckpt:
    return ckpt.restore({"state": weights(0), "extra": {"n": np.int32(0)}}, **kwargs)


def largest_file(folder: pathlib.Path) -> pathlib.Path:
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_bit(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def bits(x) -> bytes:
  return np.asarray(x).tobytes()


def assert_same(actual, expected) -> None:
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))


def odd_tree():
  names = ["float32", "float16", "bfloat16", "float8_e4m3fn", "int4", "int8", "uint8", "int32"]
  key = jax.random.key(0)
  return {
    **{name: (jax.random.normal(key, (3, 5)) * 3).astype(name) for name in names},
    "bool": jnp.array([True, False]),
    "scalar": jnp.int32(7),
    "scalar_bf16": jnp.bfloat16(0.1),
    "negative_zero": jnp.array([-0.0, 0.0]),
    "empty": jnp.zeros((0, 4), jnp.float16),
    "none": None,
    "nothing": {},
    "a.b/c d": [jnp.ones(2), (jnp.zeros(1),)],
    "key_data": jax.random.key_data(key),
  }


def test_parts_of_an_item_are_read_without_the_rest(tmp_path):
  def bytes_read() -> int:
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in found for value in metric["values"])

  params, moments = odd_tree(), np.random.default_rng(0).random((1024, 1024), np.float32)
  state = {"params": params, "mu": moments, "nu": moments, "nothing": np.zeros((3, 0), np.float32)}
  with checkpoint.Checkpointer(tmp_path) as ckpt:
    ckpt.save(1, {"state": state, "other": {"x": moments}}, {"step": 1})
  with checkpoint.Checkpointer(tmp_path) as ckpt:
    before = bytes_read()
    restored = ckpt.restore({"state": {"params": params}}, parts=True)
    assert bytes_read() - before < moments.nbytes // 4
    assert_same(restored.items, {"state": {"params": params}})
    assert restored.meta == {"step": 1}
    with pytest.raises(checkpoint.CheckpointError, match="leaf 'mu': saved .*, expected nothing"):
      ckpt.restore({"state": {"params": params}})
    with pytest.raises(checkpoint.CheckpointError, match="leaf 'rho': saved missing"):
      ckpt.restore({"state": {"rho": moments}}, parts=True)


def test_round_trip_is_bitwise_for_every_dtype(tmp_path):
  params = odd_tree()
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.adamw(1e-3, mu_dtype=jnp.bfloat16), {"w": True, "b": False}),
    optax.scale_by_schedule(lambda _: 1.0),
  )
  opt_state = tx.init({"w": jnp.ones((4, 3)), "b": jnp.ones(3)})
  state = TrainState(jnp.int32(3), params, opt_state)
  meta = {"iterator": {"epoch": 1, "index": [3, 4]}, "digest": "é", "none": None}
  with checkpoint.Checkpointer(tmp_path / "c") as ckpt:
    assert ckpt.restore({"state": state}) is None
    assert ckpt.latest_step() is None
    ckpt.save(3, {"state": state, "stateless": optax.EmptyState()}, meta)
    ckpt.wait()
    assert ckpt.latest_step() == 3
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  for like in (state, abstract, jax.tree.map(np.asarray, state)):
    with checkpoint.Checkpointer(tmp_path / "c") as ckpt:
      restored = ckpt.restore({"state": like, "stateless": optax.EmptyState()})
    assert restored is not None
    assert (restored.step, restored.meta) == (3, meta)
    assert_same(restored.items["state"], state)
    assert restored.items["stateless"] == optax.EmptyState()


def test_donated_and_overwritten_arrays_are_saved_as_they_were(tmp_path):
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x, host = jax.jit(lambda: jnp.zeros((1024, 1024)))(), np.zeros(1000, np.float32)
  with checkpoint.Checkpointer(tmp_path) as ckpt:
    for step in range(1, 4):
      x = add(x)
      host += 1
      ckpt.save(step, {"x": x, "host": host}, {})
      for _ in range(5):
        x = add(x)
        host += 1
      restored = ckpt.restore({"x": x, "host": host}, step=step)
      assert restored is not None
      assert (np.unique(restored.items["x"]), np.unique(restored.items["host"])) == (
        6 * step - 5,
        6 * step - 5,
      )


def test_restored_arrays_are_committed_only_where_the_originals_were(tmp_path):
  mesh = sharding.make_mesh("fsdp:8")
  tree = {"w": jax.device_put(jnp.ones(16), NamedSharding(mesh, P("fsdp"))), "n": jnp.int32(1)}
  with checkpoint.Checkpointer(tmp_path) as ckpt:
    ckpt.save(1, {"t": tree}, {})
    restored = ckpt.restore({"t": tree})
  assert restored is not None
  new = restored.items["t"]
  assert (new["w"].committed, new["n"].committed) == (True, False)
  jax.jit(lambda t: t["w"] * t["n"])(new)  # Would fail with `n` pinned to device 0.


_SIZE = 98_765  # Of no other array of this process.


@pytest.mark.parametrize("is_committed", [True, False])
def test_a_step_is_read_in_the_place_of_what_is_donated(tmp_path, monkeypatch, is_committed):
  """With a damaged step too, the devices hold one set of arrays at a time, or one leaf more."""
  place = jax.devices()[1] if is_committed else None
  make = lambda step: {  # noqa: E731
    name: jax.device_put(np.full(_SIZE, step, np.float32), place) for name in "abcd"
  }
  counts = []

  def counting(call):
    def counted(*args, **kwargs):
      counts.append(sum(x.size == _SIZE for x in jax.live_arrays()))
      result = call(*args, **kwargs)
      counts.append(sum(x.size == _SIZE for x in jax.live_arrays()))
      return result

    return counted

  with checkpoint.Checkpointer(tmp_path) as ckpt:
    first = make(0)
    assert ckpt.restore({"t": first}, donate=True) is None
    assert not any(leaf.is_deleted() for leaf in first.values())
    for step in (1, 2):
      ckpt.save(step, {"t": make(step)}, {})
    ckpt.wait()
    flip_bit(largest_file(tmp_path / "2" / "t"))
    monkeypatch.setattr(ocp.CheckpointManager, "restore", counting(ocp.CheckpointManager.restore))
    monkeypatch.setattr(checkpoint, "_like", counting(checkpoint._like))
    restored = ckpt.restore({"t": first}, donate=True)
  assert restored is not None and restored.step == 1
  assert counts[0] == 0 and max(counts) <= 5
  for leaf in restored.items["t"].values():
    assert np.all(leaf == 1) and leaf.committed == is_committed
    assert leaf.devices() == {jax.devices()[int(is_committed)]}


@pytest.mark.parametrize(
  "error",
  [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 800 bytes."),
    MemoryError("Unable to allocate 1.5 GiB"),
  ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_that_finds_no_memory_is_not_damaged(
  tmp_path, monkeypatch, warnings_logged, error, count
):
  save_steps(tmp_path, 1, 2)

  def full(*args, **kwargs):
    raise error

  with monkeypatch.context() as patched:
    manager = types.SimpleNamespace(restore=full)
    patched.setattr(checkpoint.Checkpointer, "_open", lambda self: manager)
    patched.setattr(checkpoint.processes, "agree", lambda function: function())
    patched.setattr(jax, "process_count", lambda: count)
    with checkpoint.Checkpointer(tmp_path) as ckpt, pytest.raises(type(error)) as e:
      ckpt.restore({"state": weights(0), "extra": {"n": np.int32(0)}})
  assert entry.verdict(e.value)[0] == 69 and not warnings_logged
  assert restore(tmp_path).step == 2


def test_other_meshes_restore_the_same_bits(tmp_path):
  rules = [("w$", P("fsdp", "tensor"))]
  tree = {"w": jax.random.normal(jax.random.key(0), (16, 8)), "b": jnp.ones(3, jnp.bfloat16)}
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  placements = [
    jax.tree.map(lambda _: one, tree),
    sharding.named_shardings(tree, sharding.make_mesh("fsdp:8"), rules),
    sharding.named_shardings(tree, sharding.make_mesh("fsdp:4,tensor:2"), rules),
    jax.tree.map(lambda _: one, tree),
  ]
  current = jax.device_put(tree, placements[0])
  with checkpoint.Checkpointer(tmp_path) as ckpt:
    for step, placement in enumerate(placements):
      ckpt.save(step, {"params": current}, {})
      like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placement
      )
      restored = ckpt.restore({"params": like})
      assert restored is not None
      current = restored.items["params"]
      assert_same(current, tree)
      assert all(
        jax.tree.leaves(
          jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), current, placement)
        )
      )


def test_keeps_the_newest_steps_and_their_manifests(tmp_path):
  save_steps(tmp_path, 1, 2, 5, 9, keep=2)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["5", "5.digest.json", "9", "9.digest.json"]
  restored = restore(tmp_path, step=5)
  assert restored is not None
  assert (restored.step, restored.meta) == (5, {"step": 5})
  np.testing.assert_array_equal(restored.items["state"]["w"], weights(5)["w"])


# Of kills, and of each kind of damage; `python -m tests.faults` takes more.
TRIALS = int(os.environ.get("TRIALS", "0"))


@pytest.mark.slow
def test_killed_while_saving_restores_whole_and_never_goes_back(tmp_path, record_property):
  rng, newest, kills = random.Random(0), 0, TRIALS or 15
  record_property("kills", kills)
  like = {f"w{i}": np.zeros((64, 1024), np.float32) for i in range(4)}
  for _ in range(kills):
    child = forked(save_fast, tmp_path)
    deadline = time.monotonic() + 300
    # A step is saved once its manifest is there.
    saved = lambda: [int(p.name.split(".")[0]) for p in tmp_path.glob("*.digest.json")]  # noqa: E731
    while max(saved(), default=0) <= newest and time.monotonic() < deadline:
      time.sleep(0.001)
    time.sleep(rng.uniform(0.0, 0.4))
    child.kill()
    child.join()
    with workdir_lib.run_lock(tmp_path), checkpoint.Checkpointer(tmp_path) as ckpt:
      assert not list(tmp_path.glob("*.orbax-checkpoint-tmp*"))
      restored = ckpt.restore({"state": like})
      assert restored is not None and restored.step > newest
      newest = restored.step
      assert restored.meta == {"step": newest}
      for i, name in enumerate(like):
        np.testing.assert_array_equal(restored.items["state"][name], random_array(newest, i))


def edit_manifest(folder: pathlib.Path, **changes) -> None:
  path = folder.with_name(f"{folder.name}.digest.json")
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove_step(step: pathlib.Path) -> None:
  shutil.rmtree(step)
  step.with_name(f"{step.name}.digest.json").unlink()


def copy_step(source: pathlib.Path, target: pathlib.Path) -> None:
  remove_step(target)
  shutil.copytree(source, target)
  shutil.copy(f"{source}.digest.json", f"{target}.digest.json")


def truncate(path: pathlib.Path) -> None:
  os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
  "damage",
  [
    lambda step: flip_bit(largest_file(step / "state")),
    lambda step: truncate(largest_file(step / "state")),
    lambda step: os.truncate(largest_file(step / "extra"), 0),
    lambda step: largest_file(step / "state").unlink(),
    lambda step: flip_bit(step / "meta" / "metadata"),
    lambda step: shutil.rmtree(step / "extra"),
    lambda step: (step / "commit_success.txt").unlink(),
    lambda step: shutil.rmtree(step),
    lambda step: step.with_name("3.digest.json").write_text("{"),
  ],
  ids=["flip", "truncate", "empty", "delete", "meta", "item", "marker", "step", "manifest"],
)
def test_damaged_step_is_rejected_and_replaced(tmp_path, warnings_logged, damage):
  save_steps(tmp_path, 2, 3)
  damage(tmp_path / "3")
  restored = restore(tmp_path)
  assert restored is not None
  assert restored.step == 2
  np.testing.assert_array_equal(restored.items["state"]["w"], weights(2)["w"])
  assert [line for line in warnings_logged if line.startswith("Rejected step 3")]
  with pytest.raises(checkpoint.CheckpointError, match="step 3: "):
    restore(tmp_path, step=3)

  with checkpoint.Checkpointer(tmp_path) as ckpt:  # The run goes on from 2 and saves 3 again.
    assert ckpt.restore({"state": weights(0)})
    ckpt.save(3, {"state": weights(33)}, {"again": True})
    restored = ckpt.restore({"state": weights(0)})
    assert restored is not None
    assert (restored.step, restored.meta) == (3, {"again": True})
    np.testing.assert_array_equal(restored.items["state"]["w"], weights(33)["w"])


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  """Folder with steps 2 and 3, not to be changed."""
  folder = tmp_path_factory.mktemp("two_steps") / "checkpoints"
  save_steps(folder, 2, 3)
  return folder


@pytest.mark.parametrize(
  "change",
  [
    lambda step: step.with_name("3.digest.json").write_text(""),
    lambda step: step.with_name("3.digest.json").write_text("[]"),
    lambda step: step.with_name("3.digest.json").write_text('{"files": {}}'),
    lambda step: edit_manifest(step, files={}),
    lambda step: edit_manifest(step, step=2),
    lambda step: edit_manifest(step, run="another"),
    lambda step: step.with_name("3.digest.json").unlink(),
    lambda step: (step / "state" / "more").write_text("x"),
    lambda step: remove_step(step),
    lambda step: copy_step(step.with_name("2"), step),
    lambda step: shutil.copytree(step.with_name("2"), step, dirs_exist_ok=True),
  ],
  ids=[
    *("empty", "list", "no_number", "no_files", "number", "run", "no_manifest", "more"),
    *("step_and_manifest", "renamed", "overwritten"),
  ],
)
def test_what_is_not_the_step_that_was_saved_is_rejected(
  two_steps, tmp_path, warnings_logged, change
):
  shutil.copytree(two_steps.parent, tmp_path, dirs_exist_ok=True)
  change(tmp_path / "checkpoints" / "3")
  restored = restore(tmp_path / "checkpoints")
  assert restored is not None and restored.step == 2
  np.testing.assert_array_equal(restored.items["state"]["w"], weights(2)["w"])
  assert [line for line in warnings_logged if line.startswith("Rejected step 3")]


def test_every_flipped_bit_is_found(tmp_path):
  save_steps(tmp_path, 1)
  files = [p for p in (tmp_path / "1").rglob("*") if p.is_file() and p.stat().st_size]
  for path in files:
    data = path.read_bytes()
    flip_bit(path)
    with pytest.raises(checkpoint.CheckpointError, match=path.name):
      restore(tmp_path)
    path.write_bytes(data)
  assert len(files) > 8
  manifest = tmp_path / "1.digest.json"
  data = manifest.read_bytes()
  for place in range(0, len(data), 23):
    manifest.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
    with pytest.raises(checkpoint.CheckpointError, match="step 1: "):
      restore(tmp_path)
  manifest.write_bytes(data)
  assert restore(tmp_path) is not None


def flip_one(step, draw):
  path = draw.choice(contents(step))
  content = bytearray(path.read_bytes())
  content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
  path.write_bytes(content)


def truncate_one(step, draw):
  path = draw.choice(contents(step))
  os.truncate(path, draw.randrange(path.stat().st_size))


def swap_two(step, draw):
  one, other = draw.sample(contents(step) + contents(step.with_name("2")), 2)
  first, second = one.read_bytes(), other.read_bytes()
  one.write_bytes(second)
  other.write_bytes(first)


def contents(step):
  files = [*step.rglob("*"), step.with_name(f"{step.name}.digest.json")]
  return sorted(path for path in files if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize(
  ("figure", "damage"),
  [
    ("bit flips", flip_one),
    ("truncated files", truncate_one),
    ("deleted files", lambda step, draw: draw.choice(contents(step)).unlink()),
    ("swapped files", swap_two),
  ],
)
def test_what_is_restored_is_what_was_saved(
  two_steps, tmp_path, warnings_logged, record_property, figure, damage
):
  """Whatever happens to a file, a step is rejected in words, or it is still what was saved."""
  draw, trials = random.Random(0), TRIALS or 3
  record_property(figure, trials)
  known = {
    path: path.read_bytes() for path in contents(two_steps / "2") + contents(two_steps / "3")
  }
  for trial in range(trials):
    folder = tmp_path / str(trial) / "checkpoints"
    shutil.copytree(two_steps.parent, folder.parent)
    damage(folder / "3", draw)
    changed = {
      path.relative_to(two_steps).parts[0].partition(".")[0]
      for path, content in known.items()
      if not (now := folder / path.relative_to(two_steps)).exists() or now.read_bytes() != content
    }
    warnings_logged.clear()
    if changed == {"2", "3"}:
      with pytest.raises(
        checkpoint.CheckpointError, match="(?s)step 3: .*step 2: |step 2: .*step 3: "
      ):
        restore(folder)
    else:
      restored = restore(folder)
      assert restored is not None and restored.step == (2 if "3" in changed else 3)
      np.testing.assert_array_equal(restored.items["state"]["w"], weights(restored.step)["w"])
      assert bool(warnings_logged) == ("3" in changed)
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("record", ['{"newest": 7}', '{"newest": 0}', "", "[]", "[" * 9999, None])
def test_a_spoilt_record_loses_no_step(two_steps, tmp_path, record):
  shutil.copytree(two_steps.parent, tmp_path, dirs_exist_ok=True)
  path = tmp_path / "checkpoints.json"
  path.unlink()
  if record is not None:
    path.write_text(record)
  with checkpoint.Checkpointer(tmp_path / "checkpoints") as ckpt:
    restored = ckpt.restore({"state": weights(0)})
    assert restored is not None and restored.step == 3
    ckpt.save(4, {"state": weights(4)}, {})
  assert json.loads(path.read_text()) == {"newest": 4}


def test_never_starts_afresh_when_steps_are_unusable(tmp_path):
  save_steps(tmp_path, 1)
  shutil.rmtree(tmp_path / "1")
  with pytest.raises(
    checkpoint.CheckpointError, match=r"(?s)no usable.*step 1: folder 1/ missing"
  ) as e:
    restore(tmp_path)
  assert e.value.exit_code == 78


def test_swapped_steps_and_steps_of_another_run_are_found(tmp_path):
  save_steps(tmp_path / "c", 1, 2)
  for name in ("", ".digest.json"):
    for source, target in (("1", "x"), ("2", "1"), ("x", "2")):
      (tmp_path / "c" / f"{source}{name}").rename(tmp_path / "c" / f"{target}{name}")
  with pytest.raises(checkpoint.CheckpointError) as e:
    restore(tmp_path / "c")
  assert "step 1: it was saved as step 2" in str(e.value)
  assert "step 2: it was saved as step 1" in str(e.value)

  with checkpoint.Checkpointer(tmp_path / "d", run="one") as ckpt:
    ckpt.save(1, {"state": weights(1)}, {})
  with checkpoint.Checkpointer(tmp_path / "d", run="one") as ckpt:
    assert ckpt.restore({"state": weights(0)})
  with checkpoint.Checkpointer(tmp_path / "d", run="two") as ckpt:
    with pytest.raises(checkpoint.CheckpointError, match="step 1: it belongs to another run"):
      ckpt.restore({"state": weights(0)})


def test_a_save_that_was_killed_before_its_manifest_has_not_happened(tmp_path, monkeypatch):
  finish = checkpoint.Checkpointer._finish
  killed = lambda self, step, manager, *_: manager.wait_until_finished()  # noqa: E731
  directory = tmp_path / "c"
  for step, left in ((1, None), (2, 1)):  # The first save of a run, and a later one.
    monkeypatch.setattr(checkpoint.Checkpointer, "_finish", killed)
    with checkpoint.Checkpointer(directory) as ckpt:
      ckpt.restore({"state": weights(0), "extra": {"n": np.int32(0)}})
      ckpt.save(step, {"state": weights(9), "extra": {"n": np.int32(0)}}, {"step": step})
    monkeypatch.setattr(checkpoint.Checkpointer, "_finish", finish)
    assert (directory / str(step) / "commit_success.txt").exists()
    restored = restore(directory)
    assert (restored and restored.step) == left
    with checkpoint.Checkpointer(directory) as ckpt:  # The run goes on and saves the step again.
      ckpt.restore({"state": weights(0), "extra": {"n": np.int32(0)}})
      ckpt.save(step, {"state": weights(step), "extra": {"n": np.int32(0)}}, {"step": step})
    restored = restore(directory)
    assert restored is not None and restored.step == step
    np.testing.assert_array_equal(restored.items["state"]["w"], weights(step)["w"])


@pytest.mark.parametrize("left", ["nothing", "folder"])
def test_checkpoints_that_are_gone_are_missed(tmp_path, left):
  save_steps(tmp_path / "c", 3, 4)
  shutil.rmtree(tmp_path / "c")
  if left == "folder":
    (tmp_path / "c").mkdir()
  with pytest.raises(checkpoint.CheckpointError, match="step 4: folder 4/ missing") as e:
    restore(tmp_path / "c")
  assert e.value.exit_code == 78
  with pytest.raises(checkpoint.CheckpointError, match="already holds step 4"):
    save_steps(tmp_path / "c", 1)


def test_older_steps_stay_until_the_new_one_has_been_read(tmp_path, monkeypatch):
  """An item whose arrays orbax has not merged looks complete to digests of what is there."""
  save_steps(tmp_path, 1, keep=1)
  wait = ocp.CheckpointManager.wait_until_finished

  def loses_arrays(self):
    wait(self)
    (tmp_path / "2" / "state" / "manifest.ocdbt").unlink(missing_ok=True)

  monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", loses_arrays)
  with checkpoint.Checkpointer(tmp_path, keep=1) as ckpt:
    assert ckpt.restore({"state": weights(0)})
    ckpt.save(2, {"state": weights(2)}, {})
    with pytest.raises(
      checkpoint.CheckpointWriteError, match=r"'state' .*steps still there: \[1\]"
    ):
      ckpt.wait()
  assert not (tmp_path / "2").exists()
  monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", wait)
  restored = restore(tmp_path)
  assert restored is not None and restored.step == 1


@pytest.mark.parametrize("name", ["lr=[1e-4]", "a*", "b?", "c\\d", "[x"])
def test_a_folder_whose_name_is_a_pattern_is_refused(tmp_path, name):
  for path in (tmp_path / name, tmp_path / name / "checkpoints"):
    with pytest.raises(workdir_lib.LockedError, match=r"without \* \? \[ and") as e:
      checkpoint.Checkpointer(path)
    assert entry.verdict(e.value)[0] == 73
  with pytest.raises(workdir_lib.LockedError), workdir_lib.run_lock(tmp_path / name):
    pass
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a b", "$(x);%s", "é'\"", "]{x}!#~&"])
def test_a_folder_of_any_other_name_holds_checkpoints(tmp_path, name):
  save_steps(tmp_path / name, 1)
  restored = restore(tmp_path / name)
  assert restored is not None and restored.step == 1


@pytest.mark.parametrize(
  "like, words",
  [
    (
      {"p": {"a": jnp.ones((2, 4)), "b": jnp.ones(3)}},
      ["'p', leaf 'a': saved float32[2,3]", "float32[2,4]"],
    ),
    ({"p": {"a": jnp.ones((2, 3), "bfloat16"), "b": jnp.ones(3)}}, ["expected bfloat16[2,3]"]),
    ({"p": {"a": jnp.ones((2, 3)), "b": jnp.ones(3, "int32")}}, ["'b': saved float32[3]"]),
    ({"p": {"a": jnp.ones((2, 3))}}, ["leaf 'b': saved float32[3], expected nothing"]),
    (
      {"p": {"a": jnp.ones((2, 3)), "b": jnp.ones(3), "c": {"d": jnp.ones(())}}},
      ["leaf 'c/d': saved missing, expected float32[]"],
    ),
    ({"critic": {"a": jnp.ones((2, 3))}}, ["item 'critic' missing; saved are ['p']"]),
  ],
)
def test_mismatch_names_the_leaf(tmp_path, like, words):
  with checkpoint.Checkpointer(tmp_path) as ckpt:
    ckpt.save(1, {"p": {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}}, {})
    with pytest.raises(checkpoint.CheckpointError) as e:
      ckpt.restore(like)
  assert all(word in str(e.value) for word in words), str(e.value)


def test_saved_step_cannot_be_overwritten_unseen(tmp_path):
  save_steps(tmp_path, 1, 2)
  with checkpoint.Checkpointer(tmp_path) as ckpt:
    with pytest.raises(checkpoint.CheckpointError, match="already holds step 2"):
      ckpt.save(2, {"state": weights(0)}, {})
    assert ckpt.restore({"state": weights(0)}, step=1)  # Continuing from 1 gives up 2.
    ckpt.save(2, {"state": weights(7)}, {})
    with pytest.raises(checkpoint.CheckpointError, match="already holds step 2"):
      ckpt.save(2, {"state": weights(0)}, {})
    restored = ckpt.restore({"state": weights(0)})
    assert restored is not None
    np.testing.assert_array_equal(restored.items["state"]["w"], weights(7)["w"])


def test_nonfinite_leaf_is_refused(tmp_path):
  tree = {"ok": jnp.ones(3), "layers": {"q": jnp.ones((2, 2), jnp.bfloat16).at[0, 1].set(jnp.inf)}}
  with checkpoint.Checkpointer(tmp_path / "c") as ckpt:
    with pytest.raises(FloatingPointError, match="item 'p', leaf 'layers/q'") as e:
      ckpt.save(1, {"p": tree}, {})
    assert getattr(e.value, "exit_code", None) == 70
    ckpt.wait()
  assert not (tmp_path / "c").exists()


def test_leaves_that_would_change_are_refused(tmp_path):
  with checkpoint.Checkpointer(tmp_path) as ckpt:
    for leaf, words in (
      (jax.random.key(0), "typed PRNG key"),
      (1.5, "is a float, not an array"),
      (np.arange(3, dtype=np.int64), "would cast int64"),
    ):
      with pytest.raises(TypeError, match=f"item 's', leaf 'x'.*{words}"):
        ckpt.save(1, {"s": {"x": leaf}}, {})
    with pytest.raises(ValueError, match="item name"):
      ckpt.save(1, {"../x": {}}, {})
    with pytest.raises(ValueError, match="JSON"):
      ckpt.save(1, {"s": weights(0)}, {"x": float("nan")})


def test_a_save_without_room_is_not_begun(tmp_path, monkeypatch):
  with workdir_lib.run_lock(tmp_path), checkpoint.Checkpointer(tmp_path / "c") as ckpt:
    ckpt.save(1, {"state": weights(1)}, {})
    ckpt.wait()
    room = os.statvfs(tmp_path)
    full = types.SimpleNamespace(f_bavail=1, f_frsize=4096)
    monkeypatch.setattr(checkpoint.os, "statvfs", lambda path: full)
    big = {"state": {"w": np.zeros(2000, np.float32)}}
    with pytest.raises(checkpoint.CheckpointWriteError, match=r"No space left .*there: \[1\]") as e:
      ckpt.save(2, big, {})
    assert entry.verdict(e.value)[0] == 74
    monkeypatch.setattr(checkpoint.os, "statvfs", lambda path: room)
    ckpt.save(2, big, {})
    ckpt.wait()
    assert ckpt.latest_step() == 2


def test_a_slow_disk_holds_no_step(tmp_path, monkeypatch):
  """A save returns before it is on disk, and only the next one waits for that."""
  finish, go = checkpoint.Checkpointer._finish, threading.Event()

  def slow(self, *args):
    assert go.wait(60)
    finish(self, *args)

  monkeypatch.setattr(checkpoint.Checkpointer, "_finish", slow)
  with checkpoint.Checkpointer(tmp_path) as ckpt:
    ckpt.save(1, {"state": weights(1)}, {})
    assert not (tmp_path / "1.digest.json").exists()  # Training goes on meanwhile.
    threading.Timer(0.2, go.set).start()
    ckpt.save(2, {"state": weights(2)}, {})
    assert (tmp_path / "1.digest.json").exists()


def test_failed_write_keeps_the_older_steps(tmp_path, monkeypatch):
  with workdir_lib.run_lock(tmp_path), checkpoint.Checkpointer(tmp_path / "c") as ckpt:
    ckpt.save(1, {"state": weights(1)}, {})
    ckpt.wait()
    # As on a full disk: files stop growing, the write fails after `save` returned.
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent.parent)!r})
import numpy as np
from rlhf_jax import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ckpt = checkpoint.Checkpointer({str(tmp_path / "c")!r})
big = {{"w": np.random.default_rng(0).random((1024, 1024))[:, :512].astype(np.float32)}}
assert ckpt.restore({{"state": {{"w": np.zeros(4096, np.float32)}}}}).step == 1
sys.dont_write_bytecode = True  # Python would keep a part of a module that is imported here.
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
try:
  ckpt.save(2, {{"state": big}}, {{}})
  ckpt.wait()
except checkpoint.CheckpointWriteError as error:
  print(error.exit_code, error)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
ckpt.save(2, {{"state": {{"w": np.ones(4096, np.float32)}}}}, {{}})
ckpt.close()
"""
  child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert child.returncode == 0, child.stderr[-2000:]
  assert child.stdout.startswith("74 step 2 could not be saved"), child.stdout
  assert child.stdout.endswith("File too large; steps still there: [1]\n")
  assert "ERROR" not in child.stderr and "never retrieved" not in child.stderr
  assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
    "1",
    "1.digest.json",
    "2",
    "2.digest.json",
  ]


def test_leftovers_are_removed_only_under_the_lock(tmp_path):
  leftover = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
  leftover.mkdir(parents=True)
  checkpoint.Checkpointer(tmp_path / "checkpoints").close()
  assert leftover.exists()
  with workdir_lib.run_lock(tmp_path):
    checkpoint.Checkpointer(tmp_path / "checkpoints").close()
  assert not leftover.exists()


def test_other_urls_are_refused():
  with pytest.raises(workdir_lib.WorkdirError, match="mount the share"):
    checkpoint.Checkpointer("s3://bucket/run")


SCORES = {1: 0.5, 2: 0.1, 3: 0.9, 4: None, 5: 0.9, 6: 0.2, 7: 0.3, 8: 0.4}


@pytest.mark.parametrize(
  ("keep", "every", "best", "left"),
  [
    (2, 0, "", [7, 8]),
    (1, 3, "", [3, 6, 8]),
    (1, 0, "reward", [5, 8]),
    (3, 4, "reward", [4, 5, 6, 7, 8]),
  ],
)
def test_steps_that_stay(tmp_path, keep, every, best, left):
  options = {"keep": keep, "every": every, "best": best}
  for first in (1, 5):  # The second one goes on where the first has ended.
    with checkpoint.Checkpointer(tmp_path / "c", **options) as saver:
      for step in range(first, first + 4):
        saver.save(step, {"x": np.float32([step])}, {}, SCORES[step])
        saver.wait()
        if best:
          known = [(s, n) for n, s in SCORES.items() if n <= step and s is not None]
          assert checkpoint.best_step(tmp_path / "c", best) == max(known)[1]
  assert sorted(int(p.name) for p in (tmp_path / "c").iterdir() if p.is_dir()) == left
  assert len(list((tmp_path / "c").glob("*.digest.json"))) == len(left)
  with checkpoint.Checkpointer(tmp_path / "c", **options) as saver:
    for step in left:
      assert saver.restore({"x": np.float32([0])}, step=step).items["x"] == step
  assert checkpoint.best_step(tmp_path / "c", "other") is None
  assert checkpoint.best_step(tmp_path / "c") == (5 if best else None)


def test_nothing_is_deleted_for_a_step_that_cannot_be_verified(tmp_path, monkeypatch):
  with checkpoint.Checkpointer(tmp_path / "c", keep=1, best="reward") as saver:
    for step, score in ((1, 0.9), (2, 0.1)):
      saver.save(step, {"x": np.float32([step])}, {}, score)
    saver.wait()

    def broken(folder, contents):
      raise OSError("lost a leaf")

    with monkeypatch.context() as patched:
      patched.setattr(checkpoint, "_require_contents", broken)
      saver.save(3, {"x": np.float32([3])}, {}, 2.0)
      with pytest.raises(checkpoint.CheckpointWriteError):
        saver.wait()
    assert sorted(int(p.name) for p in (tmp_path / "c").iterdir() if p.is_dir()) == [1, 2]
    assert checkpoint.best_step(tmp_path / "c") == 1
