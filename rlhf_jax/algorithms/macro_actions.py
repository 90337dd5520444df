"""Macro actions: neighbouring tokens that share an advantage and a return.

MA-RLHF (Chai et al., 2024, https://arxiv.org/abs/2410.02743), section 3.2. Credit for a late reward
passes fewer steps, so it reaches early tokens sooner. The advantages are those of
`losses.advantages.macro_gae`. A rule that ends macro actions is a function in `CUTS`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.losses import advantages


def ngram(mask: jax.Array, ends: jax.Array | None, ref_logprobs: jax.Array, n: int) -> jax.Array:
  """Macro actions of `n` tokens."""
  del ends, ref_logprobs
  return advantages.ngram_segments(mask, n)


def sentence(mask: jax.Array, ends: jax.Array | None, ref_logprobs: jax.Array, n: int) -> jax.Array:
  """Macro actions that last to the end of a sentence."""
  del ref_logprobs, n
  if ends is None:
    raise ValueError("cut=sentence needs the tokens that end a sentence")
  return advantages.segments_from(mask, _shift(ends))


def perplexity(
  mask: jax.Array, ends: jax.Array | None, ref_logprobs: jax.Array, n: int
) -> jax.Array:
  """Macro actions in which the perplexity of each token under the reference does not rise."""
  del ends, n
  return advantages.segments_from(mask, ref_logprobs < _shift(ref_logprobs))


def _shift(x: jax.Array) -> jax.Array:
  """Returns the entries of the tokens before; the first one stays."""
  return jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)


# (mask, ends, ref_logprobs, n) -> index of the macro action of each token. All are [B, R]: tokens
# that count, tokens that end a sentence, log-probabilities under the reference; n is a number.
Cut = Callable[[jax.Array, jax.Array | None, jax.Array, int], jax.Array]
CUTS: dict[str, Cut] = {"ngram": ngram, "sentence": sentence, "perplexity": perplexity}
