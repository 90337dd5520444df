import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import advantages, kl, masked, policy_gradient, reward, shaping
from tests.losses.case import B, Case, K, T, squash


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sigmoid(x):
  return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def softmax(x):
  e = np.exp(x - np.max(x))
  return e / e.sum()


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("references", [1, 5])
def test_preference_as_reward_matches_loops(scale, references):
  scores, ref_scores = 3 * normal(6), 3 * normal(6, references)
  want = [
    sum(sigmoid(scale * (float(s) - float(r))) for r in row) / references
    for s, row in zip(scores, ref_scores, strict=True)
  ]
  result = shaping.preference_as_reward(scores, ref_scores, scale=scale)
  np.testing.assert_allclose(result, want, rtol=1e-5)


def test_preference_as_reward_is_bounded_rising_and_blind_to_shifts():
  scores = np.float32([-400, -3, -1, 0, 1, 3, 400])
  ref_scores = np.zeros((7, 4), np.float32) + normal(4)[None, :]
  result = np.asarray(shaping.preference_as_reward(scores, ref_scores))
  assert (result >= 0).all() and (result <= 1).all() and (np.diff(result) > 0).all()
  shifted = shaping.preference_as_reward(scores[1:6] + 50, ref_scores[1:6] + 50)
  np.testing.assert_allclose(shifted, result[1:6], atol=1e-5)
  # Not to the scale: twice the scores is not the same reward.
  doubled = shaping.preference_as_reward(2 * scores[1:6], 2 * ref_scores[1:6])
  assert np.abs(doubled - result[1:6]).max() > 0.05


def best_policy(ref, rewards, divergence):
  """The optimum `ref exp(r / beta)` of the `beta` that spends the given KL."""
  low, high = 1e-3, 1e4
  for _ in range(100):
    beta = np.sqrt(low * high)
    policy = softmax(np.log(ref) + rewards / beta)
    spent = np.sum(policy * (np.log(policy) - np.log(ref)))
    low, high = (beta, high) if spent > divergence else (low, beta)
  return policy


@pytest.mark.parametrize("divergence", [0.25, 0.5, 1.0])
def test_preference_as_reward_resists_a_hacked_reward_model(divergence):
  """At equal KL; with more to spend the advantage goes (2.0 still holds, 3.0 does not)."""
  rng = np.random.default_rng(0)
  ref, gold = softmax(rng.normal(size=200)), rng.normal(size=200)
  proxy = gold + 0.3 * rng.normal(size=200)
  hacked = rng.choice(200, 5, replace=False)
  proxy[hacked] = gold[hacked] + 8
  gold[hacked] -= 3
  # Against every response, weighed by the reference, as it would sample them.
  wins = np.stack(
    [shaping.preference_as_reward(np.float32(proxy), np.full((200, 1), p)) for p in proxy]
  )
  shaped = best_policy(ref, np.float64(ref @ wins), divergence)
  raw = best_policy(ref, proxy, divergence)
  assert shaped @ gold > raw @ gold + 0.3
  assert shaped[hacked].sum() < raw[hacked].sum()


def test_log_sigmoid_reward():
  scores, anchors = 3 * normal(2, 8)
  result = shaping.log_sigmoid_reward(scores, anchors)
  np.testing.assert_allclose(result, np.log(sigmoid(scores - anchors)), rtol=1e-5)
  far = shaping.log_sigmoid_reward(np.float32([-200, 200]), np.zeros(2, np.float32))
  np.testing.assert_allclose(far, [-200, 0], atol=1e-6)


def test_min_max():
  scores = np.float32([-3, -1, 0, 1, 3])
  result = shaping.min_max(scores, jnp.float32(-1), jnp.float32(1))
  np.testing.assert_array_equal(result, [0, 0, 0.5, 1, 1])
  np.testing.assert_array_equal(shaping.min_max(scores, scores[1], scores[1]), np.zeros(5))


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_clip_to_moments(width):
  scores = 2 + 3 * normal(500)
  everything = np.ones(500, bool)
  moments = reward.update_moments(reward.RunningMoments.zero(), scores, everything)
  mean, std = scores.mean(dtype=np.float64), scores.std(dtype=np.float64)
  want = np.clip(scores, mean - width * std, mean + width * std)
  result = shaping.clip_to_moments(scores, moments, width=width)
  np.testing.assert_allclose(result, want, rtol=1e-5)
  # The clip of PPO-max, in units of the score.
  standard = jnp.clip(reward.normalize_scores(scores, moments), -width, width)
  np.testing.assert_allclose(standard * std + mean, want, rtol=1e-4)


