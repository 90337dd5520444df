"""Folders of models, and models that are written and read again."""

import pytest

from experiments.lab import models
from rlhf_jax import flags
from rlhf_jax.models import hf
from rlhf_jax.models.lora import LoRAConfig


def test_folders_that_hold_no_model(tmp_path):
  with pytest.raises(hf.ModelFolderError, match="neither the workdir of a finished run nor"):
    models.model_folder(str(tmp_path))
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(hf.ModelFolderError, match="this run has not finished"):
    models.model_folder(str(tmp_path))
  assert models.model_folder("") is None


@pytest.mark.parametrize("name", ["path", "preset"])
def test_one_source_of_params(name):
  options = models.ModelOptions(**{name: "llama3_8b"})
  with pytest.raises(flags.UsageError, match=f"--init_from and --model.{name} are both given"):
    models.source_folder(options, "runs/sft")


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"layers": 0}, "layers must be at least 1"),
    ({"preset": "gpt5"}, "preset must be one of"),
    ({"preset": "llama3_8b", "path": "x"}, "preset"),
    ({"width": 30, "heads": 4}, "must be a multiple of 2 . heads = 8"),
  ],
)
def test_options_that_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    models.ModelOptions(**settings)


def test_adapters_need_a_trained_model():
  assert models.frozen_digest(LoRAConfig(), None) == {}
  with pytest.raises(flags.UsageError, match="--lora.rank adapts a trained model"):
    models.frozen_digest(LoRAConfig(rank=2), None)
