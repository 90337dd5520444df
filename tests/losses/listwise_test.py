import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import listwise, preference, reward
from tests.losses.case import B, Case, K, squash


def ragged(n=6, k=5, arrays=1, seed=0):
  """Rows of k responses, of which some are padding, anywhere: all, one and none of them too."""
  rng = np.random.default_rng(seed)
  mask = rng.random((n, k)) < 0.7
  mask[0], mask[1], mask[2] = True, np.arange(k) == 2, False
  return *rng.normal(size=(arrays, n, k)).astype(np.float32), mask


def by_row(oracle, arrays, mask):
  """The oracle of each row's real responses."""
  return [oracle(*(x[b][mask[b]].astype(np.float64) for x in arrays)) for b in range(len(mask))]


def check(loss, oracle, arrays, mask):
  """Values by loops over the real responses, gradients of the first array by differences."""
  np.testing.assert_allclose(
    loss(*arrays, mask), by_row(oracle, arrays, mask), rtol=1e-4, atol=1e-5
  )
  grad = jax.grad(lambda x: jnp.sum(loss(x, *arrays[1:], mask)))(arrays[0])
  step, wide = 1e-6, arrays[0].astype(np.float64)
  for b, i in np.ndindex(*mask.shape):
    moved = [wide.copy(), wide.copy()]
    moved[0][b, i] -= step
    moved[1][b, i] += step
    low, high = (by_row(oracle, [x, *arrays[1:]], mask)[b] for x in moved)
    np.testing.assert_allclose(grad[b, i], (high - low) / (2 * step), atol=2e-4)


def plackett_luce(scores):
  total = 0.0
  for k in range(len(scores)):
    total -= np.log(np.exp(scores[k]) / np.sum(np.exp(scores[k:])))
  return total


@pytest.mark.parametrize("seed", range(3))
def test_plackett_luce_matches_loops(seed):
  scores, mask = ragged(seed=seed)
  check(listwise.plackett_luce_loss, plackett_luce, [scores], mask)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_plackett_luce_is_a_distribution_over_rankings(k):
  scores = np.random.default_rng(k).normal(size=k).astype(np.float32)
  rankings = np.array([scores[list(order)] for order in itertools.permutations(range(k))])
  # A fifth of the columns is padding.
  padded = np.concatenate([rankings, np.full((len(rankings), 1), np.nan, np.float32)], axis=1)
  loss = listwise.plackett_luce_loss(padded, np.isfinite(padded))
  np.testing.assert_allclose(np.sum(np.exp(-loss)), 1.0, rtol=1e-5)


def test_plackett_luce_of_two_is_bradley_terry():
  scores = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
  loss = listwise.plackett_luce_loss(scores, np.ones((6, 2), bool))
  np.testing.assert_allclose(loss, reward.bradley_terry_loss(*scores.T), rtol=1e-5)
  # And of implicit rewards it is DPO.
  policy, ref = np.random.default_rng(1).normal(size=(2, 6, 2)).astype(np.float32)
  loss = listwise.plackett_luce_loss(0.3 * (policy - ref), np.ones((6, 2), bool))
  np.testing.assert_allclose(loss, preference.dpo_loss(*policy.T, *ref.T, beta=0.3), rtol=1e-5)


def test_plackett_luce_ignores_a_common_shift():
  scores, mask = ragged()
  loss = listwise.plackett_luce_loss
  np.testing.assert_allclose(loss(scores + 7, mask), loss(scores, mask), atol=1e-5)


def pro(scores, rewards):
  total = 0.0
  for k in range(len(scores) - 1):
    gaps = [rewards[k] - rewards[i] for i in range(k + 1, len(scores))]
    own = np.exp(scores[k] * max(gaps))
    others = sum(np.exp(scores[k + 1 + i] * gap) for i, gap in enumerate(gaps))
    total -= np.log(own / (own + others))
  return total


def ranked(n=6, k=5, seed=0):
  scores, rewards, mask = ragged(n, k, 2, seed)
  return scores - 2, -np.sort(-rewards, axis=1), mask


@pytest.mark.parametrize("seed", range(3))
def test_pro_matches_loops(seed):
  scores, rewards, mask = ranked(seed=seed)
  check(listwise.pro_loss, pro, [scores, rewards], mask)


def test_pro_of_two_is_bradley_terry_sharpened_by_the_gap():
  scores, rewards, _ = ranked(k=2)
  mask = np.ones((6, 2), bool)
  gap = rewards[:, 0] - rewards[:, 1]
  want = np.logaddexp(0.0, -gap * (scores[:, 0] - scores[:, 1]))
  np.testing.assert_allclose(listwise.pro_loss(scores, rewards, mask), want, rtol=1e-5)


