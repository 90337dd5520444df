import collections
import hashlib
import json
import re

import numpy as np
import pytest

from rlhf_jax import simulation
from rlhf_jax.simulation import demands, tasks, world

DATA_SETS = [tasks.prompts, tasks.demonstrations, tasks.preferences]


def gold_of(rows, key):
  return simulation.gold_reward([row["prompt"] for row in rows], [row[key] for row in rows])


@pytest.mark.parametrize("make", DATA_SETS)
@pytest.mark.parametrize("split", demands.SPLITS)
def test_rows_are_deterministic_and_a_larger_n_extends_a_smaller(make, split):
  rows = make(split, 50, 7)
  assert make(split, 50, 7) == rows
  assert make(split, 20, 7) == rows[:20]
  assert make(split, 0, 7) == []
  assert make(split, 50, 8) != rows


def test_rows_of_one_seed_share_ids_and_prompts():
  plain, written, compared = (make("train", 30, 1) for make in DATA_SETS)
  for a, b, c in zip(plain, written, compared, strict=True):
    assert a["id"] == b["id"] == c["id"]
    assert a["prompt"] == b["prompt"] == c["prompt"]


def test_keys_and_ids():
  plain, written, compared = (make("train", 30, 1) for make in DATA_SETS)
  assert set(plain[0]) == {"id", "prompt"}
  assert set(written[0]) == {"id", "prompt", "response"}
  assert set(compared[0]) == {"id", "prompt", "chosen", "rejected", "annotator"}
  ids = [row["id"] for row in plain]
  assert len(set(ids)) == 30
  assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", each) for each in ids)


# First digits of the SHA-256 of rows: runs are compared over years.
SPLITS = {"train": "b93d0739694e1b71", "eval": "999ffe8c26f57764"}


@pytest.mark.parametrize("split", SPLITS)
def test_the_rows_of_a_split_stay_as_they_are(split):
  rows = [make(split, n, 3) for make, n in zip(DATA_SETS, (300, 100, 100), strict=True)]
  text = json.dumps([*rows, tasks.votes(split, 20, 3)])
  assert hashlib.sha256(text.encode()).hexdigest()[:16] == SPLITS[split]
  words = hashlib.sha256(json.dumps(simulation.WORDS).encode()).hexdigest()
  assert words[:16] == "0e0b363a7519712f"


def test_shifted_prompts_occur_in_no_other_split():
  shifted = {row["prompt"] for row in tasks.prompts("shift", 1_400, 0)}
  assert len(shifted) == 1_400
  for split in ("train", "eval"):
    assert not shifted & {row["prompt"] for row in tasks.prompts(split, 5_000, 0)}
  # The writer knows the demands, not their wording.
  gold = gold_of(tasks.demonstrations("shift", 1000, 0), "response")
  assert 4.8 < gold.mean() < 5.7


def test_eval_prompts_never_occur_in_train():
  train = {row["prompt"] for row in tasks.prompts("train", 40_000, 0)}
  evaluation = {row["prompt"] for row in tasks.prompts("eval", 5_000, 0)}
  assert len(train) > 20_000
  assert len(evaluation) > 2_000
  assert not train & evaluation


def test_prompts_do_not_repeat_before_all_are_used():
  rows = tasks.prompts("eval", 2_500, 3)
  assert len({row["prompt"] for row in rows}) == 2_500


def test_every_word_is_known_and_lengths_are_within_the_maxima():
  known = set(simulation.WORDS)
  for row in [*tasks.demonstrations("train", 1000, 0), *tasks.preferences("eval", 500, 0)]:
    assert len(row["prompt"].split()) <= world.MAX_PROMPT_WORDS
    assert set(row["prompt"].split()) <= known
    for key in {"response", "chosen", "rejected"} & set(row):
      words = row[key].split()
      assert " ".join(words) == row[key]
      assert 1 <= len(words) <= world.MAX_RESPONSE_WORDS
      assert set(words) <= known


def test_demonstrations_are_of_mixed_quality():
  gold = gold_of(tasks.demonstrations("train", 4000, 0), "response")
  assert 4.8 < gold.mean() < 5.7  # Half way between a plain text and a perfect one.
  assert 2.9 < gold.std() < 3.5
  low, quarter, three_quarters = np.quantile(gold, [0.05, 0.25, 0.75])
  assert low < 0.5
  assert quarter < 3.5
  assert three_quarters > 7
  assert 0.02 < np.mean(gold > 9.9) < 0.15


