"""Sampled and scored responses on their way to a method."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.lab import judges, responses
from experiments.lab.responses import Responses, RolloutOptions
from rlhf_jax import data, flags, rewards
from rlhf_jax.algorithms import grpo, ppo, reading
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig, ended
from rlhf_jax.losses.reward import RunningMoments
from rlhf_jax.rewards.shaped import ShapingConfig
from rlhf_jax.train_step import init_state
from tests.algorithms import reading_test, tabular, toy

CONFIG = ppo.PPOConfig(minibatches=1)


def settings(shaping=None, **rollout):
  shaping = shaping or ShapingConfig(missing_eos_penalty=0.0)
  return types.SimpleNamespace(shaping=shaping, rollout=RolloutOptions(**rollout))


def ppo_experience(read, read_ref, config=CONFIG, options=None):
  return responses.make_experience(
    options or settings(),
    read,
    read_ref,
    lambda ready: ppo.make_batch(
      ready.rollout,
      ready.scores,
      ready.policy.values,
      ready.ref_logprobs,
      config,
      token_rewards=ready.token_rewards,
    ),
  )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trainer_agrees_with_the_sampler(temperature):
  policy, apply, params = reading_test.transformer()
  rollout = reading_test.sampled(temperature)
  scored = Responses(rollout, np.float32(np.arange(16) % 5), ended(rollout, (1, 2)))

  def experience_at(temperature):
    read = reading.make_actor_critic_read(apply, temperature)
    experience = ppo_experience(read, reading.make_read(policy.apply, temperature))
    return experience(params, params["policy"], RunningMoments.zero(), scored)

  def update_at(temperature):
    tx = optax.sgd(1e-3)
    step = ppo.make_ppo_step(apply, tx, CONFIG, temperature=temperature)
    return step(init_state(jax.tree.map(jnp.copy, params), tx), batch, jax.random.key(0))[1]

  batch, _, metrics = experience_at(temperature)
  # The KL to an identical reference is 0, whatever the temperature.
  np.testing.assert_allclose(metrics["kl/ref"], 0.0, atol=1e-5)
  metrics = update_at(temperature)
  assert metrics["ratio/first_deviation"] < 1e-5
  assert metrics["clip_fraction"] == 0
  np.testing.assert_allclose(metrics["ratio/mean"], 1.0, atol=1e-5)
  np.testing.assert_allclose(metrics["kl/old"], 0.0, atol=1e-6)
  assert metrics["skipped_steps"] == 0
  assert metrics["weight"] == np.sum(rollout.response_mask)
  if temperature == 1.0:  # At another temperature all of this would show.
    assert abs(experience_at(1.3)[2]["kl/ref"]) > 0.01
    assert update_at(1.3)["ratio/first_deviation"] > 0.01


def test_an_iteration_reaches_the_exact_optimum_and_reports_its_kl():
  beta, rows, steps = 0.5, 512, 150
  config = ppo.PPOConfig(kl_coef=beta, epochs=2, minibatches=4)
  tx = optax.adam(optax.linear_schedule(0.03, 0.0, steps * config.updates))
  step = ppo.make_ppo_step(tabular.tabular_apply, tx, config)
  experience = ppo_experience(
    reading.make_actor_critic_read(tabular.tabular_apply),
    reading.make_read(tabular.table_apply),
    config,
    settings(importance_cap=2.0),
  )

  def make_batch(moments, params, rollout, scores, ref_logprobs):
    del ref_logprobs  # The experience reads the reference itself.
    scored = Responses(rollout, scores, jnp.ones(rows, bool))
    batch, moments, metrics = experience(params, tabular.REF["policy"], moments[0], scored)
    return batch, (moments, metrics["kl/ref"])

  policy, (moments, kl) = tabular.improve(
    step,
    make_batch,
    tabular.REF,
    tx,
    (RunningMoments.zero(), jnp.float32(0)),
    policy_of=lambda params: params["policy"],
    steps=steps,
    rows=rows,
  )
  assert tabular.divergence(policy, tabular.optimum(beta)) < 0.01
  exact = tabular.divergence(policy, tabular.sequence_logprobs(tabular.REF["policy"]))
  np.testing.assert_allclose(float(kl), exact, atol=0.15)
  assert moments.count == steps * rows


@functools.cache
def scored_responses(rows=16):
  """Responses of the toy, scored, and log-probabilities of another policy as its reference."""
  params = toy.actor_critic_params()
  rollout = toy.rollout_of(params["policy"], rows, noise=0)
  rng = np.random.default_rng(2)
  scores = rng.normal(size=rows).astype(np.float32)
  return params, Responses(rollout, scores, rng.random(rows) < 0.6)


READS = (reading.make_actor_critic_read(toy.actor_critic), reading.make_read(toy.language))


@pytest.mark.parametrize("bad", [0.3, np.nan, np.inf])
def test_metrics_are_those_of_loops(bad):
  params, scored = scored_responses()
  scored = scored._replace(scores=np.where(np.arange(16) == 5, np.float32(bad), scored.scores))
  reference = toy.near(params["policy"], 0.8)
  _, _, metrics = ppo_experience(*READS)(params, reference, RunningMoments.zero(), scored)
  rollout = scored.rollout
  ref = READS[1](reference, rollout).logprobs
  mask = rollout.response_mask[:, toy.P :]
  fine = np.isfinite(scored.scores)
  log_ratios = np.where(mask, rollout.logprobs - ref, 0).sum(axis=1)
  want = {
    "reward/mean": scored.scores[fine].mean(),
    "reward/std": scored.scores[fine].std(),
    "reward/nonfinite": (~fine).sum(),
    "kl/ref": log_ratios[fine].mean(),
    "response_length/mean": mask.sum(axis=1).mean(),
    "eos_fraction": scored.ended.mean(),
  }
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_row_without_log_probabilities_weighs_nothing(bad):
  _, scored = scored_responses()
  rollout, row = scored.rollout, np.arange(16) == 5
  logprobs = np.where(row[:, None], np.float32(bad), rollout.logprobs)
  corrected, weights, metrics = responses.correct(rollout, logprobs, cap=2.0)
  mask = rollout.response_mask[:, toy.P :]
  finite, _ = reading.finite_rows(corrected, scored.scores)
  np.testing.assert_array_equal(finite, ~row)
  assert np.isfinite(weights).all() and np.isfinite(metrics["importance/mean"])
  np.testing.assert_array_equal(weights[~row][mask[~row]], 1.0)


def test_a_method_gets_shaped_scores_and_the_metrics_raw_ones():
  params, scored = scored_responses()
  config = ppo.PPOConfig(kl_coef=0.0, lam=1.0)
  shaping = ShapingConfig(normalize=True, clip=0.8, missing_eos_penalty=0.5)
  experience = ppo_experience(*READS, config, settings(shaping))
  moments, history = RunningMoments.zero(), []
  for i in range(2):
    scores = scored.scores * 30 + 10 * i
    history.append(scores)
    batch, moments, metrics = experience(
      params, params["policy"], moments, scored._replace(scores=scores)
    )
    everything = np.concatenate(history)
    normal = (scores - everything.mean()) / everything.std()
    want = np.clip(normal, -0.8, 0.8) - 0.5 * ~scored.ended
    np.testing.assert_allclose(batch.returns[:, 0], want, atol=1e-5)
    np.testing.assert_allclose(metrics["reward/mean"], scores.mean(), rtol=1e-4)
  assert moments.count == 32


def test_scores_of_the_reference_reach_the_shaping():
  params, scored = scored_responses()
  config = ppo.PPOConfig(kl_coef=0.0, lam=1.0)
  shaping = ShapingConfig(function="center", missing_eos_penalty=0.0)
  experience = ppo_experience(*READS, config, settings(shaping))
  ref_scores = np.random.default_rng(3).normal(size=(16, 2)).astype(np.float32)
  batch, _, _ = experience(
    params, params["policy"], RunningMoments.zero(), scored._replace(ref_scores=ref_scores)
  )
  want = scored.scores - ref_scores.mean(axis=1)
  np.testing.assert_allclose(batch.returns[:, 0], want, atol=1e-5)


@pytest.mark.parametrize("bad", [0.0, np.nan, 1e30])
def test_correction_takes_the_trainer_and_weighs_by_truncated_ratios(bad):
  _, scored = scored_responses()
  rollout, rng = scored.rollout, np.random.default_rng(0)
  mask = rollout.response_mask[:, toy.P :]
  trainer = rollout.logprobs + rng.normal(size=mask.shape).astype(np.float32)
  poisoned = rollout._replace(logprobs=np.where(mask, rollout.logprobs, np.float32(bad)))
  corrected, weights, metrics = responses.correct(
    poisoned, np.where(mask, trainer, np.float32(bad)), 1.5
  )
  ratio = np.minimum(np.exp(trainer - rollout.logprobs), 1.5)
  assert (ratio[mask] == 1.5).any() and (ratio[mask] < 1.5).any()
  np.testing.assert_allclose(np.where(mask, weights, 0), np.where(mask, ratio, 0), rtol=1e-5)
  np.testing.assert_array_equal(corrected.logprobs, np.where(mask, trainer, 0))
  np.testing.assert_allclose(metrics["importance/mean"], ratio[mask].mean(), rtol=1e-5)
  # Without a cap nothing changes.
  same, ones, metrics = responses.correct(rollout, trainer, 0.0)
  assert same is rollout and (ones == 1).all() and metrics == {}


def test_rewards_of_tokens_enter_where_they_are_earned():
  """With a critic a token earns what follows it; without one a response earns the sum."""
  params, scored = scored_responses()
  rng = np.random.default_rng(3)
  tokens = rng.normal(size=scored.rollout.logprobs.shape).astype(np.float32)
  parts = scored._replace(token_rewards=tokens)
  mask = scored.rollout.response_mask[:, toy.P :]
  config = dataclasses.replace(CONFIG, kl_coef=0.0, lam=1.0, gamma=1.0)
  inputs = params, params["policy"], RunningMoments.zero()
  experience = ppo_experience(*READS, config=config)
  plain, given = experience(*inputs, scored)[0], experience(*inputs, parts)[0]
  earned = np.where(mask, tokens, 0.0)
  to_go = np.flip(np.cumsum(np.flip(earned, 1), axis=1), 1)
  np.testing.assert_allclose(
    np.where(mask, given.returns - plain.returns, 0), np.where(mask, to_go, 0), atol=1e-5
  )
  whole = rewards.total(rewards.Parts(scored.scores, earned))
  np.testing.assert_allclose(whole, scored.scores + earned.sum(axis=1), rtol=1e-6)


@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_weights_multiply_the_loss_of_each_token(cap):
  params, scored = scored_responses()
  params = params["policy"]
  noise = np.random.default_rng(0).normal(size=scored.rollout.logprobs.shape)
  mask = scored.rollout.response_mask[:, toy.P :]
  sampler = np.where(mask, scored.rollout.logprobs + 0.5 * noise, 0).astype(np.float32)
  scored = scored._replace(rollout=scored.rollout._replace(logprobs=sampler))
  config = grpo.GRPOConfig(kl_coef=0.0, clip_high=10.0, clip_low=1.0, average="tokens")
  experience = responses.make_experience(
    settings(importance_cap=cap),
    READS[1],
    READS[1],
    lambda ready: grpo.make_batch(
      ready.rollout, ready.totals, ready.ref_logprobs, config, samples_per_prompt=4
    ),
  )
  batch, _, metrics = experience(params, params, RunningMoments.zero(), scored)
  trainer = np.asarray(READS[1](params, scored.rollout).logprobs)
  ratio = np.exp(trainer - sampler)
  groups = scored.scores.reshape(4, 4)
  deviation = groups.std(axis=1, ddof=1, keepdims=True) + 1e-4
  advantages = ((groups - groups.mean(axis=1, keepdims=True)) / deviation).reshape(-1, 1)
  # The gradient of the loss at these params is that of its tokens, times min(ratio, cap). Without
  # a cap the sampler is taken for the policy, so that the ratio itself is in the loss.
  weight = np.minimum(ratio, cap) if cap else ratio
  want = -(np.where(mask, weight * advantages, 0)).sum() / mask.sum()
  loss = functools.partial(grpo.loss_fn, read=READS[1], config=config)
  value, _ = loss(params, batch, jax.random.key(0))
  np.testing.assert_allclose(value, want, rtol=1e-4)
  assert ("importance/mean" in metrics) == bool(cap)


def script(**changes):
  fields = {
    "steps": 10,
    "epochs": 0.0,
    "batch_size": 6,
    "data": DataConfig(),
    "sampling": SamplingConfig(samples_per_prompt=2),
    "rollout": RolloutOptions(),
    "shaping": ShapingConfig(),
    **changes,
  }
  return types.SimpleNamespace(**fields)


@pytest.mark.parametrize(
  ("changes", "options", "message"),
  [
    ({"sampling": SamplingConfig(temperature=0.0)}, {}, "sampling.temperature must be positive"),
    ({"sampling": SamplingConfig(top_k=3)}, {}, "sampling.top_k and top_p must be off"),
    ({"sampling": SamplingConfig(top_p=0.9)}, {}, "sampling.top_k and top_p must be off"),
    ({}, {"group": 3}, "sampling.samples_per_prompt must be at least 3"),
    ({}, {"parts": 8}, "batch_size 6 .* does not split into 8"),
    ({"data": DataConfig(packed_length=64)}, {}, "data.packed_length packs rows of data"),
    (
      {"critic": types.SimpleNamespace(warmup=10)},
      {},
      "critic.warmup must be below steps, got 10",
    ),
    (
      {
        "rollout": RolloutOptions(devices=1, importance_cap=2.0),
        "shaping": ShapingConfig(function="par"),
      },
      {},
      "rollout.devices does not go with shaping.function=par",
    ),
    (
      {
        "preference": judges.PreferenceOptions(name="panel"),
        "shaping": ShapingConfig(function="par"),
      },
      {},
      "shaping.function must be empty: a preference gives no scores",
    ),
    (
      {
        "reward": judges.RewardOptions(path="a,b", ensemble="worst_group"),
        "shaping": ShapingConfig(function="par"),
      },
      {},
      "shaping.function=par does not go with reward.ensemble=worst_group",
    ),
  ],
)
def test_settings_that_a_method_cannot_sample_with_are_refused(changes, options, message):
  responses.check(script(shaping=ShapingConfig(function="par")), parts=4, group=2)
  with pytest.raises(ValueError, match=message):
    responses.check(script(**changes), **options)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"devices": -1}, "devices must not be negative"),
    ({"importance_cap": -1.0}, "importance_cap must not be negative"),
    ({"packed_length": -1}, "packed_length must not be negative"),
    ({"devices": 2}, "set rollout.importance_cap"),
  ],
)
def test_impossible_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    RolloutOptions(**options)


@pytest.mark.parametrize("given", [{"function": "par"}, {"normalize": True}, {"clip": 1.0}, {}])
def test_shaping_is_of_scores(given):
  shaping, tokens = ShapingConfig(**given), np.ones((2, 3))
  both = rewards.weighted(
    {"a": rewards.Parts(np.zeros(2)), "b": rewards.Parts(np.zeros(2), tokens)}, [1, 1]
  )
  for reward in (
    rewards.Parts(np.zeros(2)),
    rewards.Parts(np.array([0, 1.0]), tokens),
    both,
  ):
    responses.require_scores(shaping, reward)
  segments = rewards.Parts(np.array([0, np.nan]), tokens)
  if not given:
    return responses.require_scores(shaping, segments)
  with pytest.raises(flags.UsageError, match=f"--shaping.{next(iter(given))} changes .* leave it"):
    responses.require_scores(shaping, segments)


def test_a_violation_is_worth_no_more_than_any_score():
  scores, tokens = np.ones(2), np.ones((2, 3))
  responses.require_scores(ShapingConfig(), rewards.Parts(scores), constrained=True)
  with pytest.raises(flags.UsageError, match="takes scores of whole responses"):
    responses.require_scores(ShapingConfig(), rewards.Parts(scores, tokens), constrained=True)


def test_sampling_must_leave_a_device_to_learn_with():
  responses.require_devices(RolloutOptions(devices=7, importance_cap=2.0))
  with pytest.raises(flags.UsageError, match="--rollout.devices=8 leaves none of the 8 devices"):
    responses.require_devices(RolloutOptions(devices=8, importance_cap=2.0))


@pytest.mark.parametrize(("length", "fits"), [(0, True), (39, False), (40, True)])
def test_packed_rows_must_hold_the_longest_sequence(length, fits):
  config = script(
    sampling=SamplingConfig(max_new_tokens=30), rollout=RolloutOptions(packed_length=length)
  )
  bench = types.SimpleNamespace(config=config, train_set=types.SimpleNamespace(padded_length=10))
  if fits:
    responses.require_fit(bench)
    return
  with pytest.raises(flags.UsageError, match="packed_length=39 is too short .* up to 40 tokens"):
    responses.require_fit(bench)


def test_tokens_that_end_a_sentence():
  tokenizer = data.word_level_tokenizer(("good", "bad", ".", "!", "3.5", "e.g"))
  rollout = toy.rollout_of(toy.params_of())
  ends = responses.sentence_ends(types.SimpleNamespace(tokenizer=tokenizer))(
    rollout._replace(tokens=rollout.tokens % 10)
  )
  words = [tokenizer.decode([i]) for i in range(10)]
  want = np.isin(np.array(words)[rollout.tokens % 10], (".", "!"))[:, -toy.R :]
  np.testing.assert_array_equal(ends, want)
  assert want.any()
