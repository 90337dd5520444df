"""SimPO, ORPO and CPO against their papers, in numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import pairs, simpo
from rlhf_jax.train_step import gradients, init_state
from tests.algorithms import toy
from tests.algorithms.case import ROWS, Case
from tests.testing import pack

B, T = 6, 9
POLICY = toy.params_of()
WEIGHTED = pairs.PairConfig(length_alpha=0.3, reweight=True)


def case(weighting=None, **settings):
  return Case(
    functools.partial(simpo.make_simpo_step, weighting=weighting),
    simpo.SimPOConfig(**settings),
    lambda seed: toy.token_batch(ROWS, 2, seed=seed),
  )


CASES = {
  "": case(),
  "orpo": case(loss="orpo", beta=0.1, sft_coef=1.0),
  "cpo": case(WEIGHTED, loss="cpo", beta=0.1, sft_coef=0.5),
}


def loss_of(config, weighting=None):
  read = pairs.make_read_pairs(toy.language, weighting)
  return functools.partial(simpo.loss_fn, read=read, config=config)


def softplus(x):
  return np.logaddexp(0, x)


@pytest.mark.parametrize("name", simpo.LOSSES)
def test_loss_is_that_of_its_paper(name):
  margin = 0.4 if name == "simpo" else None
  config = simpo.SimPOConfig(loss=name, beta=0.7, margin=margin, sft_coef=0.3)
  batch = toy.token_batch(B, 2)
  policy = pairs.make_read_pairs(toy.language)(POLICY, batch)
  totals, means = np.float64(policy.totals), np.float64(policy.totals) / batch.mask.sum(-1)
  log_odds = means - np.log1p(-np.exp(means))
  want, compared = {
    "simpo": (softplus(0.7 * (0.4 - means[:, 0] + means[:, 1])), means),
    "orpo": (0.7 * softplus(log_odds[:, 1] - log_odds[:, 0]), means),
    "cpo": (softplus(-0.7 * (totals[:, 0] - totals[:, 1])), totals),
  }[name]
  loss, metrics = jax.jit(loss_of(config))(POLICY, batch, jax.random.key(0))
  np.testing.assert_allclose(loss, np.mean(want - 0.3 * means[:, 0]), rtol=1e-4)
  np.testing.assert_allclose(metrics["logprobs/chosen"], compared[:, 0].mean(), rtol=1e-4)
  np.testing.assert_allclose(metrics["reward/rejected"], 0.7 * compared[:, 1].mean(), rtol=1e-4)
  assert metrics["weight"] == B
  assert metrics["tokens"] == batch.mask.sum()


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_of_means_do_not_see_the_length(name, alpha):
  """A response twice over has the same mean if the model gives every token the same odds."""
  uniform = lambda params, tokens: jnp.zeros((*tokens.shape, toy.V)) + params  # noqa: E731
  read = pairs.make_read_pairs(uniform, pairs.PairConfig(length_alpha=alpha))
  config = simpo.SimPOConfig(loss=name)
  _, metrics = simpo.loss_fn(
    jnp.zeros(()), toy.token_batch(B, 2), jax.random.key(0), read=read, config=config
  )
  np.testing.assert_allclose(metrics["logprobs/chosen"], -np.log(toy.V), rtol=1e-6)
  np.testing.assert_allclose(metrics["reward/margin"], 0, atol=1e-6)


@pytest.mark.parametrize("name", simpo.LOSSES)
def test_every_loss_is_lowered_by_its_step(name):
  config, batch, tx = simpo.SimPOConfig(loss=name), toy.token_batch(B, 2), optax.sgd(1e-4)
  step = simpo.make_simpo_step(toy.language, tx, config)
  state = init_state(jax.tree.map(jnp.array, POLICY), tx)
  losses = []
  for _ in range(2):
    state, metrics = step(state, batch, jax.random.key(0))
    losses.append(float(metrics["loss"]))
  assert losses[1] < losses[0]
  assert all(np.isfinite(float(x)) for x in metrics.values())


@pytest.mark.parametrize(
  ("name", "weighting"), [("simpo", None), ("orpo", None), ("cpo", WEIGHTED)]
)
def test_packing_padding_and_microbatches_change_no_loss_and_no_gradient(name, weighting):
  batch = toy.token_batch(B, 2)
  end = np.where(batch.mask, np.arange(T), 0).max(axis=-1, keepdims=True)
  poisoned = batch._replace(tokens=np.where(np.arange(T) > end, np.int32(7), batch.tokens))
  packed = pack(batch, [[3, 0], [5], [1, 2], [4]], length=2 * T)
  loss = loss_of(simpo.SimPOConfig(loss=name, sft_coef=0.4), weighting)
  run = jax.jit(functools.partial(gradients, loss), static_argnums=3)
  want = run(POLICY, batch, jax.random.key(0), 1)
  for other, parts in ((poisoned, 3), (packed, 2)):
    got = run(POLICY, other, jax.random.key(0), parts)
    assert got[1]["weight"] == B
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize(
  "settings",
  [{"loss": "dpo"}, {"beta": 0.0}, {"margin": -1.0}, {"sft_coef": -0.1}, {"microbatches": 0}],
  ids=str,
)
def test_impossible_settings_are_refused(settings):
  with pytest.raises(ValueError, match=f"^{next(iter(settings))} must"):
    simpo.SimPOConfig(**settings)


@pytest.mark.parametrize("name", ["orpo", "cpo"])
def test_a_margin_that_no_loss_reads_is_refused(name):
  for margin in (0.0, 0.25):
    with pytest.raises(ValueError, match=f"^margin is not read by loss={name}, only by simpo"):
      simpo.SimPOConfig(loss=name, margin=margin)


def test_unset_settings_are_those_of_the_papers():
  want = {"simpo": (2.0, 0.0), "orpo": (0.1, 1.0), "cpo": (0.1, 1.0)}
  assert want.keys() == simpo.LOSSES.keys()
  for name, settings in want.items():
    # Also if the loss is changed later, as a flag does.
    for config in (
      simpo.SimPOConfig(loss=name),
      dataclasses.replace(simpo.SimPOConfig(), loss=name),
    ):
      assert (config.value("beta"), config.value("sft_coef")) == settings
  assert simpo.SimPOConfig(loss="orpo", sft_coef=0.0).value("sft_coef") == 0
  assert 0.25 <= simpo.SimPOConfig().value("margin") <= 0.8  # Nats per token, at any beta.
