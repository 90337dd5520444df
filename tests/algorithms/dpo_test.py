"""DPO against loops over single sequences in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import dpo, pairs
from rlhf_jax.losses import preference
from rlhf_jax.train_step import gradients, init_state
from tests.algorithms import toy
from tests.algorithms.case import ROWS, Case
from tests.testing import pack

B, T = 6, 9
POLICY, REF = toy.params_of(), toy.near(toy.params_of(), 0.8)
WEIGHTED = pairs.PairConfig(length_alpha=0.3, reweight=True)
make_read = functools.cache(functools.partial(pairs.make_read_pairs, toy.language))
read_ref = functools.cache(lambda weighting: jax.jit(make_read(weighting)))


def batch_of(rows, weighting=None, seed=0):
  """Pairs with the log-probabilities of another model."""
  rows = toy.token_batch(rows, 2, seed=seed)
  return dpo.DPOBatch(rows, read_ref(weighting)(REF, rows).totals)


def loss_of(config, weighting=None):
  return functools.partial(dpo.loss_fn, read=make_read(weighting), config=config)


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_of(config, weighting, params, batch):
  return loss_of(config, weighting)(params, batch, jax.random.key(0))


def case(weighting=None, parts=4, **settings):
  return Case(
    functools.partial(dpo.make_dpo_step, weighting=weighting),
    dpo.DPOConfig(**settings),
    lambda seed: jax.device_get(batch_of(ROWS, weighting, seed)),
    parts=parts,
  )


CASES = {
  "": case(),
  "terms": case(WEIGHTED, beta=0.3, label_smoothing=0.1, sft_coef=0.5, bonus_coef=-0.02),
  "divergence": case(divergence="jensen_shannon"),
  "aot": case(loss="aot", parts=1),  # Compares all pairs of a batch: it cannot be cut.
}


def slow_sums(params, batch):
  """Log-probabilities [B, 2] of the responses, one sequence at a time, and the mean NLL [B]."""
  sums, nll = np.zeros((B, 2)), np.zeros(B)
  for i, j in np.ndindex(B, 2):
    mask = np.asarray(batch.mask[i, j])
    length = np.flatnonzero(mask)[-1] + 1
    tokens = np.asarray(batch.tokens[i, j])[:length]
    logits = np.float64(toy.language(params, tokens[None]))[0]
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    logprobs = [table[t - 1, tokens[t]] for t in np.flatnonzero(mask)]
    sums[i, j] = np.sum(logprobs)
    if j == 0:
      nll[i] = -np.mean(logprobs)
  return sums, nll


def test_loss_is_that_of_single_sequences():
  config = dpo.DPOConfig(beta=0.3, label_smoothing=0.1, sft_coef=0.5, bonus_coef=-0.02)
  batch = batch_of(B)
  (policy, nll), (ref, _) = slow_sums(POLICY, batch.pairs), slow_sums(REF, batch.pairs)
  np.testing.assert_allclose(batch.ref_logprobs, ref, rtol=1e-5)
  margin = 0.3 * ((policy - ref)[:, 0] - (policy - ref)[:, 1])
  expected = 0.9 * np.log1p(np.exp(-margin)) + 0.1 * np.log1p(np.exp(margin))
  loss, metrics = value_of(config, None, POLICY, batch)
  # VPO's bonus is the log-probability of the whole chosen response.
  want = expected + 0.5 * nll - 0.02 * policy[:, 0]
  np.testing.assert_allclose(loss, np.mean(want), rtol=1e-4)
  np.testing.assert_allclose(metrics["reward/margin"], margin.mean(), rtol=1e-3)
  np.testing.assert_allclose(metrics["reward/accuracy"], (margin > 0).mean())
  np.testing.assert_allclose(metrics["logprobs/chosen"], policy[:, 0].mean(), rtol=1e-4)
  np.testing.assert_allclose(metrics["nll/chosen"], nll.mean(), rtol=1e-4)
  assert metrics["tokens"] == batch.pairs.mask.sum()
  assert metrics["weight"] == B


def test_optimal_transport_reads_the_reference():
  """AOT compares the margins of the policy with those of the reference, each in its own order."""
  batch = batch_of(B)
  (policy, _), (ref, _) = slow_sums(POLICY, batch.pairs), slow_sums(REF, batch.pairs)
  margins = np.sort(policy[:, 0] - policy[:, 1]) - np.sort(ref[:, 0] - ref[:, 1])
  loss, _ = value_of(dpo.DPOConfig(loss="aot"), None, POLICY, batch)
  np.testing.assert_allclose(loss, np.log1p(np.exp(-0.1 * margins)).mean(), rtol=1e-4)


@pytest.mark.parametrize("loss", [*preference.OF_BATCHES, f"{__name__}:of_batches"])
def test_what_compares_the_pairs_of_a_batch_is_not_cut(loss):
  config = dpo.DPOConfig(loss=loss)
  with pytest.raises(ValueError, match="compares the rows of a batch"):
    gradients(loss_of(config), POLICY, batch_of(B), jax.random.key(0), 2)


def test_policy_that_is_the_reference_has_loss_log_2_and_zero_reward():
  loss, metrics = value_of(dpo.DPOConfig(), None, REF, batch_of(B))
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
  assert metrics["reward/chosen"] == metrics["reward/rejected"] == 0
  assert metrics["reward/accuracy"] == 0.5


@pytest.mark.parametrize("name", preference.PAIRWISE_LOSSES)
def test_every_loss_is_lowered_by_its_step(name):
  config, batch, tx = dpo.DPOConfig(loss=name), batch_of(B), optax.sgd(1e-4)
  step = dpo.make_dpo_step(toy.language, tx, config)
  state = init_state(jax.tree.map(jnp.array, POLICY), tx)
  losses = []
  for _ in range(2):
    state, metrics = step(state, batch, jax.random.key(0))
    losses.append(float(metrics["loss"]))
  assert losses[1] < losses[0]
  assert all(np.isfinite(float(x)) for x in metrics.values())


@pytest.mark.parametrize(
  ("settings", "weighting"),
  [
    ({}, None),
    ({"divergence": "jensen_shannon"}, None),
    ({"sft_coef": 0.5, "label_smoothing": 0.1}, None),
    ({}, pairs.PairConfig(reweight=True)),
    ({}, pairs.PairConfig(length_alpha=0.3)),
  ],
  ids=["dpo", "divergence", "terms", "reweight", "length_alpha"],
)
def test_padding_and_microbatches_change_nothing(settings, weighting):
  loss = loss_of(dpo.DPOConfig(**settings), weighting)
  run = jax.jit(functools.partial(gradients, loss), static_argnums=3)
  rows, want = batch_of(B).pairs, None
  end = np.where(rows.mask, np.arange(T), 0).max(axis=-1, keepdims=True)
  for poison, parts in ((0, 1), (7, 1), (7, 3)):
    poisoned = rows._replace(tokens=np.where(np.arange(T) > end, np.int32(poison), rows.tokens))
    batch = dpo.DPOBatch(poisoned, read_ref(weighting)(REF, poisoned).totals)
    result = run(POLICY, batch, jax.random.key(0), parts)
    want = want or result
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), result, want)


@pytest.mark.parametrize(
  ("settings", "weighting", "parts"),
  [
    ({"loss": "dpo", "sft_coef": 0.5}, WEIGHTED, 2),
    ({"loss": "dpo", "divergence": "forward_kl"}, None, 2),
    ({"loss": "aot"}, None, 1),  # Compares all pairs, and an empty place is none.
  ],
  ids=["terms", "divergence", "aot"],
)
def test_packing_changes_no_loss_and_no_gradient(settings, weighting, parts):
  batch = batch_of(B, weighting)
  packed = pack(batch.pairs, [[3, 0], [5], [1, 2], [4]], length=2 * T)
  ref = read_ref(weighting)(REF, packed).totals.reshape(*packed.real.shape, 2)
  run = functools.partial(gradients, loss_of(dpo.DPOConfig(**settings), weighting))
  run = jax.jit(run, static_argnums=3)
  want = run(POLICY, batch, jax.random.key(0), 1)
  got = run(POLICY, dpo.DPOBatch(packed, ref), jax.random.key(0), parts)
  assert got[1]["weight"] == B
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


def test_divergence_enters_as_a_score():
  batch = batch_of(B)
  (policy, _), (ref, _) = slow_sums(POLICY, batch.pairs), slow_sums(REF, batch.pairs)
  # The derivative of f at the ratio u, with f(u) = -log u for the forward KL: -1 / u.
  scores = -np.exp(ref - policy)
  expected = np.log1p(np.exp(-0.1 * (scores[:, 0] - scores[:, 1])))
  loss, _ = value_of(dpo.DPOConfig(divergence="forward_kl"), None, POLICY, batch)
  np.testing.assert_allclose(loss, expected.mean(), rtol=1e-3)


def of_a_user(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta):
  """A loss of a user's own."""
  return jax.nn.relu(2 - beta * (policy_chosen - policy_rejected - ref_chosen + ref_rejected))


