"""Chat templates and tokenizers of others, in a process apart that may be ended.

A template is a program, and a tokenizer.json can ask for any amount of time and memory. The one is
rendered and the other is tried in a process of `worker`, which the system ends at its limits.
"""

import atexit
import contextlib
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import Any, ClassVar

from rlhf_jax.data import worker
from rlhf_jax.data.sources import DataError


class ExcessError(DataError):
  """A file of others takes more time or memory than it may."""


class TemplateError(DataError):
  """A template is not valid."""


class ChatError(DataError):
  """A chat that cannot be read.

  Attributes:
    index: Index of the chat.
  """

  def __init__(self, reason: str, index: int):
    super().__init__(reason)
    self.index = index


class RefusedError(ChatError):
  """A template refuses a chat."""


@contextlib.contextmanager
def numbered(indices: Sequence[int]) -> Generator[None]:
  """Gives the error of a chat the index of that chat in another list.

  Args:
    indices: Index of each chat in that list.
  """
  try:
    yield
  except ChatError as error:
    error.index = indices[error.index]
    raise


class _Process:
  """A process that does one task after another; it is started anew after it was ended."""

  def __init__(self):
    self._limits = ""  # Of the last task, in words.
    self._lock = threading.Lock()
    self._child: subprocess.Popen[bytes] | None = None
    self._owner = 0  # A forked process must not write to the child of its parent.

  def start(self) -> None:
    """Starts the process; a no-op while it runs."""
    if self._child is not None and self._owner == os.getpid():
      return
    self._owner = os.getpid()
    self._child = subprocess.Popen(
      # The folder of the script is not searched for modules.
      [sys.executable, "-P", worker.__file__],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      start_new_session=True,  # Ctrl-C is for the run.
      env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    atexit.register(self.stop)

  def send(self, task: Mapping[str, Any]) -> None:
    """Gives the process a task."""
    self.start()
    assert self._child is not None and self._child.stdin is not None
    seconds, size = worker.LIMITS[task["task"]]
    task = {**task, "seconds": seconds, "bytes": size}
    self._limits = f"more than {seconds} s or {size >> 20} MiB"
    with contextlib.suppress(BrokenPipeError):  # It has ended: `receive` says how.
      self._child.stdin.write(json.dumps(task).encode() + b"\n")
      self._child.stdin.flush()

  def receive(self) -> dict[str, Any]:
    """Waits for the result of the task, or for the end of the process."""
    assert self._child is not None and self._child.stdout is not None
    line = self._child.stdout.readline()
    if line.endswith(b"\n"):
      return json.loads(line)
    code = self.stop()
    by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return {"excess": f"takes {self._limits} (its process ended by {by})"}

  def ask(self, task: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the result of a task."""
    with self._lock:
      self.send(task)
      return self.receive()

  def stop(self) -> int:
    """Ends the process and returns its exit code; a no-op if there is none."""
    child, self._child = self._child, None
    if child is None or self._owner != os.getpid():
      return 0
    atexit.unregister(self.stop)
    for pipe in (child.stdin, child.stdout):
      if pipe is not None:
        with contextlib.suppress(OSError):
          pipe.close()
    try:
      return child.wait(timeout=2)
    except subprocess.TimeoutExpired:
      child.kill()
      return child.wait()


_renderer = _Process()


_CHATS_PER_TASK = 256


def render(
  source: str,
  variables: Mapping[str, Any],
  chats: Sequence[Mapping[str, Any]],
  marks: tuple[str, str] = ("", ""),
) -> list[str]:
  """Renders chats by a template, in the process of all templates.

  Args:
    source: The template.
    variables: Variables of all chats, values of JSON.
    chats: Further variables of each chat.
    marks: Texts to write before and after what its blocks `generation` write.

  Raises:
    TemplateError: The template is not valid.
    ExcessError: It takes too much time or memory, or writes too much.
    RefusedError: It refuses a chat.
  """
  texts: list[str] = []
  for start in range(0, len(chats), _CHATS_PER_TASK):
    part = [dict(chat) for chat in chats[start : start + _CHATS_PER_TASK]]
    task = {"task": "render", "source": source, "variables": dict(variables), "chats": part}
    result = _renderer.ask(task | {"marks": marks})
    texts += result.get("texts", [])
    _require(result)
    if "refused" in result:
      raise RefusedError(result["refused"], len(texts))
  return texts


def names_in(source: str) -> list[str]:
  """Returns the names of the variables that a template reads.

  Raises:
    TemplateError: The template is not valid.
    ExcessError: It takes too much time or memory.
  """
  result = _renderer.ask({"task": "names", "source": source})
  _require(result)
  return result["names"]


def _require(result: Mapping[str, Any]) -> None:
  """Refuses the result of a template that is not valid, or that takes too much."""
  if "syntax" in result:
    raise TemplateError(result["syntax"])
  if "excess" in result:
    raise ExcessError(f"the chat template {result['excess']}; use another template")


class Trial:
  """Trial of a tokenizer.json in a process of its own, which runs from here to `require`.

  A process tries the same content once.
  """

  _known: ClassVar[dict[str, dict[str, Any]]] = {}  # Digest -> result.

  def __init__(self, path: pathlib.Path):
    with open(path, "rb") as file:
      self._digest = hashlib.file_digest(file, "sha256").hexdigest()
    self._process = _Process()
    if self._digest not in self._known:
      self._process.send({"task": "tokenizer", "path": os.path.abspath(path)})

  def require(self) -> None:
    """Waits for the end of the trial.

    Raises:
      ExcessError: The tokenizer takes too much time or memory.
      DataError: It cannot be read, or fails.
    """
    if self._digest not in self._known:
      self._known[self._digest] = self._process.receive()
      self._process.stop()
    result = self._known[self._digest]
    if "excess" in result:
      raise ExcessError(f"the tokenizer {result['excess']}; use another model folder")
    if "refused" in result:
      raise DataError(f"not a readable tokenizer ({result['refused']}); copy the folder again")
