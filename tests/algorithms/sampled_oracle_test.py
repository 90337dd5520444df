"""Methods that learn from sampled responses: loss and gradient with each term, against loops.

The loops start at the scores, so that advantages are held too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import (
  cgpo,
  cispo,
  grpo,
  gspo,
  ipo_md,
  nash_md,
  opponents,
  ppo,
  ppo_max,
  reinforce_pp,
  rloo,
  sft,
  terms,
)
from rlhf_jax.losses.reward import RunningMoments
from tests.algorithms import bigrams
from tests.algorithms.bigrams import POISON, RECORD, TEMPERATURE

PARAMS = bigrams.tables(0)
ROLLOUT = bigrams.rollout_of(PARAMS)
PAIRS = bigrams.responses(ROLLOUT)
SCORES = np.random.default_rng(1).normal(1.0, 2.0, bigrams.ROWS).astype(np.float32)
SCORES[2] = np.nan  # Counts nowhere.
REAL = [b for b in range(bigrams.ROWS) if np.isfinite(SCORES[b])]
VALUES = bigrams.beside(ROLLOUT, 3)
REF = np.where(ROLLOUT.response_mask[:, bigrams.P :], ROLLOUT.logprobs, POISON) + bigrams.beside(
  ROLLOUT, 4, 0.5
)
ONCE = {"epochs": 1, "minibatches": 1}
logprob = functools.partial(bigrams.logprob, temperature=TEMPERATURE)
entropy = functools.partial(bigrams.entropy, temperature=TEMPERATURE)


def old(b, t):
  return float(ROLLOUT.logprobs[b, t])


def log_ratio(b, t):
  """Log-ratio of the old policy to the reference at a token."""
  return old(b, t) - float(REF[b, t])


def per_token(values):
  """{(row, position): value} of lists of the real rows."""
  return {(b, t): x for b, row in values.items() for t, x in enumerate(row)}


def whitened(values):
  """Numbers of mean 0 and variance 1."""
  numbers = np.array(list(values.values()))
  return {at: (x - numbers.mean()) / numbers.std() for at, x in values.items()}


def token_rewards(b, kl_coef):
  """Rewards of the tokens of a row: the penalty, and the score at the last one."""
  rewards = [-kl_coef * log_ratio(b, t) for t in range(len(PAIRS[b]))]
  rewards[-1] += float(SCORES[b])
  return rewards


def generalised(rewards, values, gamma, lam):
  """Advantages of a sequence of rewards."""
  n = len(rewards)
  after = [*values[1:], 0.0]
  errors = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
  return [sum((gamma * lam) ** (s - t) * errors[s] for s in range(t, n)) for t in range(n)]


def clipped(ratio, low, high):
  """Ratio within its range; a distance of 0 is no bound."""
  return min(max(ratio, 1 - (low or np.inf)), 1 + (high or np.inf))


def surrogate(new, before, gain, low, high, dual=0.0):
  """Loss of a token: the worse of the plain and the clipped one."""
  ratio = np.exp(new - before)
  loss = -min(ratio * gain, clipped(ratio, low, high) * gain)
  return min(loss, -dual * gain) if dual and gain < 0 else loss


def check_metrics(metrics, low, high, **others):
  """Compares metrics of the ratio to the old policy with loops over tokens, and `others`."""
  tokens = [(b, t) for b in REAL for t in range(len(PAIRS[b]))]
  log_ratios = np.array([logprob(PARAMS, PAIRS[b][t]) - old(b, t) for b, t in tokens])
  ratios = np.exp(log_ratios)
  real = sum(map(len, PAIRS)) + ROLLOUT.prompt_mask.sum()
  want = {
    "clip_fraction": np.mean([x != clipped(x, low, high) for x in ratios]),
    "kl/old": np.mean(ratios - 1 - log_ratios),
    "ratio/mean": np.mean(ratios),
    "ratio/max": np.max(ratios),
    "ratio/first_deviation": np.max(np.abs(ratios - 1)),
    "padding": 1 - real / ROLLOUT.tokens.size,
  } | others
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


# PPO.


def ppo_targets(config, kl_coef, values, segment=1):
  """Advantages before whitening and returns, of tokens that share those of their macro action."""
  advantages, returns = {}, {}
  for b in REAL:
    n = len(PAIRS[b])
    cuts = [range(s, min(s + segment, n)) for s in range(0, n, segment)]
    rewards = token_rewards(b, kl_coef)
    macro_values = [np.mean([values[b][t] for t in cut]) for cut in cuts]
    macro = generalised(
      [sum(rewards[t] for t in cut) for cut in cuts], macro_values, config.gamma, config.lam
    )
    for cut, a, v in zip(cuts, macro, macro_values, strict=True):
      for t in cut:
        advantages[b, t], returns[b, t] = a, a + v
  return advantages, returns


def ppo_loss(config, advantages, old_values, returns):
  """Oracle of the loss of PPO."""

  def oracle(params, held):
    del held  # Advantages and returns are made before.
    total = 0.0
    for (b, t), gain in advantages.items():
      pair = PAIRS[b][t]
      total += surrogate(
        logprob(params, pair), old(b, t), gain, config.clip, config.clip, config.dual_clip
      )
      value, before, target = params["value"][pair[0]], old_values[b][t], returns[b, t]
      error = (value - target) ** 2
      if config.value_clip:
        near = before + min(max(value - before, -config.value_clip), config.value_clip)
        error = max(error, (near - target) ** 2)
      total += config.value_coef * error / 2 - config.entropy_coef * entropy(params, pair)
    return total / len(advantages)

  return oracle


PPO = {
  "plain": {},
  "penalty": {"kl_coef": 0.8, "gamma": 0.9, "lam": 0.5},
  "clip": {"clip": 0.6},
  "unclipped": {"clip": 0.0, "value_clip": 0.0},
  "dual_clip": {"dual_clip": 1.3},
  "value_clip": {"value_clip": 0.6, "value_coef": 2.0},
  "value": {"value_coef": 0.1},
  "entropy": {"entropy_coef": 0.4},
}


@pytest.mark.parametrize("name", PPO)
def test_ppo(name):
  config = ppo.PPOConfig(**ONCE, **PPO[name])
  batch, metrics = ppo.make_batch(ROLLOUT, SCORES, VALUES, REF, config)
  advantages, returns = ppo_targets(config, config.kl_coef, VALUES)
  oracle = ppo_loss(config, whitened(advantages), VALUES, returns)
  step = ppo.make_ppo_step(bigrams.actor_critic, RECORD, config, temperature=TEMPERATURE)
  taken = bigrams.check(step, PARAMS, batch, oracle, moved=("policy", "value"))
  policy = dataclasses.replace(config, value_coef=0.0, entropy_coef=0.0)
  both = dataclasses.replace(policy, value_coef=1.0)
  losses = [
    ppo_loss(c, whitened(advantages), VALUES, returns)(PARAMS, PARAMS) for c in (policy, both)
  ]
  check_metrics(
    taken,
    config.clip,
    config.clip,
    weight=len(returns),
    **{"loss/policy": losses[0], "loss/value": losses[1] - losses[0]},
  )
  found = np.array([[x, VALUES[at]] for at, x in returns.items()])
  np.testing.assert_allclose(
    metrics["value/explained_variance"],
    1 - np.var(found[:, 0] - found[:, 1]) / np.var(found[:, 0]),
    rtol=1e-4,
  )
  rewards = [sum(token_rewards(b, config.kl_coef)) for b in REAL]
  np.testing.assert_allclose(metrics["reward/shaped"], np.mean(rewards), rtol=1e-5)


MOMENTS = RunningMoments(*map(jnp.float32, (50, -0.7, 300)))
PPO_MAX = {
  "plain": {},
  "values": {"normalize_values": True},
  "segment": {"segment": 2, "gamma": 0.9, "lam": 0.7},
  "ptx": {"ptx_coef": 0.6},
  "target": {"kl_target": 0.4, "kl_horizon": 40},
}


@pytest.mark.parametrize("name", PPO_MAX)
def test_ppo_max(name):
  config = ppo_max.PPOMaxConfig(**ONCE, **PPO_MAX[name])
  control = ppo_max.Control(jnp.float32(0.3), MOMENTS)
  shift, scale = (-0.7, np.sqrt(300 / 50)) if config.normalize_values else (0.0, 1.0)
  batch, after, _ = ppo_max.make_batch(ROLLOUT, SCORES, VALUES, REF, control, config)
  # The penalty has the weight of the controller, not that of the config.
  in_rewards = VALUES * scale + shift
  advantages, returns = ppo_targets(config, 0.3, in_rewards, config.segment)
  seen = np.array(list(returns.values()))
  mean = (50 * -0.7 + seen.sum()) / (50 + len(seen))
  squares = 300 + 50 * (mean + 0.7) ** 2 + np.sum((seen - mean) ** 2)
  if config.normalize_values:  # In the units in which the critic is read next.
    shift, scale = mean, np.sqrt(squares / (50 + len(seen)))
  targets = {at: (x - shift) / scale for at, x in returns.items()}
  oracle = ppo_loss(config, whitened(advantages), VALUES, targets)

  def total(params, held):
    nll = [-bigrams.logprob(params, pair) for pair in demonstrated]
    return oracle(params, held) + config.ptx_coef * np.mean(nll)

  def demonstrate(params, sequences, key):
    return sft.loss_fn(params, sequences, key, apply_fn=bigrams.language)

  demonstrations = bigrams.sequences(bigrams.ROWS, seed=5)
  demonstrated = [
    p for row in zip(*demonstrations, strict=True) for p in bigrams.scored_pairs(*row)
  ]
  step = ppo_max.make_ppo_max_step(
    bigrams.actor_critic, RECORD, config, demonstration_loss=demonstrate, temperature=TEMPERATURE
  )
  if config.ptx_coef:
    batch = terms.WithSequences(batch, demonstrations)
  bigrams.check(step, PARAMS, batch, total, moved=("policy", "value"))
  kl = np.mean([sum(log_ratio(b, t) for t in range(len(PAIRS[b]))) for b in REAL])
  factor = 1.0
  if config.kl_target:
    factor += np.clip(kl / 0.4 - 1, -0.2, 0.2) * bigrams.ROWS / 40
    assert abs(factor - 1) > 0.01
  np.testing.assert_allclose(after.kl_coef, 0.3 * factor, rtol=1e-5)
  assert after.returns.count == 50 + len(seen)
  np.testing.assert_allclose([after.returns.mean, after.returns.m2], [mean, squares], rtol=1e-5)


# Methods that compare the responses to a prompt.


def groups_of(samples):
  size = samples if samples > 1 else bigrams.ROWS
  groups = [range(i, i + size) for i in range(0, bigrams.ROWS, size)]
  return [[b for b in group if b in REAL] for group in groups]


def standardised(samples, scale):
  """Advantage of each real row."""
  gains = {}
  for group in groups_of(samples):
    rewards = np.float64([SCORES[b] for b in group])
    std = np.std(rewards, ddof=1) + 1e-4 if scale else 1.0
    gains |= dict(zip(group, (rewards - rewards.mean()) / std, strict=True))
  return gains


def averaged(losses, average):
  """Mean of the losses of tokens, a list of each real row."""
  if average == "tokens":
    return np.mean(np.concatenate(losses))
  if average == "responses":
    return np.mean([np.mean(row) for row in losses])
  return np.mean([np.sum(row) / bigrams.R for row in losses])


def grpo_token(params, held, b, t, gain, config):
  return surrogate(logprob(params, PAIRS[b][t]), old(b, t), gain, config.clip_low, config.clip_high)


def cispo_token(params, held, b, t, gain, config):
  ratio = np.exp(logprob(held, PAIRS[b][t]) - old(b, t))
  weight = clipped(ratio, config.clip_low, config.clip_high)
  return -weight * gain * logprob(params, PAIRS[b][t])


def gspo_token(params, held, b, t, gain, config):
  """Loss of the response, at each of its tokens."""
  del held, t
  ratio = np.exp(np.mean([logprob(params, pair) - old(b, s) for s, pair in enumerate(PAIRS[b])]))
  return -min(ratio * gain, clipped(ratio, config.clip_low, config.clip_high) * gain)


def k3(params, b, t):
  x = float(REF[b, t]) - logprob(params, PAIRS[b][t])
  return np.exp(x) - 1 - x


GROUPS = {
  "grpo": (grpo.GRPOConfig, grpo.make_grpo_step, grpo_token),
  "gspo": (gspo.GSPOConfig, gspo.make_gspo_step, gspo_token),
  "cispo": (cispo.CISPOConfig, cispo.make_cispo_step, cispo_token),
}
GROUP_CASES = {
  "grpo/plain": {"clip_low": 0.1, "clip_high": 0.4},
  "grpo/penalty": {"kl_coef": 0.7, "clip_low": 0.0},
  "grpo/dr_grpo": {"scale": False, "average": "length"},
  "grpo/dapo": {"kl_coef": 0.0, "clip_high": 0.5, "average": "tokens"},
  "gspo/plain": {"clip_low": 0.05, "clip_high": 0.2, "kl_coef": 0.0},
  "gspo/penalty": {"clip_low": 0.3, "clip_high": 0.1, "kl_coef": 0.7},
  "cispo/plain": {"clip_low": 0.2, "clip_high": 0.6, "kl_coef": 0.0},
  "cispo/responses": {"clip_low": 0.5, "clip_high": 0.1, "average": "responses"},
}


@pytest.mark.parametrize("name, samples", [*((name, 4) for name in GROUP_CASES), ("grpo/plain", 1)])
def test_groups(name, samples):
  make_config, make_step, token_loss = GROUPS[name.split("/")[0]]
  config = make_config(**ONCE, **GROUP_CASES[name])
  batch, _ = grpo.make_batch(ROLLOUT, SCORES, REF, config, samples_per_prompt=samples)
  gains = standardised(samples, config.scale)

  def oracle(params, held):
    losses = [
      [
        token_loss(params, held, b, t, gains[b], config) + config.kl_coef * k3(params, b, t)
        for t in range(len(PAIRS[b]))
      ]
      for b in REAL
    ]
    return averaged(losses, config.average)

  step = make_step(bigrams.language, RECORD, config, temperature=TEMPERATURE)
  metrics = bigrams.check(step, PARAMS, batch, oracle)
  penalties = [[k3(PARAMS, b, t) for t in range(len(PAIRS[b]))] for b in REAL]
  kl = averaged(penalties, config.average)
  others = {"loss/kl": kl, "loss/policy": oracle(PARAMS, PARAMS) - config.kl_coef * kl}
  if make_step is gspo.make_gspo_step:  # What is clipped is the ratio of a response.
    ratios = [
      np.exp(np.mean([logprob(PARAMS, pair) - old(b, t) for t, pair in enumerate(PAIRS[b])]))
      for b in REAL
    ]
    moved = [x != clipped(x, config.clip_low, config.clip_high) for x in ratios]
    assert 0 < np.mean(moved) < 1
    others["clip_fraction"] = np.mean(moved)
  check_metrics(
    metrics,
    config.clip_low,
    config.clip_high,
    **others,
    weight=sum(map(len, penalties)) if config.average == "tokens" else len(REAL),
  )


@pytest.mark.parametrize("samples, kl_coef", [(4, 0.0), (4, 0.8), (1, 0.8)])
def test_rloo(samples, kl_coef):
  config = rloo.RLOOConfig(kl_coef=kl_coef)
  batch, metrics = rloo.make_batch(ROLLOUT, SCORES, REF, config, samples_per_prompt=samples)
  totals = {b: sum(token_rewards(b, kl_coef)) for b in REAL}
  gains = {
    b: totals[b] - np.mean([totals[c] for c in group if c != b])
    for group in groups_of(samples)
    for b in group
  }

  def oracle(params, held):
    losses = [[-gains[b] * logprob(params, pair) for pair in PAIRS[b]] for b in REAL]
    return averaged(losses, "length")

  step = rloo.make_rloo_step(bigrams.language, RECORD, config, temperature=TEMPERATURE)
  taken = bigrams.check(step, PARAMS, batch, oracle)
  check_metrics(taken, 0.2, 0.2, weight=len(REAL))
  np.testing.assert_allclose(metrics["reward/shaped"], np.mean(list(totals.values())), rtol=1e-5)


@pytest.mark.parametrize(
  "samples, kl_max, verdicts",
  [(4, 1e9, False), (4, 1e9, True), (4, 1.0, True), (1, 0.2, False)],
  ids=["plain", "verdicts", "budget", "one"],
)
def test_cgpo(samples, kl_max, verdicts):
  config = cgpo.CGPOConfig(kl_max=kl_max)
  scores = jax.nn.sigmoid(SCORES)
  satisfied = np.arange(bigrams.ROWS) % 3 != 0 if verdicts else None
  batch, metrics = cgpo.make_batch(
    ROLLOUT, scores, satisfied, REF, config, samples_per_prompt=samples
  )
  gains, beyond = {}, []
  for b in REAL:
    log_ratio = sum(old(b, t) - float(REF[b, t]) for t in range(len(PAIRS[b])))
    beyond.append(log_ratio >= kl_max)
    fine = satisfied is None or satisfied[b]
    gains[b] = max(1 - log_ratio / kl_max, 0) * float(scores[b]) if fine else 0.0
  total = np.mean(list(gains.values()))
  assert kl_max > 9 or 0 < np.mean(beyond) < 1
  gains = {
    b: gains[b] - np.mean([gains[c] for c in group]) for group in groups_of(samples) for b in group
  }

  def oracle(params, held):
    losses = [[-gains[b] * logprob(params, pair) for pair in PAIRS[b]] for b in REAL]
    return averaged(losses, "length")

  step = cgpo.make_cgpo_step(bigrams.language, RECORD, config, temperature=TEMPERATURE)
  taken = bigrams.check(step, PARAMS, batch, oracle)
  check_metrics(taken, 0.2, 0.2, weight=len(REAL))
  np.testing.assert_allclose(metrics["reward/shaped"], total, rtol=1e-5)
  np.testing.assert_allclose(metrics["kl/beyond_max"], np.mean(beyond), rtol=1e-5)


@pytest.mark.parametrize(
  "settings", [{}, {"kl_coef": 0.9, "gamma": 0.8}, {"clip": 0.5}], ids=["plain", "penalty", "clip"]
)
def test_reinforce_pp(settings):
  config = reinforce_pp.ReinforcePPConfig(**ONCE, **settings)
  batch, _ = reinforce_pp.make_batch(ROLLOUT, SCORES, REF, config)
  gains = {}
  for b in REAL:
    rewards = token_rewards(b, config.kl_coef)
    for t in range(len(rewards)):
      gains[b, t] = sum(config.gamma ** (s - t) * rewards[s] for s in range(t, len(rewards)))
  gains = whitened(gains)

  def oracle(params, held):
    losses = [
      surrogate(logprob(params, PAIRS[b][t]), old(b, t), gain, config.clip, config.clip)
      for (b, t), gain in gains.items()
    ]
    return np.mean(losses)

  step = reinforce_pp.make_reinforce_pp_step(
    bigrams.language, RECORD, config, temperature=TEMPERATURE
  )
  metrics = bigrams.check(step, PARAMS, batch, oracle)
  check_metrics(metrics, config.clip, config.clip, weight=len(gains))


# Methods that play against an opponent.


def judged(count, tau):
  """Batch of responses to `ROWS / count` prompts, and the preference for each of them."""
  preference = np.random.default_rng(6).random(bigrams.ROWS).astype(np.float32)
  split = lambda x: x.reshape(-1, count, *x.shape[1:])  # noqa: E731
  rows = bigrams.ROWS // count
  batch = opponents.OpponentBatch(
    jax.tree.map(split, ROLLOUT), split(REF), split(preference), np.full(rows, tau, np.float32)
  )
  return batch, np.float64(preference)


@pytest.mark.parametrize("tau", [0.0, 0.6])
def test_nash_md(tau):
  batch, preference = judged(1, tau)

  def oracle(params, held):
    total = 0.0
    for b, pairs in enumerate(PAIRS):
      ratios = [logprob(held, pair) - float(REF[b, t]) for t, pair in enumerate(pairs)]
      for t, pair in enumerate(pairs):
        total -= (preference[b] - 0.5) * logprob(params, pair)
        # Each token is charged for its own log-ratio and for all later ones.
        moved = logprob(params, pair) - logprob(held, pair)
        total += tau * (ratios[t] + sum(ratios[t:]) * moved)
    return total / bigrams.ROWS

  config = nash_md.NashMDConfig()
  step = nash_md.make_nash_md_step(bigrams.language, RECORD, config, temperature=TEMPERATURE)
  bigrams.check(step, PARAMS, batch, oracle)


@pytest.mark.parametrize("normalize", [False, True])
def test_ipo_md(normalize):
  batch, preference = judged(2, 0.6)

  def oracle(params, held):
    ratios = []
    for b, pairs in enumerate(PAIRS):
      terms = [logprob(params, pair) - float(REF[b, t]) for t, pair in enumerate(pairs)]
      ratios.append(np.mean(terms) if normalize else np.sum(terms))
    return np.mean(
      [
        (ratios[b] - ratios[b + 1] - (preference[b] - preference[b + 1]) / 0.6) ** 2
        for b in range(0, bigrams.ROWS, 2)
      ]
    )

  config = ipo_md.IPOMDConfig(normalize_lengths=normalize)
  step = ipo_md.make_ipo_md_step(bigrams.language, RECORD, config, temperature=TEMPERATURE)
  bigrams.check(step, PARAMS, batch, oracle)
