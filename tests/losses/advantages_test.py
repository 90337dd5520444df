import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import advantages, masked
from tests.losses.case import B, Case, K, T, squash

EOS = 2
# EOS first, in the middle, last, and absent: the response runs to its EOS, which counts.
RESPONSES = np.array(
  [
    [EOS, 0, 0, 0, 0],
    [5, 7, EOS, 0, 0],
    [5, 7, 6, 8, EOS],
    [5, 7, 6, 8, 9],
  ]
)


def response_mask(tokens):
  mask = np.zeros(tokens.shape, bool)
  for b, row in enumerate(tokens):
    for t, token in enumerate(row):
      mask[b, t] = True
      if token == EOS:
        break
  return mask


MASK = response_mask(RESPONSES)


def random_inputs(shape=MASK.shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, *shape)).astype(np.float32)


def gae_by_definition(rewards, values, mask, gamma, lam, bootstrap=None):
  """The sum over later errors, one pair of tokens at a time."""
  bootstrap = np.zeros(len(rewards)) if bootstrap is None else bootstrap
  result = np.zeros(rewards.shape)
  for b in range(rewards.shape[0]):
    real = np.flatnonzero(mask[b])
    for i, t in enumerate(real):
      for j in range(i, len(real)):
        s = real[j]
        successor = values[b, real[j + 1]] if j + 1 < len(real) else bootstrap[b]
        result[b, t] += (gamma * lam) ** (j - i) * (
          rewards[b, s] + gamma * successor - values[b, s]
        )
  return result


def test_masks_of_the_hand_made_rows():
  assert MASK.sum(axis=1).tolist() == [1, 3, 5, 5]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0, 0.5)])
def test_gae_matches_its_definition(gamma, lam):
  rewards, values = random_inputs()
  result, returns = advantages.gae(rewards, values, MASK, gamma=gamma, lam=lam)
  want = gae_by_definition(rewards, values, MASK, gamma, lam)
  np.testing.assert_allclose(result, want, atol=1e-5)
  np.testing.assert_allclose(returns, np.where(MASK, want + values, 0), atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_gae_of_responses_anywhere_in_the_row(seed):
  # A prompt of another length before each, padding behind, one row empty.
  rng = np.random.default_rng(seed)
  rewards, values = random_inputs((6, 12), seed)
  start, length = rng.integers(0, 6, size=(2, 6, 1))
  length[0] = 0
  mask = (np.arange(12) >= start) & (np.arange(12) < start + length)
  result, returns = advantages.gae(rewards, values, mask, gamma=0.97, lam=0.9)
  want = gae_by_definition(rewards, values, mask, 0.97, 0.9)
  np.testing.assert_allclose(result, want, atol=1e-5)
  assert (np.asarray(returns)[~mask] == 0).all()


def test_lambda_one_is_the_reward_to_go():
  rewards, values = random_inputs()
  result, returns = advantages.gae(rewards, values, MASK, lam=1.0)
  for b, row in enumerate(MASK):
    for t in np.flatnonzero(row):
      to_go = sum(float(rewards[b, s]) for s in range(t, row.sum()))
      np.testing.assert_allclose(returns[b, t], to_go, atol=1e-5)
      np.testing.assert_allclose(result[b, t] + values[b, t], to_go, atol=1e-5)


def test_lambda_zero_is_the_one_step_error():
  rewards, values = random_inputs()
  result, _ = advantages.gae(rewards, values, MASK, gamma=0.9, lam=0.0)
  for b, row in enumerate(MASK):
    n = row.sum()
    for t in range(n):
      successor = values[b, t + 1] if t + 1 < n else 0.0
      want = rewards[b, t] + 0.9 * successor - values[b, t]
      np.testing.assert_allclose(result[b, t], want, atol=1e-6)


def test_gae_of_a_score_at_the_end_by_hand():
  rewards = np.float32([[0, 0, 1, 9]])
  values = np.float32([[0.5, 0.25, 0.75, 9]])
  mask = np.array([[True, True, True, False]])
  result, returns = advantages.gae(rewards, values, mask, gamma=1.0, lam=0.5)
  # Errors: -0.25, 0.5, 0.25.
  np.testing.assert_allclose(result, [[-0.25 + 0.25 + 0.0625, 0.5 + 0.125, 0.25, 0]])
  np.testing.assert_allclose(returns, [[0.5625, 0.875, 1.0, 0]])


def test_gae_stops_no_gradient():
  rewards, values = random_inputs()
  jacobian = jax.jacobian(lambda v: advantages.gae(rewards, v, MASK)[0][2])(values)[:, 2]
  want = np.zeros((5, 5))
  for t in range(5):  # dA_t / dV_s is -1 at s = t and lam^(s-t-1) (1 - lam) after it.
    want[t, t] = -1
    for s in range(t + 1, 5):
      want[t, s] = 0.95 ** (s - t - 1) * (1 - 0.95)
  np.testing.assert_allclose(jacobian, want, atol=1e-6)


# The rows of `RESPONSES` without their stop token: the last was cut, the others ended.
AFTER = np.float32([0.0, 0.0, 0.0, 0.8])


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (1.0, 1.0)])
def test_a_cut_response_bootstraps_from_the_value_after_it(gamma, lam):
  rewards, values = random_inputs()
  result, returns = advantages.gae(rewards, values, MASK, gamma=gamma, lam=lam, bootstrap=AFTER)
  want = gae_by_definition(rewards, values, MASK, gamma, lam, AFTER)
  np.testing.assert_allclose(result, want, atol=1e-5)
  np.testing.assert_allclose(returns, np.where(MASK, want + values, 0), atol=1e-5)
  # To receive the value of what follows is to be paid it with the last token.
  paid = rewards.copy()
  paid[3, -1] += gamma * AFTER[3]
  same, _ = advantages.gae(paid, values, MASK, gamma=gamma, lam=lam)
  np.testing.assert_allclose(result, same, atol=1e-6)
  plain, _ = advantages.gae(rewards, values, MASK, gamma=gamma, lam=lam)
  np.testing.assert_array_equal(result[:3], plain[:3])
  assert np.abs(result[3] - plain[3])[-1] > 0.5


