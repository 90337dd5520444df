"""Rewards of tokens by a policy of DPO: where they lead, and what options open."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.lab import dense, models, responses
from rlhf_jax import flags, rewards
from rlhf_jax.algorithms import ppo, reading, rloo
from rlhf_jax.losses.reward import RunningMoments
from tests.algorithms import tabular, toy
from tests.experiments.lab.responses_test import settings

BETA, ROWS, STEPS = 0.5, 512, 150
DPO = tabular.policy_params(jax.random.key(5))
READ = reading.make_read(tabular.table_apply)


@pytest.mark.parametrize("method", ["ppo", "rloo"])
def test_with_its_own_penalty_it_ends_at_the_policy_of_dpo(method):
  """By scores of 0, with a critic and as their sum without one."""
  log_dpo, log_ref = map(tabular.sequence_logprobs, (DPO, tabular.REF["policy"]))
  assert tabular.divergence(log_ref, log_dpo) > 1
  if method == "ppo":
    config = ppo.PPOConfig(kl_coef=BETA, epochs=2, minibatches=4)
    make_step, apply, start = ppo.make_ppo_step, tabular.tabular_apply, tabular.REF
    policy_of, read = lambda params: params["policy"], reading.make_actor_critic_read(apply)

    def to_batch(ready):
      inputs = ready.rollout, ready.scores, ready.policy.values, ready.ref_logprobs, config
      return ppo.make_batch(*inputs, token_rewards=ready.token_rewards)

  else:
    config = rloo.RLOOConfig(kl_coef=BETA, minibatches=4)
    make_step, apply, start = rloo.make_rloo_step, tabular.table_apply, tabular.REF["policy"]
    policy_of, read = lambda params: params, READ

    def to_batch(ready):
      inputs = ready.rollout, ready.totals, ready.ref_logprobs, config
      return rloo.make_batch(*inputs, samples_per_prompt=8)

  tx = optax.adam(optax.linear_schedule(0.03, 0.0, STEPS * config.updates))
  experience = responses.make_experience(settings(), read, READ, to_batch)
  reward = rewards.dense_reward(READ, DPO, tabular.REF["policy"], scale=BETA, clip=np.inf)

  def make_batch(moments, params, rollout, scores, ref_logprobs):
    del scores, ref_logprobs  # The experience reads the reference itself.
    parts = rewards.parts_of(reward(rollout, np.zeros(ROWS, int)))
    scored = responses.Responses(rollout, parts.scores, jnp.ones(ROWS, bool), None, parts.tokens)
    batch, moments, _ = experience(params, tabular.REF["policy"], moments, scored)
    return batch, moments

  step, moments = make_step(apply, tx, config), RunningMoments.zero()
  policy, _ = tabular.improve(
    step, make_batch, start, tx, moments, policy_of=policy_of, steps=STEPS, rows=ROWS
  )
  assert tabular.divergence(policy, log_dpo) < 1e-3


def test_rewards_of_tokens_are_those_of_loops():
  params, other = toy.params_of(), toy.params_of(1)
  rollout = toy.rollout_of(params)
  read = reading.make_read(toy.language, 0.7)
  parts = rewards.dense_reward(read, other, params, scale=0.3, clip=0.2)(rollout, np.zeros(16))
  gain = 0.3 * (read(other, rollout).logprobs - read(params, rollout).logprobs)
  mask = rollout.response_mask[:, toy.P :]
  want = np.where(mask, np.clip(gain, -0.2, 0.2), 0)
  np.testing.assert_allclose(parts.tokens, want, atol=1e-6)
  assert 0 < (np.abs(want) == np.float32(0.2)).sum() < mask.sum()
  np.testing.assert_array_equal(parts.scores, np.zeros(16))


def test_options_add_them_to_the_reward_of_a_script(open_bench, sft_run, reward_run):
  flags_of_run = (f"--init_from={sft_run}", "--reward.name=gold", "--sampling.temperature=0.7")
  bench = open_bench("ppo", "prompts", *flags_of_run)
  assert dense.DenseOptions().added_to(bench.open_reward(), bench) is not None
  options = dense.DenseOptions(str(sft_run), scale=1.0, clip=0.0)
  moved = bench._replace(start=jax.tree.map(lambda x: 0.9 * x, bench.start))  # Of its reference.
  reward = options.added_to(bench.open_reward(), moved)(bench.train_set)
  sample = bench.sampler(temperature=1.0)
  prompts = next(bench.batches())
  rollout = sample(bench.reshard()(bench.start), *prompts, jax.random.key(0))
  parts = reward(rollout, np.asarray(prompts.prompt_id))
  read = reading.make_read(bench.model.apply, 0.7)
  ratio = read(bench.start, rollout).logprobs - read(moved.start, rollout).logprobs
  mask = rollout.response_mask[:, -ratio.shape[1] :]
  np.testing.assert_allclose(parts.tokens, np.where(mask, ratio, 0), atol=1e-4)
  (gold,) = bench.gold(bench.train_set).values()
  np.testing.assert_array_equal(parts.scores, gold(rollout, np.asarray(prompts.prompt_id)))
  with pytest.raises(models.hf.ModelFolderError, match="not a language model"):
    dense.DenseOptions(str(reward_run)).added_to(bench.open_reward(), bench)
  other = bench._replace(start={"embed": bench.start["embed"]})
  with pytest.raises(flags.UsageError, match="--dense.path=.* has another architecture"):
    options.added_to(bench.open_reward(), other)


def test_impossible_options_are_refused():
  for settings_of in ({"scale": 0}, {"clip": -1}):
    with pytest.raises(ValueError, match=f"^{next(iter(settings_of))} must"):
      dense.DenseOptions(**settings_of)
