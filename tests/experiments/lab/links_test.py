"""Links of reward models and policies: read from runs, and broken ones that are flagged."""

import math

import numpy as np
import scipy.stats

from experiments.lab import links


def rows(gold):
  return [
    {"step": i, "reward/mean": float(i), "gold_reward/mean": float(g), "kl/ref": float(i)}
    for i, g in enumerate(gold)
  ]


def test_a_policy_that_exploits_an_accurate_reward_model_is_flagged():
  steps = np.arange(40)
  good = links.read(0.7, {"reward/accuracy": 0.9}, rows(steps))
  assert good == (0.7, 0.9, np.mean(steps[-4:]), np.mean(steps[-4:]), 1.0, False)
  bad = links.read(0.7, {}, rows(np.minimum(steps, 40 - 2 * steps)))
  assert bad.diverged and bad.spearman < 0 and math.isnan(bad.on_policy)


def test_rank_correlations_over_reward_models():
  rng = np.random.default_rng(0)
  found = [links.Links(*rng.random(5), False) for _ in range(8)]
  by_name = {name: [getattr(of, name) for of in found] for name in ("heldout", "proxy", "gold")}
  for pair, value in links.correlations(found).items():
    a, b = pair.split("-")
    np.testing.assert_allclose(value, scipy.stats.spearmanr(by_name[a], by_name[b])[0])
  assert links.correlations(found[:2]) == {}
