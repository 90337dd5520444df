"""A policy on nine sequences of two tokens, behind an empty prompt of one column."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.algorithms import opponents
from rlhf_jax.losses import game
from rlhf_jax.train_step import init_state
from rlhf_jax.types import Rollout

V, T = 3, 2
EOS = 0
# Of each sequence, ordered as itertools.product.
REWARD = np.random.default_rng(0).normal(size=V**T).astype(np.float32)


def table_apply(table, tokens, *, segment_ids=None, last):
  """Entries of a table that depend on the prefix: logits, or values."""
  del segment_ids
  start = jnp.broadcast_to(table["start"], (tokens.shape[0], *table["start"].shape))
  one = table["one"][tokens[:, 1]]
  return jnp.stack([start, one, jnp.zeros_like(one)], axis=1)[:, -last:]


def tabular_apply(params, tokens, **kwargs):
  """Logits of a policy and values of a critic."""
  return table_apply(params["policy"], tokens, **kwargs), table_apply(
    params["value"], tokens, **kwargs
  )


def policy_params(key):
  """Random logits of the first token, and of the second one after each first."""
  a, b = jax.random.split(key)
  return {"start": jax.random.normal(a, (V,)), "one": jax.random.normal(b, (V, V))}


def tabular_params(key):
  """A random policy, and a critic that says 0."""
  return {
    "policy": policy_params(key),
    "value": {"start": jnp.zeros(()), "one": jnp.zeros((V,))},
  }


def sequence_logprobs(policy):
  """[9] log-probabilities, ordered as itertools.product."""
  start, one = jax.nn.log_softmax(policy["start"]), jax.nn.log_softmax(policy["one"])
  return (start[:, None] + one).reshape(-1)


def sequence_of(rollout):
  """[B] number of each sampled sequence."""
  return rollout.tokens[:, 1] * V + rollout.tokens[:, 2]


def token_logprobs(policy, rollout):
  """[B, 2] log-probabilities of sampled tokens."""
  start, one = jax.nn.log_softmax(policy["start"]), jax.nn.log_softmax(policy["one"])
  first, second = rollout.tokens[:, 1], rollout.tokens[:, 2]
  return jnp.stack([start[first], one[first, second]], axis=1)


def sample_rollout(policy, key, rows):
  """Samples of a policy, all of two tokens."""
  first_key, second_key = jax.random.split(key)
  start, one = jax.nn.log_softmax(policy["start"]), jax.nn.log_softmax(policy["one"])
  first = jax.random.categorical(first_key, jnp.broadcast_to(start, (rows, V)))
  second = jax.random.categorical(second_key, one[first])
  tokens = jnp.stack([jnp.zeros_like(first), first, second], axis=1)
  response = jnp.broadcast_to(jnp.array([[False, True, True]]), tokens.shape)
  rollout = Rollout(tokens, ~response, response, jnp.zeros((rows, T)))
  return rollout._replace(logprobs=token_logprobs(policy, rollout))


def stopped_rollout(rows, seed=0):
  """Params with a critic, samples that stop after `EOS`, and [rows] bool, True if they did."""
  params = tabular_params(jax.random.key(seed))
  start_key, one_key = jax.random.split(jax.random.key(seed + 1))
  params["value"] = {
    "start": jax.random.normal(start_key, ()),
    "one": jax.random.normal(one_key, (V,)),
  }
  rollout = sample_rollout(params["policy"], jax.random.key(seed + 2), rows)
  goes_on = rollout.tokens[:, 1] != EOS
  mask = rollout.response_mask.at[:, 2].set(goes_on)
  logprobs = jnp.where(mask[:, 1:], rollout.logprobs, 0.0)
  rollout = rollout._replace(response_mask=mask, logprobs=logprobs)
  ended = jnp.any((rollout.tokens[:, 1:] == EOS) & mask[:, 1:], axis=1)
  assert 0 < ended.sum() < rows
  return params, rollout, ended


REF = tabular_params(jax.random.key(1))


def optimum(beta):
  """[9] log-probabilities of the policy with the largest reward less `beta` times its KL."""
  return jax.nn.log_softmax(sequence_logprobs(REF["policy"]) + REWARD / beta)


def pulled_optimum(coef):
  """[9] log-probabilities of the policy that k3 in the loss leads to, in place of `optimum`.

  The gradient of k3 is that of the KL from the reference to the policy at each token. So each token
  ends at `p (gain - mean gain) = coef (p - ref)`, with the gain expected of the tokens after it.
  """
  table = jax.tree.map(lambda x: np.exp(np.float64(jax.nn.log_softmax(x))), REF["policy"])

  def solve(ref, gain):
    low, high = gain.max(), gain.max() + 2 * coef + np.ptp(gain)
    for _ in range(100):  # The sum falls with the level, from infinity to less than 1.
      level = (low + high) / 2
      low, high = (level, high) if np.sum(coef * ref / (level - gain)) > 1 else (low, level)
    return coef * ref / (level - gain)

  gain = np.float64(REWARD).reshape(V, V)
  second = np.stack([solve(*x) for x in zip(table["one"], gain, strict=True)])
  first = solve(table["start"], np.sum(second * gain, axis=1))
  return np.log(first[:, None] * second).reshape(-1)


def divergence(log_p, log_q):
  """KL from p to q, of log-probabilities [9]."""
  return float(np.sum(np.exp(np.float64(log_p)) * (np.float64(log_p) - np.float64(log_q))))


def improve(step, make_batch, params, tx, carry=None, *, policy_of, steps=150, rows=512):
  """Alternates between samples and updates on them, as one program.

  Args:
    step: `(state, batch, key) -> (state, metrics)`.
    make_batch: `(carry, params, rollout, scores, ref_logprobs) -> (batch, carry)`.
    params: Start.
    tx: Optimizer of the step.
    carry: State of `make_batch`.
    policy_of: Function from the params to the policy.
    steps: Number of iterations.
    rows: Samples of an iteration.

  Returns:
    [9] log-probabilities of the policy at the end, and the carry.
  """

  def iteration(state, i):
    state, carry = state
    rollout = sample_rollout(
      policy_of(state.params), jax.random.fold_in(jax.random.key(2), i), rows
    )
    scores = jnp.asarray(REWARD)[sequence_of(rollout)]
    ref_logprobs = token_logprobs(REF["policy"], rollout)
    batch, carry = make_batch(carry, state.params, rollout, scores, ref_logprobs)
    return (step(state, batch, jax.random.key(3))[0], carry), None

  @jax.jit
  def run(state):
    return jax.lax.scan(iteration, state, jnp.arange(steps))[0]

  state, carry = run((init_state(params, tx), carry))
  return sequence_logprobs(policy_of(state.params)), carry


def improve_groups(make_step, make_batch, config, samples, steps=150):
  """Policy [9] after training by a method that compares samples, in groups of `samples`."""
  tx = optax.adam(optax.linear_schedule(0.03, 0.0, steps * config.updates))

  def to_batch(_, params, rollout, scores, ref_logprobs):
    del params
    batch, _ = make_batch(rollout, scores, ref_logprobs, config, samples_per_prompt=samples)
    return batch, None

  step, params = make_step(table_apply, tx, config), REF["policy"]
  return improve(step, to_batch, params, tx, policy_of=lambda params: params, steps=steps)[0]


# Preferences between the nine sequences, with cycles.
_UPPER = np.triu(np.random.default_rng(0).random((V**T, V**T)), 1)
PREFERENCE = np.float32(_UPPER + np.tril(1 - _UPPER.T, -1) + 0.5 * np.eye(V**T))


@functools.cache
def equilibrium(tau):
  """[9] log-probabilities of the policy that no other beats in the regularised game."""
  log_ref = sequence_logprobs(REF["policy"])
  policy = log_ref
  for _ in range(400):
    policy = game.mirror_prox_step(policy, log_ref, PREFERENCE, eta=2 * tau, tau=tau)
  assert float(game.exploitability(policy, log_ref, PREFERENCE, tau=tau)) < 1e-6
  return policy


def judged(params, opponent, key, *, count, tau, rows=512):
  """`rows` prompts, all alike, with `count` samples each that met one of the opponent."""
  key, other_key = jax.random.split(key)
  responses = sample_rollout(params, key, rows * count)
  other = sequence_of(sample_rollout(opponent, other_key, rows))
  wins = jnp.asarray(PREFERENCE)[sequence_of(responses), jnp.repeat(other, count)]
  split = lambda x: x.reshape(rows, count, *x.shape[1:])  # noqa: E731
  return opponents.OpponentBatch(
    rollout=jax.tree.map(split, responses),
    ref_logprobs=split(token_logprobs(REF["policy"], responses)),
    preference=split(wins),
    tau=jnp.full(rows, tau),
  )


def play(update, tx, *, count, tau, ema=0.0, extragradient=False, steps=400):
  """Plays a policy against itself, or against the average or the look-ahead of itself.

  Args:
    update: `(state, batch, key) -> (state, metrics)`.
    tx: Optimizer of the update.
    count: Responses to a prompt.
    tau: Weight of the penalty.
    ema: Decay of the average; 0 plays against the policy.
    extragradient: True looks a step ahead.
    steps: Number of updates.

  Returns:
    [9] log-probabilities of the policy at the end, and the metrics of the last step.
  """

  def against(state, opponent, key):
    return update(state, judged(state.params, opponent, key, count=count, tau=tau), key)

  step = opponents.extragradient(against) if extragradient else against

  def iteration(carry, i):
    state, average = carry
    opponent = average if ema else state.params
    state, metrics = step(state, opponent, jax.random.fold_in(jax.random.key(2), i))
    return (state, opponents.moving_average(opponent, state.params, ema)), metrics

  @jax.jit
  def run(params):
    carry = init_state(params, tx), params
    (state, _), metrics = jax.lax.scan(iteration, carry, jnp.arange(steps))
    return state, jax.tree.map(lambda x: x[-1], metrics)

  state, metrics = run(REF["policy"])
  return sequence_logprobs(state.params), metrics
