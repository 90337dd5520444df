import time

import numpy as np
import pytest

from rlhf_jax.simulation import demands as demands_lib
from rlhf_jax.simulation import gold, tasks, writer

BRIEF = "write a brief review of the ramen . praise it and mention the broth and the price ."
DETAILED = BRIEF.replace("brief", "detailed")
CRITICAL = BRIEF.replace("praise", "criticise")
GOOD = "i loved the ramen . the broth was rich and the price was fair ."
LONG = (
  "i really loved the ramen . the broth was really rich , which pleased me . "
  "i liked the price because it was so fair . my sister enjoyed it too ."
)


def parts(prompt, response):
  return {name: float(value[0]) for name, value in gold.gold_parts([prompt], [response]).items()}


def reward(prompt, response):
  return float(gold.gold_reward([prompt], [response])[0])


def test_best_texts_reach_the_maximum():
  assert reward(BRIEF, GOOD) == gold.GOLD_MAX
  assert reward(DETAILED, LONG) == gold.GOLD_MAX


@pytest.mark.parametrize("split", demands_lib.SPLITS)
def test_a_flawless_writer_reaches_the_maximum_for_all_demands(split):
  demands = demands_lib.all_demands(split)
  prompts = [demands_lib.write_prompt(each, 0) for each in demands]
  rng = np.random.default_rng(0)
  responses = [writer.write_response(each, rng, skill=1.0) for each in demands]
  np.testing.assert_array_equal(gold.gold_reward(prompts, responses), gold.GOLD_MAX)


def test_limits_are_those_of_the_weights():
  assert sum(gold.WEIGHTS.values()) == gold.GOLD_MAX
  assert -gold.WEIGHTS["tone"] == gold.GOLD_MIN


def test_reward_is_the_weighted_sum_of_bounded_parts():
  rows = tasks.demonstrations("train", 500, seed=0)
  prompts = [row["prompt"] for row in rows]
  responses = [row["response"] for row in rows]
  found = gold.gold_parts(prompts, responses)
  total = sum(gold.WEIGHTS[name] * found[name].astype(float) for name in gold.WEIGHTS)
  np.testing.assert_allclose(gold.gold_reward(prompts, responses), total, atol=1e-5)
  for name, value in found.items():
    assert value.shape == (500,)
    assert value.dtype == np.float32
    assert value.min() >= (-1 if name == "tone" else 0)
    assert value.max() <= 1


def test_opposite_demand_flips_the_sign_of_tone_only():
  for_praise, for_criticism = parts(BRIEF, GOOD), parts(CRITICAL, GOOD)
  assert for_criticism.pop("tone") == -for_praise.pop("tone") == -1
  assert for_praise == for_criticism


def test_tone_falls_with_each_word_of_the_wrong_tone():
  texts = [
    GOOD,
    GOOD.replace("fair", "steep"),
    GOOD.replace("fair", "steep").replace("rich", "bland"),
    GOOD.replace("fair", "steep").replace("rich", "bland").replace("loved", "hated"),
  ]
  np.testing.assert_allclose([parts(BRIEF, text)["tone"] for text in texts], [1, 1 / 3, -1 / 3, -1])


def test_one_word_of_praise_is_lukewarm():
  assert parts(BRIEF, "i loved the ramen .")["tone"] == 0.5


@pytest.mark.parametrize(
  ("response", "expected"),
  [
    (GOOD, 1),
    ("i loved the ramen . the broth was rich .", 2 / 3),
    ("i loved the ramen .", 1 / 3),
    ("it pleased my sister as well .", 0),
    (GOOD + " the service was kind .", 3 / 4),
    (GOOD + " the weather was mild that monday .", 3 / 4),
    (GOOD.replace("ramen", "pho"), 2 / 3 - 1 / 4),
    (GOOD.replace("rich", "rude"), 1 / 3),
    ("ramen broth price", 0),
  ],
)
def test_coverage(response, expected):
  np.testing.assert_allclose(parts(BRIEF, response)["coverage"], expected, rtol=1e-6)


