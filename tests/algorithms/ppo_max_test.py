"""PPO-max: what it adds to PPO, against numpy and exact answers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import ppo, ppo_max, reading, sft, terms
from rlhf_jax.losses.reward import RunningMoments
from tests.algorithms import tabular, toy
from tests.algorithms.case import ROWS, sampled
from tests.algorithms.tabular import T, stopped_rollout, tabular_apply

READ = reading.make_actor_critic_read(tabular_apply, entropy=True)


def demonstration_loss(params, batch, key):
  apply = lambda params, tokens: toy.language(params["policy"], tokens)  # noqa: E731
  return sft.loss_fn(params, batch, key, apply_fn=apply)


def case(*, wrap=None, **settings):
  config = ppo_max.PPOMaxConfig(epochs=2, minibatches=2, segment=2, dual_clip=3.0, **settings)
  moments = RunningMoments(*map(jnp.float32, (100, 0.5, 200)))
  control = ppo_max.Control.init(config)._replace(returns=moments)
  return sampled(
    functools.partial(ppo_max.make_ppo_max_step, demonstration_loss=demonstration_loss),
    config,
    lambda *args, samples: ppo_max.make_batch(*args, control, config)[0],
    lambda read: functools.partial(ppo.loss_fn, read=read, config=config),
    critic=True,
    wrap=wrap,
  )


def with_demonstrations(batch, seed):
  return terms.WithSequences(batch, toy.token_batch(ROWS, seed=seed))


CASES = {
  "": case(normalize_values=True),
  "ptx": case(ptx_coef=0.5, wrap=with_demonstrations),
}


@pytest.mark.parametrize(
  "settings", [{"normalize_values": True, "dual_clip": 3.0}, {"segment": 2}], ids=str
)
def test_reaches_the_exact_optimum_of_the_regularised_objective(settings):
  beta, steps = 0.5, 150
  config = ppo_max.PPOMaxConfig(kl_coef=beta, epochs=2, minibatches=4, **settings)
  tx = optax.adam(optax.linear_schedule(0.03, 0.0, steps * config.updates))

  def make_batch(control, params, rollout, scores, ref_logprobs):
    values = READ(params, rollout).values
    return ppo_max.make_batch(rollout, scores, values, ref_logprobs, control, config)[:2]

  step = ppo_max.make_ppo_max_step(tabular_apply, tx, config)
  policy, control = tabular.improve(
    step,
    make_batch,
    tabular.REF,
    tx,
    ppo_max.Control.init(config),
    policy_of=lambda params: params["policy"],
    steps=steps,
  )
  assert tabular.divergence(policy, tabular.optimum(beta)) < 0.01
  assert control.kl_coef == np.float32(beta)
  assert control.returns.count == steps * 512 * T


to_batch = jax.jit(ppo_max.make_batch, static_argnames="config")


def arrays(rows, seed=5):
  """Scores [B], values [B, T] and log-probabilities under a reference [B, T]."""
  rng = np.random.default_rng(seed)
  return tuple(rng.normal(size=s).astype(np.float32) for s in (rows, (rows, T), (rows, T)))


def test_without_its_additions_it_is_ppo():
  _, rollout, _ = stopped_rollout(16)
  config = ppo_max.PPOMaxConfig(kl_coef=0.3)
  batch, control, metrics = to_batch(
    rollout, *arrays(16), ppo_max.Control.init(config), config=config
  )
  want, want_metrics = jax.jit(ppo.make_batch, static_argnames="config")(
    rollout, *arrays(16), ppo.PPOConfig(kl_coef=0.3)
  )
  assert metrics.pop("kl/coef") == control.kl_coef == np.float32(0.3)
  close = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(close, (batch, metrics), (want, want_metrics))


def test_critic_predicts_returns_in_running_deviations():
  _, rollout, _ = stopped_rollout(16)
  config = ppo_max.PPOMaxConfig(kl_coef=0.0, lam=1.0, normalize_values=True)
  control, seen = ppo_max.Control.init(config), []
  for i in range(3):
    scores, values, _ = arrays(16, seed=i)
    scores = 37 * scores - 12
    batch, control, metrics = to_batch(
      rollout, scores, values, rollout.logprobs, control, config=config
    )
    mask = np.asarray(batch.mask)
    # Without discount or penalty the return of each token is the score.
    returns = np.broadcast_to(scores[:, None], mask.shape)[mask]
    shift, scale = (np.mean(seen), np.std(seen)) if seen else (0.0, 1.0)
    seen.extend(returns)
    np.testing.assert_allclose(
      np.asarray(batch.returns)[mask],
      (returns - np.mean(seen)) / np.std(seen),
      rtol=1e-4,
      atol=1e-4,
    )
    np.testing.assert_array_equal(np.asarray(batch.values)[mask], values[mask])
    advantages = returns - (values[mask] * scale + shift)
    want = (advantages - advantages.mean()) / advantages.std()
    np.testing.assert_allclose(np.asarray(batch.advantages)[mask], want, atol=1e-4)
    explained = 1 - np.var(advantages) / np.var(returns)
    np.testing.assert_allclose(metrics["value/explained_variance"], explained, rtol=1e-3)
    assert not np.asarray(batch.returns)[~mask].any()
  np.testing.assert_allclose(control.returns.mean, np.mean(seen), rtol=1e-5)
  np.testing.assert_allclose(control.returns.m2 / len(seen), np.var(seen), rtol=1e-4)


def test_a_critic_that_fits_its_targets_reads_as_the_returns():
  """In the next iteration, also in the first ones, and when the scores drift."""
  _, rollout, _ = stopped_rollout(16)
  config = ppo_max.PPOMaxConfig(kl_coef=0.0, lam=1.0, normalize_values=True)
  one_step = dataclasses.replace(config, lam=0.0)
  control = ppo_max.Control.init(config)
  for i in range(3):
    scores, values, _ = arrays(16, seed=i)
    scores = np.float32(10 + 5 * i + 2 * scores)
    inputs = rollout, scores, values, rollout.logprobs
    batch, control, _ = to_batch(*inputs, control, config=config)
    fitted, after, metrics = to_batch(
      *inputs[:2], batch.returns, inputs[3], control, config=one_step
    )
    np.testing.assert_allclose(metrics["value/explained_variance"], 1, atol=1e-5)
    # One step back the return is the value of the next token, in the units after this batch.
    both = np.asarray(batch.mask[:, 1])
    unit = np.sqrt(after.returns.m2 / after.returns.count)
    read = np.asarray(fitted.returns)[both, 0] * unit + after.returns.mean
    np.testing.assert_allclose(read, scores[both], rtol=1e-4)


def test_tokens_of_a_macro_action_share_their_advantage():
  _, rollout, _ = stopped_rollout(16)
  inputs, same = arrays(16), {}
  for segment in (1, 2):
    config = ppo_max.PPOMaxConfig(segment=segment)
    batch, _, _ = to_batch(rollout, *inputs, ppo_max.Control.init(config), config=config)
    both = np.asarray(batch.mask[:, 1])
    same[segment] = np.asarray(batch.advantages[:, 0] == batch.advantages[:, 1])[both]
  assert same[2].all() and not same[1].any()


@pytest.mark.parametrize(
  "kl, factor", [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (60.0, 1.02), (0.0, 0.98), (-3.0, 0.98)]
)
def test_adaptive_kl_coefficient(kl, factor):
  config = ppo_max.PPOMaxConfig(kl_target=6.0, kl_horizon=1000)
  result = ppo_max.adapt_kl_coef(jnp.float32(0.2), jnp.float32(kl), 100, config)
  np.testing.assert_allclose(result, 0.2 * factor, rtol=1e-5)
  fixed = ppo_max.adapt_kl_coef(jnp.float32(0.2), jnp.float32(kl), 100, ppo_max.PPOMaxConfig())
  assert fixed == np.float32(0.2)


@pytest.mark.parametrize("kl, factor", [(0.0, 0.8), (6.6, 1.1), (60.0, 1.2)])
@pytest.mark.parametrize("responses", [64, 512, 100_000])
def test_a_large_batch_moves_the_coefficient_by_at_most_a_fifth(kl, factor, responses):
  """More would make the penalty a reward."""
  config = ppo_max.PPOMaxConfig(kl_target=6.0, kl_horizon=64)
  result = ppo_max.adapt_kl_coef(jnp.float32(0.2), jnp.float32(kl), responses, config)
  np.testing.assert_allclose(result, 0.2 * factor, rtol=1e-5)


@pytest.mark.parametrize("start", [0.01, 5.0])
def test_adaptive_kl_coefficient_settles_at_the_target(start):
  config = ppo_max.PPOMaxConfig(kl_coef=start, kl_target=6.0, kl_horizon=1000)

  def iteration(carry, _):
    coef, kl = carry
    # A policy that moves a tenth of the way to its optimum, which is nearer for a larger penalty.
    kl = kl + 0.1 * (3.0 / coef - kl)
    return (ppo_max.adapt_kl_coef(coef, kl, 128, config), kl), kl

  (coef, _), kls = jax.lax.scan(iteration, (jnp.float32(start), jnp.float32(0)), length=1000)
  np.testing.assert_allclose(kls[-50:], np.full(50, 6.0), rtol=0.05)
  np.testing.assert_allclose(coef, 0.5, rtol=0.05)


def test_penalty_is_that_of_the_control_which_follows_the_kl_of_whole_responses():
  _, rollout, _ = stopped_rollout(16)
  scores, values, ref = arrays(16)
  scores[3] = np.nan
  config = ppo_max.PPOMaxConfig(kl_coef=0.1, kl_target=0.5, kl_horizon=100)
  control = ppo_max.Control.init(config)._replace(kl_coef=jnp.float32(0.7))
  batch, control, metrics = to_batch(rollout, scores, values, ref, control, config=config)
  want, _ = ppo.make_batch(rollout, scores, values, ref, ppo.PPOConfig(kl_coef=0.7))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), batch, want)
  assert metrics["kl/coef"] == np.float32(0.7)
  mask = np.asarray(batch.mask)
  kl = np.where(mask, np.asarray(rollout.logprobs) - ref, 0).sum() / 15
  factor = 1 + np.clip(kl / 0.5 - 1, -0.2, 0.2) * 16 / 100
  np.testing.assert_allclose(control.kl_coef, 0.7 * factor, rtol=1e-5)


def test_a_batch_without_any_finite_score_leaves_the_control_finite():
  _, rollout, _ = stopped_rollout(8)
  _, values, ref = arrays(8)
  config = ppo_max.PPOMaxConfig(kl_target=6.0, normalize_values=True)
  result = to_batch(
    rollout, np.full(8, np.nan), values, ref, ppo_max.Control.init(config), config=config
  )
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(result[:2]))
  assert result[1].returns.count == 0
  assert result[1].kl_coef == np.float32(config.kl_coef)
  assert np.isnan(result[2]["reward/shaped"])


@pytest.mark.parametrize("where", [0, 1, 2], ids=["score", "value", "reference"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_enters_neither_the_moments_nor_the_penalty(where, bad):
  _, rollout, _ = stopped_rollout(8)
  inputs = list(arrays(8))
  inputs[where] = inputs[where].copy()
  inputs[where][(3, *(0,) * (inputs[where].ndim - 1))] = bad
  config = ppo_max.PPOMaxConfig(kl_coef=0.1, kl_target=0.5, kl_horizon=100, normalize_values=True)
  start = ppo_max.Control.init(config)
  batch, control, _ = to_batch(rollout, *inputs, start, config=config)
  others = np.arange(8) != 3
  rows = jax.tree.map(lambda x: x[others], (rollout, *inputs))
  want, want_control, _ = to_batch(*rows, start, config=config)
  for got, expected in zip(batch[1:], want[1:], strict=True):
    np.testing.assert_allclose(got[others], expected, atol=1e-5)
    assert not np.any(got[3])
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5), control.returns, want_control.returns
  )
  mask = np.asarray(want.mask)
  kl = np.where(mask, np.float64(rows[0].logprobs) - rows[3], 0).sum() / 7
  factor = 1 + np.clip(kl / 0.5 - 1, -0.2, 0.2) * 8 / 100
  np.testing.assert_allclose(control.kl_coef, 0.1 * factor, rtol=1e-5)


def test_demonstrations_need_a_loss():
  config = ppo_max.PPOMaxConfig(ptx_coef=0.1)
  with pytest.raises(ValueError, match="ptx_coef needs a demonstration_loss"):
    ppo_max.make_ppo_max_step(tabular_apply, optax.sgd(1.0), config)


@pytest.mark.parametrize(
  "settings",
  [
    {"kl_target": -1.0},
    {"ptx_coef": -0.1},
    {"kl_horizon": 0},
    {"segment": 0},
    {"segment": 2, "cut": "sentence"},
    {"cut": "best"},
    {"gamma": 2.0},
  ],
  ids=str,
)
def test_impossible_settings_are_refused(settings):
  with pytest.raises(ValueError, match=f"^{next(iter(settings))} must"):
    ppo_max.PPOMaxConfig(**settings)
