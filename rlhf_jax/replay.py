"""The black box of a run, and one of its steps run again, to see what went wrong in it."""

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from rlhf_jax import checkpoint, nonfinite, processes, reporting, sharding, writers
from rlhf_jax import workdir as workdir_lib

FOLDER = "black_box"


class Replayed(Exception):
  """A step was run again, and the run goes no further."""

  exit_code = 0


class BlackBox:
  """States before the steps that follow one without a finite gradient; the newest two are kept.

  `WORKDIR/black_box/N` has the state before step N + 1, the batch of that step, and the key.
  """

  def __init__(self, workdir: os.PathLike[str]):
    """Writes nothing yet; what an earlier start of the run has left stays until then."""
    self._workdir, self._folder = workdir, os.path.join(workdir, FOLDER)
    self._saver: checkpoint.Checkpointer | None = None
    self._works = True

  def keep(self, done: int, state: Any, batch: Any, key: jax.Array, position: Any) -> None:
    """Saves the state after `done` steps, and what the next step gets.

    A run that may recover does not end because this cannot be saved.
    """
    if not self._works:
      return
    if self._saver is None:
      processes.agree(lambda: checkpoint.remove(self._folder))
      run = workdir_lib.identity_digest(self._workdir)
      self._saver = checkpoint.Checkpointer(self._folder, run=run)
    # Of several processes, each has a key of its own, which is no array of all of them.
    items = {"state": state, "batch": batch, "key": np.asarray(jax.random.key_data(key))}
    try:
      self._saver.save(done, items, {"data": position})
    except (checkpoint.CheckpointWriteError, checkpoint.NonFiniteError) as error:
      self._works = False
      logging.warning("the black box is switched off: %s", error)

  def close(self) -> None:
    """Waits for the last save."""
    if self._saver is not None:
      try:
        self._saver.close()
      except checkpoint.CheckpointWriteError as error:
        logging.warning("the black box is incomplete: %s", error)


def again(
  workdir: os.PathLike[str],
  mesh: jax.sharding.Mesh,
  wanted: int,
  step: Callable[[Any, Any, jax.Array], tuple[Any, Mapping[str, Any]]],
  state: Any,
  batches: Any,
  key: jax.Array,
) -> Replayed:
  """Runs step number `wanted` again, from the nearest state before it, and says what it finds.

  Nothing is written. The step has to be jitted under `nonfinite.looking`.

  Args:
    workdir: Folder of the run.
    mesh: Mesh of the run.
    wanted: Number of the step, from 1.
    step: Step of the run; see `loop.fit`.
    state: State before the first step.
    batches: Batches of the run.
    key: Key of the run.

  Returns:
    Exception that ends the run.
  """
  source, done = "the start", 0
  run = workdir_lib.identity_digest(workdir)
  with contextlib.ExitStack() as stack:
    kept = {
      folder: stack.enter_context(checkpoint.Checkpointer(os.path.join(workdir, folder), run=run))
      for folder in (FOLDER, "checkpoints")
    }

    def find() -> tuple[int, str] | None:
      steps = [(of.latest_step(wanted - 1), folder) for folder, of in kept.items()]
      known = [(step, folder) for step, folder in steps if step is not None]
      return max(known, key=lambda place: place[0], default=None)

    if (nearest := processes.agree(find)) is not None:
      done, folder = nearest
      source = f"{folder}/{done}"
      restored = kept[folder].restore({"state": state}, step=done, donate=True)
      assert restored is not None  # A step that was asked for is read, or refused.
      state = restored.items["state"]
      batches.set_state(restored.meta["data"])
  reporting.note(f"running step {wanted} again, from the state of {source}")
  found, values = [], {}
  for index in range(done, wanted):
    batch = sharding.place_batch(next(batches), mesh)
    if index == wanted - 1:
      found = nonfinite.look()
    state, values = step(state, batch, key)
  for line in _report(found, jax.device_get(dict(values))):
    reporting.note(line)
  return Replayed(f"step {wanted} was run again; nothing was written to {os.fspath(workdir)}")


def _report(found: list[nonfinite.Inspection], values: Mapping[str, Any]) -> list[str]:
  lines = [
    f"{name}: {writers.json_number(values[name])}"
    for name in ("loss", "grad_norm", "skipped_steps")
    if name in values
  ]
  for number, inspection in enumerate(found, 1):
    update = f" of update {number}" if len(found) > 1 else ""
    lines += [f"not finite before the update{update}: {line}" for line in inspection.inputs]
    for name in sorted(inspection.origins, key=lambda name: name != "loss"):
      births = inspection.origins[name][:3]
      lines += [f"{name}{update} is not finite by {birth}" for birth in births]
  if not any(inspection.inputs or inspection.origins for inspection in found):
    lines.append("everything is finite, operation by operation")
  return lines
