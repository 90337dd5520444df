"""Critics as models and as heads."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lab import critics, judges, models
from rlhf_jax import writers
from rlhf_jax.losses.logprobs import over_tokens


@pytest.mark.parametrize("share_trunk", [False, True])
def test_a_new_critic_has_no_opinion(share_trunk, open_bench):
  flags = ("--reward.name=gold", f"--critic.share_trunk={str(share_trunk).lower()}")
  bench = open_bench("ppo", "prompts", *flags)
  actor = critics.open_actor(bench)
  tokens = jnp.arange(12).reshape(2, 6)
  logits, values = actor.apply(actor.params, tokens)
  found, expected = (
    over_tokens(jnp.asarray, x) for x in (logits, bench.model.apply(bench.start, tokens))
  )
  np.testing.assert_allclose(found, expected, atol=1e-6)
  np.testing.assert_array_equal(values, np.zeros((2, 6)))
  assert (actor.params["value"].keys() == {"score"}) == share_trunk  # Kernel and bias.


def test_a_critic_starts_as_the_reward_model(open_bench, sft_run, reward_run):
  flags = (f"--init_from={sft_run}", f"--reward.path={reward_run}")
  bench = open_bench("ppo", "prompts", *flags)
  actor = critics.open_actor(bench)
  config = bench.config.model
  _, expected, *_ = models.open_reward_model(bench.run, str(reward_run), config, bench.tokenizer)
  jax.tree.map(np.testing.assert_array_equal, actor.params["value"], expected)
  assert np.any(np.asarray(expected["score"]["kernel"]) != 0)


def test_a_critic_of_normalised_returns_starts_without_the_scores_of_the_reward_model(
  open_bench, sft_run, reward_run
):
  flags = (f"--init_from={sft_run}", f"--reward.path={reward_run}")
  bench = open_bench("ppo_max", "prompts", *flags, "--critic.warmup=0")
  actor = critics.open_actor(bench, normalized=True)
  config = bench.config.model
  _, expected, *_ = models.open_reward_model(bench.run, str(reward_run), config, bench.tokenizer)
  jax.tree.map(np.testing.assert_array_equal, actor.params["value"]["layers"], expected["layers"])
  _, values = actor.apply(actor.params, jnp.arange(12).reshape(2, 6))
  np.testing.assert_array_equal(values, np.zeros((2, 6)))


def test_folders_that_get_adapters():
  reward = judges.RewardOptions(path="a,b")
  assert critics.CriticOptions().adapted(reward) == ("a",)
  assert critics.CriticOptions(share_trunk=True).adapted(reward) == ()


@pytest.mark.parametrize(("warmup", "first"), [(0, 0.1), (2, 0.3), (3, 0.3), (9, None)])
def test_the_critic_is_measured_when_the_policy_is_first_updated(tmp_path, warmup, first):
  writer = writers.make_writer(tmp_path)
  for step, value in ((1, 0.1), (2, 0.2), (4, 0.3), (5, 0.4)):
    writer.write(step, {"value/explained_variance": value})
  writer.write(6, {"loss": 1.0})
  writer.close()
  config = types.SimpleNamespace(critic=critics.CriticOptions(warmup=warmup))
  bench = types.SimpleNamespace(run=types.SimpleNamespace(workdir=tmp_path), config=config)
  expected = {} if first is None else {"value/explained_variance/first": first}
  assert critics.first_explained(bench) == expected
