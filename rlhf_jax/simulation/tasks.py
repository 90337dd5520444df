"""Data sets of the built-in task: prompts, demonstrations and preferences.

A row depends only on the split, the seed and its position, so a larger `n` extends a smaller one.
All functions give row `i` of a split and seed the same id and the same prompt; use different seeds
for stages that should see different prompts. Prompts repeat only after all of a split are used.
"""

import itertools
from typing import Any

import numpy as np

from rlhf_jax.simulation import annotators, writer
from rlhf_jax.simulation import demands as demands_lib

# One random stream per purpose, so that no data set shares its randomness with another.
_PROMPT_STREAM, _DEMONSTRATION_STREAM, _PREFERENCE_STREAM, _VOTE_STREAM = range(4)


def _rng(stream: int, split: str, *numbers: int) -> np.random.Generator:
  return np.random.default_rng([stream, demands_lib.SPLITS.index(split), *numbers])


def _responses(rng: np.random.Generator, prompt: str, count: int) -> list[str]:
  """Writes `count` different responses to one prompt, each by an independent writer."""
  demands = demands_lib.parse_prompt(prompt)
  responses = []
  while len(responses) < count:
    response = writer.write_response(demands, rng)
    if response not in responses:
      responses.append(response)
  return responses


def prompts(split: str, n: int, seed: int) -> list[dict[str, str]]:
  """Prompts of a split.

  Args:
    split: "train" or "eval", or "shift"; no combination of demands is in the first and one of the
      others. No prompt of the others is worded as those of "shift".
    n: Number of rows, at least 0.
    seed: Random seed, at least 0.

  Returns:
    `n` rows with `id` and `prompt`.

  Raises:
    ValueError: If an argument is out of range.
  """
  if n < 0 or seed < 0:
    raise ValueError(f"n and seed must be at least 0, got n={n}, seed={seed}")
  demands = demands_lib.all_demands(split)
  wordings = demands_lib.wordings_of(split)
  order = _rng(_PROMPT_STREAM, split, seed).permutation(len(demands) * len(wordings))
  rows = []
  for i in range(n):
    which, wording = divmod(int(order[i % len(order)]), len(wordings))
    text = demands_lib.write_prompt(demands[which], wordings[wording])
    rows.append({"id": f"{split}-{seed}-{i}", "prompt": text})
  return rows


def demonstrations(split: str, n: int, seed: int) -> list[dict[str, str]]:
  """Demonstrations of mixed quality, by `writer.write_response`.

  Arguments and errors are the same as those of `prompts`.

  Returns:
    `n` rows with `id`, `prompt` and `response`.
  """
  rows = prompts(split, n, seed)
  for i, row in enumerate(rows):
    rng = _rng(_DEMONSTRATION_STREAM, split, seed, i)
    (row["response"],) = _responses(rng, row["prompt"], 1)
  return rows


def preferences(split: str, n: int, seed: int, annotator: str = "expert") -> list[dict[str, str]]:
  """Pairs of responses to one prompt, labelled by an annotator.

  All annotators are shown the same pairs.

  Args:
    split: "train", "eval" or "shift", as in `prompts`.
    n: Number of rows, at least 0.
    seed: Random seed, at least 0.
    annotator: Key of `annotators.ANNOTATORS`.

  Returns:
    `n` rows with `id`, `prompt`, `chosen`, `rejected` and `annotator`.

  Raises:
    ValueError: If an argument is out of range or the annotator is unknown.
  """
  rows = prompts(split, n, seed)
  pairs, draws = [], []
  for i, row in enumerate(rows):
    rng = _rng(_PREFERENCE_STREAM, split, seed, i)
    pairs.append(_responses(rng, row["prompt"], 2))
    draws.append(rng.random())
  probability = annotators.preference_probability(
    annotator, [row["prompt"] for row in rows], [a for a, _ in pairs], [b for _, b in pairs]
  )
  for row, (a, b), prefers_a in zip(rows, pairs, np.asarray(draws) < probability, strict=True):
    row["chosen"], row["rejected"] = (a, b) if prefers_a else (b, a)
    row["annotator"] = annotator
  return rows


def votes(
  split: str, n: int, seed: int, annotator: str = "expert", responses: int = 3
) -> list[dict[str, Any]]:
  """Several responses to each prompt, with the majority's verdict on every pair of them.

  Arguments and errors are the same as those of `preferences`; `responses` is at least 2.

  Returns:
    `n` rows with `id`, `prompt`, `responses` and `annotations`. The annotations are the votes of
    the annotator: for each pair of responses `a` and `b`, the `preferred` one.
  """
  rows: list[dict[str, Any]] = [dict(row) for row in prompts(split, n, seed)]
  for i, row in enumerate(rows):
    rng = _rng(_VOTE_STREAM, split, seed, i)
    row["responses"] = _responses(rng, row["prompt"], responses)
  compared = list(itertools.combinations(range(responses), 2))
  pairs = [(row, a, b) for row in rows for a, b in compared]
  probability = annotators.preference_probability(
    annotator,
    [row["prompt"] for row, _, _ in pairs],
    [row["responses"][a] for row, a, _ in pairs],
    [row["responses"][b] for row, _, b in pairs],
  )
  for (row, a, b), prefers_a in zip(pairs, probability > 0.5, strict=True):
    vote = {"annotator": annotator, "a": a, "b": b, "preferred": a if prefers_a else b}
    row.setdefault("annotations", []).append(vote)
  return rows
