import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.losses import kl, logprobs, masked
from tests.losses.case import B, Case, T, V


def log_softmax(logits):
  """In float64."""
  x = np.asarray(logits).astype(np.float64)
  top = x.max(axis=-1, keepdims=True)
  return x - top - np.log(np.exp(x - top).sum(axis=-1, keepdims=True))


def random_logits(shape, scale=3.0, seed=0):
  rng = np.random.default_rng(seed)
  logits = (scale * rng.normal(size=shape)).astype(np.float32)
  return logits, rng.integers(shape[-1], size=shape[:-1]).astype(np.int32)


def pick(table, targets):
  """Entry `targets[i]` of row i, one index at a time."""
  return np.array([table[i][targets[i]] for i in np.ndindex(targets.shape)]).reshape(targets.shape)


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (2, 3, 5, 7), (1, 1, 1)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_token_logprobs_match_float64(shape, scale):
  logits, targets = random_logits(shape, scale)
  result = logprobs.token_logprobs(logits, targets)
  assert result.dtype == jnp.float32
  np.testing.assert_allclose(result, pick(log_softmax(logits), targets), rtol=1e-6, atol=1e-6)


def test_token_logprobs_keep_small_values_beside_large_logits():
  logits = np.float32([[[100.0, 88.0]]])  # log p = -log(1 + e^-12) = -6.1e-6.
  result = logprobs.token_logprobs(logits, np.zeros((1, 1), np.int32))
  np.testing.assert_allclose(result, -np.log1p(np.exp(-12.0)), rtol=0.01)


def test_token_logprobs_of_bfloat16_are_computed_in_float32():
  logits, targets = random_logits((4, 512))
  logits = jnp.asarray(logits, jnp.bfloat16)
  result = logprobs.token_logprobs(logits, targets)
  assert result.dtype == jnp.float32
  np.testing.assert_allclose(result, pick(log_softmax(logits), targets), rtol=1e-6, atol=1e-6)
  # Were a softmax taken in bfloat16, the probability of a sequence would be off by per cents.
  assert jax.grad(lambda x: logprobs.token_logprobs(x, targets).sum())(logits).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.uint32])
def test_token_logprobs_accept_narrow_token_types(dtype):
  logits, targets = random_logits((4, 300))
  targets %= 100  # Fits every type, though the vocabulary does not.
  result = logprobs.token_logprobs(logits, targets.astype(dtype))
  np.testing.assert_allclose(result, pick(log_softmax(logits), targets), rtol=1e-6, atol=1e-6)


def test_token_logprobs_gradient_is_one_hot_minus_softmax():
  logits, targets = random_logits((3, 5, 7))
  grad = jax.grad(lambda x: jnp.sum(logprobs.token_logprobs(x, targets)))(logits)
  want = np.eye(7)[targets] - np.exp(log_softmax(logits))
  np.testing.assert_allclose(grad, want, atol=1e-6)


def test_token_logprobs_with_excluded_tokens():
  logits, targets = random_logits((6, 9))
  excluded = (np.arange(9) + 1) % 9 == targets[:, None]
  logits = np.where(excluded, -np.inf, logits).astype(np.float32)
  value, grad = jax.value_and_grad(lambda x: jnp.sum(logprobs.token_logprobs(x, targets)))(logits)
  np.testing.assert_allclose(value, pick(log_softmax(logits), targets).sum(), rtol=1e-6)
  assert np.isfinite(grad).all()
  assert (np.asarray(grad)[excluded] == 0).all()


def test_next_token_logprobs_shift_by_one():
  logits, tokens = random_logits((3, 5, 7))
  table = log_softmax(logits)
  want = np.zeros((3, 5))
  for b in range(3):
    for t in range(1, 5):
      want[b, t] = table[b, t - 1, tokens[b, t]]
  np.testing.assert_allclose(logprobs.next_token_logprobs(logits, tokens), want, atol=1e-6)
  # The output after the last token predicts nothing that is there.
  logits[:, -1] = np.nan
  np.testing.assert_allclose(logprobs.next_token_logprobs(logits, tokens), want, atol=1e-6)


