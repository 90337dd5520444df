"""A run that ends for want of a finite gradient leaves what it takes to see why."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import checkpoint, entry, loop, replay, train_step

CONFIG = loop.RunConfig(steps=30, batch_size=8, checkpoint_every=4)
TX = optax.adam(0.1)


class Batches:
  """Batch n follows from n; from batch `bad` on, the logarithm of its error is NaN."""

  def __init__(self, bad):
    self.index, self.bad = 0, bad

  def __next__(self):
    self.index += 1
    x = np.random.default_rng(self.index).normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "sign": np.full(8, -1 if self.index in self.bad else 1, np.float32)}

  def get_state(self):
    return {"index": self.index}

  def set_state(self, state):
    self.index = state["index"]


def loss(params, batch, key):
  noise = 0.1 * jax.random.normal(key, (3,))
  errors = jnp.mean((params["w"][None] + noise[None] - batch["x"]) ** 2, axis=1)
  return jnp.mean(jnp.log(batch["sign"] * errors)), {}  # PLANTED


def fit(workdir, bad, replay_step=0, step=None, config=CONFIG):
  with loop.open_run(loop.Session(str(workdir), replay_step=replay_step)) as run:
    state = train_step.init_state({"w": jnp.ones(3)}, TX)
    update = train_step.make_train_step(loss, TX)
    return loop.fit(run, config, step or update, state, Batches(bad))


def files(folder):
  return {
    path: path.read_bytes()
    for path in pathlib.Path(folder).rglob("*")
    if path.is_file() and path.name != ".lock"
  }


def states(workdir, folder, done):
  """The state after `done` steps and what the next one gets, as a folder has them."""
  batch = jax.tree.map(jnp.asarray, next(Batches(())))
  items = {
    "state": train_step.init_state({"w": jnp.ones(3)}, TX),
    "batch": batch,
    "key": jax.random.key_data(jax.random.key(0)),
  }
  if folder == "checkpoints":
    items = {"state": items["state"]}
  with checkpoint.Checkpointer(workdir / folder) as kept:
    return kept.restore(items, step=done)


def test_the_origin_of_a_gradient_without_a_finite_value(tmp_path, capsys):
  with pytest.raises(loop.NumericsError, match="steps up to 10; .* --replay_step=10 names"):
    fit(tmp_path, range(6, 40))
  assert sorted(p.name for p in (tmp_path / "black_box").iterdir() if p.is_dir()) == ["10", "9"]
  before = files(tmp_path)
  line = next(
    i
    for i, text in enumerate(pathlib.Path(__file__).read_text().splitlines(), 1)
    if "PLANTED" in text
  )
  for wanted, source in ((10, "black_box/9"), (7, "checkpoints/4"), (3, "the start")):
    capsys.readouterr()
    with pytest.raises(replay.Replayed) as e:
      fit(tmp_path, range(6, 40), replay_step=wanted)
    assert entry.verdict(e.value)[0] == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"running step {wanted} again, from the state of {source}" in said
    if wanted == 3:
      assert "everything is finite, operation by operation" in said and "skipped_steps: 0.0" in said
    else:
      assert "loss: NaN" in said and "skipped_steps: 1.0" in said
      assert "loss is not finite by log: NaN in 8 of 8 values, the first at [0], in" in said
      assert f"replay_test.py:{line}, loss" in said.replace(" ", "").replace(",loss", ", loss")
  assert files(tmp_path) == before


def test_the_black_box_has_state_batch_and_key(tmp_path):
  with pytest.raises(loop.NumericsError):
    fit(tmp_path, range(6, 40))
  kept = states(tmp_path, "black_box", 9)
  good = states(tmp_path, "checkpoints", 4)
  batches = Batches(range(6, 40))
  batches.set_state(good.meta["data"])
  state, key = good.items["state"], jax.random.fold_in(jax.random.key(0), 0)
  update = train_step.make_train_step(loss, TX)
  for _ in range(5):
    state, _ = update(state, jax.tree.map(jnp.asarray, next(batches)), key)
  jax.tree.map(np.testing.assert_array_equal, kept.items["state"], state)
  jax.tree.map(np.testing.assert_array_equal, kept.items["batch"], next(batches))
  np.testing.assert_array_equal(kept.items["key"], jax.random.key_data(key))


def test_a_run_that_recovers_goes_on_and_a_new_start_begins_a_new_box(tmp_path):
  fit(tmp_path, range(6, 9), config=loop.RunConfig(steps=12, batch_size=8, checkpoint_every=4))
  assert not (tmp_path / "black_box" / "12").exists()
  with pytest.raises(loop.NumericsError):
    fit(tmp_path, (*range(6, 9), *range(15, 40)))
  with pytest.raises(loop.NumericsError):  # The same steps again, which it has already kept.
    fit(tmp_path, (*range(6, 9), *range(15, 40)))
  assert sorted(p.name for p in (tmp_path / "black_box").iterdir() if p.is_dir()) == ["18", "19"]


def test_a_step_that_raised_is_run_again_from_the_state_before_it(tmp_path, capsys):
  update = train_step.make_train_step(loss, TX)

  def scored(state, batch, key):
    if state.step == 6:
      raise ValueError("a reward of one's own")
    return update(state, batch, key)

  for wanted in (0, 7):
    with pytest.raises(ValueError, match="one's own"):
      fit(tmp_path, (), wanted, scored)
  assert "running step 7 again, from the state of checkpoints/6" in capsys.readouterr().err


def test_a_box_without_room_does_not_end_a_run(tmp_path, monkeypatch):
  save = checkpoint.Checkpointer.save

  def full(self, step, *args, **kwargs):
    if self.directory.name == replay.FOLDER:
      raise checkpoint.CheckpointWriteError("No space left on device")
    save(self, step, *args, **kwargs)

  monkeypatch.setattr(checkpoint.Checkpointer, "save", full)
  state = fit(tmp_path, range(6, 10))
  assert int(state.step) == CONFIG.steps
