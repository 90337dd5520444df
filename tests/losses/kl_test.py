"""The estimators by exact enumeration: expectations are sums over a three-way softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import kl
from tests.losses.case import per_token

LOGITS = np.float32([0.3, -0.2, 0.5])
REFERENCES = {"uniform": np.float32([0.0, 0.0, 0.0]), "other": np.float32([-0.4, 0.9, 0.1])}


def softmax(x):
  e = np.exp(np.asarray(x, np.float64))
  return e / e.sum()


def divergence(p, q):
  return float(np.sum(p * (np.log(p) - np.log(q))))


def expectation(estimator, logits, ref_logits):
  """`E[estimator]` over tokens drawn from the policy, whose weights carry no gradient."""
  logprobs, ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
  return jnp.sum(jax.lax.stop_gradient(jnp.exp(logprobs)) * estimator(logprobs, ref))


@pytest.mark.parametrize("name", REFERENCES)
def test_expected_values(name):
  ref_logits = REFERENCES[name]
  p, q = softmax(LOGITS), softmax(ref_logits)
  exact = divergence(p, q)
  np.testing.assert_allclose(expectation(kl.k1, LOGITS, ref_logits), exact, rtol=1e-5)
  np.testing.assert_allclose(expectation(kl.k3, LOGITS, ref_logits), exact, rtol=1e-5)
  half_square = np.sum(p * 0.5 * (np.log(p) - np.log(q)) ** 2)
  np.testing.assert_allclose(expectation(kl.k2, LOGITS, ref_logits), half_square, rtol=1e-5)


def test_k2_is_biased_but_close_when_policies_are():
  near = LOGITS + np.float32([0.01, -0.02, 0.015])
  exact = divergence(softmax(near), softmax(LOGITS))
  np.testing.assert_allclose(expectation(kl.k2, near, LOGITS), exact, rtol=0.02)
  far = divergence(softmax(LOGITS), softmax(REFERENCES["other"]))
  assert abs(expectation(kl.k2, LOGITS, REFERENCES["other"]) - far) > 0.02 * far


@pytest.mark.parametrize("name", REFERENCES)
def test_expected_gradients_as_losses(name):
  ref_logits = REFERENCES[name]
  p, q = softmax(LOGITS), softmax(ref_logits)
  reverse = p * (np.log(p) - np.log(q) - divergence(p, q))  # Of KL(pi || ref) in the logits.
  forward = p - q  # Of KL(ref || pi).
  grads = {k: jax.grad(expectation, 1)(k, LOGITS, ref_logits) for k in (kl.k1, kl.k2, kl.k3)}
  np.testing.assert_allclose(grads[kl.k1], np.zeros(3), atol=1e-7)
  np.testing.assert_allclose(grads[kl.k2], reverse, atol=1e-6)
  np.testing.assert_allclose(grads[kl.k3], forward, atol=1e-6)
  # Neither is the other, so that nobody may swap them unseen.
  assert np.abs(reverse - forward).max() > 0.01


def test_gradients_against_known_numbers():
  uniform = REFERENCES["uniform"]
  k2 = jax.grad(expectation, 1)(kl.k2, LOGITS, uniform)
  k3 = jax.grad(expectation, 1)(kl.k3, LOGITS, uniform)
  np.testing.assert_allclose(k2, [0.00738, -0.10277, 0.09539], atol=1e-5)
  np.testing.assert_allclose(k3, [0.02028, -0.11885, 0.09857], atol=1e-5)


@pytest.mark.parametrize("log_ratio", [-200.0, -90.0, 90.0, 200.0])
@pytest.mark.parametrize("estimator", [kl.k1, kl.k2, kl.k3])
def test_extreme_ratios_are_finite(estimator, log_ratio):
  value, grad = jax.value_and_grad(estimator)(jnp.float32(log_ratio), jnp.float32(0.0))
  assert np.isfinite(value)
  assert np.isfinite(grad)
  if estimator is not kl.k1:
    assert value > 0


def test_sign_and_zero():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 4, 5)).astype(np.float32)
  for estimator in (kl.k2, kl.k3):
    assert (np.asarray(estimator(a, b)) >= 0).all()
  for estimator in (kl.k1, kl.k2, kl.k3):
    np.testing.assert_array_equal(estimator(a, a), np.zeros((4, 5)))
  # The ratio is read the right way round: a token the policy likes more counts positive.
  assert kl.k1(jnp.float32(-1.0), jnp.float32(-2.0)) == 1


def test_k3_keeps_small_values():
  # e^-l - 1 + l is l^2 / 2 near 0, which a difference of float32 exponentials would lose.
  small = np.float32([1e-2, -3e-3])
  want = np.expm1(-small.astype(np.float64)) + small
  np.testing.assert_allclose(kl.k3(small, np.zeros(2, np.float32)), want, rtol=1e-3)


@pytest.mark.parametrize("estimator", [kl.k1, kl.k2, kl.k3])
def test_bad_shapes_are_refused(estimator):
  with pytest.raises(AssertionError):
    estimator(jnp.zeros((3, 4)), jnp.zeros(4))


CASES = {name: per_token(getattr(kl, name), 2) for name in ("k1", "k2", "k3")}
