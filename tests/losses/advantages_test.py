import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import advantages
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


def gae_by_definition(rewards, values, mask, gamma, lam):
  """The sum over later errors, one pair of tokens at a time."""
  result = np.zeros(rewards.shape)
  for b in range(rewards.shape[0]):
    real = np.flatnonzero(mask[b])
    for i, t in enumerate(real):
      for j in range(i, len(real)):
        s = real[j]
        successor = values[b, real[j + 1]] if j + 1 < len(real) else 0.0
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


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
@pytest.mark.parametrize(
  "function", [advantages.leave_one_out, advantages.group_normalize], ids=["rloo", "grpo"]
)
def test_groups_of_equal_rewards(function, value):
  rewards = np.full((2, 4), value, np.float32)
  rewards[1] = [0, 1, 0, 1]
  result, pull = jax.vjp(function, rewards)
  np.testing.assert_allclose(result[0], np.zeros(4), atol=1e-3)
  assert np.abs(result[1]).min() > 0.5
  assert np.isfinite(pull(jnp.cos(result))[0]).all()


@pytest.mark.parametrize("function", [advantages.leave_one_out, advantages.group_normalize])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_groups_need_two_samples(function, shape):
  with pytest.raises(AssertionError):
    function(jnp.zeros(shape))


def test_gae_refuses_other_shapes():
  with pytest.raises(AssertionError):
    advantages.gae(jnp.zeros((2, 3)), jnp.zeros((2, 4)), jnp.ones((2, 3), bool))


def gae(mask, rewards, values, **hyper):
  advantage, returns = advantages.gae(rewards, values, mask, **hyper)
  return squash(advantage) + squash(returns)


def over_groups(function, **hyper):
  """A function of one array [B, K] without a mask: every sample is real."""
  call = lambda m, x, **hyper: squash(function(jnp.where(m[:, None], x, 0.0), **hyper))  # noqa: E731
  return Case(call, ((B, K),), mask_shape=(B,), hyper=hyper)


CASES = {
  "gae": Case(gae, ((B, T),) * 2, hyper={"gamma": 0.9, "lam": 0.8}),
  "leave_one_out": over_groups(advantages.leave_one_out),
  "group_normalize": over_groups(advantages.group_normalize, eps=1e-2),
  "group_normalize/centred": over_groups(lambda x: advantages.group_normalize(x, scale=False)),
}
