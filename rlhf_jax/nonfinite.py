"""The operation that made the first value that is not finite.

A step is traced, and its operations are run one by one. A value that is not finite remembers the
operations that made such values out of finite ones, so an infinity that a mask removes is not
blamed for a loss that is NaN.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # Params that hold what a call runs.
_Origins = frozenset[int]


class Birth(NamedTuple):
  """An operation that made a value that is not finite.

  Attributes:
    operation: Name of the operation, such as log.
    value: The value, such as "NaN in 3 of 512 values, the first at [0, 3]".
    place: File, line and function of the source.
    loops: Loop iterations around it, such as ", scan 3 of 12"; empty outside of loops.
    backward: True in the gradient of the source.
  """

  operation: str
  value: str
  place: str
  loops: str
  backward: bool

  def __str__(self) -> str:
    gradient = "the gradient of " if self.backward else ""
    return f"{self.operation}: {self.value}, in {gradient}{self.place}{self.loops}"


class Inspection:
  """A search for the origin of values that are not finite.

  Attributes:
    inputs: Values of a step that are not finite before it.
    origins: Name of a metric that is not finite -> its origins, the first one first.
  """

  def __init__(self):
    self.inputs: list[str] = []
    self.origins: dict[str, list[Birth]] = {}


def _reduce(function: Callable[[Any, Any], Any], value: Any) -> Any:
  """Returns `function(numpy, value)`, of float32.

  Of an array that is spread over several processes the devices compute it, for all of them.
  """
  if np.ndim(value) == 0:
    return function(np, np.asarray(value, np.float32))
  array = jnp.asarray(value).astype(jnp.float32)
  if array.is_fully_addressable or array.is_fully_replicated:
    return function(np, np.asarray(array))
  return jax.device_get(jax.jit(function, static_argnums=0)(jnp, array))


def _any_wrong(xp: Any, x: Any) -> Any:
  return xp.any(~xp.isfinite(x))


def _any_nan(xp: Any, x: Any) -> Any:
  return xp.any(xp.isnan(x))


def _survey(xp: Any, x: Any) -> tuple[Any, Any, Any]:
  """Returns whether there is NaN, how many of the worst kind there are, and where the first is."""
  nan = xp.isnan(x)
  wrong = xp.where(xp.any(nan), nan, ~xp.isfinite(x))
  return xp.any(nan), xp.sum(wrong), xp.argmax(wrong)


def _is_bad(value: Any) -> bool:
  """Returns whether a value is not finite somewhere; False for keys and integers."""
  inexact = jnp.issubdtype(jnp.result_type(value), jnp.inexact)
  return inexact and bool(_reduce(_any_wrong, value))


def describe(value: Any) -> str:
  """Describes the values of an array that are not finite."""
  is_nan, count, first = _reduce(_survey, value)
  kind = "NaN" if is_nan else "infinity"
  if np.ndim(value) == 0:
    return kind
  place = [int(i) for i in np.unravel_index(int(first), np.shape(value))]
  return f"{kind} in {count} of {np.size(value)} values, the first at {place}"


class _Around(NamedTuple):
  """Call and loop iterations around operations."""

  place: str = "an unknown place"
  loops: str = ""

  def at(self, equation: core.JaxprEqn) -> "_Around":
    """Replaces the place by that of an operation, unless all its lines are of libraries."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback else ():
      if "site-packages" not in frame.file_name and frame.file_name != __file__:
        place = f"{frame.file_name}:{frame.line_num}, {frame.function_name}"
        return self._replace(place=place)
    return self

  def loop(self, words: str) -> "_Around":
    """Adds the iteration of a loop."""
    return self._replace(loops=f"{self.loops}, {words}")