@pytest.mark.parametrize("targets", [(3, 4), (2, 5), (3, 5, 7), (5,)])
@pytest.mark.parametrize("function", [logprobs.token_logprobs, logprobs.next_token_logprobs])
def test_bad_shapes_are_refused(function, targets):
  with pytest.raises(AssertionError):
    function(jnp.zeros((3, 5, 7)), jnp.zeros(targets, jnp.int32))


def test_entropy_matches_float64():
  logits, _ = random_logits((4, 6, 9))
  table = log_softmax(logits)
  want = np.zeros((4, 6))
  for b, t, v in np.ndindex(4, 6, 9):
    want[b, t] -= np.exp(table[b, t, v]) * table[b, t, v]
  result = logprobs.entropy(logits)
  np.testing.assert_allclose(result, want, rtol=1e-5)
  assert logprobs.entropy(jnp.asarray(logits, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("n", [1, 2, 5])
def test_entropy_of_uniform_over_the_allowed_tokens(n):
  logits = jnp.where(jnp.arange(8) < n, 2.5, -jnp.inf)
  value, grad = jax.value_and_grad(lambda x: jnp.sum(logprobs.entropy(x)))(logits)
  np.testing.assert_allclose(value, np.log(n), atol=1e-6)
  np.testing.assert_allclose(grad, np.zeros(8), atol=1e-6)  # The maximum; NaN is not close to 0.


def test_entropy_gradient():
  logits, _ = random_logits((9,))
  table = log_softmax(logits)
  p = np.exp(table)
  want = -p * (table - (p * table).sum())
  np.testing.assert_allclose(jax.grad(logprobs.entropy)(logits), want, atol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("function", [logprobs.token_logprobs, logprobs.next_token_logprobs])
def test_sharded_vocabulary(axis_type, function):
  mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(axis_type,) * 2)
  logits, targets = random_logits((4, 6, 16))

  def loss(logits, targets):
    return jnp.sum(jnp.sin(function(logits, targets)))

  # On one device first: the mesh is not set yet.
  want, want_grad = jax.device_get(jax.jit(jax.value_and_grad(loss))(logits, targets))
  with jax.set_mesh(mesh):
    place = NamedSharding(mesh, P("data", None, "vocab"))
    x = jax.device_put(logits, place)
    y = jax.device_put(targets, NamedSharding(mesh, P("data", None)))
    step = jax.jit(jax.value_and_grad(loss)).lower(x, y).compile()
    value, grad = step(x, y)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  np.testing.assert_allclose(grad, want_grad, atol=1e-6)
  assert grad.sharding.is_equivalent_to(place, grad.ndim)
  # No device ever sees the logits of the whole vocabulary.
  assert "all-gather" not in step.as_text()
  assert "f32[2,6,16]" not in step.as_text()


def lazy_logits(chunk, shape=(3, 7, 5, 11), softcap=4.0, seed=0, kept=0, scored=0):
  """Lazy logits [B, T, V], their hidden states and kernel, and the targets; shape is B, T, D, V."""
  rows, length, width, size = shape
  rng = np.random.default_rng(seed)
  hidden = rng.normal(size=(rows, length, width)).astype(np.float32)
  kernel = rng.normal(size=(width, size)).astype(np.float32)
  targets = rng.integers(size, size=(rows, length)).astype(np.int32)

  def read_out(params, hidden):
    logits = hidden @ params["kernel"]
    return softcap * jnp.tanh(logits / softcap) if softcap else logits

  def make(hidden, kernel):
    return logprobs.LazyLogits(hidden, {"kernel": kernel}, read_out, chunk, kept, scored)

  return make, hidden, kernel, targets


OVER_LOGITS = {
  "token_logprobs": logprobs.token_logprobs,
  "next_token_logprobs": logprobs.next_token_logprobs,
  "entropy": lambda logits, targets: logprobs.entropy(logits),
  "two at once": lambda logits, targets: sum(
    logprobs.over_next_tokens(
      lambda targets, logits: (
        logprobs.token_logprobs(logits / 0.7, targets),
        logprobs.entropy(logits / 0.7),
      ),
      targets,
      logits,
    )
  ),
}


@pytest.mark.parametrize(("chunk", "kept"), [(1, 0), (3, 7), (4, 6), (7, 0), (100, 100)])
@pytest.mark.parametrize("name", OVER_LOGITS)
def test_lazy_logits_change_neither_values_nor_gradients(name, chunk, kept):
  make, hidden, kernel, targets = lazy_logits(chunk, kept=kept)
  weights = np.random.default_rng(1).normal(size=targets.shape).astype(np.float32)

  def loss(hidden, kernel, *, lazy):
    logits = make(hidden, kernel)
    if not lazy:
      logits = logits.read_out(logits.params, hidden)
    values = OVER_LOGITS[name](logits, targets)
    return jnp.sum(weights * values), values

  def run(lazy):
    loss_of = functools.partial(loss, lazy=lazy)
    return jax.jit(jax.value_and_grad(loss_of, (0, 1), has_aux=True))(hidden, kernel)

  (_, values), grads = run(lazy=True)
  (_, want), want_grads = run(lazy=False)
  np.testing.assert_allclose(values, want, rtol=1e-6, atol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6), grads, want_grads
  )


@pytest.mark.parametrize("kept", [0, 7])
def test_a_target_is_looked_up_or_summed_over_a_mask_to_the_same_numbers(kept):
  make, hidden, kernel, targets = lazy_logits(chunk=3, kept=kept)

  def loss(hidden, kernel, looked_up):
    lazy = dataclasses.replace(make(hidden, kernel), looked_up=looked_up)
    scores = logprobs.token_scores(lazy, targets, temperature=0.7, entropy=True, hits=True)
    return jnp.sum(jnp.sin(scores.logprobs) + scores.entropy), scores

  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
  want, found = run(hidden, kernel, False), run(hidden, kernel, True)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6), found, want)
  texts = [run.lower(hidden, kernel, looked_up).as_text() for looked_up in (False, True)]
  assert ["gather" in text for text in texts] == [False, True]


