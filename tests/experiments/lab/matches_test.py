"""Matches of a policy against an opponent."""

import jax
import numpy as np
import pytest

from experiments.lab import judges
from experiments.lab.matches import Match
from rlhf_jax import rewards
from tests.experiments.lab.rollouts import late


@pytest.mark.parametrize("count", [1, 2])
def test_answers_to_the_same_prompts_are_compared(count, open_bench):
  bench = open_bench("ipo_md", "prompts", "--ipo_md.missing_eos_penalty=0.25")
  seen = {}

  def prefer(sampled, other, ids):
    seen.update(sampled=sampled, other=other, ids=ids)
    return np.linspace(0, 1, len(ids))

  match = Match(bench, prefer, bench.config.ipo_md, count=count, mixed=count > 1)
  prompts = jax.tree.map(jax.numpy.asarray, next(bench.batches()))
  batch, metrics = match(bench.start, None, prompts, jax.random.key(0), mix=0.25, tau=0.1)
  rows, length = prompts.tokens.shape
  sampled, other = seen["sampled"], seen["other"]
  assert list(seen["ids"]) == [i for i in prompts.prompt_id.tolist() for _ in range(count)]
  for rollout in (sampled, other):
    np.testing.assert_array_equal(
      rollout.tokens[:, :length], np.repeat(prompts.tokens, count, axis=0)
    )
  assert np.any(np.asarray(sampled.tokens) != np.asarray(other.tokens))
  assert batch.rollout.tokens.shape == (rows, count, length + 8)
  assert batch.ref_logprobs.shape == (rows, count, 8)
  np.testing.assert_array_equal(batch.tau, np.full(rows, 0.1, np.float32))
  match.sample = match.sample_opponent = lambda *args: sampled  # Nothing is compiled again.
  match._prefer = judges.Named("--preference.name=my:judge", lambda a, b, ids: [np.nan] * len(ids))
  with pytest.raises(rewards.UnusableScoresError, match="scores cannot be used .NaN, inf"):
    match(bench.start, None, prompts, jax.random.key(0), mix=0.25, tau=0.1)
  cut = ~np.asarray(bench.ended(sampled))
  expected = np.linspace(0, 1, rows * count) - 0.25 * cut
  np.testing.assert_allclose(batch.preference, expected.reshape(rows, count), atol=1e-6)
  assert float(metrics["preference/mean"]) == pytest.approx(0.5)


def test_sampling_is_timed_apart_from_the_update_before_it(open_bench):
  bench = open_bench("nash_md", "prompts")
  match = Match(bench, lambda a, b, ids: np.full(len(ids), 0.5), bench.config.nash_md, count=1)
  prompts = jax.tree.map(jax.numpy.asarray, next(bench.batches()))
  inputs = None, prompts, jax.random.key(0)
  match(bench.start, *inputs, mix=0.5, tau=0.1)  # Compiles.
  policy, seconds = late(bench.start)
  _, metrics = match(policy, *inputs, mix=0.5, tau=0.1)
  assert 0 < metrics["time/generate"] < seconds / 2
