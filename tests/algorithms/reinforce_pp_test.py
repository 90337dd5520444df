"""REINFORCE++ against exact answers on problems small enough to enumerate."""

import functools

import jax
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import reading, reinforce_pp
from tests.algorithms import tabular, toy
from tests.algorithms.case import sampled


def case(**settings):
  config = reinforce_pp.ReinforcePPConfig(epochs=2, minibatches=2, **settings)
  return sampled(
    reinforce_pp.make_reinforce_pp_step,
    config,
    lambda rollout, scores, values, ref, samples: reinforce_pp.make_batch(
      rollout, scores, ref, config
    )[0],
    lambda read: functools.partial(reinforce_pp.loss_fn, read=read, config=config),
  )


CASES = {"": case(gamma=0.9)}


def test_reaches_the_exact_optimum_of_the_regularised_objective():
  beta, steps = 0.5, 150
  config = reinforce_pp.ReinforcePPConfig(kl_coef=beta, epochs=2, minibatches=4)
  tx = optax.adam(optax.linear_schedule(0.03, 0.0, steps * config.updates))

  def make_batch(_, params, rollout, scores, ref_logprobs):
    del params
    return reinforce_pp.make_batch(rollout, scores, ref_logprobs, config)[0], None

  step = reinforce_pp.make_reinforce_pp_step(tabular.table_apply, tx, config)
  params = tabular.REF["policy"]
  policy, _ = tabular.improve(
    step, make_batch, params, tx, policy_of=lambda params: params, steps=steps
  )
  assert tabular.divergence(policy, tabular.optimum(beta)) < 0.01


def test_loss_is_that_of_loops():
  params, rows, clip = toy.params_of(), 12, 0.1
  rollout = toy.rollout_of(params, rows)
  rng = np.random.default_rng(1)
  scores = rng.normal(size=rows).astype(np.float32)
  scores[5] = np.nan
  ref = rollout.logprobs + 0.3 * rng.normal(size=rollout.logprobs.shape).astype(np.float32)
  config = reinforce_pp.ReinforcePPConfig(kl_coef=0.2, gamma=0.9, clip=clip)
  batch, metrics = jax.jit(reinforce_pp.make_batch, static_argnums=3)(rollout, scores, ref, config)
  mask = rollout.response_mask[:, toy.P :] & np.isfinite(scores)[:, None]
  np.testing.assert_array_equal(batch.mask, mask)
  advantages, totals = np.zeros(mask.shape), []
  for b in np.flatnonzero(np.isfinite(scores)):
    n = mask[b].sum()
    rewards = -0.2 * np.float64(rollout.logprobs[b, :n] - ref[b, :n])
    rewards[-1] += scores[b]
    totals.append(rewards.sum())
    for t in range(n):
      advantages[b, t] = sum(0.9 ** (s - t) * rewards[s] for s in range(t, n))
  advantages = np.where(mask, (advantages - advantages[mask].mean()) / advantages[mask].std(), 0)
  np.testing.assert_allclose(batch.advantages, advantages, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(metrics["reward/shaped"], np.mean(totals), rtol=1e-5)

  read, moved = reading.make_read(toy.language), toy.near(params)
  loss = functools.partial(reinforce_pp.loss_fn, read=read, config=config)
  value, metrics = jax.jit(loss)(moved, batch, jax.random.key(0))
  ratio = np.exp(np.float64(read(moved, rollout).logprobs) - rollout.logprobs)
  worse = np.minimum(ratio * advantages, np.clip(ratio, 1 - clip, 1 + clip) * advantages)
  np.testing.assert_allclose(value, -worse[mask].mean(), rtol=1e-3)
  assert metrics["loss/policy"] == value
  assert metrics["weight"] == mask.sum()


@pytest.mark.parametrize("settings", [{"kl_coef": -0.1}, {"clip": -0.1}, {"gamma": 1.5}], ids=str)
def test_impossible_settings_are_refused(settings):
  with pytest.raises(ValueError, match=f"^{next(iter(settings))} must"):
    reinforce_pp.ReinforcePPConfig(**settings)
