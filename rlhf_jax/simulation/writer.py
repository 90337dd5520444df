"""A writer of mixed skill. Its texts are the demonstrations that a policy starts from."""

import numpy as np

from rlhf_jax.simulation import demands as demands_lib
from rlhf_jax.simulation import grammar, world

# Beta distribution of the skill of one text, from 0 (careless) to 1 (flawless).
SKILL = (2.0, 2.0)


def _choose_aspects(demands, rng, slip) -> tuple[str, ...]:
  """Chooses the aspects to mention: some are forgotten, some are replaced by others."""
  chosen = []
  for aspect in demands.aspects:
    if slip(0.4):
      continue
    if slip(0.4):
      aspect = grammar.pick(rng, world.aspects_of(demands.subject))
    if aspect not in chosen:
      chosen.append(aspect)
  return tuple(chosen)


def _damage(sentence: list[str], rng) -> list[str]:
  """Damages a sentence: doubles a word or leaves one out."""
  place = int(rng.integers(len(sentence) - 1))
  if rng.random() < 0.5:
    return sentence[: place + 1] + sentence[place:]
  return sentence[:place] + sentence[place + 1 :]


def write_response(
  demands: demands_lib.Demands, rng: np.random.Generator, skill: float | None = None
) -> str:
  """Writes one response of at most `world.MAX_RESPONSE_WORDS` words.

  Args:
    demands: Demands of the prompt.
    rng: Random generator.
    skill: Skill from 0 to 1, where 1 makes no mistake; drawn from `SKILL` if None.
  """
  if skill is None:
    skill = float(rng.beta(*SKILL))

  def slip(probability: float) -> bool:
    return rng.random() < probability * (1 - skill)

  def sentence(kind: str, aspects: tuple[str, ...] = ()) -> list[str]:
    pattern = grammar.pick(rng, world.PATTERNS[kind])
    first_tone = -tone if mixed and rng.random() < 0.4 else tone
    other_tone = -first_tone if kind == "contrast" else first_tone
    # Skilled writers use more adverbs, but adverbs are no part of the gold reward.
    return grammar.fill(
      pattern,
      rng,
      tone=first_tone,
      subject=subject,
      aspects=aspects,
      other_tone=other_tone,
      optional=0.1 + 0.5 * skill,
    )

  tone = -demands.tone if slip(0.5) else demands.tone
  mixed = slip(0.6)
  alike = world.DOMAINS[world.SUBJECTS[demands.subject]][0]
  subject = grammar.pick(rng, alike) if slip(0.15) else demands.subject
  aspects = _choose_aspects(demands, rng, slip)
  length = grammar.pick(rng, world.LENGTHS) if slip(1.0) else demands.length

  text = [] if slip(0.3) else [sentence("opener")]
  if len(aspects) == 2 and (length == "brief" or rng.random() < 0.3):
    text.append(sentence("contrast" if mixed else "pair", aspects))
  else:
    text += [sentence("aspect", (aspect,)) for aspect in aspects]
  for kind in rng.permutation(world.POINT_KINDS):
    enough = 26 if length == "detailed" else 10
    if sum(map(len, text)) < enough:
      text.append(sentence(str(kind)))

  if slip(0.5):
    text.insert(int(rng.integers(len(text) + 1)), sentence("filler"))
  text = [_damage(words, rng) if slip(0.45) else words for words in text]
  words = [word for words in text for word in words]
  if slip(0.3):
    words = words[: -int(rng.integers(1, 4))]
  return " ".join(words[: world.MAX_RESPONSE_WORDS])
