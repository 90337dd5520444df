import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import masked, preference, reward
from tests.losses.case import B, Case, T, per_row, squash


def log_sigmoid(x):
  return -np.logaddexp(0.0, -np.asarray(x, np.float64))


def sigmoid(x):
  return np.exp(log_sigmoid(x))


def four(n=9, seed=0, scale=4.0):
  """Log-probabilities of sequences: chosen, rejected, and the same under the reference."""
  return np.random.default_rng(seed).normal(-12, scale, size=(4, n)).astype(np.float32)


def log_ratios(arrays):
  chosen, rejected, ref_chosen, ref_rejected = np.asarray(arrays, np.float64)
  return chosen - ref_chosen, rejected - ref_rejected


def kl_of_pairs(p, q):
  return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


# From the log-ratios of both responses, by the formulas of the papers.
ORACLES = {
  "dpo": lambda w, l, beta, label_smoothing=0.0: (
    -(1 - label_smoothing) * log_sigmoid(beta * (w - l))
    - label_smoothing * log_sigmoid(beta * (l - w))
  ),
  "ipo": lambda w, l, beta: (w - l - 1 / (2 * beta)) ** 2,
  "hinge": lambda w, l, beta: np.maximum(0, 1 - beta * (w - l)),
  "robust_dpo": lambda w, l, beta, label_smoothing=0.0: (
    (
      (1 - label_smoothing) * -log_sigmoid(beta * (w - l))
      - label_smoothing * -log_sigmoid(beta * (l - w))
    )
    / (1 - 2 * label_smoothing)
  ),
  "exo_pair": lambda w, l, beta, label_smoothing=1e-3: kl_of_pairs(
    sigmoid(beta * (w - l)), 1 - label_smoothing
  ),
  "nca_pair": lambda w, l, beta: (
    -log_sigmoid(beta * w) - (log_sigmoid(-beta * w) + log_sigmoid(-beta * l)) / 2
  ),
  "bco_pair": lambda w, l, beta, shift=0.0: (
    -log_sigmoid(beta * w - shift) - log_sigmoid(-(beta * l - shift))
  ),
  "sppo_hard": lambda w, l, beta: (w - 0.5 / beta) ** 2 + (l + 0.5 / beta) ** 2,
  "apo_zero": lambda w, l, beta: 1 - sigmoid(beta * w) + sigmoid(beta * l),
  "apo_down": lambda w, l, beta: sigmoid(beta * w) + 1 - sigmoid(beta * (w - l)),
  "discopop": lambda w, l, beta, tau=0.05: (
    (1 - sigmoid(beta * (w - l) / tau)) * -log_sigmoid(beta * (w - l))
    + sigmoid(beta * (w - l) / tau) * np.exp(-beta * (w - l))
  ),
  "cpl": lambda w, l, beta, bias=0.5: np.log(
    (np.exp(beta * w) + np.exp(bias * beta * l)) / np.exp(beta * w)
  ),
}
EXTRAS = {
  "dpo": {"label_smoothing": 0.2},
  "robust_dpo": {"label_smoothing": 0.2},
  "exo_pair": {"label_smoothing": 0.2},
  "bco_pair": {"shift": 0.3},
  "discopop": {"tau": 0.3},
  "cpl": {"bias": 0.8},
}
VARIANTS = [(name, {}) for name in ORACLES] + list(EXTRAS.items())


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name, extras", VARIANTS)
def test_pairwise_losses_match_their_formulas(name, extras, beta):
  arrays = four()
  oracle = functools.partial(ORACLES[name], beta=beta, **extras)
  loss = functools.partial(preference.PAIRWISE_LOSSES[name], beta=beta, **extras)
  w, l = log_ratios(arrays)
  np.testing.assert_allclose(loss(*arrays), oracle(w, l), rtol=2e-5, atol=1e-6)
  grads = jax.grad(lambda *x: jnp.sum(loss(*x)), (0, 1, 2, 3))(*arrays)
  step = 1e-6
  by_chosen = (oracle(w + step, l) - oracle(w - step, l)) / (2 * step)
  by_rejected = (oracle(w, l + step) - oracle(w, l - step)) / (2 * step)
  for grad, want in zip(grads, (by_chosen, by_rejected, -by_chosen, -by_rejected), strict=True):
    np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-5)


def test_losses_by_name_share_one_signature():
  names = ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"]
  for name, loss in preference.PAIRWISE_LOSSES.items():
    assert loss.__name__ == f"{name}_loss" and vars(preference)[loss.__name__] is loss
    parameters = inspect.signature(loss).parameters
    assert list(parameters)[:5] == [*names, "beta"]
    assert parameters["beta"].default == 0.1
    assert all(p.default is not p.empty for p in list(parameters.values())[4:])
  assert set(ORACLES) | {"aot", "aot_unpaired"} == set(preference.PAIRWISE_LOSSES)


AT_THE_REFERENCE = {
  "dpo": np.log(2),
  "ipo": 25.0,
  "hinge": 1.0,
  "robust_dpo": np.log(2),
  "exo_pair": kl_of_pairs(0.5, 1e-3),
  "nca_pair": 2 * np.log(2),
  "bco_pair": 2 * np.log(2),
  "sppo_hard": 50.0,
  "aot": np.log(2),
  "aot_unpaired": np.log(2),
  "apo_zero": 1.0,
  "apo_down": 1.0,
  "discopop": (np.log(2) + 1) / 2,
  "cpl": np.log(2),
}


def takes(argument):
  """Names of the losses that take an argument."""
  losses = preference.PAIRWISE_LOSSES.items()
  return {name for name, loss in losses if argument in inspect.signature(loss).parameters}


def test_lists_of_losses_are_those_of_their_arguments():
  with_smoothing = {"dpo", "robust_dpo", "exo_pair", "aot", "aot_unpaired"}
  assert set(preference.SMOOTHED) == takes("label_smoothing") == with_smoothing
  assert set(preference.OF_BATCHES) == takes("mask")


