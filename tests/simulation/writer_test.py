import numpy as np

from rlhf_jax.simulation import demands as demands_lib
from rlhf_jax.simulation import gold, world, writer


def test_gold_rises_with_skill():
  demands = demands_lib.all_demands("eval")
  prompts = [demands_lib.write_prompt(each, 0) for each in demands]
  means = []
  for skill in (0.0, 0.25, 0.5, 0.75, 1.0):
    rng = np.random.default_rng(0)
    responses = [writer.write_response(each, rng, skill) for each in demands]
    means.append(gold.gold_reward(prompts, responses).mean())
  assert np.all(np.diff(means) > 0.5)


def test_words_and_lengths():
  rng = np.random.default_rng(1)
  for demands in demands_lib.all_demands("eval"):
    words = writer.write_response(demands, rng).split()
    assert 1 <= len(words) <= world.MAX_RESPONSE_WORDS
    assert set(words) <= set(world.WORDS)


def test_adverbs_are_a_sign_of_skill():
  demands = demands_lib.all_demands("eval")
  adverbs = {*world.PLAIN_SLOTS["truly"], *world.PLAIN_SLOTS["degree"]}

  def share(skill):
    rng = np.random.default_rng(0)
    words = [word for each in demands for word in writer.write_response(each, rng, skill).split()]
    return np.mean([word in adverbs for word in words])

  assert share(1.0) > 2 * share(0.0)
