import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.losses import game, kl, masked, policy_gradient, preference
from rlhf_jax.simulation import games
from tests.losses import tabular
from tests.losses.case import B, Case, T, V, squash

# Rock-paper-scissors: each beats the next with probability 0.9. No reward explains it.
CYCLE = np.array([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])
CYCLE_REF = np.log([0.6, 0.3, 0.1])


@pytest.fixture
def float64():
  """The rates of convergence are measured to 1e-14."""
  with jax.enable_x64(True):
    yield


def log_normalize(x):
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def divergence(log_p, log_q):
  return float(np.sum(np.exp(log_p) * (log_p - log_q)))


def random_game(seed, n=10):
  """A preference matrix and a reference."""
  rng = np.random.default_rng(seed)
  return games.random_game(n, rng), log_normalize(rng.normal(size=n))


@functools.partial(jax.jit, static_argnames=("step", "steps", "eta", "tau"))
def _iterate(log_ref, preference, step, steps, eta, tau):
  def one(log_policy, t):
    size = eta(t) if callable(eta) else eta
    new = step(log_policy, log_ref, preference, eta=size, tau=tau)
    return new, new

  return jax.lax.scan(one, log_ref, jnp.arange(steps))[1]


def iterate(step, steps, log_ref, preference, eta, *, tau):
  """[steps + 1, A] policies from the reference on; `eta` is a number or a function of t."""
  return np.concatenate([[log_ref], _iterate(log_ref, preference, step, steps, eta, tau)])


@functools.cache
def schedule(tau):
  return lambda t: 2 / (tau * (t + 2))


def equilibrium(preference, log_ref, tau):
  """Extragradient ascent in numpy, an algorithm of its own; to a residual of 1e-9."""
  log_policy, size = log_ref, 1 / (tau + 3)

  def toward(opponent):
    gain = preference @ np.exp(opponent)
    return log_normalize((1 - size * tau) * log_policy + size * tau * log_ref + size * gain)

  for _ in range(3000):
    log_policy = toward(toward(log_policy))
  residual = log_policy - log_ref - preference @ np.exp(log_policy) / tau
  assert np.ptp(residual) < 1e-9
  return log_policy


@pytest.mark.parametrize("mix", [0.0, 0.125, 0.5, 1.0])
def test_mixture_is_the_normalised_geometric_mean(mix):
  policy, ref = 3 * np.random.default_rng(0).normal(size=(2, 4, 5, 7)).astype(np.float32)
  result = game.mixture_logits(policy, ref, mix)
  np.testing.assert_allclose(jnp.sum(jnp.exp(result), axis=-1), np.ones((4, 5)), rtol=1e-5)
  want = (1 - mix) * log_normalize(np.float64(policy)) + mix * log_normalize(np.float64(ref))
  np.testing.assert_allclose(result, log_normalize(want), atol=1e-5)
  # Whatever is added to all logits of a position.
  np.testing.assert_allclose(game.mixture_logits(policy + 7, ref - 30, mix), result, atol=1e-5)


def test_mixture_is_not_a_coin_toss_between_the_two():
  policy, ref = jnp.log(jnp.float32([0.9, 0.1])), jnp.log(jnp.float32([0.1, 0.9]))
  np.testing.assert_allclose(jnp.exp(game.mixture_logits(policy, ref, 0.5)), [0.5, 0.5], rtol=1e-6)
  geometric = np.array([0.9**0.75 * 0.1**0.25, 0.1**0.75 * 0.9**0.25])
  result = jnp.exp(game.mixture_logits(policy, ref, 0.25))
  np.testing.assert_allclose(result, geometric / geometric.sum(), rtol=1e-6)
  assert abs(float(result[0]) - (0.75 * 0.9 + 0.25 * 0.1)) > 0.04


def test_mixture_of_tokens_that_cannot_be():
  policy = np.float32([0.2, -np.inf, 1.0])
  ref = np.float32([-np.inf, 0.3, 0.1])
  for mix, want in ((0.0, policy), (1.0, ref)):
    np.testing.assert_allclose(
      game.mixture_logits(policy, ref, mix), log_normalize(want), rtol=1e-5
    )
  np.testing.assert_array_equal(game.mixture_logits(policy, ref, 0.3), [-np.inf, -np.inf, 0.0])


