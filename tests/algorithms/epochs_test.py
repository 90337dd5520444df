"""Epochs and minibatches over sampled responses, padded and packed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import epochs, ppo, reading
from rlhf_jax.models import build, shared_actor_critic
from rlhf_jax.train_step import init_state
from tests.algorithms import toy
from tests.testing import TINY_MODEL, compilations, tiny_params

LENGTH = toy.P + toy.R


@functools.cache
def batch_of(rows=32):
  """A batch, and params with a critic that are not those it is from."""
  params = toy.actor_critic_params()
  rollout = toy.rollout_of(params["policy"], rows)
  rng = np.random.default_rng(1)
  scores, values = (rng.normal(size=s).astype(np.float32) for s in (rows, (rows, toy.R)))
  scores[3] = np.nan
  batch, _ = ppo.make_batch(rollout, scores, values, rollout.logprobs - 0.1, ppo.PPOConfig())
  return batch, toy.near(params, 0.97)


def real_of(batch):
  return int(np.sum(batch.rollout.prompt_mask | batch.rollout.response_mask))


def state_of(params, tx):
  return init_state(jax.tree.map(jnp.array, params), tx)


def test_a_packed_update_is_that_of_padded_rows():
  config = ppo.PPOConfig(epochs=2, minibatches=2, microbatches=2)
  batch, params = batch_of()
  tx, numbers = optax.sgd(0.1), []

  def make_step(packed):
    numbers.append(packed.rows)
    return ppo.make_ppo_step(toy.actor_critic, tx, config, temperature=0.7, packed=packed)

  steps = (
    ppo.make_ppo_step(toy.actor_critic, tx, config, temperature=0.7),
    epochs.make_packed_step(make_step, config, 12),
  )
  results = []
  for step in steps:
    state = state_of(params, tx)
    for _ in range(2):
      state, metrics = step(state, batch, jax.random.key(0))
    results.append((state, metrics))
  before, after = (metrics.pop("padding") for _, metrics in results)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *results)
  assert results[1][1]["skipped_steps"] == 0
  real = real_of(batch)
  np.testing.assert_allclose(before, 1 - real / (32 * LENGTH), rtol=1e-5)
  np.testing.assert_allclose(after, 1 - real / (4 * numbers[-1] * 12), rtol=1e-5)
  assert after < before


def test_a_packed_update_of_a_transformer_with_both_heads():
  config = ppo.PPOConfig(epochs=1, minibatches=2, microbatches=2)
  batch, _ = batch_of()
  apply = shared_actor_critic(build(TINY_MODEL, head="both"))
  params = {"policy": tiny_params(), "value": {"score": tiny_params("scalar")["score"]}}
  tx, results = optax.sgd(0.1), []
  for step in (
    ppo.make_ppo_step(apply, tx, config),
    epochs.make_packed_step(
      lambda packed: ppo.make_ppo_step(apply, tx, config, packed=packed), config, 12
    ),
  ):
    state, metrics = step(state_of(params, tx), batch, jax.random.key(0))
    assert metrics.pop("padding") > 0
    results.append((state, metrics))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *results)


def test_programs_are_as_few_as_numbers_of_rows():
  config = epochs.UpdateConfig(minibatches=1)
  batch, params = batch_of()
  made = []

  def make_step(packed):
    made.append(packed)
    return lambda state, batch, key: (state, {})

  step = epochs.make_packed_step(make_step, config, 12, multiple=8)
  state = state_of(params, optax.sgd(1.0))
  for _ in range(3):
    step(state, batch, jax.random.key(0))
  short = batch.rollout._replace(response_mask=batch.rollout.response_mask & False)
  step(state, batch._replace(rollout=short), jax.random.key(0))
  assert [packed.length for packed in made] == [12, 12]
  assert made[0].rows > made[1].rows
  assert all(packed.rows % 8 == 0 for packed in made)


def test_first_deviation_is_that_before_any_update():
  batch, params = batch_of()
  config = ppo.PPOConfig(epochs=2, minibatches=2)
  tx = optax.sgd(0.3)
  step = ppo.make_ppo_step(toy.actor_critic, tx, config)
  with compilations() as names:
    state, metrics = step(state_of(params, tx), batch, jax.random.key(0))
    step(state, batch, jax.random.key(0))
  assert names.count("step") == 1
  assert "ratio/deviation/max" not in metrics
  read = reading.make_actor_critic_read(toy.actor_critic)
  now = jax.jit(read)(params, batch.rollout).logprobs
  ratio = np.where(batch.mask, np.exp(now - batch.rollout.logprobs), 1)
  # Of the first minibatch, so that it is one of the rows' and at most that of the batch.
  deviations = np.abs(ratio - 1).max(axis=1)
  assert np.isclose(deviations, metrics["ratio/first_deviation"], rtol=1e-4).any()
  assert metrics["ratio/first_deviation"] <= deviations.max() * 1.0001

  _, metrics = ppo.make_ppo_step(toy.actor_critic, tx, ppo.PPOConfig(minibatches=1))(
    state_of(params, tx), batch, jax.random.key(0)
  )
  np.testing.assert_allclose(metrics["ratio/first_deviation"], deviations.max(), rtol=1e-4)
  np.testing.assert_allclose(metrics["padding"], 1 - real_of(batch) / (32 * LENGTH), rtol=1e-5)


def test_numbers_of_updates_and_parts():
  config = epochs.UpdateConfig(epochs=3, minibatches=4, microbatches=5)
  assert (config.updates, config.parts) == (12, 20)


@pytest.mark.parametrize("field", ["epochs", "minibatches", "microbatches"])
def test_impossible_settings_are_refused(field):
  with pytest.raises(ValueError, match=f"^{field} must be at least 1"):
    epochs.UpdateConfig(**{field: 0})


def test_minibatches_must_divide_the_responses():
  batch, params = batch_of(10)
  tx = optax.sgd(0.1)
  step = ppo.make_ppo_step(toy.actor_critic, tx, ppo.PPOConfig(minibatches=4))
  with pytest.raises(ValueError, match="10 rows cannot be cut into 4 equal parts"):
    step(state_of(params, tx), batch, jax.random.key(0))
