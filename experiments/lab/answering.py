"""Responses to prompts, a batch at a time, in a file that survives a kill."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax import data, loop, processes, reporting
from . import line_files

Lines = Sequence[Mapping[str, Any]]


def answer(
  path: pathlib.Path,
  prompts: data.Dataset,
  lines_of: Callable[[data.PromptBatch, int], list[dict[str, Any]]],
  *,
  repeats: int,
  batch_size: int,
  pad_id: int,
  title: str,
  metrics_of: Callable[[Lines], dict[str, float]] = lambda lines: {},
) -> list[dict[str, Any]]:
  """Writes a line for each response to a file, but for those that are there, and returns all.

  A line that a killed process left incomplete is dropped and written again. The samples of a prompt
  depend only on its number, so finished prompts are not sampled again.

  Args:
    path: File of JSON Lines.
    prompts: Prompts to sample responses to.
    lines_of: `(batch, n) -> lines` of the first n responses to a batch of prompts; those to a
      prompt are adjacent.
    repeats: Responses to each prompt.
    batch_size: Prompts per batch.
    pad_id: Id of padding.
    title: Beginning of the line of progress.
    metrics_of: `(lines) -> metrics` of the line of progress.
  """
  done = line_files.read_lines(path)
  if done:
    reporting.note(f"continuing from response {len(done)} of {path}")
  total, position = len(prompts.examples) * repeats, 0
  with reporting.Progress(total, len(done), title, tenths=False) as progress:
    for batch, valid in data.eval_batches(prompts, batch_size, pad_id):
      size = int(np.sum(valid)) * repeats
      position += size
      if position <= len(done):
        continue
      lines = lines_of(batch, size)[len(done) - position :]
      line_files.append_lines(path, lines)
      done += lines
      progress.update(len(done), metrics_of(lines))
  return done


def unfinished(run: loop.Run, *known: Any) -> pathlib.Path:
  """Returns the file in `samples/` that keeps the responses of a script which is not done.

  Args:
    run: The run.
    *known: All that the responses depend on, such as `loop.identity`.
  """
  digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
  folder = run.workdir / "samples"
  folder.mkdir(exist_ok=True)
  return folder / f"unfinished_{digest[:16]}.jsonl"


def finish(path: pathlib.Path) -> None:
  """Removes the file of `unfinished` when its responses are in another one."""
  if processes.is_first():
    path.unlink()
