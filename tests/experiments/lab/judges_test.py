"""Judges that options name."""

import numpy as np
import pytest

from experiments.lab import judges
from rlhf_jax import data, flags
from tests.experiments.lab.rollouts import rollout_of


@pytest.mark.parametrize("options", [judges.RewardOptions, judges.PreferenceOptions])
def test_one_judge_is_named(options):
  with pytest.raises(ValueError, match="name and path are both given; keep one"):
    options(path="runs/rm", name="gold" if options is judges.RewardOptions else "panel")
  with pytest.raises(ValueError, match="name must be one of"):
    options(name="nobody")
  assert not options().is_given
  with pytest.raises(flags.UsageError, match="path=DIR or --"):
    options().require()
  options(path="runs/rm").require()


def test_an_ensemble_is_a_list_of_folders():
  assert judges.RewardOptions(path="a,b,").paths == ("a", "b")
  assert judges.RewardOptions().paths == ()


def test_the_gold_reward_is_that_of_the_built_in_task(open_bench):
  bench = open_bench("grpo", "prompts", "--reward.name=gold")
  (name,) = bench.gold(bench.train_set)
  assert name == "gold"
  config = data.DataConfig(path="prompts.jsonl")
  assert judges.gold_rewards(config, bench.train_set, bench.tokenizer) == {}


def test_a_reward_reads_the_rows_of_its_prompts(open_bench):
  bench = open_bench("grpo", "prompts", "--reward.name=exact_answer")
  with pytest.raises(Exception, match="answer: missing"):
    bench.open_reward()(bench.train_set)
  rows = [{**row, "answer": "7"} for row in bench.train_set.rows]
  bench.open_reward()(bench.train_set._replace(rows=rows))


def test_a_preference_reads_both_texts(open_bench):
  bench = open_bench("nash_md", "prompts", "--preference.name=expert")
  prefer = bench.open_preference()(bench.train_set)
  ids = bench.tokenizer.encode_responses(["i loved the film .", "bad ."])
  good, bad = (rollout_of([tokens] * 2) for tokens in ids)
  wins = np.asarray(prefer(good, bad, np.array([0, 1])))
  losses = np.asarray(prefer(bad, good, np.array([0, 1])))
  assert wins.shape == (2,)
  np.testing.assert_allclose(wins + losses, 1, atol=1e-6)
