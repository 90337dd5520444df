"""Measurement of a GPU: shares of the limits, dropped parts, and torch beside them."""

import json
import subprocess
import sys
import types

import pytest

from experiments.bench import gpu, measure, turns, works
from experiments.bench.shapes import set_up
from tests.testing import full

TINY = {
  "vocab_size": 64,
  "layers": 1,
  "width": 16,
  "heads": 2,
  "kv_heads": 1,
  "mlp_width": 32,
  "dtype": "float32",
  "train_rows": 2,
  "length": 8,
  "decode_batches": (2, 4),
  "prompt": 4,
  "response": 4,
  "ppo_rows": 4,
  "ppo_minibatches": 2,
  "rounds": 1,
}
LIMITS = measure.Limits(1e9, 1e9)


@pytest.fixture
def quick(monkeypatch):
  """Works that take a second per token of a response, and limits that are not measured."""

  def work(setup):
    return setup.shape.response

  def interleaved(given, rounds):
    row = {"median": float(given["work"]), "tokens_per_second": 2.0, "peak_bytes": 2**30}
    return {"work": row}

  monkeypatch.setattr(gpu, "works", types.SimpleNamespace(
    sft_step=work, generate=work, ppo_iteration=work, OPTIM=works.OPTIM
  ))
  monkeypatch.setattr(measure, "interleaved", interleaved)
  monkeypatch.setattr(measure, "measure_limits", lambda dtype: LIMITS)
  shapes = lambda shape: types.SimpleNamespace(shape=shape)  # noqa: E731
  monkeypatch.setattr(gpu, "timed", lambda setup, make, rounds: interleaved({"work": make(setup)}, 1)["work"])
