"""Parts of a reward: one number per response, rewards of tokens, and what cannot be used."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import rewards
from rlhf_jax.rewards.parts import weighted


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


def test_a_response_satisfies_all_or_violates():
  one, two = (np.array(x, bool) for x in ([1, 1, 0], [1, 0, 0]))
  scores = np.zeros(3, np.float32)
  given = {"a": rewards.Parts(scores, None, one), "b": rewards.Parts(scores, None, two)}
  result = weighted(given | {"c": rewards.Parts(scores)}, [1, 1, 1])
  np.testing.assert_array_equal(result.satisfied, [True, False, False])
  assert weighted({"c": rewards.Parts(scores)}, [2]).satisfied is None
