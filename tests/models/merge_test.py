"""Merges against loops over leaves, and the front of reward against the loss on the first task."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.models import merge

L = 4


def params(seed, dtype=np.float32):
  rng = np.random.default_rng(seed)
  tree = {
    "embed": {"embedding": rng.normal(size=(5, 3))},
    "layers": {
      "mlp": {"up": {"kernel": rng.normal(size=(L, 3, 2))}},
      "norm": rng.normal(size=(L, 3)),
    },
    "score": {"bias": rng.normal(size=1)},
  }
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def same(a, b, **tolerance):
  jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("weight", [0, 1, 0.0, 1.0, lambda path: 1])
def test_the_ends_are_the_models_bit_for_bit(weight, dtype):
  base, tuned = params(0, dtype), params(1, dtype)
  base["score"]["bias"] = jnp.asarray([-0.0], dtype)
  end = base if callable(weight) or weight else tuned
  assert bits(merge.interpolate(base, tuned, weight)) == bits(end)


def by_hand(base, tuned, weights, outside):
  """Loops over layers, in float64."""

  def mix(w, a, b):
    return w * np.float64(a) + (1 - w) * np.float64(b)

  def layers(a, b):
    return np.stack([mix(w, a[i], b[i]) for i, w in enumerate(weights)])

  return {
    name: jax.tree.map(
      layers if name == "layers" else functools.partial(mix, outside), base[name], of
    )
    for name, of in tuned.items()
  }


@pytest.mark.parametrize("weights", [[0.2] * L, [0, 1, 0.25, 0.5], [-0.5, 1.5, 0, 2]])
def test_a_weight_per_layer_matches_loops(weights):
  base, tuned = params(0), params(1)
  expected = by_hand(base, tuned, weights, np.mean(weights))
  same(merge.interpolate(base, tuned, np.float32(weights)), expected, rtol=1e-5, atol=1e-6)
  function = lambda path: weights[0] if "embed" in path else 0.5  # noqa: E731
  mixed = merge.interpolate(base, tuned, function)
  same(mixed["embed"], by_hand(base, tuned, weights, weights[0])["embed"], rtol=1e-5, atol=1e-6)
  same(mixed["layers"], by_hand(base, tuned, [0.5] * L, 0)["layers"], rtol=1e-5, atol=1e-6)


def test_merges_are_linear_and_agree_with_each_other():
  base, a, b = (params(seed) for seed in range(3))
  close = functools.partial(same, rtol=1e-5, atol=1e-6)
  close(merge.average([a, b]), merge.interpolate(a, b, 0.5))
  close(merge.average([a, b], [1, 3]), merge.interpolate(a, b, 0.25))
  close(merge.average([a, b, base], [2, 2, 2]), merge.average([base, a, b]))
  close(merge.add_tasks(base, [a], [0.8]), merge.interpolate(base, a, 0.2))
  close(merge.add_tasks(base, [a, b], [0.5, 0.5]), merge.average([a, b]))
  both = merge.add_tasks(base, [a, b], [0.7, -0.4])
  one = merge.add_tasks(merge.add_tasks(base, [a], [0.7]), [b, base], [-0.4, 0.4])
  close(both, one)
  assert bits(merge.average([a])) == bits(merge.add_tasks(base, [a], [1.0])) == bits(a)
  assert bits(merge.add_tasks(base, [a, b], [0.0, 0.0])) == bits(base)
  half = merge.average([params(0, jnp.bfloat16), params(1, jnp.bfloat16)])
  assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("mean", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("blocks", [1, 3, 9])
def test_block_weights_have_the_mean_that_is_asked_for(mean, blocks):
  logits = 5 * np.random.default_rng(blocks).normal(size=blocks)
  weights = merge.block_weights(logits, mean)
  shares = [1 / (1 + np.exp(-c)) + 0.2 for c in logits]
  np.testing.assert_allclose(weights, [mean * s / np.mean(shares) for s in shares], rtol=1e-5)
  assert abs(float(jnp.mean(weights)) - mean) < 1e-6
  np.testing.assert_allclose(merge.block_weights(np.ones(blocks), mean), mean, rtol=1e-6)


def test_blocks_are_spread_over_consecutive_layers():
  spread = lambda blocks, layers: merge.layer_weights(np.float32(blocks), layers).tolist()  # noqa: E731
  assert spread([1, 2, 3], 6) == [1, 1, 2, 2, 3, 3]
  assert spread([1, 2, 3], 4) == [1, 1, 2, 3]
  assert spread([1], 3) == [1, 1, 1]
  with pytest.raises(ValueError, match="3 blocks do not divide a model of 2 layers"):
    merge.layer_weights([1, 2, 3], 2)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda a: merge.average([a, a], [1.0]), "1 weights do not match 2 models"),
    (lambda a: merge.average([a, a], [1.0, -1.0]), "0 or more"),
    (lambda a: merge.average([a], [0.0]), "0 or more"),
    (lambda a: merge.average([a], [np.nan]), "finite"),
    (lambda a: merge.average([]), "at least one"),
    (lambda a: merge.add_tasks(a, [a, a], [1.0]), "1 weights do not match 2"),
    (lambda a: merge.add_tasks(a, [a], [np.inf]), "finite"),
    (
      lambda a: merge.interpolate(a, {"embed": a["embed"]}, 0.5),
      "layers/mlp/up/kernel is .* absent",
    ),
    (lambda a: merge.interpolate(a, a, np.zeros(3)), "do not fit layers/mlp"),
    (lambda a: merge.interpolate(a, a, np.zeros((1, 2))), "a number or \\[L\\]"),
    (
      lambda a: merge.interpolate(a, a | {"score": {"bias": jnp.zeros(2)}}, 0.5),
      r"score/bias is \(1,\) in model 1 and \(2,\) in model 2",
    ),
  ],
)
def test_models_and_weights_that_do_not_match_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(params(0))


def fit(objective, params, steps):
  tx = optax.adam(3e-3)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(objective)(params), state)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]


@jax.jit
def front(key):
  """Loss on a first task and reward on a second one of a network tuned on one after the other."""
  inputs, hidden, classes, rows = 10, 48, 8, 400
  keys = jax.random.split(key, 6)
  first, second = (jax.random.normal(k, (inputs, classes)) for k in keys[:2])
  x = jax.random.normal(keys[2], (rows, inputs))
  x_first, x_second = x.at[:, 0].set(1.0), x.at[:, 0].set(-1.0)
  labels = jax.nn.one_hot(jnp.argmax(x_first @ first, axis=1), classes)
  rewards = jax.nn.softmax(2 * x_second @ second)
  sizes = (inputs, hidden, hidden, classes)
  start = [
    jax.random.normal(k, (a, b)) / a**0.5
    for k, a, b in zip(keys[3:], sizes, sizes[1:], strict=False)
  ]

  def logits(params, x):
    return jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]) @ params[2]

  def loss(params):
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits(params, x_first)), axis=1))

  def reward(params):
    return jnp.mean(jnp.sum(rewards * jax.nn.softmax(logits(params, x_second)), axis=1))

  base = fit(loss, start, 200)
  tuned = fit(lambda params: -reward(params), base, 150)
  mixed = [merge.interpolate(base, tuned, w) for w in (0.0, 0.2, 0.4, 1.0)]
  return jnp.array([[loss(params), reward(params)] for params in mixed])


def test_the_front_of_reward_against_the_loss_on_the_first_task_is_concave():
  """The tax of the tuning falls faster than its reward: each mixture is better than a coin's."""
  fronts = np.asarray(jax.lax.map(front, jax.random.split(jax.random.key(0), 3)))
  for loss, reward in np.moveaxis(fronts, 2, 1):
    assert loss[3] < loss[2] < loss[1] < loss[0]  # The tax: the tuned network has forgotten.
    for i, weight in ((1, 0.2), (2, 0.4)):
      assert loss[i] < weight * loss[3] + (1 - weight) * loss[0]
      assert reward[i] > weight * reward[3] + (1 - weight) * reward[0] + 0.02
