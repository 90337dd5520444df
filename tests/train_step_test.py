import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import checkpoint, sharding, train_step
from rlhf_jax.losses import masked
from rlhf_jax.train_step import OptimConfig
from tests.testing import compilations

ROWS, T, D, V = 16, 6, 4, 5


class Batch(NamedTuple):
  tokens: jax.Array  # [B, T] int32.
  target: jax.Array  # [B, T] float32.
  mask: jax.Array  # [B, T] bool.


def init_params():
  key = jax.random.key(0)
  return {
    "embed": {"embedding": jax.random.normal(key, (V, D))},
    "layers": {"out": {"kernel": jnp.ones((D, 1)), "bias": jnp.float32([0.3])}},
    "norm": {"scale": jnp.float32([1.1] * D)},
  }


def make_batch(seed=0, rows=ROWS):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, T + 1, size=(rows, 1))  # Unequal: micro-batches must not count alike.
  return Batch(
    jnp.asarray(rng.integers(V, size=(rows, T)), jnp.int32),
    jnp.asarray(rng.normal(size=(rows, T)), jnp.float32),
    jnp.asarray(np.arange(T) < lengths),
  )


def token_loss(params, batch: Batch, key):
  """A mean over tokens, so that rows of other lengths weigh differently."""
  del key
  hidden = params["embed"]["embedding"][batch.tokens] * params["norm"]["scale"].reshape(1, 1, -1)
  out = (hidden @ params["layers"]["out"]["kernel"])[..., 0]
  error = out + params["layers"]["out"]["bias"].reshape(1, 1) - batch.target
  return masked.masked_mean(jnp.square(error), batch.mask), {
    "error": masked.masked_mean(jnp.abs(error), batch.mask),
    "error/max": jnp.max(jnp.where(batch.mask, jnp.abs(error), -jnp.inf)),
    "error/min": jnp.min(jnp.where(batch.mask, jnp.abs(error), jnp.inf)),
    "weight": jnp.sum(batch.mask).astype(jnp.float32),
  }


def row_loss(params, batch: Batch, key):
  """A mean over rows, which needs no weight."""
  loss, _ = jax.vmap(lambda row: token_loss(params, jax.tree.map(lambda x: x[None], row), key))(
    batch
  )
  return jnp.mean(loss), {"first": jnp.mean(batch.target[:, 0])}


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, atol):
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), a, b)


def spiky(norms, factor=5.0):
  """Params after each update by gradients of these norms, and the metric `spikes` of each."""
  config = OptimConfig(
    learning_rate=0.1, warmup=0.0, schedule="constant", max_grad_norm=0.0, max_spike=factor
  )
  tx = train_step.make_optimizer(config, len(norms))

  def loss(params, batch, key):
    return jnp.sum(params["kernel"]) * batch[0], {}

  state = train_step.init_state({"kernel": jnp.zeros(1)}, tx)
  step, params, spikes = train_step.make_train_step(loss, tx), [], []
  for norm in norms:
    state, metrics = step(state, jnp.full(1, norm, jnp.float32), jax.random.key(0))
    params.append(float(state.params["kernel"][0]))
    spikes.append(float(metrics["spikes"]))
  return params, spikes


def test_a_spike_is_a_step_that_is_left_out():
  usual = [1.0 + 0.1 * (i % 3) for i in range(30)]
  params, spikes = spiky([*usual[:20], 100.0, 1e20, *usual[20:]])
  expected, _ = spiky(usual)
  np.testing.assert_array_equal(params[:20] + params[22:], expected)
  assert params[19] == params[20] == params[21]
  assert spikes == [0.0] * 20 + [1.0, 1.0] + [0.0] * 10


@pytest.mark.parametrize(
  ("norms", "spikes"),
  [
    ([1.0] * 10 + [100.0] + [1.0] * 20, 0),  # Too few to tell.
    ([1.5**i for i in range(40)], 24),
    ([1.05**i for i in range(40)], 0),
    ([1.0] * 20 + [4.9] * 5, 0),
    ([1.0] * 64 + [10.0] * 80, 64),  # They have grown for good.
    ([1.0] * 20 + [math.nan, 1.0], 0),
  ],
)
def test_spikes_are_counted(norms, spikes):
  assert sum(spiky(norms)[1]) == spikes


