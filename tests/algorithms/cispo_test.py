"""CISPO: no token loses its gradient, and the end of its training where it can be enumerated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms import cispo, grpo, reading
from rlhf_jax.train_step import gradients
from tests.algorithms import tabular, toy
from tests.algorithms.case import sampled


def case(**settings):
  config = cispo.CISPOConfig(epochs=2, minibatches=2, clip_high=0.1, **settings)
  return sampled(
    cispo.make_cispo_step,
    config,
    lambda rollout, scores, values, ref, samples: cispo.make_batch(
      rollout, scores, ref, config, samples_per_prompt=samples
    )[0],
    lambda read: functools.partial(cispo.loss_fn, read=read, config=config),
    # Its weights are constants of the gradient, but move with the policy.
    falls=False,
  )


CASES = {"": case(), "responses": case(average="responses")}


def test_reaches_the_exact_end_of_its_training():
  beta, samples = 0.5, 8
  config = cispo.CISPOConfig(kl_coef=beta, epochs=2, minibatches=4, scale=False)
  policy = tabular.improve_groups(cispo.make_cispo_step, cispo.make_batch, config, samples)
  optimum = tabular.pulled_optimum(beta * samples / (samples - 1))
  assert tabular.divergence(policy, optimum) < 0.003


def test_tokens_beyond_the_clip_keep_their_gradient():
  params = toy.params_of()
  rollout = toy.rollout_of(params, 8)
  rollout = rollout._replace(logprobs=rollout.logprobs - 1)  # All ratios are near e.
  scores = np.random.default_rng(1).normal(size=8).astype(np.float32)
  scores[scores < 0] -= 1  # No group of equal ones.
  read, grads = reading.make_read(toy.language), {}
  for module, config in (
    (grpo, grpo.GRPOConfig(kl_coef=0.0, clip_high=0.2)),
    (cispo, cispo.CISPOConfig(kl_coef=0.0, clip_high=0.2, average="responses")),
  ):
    batch, _ = module.make_batch(rollout, scores, rollout.logprobs, config, samples_per_prompt=4)
    # Of a clipped surrogate only good tokens that have become likely lose theirs.
    good = batch._replace(mask=batch.mask & (batch.advantages > 0))
    loss = functools.partial(module.loss_fn, read=read, config=config)
    grads[module], metrics = jax.jit(functools.partial(gradients, loss))(
      params, good, jax.random.key(0)
    )
    assert metrics["clip_fraction"] == 1

  def weighted(params):
    logprobs = read(params, rollout).logprobs
    per_token = jnp.where(good.mask, 1.2 * good.advantages * logprobs, 0.0)
    rows = good.mask.any(axis=1)
    means = jnp.sum(per_token, axis=1) / jnp.maximum(jnp.sum(good.mask, axis=1), 1)
    return -jnp.sum(means) / jnp.sum(rows)

  want = jax.jit(jax.grad(weighted))(params)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), grads[cispo], want)
  assert max(np.abs(x).max() for x in jax.tree.leaves(grads[cispo])) > 0.01
  assert not any(np.any(x) for x in jax.tree.leaves(grads[grpo]))
