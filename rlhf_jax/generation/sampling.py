"""Sampling of tokens from logits."""

import dataclasses
import math
import re

import chex
import jax
import jax.numpy as jnp

from rlhf_jax import ranges
from rlhf_jax.losses import logprobs as logprobs_lib

_ROUNDING = 1e-6  # Of a sum of probabilities in float32.


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  r"""Settings of the sampler.

  Attributes:
    max_new_tokens: Maximum length of a response in tokens, including the stop token.
    temperature: Sampling temperature; 0 is greedy.
    top_k: Number of most likely tokens to sample from; 0 samples from all.
    top_p: Probability of the nucleus. Only the smallest set of most likely tokens that reaches it
      is sampled from; 1 samples from all.
    samples_per_prompt: Responses per prompt. They share one prefill.
    stop: Strings that end a response, separated by commas, besides the tokens that end one. A
      response keeps its stop string, and counts as ended. Write \n for a new line, \t for a tab and
      \xNN or \uNNNN for another character, such as \x2c for a comma or \x20 for a space at an end.
  """

  max_new_tokens: int = 64
  temperature: float = 1.0
  top_k: int = ranges.rare(0)
  top_p: float = ranges.rare(1.0)
  samples_per_prompt: int = 1
  stop: tuple[str, ...] = ranges.rare(())

  def __post_init__(self):
    # A flag holds one printable line, so this is the form in which it is kept.
    object.__setattr__(self, "stop", tuple(map(_escaped, self.stop)))
    if "" in self.stop:
      raise ValueError("stop has an empty string, which would end every response at once")
    ranges.check(
      self,
      at_least_one=("max_new_tokens", "samples_per_prompt"),
      non_negative=("temperature", "top_k"),
      above_zero=("top_p",),
    )
    if math.isinf(self.temperature):
      raise ValueError(f"temperature must be finite, got {self.temperature}")

  @property
  def stop_strings(self) -> tuple[str, ...]:
    """Strings that end a response, as they are in its text."""
    return tuple(map(_unescaped, self.stop))


_ESCAPES = {"\n": r"\n", "\t": r"\t", "\r": r"\r", ",": r"\x2c"}


def _escaped(text: str) -> str:
  """Returns a text without control characters, commas and spaces at its ends."""
  code = lambda c: c if c.isprintable() else c.encode("unicode_escape").decode()  # noqa: E731
  text = "".join(_ESCAPES.get(c) or code(c) for c in text)
  inner = text.strip(" ")
  before = len(text) - len(text.lstrip(" ")) if inner else len(text)
  return r"\x20" * before + inner + r"\x20" * (len(text) - before - len(inner))


def _unescaped(text: str) -> str:
  letters = {escape: char for char, escape in _ESCAPES.items()}
  return re.sub(
    r"\\(?:[ntr]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})",
    lambda match: letters.get(match[0]) or chr(int(match[0][2:], 16)),
    text,
  )


def adjust_logits(logits: jax.Array, *, top_k: int = 0, top_p: float = 1.0) -> jax.Array:
  """Sets the logits of excluded tokens to -inf. The most likely token always stays.

  Of equally likely tokens, those with the smallest ids are taken first.

  `top_p` is nucleus sampling (Holtzman et al., 2019, https://arxiv.org/abs/1904.09751): the
  smallest set of most likely tokens whose probability reaches `top_p`, after `top_k`.

  Args:
    logits: [..., V] float.
    top_k: 0 keeps all.
    top_p: 1 keeps all.

  Returns:
    [..., V] float.
  """

  def keep(threshold: jax.Array, count: int | jax.Array) -> jax.Array:
    """Keeps the `count` most likely tokens, of which the last one has the logit `threshold`."""
    above, tied = logits > threshold, logits == threshold
    room = count - jnp.sum(above, axis=-1, keepdims=True)
    return jnp.where(above | (tied & (jnp.cumsum(tied, axis=-1) <= room)), logits, -jnp.inf)

  if 0 < top_k < logits.shape[-1]:
    logits = keep(jax.lax.top_k(logits, top_k)[0][..., -1:], top_k)
  if top_p < 1:
    ordered = jnp.flip(jnp.sort(logits, axis=-1), -1)
    reached = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) >= top_p - _ROUNDING
    # Place of the last token of the smallest set that reaches it; all, if rounding is in the way.
    last = jnp.minimum(jnp.sum(~reached, axis=-1, keepdims=True), logits.shape[-1] - 1)
    logits = keep(jnp.take_along_axis(ordered, last, axis=-1), 1 + last)
  return logits


def sample(
  logits: jax.Array, keys: jax.Array, config: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
  """Draws one token per row, each row with its own key.

  Args:
    logits: [B, V] float.
    keys: [B] typed random keys.
    config: Sampling rule.

  Returns:
    Tokens [B] int32, and their log-probabilities [B] float32 under the softmax at
    `config.temperature` (at 1 if the temperature is 0). `top_k` and `top_p` do not affect the
    log-probabilities, so they equal those that a trainer computes.
  """
  chex.assert_rank([logits, keys], [2, 1])
  chex.assert_equal_shape_prefix([logits, keys], 1)
  logits = logits.astype(jnp.float32)
  if config.temperature > 0:
    logits = logits / config.temperature
    allowed = adjust_logits(logits, top_k=config.top_k, top_p=config.top_p)
    tokens = jax.vmap(jax.random.categorical)(keys, allowed)
  else:
    tokens = jnp.argmax(logits, axis=-1)
  tokens = tokens.astype(jnp.int32)
  return tokens, logprobs_lib.token_logprobs(logits, tokens)
