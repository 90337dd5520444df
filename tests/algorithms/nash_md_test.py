"""Nash-MD's steps against the exact equilibrium of games small enough to enumerate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import nash_md
from rlhf_jax.losses import game
from rlhf_jax.train_step import init_state
from tests.algorithms.tabular import (
  T,
  V,
  sample_rollout,
  sequence_logprobs,
  tabular_apply,
  tabular_params,
)

TAU = 0.15


def policy_apply(params, tokens, **kwargs):
  return tabular_apply({"policy": params, "value": VALUE}, tokens, **kwargs)[0]


VALUE = {"start": jnp.zeros(()), "one": jnp.zeros(V)}


@pytest.fixture(scope="module")
def problem():
  """Preferences between the nine sequences with cycles, a reference, and the equilibrium."""
  rng = np.random.default_rng(0)
  upper = np.triu(rng.random((V**T, V**T)), 1)
  preference = upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(V**T)
  ref = tabular_params(jax.random.key(1))["policy"]
  log_ref = sequence_logprobs(ref)
  equilibrium = log_ref
  for _ in range(400):
    equilibrium = game.mirror_prox_step(equilibrium, log_ref, preference, eta=2 * TAU, tau=TAU)
  assert float(game.exploitability(equilibrium, log_ref, preference, tau=TAU)) < 1e-6
  return jnp.asarray(preference, jnp.float32), ref, log_ref, equilibrium


def sequence_of(rollout):
  return rollout.tokens[:, 1] * V + rollout.tokens[:, 2]


def ref_logprobs_of(ref, rollout):
  start, one = jax.nn.log_softmax(ref["start"]), jax.nn.log_softmax(ref["one"])
  first, second = rollout.tokens[:, 1], rollout.tokens[:, 2]
  return jnp.stack([start[first], one[first, second]], axis=1)


def judged(config, preference, ref, params, opponent, key, rows=512):
  """A batch of `rows` prompts, all alike."""
  own_key, other_key = jax.random.split(key)
  count = config.responses
  own = sample_rollout(params, own_key, rows * count)
  other = sequence_of(sample_rollout(opponent, other_key, rows))
  wins = preference[sequence_of(own), jnp.repeat(other, count)]
  split = lambda x: x.reshape(rows, count, *x.shape[1:])  # noqa: E731
  return nash_md.NashMDBatch(
    rollout=jax.tree.map(split, own),
    ref_logprobs=split(ref_logprobs_of(ref, own)),
    preference=split(wins),
    tau=jnp.full(rows, TAU),
  )


@pytest.mark.parametrize(
  "settings",
  [
    {"objective": "policy_gradient"},
    {"objective": "policy_gradient", "ema": 0.8},
    {"objective": "policy_gradient", "extragradient": True},
    {"objective": "regression"},
    {"objective": "regression", "extragradient": True},
  ],
  ids=lambda settings: "-".join(settings) + "-" + settings["objective"],
)
def test_reaches_the_equilibrium(settings, problem):
  preference, ref, log_ref, equilibrium = problem
  start_kl = jnp.sum(jnp.exp(log_ref) * (log_ref - equilibrium))
  assert start_kl > 0.1, "the problem must not start at its solution"
  config = nash_md.NashMDConfig(mix=0.0, tau=TAU, **settings)
  steps = 400
  tx = optax.adam(optax.linear_schedule(0.03, 0.0, steps))
  update = nash_md.make_nash_md_step(policy_apply, tx, config)
  draw = jax.jit(functools.partial(judged, config, preference, ref))

  def against(state, opponent, key):
    return update(state, draw(state.params, opponent, key), key)

  step = nash_md.extragradient(against) if config.extragradient else against
  state = init_state(jax.tree.map(jnp.copy, ref), tx)
  average = state.params
  for i in range(steps):
    opponent = jax.tree.map(jnp.copy, average if config.ema else state.params)
    state, metrics = step(state, opponent, jax.random.fold_in(jax.random.key(2), i))
    average = nash_md.moving_average(opponent, state.params, config.ema)
  policy = sequence_logprobs(state.params)
  assert float(jnp.sum(jnp.exp(policy) * (policy - equilibrium))) < 0.01
  exact = float(jnp.sum(jnp.exp(policy) * (policy - log_ref)))
  np.testing.assert_allclose(float(metrics["kl/ref"]), exact, atol=0.1)


def test_looks_ahead_and_steps_from_the_start():
  """On `x' = x - opponent / 2`, with keys that differ."""
  seen = []

  def step(state, opponent, key):
    seen.append((float(state.params), float(opponent), np.asarray(jax.random.key_data(key))))
    new = state._replace(params=state.params - 0.5 * opponent)
    jax.tree.map(lambda x: x.delete(), state.params)  # As a step that donates its state does.
    return new, {}

  state = init_state(jnp.float32(8.0), optax.sgd(1.0))
  new, _ = nash_md.extragradient(step)(state, jnp.float32(4.0), jax.random.key(0))
  assert [entry[:2] for entry in seen] == [(8.0, 4.0), (8.0, 6.0)]
  assert float(new.params) == 5.0
  assert (seen[0][2] != seen[1][2]).any()


def test_normalised_lengths_make_tau_a_penalty_per_token(problem):
  preference, ref, _, _ = problem
  params = tabular_params(jax.random.key(3))["policy"]
  losses = {}
  for normalize, tau in ((False, 0.2), (True, 0.4)):
    config = nash_md.NashMDConfig(
      objective="regression", mix=0.0, tau=tau, normalize_lengths=normalize
    )
    batch = judged(config, preference, ref, params, params, jax.random.key(0), rows=64)
    batch = batch._replace(tau=jnp.full(64, tau))
    losses[normalize], _ = nash_md.loss_fn(
      params, batch, jax.random.key(0), apply_fn=policy_apply, config=config, temperature=1.0
    )
  # Both sequences have T = 2 tokens: (h / 2 - d / (2 tau))^2 is a quarter of (h - d / tau)^2.
  np.testing.assert_allclose(losses[False], T**2 * losses[True], rtol=1e-5)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"objective": "sft"}, "objective must be"),
    ({"tau": -1.0}, "tau must not be negative"),
    ({"objective": "regression", "tau": 0.0}, "tau must be positive"),
    ({"mix": 1.5}, "mix must be in"),
    ({"mix_end": 2.0}, "mix_end must be in"),
    ({"ema": 1.0}, "ema must be in"),
    ({"ema": 0.5, "extragradient": True}, "both choose the opponent"),
    ({"normalize_lengths": True}, "is for objective=regression"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    nash_md.NashMDConfig(**settings)
