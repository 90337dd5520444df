"""Scores of samples by their matches with each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lab import pairing
from rlhf_jax import data, rewards
from tests.experiments.lab.rollouts import rollout_of


def test_a_tournament_scores_by_the_mean_of_all_matches():
  strength = {1: 0.9, 2: 0.6, 3: 0.1}
  seen = []

  def prefer_of(prompts):
    assert prompts.kind == "prompts"

    def prefer(a, b, ids):
      seen.append(list(ids))
      first, second = ([strength[int(x)] for x in rollout.tokens[:, -1]] for rollout in (a, b))
      return 0.5 + (np.array(first) - np.array(second)) / 2

    return prefer

  score = pairing.tournament(prefer_of, 3)(data.from_examples("prompts", [], []))
  scores = score(rollout_of([[1], [2], [3], [3], [3], [1]]), np.array([7, 7, 7, 8, 8, 8]))
  assert seen == [[7, 8]] * 3
  mean = lambda x, others: np.mean([0.5 + (x - y) / 2 for y in others])  # noqa: E731
  expected = [mean(0.9, (0.6, 0.1)), mean(0.6, (0.9, 0.1)), mean(0.1, (0.9, 0.6))]
  expected += [mean(0.1, (0.1, 0.9))] * 2 + [mean(0.9, (0.1, 0.1))]
  np.testing.assert_allclose(scores, jnp.asarray(expected), atol=1e-6)


def test_a_match_without_a_preference_does_not_count():
  ids = np.arange(8)

  def prefer(a, b, prompt_ids):
    first, second = (rollout.tokens[:, -1] for rollout in (a, b))
    wins = np.where(first > second, 1.0, 0.0)
    return np.where((prompt_ids == 5) & (first == 3), np.nan, wins)  # 3 has no match there.

  score = pairing.tournament(lambda prompts: prefer, 3)(data.from_examples("prompts", [], []))
  scores = score(rollout_of([[3], [2], [1]] * 8), np.repeat(ids, 3)).reshape(8, 3)
  np.testing.assert_array_equal(scores[5], [np.nan, 1, 0])
  np.testing.assert_array_equal(np.delete(scores, 5, axis=0), np.tile([1, 0.5, 0], (7, 1)))
  broken = pairing.tournament(lambda prompts: lambda a, b, ids: np.full(8, np.nan), 3)
  with pytest.raises(rewards.UnusableScoresError, match="24 of 24"):
    broken(data.from_examples("prompts", [], []))(
      rollout_of([[3], [2], [1]] * 8), np.repeat(ids, 3)
    )
