"""Rewards that are plain Python functions of text. Add yours to `REWARDS`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax import simulation

# (prompts, responses, rows) -> one score per response. `rows` are the data rows of the prompts,
# with all their columns: a reference answer, a label, anything the score needs.
Scores = Sequence[float] | np.ndarray
TextReward = Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Scores]


def gold(
  prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> Scores:
  """The known reward of the built-in task."""
  del rows
  return simulation.gold_reward(list(prompts), list(responses))


@functools.cache
def _sentiment_analyzer():
  try:
    from vaderSentiment import vaderSentiment
  except ImportError as error:
    raise ImportError(
      "the sentiment reward needs vaderSentiment: pip install 'rlhf_jax[rewards]'"
    ) from error
  return vaderSentiment.SentimentIntensityAnalyzer()


def sentiment(
  prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> Scores:
  """VADER's compound sentiment of the response, in [-1, 1].

  Hutto and Gilbert, 2014, https://github.com/cjhutto/vaderSentiment.
  """
  del prompts, rows
  score = _sentiment_analyzer().polarity_scores
  return np.array([score(response)["compound"] for response in responses], np.float32)


REWARDS: dict[str, TextReward] = {"gold": gold, "sentiment": sentiment}
