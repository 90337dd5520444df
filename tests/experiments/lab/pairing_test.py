"""Scores of samples by their matches with each other."""

import jax.numpy as jnp
import numpy as np

from experiments.lab import pairing
from rlhf_jax import data
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