def test_losses_of_margins_see_nothing_but_the_difference_of_two_log_ratios():
  chosen, rejected, ref_chosen, ref_rejected = four(scale=1.0)
  found = set()
  for name, loss in preference.PAIRWISE_LOSSES.items():
    want = loss(chosen, rejected, ref_chosen, ref_rejected, beta=1.0)
    margin = chosen - rejected - (ref_chosen - ref_rejected)
    zeros = np.zeros_like(margin)
    if np.allclose(loss(margin, zeros, zeros, zeros, beta=1.0), want, rtol=1e-4, atol=1e-5):
      found.add(name)
  # AOT compares the margins of a batch, in which a score in place of a log-ratio has no order.
  assert set(preference.OF_MARGINS) == found - set(preference.OF_BATCHES)


@pytest.mark.parametrize("name", preference.PAIRWISE_LOSSES)
def test_loss_where_policy_and_reference_agree(name):
  chosen, rejected = four()[:2]
  loss = preference.PAIRWISE_LOSSES[name](chosen, rejected, chosen, rejected)
  np.testing.assert_allclose(loss, np.full(9, AT_THE_REFERENCE[name]), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("name", ["dpo", "robust_dpo", "aot", "aot_unpaired"])
def test_label_smoothing_does_not_move_log_2(name, smoothing):
  x = four()[0]
  loss = preference.PAIRWISE_LOSSES[name](x, x, x, x, label_smoothing=smoothing)
  np.testing.assert_allclose(loss, np.full(9, np.log(2)), rtol=1e-6)


def test_a_pair_of_equal_responses_teaches_nothing():
  x, _, ref, _ = four()

  def loss(x):
    return jnp.sum(preference.dpo_loss(x, x, ref, ref))

  value, grad = jax.value_and_grad(loss)(x)
  np.testing.assert_allclose(value, 9 * np.log(2), rtol=1e-6)
  np.testing.assert_array_equal(grad, np.zeros(9))


@pytest.mark.parametrize("name", ["dpo", "robust_dpo", "exo_pair", "hinge", "apo_zero", "ipo"])
def test_every_step_pulls_the_responses_apart(name):
  chosen, rejected, ref_chosen, ref_rejected = four(scale=1.0)
  loss = preference.PAIRWISE_LOSSES[name]
  grads = jax.grad(lambda c, r: jnp.sum(loss(c, r, ref_chosen, ref_rejected)), (0, 1))
  up, down = grads(chosen, rejected)
  assert (up < 0).all() and (down > 0).all()


@pytest.mark.parametrize("margin", [-400.0, 400.0])
def test_dpo_of_extreme_margins(margin):
  zero = jnp.zeros(1)
  value, grad = jax.value_and_grad(
    lambda x: jnp.sum(preference.dpo_loss(x, zero, zero, zero, beta=1.0))
  )(jnp.full(1, margin))
  np.testing.assert_allclose(value, max(0.0, -margin))
  np.testing.assert_allclose(grad, [-1.0 if margin < 0 else 0.0])


def test_smoothed_dpo_is_minimal_at_the_log_odds():
  zero = jnp.zeros(1)
  grad = jax.grad(
    lambda x: jnp.sum(preference.dpo_loss(x, zero, zero, zero, beta=0.5, label_smoothing=0.1))
  )(jnp.full(1, np.log(0.9 / 0.1) / 0.5))
  np.testing.assert_allclose(grad, [0.0], atol=1e-6)


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.45])
def test_robust_dpo_is_unbiased_under_flips(rate):
  chosen, rejected, ref_chosen, ref_rejected = four(scale=1.0)
  loss = functools.partial(preference.robust_dpo_loss, beta=0.5, label_smoothing=rate)
  as_is = np.float64(loss(chosen, rejected, ref_chosen, ref_rejected))
  flipped = np.float64(loss(rejected, chosen, ref_rejected, ref_chosen))
  clean = preference.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.5)
  np.testing.assert_allclose((1 - rate) * as_is + rate * flipped, clean, rtol=1e-4)
  # Conservative DPO is biased: its mean is not the clean loss.
  smooth = functools.partial(preference.dpo_loss, beta=0.5, label_smoothing=rate)
  mean = (1 - rate) * smooth(chosen, rejected, ref_chosen, ref_rejected)
  mean += rate * smooth(rejected, chosen, ref_rejected, ref_chosen)
  assert np.abs(mean - clean).max() > 0.05


def softmax(x):
  return np.asarray(jax.nn.softmax(jnp.asarray(x)))


def descend(loss, logits, steps=4000, rate=1.0):
  grad = jax.grad(loss)
  return jax.jit(lambda x: jax.lax.fori_loop(0, steps, lambda _, x: x - rate * grad(x), x))(logits)


def all_pairs(logits, log_ref):
  """The four arrays of every ordered pair of actions, [A * A] each."""
  logp = jax.nn.log_softmax(logits)
  first, second = (x.ravel() for x in np.indices((len(log_ref), len(log_ref))))
  return logp[first], logp[second], log_ref[first], log_ref[second]


def bandit(n=6, seed=0):
  rng = np.random.default_rng(seed)
  log_ref = np.asarray(jax.nn.log_softmax(rng.normal(size=n).astype(np.float32)))
  return log_ref, rng.normal(size=n).astype(np.float32)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_dpo_on_bradley_terry_preferences_ends_at_the_tilted_reference(beta):
  log_ref, rewards = bandit()
  wins = sigmoid(rewards[:, None] - rewards[None, :]).ravel().astype(np.float32)

  def loss(logits):
    return jnp.sum(wins * preference.dpo_loss(*all_pairs(logits, log_ref), beta=beta)) / len(wins)

  want = softmax(log_ref + rewards / beta)
  result = softmax(descend(loss, log_ref, rate=8.0))
  np.testing.assert_allclose(result, want, atol=1e-4)
  assert np.abs(np.exp(log_ref) - want).max() > 0.1


def test_certain_labels_ipo_stops_and_dpo_does_not():
  zero = jnp.zeros(1)

  def margin(loss, steps, rate):
    def total(x):
      return jnp.sum(loss(x, -x, zero, zero, beta=0.1))

    return 2 * float(descend(total, zero, steps, rate)[0])

  np.testing.assert_allclose(margin(preference.ipo_loss, 400, 0.05), 1 / (2 * 0.1), rtol=1e-4)
  margins = [margin(preference.dpo_loss, steps, 50.0) for steps in (100, 400, 1600)]
  assert margins[0] + 10 < margins[1] < margins[2] - 10 and margins[0] > 1 / (2 * 0.1)


