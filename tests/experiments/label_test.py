"""Labelling by hand through a pseudo-terminal, by a judge, and what the labels train."""

import json
import os
import pathlib
import pty
import select
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import label
from experiments.annotation.items import read_item, shown_order
from rlhf_jax import data, flags, loop, simulation
from tests.testing import read_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
COUNT = 24


@pytest.fixture
def pairs_file(tmp_path):
  rows = simulation.preferences("eval", COUNT, 0)
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


class Terminal:
  """The script on a terminal of its own, and what it has drawn since the last key."""

  def __init__(self, *words):
    self._fd, side = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    # Not pty.fork: this process has threads of JAX's.
    self.process = subprocess.Popen(
      [sys.executable, "-m", "experiments.label", *words],
      cwd=ROOT,
      env=env | {"TERM": "xterm", "COLUMNS": "100"},
      stdin=side,
      stdout=side,
      stderr=side,
      start_new_session=True,
    )
    os.close(side)
    self.screen = b""

  def read(self, until=None, seconds=60.0):
    """Reads until a text is there, or the program ends."""
    deadline = time.monotonic() + seconds
    while (until is None or until not in self.screen) and time.monotonic() < deadline:
      ready, _, _ = select.select([self._fd], [], [], 0.1)
      if not ready:
        continue
      try:
        part = os.read(self._fd, 65536)
      except OSError:  # The program has ended.
        return self.screen.decode("utf-8", "replace")
      if not part:
        break
      self.screen += part
    return self.screen.decode("utf-8", "replace")

  def press(self, keys):
    for key in keys:
      assert "quit" in self.read(b"quit"), self.screen
      self.screen = b""
      os.write(self._fd, key.encode())

  def kill(self):
    self.process.kill()
    self.process.wait()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.kill()
    os.close(self._fd)


def answers(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(path, lines):
  deadline = time.monotonic() + 30
  while time.monotonic() < deadline and len(answers(path) if path.exists() else []) < lines:
    time.sleep(0.02)
  return answers(path)


@pytest.mark.slow
def test_twenty_answers_an_undo_and_a_kill(tmp_path, pairs_file, train_on_labels):
  labels = tmp_path / "out" / "labels.jsonl"
  words = (f"--workdir={tmp_path / 'out'}", "--annotator=ada", f"--data.path={pairs_file}")
  with Terminal(*words) as first:
    first.press("abtabsbaab")
    assert len(wait_for(labels, 10)) == 10
    first.press("u")
    deadline = time.monotonic() + 30
    while len(answers(labels)) > 9 and time.monotonic() < deadline:
      time.sleep(0.02)
    before = answers(labels)
    assert len(before) == 9
    first.kill()

  with Terminal(*words) as second:
    assert "10 of 24" in second.read(b"quit")  # The one that was undone is asked again.
    second.press("babababababa")
    assert len(wait_for(labels, 21)) == 21
    second.press("q")
    shown = second.read()
    second.process.wait()
  assert "21 of 24 are labelled" in shown
  rows = answers(labels)
  assert rows[:9] == before
  assert len({row["id"] for row in rows}) == 21
  assert {row["by"] for row in rows} == {"ada"}
  assert all(row["seconds"] >= 0 for row in rows)

  # What a key means depends on the side on which a response stood.
  source = {row["id"]: row for row in answers(pairs_file)}
  keys = "abtabsbaa" + "babababababa"
  sides = set()
  for key, row in zip(keys, rows, strict=True):
    if key == "s":
      assert row["annotations"] == []
      continue
    (vote,) = row["annotations"]
    if key == "t":
      assert vote["preferred"] is None
      continue
    item = read_item(data.Row("r", source[row["id"]]), 0)
    left, _ = shown_order(item.prompt, item.responses)
    assert row["shown"][0] == left
    sides.add(left)
    assert vote["preferred"] == (left if key == "a" else 1 - left)
  assert sides == {0, 1}

  summary = json.loads((tmp_path / "out" / "summary.json").read_text())
  assert (summary["answers"], summary["ties"], summary["skipped"]) == (20, 1, 1)
  assert -1 <= summary["kappa/ada/label"] <= 1

  # The reward model learns from what a browser test has labelled.
  assert "1 not judged" in train_on_labels("preference_model", labels)


@pytest.mark.slow
def test_a_judge_labels_resumes_and_trains(tmp_path, pairs_file, run_script, sft_run, shared):
  words = (
    f"--judge.path={shared / 'models' / 'stories260k'}",
    "--data.end_token=<s>",
    f"--data.path={pairs_file}",
    "--judge.max_characters=60",
    "--batch_size=8",
    "--judge.canaries=2",
  )
  principles = tmp_path / "principles.txt"
  principles.write_text("is it a good review ?\n\nis it brief ?\n")
  words = (*words, f"--judge.principles={principles}")
  part = run_script("label", tmp_path / "out", *words, "--limit=10")
  assert part.code == 0, part.output
  labels = tmp_path / "out" / "labels.jsonl"
  before = labels.read_bytes()
  finished = run_script("label", tmp_path / "out", *words)
  assert finished.code == 0, finished.output
  assert labels.read_bytes().startswith(before)
  rows = answers(labels)
  assert len(rows) == COUNT
  for row in rows:
    (vote,) = row["annotations"]
    both = (np.array(row["first"]) + np.array(row["second"])) / 2
    assert vote["probability"] == pytest.approx(both.mean(), abs=1e-5)
    assert vote["preferred"] in (0, 1, None)
    assert len(row["first"]) == 2
  summary = json.loads((tmp_path / "out" / "summary.json").read_text())
  for name in ("position_bias", "consistency", "agreement/as_first", "canary/empty"):
    assert name in summary
  trained = run_script(
    "preference_model",
    tmp_path / "model",
    f"--init_from={sft_run}",
    f"--data.path={labels}",
    "--data.votes=each",
    "--batch_size=4",
    "--steps=2",
  )
  assert trained.code == 0, trained.output


def test_more_than_two_are_ranked_on_the_page_only(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"prompt": "p", "responses": ["x", "y", "z"]}\n')
  config = label.Config(annotator="ada", data=data.DataConfig(path=str(path)))
  with pytest.raises(data.DataError, match="rank them with experiments.label_page"):
    label.label(loop.Session(str(tmp_path / "out")), config)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([], "--annotator or judge.path says who labels"),
    (["--annotator=a b"], "--annotator must be up to 64"),
    (["--annotator=ada", "--limit=-1"], "--limit must not be negative"),
    (["--annotator=ada", "--batch_size=0"], "--batch_size must be at least 1"),
    (["--judge.path=x", "--judge.canaries=-1"], "--judge.canaries must not be negative"),
    (["--judge.path=x", "--judge.max_characters=0"], "--judge.max_characters must be at least 1"),
  ],
)
def test_flags_that_are_refused(words, message):
  with pytest.raises(flags.UsageError, match=message):
    read_flags("experiments.label", ["--workdir=x", *words])
