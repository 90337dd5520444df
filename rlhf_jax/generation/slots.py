"""Continuous batching: where a response has ended, the next one of a queue takes its slot.

One program with static shapes. Prompts are prefilled once, each slot holds the cache of one
response, and all slots take a token per step. A free slot gets the keys and values of the next
prompt and the first token of its response, so that it takes part in the next step.

All slots write their token at one place, which moves through a ring of R - 1 places behind the
prompt. The last of R tokens is never read back, so no response meets its beginning. Positions in
the cache tell which tokens a response sees, wherever they are.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.generation.sampling import SamplingConfig, row_keys, sample
from rlhf_jax.generation.stopping import Stops
from rlhf_jax.types import Decode, Params, Rollout


class _Slots(NamedTuple):
  step: jax.Array  # [] int32, decode steps so far.
  next: jax.Array  # [] int32, next row of the queue.
  row: jax.Array  # [S] int32, row whose response is in the slot.
  live: jax.Array  # [S] bool, slots whose response has not ended.
  drawn: jax.Array  # [S] int32, tokens of the response so far.
  token: jax.Array  # [S] int32, the last of them.
  read: jax.Array  # [S] int32, states of the automaton of stop strings.
  cache: Any
  tokens: jax.Array  # [rows, R] int32, -1 where nothing is drawn.
  logprobs: jax.Array  # [rows, R] float32.


def make_generate_in_slots(
  decode: Callable[..., tuple[jax.Array, Any]],
  init_cache: Callable[..., Any],
  config: SamplingConfig,
  *,
  stops: Stops,
  pad_id: int,
) -> Callable[..., Rollout]:
  """Builds the sampler of `make_generate` with `config.slots` slots; the responses are the same."""
  length, samples = config.max_new_tokens, config.samples_per_prompt

  @jax.jit
  def generate(
    params: Params, tokens: jax.Array, mask: jax.Array, prompt_ids: jax.Array, key: jax.Array
  ) -> Rollout:
    batch, prompt_length = tokens.shape
    rows = batch * samples
    slots = min(config.slots, rows)
    if isinstance(decode, Decode):
      params = decode.prepare(params)
    keys = row_keys(key, prompt_ids, samples)
    first_logits, prompts = decode(params, tokens, init_cache(batch, prompt_length), mask=mask)

    def draw(logits: jax.Array, row: jax.Array, drawn: jax.Array, read: jax.Array):
      """Draws a token for each of some rows; also tells which of them it ends."""
      token, logprob = sample(logits, jax.vmap(jax.random.fold_in)(keys[row], drawn), config)
      read, stopped = stops.read(read, token)
      return token, logprob, read, stopped | (drawn + 1 == length)

    def has_room(state: _Slots) -> jax.Array:
      return (state.next < rows) & ~jnp.all(state.live)

    def seat(state: _Slots) -> _Slots:
      """Puts the next row into the first free slot, with its first token."""
      slot, row = jnp.argmin(state.live), state.next
      prompt, start = row // samples, jnp.zeros(1, jnp.int32)
      logits = jnp.take(first_logits, prompt[None], axis=0, mode="clip")
      token, logprob, read, ended = draw(logits, row[None], start, start)
      return state._replace(
        next=row + 1,
        row=state.row.at[slot].set(row),
        live=state.live.at[slot].set(~ended[0]),
        drawn=state.drawn.at[slot].set(1),
        token=state.token.at[slot].set(token[0]),
        read=state.read.at[slot].set(read[0]),
        cache=state.cache.seat(slot, prompts, prompt),
        tokens=state.tokens.at[row, 0].set(token[0]),
        logprobs=state.logprobs.at[row, 0].set(logprob[0]),
      )

    def advance(state: _Slots) -> _Slots:
      """Draws the next token of every live slot."""
      cache = state.cache.seek(prompt_length + state.step % max(length - 1, 1))
      live = state.live
      logits, cache = decode(params, state.token[:, None], cache, mask=live[:, None])
      token, logprob, read, ended = draw(logits, state.row, state.drawn, state.read)
      place = jnp.where(live, state.row, rows), state.drawn  # Beyond the last row is nowhere.
      return state._replace(
        step=state.step + 1,
        live=live & ~ended,
        drawn=state.drawn + 1,
        token=token,
        read=read,
        cache=cache,
        tokens=state.tokens.at[place].set(token, mode="drop"),
        logprobs=state.logprobs.at[place].set(logprob, mode="drop"),
      )

    def fill(state: _Slots) -> _Slots:
      return jax.lax.while_loop(has_room, seat, state)

    nothing = jnp.zeros(slots, jnp.int32)
    start = _Slots(
      step=jnp.int32(0),
      next=jnp.int32(0),
      row=nothing,
      live=jnp.zeros(slots, bool),
      drawn=nothing,
      token=nothing,
      read=nothing,
      cache=init_cache(slots, prompt_length + length - 1),
      tokens=jnp.full((rows, length), -1, jnp.int32),
      logprobs=jnp.zeros((rows, length), jnp.float32),
    )
    end = jax.lax.while_loop(
      lambda state: jnp.any(state.live), lambda state: fill(advance(state)), fill(start)
    )
    tokens, mask = jnp.repeat(tokens, samples, axis=0), jnp.repeat(mask, samples, axis=0)
    drawn = end.tokens >= 0
    return Rollout(
      tokens=jnp.concatenate([tokens, jnp.where(drawn, end.tokens, pad_id)], axis=1),
      prompt_mask=jnp.concatenate([mask, jnp.zeros_like(drawn)], axis=1),
      response_mask=jnp.concatenate([jnp.zeros_like(mask), drawn], axis=1),
      logprobs=end.logprobs,
    )

  return generate


def usage(lengths: Sequence[int] | np.ndarray, slots: int = 0) -> tuple[int, float]:
  """Decode steps that responses take, and the share of the slots' tokens that belong to responses.

  Args:
    lengths: [B] lengths of the responses in tokens, in the order of the queue.
    slots: Number of slots; 0 stands for one per response.
  """
  ends = [0] * min(slots or len(lengths), len(lengths))
  for length in lengths:  # The first token is drawn from the logits of the prompt.
    heapq.heapreplace(ends, ends[0] + int(length) - 1)
  steps = max(ends)
  return steps, float(np.sum(lengths) - len(lengths)) / (len(ends) * steps) if steps else 1.0
