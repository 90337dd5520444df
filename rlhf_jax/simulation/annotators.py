"""Simulated annotators: raters that compare two responses with Bradley-Terry noise.

A rater values a response by a weighted sum of features and prefers `a` to `b` with probability
`sigmoid((value(a) - value(b)) / temperature)`. An annotator is a panel of raters, one of whom is
drawn at random for each comparison. A panel of one is a Bradley-Terry model. A panel of several
need not be one: the majority of `panel` is intransitive, so no reward function represents it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.simulation import gold, world


class Annotator(NamedTuple):
  """A panel of raters.

  Attributes:
    description: Short description of the annotator.
    raters: Weights of the features in `FEATURES` for each rater; absent means 0.
    temperature: Noise of each rater, in the units of the weighted sum.
  """

  description: str
  raters: tuple[Mapping[str, float], ...]
  temperature: float


# Topics of sentences. No text can be entirely about one and entirely about another.
TOPICS = {
  "facts": world.ASPECT_KINDS,
  "verdict": ("opener", "verdict"),
  "advice": ("company", "again", "recommend"),
}
# The parts of the gold reward; shortness in [0, 1], which ignores the requested length; and, for
# each topic, the share of the words in sentences of that topic that count, in [0, 1].
FEATURES = (*gold.WEIGHTS, "shortness", *TOPICS)

_CONTENT = {"tone": 3.0, "coverage": 4.0, "fluency": 1.5}

ANNOTATORS = {
  "expert": Annotator("judges by the gold reward", (gold.WEIGHTS,), 0.5),
  "novice": Annotator("judges by the gold reward, carelessly", (gold.WEIGHTS,), 2.0),
  "terse": Annotator(
    "likes short texts, whatever the prompt asks", ({**_CONTENT, "shortness": 20.0},), 0.75
  ),
  "lavish": Annotator(
    "likes long texts, whatever the prompt asks", ({**_CONTENT, "shortness": -20.0},), 0.75
  ),
  # Condorcet's paradox: facts beat the verdict, the verdict beats advice, and advice beats facts,
  # by two raters to one. The topics compete for the words of a text, so that no text beats all.
  "panel": Annotator(
    "three raters whose majority preference is intransitive",
    (
      {"fluency": 1.0, "facts": 2.0, "verdict": 1.0},
      {"fluency": 1.0, "verdict": 2.0, "advice": 1.0},
      {"fluency": 1.0, "advice": 2.0, "facts": 1.0},
    ),
    0.2,
  ),
}


def features(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, np.ndarray]:
  """Features that raters judge by: arrays `[B]` under the keys of `FEATURES`."""
  words = np.asarray([len(response.split()) for response in responses], np.float32)
  counted = [gold.counted_sentences(response) for response in responses]
  values = gold.gold_parts(prompts, responses)
  values["shortness"] = 1 - np.minimum(words / world.MAX_RESPONSE_WORDS, 1)
  for topic, kinds in TOPICS.items():
    on_topic = [sum(n for n, meaning in text if meaning.kind in kinds) for text in counted]
    values[topic] = np.asarray(on_topic, np.float32) / np.maximum(words, 1)
  return values


def preference_probability(
  annotator: str, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]
) -> np.ndarray:
  """Probability that an annotator prefers response `a` to response `b`.

  Args:
    annotator: Key of `ANNOTATORS`.
    prompts: `B` prompts of the world.
    a: `B` responses.
    b: `B` responses.

  Returns:
    `[B] float64` in [0, 1]; swapping `a` and `b` gives one minus the result.

  Raises:
    ValueError: If the annotator is unknown, the numbers of texts differ, or a prompt is not of
      this world.
  """
  _, raters, temperature = _annotator(annotator)
  features_a, features_b = features(prompts, a), features(prompts, b)
  difference = {name: features_a[name] - np.float64(features_b[name]) for name in FEATURES}
  values = [sum(weight * difference[name] for name, weight in rater.items()) for rater in raters]
  # sigmoid(x) = (1 + tanh(x / 2)) / 2, which cannot overflow
  return np.mean([0.5 + 0.5 * np.tanh(value / (2 * temperature)) for value in values], axis=0)


def value(annotator: str, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
  """Value of each response to an annotator, the mean over its raters.

  Args:
    annotator: Key of `ANNOTATORS`.
    prompts: `B` prompts of the world.
    responses: `B` responses.

  Returns:
    `[B] float64`. An annotator with one rater prefers the response with the higher value.

  Raises:
    ValueError: If the annotator is unknown, or a prompt is not of this world.
  """
  _, raters, _ = _annotator(annotator)
  of_text = features(prompts, responses)
  values = [sum(weight * np.float64(of_text[name]) for name, weight in r.items()) for r in raters]
  return np.mean(values, axis=0)


def _annotator(name: str) -> Annotator:
  if name not in ANNOTATORS:
    raise ValueError(f"annotator must be one of {sorted(ANNOTATORS)}, got {name!r}")
  return ANNOTATORS[name]