def test_pro_reads_differences_of_rewards_at_their_scale():
  scores, rewards, mask = ranked()
  loss = listwise.pro_loss(scores, rewards, mask)
  np.testing.assert_allclose(listwise.pro_loss(scores, rewards + 7, mask), loss, atol=1e-4)
  assert np.abs(listwise.pro_loss(scores, 2 * rewards, mask) - loss)[0] > 0.1
  assert not np.any(jax.grad(lambda r: jnp.sum(listwise.pro_loss(scores, r, mask)))(rewards))


def test_pro_of_equal_rewards_is_log_factorial_without_gradient():
  scores, mask = ragged()

  def loss(scores):
    return listwise.pro_loss(scores, jnp.full((6, 5), 1.5), mask)

  want = [np.sum(np.log(np.arange(1, n + 1))) for n in mask.sum(axis=1)]
  np.testing.assert_allclose(loss(scores), want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(jax.grad(lambda s: jnp.sum(loss(s)))(scores), np.zeros((6, 5)))


def test_pro_of_integer_rewards():
  scores, mask = ragged()
  rewards = np.tile(np.arange(5)[::-1], (6, 1))
  np.testing.assert_array_equal(
    listwise.pro_loss(scores, rewards.astype(np.int32), mask),
    listwise.pro_loss(scores, rewards.astype(np.float32), mask),
  )


def rrhf(scores):
  pairs = itertools.combinations(scores, 2)
  return sum(max(0.0, worse - better) for better, worse in pairs)


@pytest.mark.parametrize("seed", range(3))
def test_rrhf_matches_loops(seed):
  scores, mask = ragged(seed=seed)
  check(listwise.rrhf_loss, rrhf, [scores], mask)


def test_rrhf_of_scores_in_order_is_zero():
  scores = -np.sort(-ragged()[0], axis=1)
  assert (listwise.rrhf_loss(scores, np.ones((6, 5), bool)) == 0).all()


def brain(policy, ref, proposal, rewards, beta=0.5):
  target, model = np.exp(rewards / beta + ref - proposal), np.exp(policy - proposal)
  target, model = target / target.sum(), model / model.sum()
  return -sum(a * np.log(m) for a, m in zip(target, model, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_brain_matches_loops(seed):
  *arrays, mask = ragged(arrays=4, seed=seed)
  check(functools.partial(listwise.brain_loss, beta=0.5), brain, arrays, mask)
  grads = jax.grad(lambda *x: jnp.sum(listwise.brain_loss(*x, mask)), (1, 2, 3))(*arrays)
  assert not any(np.any(g) for g in grads)


def test_brain_of_two_with_a_certain_target_is_dpo():
  policy, ref = np.random.default_rng(0).normal(size=(2, 6, 2)).astype(np.float32)
  rewards = np.tile(np.int32([3, -3]), (6, 1))

  def loss(policy):
    return listwise.brain_loss(policy, ref, ref, rewards, np.ones((6, 2), bool), beta=0.01)

  def dpo(policy):
    return preference.dpo_loss(*policy.T, *ref.T, beta=1.0)

  np.testing.assert_allclose(loss(policy), dpo(policy), rtol=1e-5)
  grads = [jax.grad(lambda x, f=f: jnp.sum(f(x)))(policy) for f in (loss, dpo)]
  np.testing.assert_allclose(*grads, rtol=1e-5, atol=1e-6)


def test_brain_is_stationary_at_the_tilted_reference():
  ref, proposal, rewards, mask = ragged(arrays=3)
  grad = jax.grad(
    lambda policy: jnp.sum(listwise.brain_loss(policy, ref, proposal, rewards, mask, beta=0.5))
  )
  # Up to the normaliser, which every response of a row has in common.
  optimum = ref + rewards / 0.5 - 1.7
  np.testing.assert_allclose(grad(optimum), np.zeros((6, 5)), atol=1e-6)
  assert np.abs(grad(ref)).max() > 0.1
  # The loss there is the entropy of the target: no policy does better.
  loss = functools.partial(listwise.brain_loss, beta=0.5)
  at_optimum = loss(optimum, ref, proposal, rewards, mask)
  assert (at_optimum <= loss(ref, ref, proposal, rewards, mask) + 1e-6).all()


def test_brain_reads_differences_of_rewards():
  *arrays, rewards, mask = ragged(arrays=4)
  shift = np.arange(6, dtype=np.float32)[:, None]
  np.testing.assert_allclose(
    listwise.brain_loss(*arrays, rewards + shift, mask),
    listwise.brain_loss(*arrays, rewards, mask),
    rtol=1e-4,
    atol=1e-5,
  )


def wins(n=6, k=5, seed=1):
  raw = np.random.default_rng(seed).normal(size=(n, k, k))
  return (1 / (1 + np.exp(np.swapaxes(raw, 1, 2) - raw))).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_all_pairs_regression_matches_pairs(seed):
  policy, ref, mask = ragged(arrays=2, seed=seed)
  target = (wins() - 0.5) / 0.3
  want = np.zeros(6)
  for b in range(6):
    losses = [
      preference.pair_regression_loss(*(np.atleast_1d(x) for x in arrays))[0]
      for i, j in itertools.combinations(np.flatnonzero(mask[b]), 2)
      for arrays in [(policy[b, i], policy[b, j], ref[b, i], ref[b, j], target[b, i, j])]
    ]
    want[b] = np.mean(losses) if losses else 0.0
  result = listwise.all_pairs_regression_loss(policy, ref, target, mask)
  np.testing.assert_allclose(result, want, rtol=1e-5)
  # The preferences are antisymmetric, so that the order of the responses has no effect.
  reversed_ = [x[:, ::-1] for x in (policy, ref)]
  result = listwise.all_pairs_regression_loss(*reversed_, target[:, ::-1, ::-1], mask[:, ::-1])
  np.testing.assert_allclose(result, want, rtol=1e-4)
  grads = jax.grad(lambda *x: jnp.sum(listwise.all_pairs_regression_loss(*x, mask)), (0, 1, 2))(
    policy, ref, target
  )
  np.testing.assert_allclose(np.sum(grads[0], axis=1), np.zeros(6), atol=1e-4)
  np.testing.assert_allclose(grads[0], -grads[1], rtol=1e-6)
  assert not np.any(grads[2])


def test_all_pairs_regression_ignores_targets_of_padding():
  policy, ref, mask = ragged(arrays=2)
  target = wins()
  real = mask[:, :, None] & mask[:, None, :]
  np.testing.assert_array_equal(
    listwise.all_pairs_regression_loss(policy, ref, np.where(real, target, np.nan), mask),
    listwise.all_pairs_regression_loss(policy, ref, target, mask),
  )


@pytest.mark.parametrize("shape", [(3, 1), (3,)])
@pytest.mark.parametrize(
  "function, arrays",
  [
    (listwise.plackett_luce_loss, 1),
    (listwise.pro_loss, 2),
    (listwise.rrhf_loss, 1),
    (listwise.brain_loss, 4),
  ],
)
def test_bad_shapes_are_refused(function, arrays, shape):
  with pytest.raises(AssertionError):
    function(*(jnp.zeros((3, 2)),) * arrays, jnp.ones(shape, bool))


@pytest.mark.parametrize("shape", [(3, 2, 3), (3, 3, 2), (3, 2, 1), (3, 2)])
def test_bad_shapes_of_targets_are_refused(shape):
  x = jnp.zeros((3, 2))
  with pytest.raises(AssertionError):
    listwise.all_pairs_regression_loss(x, x, jnp.zeros(shape), jnp.ones((3, 2), bool))


def over_rows(function, n, **hyper):
  """A function of n arrays [B, K] and their mask."""
  call = lambda m, *x, **hyper: squash(function(*x, m, **hyper))  # noqa: E731
  return Case(call, ((B, K),) * n, mask_shape=(B, K), hyper=hyper)


def ranked_pro(logprobs, mask):
  rewards = -jax.lax.broadcasted_iota(jnp.float32, logprobs.shape, 1)
  return listwise.pro_loss(logprobs, rewards, mask)


def all_pairs(policy, ref, mask):
  place = jax.lax.broadcasted_iota(jnp.float32, (*policy.shape, K), 1)
  return listwise.all_pairs_regression_loss(policy, ref, jnp.cos(place), mask)


CASES = {
  "plackett_luce_loss": over_rows(listwise.plackett_luce_loss, 1),
  "pro_loss": over_rows(ranked_pro, 1),
  "pro_loss/rewards": over_rows(listwise.pro_loss, 2),
  "rrhf_loss": over_rows(listwise.rrhf_loss, 1),
  "brain_loss": over_rows(listwise.brain_loss, 4, beta=0.5),
  "all_pairs_regression_loss": over_rows(all_pairs, 2),
}
