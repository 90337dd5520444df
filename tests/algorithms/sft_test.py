"""Supervised fine-tuning against loops, and the weights of its tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import sft
from rlhf_jax.models import build
from rlhf_jax.train_step import gradients, init_state
from rlhf_jax.types import TokenBatch
from tests.algorithms import toy
from tests.algorithms.case import ROWS, Case
from tests.testing import TINY_MODEL as CONFIG
from tests.testing import compilations, pack

PAD, EOS, V = 0, 2, 16
PROMPT, T = 3, 10


def make_batch(rows=8, seed=0):
  """A prompt of three tokens, a response that ends in EOS, padding."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, V, size=(rows, T)).astype(np.int32)
  end = rng.integers(PROMPT + 1, T, size=(rows, 1))  # Where the EOS is.
  at = np.arange(T)
  tokens = np.where(at == end, EOS, np.where(at > end, PAD, tokens)).astype(np.int32)
  return TokenBatch(jnp.asarray(tokens), jnp.asarray((at >= PROMPT) & (at <= end)))


CASES = {
  "": Case(sft.make_sft_step, sft.SFTConfig(), lambda seed: toy.token_batch(ROWS, seed=seed))
}


@functools.cache
def model_and_params(init_std=0.3):
  model = build(dataclasses.replace(CONFIG, init_std=init_std))
  return model._replace(apply=jax.jit(model.apply)), jax.jit(model.init)(jax.random.key(0))


def table_apply(params, tokens):
  """Free logits for every row and position: their gradients are the weights of the tokens."""
  del tokens
  return params["logits"]


def table_loss(logits, batch):
  value, metrics = sft.loss_fn({"logits": logits}, batch, jax.random.key(0), apply_fn=table_apply)
  return value, metrics


def test_loss_is_the_mean_over_response_tokens():
  batch = make_batch()
  logits = np.random.default_rng(1).normal(size=(8, T, V)).astype(np.float32)
  total, count, hits = 0.0, 0, 0
  for b in range(8):
    for t in range(1, T):
      if batch.mask[b, t]:
        row = logits[b, t - 1].astype(np.float64)
        total += np.log(np.exp(row).sum()) - row[batch.tokens[b, t]]
        hits += int(row.argmax() == batch.tokens[b, t])
        count += 1
  loss, metrics = table_loss(logits, batch)
  np.testing.assert_allclose(loss, total / count, rtol=1e-5)
  np.testing.assert_allclose(metrics["token_accuracy"], hits / count, rtol=1e-6)
  assert metrics["weight"] == count


@pytest.mark.parametrize("scored_from", [0, PROMPT])
def test_packing_changes_no_loss_and_no_gradient(scored_from):
  # From 0: there is no prompt, and the token behind another sequence is not predicted from it.
  batch = make_batch()
  at = np.arange(T)[None]
  batch = batch._replace(mask=(np.asarray(batch.mask) | (at < PROMPT)) & (at >= scored_from))
  packed = pack(batch, [[3, 0, 5], [1, 2], [7], [6, 4]], length=3 * T)
  model, params = model_and_params()

  @functools.partial(jax.jit, static_argnames="microbatches")
  def run(batch, microbatches=1):
    loss = functools.partial(sft.loss_fn, apply_fn=model.apply)
    return gradients(loss, params, batch, jax.random.key(0), microbatches)

  want = run(batch)
  for got in (run(packed), run(packed, microbatches=2)):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


def test_weights_of_prompt_response_eos_and_padding():
  batch = make_batch()
  grad, _ = jax.grad(table_loss, has_aux=True)(jnp.zeros((8, T, V)), batch)
  # The logits at t - 1 learn token t.
  trained = np.pad(np.abs(grad).max(axis=-1) > 0, ((0, 0), (1, 0)))[:, :-1]
  np.testing.assert_array_equal(trained, batch.mask)
  is_eos = np.asarray(batch.tokens) == EOS
  assert is_eos.sum() == 8
  assert trained[is_eos].all(), "a model that never learns to stop"
  assert not trained[:, :PROMPT].any()
  assert not trained[np.asarray(batch.tokens) == PAD].any()
  # Every scored token counts the same, whatever the length of its row.
  weight = -np.take_along_axis(np.asarray(grad)[:, :-1], np.asarray(batch.tokens)[:, 1:, None], 2)
  scored = weight[..., 0][np.asarray(batch.mask)[:, 1:]]
  np.testing.assert_allclose(scored, np.full(len(scored), (1 - 1 / V) / len(scored)), rtol=1e-4)


