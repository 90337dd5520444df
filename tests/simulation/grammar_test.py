import numpy as np
import pytest

from rlhf_jax.simulation import grammar, world

ALL_PATTERNS = [(kind, pattern) for kind, found in world.PATTERNS.items() for pattern in found]


@pytest.mark.parametrize("tone", world.TONES.values())
@pytest.mark.parametrize(("kind", "pattern"), ALL_PATTERNS)
def test_read_recognises_what_fill_writes(kind, pattern, tone):
  rng = np.random.default_rng(0)
  for _ in range(20):
    words = grammar.fill(
      pattern, rng, tone=tone, subject="hotel", aspects=("bed", "price"), other_tone=tone
    )
    meaning = grammar.read(words)
    assert meaning is not None
    assert meaning.kind == kind
    assert set(meaning.names) <= {"hotel", "bed", "price"}
    wrong = meaning.criticising if tone == world.PRAISE else meaning.praising
    assert wrong == 0
    assert (meaning.praising + meaning.criticising > 0) == (kind != "filler")


def read(text):
  return grammar.read(text.split())


def test_meaning_of_a_pair():
  meaning = grammar.read(
    ["the", "broth", "was", "rich", "but", "the", "price", "was", "steep", "."]
  )
  assert meaning == grammar.Meaning(
    "contrast", frozenset({"broth", "price"}), ("broth", "price"), praising=1, criticising=1
  )


@pytest.mark.parametrize(
  "sentence",
  [
    "",
    ".",
    "the broth was rich",
    "the broth rich .",
    "the the broth was rich .",
    "the broth was really really rich .",
    "the broth was friendly .",
    "the broth was rich and the price was rude .",
    "the broth was rich and the broth was tasty .",
    "rich rich rich .",
    "the moon was rich .",
    "the broth was rich . .",
    "i loved the (ramen|pho) .",
  ],
)
def test_ill_formed_sentences_are_not_read(sentence):
  assert read(sentence) is None


def test_sentences_keep_every_word():
  text = ". i loved the ramen . . and"
  found = [" ".join(sentence) for sentence in grammar.sentences(text.split())]
  assert found == [".", "i loved the ramen .", ".", "and"]
  assert grammar.sentences([]) == []
