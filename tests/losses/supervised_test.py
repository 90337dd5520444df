import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses import masked, supervised
from tests.losses.case import B, Case, T, V


def test_nll_matches_float64():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 5, 7)).astype(np.float32)
  tokens = rng.integers(7, size=(3, 5))
  want = np.zeros((3, 5))
  for b in range(3):
    for t in range(1, 5):
      row = logits[b, t - 1].astype(np.float64)
      want[b, t] = np.log(np.sum(np.exp(row))) - row[tokens[b, t]]
  result = supervised.nll(logits, tokens)
  np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-6)
  assert result.dtype == jnp.float32


def test_nll_of_uniform_logits_is_log_v():
  tokens = np.arange(12).reshape(3, 4) % 5
  result = supervised.nll(jnp.zeros((3, 4, 5)), tokens)
  np.testing.assert_allclose(result[:, 1:], np.full((3, 3), np.log(5)), rtol=1e-6)
  np.testing.assert_array_equal(result[:, 0], np.zeros(3))


def test_gradient_is_softmax_minus_one_hot_of_the_next_token():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(2, 4, 5)).astype(np.float32)
  tokens = rng.integers(5, size=(2, 4))
  mask = np.array([[False, False, True, True], [False, True, True, False]])
  grad = jax.grad(lambda x: masked.masked_mean(supervised.nll(x, tokens), mask))(logits)
  want = np.zeros((2, 4, 5))
  for b, t in zip(*np.nonzero(mask), strict=True):
    e = np.exp(logits[b, t - 1].astype(np.float64))
    want[b, t - 1] = (e / e.sum() - np.eye(5)[tokens[b, t]]) / mask.sum()
  np.testing.assert_allclose(grad, want, atol=1e-6)


def nll(mask, logits):
  tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape[:-1], 1) % V
  # Scored positions t read the logits at t - 1: here the mask is that of the logits.
  return masked.masked_mean(supervised.nll(logits, tokens)[:, 1:], mask[:, :-1])


CASES = {"nll": Case(nll, ((B, T, V),))}
