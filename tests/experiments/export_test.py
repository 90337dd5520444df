"""Models of checkpoints, against those that the runs have exported themselves."""

import json
import shutil

import pytest

from experiments import export
from experiments.lab import models
from rlhf_jax import checkpoint, flags, loop
from rlhf_jax.models import hf
from tests.experiments.scripts_test import STEPS, flags_of, whole
from tests.testing import full, read_configs

__all__ = ["flags_of", "whole"]


def exported(workdir, step):
  words = [f"--workdir={workdir}", f"--step={step}"]
  return export.export(*read_configs("experiments.export", words))


RELATIVES = [pytest.param(name, marks=full) for name in ("nash_md", "rloo")]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dpo", "ppo", "preference_model", *RELATIVES])
def test_the_last_checkpoint_is_the_model_of_the_run(script, whole, tmp_path):
  shutil.copytree(whole(script), tmp_path / "run")
  folder = exported(tmp_path / "run", STEPS)
  expected = tmp_path / "run" / models.EXPORT
  for name in ("model.safetensors", "config.json", "tokenizer.json"):
    assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


def test_a_run_that_has_not_finished_is_a_start(start_here, tmp_path):
  run = tmp_path / "run"
  words = ("--checkpoint_every=2", "--eval_every=2", "--keep=9", "--keep_best=-eval/loss")
  with pytest.MonkeyPatch.context() as patched:  # It ends before its export, as by a kill.
    patched.setattr(loop.RunConfig, "require", lambda self: None)
    patched.setattr(models, "export", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      start_here("sft", run, "--steps=4", *words)
  kept = (run / "flags").read_bytes()
  first, last = exported(run, 2), exported(run, 4)
  assert first == run / "exports" / "2" and exported(run, "best") == last
  weights = [(folder / "model.safetensors").read_bytes() for folder in (first, last)]
  assert weights[0] != weights[1] and (run / "flags").read_bytes() == kept
  shutil.rmtree(first)
  assert models.finished_folder(f"{run}@2") == first == models.finished_folder(f"{run}@2")
  assert (first / "model.safetensors").read_bytes() == weights[0]
  assert models.finished_folder(f"{run}@best") == last
  with pytest.raises(flags.UsageError, match="holds the model to start from"):
    models.require_other_folder(str(run), first)
  start_here("sft", tmp_path / "next", f"--init_from={run}@2", "--steps=1")
  record = json.loads((tmp_path / "next" / "run.json").read_text())
  assert record["settings"]["init_from"] == f"{run}@2"

  with pytest.raises(checkpoint.CheckpointError, match="no step 3 .*steps there: 2, 4"):
    exported(run, 3)
  with pytest.raises(flags.UsageError, match="its step must be a number or best, got 'last'"):
    exported(run, "last")
  (run / "checkpoints" / "2.digest.json").unlink()
  shutil.rmtree(first)
  with pytest.raises(checkpoint.CheckpointError, match=r"2.digest.json missing"):
    exported(run, 2)
  with pytest.raises(hf.ModelFolderError, match="not the workdir of a training run"):
    exported(tmp_path, 2)
