"""Fills the sentence patterns of the world, and recognises them in text."""

import functools
import re
from typing import NamedTuple

import numpy as np

from rlhf_jax.simulation import world


class Meaning(NamedTuple):
  """Meaning of a well-formed sentence.

  Attributes:
    kind: Key of `world.PATTERNS`.
    points: Points that the sentence makes; see `world.PATTERNS`.
    names: Subject or aspects that the sentence names.
    praising: Number of words that praise.
    criticising: Number of words that criticise.
  """

  kind: str
  points: frozenset[str]
  names: tuple[str, ...]
  praising: int
  criticising: int


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
  """Picks one of the options, all equally likely."""
  return options[int(rng.integers(len(options)))]


def fitting_adjectives(aspect: str, tone: int) -> tuple[str, ...]:
  """Adjectives that fit an aspect in a tone."""
  index = 0 if tone == world.PRAISE else 1
  return world.ADJECTIVES[aspect][index] + world.TONE_SLOTS["overall"][index]


def fill(
  pattern: str,
  rng: np.random.Generator,
  *,
  tone: int,
  subject: str = "",
  aspects: tuple[str, ...] = (),
  other_tone: int | None = None,
  optional: float = 0.5,
) -> list[str]:
  """Writes one sentence.

  Args:
    pattern: One of the patterns in `world.PATTERNS`.
    rng: Random generator.
    tone: Tone of the words.
    subject: Word for `{subject}`.
    aspects: Words for `{aspect}` and `{other}`, as many as the pattern has.
    other_tone: Tone of the words about the second aspect; `tone` if None.
    optional: Probability of filling a slot that may stay empty.

  Returns:
    The words of the sentence, including the full stop.
  """
  topics = {"subject": subject, **dict(zip(("aspect", "other"), aspects, strict=False))}
  words = []
  for item in pattern.split():
    slot = item.strip("{}?")
    if not item.startswith("{"):
      words.append(item)
    elif item.endswith("?}") and rng.random() >= optional:
      continue
    elif slot in topics:
      words.append(topics[slot])
    elif slot == "adjective":
      words.append(pick(rng, fitting_adjectives(topics["aspect"], tone)))
    elif slot == "other_adjective":
      words.append(pick(rng, fitting_adjectives(topics["other"], other_tone or tone)))
    elif slot in world.TONE_SLOTS:
      words.append(pick(rng, world.TONE_SLOTS[slot][0 if tone == world.PRAISE else 1]))
    else:
      words.extend(pick(rng, world.PLAIN_SLOTS[slot]).split())
  return words


def _slot_regex(slot: str) -> str:
  if slot == "subject":
    return f"(?P<subject>{'|'.join(world.SUBJECTS)})"
  if slot in ("aspect", "other"):
    return f"(?P<{slot}>{'|'.join(world.ADJECTIVES)})"
  if slot in ("adjective", "other_adjective"):
    return rf"(?P<{slot}>\w+)"
  if slot in world.TONE_SLOTS:
    praising, criticising = world.TONE_SLOTS[slot]
    return f"(?:{'|'.join(praising + criticising)})"
  return f"(?:{'|'.join(world.PLAIN_SLOTS[slot])})"


def _pattern_regex(pattern: str) -> re.Pattern[str]:
  parts = []
  for item in pattern.split():
    word = _slot_regex(item.strip("{}?")) if item.startswith("{") else re.escape(item)
    parts.append(f"(?:{word} )?" if item.endswith("?}") else f"{word} ")
  return re.compile("".join(parts))


_KNOWN_WORDS = frozenset(world.WORDS)
_REGEXES = tuple(
  (kind, _pattern_regex(pattern))
  for kind, patterns in world.PATTERNS.items()
  for pattern in patterns
)


def _fits(aspect: str | None, adjective: str | None) -> bool:
  if aspect is None or adjective is None:
    return True
  return any(adjective in fitting_adjectives(aspect, tone) for tone in world.TONES.values())


@functools.lru_cache(maxsize=1 << 16)
def _read(sentence: str) -> Meaning | None:
  for kind, regex in _REGEXES:
    match = regex.fullmatch(sentence + " ")
    if match is None:
      continue
    named = match.groupdict()
    aspects = tuple(named[slot] for slot in ("aspect", "other") if named.get(slot))
    repeats = len(set(aspects)) < len(aspects)
    fits = _fits(named.get("aspect"), named.get("adjective"))
    fits_other = _fits(named.get("other"), named.get("other_adjective"))
    if repeats or not fits or not fits_other:
      return None
    words = sentence.split()
    return Meaning(
      kind=kind,
      points=frozenset(aspects or (kind,)),
      names=aspects or ((named["subject"],) if "subject" in named else ()),
      praising=sum(word in world.PRAISING_WORDS for word in words),
      criticising=sum(word in world.CRITICISING_WORDS for word in words),
    )
  return None


def read(words: list[str]) -> Meaning | None:
  """Meaning of a sentence, or None if it is not well formed.

  Args:
    words: Words of one sentence, including the full stop.
  """
  # Both rules follow from the patterns; checked first, they keep long garbage out of the cache.
  if len(words) > world.MAX_RESPONSE_WORDS or not _KNOWN_WORDS.issuperset(words):
    return None
  return _read(" ".join(words))


def sentences(words: list[str]) -> list[list[str]]:
  """Cuts a text after every full stop; the last sentence may be unfinished."""
  ends = [i + 1 for i, word in enumerate(words) if word == "."]
  starts = [0, *ends]
  cuts = zip(starts, [*ends, len(words)], strict=True)
  return [words[start:end] for start, end in cuts if end > start]
