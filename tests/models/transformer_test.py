import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlhf_jax.models.build import build
from rlhf_jax.models.transformer import (
  Cache,
  Embedding,
  ModelConfig,
  RopeScaling,
  matmul_on_cpu,
  rope_frequencies,
  rotate,
  rotation,
)

LLAMA3 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=64)


def llama3_oracle(frequency: float, scaling: RopeScaling) -> float:
  """The rule of the Llama 3.1 reference code, one frequency at a time, in its three cases."""
  wavelength = 2 * math.pi / frequency
  if wavelength < scaling.original_length / scaling.high_freq_factor:
    return frequency
  if wavelength > scaling.original_length / scaling.low_freq_factor:
    return frequency / scaling.factor
  smooth = scaling.original_length / wavelength - scaling.low_freq_factor
  smooth /= scaling.high_freq_factor - scaling.low_freq_factor
  return (1 - smooth) * frequency / scaling.factor + smooth * frequency


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 3.0), LLAMA3])
@pytest.mark.parametrize("theta", [100.0, 10000.0, 500000.0])
def test_rope_frequencies(scaling, theta):
  config = ModelConfig(vocab_size=8, head_dim=32, rope_theta=theta, rope_scaling=scaling)
  expected = [theta ** (-2 * i / 32) for i in range(16)]
  if scaling is not None and scaling.kind == "linear":
    expected = [f / 3.0 for f in expected]
  elif scaling is not None:
    expected = [llama3_oracle(f, scaling) for f in expected]
    cases = {f / theta ** (-2 * i / 32) for i, f in enumerate(expected)}
    assert {1.0, 1 / 8} < cases, "the three cases must all occur"
  actual = rope_frequencies(config)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected, rtol=2e-6)


def test_local_and_partial_rope_frequencies():
  config = ModelConfig(
    vocab_size=8,
    layers=2,
    head_dim=32,
    rotary_fraction=0.5,
    rope_theta=1e6,
    rope_scaling=RopeScaling("linear", 3.0),
    rope_local_theta=100.0,
    windows=(2, None),
  )
  expected = [1e6 ** (-2 * i / 16) / 3.0 for i in range(8)]
  np.testing.assert_allclose(rope_frequencies(config), expected, rtol=2e-6)
  expected = [100.0 ** (-2 * i / 16) for i in range(8)]
  np.testing.assert_allclose(rope_frequencies(config, local=True), expected, rtol=2e-6)
  shared = dataclasses.replace(config, rope_local_theta=None)
  np.testing.assert_array_equal(rope_frequencies(shared, local=True), rope_frequencies(config))


def test_what_is_not_rotated_stays():
  x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
  frequencies = jnp.array([1.0, 0.5])
  positions = jnp.arange(3)[None]
  by = rotation(positions, frequencies)
  turned = rotate(x, by)
  np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
  np.testing.assert_array_equal(turned[..., :4], rotate(x[..., :4], by))


def test_rotate_is_a_rotation_of_pairs():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
  positions = rng.integers(0, 500, (2, 5))
  frequencies = rng.uniform(0.01, 1.0, 4).astype(np.float32)
  # A pair (i, i + K / 2) is one complex number, turned by position * frequency.
  angle = positions[:, :, None, None] * frequencies.astype(np.float64)
  turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
  expected = np.concatenate([turned.real, turned.imag], -1)
  actual = rotate(jnp.asarray(x), rotation(jnp.asarray(positions), jnp.asarray(frequencies)))
  np.testing.assert_allclose(actual, expected, atol=2e-4)  # float32 angles of up to 500.
  zero = rotate(jnp.asarray(x), rotation(jnp.zeros((2, 5), jnp.int32), jnp.asarray(frequencies)))
  np.testing.assert_array_equal(zero, x)
  assert rotate(x.astype(jnp.bfloat16), rotation(positions, frequencies)).dtype == jnp.bfloat16


@pytest.mark.parametrize("kinds", [(), (2,)])
def test_a_rotation_in_a_loop_is_the_same(kinds):
  rng = np.random.default_rng(2)
  positions = jnp.asarray(rng.integers(0, 500, (2, 5)))
  frequencies = jnp.asarray(rng.uniform(0.01, 1.0, (*kinds, 4)), jnp.float32)
  plain, looped = (rotation(positions, frequencies, on_cpu=on_cpu) for on_cpu in (False, True))
  for got, want in zip(looped, plain, strict=True):
    assert got.shape == (*kinds, 2, 5, 4)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_step_on_one_cpu_computes_cosines_once():
  model = build(ModelConfig(vocab_size=32, width=16, heads=2, kv_heads=2, head_dim=8, remat="none"))
  params = jax.eval_shape(model.init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((3, 7), jnp.int32)
  loss = lambda params, tokens: jnp.sum(model.apply(params, tokens) ** 2)  # noqa: E731
  text = jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()
  assert text.count(" cosine(") == 1


def test_scores_depend_on_distance_only():
  rng = np.random.default_rng(1)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
  frequencies = rope_frequencies(ModelConfig(vocab_size=8, head_dim=8))

  def score(i: int, j: int) -> float:
    at = [rotate(x, rotation(jnp.full((1, 1), p), frequencies)) for x, p in ((q, i), (k, j))]
    return float(jnp.sum(at[0] * at[1]))

  np.testing.assert_allclose(score(107, 100), score(7, 0), atol=1e-4)
  assert abs(score(107, 100) - score(100, 107)) > 1e-2


def test_grouped_queries_equal_repeated_key_heads():
  grouped = ModelConfig(
    vocab_size=16, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp_width=24, init_std=0.3
  )
  full = dataclasses.replace(grouped, kv_heads=4)
  params = jax.jit(build(grouped).init)(jax.random.key(0))
  attention = dict(params["layers"]["attention"])
  for name in "kv":
    kernel = attention[name]["kernel"].reshape(2, 16, 2, 4)
    # Query heads 0, 1 read key head 0 and 2, 3 read key head 1.
    attention[name] = {"kernel": jnp.repeat(kernel, 2, axis=2).reshape(2, 16, 16)}
  repeated = params | {"layers": params["layers"] | {"attention": attention}}
  tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 16)
  np.testing.assert_allclose(
    jax.jit(build(grouped).apply)(params, tokens),
    jax.jit(build(full).apply)(repeated, tokens),
    atol=1e-5,
  )