def test_bootstrapping_behind_a_prompt_and_before_padding():
  rewards, values = random_inputs((2, 6))
  mask = np.array([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]], bool)
  after = np.float32([0.5, -2.0])
  result, returns = advantages.gae(rewards, values, mask, gamma=0.9, lam=0.7, bootstrap=after)
  want = gae_by_definition(rewards, values, mask, 0.9, 0.7, after)
  np.testing.assert_allclose(result, want, atol=1e-6)
  assert (np.asarray(result)[~mask] == 0).all() and (np.asarray(returns)[~mask] == 0).all()


def test_the_first_of_two_halves_bootstraps_from_the_second():
  # With lambda 0 a response cut in two and bootstrapped is the response in one piece.
  rewards, values = random_inputs((1, 8))
  on = np.ones((1, 8), bool)
  whole, _ = advantages.gae(rewards, values, on, gamma=0.9, lam=0.0)
  half, _ = advantages.gae(
    rewards[:, :3], values[:, :3], on[:, :3], gamma=0.9, lam=0.0, bootstrap=values[:, 3]
  )
  np.testing.assert_array_equal(half, whole[:, :3])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 99])
def test_ngram_segments_match_loops(n):
  mask = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0] * 7], bool)
  ids = np.asarray(advantages.ngram_segments(mask, n))
  assert ids.dtype == np.int32
  for row, got in zip(mask, ids, strict=True):
    assert got[row].tolist() == [i // n for i in range(row.sum())]


# Right padded, behind a prompt, alone, none; with ids that are none where masked.
MACRO_MASK = np.array([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [0] * 6], bool)
MACRO_IDS = np.array(
  [[0, 0, 1, 2, 2, 77], [-5, 0, 1, 1, 1, 2], [9, 9, 0, 9, 9, 9], [3, 1, 4, 1, 5, 9]]
)


def macro_gae_by_loops(rewards, values, ids, mask, gamma, lam, bootstrap):
  result, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
  for b in range(len(rewards)):
    names = sorted(set(ids[b][mask[b]].tolist()))
    where = [np.flatnonzero(mask[b] & (ids[b] == name)) for name in names]
    reward = [np.float64(rewards[b, at]).sum() for at in where]
    value = [np.float64(values[b, at]).mean() for at in where]
    advantage, following = 0.0, bootstrap[b]
    for m in reversed(range(len(names))):
      error = reward[m] + gamma * following - value[m]
      advantage, following = error + gamma * lam * advantage, value[m]
      result[b, where[m]], returns[b, where[m]] = advantage, advantage + value[m]
  return result, returns


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5)])
@pytest.mark.parametrize("after", [None, np.float32([0.3, -0.7, 2.0, 1.0])])
def test_macro_gae_matches_loops(gamma, lam, after):
  rewards, values = random_inputs(MACRO_MASK.shape)
  result = advantages.macro_gae(
    rewards, values, MACRO_IDS, MACRO_MASK, gamma=gamma, lam=lam, bootstrap=after
  )
  end = np.zeros(4) if after is None else after
  want = macro_gae_by_loops(rewards, values, MACRO_IDS, MACRO_MASK, gamma, lam, end)
  np.testing.assert_allclose(result, want, atol=1e-5)