@pytest.mark.parametrize("loss_fn", [token_loss, row_loss])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_microbatches_do_not_change_the_result(loss_fn, parts):
  params, batch, key = init_params(), make_batch(), jax.random.key(0)
  want_grads, want = train_step.gradients(loss_fn, params, batch, key)
  grads, metrics = train_step.gradients(loss_fn, params, batch, key, parts)
  assert_close(grads, want_grads, 1e-6)
  assert_close(metrics, want, 1e-6)


def test_equal_weights_would_be_wrong():
  # The lengths above do tell a mean of means from the mean.
  params, batch, key = init_params(), make_batch(), jax.random.key(0)
  unweighted = lambda *x: (token_loss(*x)[0], {})  # noqa: E731
  want, _ = train_step.gradients(token_loss, params, batch, key)
  grads, _ = train_step.gradients(unweighted, params, batch, key, 8)
  difference = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), grads, want)
  assert max(jax.tree.leaves(difference)) > 1e-3


def test_a_microbatch_without_tokens_adds_nothing():
  params, batch, key = init_params(), make_batch(), jax.random.key(0)
  # Strided parts: the last quarter of every four rows is the last micro-batch.
  off = (jnp.arange(ROWS) % 4 == 3)[:, None]
  batch = batch._replace(mask=batch.mask & ~off)
  want, _ = train_step.gradients(token_loss, params, batch, key)
  grads, metrics = train_step.gradients(token_loss, params, batch, key, 4)
  assert_close(grads, want, 1e-6)
  assert metrics["weight"] == np.sum(batch.mask)
  nothing = batch._replace(mask=jnp.zeros_like(batch.mask))
  grads, _ = train_step.gradients(token_loss, params, nothing, key, 4)
  assert all(np.all(g == 0) for g in jax.tree.leaves(grads))


def test_microbatches_of_bfloat16_params():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params())
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  batch, key = make_batch(), jax.random.key(0)
  want, _ = train_step.gradients(token_loss, wide, batch, key)
  grads, metrics = train_step.gradients(token_loss, params, batch, key, 4)
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
  scale = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(want))
  assert_close(jax.tree.map(lambda x: x.astype(jnp.float32), grads), want, 2**-6 * scale)
  assert metrics["weight"] == np.sum(batch.mask)


def two_terms(params, batch: Batch, key):
  """A mean over tokens, one over the positive ones, and one over rows; with metrics of each."""
  loss, metrics = token_loss(params, batch, key)
  chosen = batch.mask & (batch.target > 0.5)
  few, of_few = token_loss(params, batch._replace(mask=chosen), key)
  rows, _ = row_loss(params, batch, key)
  return loss - 0.7 * few + 0.2 * rows, metrics | {
    "few": of_few["error"],
    "weight/few": of_few["weight"],
    "term/few": -0.7 * few,
    "term/rows": 0.2 * rows,
    "weight/rows": jnp.ones(()),
    "rows": rows,
  }


@pytest.mark.parametrize("parts", [2, 4, 8, 16])
def test_each_term_and_metric_keeps_its_unit(parts):
  params, batch, key = init_params(), make_batch(), jax.random.key(0)
  batch = batch._replace(target=batch.target.at[:5].set(0.1))  # Some parts have none of the few.
  want_grads, want = train_step.gradients(two_terms, params, batch, key)
  run = jax.jit(train_step.gradients, static_argnums=(0, 4))
  grads, metrics = run(two_terms, params, batch, key, parts)
  assert_close(grads, want_grads, 1e-6)
  for name in ("loss", "few", "rows", "error", "weight", "weight/few"):
    np.testing.assert_allclose(metrics[name], want[name], rtol=1e-6, err_msg=name)
  assert train_step.reported(metrics).keys() == {
    *("loss", "few", "rows", "error", "error/max", "error/min", "weight")
  }


def test_the_model_is_not_run_to_count_units():
  def loss(params, batch, key):
    value, metrics = two_terms(params, batch, key)
    return value + 0 * jnp.linalg.norm(jnp.sin(params["embed"]["embedding"]) ** 3), metrics

  run = jax.jit(lambda *args: train_step.gradients(loss, *args, 4))
  text = run.lower(init_params(), make_batch(), jax.random.key(0)).compile().as_text()
  whole = jax.jit(lambda *args: train_step.gradients(loss, *args))
  once = whole.lower(init_params(), make_batch(), jax.random.key(0)).compile().as_text()
  assert text.count("sine(") == once.count("sine(") > 0


