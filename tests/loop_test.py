"""The host loop on a problem of one vector: what it writes, how it stops, how it goes on."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoint, entry, flags, loop, sharding, watch, writers
from rlhf_jax import workdir as workdir_lib

STEPS = 8
CONFIG = loop.RunConfig(steps=STEPS, batch_size=8, log_every=3, checkpoint_every=2)
_TIMES = {"step_seconds", "tokens_per_second"}


class Batches:
  """Resumable iterator: batch n follows from n."""

  def __init__(self, fail_at=None):
    self.index, self.fail_at = 0, fail_at

  def __iter__(self):
    return self

  def __next__(self):
    if self.index == self.fail_at:
      raise OSError("the disk of the data is gone")
    self.index += 1
    return {"x": np.random.default_rng(self.index).normal(size=(8, 3)).astype(np.float32)}

  def get_state(self):
    return {"index": self.index}

  def set_state(self, state):
    self.index = state["index"]


@jax.jit
def quadratic(state, batch, key):
  """One step of noisy gradient descent on |w - x|^2 with momentum."""
  error = state["w"][None] - batch["x"]
  noise = jax.random.normal(jax.random.fold_in(key, state["step"]), (3,))
  velocity = 0.9 * state["velocity"] + jnp.mean(error, axis=0) + 0.1 * noise
  new = {"w": state["w"] - 0.1 * velocity, "velocity": velocity, "step": state["step"] + 1}
  values = {"loss": jnp.mean(error**2), "tokens": jnp.float32(24), "weight": jnp.float32(8)}
  return new, values


def start_state():
  return {"w": jnp.ones(3), "velocity": jnp.zeros(3), "step": jnp.int32(0)}


def fit(workdir, config=CONFIG, step=quadratic, batches=None, seed=0, **kwargs):
  with loop.open_run(loop.Session(str(workdir), seed=seed)) as run:
    state = loop.fit(run, config, step, start_state(), batches or Batches(), **kwargs)
    return jax.device_get(state)


def lines(workdir):
  """The rows of metrics.jsonl without what depends on the clock."""
  rows = writers.read_metrics(pathlib.Path(workdir) / "metrics.jsonl")
  return [{k: v for k, v in row.items() if k not in _TIMES} for row in rows]


def fails_in(step, call):
  """`step`, but call number `call` raises after the update."""
  count = iter(range(1, 1000))

  def wrapped(*args):
    out = step(*args)
    if next(count) == call:
      raise RuntimeError("planted")
    return out

  return wrapped


def signals_in(step, call, number=signal.SIGTERM):
  """`step`, but a signal arrives during call number `call`."""
  count = iter(range(1, 1000))

  def wrapped(*args):
    if next(count) == call:
      os.kill(os.getpid(), number)
    return step(*args)

  return wrapped


def assert_same_end(workdir, state, expected):
  expected_state, expected_lines = expected
  jax.tree.map(np.testing.assert_array_equal, state, expected_state)
  assert lines(workdir) == expected_lines


def test_a_continued_run_does_not_hold_its_first_state(tmp_path, monkeypatch):
  fit(tmp_path)
  first, read = start_state(), checkpoint.Checkpointer._read

  def read_alone(*args):
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    return read(*args)

  monkeypatch.setattr(checkpoint.Checkpointer, "_read", read_alone)
  with loop.open_run(loop.Session(str(tmp_path))) as run:
    config = dataclasses.replace(CONFIG, steps=CONFIG.steps + 1)
    end = loop.fit(run, config, quadratic, first, Batches())
  assert int(end["step"]) == CONFIG.steps + 1
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))


def test_trackers_get_the_settings_and_everything_in_the_order_of_the_steps(tmp_path, monkeypatch):
  calls = []

  class Tracker:
    def __init__(self, workdir, *, run_name, resume_step, config):
      calls.append(("open", resume_step, config))

    def write(self, step, scalars):
      calls.append(("write", step))

    def table(self, step, name, rows):
      calls.append(("table", step))

    def close(self):
      calls.append(("close", None))

  monkeypatch.setitem(writers.TRACKERS, "mine", Tracker)
  config = dataclasses.replace(CONFIG, steps=4, log_every=1, eval_every=2)
  with loop.open_run(loop.Session(str(tmp_path), seed=5, trackers=("mine",))) as run:

    def evaluate(state, step):
      run.writer.table(step, "samples", [{"prompt": "p"}])
      return {}

    loop.fit(run, config, quadratic, start_state(), Batches(), evaluate=evaluate)
    run.writer.table(4, "samples", [{"prompt": "q"}])
  first, *rest = calls
  assert first[:2] == ("open", 0)
  assert {"seed": 5, "batch_size": 8, "eval_every": 2}.items() <= first[2].items()
  writes = [("write", step) for step in (1, 2, 3, 4)]
  assert rest == [
    writes[0],
    ("table", 2),
    *writes[1:3],
    ("table", 4),
    writes[3],
    ("table", 4),
    ("close", None),
  ]
  assert (tmp_path / "samples" / "step_00000004.jsonl").read_text() == '{"prompt": "q"}\n'


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  return fit(workdir), lines(workdir)


def test_it_computes_what_a_plain_loop_does(uninterrupted):
  key = jax.random.fold_in(jax.random.key(0), 0)
  state, batches, losses = start_state(), Batches(), {}
  for i in range(STEPS):
    state, values = quadratic(state, jax.tree.map(jnp.asarray, next(batches)), key)
    losses[i + 1] = float(values["loss"])
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), uninterrupted[0], state)
  rows = uninterrupted[1]
  assert [row["step"] for row in rows] == [1, 3, 6, 8]
  for row in rows:
    assert set(row) == {"step", "loss"}
    np.testing.assert_allclose(row["loss"], losses[row["step"]], rtol=1e-5)


@pytest.mark.parametrize(
  "log_every, eval_every, logged, evaluated",
  [
    (1, 0, [1, 2, 3, 4, 5, 6, 7, 8], [8]),
    (100, 0, [1, 8], [8]),
    (4, 3, [1, 3, 4, 6, 8], [3, 6, 8]),
  ],
)
def test_lines_of_metrics(tmp_path, log_every, eval_every, logged, evaluated):
  config = loop.RunConfig(
    steps=STEPS, batch_size=8, log_every=log_every, eval_every=eval_every, checkpoint_every=5
  )
  calls = []

  def evaluate(state, step):
    assert int(state["step"]) == step
    calls.append(step)
    return {"win_rate": step / 10}

  fit(tmp_path, config, evaluate=evaluate, learning_rate=lambda index: 0.5 * index)
  rows = writers.read_metrics(tmp_path / "metrics.jsonl")
  assert [row["step"] for row in rows] == logged
  assert calls == evaluated
  for row in rows:
    assert row["lr"] == 0.5 * (row["step"] - 1)
    assert row["tokens_per_second"] > 0 and row["step_seconds"] > 0
    assert row.get("win_rate") == (row["step"] / 10 if row["step"] in evaluated else None)
    assert not {"tokens", "weight"} & set(row)
  saved = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()}
  assert saved == {"5", "8"}


@pytest.mark.parametrize("log_every", [1, 3])
@pytest.mark.parametrize("call", [1, 2, 3, 5, 8])
def test_a_crash_changes_neither_the_end_nor_the_lines(tmp_path, call, log_every, uninterrupted):
  config = loop.RunConfig(steps=STEPS, batch_size=8, log_every=log_every, checkpoint_every=2)
  with pytest.raises(RuntimeError, match="planted"):
    fit(tmp_path / "a", config, fails_in(quadratic, call))
  state = fit(tmp_path / "a", config)
  if log_every == 3:
    expected = uninterrupted
  else:
    expected = fit(tmp_path / "b", config), lines(tmp_path / "b")
    assert [row["step"] for row in expected[1]] == list(range(1, STEPS + 1))
  assert_same_end(tmp_path / "a", state, expected)


def test_a_step_that_raises_leaves_the_state_before_it(tmp_path, uninterrupted, capsys):
  config = dataclasses.replace(CONFIG, checkpoint_every=100)
  calls = []

  def counted(*args):
    calls.append(1)
    return quadratic(*args)

  for call, left in ((1, None), (4, 3), (1, 3), (3, 5)):
    with pytest.raises(RuntimeError, match="planted"):
      fit(tmp_path, config, fails_in(counted, call))
    with checkpoint.Checkpointer(tmp_path / "checkpoints") as saver:
      assert saver.latest_step() == left
    said = f"saved step {left} of {STEPS}, the last one before the error"
    assert (said in capsys.readouterr().err) == (call > 1)
  assert_same_end(tmp_path, fit(tmp_path, config, counted), uninterrupted)
  assert len(calls) == STEPS + 4


def test_an_evaluation_that_raises_leaves_the_state_after_the_step(tmp_path, uninterrupted):
  config = dataclasses.replace(CONFIG, checkpoint_every=100, eval_every=5)

  def broken(state, step):
    raise RuntimeError("planted")

  with pytest.raises(RuntimeError, match="planted"):
    fit(tmp_path, config, evaluate=broken)
  with checkpoint.Checkpointer(tmp_path / "checkpoints") as saver:
    assert saver.latest_step() == 5
  state = fit(tmp_path, dataclasses.replace(config, eval_every=0))
  jax.tree.map(np.testing.assert_array_equal, state, uninterrupted[0])
  assert [row["step"] for row in lines(tmp_path)] == [1, 3, 5, 6, 8]


def test_a_step_that_has_lost_its_state_saves_nothing(tmp_path):
  def losing(state, *rest):
    new, values = quadratic(state, *rest)
    jax.tree.map(lambda x: x.delete(), state)
    if new["step"] == 3:
      raise RuntimeError("planted")
    return new, values

  with pytest.raises(RuntimeError, match="planted"):
    fit(tmp_path, dataclasses.replace(CONFIG, checkpoint_every=100), losing)
  with checkpoint.Checkpointer(tmp_path / "checkpoints") as saver:
    assert saver.latest_step() is None


def test_a_crash_of_the_data_right_after_a_save(tmp_path, uninterrupted):
  for fail_at in (4, 6):
    with pytest.raises(OSError, match="disk"):
      fit(tmp_path, batches=Batches(fail_at))
    with checkpoint.Checkpointer(tmp_path / "checkpoints") as saver:
      assert saver.latest_step() == fail_at
    # The metrics of the saved step are on disk: no later process could write them.
    assert lines(tmp_path) == [row for row in uninterrupted[1] if row["step"] <= fail_at]
  assert_same_end(tmp_path, fit(tmp_path), uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("call", [1, 2, 5, 7])
def test_a_signal_saves_and_the_run_continues(tmp_path, call, number, uninterrupted, capfd):
  before = signal.getsignal(number)
  with pytest.raises(loop.Preempted, match=f"saved step {call} of {STEPS}; run the same") as e:
    fit(tmp_path, step=signals_in(quadratic, call, number))
  assert e.value.exit_code == 75
  assert signal.getsignal(number) is before
  assert ("stopping after this step" in capfd.readouterr().err) == (number == signal.SIGINT)
  with checkpoint.Checkpointer(tmp_path / "checkpoints") as saver:
    assert saver.latest_step() == call
  taken = []

  def counted(*args):
    taken.append(1)
    return quadratic(*args)

  assert_same_end(tmp_path, fit(tmp_path, step=counted), uninterrupted)
  assert len(taken) == STEPS - call


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path, uninterrupted):
  signal.signal(signal.SIGINT, signal.default_int_handler)  # Ignored, if tests run behind a shell.

  def twice(*args):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)  # The handler runs between two instructions.
    raise AssertionError("the step went on")

  with pytest.raises(KeyboardInterrupt):
    fit(tmp_path, step=lambda *args: (twice if int(args[0]["step"]) == 3 else quadratic)(*args))
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  assert_same_end(tmp_path, fit(tmp_path), uninterrupted)


def test_a_finished_run_says_that_it_trains_nothing(tmp_path, capsys):
  fit(tmp_path)
  capsys.readouterr()
  for steps in (STEPS, STEPS - 1):
    fit(tmp_path, dataclasses.replace(CONFIG, steps=steps))
    said = capsys.readouterr().err
    assert f"already finished, with step {STEPS}: nothing is trained" in said
    assert "continuing" not in said


@pytest.mark.parametrize("changes", [True, False])
def test_other_steps_say_what_becomes_of_the_learning_rate(tmp_path, changes, capsys):
  def schedule(steps):
    return lambda step: 0.5 * (1 - step / steps) if changes else 0.5

  fit(tmp_path, learning_rate=schedule(STEPS))
  more = dataclasses.replace(CONFIG, steps=STEPS + 2)
  for _ in range(2):  # The second time, nothing has changed.
    fit(tmp_path, more, learning_rate=schedule(STEPS + 2))
  said = capsys.readouterr().err
  words = f"--steps was {STEPS}, now {STEPS + 2}: the learning rate is scheduled over the steps, so"
  assert said.count(words) == int(changes)
  if changes:
    assert f"that of step {STEPS + 1} is 0.1 and not 0;" in said


def test_sigterm_in_the_last_step_ends_the_run(tmp_path, uninterrupted):
  assert_same_end(tmp_path, fit(tmp_path, step=signals_in(quadratic, STEPS)), uninterrupted)


def test_sigterm_at_any_moment_is_not_reported_without_a_save(tmp_path, monkeypatch):
  # The signal arrives between two looks at the flag, in a step that is not due for a checkpoint.
  class Flag:
    looks = 0

    def is_set(self):
      self.looks += 1
      return self.looks > 1

  class Watch(watch.Watch):
    def __enter__(self):
      super().__enter__().stop = Flag()
      return self

  monkeypatch.setattr(watch, "Watch", Watch)
  with pytest.raises(loop.Preempted) as e:
    fit(tmp_path)
  with checkpoint.Checkpointer(tmp_path / "checkpoints") as saver:
    assert str(e.value).startswith(f"saved step {saver.latest_step()} of")


def test_checkpoints_that_were_deleted_are_not_replaced_by_a_new_start(tmp_path):
  fit(tmp_path, dataclasses.replace(CONFIG, steps=4))
  metrics = (tmp_path / "metrics.jsonl").read_bytes()
  shutil.rmtree(tmp_path / "checkpoints")
  with pytest.raises(
    checkpoint.CheckpointError, match="put a copy back, or start afresh with"
  ) as e:
    fit(tmp_path)
  assert entry.verdict(e.value)[0] == 78
  assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_a_run_stops_when_its_folder_is_removed(tmp_path):
  def removing(state, *rest):
    if state["step"] == 3:
      shutil.rmtree(tmp_path / "run")
    return quadratic(state, *rest)

  with pytest.raises(workdir_lib.LostError, match="was removed, or replaced") as e:
    fit(tmp_path / "run", dataclasses.replace(CONFIG, log_every=1, checkpoint_every=100), removing)
  assert entry.verdict(e.value)[0] == 74
  assert not (tmp_path / "run").exists()


def test_steps_of_another_run_are_not_used(tmp_path):
  for name, seed in (("a", 0), ("b", 1)):
    (tmp_path / name).mkdir()
    (tmp_path / name / "identity.json").write_text(json.dumps({"seed": seed}))
    fit(tmp_path / name, seed=seed)
  for file in (f"{STEPS}.digest.json", str(STEPS)):
    target = tmp_path / "b" / "checkpoints" / file
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    (tmp_path / "a" / "checkpoints" / file).rename(target)
  taken = []

  def counted(*args):
    taken.append(1)
    return quadratic(*args)

  fit(tmp_path / "b", step=counted, seed=1)
  assert taken, "it went on from an older step of its own"


def test_a_finished_run_takes_no_step(tmp_path, uninterrupted):
  fit(tmp_path)
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}

  def never(*args):
    raise AssertionError("a step was taken")

  assert_same_end(tmp_path, fit(tmp_path, step=never), uninterrupted)
  after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
  assert after == before


def test_more_steps_continue_a_finished_run(tmp_path, uninterrupted):
  short = loop.RunConfig(steps=5, batch_size=8, log_every=3, checkpoint_every=2)
  fit(tmp_path, short)
  state = fit(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, state, uninterrupted[0])
  # The old last step has its line too.
  assert [row["step"] for row in lines(tmp_path)] == [1, 3, 5, 6, 8]


def test_a_metric_that_is_undefined_in_a_step_is_absent(tmp_path):
  def step(state, batch, key):
    new, values = quadratic(state, batch, key)
    defined = new["step"] % 2 == 0
    values |= {"reward/chosen": jnp.where(defined, 0.0, jnp.nan)}
    return new, values | {"loss": jnp.where(defined, values["loss"], jnp.nan)}

  fit(tmp_path, dataclasses.replace(CONFIG, log_every=1), step)
  rows = lines(tmp_path)
  assert len(rows) == CONFIG.steps
  for row in rows:  # A loss is always shown.
    assert row["loss"] == row["loss"] if row["step"] % 2 == 0 else "loss" in row
    assert row.get("reward/chosen") == (0.0 if row["step"] % 2 == 0 else None)


def test_the_seed_decides(tmp_path, uninterrupted):
  assert (fit(tmp_path, seed=1)["w"] != uninterrupted[0]["w"]).any()


def skipping(bad, grad_norm=np.nan):
  """A step that reports a skipped update, without finite gradient, for the calls in `bad`."""
  count = iter(range(1, 1000))

  def step(state, batch, key):
    skipped = next(count) in bad
    new, values = quadratic(state, batch, key)
    new = state | {"step": new["step"]} if skipped else new
    norms = {"grad_norm": jnp.float32(grad_norm)} if skipped else {}
    return new, {**values, **norms, "skipped_steps": jnp.float32(skipped)}

  return step


def test_five_steps_without_finite_gradient_end_the_run(tmp_path):
  config = loop.RunConfig(steps=30, batch_size=8, checkpoint_every=3)
  with pytest.raises(loop.NumericsError, match="in 5 steps up to 9; lower --optim.lear") as e:
    fit(tmp_path, config, skipping(range(5, 30)))
  assert e.value.exit_code == 70
  assert [row["step"] for row in lines(tmp_path)][-1] == 9
  with checkpoint.Checkpointer(tmp_path / "checkpoints") as saver:
    assert saver.latest_step() == 3, "the last checkpoint is from before the bad steps"


def test_batches_without_anything_to_learn_from_are_survived_for_longer(tmp_path):
  config = loop.RunConfig(steps=60, batch_size=8, checkpoint_every=30)
  fit(tmp_path / "few", config, skipping(range(5, 54), grad_norm=0.0))
  with pytest.raises(loop.NumericsError, match="nothing to learn from in 50 steps up to 54,"):
    fit(tmp_path / "many", config, skipping(range(5, 60), grad_norm=0.0))
  with checkpoint.Checkpointer(tmp_path / "many" / "checkpoints") as saver:
    assert saver.latest_step() == 30, "they leave the state as it was"


def test_five_bad_steps_at_the_very_end(tmp_path):
  config = loop.RunConfig(steps=10, batch_size=8, checkpoint_every=5)
  with pytest.raises(loop.NumericsError):
    fit(tmp_path, config, skipping(range(6, 11)))
  with checkpoint.Checkpointer(tmp_path / "checkpoints") as saver:
    assert saver.latest_step() == 5


def test_nothing_is_saved_after_a_broken_gradient(tmp_path):
  config = loop.RunConfig(steps=9, batch_size=8, checkpoint_every=3)
  with pytest.raises(RuntimeError, match="planted"):
    fit(tmp_path, config, fails_in(skipping({3}), 4))
  with checkpoint.Checkpointer(tmp_path / "checkpoints") as saver:
    assert saver.latest_step() is None
  fit(tmp_path, config, skipping({4}))  # Step 9, the last: saved nevertheless.
  with checkpoint.Checkpointer(tmp_path / "checkpoints") as saver:
    assert saver.latest_step() == 9


def test_fewer_bad_steps_in_a_row_are_survived(tmp_path):
  bad = {2, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15}
  config = loop.RunConfig(steps=16, batch_size=8, checkpoint_every=4)
  fit(tmp_path, config, skipping(bad))
  assert [row["skipped_steps"] for row in lines(tmp_path)] == [
    float(i in bad) for i in range(1, 17)
  ]


SETTINGS = {"steps": 10, "log_every": 1, "batch_size": 8, "optim": {"learning_rate": 1e-3}}


def test_identity(tmp_path):
  data = {"data": "abc"}
  with loop.open_run(loop.Session(str(tmp_path))) as run:
    loop.identify(run, "dpo", SETTINGS, data)
    loop.identify(run, "dpo", SETTINGS, data)
    free = {"steps": 99, "log_every": 7, "eval_every": 3, "checkpoint_every": 2}
    loop.identify(run, "dpo", SETTINGS | free, data)
    rate = {"optim": {"learning_rate": 2e-3}}
    for name, settings, digests, words in (
      ("dpo", SETTINGS | rate, data, "--optim.learning_rate was 0.001, now 0.002"),
      ("dpo", SETTINGS | {"batch_size": 16}, data, "--batch_size was 8, now 16"),
      ("dpo", SETTINGS | {"dpo.beta": 0.1}, data, "--dpo.beta was absent, now 0.1"),
      ("ppo", SETTINGS | rate, {}, 'script was "dpo", now "ppo"'),
      ("dpo", SETTINGS, {"data": "abd"}, 'data was "abc", now "abd"'),
      ("dpo", SETTINGS, {}, 'data was "abc", now absent'),
    ):
      with pytest.raises(workdir_lib.WorkdirError, match=f"run: {words}; use another --w") as e:
        loop.identify(run, name, settings, digests)
      assert e.value.exit_code == 78
  with loop.open_run(loop.Session(str(tmp_path), seed=1)) as run:
    with pytest.raises(workdir_lib.WorkdirError, match="run: --seed was 0, now 1; use"):
      loop.identify(run, "dpo", SETTINGS, data)


def test_keys_of_a_run(tmp_path):
  with loop.open_run(loop.Session(str(tmp_path), seed=3)) as run:
    keys = [jax.random.key_data(run.key_for(i)).tolist() for i in range(4)]
    again = [jax.random.key_data(run.key_for(i)).tolist() for i in range(4)]
  assert keys == again and len({tuple(k) for k in keys}) == 4


_SECOND = """
import sys
from rlhf_jax import loop
from rlhf_jax import workdir as workdir_lib
try:
  with loop.open_run(loop.Session(sys.argv[1])):
    print("opened")
