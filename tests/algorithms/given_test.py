"""Reading of given responses: tokens, scores and preferences, padded and packed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import given
from rlhf_jax.types import RankingBatch, TokenBatch
from tests.algorithms import toy
from tests.testing import pack

B, T = 6, 9
LAYOUT = [[3, 0], [5], [1, 2], [4]]
POLICY, JUDGE = toy.params_of(), toy.score_params()
read_tokens = jax.jit(given.read_tokens, static_argnums=0, static_argnames="collision")
read_scores = jax.jit(given.read_scores, static_argnums=0)
read_preferences = jax.jit(given.read_preferences, static_argnums=0)


def slow_tables(params, tokens):
  """Log-probabilities [T, V] after each token of one sequence, in float64."""
  logits = np.float64(toy.language(params, jnp.asarray(tokens)[None]))[0]
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("leading", [(B,), (B, 2)])
def test_tokens_are_those_of_single_sequences(leading):
  batch = toy.token_batch(*leading)
  logprobs, mask, collision = read_tokens(toy.language, POLICY, batch, collision=True)
  assert logprobs.shape == mask.shape == collision.shape == (*leading, T)
  np.testing.assert_array_equal(mask, batch.mask)
  for i in np.ndindex(leading):
    length = np.flatnonzero(batch.mask[i])[-1] + 1
    table = slow_tables(POLICY, batch.tokens[i][:length])
    for t in np.flatnonzero(batch.mask[i]):
      np.testing.assert_allclose(logprobs[i][t], table[t - 1, batch.tokens[i][t]], atol=1e-5)
      same = np.log(np.sum(np.exp(table[t - 1]) ** 2))
      np.testing.assert_allclose(collision[i][t], same, atol=1e-5)


def test_collision_has_no_gradient():
  batch = toy.token_batch(B)
  total = lambda params: jnp.sum(  # noqa: E731
    given.read_tokens(toy.language, params, batch, collision=True)[2]
  )
  grads = jax.jit(jax.grad(total))(POLICY)
  assert not any(np.any(x) for x in jax.tree.leaves(grads))
  assert len(given.read_tokens(toy.language, POLICY, batch)) == 2


def test_the_first_token_of_a_sequence_is_not_predicted():
  batch = toy.token_batch(B)
  batch = batch._replace(mask=np.ones_like(batch.mask))
  _, mask = read_tokens(toy.language, POLICY, batch)
  np.testing.assert_array_equal(mask, np.arange(T) > np.zeros((B, 1)))
  _, mask = read_tokens(toy.language, POLICY, pack(batch, LAYOUT, 2 * T))
  assert sorted(np.asarray(mask).sum(axis=1)) == [0] * 6 + [T - 1] * 6


@pytest.mark.parametrize("sides", [(), (2,)])
def test_packed_tokens_are_those_of_rows_of_their_own(sides):
  batch = toy.token_batch(B, *sides)
  packed = pack(batch, LAYOUT, 2 * T)
  want = read_tokens(toy.language, POLICY, batch, collision=True)
  result = read_tokens(toy.language, POLICY, packed, collision=True)
  places = packed.real.shape[1]
  for row, members in enumerate(LAYOUT):
    for place in range(places):
      logprobs, mask, collision = (np.asarray(x)[row * places + place] for x in result)
      if place >= len(members):
        assert not mask.any()
        continue
      n = members[place]
      for x, y in ((logprobs, want[0]), (collision, want[2])):
        np.testing.assert_allclose(x[mask], np.asarray(y)[n][batch.mask[n]], atol=1e-5)


def test_scores_are_read_at_the_end_of_each_response():
  batch = toy.token_batch(B, 3)
  scores = read_scores(toy.scores, JUDGE, batch)
  assert scores.shape == (B, 3)
  for i in np.ndindex(B, 3):
    n = np.flatnonzero(batch.mask[i])[-1] + 1
    single = toy.scores(JUDGE, jnp.asarray(batch.tokens[i][:n])[None])[0, -1]
    np.testing.assert_allclose(scores[i], single, atol=1e-5)


@pytest.mark.parametrize("extra", [1, 6])
def test_scores_do_not_depend_on_right_padding(extra):
  batch = toy.token_batch(B, 2)
  wide = ((0, 0), (0, 0), (0, extra))
  padded = TokenBatch(np.pad(batch.tokens, wide, constant_values=13), np.pad(batch.mask, wide))
  want = read_scores(toy.scores, JUDGE, batch)
  np.testing.assert_allclose(read_scores(toy.scores, JUDGE, padded), want, atol=1e-5)


def test_packed_scores_are_those_of_rows_of_their_own():
  batch = toy.token_batch(B, 2)
  packed = pack(batch, LAYOUT, 2 * T)
  want = read_scores(toy.scores, JUDGE, batch)
  result = np.asarray(read_scores(toy.scores, JUDGE, packed))
  order = [n for members in LAYOUT for n in members]
  np.testing.assert_allclose(result[packed.real.reshape(-1)], want[jnp.array(order)], atol=1e-5)
  assert not result[~packed.real.reshape(-1)].any()


def test_each_response_of_a_ranking_is_read_once():
  batch, calls = toy.token_batch(B, 4), []
  real = np.arange(4) < np.array([4, 2, 3, 4, 1, 2])[:, None]
  ranking = RankingBatch(batch.tokens, batch.mask & real[..., None], np.zeros((B, 4)), real)

  def apply(params, tokens):
    calls.append(tokens.shape)
    return params * tokens

  scores = given.read_scores(apply, jnp.float32(0.1), ranking)
  assert calls == [(B * 4, T)]
  assert scores.shape == (B, 4)
  np.testing.assert_array_equal(scores != 0, real)


def both_orders(prompt, a, b, length):
  tokens, mask = np.zeros((2, length), np.int32), np.zeros((2, length), bool)
  for row, answers in enumerate(([*a, *b], [*b, *a])):
    ids = [*prompt, *answers]
    tokens[row, : len(ids)] = ids
    mask[row, len(prompt) : len(ids)] = True
  return tokens, mask


def comparisons(length=16, swapped=False):
  """Tokens and mask of pairs of responses to one prompt, in both orders."""
  rng = np.random.default_rng(0)
  texts = [[*rng.integers(3, toy.V, n), 2] for n in (1, 2, 3, 4)]
  pairs = [pair[::-1] if swapped else pair for pair in itertools.permutations(texts, 2)]
  return tuple(
    np.stack(x) for x in zip(*(both_orders([5, 6], a, b, length) for a, b in pairs), strict=True)
  )


def test_exchanging_the_responses_changes_the_sign_of_a_preference():
  there = read_preferences(toy.scores, JUDGE, *comparisons())
  back = read_preferences(toy.scores, JUDGE, *comparisons(swapped=True))
  assert np.abs(there).max() > 0.1
  np.testing.assert_array_equal(there, -back)
  np.testing.assert_allclose(jax.nn.sigmoid(there) + jax.nn.sigmoid(back), 1.0, atol=1e-7)


def test_padding_changes_no_preference():
  short, long = comparisons(), comparisons(24)
  long[0][~np.pad(short[0] != 0, ((0, 0), (0, 0), (0, 8)))] = 7
  np.testing.assert_allclose(
    read_preferences(toy.scores, JUDGE, *long),
    read_preferences(toy.scores, JUDGE, *short),
    atol=1e-5,
  )