def test_constrained_reward_by_hand():
  result = shaping.constrained_reward(
    np.float32([0.8, 0.8, 0.8, 0.8, 0.8]),
    np.array([True, True, True, False, True]),
    np.float32([0, 2.5, 5, 1, 9]),
    kl_max=5.0,
  )
  np.testing.assert_allclose(result, [0.8, 0.4, 0, 0, 0], atol=1e-7)


def test_constrained_policy_gradient_weights_do_not_see_a_shift_of_a_prompt():
  scores, baseline, log_ratios = normal(3, 4, 8)
  satisfied = normal(4, 8, seed=1) > -0.5

  def weights(shift):
    calibrated = shaping.preference_as_reward(
      (scores + shift).reshape(-1), (baseline + shift).reshape(-1, 1)
    )
    rewards = shaping.constrained_reward(
      calibrated, satisfied.reshape(-1), log_ratios.reshape(-1), kl_max=5.0
    )
    return advantages.group_normalize(rewards.reshape(4, 8), scale=False)

  result = np.asarray(weights(0.0))
  np.testing.assert_allclose(weights(normal(4, 1, seed=2) * 5), result, atol=1e-5)
  for row, fine in zip(result, satisfied, strict=True):  # Violations are the worst of their prompt.
    assert fine.all() or (row[~fine] == row.min()).all()


@pytest.mark.parametrize("longest, buffer", [(20, 5), (16, 16)])
def test_length_penalty_is_soft_overlong_punishment(longest, buffer):
  lengths = np.arange(longest + 1)
  mask = np.arange(longest) < lengths[:, None]
  want = [0 if n <= longest - buffer else (longest - buffer - n) / buffer for n in lengths]
  result = shaping.length_penalty(mask, start=longest - buffer, coef=1 / buffer)
  np.testing.assert_allclose(result, want, atol=1e-6)
  assert result.dtype == jnp.float32 and want[-1] == -1
  # It counts tokens, wherever they are in the row.
  np.testing.assert_array_equal(
    shaping.length_penalty(mask[:, ::-1], start=longest - buffer, coef=1 / buffer), result
  )


@pytest.mark.parametrize("coef", [0.0, 0.7])
def test_variance_penalized_matches_loops(coef):
  rewards = normal(6, 5)
  want = []
  for row in np.float64(rewards):
    mean = sum(row) / 5
    want.append(mean - coef * sum((r - mean) ** 2 for r in row) / 5)
  np.testing.assert_allclose(shaping.variance_penalized(rewards, coef=coef), want, atol=1e-5)


def test_nominal_min_lies_between_the_worst_case_and_the_nominal():
  rewards = normal(50, 5)
  worst = rewards.min(axis=1)
  for nominal in (rewards.mean(axis=1), rewards[:, 2]):
    between = shaping.nominal_min(rewards, nominal, alpha=0.4)
    assert (worst <= between + 1e-6).all() and (between <= nominal + 1e-6).all()
    np.testing.assert_allclose(between, 0.4 * nominal + 0.6 * worst, atol=1e-6)
    np.testing.assert_array_equal(shaping.nominal_min(rewards, nominal, alpha=1.0), nominal)
    np.testing.assert_array_equal(shaping.nominal_min(rewards, nominal, alpha=0.0), worst)


@pytest.mark.parametrize(
  "aggregate",
  [
    lambda r: shaping.variance_penalized(r, coef=0.5),
    lambda r: shaping.nominal_min(r, r[:, 0], alpha=0.3),
    lambda r: shaping.worst_group(r, np.ones(len(r), bool)),
  ],
)
def test_a_constant_reward_is_no_advantage(aggregate):
  rewards = np.full((6, 3), 1.7, np.float32)
  gain = advantages.leave_one_out(aggregate(rewards).reshape(2, 3))
  np.testing.assert_allclose(gain, np.zeros((2, 3)), atol=1e-6)


