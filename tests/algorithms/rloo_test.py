"""RLOO and REINFORCE against exact answers on problems small enough to enumerate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import reading, reinforce, rloo
from rlhf_jax.losses import game
from rlhf_jax.train_step import gradients
from tests.algorithms import tabular, toy
from tests.algorithms.case import sampled


def case(**settings):
  config = rloo.RLOOConfig(**settings)
  return sampled(
    rloo.make_rloo_step,
    config,
    lambda rollout, scores, values, ref, samples: rloo.make_batch(
      rollout, scores, ref, config, samples_per_prompt=samples
    )[0],
    lambda read: functools.partial(reinforce.loss_fn, read=read),
  )


CASES = {"": case()}


@pytest.mark.parametrize("samples", [8, 1], ids=["rloo", "reinforce"])
def test_reaches_the_exact_optimum_of_the_regularised_objective(samples):
  beta = 0.5
  config = rloo.RLOOConfig(kl_coef=beta, minibatches=4)
  policy = tabular.improve_groups(rloo.make_rloo_step, rloo.make_batch, config, samples)
  assert tabular.divergence(policy, tabular.optimum(beta)) < 0.01


def test_samples_that_meet_each_other_end_at_the_equilibrium():
  """Pairwise-RL's policy half: a tournament pays for what no reward of single responses can."""
  tau, samples = 0.1, 8

  def make_batch(rollout, scores, ref_logprobs, config, *, samples_per_prompt):
    played = tabular.sequence_of(rollout).reshape(-1, samples)
    wins = jnp.asarray(tabular.PREFERENCE)[played[:, :, None], played[:, None, :]]
    meets = (jnp.sum(wins, axis=2) - 0.5) / (samples - 1)  # As `rewards.tournament_reward`.
    return rloo.make_batch(
      rollout, meets.ravel(), ref_logprobs, config, samples_per_prompt=samples_per_prompt
    )

  config = rloo.RLOOConfig(kl_coef=tau, minibatches=4)
  policy = tabular.improve_groups(rloo.make_rloo_step, make_batch, config, samples, steps=250)
  log_ref = tabular.sequence_logprobs(tabular.REF["policy"])
  exploit = lambda log_p: float(  # noqa: E731
    game.exploitability(log_p, log_ref, tabular.PREFERENCE, tau=tau)
  )
  assert tabular.divergence(policy, tabular.equilibrium(tau)) < 0.01
  # The reward of beating the reference, which ignores that opponents change with the policy.
  beats_ref = tabular.PREFERENCE @ np.exp(np.float64(log_ref))
  assert exploit(policy) < 0.01 < exploit(jax.nn.log_softmax(log_ref + beats_ref / tau))


@pytest.mark.parametrize("samples", [4, 1])
def test_loss_is_that_of_loops(samples):
  params, rows = toy.params_of(), 12
  rollout = toy.rollout_of(params, rows)
  rng = np.random.default_rng(1)
  scores = rng.normal(size=rows).astype(np.float32)
  scores[5] = np.nan
  ref = rollout.logprobs + 0.3 * rng.normal(size=rollout.logprobs.shape).astype(np.float32)
  config = rloo.RLOOConfig(kl_coef=0.2)
  batch, metrics = rloo.make_batch(rollout, scores, ref, config, samples_per_prompt=samples)
  mask = rollout.response_mask[:, toy.P :]
  penalty = np.where(mask, rollout.logprobs - ref, 0).sum(axis=1)
  totals = scores - 0.2 * penalty
  size = samples if samples > 1 else rows
  advantages = np.zeros(rows)
  for b in range(rows):
    others = [totals[i] for i in range(b // size * size, b // size * size + size) if i != b]
    if np.isfinite(totals[b]):
      advantages[b] = totals[b] - np.nanmean(others)
  mask = mask & np.isfinite(scores)[:, None]
  np.testing.assert_array_equal(batch.mask, mask)
  np.testing.assert_allclose(
    batch.advantages, np.where(mask, advantages[:, None], 0), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(metrics["reward/shaped"], np.nanmean(totals), rtol=1e-5)

  read = reading.make_read(toy.language)
  loss = functools.partial(reinforce.loss_fn, read=read)

  def published(params):
    """Ahmadian et al., 2024, eq. 7: the log-probability of a response times its advantage."""
    totals = jnp.sum(jnp.where(mask, read(params, rollout).logprobs, 0.0), axis=1)
    return -jnp.sum(advantages.astype(np.float32) * totals) / (rows - 1) / toy.R

  moved = toy.near(params)
  grads, metrics = jax.jit(functools.partial(gradients, loss))(moved, batch, jax.random.key(0))
  want, want_grads = jax.jit(jax.value_and_grad(published))(moved)
  np.testing.assert_allclose(metrics["loss"], want, rtol=1e-4)
  assert metrics["weight"] == rows - 1
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), grads, want_grads)


def test_a_negative_penalty_is_refused():
  with pytest.raises(ValueError, match="^kl_coef must not be negative"):
    rloo.RLOOConfig(kl_coef=-0.1)
