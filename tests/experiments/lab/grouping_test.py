"""Groups of held-out rows against loops, and columns that give none."""

import math

import numpy as np
import pytest

from experiments.lab import evaluating, grouping
from rlhf_jax import evaluation, flags
from rlhf_jax.data import DataConfig
from tests.experiments.rows import RANKINGS, dataset

PROMPT = "write a {} review of the ramen . {} it and mention the broth and the price ."


def heldout(*values, column="language"):
  """Prompts of a file; None leaves the column out."""
  rows = [{"prompt": "x", "extra": 1} | ({} if v is None else {column: v}) for v in values]
  return dataset("prompts", *({"prompt": [1]} for _ in values))._replace(rows=rows)


def config(column="language", path="rows.jsonl"):
  return DataConfig(path=path, group=column)


def test_the_group_of_a_row_is_the_value_of_a_column(capsys):
  rows = heldout("en", "de", "en", None, "de", None, 3)
  groups = grouping.groups_of(rows, config())
  assert groups == ["en", "de", "en", "(none)", "de", "(none)", "3"]
  noted = capsys.readouterr().err
  assert "1 groups have one row and no interval, and are left out" in noted and ": 3" in noted
  assert grouping.groups_of(rows, config("")) == []


def test_the_prompts_of_the_built_in_task_say_what_they_ask_for():
  asked = [("brief", "praise"), ("brief", "criticise"), ("detailed", "praise"), ("brief", "praise")]
  rows = [{"prompt": PROMPT.format(*of)} for of in [*asked, asked[2]]]
  prompts = heldout(*rows)._replace(rows=rows)
  groups = grouping.groups_of(prompts, config("length", path=""))
  assert groups == ["brief", "brief", "detailed", "brief", "detailed"]


@pytest.mark.parametrize(
  ("values", "column", "message"),
  [
    (["en", "de"] * 2, "laguage", "is no column of the held-out rows; they have extra, language"),
    (["en"] * 4, "language", "gives 1 groups in 4 held-out rows"),
    (["en", "en", "de"], "language", "gives 2 groups in 3 held-out rows, 1 of them of one row"),
    (["a", "b", "c"], "language", "3 of them of one row"),
    ([["en"], ["de"]], "language", r"a group is a text or a number, and a row has \['en'\]"),
  ],
)
def test_a_column_without_groups_is_refused(values, column, message):
  with pytest.raises(flags.UsageError, match=message):
    grouping.groups_of(heldout(*values), config(column))


def test_a_group_has_all_prompts_with_a_usable_sample(capsys):
  groups, values = ["a", "b"] * 6, np.random.default_rng(0).normal(size=(12, 4))
  values[:, 2] = values[3] = np.nan
  texts = [""] * values.size
  drawn = evaluating.Samples(
    texts, texts, {"gold": values.ravel()}, *(np.ones(values.size) for _ in range(3))
  )
  by_group, together = grouping.of_policy(drawn, drawn, groups, 4)
  means = [np.mean([np.nanmean(row) for row in values[i::2] if row[0] == row[0]]) for i in (0, 1)]
  np.testing.assert_allclose([by_group[name]["gold/mean"] for name in "ab"], means)
  assert [by_group[name]["gold/prompts"] for name in "ab"] == [6, 5]
  assert together["gold/worst_group"] == pytest.approx(min(means))


def samples(seed, rows):
  rng = np.random.default_rng(seed)
  texts = [str(i) for i in range(rows)]
  gold = rng.normal(size=rows)
  return evaluating.Samples(
    texts, texts, {"gold": gold}, rng.normal(size=rows), np.ones(rows), gold > 0
  )


