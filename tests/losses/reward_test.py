import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import reward
from tests.losses.case import B, Case, K, per_row, squash


def softplus(x):
  return np.logaddexp(0.0, np.asarray(x, np.float64))


def pair(n=7, seed=0):
  return np.random.default_rng(seed).normal(size=(2, n)).astype(np.float32)


@pytest.mark.parametrize("score", [0.0, -3.0, 50.0])
def test_bradley_terry_of_equal_scores_is_log_2(score):
  x = jnp.full(3, score)
  for smoothing in (0.0, 0.3):
    loss = reward.bradley_terry_loss(x, x, label_smoothing=smoothing)
    np.testing.assert_allclose(loss, np.full(3, np.log(2)), rtol=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.7, np.float32([0, 1, 2, 0, 1, 2, -1])])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bradley_terry_closed_form(margin, smoothing):
  chosen, rejected = pair()
  d = chosen - rejected - margin
  want = (1 - smoothing) * softplus(-d) + smoothing * softplus(d)
  loss = functools.partial(
    reward.bradley_terry_loss, margin=jnp.asarray(margin), label_smoothing=smoothing
  )
  np.testing.assert_allclose(loss(chosen, rejected), want, rtol=1e-5)
  grad = jax.grad(lambda x: jnp.sum(loss(x, rejected)))(chosen)
  np.testing.assert_allclose(grad, 1 / (1 + np.exp(-d)) - (1 - smoothing), atol=1e-6)


