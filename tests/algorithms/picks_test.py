"""Pairs that are picked from the samples of a prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import picks

ALL_FINE = np.ones((400, 5), bool)


@pytest.mark.parametrize("rule", picks.PICKS)
def test_the_chosen_sample_scores_higher(rule):
  scores = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
  chosen, rejected = picks.pick_pairs(scores, jax.random.key(0), rule, ALL_FINE)
  rows = np.arange(400)
  assert (scores[rows, chosen] > scores[rows, rejected]).all()
  if rule == "first_two":
    assert set(np.asarray(chosen)) | set(np.asarray(rejected)) == {0, 1}
    return
  np.testing.assert_array_equal(chosen, scores.argmax(axis=1))
  if rule in ("best_worst", "constrained"):
    np.testing.assert_array_equal(rejected, scores.argmin(axis=1))
  else:  # Each of the other four about as often, wherever it stands.
    _, places = picks.pick_pairs(np.sort(scores), jax.random.key(0), rule)
    np.testing.assert_allclose(np.bincount(places, minlength=5)[:4] / 400, 0.25, atol=0.08)
    rank = (scores > scores[rows, rejected][:, None]).sum(axis=1)
    np.testing.assert_allclose(np.bincount(rank, minlength=5)[1:] / 400, 0.25, atol=0.08)


@pytest.mark.parametrize("rule", picks.PICKS)
def test_a_prompt_with_a_score_that_is_no_number_is_no_pair(rule):
  """Neither NaN nor an infinite score is the best, or the worst."""
  bad = np.nan, np.inf, -np.inf
  scores = np.array(
    [[0.0, 1.0, 2.0], *([x, 1.0, 2.0] for x in bad), *([x, y, 1.0] for x in bad for y in bad)]
  )
  fine = np.ones(scores.shape, bool)
  picked = picks.pick_pairs(np.float32(scores), jax.random.key(0), rule, fine)
  for row, chosen, rejected in zip(scores, *map(np.asarray, picked), strict=True):
    candidates = [i for i in range(2 if rule == "first_two" else 3) if np.isfinite(row[i])]
    if len(candidates) > 1:
      assert chosen == max(candidates, key=lambda i: row[i]) and rejected in candidates
      assert row[chosen] > row[rejected]
    else:
      assert chosen == rejected


def test_one_sample_is_no_pair():
  with pytest.raises(ValueError, match="pairs need at least 2 samples per prompt, got 1"):
    picks.pick_pairs(jnp.zeros((3, 1)), jax.random.key(0), "first_two")


def test_constraints_come_before_scores():
  scores = np.float32([[4, 1, 3, 2], [4, 1, 3, 2], [4, 1, 3, 2], [4, 1, 3, 2], [5, 5, np.nan, 5]])
  satisfied = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 1, 1]], bool)
  chosen, rejected = picks.pick_pairs(scores, jax.random.key(0), "constrained", satisfied)
  # The best that satisfies and the worst that does not; the worst of all; nothing; a lower score.
  assert list(zip(chosen.tolist(), rejected.tolist(), strict=True))[:2] == [(2, 3), (0, 1)]
  assert chosen[2] == rejected[2]
  assert (int(chosen[3]), int(rejected[3])) == (3, 1)
  assert chosen[4] in (0, 3) and rejected[4] == 1
  others = [picks.pick_pairs(scores, jax.random.key(0), "best_worst", x) for x in (None, satisfied)]
  jax.tree.map(np.testing.assert_array_equal, *others)


def test_constrained_pairs_need_constraints():
  with pytest.raises(ValueError, match="pick=constrained needs constraints"):
    picks.pick_pairs(jnp.zeros((3, 2)), jax.random.key(0), "constrained")
