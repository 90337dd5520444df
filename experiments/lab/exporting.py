"""Models of the checkpoints of a run, which need not have finished, as Hugging Face folders."""

import json
import pathlib
import re
from typing import Any

import jax
from absl import flags as absl_flags

from rlhf_jax import (
  bucket,
  checkpoint,
  flags,
  hub,
  loop,
  processes,
  reporting,
  sharding,
  writers,
)
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.models import hf, lora
from rlhf_jax.train_step import join
from .. import records
from . import models, plans

# Places of the params in the state of a script; those with a critic come first.
_PLACES = ("params/policy/", "train/params/policy/", "params/", "train/params/")


def export_step(workdir: pathlib.Path, step: int, mesh: str = "") -> pathlib.Path:
  """Writes the model of a checkpoint to `WORKDIR/exports/STEP`, unless it is there, and returns it.

  The run may go on meanwhile. The checkpoint is verified as for a run that is continued, and so is
  the model that the run was started from. Of several processes that want the same step, one writes
  it, and the others wait.

  Args:
    workdir: Folder of the run.
    step: Step of the checkpoint.
    mesh: Devices per mesh axis; empty for those of the run.

  Raises:
    ModelFolderError: The folder is no run of a training script.
    CheckpointError: There is no such checkpoint, or it is damaged.
    WorkdirError: The model that the run was started from has changed.
  """
  bucket.pull(workdir / "checkpoints")
  folder = workdir / models.EXPORTS / str(step)
  is_there = (folder / "config.json").exists
  if is_there():
    return folder
  script, session, config = _read_run(workdir)
  devices = sharding.make_mesh(mesh or session.mesh)
  run = loop.Run(
    workdir, session, devices, jax.random.key(session.seed), writers.RunWriter(workdir)
  )
  digest = workdir_lib.identity_digest(workdir)
  with checkpoint.Checkpointer(workdir / "checkpoints", run=digest) as saver:
    saver.leaves(step)  # No folder is made for a step that does not exist.
    workdir_lib.make(folder)
    with workdir_lib.run_lock(folder, patient=True):
      if not is_there():
        _write(folder, run, script, config, saver, step)
        reporting.note(f"model of step {step}: {folder}")
  return folder


def _write(
  folder: pathlib.Path,
  run: loop.Run,
  script: str,
  config: Any,
  saver: checkpoint.Checkpointer,
  step: int,
) -> None:
  """Writes the model of a step of a run to a folder."""
  saved = saver.leaves(step)["state"]
  place = next((p for p in _PLACES if any(path.startswith(p) for path in saved)), None)
  if place is None:
    raise hf.ModelFolderError(f"{run.workdir}: step {step} holds no model of a training script")
  head = "scalar" if any(path.startswith(f"{place}score/") for path in saved) else "language"
  starts = {"init_from": config.init_from, "model.path": config.model.path}
  with hub.settled(run.workdir, starts.values()):
    source = models.source_folder(config.model, config.init_from)
    tokenizer = models.open_tokenizer(source, config.data)
    frozen = config.lora.rank > 0
    # Adapters fit only the model that they were trained on.
    found = (models.digests(starts) if frozen else {}) | {"tokenizer": tokenizer.digest}
    workdir_lib.require_identity(run.workdir, found)
    model, start = models.open_model(run, config.model, source, tokenizer, head, frozen=frozen)
  base, trained = lora.split(models.add_adapters(run, config.lora, start))
  paths = [
    place + jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(trained)
  ]
  like = {"state": dict(zip(paths, jax.tree.leaves(trained), strict=True))}
  restored = saver.restore(like, step=step, donate=True, parts=True)
  assert restored is not None
  leaves = [restored.items["state"][path] for path in paths]
  params = join(base, jax.tree.unflatten(jax.tree.structure(trained), leaves))
  label = records.PREFERENCE if script == "preference_model" else "reward"
  models.export(folder, params, model, tokenizer, label, config.export_dtype, sources=[source])


def number_of(workdir: pathlib.Path, step: str) -> int:
  """Returns the number of a step, which may be `best`.

  Raises:
    UsageError: It is neither, or no step has a score.
  """
  if re.fullmatch(r"0|[1-9][0-9]*", step):
    return int(step)
  if step != "best":
    raise flags.UsageError(
      f"{bucket.name_of(workdir)}: its step must be a number or best, got {step!r}"
    )
  bucket.pull(workdir / "checkpoints")
  found = processes.agree(lambda: checkpoint.best_step(workdir / "checkpoints"))
  if found is None:
    raise flags.UsageError(
      f"{bucket.name_of(workdir)}: no checkpoint has a score; train with --keep_best=METRIC, or"
      " give a step"
    )
  return found


def _read_run(workdir: pathlib.Path) -> tuple[str, loop.Session, Any]:
  """Returns the script of a run, and its session and config from the flags that repeat it."""
  try:
    script = json.loads((workdir / "run.json").read_text(encoding="utf-8"))["script"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    shown = bucket.name_of(workdir)
    raise hf.ModelFolderError(f"{shown}: not the workdir of a training run") from error
  if script not in plans.methods():  # A file names no code but that of this package.
    raise hf.ModelFolderError(f"{workdir}: a run of {script!r}, whose checkpoints are not exported")
  registry = absl_flags.FlagValues()
  readers = [
    flags.define(cls, flag_values=registry)
    for cls in (loop.Session, plans.script_of(script).Config)
  ]
  flags.parse([script, f"--flagfile={workdir / 'flags'}"], registry)
  session, config = (read() for read in readers)
  return script, session, config
