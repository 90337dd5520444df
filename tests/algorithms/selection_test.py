"""Selection of scored responses against numpy."""

import numpy as np
import pytest

from rlhf_jax.algorithms import selection
from rlhf_jax.algorithms.selection import kept_weights


def test_thresholds_are_quantiles_of_all_responses():
  rewards = np.random.default_rng(0).normal(size=(50, 8))
  shares = []
  for quantile in (0.0, 0.5, 0.9):
    weights = kept_weights(rewards, quantile)
    assert weights.dtype == np.float32
    assert set(np.unique(weights)) <= {0.0, 1.0}
    threshold = np.quantile(rewards, quantile)
    np.testing.assert_array_equal(weights > 0, rewards >= threshold)
    shares.append(weights.mean())
  np.testing.assert_allclose(shares, [1.0, 0.5, 0.1], atol=0.01)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_advantages_do_not_depend_on_how_good_a_prompt_is(temperature):
  """Bradley-Terry determines a reward up to a function of the prompt."""
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=(50, 8))
  centred = rewards - rewards.mean(axis=1, keepdims=True)
  shifted = rewards + 5 * rng.normal(size=(50, 1))
  options = {"keep": "advantage", "temperature": temperature}
  weights = kept_weights(rewards, 0.7, **options)
  np.testing.assert_array_equal(weights > 0, centred >= np.quantile(centred, 0.7))
  np.testing.assert_allclose(kept_weights(shifted, 0.7, **options), weights, rtol=1e-5)


def test_wrong_answers_are_left_out_where_most_are_wrong():
  """The median of the rewards is then that of a wrong answer."""
  rewards = np.zeros((4, 4))
  rewards[0, 1] = rewards[2, :2] = 1.0
  for keep in ("threshold", "advantage"):
    np.testing.assert_array_equal(kept_weights(rewards, 0.5, keep=keep), rewards)
  # Equal rewards of a prompt are no advantage, however their mean is rounded.
  rewards = np.array([[0.1, 0.1, 0.1], [0.7, 0.7, 0.4]])
  weights = kept_weights(rewards, 0.5, keep="advantage")
  np.testing.assert_array_equal(weights, [[0, 0, 0], [1, 1, 0]])
  np.testing.assert_array_equal(kept_weights(np.ones((2, 2)), 0.5), 1.0)


@pytest.mark.parametrize("keep", ["threshold", "best", "advantage"])
def test_a_response_that_violates_a_constraint_is_kept_by_no_rule(keep):
  rewards = np.random.default_rng(3).normal(size=(6, 4))
  satisfied = rewards < np.sort(rewards, axis=1)[:, 2:3]  # Only the two worst of each prompt do.
  satisfied[5] = False
  weights = kept_weights(rewards, 0.3, keep=keep, satisfied=satisfied)
  assert weights.any() and not weights[~satisfied].any()
  masked = np.where(satisfied, rewards, np.nan)
  np.testing.assert_array_equal(weights, kept_weights(masked, 0.3, keep=keep))
  if keep == "best":
    best = kept_weights(rewards, 0.0, keep=keep, satisfied=satisfied)
    second_worst = rewards == np.sort(rewards, axis=1)[:, 1:2]
    np.testing.assert_array_equal(best[:5] > 0, second_worst[:5])
  none = kept_weights(rewards, 0.3, keep=keep, satisfied=np.zeros_like(satisfied))
  assert not none.any()


def test_the_best_of_each_prompt():
  rewards = np.random.default_rng(0).normal(size=(50, 8))
  weights = kept_weights(rewards, 0.0, keep="best")
  np.testing.assert_array_equal(weights.argmax(axis=1), rewards.argmax(axis=1))
  np.testing.assert_array_equal(weights.sum(axis=1), 1.0)
  half = kept_weights(rewards, 0.5, keep="best")
  best = rewards.max(axis=1)
  np.testing.assert_array_equal(half.sum(axis=1) > 0, best >= np.median(best))


def test_weights_grow_exponentially_with_the_reward():
  rewards = np.random.default_rng(0).normal(size=(50, 8)) * 7
  weights = kept_weights(rewards, 0.5, temperature=0.5)
  kept = rewards >= np.median(rewards)
  want = np.where(kept, np.exp((rewards - rewards.max()) / (0.5 * rewards.std())), 0.0)
  np.testing.assert_allclose(weights, want, rtol=1e-5)
  assert weights.max() == 1.0


@pytest.mark.parametrize("value", [103.3, 1000.7, -3e4])
def test_equal_rewards_of_a_prompt_are_all_kept_or_all_left_out(value):
  rewards = np.full((3, 7), np.float32(value), np.float64)
  for keep in ("advantage", "threshold"):
    assert (kept_weights(rewards, 0.7, keep=keep) == 1).all()
  rewards[1, 2] += 1  # The only one above the mean of its prompt.
  want = np.zeros((3, 7))
  want[1, 2] = 1
  np.testing.assert_array_equal(kept_weights(rewards, 0.96), want)


@pytest.mark.parametrize("keep", selection.RULES)
def test_rewards_that_are_no_numbers_are_left_out(keep):
  rewards = np.array([[np.nan, 1.0, 2.0], [np.inf, -np.inf, np.nan]])
  for temperature in (0.0, 1.0):
    weights = kept_weights(rewards, 0.0, keep=keep, temperature=temperature)
    assert np.isfinite(weights).all()
    assert (weights[1] == 0).all()
    assert (weights[0] > 0).tolist() == [False, keep != "best", True]
    assert weights.max() == 1.0
  assert (kept_weights(np.full((2, 2), np.nan), 0.0, keep=keep) == 0).all()


def test_rules_say_what_they_need():
  needs = {
    name: (rule.one_per_prompt, rule.least_samples) for name, rule in selection.RULES.items()
  }
  assert needs == {"advantage": (False, 2), "threshold": (False, 1), "best": (True, 2)}