except workdir_lib.LockedError as error:
  print(error.exit_code, error)
"""
_TRAINER = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
from rlhf_jax import loop
class Batches:
  index = 0
  def __next__(self):
    self.index += 1
    return {"x": np.zeros((8, 1), np.float32)}
  def get_state(self): return {"index": self.index}
  def set_state(self, state): self.index = state["index"]
def step(state, batch, key):
  print("STEP", flush=True)
  time.sleep(0.02)
  return state + 1, {}
config = loop.RunConfig(steps=5000, batch_size=8, checkpoint_every=5000)
with loop.open_run(loop.Session(sys.argv[1])) as run:
  try:
    loop.fit(run, config, step, jnp.float32(0), Batches())
  except loop.Preempted as error:
    sys.exit(error.exit_code)
"""


def child_env(repository):
  return os.environ | {"PYTHONPATH": str(repository), "XLA_FLAGS": ""}


@pytest.mark.slow
def test_a_second_process_is_refused(tmp_path, repository):
  command = [sys.executable, "-c", _SECOND, str(tmp_path)]
  run = functools.partial(
    subprocess.run, command, env=child_env(repository), capture_output=True, text=True
  )
  with loop.open_run(loop.Session(str(tmp_path))):
    output = run().stdout
  assert output.startswith(f"73 --workdir={tmp_path} is in use by pid {os.getpid()} "), output
  assert run().stdout == "opened\n"


