"""Rewards of segments: scores of sentences or other spans of a text, on the tokens that end them.

Fine-grained RLHF (Wu et al., 2023, https://arxiv.org/abs/2306.01693). A reward function that gives
`[(end_character, score), ...]` for each response, in place of one number, scores segments.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import user
from rlhf_jax.rewards import checks


class Segments(NamedTuple):
  """Scores of the segments of B responses, which all are in one list.

  Attributes:
    rows: [J] int, index of the response of each segment.
    ends: [J] int, number of characters of the response up to the end of the segment.
    scores: [J] float32, NaN where they cannot be used.
    count: Number B of responses.
  """

  rows: np.ndarray
  ends: np.ndarray
  scores: np.ndarray
  count: int

  @property
  def totals(self) -> np.ndarray:
    """Sum of the scores [B] of the segments of each response."""
    totals = np.zeros(self.count, np.float32)
    np.add.at(totals, self.rows, self.scores)
    return totals


def are_given(values: Any) -> bool:
  """Returns True if a reward function gave a list of segments for each response."""
  lists = (list, tuple)
  return (
    isinstance(values, lists)
    and bool(values)
    and all(
      isinstance(of, lists) and all(isinstance(segment, lists) for segment in of) for of in values
    )
  )


def read(values: Sequence[Any], name: str, responses: Sequence[str]) -> Segments:
  """Checks the segments that a reward function gave.

  Args:
    values: Segments of each response.
    name: Name of the function, for messages.
    responses: B texts.

  Raises:
    user.ResultError: Something is no segment of its response. The message names the function.
  """
  if len(values) != len(responses):
    raise user.ResultError(
      f"{name} gave segments of {len(values)} responses, for {len(responses)}; it must return one"
      " list per response"
    )
  rows, ends, scores = [], [], []
  for i, (of, response) in enumerate(zip(values, responses, strict=True)):
    for segment in of:
      try:
        end, score = segment
        rows.append(i)
        ends.append(_integer(end))
        scores.append(np.float32(np.nan if score is None else _number(score)))
      except (TypeError, ValueError, OverflowError) as error:
        raise user.ResultError(
          f"{name} gave {str(segment)[:80]} as a segment of response {i}; a segment is"
          " (end_character, score)"
        ) from error
      if not 0 <= ends[-1] <= len(response):
        raise user.ResultError(
          f"{name} gave a segment that ends at character {end} of response {i}, which has"
          f" {len(response)}: {response[:80]!r}"
        )
  marked = checks.mark(np.array(scores, np.float32))
  return Segments(np.array(rows, int), np.array(ends, int), marked, len(responses))


def _number(value: Any) -> float:
  """Returns a number; NumPy and float() would read one from text."""
  if isinstance(value, str | bytes):
    raise TypeError
  return float(value)


def _integer(value: Any) -> int:
  """Returns a whole number."""
  if isinstance(value, bool) or _number(value) != int(value):
    raise TypeError
  return int(value)


def on_tokens(
  segments: Segments,
  tokens: Sequence[Sequence[int]],
  responses: Sequence[str],
  decode: Callable[[list[list[int]]], list[str]],
  length: int,
) -> np.ndarray:
  """Puts the score of each segment on the token that completes its text.

  That is the first token up to which the response decodes to all characters of the segment.

  Args:
    segments: Scores of the segments of B responses.
    tokens: Ids of each response.
    responses: The decoded responses.
    decode: Function from the token ids of several texts to the texts.
    length: Number R of columns.

  Returns:
    [B, R] float32; a row sums to the total of its response.
  """
  rows, ends = segments.rows, segments.ends
  low = np.zeros(len(rows), int)
  high = np.array([len(tokens[row]) for row in rows], int) - 1
  while (low < high).any():
    middle = (low + high) // 2
    read = decode([list(tokens[b][: k + 1]) for b, k in zip(rows, middle, strict=True)])
    reached = np.array(
      [text[:end] == responses[b][:end] for text, b, end in zip(read, rows, ends, strict=True)]
    )
    low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
  earned = np.zeros((segments.count, length), np.float32)
  np.add.at(earned, (rows, high), segments.scores)
  return earned