@pytest.mark.parametrize("looked_up", [False, True])
@pytest.mark.parametrize("kept", [0, 7])
@pytest.mark.parametrize("bad", [-np.inf, np.inf, np.nan])
def test_tokens_without_a_finite_logit_pass_no_gradient(bad, kept, looked_up):
  make, hidden, kernel, targets = lazy_logits(chunk=3, kept=kept)
  hidden[:, 2, 0] = 99.0  # Marks the tokens to spoil.
  spoilt = np.arange(targets.shape[1]) == 2

  def gradients(bad):
    def loss(hidden, kernel):
      lazy = make(hidden, kernel)

      def read_out(params, x):
        return lazy.read_out(params, x) + jnp.where(x[..., :1] == 99.0, bad, 0.0)

      spoiling = dataclasses.replace(lazy, read_out=read_out, looked_up=looked_up)
      scores = logprobs.token_scores(spoiling, targets, entropy=True)
      return jnp.sum(jnp.where(spoilt, 0.0, scores.logprobs + 0.3 * scores.entropy))

    return jax.jit(jax.grad(loss, (0, 1)))(hidden, kernel)

  for got, want in zip(gradients(bad), gradients(0.0), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_lazy_logits_match_float64():
  make, hidden, kernel, targets = lazy_logits(chunk=2)
  table = log_softmax(4 * np.tanh(hidden.astype(np.float64) @ kernel / 4))
  result = jax.jit(lambda *x: logprobs.token_logprobs(make(*x), targets))(hidden, kernel)
  np.testing.assert_allclose(result, pick(table, targets), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lazy", [False, True])
def test_scores_match_float64(lazy):
  make, hidden, kernel, targets = lazy_logits(chunk=3)
  table = log_softmax(4 * np.tanh(hidden.astype(np.float64) @ kernel / 4) / 0.7)

  @jax.jit
  def scores(targets, *x):
    logits = make(*x)
    logits = logits if lazy else logits.read_out(logits.params, logits.hidden)
    ask = {"entropy": True, "hits": True, "collision": True}
    return logprobs.token_scores(logits, targets, temperature=0.7, **ask)

  result, p = scores(targets, hidden, kernel), np.exp(table)
  np.testing.assert_allclose(result.logprobs, pick(table, targets), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(result.entropy, -(p * table).sum(-1), rtol=1e-5)
  np.testing.assert_array_equal(result.hits, table.argmax(-1) == targets)
  np.testing.assert_allclose(result.collision, np.log((p**2).sum(-1)), rtol=1e-5)
  assert 0 < result.hits.sum() < result.hits.size
  # In a compiled program the logits and their maximum may be rounded differently.
  assert scores(table.argmax(-1), hidden, kernel).hits.all()


SCORED = np.array([[t in row for t in range(7)] for row in ([1, 3, 4], [6], [])])


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(("chunk", "kept"), [(1, 0), (2, 3), (100, 100)])
@pytest.mark.parametrize("function", ["scores", "nll"])
def test_scored_positions_have_the_values_and_gradients_of_all_positions(
  function, chunk, kept, softcap
):
  make, hidden, kernel, tokens = lazy_logits(chunk, softcap=softcap, kept=kept, scored=3)
  weights = SCORED * np.random.default_rng(1).normal(size=tokens.shape).astype(np.float32)

  def loss(hidden, kernel, *, lazy):
    logits = make(hidden, kernel)
    logits = logits if lazy else logits.read_out(logits.params, hidden)
    if function == "nll":
      total, scores = logprobs.next_token_nll(logits, tokens, weights, hits=True)
      total = jnp.square(total)  # The gradient from outside is not 1.
    else:
      scores = logprobs.next_token_scores(
        logits, tokens, SCORED, temperature=0.7, entropy=True, hits=True
      )
      total = jnp.sum(weights * (jnp.sin(scores.logprobs) + jnp.cos(scores.entropy)))
    return total, scores

  def run(lazy):
    loss_of = functools.partial(loss, lazy=lazy)
    return jax.jit(jax.value_and_grad(loss_of, (0, 1), has_aux=True))(hidden, kernel)

  (value, scores), grads = run(lazy=True)
  (want, want_scores), want_grads = run(lazy=False)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  for x, y in zip(jax.tree.leaves(scores), jax.tree.leaves(want_scores), strict=True):
    np.testing.assert_allclose(x, y * SCORED, rtol=1e-5, atol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5), grads, want_grads
  )


def test_rows_with_more_tokens_than_are_scored_are_nan():
  make, hidden, kernel, tokens = lazy_logits(chunk=2, scored=2)
  scores = logprobs.next_token_scores(make(hidden, kernel), tokens, SCORED)
  np.testing.assert_array_equal(np.isnan(scores.logprobs).all(axis=1), [True, False, False])
  total, _ = logprobs.next_token_nll(make(hidden, kernel), tokens, SCORED.astype(np.float32))
  assert np.isnan(total)
  total, _ = logprobs.next_token_nll(make(hidden, kernel), tokens, SCORED * [[0], [1], [1]])
  assert np.isfinite(total)


@pytest.mark.parametrize("scored", [0, 4])
def test_nothing_predicts_the_first_token(scored):
  make, hidden, kernel, tokens = lazy_logits(chunk=2, scored=scored)

  @jax.jit
  def run(mask):
    lazy = make(hidden, kernel)
    total, _ = logprobs.next_token_nll(lazy, tokens, mask.astype(jnp.float32))
    return total, logprobs.next_token_scores(lazy, tokens, mask).logprobs

  (total, logprobs_of), (want, _) = run(SCORED | (np.arange(7) == 0)), run(SCORED)
  assert total == want and not logprobs_of[:, 0].any()


@pytest.mark.parametrize("lazy", [False, True])
def test_half_precision_logits_are_widened_before_the_temperature(lazy):
  hidden, targets = random_logits((3, 7, 50))
  hidden = jnp.asarray(20 * hidden, jnp.bfloat16)

  def loss(x):
    x = logprobs.LazyLogits(x, (), lambda _, hidden: hidden, chunk=3) if lazy else x
    scores = logprobs.token_scores(x, targets, temperature=0.7, entropy=True)
    return jnp.sum(scores.logprobs + scores.entropy), scores

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (_, got), grad = run(hidden)
  (_, want), want_grad = run(hidden.astype(jnp.float32))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), got, want)
  assert grad.dtype == jnp.bfloat16
  np.testing.assert_allclose(grad.astype(jnp.float32), want_grad, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_scored_positions_on_a_mesh(axis_type):
  make, hidden, kernel, tokens = lazy_logits(chunk=2, shape=(8, 7, 5, 16), scored=3, softcap=None)
  mask = np.resize(SCORED, (8, 7))

  def loss(hidden, kernel, tokens, mask):
    logits, weights = make(hidden, kernel), mask / jnp.sum(mask)
    total, _ = logprobs.next_token_nll(logits, tokens, weights)
    return total + jnp.sum(weights * logprobs.next_token_scores(logits, tokens, mask).logprobs ** 2)

  step = jax.value_and_grad(loss, (0, 1))
  want = jax.device_get(jax.jit(step)(hidden, kernel, tokens, mask))
  mesh = jax.make_mesh((4, 2), ("data", "vocab"), axis_types=(axis_type,) * 2)
  with jax.set_mesh(mesh):
    rows, columns = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "vocab"))
    inputs = jax.device_put((hidden, kernel, tokens, mask), (rows, columns, rows, rows))
    got = jax.device_get(jax.jit(step)(*inputs))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_tokens_without_a_weight_may_have_no_likelihood():
  logits, tokens = random_logits((3, 7, 5))
  weights = np.ones(tokens.shape, np.float32)
  weights[:, 0] = weights[1, 4:] = 0
  logits[1, 3:] = np.nan

  def loss(x):
    return logprobs.next_token_nll(x, tokens, weights)[0]

  value, grad = jax.jit(jax.value_and_grad(loss))(logits)
  want = -np.nansum(weights[:, 1:] * pick(log_softmax(logits)[:, :-1], tokens[:, 1:]))
  np.testing.assert_allclose(value, want, rtol=1e-5)
  assert np.isfinite(grad).all()
  lazy = logprobs.LazyLogits(jnp.asarray(logits), (), lambda _, hidden: hidden, chunk=2)
  lazy_value, lazy_grad = jax.jit(jax.value_and_grad(loss, allow_int=True))(lazy)
  np.testing.assert_allclose(lazy_value, value, rtol=1e-6)
  np.testing.assert_allclose(lazy_grad.hidden, grad, atol=1e-6)


