"""A teacher and a student that answer in turn."""

import time

import jax
import pytest

from experiments.lab import teachers
from rlhf_jax import profiling
from tests.experiments.lab.rollouts import late


@pytest.mark.parametrize("share", [0, 1])
def test_sampling_and_scoring_are_timed_apart_from_updates(share, open_bench, monkeypatch):
  bench = open_bench("gkd", "prompts", f"--gkd.student_share={share}")
  score = teachers.judges.mean_rewards

  def scores(*args):
    time.sleep(0.5)
    return score(*args)

  teacher = teachers.Teacher(bench.model, bench.start)
  respond = teachers.make_respond(bench, teacher)
  inputs = jax.tree.map(jax.numpy.asarray, next(bench.batches())), 0, jax.random.key(0)
  respond(bench.start, *inputs)  # Compiles.
  monkeypatch.setattr(teachers.judges, "mean_rewards", scores)
  policy, seconds = late(bench.start)
  _, metrics = respond(policy, *inputs)
  assert 0 < metrics["time/generate"] < seconds / 2 and metrics["time/reward"] >= 0.5
  spent = metrics["time/generate"] + metrics["time/reward"]
  rates = profiling.rates({**metrics, "model_flops": 6.0}, spent + 2, bench.run.mesh)
  assert rates["model_flops_per_second"] == pytest.approx(3)