def test_a_loss_of_a_whole_batch_is_not_cut():
  def ranks(params, batch, key):
    loss, metrics = row_loss(params, batch, key)
    return loss, metrics | {"whole_batch": jnp.ones(())}

  args = init_params(), make_batch(), jax.random.key(0)
  assert "whole_batch" in train_step.gradients(ranks, *args)[1]
  with pytest.raises(ValueError, match="compares the rows of a batch.*set microbatches to 1"):
    train_step.gradients(ranks, *args, 2)


def test_microbatches_get_different_keys():
  def noisy(params, batch, key):
    noise = jax.random.uniform(key)
    return jnp.sum(params) * noise, {"noise/max": noise, "noise/min": noise}

  _, metrics = train_step.gradients(noisy, jnp.ones(2), jnp.zeros((4, 1)), jax.random.key(0), 4)
  assert metrics["noise/max"] > metrics["noise/min"]


def test_parts_are_strided_so_that_each_has_rows_of_every_device():
  loss = lambda params, batch, key: (params * batch[0], {})  # noqa: E731
  grads, _ = train_step.gradients(
    loss, jnp.float32(1), jnp.arange(8.0), jax.random.key(0), microbatches=2
  )
  assert grads == 0.5  # The first rows of both parts are 0 and 1.


def test_rows_must_divide():
  with pytest.raises(ValueError, match="16 rows cannot be cut into 3 equal parts"):
    train_step.gradients(token_loss, init_params(), make_batch(), jax.random.key(0), 3)


def run(step, tx, batches, key=None):
  state = train_step.init_state(init_params(), tx)
  metrics = []
  for batch in batches:
    state, m = step(state, batch, jax.random.key(7) if key is None else key)
    metrics.append(jax.device_get(m))
  return state, metrics


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("parts", [1, 4])
def test_a_step_without_finite_gradient_changes_nothing(bad, parts):
  tx = train_step.make_optimizer(OptimConfig(learning_rate=0.05, weight_decay=0.1), 10)
  step = train_step.make_train_step(token_loss, tx, microbatches=parts)
  good = [make_batch(seed) for seed in range(3)]
  # In one real token of the batch.
  poisoned = good[1]._replace(target=good[1].target.at[2, 0].set(bad))
  with compilations() as names:
    before, _ = run(step, tx, good[:1])
    after, metrics = run(step, tx, [good[0], poisoned])
  assert names.count("step") == 1
  assert_same(after.params, before.params)
  assert_same(after.opt_state, before.opt_state)
  assert [m["skipped_steps"] for m in metrics] == [0, 1]
  assert after.step == 2

  # And the run goes on as if that batch had not been there.
  with_it, metrics = run(step, tx, [good[0], poisoned, good[2]])
  without_it, _ = run(step, tx, [good[0], good[2]])
  assert_same(with_it.params, without_it.params)
  assert_same(with_it.opt_state, without_it.opt_state)
  assert metrics[-1]["skipped_steps"] == 0
  moved = jax.tree.map(lambda a, b: jnp.any(a != b), with_it.params, before.params)
  assert all(jax.tree.leaves(moved))


def test_finite_loss_with_a_nan_gradient_is_skipped():
  def loss(params, batch, key):
    del batch, key
    return jnp.sum(jnp.where(params > 0, jnp.sqrt(params), 0.0)), {}

  tx = optax.sgd(0.1)
  state = train_step.init_state(jnp.zeros(3), tx)
  after, metrics = train_step.update(loss, tx, state, None, jax.random.key(0))
  assert metrics["loss"] == 0
  assert metrics["skipped_steps"] == 1
  assert_same(after.params, jnp.zeros(3))


def test_step_compiles_once_and_donates_its_state():
  tx = train_step.make_optimizer(OptimConfig(), 10)
  step = train_step.make_train_step(token_loss, tx, microbatches=2)
  first = train_step.init_state(init_params(), tx)
  state = first
  with compilations() as names:
    for seed in range(3):
      state, metrics = step(state, make_batch(seed), jax.random.key(seed))
      assert all(x.shape == () for x in metrics.values())
  assert names.count("step") == 1
  assert state.step == 3
  donated = [x.is_deleted() for x in jax.tree.leaves((first.params, first.opt_state))]
  assert all(donated)


