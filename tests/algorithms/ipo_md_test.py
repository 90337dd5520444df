"""IPO-MD and its relatives against the exact equilibrium of a game small enough to enumerate."""

import functools

import jax
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import ipo_md, reading
from tests.algorithms import tabular, toy
from tests.algorithms.case import ROWS, Case
from tests.algorithms.opponents_test import opponent_batch

TAU = 0.15


def batch_of(seed):
  return opponent_batch(seed, ROWS, 2)


CASES = {
  "": Case(ipo_md.make_ipo_md_step, ipo_md.IPOMDConfig(), batch_of),
  "lengths": Case(ipo_md.make_ipo_md_step, ipo_md.IPOMDConfig(normalize_lengths=True), batch_of),
}


@pytest.mark.parametrize("extragradient", [False, True], ids=["online_ipo", "egpo"])
def test_reaches_the_equilibrium(extragradient):
  tx = optax.adam(optax.linear_schedule(0.03, 0.0, 400))
  update = ipo_md.make_ipo_md_step(tabular.table_apply, tx, ipo_md.IPOMDConfig())
  policy, metrics = tabular.play(update, tx, count=2, tau=TAU, extragradient=extragradient)
  assert tabular.divergence(policy, tabular.equilibrium(TAU)) < 0.01
  exact = tabular.divergence(policy, tabular.sequence_logprobs(tabular.REF["policy"]))
  np.testing.assert_allclose(float(metrics["kl/ref"]), exact, atol=0.1)


@pytest.mark.parametrize("mix", [0.0, 0.4])
def test_metrics_of_a_mixture_are_exact(mix):
  """The mixture is what the responses are samples of."""
  policy, ref = tabular.policy_params(jax.random.key(3)), tabular.REF["policy"]
  tables = [jax.tree.map(jax.nn.log_softmax, x) for x in (policy, ref)]
  mixture = jax.tree.map(lambda p, r: (1 - mix) * p + mix * r, *tables)
  key = jax.random.key(0)
  batch = tabular.judged(mixture, mixture, key, count=2, tau=TAU, rows=20000)
  read, config = reading.make_read(tabular.table_apply), ipo_md.IPOMDConfig()
  _, metrics = ipo_md.loss_fn(policy, batch, key, read=read, config=config)
  of_mixture, of_ref = map(tabular.sequence_logprobs, (mixture, ref))
  np.testing.assert_allclose(metrics["kl/ref"], tabular.divergence(of_mixture, of_ref), atol=0.02)
  entropy = -np.sum(np.exp(of_mixture) * of_mixture) / tabular.T
  np.testing.assert_allclose(metrics["entropy"], entropy, atol=0.01)


@pytest.mark.parametrize("normalize", [False, True])
def test_loss_is_that_of_loops(normalize):
  batch, params = opponent_batch(0, 6, 2, tau=0.2), toy.params_of()
  read = reading.make_read(toy.language, 0.7)
  config = ipo_md.IPOMDConfig(normalize_lengths=normalize)
  loss = functools.partial(ipo_md.loss_fn, read=read, config=config)
  value, _ = jax.jit(loss)(params, batch, jax.random.key(0))
  want = []
  for b in range(6):
    ratios = []
    for k in range(2):
      row = jax.tree.map(lambda x, b=b, k=k: x[b, k][None], batch.rollout)
      mask = row.response_mask[0, toy.P :]
      terms = np.float64(read(params, row).logprobs)[0][mask] - batch.ref_logprobs[b, k][mask]
      ratios.append(terms.mean() if normalize else terms.sum())
    target = (batch.preference[b, 0] - batch.preference[b, 1]) / 0.2
    want.append((ratios[0] - ratios[1] - target) ** 2)
  np.testing.assert_allclose(value, np.mean(want), rtol=1e-4)


def test_normalised_lengths_make_tau_a_penalty_per_token():
  params = tabular.policy_params(jax.random.key(3))
  losses = {}
  for normalize, tau in ((False, 0.2), (True, 0.4)):
    batch = tabular.judged(params, params, jax.random.key(0), count=2, tau=tau, rows=64)
    config = ipo_md.IPOMDConfig(normalize_lengths=normalize)
    read = reading.make_read(tabular.table_apply)
    losses[normalize], _ = ipo_md.loss_fn(
      params, batch, jax.random.key(0), read=read, config=config
    )
  # Both sequences have T = 2 tokens: (h / 2 - d / (2 tau))^2 is a quarter of (h - d / tau)^2.
  np.testing.assert_allclose(losses[False], tabular.T**2 * losses[True], rtol=1e-5)


@pytest.mark.parametrize("settings", [{"tau": 0.0}, {"tau_end": 0.0}], ids=str)
def test_a_tau_of_zero_is_refused(settings):
  with pytest.raises(ValueError, match="tau must be positive: the regression divides by it"):
    ipo_md.IPOMDConfig(**settings)
