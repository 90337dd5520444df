"""Log-probabilities of given tokens, and entropy, in float32 or wider.

Logits are arrays or `LazyLogits`, which are computed for a few tokens at a time. With a vocabulary
of 128 thousand, the logits of a batch, their softmax and their gradients would dominate memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked, packing


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("hidden", "params"),
  meta_fields=("read_out", "chunk", "kept", "scored", "looked_up"),
)
@dataclasses.dataclass(frozen=True)
class LazyLogits:
  """Logits [B, T, V] that are computed when they are read.

  `over_tokens` reads them for any function. `token_scores` reads them with a gradient of its own,
  which has no forward-mode derivative.

  Attributes:
    hidden: [B, T, D] hidden states that the logits are computed from.
    params: Params of `read_out`.
    read_out: `(params, hidden [B, t, D]) -> logits [B, t, V]`.
    chunk: Number t of tokens per row whose logits are computed at a time.
    kept: Number of tokens per row whose softmax may be kept for the backward pass. Longer rows
      compute it again.
    scored: Maximum number of tokens per row that a loss scores; logits are computed only for them.
      0 stands for all.
    looked_up: True to look up the logit of a target, False to sum over a mask. The same number;
      a CPU sums in two more passes over the logits, and others cannot look up in a split V.
  """

  hidden: jax.Array
  params: Any
  read_out: Callable[[Any, jax.Array], jax.Array]
  chunk: int
  kept: int = 0
  scored: int = 0
  looked_up: bool = False


Logits = jax.Array | LazyLogits


def over_tokens(fn: Callable[..., Any], *inputs: Logits) -> Any:
  """`fn(*inputs)`, computed for a few tokens at a time if an input is lazy.

  The backward pass recomputes each chunk. Chunks are cut along T only, so that rows stay where
  they are on a mesh.

  Args:
    fn: Function from arrays [B, t, ...] to a tree of arrays [B, t, ...] that treats each token
      independently.
    *inputs: [B, T, ...] each; lazy ones reach `fn` as arrays [B, t, V]. If none is lazy, they may
      have any shape and are passed to `fn` unchanged.

  Returns:
    Tree of [B, T, ...].

  Raises:
    AssertionError: If an input is lazy and B or T differ between inputs.
  """
  lazy = [x for x in inputs if isinstance(x, LazyLogits)]
  if not lazy:
    return fn(*inputs)
  arrays = [x.hidden if isinstance(x, LazyLogits) else x for x in inputs]
  chex.assert_equal_shape_prefix(arrays, 2)

  def piece(arrays):
    read = [
      x.read_out(x.params, array) if isinstance(x, LazyLogits) else array
      for x, array in zip(inputs, arrays, strict=True)
    ]
    return fn(*read)

  length = arrays[0].shape[1]
  pieces = max(-(-length // x.chunk) for x in lazy)
  if pieces == 1:
    return piece(arrays)
  piece = jax.checkpoint(piece, prevent_cse=False)  # In a loop there is nothing to merge anyway.
  return _join(jax.lax.map(piece, _cut(arrays, pieces)), length)


def _cut(arrays: Any, pieces: int) -> Any:
  """Cuts a tree of [B, T, ...] along T into [pieces, B, t, ...], with zeros at the end."""

  def cut(x: jax.Array) -> jax.Array:
    size = -(-x.shape[1] // pieces)
    padding = ((0, 0), (0, pieces * size - x.shape[1])) + ((0, 0),) * (x.ndim - 2)
    return jnp.swapaxes(jnp.pad(x, padding).reshape(len(x), pieces, size, *x.shape[2:]), 0, 1)

  return jax.tree.map(cut, arrays)


def _join(pieces: Any, length: int) -> Any:
  """Joins a tree of [pieces, B, t, ...] into [B, length, ...]."""

  def join(x: jax.Array) -> jax.Array:
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

  return jax.tree.map(join, pieces)


def over_next_tokens(fn: Callable[..., Any], tokens: jax.Array, *logits: Logits) -> Any:
  """`fn(targets, *logits)`, where targets are the next tokens.

  Args:
    fn: See `over_tokens`.
    tokens: [B, T] int.
    *logits: [B, T, V] float each, of which `[:, t]` predicts `tokens[:, t + 1]`.

  Returns:
    Tree of [B, T, ...], where `[:, t]` is about `tokens[:, t]`. Column 0 has no prediction and
    is 0.
  """
  chex.assert_rank(tokens, 2)
  return _back(over_tokens(fn, _next(tokens), *logits))


def _next(tokens: jax.Array) -> jax.Array:
  """Targets of the logits at each position; `_back` drops the last one, which is wrong."""
  return jnp.roll(tokens, -1, axis=1)


def _back(results: Any) -> Any:
  """Moves results from the position of the logits to that of the token which they are about."""
  return jax.tree.map(
    lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2)), results
  )


def shifted(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Logits minus their maximum, [..., V], and whether that maximum is finite, [...].

  Next to a logit of 30, float32 keeps only five decimals of a log-probability. Logits without a
  finite maximum (padding may hold anything) become zeros, so that they pass no gradient.

  Args:
    logits: [..., V] float.

  Returns:
    [..., V] float32 and [...] bool.
  """
  logits = masked.widen(logits)
  return _minus(logits, jax.lax.stop_gradient(jnp.max(logits, axis=-1)))


