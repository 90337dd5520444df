import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import advantages, kl, masked, policy_gradient
from tests.losses import tabular
from tests.losses.case import B, Case, T, per_token, squash

LOW, HIGH = 0.2, 0.3


def arrays(n, shape=(3, 5), seed=0):
  return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)


def policy_loss(ratio, advantage, **kwargs):
  """Loss and gradient with respect to the log-probability of one token."""

  def loss(logprob):
    x = logprob.reshape(1, 1)
    a = jnp.full((1, 1), advantage)
    out = policy_gradient.ppo_policy_loss(
      x, jnp.zeros((1, 1)), a, clip_low=LOW, clip_high=HIGH, **kwargs
    )
    return out[0, 0]

  return jax.value_and_grad(loss)(jnp.log(jnp.float32(ratio)))


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_policy_loss_matches_loops(dual_clip, seed):
  logprobs, old, advantage = arrays(3, seed=seed)
  want = np.zeros((3, 5))
  for i in np.ndindex(3, 5):
    ratio = np.exp(float(logprobs[i]) - float(old[i]))
    a = float(advantage[i])
    want[i] = -min(a * ratio, a * min(max(ratio, 1 - LOW), 1 + HIGH))
    if dual_clip is not None and a < 0:
      want[i] = min(want[i], -dual_clip * a)
  result = policy_gradient.ppo_policy_loss(
    logprobs, old, advantage, clip_low=LOW, clip_high=HIGH, dual_clip=dual_clip
  )
  np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.29, 1.31, 2.0])
def test_gradient_is_zero_in_exactly_two_corners(ratio, advantage):
  _, grad = policy_loss(ratio, advantage)
  clipped = ratio > 1 + HIGH if advantage > 0 else ratio < 1 - LOW
  if clipped:
    assert grad == 0
  else:  # Moves the log-probability in the direction of the advantage, by -A rho.
    np.testing.assert_allclose(grad, -advantage * ratio, rtol=1e-5)


@pytest.mark.parametrize("advantage", [-2.0, 2.0])
@pytest.mark.parametrize("ratio", [0.5, 2.9, 3.1, 20.0])
def test_dual_clip_only_caps_negative_advantages(ratio, advantage):
  value, grad = policy_loss(ratio, advantage, dual_clip=3.0)
  plain, plain_grad = policy_loss(ratio, advantage)
  if advantage < 0 and ratio > 3:
    assert (value, grad) == (6.0, 0.0)
  else:
    assert (value, grad) == (plain, plain_grad)


def test_at_ratio_one_the_gradient_is_that_of_reinforce():
  logprobs, advantage = arrays(2)
  grad = jax.grad(
    lambda x: jnp.sum(policy_gradient.ppo_policy_loss(x, jnp.asarray(logprobs), advantage))
  )(logprobs)
  np.testing.assert_array_equal(grad, -advantage)
  reinforce = jax.grad(lambda x: jnp.sum(policy_gradient.reinforce_loss(x, advantage)))(logprobs)
  np.testing.assert_array_equal(grad, reinforce)


