"""Labelling by a person in a terminal: both responses side by side, a key per answer."""

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from rlhf_jax import reporting
from .items import Item, answer_row, shown_order
from .store import Store

_KEYS = {
  "a": "the left one",
  "b": "the right one",
  "t": "a tie",
  "s": "skip",
  "u": "undo",
  "q": "quit",
}
_PLACES = {"a": (0, 1), "b": (1, 0), "t": (0, 0), "s": None}  # Ranks of the left and right one.

_ESCAPE_SECONDS = 0.05  # Within which a remote terminal sends the rest of a key.


def label(store: Store, items: Sequence[Item], annotator: str) -> None:
  """Asks about each pair that the annotator has not answered; each answer is on disk at once."""
  while True:
    seen = store.answered(annotator)
    left = [item for item in items if item.id not in seen]
    done = f"{len(items) - len(left)} of {len(items)}"
    if not left:
      reporting.note(f"all {len(items)} pairs are labelled")
      return
    item = left[0]
    order = shown_order(item.prompt, item.responses)
    title = f"{len(items) - len(left) + 1} of {len(items)}"
    a, b = (item.responses[i] for i in order)
    reporting.show_pair(item.prompt, a, b, title, _KEYS)
    start = time.monotonic()
    key = read_key(_KEYS)
    if key == "q":
      reporting.note(f"{done} are labelled; start again to continue")
      return
    if key == "u":
      if not store.undo(annotator):
        reporting.note("there is nothing to undo")
      continue
    places = _PLACES[key]
    ranks = None if places is None else [places[order.index(i)] for i in range(2)]
    seconds = round(time.monotonic() - start, 1)
    store.add([answer_row(item, annotator, ranks, shown=list(order), seconds=seconds)])


def read_key(keys: Mapping[str, str]) -> str:
  """Waits for one of the keys; the end of the input counts as q."""
  while True:
    key = next_character().lower()
    if not key:
      return "q"
    if key in keys:
      return key


def next_character() -> str:
  """Reads one character of the input; see `single_keys`.

  An arrow or a function key sends ESC and more, such as the letters of answers. They come at once,
  or nearly, and are dropped.
  """
  if not sys.stdin.isatty():
    return sys.stdin.read(1)
  terminal = sys.stdin.fileno()
  character = os.read(terminal, 1)
  if character == b"\x1b":
    while select.select([terminal], [], [], _ESCAPE_SECONDS)[0] and os.read(terminal, 64):
      pass
  return character.decode("utf-8", "replace")


@contextlib.contextmanager
def single_keys() -> Iterator[None]:
  """Makes a terminal deliver each key as it is pressed, without Enter and without echo."""
  if not sys.stdin.isatty():
    yield
    return
  import termios
  import tty

  settings = termios.tcgetattr(sys.stdin)
  try:
    tty.setcbreak(sys.stdin, termios.TCSANOW)  # Keys that were pressed already still count.
    yield
  finally:
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
