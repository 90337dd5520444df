"""KTO against loops over single sequences in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import given, kto
from rlhf_jax.train_step import gradients, init_state
from rlhf_jax.types import TokenBatch, UnpairedBatch
from tests.algorithms import toy
from tests.algorithms.case import ROWS, Case

B = 6
POLICY, REF = toy.params_of(0), toy.params_of(1)
read_responses = jax.jit(kto.read_responses, static_argnums=0)


def batch_of(rows, seed=0):
  """Labelled responses, each beside another one to its prompt."""
  tokens, mask = toy.token_batch(rows, 2, seed=seed)
  desirable = np.arange(rows) % 3 == 0
  responses = UnpairedBatch(
    tokens[:, 0], mask[:, 0], desirable, TokenBatch(tokens[:, 1], mask[:, 1])
  )
  return kto.KTOBatch(responses, read_responses(toy.language, REF, responses))


CASES = {  # The KL is estimated from the batch: it cannot be cut.
  "": Case(
    kto.make_kto_step,
    kto.KTOConfig(undesirable_weight=0.7),
    lambda seed: jax.device_get(batch_of(ROWS, seed)),
    parts=1,
  )
}


def sums(params, tokens):
  logprobs, mask = given.read_tokens(toy.language, params, tokens)
  return np.where(mask, np.float64(logprobs), 0).sum(axis=1)


def test_loss_is_that_of_single_sequences():
  config = kto.KTOConfig(beta=0.2, desirable_weight=1.5)
  batch = batch_of(B)
  rows = batch.responses
  loss = functools.partial(kto.loss_fn, apply_fn=toy.language, config=config)
  value, metrics = jax.jit(loss)(POLICY, batch, jax.random.key(0))
  log_ratio, other = (
    sums(POLICY, tokens) - sums(REF, tokens)
    for tokens in (TokenBatch(rows.tokens, rows.mask), rows.mismatched)
  )
  z = max(0.0, other.mean())
  gain = 0.2 * (log_ratio - z)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
  expected = np.where(rows.desirable, 1.5 * (1 - sigmoid(gain)), 1 - sigmoid(-gain))
  np.testing.assert_allclose(value, expected.mean(), rtol=1e-4)
  up = np.asarray(rows.desirable)
  np.testing.assert_allclose(metrics["reward/chosen"], 0.2 * log_ratio[up].mean(), rtol=1e-3)
  np.testing.assert_allclose(metrics["reward/rejected"], 0.2 * log_ratio[~up].mean(), rtol=1e-3)
  np.testing.assert_allclose(metrics["kl/estimate"], other.mean(), rtol=1e-3)
  assert metrics["tokens"] == rows.mask.sum()


def test_the_estimate_of_the_kl_has_no_gradient():
  batch = batch_of(B)
  total = lambda params: jnp.sum(  # noqa: E731
    kto.read_responses(toy.language, params, batch.responses)[:, 1]
  )
  assert not any(np.any(x) for x in jax.tree.leaves(jax.jit(jax.grad(total))(POLICY)))


def test_labelled_responses_move_apart():
  tx = optax.adam(3e-3)
  step = kto.make_kto_step(toy.language, tx, kto.KTOConfig())
  state = init_state(jax.tree.map(jnp.array, REF), tx)
  batch = batch_of(B)
  for _ in range(40):
    state, metrics = step(state, batch, jax.random.key(0))
  assert metrics["reward/chosen"] > 0.05
  assert metrics["reward/rejected"] < -0.05


@pytest.mark.parametrize("label", [True, False])
def test_metrics_of_a_label_that_is_not_there_are_undefined(label):
  batch = batch_of(B)
  responses = batch.responses._replace(desirable=np.full(B, label))
  loss = functools.partial(kto.loss_fn, apply_fn=toy.language, config=kto.KTOConfig())
  _, metrics = loss(POLICY, batch._replace(responses=responses), jax.random.key(0))
  there, missing = ("chosen", "rejected") if label else ("rejected", "chosen")
  for name in ("reward", "logprobs"):
    assert np.isfinite(metrics[f"{name}/{there}"]) and np.isnan(metrics[f"{name}/{missing}"])


def test_a_batch_is_not_cut():
  with pytest.raises(ValueError, match="^microbatches must be 1: KTO estimates its KL"):
    kto.KTOConfig(microbatches=2)
  loss = functools.partial(kto.loss_fn, apply_fn=toy.language, config=kto.KTOConfig())
  with pytest.raises(ValueError, match="compares the rows of a batch"):
    gradients(loss, POLICY, batch_of(B), jax.random.key(0), 2)


@pytest.mark.parametrize("name", ["beta", "desirable_weight", "undesirable_weight"])
def test_impossible_settings_are_refused(name):
  with pytest.raises(ValueError, match=f"^{name} must be positive"):
    kto.KTOConfig(**{name: 0.0})