def test_demonstrations_follow_the_demands_more_often_than_not():
  rows = tasks.demonstrations("train", 4000, 0)
  parts = simulation.gold_parts([row["prompt"] for row in rows], [row["response"] for row in rows])
  assert parts["tone"].mean() > 0.1
  assert parts["coverage"].mean() > 0.25


def test_best_possible_accuracy_on_preferences():
  rows = tasks.preferences("eval", 4000, 0)
  difference = gold_of(rows, "chosen") - gold_of(rows, "rejected")
  accuracy = np.mean(difference > 0) + np.mean(difference == 0) / 2
  assert 0.9 < accuracy < 0.95


def test_annotators_see_the_same_pairs_and_the_two_responses_differ():
  expert = tasks.preferences("train", 300, 2)
  terse = tasks.preferences("train", 300, 2, annotator="terse")
  swapped = 0
  for a, b in zip(expert, terse, strict=True):
    assert {a["chosen"], a["rejected"]} == {b["chosen"], b["rejected"]}
    assert a["chosen"] != a["rejected"]
    assert (a["annotator"], b["annotator"]) == ("expert", "terse")
    swapped += a["chosen"] != b["chosen"]
  assert 50 < swapped < 150


def test_labels_are_as_frequent_as_their_probability():
  rows = tasks.preferences("train", 4000, 4, annotator="novice")
  prompts, chosen, rejected = (
    [row[key] for row in rows] for key in ("prompt", "chosen", "rejected")
  )
  probability = simulation.preference_probability("novice", prompts, chosen, rejected)
  confidence = np.maximum(probability, 1 - probability)
  np.testing.assert_allclose(np.mean(probability > 0.5), confidence.mean(), atol=0.025)


@pytest.mark.parametrize("make", DATA_SETS)
def test_bad_arguments_are_refused(make):
  with pytest.raises(ValueError, match="split must be one of"):
    make("test", 1, 0)
  with pytest.raises(ValueError, match="n=-1"):
    make("train", -1, 0)
  with pytest.raises(ValueError, match="seed=-1"):
    make("train", 1, -1)


def test_unknown_annotator_is_refused():
  with pytest.raises(ValueError, match="annotator must be one of"):
    tasks.preferences("train", 1, 0, annotator="nobody")


def word_features(prompt, response):
  """Counts of words, and the same with the sign of the demanded tone: `[2 V]`."""
  tone = simulation.parse_prompt(prompt).tone
  present = collections.Counter(response.split())
  counts = np.asarray([present.get(word, 0) for word in simulation.WORDS], float)
  return np.concatenate([counts, tone * counts])


def test_a_proxy_learned_from_preferences_can_be_over_optimised():
  rows = tasks.preferences("train", 2000, 0)
  x = np.stack(
    [
      word_features(row["prompt"], row["chosen"]) - word_features(row["prompt"], row["rejected"])
      for row in rows
    ]
  )
  proxy = np.zeros(x.shape[1])
  for _ in range(500):  # By einsum: the threads of BLAS wait for each other on busy processors.
    wrong = 1 / (1 + np.exp(np.einsum("nf,f", x, proxy)))
    proxy += 0.2 * (np.einsum("nf,n", x, wrong) / len(x) - 1e-3 * proxy)
  assert np.mean(x @ proxy > 0) > 0.7

  proxy_start, proxy_end, gold_start, gold_end = [], [], [], []
  rng = np.random.default_rng(0)
  for row in tasks.demonstrations("eval", 20, 0):
    prompt, words = row["prompt"], row["response"].split()
    score = proxy_start_score = word_features(prompt, row["response"]) @ proxy
    for _ in range(300):
      edited = list(words)
      edited[rng.integers(len(words))] = simulation.WORDS[rng.integers(len(simulation.WORDS))]
      edited_score = word_features(prompt, " ".join(edited)) @ proxy
      if edited_score > score:
        words, score = edited, edited_score
    proxy_start.append(proxy_start_score)
    proxy_end.append(score)
    gold_start.append(simulation.gold_reward([prompt], [row["response"]])[0])
    gold_end.append(simulation.gold_reward([prompt], [" ".join(words)])[0])
  assert np.mean(proxy_end) > np.mean(proxy_start) + 3
  assert np.mean(gold_end) < np.mean(gold_start) - 1