def pair_by_rank(high, low, beta, smoothing):
  """AOT by sorting: the loss of every row of `high`, in the order of `high`."""
  order = np.argsort(high, kind="stable")
  loss = np.zeros(len(high))
  for k, row in enumerate(order):
    margin = beta * (high[row] - np.sort(low)[k])
    loss[row] = -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
  return loss


def sides(name, arrays):
  """The two arrays that are sorted against each other."""
  chosen, rejected, ref_chosen, ref_rejected = np.asarray(arrays, np.float64)
  if name == "aot":
    return chosen - rejected, ref_chosen - ref_rejected
  return chosen - ref_chosen, rejected - ref_rejected


AOT = pytest.mark.parametrize("name", ["aot", "aot_unpaired"])


@AOT
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_aot_matches_sorting(name, smoothing, seed):
  arrays = four(8, seed)
  loss = functools.partial(preference.PAIRWISE_LOSSES[name], beta=0.3, label_smoothing=smoothing)
  want = pair_by_rank(*sides(name, arrays), 0.3, smoothing)
  np.testing.assert_allclose(loss(*arrays), want, rtol=1e-5)
  step, wide = 1e-5, np.asarray(arrays, np.float64)
  grads = jax.grad(lambda *x: jnp.sum(loss(*x)), (0, 1, 2, 3))(*arrays)
  for a, b in np.ndindex(4, 8):
    moved = [wide.copy(), wide.copy()]
    moved[0][a, b] -= step
    moved[1][a, b] += step
    low, high = (pair_by_rank(*sides(name, x), 0.3, smoothing).sum() for x in moved)
    np.testing.assert_allclose(grads[a][b], (high - low) / (2 * step), atol=1e-5)


@AOT
def test_aot_with_ties_pairs_each_row_once(name):
  arrays = np.round(four(12, scale=1.0))
  high, low = sides(name, arrays)
  assert len(set(high)) < 12 and len(set(low)) < 12
  result = preference.PAIRWISE_LOSSES[name](*arrays)
  np.testing.assert_allclose(result, pair_by_rank(high, low, 0.1, 0.0), rtol=1e-5)


@AOT
def test_masked_aot_is_aot_of_the_other_rows(name):
  arrays, mask = four(10), np.arange(10) % 3 != 1
  loss = preference.PAIRWISE_LOSSES[name]
  result = loss(*np.where(mask, arrays, np.nan), mask=mask)
  np.testing.assert_array_equal(result[mask], loss(*arrays[:, mask]))
  assert (np.asarray(result)[~mask] == 0).all()
  assert not np.allclose(result[mask], loss(*arrays)[mask])
  np.testing.assert_array_equal(loss(*arrays, mask=np.ones(10, bool)), loss(*arrays))


def test_aot_unpaired_needs_no_pairs():
  chosen, rejected, ref_chosen, ref_rejected = four()
  loss = preference.aot_unpaired_loss(chosen, rejected, ref_chosen, ref_rejected)
  other = preference.aot_unpaired_loss(chosen, rejected[::-1], ref_chosen, ref_rejected[::-1])
  np.testing.assert_array_equal(loss, other)
  dpo = preference.dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
  assert not np.allclose(loss, dpo)


@AOT
def test_aot_of_one_pair_is_dpo(name):
  arrays = four(1)
  np.testing.assert_allclose(
    preference.PAIRWISE_LOSSES[name](*arrays), preference.dpo_loss(*arrays), rtol=1e-6
  )


@AOT
def test_aot_inside_shard_map_sees_its_own_rows(name):
  # Rows of one device are a batch of their own there, and no mesh axis may be named again.
  arrays, loss = four(8), preference.PAIRWISE_LOSSES[name]
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.P("data")
  shards = jax.shard_map(loss, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows)
  want = [loss(*arrays[:, :4]), loss(*arrays[:, 4:])]
  np.testing.assert_allclose(jax.jit(shards)(*arrays), np.concatenate(want), rtol=1e-6)


def test_bco_shift_is_the_running_mean_of_implicit_rewards():
  arrays, beta = four(), 0.1
  w, l = (beta * x for x in log_ratios(arrays))
  mask, moments = np.ones(9, bool), reward.RunningMoments.zero()
  for x in (w, l):
    moments = reward.update_moments(moments, jnp.float32(x), mask)
  np.testing.assert_allclose(moments.mean, (w.mean() + l.mean()) / 2, rtol=1e-4)
  loss = functools.partial(preference.bco_pair_loss, *arrays, beta=beta)
  want = ORACLES["bco_pair"](w, l, 1.0, shift=(w.mean() + l.mean()) / 2)
  np.testing.assert_allclose(loss(shift=moments.mean), want, rtol=1e-5)
  assert jax.grad(lambda s: jnp.sum(loss(shift=s)))(moments.mean) == 0


def test_sppo_regresses_on_the_win_probability():
  policy, ref = four()[:2]
  wins = np.random.default_rng(1).random(9).astype(np.float32)
  loss = functools.partial(preference.sppo_loss, beta=0.4)
  want = (np.float64(policy) - ref - (wins - 0.5) / 0.4) ** 2
  np.testing.assert_allclose(loss(policy, ref, wins), want, rtol=1e-5)
  grads = jax.grad(lambda *x: jnp.sum(loss(*x)), (0, 2))(policy, ref, wins)
  np.testing.assert_allclose(grads[0], 2 * (policy - ref - (wins - 0.5) / 0.4), rtol=1e-5)
  assert not np.any(grads[1])
  # Its minimum is the multiplicative-weights step, up to the normaliser.
  np.testing.assert_allclose(loss(ref + (wins - 0.5) / 0.4, ref, wins), np.zeros(9), atol=1e-9)


