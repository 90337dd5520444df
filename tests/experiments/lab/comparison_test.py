"""Metrics of policies on held-out prompts: intervals, the best-of-n line, diversity."""

import itertools
import math

import numpy as np
import pytest

from experiments.lab import comparison, evaluating
from rlhf_jax import evaluation
from rlhf_jax.data import Dataset


def samples_of(rewards, **fields):
  size = len(next(iter(rewards.values())))
  same = {"kl": np.zeros(size), "lengths": np.ones(size), "ended": np.ones(size, bool)}
  texts = {"prompts": ["p"] * size, "responses": ["r"] * size}
  return evaluating.Samples(rewards=rewards, **(same | texts | fields))


def test_intervals_are_over_prompts_and_not_over_samples():
  rng = np.random.default_rng(0)
  of_prompt = rng.normal(size=40)
  gold = np.repeat(of_prompt, 4) + 1e-3 * rng.normal(size=160)
  before = samples_of({"gold": np.zeros(160)})
  found = comparison.intervals(before, samples_of({"gold": gold}, kl=gold + 2), 4)
  expected = evaluation.mean(of_prompt)
  names = ("gold/mean", "gold/mean_low", "gold/mean_high")
  np.testing.assert_allclose([found[name] for name in names], expected, atol=1e-3)
  assert found["kl"] == pytest.approx(expected.value + 2, abs=1e-3)
  wins = evaluation.mean(1.0 * (of_prompt > 0))
  assert found["gold/win_rate_low"] == pytest.approx(wins.low, abs=1e-6)
  assert "reward/accuracy" not in found


def test_each_prompt_counts_with_its_usable_samples():
  """Each prompt has samples that are unusable, and only the one without any other is left out."""
  rng = np.random.default_rng(0)
  own, start = rng.normal(size=(2, 24, 16))
  for values in (own, start):
    values[:, 3] = values[rng.random(values.shape) < 0.05] = np.nan
  own[7] = np.nan
  means, wins = [], []
  for mine, others in zip(own, start, strict=True):
    if pairs := [a > b for a in mine for b in others if not math.isnan(a + b)]:
      means.append(np.mean(mine[np.isfinite(mine)]))
      wins.append(np.mean(pairs))
  before, after = (samples_of({"reward": values.ravel()}) for values in (start, own))
  found = comparison.intervals(before, after, 16)
  assert found["reward/prompts"] == len(means) == 23
  for name, values in (("mean", means), ("win_rate", wins)):
    ends = [found[f"reward/{name}{end}"] for end in ("", "_low", "_high")]
    np.testing.assert_allclose(ends, evaluation.mean(np.array(values)))


def test_a_reward_that_a_policy_lacks_is_missing_from_its_table_and_chart(capsys):
  fine = samples_of({"reward": np.arange(6.0)})
  metrics = {"start": comparison.intervals(fine, fine, 2)}
  broken = samples_of({"reward": np.full(6, np.nan)})
  metrics["broken"] = comparison.intervals(fine, broken, 2)
  lines = comparison.best_of_n(fine, 2)
  for order in (["start", "broken"], ["broken", "start"]):
    of = {name: metrics[name] for name in order}
    (chart,) = comparison.frontier(of, lines, order[0])
    assert [point.label for point in chart.points] == ["start"]
    comparison.show(of, ["reward"])
    assert "–" in capsys.readouterr().err
  assert comparison.best_of_n(broken, 2) == {}


def test_agreement_of_proxy_and_gold():
  before = samples_of({"reward": np.zeros(6), "gold": np.zeros(6)})
  after = samples_of(
    {"reward": np.array([1, 1, -1, 0, 5, 5]), "gold": np.array([2.0, -2, -3, 1, 0, 0])}
  )
  # Right, wrong, right, a tie of the proxy; where the gold reward ties nothing can be right.
  assert comparison.intervals(before, after, 1)["reward/accuracy"] == 2.5 / 4
  assert "reward/accuracy" not in comparison.intervals(before, before, 1)


def test_best_of_n_line_is_chosen_by_the_proxy():
  proxy, gold = np.array([[1.0, 2, 3, 4], [4, 3, 2, 1]]), np.array([[0.0, 0, 0, 8], [4, 0, 0, 0]])
  lines = comparison.best_of_n(samples_of({"reward": proxy.ravel(), "gold": gold.ravel()}), 4)
  np.testing.assert_allclose(lines["reward"].y, [2.5, (2 * 1 + 3 * 2 + 4 * 3) / 6, 4])
  np.testing.assert_allclose(lines["gold"].y, [1.5, 3, 6])
  np.testing.assert_allclose(lines["gold"].x, [0, math.log(2) - 0.5, math.log(4) - 0.75])
  assert comparison.best_of_n(samples_of({"gold": gold.ravel()}), 1) == {}


def test_best_of_n_draws_no_unusable_sample():
  """All draws of a prompt with a usable sample count, by the best one that is usable in each."""
  rng = np.random.default_rng(0)
  proxy, gold = rng.normal(size=(2, 5, 4))
  proxy[0, :2], proxy[1, 1:], proxy[2] = np.nan, np.nan, np.nan
  lines = comparison.best_of_n(samples_of({"reward": proxy.ravel(), "gold": gold.ravel()}), 4)
  for at, n in enumerate((1, 2, 4)):
    expected = []
    for row in (0, 1, 3, 4):
      picks = []
      for draw in itertools.combinations(range(4), n):
        if fine := [i for i in draw if np.isfinite(proxy[row, i])]:
          picks.append(max(fine, key=lambda i: proxy[row, i]))
      expected.append([np.mean(x[row, picks]) for x in (proxy, gold)])
    found = [lines[name].y[at] for name in ("reward", "gold")]
    np.testing.assert_allclose(found, np.mean(expected, axis=0))


def test_diversity_across_and_per_input():
  # Four prompts; the samples of a prompt are alike, those of two prompts are not.
  tokens = [[10 * prompt + i for i in range(5)] + [0] for prompt in range(4) for _ in range(3)]
  found = comparison.diversity(tokens, 3, 50)
  assert found["diversity/self_similarity"] == pytest.approx(0)
  assert found["diversity_per_input/self_similarity"] == pytest.approx(1)
  assert found["diversity/distinct_1"] == 1
  assert found["diversity_per_input/distinct_1"] == pytest.approx(1 / 3)
  assert comparison.diversity([[1, 0]], 1, 50) == {}


def test_diversity_is_that_of_the_prompts_where_it_is_defined():
  short, longer = [[7, 0], [8, 0]], [[1, 2, 3, 0], [1, 2, 4, 0]]
  found = comparison.diversity(short + longer, 2, 50)
  assert found["diversity_per_input/distinct_2"] == 3 / 4  # Of the second prompt alone.
  assert found["diversity_per_input/distinct_1"] == (1 + 4 / 6) / 2
  assert found["diversity/distinct_2"] == 1
  # One token each: no pair of tokens anywhere.
  found = comparison.diversity(short + short, 2, 50)
  assert not [name for name in found if name.endswith("distinct_2")]
  assert found["diversity_per_input/distinct_1"] == 1
  assert not [name for name, value in found.items() if math.isnan(value)]


def test_repeated_prompts_stay_together():
  prompts = Dataset(**dict.fromkeys(Dataset._fields))
  prompts = prompts._replace(examples=[{"prompt": np.array([i])} for i in (5, 7)], rows=["a", "b"])
  repeated = comparison.repeat(prompts, 3)
  assert repeated.rows == ["a"] * 3 + ["b"] * 3
  assert [int(example["prompt"][0]) for example in repeated.examples] == [5] * 3 + [7] * 3
