"""GSPO: one ratio for a response, and the end of its training where it can be enumerated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import grpo, gspo, reading
from rlhf_jax.train_step import gradients
from tests.algorithms import tabular, toy
from tests.algorithms.case import sampled


def case(**settings):
  # The toy's samples are further from its policy than the default clips.
  config = gspo.GSPOConfig(epochs=2, minibatches=2, clip_low=0.1, clip_high=0.2, **settings)
  return sampled(
    gspo.make_gspo_step,
    config,
    lambda rollout, scores, values, ref, samples: gspo.make_batch(
      rollout, scores, ref, config, samples_per_prompt=samples
    )[0],
    lambda read: functools.partial(gspo.loss_fn, read=read, config=config),
  )


CASES = {"": case(), "tokens": case(average="tokens")}


def test_reaches_the_exact_end_of_its_training():
  beta, samples = 0.5, 8
  config = gspo.GSPOConfig(
    kl_coef=beta, epochs=2, minibatches=4, scale=False, clip_low=0.2, clip_high=0.2
  )
  policy = tabular.improve_groups(gspo.make_gspo_step, gspo.make_batch, config, samples)
  optimum = tabular.pulled_optimum(beta * samples / (samples - 1))
  assert tabular.divergence(policy, optimum) < 0.003


@pytest.mark.parametrize("clip", [1e-4, 10.0])
def test_policy_loss_is_that_of_the_geometric_mean_of_the_ratios(clip):
  """Zheng et al., 2025, eq. 5 to 7, differentiated as they stand."""
  params = toy.params_of()
  rollout = toy.rollout_of(params, 8)
  config = gspo.GSPOConfig(kl_coef=0.0, clip_low=clip, clip_high=clip)
  scores = np.random.default_rng(1).normal(size=8).astype(np.float32)
  batch, _ = gspo.make_batch(rollout, scores, rollout.logprobs, config, samples_per_prompt=4)
  read = reading.make_read(toy.language)

  def published(params):
    lengths = jnp.sum(batch.mask, axis=1)
    log_ratio = jnp.where(batch.mask, read(params, rollout).logprobs - rollout.logprobs, 0.0)
    ratio = jnp.exp(jnp.sum(log_ratio, axis=1) / lengths)
    advantages = batch.advantages[:, 0]
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    return -jnp.mean(jnp.minimum(ratio * advantages, clipped * advantages))

  moved = toy.near(params)
  loss = functools.partial(gspo.loss_fn, read=read, config=config)
  grads, metrics = jax.jit(functools.partial(gradients, loss))(moved, batch, jax.random.key(0))
  want, want_grads = jax.jit(jax.value_and_grad(published))(moved)
  np.testing.assert_allclose(metrics["loss/policy"], want, rtol=1e-4)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), grads, want_grads)


def test_clips_are_far_narrower_than_those_of_tokens():
  config = gspo.GSPOConfig()
  assert config.clip_low < config.clip_high < grpo.GRPOConfig().clip_high / 100