def products(function, *inputs):
  """Sizes of the products with the kernel in a compiled function: tokens per call, for each."""
  text = jax.jit(function).lower(*inputs).compile().as_text()
  return [line for line in text.splitlines() if re.search(r"\b(dot|custom-call)\(", line)]


@pytest.mark.parametrize(
  ("name", "kept", "count"), [("nll", 0, 3), ("scores", 7, 3), ("scores", 0, 4)]
)
def test_products_with_the_output_matrix(name, kept, count):
  """One forward and two backward; logits that are not kept are computed once more."""
  make, hidden, kernel, tokens = lazy_logits(chunk=4, softcap=None, kept=kept)
  weights = np.ones(tokens.shape, np.float32)

  def loss(*x):
    if name == "nll":
      return logprobs.next_token_nll(make(*x), tokens, weights)[0]
    return jnp.sum(jnp.sin(logprobs.next_token_scores(make(*x), tokens).logprobs))

  assert len(products(jax.value_and_grad(loss, (0, 1)), hidden, kernel)) == count


def test_two_lazy_inputs_are_cut_at_the_same_tokens():
  make, hidden, kernel, _ = lazy_logits(chunk=3)
  other = logprobs.LazyLogits(hidden, {"kernel": -kernel}, make(hidden, kernel).read_out, 100)
  divergence = jax.jit(lambda *x: logprobs.over_tokens(kl.full_kl, *x))(make(hidden, kernel), other)
  p, q = (log_softmax(4 * np.tanh(sign * hidden @ kernel / 4)) for sign in (1, -1))
  np.testing.assert_allclose(divergence, (np.exp(p) * (p - q)).sum(-1), rtol=1e-4)