PREFERENCE, _ = random_game(3, 9)
OPPONENT = np.random.default_rng(4).dirichlet(np.ones(9))


def nash_md_gradient(params, ref, loss, tau):
  def mean(params):
    losses = loss(tabular.logprobs(params), tabular.logprobs(ref), tau)
    return jnp.sum(tabular.probabilities(params) * jnp.sum(losses, axis=1))

  return jax.grad(mean)(params)


def exact_gradient(params, ref, tau):
  gains = (PREFERENCE @ OPPONENT).astype(np.float32)
  return jax.grad(lambda params: -tabular.objective(params, ref, gains, tau))(params)


@pytest.mark.parametrize("tau", [0.0, 0.3])
@pytest.mark.parametrize("baseline", [0.5, 0.0, 7.0])
def test_nash_md_loss_has_the_gradient_of_the_regularised_game(baseline, tau):
  params, ref = tabular.draw(0), tabular.draw(1)

  def loss(logprobs, ref_logprobs, tau):
    wins = jnp.asarray(PREFERENCE @ OPPONENT, jnp.float32)
    return game.nash_md_loss(logprobs, ref_logprobs, tabular.MASK, wins, tau=tau, baseline=baseline)

  result = nash_md_gradient(params, ref, loss, tau)
  tabular.assert_same_gradient(result, exact_gradient(params, ref, tau))


def test_a_token_that_answers_for_its_own_log_ratio_only_is_biased():
  """The form that other libraries use; if it had the same gradient, the test above were blind."""
  params, ref = tabular.draw(0), tabular.draw(1)

  def loss(logprobs, ref_logprobs, tau):
    gain = jnp.asarray(PREFERENCE @ OPPONENT, jnp.float32)[:, None] - 0.5
    gain = gain - tau * kl.k1(logprobs, ref_logprobs)
    return policy_gradient.reinforce_loss(logprobs, gain)

  result, exact = nash_md_gradient(params, ref, loss, 0.3), exact_gradient(params, ref, 0.3)
  assert max(np.abs(result[name] - exact[name]).max() for name in exact) > 0.01


def test_nash_md_loss_of_padding_and_of_what_is_constant():
  logprobs, ref = -np.abs(np.random.default_rng(0).normal(size=(2, 2, 4))).astype(np.float32)
  mask = np.array([[True, True, False, False], [True] * 4])
  logprobs[~mask] = np.nan

  def total(logprobs, ref, wins):
    losses = game.nash_md_loss(logprobs, ref, mask, wins, tau=0.1)
    return jnp.sum(losses), losses

  wins = jnp.float32([0.9, 0.2])
  grads, losses = jax.grad(total, (0, 1, 2), has_aux=True)(logprobs, ref, wins)
  assert (np.asarray(losses)[~mask] == 0).all()
  assert (np.asarray(grads[0])[~mask] == 0).all() and np.isfinite(grads[0]).all()
  assert not np.any(grads[1]) and not np.any(grads[2])


def test_self_play_has_the_direction_of_online_ipo():
  """Regression on pairs of the policy's own samples: `4 / tau` times the same gradient."""
  params, ref, tau = tabular.draw(0), tabular.draw(1), 0.3
  preference = jnp.asarray(PREFERENCE, jnp.float32)
  log_ref = jnp.sum(tabular.logprobs(ref), axis=1)
  weight = tabular.probabilities(params)

  def ipo(params):
    ratio = jnp.sum(tabular.logprobs(params), axis=1) - log_ref
    error = ratio[:, None] - ratio[None, :] - (preference - 0.5) / tau
    return jnp.sum(weight[:, None] * weight[None, :] * jnp.square(error))

  def loss(logprobs, ref_logprobs, tau):
    wins = jnp.sum(preference * weight[None, :], axis=1)
    return game.nash_md_loss(logprobs, ref_logprobs, tabular.MASK, wins, tau=tau)

  result = nash_md_gradient(params, ref, loss, tau)
  tabular.assert_same_gradient(jax.grad(ipo)(params), result, scale=4 / tau)


