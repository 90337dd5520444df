"""Demands of prompts: their wording, parsing, and assignment to splits."""

import functools
import hashlib
import itertools
import os
import re
from typing import NamedTuple

from rlhf_jax.simulation import world

# The demands of `shift` are those of `eval`, in wordings of its own.
SPLITS = ("train", "eval", "shift")
WORDINGS = (*world.PROMPT_WORDINGS, *world.SHIFTED_WORDINGS)
EVAL_SHARE = 0.1


class Demands(NamedTuple):
  """The demands of a prompt.

  Attributes:
    subject: Thing to review, a key of `world.SUBJECTS`.
    tone: `world.PRAISE` (+1) or `world.CRITICISE` (-1).
    aspects: The two aspects to mention, in the order of the prompt.
    length: One of `world.LENGTHS`.
  """

  subject: str
  tone: int
  aspects: tuple[str, str]
  length: str


def write_prompt(demands: Demands, wording: int) -> str:
  """Writes the prompt for the demands in the `wording`-th of `WORDINGS`."""
  tone = next(word for word, sign in world.TONES.items() if sign == demands.tone)
  first, second = demands.aspects
  return WORDINGS[wording].format(
    subject=demands.subject, tone=tone, first=first, second=second, length=demands.length
  )


_WORDING_REGEXES = tuple(
  re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", re.escape(wording))) for wording in WORDINGS
)


class PromptError(ValueError):
  """A text is not a prompt of the built-in task."""

  exit_code = os.EX_DATAERR


@functools.lru_cache(maxsize=1 << 15)
def parse_prompt(text: str) -> Demands:
  """Recovers the demands of a prompt.

  Raises:
    PromptError: If the text is not a prompt of this world.
  """
  for regex in _WORDING_REGEXES:
    match = regex.fullmatch(text)
    if match and match["tone"] in world.TONES and match["length"] in world.LENGTHS:
      aspects = (match["first"], match["second"])
      known = world.aspects_of(match["subject"])
      if set(aspects) <= set(known) and aspects[0] != aspects[1]:
        return Demands(match["subject"], world.TONES[match["tone"]], aspects, match["length"])
  raise PromptError(
    f"not a prompt of the built-in task: {text[:200]!r}; its prompts look like"
    f" {world.PROMPT_WORDINGS[0]!r}, and its judges (gold, expert, panel) know no others: give"
    " another reward or preference"
  )


def split_of(demands: Demands) -> str:
  """Returns the split that the demands belong to, "train" or "eval".

  The hash ignores the order of the aspects, so eval contains no mere rewording of a train prompt.
  """
  key = f"{demands.subject} {demands.tone} {sorted(demands.aspects)} {demands.length}"
  digest = hashlib.sha256(key.encode()).digest()
  return "eval" if int.from_bytes(digest[:8], "big") < EVAL_SHARE * 2**64 else "train"


def wordings_of(split: str) -> range:
  """Returns the places in `WORDINGS` of the wordings of a split."""
  usual = len(world.PROMPT_WORDINGS)
  return range(usual, len(WORDINGS)) if split == "shift" else range(usual)


@functools.cache
def all_demands(split: str) -> tuple[Demands, ...]:
  """Lists every combination of demands of a split, in a fixed order.

  Raises:
    ValueError: If the split is not one of `SPLITS`.
  """
  if split not in SPLITS:
    raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
  combinations = (
    Demands(subject, tone, aspects, length)
    for subject in world.SUBJECTS
    for aspects in itertools.permutations(world.aspects_of(subject), 2)
    for tone in world.TONES.values()
    for length in world.LENGTHS
  )
  source = "eval" if split == "shift" else split
  return tuple(demands for demands in combinations if split_of(demands) == source)