@pytest.mark.parametrize("count", [1, 2])
def test_a_group_without_a_usable_reward(count, capsys):
  groups = ["a", "b", "b", "c", "c", "b", "c"]
  before, after = (samples(seed, count * len(groups)) for seed in (0, 1))
  (after if count == 1 else before).rewards["gold"][:count] = np.nan
  metrics = {"start": {}, "policy": {}}
  found = grouping.of_policies(metrics, {"start": before, "policy": after}, groups, count)
  of_a = found["groups"]["policy"]["a"]
  assert of_a["prompts"] == 1 and "kl" in of_a and not any("gold" in name for name in of_a)
  assert (
    "gold/mean" in found["groups"]["policy"]["b"] and "policy by group" in capsys.readouterr().err
  )
  assert metrics["policy"]["gold/group_spread"] > 0


@pytest.mark.parametrize("count", [1, 3])
def test_metrics_of_a_policy_by_group_match_loops(count):
  groups = ["a", "b", "a", "c", "b", "b", "a", "d"]
  before, after = (samples(seed, count * len(groups)) for seed in (0, 1))
  after.rewards["gold"][2 * count : 3 * count] = np.nan  # Leaves out the third prompt, of a.
  by_group, together = grouping.of_policy(before, after, groups, count)
  means = {}
  for name in "abcd":
    at = [i for i, group in enumerate(groups) if group == name]
    assert by_group[name]["prompts"] == len(at)
    values = [after.rewards["gold"][i * count : (i + 1) * count].mean() for i in at]
    means[name] = [value for value in values if not math.isnan(value)]
    np.testing.assert_allclose(by_group[name]["gold/mean"], np.mean(means[name]))
    others = [before.rewards["gold"][i * count : (i + 1) * count] for i in at if i != 2]
    mine = [after.rewards["gold"][i * count : (i + 1) * count] for i in at if i != 2]
    wins = [np.mean([[x > y for y in b] for x in a]) for a, b in zip(mine, others, strict=True)]
    np.testing.assert_allclose(by_group[name]["gold/win_rate"], np.mean(wins))
  two = {name: np.mean(means[name]) for name in "ab"}  # The others have one prompt.
  worst = min(two, key=two.__getitem__)
  interval = evaluation.mean(np.array(means[worst]))
  names = [f"gold/worst_group{end}" for end in ("", "_low", "_high")]
  np.testing.assert_allclose([together[name] for name in names], interval)
  np.testing.assert_allclose(together["gold/group_spread"], max(two.values()) - min(two.values()))
  overall = np.mean(means["a"] + means["b"])
  gap = max(abs(value - overall) for value in two.values())
  np.testing.assert_allclose(together["gold/representativeness"], gap)


def test_groups_of_policies_are_shown_and_added(capsys):
  policies = {"sft": samples(0, 6), "ppo": samples(1, 6)}
  metrics = {name: {"kl": 0.0} for name in policies}
  groups = ["a", "a", "a", "b", "b", "b"]
  found = grouping.of_policies(metrics, policies, groups, 1)["groups"]
  assert found.keys() == policies.keys() and found["sft"]["a"]["gold/win_rate"] == 0.5
  assert all("gold/worst_group_low" in of for of in metrics.values())
  shown = capsys.readouterr().err
  assert "ppo by group" in shown and "worst group" in shown and "group spread" in shown
  assert grouping.of_policies(metrics, policies, [], 1) == {}


def test_accuracy_of_a_reward_model_by_group():
  pair = {"prompt": [1], "chosen": [1, 2], "rejected": [3]}
  pairs = dataset("preferences", *[pair] * 5)
  scores = np.float32([[1, 0], [0, 1], [2, 2], [3, 1], [5, 6]])
  found = grouping.of_pairs(pairs, scores, ["a", "a", "b", "b", "c"])
  accuracy = {name: of["accuracy"] for name, of in found["groups"].items()}
  assert accuracy == {"a": 0.5, "b": 0.75, "c": 0.0}
  assert found["accuracy/worst_group"] == 0.5  # A group of one row is no worst group.
  assert found["accuracy/group_spread"] == 0.25
  assert grouping.of_pairs(pairs, scores, []) == {}
  ranked = grouping.of_pairs(RANKINGS, np.float32([[3, 2, 4], [1, 0, 9]]), ["a", "b"])
  assert {name: of["accuracy"] for name, of in ranked["groups"].items()} == {"a": 0.5, "b": 1.0}
