"""Models of checkpoints, against those that the runs have exported themselves."""

import concurrent.futures
import json
import shutil
import threading

import pytest
import safetensors.numpy
from absl import logging

from experiments import export
from experiments.lab import exporting, models
from rlhf_jax import checkpoint, flags, hub, loop
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.models import hf
from tests import hub_test
from tests.experiments.scripts_test import STEPS, flags_of, whole
from tests.testing import full, read_configs

__all__ = ["flags_of", "server", "whole"]

server = hub_test.server


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


ADAPTERS = ("--lora.rank=2", "--steps=2", "--batch_size=4")


def change(path):
  """Replaces the weights of a model by others."""
  tensors = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file({name: -x for name, x in tensors.items()}, path, {"format": "pt"})


@pytest.mark.parametrize("file", ["model.safetensors", "chat_template.jinja"])
def test_adapters_are_not_merged_into_another_model(tmp_path, start_here, sft_run, file):
  start, run = tmp_path / "start", tmp_path / "run"
  shutil.copytree(sft_run, start)
  start_here("sft", run, f"--init_from={start}", *ADAPTERS)
  path = start / "export" / file
  before = path.read_bytes() if path.exists() else None
  if file == "model.safetensors":
    change(path)
  else:
    path.write_text("{{ messages[0].content }}")
  with pytest.raises(workdir_lib.WorkdirError, match="files of --init_from was .*; put back") as e:
    exported(run, 2)
  assert e.value.exit_code == 78 and str(run) in str(e.value)
  assert not (run / "exports" / "2" / "config.json").exists()
  if before is None:
    path.unlink()
  else:
    path.write_bytes(before)
  merged = exported(run, 2) / "model.safetensors"
  assert merged.read_bytes() == (run / "export" / "model.safetensors").read_bytes()


def test_a_model_without_adapters_is_that_of_its_checkpoint(tmp_path, start_here, sft_run):
  start, run = tmp_path / "start", tmp_path / "run"
  shutil.copytree(sft_run, start)
  start_here("sft", run, f"--init_from={start}", "--steps=2", "--batch_size=4")
  change(start / "export" / "model.safetensors")
  own = exported(run, 2) / "model.safetensors"
  assert own.read_bytes() == (run / "export" / "model.safetensors").read_bytes()


def test_a_model_of_a_hub_is_that_of_the_run(tmp_path, start_here, teacher_run, server):
  """Also while another run reads the name at another commit."""
  files = {path.name: path.read_bytes() for path in teacher_run.iterdir() if path.is_file()}
  server.repos["me/base"] = {"main": (hub_test.FIRST, files)}
  run, name = tmp_path / "run", "hf://me/base"
  start_here("sft", run, f"--init_from={name}", *ADAPTERS)
  other = tmp_path / "model.safetensors"
  other.write_bytes(files[other.name])
  change(other)
  server.repos["me/base"]["main"] = hub_test.SECOND, files | {other.name: other.read_bytes()}
  hub_test.forget()
  hub.settle(tmp_path / "next", [name])
  merged = exported(run, 2) / "model.safetensors"
  assert merged.read_bytes() == (run / "export" / "model.safetensors").read_bytes()
  assert models.finished_folder(name).name == hub_test.SECOND


def test_of_several_that_want_a_step_one_writes_it(tmp_path, monkeypatch, sft_run):
  shutil.copytree(sft_run, tmp_path / "run")
  write, begun, waits, written = models.export, threading.Event(), threading.Event(), []

  def slow(*args, **settings):
    begun.set()
    assert waits.wait(60)
    written.append(write(*args, **settings))

  monkeypatch.setattr(models, "export", slow)
  monkeypatch.setattr(logging, "warning", lambda text, *args: waits.set())
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first = pool.submit(exporting.export_step, tmp_path / "run", 4)
    assert begun.wait(60)
    second = pool.submit(exporting.export_step, tmp_path / "run", 4)
    assert first.result() == second.result() == tmp_path / "run" / "exports" / "4"
  assert len(written) == 1
