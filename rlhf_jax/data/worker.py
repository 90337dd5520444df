"""Program of the process that renders chat templates of others, or tries a tokenizer of others.

`apart` starts it as a script. It imports nothing of this package, so that it starts quickly. A line
of its input is a task in JSON, and a line of its output the result, or the reason that there is
none. It limits the time and memory of each task, and the system ends it where it takes more.
"""

import contextlib
import functools
import json
import math
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

# Task -> seconds of the processor, bytes of memory.
LIMITS = {"render": (10, 2**30), "names": (10, 2**30), "tokenizer": (60, 4 * 2**30)}
MAX_CHARACTERS = 16 * 2**20  # Of a rendered chat; a row of data has at most half of it.
_DATE = "26 Jul 2024"  # A template that wrote today's would give other tokens tomorrow.
_marks = ["", ""]  # Texts before and after what a block `generation` writes, of the task.
_PROBES = ("a", " a", "a\n:", "Hello, world! 123 é 漢", "<|user|>")


class _TooLongError(Exception):
  pass


def _limit(seconds: int, size: int) -> None:
  """Limits the processor time of the next task, and the memory of this process."""
  usage = resource.getrusage(resource.RUSAGE_SELF)
  until = math.ceil(usage.ru_utime + usage.ru_stime) + seconds
  resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))
  hard = resource.getrlimit(resource.RLIMIT_AS)[1]
  allowed = size if hard == resource.RLIM_INFINITY else min(size, hard)
  with contextlib.suppress(OSError, ValueError):  # Of a system without such a limit.
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))


@functools.cache
def _environment() -> Any:
  """Returns the environment that transformers gives templates, with a fixed date."""
  import jinja2
  import jinja2.ext
  import jinja2.nodes
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """The block `generation`, which marks answers."""

    tags = {"generation"}  # noqa: RUF012 - the name is that of jinja2.

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
      return _marks[0] + caller() + _marks[1]

  class Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **values: Any):
      self, *rest = args
      attributes = dict(*rest, **values)
      for name in attributes:
        _refuse_private(name)
      jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
      _refuse_private(name)
      super().__setitem__(name, value)

  class Dict:
    """The function `dict`, without the attributes of the class."""

    def __call__(self, *args: Any, **values: Any) -> dict:
      return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict:
      return dict.fromkeys(*args)

  def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
      raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

  def raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)

  def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
  ) -> str:
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  environment: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = to_json
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda format: _DATE
  environment.globals["dict"] = Dict()
  environment.globals["namespace"] = Namespace
  return environment


@functools.lru_cache(maxsize=16)
def _template(source: str) -> Any:
  return _environment().from_string(source)


def _pieces(source: str, variables: dict[str, Any]) -> Iterator[str]:
  left = MAX_CHARACTERS
  for piece in _template(source).generate(**variables):
    left -= len(piece)
    if left < 0:
      raise _TooLongError
    yield piece


def _render(task: dict[str, Any]) -> dict[str, Any]:
  """Renders chats up to the first one that is refused."""
  texts: list[str] = []
  problem: dict[str, str] = {}
  _marks[:] = task.get("marks", ("", ""))
  for chat in task["chats"]:
    problem = _append(texts, task["source"], {**task["variables"], **chat})
    if problem:
      break
  return {"texts": texts, **problem}


def _append(texts: list[str], source: str, variables: dict[str, Any]) -> dict[str, str]:
  """Adds the text of a chat; returns why there is none."""
  import jinja2

  try:
    texts.append("".join(_pieces(source, variables)))
    return {}
  except jinja2.TemplateSyntaxError as error:
    return {"syntax": str(error)}
  except MemoryError:
    return {"excess": "takes too much memory"}
  except RecursionError:
    return {"excess": "calls itself without an end"}
  except OverflowError as error:
    return {"excess": str(error)}
  except _TooLongError:
    return {"excess": f"writes more than {MAX_CHARACTERS >> 20} Mi characters"}
  except Exception as error:
    return {"refused": str(error) or type(error).__name__}


def _names(task: dict[str, Any]) -> dict[str, Any]:
  """Returns the names of the variables that a template reads."""
  import jinja2.meta

  try:
    names = jinja2.meta.find_undeclared_variables(_environment().parse(task["source"]))
  except jinja2.TemplateSyntaxError as error:
    return {"syntax": str(error)}
  except (MemoryError, RecursionError):
    return {"excess": "takes too much memory"}
  return {"names": sorted(names - _environment().globals.keys())}


def _try_tokenizer(task: dict[str, Any]) -> dict[str, Any]:
  """Does with a tokenizer.json what could end the process that reads it."""
  try:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(task["path"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.to_str()
    for text in _PROBES:
      for special in (True, False):
        tokenizer.decode(tokenizer.encode(text, add_special_tokens=special).ids)
  except MemoryError:
    return {"excess": "takes too much memory"}
  except BaseException as error:  # A panic of the Rust parser is no Exception.
    return {"refused": str(error) or type(error).__name__}
  return {}


def main() -> None:
  """Does the tasks of the standard input until it ends."""
  # They tell a run to save and stop. This process ends with its input.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  tasks = {"render": _render, "names": _names, "tokenizer": _try_tokenizer}
  for line in sys.stdin.buffer:
    task = json.loads(line)
    _limit(task.pop("seconds"), task.pop("bytes"))
    result = tasks[task.pop("task")](task)
    sys.stdout.buffer.write(json.dumps(result).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
  main()
