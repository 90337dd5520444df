"""Pairs of a policy's own samples, and the bonus on calibration responses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import dpo, online_dpo
from rlhf_jax.generation import SamplingConfig, make_generate
from rlhf_jax.models import build
from rlhf_jax.types import TokenBatch
from tests.testing import TINY_MODEL as CONFIG
from tests.testing import tiny_params

P, R, EOS = 6, 5, 2


@pytest.fixture(scope="module")
def sampled():
  """A tiny model, its params, and 4 samples to each of 5 left-padded prompts."""
  model = build(CONFIG)
  params = tiny_params()
  rng = np.random.default_rng(0)
  mask = np.arange(P)[None] >= np.arange(5)[:, None]
  tokens = np.where(mask, rng.integers(3, CONFIG.vocab_size, (5, P)), 0).astype(np.int32)
  generate = make_generate(
    model.decode,
    model.init_cache,
    SamplingConfig(max_new_tokens=R, samples_per_prompt=4),
    stop_ids=(EOS,),
    pad_id=0,
  )
  rollout = generate(params, tokens, mask, np.arange(5, dtype=np.int32), jax.random.key(1))
  return model, params, rollout


@pytest.mark.parametrize("rule", ["best_worst", "best_random", "first_two"])
def test_the_chosen_sample_scores_higher(rule):
  scores = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
  chosen, rejected = online_dpo.pick_pairs(scores, jax.random.key(0), rule)
  rows = np.arange(400)
  assert (scores[rows, chosen] > scores[rows, rejected]).all()
  if rule == "first_two":
    assert set(np.asarray(chosen)) | set(np.asarray(rejected)) == {0, 1}
    return
  np.testing.assert_array_equal(chosen, scores.argmax(axis=1))
  if rule == "best_worst":
    np.testing.assert_array_equal(rejected, scores.argmin(axis=1))
  else:  # Each of the other four about as often.
    rank = (scores > scores[rows, rejected][:, None]).sum(axis=1)
    np.testing.assert_allclose(np.bincount(rank, minlength=5)[1:] / 400, 0.25, atol=0.08)


def test_a_tie_is_no_pair_and_teaches_nothing(sampled):
  model, params, rollout = sampled
  scores = jnp.zeros((5, 4)).at[0, 2].set(1.0)
  chosen, rejected = online_dpo.pick_pairs(scores, jax.random.key(0), "best_worst")
  assert (np.asarray(chosen) == np.asarray(rejected)).tolist() == [False] + [True] * 4
  pairs = online_dpo.make_pairs(rollout, chosen, rejected)
  config = dpo.DPOConfig(beta=0.5)

  def gradient(rows):
    batch = dpo.DPOBatch(TokenBatch(*(x[rows] for x in pairs)), jnp.zeros((len(rows), 2)))
    loss = lambda p: dpo.loss_fn(p, batch, None, apply_fn=model.apply, config=config)[0]  # noqa: E731
    return jax.jit(jax.grad(loss))(params)

  of_ties, of_pair = gradient(np.arange(1, 5)), gradient(np.arange(1))
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(of_ties)) < 1e-6
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(of_pair)) > 1e-3


def test_pairs_are_prompt_and_response_without_padding(sampled):
  _, _, rollout = sampled
  chosen, rejected = np.array([3, 0, 1, 2, 3]), np.array([1, 2, 0, 3, 0])
  pairs = online_dpo.make_pairs(rollout, jnp.asarray(chosen), jnp.asarray(rejected))
  tokens, prompt_mask, response_mask = map(
    np.asarray, (rollout.tokens, rollout.prompt_mask, rollout.response_mask)
  )
  for b in range(5):
    for side, sample in enumerate((chosen[b], rejected[b])):
      row = 4 * b + sample
      prompt, response = tokens[row][prompt_mask[row]], tokens[row][response_mask[row]]
      length = len(prompt) + len(response)
      np.testing.assert_array_equal(
        pairs.tokens[b, side, :length], np.concatenate([prompt, response])
      )
      want = np.arange(P + R) >= len(prompt)
      want[length:] = False
      np.testing.assert_array_equal(pairs.mask[b, side], want)


def test_log_probabilities_survive_the_move(sampled):
  model, params, rollout = sampled
  logprobs, mask, _ = dpo.score_tokens(model.apply, params, online_dpo.right_padded(rollout))
  np.testing.assert_allclose(
    jnp.sum(jnp.where(mask, logprobs, 0.0), axis=1), jnp.sum(rollout.logprobs, axis=1), atol=1e-5
  )


def test_the_bonus_adds_the_gradient_of_calibration_responses(sampled):
  model, params, rollout = sampled
  pairs = online_dpo.make_pairs(rollout, jnp.zeros(5, int), jnp.ones(5, int))
  free = online_dpo.right_padded(jax.tree.map(lambda x: x[::4], rollout))
  batch = dpo.DPOBatch(pairs, jnp.zeros((5, 2)), free)
  coef = 0.3

  def loss(params, bonus):
    config = dpo.DPOConfig(bonus_coef=bonus)
    return dpo.loss_fn(params, batch, None, apply_fn=model.apply, config=config)[0]

  def mean_logprob(params):
    logprobs, mask, _ = dpo.score_tokens(model.apply, params, free)
    return jnp.mean(jnp.sum(jnp.where(mask, logprobs, 0.0), axis=1))

  plain, shifted, bonus = (
    jax.jit(jax.grad(loss), static_argnums=1)(params, 0.0),
    jax.jit(jax.grad(loss), static_argnums=1)(params, coef),
    jax.jit(jax.grad(mean_logprob))(params),
  )
  jax.tree.map(
    lambda a, b, c: np.testing.assert_allclose(a, b + coef * c, atol=1e-5), shifted, plain, bonus
  )
  with pytest.raises(ValueError, match="calibration"):
    dpo.loss_fn(
      params,
      batch._replace(calibration=None),
      None,
      apply_fn=model.apply,
      config=dpo.DPOConfig(bonus_coef=coef),
    )
