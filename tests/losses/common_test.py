"""Tests that hold for every loss: padding changes nothing, every transformation and mesh agrees.

A function that takes no mask is used the way the algorithms use it, under `masked_mean`.
"""

import functools
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax import losses
from tests.losses.case import B, Case

MODULES = {name: importlib.import_module(f"tests.losses.{name}_test") for name in losses.__all__}
CASES: dict[str, Case] = {
  f"{module}.{name}": case
  for module, tests in MODULES.items()
  for name, case in tests.CASES.items()
}
CASE = pytest.mark.parametrize("name", CASES)
# They make a function, or count and place tokens: there is nothing to differentiate.
WITHOUT_CASE = {
  "masked.elementwise",
  *(f"packing.{name}" for name in ("first_fit", "places", "round_up", "pack", "take")),
}


def test_every_public_function_has_a_case():
  public = {
    f"{module}.{name}"
    for module in losses.__all__
    for name, value in vars(getattr(losses, module)).items()
    if inspect.isfunction(value)
    and not name.startswith("_")
    and value.__module__ == f"rlhf_jax.losses.{module}"
  }
  assert public - WITHOUT_CASE == {name.partition("/")[0] for name in CASES}


def inputs_of(case: Case):
  rng = np.random.default_rng(0)
  if len(case.mask_shape) == 1:
    mask = np.arange(B) % 3 != 0
  else:  # Right padding, from full rows to an empty one.
    length = case.mask_shape[1]
    mask = np.arange(length) < (np.arange(B) % (length + 1))[::-1, None]
  return mask, [rng.normal(size=shape).astype(np.float32) for shape in case.shapes]


def poison(case: Case, mask, arrays, value):
  poisoned = [x.copy() for x in arrays]
  for i in case.padded:
    poisoned[i][~mask] = value
  return poisoned


def value_and_grads(case: Case):
  call = functools.partial(case.call, **case.hyper)
  return jax.value_and_grad(call, argnums=tuple(range(1, 1 + len(case.shapes))))


@functools.cache
def compiled(name: str):
  """The same for all tests of a case: most of their time is compiling."""
  return jax.jit(value_and_grads(CASES[name]))


@CASE
def test_padding_changes_nothing(name):
  case = CASES[name]
  mask, arrays = inputs_of(case)
  assert mask.any() and not mask.all()
  function = compiled(name)
  want, want_grads = function(mask, *poison(case, mask, arrays, 0.0))
  assert np.isfinite(want) and want != 0
  for bad in (np.nan, 1e30, -1e30, np.inf, -np.inf):
    value, grads = function(mask, *poison(case, mask, arrays, bad))
    np.testing.assert_array_equal(value, want)
    jax.tree.map(np.testing.assert_array_equal, grads, want_grads)
  for i in case.padded:
    assert (np.asarray(want_grads[i])[~mask] == 0).all(), f"gradient at padding of argument {i}"


@CASE
def test_everything_masked_is_finite(name):
  case = CASES[name]
  mask, arrays = inputs_of(case)
  value, grads = compiled(name)(np.zeros_like(mask), *arrays)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in grads)


@CASE
def test_gradients_are_finite_at_extreme_inputs(name):
  """Differences of log-probabilities of up to 200 nats, either way."""
  case = CASES[name]
  mask, arrays = inputs_of(case)
  function = compiled(name)
  for scale in (200.0, -200.0):
    extreme = [np.where(np.arange(x.size).reshape(x.shape) % 2, scale, 0.0) for x in arrays]
    for shifted in range(len(arrays)):
      moved = [(x if i != shifted else -x).astype(np.float32) for i, x in enumerate(extreme)]
      value, grads = function(mask, *moved)
      assert np.isfinite(value)
      assert all(np.isfinite(g).all() for g in grads)


@CASE
def test_jit_changes_nothing(name):
  case = CASES[name]
  mask, arrays = inputs_of(case)
  want = case.call(mask, *map(jnp.asarray, arrays), **case.hyper)
  np.testing.assert_allclose(compiled(name)(mask, *arrays)[0], want, rtol=1e-5, atol=1e-6)


@CASE
def test_vmap_is_a_loop(name):
  case = CASES[name]
  mask, arrays = inputs_of(case)
  function = functools.partial(case.call, **case.hyper)
  stacked = [np.stack([x, 0.5 * x, -x]) for x in arrays]
  many = jax.jit(jax.vmap(functools.partial(function, mask)))(*stacked)
  each = [compiled(name)(mask, *(x[i] for x in stacked))[0] for i in range(3)]
  np.testing.assert_allclose(many, each, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.hyper])
def test_vmap_over_hyperparameters_is_a_loop(name):
  case = CASES[name]
  mask, arrays = inputs_of(case)
  scales = np.float32([1.0, 0.5, 0.9])
  values = {key: value * scales for key, value in case.hyper.items()}
  many = jax.jit(jax.vmap(lambda hyper: case.call(mask, *arrays, **hyper)))(values)
  each = [
    case.call(mask, *arrays, **{key: float(value[i]) for key, value in values.items()})
    for i in range(3)
  ]
  np.testing.assert_allclose(many, each, rtol=1e-5, atol=1e-6)


@CASE
def test_bfloat16_inputs_are_computed_in_float32(name):
  """A result from bfloat16 inputs is that from the same numbers in float32."""
  case = CASES[name]
  mask, arrays = inputs_of(case)
  narrow = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
  function = jax.jit(functools.partial(case.call, **case.hyper))
  value = function(mask, *narrow)
  assert value.dtype == jnp.float32
  want = function(mask, *(x.astype(jnp.float32) for x in narrow))
  np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)


@CASE
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_rows(name, axis_type):
  case = CASES[name]
  mask, arrays = inputs_of(case)
  want = jax.device_get(compiled(name)(mask, *arrays))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
  with jax.set_mesh(mesh):
    place = NamedSharding(mesh, P("data"))
    result = jax.jit(value_and_grads(case))(*jax.device_put((mask, *arrays), place))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result, want)
