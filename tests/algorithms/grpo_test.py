"""GRPO against the exact end of its training on a problem small enough to enumerate."""

import functools

import numpy as np
import pytest

from rlhf_jax.algorithms import grpo
from tests.algorithms import tabular
from tests.algorithms.case import sampled

# Means over tokens, while the loss is a mean over responses.


def case(**settings):
  config = grpo.GRPOConfig(epochs=2, minibatches=2, **settings)
  return sampled(
    grpo.make_grpo_step,
    config,
    lambda rollout, scores, values, ref, samples: grpo.make_batch(
      rollout, scores, ref, config, samples_per_prompt=samples
    )[0],
    lambda read: functools.partial(grpo.loss_fn, read=read, config=config),
  )


CASES = {
  "": case(),
  "dr_grpo": case(scale=False, average="length"),
  "dapo": case(kl_coef=0.0, clip_high=0.28, average="tokens"),
}


@pytest.mark.parametrize("average", ["responses", "tokens", "length"])
def test_reaches_the_exact_end_of_published_grpo(average):
  beta, samples = 0.5, 8
  config = grpo.GRPOConfig(kl_coef=beta, epochs=2, minibatches=4, scale=False, average=average)
  # The mean of a group includes the response itself, which takes an eighth of its advantage.
  optimum = tabular.pulled_optimum(beta * samples / (samples - 1))
  assert tabular.divergence(tabular.sequence_logprobs(tabular.REF["policy"]), optimum) > 0.1
  assert tabular.divergence(tabular.optimum(beta), optimum) > 0.01
  policy = tabular.improve_groups(grpo.make_grpo_step, grpo.make_batch, config, samples)
  assert tabular.divergence(policy, optimum) < 0.003


def test_standardised_rewards_have_a_penalty_in_deviations_of_the_reward():
  beta, samples = 0.5, 512
  coef = beta
  for _ in range(50):  # The deviation of the reward is that under the policy itself.
    p = np.exp(tabular.pulled_optimum(coef))
    deviation = np.sqrt(p @ tabular.REWARD**2 - (p @ tabular.REWARD) ** 2)
    coef = beta * deviation
  config = grpo.GRPOConfig(kl_coef=beta, epochs=2, minibatches=4)
  policy = tabular.improve_groups(grpo.make_grpo_step, grpo.make_batch, config, samples)
  assert tabular.divergence(policy, tabular.pulled_optimum(coef)) < 0.003
  assert tabular.divergence(policy, tabular.pulled_optimum(beta)) > 0.01