@pytest.mark.parametrize("mask", [MASK, MACRO_MASK])
def test_macro_gae_of_single_tokens_is_gae_bit_for_bit(mask):
  rewards, values = random_inputs(mask.shape)
  ids = advantages.ngram_segments(mask, 1)
  macro = advantages.macro_gae(rewards, values, ids, mask, gamma=0.9, lam=0.8)
  plain = advantages.gae(rewards, values, mask, gamma=0.9, lam=0.8)
  np.testing.assert_array_equal(macro, plain)


@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_macro_actions_conserve_the_return_and_shorten_the_way_of_credit(n):
  # Without values and discount the first advantage is the return, however it is cut.
  mask = np.ones((1, 64), bool)
  rewards = np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)
  ids, zeros = advantages.ngram_segments(mask, n), np.zeros((1, 64), np.float32)
  result, _ = advantages.macro_gae(rewards, zeros, ids, mask, lam=1.0)
  np.testing.assert_allclose(result[0, 0], rewards.sum(dtype=np.float64), rtol=1e-5)
  last = np.zeros((1, 64), np.float32)
  last[0, -1] = 1.0
  result, _ = advantages.macro_gae(last, zeros, ids, mask, lam=0.95)
  np.testing.assert_allclose(result[0, 0], 0.95 ** (-(-64 // n) - 1), rtol=1e-5)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_leave_one_out_matches_loops(n):
  rewards = np.random.default_rng(n).normal(5.0, 1.0, size=(4, n)).astype(np.float32)
  want = np.zeros((4, n))
  for b, i in np.ndindex(4, n):
    others = [rewards[b, j] for j in range(n) if j != i]
    want[b, i] = rewards[b, i] - sum(others) / len(others)
  result = advantages.leave_one_out(rewards)
  np.testing.assert_allclose(result, want, atol=1e-5)
  np.testing.assert_allclose(jnp.sum(result, axis=1), np.zeros(4), atol=1e-5)


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("scale", [True, False])
def test_group_normalize_matches_loops(n, scale):
  rewards = np.random.default_rng(n).normal(5.0, 2.0, size=(4, n)).astype(np.float32)
  want = np.zeros((4, n))
  for b in range(4):
    mean = sum(float(r) for r in rewards[b]) / n
    std = (sum((float(r) - mean) ** 2 for r in rewards[b]) / (n - 1)) ** 0.5
    for i in range(n):
      want[b, i] = (rewards[b, i] - mean) / (std + 1e-4 if scale else 1.0)
  result = advantages.group_normalize(rewards, scale=scale)
  np.testing.assert_allclose(result, want, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 103.3, 1000.7, -3e4])
@pytest.mark.parametrize(
  "function", [advantages.leave_one_out, advantages.group_normalize], ids=["rloo", "grpo"]
)
def test_groups_of_equal_rewards(function, value):
  rewards = np.full((2, 11), value, np.float32)
  rewards[1] = np.arange(11) % 2
  mask = np.ones((2, 11), bool)
  mask[0, :4] = False  # Seven equal ones are left.
  for on in (mask, mask | True):
    result, pull = jax.vjp(lambda x, on=on: function(x, mask=on), rewards)
    assert not np.any(result[0])
  assert np.abs(result[1]).min() > 0.4
  assert np.isfinite(pull(jnp.cos(result))[0]).all()


def test_equal_groups_are_those_in_which_no_two_rewards_differ():
  rewards = np.random.default_rng(0).choice([0.0, 0.1, 1.0], size=(60, 3)).astype(np.float32)
  rewards[::7, 1] = np.nan
  mask = np.isfinite(rewards)
  mask[::5, 0] = False
  want = [len(set(row[on])) < 2 for row, on in zip(rewards, mask, strict=True)]
  np.testing.assert_array_equal(advantages.equal_groups(rewards, mask=mask), want)
  assert 0 < np.mean(want) < 1
  np.testing.assert_array_equal(
    advantages.equal_groups(np.array([[2.0, 2], [2, 3]])), [True, False]
  )


@pytest.mark.parametrize(
  "function", [advantages.leave_one_out, advantages.group_normalize, advantages.equal_groups]
)
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_groups_need_two_samples(function, shape):
  with pytest.raises(AssertionError):
    function(jnp.zeros(shape))


def test_leaving_one_out_takes_noise_from_the_policy_gradient():
  rng = np.random.default_rng(0)
  policy, score = rng.dirichlet(np.ones(9)), rng.normal(3.0, 1.0, size=9)
  drawn = rng.choice(9, size=(4000, 4), p=policy)
  directions = (np.eye(9) - policy)[drawn]  # Of the logits, [4000, 4, 9].
  exact = policy * (score - policy @ score)
  rewards = score[drawn]
  without = np.mean(rewards[:, :, None] * directions, axis=1)
  gain = np.float64(advantages.leave_one_out(np.float32(rewards)))
  with_rloo = np.mean(gain[:, :, None] * directions, axis=1)
  for estimate in (without, with_rloo):
    assert np.abs(estimate.mean(axis=0) - exact).max() < 4 * estimate.std(axis=0).max() / 4000**0.5
  assert with_rloo.var(axis=0).sum() < 0.2 * without.var(axis=0).sum()


GROUPS = np.array([[1, 1, 0, 1, 1], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0], [0] * 5], bool)


@pytest.mark.parametrize(
  "function",
  [
    advantages.leave_one_out,
    advantages.group_normalize,
    lambda x, mask=None: advantages.group_normalize(x, scale=False, mask=mask),
  ],
)
def test_a_sample_left_out_of_its_group_is_not_there(function):
  rewards = np.random.default_rng(0).normal(size=GROUPS.shape).astype(np.float32)
  rewards[~GROUPS] = np.nan
  result = np.asarray(function(rewards, mask=GROUPS))
  for row, on, got in zip(rewards[:2], GROUPS[:2], result[:2], strict=True):
    np.testing.assert_allclose(got[on], function(row[None, on])[0], rtol=1e-5, atol=1e-6)
  assert (result[~GROUPS] == 0).all()
  np.testing.assert_array_equal(result[2:], np.zeros((2, 5)))  # Alone, and nobody.


def test_gae_refuses_other_shapes():
  with pytest.raises(AssertionError):
    advantages.gae(jnp.zeros((2, 3)), jnp.zeros((2, 4)), jnp.ones((2, 3), bool))


def gae(mask, rewards, values, **hyper):
  advantage, returns = advantages.gae(rewards, values, mask, **hyper)
  return squash(advantage) + squash(returns)


def macro_gae(mask, rewards, values, **hyper):
  ids = advantages.ngram_segments(mask, 2)
  advantage, returns = advantages.macro_gae(rewards, values, ids, mask, **hyper)
  return squash(advantage) + squash(returns)


def cut_gae(mask, rewards, values, after, **hyper):
  bootstrap = jnp.where(mask.any(axis=1), after, 0.0)
  return gae(mask, rewards, values, bootstrap=bootstrap, **hyper)


def segments(mask, x):
  return masked.masked_sum(masked.widen(x) * advantages.ngram_segments(mask, 2), mask)


def started(mask, x):
  return masked.masked_sum(masked.widen(x) * advantages.segments_from(mask, x > 0), mask)


def over_groups(function, **hyper):
  """A function of one array [B, K] under a mask of samples."""
  call = lambda m, x, **hyper: squash(function(x, mask=m, **hyper))  # noqa: E731
  return Case(call, ((B, K),), mask_shape=(B, K), hyper=hyper)


CASES = {
  "gae": Case(gae, ((B, T),) * 2, hyper={"gamma": 0.9, "lam": 0.8}),
  "gae/bootstrap": Case(cut_gae, ((B, T), (B, T), (B,)), padded=(0, 1), hyper={"lam": 0.8}),
  "ngram_segments": Case(segments, ((B, T),)),
  "segments_from": Case(started, ((B, T),)),
  "macro_gae": Case(macro_gae, ((B, T),) * 2, hyper={"gamma": 0.9, "lam": 0.8}),
  "equal_groups": over_groups(
    lambda x, mask: (
      advantages.equal_groups(x, mask=mask)[:, None] * jnp.where(mask, masked.widen(x), 0)
    )
  ),
  "leave_one_out": over_groups(advantages.leave_one_out),
  "group_normalize": over_groups(advantages.group_normalize, eps=1e-2),
  "group_normalize/centred": over_groups(
    lambda x, mask: advantages.group_normalize(x, scale=False, mask=mask)
  ),
}
