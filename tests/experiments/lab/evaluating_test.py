"""Values of pairs, held-out prompts, and answers side by side."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lab import comparison, evaluating, grouping, judges, models
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


class OfTokens:
  """Reward model whose score of a response is the number of its last token, in its own table."""

  def __init__(self, path):
    values = np.random.default_rng(len(path)).normal(size=64).astype(np.float32)
    self.scores = values - values[1:9].mean()  # Groups that are about as well served.

  def apply(self, params, tokens, *, segment_ids):
    return jnp.asarray(self.scores)[tokens]


@pytest.mark.parametrize("added", ["", "gold"], ids=["alone", "added"])
@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_the_worst_group_is_that_of_all_held_out_responses(
  batch_size, added, open_bench, monkeypatch
):
  """Whatever the batch; rows that only fill the last batch have no say."""
  opened = lambda run, path, *_: models.Scorer(OfTokens(path), {}, "", None)  # noqa: E731
  monkeypatch.setattr(models, "open_reward_model", opened)
  options = judges.RewardOptions(path="a,bb,ccc", ensemble="worst_group", name=added)
  bench = open_bench("grpo", "prompts", "--reward.name=gold")
  reward_of = judges.open_reward(bench.run, options, bench.config.model, bench.tokenizer)
  answer = lambda *given: rollout_of([[int(i) + 1] for i in given[3]])  # noqa: E731
  monkeypatch.setattr(models, "make_sampler", lambda *_: answer)
  zeros = lambda params, rollout: np.zeros(len(rollout.tokens))  # noqa: E731
  monkeypatch.setattr(evaluating, "sequence_kl", lambda *_: zeros)
  judge = bench.judge(reward_of, batch_size=batch_size)
  bench.run.writer.open(resume_step=0, config={})
  values = judge.measure(bench.start, 1)
  bench.run.writer.write(1, values)
  assert len(bench.heldout.examples) == 8
  of_groups = [OfTokens(path).scores[1:9].mean(dtype=float) for path in ("a", "bb", "ccc")]
  groups = [values[f"eval/reward/group_{k}"] for k in range(3)]
  np.testing.assert_allclose(groups, of_groups, atol=1e-6)
  rest = values["eval/gold"] if added else 0.0
  assert values["eval/reward"] == pytest.approx(min(groups) + rest, abs=1e-6)
  # Another policy may have another worst group: the two are not compared by it.
  summary = judge.finish(bench.start, 1, "GRPO")
  assert summary["reward/mean"] == pytest.approx(min(groups) + rest, abs=1e-6)
  assert not {"reward/win_rate", "reward/win_rate_low", "reward/accuracy"} & summary.keys()
  assert {"gold/win_rate", *(f"reward/group_{k}/win_rate" for k in range(3))} <= summary.keys()


def test_a_reward_that_is_chosen_for_each_policy_compares_none(capsys):
  rng, size = np.random.default_rng(0), 8

  def samples():
    scores = {name: rng.normal(size=size) for name in ("reward", "reward/group_0", "gold")}
    drawn = evaluating.Samples(["p"] * size, ["r"] * size, scores, *np.ones([3, size]))
    return drawn._replace(by_policy=("reward",))

  before, after = samples(), samples()
  metrics = {"policy": comparison.intervals(before, after, 2)}
  of_groups = grouping.of_policies(metrics, {"policy": after}, ["a", "b"] * 2, 2)["groups"]
  for of in (*metrics.values(), *of_groups["policy"].values()):
    assert np.isfinite(of["reward/mean"]) and of["reward/mean_low"] < of["reward/mean_high"]
    assert not {"reward/win_rate", "reward/win_rate_low", "reward/accuracy"} & of.keys()
    assert {"gold/win_rate", "reward/group_0/win_rate"} <= of.keys()
  comparison.show(metrics, list(after.rewards))
  shown = capsys.readouterr().err
  assert "reward (mean)" in shown and "reward (win rate)" not in shown
  assert len(comparison.frontier(metrics, {}, "start")) == 3