def test_sppo_of_integer_wins_is_the_hard_loss():
  arrays = four()
  one, zero = np.ones(9, np.int32), np.zeros(9, np.int32)
  result = preference.sppo_loss(arrays[0], arrays[2], one)
  result += preference.sppo_loss(arrays[1], arrays[3], zero)
  np.testing.assert_allclose(preference.sppo_hard_loss(*arrays), result, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_cpl_with_a_reference_and_no_bias_is_dpo(beta):
  arrays = four()
  result = preference.cpl_loss(*arrays, beta=beta, bias=1.0)
  np.testing.assert_array_equal(result, preference.dpo_loss(*arrays, beta=beta))


def test_cpl_bias_punishes_a_common_fall():
  zero, chosen, rejected = np.zeros((3, 1), np.float32)
  chosen, rejected = chosen - 1.2, rejected - 3

  def loss(fall, bias):
    arrays = chosen - fall, rejected - fall, zero, zero
    return float(preference.cpl_loss(*arrays, beta=1.0, bias=bias)[0])

  np.testing.assert_allclose(loss(10, 1.0), loss(0, 1.0), rtol=1e-5)
  np.testing.assert_allclose([loss(0, 0.5), loss(10, 0.5)], [0.554, 4.71], atol=5e-3)


def test_cpl_recovers_the_policy_behind_regret_preferences():
  states, actions, length, pairs, beta = 4, 3, 4, 4000, 0.5
  rng = np.random.default_rng(0)
  truth = np.asarray(jax.nn.log_softmax(rng.normal(size=(states, actions)).astype(np.float32)))
  state = rng.integers(states, size=(pairs, 2, length))
  action = rng.integers(actions, size=(pairs, 2, length))
  advantage = beta * truth[state, action].sum(-1)
  first = rng.random(pairs) < sigmoid(advantage[:, 0] - advantage[:, 1])
  swap = ~first[:, None, None]
  state, action = (np.where(swap, x[:, ::-1], x) for x in (state, action))

  def loss(logits, bias):
    total = jnp.sum(jax.nn.log_softmax(logits)[state, action], axis=-1)
    zero = jnp.zeros(pairs)
    return jnp.mean(preference.cpl_loss(total[:, 0], total[:, 1], zero, zero, beta=beta, bias=bias))

  def fit(bias):
    start = np.zeros((states, actions), np.float32)
    return jax.nn.log_softmax(descend(functools.partial(loss, bias=bias), start, 400, 4.0))

  def kl(fitted):
    return float(np.mean(np.sum(np.exp(truth) * (truth - fitted), axis=1)))

  plain, biased = fit(1.0), fit(0.5)
  assert kl(np.full_like(truth, -np.log(actions))) > 0.1
  assert kl(plain) < 0.005 < 0.01 < kl(biased)
  assert biased[state[:, 0], action[:, 0]].mean() > plain[state[:, 0], action[:, 0]].mean() + 0.02


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cpo_is_dpo_with_a_uniform_reference(smoothing):
  chosen, rejected = four()[:2]
  zero = np.zeros(9, np.float32)
  result = preference.cpo_loss(chosen, rejected, beta=0.3, label_smoothing=smoothing)
  want = preference.dpo_loss(chosen, rejected, zero, zero, beta=0.3, label_smoothing=smoothing)
  np.testing.assert_array_equal(result, want)


@pytest.mark.parametrize("beta, gamma, smoothing", [(2.0, 0.5, 0.0), (0.1, 0.5, 0.1), (10, 3, 0)])
def test_simpo_matches_its_formula(beta, gamma, smoothing):
  chosen, rejected = -np.abs(four(scale=0.5)[:2] + 12)
  margin = beta * (np.float64(chosen) - rejected) - gamma
  want = -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
  loss = functools.partial(preference.simpo_loss, beta=beta, gamma=gamma, label_smoothing=smoothing)
  np.testing.assert_allclose(loss(chosen, rejected), want, rtol=1e-5)
  grad = jax.grad(lambda c: jnp.sum(loss(c, rejected)))(chosen)
  np.testing.assert_allclose(grad, beta * (sigmoid(margin) - (1 - smoothing)), rtol=1e-4, atol=1e-5)


def test_orpo_is_the_log_likelihood_of_the_odds_ratio():
  rng = np.random.default_rng(0)
  p, q = rng.uniform(0.01, 0.99, size=(2, 50))
  odds_ratio = (p / (1 - p)) / (q / (1 - q))
  want = -0.3 * np.log(odds_ratio / (1 + odds_ratio))
  loss = functools.partial(preference.orpo_loss, beta=0.3)
  chosen, rejected = np.float32(np.log([p, q]))
  np.testing.assert_allclose(loss(chosen, rejected), want, rtol=1e-4, atol=1e-6)
  # d log odds / d log p is 1 / (1 - p).
  grad = jax.grad(lambda c: jnp.sum(loss(c, rejected)))(chosen)
  np.testing.assert_allclose(grad, -0.3 / (1 + odds_ratio) / (1 - p), rtol=1e-4)


def test_orpo_of_certain_and_impossible_responses_is_finite():
  x = np.float32([0.0, -1e-9, -1e-6, -1e-3, -88.0, -500.0])
  pairs = np.array(list(itertools.product(x, x)), np.float32).T
  value, grads = jax.value_and_grad(
    lambda c, r: jnp.sum(preference.orpo_loss(c, r, beta=1.0)), (0, 1)
  )(*pairs)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_slic_matches_its_formula():
  chosen, rejected, target = four()[:3]
  loss = functools.partial(preference.slic_loss, margin=2.0, sft_weight=0.5)
  gap = np.float64(chosen) - rejected
  want = [max(0.0, 2.0 - gap[i]) - 0.5 * target[i] for i in range(9)]
  np.testing.assert_allclose(loss(chosen, rejected, target), want, rtol=1e-5)
  assert 0 < (gap < 2.0).sum() < 9
  grads = jax.grad(lambda *x: jnp.sum(loss(*x)), (0, 1, 2))(chosen, rejected, target)
  active = np.float32(gap < 2.0)
  for grad, wanted in zip(grads, (-active, active, np.full(9, -0.5)), strict=True):
    np.testing.assert_allclose(grad, wanted)


def kto_inputs(seed=0, shift=0.5):
  rng = np.random.default_rng(seed)
  policy, ref, mismatched_ref = rng.normal(-12, 3, size=(3, 9)).astype(np.float32)
  mismatched = mismatched_ref + rng.normal(shift, 0.5, size=9).astype(np.float32)
  return policy, ref, rng.random(9) < 0.5, mismatched, mismatched_ref


@pytest.mark.parametrize("shift", [2.0, -2.0])  # Of the estimate: above 0, and held at 0.
def test_kto_matches_loops(shift):
  policy, ref, desirable, mismatched, mismatched_ref = kto_inputs(shift=shift)
  mask = np.arange(9) % 4 != 1
  kl = max(0.0, sum(float(mismatched[i] - mismatched_ref[i]) for i in range(9) if mask[i]) / 7)
  assert (kl > 0) == (shift > 0) and 0 < desirable[mask].sum() < 7
  want, slope = np.zeros(9), np.zeros(9)
  for i in range(9):
    if not mask[i]:
      continue
    gain, weight = 0.3 * (float(policy[i]) - float(ref[i]) - kl), 2.0 if desirable[i] else 0.5
    want[i] = weight * (1 - (sigmoid(gain) if desirable[i] else sigmoid(-gain)))
    slope[i] = (-1 if desirable[i] else 1) * weight * 0.3 * sigmoid(gain) * sigmoid(-gain)
  loss = functools.partial(
    preference.kto_loss, beta=0.3, desirable_weight=2.0, undesirable_weight=0.5, mask=mask
  )
  arrays = policy, ref, desirable, mismatched, mismatched_ref
  np.testing.assert_allclose(loss(*arrays), want, rtol=1e-5)
  grads = jax.grad(lambda *x: jnp.sum(loss(x[0], x[1], desirable, x[2], x[3])), (0, 1, 2, 3))(
    policy, ref, mismatched, mismatched_ref
  )
  for grad, wanted in zip(grads, (slope, -slope, np.zeros(9), np.zeros(9)), strict=True):
    np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-7)