def stationary_point(mix, tau=0.1):
  """Runs exact gradient descent on `nash_md_loss` to its end, on responses of one token."""
  log_ref = jnp.asarray(CYCLE_REF, jnp.float32)
  preference, mask = jnp.asarray(CYCLE, jnp.float32), np.ones((3, 1), bool)

  def loss(logits):
    logprobs = jax.nn.log_softmax(logits)
    opponent = jnp.exp(game.mixture_logits(logprobs, log_ref, mix))
    wins = jax.lax.stop_gradient(jnp.sum(preference * opponent[None, :], axis=1))
    losses = game.nash_md_loss(logprobs[:, None], log_ref[:, None], mask, wins, tau=tau)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(logprobs)) * losses[:, 0])

  step = lambda logits, _: (logits - 0.5 * jax.grad(loss)(logits), None)  # noqa: E731
  logits, _ = jax.jit(lambda: jax.lax.scan(step, log_ref, None, length=8000))()
  return np.exp(log_normalize(np.float64(logits)))


def test_self_play_ends_at_the_equilibrium():
  result = stationary_point(0.0)
  np.testing.assert_allclose(result, np.exp(equilibrium(CYCLE, CYCLE_REF, 0.1)), atol=1e-4)
  np.testing.assert_allclose(result, [0.4607, 0.2127, 0.3267], atol=1e-4)


def test_a_fixed_mixture_ends_at_another_point():
  """At `ref exp(P mixture / tau)`, which is not the equilibrium."""
  result = stationary_point(0.25)
  np.testing.assert_allclose(result, [0.443, 0.153, 0.405], atol=1e-3)
  mixture = np.exp(log_normalize(0.75 * np.log(result) + 0.25 * CYCLE_REF))
  residual = np.log(result) - CYCLE_REF - CYCLE @ mixture / 0.1
  assert np.ptp(residual) < 1e-3


@pytest.mark.parametrize("mix", [0.0, 0.25])
def test_ipo_md_is_stationary_where_nash_md_is(mix):
  """Regression on pairs of the mixture's samples (arXiv 2403.08635), with every pair enumerated."""
  tau = 0.1
  log_ref, wins = jnp.asarray(CYCLE_REF, jnp.float32), jnp.asarray(CYCLE, jnp.float32)
  first, second = (x.ravel() for x in np.indices((3, 3)))

  def gradient(log_policy):
    weight = jnp.exp(game.mixture_logits(log_policy, log_ref, mix))

    def loss(logits):
      logprobs = jax.nn.log_softmax(logits)
      losses = preference.pair_regression_loss(
        logprobs[first],
        logprobs[second],
        log_ref[first],
        log_ref[second],
        (wins[first, second] - 0.5) / tau,
      )
      return jnp.sum(weight[first] * weight[second] * losses)

    return np.abs(jax.grad(loss)(log_policy)).max()

  end = jnp.log(jnp.asarray(stationary_point(mix, tau), jnp.float32))
  assert gradient(end) < 1e-3 * gradient(log_ref)
  other = jnp.log(jnp.asarray(stationary_point(0.25 - mix, tau), jnp.float32))
  assert gradient(end) < 0.01 * gradient(other)


@pytest.mark.parametrize("seed", range(3))
def test_steps_match_numpy(seed):
  preference, log_ref = random_game(seed)
  log_policy = log_normalize(np.random.default_rng(seed + 10).normal(size=10))
  eta, tau = 0.7, 0.2
  arrays = [jnp.asarray(x, jnp.float32) for x in (log_policy, log_ref, preference)]
  mixture = log_normalize((1 - eta * tau) * log_policy + eta * tau * log_ref)
  want = log_normalize(mixture + eta * preference @ np.exp(mixture))
  np.testing.assert_allclose(game.nash_md_step(*arrays, eta=eta, tau=tau), want, atol=1e-5)

  def prox(opponent):
    gain = preference @ np.exp(opponent)
    return log_normalize((log_policy + eta * log_ref + eta / tau * gain) / (1 + eta))

  want = prox(prox(log_policy))
  np.testing.assert_allclose(game.mirror_prox_step(*arrays, eta=eta, tau=tau), want, atol=1e-5)


