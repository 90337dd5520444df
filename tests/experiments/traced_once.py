"""Programs of runs that follow each other in one process, traced and compiled once."""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np


class _Kept:
  """Object that only equals itself; it stays, so that no other gets its id."""

  def __init__(self, value: Any):
    self._value = value

  def __hash__(self) -> int:
    return id(self._value)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Kept) and other._value is self._value


def _key(value: Any) -> Hashable:
  """Key of a value; two functions are equal if their code and all that they close over are."""
  if isinstance(value, types.FunctionType):
    cells = []
    for cell in value.__closure__ or ():
      try:
        cells.append(_key(cell.cell_contents))
      except ValueError:  # Not yet assigned.
        cells.append(_Kept(cell))
    parts = value.__defaults__, value.__kwdefaults__
    return "function", value.__module__, value.__code__, tuple(cells), _key(parts)
  if isinstance(value, types.MethodType):
    return "method", _key(value.__func__), _key(value.__self__)
  if isinstance(value, functools.partial):
    return "partial", _key(value.func), _key(value.args), _key(value.keywords)
  if isinstance(value, tuple):
    return type(value), tuple(map(_key, value))
  if isinstance(value, Mapping) and type(value) in (dict, types.MappingProxyType):
    return dict, tuple((name, _key(of)) for name, of in value.items())
  if isinstance(value, list):
    return list, tuple(map(_key, value))
  if isinstance(value, np.ndarray):
    return np.ndarray, value.dtype.str, value.shape, value.tobytes()
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return type(value), tuple(_key(getattr(value, f.name)) for f in dataclasses.fields(value))
  if isinstance(value, str | bytes | int | float | complex | None):
    return type(value), value
  if type(value).__hash__ is not object.__hash__ and isinstance(value, Hashable):
    return value  # It says itself what equals it.
  return _Kept(value)


@contextlib.contextmanager
def traced_once() -> Iterator[dict[Hashable, Callable[..., Any]]]:
  """Gives equal functions that are jitted inside one program."""
  programs: dict[Hashable, Callable[..., Any]] = {}
  jit = jax.jit

  def once(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    if function is None:
      return functools.partial(once, **options)
    key = _key(function), _key(options)
    if key not in programs:
      programs[key] = jit(function, **options)
    return programs[key]

  with mock.patch.object(jax, "jit", once):
    yield programs