def test_kto_without_a_mask_reads_every_row():
  arrays = kto_inputs()
  np.testing.assert_array_equal(
    preference.kto_loss(*arrays), preference.kto_loss(*arrays, mask=np.ones(9, bool))
  )
  integers = arrays[2].astype(np.int32)
  np.testing.assert_array_equal(
    preference.kto_loss(*arrays), preference.kto_loss(*arrays[:2], integers, *arrays[3:])
  )


def test_kto_without_drift_is_apo_zero_of_single_responses():
  chosen, rejected, ref_chosen, ref_rejected = arrays = four()
  zero, yes = np.zeros(9, np.float32), np.ones(9, bool)
  up = preference.kto_loss(chosen, ref_chosen, yes, zero, zero)
  down = preference.kto_loss(rejected, ref_rejected, ~yes, zero, zero)
  np.testing.assert_allclose(up + down, preference.apo_zero_loss(*arrays), rtol=1e-6)


def test_pair_regression_matches_its_formula_in_either_order():
  arrays = four()
  target = np.random.default_rng(1).normal(size=9).astype(np.float32)
  w, l = log_ratios(arrays)
  result = preference.pair_regression_loss(*arrays, target)
  np.testing.assert_allclose(result, (w - l - target) ** 2, rtol=1e-5)
  swapped = preference.pair_regression_loss(*arrays[[1, 0, 3, 2]], -target)
  np.testing.assert_allclose(swapped, result, rtol=1e-6)
  assert not np.any(
    jax.grad(lambda t: jnp.sum(preference.pair_regression_loss(*arrays, t)))(target)
  )
  half = np.full(9, 1 / (2 * 0.3), np.float32)
  np.testing.assert_allclose(
    preference.ipo_loss(*arrays, beta=0.3),
    preference.pair_regression_loss(*arrays, half),
    rtol=1e-6,
  )


@pytest.mark.parametrize("eta", [0.5, 1.5])
def test_rebel_takes_one_exact_mirror_descent_step(eta):
  log_old, rewards = bandit(seed=2)
  weight = (np.exp(log_old)[:, None] * np.exp(log_old)[None, :]).ravel()
  target = eta * (rewards[:, None] - rewards[None, :]).ravel()

  def loss(logits):
    return jnp.sum(weight * preference.pair_regression_loss(*all_pairs(logits, log_old), target))

  result = softmax(descend(loss, log_old, rate=0.5))
  np.testing.assert_allclose(result, softmax(log_old + eta * rewards), atol=1e-5)


def game(n=5, seed=0):
  """P[i, j] = P(i beats j), with cycles; and log-probabilities of a reference."""
  rng = np.random.default_rng(seed)
  raw = rng.normal(size=(n, n))
  wins = sigmoid(1.5 * (raw - raw.T)).astype(np.float32)
  return wins, np.asarray(jax.nn.log_softmax(rng.normal(size=n).astype(np.float32)))


@pytest.mark.parametrize("hard", [False, True])
def test_online_ipo_has_the_gradient_of_the_regularised_game(hard):
  wins, log_ref = game()
  tau, logits = 0.3, np.random.default_rng(1).normal(size=5).astype(np.float32)
  policy = softmax(logits)  # Of the samples: no gradient.
  weight = (policy[:, None] * policy[None, :]).ravel()

  def ipo(logits):
    arrays = all_pairs(logits, log_ref)
    if not hard:
      target = (wins.ravel() - 0.5) / tau
      return jnp.sum(weight * preference.pair_regression_loss(*arrays, target))
    # A label is drawn: the first wins with probability P, else the second does.
    first = preference.ipo_loss(*arrays, beta=tau)
    second = preference.ipo_loss(arrays[1], arrays[0], arrays[3], arrays[2], beta=tau)
    return jnp.sum(weight * (wins.ravel() * first + (1 - wins.ravel()) * second))

  def value(logits):
    logp = jax.nn.log_softmax(logits)
    return jnp.exp(logp) @ wins @ policy - tau * jnp.sum(jnp.exp(logp) * (logp - log_ref))

  np.testing.assert_allclose(
    jax.grad(ipo)(logits), -4 / tau * jax.grad(value)(logits), rtol=1e-3, atol=1e-5
  )


def test_online_ipo_of_uniform_pairs_is_the_extragradient_direction():
  wins, log_ref = game()
  beta, logits = 0.2, np.random.default_rng(1).normal(size=5).astype(np.float32)
  against_policy = wins @ softmax(logits)
  target = (against_policy[:, None] - against_policy[None, :]).ravel() / beta

  def loss(logits):
    return jnp.mean(preference.pair_regression_loss(*all_pairs(logits, log_ref), target))

  direction = logits - log_ref - against_policy / beta
  np.testing.assert_allclose(
    jax.grad(loss)(logits), 4 / 5 * (direction - direction.mean()), rtol=1e-4, atol=1e-5
  )


