"""Reading of pairs: sums, means, weights, and rows that hold no pair."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import hlo, preflight, sharding
from rlhf_jax.algorithms import given, pairs
from rlhf_jax.models import build, lora
from rlhf_jax.train_step import join
from rlhf_jax.types import TokenBatch
from tests.algorithms import toy
from tests.testing import TINY_MODEL, pack, share

B, T = 6, 9
LAYOUT = [[3, 0], [5], [1, 2], [4]]
ORDER = jnp.array([n for members in LAYOUT for n in members])
PARAMS = toy.params_of()


@functools.cache
def read(config=None):
  return jax.jit(pairs.make_read_pairs(toy.language, config))


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
def test_numbers_are_those_of_loops(alpha):
  batch = toy.token_batch(B, 2)
  policy = read(pairs.PairConfig(length_alpha=alpha))(PARAMS, batch)
  logprobs, mask = given.read_tokens(toy.language, PARAMS, batch)
  np.testing.assert_array_equal(policy.lengths, mask.sum(axis=-1))
  assert policy.weights is None and policy.real.all()
  for n in range(B):
    rows = [np.float64(logprobs[n, side])[batch.mask[n, side]] for side in range(2)]
    short = min(map(len, rows))
    for side, row in enumerate(rows):
      total = row[:short].sum() + alpha * row[short:].sum()  # Liu et al., 2024, eq. 10.
      np.testing.assert_allclose(policy.totals[n, side], total, rtol=1e-5)
      mean = np.average(row, weights=np.where(np.arange(len(row)) < short, 1, alpha))
      np.testing.assert_allclose(policy.means[n, side], mean, rtol=1e-5)
    np.testing.assert_allclose(policy.nll[n], -rows[0].mean(), rtol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
def test_beside_an_empty_response_a_token_has_its_own_mean_or_none(alpha):
  batch = toy.token_batch(B, 2)
  batch.mask[2, 0] = False
  batch.mask[2, 1] = np.arange(T) == np.argmax(batch.mask[2, 1])
  policy = read(pairs.PairConfig(length_alpha=alpha))(PARAMS, batch)
  logprobs, _ = given.read_tokens(toy.language, PARAMS, batch)
  token = logprobs[2, 1][batch.mask[2, 1]] if alpha else 0.0
  np.testing.assert_allclose(policy.means[2], [0.0, np.squeeze(token)], rtol=1e-6)


def test_weights_are_the_product_of_both_responses_and_constants():
  batch = toy.token_batch(B, 2)
  config = pairs.PairConfig(reweight=True)
  policy = read(config)(PARAMS, batch)
  logprobs, mask, collision = given.read_tokens(toy.language, PARAMS, batch, collision=True)
  surprise = np.where(mask, np.float64(logprobs - collision), 0)
  want = np.exp((surprise.sum(-1) / batch.mask.sum(-1)).sum(axis=1))  # WPO, eq. 2.
  np.testing.assert_allclose(policy.weights, want, rtol=1e-4)
  make = functools.partial(pairs.make_read_pairs, toy.language, config)
  grads = jax.jit(jax.grad(lambda params: jnp.sum(make()(params, batch).weights)))(PARAMS)
  assert not any(np.any(x) for x in jax.tree.leaves(grads))
  rows, _ = pairs.row_metrics(jnp.ones(B), policy, policy.totals, policy.totals)
  np.testing.assert_array_equal(rows["loss"], policy.weights)


@pytest.mark.parametrize(
  "config",
  [pairs.PairConfig(), pairs.PairConfig(length_alpha=0.3, reweight=True)],
  ids=["plain", "weighted"],
)
def test_packed_pairs_are_those_of_rows_of_their_own(config):
  batch = toy.token_batch(B, 2)
  packed = pack(batch, LAYOUT, 2 * T)
  want, result = read(config)(PARAMS, batch), read(config)(PARAMS, packed)
  np.testing.assert_array_equal(result.real, packed.real.reshape(-1))
  real = np.asarray(result.real)
  for name in ("totals", "means", "nll", "weights"):
    a, b = getattr(result, name), getattr(want, name)
    if b is None:
      assert a is None
    else:
      np.testing.assert_allclose(a[real], b[ORDER], rtol=1e-5, atol=1e-5, err_msg=name)


def test_two_empty_responses_are_no_pair():
  batch = toy.token_batch(B, 2)
  batch.mask[2] = batch.mask[4, 0] = False
  assert read()(PARAMS, batch).real.tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("bad", [0.0, np.nan, 1e30])
def test_rows_without_a_pair_count_for_nothing(bad):
  real = jnp.array([True, False, True, True])
  rng = np.random.default_rng(0)
  rows = {
    name: jnp.where(real, rng.normal(size=4).astype(np.float32), bad) for name in ("loss", "x")
  }
  mask = rng.random((4, 2, 5)) < 0.5
  loss, metrics = pairs.mean_metrics(dict(rows), real, mask)
  np.testing.assert_allclose(loss, np.mean(np.asarray(rows["loss"])[[0, 2, 3]]), rtol=1e-6)
  np.testing.assert_allclose(metrics["x"], np.mean(np.asarray(rows["x"])[[0, 2, 3]]), rtol=1e-6)
  assert "loss" not in metrics
  assert metrics["weight"] == 3 and metrics["tokens"] == mask.sum()


def test_a_tie_is_half_correct():
  policy = read()(PARAMS, toy.token_batch(3, 2))
  rewards = jnp.float32([[1, 0], [0, 3], [2, 2]])
  logprobs = rewards - 10
  rows, real = pairs.row_metrics(jnp.arange(3.0), policy, logprobs, rewards)
  assert real.all()
  assert rows["reward/accuracy"].tolist() == [1.0, 0.0, 0.5]
  assert rows["reward/margin"].tolist() == [1.0, -3.0, 0.0]
  assert rows["logprobs/chosen"].tolist() == [-9.0, -10.0, -8.0]
  assert rows["logprobs/rejected"].tolist() == [-10.0, -7.0, -8.0]
  assert rows["loss"].tolist() == [0.0, 1.0, 2.0]
  np.testing.assert_array_equal(rows["nll/chosen"], policy.nll)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_impossible_weights_are_refused(alpha):
  with pytest.raises(ValueError, match="^length_alpha must be in"):
    pairs.PairConfig(length_alpha=alpha)


ROTARY = dataclasses.replace(TINY_MODEL, layers=1, tied=False)
LEARNED = dataclasses.replace(ROTARY, positions="learned", max_length=16, windows=(3,))


def pairs_with_prompts(rng, rows=8, length=16):
  """Pairs with prompts of 1 to 10 tokens, and responses of 1 to 6."""
  tokens = rng.integers(1, 16, (rows, 2, length)).astype(np.int32)
  prompts, at = rng.integers(1, 11, rows), np.arange(length)
  lengths = rng.integers(1, 7, (rows, 2, 1))
  prompts[:2], lengths[:2] = 10, [[[6], [6]], [[1], [6]]]
  inside = at < prompts[:, None, None]
  tokens = np.where(inside, tokens[:, :1], tokens)
  return TokenBatch(tokens, ~inside & (at < prompts[:, None, None] + lengths))


@pytest.mark.parametrize(
  ("config", "head", "spec"),
  [(ROTARY, "language", "data:2,fsdp:2,tensor:2"), (LEARNED, "scalar", None)],
  ids=["adapters on a mesh", "scores within a window"],
)
def test_a_prompt_that_is_run_once_changes_nothing(config, head, spec):
  batch = pairs_with_prompts(np.random.default_rng(3))
  shared = share(batch)

  def run(mesh, batch):
    model = build(config, head, mesh=mesh, logit_chunk=3 * config.vocab_size)
    params = jax.eval_shape(model.init, jax.random.key(0))
    if spec is not None:
      add = lambda params: join(  # noqa: E731
        params, lora.init(jax.random.key(0), params, lora.LoRAConfig(2))
      )
      params = jax.eval_shape(add, params)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), params)
    if mesh is not None:
      places = sharding.named_shardings(params, mesh, sharding.DECODER_RULES)
      params, batch = jax.device_put(params, places), sharding.place_batch(batch, mesh)
    apply = functools.partial(model.apply, scored=6)

    def loss(params, batch):
      if head == "scalar":
        numbers = given.read_scores(apply, params, batch)
      else:
        numbers = pairs.make_read_pairs(apply)(params, batch).totals
      return jnp.sum(jax.nn.softplus(numbers[:, 1] - numbers[:, 0])), numbers

    program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, batch).compile()
    return jax.device_get(program(params, batch)), hlo.count(program.as_text()).flops

  want, all_flops = run(None, batch)
  result, flops = run(None if spec is None else sharding.make_mesh(spec), shared)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(want[1]))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
  jax.tree.map(functools.partial(close, atol=1e-5), result[0], want[0])
  jax.tree.map(functools.partial(close, atol=1e-5 * largest), result[1], want[1])
  if spec is None:  # Three products with each weight: forward, and for both gradients.
    saved = batch.mask.size - shared.tokens.size
    assert all_flops - flops == 3 * 2 * saved * preflight.matrices(config, 0)
