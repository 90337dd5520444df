"""Stop strings inside a compiled sampler: an automaton over tokens.

A string can begin and end anywhere in a token, so no list of tokens is the same as a string. The
automaton of Aho and Corasick (1975) reads bytes; it is computed for whole tokens in advance. The
sampler then looks up one number per token, and ends a response at the very token that completes a
stop string. Nothing is decoded, and no token is sampled in vain.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_BYTES = 256


class StopText(NamedTuple):
  """Automaton of stop strings.

  Attributes:
    classes: [V] int32, the class of each token; tokens of a class move the automaton alike.
    next: [S, C] int32, the state after a token of each class. State 0 has read nothing of a string;
      the last state, which is never left, has read a whole one.
  """

  classes: jax.Array | np.ndarray
  next: jax.Array | np.ndarray

  def step(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the states [B] after one more token [B]."""
    return jnp.asarray(self.next)[state, jnp.asarray(self.classes)[tokens]]

  def is_complete(self, state: jax.Array) -> jax.Array:
    """Returns bools [B], True if a stop string has been read."""
    return state == self.next.shape[0] - 1


class Stops(NamedTuple):
  """Ends of responses.

  Attributes:
    ids: Tokens that end a response.
    text: Automaton of the strings that end one, or None.
  """

  ids: Sequence[int]
  text: StopText | None

  def read(self, state: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the states [B] after one more token [B], 0 at first, and whether it is the last."""
    stopped = jnp.any(tokens[:, None] == jnp.asarray(self.ids, jnp.int32)[None], axis=1)
    if self.text is not None:
      state = self.text.step(state, tokens)
      stopped |= self.text.is_complete(state)
    return state, stopped


def stop_text(strings: Sequence[str], token_bytes: Sequence[bytes]) -> StopText:
  """Builds the automaton.

  Args:
    strings: Stop strings.
    token_bytes: Bytes that each token adds to the text of a response.

  Raises:
    ValueError: If a string is empty.
  """
  if not all(strings):
    raise ValueError("a stop string is empty: every response would end at once")
  moves = _automaton([string.encode() for string in strings])
  start = np.arange(len(moves), dtype=np.int32)
  columns = np.empty([len(token_bytes), len(moves)], np.int32)
  for token, text in enumerate(token_bytes):
    states = start
    for byte in text:
      states = moves[states, byte]
    columns[token] = states
  unique, classes = np.unique(columns, axis=0, return_inverse=True)
  return StopText(classes.reshape(-1).astype(np.int32), np.ascontiguousarray(unique.T))


def _automaton(strings: Sequence[bytes]) -> np.ndarray:
  """Returns the next state [S, 256] of each state and byte; the last state is the end."""
  children: list[dict[int, int]] = [{}]
  ends: set[int] = set()
  for string in strings:
    node = 0
    for byte in string:
      if byte not in children[node]:
        children[node][byte] = len(children)
        children.append({})
      node = children[node][byte]
    ends.add(node)
  moves = np.zeros([len(children) + 1, _BYTES], np.int32)
  queue = [(0, 0)]  # Nodes and their longest proper suffixes, by depth.
  for node, suffix in queue:
    if node:
      moves[node] = moves[suffix]
      ends |= {node} if suffix in ends else set()
    for byte, child in children[node].items():
      queue.append((child, moves[node, byte] if node else 0))
      moves[node, byte] = child
  end = len(children)
  moves[np.isin(moves, [*ends])] = end
  moves[end] = end
  return moves
