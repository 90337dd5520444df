"""Functions of your own, named on the command line as `module:function`.

A name is imported because you typed it. Nothing that is read from data, from a checkpoint or from a
model folder reaches these functions.
"""

import hashlib
import importlib
import inspect
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def resolve(
  field: str,
  name: str,
  known: Mapping[str, Callable[..., Any]],
  arguments: Sequence[str],
  keywords: Sequence[str] = (),
) -> Callable[..., Any]:
  """Returns the function that a setting names.

  Args:
    field: Name of the setting, for messages.
    name: Key of `known`, or `module:function`. The module is looked for in the working directory
      and among the installed ones.
    known: Functions by name.
    arguments: Names of the arguments that the function is called with, in order.
    keywords: Names of those that it is called with by keyword.

  Raises:
    ValueError: There is no such function, or it does not take the arguments. The message starts
      with `field`.
  """
  if ":" not in name:
    if name not in known:
      raise ValueError(
        f"{field} must be one of {', '.join(sorted(known))}, or module:function of your own; got"
        f" {name!r}"
      )
    return known[name]
  if not _NAME.fullmatch(name):
    raise ValueError(f"{field} must be a key or module:function, got {name!r}")
  module_name, _, function_name = name.partition(":")
  if "" not in sys.path and str(pathlib.Path.cwd()) not in sys.path:
    sys.path.insert(0, str(pathlib.Path.cwd()))
  try:
    module = importlib.import_module(module_name)
  except Exception as error:
    raise ValueError(
      f"{field}={name} cannot be imported: {type(error).__name__}: {error}. Start in the folder of"
      f" {module_name.replace('.', '/')}.py, or set PYTHONPATH"
    ) from error
  function = getattr(module, function_name, None)
  if not callable(function):
    place = getattr(module, "__file__", module_name)
    raise ValueError(f"{field}={name}: {place} has no function {function_name}")
  try:
    inspect.signature(function).bind(*arguments, **dict.fromkeys(keywords))
  except TypeError as error:
    wanted = ", ".join([*arguments, *(f"{keyword}=" for keyword in keywords)])
    raise ValueError(f"{field}={name} must take ({wanted}), and it does not: {error}") from error
  return function


def digests(*names: str) -> dict[str, str]:
  """SHA-256 of the file of each `module:function` among `names`, for the identity of a run."""
  found = {}
  for name in names:
    module = sys.modules.get(name.partition(":")[0]) if ":" in name else None
    path = getattr(module, "__file__", None)
    if path:
      found[name] = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
  return found
