"""Critics as models and as heads."""

import jax
import numpy as np

from experiments.lab import critics, models


def test_a_critic_starts_as_the_reward_model(open_bench, sft_run, reward_run):
  flags = (f"--init_from={sft_run}", f"--reward.path={reward_run},nowhere")
  bench = open_bench("ppo", "prompts", *flags)
  actor = critics.open_actor(bench)
  config = bench.config.model
  _, expected = models.open_reward_model(bench.run, str(reward_run), config, bench.tokenizer)
  jax.tree.map(np.testing.assert_array_equal, actor.params["value"], expected)
  assert np.any(np.asarray(expected["score"]["kernel"]) != 0)


def test_folders_that_get_adapters(open_bench):
  bench = open_bench("ppo", "prompts", "--reward.path=a,b")
  options, reward = bench.config.critic, bench.config.reward
  assert options.adapted(reward) == ("a",)
  assert critics.CriticOptions(share_trunk=True).adapted(reward) == ()