def test_lazy_logits_of_another_length_than_the_tokens_are_refused():
  make, hidden, kernel, targets = lazy_logits(chunk=2)
  with pytest.raises(AssertionError):
    logprobs.token_logprobs(make(hidden, kernel), targets[:, :-1])


def test_lazy_logits_on_a_mesh_are_never_gathered():
  mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)
  make, hidden, kernel, targets = lazy_logits(chunk=4, shape=(4, 12, 8, 64))

  def loss(hidden, kernel, targets):
    return jnp.sum(jnp.sin(logprobs.token_logprobs(make(hidden, kernel), targets)))

  function = jax.jit(jax.value_and_grad(loss, (0, 1)))
  want, want_grads = jax.device_get(function(hidden, kernel, targets))
  places = [NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "vocab"))]
  placed = jax.device_put((hidden, kernel, targets), (*places, places[0]))
  step = function.lower(*placed).compile()
  value, grads = step(*placed)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  for grad, want_grad, place in zip(grads, want_grads, places, strict=True):
    np.testing.assert_allclose(grad, want_grad, atol=1e-5)
    assert grad.sharding.is_equivalent_to(place, grad.ndim)
  # A device holds its rows and its part of the vocabulary, for one piece: 2 rows, 4 tokens, 16 ids.
  assert "f32[2,4,16]" in step.as_text()
  assert "all-gather" not in step.as_text()
  assert not re.search(r"f32\[(\d+,)*64\]", step.as_text())