def test_first_token_is_never_scored():
  batch = make_batch()
  everything = batch._replace(mask=jnp.ones_like(batch.mask))
  logits = jax.random.normal(jax.random.key(0), (8, T, V))
  _, metrics = table_loss(logits, everything)
  assert metrics["weight"] == 8 * (T - 1)


@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_poisoned_logits_at_padding_change_nothing(bad):
  batch = make_batch()
  logits = np.random.default_rng(1).normal(size=(8, T, V)).astype(np.float32)
  function = jax.jit(jax.value_and_grad(table_loss, has_aux=True))
  (want, want_metrics), want_grad = function(logits, batch)
  used = np.pad(np.asarray(batch.mask), ((0, 0), (0, 1)))[:, 1:]
  logits[~used] = bad
  (value, metrics), grad = function(logits, batch)
  assert value == want
  assert metrics == want_metrics
  np.testing.assert_array_equal(np.asarray(grad)[used], np.asarray(want_grad)[used])


@pytest.mark.parametrize("extra", [0, 1, 7])
def test_tokens_and_amount_of_padding_change_nothing(extra):
  params, batch = toy.params_of(), make_batch()

  @jax.jit
  @jax.value_and_grad
  def loss(params, batch):
    return sft.loss_fn(params, batch, jax.random.key(0), apply_fn=toy.language)[0]

  want, want_grad = loss(params, batch)
  last = np.array([np.flatnonzero(row)[-1] for row in np.asarray(batch.mask)])[:, None]
  tokens = np.where(np.arange(T) > last, 9, batch.tokens)
  padded = TokenBatch(
    jnp.pad(jnp.asarray(tokens), ((0, 0), (0, extra)), constant_values=11),
    jnp.pad(batch.mask, ((0, 0), (0, extra))),
  )
  value, grad = loss(params, padded)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grad, want_grad)


def test_memorises_eight_rows():
  model, params = model_and_params(init_std=0.1)
  batch = make_batch()
  # Prompts that can be told apart.
  tokens = batch.tokens.at[:, 0].set(jnp.arange(8) + 3)
  batch = batch._replace(tokens=tokens)
  tx = optax.adam(1e-2)
  step = sft.make_sft_step(model.apply, tx, sft.SFTConfig())
  state = init_state(jax.tree.map(jnp.copy, params), tx)
  with compilations() as names:
    for _ in range(300):
      state, metrics = step(state, batch, jax.random.key(0))
  assert metrics["loss"] < 0.02
  assert metrics["token_accuracy"] == 1
  assert names.count("step") == 1
  # Greedy continuation of a prompt is its response, up to the EOS.
  generated = tokens[:, :PROMPT]
  for t in range(PROMPT, T):
    logits = model.apply(state.params, jnp.pad(generated, ((0, 0), (0, T - t))))
    generated = jnp.concatenate([generated, jnp.argmax(logits[:, t - 1 : t], axis=-1)], axis=1)
  np.testing.assert_array_equal(np.where(batch.mask, generated, 0), np.where(batch.mask, tokens, 0))


def test_impossible_settings_are_refused():
  with pytest.raises(ValueError, match="^microbatches must be at least 1"):
    sft.SFTConfig(microbatches=0)


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 7)])
def test_sums_of_rows_have_the_normaliser_of_the_loss(cuts):
  """However rows are divided into batches, their mean is that over all tokens."""
  batch = toy.token_batch(8)
  batch.mask[4] = (
    np.arange(batch.mask.shape[1]) < 5
  )  # From the first token on, which is not scored.
  params = toy.params_of()
  want, metrics = sft.loss_fn(params, batch, jax.random.key(0), apply_fn=toy.language)
  parts = [
    jax.tree.map(lambda x, a=a, b=b: x[a:b], batch)
    for a, b in zip((0, *cuts), (*cuts, 8), strict=True)
  ]
  sums = [sft.row_sums(toy.language, params, part) for part in parts]
  loss, means = sft.mean_metrics(jax.tree.map(lambda *x: np.concatenate(x), *sums))
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  np.testing.assert_allclose(means["token_accuracy"], metrics["token_accuracy"], rtol=1e-6)