def test_what_is_frozen_is_an_argument_of_the_step_and_has_no_moments():
  whole, tx, seen = init_params(), optax.adam(0.1), []
  trained = {"layers": {"out": whole["layers"]["out"]}}
  frozen = {"embed": whole["embed"], "norm": whole["norm"]}

  def make_step(apply_fn, *, state_shardings=None):
    def loss(params, batch, key):
      del key
      return jnp.mean(jnp.square(apply_fn(params, batch.tokens) - batch.target)), {}

    return train_step.make_train_step(loss, tx, state_shardings=state_shardings)

  def apply_fn(params, tokens):
    seen.append(params["embed"]["embedding"])
    x = params["embed"]["embedding"][tokens] * params["norm"]["scale"].reshape(1, 1, -1)
    out = params["layers"]["out"]
    return (x @ out["kernel"])[..., 0] + out["bias"].reshape(1, 1)

  step = train_step.freeze(make_step, apply_fn, frozen)
  want, _ = make_step(apply_fn)(
    train_step.init_state(jax.tree.map(jnp.copy, whole), tx), make_batch(), jax.random.key(0)
  )
  state = train_step.init_state(jax.tree.map(jnp.copy, trained), tx)
  seen.clear()
  with compilations() as names:
    state, _ = step(state, make_batch(), jax.random.key(0))
    assert jax.tree.structure(state.params) == jax.tree.structure(trained)
    # Adam's first step does not depend on the size of a gradient.
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5),
      state.params["layers"],
      want.params["layers"],
    )
    step(state, make_batch(1), jax.random.key(0))
  assert names.count("step") == 1
  assert seen and all(isinstance(x, jax.core.Tracer) for x in seen)
  assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))
  joined = train_step.join(frozen, trained)
  assert jax.tree.structure(joined) == jax.tree.structure(whole)
  # Without anything frozen, it is the step itself.
  assert train_step.freeze(lambda apply, state_shardings: apply, apply_fn, {}) is apply_fn


def test_key_is_folded_with_the_step():
  def loss(params, batch, key):
    del batch
    return jnp.sum(params), {"draw": jax.random.uniform(key)}

  tx = optax.sgd(0.1)
  step = train_step.make_train_step(loss, tx)
  state = train_step.init_state(jnp.ones(2), tx)
  draws = []
  for _ in range(3):
    state, metrics = step(state, None, jax.random.key(0))
    draws.append(float(metrics["draw"]))
  assert len(set(draws)) == 3
  # Step 1 again, from a state that says so.
  again = train_step.init_state(jnp.ones(2), tx)._replace(step=jnp.int32(1))
  assert float(step(again, None, jax.random.key(0))[1]["draw"]) == draws[1]


def test_step_runs_over_seeds_under_vmap():
  tx = optax.adam(0.1)
  step = train_step.make_train_step(token_loss, tx)
  batch = make_batch()

  def train(scale):
    params = jax.tree.map(lambda x: scale * x, init_params())
    state, metrics = step(train_step.init_state(params, tx), batch, jax.random.key(0))
    return state.params, metrics["loss"]

  scales = jnp.float32([0.5, 1.0, 2.0])
  many = jax.jit(jax.vmap(train))(scales)
  for i in range(3):
    assert_close(jax.tree.map(lambda x, i=i: x[i], many), train(scales[i]), 1e-5)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.001, 0.1, 0.5])
