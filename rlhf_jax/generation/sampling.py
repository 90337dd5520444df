"""Sampling of tokens from logits."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax import ranges

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
    slots: Number of responses that are sampled at a time. One that has ended makes room for the
      next, so that short ones do not wait for the longest. The responses are the same. 0 samples
      all of a batch at a time.
    stop: Strings that end a response, separated by commas, besides the tokens that end one. A
      response keeps its stop string, and counts as ended. Write \n for a new line, \t for a tab and
      \xNN or \uNNNN for another character, such as \x2c for a comma or \x20 for a space at an end.
  """

  max_new_tokens: int = 64
  temperature: float = 1.0
  top_k: int = ranges.rare(0)
  top_p: float = ranges.rare(1.0)
  samples_per_prompt: int = 1
  slots: int = ranges.rare(0)
  stop: tuple[str, ...] = ranges.rare(())

  def __post_init__(self):
    # A flag holds one printable line, so this is the form in which it is kept.
    object.__setattr__(self, "stop", tuple(map(_escaped, self.stop)))
    if "" in self.stop:
      raise ValueError("stop has an empty string, which would end every response at once")
    ranges.check(
      self,
      at_least_one=("max_new_tokens", "samples_per_prompt"),
      non_negative=("temperature", "top_k", "slots"),
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
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)

  def keep(lowest: jax.Array, last: jax.Array) -> jax.Array:
    """Keeps logits above `lowest`, and of those equal to it the ones with ids up to `last`."""
    kept = (logits > lowest) | ((logits == lowest) & (ids <= last))
    return jnp.where(kept, logits, -jnp.inf)

  mass = max(top_p - _ROUNDING, 1e-30)
  if 0 < top_k < logits.shape[-1]:
    values, places = jax.lax.top_k(logits, top_k)  # Equal values are in the order of their ids.
    last = jnp.full((*logits.shape[:-1], 1), top_k - 1)
    if top_p < 1:
      missed = jnp.cumsum(jax.nn.softmax(values, axis=-1), axis=-1) < mass
      last = jnp.minimum(jnp.sum(missed, axis=-1, keepdims=True), last)
    return keep(*(jnp.take_along_axis(x, last, axis=-1) for x in (values, places)))
  return keep(*_end_of_nucleus(logits, ids, mass)) if top_p < 1 else logits


def _end_of_nucleus(logits: jax.Array, ids: jax.Array, mass: float) -> tuple[jax.Array, jax.Array]:
  """Logit and id, [..., 1] each, of the least likely token of the smallest set with a `mass`.

  Both are found by bisection, in about 50 sums over the vocabulary, which cost less than sorting
  it. If rounding keeps the probability of all tokens below `mass`, the set is all tokens.
  """
  probs = jax.nn.softmax(logits, axis=-1)

  def missed(kept: jax.Array) -> jax.Array:
    return jnp.sum(probs, axis=-1, keepdims=True, where=kept) < mass

  first, last = (_place(jnp.float32(x)) for x in (-jnp.inf, jnp.inf))
  shape = (*logits.shape[:-1], 1)
  lowest = _bisect(lambda at: missed(logits >= _at_place(at)), shape, first + 1, last, 32)
  lowest = _at_place(lowest - 1)
  above, tied = logits > lowest, logits == lowest
  size = logits.shape[-1]
  missing = lambda at: ~missed(above | (tied & (ids <= at)))  # noqa: E731
  return lowest, _bisect(missing, shape, 0, size - 1, size.bit_length())


def _bisect(
  holds: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], low: Any, high: Any, steps: int
) -> jax.Array:
  """Returns the first integers [..., 1] in [low, high) for which `holds`, else `high`."""

  def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    low, high = ends
    middle = (low & high) + ((low ^ high) >> 1)  # Their mean, without overflow.
    found = holds(middle)
    return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

  ends = tuple(jnp.full(shape, end, jnp.int32) for end in (low, high))
  return jax.lax.fori_loop(0, steps, halve, ends)[1]