def test_worst_group_is_the_minimum_of_the_averages():
  rewards, mask = normal(40, 3), np.arange(40) % 5 != 0
  rewards[~mask] = np.nan
  result = shaping.worst_group(rewards, mask)
  means = np.float64(rewards[mask]).mean(axis=0)
  np.testing.assert_array_equal(result[mask], rewards[mask][:, means.argmin()])
  # Which is not the average of the minima: that one is lower.
  np.testing.assert_allclose(np.mean(result[mask]), means.min(), rtol=1e-5)
  assert rewards[mask].min(axis=1).mean() < means.min() - 0.1


def serve_groups(pay):
  """KL-regularised optimum over 12 responses, by mirror ascent on `pay(policy)`."""
  log_policy = log_ref = np.full(12, -np.log(12))
  for _ in range(1000):
    policy = np.exp(log_policy)
    gain = pay(policy) - 0.1 * (log_policy - log_ref)
    log_policy = np.log(softmax(log_policy + 0.2 * (gain - policy @ gain)))
  return np.exp(log_policy)


def test_the_worst_of_two_groups_is_served_better_than_by_their_pool():
  rng = np.random.default_rng(0)
  first = rng.normal(size=12)
  groups = np.stack([first, -first + 0.6 * rng.normal(size=12)], axis=1)
  groups = (groups - groups.mean(axis=0)) / groups.std(axis=0)
  worst_group, everyone = jax.jit(shaping.worst_group), np.ones(1000, bool)

  def maxmin(policy):
    # A batch of 1000 responses, as evenly drawn as can be.
    rows = np.searchsorted(np.cumsum(policy)[:-1], (np.arange(1000) + 0.5) / 1000)
    chosen = worst_group(np.float32(groups[rows]), everyone)[0]
    return groups[:, np.abs(groups[rows[0]] - float(chosen)).argmin()]

  pay = {
    "pooled": lambda policy: groups @ [0.8, 0.2],
    "maxmin": maxmin,
    "per response": lambda policy: groups.min(axis=1),
  }
  worst = {name: (serve_groups(rule) @ groups).min() for name, rule in pay.items()}
  assert worst["maxmin"] > worst["per response"] > worst["pooled"]
  assert worst["maxmin"] > 0 > worst["pooled"]


