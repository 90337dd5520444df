"""A tiny model folder and rows, which the tables of inputs spoil."""

import json
import pathlib

import jax
import numpy as np
import pytest

from rlhf_jax import data, simulation
from rlhf_jax.models import ModelConfig, build, hf


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> pathlib.Path:
  """Hugging Face folder of a model with the words of the built-in task; all weights are 0."""
  folder = tmp_path_factory.mktemp("inputs") / "model"
  tokenizer = data.word_level_tokenizer(simulation.WORDS)
  config = ModelConfig(
    vocab_size=tokenizer.vocab_size, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp_width=8
  )
  shapes = jax.eval_shape(build(config, "language").init, jax.random.key(0))
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  folder.mkdir()
  tokenizer.save(folder)
  hf.save_folder(folder, params, config, token_ids={"eos_token_id": tokenizer.eos_id})
  return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> pathlib.Path:
  """Rows of the words of the built-in task that every script can read."""
  path = tmp_path_factory.mktemp("inputs") / "rows.jsonl"
  better, worse, *words = sorted(simulation.WORDS)
  rows = [
    {
      "prompt": f"write a brief review of the film {word} .",
      "response": f" {word} {better}",
      "chosen": f" {word} {better}",
      "rejected": f" {word} {worse}",
    }
    for word in words[:24]
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path
