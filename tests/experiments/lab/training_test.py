"""Optimizers of two models, trained and frozen params, and zipped batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.lab import training
from rlhf_jax.algorithms import sft
from rlhf_jax.algorithms.sft import SFTConfig
from rlhf_jax.models import lora
from rlhf_jax.train_step import OptimConfig


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
  before = jax.device_get(bench.start)
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
