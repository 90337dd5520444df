"""Terms that several losses can have: demonstrations, and a bonus on calibration responses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import dpo, given, grpo, pairs, ppo, reading, sft, terms
from rlhf_jax.train_step import gradients, make_train_step, reported
from tests.algorithms import toy
from tests.algorithms.case import ROWS, Case

COEF = 0.3


def bonus_loss(apply_fn, config):
  """DPO with a bonus, as online DPO has it."""
  loss = functools.partial(dpo.loss_fn, read=pairs.make_read_pairs(apply_fn), config=config)
  return terms.with_term(loss, terms.make_value_bonus(apply_fn), COEF, "loss/bonus")


def bonus_batch(seed):
  ref = np.random.default_rng(seed).normal(-10, 1, (ROWS, 2)).astype(np.float32)
  batch = dpo.DPOBatch(toy.token_batch(ROWS, 2, seed=seed), ref)
  return terms.WithSequences(batch, toy.token_batch(ROWS, seed=seed + 50))


CASES = {
  "bonus": Case(
    lambda apply, tx, config: make_train_step(
      bonus_loss(apply, config), tx, microbatches=config.microbatches
    ),
    dpo.DPOConfig(),
    bonus_batch,
  )
}


@pytest.mark.parametrize("coef", [COEF, -COEF])
def test_the_bonus_adds_the_gradient_of_calibration_responses(coef):
  params, batch = toy.params_of(), bonus_batch(0)
  config = dpo.DPOConfig()
  plain = functools.partial(dpo.loss_fn, read=pairs.make_read_pairs(toy.language), config=config)
  total = terms.with_term(plain, terms.make_value_bonus(toy.language), coef, "loss/bonus")

  def mean_logprob(params):
    logprobs, mask = given.read_tokens(toy.language, params, batch.sequences)
    return jnp.mean(jnp.sum(jnp.where(mask, logprobs, 0.0), axis=1))

  @jax.jit
  def run(params):
    key, both = jax.random.key(0), functools.partial(jax.value_and_grad, has_aux=True)
    return (
      both(total)(params, batch, key),
      both(plain)(params, batch.batch, key),
      jax.value_and_grad(mean_logprob)(params),
    )

  ((loss, metrics), grads), ((plain_loss, _), plain_grads), (bonus, bonus_grads) = run(params)
  np.testing.assert_allclose(metrics["loss/bonus"], bonus, rtol=1e-5)
  np.testing.assert_allclose(loss, plain_loss + coef * bonus, rtol=1e-5)
  jax.tree.map(
    lambda a, b, c: np.testing.assert_allclose(a, b + coef * c, atol=1e-5),
    grads,
    plain_grads,
    bonus_grads,
  )
  assert max(np.abs(x).max() for x in jax.tree.leaves(bonus_grads)) > 0.1


@pytest.mark.parametrize(("average", "parts"), [("responses", 2), ("tokens", 4), ("length", 4)])
def test_demonstrations_keep_their_unit_in_micro_batches(average, parts):
  """Tokens of demonstrations beside responses, tokens of responses, or rows, whatever their cut."""
  params, rows = toy.params_of(), 8
  rollout, demonstrations = toy.rollout_of(params, rows), toy.token_batch(rows, seed=3)
  scores = np.random.default_rng(0).normal(size=rows).astype(np.float32)
  config = grpo.GRPOConfig(average=average)
  groups, _ = grpo.make_batch(rollout, scores, rollout.logprobs, config, samples_per_prompt=4)
  batch = terms.WithSequences(groups, demonstrations)
  loss = functools.partial(grpo.loss_fn, read=reading.make_read(toy.language), config=config)
  total = terms.with_term(
    loss, functools.partial(sft.loss_fn, apply_fn=toy.language), 1.0, "loss/ptx"
  )

  @functools.partial(jax.jit, static_argnums=0)
  def run(parts):
    return gradients(total, toy.near(params), batch, jax.random.key(0), parts)

  (want_grads, want), (grads, metrics) = run(1), run(parts)
  logits = np.float64(toy.language(toy.near(params), demonstrations.tokens))
  logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  nll = [
    -logprobs[b, t - 1, demonstrations.tokens[b, t]]
    for b, t in zip(*np.nonzero(demonstrations.mask), strict=True)
  ]
  np.testing.assert_allclose([want["loss/ptx"], metrics["loss/ptx"]], np.mean(nll), rtol=1e-5)
  for name, value in reported(want).items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), grads, want_grads)


def test_each_term_gets_its_part_of_the_batch_and_the_key():
  def loss_fn(params, batch, key):
    return params * batch, {"key": jax.random.key_data(key), "loss/policy": params}

  def term_fn(params, sequences, key):
    return params * sequences**2, {"key": -1, "ignored": 0}

  total = terms.with_term(loss_fn, term_fn, 0.5, "loss/term")
  key = jax.random.key(3)
  loss, metrics = total(2.0, terms.WithSequences(3.0, 4.0), key)
  assert loss == 2 * 3 + 0.5 * 2 * 16
  assert metrics.keys() == {"key", "loss/policy", "loss/term", "term/loss/term", "weight/loss/term"}
  assert metrics["loss/term"] == 32.0
  assert metrics["term/loss/term"] == 16.0
  np.testing.assert_array_equal(metrics["key"], jax.random.key_data(key))


def test_demonstrations_stand_beside_sampled_responses():
  rollout = toy.rollout_of(toy.params_of(), 4)
  sequences = toy.token_batch(4)
  zeros = np.zeros((4, toy.R), np.float32)
  batch = ppo.PPOBatch(rollout, zeros > 0, zeros, zeros, zeros)
  assert terms.WithSequences(batch, sequences).rollout is rollout
  # PPO-ptx: with no response that counts, only the loss on demonstrations is left.
  config = ppo.PPOConfig()
  params = toy.actor_critic_params()
  language = lambda params, tokens: toy.language(params["policy"], tokens)  # noqa: E731
  demonstrate = functools.partial(sft.loss_fn, apply_fn=language)
  none = functools.partial(
    ppo.loss_fn,
    read=reading.make_actor_critic_read(toy.actor_critic),
    config=config,
  )
  total = terms.with_term(none, demonstrate, COEF, "loss/ptx")
  loss, metrics = total(params, terms.WithSequences(batch, sequences), jax.random.key(0))
  want, _ = demonstrate(params, sequences, jax.random.key(0))
  np.testing.assert_allclose(loss, COEF * want, rtol=1e-6)
  assert metrics["loss/ptx"] == want