def _minus(logits: jax.Array, highest: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`shifted` logits whose maximum is known, [...] float32."""
  fine = jnp.isfinite(highest)
  return jnp.where(fine[..., None], logits - highest[..., None], 0.0), fine


_ROUNDING = 2.0**-20  # Relative, of a logit in float32.


class TokenScores(NamedTuple):
  """Numbers about tokens under their logits, [..., T] each; None for those not asked for.

  Attributes:
    logprobs: float32, log-probability of the target.
    entropy: float32, entropy in nats.
    hits: bool, True if no logit is above that of the target by more than rounding.
    collision: float32, log sum_v pi(v)^2, without a gradient.
  """

  logprobs: jax.Array
  entropy: Any = None
  hits: Any = None
  collision: Any = None


class _Ask(NamedTuple):
  """Arguments of `token_scores` that are not arrays."""

  temperature: float = 1.0
  entropy: bool = False
  hits: bool = False
  collision: bool = False


def token_scores(
  logits: Logits,
  targets: jax.Array,
  *,
  temperature: float = 1.0,
  entropy: bool = False,
  hits: bool = False,
  collision: bool = False,
) -> TokenScores:
  """Log-probability of each target, and what else is asked for, in one pass over the logits.

  Nothing is shifted; see `token_logprobs`. The gradient of lazy logits is written by hand: the
  softmax is kept if there are at most `LazyLogits.kept` tokens per row, and computed again if not.

  Args:
    logits: [..., T, V] float.
    targets: [..., T] int, each in `[0, V)`.
    temperature: Temperature, which divides the logits.
    entropy: True to return the entropy.
    hits: True to return whether the target has the highest logit.
    collision: True to return log sum_v pi(v)^2.

  Returns:
    Arrays [..., T].
  """
  ask = _Ask(temperature, entropy, hits, collision)
  if isinstance(logits, LazyLogits):
    chex.assert_equal_shape_prefix([logits.hidden, targets], 2)
    return _lazy_scores(logits, targets, ask)
  return _measure(logits, targets, ask)[0]


def next_token_scores(
  logits: Logits, tokens: jax.Array, mask: jax.Array | None = None, **ask: Any
) -> TokenScores:
  """`token_scores` of every token given the ones before it.

  Args:
    logits: [B, T, V] float, `logits[:, t]` predicts `tokens[:, t + 1]`.
    tokens: [B, T] int.
    mask: [B, T] bool, True on the tokens to score. Lazy logits with `LazyLogits.scored` are
      computed for these only; a row with more of them gets NaN. None stands for all tokens.
    **ask: See `token_scores`.

  Returns:
    Arrays [B, T]; 0 in column 0, which has no prediction, and at tokens whose logits are not
    computed.
  """
  if mask is None or not isinstance(logits, LazyLogits) or not _skips(logits):
    return _back(token_scores(logits, _next(tokens), **ask))
  mask = packing.predicted(mask)
  scored = packing.positions(mask, logits.scored)
  scores = token_scores(_at(logits, scored - 1), _take(tokens, scored), **ask)
  return _spread(scores, scored, mask)


def next_token_nll(
  logits: Logits, tokens: jax.Array, weights: jax.Array, **ask: Any
) -> tuple[jax.Array, TokenScores]:
  """Sum over tokens of `weights` times the negative log-likelihood given the tokens before.

  The gradient of lazy logits is computed together with the sum, so that no logit is kept or
  computed again.

  Args:
    logits: [B, T, V] float, `logits[:, t]` predicts `tokens[:, t + 1]`.
    tokens: [B, T] int.
    weights: [B, T] float32, without a gradient. 0 leaves a token out, as does column 0; lazy
      logits with `LazyLogits.scored` are computed only for tokens with a weight.
    **ask: See `token_scores`.

  Returns:
    The sum, and arrays [B, T] as from `next_token_scores`, without a gradient.
  """
  weights = jax.lax.stop_gradient(jnp.asarray(weights)).at[:, 0].set(0)
  if not isinstance(logits, LazyLogits):
    scores = next_token_scores(logits, tokens, **ask)
    return _weighted(scores.logprobs, weights), jax.lax.stop_gradient(scores)
  if not _skips(logits):
    total, scores = _lazy_nll(logits, _next(tokens), jnp.roll(weights, -1, axis=1), _Ask(**ask))
    return total, _back(scores)
  mask = weights != 0
  scored = packing.positions(mask, logits.scored)
  inputs = _at(logits, scored - 1), _take(tokens, scored), _take(weights, scored)
  total, scores = _lazy_nll(*inputs, _Ask(**ask))
  missing = jnp.sum(mask) > jnp.sum(scored < tokens.shape[1])
  return jnp.where(missing, jnp.nan, total), _spread(scores, scored, mask)


def _skips(logits: LazyLogits) -> bool:
  """True if logits are computed for some of the tokens."""
  return 0 < logits.scored < logits.hidden.shape[1]


def _at(logits: LazyLogits, positions: jax.Array) -> LazyLogits:
  """Lazy logits at positions [B, C] of each row; outside of it they are of any position."""
  positions = jnp.clip(positions, 0, logits.hidden.shape[1] - 1)
  hidden = jnp.take_along_axis(logits.hidden, positions[..., None], axis=1)
  return dataclasses.replace(logits, hidden=hidden)


def _take(x: jax.Array, positions: jax.Array) -> jax.Array:
  """Entries of x [B, T] at positions [B, C]; 0 where these are T."""
  taken = jnp.take_along_axis(x, jnp.minimum(positions, x.shape[1] - 1), axis=1)
  return jnp.where(positions < x.shape[1], taken, jnp.zeros((), x.dtype))


def _spread(scores: TokenScores, scored: jax.Array, mask: jax.Array) -> TokenScores:
  """Moves results [B, C] to their tokens in a mask [B, T]; NaN in rows that have more than C."""
  length = mask.shape[1]
  missing = jnp.sum(mask, axis=1) > jnp.sum(scored < length, axis=1)
  nth = jnp.clip(jnp.cumsum(mask, axis=1) - 1, 0, scored.shape[1] - 1)

  def spread(x: jax.Array) -> jax.Array:
    x = jnp.where(mask, jnp.take_along_axis(x, nth, axis=1), jnp.zeros((), x.dtype))
    return x if x.dtype == bool else jnp.where(missing[:, None], jnp.nan, x)

  return jax.tree.map(spread, scores)


def _weighted(logprobs: jax.Array, weights: jax.Array) -> jax.Array:
  # Log-probabilities without a weight may be NaN.
  return -jnp.sum(weights * jnp.where(weights == 0, 0.0, logprobs))


class _Softmax(NamedTuple):
  """Softmax of logits as exponentials of logits minus their maximum, and what they sum to.

  Attributes:
    highest: [...] float32, maximum of the logits.
    level: [...] float32, logarithm of the sum.
    powers: [..., V] float32, exponentials; None if they are not kept.
  """

  highest: jax.Array
  level: jax.Array
  powers: Any = None


def _measure(
  logits: jax.Array, targets: jax.Array, ask: _Ask, *, looked_up: bool = False
) -> tuple[TokenScores, _Softmax]:
  chex.assert_rank(logits, targets.ndim + 1)
  chex.assert_equal_shape_prefix([logits, targets], targets.ndim)
  logits = masked.widen(logits) / ask.temperature
  highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
  target = None
  if looked_up:  # Before logits are shifted, so that a compiler need not write shifted ones.
    places = targets[..., None].astype(jnp.int32)
    target = jnp.take_along_axis(logits, places, axis=-1, mode="clip")[..., 0] - highest
  logits, fine = _minus(logits, highest)
  if target is None:
    # A masked sum instead of a gather: it partitions over a sharded vocabulary on Auto and on
    # Explicit meshes, and needs less memory on TPU.
    target = jnp.sum(logits, axis=-1, where=_is_target(logits, targets))
  powers = jnp.exp(logits)
  total = jnp.sum(powers, axis=-1)
  level = jnp.log(total)

  def known(x: jax.Array) -> jax.Array:
    return jnp.where(fine, x, jnp.nan)

  scores = TokenScores(known(target - level))
  if ask.entropy:
    products = powers * jnp.where(powers > 0, logits, 0.0)
    scores = scores._replace(entropy=known(level - jnp.sum(products, axis=-1) / total))
  if ask.hits:
    # A compiler may compute a maximum and the logits that it is taken from in two ways.
    rounding = _ROUNDING * jnp.maximum(jnp.abs(highest), 1.0)
    scores = scores._replace(hits=fine & (target >= -rounding))
  if ask.collision:
    squared = jnp.log(jnp.sum(powers * powers, axis=-1)) - 2 * level
    scores = scores._replace(collision=jax.lax.stop_gradient(known(squared)))
  return scores, _Softmax(highest, level, powers)


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
  # int32 whatever the dtype of the tokens: 8 bits would wrap around after 255.
  vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  return vocabulary == targets[..., None]


def _cotangent(
  softmax: _Softmax,
  targets: jax.Array,
  temperature: float,
  by_logprob: jax.Array,
  by_entropy: jax.Array | None = None,
  entropy: jax.Array | None = None,
) -> jax.Array:
  """Gradient [..., V] of a loss by logits, from those by the numbers of `_measure`."""

  def column(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(softmax.highest), x, 0.0)[..., None]

  probs = softmax.powers / jnp.exp(softmax.level)[..., None]
  by_logprob = column(by_logprob / temperature)
  result = jnp.where(_is_target(probs, targets), by_logprob, 0.0) - probs * by_logprob
  if by_entropy is not None and entropy is not None:
    logs = jnp.log(jnp.where(probs > 0, probs, 1.0))
    result -= probs * (logs + column(entropy)) * column(by_entropy / temperature)
  return result


def _pieces(lazy: LazyLogits) -> int:
  return -(-lazy.hidden.shape[1] // lazy.chunk)


def _scan(piece: Callable[..., Any], carry: Any, arrays: Any, pieces: int) -> tuple[Any, Any]:
  """Runs `piece(carry, arrays) -> (carry, results)` over the tokens, a few at a time."""
  if pieces == 1:
    return piece(carry, arrays)
  carry, results = jax.lax.scan(piece, carry, _cut(arrays, pieces))
  return carry, _join(results, jax.tree.leaves(arrays)[0].shape[1])


def _add(total: Any, params: Any) -> Any:
  return jax.tree.map(lambda t, x: t + x, total, params)


def _zeros(params: Any) -> Any:
  # Summed in float32: params may be bfloat16.
  return jax.tree.map(lambda p: jnp.zeros_like(p, jnp.promote_types(p.dtype, jnp.float32)), params)


def _gradient(lazy: LazyLogits, hidden: jax.Array, params: Any) -> LazyLogits:
  params = jax.tree.map(lambda total, p: total.astype(p.dtype), params, lazy.params)
  return dataclasses.replace(lazy, hidden=hidden, params=params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lazy_scores(lazy: LazyLogits, targets: jax.Array, ask: _Ask) -> TokenScores:
  return _scores_forward(lazy, targets, ask)[0]


def _scores_forward(lazy: LazyLogits, targets: jax.Array, ask: _Ask):
  keep = lazy.hidden.shape[1] <= lazy.kept

  def piece(carry, xs):
    logits = lazy.read_out(lazy.params, xs[0])
    scores, softmax = _measure(logits, xs[1], ask, looked_up=lazy.looked_up)
    return carry, (scores, softmax if keep else softmax._replace(powers=None))

  _, (scores, softmax) = _scan(piece, None, (lazy.hidden, targets), _pieces(lazy))
  return scores, (lazy, targets, softmax, scores.entropy)


def _scores_backward(ask: _Ask, saved, by: TokenScores):
  lazy, targets, softmax, entropy = saved

  def piece(total, xs):
    hidden, targets, softmax, by_logprob, by_entropy, entropy = xs
    # If powers are kept and logits linear in the hidden states, the compiler drops this product.
    logits, pull = jax.vjp(lazy.read_out, lazy.params, hidden)
    if softmax.powers is None:
      differences, _ = _minus(masked.widen(logits) / ask.temperature, softmax.highest)
      softmax = softmax._replace(powers=jnp.exp(differences))
    by = _cotangent(softmax, targets, ask.temperature, by_logprob, by_entropy, entropy)
    by_params, by_hidden = pull(by.astype(logits.dtype))
    return _add(total, by_params), by_hidden

  inputs = (lazy.hidden, targets, softmax, by.logprobs, by.entropy, entropy)
  params, hidden = _scan(piece, _zeros(lazy.params), inputs, _pieces(lazy))
  return _gradient(lazy, hidden, params), None


_lazy_scores.defvjp(_scores_forward, _scores_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _lazy_nll(
  lazy: LazyLogits, targets: jax.Array, weights: jax.Array, ask: _Ask
) -> tuple[jax.Array, TokenScores]:
  scores = _lazy_scores(lazy, targets, ask)
  return _weighted(scores.logprobs, weights), scores


def _nll_forward(lazy: LazyLogits, targets: jax.Array, weights: jax.Array, ask: _Ask):
  def piece(total, xs):
    hidden, targets, weights = xs
    logits, pull = jax.vjp(lazy.read_out, lazy.params, hidden)
    scores, softmax = _measure(logits, targets, ask, looked_up=lazy.looked_up)
    by_logits = _cotangent(softmax, targets, ask.temperature, -weights)
    by_params, by_hidden = pull(by_logits.astype(logits.dtype))
    return _add(total, by_params), (by_hidden, scores)

  inputs = (lazy.hidden, targets, weights)
  params, (hidden, scores) = _scan(piece, _zeros(lazy.params), inputs, _pieces(lazy))
  return (_weighted(scores.logprobs, weights), scores), _gradient(lazy, hidden, params)


def _nll_backward(ask: _Ask, gradient: LazyLogits, by):
  del ask
  return jax.tree.map(lambda g: (by[0] * g).astype(g.dtype), gradient), None, None


_lazy_nll.defvjp(_nll_forward, _nll_backward)


def token_logprobs(logits: Logits, targets: jax.Array) -> jax.Array:
  """Log-probability of each target under the logits at the same position.

  Nothing is shifted: `logits[..., t, :]` must be the distribution of `targets[..., t]`. For the
  logits of a causal model over its input, use `next_token_logprobs`.

  Args:
    logits: [..., T, V] float.
    targets: [..., T] int, each in `[0, V)`.

  Returns:
    [..., T] float32 (float64 for float64 logits).

  Raises:
    AssertionError: If the shapes do not match.
  """
  return token_scores(logits, targets).logprobs


def next_token_logprobs(logits: Logits, tokens: jax.Array) -> jax.Array:
  """Log-probability of every token given the ones before it.

  Args:
    logits: [B, T, V] float, `logits[:, t]` predicts `tokens[:, t + 1]`.
    tokens: [B, T] int.

  Returns:
    [B, T] float32. Column 0 has no prediction and is 0.
  """
  chex.assert_rank(tokens, 2)
  return next_token_scores(logits, tokens).logprobs


def entropy(logits: Logits) -> jax.Array:
  """Entropy of the softmax, in nats.

  Args:
    logits: [..., V] float; -inf entries have probability 0 and add nothing.

  Returns:
    [...] float32.
  """
  shape = logits.hidden.shape[:-1] if isinstance(logits, LazyLogits) else logits.shape[:-1]
  return token_scores(logits, jnp.zeros(shape, jnp.int32), entropy=True).entropy
