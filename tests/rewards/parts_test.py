"""Parts of a reward: one number per response, rewards of tokens, and what cannot be used."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import rewards


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_a_score_alone_is_its_own_total(array):
  scores = array([1.0, np.nan, -2.0])
  assert rewards.parts_of(scores) == rewards.Parts(scores)
  assert rewards.total(scores) is scores


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_a_response_with_an_unusable_part_has_no_score(array, bad):
  tokens = array(np.float32([[1, 2, 0], [0, bad, 1], [0, 0, 0]]))
  parts = rewards.parts_of(rewards.Parts(array(np.float32([0.5, 1, 2])), tokens))
  np.testing.assert_array_equal(parts.scores, np.float32([0.5, np.nan, 2]))
  np.testing.assert_array_equal(parts.tokens, np.float32([[1, 2, 0], [0, 0, 1], [0, 0, 0]]))
  np.testing.assert_array_equal(rewards.total(parts), np.float32([3.5, np.nan, 2]))


def test_a_sum_has_the_parts_of_both():
  scores, tokens = np.float32([1, np.nan]), np.float32([[1, 2], [3, 4]])
  first = rewards.Parts(scores, None, np.array([True, True]))
  second = rewards.Parts(np.float32([10, 20]), tokens, np.array([True, False]))
  for both in (rewards.add(first, second), rewards.add(second, first)):
    np.testing.assert_array_equal(both.scores, np.float32([11, np.nan]))
    np.testing.assert_array_equal(both.tokens, tokens)
    np.testing.assert_array_equal(both.satisfied, [True, False])
  twice = rewards.add(second, second)
  np.testing.assert_array_equal(rewards.total(twice), np.float32([26, 54]))
  assert rewards.add(scores, scores).tokens is None