def _place(x: jax.Array) -> jax.Array:
  """Integers in the order of floats; the inverse of `_at_place`."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _at_place(place: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(place ^ ((place >> 31) & 0x7FFFFFFF), jnp.float32)


def row_keys(key: jax.Array, prompt_ids: jax.Array, samples: int) -> jax.Array:
  """Returns the keys [B * samples] of the responses to B prompts, those of a prompt adjacent.

  A token's key is this one folded with its position in the response.
  """
  prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.repeat(prompt_ids, samples))
  ids = jnp.tile(jnp.arange(samples), prompt_ids.shape[0])
  return jax.vmap(jax.random.fold_in)(prompt_keys, ids)


def distinct_ids(prompt_ids: jax.Array) -> jax.Array:
  """Gives the prompts of a batch ids [B] of which no two are equal, to sample with.

  A prompt that is in a batch several times, as where an epoch ends, thus gets other responses each
  time. The first one keeps its id.
  """
  place = jnp.arange(prompt_ids.shape[0])
  earlier = (prompt_ids[:, None] == prompt_ids[None]) & (place[:, None] > place[None])
  return prompt_ids + (jnp.max(prompt_ids) + 1) * jnp.sum(earlier, axis=1, dtype=prompt_ids.dtype)


def sample(
  logits: jax.Array, keys: jax.Array, config: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
  """Draws one token per row, each row with its own key.

  The vocabulary is cut into about sqrt(V) blocks. A block is drawn by its probability, then a token
  of it, each by the Gumbel-max trick. So there are about 2 sqrt(V) random numbers per row instead
  of V, and the law is the softmax: probabilities are right to a relative 1e-5, from 1 down to 1e-14
  for a block and for a token in its block. A logit of -inf is never drawn.

  Args:
    logits: [B, V] float.
    keys: [B] typed random keys.
    config: Sampling rule.

  Returns:
    Tokens [B] int32, and their log-probabilities [B] float32 under the softmax at
    `config.temperature` (at 1 if the temperature is 0). `top_k` and `top_p` do not affect the
    log-probabilities, so they equal those that a trainer computes; NaN if the highest logit of the
    row is not finite.
  """
  chex.assert_rank([logits, keys], [2, 1])
  chex.assert_equal_shape_prefix([logits, keys], 1)
  logits = logits.astype(jnp.float32)
  if config.temperature > 0:
    logits = logits / config.temperature
  highest = jnp.max(logits, axis=-1)

  def powers(blocks: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(blocks - highest[:, None, None]), axis=-1)

  blocks = _blocks(logits)
  count, size = blocks.shape[1:]
  sums = powers(blocks)
  level = jnp.log(jnp.sum(sums, axis=-1))
  if config.temperature > 0:
    if config.top_k or config.top_p < 1:
      blocks = _blocks(adjust_logits(logits, top_k=config.top_k, top_p=config.top_p))
      sums = powers(blocks)
    # The resolution of the cheaper noise ends at a probability of 1e-7.
    draw = lambda key: jax.random.gumbel(key, (count + size,), mode="high")  # noqa: E731
    tokens, chosen = _choose(blocks, jnp.log(sums), jax.vmap(draw)(keys))
  else:
    tokens, chosen = _choose(blocks, jnp.max(blocks, axis=-1), jnp.zeros((1, count + size)))
  return tokens, jnp.where(jnp.isfinite(highest), chosen - highest - level, jnp.nan)


def _blocks(x: jax.Array) -> jax.Array:
  """Cuts [B, V] into blocks, about as many as each has numbers; -inf fills the last one.

  Their number is a power of two, so that devices which hold parts of the vocabulary hold whole
  blocks, and a divisor of V if a large one is.
  """
  size = x.shape[-1]
  count = 2 ** (size.bit_length() // 2)
  divisor = math.gcd(count, size)
  count = divisor if 8 * divisor >= count else count
  x = jnp.pad(x, ((0, 0), (0, -size % count)), constant_values=-jnp.inf)
  return x.reshape(len(x), count, -1)


def _choose(blocks: jax.Array, ranks: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Chooses the block of the highest rank, then its highest logit, both with noise.

  Args:
    blocks: [B, N, S] logits.
    ranks: [B, N] ranks of the blocks.
    noise: [B, N + S] numbers to add to the ranks, and to the logits of the block.

  Returns:
    Ids [B] int32 and their logits [B].
  """
  count, size = blocks.shape[1:]

  block = jnp.argmax(ranks + noise[:, :count], axis=-1)
  logits = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  place = jnp.argmax(logits + noise[:, count:], axis=-1)
  chosen = jnp.take_along_axis(logits, place[:, None], axis=1)[:, 0]
  return (block * size + place).astype(jnp.int32), chosen
