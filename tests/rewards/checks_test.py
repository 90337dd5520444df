"""Scores that cannot be used, and runs that have too many of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rewards import checks

NAN, INF = float("nan"), float("inf")
UNUSABLE = [NAN, INF, -INF, 1e9, -1e9, 1e12, -1e30, 3e38]
USABLE = [0.0, -0.0, 1.0, -9.9e8, 1e-40, 123456.0]
JUDGE = "--reward.name=my:score"


@pytest.mark.parametrize("array", [np.float32, jnp.float32], ids=["numpy", "jax"])
def test_marked_scores(array):
  marked = np.asarray(checks.mark(array([*UNUSABLE, *USABLE])))
  assert marked.dtype == np.float32
  assert np.isnan(marked[: len(UNUSABLE)]).all()
  np.testing.assert_array_equal(marked[len(UNUSABLE) :], np.float32(USABLE))
  assert checks.count(array([*UNUSABLE, *USABLE])) == len(UNUSABLE)


@pytest.mark.parametrize(
  "bad, total, stops",
  [(0, 8, False), (1, 8, True), (1, 10, False), (2, 10, True), (6, 64, False), (7, 64, True)],
)
@pytest.mark.parametrize("value", [NAN, INF, -1e30])
def test_a_tenth_of_a_batch_may_be_unusable(bad, total, stops, value):
  scores = np.zeros(total, np.float32)
  scores[:bad] = value
  if not stops:
    assert checks.require(JUDGE, scores) == bad
    return
  with pytest.raises(checks.UnusableScoresError, match=f"^{JUDGE}: {bad} of {total}") as raised:
    checks.require(JUDGE, jnp.asarray(scores))
  assert raised.value.exit_code == 70


@pytest.mark.parametrize(
  "batches, stops_at",
  [([1, 1, 1], 2), ([1, 1, 0, 1, 1, 0], None), ([0, 1, 1, 1, 0], 3), ([0] * 5, None), ([2], None)],
)
def test_no_more_than_two_batches_in_a_row(batches, stops_at):
  watch = checks.Watch(JUDGE)
  for i, bad in enumerate(batches):
    scores = np.where(np.arange(20) < bad, NAN, 1.0)
    if i == stops_at:
      with pytest.raises(checks.UnusableScoresError, match=f"^{JUDGE}: 3 batches in a row"):
        watch.check(scores)
      return
    watch.check(scores)
  assert stops_at is None


def test_a_judge_at_an_address_may_lose_a_few_of_each_batch():
  watch = checks.Watch(JUDGE, remote=True)
  for _ in range(9):
    watch.check(np.where(np.arange(20) < 2, NAN, 1.0))
  with pytest.raises(checks.UnusableScoresError, match=f"^{JUDGE}: 3 of 20.*another model at url"):
    watch.check(np.where(np.arange(20) < 3, NAN, 1.0))
