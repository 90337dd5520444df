"""PF-PPO: what it selects, and where a selection learns what the best alone does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import pf_ppo, ppo, reading
from tests.algorithms import tabular, toy
from tests.algorithms.case import inputs_of
from tests.algorithms.tabular import tabular_apply

KEY = jax.random.key(5)
READ = reading.make_actor_critic_read(tabular_apply)
N = 4


def to_batch(keep, rollout, *inputs, **options):
  config = pf_ppo.PFPPOConfig(keep=keep)
  make = functools.partial(pf_ppo.make_batch, config=config, samples_per_prompt=N, key=KEY)
  return jax.jit(make)(rollout, *inputs, **options)[0]


@pytest.mark.parametrize("keep", pf_ppo.RULES)
def test_it_is_ppo_on_the_selected_responses(keep):
  rollout = toy.rollout_of(toy.params_of(), 16)
  scores, values, other = inputs_of(rollout, np.random.default_rng(0))
  scores[4:8] = np.nan  # A group without any.
  scores[[9, 10, 11]] = np.inf  # A group with one.
  values[0, 0] = np.nan
  ref = rollout.logprobs + other
  dense = np.float32(np.random.default_rng(1).normal(size=ref.shape))
  weights = np.float32(np.random.default_rng(2).random(ref.shape))
  batch = to_batch(keep, rollout, scores, values, ref, token_rewards=dense, weights=weights)
  mask = rollout.response_mask[:, toy.P :]
  totals = scores + np.where(mask, dense, 0).sum(axis=1)
  finite = np.isfinite(totals) & (np.arange(16) > 0)
  config = pf_ppo.PFPPOConfig(keep=keep)
  picked, _ = pf_ppo.select(np.where(finite, totals, 0), finite, KEY, config, samples_per_prompt=N)
  chosen = []
  for group in range(4):
    rows = [b for b in range(4 * group, 4 * group + 4) if np.isfinite(scores[b]) and b > 0]
    rows.sort(key=lambda b: -totals[b])
    others = [b for b in rows[1:] if b - 4 * group in picked[group].tolist()]
    rest = {"best": [], "best_worst": rows[1:][-1:], "best_random": others}[keep]
    chosen.append((rows[:1] + rest, group))
  kept = [b for rows, _ in chosen for b in rows]
  assert kept[0] != 0 and len(kept) == (3 if keep == "best" else 5)
  take = lambda x: x[np.array(kept)]  # noqa: E731
  inputs = jax.tree.map(take, (rollout, scores, values, ref))
  want, _ = ppo.make_batch(*inputs, ppo.PPOConfig(), token_rewards=take(dense))
  want = want._replace(advantages=take(weights) * want.advantages)
  size = pf_ppo.RULES[keep]
  at = [size * group + i for rows, group in chosen for i in range(len(rows))]
  assert batch.mask.shape[0] == 4 * size
  order = lambda x: sorted(np.asarray(x).tolist())  # noqa: E731
  found = jax.tree.map(lambda x: np.asarray(x)[np.array(at)], batch)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(order(a), order(b), atol=1e-5)
  assert np.asarray(batch.mask).sum() == np.asarray(want.mask).sum()


@pytest.mark.parametrize(
  "rewards", [[1.0, 3.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]]
)
def test_the_other_response_is_a_random_one(rewards):
  """Also among equal rewards, as those of answers that are right or wrong."""
  config = pf_ppo.PFPPOConfig(keep="best_random")
  groups = 3000
  picked, kept = pf_ppo.select(
    np.tile(np.float32(rewards), groups),
    np.ones(4 * groups, bool),
    KEY,
    config,
    samples_per_prompt=4,
  )
  assert kept.all()
  best, other = np.asarray(picked).T
  assert set(np.asarray(rewards)[best]) == {max(rewards)}
  assert (best != other).all()
  for b in set(best.tolist()):
    counts = np.bincount(other[best == b], minlength=4) / np.sum(best == b)
    np.testing.assert_allclose(np.delete(counts, b), 1 / 3, atol=0.05)


def gold_of(keep, seed=0, steps=60, rows=256, samples=8):
  """Mean gold reward of a policy that learns from a reward model which errs about the middle."""
  config = pf_ppo.PFPPOConfig(keep=keep, kl_coef=0.1, minibatches=2)
  tx = optax.adam(0.03)

  def make_batch(key, params, rollout, scores, ref_logprobs):
    key, now, pick = jax.random.split(key, 3)
    noise = jax.random.normal(now, scores.shape) * jnp.where(jnp.abs(scores) > 0.6, 0.3, 1.6)
    values = READ(params, rollout).values
    inputs = rollout, scores + noise, values, ref_logprobs, config
    return pf_ppo.make_batch(*inputs, samples_per_prompt=samples, key=pick)[0], key

  step = ppo.make_ppo_step(tabular_apply, tx, config)
  policy, _ = tabular.improve(
    step,
    make_batch,
    tabular.REF,
    tx,
    jax.random.key(seed),
    policy_of=lambda params: params["policy"],
    steps=steps,
    rows=rows,
  )
  return float(np.sum(np.exp(policy) * tabular.REWARD))


def test_the_best_alone_loses_where_the_best_and_the_worst_win():
  start = float(np.sum(np.exp(tabular.sequence_logprobs(tabular.REF["policy"])) * tabular.REWARD))
  best, both = gold_of("best"), gold_of("best_worst")
  assert both > start + 0.5
  assert both > best + 0.3


def test_an_unknown_selection_is_refused():
  with pytest.raises(ValueError, match="^keep must be one of best_worst, best_random, best"):
    pf_ppo.PFPPOConfig(keep="all")
