import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import hlo, sharding
from rlhf_jax.generation import SamplingConfig, adjust_logits, sample, sampling

DRAWS = 20_000
# 0.9999 quantile of chi-square by degrees of freedom.
CHI_SQUARE = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 5: 25.74, 6: 27.86, 7: 29.88}


def softmax(x):
  x = np.exp(np.asarray(x, np.float64) - np.max(x))
  return x / x.sum()


def support(logits, top_k, top_p):
  """The tokens that may be drawn, by the definition, one at a time."""
  order = sorted(range(len(logits)), key=lambda i: -logits[i])
  if top_k:
    order = order[:top_k]
  probs = dict(zip(order, softmax([logits[i] for i in order]), strict=True))
  kept, total = set(), 0.0
  for i in order:
    kept.add(i)
    total += probs[i]
    if total >= top_p:
      break
  return kept


@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 9, 50])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.6, 0.95, 1.0])
def test_support(top_k, top_p):
  rng = np.random.default_rng(top_k)
  logits = rng.normal(size=(30, 9)).astype(np.float32) * rng.uniform(0.1, 5.0, (30, 1))
  adjusted = np.asarray(adjust_logits(jnp.asarray(logits, jnp.float32), top_k=top_k, top_p=top_p))
  for row, out in zip(logits.astype(np.float32), adjusted, strict=True):
    kept = sorted(support(row, top_k, top_p))
    np.testing.assert_array_equal(np.flatnonzero(out > -np.inf), kept)
    np.testing.assert_array_equal(out[kept], row[kept])
    assert np.argmax(row) in kept


def test_support_of_hand_made_logits():
  logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]]))

  def kept(**kwargs):
    return (adjust_logits(logits, **kwargs) > -jnp.inf).tolist()

  assert kept(top_k=2) == [[False, True, False, True], [True, True, False, False]]
  assert kept(top_p=0.5) == [[False, True, False, True], [True, False, False, False]]
  assert kept(top_p=0.35) == [[False, True, False, False], [True, False, False, False]]
  # After top_k the rest is a distribution of its own: 4/7 of it is reached by one token.
  assert kept(top_k=2, top_p=0.55)[0] == [False, True, False, False]
  assert kept() == [[True] * 4] * 2
  # Any leading shape, and tokens that were excluded before stay so.
  shaped = adjust_logits(logits.reshape(2, 1, 4).at[0, 0, 1].set(-jnp.inf), top_p=0.99)
  assert shaped.shape == (2, 1, 4) and shaped[0, 0, 1] == -jnp.inf


@pytest.mark.parametrize("top_k", [0, 1, 3, 5])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.9, 1.0])
def test_ties_are_in_the_smallest_set_by_their_ids(top_k, top_p):
  rows = [[0.0] * 10, [1.0, 2.0] * 5, [2.0] * 4 + [0.0] * 6, [-np.inf, 1.0] * 5, [0.0] * 9 + [1e-3]]
  adjusted = np.asarray(adjust_logits(jnp.float32(rows), top_k=top_k, top_p=top_p))
  for row, out in zip(rows, adjusted, strict=True):
    # A sum that misses top_p by rounding has reached it.
    kept = sorted(support(row, top_k, top_p - 1e-6 if top_p < 1 else 2.0))
    likely = [i for i in kept if row[i] > -np.inf]
    np.testing.assert_array_equal(np.flatnonzero(out > -np.inf), likely)


def test_a_nucleus_of_nearly_all_of_a_large_vocabulary_is_nearly_all():
  """Rounding keeps a sum of 200,000 probabilities from 1."""
  adjusted = adjust_logits(jnp.zeros((1, 200_000)), top_p=0.9999999)
  assert np.sum(np.asarray(adjusted) == 0) > 199_000


@pytest.mark.parametrize(
  "config",
  [
    SamplingConfig(),
    SamplingConfig(temperature=0.7),
    SamplingConfig(temperature=3.0),
    SamplingConfig(top_k=4),
    SamplingConfig(top_p=0.8),
    SamplingConfig(temperature=0.7, top_k=5, top_p=0.9),
  ],
  ids=str,
)
def test_frequencies(config):
  logits = np.array([0.3, -1.0, 1.2, 0.0, 0.9, -0.2, 0.5, -2.0], np.float32)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(DRAWS))
  tokens, logprobs = jax.jit(sample, static_argnums=2)(
    jnp.broadcast_to(logits, (DRAWS, 8)), keys, config
  )
  assert tokens.dtype == jnp.int32 and logprobs.dtype == jnp.float32
  scaled = logits / config.temperature
  kept = sorted(support(scaled, config.top_k, config.top_p))
  expected = DRAWS * softmax(scaled[kept])
  counts = np.bincount(tokens, minlength=8)
  assert counts.sum() == counts[kept].sum()
  statistic = np.sum((counts[kept] - expected) ** 2 / expected)
  assert statistic < CHI_SQUARE[len(kept) - 1]
  # The log-probability is that of the whole softmax, without top_k and top_p.
  whole = np.log(softmax(scaled))
  np.testing.assert_allclose(logprobs, whole[np.asarray(tokens)], atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 50, 257, 1000, 32_000, 50_257, 151_936])
