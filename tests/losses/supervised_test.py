import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses import kl, masked, supervised
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


def best_of(n, policy, order):
  """Distribution of the best of n samples; `order` sorts the responses by reward."""
  below = np.minimum(np.cumsum(policy[order]), 1.0) ** n
  result = np.zeros(len(policy))
  result[order] = np.diff(below, prepend=0.0)
  return result


def test_superhf_keeps_a_share_of_the_reference():
  """Trained on the best of 16 with a forward KL: `(best + kappa ref) / (1 + kappa)` at the end."""
  rng = np.random.default_rng(0)
  reward, ref = rng.normal(size=20), rng.normal(size=20).astype(np.float32)
  order, log_ref = np.argsort(reward), np.float64(jax.nn.log_softmax(ref))

  @jax.jit
  def descend(logits, best, kappa):
    def loss(logits):
      # One position before each of the 20 responses of one token.
      rows = jnp.stack([jnp.broadcast_to(logits[None, :], (20, 20))] * 2, axis=1)
      tokens = jnp.stack([jnp.zeros(20, jnp.int32), jnp.arange(20)], axis=1)
      return jnp.sum(best * supervised.nll(rows, tokens)[:, 1]) + kappa * kl.full_kl(ref, logits)

    return logits - 2.0 * jax.grad(loss)(logits)

  kept, gained = [], []
  for kappa in (0.1, 0.35, 1.0):
    logits = jnp.asarray(ref)
    for _ in range(2000):
      policy = np.float64(jax.nn.softmax(logits))
      logits = descend(logits, np.float32(best_of(16, policy, order)), kappa)
    policy = np.float64(jax.nn.softmax(logits))
    want = (best_of(16, policy, order) + kappa * np.exp(log_ref)) / (1 + kappa)
    np.testing.assert_allclose(policy, want, atol=1e-4)
    kept.append(np.min(policy / np.exp(log_ref)))
    gained.append(policy @ reward)
    np.testing.assert_allclose(kept[-1], kappa / (1 + kappa), rtol=0.02)
  assert gained[0] > gained[1] > gained[2] > np.exp(log_ref) @ reward


def nll(mask, logits):
  tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape[:-1], 1) % V
  # Scored positions t read the logits at t - 1: here the mask is that of the logits.
  return masked.masked_mean(supervised.nll(logits, tokens)[:, 1:], mask[:, :-1])


CASES = {"nll": Case(nll, ((B, T, V),))}
