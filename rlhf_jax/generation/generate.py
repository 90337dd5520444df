"""Prefill and decode as one jitted program that stops when every row has ended."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.generation.sampling import SamplingConfig, row_keys, sample
from rlhf_jax.generation.slots import make_generate_in_slots
from rlhf_jax.generation.stopping import Stops, StopText
from rlhf_jax.types import Decode, Params, Rollout


class _Decoding(NamedTuple):
  step: jax.Array  # [] int32, response tokens drawn so far.
  done: jax.Array  # [B] bool, rows whose stop token was drawn.
  cache: Any
  tokens: jax.Array  # [B, R] int32.
  logprobs: jax.Array  # [B, R] float32.
  mask: jax.Array  # [B, R] bool.
  read: jax.Array  # [B] int32, states of the automaton of stop strings.


def make_generate(
  decode: Callable[..., tuple[jax.Array, Any]],
  init_cache: Callable[..., Any],
  config: SamplingConfig,
  *,
  stop_ids: Sequence[int],
  pad_id: int,
  stop_text: StopText | None = None,
) -> Callable[..., Rollout]:
  """Builds the jitted sampler.

  A token depends only on its logits and on (key, prompt id, sample id, position in the response).
  It does not depend on the mesh, or on the order or number of the other rows.

  Args:
    decode: `(params, tokens [B, T], cache, *, mask) -> (logits [B, V], cache)`. If it is a
      `Decode`, params are prepared once for all tokens.
    init_cache: `(batch, slots) -> cache` with a method `repeat(n)` that repeats its rows, and
      `seek` and `seat` of `models.Cache` if `config.slots` is set.
    config: Sampling rule and maximum response length R.
    stop_ids: Tokens that end a response; the stop token is kept, with its log-probability.
    pad_id: Token that fills a row after the end of its response; nothing reads it.
    stop_text: Automaton of strings that end a response; the token that completes one is kept.

  Returns:
    `generate(params, tokens [B, P], mask [B, P], prompt_ids [B], key) -> Rollout` with
    `B * samples_per_prompt` rows; the samples of a prompt are adjacent. Prompts are left padded.
  """
  if not stop_ids:
    raise ValueError("stop_ids is empty: no response could ever end")
  length, samples = config.max_new_tokens, config.samples_per_prompt
  stops = Stops(stop_ids, stop_text)
  if config.slots:
    return make_generate_in_slots(decode, init_cache, config, stops=stops, pad_id=pad_id)

  @jax.jit
  def generate(
    params: Params, tokens: jax.Array, mask: jax.Array, prompt_ids: jax.Array, key: jax.Array
  ) -> Rollout:
    batch, prompt_length = tokens.shape
    rows = batch * samples
    if isinstance(decode, Decode):
      params = decode.prepare(params)
    # The last sampled token is never read back, so it needs no slot.
    cache = init_cache(batch, prompt_length + length - 1)
    logits, cache = decode(params, tokens, cache, mask=mask)
    logits, cache = jnp.repeat(logits, samples, axis=0), cache.repeat(samples)
    tokens, mask = jnp.repeat(tokens, samples, axis=0), jnp.repeat(mask, samples, axis=0)
    keys_of_rows = row_keys(key, prompt_ids, samples)

    def draw(state: _Decoding, logits: jax.Array) -> _Decoding:
      keys = jax.vmap(jax.random.fold_in, (0, None))(keys_of_rows, state.step)
      token, logprob = sample(logits, keys, config)
      token = jnp.where(state.done, pad_id, token)
      logprob = jnp.where(state.done, 0.0, logprob)
      read, stopped = stops.read(state.read, token)
      return _Decoding(
        step=state.step + 1,
        done=state.done | stopped,
        cache=state.cache,
        tokens=jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.step, 1),
        logprobs=jax.lax.dynamic_update_index_in_dim(state.logprobs, logprob, state.step, 1),
        mask=jax.lax.dynamic_update_index_in_dim(state.mask, ~state.done, state.step, 1),
        read=read,
      )

    def unfinished(state: _Decoding) -> jax.Array:
      return (state.step < length) & ~jnp.all(state.done)

    def advance(state: _Decoding) -> _Decoding:
      token = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
      written = ~state.done[:, None]
      logits, cache = decode(params, token, state.cache, mask=written)
      return draw(state._replace(cache=cache), logits)

    start = _Decoding(
      step=jnp.int32(0),
      done=jnp.zeros(rows, bool),
      cache=cache,
      tokens=jnp.full((rows, length), pad_id, jnp.int32),
      logprobs=jnp.zeros((rows, length), jnp.float32),
      mask=jnp.zeros((rows, length), bool),
      read=jnp.zeros(rows, jnp.int32),
    )
    end = jax.lax.while_loop(unfinished, advance, draw(start, logits))
    return Rollout(
      tokens=jnp.concatenate([tokens, end.tokens], axis=1),
      prompt_mask=jnp.concatenate([mask, jnp.zeros_like(end.mask)], axis=1),
      response_mask=jnp.concatenate([jnp.zeros_like(mask), end.mask], axis=1),
      logprobs=end.logprobs,
    )

  return generate


@jax.jit
def ended(
  rollout: Rollout, stop_ids: Sequence[int], stop_text: StopText | None = None
) -> jax.Array:
  """[B] bool, True if a response ended in a stop token or string instead of being truncated."""
  stops = jnp.asarray(stop_ids, jnp.int32)[None, None]
  by_token = jnp.any((rollout.tokens[..., None] == stops).any(-1) & rollout.response_mask, axis=1)
  if stop_text is None:
    return by_token

  def read(state: jax.Array, column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    token, on = column
    return jnp.where(on, stop_text.step(state, token), state), None

  start = jnp.zeros_like(rollout.tokens[:, 0])
  state, _ = jax.lax.scan(read, start, (rollout.tokens.T, rollout.response_mask.T))
  return by_token | stop_text.is_complete(state)