def test_online_ipo_finds_the_condorcet_winner_and_offline_the_borda_one():
  wins = np.float32([[0.5, 0.6, 0.6], [0.4, 0.5, 0.9], [0.4, 0.1, 0.5]])
  tau, log_ref = 0.05, np.full(3, -np.log(3), np.float32)
  target = (wins.ravel() - 0.5) / tau

  def end(online):
    def loss(logits):
      policy = jax.lax.stop_gradient(jax.nn.softmax(logits)) if online else jnp.full(3, 1 / 3)
      weight = (policy[:, None] * policy[None, :]).ravel()
      return jnp.sum(weight * preference.pair_regression_loss(*all_pairs(logits, log_ref), target))

    return softmax(descend(loss, jnp.zeros(3), 20_000, 0.02))

  np.testing.assert_allclose(end(online=True), [0.819, 0.146, 0.035], atol=2e-3)
  np.testing.assert_allclose(end(online=False), [0.338, 0.659, 0.003], atol=2e-3)


def xpo(arrays, sampled_by_ref, beta, alpha):
  bonus = preference.value_bonus(sampled_by_ref, coef=alpha)
  return preference.dpo_loss(*arrays, beta=beta) + bonus


def test_xpo_is_online_vpo():
  arrays = four()
  beta, alpha = 0.2, 0.03
  grads = [
    jax.grad(lambda *x, add=add: jnp.sum(preference.dpo_loss(*x, beta=beta) + add(x)), (0, 1))
    for add in (
      lambda x: preference.value_bonus(x[1], coef=alpha * beta),  # VPO: alpha beta log pi.
      lambda x: alpha * beta * (x[1] - x[3]),  # As derived: minus alpha times the value.
    )
  ]
  jax.tree.map(np.testing.assert_array_equal, *(g(*arrays) for g in grads))
  np.testing.assert_array_equal(
    xpo(arrays, arrays[1], beta, 0.0), preference.dpo_loss(*arrays, beta=beta)
  )


def test_the_bonus_is_minus_the_value_of_rewards_centred_on_the_calibration():
  log_ref, rewards = bandit()
  beta, calibration = 0.4, softmax(np.random.default_rng(1).normal(size=6))
  rewards = rewards - calibration @ rewards
  log_policy = np.log(softmax(log_ref + rewards / beta))
  value = np.exp(log_policy) @ (rewards - beta * (log_policy - log_ref))
  bonus = preference.value_bonus(log_policy, coef=beta)
  bonus -= preference.value_bonus(log_ref, coef=beta)
  np.testing.assert_allclose(calibration @ bonus, -value, atol=1e-5)


def explore(alpha, seed, arms=5, rounds=60, beta=0.1):
  """Runs XPO with an exact argmin over a finite class; True if it ever tries the best arm.

  The reference samples that arm once in a thousand.
  """
  rewards = np.array(list(itertools.product([0, 0.5, 1, 1.5, 2], repeat=arms)), np.float32)
  log_ref = np.array(jax.nn.log_softmax(jnp.float32([0] * (arms - 1) + [-7])))
  logp = np.asarray(jax.nn.log_softmax(log_ref + rewards / beta))
  rng = np.random.default_rng(seed)
  truth = np.append(rng.choice([0, 0.5], arms - 1), 2.0)
  loss, current = np.zeros(len(rewards)), log_ref
  for _ in range(rounds):
    mine, other = rng.choice(arms, p=softmax(current)), rng.choice(arms, p=softmax(log_ref))
    if mine == arms - 1:
      return True
    wins = rng.random() < sigmoid(truth[mine] - truth[other])
    w, l = (mine, other) if wins else (other, mine)
    ref = np.broadcast_to(log_ref[:, None], (arms, len(rewards)))
    loss += xpo((logp[:, w], logp[:, l], ref[w], ref[l]), logp[:, other], beta, alpha)
    current = logp[np.argmin(loss + 1e-6 * rewards.sum(axis=1))]  # Ties: nearest the reference.
  return False


@pytest.mark.parametrize("alpha, found", [(0.0, 0), (-1e-3, 0), (3e-3, 3)])
def test_xpo_explores_what_the_reference_does_not(alpha, found):
  assert sum(explore(alpha, seed) for seed in range(3)) == found


def test_offline_vpo_stays_near_its_calibration():
  rng = np.random.default_rng(0)
  log_ref, rewards = bandit(12, seed=3)
  first, second = rng.choice(12, size=(2, 60), p=softmax(log_ref))
  wins = rng.random(60) < sigmoid(rewards[first] - rewards[second])
  w, l = np.where(wins, first, second), np.where(wins, second, first)
  beta = 0.1

  @jax.vmap
  def end(alpha):
    def loss(logits):
      logp = jax.nn.log_softmax(logits)
      arrays = logp[w], logp[l], log_ref[w], log_ref[l]
      bonus = preference.value_bonus(logp[w], coef=-alpha * beta)
      return jnp.mean(preference.dpo_loss(*arrays, beta=beta) + bonus)

    return jax.nn.log_softmax(descend(loss, log_ref, 3000, 2.0))

  fitted = np.asarray(end(jnp.float32([0.0, 0.1, 1.0, 10.0])))
  near = [np.mean((logp - log_ref)[w]) for logp in fitted]
  kl = [np.sum(np.exp(logp) * (logp - log_ref)) for logp in fitted]
  assert near == sorted(near) and kl == sorted(kl, reverse=True)
  assert near[0] < -1 and near[-1] > 0


def f_reverse_kl(u):
  return u * np.log(u)


def f_forward_kl(u):
  return -np.log(u)


def f_jensen_shannon(u):
  return u * np.log(u) - (u + 1) * np.log((u + 1) / 2)


def f_alpha(u, alpha=0.5):
  return (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))


@pytest.mark.parametrize(
  "name, f",
  [
    ("reverse_kl", f_reverse_kl),
    ("forward_kl", f_forward_kl),
    ("jensen_shannon", f_jensen_shannon),
    ("alpha", f_alpha),
  ],
)
def test_divergence_scores_are_derivatives_of_the_divergences(name, f):
  log_ratio = np.linspace(-3, 3, 25)
  step = 1e-6 * np.exp(log_ratio)
  slope = (f(np.exp(log_ratio) + step) - f(np.exp(log_ratio) - step)) / (2 * step)
  slope -= (f(1 + 1e-6) - f(1 - 1e-6)) / 2e-6  # A constant has no effect on a difference.
  ref = np.random.default_rng(0).normal(size=25).astype(np.float32)
  policy = np.float32(log_ratio) + ref
  score = functools.partial(preference.DIVERGENCE_SCORES[name])
  np.testing.assert_allclose(score(policy, ref), slope, rtol=1e-4, atol=1e-5)
  grad = jax.grad(lambda x: jnp.sum(score(x, ref)))(policy)
  numeric = np.gradient(slope, log_ratio)[1:-1]
  np.testing.assert_allclose(grad[1:-1], numeric, rtol=0.05)


