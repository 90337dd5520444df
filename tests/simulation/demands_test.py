import pytest

from rlhf_jax.simulation import demands as demands_lib
from rlhf_jax.simulation import world


def test_prompt_example():
  demands = demands_lib.Demands("ramen", world.PRAISE, ("broth", "price"), "brief")
  prompt = demands_lib.write_prompt(demands, 0)
  assert prompt == (
    "write a brief review of the ramen . praise it and mention the broth and the price ."
  )


@pytest.mark.parametrize("split", demands_lib.SPLITS)
def test_parse_inverts_write_for_all_demands_and_wordings(split):
  for demands in demands_lib.all_demands(split):
    for wording in demands_lib.wordings_of(split):
      prompt = demands_lib.write_prompt(demands, wording)
      assert demands_lib.parse_prompt(prompt) == demands
      assert 15 <= len(prompt.split()) <= world.MAX_PROMPT_WORDS


@pytest.mark.parametrize(
  "text",
  [
    "",
    "hello",
    "write a brief review of the ramen . praise it and mention the bed and the price .",
    "write a brief review of the ramen . praise it and mention the price and the price .",
    "write a brief review of the moon . praise it and mention the broth and the price .",
    "write a warm review of the ramen . praise it and mention the broth and the price .",
    "write a brief review of the ramen . eat it and mention the broth and the price .",
  ],
)
def test_text_that_is_no_prompt_is_refused(text):
  with pytest.raises(ValueError, match="not a prompt of the built-in task"):
    demands_lib.parse_prompt(text)


def test_splits_are_disjoint_even_when_aspects_are_reordered():
  def unordered(split):
    return {
      (demands.subject, demands.tone, frozenset(demands.aspects), demands.length)
      for demands in demands_lib.all_demands(split)
    }

  train, evaluation = unordered("train"), unordered("eval")
  assert not train & evaluation
  assert len(train) + len(evaluation) > 3500
  assert 0.08 < len(evaluation) / (len(train) + len(evaluation)) < 0.12


def test_there_are_many_demands():
  assert sum(len(demands_lib.all_demands(split)) for split in ("train", "eval")) > 5000


def test_shifted_prompts_have_the_demands_of_eval_in_other_wordings_of_the_same_words():
  assert demands_lib.all_demands("shift") == demands_lib.all_demands("eval")
  usual, shifted = (set(demands_lib.wordings_of(split)) for split in ("train", "shift"))
  assert usual == set(demands_lib.wordings_of("eval")) and usual and shifted
  assert not usual & shifted and usual | shifted == set(range(len(demands_lib.WORDINGS)))
  demands = demands_lib.all_demands("eval")[0]
  known = set(world.WORDS)
  for wording in shifted:
    prompt = demands_lib.write_prompt(demands, wording)
    assert set(prompt.split()) <= known
    matches = [regex for regex in demands_lib._WORDING_REGEXES if regex.fullmatch(prompt)]
    assert len(matches) == 1


def test_unknown_split_is_refused():
  with pytest.raises(ValueError, match="split must be one of"):
    demands_lib.all_demands("test")