def test_a_loss_of_your_own():
  config = dpo.DPOConfig(loss=f"{__name__}:of_a_user", beta=0.2)
  batch = batch_of(B)
  loss, _ = value_of(config, None, POLICY, batch)
  (policy, _), (ref, _) = slow_sums(POLICY, batch.pairs), slow_sums(REF, batch.pairs)
  margin = (policy - ref)[:, 0] - (policy - ref)[:, 1]
  np.testing.assert_allclose(loss, np.maximum(2 - 0.2 * margin, 0).mean(), rtol=1e-4)


def of_batches(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta):
  """A loss whose margin is the mean of the batch, a constant."""
  margin = beta * (policy_chosen - policy_rejected - ref_chosen + ref_rejected)
  return jnp.square(margin - jax.lax.stop_gradient(jnp.mean(margin)))


def without_beta(policy_chosen, policy_rejected, ref_chosen, ref_rejected):
  """A loss that cannot be called."""


@pytest.mark.parametrize(
  "settings",
  [
    {"loss": "no_such_loss"},
    {"loss": f"{__name__}:no_such_loss"},
    {"loss": f"{__name__}:without_beta"},
    {"loss": f"{__name__}:of_a_user", "label_smoothing": 0.1},
    {"loss": f"{__name__}:of_a_user", "divergence": "forward_kl"},
    {"divergence": "euclid"},
    {"beta": 0.0},
    {"sft_coef": -0.1},
    {"microbatches": 0},
    {"bonus_coef": 0.1},
    {"bonus_coef": np.nan},
    {"microbatches": 2, "loss": "aot"},
    {"microbatches": 4, "loss": "aot_unpaired"},
    {"microbatches": 2, "loss": f"{__name__}:of_batches"},
    {"label_smoothing": 0.5},
    {"loss": "ipo", "label_smoothing": 0.1},
    {"loss": "aot", "divergence": "forward_kl"},
  ],
  ids=str,
)
def test_impossible_settings_are_refused(settings):
  with pytest.raises(ValueError, match="|".join(settings)):
    dpo.DPOConfig(**settings)
