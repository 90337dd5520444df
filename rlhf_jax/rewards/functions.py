"""Rewards and constraints that are plain Python functions of text.

Add yours to `REWARDS` or `CONSTRAINTS`, or name it as `module:function` on the command line.
"""

import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax import processes, simulation, user
from rlhf_jax.data import DataError
from rlhf_jax.rewards import checks, segments

# (prompts, responses, rows) -> one score per response, or its segments: a list of
# (end_character, score). `rows` are the data rows of the prompts, with all their columns: a
# reference answer, a label, anything that the score needs.
Scores = Sequence[float] | np.ndarray | Sequence[Sequence[tuple[int, float]]]
TextReward = Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Scores]
# The same with one bool per response, True if it satisfies the constraint.
TextConstraint = Callable[
  [Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Sequence[bool] | np.ndarray
]


def ask(
  function: Callable[..., Any],
  prompts: Sequence[str],
  *responses: Sequence[str],
  rows: Sequence[Mapping[str, Any]],
  kind: str = "",
) -> np.ndarray:
  """Calls a reward function, or with two responses to each prompt a preference function.

  Args:
    function: The function.
    prompts: B texts.
    *responses: B texts each: the responses, or both responses of pairs.
    rows: B data rows of the prompts.
    kind: Kind of the function for messages; empty for a reward or a preference.

  Returns:
    [B] float32 rewards or probabilities, NaN where they cannot be used. The reward of segments is
    their sum.

  Raises:
    user.RaisedError: The function raised. The message names the function and the line.
    user.ResultError: It did not return one number per response, or one probability per pair.
  """
  given = ask_parts(function, prompts, *responses, rows=rows, kind=kind)
  return given.totals if isinstance(given, segments.Segments) else given


def ask_parts(
  function: Callable[..., Any],
  prompts: Sequence[str],
  *responses: Sequence[str],
  rows: Sequence[Mapping[str, Any]],
  kind: str = "",
) -> np.ndarray | segments.Segments:
  """Calls a reward or preference function; see `ask`. A reward may be that of segments.

  With several processes process 0 calls it, and all get its numbers.
  """

  def call() -> list[Any]:
    given = _ask_here(function, prompts, responses, rows, kind)
    if isinstance(given, segments.Segments):
      return [given.rows.tolist(), given.ends.tolist(), given.scores.tolist()]
    return [given.tolist()]

  *places, scores = processes.agree(call)
  numbers = np.array(scores, np.float32)
  if not places:
    return numbers
  at, ends = (np.array(of, int) for of in places)
  return segments.Segments(at, ends, numbers, len(responses[0]))


def _ask_here(
  function: Callable[..., Any],
  prompts: Sequence[str],
  responses: Sequence[Sequence[str]],
  rows: Sequence[Mapping[str, Any]],
  kind: str,
) -> np.ndarray | segments.Segments:
  """Calls a reward or preference function in this process; see `ask_parts`."""
  kind = kind or ("reward" if len(responses) == 1 else "preference")
  name = f"{kind} function {user.name_of(function)}"
  try:  # With copies: a function may sort its lists or take columns out of its rows.
    values = function([*prompts], *map(list, responses), [{**row} for row in rows])
  except (Exception, SystemExit) as error:  # Else the run would seem to have ended well.
    if hasattr(error, "exit_code"):  # Its message says what is wrong with the data.
      raise
    raise user.RaisedError(f"{name} raised {user.describe(error)}") from error
  if kind == "reward" and segments.are_given(values):
    return segments.read(values, name, responses[0])
  return _one_number_each(values, name, responses)


def ask_constraint(
  function: Callable[..., Any],
  prompts: Sequence[str],
  responses: Sequence[str],
  *,
  rows: Sequence[Mapping[str, Any]],
) -> np.ndarray:
  """Calls a constraint.

  Args:
    function: The constraint.
    prompts: B texts.
    responses: B texts.
    rows: B data rows of the prompts.

  Returns:
    [B] bool, True on responses that satisfy the constraint.

  Raises:
    user.ResultError: See `ask`; or a result is neither True nor False.
  """
  verdicts = ask(function, prompts, responses, rows=rows, kind="constraint")
  for i in np.flatnonzero((verdicts != 0) & (verdicts != 1))[:1]:
    raise user.ResultError(
      f"constraint function {user.name_of(function)} gave {verdicts[i]:g} for response {i},"
      f" {responses[i][:80]!r}; it must return True or False for each"
    )
  return verdicts == 1


def _one_number_each(values: Any, name: str, responses: Sequence[Sequence[str]]) -> np.ndarray:
  """Returns the result of a reward or preference function as [B] float32; see `ask`."""
  pairs, texts = len(responses) == 2, responses[0]
  unit, plural, wanted = "response", "responses", "number"
  if pairs:
    unit, plural, wanted = "pair", "pairs", "probability"
  must = f"it must return one {wanted} per {unit}"
  must += ", or a list of (end_character, score)" if name.startswith("reward ") else ""
  try:
    if np.asarray(values).dtype.kind in "SUMm":  # NumPy would read numbers from texts and dates.
      raise TypeError
    with np.errstate(over="ignore"):  # It becomes infinite.
      numbers = np.asarray(values, np.float32)
  except Exception as error:  # Anything: a tensor with a gradient is a RuntimeError of PyTorch.
    raise user.ResultError(
      f"{name} gave a {type(values).__name__} without numbers; {must}"
    ) from error
  if numbers.shape != (len(texts),):
    gave = "None" if values is None else f"shape {numbers.shape}"
    raise user.ResultError(f"{name} gave {gave} for {len(texts)} {plural}; {must}")
  numbers = checks.mark(numbers)
  for i in np.flatnonzero((numbers < 0) | (numbers > 1))[: int(pairs)]:
    raise user.ResultError(
      f"{name} gave a value outside [0, 1]: {numbers[i]:g} for {unit} {i}, {texts[i][:80]!r}"
    )
  return numbers


def sentences(
  prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> Scores:
  """Gold reward of the built-in task in parts: what each sentence adds to it."""
  del rows
  return simulation.gold_of_sentences(list(prompts), list(responses))


def gold(
  prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> Scores:
  """Gold reward of the built-in task."""
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


# Patterns that announce an answer, the strongest sign first.
_ANNOUNCEMENTS = tuple(
  re.compile(pattern, re.IGNORECASE | re.MULTILINE)
  for pattern in (
    r"\\boxed\s*\{",
    r"####",
    r"\banswer\s*(?:is|:|=)|^\s*A:",
    r"=(?=[^=\n]*\Z)",  # In the last line.
  )
)
# Not a part of a word or an exponent, nor the left side of a sum or an equation. A minus sign that
# does not subtract belongs to it.
_NUMBER = re.compile(
  r"(?:(?<![\w)])-)?(?<![\w.^])"
  r"(?>(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:e[-+]?[0-9]+)?(?:/[1-9][0-9]*)?)"
  r"(?!\s*[-+*/×=]\s*[-(.0-9])",
  re.IGNORECASE,
)
_PLAIN = (
  (re.compile(r"(?<=[0-9])(?:,|\{,\}|\\,)(?=[0-9]{3}(?![0-9]))"), ""),  # Thousands.
  (re.compile(r"\\?[$€£]"), ""),
  (re.compile("\N{MINUS SIGN}"), "-"),
  (re.compile(r"\\[dt]?frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}"), r"\1/\2"),
)


def final_number(text: str) -> float | None:
  r"""The number that a text gives as its answer.

  It is the first number after the last `\boxed{`, or else after the last `####`, or else after the
  last "answer is", "answer:" or, at the start of a line, "A:", or else after the last equals sign
  of the last line. In a text without any of these it is the last number. Thousands separators,
  currencies, units, fractions and LaTeX are understood.

  Args:
    text: A solution, such as "6 * 12 = 72, so the answer is $72.00 a week."

  Returns:
    The number; None if there is none.
  """
  text = text.strip()
  for pattern, plain in _PLAIN:
    text = pattern.sub(plain, text)
  announced = next((hits for p in _ANNOUNCEMENTS if (hits := list(p.finditer(text)))), [])
  numbers = list(_NUMBER.finditer(text, announced[-1].end() if announced else 0))
  if not numbers:
    return None
  numerator, _, denominator = numbers[0 if announced else -1].group().partition("/")
  return float(numerator) / float(denominator or 1)


def _answer(row: Mapping[str, Any], read: Callable[[str], Any], wanted: str, reward: str) -> Any:
  """Returns what is read in the column `answer` of a row; refuses a row with nothing to read."""
  answer = row.get("answer")
  found = None if answer is None else read(str(answer))
  if found is None:
    raise DataError(
      f"answer: {'missing' if answer is None else f'no {wanted}'}; the reward {reward} compares"
      f" with the {wanted} in the column `answer`"
    )
  return found


def _references(reward: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
  """Returns the references of rows; names the row that has none."""
  for i, row in enumerate(rows):
    try:
      yield REFERENCES[reward](row)
    except DataError as error:
      raise DataError(f"row {row.get('id', i)}: {error}") from error


def exact_answer(
  prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> Scores:
  """1 if the final number of the response equals that of the column `answer`, else 0.

  Raises:
    DataError: If a row has no number in `answer`.
  """
  del prompts
  scores = np.zeros(len(responses), np.float32)
  references = _references("exact_answer", rows)
  for i, (response, reference) in enumerate(zip(responses, references, strict=True)):
    scores[i] = final_number(response) == reference
  return scores


@functools.cache
def _math_verifier() -> Any:
  try:
    import math_verify
  except ImportError as error:
    fix = "pip install 'rlhf_jax[math]'"
    raise user.RaisedError(f"the math reward needs math-verify: {fix}") from error
  return math_verify


@functools.lru_cache(2**14)
def _math_reference(answer: str) -> list[Any] | None:
  """Expressions of a reference answer, None if there are none; LaTeX may be bare."""
  parse = functools.partial(_math_verifier().parse, parsing_timeout=_math_seconds())
  return parse(answer) or parse(f"${answer}$") or None


def _math_seconds() -> int | None:
  """Time limit for an expression; it is kept by a signal, so only the main thread has one."""
  return 5 if threading.current_thread() is threading.main_thread() else None


def math(
  prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> Scores:
  """1 if the answer of the response is mathematically that of the column `answer`, else 0.

  Both may be numbers, LaTeX or text with an answer, boxed or last, as math-verify reads them:
  https://github.com/huggingface/Math-Verify.

  Raises:
    DataError: If a row has no expression in `answer`.
  """
  del prompts
  library, seconds = _math_verifier(), _math_seconds()
  scores = np.zeros(len(responses), np.float32)
  for i, (response, reference) in enumerate(zip(responses, _references("math", rows), strict=True)):
    found = library.parse(response, parsing_timeout=seconds)
    scores[i] = library.verify(reference, found, timeout_seconds=seconds)
  return scores


# Reward -> function that returns what the reward compares with, of a row, or raises a DataError.
REFERENCES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
  "exact_answer": lambda row: _answer(row, final_number, "number", "exact_answer"),
  "math": lambda row: _answer(row, _math_reference, "expression", "math"),
}


def filler(
  prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> Scores:
  """1 for a response with a filler sentence of the built-in task, else 0: a bonus for padding."""
  del prompts, rows
  return np.array([simulation.has_filler(response) for response in responses], np.float32)


def _worth(annotator: str) -> TextReward:
  """Reward function of the value of a response to an annotator of the built-in task."""

  def score(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
  ) -> Scores:
    del rows
    return simulation.value(annotator, prompts, responses).astype(np.float32)

  return score


REWARDS: dict[str, TextReward] = {
  "exact_answer": exact_answer,
  "filler": filler,
  "gold": gold,
  "lavish": _worth("lavish"),
  "math": math,
  "sentences": sentences,
  "sentiment": sentiment,
  "terse": _worth("terse"),
}


def finished(
  prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> Sequence[bool]:
  """True for a response that ends with a full stop, an exclamation mark or a question mark."""
  del prompts, rows
  return [response.rstrip(" \n\"')]*").endswith((".", "!", "?")) for response in responses]


def no_filler(
  prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> Sequence[bool]:
  """True for a response without a filler sentence of the built-in task."""
  del prompts, rows
  return [not simulation.has_filler(response) for response in responses]


CONSTRAINTS: dict[str, TextConstraint] = {"finished": finished, "no_filler": no_filler}