def test_schedule(name, warmup):
  peak, updates = 3e-3, 100
  config = OptimConfig(learning_rate=peak, schedule=name, warmup=warmup)
  schedule = train_step.make_schedule(config, updates)
  rates = np.array([schedule(i) for i in range(updates + 1)])
  rise = max(1, round(warmup * updates)) if warmup else 0
  want = []
  for i in range(updates + 1):
    done = (i - rise) / (updates - rise)
    after = {"constant": 1, "linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2}[name]
    want.append(peak * ((i + 1) / rise if i < rise else after))
  np.testing.assert_allclose(rates, want, atol=1e-8)
  assert rates[0] > 0, "an update at rate 0 is a batch thrown away"
  np.testing.assert_allclose(rates.max(), peak, rtol=1e-6)
  assert (np.diff(rates[rise:]) <= 1e-9).all()
  if name != "constant":
    np.testing.assert_allclose(rates[-1], 0, atol=1e-9)


def test_schedule_of_a_single_update_trains():
  for name in ("constant", "linear", "cosine"):
    schedule = train_step.make_schedule(OptimConfig(learning_rate=1.0, schedule=name), 1)
    assert schedule(0) == 1.0


def test_weight_decay_is_on_matrices_only():
  config = OptimConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant", warmup=0.0)
  tx = train_step.make_optimizer(config, 10)
  # Stacked layers: norms and biases have two axes as well.
  params = init_params() | {
    "stack": {
      "norm": {"scale": jnp.ones((3, D))},
      "q": {"kernel": jnp.ones((3, D, D)), "bias": jnp.ones((3, D))},
    },
    "score": {"kernel": jnp.ones((D, 1)), "bias": jnp.ones((1,))},
  }
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zero, tx.init(params), params)
  params["embed"] |= {"positions": jnp.ones((7, D))}  # An embedding, too.
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zero, tx.init(params), params)
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    value = functools.reduce(lambda tree, entry: tree[entry.key], path, params)
    matrix = path[-1].key in ("kernel", "embedding", "positions")
    want = -0.1 * 0.5 * value if matrix else 0 * value
    np.testing.assert_allclose(update, want, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


# Name -> bytes of its state, in those of the matrices.
OPTIMIZERS = {"adamw": 2.0, "adafactor": 0.03, "lion": 1.0, "muon": 1.0, "schedule_free": 2.0}


@functools.cache
def matrices():
  """Params of one stacked matrix that is the product of two, and of its norm."""
  rng = np.random.default_rng(0)
  kernel = 0.1 * rng.normal(size=(2, 128, 128)).astype(np.float32)
  return {"layers": {"attention": {"q": {"kernel": kernel}}, "norm": {"scale": np.ones((2, 128))}}}


@pytest.mark.parametrize("name", train_step.OPTIMIZERS)
def test_an_optimizer_learns_in_a_state_that_is_split_and_resumes_bitwise(name, tmp_path):
  config = OptimConfig(1e-2, name, "constant", warmup=0.0, weight_decay=0.01)
  tx, target = (
    train_step.make_optimizer(config, 30),
    np.random.default_rng(1).normal(size=(1, 2, 128)),
  )

  def loss_fn(params, batch, key):
    layer = params["layers"]
    y = layer["norm"]["scale"][None] * jnp.einsum(
      "lio,bi->blo", layer["attention"]["q"]["kernel"], batch
    )
    return jnp.mean(jnp.square(y - target)), {}

  params = jax.tree.map(jnp.float32, matrices())
  mesh = sharding.make_mesh("fsdp:2,tensor:2,data:2")
  shapes = jax.eval_shape(lambda: train_step.init_state(params, tx))
  shardings = sharding.named_shardings(shapes, mesh, sharding.DECODER_RULES)
  init = jax.jit(lambda: train_step.init_state(params, tx), out_shardings=shardings)
  step = train_step.make_train_step(loss_fn, tx, state_shardings=shardings)
  batch = sharding.place_batch({"x": np.ones((8, 128), np.float32)}, mesh)["x"]
  state, losses, saved = init(), [], None
  with checkpoint.Checkpointer(tmp_path) as ckpt:
    for i in range(30):
      if i == 2:
        ckpt.save(2, {"state": state}, {})
      state, metrics = step(state, batch, jax.random.key(0))
      losses.append(float(metrics["loss"]))
      if i == 3:
        saved = jax.device_get(state)
    restored = ckpt.restore({"state": init()}).items["state"]
  assert losses[-1] < 0.5 * losses[0], losses
  for _ in range(2):
    restored, _ = step(restored, batch, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), saved)
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 3]
  assert all(x.sharding.shard_shape(x.shape) == (2, 64, 64) for x in moments)
  size = sum(x.size for x in jax.tree.leaves(state.opt_state)) / (2 * 128 * 128)
  assert size == pytest.approx(OPTIMIZERS[name], abs=0.03)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_schedule_free_has_the_average_of_optax_as_its_params(decay, warmup):
  rng = np.random.default_rng(0)
  start = {"a": {"kernel": rng.normal(size=(3, 4)).astype(np.float32)}}
  target = rng.normal(size=(3, 4)).astype(np.float32)
  config = OptimConfig(0.05, "schedule_free", warmup=warmup, weight_decay=decay, max_grad_norm=0)
  rate = train_step.make_schedule(config, 8)
  assert float(rate(7)) == np.float32(0.05), "it decays"
  # Theirs begins to count its weights at 1.
  base = optax.chain(
    optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True),
    optax.add_decayed_weights(decay),
    optax.scale_by_learning_rate(rate),
  )
  theirs = optax.contrib.schedule_free(base, lambda count: rate(count - 1), b1=config.b1)
  loss_fn = lambda params, batch, key: (jnp.mean((params["a"]["kernel"] - target) ** 4), {})  # noqa: E731
  tx = train_step.make_optimizer(config, 8)
  step = train_step.make_train_step(loss_fn, tx)
  state = train_step.init_state(jax.tree.map(jnp.array, start), tx)
  y, their_state = start, theirs.init(start)
  for _ in range(8):
    grads = jax.grad(lambda y: loss_fn(y, None, None)[0])(y)
    updates, their_state = theirs.update(grads, their_state, y)
    y = optax.apply_updates(y, updates)
    state, _ = step(state, {"x": jnp.zeros(1)}, jax.random.key(0))
    expected = optax.contrib.schedule_free_eval_params(their_state, y)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state.params, expected)
    point = train_step.gradient_params(state.opt_state, state.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), point, y)


