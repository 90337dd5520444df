"""Functions of your own, named on the command line as `module:function`.

A name is imported because you typed it. Nothing that is read from data, from a checkpoint or from a
model folder reaches these functions.
"""

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_HERE = pathlib.Path(__file__).resolve().parent
# In a clone the scripts and the launcher are beside the package, not in it.
_OURS = (_HERE, _HERE.parent / "experiments", _HERE.parent / "launch")
# module:function -> the function, and the SHA-256 of its file at the time of its import. A file
# that is edited while a run goes on changes nothing in the process, so it is read only once.
_resolved: dict[str, tuple[Callable[..., Any], str]] = {}


class ResultError(ValueError):
  """A function returned something unusable."""

  exit_code = os.EX_USAGE


class RaisedError(ResultError):
  """A function raised."""

  exit_code = os.EX_SOFTWARE


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
    name: Key of `known`, or `module:function`. The module is looked for where Python looks for
      modules, PYTHONPATH included, and in the working directory. `__main__` is the running script
      or notebook.
    known: Functions by name.
    arguments: Names of the arguments that the function is called with, in order.
    keywords: Names of those that it is called with by keyword.

  Raises:
    ValueError: There is no such function, or it does not take the arguments. The message starts
      with `field`.
  """
  if ":" not in name:
    if name not in known:
      keys = f"one of {', '.join(sorted(known))}, or " if known else ""
      raise ValueError(f"{field} must be {keys}module:function of your own; got {name!r}")
    return known[name]
  module_name, _, function_name = name.partition(":")
  if not _NAME.fullmatch(name) or module_name.endswith(".py"):
    raise ValueError(
      f"{field} must be a key or module:function, got {name!r}; the module of FOLDER/my_file.py is"
      " my_file, with FOLDER as the working directory or on PYTHONPATH"
    )
  module = load(field, name)
  function = getattr(module, function_name, None)
  if not callable(function) or inspect.isclass(function):
    place = getattr(module, "__file__", None) or module_name
    raise ValueError(
      f"{field}={name}: {place} has no function {function_name}{_near(name, module)}"
    )
  try:
    inspect.signature(function).bind(*arguments, **dict.fromkeys(keywords))
  except TypeError as error:
    wanted = ", ".join([*arguments, *(f"{keyword}=" for keyword in keywords)])
    raise ValueError(f"{field}={name} must take ({wanted}), and it does not: {error}") from error
  except ValueError:  # A function in C that does not say what it takes.
    pass
  if name not in _resolved or _resolved[name][0] is not function:  # It may have been reloaded.
    _resolved[name] = function, _digest(module, function)
  return function


def limited(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
  """Returns a function that raises TimeoutError, with the line, where another one takes longer.

  Each call is in a thread of its own, which is abandoned then. With 0 seconds it is the function.
  """
  if not seconds:
    return function

  @functools.wraps(function)
  def call(*args: Any) -> Any:
    done: list[tuple[bool, Any]] = []

    def work() -> None:
      try:
        done.append((True, function(*args)))
      except BaseException as error:
        done.append((False, error))

    thread = threading.Thread(target=work, name="function_of_user", daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
      frame = sys._current_frames().get(thread.ident or 0)
      line = _line_of_user(traceback.extract_stack(frame)) if frame else ""
      raise TimeoutError(f"it took more than {seconds:g} seconds{f', at {line}' if line else ''}")
    returned, result = done[0]
    if not returned:
      raise result
    return result

  call.limits = function  # type: ignore[attr-defined]
  return call


def load(field: str, name: str) -> types.ModuleType:
  """Imports the module that a setting names.

  Args:
    field: Name of the setting, for messages.
    name: Name of the module; `module:function` has one too.

  Raises:
    ValueError: There is no such module, or its import fails. The message starts with `field`.
  """
  module = name.partition(":")[0]
  here = str(pathlib.Path.cwd())
  if "" not in sys.path and here not in sys.path:
    sys.path.append(here)
  try:
    return importlib.import_module(module)
  except (Exception, SystemExit) as error:
    missing = getattr(error, "name", None) or ""
    if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{missing}."):
      given = os.environ.get("PYTHONPATH", "")
      raise ValueError(
        f"{field}={name} cannot be imported: there is no module {missing} in {here}, on"
        f" PYTHONPATH ({given or 'empty'}) or among the installed ones. Start in the folder of"
        f" {module.replace('.', '/')}.py, or put that folder on PYTHONPATH"
      ) from error
    if isinstance(error, SystemExit):
      reason = "it ends the process; put what it runs under if __name__ == '__main__'"
    else:
      reason = describe(error)
    raise ValueError(f"{field}={name} cannot be imported: {reason}") from error


def name_of(function: Callable[..., Any]) -> str:
  """Returns the `module:function` that a setting named a function by, else its own name."""
  function = getattr(function, "limits", function)
  for name, (known, _) in _resolved.items():
    if known is function:
      return name
  while isinstance(function, functools.partial):
    function = function.func
  inner = function if hasattr(function, "__qualname__") else type(function)
  module = getattr(inner, "__module__", None) or "builtins"
  package = module.partition(".")[0] == __package__
  return inner.__qualname__ if package else f"{module}:{inner.__qualname__}"


def describe(error: BaseException) -> str:
  """Describes an error in a file of the user: line of code, type, first line of the text."""
  text = f"{type(error).__name__}: {str(error).partition(os.linesep)[0]}"
  if isinstance(error, SyntaxError):  # Its text names the place.
    return text
  line = _line_of_user(traceback.extract_tb(error.__traceback__))
  return f"{line}: {text}" if line else text


def _line_of_user(frames: traceback.StackSummary) -> str:
  """Returns file and line of the innermost call that is in no library; empty if there is none."""
  package, library = pathlib.Path(__file__).parent, pathlib.Path(os.__file__).parent
  lines = [
    f"{frame.filename}:{frame.lineno}"
    for frame in frames
    if not frame.filename.startswith((str(package), str(library), "<frozen"))
    and "site-packages" not in frame.filename
  ]
  return lines[-1] if lines else ""


def digests(settings: Mapping[str, Any]) -> dict[str, str]:
  """Returns what identifies the functions of a user that the settings of a run name.

  Covered are the file of the module and the user's modules that it imports, as far as its text says
  which. A function that was typed into a notebook has its own source covered.

  Args:
    settings: Values of the settings by the names of their flags.

  Returns:
    SHA-256 by the names of the flags.
  """
  found = {}
  for flag, value in settings.items():
    names = value.split(",") if isinstance(value, str) else ()
    files = [_resolved[name][1] for name in names if name in _resolved and _resolved[name][1]]
    if files:
      together = hashlib.sha256("".join(files).encode()).hexdigest()
      found[f"file of --{flag}"] = files[0] if len(files) == 1 else together
  return found


def _digest(module: types.ModuleType, function: Callable[..., Any]) -> str:
  """SHA-256 of the files of a module, else of the source of a function; empty if there is none."""
  if path := getattr(module, "__file__", None):
    files = _with_imports(pathlib.Path(path), module.__name__)
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    together = hashlib.sha256("".join(digests).encode()).hexdigest()
    return digests[0] if len(digests) == 1 else together
  try:
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
  except (OSError, TypeError):
    return ""


def _with_imports(path: pathlib.Path, name: str) -> list[pathlib.Path]:
  """Lists the file of a module and those of the modules of its folder that it imports, in turn."""
  found, left = [path], [(path, name)]
  while left:
    path, name = left.pop()
    for imported in _imported_by(path, name):
      file = _file_of(imported)
      if file.suffix == ".py" and file not in found and _is_of_user(file, found[0]):
        found.append(file)
        left.append((file, imported))
  return found


def _file_of(name: str) -> pathlib.Path:
  """Returns the file of a module, imported or not; an empty path if there is none."""
  package = name.rpartition(".")[0]
  if package and package not in sys.modules:  # It would be imported to find out.
    return pathlib.Path()
  try:
    spec = importlib.util.find_spec(name)
  except (ImportError, ValueError, AttributeError):
    spec = None
  return pathlib.Path((spec and spec.origin) or "")


def _imported_by(path: pathlib.Path, name: str) -> list[str]:
  """Names that could be the modules which a file imports, in their order."""
  try:
    tree = ast.parse(path.read_bytes())
  except (OSError, SyntaxError, ValueError):
    return []
  package = name if path.name == "__init__.py" else name.rpartition(".")[0]
  names = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
      base = ".".join([*above, *([node.module] if node.module else [])])
      names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
  return list(dict.fromkeys(names))


def _is_of_user(file: pathlib.Path, first: pathlib.Path) -> bool:
  """Returns whether a module is beside the first one and neither installed nor of this package."""
  is_ours = any(file.resolve().is_relative_to(folder) for folder in _OURS)
  beside = any(file.is_relative_to(folder) for folder in (first.parent, pathlib.Path.cwd()))
  return beside and not is_ours and "site-packages" not in file.parts


def _near(name: str, module: types.ModuleType) -> str:
  """Names the functions of a module that a name could mean."""
  wanted = name.partition(":")[2]
  if inspect.isclass(getattr(module, wanted, None)):
    return f"; {wanted} is a class: name a function, or an object that can be called"
  functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
  near = difflib.get_close_matches(wanted, functions, n=1)
  return f"; did you mean {near[0]}?" if near else ""
