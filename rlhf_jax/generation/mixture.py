"""Decoding from the geometric mixture of two models, each with its own cache."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from rlhf_jax.losses import game
from rlhf_jax.types import Decode, Params


class MixtureParams(NamedTuple):
  """Two sets of params of one architecture, and their mixing weight.

  Attributes:
    policy: Params with weight `1 - mix`.
    ref: Params with weight `mix`.
    mix: [] float32 in [0, 1]; changing it does not recompile.
  """

  policy: Params
  ref: Params
  mix: jax.Array


class MixtureCache(NamedTuple):
  """The caches of both models, which have seen the same tokens."""

  policy: Any
  ref: Any

  def repeat(self, n: int) -> "MixtureCache":
    """Repeats every row n times; the copies are adjacent."""
    return MixtureCache(self.policy.repeat(n), self.ref.repeat(n))

  def seek(self, index: jax.Array) -> "MixtureCache":
    """Returns the cache with `index` as the next slot to write."""
    return MixtureCache(self.policy.seek(index), self.ref.seek(index))

  def seat(self, row: jax.Array, prompts: "MixtureCache", prompt: jax.Array) -> "MixtureCache":
    """Replaces one row by a row of a cache of prompts."""
    policy = self.policy.seat(row, prompts.policy, prompt)
    return MixtureCache(policy, self.ref.seat(row, prompts.ref, prompt))


def make_mixture(
  decode: Decode, init_cache: Callable[..., Any]
) -> tuple[Decode, Callable[..., MixtureCache]]:
  """Builds `decode` and `init_cache` of Nash-MD's opponent, for `make_generate`.

  Munos et al., 2023, https://arxiv.org/abs/2312.00886: each token is sampled from
  `policy^(1 - mix) ref^mix`, normalised (`losses.game.mixture_logits`). A token costs a forward
  pass of both models at the newest position, and two caches are held.

  Args:
    decode: `(params, tokens [B, T], cache, *, mask) -> (logits [B, V], cache)` of the architecture.
    init_cache: `(batch, slots) -> cache` with a method `repeat(n)`.

  Returns:
    `decode` and `init_cache` for `MixtureParams` and `MixtureCache`. The logits are
    log-probabilities of the mixture.
  """

  def init_both(batch: int, slots: int) -> MixtureCache:
    return MixtureCache(init_cache(batch, slots), init_cache(batch, slots))

  def decode_both(
    params: MixtureParams, tokens: jax.Array, cache: MixtureCache, *, mask: jax.Array
  ) -> tuple[jax.Array, MixtureCache]:
    policy, policy_cache = decode(params.policy, tokens, cache.policy, mask=mask)
    ref, ref_cache = decode(params.ref, tokens, cache.ref, mask=mask)
    return game.mixture_logits(policy, ref, params.mix), MixtureCache(policy_cache, ref_cache)

  def prepare_both(params: MixtureParams) -> MixtureParams:
    policy, ref, mix = params
    return MixtureParams(decode.prepare(policy), decode.prepare(ref), mix)

  return Decode(decode_both, prepare_both), init_both