def test_schedule_free_leaves_other_params_and_those_without_a_rate_as_they_are():
  config = OptimConfig(0.05, "schedule_free", warmup=0.0)
  waits = train_step.make_optimizer(config, 8, schedule=optax.constant_schedule(0.0))
  tx = optax.partition({"a": waits, "b": optax.sgd(0.1)}, lambda params: {"a": "a", "b": "b"})
  params = {"a": jnp.float32([0.1, 0.7]), "b": jnp.float32([0.3])}
  first = jax.device_get(params)
  loss_fn = lambda params, batch, key: (sum(jnp.sum(x**2) for x in params.values()), {})  # noqa: E731
  step = train_step.make_train_step(loss_fn, tx)
  state = train_step.init_state(params, tx)
  for _ in range(2):
    state, _ = step(state, {"x": jnp.zeros(1)}, jax.random.key(0))
  np.testing.assert_array_equal(state.params["a"], first["a"])
  np.testing.assert_allclose(state.params["b"], 0.64 * first["b"], rtol=1e-6)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (
      {"name": "schedule_free", "schedule": "linear"},
      "schedule is not read by schedule_free, only by adamw, adafactor, lion, muon",
    ),
    (
      {"name": "adafactor", "b1": 0.8},
      "b1 is not read by adafactor, only by adamw, muon, schedule_free",
    ),
    ({"name": "lion", "b2": 0.8}, "b2 is not read by lion, only by adamw, muon, schedule_free"),
    ({"name": "muon", "eps": 1e-3}, "eps is not read by muon, only by adamw, schedule_free"),
    ({"name": "adafactor", "mu_dtype": "bfloat16"}, "mu_dtype is not read by adafactor"),
  ],
)
def test_settings_that_an_optimizer_does_not_read_are_refused(settings, message):
  # What a script sets by default is not the user's doing.
  page = OptimConfig(eps=1e-5)
  OptimConfig(name=settings["name"], eps=1e-5).require_read(page)
  with pytest.raises(ValueError, match=f"^{message}"):
    dataclasses.replace(page, **settings).require_read(page)


