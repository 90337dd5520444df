"""DPO and KTO over a small transformer, against loops over single sequences in numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import dpo, kto
from rlhf_jax.losses import preference
from rlhf_jax.models import build
from rlhf_jax.train_step import gradients, init_state
from rlhf_jax.types import TokenBatch, UnpairedBatch
from tests.testing import TINY_MODEL, pack, tiny_params

B, T, V = 6, 9, 16
MODEL = build(TINY_MODEL)
MODEL = MODEL._replace(apply=jax.jit(MODEL.apply))


params_of = functools.partial(tiny_params, "language")


def make_pairs(rng, poison=0):
  """Right-padded pairs: prompts of 1 to 3 tokens, responses of 1 to 5; padding is `poison`."""
  tokens = np.full((B, 2, T), poison, np.int32)
  mask = np.zeros((B, 2, T), bool)
  for i in range(B):
    prompt = rng.integers(1, V, 1 + i % 3)
    for j in range(2):
      response = rng.integers(1, V, rng.integers(1, 6))
      end = len(prompt) + len(response)
      tokens[i, j, :end] = [*prompt, *response]
      mask[i, j, len(prompt) : end] = True
  return TokenBatch(tokens, mask)


def slow_logprobs(params, tokens, mask):
  """Log-probabilities of the masked tokens of one sequence, in float64."""
  logits = np.asarray(MODEL.apply(params, jnp.asarray(tokens[None])), np.float64)[0]
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return np.array([logprobs[t - 1, tokens[t]] for t in np.flatnonzero(mask)])


def slow_sums(params, pairs):
  return np.array(
    [
      [slow_logprobs(params, pairs.tokens[i, j], pairs.mask[i, j]).sum() for j in range(2)]
      for i in range(B)
    ]
  )


def batch_of(config, pairs):
  ref = dpo.reference_logprobs(MODEL.apply, params_of(1), jax.tree.map(jnp.asarray, pairs), config)
  return dpo.DPOBatch(jax.tree.map(jnp.asarray, pairs), ref)


def test_loss_is_that_of_single_sequences():
  pairs = make_pairs(np.random.default_rng(0))
  config = dpo.DPOConfig(beta=0.3, label_smoothing=0.1, sft_coef=0.5)
  batch = batch_of(config, pairs)
  policy, ref = slow_sums(params_of(0), pairs), slow_sums(params_of(1), pairs)
  np.testing.assert_allclose(batch.ref_logprobs, ref, rtol=1e-5)
  margin = 0.3 * ((policy - ref)[:, 0] - (policy - ref)[:, 1])
  expected = 0.9 * np.log1p(np.exp(-margin)) + 0.1 * np.log1p(np.exp(margin))
  nll = [
    -slow_logprobs(params_of(0), pairs.tokens[i, 0], pairs.mask[i, 0]).mean() for i in range(B)
  ]
  loss, metrics = dpo.loss_fn(
    params_of(0), batch, jax.random.key(0), apply_fn=MODEL.apply, config=config
  )
  np.testing.assert_allclose(loss, np.mean(expected + 0.5 * np.array(nll)), rtol=1e-4)
  np.testing.assert_allclose(metrics["reward/margin"], margin.mean(), rtol=1e-3)
  np.testing.assert_allclose(metrics["reward/accuracy"], (margin > 0).mean())
  np.testing.assert_allclose(metrics["logprobs/chosen"], policy[:, 0].mean(), rtol=1e-4)
  assert metrics["tokens"] == pairs.mask.sum()


def test_optimal_transport_reads_the_reference():
  """AOT compares the margins of the policy with those of the reference, each in its own order."""
  pairs = make_pairs(np.random.default_rng(7))
  config = dpo.DPOConfig(loss="aot")
  policy, ref = slow_sums(params_of(0), pairs), slow_sums(params_of(1), pairs)
  margins = np.sort(policy[:, 0] - policy[:, 1]) - np.sort(ref[:, 0] - ref[:, 1])
  loss, _ = dpo.loss_fn(
    params_of(0), batch_of(config, pairs), jax.random.key(0), apply_fn=MODEL.apply, config=config
  )
  np.testing.assert_allclose(loss, np.log1p(np.exp(-0.1 * margins)).mean(), rtol=1e-4)


def test_policy_that_is_the_reference_has_loss_log_2_and_zero_reward():
  pairs = make_pairs(np.random.default_rng(1))
  config = dpo.DPOConfig()
  loss, metrics = dpo.loss_fn(
    params_of(1), batch_of(config, pairs), jax.random.key(0), apply_fn=MODEL.apply, config=config
  )
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
  assert metrics["reward/chosen"] == metrics["reward/rejected"] == 0
  assert metrics["reward/accuracy"] == 0.5


@pytest.mark.parametrize("name", dpo.LOSSES)
def test_every_loss_is_lowered_by_its_step(name):
  config = dpo.DPOConfig(loss=name)
  batch = batch_of(config, make_pairs(np.random.default_rng(2)))
  tx = optax.sgd(1e-4)
  step = dpo.make_dpo_step(MODEL.apply, tx, config)
  state = init_state(jax.tree.map(jnp.copy, params_of(0)), tx)
  losses = []
  for _ in range(2):
    state, metrics = step(state, batch, jax.random.key(0))
    losses.append(float(metrics["loss"]))
  assert losses[1] < losses[0]
  assert all(np.isfinite(float(x)) for x in metrics.values())


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_of_means_do_not_see_the_length(name):
  """A response twice over has the same mean if the model gives every token the same odds."""
  uniform = lambda params, tokens: jnp.zeros((*tokens.shape, V)) + params  # noqa: E731
  pairs = make_pairs(np.random.default_rng(3))
  config = dpo.DPOConfig(loss=name)
  batch = dpo.DPOBatch(jax.tree.map(jnp.asarray, pairs), jnp.zeros((B, 2)))
  _, metrics = dpo.loss_fn(jnp.zeros(()), batch, jax.random.key(0), apply_fn=uniform, config=config)
  np.testing.assert_allclose(metrics["logprobs/chosen"], -np.log(V), rtol=1e-6)
  np.testing.assert_allclose(metrics["reward/margin"], 0, atol=1e-6)


@pytest.mark.parametrize(
  "settings",
  [{}, {"divergence": "jensen_shannon"}, {"reweight": True}, {"length_alpha": 0.3}],
  ids=lambda settings: "-".join(settings) or "dpo",
)
def test_padding_and_microbatches_change_nothing(settings):
  config = dpo.DPOConfig(**settings)
  loss = functools.partial(dpo.loss_fn, apply_fn=MODEL.apply, config=config)
  want = None
  for poison, parts in ((0, 1), (7, 1), (7, 3)):
    batch = batch_of(config, make_pairs(np.random.default_rng(4), poison))
    grads, metrics = gradients(loss, params_of(0), batch, jax.random.key(0), parts)
    want = want or (grads, metrics["loss"])
    np.testing.assert_allclose(metrics["loss"], want[1], rtol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, want[0]
    )


@pytest.mark.parametrize(
  "settings, parts",
  [
    ({"loss": "dpo", "sft_coef": 0.5, "reweight": True, "length_alpha": 0.3}, 2),
    ({"loss": "orpo"}, 1),
    ({"loss": "aot"}, 1),  # Compares all pairs, and an empty place is none.
  ],
  ids=lambda x: x["loss"] if isinstance(x, dict) else "",
)
def test_packing_changes_no_loss_and_no_gradient(settings, parts):
  config = dpo.DPOConfig(**settings)
  batch = batch_of(config, make_pairs(np.random.default_rng(6)))
  packed = pack(batch.pairs, [[3, 0], [5], [1, 2], [4]], length=2 * T)
  ref = np.zeros((*packed.real.shape, 2), np.float32)
  ref[packed.real] = batch.ref_logprobs[jnp.array([3, 0, 5, 1, 2, 4])]
  loss = functools.partial(dpo.loss_fn, apply_fn=MODEL.apply, config=config)
  run = jax.jit(functools.partial(gradients, loss), static_argnums=3)
  want, expected = run(params_of(0), batch, jax.random.key(0), 1)
  got, metrics = run(params_of(0), dpo.DPOBatch(packed, ref), jax.random.key(0), parts)
  assert metrics.pop("weight") == B
  for a, b in ((got, want), (metrics, expected)):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), a, b)


def test_divergence_enters_as_a_score():
  pairs = make_pairs(np.random.default_rng(5))
  config = dpo.DPOConfig(divergence="forward_kl")
  policy, ref = slow_sums(params_of(0), pairs), slow_sums(params_of(1), pairs)
  # The derivative of f at the ratio u, with f(u) = -log u for the forward KL: -1 / u.
  scores = -np.exp(ref - policy)
  expected = np.log1p(np.exp(-0.1 * (scores[:, 0] - scores[:, 1])))
  loss, _ = dpo.loss_fn(
    params_of(0), batch_of(config, pairs), jax.random.key(0), apply_fn=MODEL.apply, config=config
  )
  np.testing.assert_allclose(loss, expected.mean(), rtol=1e-3)


@pytest.mark.parametrize(
  "settings",
  [
    {"loss": "no_such_loss"},
    {"divergence": "euclid"},
    {"beta": 0.0},
    {"label_smoothing": 0.5},
    {"loss": "ipo", "label_smoothing": 0.1},
    {"loss": "aot", "divergence": "forward_kl"},
  ],
  ids=str,
)
def test_impossible_settings_are_refused(settings):
  with pytest.raises(ValueError, match="|".join(settings)):
    dpo.DPOConfig(**settings)


def unpaired():
  pairs = make_pairs(np.random.default_rng(6))
  mismatched = TokenBatch(pairs.tokens[:, 1], pairs.mask[:, 1])
  desirable = np.arange(B) % 3 == 0
  return UnpairedBatch(pairs.tokens[:, 0], pairs.mask[:, 0], desirable, mismatched)


def test_kto_is_that_of_single_sequences():
  rows = jax.tree.map(jnp.asarray, unpaired())
  config = kto.KTOConfig(beta=0.2, desirable_weight=1.5)
  ref = kto.reference_logprobs(MODEL.apply, params_of(1), rows)
  loss, metrics = kto.loss_fn(
    params_of(0), kto.KTOBatch(rows, ref), jax.random.key(0), apply_fn=MODEL.apply, config=config
  )

  def sums(params):
    own = [slow_logprobs(params, t, m).sum() for t, m in zip(rows.tokens, rows.mask, strict=True)]
    other = [slow_logprobs(params, t, m).sum() for t, m in zip(*rows.mismatched, strict=True)]
    return np.array([own, other])

  log_ratio, other = sums(params_of(0)) - sums(params_of(1))
  z = max(0.0, other.mean())
  gain = 0.2 * (log_ratio - z)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
  expected = np.where(rows.desirable, 1.5 * (1 - sigmoid(gain)), 1 - sigmoid(-gain))
  np.testing.assert_allclose(loss, expected.mean(), rtol=1e-4)
  up = np.asarray(rows.desirable)
  np.testing.assert_allclose(metrics["reward/chosen"], 0.2 * log_ratio[up].mean(), rtol=1e-3)
  np.testing.assert_allclose(metrics["reward/rejected"], 0.2 * log_ratio[~up].mean(), rtol=1e-3)


def test_kto_moves_labelled_responses_apart():
  rows = jax.tree.map(jnp.asarray, unpaired())
  config = kto.KTOConfig()
  tx = optax.adam(1e-3)
  step = kto.make_kto_step(MODEL.apply, tx, config)
  state = init_state(jax.tree.map(jnp.copy, params_of(1)), tx)
  batch = kto.KTOBatch(rows, kto.reference_logprobs(MODEL.apply, params_of(1), rows))
  for _ in range(20):
    state, metrics = step(state, batch, jax.random.key(0))
  assert metrics["reward/chosen"] > 0.05
  assert metrics["reward/rejected"] < -0.05


def test_label_smoothing_is_offered_where_the_loss_has_it():
  smooth = {name for name in dpo.LOSSES if dpo.DPOConfig(loss=name).smooths_labels}
  assert {"dpo", "robust_dpo", "exo_pair", "aot", "aot_unpaired"} <= smooth
  assert "ipo" not in smooth
  assert dataclasses.replace(dpo.DPOConfig(), label_smoothing=0.2).function is preference.dpo_loss
