"""Opponents, and batches of responses that met theirs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import nash_md, opponents, reading
from rlhf_jax.train_step import gradients, init_state
from tests.algorithms import toy


def opponent_batch(seed, rows, count, tau=0.5, noise=0.1):
  """Judged responses of the toy, `count` to each of `rows` prompts."""
  rng = np.random.default_rng(seed)
  rollout = toy.rollout_of(toy.params_of(), rows * count, seed, noise=noise)
  ref = rollout.logprobs + 0.3 * rng.normal(size=rollout.logprobs.shape).astype(np.float32)
  split = lambda x: x.reshape(rows, count, *x.shape[1:])  # noqa: E731
  return opponents.OpponentBatch(
    rollout=type(rollout)(*map(split, rollout)),
    ref_logprobs=split(ref),
    preference=rng.random((rows, count)).astype(np.float32),
    tau=np.full(rows, tau, np.float32),
  )


def test_looks_ahead_and_steps_from_the_start():
  """On `x' = x - opponent / 2`, with keys that differ."""
  seen = []

  def step(state, opponent, key):
    seen.append((float(state.params), float(opponent), np.asarray(jax.random.key_data(key))))
    new = state._replace(params=state.params - 0.5 * opponent)
    jax.tree.map(lambda x: x.delete(), state.params)  # As a step that donates its state does.
    return new, {}

  state = init_state(jnp.float32(8.0), optax.sgd(1.0))
  new, _ = opponents.extragradient(step)(state, jnp.float32(4.0), jax.random.key(0))
  assert [entry[:2] for entry in seen] == [(8.0, 4.0), (8.0, 6.0)]
  assert float(new.params) == 5.0
  assert (seen[0][2] != seen[1][2]).any()


def test_the_costs_of_both_halves_of_a_step_are_reported():
  """The rates of a step divide them by the seconds of both."""
  halves = iter([(1.0, 2.0, 3.0, 40.0, 7.0), (10.0, 20.0, 30.0, 400.0, 70.0)])
  names = ("time/generate", "time/preference", "tokens", "model_flops", "loss")
  step = lambda state, opponent, key: (state, dict(zip(names, next(halves), strict=True)))  # noqa: E731
  state = init_state(jnp.float32(8.0), optax.sgd(1.0))
  _, metrics = opponents.extragradient(step)(state, jnp.float32(4.0), jax.random.key(0))
  assert metrics == dict(zip(names, (11.0, 22.0, 33.0, 440.0, 70.0), strict=True))


def test_moving_average():
  average, params = {"a": jnp.float32([1, 2]), "b": jnp.float32(0)}, {"a": jnp.ones(2), "b": 4.0}
  new = opponents.moving_average(average, params, 0.75)
  np.testing.assert_array_equal(new["a"], [1, 1.75])
  assert new["b"] == 1.0


@pytest.mark.parametrize("bad", [0.0, np.nan, 1e30])
def test_metrics_are_those_of_loops(bad):
  batch, params = opponent_batch(0, 5, 2), toy.near(toy.params_of())
  read = reading.make_read(toy.language, 0.7)
  real = batch.rollout.response_mask[..., toy.P :]
  poisoned = batch._replace(ref_logprobs=np.where(real, batch.ref_logprobs, np.float32(bad)))
  judged = jax.jit(lambda params, batch: opponents.read_batch(read, params, batch))(
    params, poisoned
  )
  flat = jax.tree.map(lambda x: x.reshape(10, *x.shape[2:]), batch.rollout)
  now, mask = read(params, flat), flat.response_mask[:, toy.P :]
  np.testing.assert_allclose(
    np.where(mask, judged.logprobs, 0), np.where(mask, now.logprobs, 0), atol=1e-6
  )
  np.testing.assert_array_equal(judged.mask, mask)
  np.testing.assert_array_equal(
    np.asarray(judged.ref_logprobs)[mask], batch.ref_logprobs.reshape(10, -1)[mask]
  )
  log_ratio = np.where(mask, flat.logprobs - batch.ref_logprobs.reshape(10, -1), 0)
  entropy = [-np.asarray(flat.logprobs)[i][mask[i]].mean() for i in range(10)]
  want = {
    "kl/ref": log_ratio.sum(axis=1).mean(),
    "entropy": np.mean(entropy),
    "response_length/mean": mask.sum() / 10,
    "tokens": mask.sum(),
  }
  units = {name: judged.metrics.pop(name) for name in list(judged.metrics) if "weight/" in name}
  assert units == {f"weight/{name}": 10 for name in want if name != "tokens"}
  assert judged.metrics.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(judged.metrics[name], value, rtol=1e-4, err_msg=name)


def test_a_response_without_a_preference_or_reference_is_as_if_it_were_not_there():
  batch, params = opponent_batch(0, 8, 1), toy.near(toy.params_of())
  read = reading.make_read(toy.language, 0.7)
  preference, ref = batch.preference.copy(), batch.ref_logprobs.copy()
  preference[1], preference[2], ref[5, 0, 0] = np.nan, np.inf, -np.inf
  bad = batch._replace(preference=preference, ref_logprobs=ref)
  others = jax.tree.map(lambda x: x[[0, 3, 4, 6, 7]], batch)
  loss = functools.partial(nash_md.loss_fn, read=read)
  run = jax.jit(functools.partial(gradients, loss), static_argnums=3)
  want = run(params, others, jax.random.key(0), 1)
  for parts in (1, 4):
    got = run(params, bad, jax.random.key(0), parts)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, want)


def test_schedules_are_linear_over_the_run():
  config = opponents.OpponentConfig(tau=0.4, tau_end=0.1, mix=0.0, mix_end=0.5)
  mixes, taus = config.schedules(4)
  np.testing.assert_allclose([mixes(i) for i in range(5)], [0, 1 / 6, 1 / 3, 0.5, 0.5], rtol=1e-6)
  np.testing.assert_allclose([taus(i) for i in range(5)], [0.4, 0.3, 0.2, 0.1, 0.1], rtol=1e-6)
  mixes, taus = opponents.OpponentConfig(tau=0.4, mix=0.3).schedules(1)
  np.testing.assert_allclose([mixes(0), mixes(9), taus(0), taus(9)], [0.3, 0.3, 0.4, 0.4])


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"tau": -1.0}, "tau must not be negative"),
    ({"tau": float("nan")}, "tau must not be negative"),
    ({"mix": 1.5}, "mix must be in"),
    ({"mix": -0.5}, "mix must be in"),
    ({"mix_end": 2.0}, "mix_end must be in"),
    ({"microbatches": 0}, "microbatches must be at least 1"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    opponents.OpponentConfig(**settings)
