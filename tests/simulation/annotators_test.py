import itertools

import numpy as np
import pytest

from rlhf_jax.simulation import annotators, gold, tasks

PROMPT = "write a brief review of the film . praise it and mention the plot and the pace ."
SHORT = "i loved the film . the plot was clever and the pace was lively ."
LONG = SHORT + " my sister loved it too . i would gladly recommend it to everyone ."
FACTS = "the plot was clever ."
VERDICT = "what a great film ."
ADVICE = "i would gladly choose it again ."


def texts(n=300):
  rows = tasks.preferences("eval", n, seed=5)
  return [[row[key] for row in rows] for key in ("prompt", "chosen", "rejected")]


def majority(a, b):
  return float(annotators.preference_probability("panel", [PROMPT], [a], [b])[0])


@pytest.mark.parametrize("name", annotators.ANNOTATORS)
def test_probabilities_are_antisymmetric(name):
  prompts, a, b = texts()
  forward = annotators.preference_probability(name, prompts, a, b)
  backward = annotators.preference_probability(name, prompts, b, a)
  assert forward.shape == (300,)
  assert np.all((forward >= 0) & (forward <= 1))
  np.testing.assert_allclose(forward + backward, 1, atol=1e-12)
  np.testing.assert_array_equal(annotators.preference_probability(name, prompts, a, a), 0.5)


@pytest.mark.parametrize("name", ["expert", "novice", "terse", "lavish"])
def test_a_single_rater_is_bradley_terry_on_its_value(name):
  prompts, a, b = texts()
  difference = annotators.value(name, prompts, a) - annotators.value(name, prompts, b)
  expected = 1 / (1 + np.exp(-difference / annotators.ANNOTATORS[name].temperature))
  given = annotators.preference_probability(name, prompts, a, b)
  np.testing.assert_allclose(given, expected, atol=1e-9)


def test_the_value_of_a_panel_is_the_mean_over_its_raters():
  prompts, a, _ = texts()
  given, raters = annotators.features(prompts, a), annotators.ANNOTATORS["panel"].raters
  expected = sum(weight * given[name] for rater in raters for name, weight in rater.items()) / 3
  np.testing.assert_allclose(annotators.value("panel", prompts, a), expected, atol=1e-5)


def test_expert_is_bradley_terry_on_the_gold_reward():
  prompts, a, b = texts()
  temperature = annotators.ANNOTATORS["expert"].temperature
  difference = gold.gold_reward(prompts, a) - gold.gold_reward(prompts, b)
  expected = 1 / (1 + np.exp(-difference / temperature))
  found = annotators.preference_probability("expert", prompts, a, b)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("length", ["brief", "detailed"])
def test_groups_have_opposed_tastes_whatever_the_prompt_asks(length):
  prompt = [PROMPT.replace("brief", length)]
  assert annotators.preference_probability("terse", prompt, [SHORT], [LONG]) > 0.9
  assert annotators.preference_probability("lavish", prompt, [SHORT], [LONG]) < 0.1


def test_groups_disagree_on_most_pairs():
  prompts, a, b = texts(1000)
  terse = annotators.preference_probability("terse", prompts, a, b) > 0.5
  lavish = annotators.preference_probability("lavish", prompts, a, b) > 0.5
  assert np.mean(terse == lavish) < 0.5


def test_the_majority_of_the_panel_is_an_exact_cycle():
  cycle = [majority(FACTS, VERDICT), majority(VERDICT, ADVICE), majority(ADVICE, FACTS)]
  np.testing.assert_allclose(cycle, 2 / 3, atol=0.01)
  np.testing.assert_allclose(cycle, cycle[0], atol=1e-6)


def test_every_mix_of_topics_is_beaten_by_another():
  sentences = [FACTS, "the pace was lively .", VERDICT, "in the end it was a treat .", ADVICE]
  mixes = [" ".join(mix) for count in (1, 2, 3) for mix in itertools.combinations(sentences, count)]
  for mix in mixes:
    assert max(majority(other, mix) for other in mixes) > 0.55


def test_the_panel_dislikes_garbage():
  for text in (FACTS, VERDICT, ADVICE):
    assert majority("great great great", text) < 0.01


def test_unknown_annotator_is_refused():
  with pytest.raises(ValueError, match="annotator must be one of"):
    annotators.preference_probability("nobody", [PROMPT], [SHORT], [LONG])


def test_weights_name_features():
  for annotator in annotators.ANNOTATORS.values():
    assert annotator.temperature > 0
    for rater in annotator.raters:
      assert set(rater) <= set(annotators.FEATURES)
