r"""Exports the model of a checkpoint, of a run that has finished or not, as a Hugging Face folder.

A step that is there, or the best one of a run with --keep_best (seconds on a laptop CPU):
  python -m experiments.export --workdir=runs/sft --step=100
  python -m experiments.export --workdir=runs/sft --step=best

The model is in `WORKDIR/exports/STEP`, with adapters merged; --init_from, --reward.path and
transformers open it. Scripts do the same for a path such as --init_from=runs/sft@100 or
runs/sft@best. Which checkpoints a run leaves is up to its --keep, --keep_every and --keep_best.
"""

import dataclasses
import pathlib

from rlhf_jax import entry
from rlhf_jax import workdir as workdir_lib
from .lab import exporting


@dataclasses.dataclass(frozen=True)
class Config:
  """Checkpoint to export.

  Attributes:
    workdir: Workdir of the run.
    step: Number of the step, or best.
    mesh: Devices per mesh axis; empty for those of the run.
  """

  workdir: str
  step: str
  mesh: str = ""


def export(config: Config) -> pathlib.Path:
  """Writes the model to `workdir/exports/STEP` and returns the folder."""
  workdir = workdir_lib.local_path(config.workdir)
  return exporting.export_step(workdir, exporting.number_of(workdir, config.step), config.mesh)


if __name__ == "__main__":
  entry.run_script(export, Config, keep_flags=False)