def test_blocks_hold_every_token_once_in_order(size):
  count, width = jax.eval_shape(
    sampling._blocks, jax.ShapeDtypeStruct((1, size), jnp.float32)
  ).shape[1:]
  assert count.bit_count() == 1 and size <= count * width < size + count
  assert count + width <= 1 + 9 * size**0.5  # Far fewer than V random numbers.
  if size <= 1000:
    ids = np.asarray(sampling._blocks(jnp.arange(1.0, size + 1)[None]))[0]
    np.testing.assert_array_equal(ids.ravel()[:size], np.arange(1, size + 1))
    assert (ids.ravel()[size:] == -np.inf).all()


@pytest.mark.parametrize(
  "logits",
  [
    [0.0, 0.0, 0.0, 0.0],
    [1.0, -1.0, 0.5, 2.0],
    [5.0, -3.0, -np.inf, 0.0],
    [30.0, 29.0, -np.inf, 27.0],
  ],
)
def test_the_law_is_the_softmax_over_a_grid_of_noise(logits):
  """Uniforms on a grid, for each of the two blocks and for each of the two tokens of a block."""
  uniform = (np.arange(500) + 0.5) / 500
  grid = np.stack(np.meshgrid(*[-np.log(-np.log(uniform))] * 2, indexing="ij"), -1).reshape(-1, 2)
  rows = jnp.broadcast_to(jnp.float32(logits).reshape(1, 2, 2), (len(grid), 2, 2))
  ranks = jax.nn.logsumexp(rows, axis=-1)
  tokens = []
  for block in (None, 0, 1):
    noise = np.tile(grid, 2)
    if block is not None:  # The draw within this block.
      noise[:, :2] = np.where(np.arange(2) == block, 1e9, -1e9)
    drawn, chosen = sampling._choose(rows, ranks, jnp.float32(noise))
    np.testing.assert_array_equal(chosen, np.float32(logits)[np.asarray(drawn)])
    tokens.append(np.bincount(drawn, minlength=4) / len(grid))
  law = np.repeat(tokens[0].reshape(2, 2).sum(1), 2) * np.concatenate(
    [tokens[1][:2], tokens[2][2:]]
  )
  np.testing.assert_allclose(law, softmax(logits), atol=5e-3)
  assert (law[np.isneginf(logits)] == 0).all()


@pytest.mark.parametrize("size", [1, 2, 37, 1000])
def test_frequencies_over_a_large_vocabulary(size):
  """Pearson's statistic of tokens that are expected often enough, and of all others together."""
  rng = np.random.default_rng(size)
  logits = np.where(rng.random(size) < 0.2, -np.inf, 3 * rng.normal(size=size)).astype(np.float32)
  logits[size // 2] = 1.0
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(DRAWS))
  rows = jnp.broadcast_to(logits, (DRAWS, size))
  tokens, logprobs = jax.jit(sample, static_argnums=2)(rows, keys, SamplingConfig())
  probs = softmax(logits)
  np.testing.assert_allclose(logprobs, np.log(probs[np.asarray(tokens)]), rtol=1e-5, atol=1e-6)
  counts, often = np.bincount(tokens, minlength=size), probs * DRAWS >= 5
  assert counts[np.isneginf(logits)].sum() == 0
  counts = np.append(counts[often], counts[~often].sum())
  expected = DRAWS * np.append(probs[often], probs[~often].sum())
  freedom = max(len(counts) - 1, 1)
  statistic = np.sum((counts - expected) ** 2 / np.maximum(expected, 1e-9))
  assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
  "config",
  [
    SamplingConfig(),
    SamplingConfig(temperature=0.0),
    SamplingConfig(top_k=3),
    SamplingConfig(top_p=0.9),
  ],
  ids=["plain", "greedy", "top_k", "top_p"],
)
def test_rows_without_a_finite_maximum_get_some_token_and_no_logprob(config):
  rows = [[np.nan] * 11, [-np.inf] * 11, [np.inf] + [0.0] * 10, [0.0] * 10 + [np.nan], [0.0] * 11]
  keys = jax.random.split(jax.random.key(0), len(rows))
  tokens, logprobs = sample(jnp.float32(rows), keys, config)
  assert ((np.asarray(tokens) >= 0) & (np.asarray(tokens) < 11)).all()
  np.testing.assert_array_equal(np.isnan(logprobs), [True, True, True, True, False])