class _Interpreter:
  """Runs operations one by one, and keeps the origins of values that are not finite."""

  def __init__(self):
    self.births: list[Birth] = []

  def run(
    self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[tuple[Any, _Origins]], around: _Around
  ) -> list[tuple[Any, _Origins]]:
    """Returns the outputs of a jaxpr, each with its origins."""
    known: dict[Any, tuple[Any, _Origins]] = {}
    none: _Origins = frozenset()

    def read(atom: Any) -> tuple[Any, _Origins]:
      return (atom.val, none) if isinstance(atom, core.Literal) else known[atom]

    for variable, value in zip(jaxpr.constvars, consts, strict=True):
      known[variable] = (value, none)
    known.update(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
      outputs = self._apply(jaxpr, equation, [read(atom) for atom in equation.invars], around)
      known.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def _call(self, inner: Any, inputs: Sequence[tuple[Any, _Origins]], around: _Around):
    if isinstance(inner, core.ClosedJaxpr):
      return self.run(inner.jaxpr, inner.consts, inputs, around)
    return self.run(inner, (), inputs, around)

  def _apply(self, jaxpr: Any, equation: core.JaxprEqn, inputs: list, around: _Around) -> list:
    name, params = equation.primitive.name, equation.params
    around = around.at(equation)
    if name == "scan":
      return self._scan(params, inputs, around)
    if name == "while":
      return self._while(params, inputs, around)
    if name == "cond":
      (index, _), *operands = inputs
      return self._call(params["branches"][int(index)], operands, around)
    inner = next((params[key] for key in _CALLS if key in params), None)
    if inner is not None and name != "shard_map":
      return self._call(inner, inputs, around)
    given = {
      atom: value
      for atom, (value, _) in zip(equation.invars, inputs, strict=True)
      if not isinstance(atom, core.Literal)
    }
    alone = jaxpr.replace(constvars=[], invars=[*given], outvars=equation.outvars, eqns=[equation])
    outputs = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values())
    return [(value, self._origins(equation, inputs, value, around)) for value in outputs]

  def _origins(
    self, equation: core.JaxprEqn, inputs: list, output: Any, around: _Around
  ) -> _Origins:
    if not _is_bad(output):
      return frozenset()
    broken = [(value, of) for value, of in inputs if _is_bad(value)]
    origins = frozenset[int]().union(*(of for _, of in broken))
    is_nan = bool(_reduce(_any_nan, output))
    made = is_nan and not any(_reduce(_any_nan, value) for value, _ in broken)
    if not broken or made:
      backward = "transpose" in str(equation.source_info.name_stack)
      birth = Birth(equation.primitive.name, describe(output), around.place, around.loops, backward)
      self.births.append(birth)
      origins |= {len(self.births) - 1}
    return origins

  def _scan(self, params: Mapping[str, Any], inputs: list, around: _Around) -> list:
    consts, carried = params["num_consts"], params["num_carry"]
    fixed, carry, rows = (
      inputs[:consts],
      inputs[consts : consts + carried],
      inputs[consts + carried :],
    )
    steps, body = params["length"], params["jaxpr"]
    stacked: list[list] = [[] for _ in body.jaxpr.outvars[carried:]]
    for i in reversed(range(steps)) if params["reverse"] else range(steps):
      row = [(value[i], of) for value, of in rows]
      here = around.loop(f"scan {i} of {steps}")
      outputs = self._call(body, [*fixed, *carry, *row], here)
      carry = outputs[:carried]
      for parts, output in zip(stacked, outputs[carried:], strict=True):
        parts.append(output)
    ends = []
    for parts, variable in zip(stacked, body.jaxpr.outvars[carried:], strict=True):
      values = [value for value, _ in (parts[::-1] if params["reverse"] else parts)]
      shape = (steps, *variable.aval.shape)
      value = jnp.stack(values) if values else jnp.zeros(shape, variable.aval.dtype)
      ends.append((value, frozenset[int]().union(*(of for _, of in parts))))
    return [*carry, *ends]

  def _while(self, params: Mapping[str, Any], inputs: list, around: _Around) -> list:
    of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
    test, body = inputs[:of_test], inputs[of_test : of_test + of_body]
    carry = inputs[of_test + of_body :]
    for i in range(2**31):
      if not self._call(params["cond_jaxpr"], [*test, *carry], around)[0][0]:
        break
      carry = self._call(params["body_jaxpr"], [*body, *carry], around.loop(f"while {i}"))
    return carry


def inspect(step: Callable[..., tuple[Any, Mapping[str, Any]]], *inputs: Any) -> Inspection:
  """Finds what made the metrics of `step(*inputs) -> (state, metrics)` that are not finite.

  Its operations are run one by one, so the result is that of the compiled step up to rounding.
  """
  result = Inspection()
  for path, leaf in jax.tree_util.tree_leaves_with_path(inputs):
    if _is_bad(leaf):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      result.inputs.append(f"{name}: {describe(leaf)}")
  closed, shape = jax.make_jaxpr(step, return_shape=True)(*inputs)
  interpreter = _Interpreter()
  given = [(leaf, frozenset[int]()) for leaf in jax.tree.leaves(inputs)]
  outputs = interpreter.run(closed.jaxpr, closed.consts, given, _Around())
  names = [path for path, _ in jax.tree_util.tree_leaves_with_path(shape)]
  for path, (value, origins) in zip(names, outputs, strict=True):
    if str(path[0]) == "[1]" and _is_bad(value):
      name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
      result.origins[name] = [interpreter.births[i] for i in sorted(origins)]
  return result


_inspections: list[list[Inspection] | None] = []  # Of the runs that look: None until they do.


@contextlib.contextmanager
def looking() -> Generator[None]:
  """Steps that are jitted in this context can be looked into, from `look` on."""
  _inspections.append(None)
  try:
    yield
  finally:
    _inspections.pop()


def look() -> list[Inspection]:
  """Looks into the steps that follow; returns a list that they extend."""
  _inspections[-1] = found = []
  return found


class _Step:
  """A jitted step that is looked into, if it is called outside of another one."""

  def __init__(self, jitted: Any, step: Callable[..., Any]):
    self._jitted, self._step = jitted, step

  def __call__(self, *inputs: Any) -> Any:
    found = _inspections[-1] if _inspections else None
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs))
    if found is not None and not traced:
      _inspections[-1] = None  # Steps within are a part of this one.
      found.append(inspect(self._step, *inputs))
      _inspections[-1] = found
    return self._jitted(*inputs)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._jitted, name)


def watched(jitted: Any, step: Callable[..., Any]) -> Any:
  """Returns a jitted step, as one that can be looked into where a run does."""
  return _Step(jitted, functools.partial(step)) if _inspections else jitted