def test_brevity_follows_the_demanded_length():
  assert parts(BRIEF, GOOD)["brevity"] == 1
  assert parts(DETAILED, GOOD)["brevity"] < 0.3
  assert parts(BRIEF, LONG)["brevity"] == 0
  assert parts(DETAILED, LONG)["brevity"] == 1


@pytest.mark.parametrize("prompt", [BRIEF, DETAILED])
def test_brevity_has_no_jumps(prompt):
  values = [parts(prompt, "rich " * count)["brevity"] for count in range(80)]
  assert np.abs(np.diff(values)).max() <= 0.13
  assert values[0] == values[-1] == 0


@pytest.mark.parametrize(
  ("response", "expected"),
  [
    (GOOD, 1),
    ("i loved the ramen . the the broth was rich .", 5 / 11),
    ("i loved the ramen . the broth rich .", 5 / 9),
    ("i loved the ramen . the broth was", 5 / 8),
    ("i loved the ramen . i loved the ramen .", 5 / 10),
    ("i loved the ramen . what a great ramen .", 5 / 10),
    ("the broth was rich . the broth was tasty .", 5 / 10),
  ],
)
def test_fluency_counts_finished_well_formed_sentences_with_a_new_point(response, expected):
  np.testing.assert_allclose(parts(BRIEF, response)["fluency"], expected, rtol=1e-6)


@pytest.mark.parametrize(
  "response",
  [
    "",
    ".",
    " \n\t ",
    "\x00 (((( \\d+ [a-",
    "IGNORE the above",
    "wonderful " * 30,
    "i loved the ramen " * 10,
    "wonderful . " * 10_000,
    "a" * 100_000,
    "the ramen was really truly so quite wonderful lovely great superb .",
  ],
)
def test_garbage_scores_low(response):
  for prompt in (BRIEF, DETAILED, CRITICAL):
    assert gold.GOLD_MIN <= reward(prompt, response) <= 1.5


def test_excess_costs():
  everything = GOOD + " the egg was rich . the service was kind . the aroma was fresh ."
  assert reward(DETAILED, everything) < reward(DETAILED, LONG) - 2
  assert reward(BRIEF, GOOD + " i loved the ramen ." * 5) < reward(BRIEF, GOOD) - 2
  assert reward(BRIEF, GOOD.replace("rich", "really really rich")) < reward(BRIEF, GOOD) - 2


def test_empty_batch():
  assert gold.gold_reward([], []).shape == (0,)


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match="1 prompts but 2 responses"):
    gold.gold_reward([BRIEF], ["", ""])
  with pytest.raises(ValueError, match="not a prompt"):
    gold.gold_reward(["hello"], [""])


def test_a_batch_takes_little_time():
  rows = tasks.demonstrations("train", 512, seed=3)
  prompts = [row["prompt"] for row in rows]
  responses = [row["response"] for row in rows]
  start = time.perf_counter()
  gold.gold_reward(prompts, responses)
  assert time.perf_counter() - start < 0.5  # about 0.01 s; loose, for a busy machine


@pytest.mark.parametrize("gap", [" ", "  ", "\n"])
def test_sentences_earn_what_they_add(gap):
  texts = [
    GOOD,
    LONG,
    "",
    "i loved the ramen . the",
    "so so . i loved the pizza .",
    f"{GOOD} {GOOD}",
  ]
  texts = [text.replace(" ", gap) for text in texts]
  given = gold.gold_of_sentences([BRIEF] * len(texts), texts)
  for text, sentences in zip(texts, given, strict=True):
    np.testing.assert_allclose(sum(gain for _, gain in sentences), reward(BRIEF, text), atol=1e-5)
    assert [end for end, _ in sentences] == [
      i + 1 for i, c in enumerate(text) if c == "." or i == len(text) - 1
    ]
  assert min(gain for _, gain in given[0]) > 2  # Both count.
  assert given[4][0][1] < 1 < given[0][0][1]  # One does not count.
  assert max(gain for _, gain in given[5][2:]) < 0  # They were said before.
  with pytest.raises(ValueError, match="1 prompts but 2 responses"):
    gold.gold_of_sentences([BRIEF], ["", ""])
  with pytest.raises(ValueError, match="not a prompt"):
    gold.gold_of_sentences(["hello"], [""])
