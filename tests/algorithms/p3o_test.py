"""P3O against its formula in loops and against exact answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import p3o, reading
from rlhf_jax.train_step import gradients, init_state
from tests.algorithms import tabular, toy
from tests.algorithms.case import ROWS, Case, inputs_of

PARAMS = toy.params_of()
make_batch = jax.jit(p3o.make_batch, static_argnames=("config", "samples_per_prompt"))


def inputs(seed, rows=2 * ROWS):
  """Responses, scores [B] and log-probabilities under a reference [B, R]."""
  rollout = toy.rollout_of(PARAMS, rows, seed)
  scores, _, other = inputs_of(rollout, np.random.default_rng(seed))
  return rollout, scores, rollout.logprobs + other


def batch(seed):
  """A batch of `ROWS` pairs, of which one has no score."""
  rollout, scores, ref = inputs(seed)
  scores[seed % ROWS] = np.nan
  return jax.device_get(make_batch(rollout, scores, ref, CONFIG, samples_per_prompt=2)[0])


CONFIG = p3o.P3OConfig(epochs=2, minibatches=2)
CASES = {"": Case(p3o.make_p3o_step, CONFIG, batch)}


@pytest.mark.parametrize("samples", [2, 4])
def test_reaches_the_exact_optimum_of_the_regularised_objective(samples):
  beta = 0.5
  config = p3o.P3OConfig(kl_coef=beta, epochs=2, minibatches=4)
  policy = tabular.improve_groups(p3o.make_p3o_step, p3o.make_batch, config, samples)
  assert tabular.divergence(policy, tabular.optimum(beta)) < 0.01


def test_a_shift_of_the_rewards_of_a_prompt_changes_no_update():
  """So the shuffle into minibatches tears no pair, too."""
  rollout, scores, ref = inputs(0)
  shift = np.repeat(np.float32(100 + np.arange(ROWS) % 3), 2)
  ends, tx = [], optax.sgd(1.0)
  step = p3o.make_p3o_step(toy.language, tx, CONFIG)
  for given in (scores, scores + shift):
    made, _ = make_batch(rollout, given, ref, CONFIG, samples_per_prompt=2)
    state, _ = step(init_state(jax.tree.map(jnp.array, PARAMS), tx), made, jax.random.key(0))
    ends.append(jax.device_get(state.params))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *ends)
  assert np.abs(ends[0]["head"] - PARAMS["head"]).max() > 1e-3


@pytest.mark.parametrize("clip", [0.2, 0.0])
def test_loss_is_that_of_loops(clip):
  rollout, scores, ref = inputs(1, 12)
  scores[5] = np.nan  # Its pair is left out.
  ref[7, 0] = np.inf
  config = p3o.P3OConfig(kl_coef=0.2, clip=clip)
  made, metrics = make_batch(rollout, scores, ref, config, samples_per_prompt=4)
  mask = rollout.response_mask[:, toy.P :]
  finite = np.isfinite(np.where(mask, ref, 0)).all(axis=1) & np.isfinite(scores)
  totals = scores - 0.2 * np.where(mask, rollout.logprobs - ref, 0).sum(axis=1)
  pairs = [(b, b + 1) for b in range(0, 12, 2) if finite[b] and finite[b + 1]]
  assert 2 < len(pairs) < 6
  np.testing.assert_allclose(metrics["reward/shaped"], totals[finite].mean(), rtol=1e-5)
  read = reading.make_read(toy.language)
  moved = toy.near(PARAMS, 0.97)

  def published(params):
    """Half of -d rho_1 rho_2 (log rho_1 - log rho_2), clipped on the side that is pushed."""
    ratios = jnp.sum(jnp.where(mask, read(params, rollout).logprobs - rollout.logprobs, 0), axis=1)
    total = 0.0
    for a, b in pairs:
      gap, v = totals[a] - totals[b], ratios[a] - ratios[b]
      weight = gap * jax.lax.stop_gradient(jnp.exp(ratios[a] + ratios[b]))
      held = jnp.clip(v, -jnp.log(1 + clip), jnp.log(1 + clip)) if clip else v
      total += -jnp.minimum(weight * v, weight * held) / 2
    return total / len(pairs) / toy.R

  loss = functools.partial(p3o.loss_fn, read=read, config=config)
  grads, metrics = jax.jit(functools.partial(gradients, loss))(moved, made, jax.random.key(0))
  want, want_grads = jax.jit(jax.value_and_grad(published))(moved)
  np.testing.assert_allclose(metrics["loss"], want, rtol=1e-4)
  assert metrics["weight"] == len(pairs)
  assert (0 < metrics["clip_fraction"] < 1) == bool(clip)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), grads, want_grads)


def test_impossible_settings_are_refused():
  for settings in ({"kl_coef": -0.1}, {"clip": -0.1}):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} must not be negative"):
      p3o.P3OConfig(**settings)
  with pytest.raises(ValueError, match="samples_per_prompt must be even, got 3"):
    p3o.make_batch(*inputs(0, 12), CONFIG, samples_per_prompt=3)