def test_a_prox_step_maximises_what_it_says():
  """The closed form of a half step against gradient ascent on its objective."""
  preference, log_ref = random_game(0, 4)
  log_policy = log_normalize(np.random.default_rng(1).normal(size=4))
  eta, tau = 0.5, 0.3
  # With a constant preference against any opponent both half steps are the same one.
  preference = np.broadcast_to(preference[:, :1], (4, 4))
  arrays = [jnp.asarray(x, jnp.float32) for x in (log_policy, log_ref, preference)]
  result = np.float64(game.mirror_prox_step(*arrays, eta=eta, tau=tau))

  def gained(log_p):
    return (
      np.exp(log_p) @ preference[:, 0]
      - tau * divergence(log_p, log_ref)
      - tau / eta * divergence(log_p, log_policy)
    )

  rng = np.random.default_rng(2)
  others = [log_normalize(result + size * rng.normal(size=4)) for size in (1e-2, 0.1, 1) * 50]
  assert all(gained(other) < gained(result) for other in others)


def test_nash_md_schedule_keeps_its_bound_and_constant_steps_stop_short(float64):
  tau, star = 0.1, equilibrium(CYCLE, CYCLE_REF, 0.1)
  policies = iterate(game.nash_md_step, 1000, CYCLE_REF, CYCLE, schedule(tau), tau=tau)
  gaps = np.array([divergence(star, p) for p in policies])
  count = np.arange(1, 1001)
  assert (gaps[1:] <= 8 / (tau**2 * (count + 1))).all()
  np.testing.assert_allclose(gaps[[10, 100, 1000]], [2.5e-3, 1.2e-4, 8.7e-7], rtol=0.05)
  for eta, floor in ((0.2, 8e-5), (1.0, 2e-3)):
    policies = iterate(game.nash_md_step, 4000, CYCLE_REF, CYCLE, eta, tau=tau)
    np.testing.assert_allclose(divergence(star, policies[-1]), floor, rtol=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_nash_md_bound_on_random_games(seed, float64):
  tau = 0.1
  preference, log_ref = random_game(seed)
  star = equilibrium(preference, log_ref, tau)
  policies = iterate(game.nash_md_step, 1000, log_ref, preference, schedule(tau), tau=tau)
  gaps = [divergence(star, p) for p in policies[1:]]
  assert (gaps <= 8 / (tau**2 * (np.arange(1, 1001) + 1))).all()


@pytest.mark.parametrize("seed", range(10))
def test_mirror_prox_converges_linearly(seed, float64):
  tau = 0.1
  preference, log_ref = random_game(seed)
  star = equilibrium(preference, log_ref, tau)
  policies = iterate(game.mirror_prox_step, 100, log_ref, preference, 2 * tau, tau=tau)
  gaps = np.array([divergence(star, p) for p in policies])
  assert (gaps <= gaps[0] * (1 + 2 * tau) ** -np.arange(101.0) + 1e-12).all()
  np.testing.assert_allclose(policies[-1], star, atol=1e-7)


@pytest.mark.parametrize("tau", [0.01, 0.1, 0.5])
def test_mirror_prox_is_extragradient_of_another_step(tau, float64):
  preference, log_ref = random_game(3)
  policies = iterate(game.mirror_prox_step, 50, log_ref, preference, 2 * tau, tau=tau)
  size, log_policy = 2 / (1 + 2 * tau), log_ref
  for got in policies[1:]:

    def toward(opponent, start=log_policy):
      gain = preference @ np.exp(opponent)
      return log_normalize((1 - size * tau) * start + size * tau * log_ref + size * gain)

    log_policy = toward(toward(log_policy))
    np.testing.assert_allclose(got, log_policy, atol=1e-11)


def mirror_descent_step(log_policy, log_ref, preference, *, eta, tau):
  """Plain mirror ascent against the policy itself, for comparison."""
  gain = preference @ jnp.exp(log_policy)
  return jax.nn.log_softmax((1 - eta * tau) * log_policy + eta * tau * log_ref + eta * gain)


@pytest.mark.parametrize(
  ("tau", "queries", "want"),
  [
    (0.1, 200, {"omd": 3.6e-7, "constant": 7.5e-5, "schedule": 9.1e-6, "egpo": 1.9e-4}),
    (0.01, 1200, {"omd": 7.0e-3, "constant": 7.4e-3, "schedule": 4.7e-2, "egpo": 6.7e-3}),
  ],
)
def test_duality_gaps_at_equal_numbers_of_preferences(tau, queries, want, float64):
  """Medians over ten games; Mirror Prox with its large step is far ahead of everything."""
  rng, size = np.random.default_rng(1), 1 / (tau + 3)
  # EGPO of a step is Mirror Prox of another one.
  runs = {
    "omd": (mirror_descent_step, queries, size),
    "constant": (game.nash_md_step, queries, size),
    "schedule": (game.nash_md_step, queries, schedule(tau)),
    "egpo": (game.mirror_prox_step, queries // 2, size * tau / (1 - size * tau)),
    "prox": (game.mirror_prox_step, queries // 2, 2 * tau),
  }
  gaps = {name: [] for name in runs}
  for _ in range(10):
    wins = games.random_game(10, rng)
    log_ref = log_normalize(rng.normal(size=10))
    for name, (step, steps, eta) in runs.items():
      last = jnp.asarray(iterate(step, steps, log_ref, wins, eta, tau=tau)[-1])
      # Both players' regrets are the same in a symmetric game.
      gaps[name].append(2 * float(game.exploitability(last, log_ref, wins, tau=tau)))
  median = {name: np.median(values) for name, values in gaps.items()}
  for name, value in want.items():
    np.testing.assert_allclose(median[name], value, rtol=0.05, err_msg=name)
  assert median["prox"] < (1e-14 if tau == 0.1 else 1e-12)
  assert median["prox"] < 1e-3 * min(median[name] for name in want)


@pytest.mark.parametrize("e", [0.1, -0.01])
def test_three_raters_of_opposed_tastes(e, float64):
  """The equilibrium is continuous where the best average win rate jumps between responses."""
  preference = games.three_raters(e)
  uniform = np.full(3, -np.log(3))
  tau = 1e-3
  policies = iterate(game.mirror_prox_step, 20000, uniform, preference, 2 * tau, tau=tau)
  want = [1 / 3 + e / 2, 1 / 3 + e / 2, 1 / 3 - e]
  np.testing.assert_allclose(np.exp(policies[-1]), want, atol=2e-3)
  assert preference.mean(axis=1).argmax() == (0 if e > 0 else 1)


def win_of(log_q, log_p, log_ref, preference, tau):
  payoff = np.exp(log_q) @ preference @ np.exp(log_p)
  return payoff - tau * divergence(log_q, log_ref) + tau * divergence(log_p, log_ref)


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_exploitability_is_the_gain_of_the_best_response(tau):
  preference, log_ref = random_game(1, 4)
  log_policy = log_normalize(np.random.default_rng(2).normal(size=4))
  arrays = [jnp.asarray(x, jnp.float32) for x in (log_policy, log_ref, preference)]
  result = float(game.exploitability(*arrays, tau=tau))
  best = log_normalize(log_ref + preference @ np.exp(log_policy) / tau)
  gain = win_of(best, log_policy, log_ref, preference, tau) - 0.5
  np.testing.assert_allclose(result, gain, atol=1e-6)
  rng = np.random.default_rng(0)
  for _ in range(300):  # Nobody else gains more.
    other = log_normalize(best + rng.exponential() * rng.normal(size=4))
    assert win_of(other, log_policy, log_ref, preference, tau) - 0.5 <= gain + 1e-9
  assert gain > 0


def test_exploitability_is_zero_at_the_equilibrium_alone(float64):
  for seed in range(5):
    preference, log_ref = random_game(seed)
    star = equilibrium(preference, log_ref, 0.1)
    at = functools.partial(game.exploitability, log_ref=log_ref, preference=preference, tau=0.1)
    np.testing.assert_allclose(at(star), 0.0, atol=1e-12)
    moved = log_normalize(star + 0.1 * np.random.default_rng(seed).normal(size=10))
    assert at(moved) > 1e-5


def test_small_tau_leaves_float32_finite():
  arrays = [jnp.asarray(x, jnp.float32) for x in (CYCLE_REF, CYCLE_REF, CYCLE)]
  value, grad = jax.value_and_grad(game.exploitability)(*arrays, tau=1e-3)
  assert np.isfinite(value) and np.isfinite(grad).all()
  # The best response is nearly pure: what beats the reference most.
  np.testing.assert_allclose(value, (CYCLE @ np.exp(CYCLE_REF)).max() - 0.5, atol=3e-3)
  policy = game.mirror_prox_step(*arrays, eta=2e-3, tau=1e-3)
  np.testing.assert_allclose(jnp.sum(jnp.exp(policy)), 1.0, rtol=1e-5)


def test_deep_self_play_on_sequences_finds_the_tabular_equilibrium():
  """The sampled loss with all samples enumerated, on a policy over two tokens."""
  ref, tau = tabular.draw(1), 0.2
  log_ref = jnp.sum(tabular.logprobs(ref), axis=1)
  preference = jnp.asarray(PREFERENCE, jnp.float32)
  tx = optax.adam(0.03)

  def loss(params):
    logprobs, probability = tabular.logprobs(params), tabular.probabilities(params)
    wins = jnp.sum(preference * probability[None, :], axis=1)
    losses = game.nash_md_loss(logprobs, tabular.logprobs(ref), tabular.MASK, wins, tau=tau)
    return jnp.sum(probability * jnp.sum(losses, axis=1))

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None

  start = (ref, tx.init(ref))
  (params, _), _ = jax.jit(lambda: jax.lax.scan(step, start, None, length=1500))()
  result = jnp.sum(tabular.logprobs(params), axis=1)
  star = equilibrium(PREFERENCE, np.float64(log_ref), tau)
  assert divergence(star, np.float64(log_ref)) > 0.05
  assert divergence(star, np.float64(result)) < 1e-4
  assert game.exploitability(result, log_ref, preference, tau=tau) < 1e-4


@pytest.mark.parametrize(
  "function, shapes",
  [
    (lambda p, q: game.mixture_logits(p, q, 0.5), [(2, 3), (3,)]),
    (lambda *x: game.nash_md_loss(*x, tau=0.1), [(2, 3), (2, 3), (2, 3), (3,)]),
    (lambda *x: game.nash_md_step(*x, eta=0.1, tau=0.1), [(3,), (3,), (3, 2)]),
    (lambda *x: game.mirror_prox_step(*x, eta=0.1, tau=0.1), [(3,), (2,), (3, 3)]),
    (lambda *x: game.exploitability(*x, tau=0.1), [(3, 1), (3, 1), (3, 3)]),
  ],
)
def test_bad_shapes_are_refused(function, shapes):
  with pytest.raises(AssertionError):
    function(*(jnp.zeros(shape) for shape in shapes))


def mixture(mask, policy, ref, **hyper):
  return squash(jnp.where(mask[:, :, None], game.mixture_logits(policy, ref, **hyper), 0.0))


def nash_md(mask, logprobs, ref_logprobs, preference, **hyper):
  return jnp.sum(game.nash_md_loss(logprobs, ref_logprobs, mask, preference, **hyper))


def of_tables(function, **hyper):
  """One game per row, made from any numbers; rows are left out before the tables are."""

  def call(mask, log_policy, log_ref, scores, **hyper):
    def one(log_policy, log_ref, scores):
      preference = jax.nn.sigmoid(scores - scores.T)
      return function(
        jax.nn.log_softmax(log_policy), jax.nn.log_softmax(log_ref), preference, **hyper
      )

    x = (log_policy, log_ref, scores)
    x = [jnp.where(mask.reshape(B, *(1,) * (a.ndim - 1)), masked.widen(a), 0.0) for a in x]
    return squash(jax.vmap(one)(*x).reshape(B, -1))

  return Case(call, ((B, 4), (B, 4), (B, 4, 4)), mask_shape=(B,), hyper=hyper)


STEP = {"eta": 0.5, "tau": 0.3}
CASES = {
  "mixture_logits": Case(mixture, ((B, T, V),) * 2, hyper={"mix": 0.3}),
  "nash_md_loss": Case(
    nash_md, ((B, T), (B, T), (B,)), padded=(0, 1), hyper={"tau": 0.1, "baseline": 0.4}
  ),
  "nash_md_step": of_tables(game.nash_md_step, **STEP),
  "mirror_prox_step": of_tables(game.mirror_prox_step, **STEP),
  "exploitability": of_tables(game.exploitability, tau=0.3),
}