MAY = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 1, 0, 0], [0] * 5], bool)
SCORES = np.float32([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize(
  "rule, want",
  [
    ("best", [[0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]),
    ("best_worst", [[0, 0.5, 0, 0, 0.5], [0, 0.5, 0.5, 0, 0]]),  # The first of two equal ones.
    ("best_random", [[0.125] * 4 + [0.5], [0, 0.25, 0.5, 0, 0.25]]),
  ],
)
def test_selection_weights_by_hand(rule, want):
  result = shaping.selection_weights(SCORES, MAY, rule)
  np.testing.assert_allclose(result[:2], want)
  np.testing.assert_array_equal(result[2], [0, 0, 1, 0, 0])  # The only one is best and worst.
  np.testing.assert_array_equal(result[3], np.zeros(5))


def test_selection_refuses_an_unknown_rule():
  with pytest.raises(KeyError, match="median"):
    shaping.selection_weights(SCORES, MAY, "median")


def test_the_reward_model_is_right_more_often_about_the_best_and_the_worst():
  rng = np.random.default_rng(0)
  gold = rng.normal(size=(4000, 5))
  # Unsure about the middling, sure about the very good and the very bad.
  noise = np.where(np.abs(gold) > 1, 0.3, 1.6) * rng.normal(size=(4000, 5))
  scores = np.float32(gold + noise)
  agree = {}
  everyone = np.full(scores.shape, 0.2)
  for rule in ("all", "best", "best_worst", "best_random"):
    weights = everyone
    if rule != "all":
      weights = np.asarray(shaping.selection_weights(scores, np.ones(scores.shape, bool), rule))
    centre = (weights * scores).sum() / weights.sum()
    agree[rule] = np.average(np.sign(scores - centre) == np.sign(gold), weights=weights)
  assert agree["best_worst"] > agree["all"] > agree["best"]
  assert agree["best_random"] > agree["best"]


def test_dense_rewards_match_loops():
  dpo, ref = normal(2, 4, 6)
  mask = np.arange(6) < np.array([6, 3, 1, 0])[:, None]
  want = np.zeros((4, 6))
  for b, t in zip(*np.nonzero(mask), strict=True):
    want[b, t] = min(max(0.5 * (float(dpo[b, t]) - float(ref[b, t])), -0.4), 0.4)
  result = shaping.dense_rewards(dpo, ref, mask, scale=0.5, clip=0.4)
  np.testing.assert_allclose(result, want, atol=1e-6)
  assert (np.abs(want) == 0.4).any()


def test_dense_rewards_telescope_to_the_implicit_reward():
  dpo, ref = normal(2, 4, 6)
  mask = np.arange(6) < np.array([6, 3, 1, 2])[:, None]
  dense = shaping.dense_rewards(dpo, ref, mask, scale=0.1, clip=np.inf)
  implicit = masked.masked_sum(kl.k1(dpo, ref), mask, axis=1)
  np.testing.assert_allclose(jnp.sum(dense, axis=1), 0.1 * implicit, atol=1e-6)


def test_the_soft_optimal_policy_of_dense_rewards_is_that_of_dpo():
  """Backward induction on all prefixes of a tree of depth 3, penalty and dense reward alike."""
  rng, beta, width = np.random.default_rng(0), 0.1, 4
  prefixes = [p for depth in range(3) for p in itertools.product(range(width), repeat=depth)]
  ref = {p: softmax(rng.normal(size=width)) for p in prefixes}
  dpo = {p: softmax(np.log(ref[p]) + rng.normal(size=width)) for p in prefixes}
  log_dpo, log_ref = (np.float32([np.log(x[p]) for p in prefixes]) for x in (dpo, ref))
  on = np.ones(log_dpo.shape, bool)
  dense = np.float64(shaping.dense_rewards(log_dpo, log_ref, on, scale=beta, clip=np.inf))
  value = {}
  for i in reversed(range(len(prefixes))):
    prefix = prefixes[i]
    to_come = np.array([value.get((*prefix, token), 0.0) for token in range(width)])
    logits = np.log(ref[prefix]) + (dense[i] + to_come) / beta
    value[prefix] = beta * np.log(np.exp(logits).sum())
    np.testing.assert_allclose(softmax(logits), dpo[prefix], rtol=1e-5)


def test_dense_rewards_beside_the_shaped_ones():
  """The reward of a token in RTO, written out."""
  dpo, ref, old = normal(3, 1, 3)
  mask = np.ones((1, 3), bool)
  score = np.float32([0.7])
  total = shaping.dense_rewards(dpo, ref, mask, scale=0.05, clip=0.05)
  total += policy_gradient.kl_shaped_rewards(2 * score, old, ref, mask, kl_coef=0.01)
  want = np.clip(0.05 * (dpo - ref), -0.05, 0.05) - 0.01 * (old - ref)
  want[0, -1] += 1.4
  np.testing.assert_allclose(total, want, atol=1e-6)


def test_segment_rewards_match_loops_and_conserve_the_scores():
  scores = normal(3, 4)
  ends = np.array([[0, 2, 5, 6], [3, 3, 6, 0], [9, 9, 9, -1]])
  mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
  want = np.zeros((3, 7))
  for b, j in zip(*np.nonzero(mask), strict=True):
    want[b, ends[b, j]] += scores[b, j]
  result = shaping.segment_rewards(scores, ends, mask, 7)
  np.testing.assert_allclose(result, want, atol=1e-6)
  np.testing.assert_allclose(
    jnp.sum(result, axis=1), np.where(mask, scores, 0).sum(axis=1), atol=1e-6
  )


def test_segment_rewards_reach_the_segment_that_earned_them():
  """With lambda < 1 a segment's own reward decides its advantage, not that of the whole text."""
  count, size = 8, 10
  scores = normal(4000, count)
  mask = np.ones((4000, count * size), bool)
  ends = np.broadcast_to(np.arange(1, count + 1) * size - 1, scores.shape)
  dense = shaping.segment_rewards(scores, ends, np.ones(scores.shape, bool), count * size)
  whole = shaping.segment_rewards(
    scores.sum(axis=1, keepdims=True), ends[:, -1:], np.ones((4000, 1), bool), count * size
  )

  def credit(rewards):
    result, _ = advantages.gae(rewards, np.zeros(mask.shape, np.float32), mask, lam=0.95)
    return [np.corrcoef(result[:, j * size], scores[:, j])[0, 1] for j in (0, count - 1)]

  np.testing.assert_allclose(credit(dense), [0.80, 1.0], atol=0.02)
  np.testing.assert_allclose(credit(whole), [0.35, 0.35], atol=0.03)


@pytest.mark.parametrize(
  "call",
  [
    lambda x: shaping.preference_as_reward(x[:, 0], x),
    lambda x: shaping.log_sigmoid_reward(x[:, 0], x[:, 1]),
    lambda x: shaping.constrained_reward(x[:, 0], x[:, 1] > 0, x[:, 2], kl_max=1.0),
    lambda x: shaping.variance_penalized(x, coef=1.0),
    lambda x: shaping.worst_group(x, x[:, 0] > 0),
    lambda x: shaping.selection_weights(x, x > 0, "best_random"),
    lambda x: shaping.dense_rewards(x, 2 * x, x > 0),
  ],
)
def test_rewards_pass_no_gradient(call):
  x = normal(5, 3)
  assert not np.any(jax.grad(lambda x: jnp.sum(call(x)))(x))


@pytest.mark.parametrize(
  "function, shapes",
  [
    (shaping.preference_as_reward, [(3,), (2, 4)]),
    (shaping.log_sigmoid_reward, [(3,), (3, 1)]),
    (shaping.worst_group, [(3, 2), (2,)]),
    (shaping.dense_rewards, [(2, 3), (2, 3), (2, 1)]),
  ],
)
def test_bad_shapes_are_refused(function, shapes):
  with pytest.raises(AssertionError):
    function(*(jnp.zeros(shape) for shape in shapes))


def of_rows(function, *shapes, **hyper):
  """Rewards [B] from arrays of B rows, under a mask of rows. They weigh what has a gradient."""

  def call(mask, *x, **hyper):
    rewards = function(mask, *x, **hyper)
    logprobs = x[0].reshape(B, -1)[:, :1].astype(jnp.float32)
    losses = policy_gradient.reinforce_loss(logprobs, rewards[:, None])
    return masked.masked_mean(losses[:, 0], mask) + squash(jnp.where(mask, rewards, 0.0))

  return Case(call, shapes, mask_shape=(B,), hyper=hyper)


MOMENTS = reward.RunningMoments(jnp.float32(3), jnp.float32(0.5), jnp.float32(2))


def lengths(mask, logprobs, **hyper):
  penalty = shaping.length_penalty(mask, **hyper)
  return jnp.sum(penalty * jnp.tanh(masked.masked_mean(logprobs, mask, axis=1)))


def selection(rule):
  return Case(
    lambda m, x: squash(shaping.selection_weights(x, m, rule)), ((B, K),), mask_shape=(B, K)
  )


def dense(mask, dpo, ref, **hyper):
  return squash(shaping.dense_rewards(dpo, ref, mask, **hyper))


def segments(mask, scores):
  ends = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
  return squash(shaping.segment_rewards(scores, 2 * ends, mask, 2 * K))


CASES = {
  "preference_as_reward": of_rows(
    lambda m, x, ref, **h: shaping.preference_as_reward(x, ref, **h), (B,), (B, K), scale=0.7
  ),
  "log_sigmoid_reward": of_rows(lambda m, *x: shaping.log_sigmoid_reward(*x), (B,), (B,)),
  "min_max": of_rows(lambda m, x, **h: shaping.min_max(x, **h), (B,), low=-0.5, high=0.8),
  "clip_to_moments": of_rows(
    lambda m, x, **h: shaping.clip_to_moments(x, MOMENTS, **h), (B,), width=0.5
  ),
  "constrained_reward": of_rows(
    lambda m, x, far, **h: shaping.constrained_reward(x, m, far, **h), (B,), (B,), kl_max=3.0
  ),
  "length_penalty": Case(lengths, ((B, T),), hyper={"start": 2.0, "coef": 0.1}),
  "variance_penalized": of_rows(
    lambda m, x, **h: shaping.variance_penalized(x, **h), (B, K), coef=0.5
  ),
  "nominal_min": of_rows(
    lambda m, x, nominal, **h: shaping.nominal_min(x, nominal, **h), (B, K), (B,), alpha=0.3
  ),
  "worst_group": of_rows(lambda m, x: shaping.worst_group(x, m), (B, K)),
  "selection_weights/best": selection("best"),
  "selection_weights/best_worst": selection("best_worst"),
  "selection_weights/best_random": selection("best_random"),
  "dense_rewards": Case(dense, ((B, T),) * 2, hyper={"scale": 0.5, "clip": 0.3}),
  "segment_rewards": Case(segments, ((B, K),), mask_shape=(B, K)),
}
