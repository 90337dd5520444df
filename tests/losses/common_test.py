"""Tests that hold for every loss: padding changes nothing, every transformation and mesh agrees.

A function that takes no mask is used the way the algorithms use it, under `masked_mean`.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

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
# They make a function or arguments, or count and place tokens: there is nothing to differentiate.
WITHOUT_CASE = {
  "masked.elementwise",
  "policy_gradient.clip_range",
  *(f"packing.{name}" for name in ("first_fit", "places", "round_up", "pack", "take")),
  *(f"packing.{name}" for name in ("separate", "first_places", "reunite", "apart")),
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


# Arguments of a case, a mask and arrays, by what a test varies.


def plain(case: Case):
  rng = np.random.default_rng(0)
  if len(case.mask_shape) == 1:
    mask = np.arange(B) % 3 != 0
  else:  # Right padding, from full rows to an empty one.
    length = case.mask_shape[1]
    mask = np.arange(length) < (np.arange(B) % (length + 1))[::-1, None]
  return mask, *(rng.normal(size=shape).astype(np.float32) for shape in case.shapes)


def padded_with(case: Case, filling: float):
  mask, *arrays = plain(case)
  for i in case.padded:
    arrays[i][~mask] = filling
  return mask, *arrays


def all_masked(case: Case):
  mask, *arrays = plain(case)
  return np.zeros_like(mask), *arrays


def alternating(case: Case, size: float, negated: int):
  mask, *arrays = plain(case)
  arrays = [np.where(np.arange(x.size).reshape(x.shape) % 2, size, 0.0) for x in arrays]
  return mask, *((x if i != negated else -x).astype(np.float32) for i, x in enumerate(arrays))


def scaled(case: Case, scale: float):
  mask, *arrays = plain(case)
  return mask, *(np.float32(scale) * x for x in arrays)


def stacked(case: Case, *scales: float):
  mask, *arrays = plain(case)
  return mask, *(np.stack([np.float32(scale) * x for scale in scales]) for x in arrays)


def rounded(case: Case, dtype: str):
  """Numbers that bfloat16 has."""
  mask, *arrays = plain(case)
  return mask, *(jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in arrays)


def with_hyperparameters(case: Case, *scales: float):
  return {key: np.float32(scales) * value for key, value in case.hyper.items()}, *plain(case)


# Functions of a case and its arguments.


def value(case: Case, *arguments):
  return case.call(*arguments, **case.hyper)


def value_and_grads(case: Case, *arguments):
  call = functools.partial(case.call, **case.hyper)
  return jax.value_and_grad(call, argnums=tuple(range(1, 1 + len(case.shapes))))(*arguments)


def mapped(case: Case, mask, *arrays):
  return jax.vmap(functools.partial(value, case, mask))(*arrays)


def mapped_over_hyperparameters(case: Case, hyper, *arguments):
  return jax.vmap(lambda hyper: case.call(*arguments, **hyper))(hyper) if hyper else None


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
  """`{name: arguments} -> {name: result}`: most of the time of small programs is their number."""

  def call(arguments):
    results = {}
    for name, x in arguments.items():
      try:
        results[name] = function(CASES[name], *x)
      except Exception as error:
        error.add_note(f"in the case {name}")
        raise
    return results

  return jax.jit(call)


@functools.cache
def of_module(module: str, axis_type: AxisType | None, function, arguments_of, *options):
  """The results of all cases of a module, by name; with rows on 8 devices if there are axes."""
  arguments = {
    name: arguments_of(case, *options)
    for name, case in CASES.items()
    if name.startswith(f"{module}.")
  }
  if axis_type is None:
    return jax.device_get(compiled(function)(arguments))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
  with jax.set_mesh(mesh):
    placed = jax.device_put(arguments, NamedSharding(mesh, P("data")))
    return jax.device_get(compiled(function)(placed))


def compute(name: str, function, arguments_of, *options, axis_type: AxisType | None = None):
  """`function(case, *arguments_of(case, *options))`."""
  return of_module(name.partition(".")[0], axis_type, function, arguments_of, *options)[name]


@CASE
def test_padding_changes_nothing(name):
  case = CASES[name]
  mask, *_ = plain(case)
  assert mask.any() and not mask.all()
  want, want_grads = compute(name, value_and_grads, padded_with, 0.0)
  assert np.isfinite(want) and want != 0
  for bad in (np.nan, 1e30, -1e30, np.inf, -np.inf):
    got, grads = compute(name, value_and_grads, padded_with, bad)
    np.testing.assert_array_equal(got, want)
    jax.tree.map(np.testing.assert_array_equal, grads, want_grads)
  for i in case.padded:
    assert (want_grads[i][~mask] == 0).all(), f"gradient at padding of argument {i}"


@CASE
def test_everything_masked_is_finite(name):
  got, grads = compute(name, value_and_grads, all_masked)
  assert np.isfinite(got)
  assert all(np.isfinite(g).all() for g in grads)


@CASE
def test_gradients_are_finite_at_extreme_inputs(name):
  """Differences of log-probabilities of up to 200 nats, either way."""
  for size in (200.0, -200.0):
    for negated in range(len(CASES[name].shapes)):
      got, grads = compute(name, value_and_grads, alternating, size, negated)
      assert np.isfinite(got)
      assert all(np.isfinite(g).all() for g in grads)


@CASE
def test_jit_changes_nothing(name):
  case = CASES[name]
  mask, *arrays = plain(case)
  want = value(case, mask, *map(jnp.asarray, arrays))
  got, _ = compute(name, value_and_grads, plain)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@CASE
def test_vmap_is_a_loop(name):
  scales = 1.0, 0.5, -1.0
  many = compute(name, mapped, stacked, *scales)
  each = [compute(name, value_and_grads, scaled, scale)[0] for scale in scales]
  np.testing.assert_allclose(many, each, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.hyper])
def test_vmap_over_hyperparameters_is_a_loop(name):
  case = CASES[name]
  scales = 1.0, 0.5, 0.9
  many = compute(name, mapped_over_hyperparameters, with_hyperparameters, *scales)
  values, *arguments = with_hyperparameters(case, *scales)
  each = [
    case.call(*arguments, **{key: float(value[i]) for key, value in values.items()})
    for i in range(3)
  ]
  np.testing.assert_allclose(many, each, rtol=1e-5, atol=1e-6)


@CASE
def test_bfloat16_inputs_are_computed_in_float32(name):
  """A result from bfloat16 inputs is that from the same numbers in float32."""
  got = compute(name, value, rounded, "bfloat16")
  assert got.dtype == jnp.float32
  want, _ = compute(name, value_and_grads, rounded, "float32")
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@CASE
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_rows(name, axis_type):
  want = compute(name, value_and_grads, plain)
  got = compute(name, value_and_grads, plain, axis_type=axis_type)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
