"""Keys of a terminal: one answer each, and none for those that send several characters."""

import os
import pty
import sys
import threading
import time

import pytest

from experiments.annotation import terminal
from experiments.annotation.items import Item
from experiments.annotation.store import Store
from tests.testing import full

ITEMS = [Item(str(i), f"p{i}", (f"x{i}", f"y{i}")) for i in range(3)]
SEQUENCES = {
  "Up": ["\x1b[A"],
  "Down, in the mode of applications": ["\x1bOB"],
  "F1 of the Linux console": ["\x1b[[A"],
  "F2": ["\x1bOQ"],
  "F4": ["\x1bOS"],
  "Page Down": ["\x1b[6~"],
  "Shift and Tab": ["\x1b[Z"],
  "Alt and a": ["\x1ba"],
  "a paste between brackets": ["\x1b[200~abt\x1b[201~"],
  "Down, held": ["\x1b[B\x1b[B\x1b[B"],
  "Down, of a remote terminal": ["\x1b", "[", "B"],
  "Escape": ["\x1b"],
}
FIRST = {"Up", "Alt and a", "a paste between brackets", "Down, of a remote terminal", "Escape"}


@pytest.fixture
def keyboard(monkeypatch):
  """File descriptor of the keyboard of a terminal whose other side is the standard input."""
  board, side = pty.openpty()
  with os.fdopen(side) as stdin:
    monkeypatch.setattr(sys, "stdin", stdin)
    yield board
  os.close(board)


def press(keyboard, parts):
  for part in parts:
    os.write(keyboard, part.encode())
    time.sleep(0.01)
  time.sleep(0.3)  # A person needs longer than a terminal.


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[] if name in FIRST else full) for name in SEQUENCES]
)
def test_arrows_and_function_keys_answer_nothing(tmp_path, keyboard, name):
  store = Store(tmp_path)
  stored = []

  def work():
    press(keyboard, SEQUENCES[name])
    stored.append(len(store.rows()))
    press(keyboard, ["t"])
    press(keyboard, SEQUENCES[name])
    stored.append(len(store.rows()))
    press(keyboard, ["s"])
    press(keyboard, ["q"])

  with terminal.single_keys():
    hands = threading.Thread(target=work)
    hands.start()
    terminal.label(store, ITEMS, "ada")
    hands.join()
  assert stored == [0, 1]
  tie, skip = store.rows()
  assert tie["annotations"][0]["preferred"] is None and skip["annotations"] == []