def test_the_first_moment_in_half_the_bytes():
  """A step of Adam is nearly that of moments in float32, and the second one stays as it is."""
  grads = [jax.tree.map(lambda x, s=s: s * jnp.sin(x), init_params()) for s in (1.0, -0.3, 2.0)]
  found = []
  for dtype in ("float32", "bfloat16"):
    tx = train_step.make_optimizer(OptimConfig(schedule="constant", mu_dtype=dtype), 10)
    params, state = init_params(), tx.init(init_params())
    for grad in grads:
      updates, state = tx.update(grad, state, params)
      params = optax.apply_updates(params, updates)
    assert {x.dtype for x in jax.tree.leaves(optax.tree.get(state, "mu"))} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(optax.tree.get(state, "nu"))} == {jnp.dtype("float32")}
    found.append(jax.tree.map(jnp.subtract, params, init_params()))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0.05, atol=1e-7), *found)


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_gradient_clip(limit):
  params = {"kernel": jnp.zeros(2)}
  grads = {"kernel": jnp.float32([3.0, 4.0])}
  # With b1 = 0 and a huge eps Adam is SGD at rate 1 / eps.
  config = OptimConfig(learning_rate=1.0, b1=0.0, b2=0.0, eps=1e6, max_grad_norm=limit, warmup=0.0)
  tx = train_step.make_optimizer(config, 10)
  update, _ = tx.update(grads, tx.init(params), params)
  scale = limit / 5 if 0 < limit < 5 else 1.0
  np.testing.assert_allclose(-1e6 * update["kernel"], [3 * scale, 4 * scale], rtol=1e-4)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_gradients_whose_squares_overflow_are_clipped(limit):
  grads = {"kernel": jnp.float32([3e25, -4e25])}
  np.testing.assert_allclose(train_step.global_norm(grads), 5e25, rtol=1e-5)
  assert np.isnan(train_step.global_norm({"kernel": jnp.float32([jnp.nan, 1.0])}))
  assert not np.isfinite(train_step.global_norm({"kernel": jnp.float32([jnp.inf, 1.0])}))
  config = OptimConfig(learning_rate=0.1, warmup=0.0, max_grad_norm=limit)
  tx = train_step.make_optimizer(config, 10)
  state = train_step.init_state({"kernel": jnp.ones(2)}, tx)
  loss = lambda params, batch, key: (jnp.vdot(grads["kernel"], params["kernel"]), {})  # noqa: E731
  state, metrics = train_step.update(loss, tx, state, None, jax.random.key(0))
  assert metrics["skipped_steps"] == 0
  np.testing.assert_allclose(state.params["kernel"], [0.9, 1.1], rtol=1e-3)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_grad_norm_is_the_one_before_the_clip():
  tx = train_step.make_optimizer(OptimConfig(max_grad_norm=1e-3), 10)
  state = train_step.init_state(init_params(), tx)
  grads, _ = train_step.gradients(token_loss, init_params(), make_batch(), jax.random.key(0))
  _, metrics = train_step.update(token_loss, tx, state, make_batch(), jax.random.key(0))
  want = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(metrics["grad_norm"], want, rtol=1e-5)


@pytest.mark.parametrize(
  "settings, word",
  [
    ({"name": "sgd"}, "name must be one of adamw, adafactor, lion, muon"),
    ({"learning_rate": 0.0}, "learning_rate must be positive"),
    ({"eps": -1.0}, "eps must be positive"),
    ({"warmup": 1.0}, "warmup must be in"),
    ({"b2": 1.0}, "b2 must be in"),
    ({"weight_decay": -0.1}, "weight_decay must not be negative"),
    ({"max_grad_norm": -1.0}, "max_grad_norm must not be negative"),
  ],
)
def test_impossible_settings_are_refused(settings, word):
  with pytest.raises(ValueError, match=word):
    OptimConfig(**settings)


def test_merge_metrics():
  stacked = {
    "loss": jnp.float32([1.0, 3.0]),
    "ratio/max": jnp.float32([1.5, 1.2]),
    "error/min": jnp.float32([0.5, 0.2]),
    "weight": jnp.float32([3.0, 1.0]),
  }
  merged = {k: float(v) for k, v in train_step.merge_metrics(stacked).items()}
  assert merged["loss"] == 1.5
  assert merged["ratio/max"] == 1.5
  np.testing.assert_allclose(merged["error/min"], 0.2, rtol=1e-6)
  assert merged["weight"] == 4
  del stacked["weight"]
  assert train_step.merge_metrics(stacked)["loss"] == 2
  # Parts without a unit do not count, even if a single unit is left.
  one = {"loss": jnp.float32([jnp.nan, 3.0]), "weight": jnp.float32([0.0, 1.0])}
  assert train_step.merge_metrics(one)["loss"] == 3


