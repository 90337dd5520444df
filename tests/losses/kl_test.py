"""The estimators by exact enumeration: expectations are sums over a three-way softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import kl, masked, policy_gradient
from tests.losses import tabular
from tests.losses.case import B, Case, T, V, per_token

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


def test_k3_under_the_importance_ratio_has_the_gradient_of_k2():
  ref_logits = REFERENCES["other"]

  def weighed(logprobs, ref):
    return jnp.exp(logprobs - jax.lax.stop_gradient(logprobs)) * kl.k3(logprobs, ref)

  result = jax.grad(expectation, 1)(weighed, LOGITS, ref_logits)
  want = jax.grad(expectation, 1)(kl.k2, LOGITS, ref_logits)
  np.testing.assert_allclose(result, want, atol=1e-6)


def sequence_kl(params, ref):
  """Exact KL over whole sequences: the negated objective without a score."""
  return -tabular.objective(params, ref, 0.0, 1.0)


def expected_sum(estimator, params, ref):
  losses = estimator(tabular.logprobs(params), tabular.logprobs(ref))
  return jnp.sum(tabular.probabilities(params) * jnp.sum(losses, axis=1))


def test_reverse_kl_loss_is_the_kl_of_sequences_with_its_gradient():
  params, ref = tabular.draw(0), tabular.draw(1)

  def loss(logprobs, ref_logprobs):
    return kl.reverse_kl_loss(logprobs, ref_logprobs, tabular.MASK)

  value, grad = jax.value_and_grad(expected_sum, 1)(loss, params, ref)
  exact, exact_grad = jax.value_and_grad(sequence_kl)(params, ref)
  np.testing.assert_allclose(value, exact, rtol=1e-5)
  tabular.assert_same_gradient(grad, exact_grad)


def test_the_kl_in_the_reward_has_the_same_gradient():
  params, ref = tabular.draw(0), tabular.draw(1)

  def loss(logprobs, ref_logprobs):
    penalty = jnp.sum(kl.k1(logprobs, ref_logprobs), axis=1, keepdims=True)
    return policy_gradient.reinforce_loss(logprobs, jnp.broadcast_to(-penalty, logprobs.shape))

  grad = jax.grad(expected_sum, 1)(loss, params, ref)
  tabular.assert_same_gradient(grad, jax.grad(sequence_kl)(params, ref))


@pytest.mark.parametrize("estimator", [kl.k2, kl.k3])
def test_token_losses_leave_out_what_a_token_leads_to(estimator):
  """Exact for the second token, whose prefix is given; the first is not told about the second."""
  params, ref = tabular.draw(0), tabular.draw(1)
  result = jax.grad(expected_sum, 1)(estimator, params, ref)
  exact = jax.grad(sequence_kl)(params, ref)
  assert np.abs(result["start"] - exact["start"]).max() > 0.03
  if estimator is kl.k2:
    np.testing.assert_allclose(result["one"], exact["one"], atol=1e-5)
  else:
    assert np.abs(result["one"] - exact["one"]).max() > 0.03


def test_reverse_kl_loss_by_hand():
  logprobs = jnp.log(jnp.float32([[0.5, 0.25, 0.1]]))
  ref = jnp.log(jnp.float32([[0.25, 0.5, 0.1]]))
  mask = np.array([[True, True, False]])
  value, pull = jax.vjp(lambda x: kl.reverse_kl_loss(x, ref, mask), logprobs)
  np.testing.assert_allclose(value, np.log([[2, 0.5, 1]]), atol=1e-6)
  # The first token answers for log 2 + log 1/2, the second for log 1/2.
  np.testing.assert_allclose(pull(jnp.ones((1, 3)))[0], [[0, -np.log(2), 0]], atol=1e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_full_kl_both_ways_with_gradients(name):
  ref_logits = REFERENCES[name]
  p, q = softmax(LOGITS), softmax(ref_logits)
  np.testing.assert_allclose(kl.full_kl(LOGITS, ref_logits), divergence(p, q), rtol=1e-5)
  np.testing.assert_allclose(kl.full_kl(ref_logits, LOGITS), divergence(q, p), rtol=1e-5)
  reverse = p * (np.log(p) - np.log(q) - divergence(p, q))
  np.testing.assert_allclose(jax.grad(kl.full_kl)(LOGITS, ref_logits), reverse, atol=1e-6)
  np.testing.assert_allclose(jax.grad(kl.full_kl, 1)(ref_logits, LOGITS), p - q, atol=1e-6)


def test_full_kl_of_many_positions_is_what_k1_estimates():
  rng = np.random.default_rng(0)
  logits, ref_logits = 2 * rng.normal(size=(2, 4, 5, 7)).astype(np.float32)
  logprobs, ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
  want = jnp.sum(jnp.exp(logprobs) * kl.k1(logprobs, ref), axis=-1)
  np.testing.assert_allclose(kl.full_kl(logits, ref_logits), want, rtol=1e-4)
  assert (np.asarray(want) > 0).all()


def test_full_kl_of_a_policy_to_itself_is_zero():
  logits = 5 * np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
  np.testing.assert_array_equal(kl.full_kl(logits, logits), np.zeros(4))
  np.testing.assert_allclose(kl.full_kl(logits, logits + 30), np.zeros(4), atol=1e-5)


def test_full_kl_of_tokens_that_cannot_be():
  cut = np.float32([0.3, -np.inf, 0.5])
  value, grads = jax.value_and_grad(kl.full_kl, (0, 1))(cut, LOGITS)
  p, q = softmax(cut), softmax(LOGITS)
  np.testing.assert_allclose(value, divergence(p[[0, 2]], q[[0, 2]]), rtol=1e-5)
  assert np.isfinite(grads).all()
  np.testing.assert_allclose(grads[1], q - p, atol=1e-6)
  np.testing.assert_allclose(kl.full_kl(cut, cut), 0.0, atol=1e-7)
  assert kl.full_kl(LOGITS, cut) == np.inf


def jensen_shannon(p, q, weight):
  """Equation 1 of arXiv 2306.13649."""
  m = weight * p + (1 - weight) * q
  return weight * divergence(p, m) + (1 - weight) * divergence(q, m)


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", REFERENCES)
def test_full_jsd_with_gradients(name, weight):
  ref_logits = REFERENCES[name]
  value, grads = jax.value_and_grad(kl.full_jsd, (0, 1))(LOGITS, ref_logits, weight=weight)
  sides = [softmax(LOGITS), softmax(ref_logits)]
  np.testing.assert_allclose(value, jensen_shannon(*sides, weight), rtol=1e-5)
  m = weight * sides[0] + (1 - weight) * sides[1]
  for grad, side, share in zip(grads, sides, (weight, 1 - weight), strict=True):
    # Of the mixture only the side itself has a gradient: the others sum to that of 1.
    want = share * side * (np.log(side / m) - divergence(side, m))
    np.testing.assert_allclose(grad, want, atol=1e-6)
    assert np.abs(want).max() > 1e-3


def test_full_jsd_tends_to_both_kls():
  p, q = softmax(LOGITS), softmax(REFERENCES["other"])
  ends = [(1e-3, divergence(p, q)), (1 - 1e-3, divergence(q, p))]
  for weight, want in ends:
    value = kl.full_jsd(LOGITS, REFERENCES["other"], weight=weight) / min(weight, 1 - weight)
    np.testing.assert_allclose(value, want, rtol=5e-3)


def test_full_jsd_of_tokens_that_cannot_be():
  cut, other = np.float32([[0.3, -np.inf, 0.5, -np.inf], [0.1, 0.2, -np.inf, -np.inf]])
  value, grads = jax.value_and_grad(kl.full_jsd, (0, 1))(cut, other, weight=0.3)
  p, q = softmax(cut), softmax(other)
  m = 0.3 * p + 0.7 * q
  want = 0.3 * divergence(p[[0, 2]], m[[0, 2]]) + 0.7 * divergence(q[:2], m[:2])
  np.testing.assert_allclose(value, want, rtol=1e-5)
  assert np.isfinite(grads).all()
  assert 0 < kl.full_jsd(np.float32([0, -np.inf]), np.float32([-np.inf, 0])) <= np.log(2) + 1e-6
  np.testing.assert_allclose(kl.full_jsd(cut, cut), 0.0, atol=1e-7)


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


@pytest.mark.parametrize("estimator", [kl.k1, kl.k2, kl.k3, kl.full_kl, kl.full_jsd])
def test_bad_shapes_are_refused(estimator):
  with pytest.raises(AssertionError):
    estimator(jnp.zeros((3, 4)), jnp.zeros(4))


def reverse_kl(mask, logprobs, ref_logprobs):
  return jnp.sum(kl.reverse_kl_loss(logprobs, ref_logprobs, mask))


def full_kl(mask, logits, ref_logits):
  return masked.masked_mean(kl.full_kl(logits, ref_logits), mask)


def full_jsd(mask, logits, ref_logits, *, weight):
  return masked.masked_mean(kl.full_jsd(logits, ref_logits, weight=weight), mask)


CASES = {name: per_token(getattr(kl, name), 2) for name in ("k1", "k2", "k3")} | {
  "reverse_kl_loss": Case(reverse_kl, ((B, T),) * 2),
  "full_kl": Case(full_kl, ((B, T, V),) * 2),
  "full_jsd": Case(full_jsd, ((B, T, V),) * 2, hyper={"weight": 0.3}),
}


@pytest.mark.parametrize("log_ratio", [-75.0, -40.0, -21.0, -3.0, 0.0, 5.0, 60.0])
def test_k3_is_that_of_float64_as_far_as_float32_goes(log_ratio):
  value, grad = jax.value_and_grad(kl.k3)(jnp.float32(log_ratio), jnp.float32(0.0))
  np.testing.assert_allclose(value, np.expm1(-np.float64(log_ratio)) + log_ratio, rtol=1e-5)
  np.testing.assert_allclose(grad, -np.expm1(-np.float64(log_ratio)), rtol=1e-5)
