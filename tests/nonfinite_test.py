"""The operation that made a value that is not finite is named, with its line."""

import inspect as python_inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import nonfinite, train_step


def log(x):
  return jnp.log(x - 1)  # PLANTED log


def masked(x):
  """An infinity that a mask removes, beside the fault."""
  harmless = jnp.where(x > 5, jnp.log(x - 1), 0.0)
  return harmless + jnp.sqrt(-x)  # PLANTED sqrt


def overflow(x):
  big = jnp.exp(x * 100)  # PLANTED exp
  return big - big


def scan(x):
  def body(carry, i):
    return carry * jnp.where(i == 2, jnp.inf, 1.0) * 0, carry  # PLANTED mul

  return jax.lax.scan(body, x, jnp.arange(4))[0]


def loop(x):
  def body(carry):
    i, x = carry
    return i + 1, x / jnp.where(i == 1, 0.0, 1.0)  # PLANTED div

  start = (0, jax.lax.stop_gradient(x) * 0)
  return jax.lax.while_loop(lambda carry: carry[0] < 3, body, start)[1]


def branch(x):
  return jax.lax.cond(x[0] > 0, lambda: jnp.arccosh(x * 0.5), lambda: x)  # PLANTED


@jax.checkpoint
def remat(x):
  return jax.jit(lambda x: jnp.log(-x))(x)  # PLANTED log


@jax.custom_vjp
def rule(x):
  return x


rule.defvjp(lambda x: (x, x), lambda x, g: (g * jnp.log(-x),))


def slope(x):
  return jnp.sqrt(x - x)  # PLANTED


FAULTS = [log, masked, overflow, scan, loop, branch, remat, slope]


def line_of(fault):
  source = getattr(fault, "__wrapped__", fault)
  lines = pathlib.Path(__file__).read_text().splitlines()
  start = python_inspect.getsourcelines(source)[1] - 1
  number = next(i for i in range(start, len(lines)) if "PLANTED" in lines[i])
  return number + 1, lines[number].partition("PLANTED")[2].strip()


def origins(fault):
  """Origins of what is not finite in a train step whose loss has a fault."""
  tx = optax.sgd(0.1)

  def loss(params, batch, key):
    x = params["w"] * batch
    return jnp.sum(fault(x)), {"largest": jnp.max(x)}

  state = train_step.init_state({"w": jnp.ones(3)}, tx)
  step = train_step.make_train_step(loss, tx)
  inspection = nonfinite.inspect(step, state, jnp.ones(3), jax.random.key(0))
  assert not inspection.inputs
  return inspection.origins


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_origin_is_named_with_its_line(fault):
  found = origins(fault)
  assert "largest" not in found
  first = found["grad_norm" if fault is slope else "loss"][0]
  line, operation = line_of(fault)
  assert f"{__file__}:{line}, " in first.place, first
  assert operation in ("", first.operation)
  assert bool(first.loops) == (fault in (scan, loop))


def test_a_gradient_has_the_place_of_its_function():
  (first,) = origins(rule)["grad_norm"]
  assert str(first).startswith("log: NaN in 3 of 3 values, the first at [0], in the gradient of ")
  assert "nonfinite_test.py" in first.place


def test_what_is_finite_has_no_origin():
  result = nonfinite.inspect(lambda x: (x, {"loss": jnp.sum(x)}), jnp.ones(3))
  assert (result.inputs, result.origins) == ([], {})


def test_an_input_that_is_not_finite_is_named():
  batch = {"scores": jnp.array([[1.0, 2.0], [np.inf, np.nan]]), "tokens": jnp.arange(3)}
  result = nonfinite.inspect(lambda x, b: (x, {"loss": jnp.sum(b["scores"])}), jnp.ones(3), batch)
  assert result.inputs == ["1/scores: NaN in 1 of 4 values, the first at [1, 1]"]
  assert result.origins == {"loss": []}


def test_steps_are_looked_into_where_it_is_asked_for():
  def step(state, batch, key):
    return state + 1, {"loss": jnp.log(batch)}

  assert type(train_step.jit_step(step)) is type(jax.jit(step))
  with nonfinite.looking():
    jitted = train_step.jit_step(step)
    outer = train_step.jit_step(lambda *inputs: jitted(*inputs))
    jitted(jnp.zeros(()), jnp.float32(-1), None)
    found = nonfinite.look()
    state, _ = outer(jnp.zeros(()), jnp.float32(-1), None)
  assert float(state) == 1
  (inspection,) = found
  assert [birth.operation for birth in inspection.origins["loss"]] == ["log"]
