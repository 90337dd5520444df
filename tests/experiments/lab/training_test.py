"""Optimizers of two models, trained and frozen params, and zipped batches."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.lab import critics, models, training
from rlhf_jax.algorithms import ppo, sft
from rlhf_jax.algorithms.sft import SFTConfig
from rlhf_jax.models import lora, quantized, round_matrices
from rlhf_jax.train_step import OptimConfig
from rlhf_jax.types import TrainState


def test_a_policy_that_waits_is_left_bitwise():
  config = OptimConfig(learning_rate=0.1, schedule="constant", warmup=0.0)
  optimizer = training.actor_critic_optimizer(config, config, 4, updates_per_step=2, wait=2)
  assert [float(optimizer.learning_rate(step)) for step in range(3)] == [0, 0, pytest.approx(0.1)]
  params = {name: {"w": jnp.float32([0.3])} for name in ("policy", "value")}
  grads, state, moved = jax.tree.map(jnp.ones_like, params), optimizer.tx.init(params), []
  for _ in range(5):  # Two updates for each step.
    updates, state = optimizer.tx.update(grads, state, params)
    after = optax.apply_updates(params, updates)
    moved.append({name: bool(after[name]["w"] != params[name]["w"]) for name in params})
    params = after
  assert [x["policy"] for x in moved] == [False] * 4 + [True]
  assert all(x["value"] for x in moved)


def test_zipped_batches_continue_together():
  class Count:
    def __init__(self, step):
      self.step, self.at = step, 0

    def __next__(self):
      self.at += self.step
      return self.at

    def get_state(self):
      return self.at

    def set_state(self, state):
      self.at = state

  first = training.Zipped(Count(1), Count(10))
  assert [next(first) for _ in range(2)] == [(1, 10), (2, 20)]
  second = training.Zipped(Count(1), Count(10))
  second.set_state(first.get_state())
  assert next(second) == next(first) == (3, 30)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("keep_start", [True, False])
def test_a_state_lives_in_buffers_of_its_own(rank, keep_start, open_bench, monkeypatch):
  monkeypatch.setattr("experiments.lab.models.require_base", lambda *args: None)  # A new model.
  bench = open_bench("sft", "demonstrations", f"--lora.rank={rank}")
  before = jax.device_get(jax.tree.map(jnp.copy, bench.start))  # A view would keep its buffers.
  make_step = functools.partial(sft.make_sft_step, config=SFTConfig())
  trainer = bench.trainer(make_step, keep_start=keep_start)
  assert bool(trainer.frozen) == bool(rank)
  jax.tree.map(np.testing.assert_array_equal, lora.base(trainer.params(trainer.state)), before)
  batch = jax.tree.map(jnp.asarray, next(bench.batches()))
  state, _ = trainer.step(trainer.state, batch, jax.random.key(0))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trainer.state.params))
  if keep_start or rank:
    jax.tree.map(np.testing.assert_array_equal, bench.start, before)
  else:
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(bench.start))
  after = lora.base(trainer.params(state))
  same = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), after, before))
  assert all(same) if rank else not all(same)


@pytest.mark.parametrize("following", [(), ("ppo", "--workdir=runs/ppo", "--reward.path=a b")])
def test_the_end_names_the_model_and_the_next_command(following, open_bench, monkeypatch, capsys):
  bench = open_bench("sft", "demonstrations")
  monkeypatch.setattr(training.plots, "plot_metrics", lambda workdir: None)
  monkeypatch.setattr(training.records, "write_card", lambda *args: None)
  assert "sft: reading the model and the data" in capsys.readouterr().err
  bench.finish({"a": 1.0}, *following)
  said = capsys.readouterr().err.splitlines()
  assert (
    said
    == [
      f"model: {bench.run.workdir / 'export'}",
      "next: python -m experiments.ppo --workdir=runs/ppo '--reward.path=a b'",
    ][: len(following)]
  )


@pytest.mark.parametrize("script", ["reward_model", "sft"])
def test_the_next_command_starts_from_what_this_one_started_from(script, open_bench, sft_run):
  kind = {"reward_model": "preferences", "sft": "demonstrations"}[script]
  bench = open_bench(script, kind, f"--init_from={sft_run}")
  assert bench.start_of("runs/x") == ["--workdir=runs/x", f"--init_from={sft_run}"]


def dtypes(params):
  """Dtypes of the leaves, apart for matrices and for what is no matrix."""
  found = {True: set(), False: set()}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    names = [key.key for key in path]
    is_matrix = names[-1] in ("kernel", "embedding") and "score" not in names
    found[is_matrix].add(str(leaf.dtype))
  return found


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("script", ["sft", "ppo"])
def test_what_is_not_trained_has_a_dtype_of_its_own(script, rank, open_bench, monkeypatch):
  monkeypatch.setattr("experiments.lab.models.require_base", lambda *args: None)  # A new model.
  kind = "demonstrations" if script == "sft" else "prompts"
  judge = [] if script == "sft" else ["--reward.name=gold"]
  frozen = "--model.frozen_dtype=bfloat16"
  bench = open_bench(script, kind, frozen, f"--lora.rank={rank}", *judge)
  start = jax.device_get(bench.start)
  assert dtypes(start) == {True: {"bfloat16"}, False: {"float32"}}
  if script == "sft":
    make_step = functools.partial(sft.make_sft_step, config=SFTConfig())
    trainer = bench.trainer(make_step)
    parts = [(trainer.state.params, trainer.frozen)]
  else:
    actor = critics.open_actor(bench)
    make_step = functools.partial(ppo.make_ppo_step, config=bench.config.ppo)
    trainer = critics.make_trainer(bench, actor, make_step, bench.config.ppo)
    given = jax.tree.leaves(lora.split(actor.params["value"])[1])
    assert all(x.is_deleted() for x in given), "the critic is in memory twice"
    names = ("policy", "value")
    parts = [(trainer.state.params[n], trainer.frozen.get(n, {})) for n in names]
  for trained, below in parts:
    assert {str(x.dtype) for x in jax.tree.leaves(trained)} == {"float32"}
    if rank:
      assert dtypes(below) == {True: {"bfloat16"}, False: {"float32"}}
  if not rank:
    first = trainer.state.params if script == "sft" else trainer.state.params["policy"]
    rounded = round_matrices(jax.device_get(first), "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, rounded, start)
    assert all(x.is_deleted() for x in jax.tree.leaves(bench.initial)), "the start is there twice"
  jax.tree.map(np.testing.assert_array_equal, bench.start, start)


def test_the_panel_counts_what_is_not_trained():
  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)  # noqa: E731
  trained = {"w": {"kernel": shape(1024, 256)}}  # 1 MiB, four times with gradient and moments.
  state = TrainState(shape(), trained, {"mu": trained, "nu": trained})
  words = "4.00 MiB for trained params, gradients and optimizer state"
  end = "; activations not counted"
  assert training.memory_line(state, {"frozen": {}}) == words + end
  reference = {"start": trained, "norm": {"scale": shape(1024)}}
  more = ", 1.00 MiB for models that are not trained"
  half = " (516.00 KiB with --model.frozen_dtype=bfloat16)"
  assert training.memory_line(state, reference) == words + more + half + end
  rounded = jax.eval_shape(
    lambda: round_matrices(jax.tree.map(lambda x: jnp.zeros(x.shape), reference), "bfloat16")
  )
  layers = {"start": {"layers": trained}}  # Two bytes more for each 128 or 64 weights.
  sizes = {"bfloat16": "512.00", "int8": "260.00", "nf4": "136.00"}
  choices = typing.get_args(typing.get_type_hints(models.ModelOptions)["frozen_dtype"])
  assert {*choices} == {"float32", *sizes} == {"float32", "bfloat16", *quantized.FORMATS}
  ways = [f"{size} KiB with --model.frozen_dtype={dtype}" for dtype, size in sizes.items()]
  small = f" ({', '.join(ways)})"
  assert training.memory_line(state, layers) == (
    f"{words}, 1.00 MiB for models that are not trained{small}{end}"
  )
  assert (
    training.memory_line(state, rounded)
    == f"{words}, 516.00 KiB for models that are not trained{end}"
  )