@pytest.mark.slow
def test_sigterm_of_a_process(tmp_path, repository):
  child = subprocess.Popen(
    [sys.executable, "-c", _TRAINER, str(tmp_path)],
    env=child_env(repository),
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  with child, child.stdout as output:
    for line in output:
      if line == "STEP\n":
        break
    child.send_signal(signal.SIGTERM)
    began = time.monotonic()
    taken = 1 + sum(line == "STEP\n" for line in output)
    assert child.wait(60) == 75
  assert time.monotonic() - began < 30
  with checkpoint.Checkpointer(tmp_path / "checkpoints") as saver:
    restored = saver.restore({"state": jnp.float32(0)})
  assert restored.step == taken and float(restored.items["state"]) == taken
  assert restored.meta["data"] == {"index": taken}
  last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
  assert json.loads(last)["step"] == taken


@pytest.mark.parametrize("name", ["steps", "batch_size", "log_every", "checkpoint_every"])
def test_impossible_settings_are_refused(name):
  with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
    loop.RunConfig(**{name: 0})
  with pytest.raises(ValueError, match="eval_every must not be negative"):
    loop.RunConfig(eval_every=-1)


def test_what_is_asked_of_a_process_is_known_to_all_one_step_later():
  asked = threading.Event()
  stop = loop._SharedStop(asked, sharding.make_mesh("data:2,fsdp:2,tensor:2"))
  assert [stop.is_set() for _ in range(3)] == [False] * 3
  asked.set()
  assert [stop.is_set() for _ in range(3)] == [False, True, True]


@pytest.mark.parametrize(("name", "best"), [("eval/reward", 2), ("-eval/reward", 6)])
def test_the_best_checkpoint_stays(tmp_path, name, best):
  config = loop.RunConfig(
    steps=STEPS, batch_size=8, checkpoint_every=4, eval_every=2, keep=1, keep_best=name
  )
  values = {2: 0.9, 4: 0.5, 6: 0.1, 8: 0.6}
  fit(tmp_path, config, evaluate=lambda state, step: {"eval/reward": values[step]})
  folder = tmp_path / "checkpoints"
  assert {p.name for p in folder.iterdir() if p.is_dir()} == {str(best), "8"}
  assert checkpoint.best_step(folder) == best


def test_a_metric_that_was_there_may_be_undefined_in_a_run_that_continues(tmp_path):
  config = loop.RunConfig(
    steps=2, batch_size=8, checkpoint_every=4, eval_every=2, keep=1, keep_best="eval/reward"
  )
  fit(tmp_path, config, evaluate=lambda state, step: {"eval/reward": 1.0})
  fit(tmp_path, dataclasses.replace(config, steps=6), evaluate=lambda state, step: {})
  assert checkpoint.best_step(tmp_path / "checkpoints") == 2
  other = dataclasses.replace(config, steps=8, keep_best="eval/rewards")
  with pytest.raises(flags.UsageError, match="no metric of the evaluations"):
    fit(tmp_path, other, evaluate=lambda state, step: {"eval/reward": 1.0})


def test_a_best_checkpoint_needs_its_metric(tmp_path):
  with pytest.raises(ValueError, match="keep_best=eval/reward is a metric of evaluations"):
    loop.RunConfig(keep_best="eval/reward")
  with pytest.raises(ValueError, match="keep_best=- names no metric"):
    loop.RunConfig(keep_best="-", eval_every=1)
  config = loop.RunConfig(steps=2, batch_size=8, eval_every=1, keep_best="eval/reward")
  with pytest.raises(flags.UsageError, match="there are no held-out rows"):
    fit(tmp_path / "a", config)
  with pytest.raises(flags.UsageError, match="no metric of the evaluations; they have eval/loss"):
    fit(tmp_path / "b", config, evaluate=lambda state, step: {"eval/loss": 1.0})
