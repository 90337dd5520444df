"""Macro actions: rules that cut responses, against loops, and how soon credit reaches a token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import macro_actions, ppo_max
from rlhf_jax.train_step import init_state
from rlhf_jax.types import Rollout

V, T, ROWS = 4, 32, 64


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("name", macro_actions.CUTS)
def test_cuts_are_those_of_loops(name, start):
  """Of responses that start anywhere in their rows; one is empty."""
  rng = np.random.default_rng(0)
  lengths = np.array([[0], [1], [5], [7]])
  mask = (np.arange(9) >= start) & (np.arange(9) < start + lengths)
  ends, surprise = rng.random((4, 9)) < 0.4, rng.normal(size=(4, 9)).astype(np.float32)
  ids = np.asarray(macro_actions.CUTS[name](mask, ends, np.where(mask, -surprise, np.nan), 3))
  for b, row in enumerate(mask):
    want = -1
    for i, t in enumerate(np.flatnonzero(row)):
      cut = {
        "ngram": i % 3 == 0,
        "sentence": i > 0 and ends[b, t - 1],
        "perplexity": i > 0 and surprise[b, t] > surprise[b, t - 1],
      }[name]
      want += i == 0 or cut
      assert ids[b, t] == want, (b, t)
  assert ids[3][mask[3]].max() > 0


def test_sentences_are_not_cut_without_their_ends():
  with pytest.raises(ValueError, match="tokens that end a sentence"):
    macro_actions.sentence(np.ones((1, 2), bool), None, np.zeros((1, 2)), 1)


def apply(params, tokens, *, segment_ids, last):
  """A table of logits for each place, and a critic that says 0."""
  del segment_ids
  logits = jnp.concatenate([params["policy"], jnp.zeros((1, V))])
  rows = tokens.shape[0]
  return jnp.broadcast_to(logits, (rows, last, V)), jnp.zeros((rows, last)) * params["value"]


@functools.partial(jax.jit, static_argnums=0)
def steps_to_learn(config, key):
  """Steps until the first token, which alone earns a reward, is right nine times in ten."""
  tx = optax.sgd(0.5 * T)  # The loss is a mean over tokens.
  step = ppo_max.make_ppo_max_step(apply, tx, config)

  def iteration(state, i):
    draw, noise = jax.random.split(jax.random.fold_in(key, i))
    logprobs = jax.nn.log_softmax(state.params["policy"])
    tokens = jax.random.categorical(draw, logprobs, shape=(ROWS, T))
    scores = (tokens[:, 0] == 0) + 0.5 * jax.random.normal(noise, (ROWS,))
    tokens = jnp.pad(tokens, ((0, 0), (1, 0)))
    mask = jnp.broadcast_to(jnp.arange(T + 1) > 0, tokens.shape)
    taken = jnp.take_along_axis(logprobs[None], tokens[:, 1:, None], axis=2)[..., 0]
    rollout = Rollout(tokens, ~mask, mask, taken)
    control = ppo_max.Control.init(config)
    batch, *_ = ppo_max.make_batch(rollout, scores, 0 * taken, taken, control, config)
    return step(state, batch, key)[0], jnp.exp(logprobs[0, 0]) > 0.9

  state = init_state({"policy": jnp.zeros((T, V)), "value": jnp.zeros(())}, tx)
  _, learnt = jax.lax.scan(iteration, state, jnp.arange(100))
  return jnp.where(learnt.any(), jnp.argmax(learnt), 100)


def test_macro_actions_of_five_take_six_tenths_of_the_steps_of_tokens():
  keys = jax.random.split(jax.random.key(0), 3)
  settings = {"kl_coef": 0.0, "minibatches": 1, "value_coef": 0.0}
  steps = {
    n: np.median([steps_to_learn(ppo_max.PPOMaxConfig(segment=n, **settings), key) for key in keys])
    for n in (1, 5)
  }
  assert steps[5] <= 0.6 * steps[1] < 60, steps
