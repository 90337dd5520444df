"""CGPO against the exact end of its training on a problem small enough to enumerate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import cgpo, reinforce
from tests.algorithms import tabular
from tests.algorithms.case import sampled


def case(**settings):
  config = cgpo.CGPOConfig(**settings)
  return sampled(
    cgpo.make_cgpo_step,
    config,
    lambda rollout, scores, values, ref, samples: cgpo.make_batch(
      rollout,
      jnp.abs(scores),  # Not negative, and not finite where a score is not.
      rollout.tokens[:, -1] % 3 > 0,
      ref,
      config,
      samples_per_prompt=samples,
    )[0],
    lambda read: functools.partial(reinforce.loss_fn, read=read),
  )


CASES = {"": case(kl_max=2.0)}
KL_MAX = 2.0
# The best of the nine sequences, and two more, violate a constraint.
SATISFIED = np.isin(np.arange(tabular.V**tabular.T), [np.argmax(tabular.REWARD), 1, 5], invert=True)


def exact_end(satisfied):
  """[9] log-probabilities at which every sequence earns the same, and violations are gone.

  A sequence of reward R has the reward (1 - log ratio / kl_max) R, which is some c for all of them.
  """
  rewards = np.float64(jax.nn.sigmoid(tabular.REWARD))
  log_ref = np.float64(tabular.sequence_logprobs(tabular.REF["policy"]))

  def policy(c):
    return np.where(satisfied, log_ref + KL_MAX * (1 - c / rewards), -np.inf)

  low, high = 0.0, 1.0
  for _ in range(100):  # The sum falls with c.
    c = (low + high) / 2
    low, high = (c, high) if np.exp(policy(c)).sum() > 1 else (low, c)
  return policy(c)


@pytest.mark.parametrize("constrained", [True, False], ids=["constrained", "free"])
def test_reaches_the_exact_end_of_its_training(constrained):
  satisfied = SATISFIED if constrained else np.ones_like(SATISFIED)

  def make_batch(rollout, scores, ref_logprobs, config, *, samples_per_prompt):
    verdicts = jnp.asarray(satisfied)[tabular.sequence_of(rollout)] if constrained else None
    rewards = jax.nn.sigmoid(scores)
    return cgpo.make_batch(
      rollout, rewards, verdicts, ref_logprobs, config, samples_per_prompt=samples_per_prompt
    )

  config = cgpo.CGPOConfig(kl_max=KL_MAX, minibatches=4)
  policy = tabular.improve_groups(cgpo.make_cgpo_step, make_batch, config, 8)
  end = exact_end(satisfied)
  close = float(np.sum(np.exp(end[satisfied]) * (end - np.float64(policy))[satisfied]))
  violations = float(np.exp(np.float64(policy))[~SATISFIED].sum())
  before = float(
    np.exp(np.float64(tabular.sequence_logprobs(tabular.REF["policy"])))[~SATISFIED].sum()
  )
  assert close < 0.01
  assert violations < 0.02 if constrained else violations > before


def test_a_budget_of_nothing_is_refused():
  with pytest.raises(ValueError, match="^kl_max must be positive"):
    cgpo.CGPOConfig(kl_max=0.0)
