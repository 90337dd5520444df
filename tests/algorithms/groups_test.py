"""Comparison of the responses to a prompt, against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import groups, reading, rloo
from rlhf_jax.losses import policy_gradient
from tests.algorithms import toy

ROWS, N = 12, 4
LOSSES = {  # Of a token: (log-probability, old log-probability, advantage).
  "clipped": lambda new, old, a: max(
    -a * np.exp(new - old), -a * np.clip(np.exp(new - old), 0.95, 1.05)
  ),
  "reinforce": lambda new, old, a: -a * new,
}


@functools.cache
def responses(missing=()):
  """A rollout, its rewards, of which some are NaN, and log-probabilities of a reference."""
  rollout = toy.rollout_of(toy.params_of(), ROWS)
  rng = np.random.default_rng(1)
  rewards = rng.normal(size=ROWS).astype(np.float32)
  rewards[list(missing)] = np.nan
  ref = rollout.logprobs + 0.3 * rng.normal(size=rollout.logprobs.shape).astype(np.float32)
  return rollout, rewards, ref


@pytest.mark.parametrize("samples", [N, 1])
@pytest.mark.parametrize("scale", [True, False])
def test_advantages_are_those_of_loops(samples, scale):
  missing = (2, 5, 8, 9, 10)  # One in two of the groups, all but one in the third.
  rollout, rewards, ref = responses(missing)
  config = groups.GroupConfig(scale=scale)
  batch, metrics = groups.make_batch(rollout, rewards, ref, config, samples_per_prompt=samples)
  size = samples if samples > 1 else ROWS
  sets = [set(rewards[b:][:size]) for b in range(0, ROWS, size)]
  sets = [{r for r in group if np.isfinite(r)} for group in sets]
  assert metrics["groups/zero_std"] == np.float32(np.mean([len(group) < 2 for group in sets]))
  for b in range(ROWS):
    group = [r for r in rewards[b // size * size :][:size] if np.isfinite(r)]
    want = 0.0
    if np.isfinite(rewards[b]) and len(group) > 1:
      want = rewards[b] - np.mean(group)
      want /= np.std(group, ddof=1) + 1e-4 if scale else 1.0
    on = rollout.response_mask[b, toy.P :] & np.isfinite(rewards[b])
    np.testing.assert_array_equal(batch.mask[b], on)
    np.testing.assert_allclose(batch.advantages[b], np.where(on, want, 0), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(batch.ref_logprobs[b], np.where(on, ref[b], 0))
    np.testing.assert_array_equal(batch.rollout.logprobs[b], np.where(on, rollout.logprobs[b], 0))
  np.testing.assert_allclose(metrics["reward/shaped"], np.nanmean(rewards), rtol=1e-5)


def means(values, mask, average):
  """Mean of the entries of `values` [B, R] that are on, as `average` says, by loops."""
  rows = [[v for v, on in zip(*row, strict=True) if on] for row in zip(values, mask, strict=True)]
  rows = [row for row in rows if row]
  if average == "responses":
    return np.mean([np.mean(row) for row in rows])
  if average == "tokens":
    return np.mean(np.concatenate(rows))
  return np.mean([np.sum(row) / mask.shape[1] for row in rows])


@pytest.mark.parametrize("average", groups.AVERAGES)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_that_of_loops(average, loss):
  rollout, rewards, ref = responses((3,))
  config = groups.GroupConfig(kl_coef=0.4, average=average, clip_low=0.05, clip_high=0.05)
  batch, _ = groups.make_batch(rollout, rewards, ref, config, samples_per_prompt=N)
  params = toy.near(toy.params_of())
  read = reading.make_read(toy.language)

  def token_loss(logprobs, old, advantages, mask):
    del mask
    if loss == "reinforce":
      return policy_gradient.reinforce_loss(logprobs, advantages)
    return policy_gradient.ppo_policy_loss(logprobs, old, advantages, clip_low=0.05, clip_high=0.05)

  @jax.jit
  def run(params, batch):
    options = {"read": read, "config": config, "token_loss": token_loss}
    return groups.loss_fn(params, batch, jax.random.key(0), **options), read(params, rollout)

  ((value, metrics), now), mask = run(params, batch), np.asarray(batch.mask)
  arrays = (now.logprobs, batch.rollout.logprobs, batch.advantages)
  policy = np.vectorize(LOSSES[loss])(*map(np.float64, arrays))
  log_ratio = np.float64(batch.ref_logprobs) - np.float64(now.logprobs)
  k3 = np.exp(log_ratio) - 1 - log_ratio
  np.testing.assert_allclose(metrics["loss/policy"], means(policy, mask, average), rtol=1e-4)
  np.testing.assert_allclose(metrics["loss/kl"], means(k3, mask, average), rtol=1e-4)
  np.testing.assert_allclose(value, metrics["loss/policy"] + 0.4 * metrics["loss/kl"], rtol=1e-5)
  assert metrics["weight"] == (mask.sum() if average == "tokens" else ROWS - 1)


def test_a_group_of_equal_rewards_learns_nothing_but_the_penalty():
  rollout, _, ref = responses()
  config = groups.GroupConfig()
  rewards = jnp.ones(ROWS).at[-1].set(0)
  for make_batch, settings in ((groups.make_batch, config), (rloo.make_batch, rloo.RLOOConfig())):
    batch, metrics = make_batch(rollout, rewards, ref, settings, samples_per_prompt=N)
    assert metrics["groups/zero_std"] == np.float32(1 - N / ROWS)  # Also where KL is in the reward.
    if make_batch is groups.make_batch:
      assert not batch.advantages[:-N].any() and batch.advantages[-N:].any()


@pytest.mark.parametrize(
  "settings",
  [{"kl_coef": -0.1}, {"clip_low": -0.1}, {"clip_high": -0.1}, {"average": "dapo"}],
  ids=str,
)
def test_impossible_settings_are_refused(settings):
  with pytest.raises(ValueError, match=f"^{next(iter(settings))} must"):
    groups.GroupConfig(**settings)
