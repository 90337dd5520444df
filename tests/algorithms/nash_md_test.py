"""Nash-MD against the exact equilibrium of a game small enough to enumerate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import nash_md, reading
from tests.algorithms import tabular, toy
from tests.algorithms.case import ROWS, Case
from tests.algorithms.opponents_test import opponent_batch

TAU = 0.15
CASES = {
  "": Case(nash_md.make_nash_md_step, nash_md.NashMDConfig(), lambda i: opponent_batch(i, ROWS, 1))
}


@pytest.mark.parametrize("settings", [{}, {"ema": 0.8}, {"extragradient": True}], ids=str)
def test_reaches_the_equilibrium(settings):
  equilibrium = tabular.equilibrium(TAU)
  log_ref = tabular.sequence_logprobs(tabular.REF["policy"])
  assert tabular.divergence(log_ref, equilibrium) > 0.1, (
    "the problem must not start at its solution"
  )
  tx = optax.adam(optax.linear_schedule(0.03, 0.0, 400))
  update = nash_md.make_nash_md_step(tabular.table_apply, tx, nash_md.NashMDConfig())
  policy, metrics = tabular.play(update, tx, count=1, tau=TAU, **settings)
  assert tabular.divergence(policy, equilibrium) < 0.01
  exact = tabular.divergence(policy, log_ref)
  np.testing.assert_allclose(float(metrics["kl/ref"]), exact, atol=0.1)


def test_tokens_are_credited_with_the_preference_less_the_log_ratios_from_them_on():
  batch, params = opponent_batch(0, 8, 1, tau=0.2), toy.params_of()
  read = reading.make_read(toy.language, 0.7)
  rollout = jax.tree.map(lambda x: x[:, 0], batch.rollout)
  mask = rollout.response_mask[:, toy.P :]

  def published(params):
    """Munos et al., 2023, section 7, without the terms whose expectation is 0."""
    logprobs = jnp.where(mask, read(params, rollout).logprobs, 0.0)
    log_ratio = jax.lax.stop_gradient(jnp.where(mask, logprobs - batch.ref_logprobs[:, 0], 0.0))
    later = jnp.cumsum(log_ratio[:, ::-1], axis=1)[:, ::-1]
    gain = batch.preference - 0.5 - 0.2 * later
    return -jnp.sum(gain * logprobs) / 8

  loss = functools.partial(nash_md.loss_fn, read=read)
  grads = jax.jit(jax.grad(lambda p: loss(p, batch, jax.random.key(0))[0]))(params)
  want = jax.jit(jax.grad(published))(params)
  scale = max(np.abs(x).max() for x in jax.tree.leaves(want))
  assert scale > 0.1
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5 * scale), grads, want)


@pytest.mark.parametrize("ema", [1.0, -0.1])
def test_bad_settings_are_refused(ema):
  with pytest.raises(ValueError, match="^ema must be in"):
    nash_md.NashMDConfig(ema=ema)