@pytest.mark.parametrize("log_ratio", [-200.0, -89.0, 89.0, 200.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_extreme_ratios_are_finite(log_ratio, advantage):
  x = jnp.full((1, 1), log_ratio)
  a = jnp.full((1, 1), advantage)
  value, grad = jax.value_and_grad(
    lambda x: jnp.sum(policy_gradient.ppo_policy_loss(x, jnp.zeros((1, 1)), a))
  )(x)
  assert np.isfinite(value)
  assert np.isfinite(grad).all()


def test_only_the_new_logprobs_get_a_gradient():
  inputs = arrays(3)
  grads = jax.grad(lambda *x: jnp.sum(policy_gradient.ppo_policy_loss(*x)), (0, 1, 2))(*inputs)
  assert [bool(np.any(g)) for g in grads] == [True, False, False]
  grads = jax.grad(lambda *x: jnp.sum(policy_gradient.ppo_value_loss(*x)), (0, 1, 2))(*inputs)
  assert [bool(np.any(g)) for g in grads] == [True, False, False]
  grads = jax.grad(lambda *x: jnp.sum(policy_gradient.reinforce_loss(*x)), (0, 1))(*inputs[:2])
  assert [bool(np.any(g)) for g in grads] == [True, False]


@pytest.mark.parametrize(
  "loss",
  [
    policy_gradient.cispo_loss,
    lambda *x: policy_gradient.gspo_loss(*x, np.ones((3, 2), bool), clip_low=0.9, clip_high=9.0),
    lambda *x: policy_gradient.p3o_loss(*x, clip=9.0),
    lambda *x: policy_gradient.p3o_separate_loss(*x, clip=9.0),
    lambda x, old, gain: policy_gradient.reinforce_loss(
      x, gain * policy_gradient.truncated_importance_weights(x, old)
    ),
  ],
)
def test_only_the_new_logprobs_get_a_gradient_in_the_family(loss):
  grads = jax.grad(lambda *x: jnp.sum(loss(*x)), (0, 1, 2))(*arrays(3, (3, 2)))
  assert [bool(np.any(g)) for g in grads] == [True, False, False]


@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_value_loss_matches_loops(clip):
  values, old, returns = arrays(3, (6, 10))
  want, want_grad = np.zeros((6, 10)), np.zeros((6, 10))
  for i in np.ndindex(6, 10):
    v, o, r = (float(x[i]) for x in (values, old, returns))
    c = min(max(v, o - clip), o + clip)
    want[i] = 0.5 * max((v - r) ** 2, (c - r) ** 2)
    # Inside the clip both branches are the same; outside, only the plain one moves.
    want_grad[i] = v - r if c == v or (v - r) ** 2 > (c - r) ** 2 else 0.0
  value, grad = jax.value_and_grad(
    lambda v: jnp.sum(policy_gradient.ppo_value_loss(v, old, returns, clip=clip))
  )(values)
  np.testing.assert_allclose(value, want.sum(), rtol=1e-5)
  np.testing.assert_allclose(grad, want_grad, atol=1e-5)
  assert 0 < (want_grad == 0).sum() < 60


SCORE = np.random.default_rng(7).normal(size=9).astype(np.float32)


@pytest.mark.parametrize("baseline", [0.0, 1.3, -20.0, "batch mean", "greedy"])
def test_reinforce_with_shaped_rewards_is_the_exact_gradient(baseline):
  params, ref, beta = tabular.draw(0), tabular.draw(1), 0.3
  ref_logprobs = tabular.logprobs(ref)

  def surrogate(params):
    logprobs, weight = tabular.logprobs(params), tabular.probabilities(params)
    rewards = policy_gradient.kl_shaped_rewards(
      SCORE, logprobs, ref_logprobs, tabular.MASK, kl_coef=beta
    )
    total = jnp.sum(rewards, axis=1)
    known = {"batch mean": jnp.sum(weight * total), "greedy": total[jnp.argmax(weight)]}
    gain = total - known.get(baseline, baseline)
    losses = policy_gradient.reinforce_loss(logprobs, jnp.broadcast_to(gain[:, None], (9, 2)))
    return jnp.sum(weight * jnp.sum(losses, axis=1))

  exact = jax.grad(lambda params: -tabular.objective(params, ref, SCORE, beta))(params)
  tabular.assert_same_gradient(jax.grad(surrogate)(params), exact)


def over_pairs(loss):
  """`loss(logprobs [162, 2], rewards [81, 2]) -> [162, 2]` over all pairs, exactly weighed."""

  def mean(params, shift=0.0):
    logprobs = tabular.logprobs(params)[tabular.PAIRS]
    rewards = jnp.asarray(SCORE)[tabular.PAIRS] + shift
    losses = loss(logprobs.reshape(162, 2), rewards).reshape(81, 2, 2)
    weight = tabular.pair_probabilities(params)
    return jnp.sum(weight * jnp.mean(jnp.sum(losses, axis=2), axis=1))

  return mean


def repeated(advantage):
  """[B, N] advantages of responses -> [B * N, 2] of their tokens."""
  return jnp.broadcast_to(advantage.reshape(-1, 1), (advantage.size, 2))


FAMILY = {
  "reinforce": lambda x, a: policy_gradient.reinforce_loss(x, a),
  "ppo": lambda x, a: policy_gradient.ppo_policy_loss(x, jax.lax.stop_gradient(x), a),
  "dual": lambda x, a: policy_gradient.ppo_policy_loss(
    x, jax.lax.stop_gradient(x), a, dual_clip=3.0
  ),
  "cispo": lambda x, a: policy_gradient.cispo_loss(x, jax.lax.stop_gradient(x), a),
  "gspo": lambda x, a: policy_gradient.gspo_loss(
    x, jax.lax.stop_gradient(x), a, np.ones(x.shape, bool)
  ),
}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("advantage, scale", [("leave_one_out", 1.0), ("centred", 0.5)])
def test_on_policy_every_loss_is_the_policy_gradient(name, advantage, scale):
  """Centring over N samples, their own included, shrinks the gradient by (N - 1) / N."""

  def loss(logprobs, rewards):
    if advantage == "leave_one_out":
      gain = advantages.leave_one_out(rewards)
    else:
      gain = advantages.group_normalize(rewards, scale=False)
    return FAMILY[name](logprobs, repeated(gain))

  params = tabular.draw(0)
  exact = jax.grad(lambda params: -tabular.objective(params, params, SCORE, 0.0))(params)
  result = jax.grad(over_pairs(loss))(params)
  tabular.assert_same_gradient(result, exact, scale)
  # Nothing that a prompt adds to all rewards matters.
  tabular.assert_same_gradient(jax.grad(over_pairs(loss))(params, shift=8.0), result)


P3O = {"joint": policy_gradient.p3o_loss, "separate": policy_gradient.p3o_separate_loss}


@pytest.mark.parametrize("name", P3O)
def test_p3o_on_policy_is_rloo_of_two_samples(name):
  def p3o(params, shift=0.0):
    logprobs = jnp.sum(tabular.logprobs(params), axis=1)[tabular.PAIRS]
    rewards = jnp.asarray(SCORE)[tabular.PAIRS] + shift
    losses = P3O[name](logprobs, jax.lax.stop_gradient(logprobs), rewards)
    return jnp.sum(tabular.pair_probabilities(params) * losses)

  def rloo(logprobs, rewards):
    return FAMILY["reinforce"](logprobs, repeated(advantages.leave_one_out(rewards)))

  params = tabular.draw(0)
  result = jax.grad(p3o)(params)
  tabular.assert_same_gradient(result, jax.grad(over_pairs(rloo))(params), atol=1e-6)
  tabular.assert_same_gradient(jax.grad(p3o)(params, shift=8.0), result, atol=1e-5)


def p3o_by_hand(variant, logprobs, old, rewards, clip):
  """Loss and gradient of each pair, from the definition."""
  losses, grads = [], []
  for (a, b), (old_a, old_b), (r_a, r_b) in zip(logprobs, old, rewards, strict=True):
    rho_a, rho_b, d = np.exp(a - old_a), np.exp(b - old_b), r_a - r_b
    if variant == "joint":
      v, c = np.log(rho_a / rho_b), np.log(1 + clip)
      losses.append(-0.5 * rho_a * rho_b * min(d * v, d * np.clip(v, -c, c)))
      moved = (v < c) if d > 0 else (v > -c)
      grads.append(-0.5 * moved * rho_a * rho_b * d * np.array([1, -1]))
      continue
    first = min(d * rho_a, d * np.clip(rho_a, 1 - clip, 1 + clip)) * rho_b
    second = min(-d * rho_b, -d * np.clip(rho_b, 1 - clip, 1 + clip)) * rho_a
    losses.append(-0.5 * (first + second))
    a_moves = rho_a < 1 + clip if d > 0 else rho_a > 1 - clip
    b_moves = rho_b > 1 - clip if d > 0 else rho_b < 1 + clip
    grads.append(-0.5 * d * rho_a * rho_b * np.array([a_moves, -1.0 * b_moves]))
  return np.array(losses), np.array(grads)


@pytest.mark.parametrize("name", P3O)
def test_p3o_matches_loops(name):
  logprobs, old, rewards = 0.3 * arrays(3, (200, 2))
  want, want_grad = p3o_by_hand(name, *np.float64([logprobs, old, rewards]), clip=0.2)
  function = lambda x: P3O[name](x, old, rewards, clip=0.2)  # noqa: E731
  np.testing.assert_allclose(function(logprobs), want, atol=1e-6)
  grad = jax.grad(lambda x: jnp.sum(function(x)))(logprobs)
  np.testing.assert_allclose(grad, want_grad, atol=1e-6)
  stopped = (want_grad == 0).mean()
  assert 0.1 < stopped < 0.9
  # Which answer is called the first does not matter.
  swapped = P3O[name](logprobs[:, ::-1], old[:, ::-1], rewards[:, ::-1], clip=0.2)
  np.testing.assert_allclose(swapped, want, atol=1e-6)


def test_cispo_matches_loops_and_stops_no_token():
  logprobs, old, advantage = arrays(3, (40, 5))
  bounds = {"clip_low": 0.5, "clip_high": 1.5}
  weight = np.clip(np.exp(np.float64(logprobs) - old), 0.5, 2.5)
  loss = policy_gradient.cispo_loss(logprobs, old, advantage, **bounds)
  np.testing.assert_allclose(loss, -weight * advantage * logprobs, rtol=1e-5, atol=1e-6)
  grad = jax.grad(lambda x: jnp.sum(policy_gradient.cispo_loss(x, old, advantage, **bounds)))(
    logprobs
  )
  np.testing.assert_allclose(grad, -weight * advantage, rtol=1e-5)
  assert 0.1 < np.isin(weight, [0.5, 2.5]).mean() < 0.9
  ppo = jax.grad(lambda x: jnp.sum(policy_gradient.ppo_policy_loss(x, old, advantage)))(logprobs)
  assert (np.asarray(ppo) == 0).any() and (np.asarray(grad) != 0).all()


def test_cispo_has_no_lower_bound_by_default():
  logprobs, old = jnp.full((1, 2), -9.0), jnp.float32([[-3.0, -12.0]])
  loss = policy_gradient.cispo_loss(logprobs, old, jnp.ones((1, 2)))
  np.testing.assert_allclose(loss, [[9 * np.exp(-6), 9 * 5]], rtol=1e-5)


@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_gspo_is_the_clipped_mean_ratio_of_the_sequence(clip):
  """Its mean over tokens is the objective of sequences; each token pulls with the same weight."""
  lengths = [5, 3, 1, 4, 2, 5]
  mask = np.arange(5) < np.array(lengths)[:, None]
  logprobs, old = 0.3 * arrays(2, (6, 5))
  gains = np.float32([1.0, -2.0, 0.5, -0.3, 0.7, -1.1])
  advantage = np.tile(gains[:, None], (1, 5))

  def objective(x):
    losses = policy_gradient.gspo_loss(x, old, advantage, mask, clip_low=clip, clip_high=clip)
    return masked.masked_mean(losses, mask, axis=1)

  want, want_grad = np.zeros(6), np.zeros((6, 5))
  for b, n in enumerate(lengths):
    ratio = np.exp(np.mean(np.float64(logprobs[b, :n]) - old[b, :n]))
    want[b] = -min(ratio * gains[b], np.clip(ratio, 1 - clip, 1 + clip) * gains[b])
    inside = ratio < 1 + clip if gains[b] > 0 else ratio > 1 - clip
    want_grad[b, :n] = -(ratio if inside else 0.0) * gains[b] / n
  np.testing.assert_allclose(objective(logprobs), want, rtol=1e-5)
  grad = jax.grad(lambda x: jnp.sum(objective(x)))(logprobs)
  np.testing.assert_allclose(grad, want_grad, atol=1e-6)
  assert (want_grad[mask] == 0).any() == (clip < 1)


def test_gspo_of_an_unchanged_policy_has_ratio_one_exactly():
  logprobs, advantage = arrays(2)
  loss = policy_gradient.gspo_loss(logprobs, logprobs, advantage, np.ones((3, 5), bool))
  np.testing.assert_array_equal(loss, -advantage)


def test_truncated_weights_undo_the_sampler_up_to_the_cap():
  policy, sampler = tabular.draw(0), tabular.draw(1)
  mu = tabular.probabilities(sampler)

  def gradient(cap):
    def surrogate(params):
      logprobs, drawn = (jnp.sum(tabular.logprobs(x), axis=1) for x in (params, sampler))
      weight = policy_gradient.truncated_importance_weights(logprobs, drawn, cap=cap)
      losses = policy_gradient.reinforce_loss(logprobs[:, None], jnp.asarray(SCORE)[:, None])
      return jnp.sum(mu * weight * losses[:, 0])

    return jax.grad(surrogate)(policy)

  exact = jax.grad(lambda params: -tabular.objective(params, params, SCORE, 0.0))(policy)
  tabular.assert_same_gradient(gradient(np.inf), exact)
  assert any(np.abs(gradient(1.0)[name] - exact[name]).max() > 0.01 for name in exact)
  logprobs, drawn = arrays(2)
  weight = policy_gradient.truncated_importance_weights(logprobs, drawn, cap=2.0)
  np.testing.assert_allclose(weight, np.minimum(np.exp(logprobs - drawn), 2.0), rtol=1e-5)
  assert (np.asarray(weight) == 2).any()


WEIGHED = np.arange(7) < np.array([7, 1, 3, 0, 5, 2])[:, None]


def objective_by_loops(name, losses, mask, length):
  rows = [
    [float(x) for x, on in zip(*row, strict=True) if on] for row in zip(losses, mask, strict=True)
  ]
  rows = [row for row in rows if row]
  if name == "grpo":
    return sum(sum(row) / len(row) for row in rows) / len(rows)
  if name == "dr_grpo":
    return sum(sum(row) / length for row in rows) / len(rows)
  return sum(map(sum, rows)) / sum(map(len, rows))


@pytest.mark.parametrize("length", [None, 20])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_token_weights_make_the_objective(name, length):
  losses = arrays(1, WEIGHED.shape)[0]
  weights = policy_gradient.token_weights(WEIGHED, name, length=length)
  assert weights.dtype == jnp.float32 and (np.asarray(weights)[~WEIGHED] == 0).all()
  want = objective_by_loops(name, losses, WEIGHED, length or 7)
  np.testing.assert_allclose(jnp.sum(losses * weights), want, rtol=1e-5)
  if name != "dr_grpo":  # A mean.
    np.testing.assert_allclose(jnp.sum(weights), 1.0, rtol=1e-6)
  # A row that was left out and one that is not there are the same.
  kept = WEIGHED.any(axis=1)
  np.testing.assert_array_equal(
    weights[kept], policy_gradient.token_weights(WEIGHED[kept], name, length=length)
  )


def test_weights_of_micro_batches_add_up_and_of_each_alone_are_another_objective():
  losses = arrays(1, WEIGHED.shape)[0]
  whole = policy_gradient.token_weights(WEIGHED, "dapo")
  parts = [slice(i, i + 2) for i in (0, 2, 4)]
  total = sum(float(jnp.sum(losses[part] * whole[part])) for part in parts)
  want = objective_by_loops("dapo", losses, WEIGHED, None)
  np.testing.assert_allclose(total, want, rtol=1e-5)
  alone = [policy_gradient.token_weights(WEIGHED[part], "dapo") for part in parts]
  bnpo = np.mean([float(jnp.sum(losses[p] * w)) for p, w in zip(parts, alone, strict=True)])
  by_loops = np.mean([objective_by_loops("dapo", losses[p], WEIGHED[p], None) for p in parts])
  np.testing.assert_allclose(bnpo, by_loops, rtol=1e-5)
  assert abs(bnpo - total) > 0.01


def test_unknown_aggregation():
  with pytest.raises(KeyError, match="mean"):
    policy_gradient.token_weights(WEIGHED, "mean")


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_the_grpo_family_matches_loops(name):
  """Rewards of groups to a scalar loss, once by our pieces and once by hand."""
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=(2, 3)).astype(np.float32)
  logprobs, old, ref = 0.2 * arrays(3, WEIGHED.shape)
  beta, scale = 0.1, name != "dr_grpo"
  per_token = np.zeros(WEIGHED.shape)
  for b, t in zip(*np.nonzero(WEIGHED), strict=True):
    group = np.float64(rewards[b // 3])
    gain = rewards[b // 3, b % 3] - group.mean()
    if scale:
      gain /= group.std(ddof=1) + 1e-4
    ratio = np.exp(np.float64(logprobs[b, t]) - old[b, t])
    gap = float(ref[b, t]) - float(logprobs[b, t])
    per_token[b, t] = -min(ratio * gain, np.clip(ratio, 0.8, 1.28) * gain)
    per_token[b, t] += beta * (np.exp(gap) - 1 - gap)
  gain = advantages.group_normalize(rewards, scale=scale)
  gain = jnp.broadcast_to(gain.reshape(-1, 1), WEIGHED.shape)
  losses = policy_gradient.ppo_policy_loss(logprobs, old, gain, clip_high=0.28)
  losses += beta * kl.k3(logprobs, ref)
  result = jnp.sum(losses * policy_gradient.token_weights(WEIGHED, name))
  np.testing.assert_allclose(result, objective_by_loops(name, per_token, WEIGHED, 7), rtol=1e-5)


MASK = np.array(
  [
    [1, 0, 0, 0, 0],  # The stop token comes first.
    [1, 1, 1, 0, 0],
    [1, 1, 1, 1, 1],
    [0, 1, 1, 1, 0],  # Behind a prompt.
    [0, 0, 0, 0, 0],
  ],
  bool,
)


@pytest.mark.parametrize("kl_coef", [0.0, 0.05, 2.0])
def test_shaped_rewards_match_loops_and_conserve_the_score(kl_coef):
  logprobs, ref = arrays(2, MASK.shape)
  scores = np.float32([0.7, -0.9, 1e-3, 12.0, 5.0])
  want = np.zeros(MASK.shape)
  for b in range(5):
    real = np.flatnonzero(MASK[b])
    for t in real:
      want[b, t] = -kl_coef * (float(logprobs[b, t]) - float(ref[b, t]))
      want[b, t] += scores[b] if t == real[-1] else 0
  result = policy_gradient.kl_shaped_rewards(scores, logprobs, ref, MASK, kl_coef=kl_coef)
  np.testing.assert_allclose(result, want, atol=1e-6)
  kl = np.where(MASK, logprobs - ref, 0).sum(axis=1)
  conserved = np.where(MASK.any(axis=1), scores - kl_coef * kl, 0)
  np.testing.assert_allclose(np.sum(result, axis=1), conserved, atol=1e-5)


@pytest.mark.parametrize("logprob_dtype", [np.float32, np.int32])
@pytest.mark.parametrize("mask_dtype", [bool, np.int32])
@pytest.mark.parametrize("kl_coef", [0, 0.0, 1])
def test_a_fractional_score_stays_fractional(logprob_dtype, mask_dtype, kl_coef):
  zeros = np.zeros((2, 3), logprob_dtype)
  mask = np.array([[1, 1, 0], [1, 0, 0]]).astype(mask_dtype)
  result = policy_gradient.kl_shaped_rewards(
    jnp.float32([0.7, -0.9]), zeros, zeros, mask, kl_coef=kl_coef
  )
  np.testing.assert_allclose(result, [[0, 0.7, 0], [-0.9, 0, 0]], rtol=1e-6)


def test_integer_scores_become_rewards():
  zeros = np.zeros((2, 3), np.float32)
  scores, mask = np.int32([3, -2]), np.ones((2, 3), bool)
  result = policy_gradient.kl_shaped_rewards(scores, zeros + 0.5, zeros, mask, kl_coef=0.1)
  np.testing.assert_allclose(result[:, -1], [2.95, -2.05], rtol=1e-6)


def test_shaped_rewards_carry_no_gradient():
  logprobs, ref = arrays(2, MASK.shape)

  def total(scores, logprobs, ref):
    out = policy_gradient.kl_shaped_rewards(scores, logprobs, ref, MASK, kl_coef=1.0)
    return jnp.sum(out)

  grads = jax.grad(total, (0, 1, 2))(np.ones(5, np.float32), logprobs, ref)
  assert not any(np.any(g) for g in grads)


def test_shaped_rewards_to_monte_carlo_returns():
  logprobs, ref = arrays(2, MASK.shape)
  scores = arrays(1, (5,))[0]
  rewards = policy_gradient.kl_shaped_rewards(scores, logprobs, ref, MASK, kl_coef=0.1)
  _, returns = advantages.gae(rewards, arrays(1, MASK.shape, 1)[0], MASK, lam=1.0)
  kl = np.where(MASK, logprobs - ref, 0)
  for b, t in zip(*np.nonzero(MASK), strict=True):
    np.testing.assert_allclose(returns[b, t], scores[b] - 0.1 * kl[b, t:].sum(), atol=1e-5)


def test_explained_variance():
  values, returns = arrays(2, MASK.shape)
  r, v = returns[MASK].astype(np.float64), values[MASK].astype(np.float64)
  result = policy_gradient.explained_variance(values, returns, MASK)
  np.testing.assert_allclose(result, 1 - np.var(r - v) / np.var(r), rtol=1e-4)
  np.testing.assert_allclose(
    policy_gradient.explained_variance(returns, returns, MASK), 1.0, atol=1e-6
  )
  constant = np.full_like(returns, 3.0)
  np.testing.assert_allclose(
    policy_gradient.explained_variance(constant, returns, MASK), 0.0, atol=1e-5
  )
  assert policy_gradient.explained_variance(values, constant, MASK) == 0
  assert policy_gradient.explained_variance(values, returns, np.zeros_like(MASK)) == 0
  # A critic that is off by a constant explains everything: variances ignore the mean.
  np.testing.assert_allclose(
    policy_gradient.explained_variance(returns + 2, returns, MASK), 1.0, atol=1e-5
  )
  poisoned = np.where(MASK, returns, np.nan)
  assert policy_gradient.explained_variance(values, poisoned, MASK) == result


@pytest.mark.parametrize(
  "function, shapes",
  [
    (policy_gradient.ppo_policy_loss, [(2, 3), (2, 3), (2, 1)]),
    (policy_gradient.ppo_value_loss, [(2, 3), (3,), (2, 3)]),
    (policy_gradient.reinforce_loss, [(2, 3), (2, 1)]),
    (policy_gradient.cispo_loss, [(2, 3), (2, 3), (2, 1)]),
    (policy_gradient.gspo_loss, [(2, 3), (2, 3), (2, 3), (2, 1)]),
    (policy_gradient.p3o_loss, [(4, 3), (4, 3), (4, 3)]),
    (policy_gradient.p3o_separate_loss, [(4, 2), (4, 2), (4,)]),
    (policy_gradient.truncated_importance_weights, [(2, 3), (2, 1)]),
    (lambda mask: policy_gradient.token_weights(mask, "grpo"), [(3,)]),
  ],
)
def test_bad_shapes_are_refused(function, shapes):
  with pytest.raises(AssertionError):
    function(*(jnp.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("scores, mask", [((3,), (2, 3)), ((2, 3), (2, 3)), ((2,), (2, 1))])
def test_shaped_rewards_refuse_bad_shapes(scores, mask):
  x = jnp.zeros((2, 3))
  with pytest.raises(AssertionError):
    policy_gradient.kl_shaped_rewards(jnp.zeros(scores), x, x, jnp.ones(mask, bool), kl_coef=1.0)


def shaped(mask, scores, logprobs, ref_logprobs, kl_coef):
  """The shaped rewards have no gradient: they weigh log-probabilities, as they are used."""
  rewards = policy_gradient.kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=kl_coef)
  return squash(rewards) + masked.masked_sum(
    policy_gradient.reinforce_loss(logprobs, rewards), mask
  )


def gspo(mask, *x, **hyper):
  return masked.masked_mean(policy_gradient.gspo_loss(*x, mask, **hyper), mask)


def over_responses(function):
  """A function of three arrays [B, 2] to losses [B], used under a mask of rows."""

  def call(mask, *x, **hyper):
    return masked.masked_mean(function(*x, **hyper), mask)

  return Case(call, ((B, 2),) * 3, mask_shape=(B,), hyper={"clip": 0.2})


def weighed(aggregation, **hyper):
  def call(mask, losses, **hyper):
    return masked.masked_sum(
      losses * policy_gradient.token_weights(mask, aggregation, **hyper), mask
    )

  return Case(call, ((B, T),), hyper=hyper)


def importance_weighed(logprobs, sampler_logprobs, **hyper):
  weights = policy_gradient.truncated_importance_weights(logprobs, sampler_logprobs, **hyper)
  return policy_gradient.reinforce_loss(logprobs, weights)


CLIP = {"clip_low": 0.2, "clip_high": 0.3}
CASES = {
  "ppo_policy_loss": per_token(policy_gradient.ppo_policy_loss, 3, **CLIP),
  "ppo_policy_loss/dual_clip": per_token(policy_gradient.ppo_policy_loss, 3, dual_clip=3.0),
  "ppo_value_loss": per_token(policy_gradient.ppo_value_loss, 3, clip=0.2),
  "reinforce_loss": per_token(policy_gradient.reinforce_loss, 2),
  "cispo_loss": per_token(policy_gradient.cispo_loss, 3, **CLIP),
  "gspo_loss": Case(gspo, ((B, T),) * 3, hyper=CLIP),
  "p3o_loss": over_responses(policy_gradient.p3o_loss),
  "p3o_separate_loss": over_responses(policy_gradient.p3o_separate_loss),
  "truncated_importance_weights": per_token(importance_weighed, 2, cap=1.5),
  "token_weights/grpo": weighed("grpo"),
  "token_weights/dr_grpo": weighed("dr_grpo", length=4.0),
  "token_weights/dapo": weighed("dapo"),
  "kl_shaped_rewards": Case(shaped, ((B,), (B, T), (B, T)), padded=(1, 2), hyper={"kl_coef": 0.3}),
  "explained_variance": Case(
    lambda m, v, r: policy_gradient.explained_variance(v, r, m), ((B, T),) * 2
  ),
}


def test_a_clip_of_nothing_does_not_clip():
  """Distances of 0 in a config, for the ratio and for the value."""
  ratio, advantage = np.float32([[0.2, 0.9, 3.0, 8.0]]), np.float32([[-1.0, 2.0, 1.5, -0.5]])
  loss = policy_gradient.ppo_policy_loss(
    np.log(ratio), np.zeros_like(ratio), advantage, **policy_gradient.clip_range(0.0, 0.0)
  )
  np.testing.assert_allclose(loss, -ratio * advantage, rtol=1e-5)
  assert policy_gradient.clip_range(0.1, 0.3) == {"clip_low": 0.1, "clip_high": 0.3}
  values, old, returns = np.float32([[3.0]]), np.float32([[0.0]]), np.float32([[5.0]])
  loss, grad = jax.value_and_grad(
    lambda x: jnp.sum(policy_gradient.ppo_value_loss(x, old, returns, clip=None))
  )(values)
  assert (loss, grad[0, 0]) == (2.0, -2.0)


def test_the_surrogate_keeps_its_gradient_far_from_the_old_policy():
  grad = jax.grad(
    lambda x: policy_gradient.ppo_policy_loss(x, jnp.zeros((1, 1)), -jnp.ones((1, 1)))[0, 0]
  )(jnp.full((1, 1), 30.0))
  np.testing.assert_allclose(grad, [[np.exp(30.0)]], rtol=1e-5)