def test_cache_repeats_rows_next_to_each_other():
  k = jnp.arange(6.0).reshape(1, 2, 3, 1, 1)
  positions = jnp.array([[0, -1, 1], [-1, 0, 1]])
  cache = Cache(k, -k, positions, jnp.int32(2)).repeat(3)
  for i in range(6):
    np.testing.assert_array_equal(cache.k[:, i], k[:, i // 3])
    np.testing.assert_array_equal(cache.v[:, i], -k[:, i // 3])
    np.testing.assert_array_equal(cache.positions[i], positions[i // 3])
  assert int(cache.index) == 2


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
    ({"norm": "batch"}, "norm must be one of .*, got 'batch'"),
    ({"activation": "relu"}, "activation must be one of .*silu.*, got 'relu'"),
    ({"positions": "alibi"}, "positions must be one of .*, got 'alibi'"),
    ({"remat": "some"}, "remat must be one of .*dots.*, got 'some'"),
    ({"windows": (4,)}, "windows has 1 entries for 4 layers"),
    ({"windows": (4, 4, None, 0)}, "a token sees at least itself"),
    ({"windows": (None,) * 4}, "windows holds no window; leave it empty"),
    ({"rope_local_theta": 5.0}, "rope_local_theta is for layers with a window"),
    ({"positions": "learned", "rotary_fraction": 0.5}, "learned positions leave no use for"),
    ({"positions": "learned", "rope_scaling": LLAMA3}, "learned positions leave no use for"),
    ({"rotary_fraction": 1.5}, r"rotary_fraction must be in \(0, 1\], got 1.5"),
    ({"rotary_fraction": 0.1}, "is 3 dimensions, expected an even number"),
    ({"head_dim": 7}, "head_dim 7 is 7 dimensions, expected an even number"),
    ({"attention_softcap": 0.0}, "attention_softcap must be positive, got 0.0"),
    ({"logit_softcap": math.nan}, "logit_softcap must be positive, got nan"),
    ({"query_width": -1}, "query_width must be positive, got -1"),
  ],
)
def test_fields_that_do_not_go_together_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    ModelConfig(**{"vocab_size": 8} | changes)


def test_the_factor_of_the_embedding_is_rounded_to_its_type():
  config = ModelConfig(vocab_size=8, width=3072, embed_scale=True, dtype="bfloat16")
  embed = Embedding(config, rngs=nnx.Rngs(0))
  tokens = jnp.arange(8)[None]
  # sqrt(3072) is 55.4, and the nearest bfloat16 is 55.5.
  table = embed.embedding[...].astype(jnp.bfloat16)
  expected = (table.astype(jnp.float32) * 55.5).astype(jnp.bfloat16)
  np.testing.assert_array_equal(embed(tokens, tokens)[0], expected)
  exact = Embedding(dataclasses.replace(config, dtype="float32"), rngs=nnx.Rngs(0))
  np.testing.assert_allclose(
    exact(tokens, tokens)[0], exact.embedding[...] * math.sqrt(3072), rtol=1e-6
  )


@pytest.mark.parametrize("width", [4, 9])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_matmul_on_cpu_has_the_derivatives_of_a_matmul(shape, width):
  keys = jax.random.split(jax.random.key(0), 3)
  x, kernel = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (6, width))
  weights = jax.random.normal(keys[2], (*shape[:-1], width))

  def derivatives(matmul):
    loss = lambda x, kernel: jnp.sum(weights * jnp.tanh(matmul(x, kernel)))  # noqa: E731
    first = jax.grad(loss, argnums=(0, 1))
    second = jax.grad(lambda *inputs: sum(jnp.sum(g**2) for g in first(*inputs)), argnums=(0, 1))
    return first(x, kernel), second(x, kernel)

  for got, want in zip(
    *map(jax.tree.leaves, map(derivatives, (matmul_on_cpu, jnp.matmul))), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_gradients_by_matrices_are_wide_on_a_cpu(shape):
  x, kernel = jnp.ones((2, 3, shape[0])), jnp.ones(shape)
  loss = lambda x, kernel: jnp.sum(matmul_on_cpu(x, kernel) ** 2)  # noqa: E731
  text = jax.jit(jax.grad(loss, argnums=1)).lower(x, kernel).compile().as_text()
  assert "f32[8,24]{1,0} dot(" in text
  assert "f32[24,8]{1,0} dot(" not in text