ADJUSTED = [SamplingConfig(), SamplingConfig(temperature=0.0), SamplingConfig(top_p=0.9)]


@pytest.mark.parametrize("config", ADJUSTED, ids=["plain", "greedy", "top_p"])
def test_no_device_gathers_a_split_vocabulary(config):
  rows, size = 8, 4096
  mesh = sharding.make_mesh("data:2,tensor:4")
  logits = 3 * jax.random.normal(jax.random.key(0), (rows, size))
  keys = jax.random.split(jax.random.key(1), rows)
  split = jax.device_put(logits, jax.NamedSharding(mesh, jax.P("data", "tensor")))
  keys = jax.device_put(keys, jax.NamedSharding(mesh, jax.P("data")))
  compiled = jax.jit(sample, static_argnums=2).lower(split, keys, config).compile()
  blocks = jax.eval_shape(sampling._blocks, logits).shape
  sent = [found.bytes for found in hlo.collectives(compiled.as_text())]
  assert max(sent) <= 4 * rows * (blocks[1] + blocks[2])
  got, expected = compiled(split, keys), sample(logits, keys, config)
  np.testing.assert_array_equal(got[0], expected[0])
  np.testing.assert_allclose(got[1], expected[1], rtol=1e-5)


@pytest.mark.parametrize("config", [*ADJUSTED, SamplingConfig(top_k=9, top_p=0.9)], ids=str)
def test_a_token_costs_few_random_numbers_and_no_sort(config):
  size = 32_000
  rows, keys = jnp.zeros((2, size)), jax.random.split(jax.random.key(1), 2)
  jaxpr = str(jax.make_jaxpr(sample, static_argnums=2)(rows, keys, config))
  assert not re.search(rf"(sort\[|,{size}\] = cumsum)", jaxpr)
  for shape in re.findall(r"random_bits\[[^\]]*shape=\(([\d, ]*)\)", jaxpr):
    assert np.prod([int(n) for n in shape.split(",") if n.strip()]) < size / 20


@pytest.mark.parametrize(
  "config",
  [SamplingConfig(temperature=0.0), SamplingConfig(top_k=1), SamplingConfig(top_p=1e-6)],
  ids=str,
)
def test_most_likely_token(config):
  logits = jax.random.normal(jax.random.key(1), (50, 11))
  tokens, logprobs = sample(logits, jax.random.split(jax.random.key(2), 50), config)
  np.testing.assert_array_equal(tokens, jnp.argmax(logits, -1))
  np.testing.assert_allclose(logprobs, jnp.max(jax.nn.log_softmax(logits), -1), atol=1e-6)


def test_a_row_depends_on_its_own_key_only():
  config = SamplingConfig()
  logits = jax.random.normal(jax.random.key(0), (64, 30))
  keys = jax.random.split(jax.random.key(1), 64)
  tokens, logprobs = sample(logits, keys, config)
  order = np.random.default_rng(0).permutation(64)
  mixed, mixed_logprobs = sample(logits[order], keys[order], config)
  np.testing.assert_array_equal(mixed, tokens[order])
  np.testing.assert_array_equal(mixed_logprobs, logprobs[order])
  for i in (0, 17, 63):
    np.testing.assert_array_equal(sample(logits[i : i + 1], keys[i : i + 1], config)[0], tokens[i])


def test_half_precision_logits_are_widened():
  logits = (8 * jax.random.normal(jax.random.key(0), (4, 1000))).astype(jnp.bfloat16)
  keys = jax.random.split(jax.random.key(1), 4)
  tokens, logprobs = sample(logits, keys, SamplingConfig(temperature=0.7))
  wide = sample(logits.astype(jnp.float32), keys, SamplingConfig(temperature=0.7))
  np.testing.assert_array_equal(tokens, wide[0])
  np.testing.assert_array_equal(logprobs, wide[1])
  assert logprobs.dtype == jnp.float32


def test_shapes_are_checked():
  keys = jax.random.split(jax.random.key(0), 3)
  with pytest.raises(AssertionError):
    sample(jnp.zeros((2, 5)), keys, SamplingConfig())
  with pytest.raises(AssertionError):
    sample(jnp.zeros((3, 1, 5)), keys, SamplingConfig())


@pytest.mark.parametrize(
  "field, value",
  [
    ("max_new_tokens", 0),
    ("temperature", -0.1),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", float("nan")),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("samples_per_prompt", 0),
  ],
)
def test_impossible_settings_are_refused(field, value):
  with pytest.raises(ValueError, match=f"{field} must.*got {value}"):
    dataclasses.replace(SamplingConfig(), **{field: value})