def visits(epochs, minibatches, microbatches=1, rows=12, seed=0):
  """Rows that each optimizer step of `update_epochs` saw, [epochs, minibatches, rows]."""

  def loss(params, batch, key):
    del key
    # The gradient is a histogram of the rows: one-hot rows, summed.
    return jnp.mean(batch["one_hot"] @ params), {"seen": jnp.mean(batch["one_hot"], axis=0)}

  def loss_of_scalars(params, batch, key):
    value, metrics = loss(params, batch, key)
    return value, {f"seen_{i}": metrics["seen"][i] for i in range(rows)}

  tx = optax.sgd(1.0)
  state = train_step.init_state(jnp.zeros(rows), tx)
  state, metrics = train_step.update_epochs(
    loss_of_scalars,
    tx,
    state,
    {"one_hot": jnp.eye(rows)},
    jax.random.key(seed),
    epochs=epochs,
    minibatches=minibatches,
    microbatches=microbatches,
  )
  assert metrics["loss"].shape == (epochs * minibatches,)
  seen = np.stack([metrics[f"seen_{i}"] for i in range(rows)], axis=-1) * (rows // minibatches)
  return seen.reshape(epochs, minibatches, rows), state


@pytest.mark.parametrize("microbatches", [1, 2])
def test_every_row_is_visited_once_per_epoch_in_a_new_order(microbatches):
  seen, state = visits(epochs=4, minibatches=3, microbatches=microbatches)
  np.testing.assert_allclose(seen.sum(axis=1), np.ones((4, 12)), atol=1e-6)
  np.testing.assert_allclose(seen, np.round(seen), atol=1e-6)  # A row is there or it is not.
  orders = {tuple(np.round(epoch).argmax(axis=0)) for epoch in seen}
  assert len(orders) == 4
  assert state.step == 1, "an iteration is one step, however many updates it makes"
  # Each update moved by minus its rate times the mean of its rows.
  np.testing.assert_allclose(state.params, -4 * np.ones(12) / 4, atol=1e-6)
  other, _ = visits(epochs=4, minibatches=3, seed=1)
  assert (np.round(other) != np.round(seen)).any()


def test_split_epochs_gives_what_the_losses_of_update_epochs_read():
  def loss(params, batch, key):
    del key
    return jnp.mean(params * batch), {"tokens": jnp.max(batch)}  # Summed over micro-batches.

  tx, batch, key = optax.sgd(0.1), jnp.arange(24.0) ** 2, jax.random.key(3)
  sizes = {"epochs": 2, "minibatches": 3, "microbatches": 2}
  state = train_step.init_state(jnp.ones(()), tx)
  _, metrics = train_step.update_epochs(loss, tx, state, batch, key, **sizes)
  parts = train_step.split_epochs(batch, key, **sizes)
  assert parts.shape == (12, 4)
  np.testing.assert_array_equal(metrics["tokens"], parts.max(axis=1).reshape(6, 2).sum(axis=1))


def test_update_epochs_is_the_same_as_its_updates_one_by_one():
  tx = optax.adam(0.01)
  batch, key = make_batch(), jax.random.key(5)
  state = train_step.init_state(init_params(), tx)
  end, metrics = train_step.update_epochs(
    token_loss, tx, state, batch, key, epochs=1, minibatches=1
  )
  want, want_metrics = train_step.update(token_loss, tx, state, batch, key)
  assert_close(end.params, want.params, 1e-6)
  assert_close(jax.tree.map(lambda x: x[0], metrics), want_metrics, 1e-5)


def test_a_bad_minibatch_does_not_stop_the_others():
  tx = optax.adam(0.01)
  batch = make_batch()
  batch = batch._replace(target=batch.target.at[3, 0].set(jnp.nan))
  state = train_step.init_state(init_params(), tx)
  end, metrics = train_step.update_epochs(
    token_loss, tx, state, batch, jax.random.key(0), epochs=2, minibatches=4
  )
  assert np.sum(metrics["skipped_steps"]) == 2  # One minibatch of each epoch.
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(end.params))
  assert optax.tree.get(end.opt_state, "count") == 6


@pytest.mark.parametrize("size", [1e-30, 0.0, 0.1, 0.3, 1.0, 3e4, 1e20, 1e38])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 7.0])
def test_gradients_of_any_size_are_scaled_down_to_the_maximum(size, max_norm):
  direction = np.array([0.5, -0.25, 1.0, 0.0, 2.0], np.float32)
  gradients = {"a": jnp.asarray(size * direction[:2]), "b": jnp.asarray(size * direction[2:])}
  clipped, _ = jax.jit(train_step.clip_by_norm(max_norm).update)(gradients, optax.EmptyState())
  exact = size * direction.astype(np.float64)
  exact *= min(1.0, max_norm / max(np.linalg.norm(exact), 1e-300))
  got = np.concatenate([clipped["a"], clipped["b"]])
  np.testing.assert_allclose(got, exact, rtol=1e-6)
