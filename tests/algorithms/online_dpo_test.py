"""Pairs of a policy's own samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import dpo, given, online_dpo, pairs, picks, reading
from rlhf_jax.types import TokenBatch
from tests.algorithms import toy

P, R = toy.P, toy.R
PARAMS = toy.params_of()


@functools.cache
def sampled():
  """4 samples to each of 5 left-padded prompts."""
  rollout = toy.rollout_of(PARAMS, 20, noise=0)
  first = np.repeat(np.arange(0, 20, 4), 4)
  tokens, prompt_mask = rollout.tokens.copy(), rollout.prompt_mask[first]
  tokens[:, :P] = rollout.tokens[first, :P]
  rollout = rollout._replace(tokens=tokens, prompt_mask=prompt_mask)
  logprobs = jax.jit(reading.make_read(toy.language))(PARAMS, rollout).logprobs
  return rollout._replace(logprobs=np.where(rollout.response_mask[:, P:], logprobs, 0))


def test_a_tie_is_no_pair_and_teaches_nothing():
  rollout = sampled()
  scores = jnp.zeros((5, 4)).at[0, 2].set(1.0)
  chosen, rejected = picks.pick_pairs(scores, jax.random.key(0), "best_worst")
  assert (np.asarray(chosen) == np.asarray(rejected)).tolist() == [False] + [True] * 4
  picked = online_dpo.make_pairs(rollout, chosen, rejected)
  config, read = dpo.DPOConfig(beta=0.5), pairs.make_read_pairs(toy.language)

  def gradient(rows):
    batch = dpo.DPOBatch(TokenBatch(*(x[rows] for x in picked)), jnp.zeros((len(rows), 2)))
    loss = lambda p: dpo.loss_fn(p, batch, None, read=read, config=config)[0]  # noqa: E731
    return jax.jit(jax.grad(loss))(PARAMS)

  of_ties, of_pair = gradient(np.arange(1, 5)), gradient(np.arange(1))
  assert not any(np.any(g) for g in jax.tree.leaves(of_ties))
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(of_pair)) > 1e-3
  # A tie takes no part in the mean, whatever the loss.
  config = dpo.DPOConfig(beta=0.5, loss="nca_pair", sft_coef=0.3)
  of_all = gradient(np.arange(5))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6), of_all, gradient(np.arange(1))
  )


def test_pairs_are_prompt_and_response_without_padding():
  rollout = sampled()
  chosen, rejected = np.array([3, 0, 1, 2, 3]), np.array([1, 2, 0, 3, 0])
  picked = online_dpo.make_pairs(rollout, jnp.asarray(chosen), jnp.asarray(rejected))
  tokens, prompt_mask, response_mask = map(
    np.asarray, (rollout.tokens, rollout.prompt_mask, rollout.response_mask)
  )
  for b in range(5):
    for side, sample in enumerate((chosen[b], rejected[b])):
      row = 4 * b + sample
      prompt, response = tokens[row][prompt_mask[row]], tokens[row][response_mask[row]]
      length = len(prompt) + len(response)
      np.testing.assert_array_equal(
        picked.tokens[b, side, :length], np.concatenate([prompt, response])
      )
      want = np.arange(P + R) >= len(prompt)
      want[length:] = False
      np.testing.assert_array_equal(picked.mask[b, side], want)


def test_log_probabilities_survive_the_move():
  rollout = sampled()
  read = jax.jit(functools.partial(given.read_tokens, toy.language))
  logprobs, mask = read(PARAMS, online_dpo.right_padded(rollout))
  np.testing.assert_allclose(
    jnp.sum(jnp.where(mask, logprobs, 0.0), axis=1), np.sum(rollout.logprobs, axis=1), atol=1e-5
  )


@pytest.mark.parametrize(
  "settings", [{"pick": "worst"}, {"round_steps": -1}, {"bonus_coef": -0.1}], ids=str
)
def test_impossible_settings_are_refused(settings):
  with pytest.raises(ValueError, match=f"^{next(iter(settings))} must"):
    online_dpo.OnlineConfig(**settings)