@pytest.mark.parametrize("alpha", [0.25, 0.75])
def test_alpha_divergence_score(alpha):
  policy, ref = four(scale=1.0)[:2]
  want = (1 - np.exp(np.float64(ref) - policy) ** alpha) / alpha
  result = preference.alpha_divergence_score(policy, ref, alpha=alpha)
  np.testing.assert_allclose(result, want, rtol=1e-5)


@pytest.mark.parametrize("loss", [preference.dpo_loss, preference.hinge_loss])
def test_the_reverse_kl_score_is_the_log_ratio(loss):
  arrays, zero = four(), np.zeros(9, np.float32)
  score = preference.DIVERGENCE_SCORES["reverse_kl"]
  chosen, rejected = score(arrays[0], arrays[2]), score(arrays[1], arrays[3])
  np.testing.assert_allclose(loss(chosen, rejected, zero, zero), loss(*arrays), rtol=1e-6)


@pytest.mark.parametrize("name", preference.DIVERGENCE_SCORES)
def test_f_dpo_ends_at_the_optimum_of_its_divergence(name):
  log_ref, rewards = bandit(4, seed=1)
  beta, score = 1.0, preference.DIVERGENCE_SCORES[name]
  wins = sigmoid(rewards[:, None] - rewards[None, :]).ravel().astype(np.float32)

  def loss(logits):
    first, second, ref_first, ref_second = all_pairs(logits, log_ref)
    zero = jnp.zeros(16)
    scores = score(first, ref_first), score(second, ref_second)
    return jnp.mean(wins * preference.dpo_loss(*scores, zero, zero, beta=beta))

  logits = descend(loss, log_ref, 6000, 1.0)
  log_ratio = np.asarray(jax.nn.log_softmax(logits) - log_ref, np.float64)
  # The condition of Lagrange: reward minus beta f' is the same for every action.
  slope = {
    "reverse_kl": log_ratio,
    "forward_kl": -np.exp(-log_ratio),
    "jensen_shannon": np.log(2 / (1 + np.exp(-log_ratio))),
    "alpha": -2 * np.exp(-log_ratio / 2),
  }[name]
  assert np.ptp(rewards - beta * slope) < 5e-3 < 0.5 < np.ptp(rewards)


def test_wpo_weights_match_loops():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(5, T, 7)).astype(np.float32)
  tokens, lengths = rng.integers(7, size=(5, T)), [6, 3, 1, 0, 4]
  mask = np.arange(T) < np.array(lengths)[:, None]
  log_probs = jax.nn.log_softmax(logits)
  logprobs = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
  collision = jax.nn.logsumexp(2 * log_probs, axis=-1)
  want, plain = np.ones(5), np.ones(5)
  for b, length in enumerate(lengths):
    for t in range(length):
      p = np.exp(logits[b, t].astype(np.float64))
      p /= p.sum()
      want[b] *= (p[tokens[b, t]] / (p**2).sum()) ** (1 / length)
      plain[b] *= p[tokens[b, t]] ** (1 / length)
  np.testing.assert_allclose(preference.wpo_weights(logprobs, collision, mask), want, rtol=1e-5)
  zero = jnp.zeros_like(collision)
  np.testing.assert_allclose(preference.wpo_weights(logprobs, zero, mask), plain, rtol=1e-5)
  grads = jax.grad(lambda *x: jnp.sum(preference.wpo_weights(*x, mask)), (0, 1))(
    logprobs, collision
  )
  assert not any(np.any(g) for g in grads)