@pytest.mark.parametrize("difference", [-200.0, 200.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bradley_terry_of_extreme_scores_is_finite(difference, smoothing):
  def loss(x):
    return jnp.sum(reward.bradley_terry_loss(x, jnp.zeros(1), label_smoothing=smoothing))

  value, grad = jax.value_and_grad(loss)(jnp.full(1, difference))
  wrong = 1 - smoothing if difference < 0 else smoothing
  np.testing.assert_allclose(value, 200 * wrong, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(grad, [np.sign(difference) * wrong], atol=1e-6)


def test_bradley_terry_is_minimal_at_the_smoothed_log_odds():
  odds = np.log(0.9 / 0.1)
  grad = jax.grad(
    lambda x: jnp.sum(reward.bradley_terry_loss(x, jnp.zeros(1), label_smoothing=0.1))
  )(jnp.full(1, odds))
  np.testing.assert_allclose(grad, [0.0], atol=1e-6)


SOFT = np.float32([0.0, 0.1, 0.4, 0.5, 0.6, 0.97, 1.0])


def test_soft_labels_are_the_cross_entropy_with_the_probability():
  first, second = pair()
  d = np.float64(first) - second
  want = SOFT * softplus(-d) + (1 - SOFT) * softplus(d)
  loss = reward.bradley_terry_loss(first, second, label_smoothing=1 - SOFT)
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  # Either response may be the first.
  swapped = reward.bradley_terry_loss(second, first, label_smoothing=SOFT)
  np.testing.assert_allclose(swapped, want, rtol=1e-5)


@pytest.mark.parametrize(
  "loss",
  [
    lambda gap, p: reward.bradley_terry_loss(gap, jnp.zeros_like(gap), label_smoothing=1 - p),
    reward.binary_loss,
  ],
)
def test_soft_labels_are_met_at_their_log_odds(loss):
  # Labels of a judge that may only say 0.4 to 0.6 hold scores within 0.405.
  labels = SOFT[1:-1]
  odds = np.log(labels / (1 - labels))
  grad = jax.grad(lambda gap: jnp.sum(loss(gap, labels)))(odds)
  np.testing.assert_allclose(grad, np.zeros(5), atol=1e-6)
  np.testing.assert_allclose(odds[[1, 3]], [-0.405, 0.405], atol=1e-3)


def test_binary_loss_closed_form():
  scores, _ = pair()
  want = SOFT * softplus(-scores) + (1 - SOFT) * softplus(scores)
  np.testing.assert_allclose(reward.binary_loss(scores, SOFT), want, rtol=1e-5)
  hard = reward.binary_loss(scores, np.array([True, False, True, True, False, False, True]))
  np.testing.assert_allclose(hard, softplus(-scores * np.float32([1, -1, 1, 1, -1, -1, 1])), 1e-5)


@pytest.mark.parametrize("score", [-200.0, 200.0])
def test_binary_loss_of_extreme_scores_is_finite(score):
  value, grad = jax.value_and_grad(lambda x: jnp.sum(reward.binary_loss(x, jnp.ones(1))))(
    jnp.full(1, score)
  )
  np.testing.assert_allclose(value, max(-score, 0.0), atol=1e-6)
  np.testing.assert_allclose(grad, [-1.0 if score < 0 else 0.0], atol=1e-6)


def test_scores_trained_on_a_share_of_the_negatives_are_calibrated_by_its_log():
  positives, share = 0.02, 0.1
  weights = np.float32([positives, share * (1 - positives)])
  # The score that the kept labels ask for, then the correction.
  trained = np.log(positives / (share * (1 - positives)))
  grad = jax.grad(
    lambda x: jnp.sum(weights * reward.binary_loss(jnp.stack([x, x]), jnp.float32([1, 0])))
  )(jnp.float32(trained))
  np.testing.assert_allclose(grad, 0.0, atol=1e-7)
  np.testing.assert_allclose(1 / (1 + np.exp(-(trained + np.log(share)))), positives, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_ranking_loss_matches_loops(seed):
  rng = np.random.default_rng(seed)
  scores = rng.normal(size=(6, 5)).astype(np.float32)
  ranks = rng.integers(0, 4, size=(6, 5))  # With ties.
  mask = rng.random((6, 5)) < 0.7
  mask[0] = False
  mask[1] = np.arange(5) == 2
  ranks[2] = 1
  want = np.zeros(6)
  for b in range(6):
    losses = []
    for i in range(5):
      for j in range(5):
        if mask[b, i] and mask[b, j] and ranks[b, i] < ranks[b, j]:
          losses.append(softplus(float(scores[b, j]) - float(scores[b, i])))
    want[b] = sum(losses) / max(len(losses), 1)
  np.testing.assert_allclose(reward.ranking_loss(scores, ranks, mask), want, rtol=1e-5)
  assert want[:3].tolist() == [0, 0, 0]  # No pair: empty, alone, all tied.
  grad = jax.grad(lambda s: jnp.sum(reward.ranking_loss(s, ranks, mask)))(scores)
  np.testing.assert_allclose(np.sum(grad, axis=1), np.zeros(6), atol=1e-6)
  assert (np.asarray(grad)[:3] == 0).all()


def test_ranking_two_responses_is_bradley_terry():
  chosen, rejected = pair()
  want = reward.bradley_terry_loss(chosen, rejected)
  mask = np.ones((7, 2), bool)
  ranks = np.tile(np.int32([0, 1]), (7, 1))
  scores = np.stack([chosen, rejected], axis=1)
  np.testing.assert_allclose(reward.ranking_loss(scores, ranks, mask), want, rtol=1e-6)
  # Whichever of the two is in front.
  swapped = reward.ranking_loss(scores[:, ::-1], ranks[:, ::-1], mask)
  np.testing.assert_allclose(swapped, want, rtol=1e-6)


def test_ranking_loss_weighs_prompts_and_not_pairs():
  scores = jnp.zeros((2, 4))
  mask = np.array([[True] * 4, [True, True, False, False]])
  ranks = np.tile(np.arange(4), (2, 1))
  loss = reward.ranking_loss(scores, ranks, mask)
  np.testing.assert_allclose(loss, np.full(2, np.log(2)), rtol=1e-6)


def test_centering_penalty():
  chosen, rejected = pair()
  np.testing.assert_allclose(
    reward.centering_penalty(chosen, rejected), (chosen + rejected) ** 2, rtol=1e-6
  )
  np.testing.assert_array_equal(reward.centering_penalty(chosen, -chosen), np.zeros(7))


def moments_of(batches, masks):
  moments = reward.RunningMoments.zero()
  for x, mask in zip(batches, masks, strict=True):
    moments = reward.update_moments(moments, x, mask)
  return moments


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_running_moments_are_those_of_the_concatenation(offset):
  rng = np.random.default_rng(0)
  sizes = (5, 1, 32, 3)
  batches = [rng.normal(offset + 3 * i, 1 + i, n).astype(np.float32) for i, n in enumerate(sizes)]
  masks = [rng.random(n) < 0.8 for n in sizes]
  masks[1][:] = False  # A batch without any score.
  seen = np.concatenate([x[on] for x, on in zip(batches, masks, strict=True)]).astype(np.float64)
  moments = moments_of(batches, masks)
  assert moments.count == len(seen)
  np.testing.assert_allclose(moments.mean, seen.mean(), rtol=1e-5)
  np.testing.assert_allclose(moments.m2, ((seen - seen.mean()) ** 2).sum(), rtol=1e-3)
  # In any order of the batches.
  other = moments_of(batches[::-1], masks[::-1])
  np.testing.assert_allclose(other.mean, moments.mean, rtol=1e-5)
  np.testing.assert_allclose(other.m2, moments.m2, rtol=1e-3)


def test_moments_of_nothing_are_finite():
  zero = reward.RunningMoments.zero()
  moments = reward.update_moments(zero, jnp.full(3, jnp.nan), jnp.zeros(3, bool))
  assert [float(x) for x in moments] == [0, 0, 0]
  one = reward.update_moments(zero, jnp.full(1, 4.0), jnp.ones(1, bool))
  for bad in (np.nan, np.inf, -np.inf, 1e30, -3e38, 2e16):
    same = reward.update_moments(zero, jnp.float32([bad, 4.0, bad]), jnp.ones(3, bool))
    jax.tree.map(np.testing.assert_array_equal, same, one)
  assert [float(x) for x in one] == [1, 4, 0]
  np.testing.assert_array_equal(reward.normalize_scores(jnp.full(1, 4.0), one), [0.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_masked_score_is_left_out(bad):
  x = np.float32([1.0, bad, 4.0])
  moments = reward.update_moments(reward.RunningMoments.zero(), x, np.array([True, False, True]))
  assert [float(m) for m in moments] == [2, 2.5, 4.5]


def test_normalized_scores_match_numpy():
  x = np.random.default_rng(0).normal(7.0, 3.0, 64).astype(np.float32)
  moments = moments_of([x], [np.ones(64, bool)])
  want = (x - x.mean(dtype=np.float64)) / x.std(dtype=np.float64)
  np.testing.assert_allclose(reward.normalize_scores(x, moments), want, atol=1e-5)


@pytest.mark.parametrize("value", [0.1, 103.3, 1000.7, -3e4])
def test_equal_scores_are_normalised_to_exactly_zero(value):
  batches, masks = np.full((3, 11), value, np.float32), np.ones((3, 11), bool)
  masks[1, :4] = False
  moments = moments_of(batches, masks)
  assert (moments.count, moments.mean, moments.m2) == (29, np.float32(value), 0)
  assert not np.any(reward.normalize_scores(batches[0], moments))


@pytest.mark.parametrize("scale, shift", [(37.0, -12.0), (0.1, 0.0), (1.0, 5.0)])
def test_normalization_is_invariant_to_affine_changes(scale, shift):
  rng = np.random.default_rng(0)
  batches = rng.normal(size=(4, 16)).astype(np.float32)
  masks = np.ones((4, 16), bool)
  want = reward.normalize_scores(batches[-1], moments_of(batches, masks))
  changed = batches * np.float32(scale) + np.float32(shift)
  result = reward.normalize_scores(changed[-1], moments_of(changed, masks))
  np.testing.assert_allclose(result, want, atol=1e-5)


def test_moments_of_history_resist_one_corrupted_score():
  # Among 31 scores of N(0, 1) one of 50: normalising by the batch alone would shrink the others.
  rng = np.random.default_rng(0)
  history = rng.normal(size=20_000).astype(np.float32)
  batch = rng.normal(size=32).astype(np.float32)
  batch[0] = 50.0
  on = np.ones(32, bool)
  before = moments_of([history], [np.ones(20_000, bool)])
  with_history = reward.normalize_scores(batch, reward.update_moments(before, batch, on))
  alone = reward.normalize_scores(batch, moments_of([batch], [on]))

  def share(x):
    x = np.abs(np.clip(x, -1, 1))
    return x[0] / x.sum()

  assert share(with_history) < 0.07 < 0.1 < share(alone)


@pytest.mark.parametrize(
  "function, shapes",
  [
    (reward.bradley_terry_loss, [(3,), (4,)]),
    (reward.bradley_terry_loss, [(3, 1), (3, 1)]),
    (reward.centering_penalty, [(3,), (3, 1)]),
    (reward.binary_loss, [(3,), (3, 1)]),
    (reward.ranking_loss, [(3, 2), (3, 2), (3, 1)]),
    (reward.ranking_loss, [(3,), (3,), (3,)]),
  ],
)
def test_bad_shapes_are_refused(function, shapes):
  with pytest.raises(AssertionError):
    function(*(jnp.zeros(shape) for shape in shapes))


MOMENTS = reward.RunningMoments(jnp.float32(3), jnp.float32(0.5), jnp.float32(2))


def ranking(mask, scores):
  ranks = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) % 3
  return squash(reward.ranking_loss(scores, ranks, mask))


def updated_moments(mask, x):
  after = reward.update_moments(MOMENTS, x, mask)
  return jnp.tanh(after.mean) + jnp.log(after.m2) * after.count


def soft(first, second, labels, **hyper):
  return reward.bradley_terry_loss(first, second, label_smoothing=labels, **hyper)


CASES = {
  "bradley_terry_loss": per_row(reward.bradley_terry_loss, 2, margin=0.1, label_smoothing=0.1),
  "bradley_terry_loss/soft": per_row(soft, 3, margin=0.1),
  "binary_loss": per_row(reward.binary_loss, 2),
  "ranking_loss": Case(ranking, ((B, K),), mask_shape=(B, K)),
  "centering_penalty": per_row(reward.centering_penalty, 2),
  "update_moments": Case(updated_moments, ((B,),), mask_shape=(B,)),
  "normalize_scores": Case(
    lambda m, x, eps: squash(jnp.where(m, reward.normalize_scores(x, MOMENTS, eps=eps), 0.0)),
    ((B,),),
    mask_shape=(B,),
    hyper={"eps": 0.1},
  ),
}
