"""The gold reward: the known truth that annotators, reward models and policies are judged by.

    gold = 3 * tone + 4 * coverage + 1.5 * brevity + 1.5 * fluency        from -3 to 10

Only sentences that *count* contribute to tone and coverage. A sentence counts if it matches a
pattern of the world, is finished, and makes no point that an earlier sentence made. So text that a
learned proxy may like (repeated praise, a list of every aspect, heaps of adverbs) earns little.
"""

import functools
import itertools
import re
from collections.abc import Sequence

import numpy as np

from rlhf_jax.simulation import demands as demands_lib
from rlhf_jax.simulation import grammar

WEIGHTS = {"tone": 3.0, "coverage": 4.0, "brevity": 1.5, "fluency": 1.5}
GOLD_MIN = -3.0
GOLD_MAX = 10.0

# A text with fewer words of tone than this is lukewarm.
FULL_TONE_WORDS = 2
# Cost in coverage of each thing that was not requested.
STRAY_COST = 0.25
# Brevity is 0 outside the outer lengths, 1 between the inner ones, linear in between.
LENGTH_BANDS = {"brief": (0, 10, 18, 26), "detailed": (12, 26, 40, 60)}


def _brevity(length: str, count: int) -> float:
  return float(np.interp(count, LENGTH_BANDS[length], (0.0, 1.0, 1.0, 0.0), left=0.0, right=0.0))


@functools.lru_cache(maxsize=1 << 14)
def counted_sentences(response: str) -> tuple[tuple[int, grammar.Meaning], ...]:
  """Lists the sentences of a text that count, each as (number of words, meaning)."""
  counted, points = [], set()
  for sentence in grammar.sentences(response.split()):
    meaning = grammar.read(sentence)
    if meaning is not None and not meaning.points & points:
      points |= meaning.points
      counted.append((len(sentence), meaning))
  return tuple(counted)


def has_filler(response: str) -> bool:
  """Returns True if a sentence of the text is well formed and says nothing about the subject."""
  meanings = map(grammar.read, grammar.sentences(response.split()))
  return any(meaning is not None and meaning.kind == "filler" for meaning in meanings)


def _parts(demands: demands_lib.Demands, response: str) -> tuple[float, float, float, float]:
  counted = counted_sentences(response)
  meanings = [meaning for _, meaning in counted]
  length = len(response.split())

  praising = sum(meaning.praising for meaning in meanings)
  criticising = sum(meaning.criticising for meaning in meanings)
  tone = demands.tone * (praising - criticising) / max(praising + criticising, FULL_TONE_WORDS)

  requested = {demands.subject, *demands.aspects}
  named = {name for meaning in meanings for name in meaning.names}
  stray = len(named - requested) + sum(meaning.kind == "filler" for meaning in meanings)
  coverage = max(0.0, len(named & requested) / len(requested) - STRAY_COST * stray)

  brevity = _brevity(demands.length, length)
  fluency = sum(words for words, _ in counted) / max(length, 1)
  return tone, coverage, brevity, fluency


def gold_parts(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, np.ndarray]:
  """The parts of the gold reward, before weighting.

  Args:
    prompts: `B` prompts of the world.
    responses: `B` texts; any string is accepted.

  Returns:
    Arrays `[B] float32` under the keys of `WEIGHTS`:
    tone: in [-1, 1]: balance of praising and criticising words, positive in the demanded tone.
    coverage: in [0, 1]: mentioned share of the subject and the two aspects, minus `STRAY_COST` for
      each other subject, other aspect or filler sentence.
    brevity: in [0, 1]: fit of the number of words to the demanded length; see `LENGTH_BANDS`.
    fluency: in [0, 1]: share of the words in sentences that count.

  Raises:
    ValueError: If the numbers of prompts and responses differ, or a prompt is not of this world.
  """
  if len(prompts) != len(responses):
    raise ValueError(f"got {len(prompts)} prompts but {len(responses)} responses")
  rows = [
    _parts(demands_lib.parse_prompt(prompt), response)
    for prompt, response in zip(prompts, responses, strict=True)
  ]
  table = np.asarray(rows, np.float32).reshape(-1, len(WEIGHTS))
  return dict(zip(WEIGHTS, table.T, strict=True))


def gold_reward(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
  """Computes the weighted sum of `gold_parts`; arguments and errors are the same.

  Returns:
    `[B] float32` between `GOLD_MIN` and `GOLD_MAX`.
  """
  parts = gold_parts(prompts, responses)
  weighted = [np.float32(weight) * parts[name] for name, weight in WEIGHTS.items()]
  return np.sum(weighted, axis=0)


def gold_of_sentences(
  prompts: Sequence[str], responses: Sequence[str]
) -> list[list[tuple[int, float]]]:
  """Splits the gold reward over sentences: each earns what it adds to the text before it.

  A sentence gains by counting, in the demanded tone, and by naming what was requested. It loses by
  not counting, by straying, and by making the text too long. Arguments and errors are those of
  `gold_parts`.

  Returns:
    For each response its sentences as (number of characters up to its end, gain). The gains sum to
    `gold_reward`.
  """
  if len(prompts) != len(responses):
    raise ValueError(f"got {len(prompts)} prompts but {len(responses)} responses")
  return [_gains(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _gains(prompt: str, response: str) -> list[tuple[int, float]]:
  ends_of_words = [word.end() for word in re.finditer(r"\S+", response)]
  counts = map(len, grammar.sentences(response.split()))
  ends = [ends_of_words[count - 1] for count in itertools.accumulate(counts)]
  texts = ["", *(response[:end] for end in ends)]  # The gold reward of no text is 0.
  gains = np.diff(gold_reward([prompt] * len(texts), texts))
  return list(zip(ends, gains.tolist(), strict=True))