def tokens_for(logits):
  return jax.lax.broadcasted_iota(jnp.int32, logits.shape[:-1], 1) % V


def test_shifted_keeps_the_distribution_and_flags_rows_without_one():
  logits, _ = random_logits((4, V), scale=30.0)
  logits[1, 0], logits[2, 0], logits[3] = -np.inf, np.nan, -np.inf
  result, fine = logprobs.shifted(jnp.asarray(logits))
  np.testing.assert_array_equal(fine, [True, True, False, False])
  assert (result[:2].max(axis=-1) == 0).all() and (result[2:] == 0).all()
  np.testing.assert_allclose(log_softmax(result[:1]), log_softmax(logits[:1]), rtol=1e-5, atol=1e-5)


def over_logits(function):
  """A function of logits to [B, T], used under a mask."""
  return Case(lambda m, x: masked.masked_mean(function(x), m), ((B, T, V),))


CASES = {
  "shifted": over_logits(lambda x: jnp.sum(jnp.tanh(logprobs.shifted(x)[0]), axis=-1)),
  "token_logprobs": over_logits(lambda x: logprobs.token_logprobs(x, tokens_for(x))),
  "entropy": over_logits(logprobs.entropy),
  "token_scores": over_logits(lambda x: logprobs.token_scores(x, tokens_for(x)).logprobs),
  "token_scores/entropy": over_logits(
    lambda x: logprobs.token_scores(x, tokens_for(x), temperature=0.7, entropy=True).entropy
  ),
  "next_token_scores": Case(
    lambda m, x: masked.masked_mean(
      logprobs.next_token_scores(x, tokens_for(x), collision=True).logprobs[:, 1:], m[:, :-1]
    ),
    ((B, T, V),),
  ),
  "next_token_nll": Case(
    lambda m, x: logprobs.next_token_nll(
      x, tokens_for(x), jnp.pad(m[:, :-1], ((0, 0), (1, 0))) / jnp.maximum(jnp.sum(m[:, :-1]), 1)
    )[0],
    ((B, T, V),),
  ),
  "over_tokens": over_logits(lambda x: logprobs.over_tokens(logprobs.entropy, x)),
  # The last column of logits predicts nothing: here the mask is that of the logits.
  "next_token_logprobs": Case(
    lambda m, x: masked.masked_mean(
      logprobs.next_token_logprobs(x, tokens_for(x))[:, 1:], m[:, :-1]
    ),
    ((B, T, V),),
  ),
  "over_next_tokens": Case(
    lambda m, x: masked.masked_mean(
      logprobs.over_next_tokens(
        lambda targets, x: logprobs.token_logprobs(x, targets), tokens_for(x), x
      )[:, 1:],
      m[:, :-1],
    ),
    ((B, T, V),),
  ),
}
