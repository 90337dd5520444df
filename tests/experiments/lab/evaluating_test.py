"""Values of pairs, held-out prompts, and answers side by side."""

import numpy as np
import pytest

from experiments.lab import evaluating, models
from tests.experiments.lab.rollouts import rollout_of
from tests.experiments.rows import RANKINGS, dataset


def test_values_of_pairs_and_of_rankings():
  pairs = dataset(
    "preferences",
    {"prompt": [1], "chosen": [1, 2, 3], "rejected": [1]},
    {"prompt": [1], "chosen": [1], "rejected": [1, 2]},
  )
  values = np.float32([[1, 0], [2, 5]])
  flat = lambda pairs, mask: pairs[mask]  # noqa: E731
  np.testing.assert_array_equal(flat(*evaluating.compared(pairs, values)), values)
  np.testing.assert_array_equal(flat(*evaluating.compared_lengths(pairs)), [[3, 1], [1, 2]])
  assert evaluating.length_baseline(pairs) == {"eval/length_baseline": 0.5}
  assert evaluating.length_baseline(dataset("preferences")) == {}
  values = np.float32([[3, 2, 4], [1, 0, 9]])  # The last place is empty.
  found, mask = evaluating.compared(RANKINGS, values)
  np.testing.assert_array_equal(found[mask], [[3, 2], [3, 4], [1, 0]])
  assert mask.sum(axis=1).tolist() == [2, 1]
  # Each prompt counts the same: of the first one's pairs none is longer first, of the other's all.
  assert evaluating.length_baseline(RANKINGS) == {"eval/length_baseline": 0.5}
  # A mean over responses, not over pairs, which hold some of them more often.
  assert evaluating.mean_score(RANKINGS, values) == 2.0


def test_each_prompt_is_answered_once():
  pairs = dataset(
    "preferences",
    *({"prompt": [n] * n, "chosen": [1], "rejected": [2]} for n in (1, 3, 1, 2)),
    texts=["a", "b", "a", "c"],
  )
  prompts = evaluating.as_prompts(pairs, 2)
  assert prompts.kind == "prompts"
  assert [row["prompt_text"] for row in prompts.rows] == ["a", "b"]
  assert [len(example["prompt"]) for example in prompts.examples] == [1, 3]
  assert prompts.padded_length == 3
  assert len(evaluating.as_prompts(pairs, 9).rows) == 3


def test_the_end_of_a_run_measures_once():
  steps = []
  measure = evaluating.once_per_step(lambda state, step: steps.append(step) or state)
  assert [measure("a", 2), measure("b", 2), measure("c", 4), measure("d", 2)] == [
    "a",
    "a",
    "c",
    "d",
  ]
  assert steps == [2, 4, 2]


@pytest.mark.parametrize("rewards", [{}, {"reward": 1.0, "gold": 2.0}], ids=["none", "two"])
def test_answers_side_by_side_with_and_without_a_reward(rewards):
  values = {name: np.array([value]) for name, value in rewards.items()}
  one = np.ones(1)
  samples = evaluating.Samples(["p"], ["r"], values, kl=one, lengths=one, ended=one)
  (row,) = evaluating.answers({"start": samples, "trained": samples})
  answer = "r  [gold 2.00]" if rewards else "r"
  assert row == {"prompt": "p", "start": answer, "trained": answer}


def test_the_first_answers_to_the_first_prompts():
  texts = {"prompts": [f"p{i // 2}" for i in range(12)], "responses": [f"r{i}" for i in range(12)]}
  drawn = evaluating.Samples(**texts, rewards={}, kl=None, lengths=None, ended=None)
  rows = evaluating.answers({"a": drawn}, 2)
  assert rows == [{"prompt": f"p{i}", "a": f"r{2 * i}"} for i in range(4)]


def test_two_judged_policies():
  def samples(rewards, kl):
    fields = {"lengths": np.full(4, 2.0), "ended": np.array([True, True, False, False])}
    return evaluating.Samples(["p"] * 4, ["r"] * 4, {"gold": rewards}, kl=kl, **fields)

  before = samples(np.array([0.0, 0, 0, 0]), np.zeros(4))
  after = samples(np.array([1.0, 1, 1, -1]), np.ones(4))
  metrics = evaluating.means(before, after) | evaluating.win_rates(before, after)
  assert (metrics["gold/mean"], metrics["gold/mean_before"]) == (0.5, 0.0)
  assert metrics["gold/win_rate"] == 0.75
  assert metrics["gold/win_rate_low"] < 0.75 < metrics["gold/win_rate_high"]
  assert (metrics["kl"], metrics["length"], metrics["eos_fraction"]) == (1.0, 2.0, 0.5)
  table = evaluating.comparison_table(metrics, before)
  assert table["gold (mean)"] == {"start": 0.0, "trained": 0.5}
  assert table["gold: win rate against the start"] == {"trained": 0.75}
  assert table["KL to the start, nats"]["trained"] == 1.0
  assert table["ended by itself"] == {"start": 0.5, "trained": 0.5}
  assert not [name for name in (*metrics, *table) if "viola" in name]
  verdicts = [np.arange(4) < n for n in (1, 3)]
  judged = [of._replace(satisfied=x) for of, x in zip((before, after), verdicts, strict=True)]
  metrics = evaluating.means(*judged) | evaluating.win_rates(*judged)
  assert (metrics["reward/violations"], metrics["reward/violations_before"]) == (0.25, 0.75)
  table = evaluating.comparison_table(metrics, judged[0])
  assert table["violates a constraint"] == {"start": 0.75, "trained": 0.25}


def test_each_of_several_rewards_is_measured_on_held_out_prompts(open_bench, monkeypatch):
  words = ("--reward.name=gold,filler", "--reward.weights=1,-2", "--reward.constraints=no_filler")
  bench = open_bench("grpo", "prompts", *words)
  texts = ["i do not know what else to write .", "bad .", "i loved it ."]
  rollout = rollout_of([bench.tokenizer.encode_responses(texts)[i % 3] for i in range(8)])
  monkeypatch.setattr(models, "make_sampler", lambda *_: lambda *_: rollout)
  monkeypatch.setattr(evaluating, "sequence_kl", lambda *_: lambda *_: np.zeros(8))
  judge = bench.judge(bench.open_reward())
  values = judge.measure(bench.start, 0)
  names = {"eval/reward", "eval/reward/gold", "eval/reward/filler", "eval/reward/violations"}
  assert names < values.keys()
  assert values["eval/reward/gold"] == values["eval/gold"]
  total = values["eval/gold"] - 2 * values["eval/reward/filler"]
  np.testing.assert_allclose(values["eval/reward"], total, rtol=1e-5)
  assert values["eval/reward/violations"] == values["eval/reward/filler"] == 0.375