def test_wpo_weighs_a_response_without_surprise_by_one():
  uniform = np.full((3, 4), -np.log(7), np.float32)  # log p(y) and log sum_v p(v)^2 alike.
  mask = np.ones((3, 4), bool)
  np.testing.assert_allclose(preference.wpo_weights(uniform, uniform, mask), np.ones(3))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_length_desensitized_logprobs_match_loops(alpha):
  rng = np.random.default_rng(0)
  chosen, rejected = rng.normal(size=(5, 6)), rng.normal(size=(5, 8))
  prompt = rng.integers(0, 3, size=(2, 5, 1))
  length = np.array([[4, 1, 3, 0, 2], [2, 5, 3, 2, 0]])[..., None]
  masks = [
    (np.arange(n) >= p) & (np.arange(n) < p + k)
    for n, p, k in zip((6, 8), prompt, length, strict=True)
  ]
  result = preference.length_desensitized_logprobs(
    np.float32(chosen), np.float32(rejected), *masks, alpha=alpha
  )
  for logprobs, mask, total in zip((chosen, rejected), masks, result, strict=True):
    want = np.zeros(5)
    for b in range(5):
      shared = min(masks[0][b].sum(), masks[1][b].sum())
      for k, t in enumerate(np.flatnonzero(mask[b])):
        want[b] += (1.0 if k < shared else alpha) * logprobs[b, t]
    np.testing.assert_allclose(total, want, rtol=1e-5, atol=1e-6)
    if alpha == 1:
      np.testing.assert_allclose(total, np.sum(logprobs, axis=1, where=mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", preference.PAIRWISE_LOSSES)
@pytest.mark.parametrize("shapes", [[(3,), (3,), (3,), (1,)], [(3, 1)] * 4, [(3,)] * 3 + [(2,)]])
def test_pairwise_losses_refuse_bad_shapes(name, shapes):
  with pytest.raises(AssertionError):
    preference.PAIRWISE_LOSSES[name](*(jnp.zeros(shape) for shape in shapes))


@pytest.mark.parametrize(
  "function, shapes",
  [
    (preference.cpo_loss, [(3,), (1,)]),
    (preference.simpo_loss, [(3, 1), (3, 1)]),
    (preference.orpo_loss, [(3,), (1,)]),
    (preference.slic_loss, [(3,), (3,), (1,)]),
    (preference.sppo_loss, [(3,), (3,), (1,)]),
    (preference.kto_loss, [(3,), (3,), (3,), (3,), (1,)]),
    (preference.pair_regression_loss, [(3,)] * 4 + [(1,)]),
    (preference.alpha_divergence_score, [(3,), (1,)]),
    (preference.jensen_shannon_score, [(3,), (1,)]),
    (preference.wpo_weights, [(3, 2), (3, 2), (3, 1)]),
    (preference.length_desensitized_logprobs, [(3, 2), (3, 2), (3, 2), (3, 1)]),
  ],
)
def test_bad_shapes_are_refused(function, shapes):
  with pytest.raises(AssertionError):
    function(*(jnp.zeros(shape) for shape in shapes))


def coupled(function, n, **hyper):
  """A loss of rows [B] that reads the mask itself."""

  def call(mask, *x, **hyper):
    return masked.masked_mean(function(*x, mask=mask, **hyper), mask)

  return Case(call, ((B,),) * n, mask_shape=(B,), hyper=hyper)


def kto(policy, ref, liked, policy_mismatched, ref_mismatched, **hyper):
  return preference.kto_loss(policy, ref, liked > 0, policy_mismatched, ref_mismatched, **hyper)


def wpo(mask, logprobs, collision):
  weights = preference.wpo_weights(logprobs, collision, mask)
  return squash(weights * masked.masked_sum(logprobs, mask, axis=1))


def length_desensitized(mask, chosen, rejected, alpha):
  shorter = mask & (jax.lax.broadcasted_iota(jnp.int32, mask.shape, 1) < 2)
  sums = preference.length_desensitized_logprobs(chosen, rejected, mask, shorter, alpha=alpha)
  return squash(sums[0]) + squash(sums[1])


CASES = {
  "dpo_loss": per_row(preference.dpo_loss, 4, beta=0.1, label_smoothing=0.1),
  "ipo_loss": per_row(preference.ipo_loss, 4, beta=0.1),
  "hinge_loss": per_row(preference.hinge_loss, 4, beta=0.1),
  "robust_dpo_loss": per_row(preference.robust_dpo_loss, 4, beta=0.1, label_smoothing=0.1),
  "exo_pair_loss": per_row(preference.exo_pair_loss, 4, beta=0.1, label_smoothing=0.01),
  "nca_pair_loss": per_row(preference.nca_pair_loss, 4, beta=0.1),
  "bco_pair_loss": per_row(preference.bco_pair_loss, 4, beta=0.1, shift=0.2),
  "sppo_loss": per_row(preference.sppo_loss, 3, beta=0.5),
  "sppo_hard_loss": per_row(preference.sppo_hard_loss, 4, beta=0.1),
  "aot_loss": coupled(preference.aot_loss, 4, beta=0.1, label_smoothing=0.1),
  "aot_unpaired_loss": coupled(preference.aot_unpaired_loss, 4, beta=0.1, label_smoothing=0.1),
  "apo_zero_loss": per_row(preference.apo_zero_loss, 4, beta=0.1),
  "apo_down_loss": per_row(preference.apo_down_loss, 4, beta=0.1),
  "discopop_loss": per_row(preference.discopop_loss, 4, beta=1.0, tau=0.05),
  "cpl_loss": per_row(preference.cpl_loss, 4, beta=0.1, bias=0.5),
  "cpo_loss": per_row(preference.cpo_loss, 2, beta=0.1, label_smoothing=0.1),
  "simpo_loss": per_row(preference.simpo_loss, 2, beta=2.0, gamma=0.5, label_smoothing=0.1),
  "orpo_loss": per_row(
    lambda c, r, beta: preference.orpo_loss(c - 1, r - 1, beta=beta), 2, beta=1.0
  ),
  "slic_loss": per_row(preference.slic_loss, 3, margin=1.0, sft_weight=0.1),
  "kto_loss": coupled(kto, 5, beta=0.1, desirable_weight=2.0, undesirable_weight=0.5),
  "pair_regression_loss": per_row(preference.pair_regression_loss, 5),
  "value_bonus": per_row(preference.value_bonus, 1, coef=0.1),
  "alpha_divergence_score": per_row(preference.alpha_divergence_score, 2, alpha=0.5),
  "alpha_divergence_score/forward_kl": per_row(preference.DIVERGENCE_SCORES["forward_kl"], 2),
  "alpha_divergence_score/reverse_kl": per_row(preference.DIVERGENCE_SCORES["reverse_kl"], 2),
  "jensen_shannon_score": per_row(preference.jensen_shannon_score, 2),
  "wpo_weights": Case(wpo, ((B, T),) * 2),
  "length_desensitized_logprobs": Case(length_desensitized, ((B, T),) * 2, hyper={"alpha": 0.5}),
}


SLOPES = {
  "reverse_kl": (lambda h: h, lambda h: 1.0),
  "forward_kl": (lambda h: 1 - np.exp(-h), lambda h: np.exp(-h)),
  "jensen_shannon": (lambda h: np.log(2) - np.log1p(np.exp(-h)), lambda h: 1 / (1 + np.exp(h))),
  "alpha": (lambda h: 2 - 2 * np.exp(-h / 2), lambda h: np.exp(-h / 2)),
}


@pytest.mark.parametrize("name", preference.DIVERGENCE_SCORES)
@pytest.mark.parametrize("chosen", [-78.0, -60.0, -41.0, -5.0, 3.0])
def test_f_dpo_is_that_of_float64_as_far_as_float32_goes(name, chosen):
  """Value and gradient of the loss far from the reference, which 200 tokens easily are."""
  score, rejected, beta = preference.DIVERGENCE_SCORES[name], -30.0, 0.1
  zero = jnp.zeros(1)

  def loss(chosen, rejected):
    scores = score(chosen, zero), score(rejected, zero)
    return preference.dpo_loss(*scores, zero, zero, beta=beta)[0]

  value, grads = jax.value_and_grad(loss, (0, 1))(jnp.full(1, chosen), jnp.full(1, rejected))
  of, slope = SLOPES[name]
  chosen, rejected = np.float64(chosen), np.float64(rejected)
  margin = beta * (of(chosen) - of(rejected))
  np.testing.assert_allclose(value, np.logaddexp(0, -margin), rtol=1e-4, atol=1e-30)
  push = beta * np.exp(-np.logaddexp(0, margin))
  want = -push * slope(chosen), push * slope(rejected)
  np.testing.assert_allclose(np.ravel(grads), want, rtol=1e-4, atol=1e-30)
