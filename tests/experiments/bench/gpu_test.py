"""Measurement of a GPU: shares of its limits, parts that are dropped, and torch beside them."""

import json
import sys
import types

import jax
import pytest

from experiments.bench import gpu, measure, turns, works
from experiments.bench.shapes import Setup, set_up
from rlhf_jax import sharding
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
LIMITS = measure.Limits(1e6, 1e6)
ANSWER = {"seconds": [8.0], "prefill": 2.0, "peak_bytes": 0}


def shapes_only(shape):
  """Setup without models."""
  run = types.SimpleNamespace(mesh=sharding.make_mesh("", jax.devices()[:1]))
  return Setup(shape, run, *[None] * 5)


def interleaved(given, rounds):
  """Takes a second per token of a response."""
  row = {"median": float(given["work"]), "tokens_per_second": 1.0, "peak_bytes": 2**30}
  return {"work": row}


@pytest.fixture
def quick(monkeypatch):
  """Times that are known, without models."""
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
  for name in ("sft_step", "generate", "ppo_iteration"):
    monkeypatch.setattr(works, name, lambda setup: setup.shape.response)
  monkeypatch.setattr(measure, "interleaved", interleaved)
  monkeypatch.setattr(measure, "measure_limits", lambda dtype: LIMITS)
  monkeypatch.setattr(gpu, "set_up", shapes_only)


def require_results(content):
  found = content["works"]
  assert {"train", "decode 2", "decode 4", "ppo"} <= set(found)
  assert found["train"]["share"] > 0 and found["decode 4"]["share"] > 0
  assert found["ppo"]["times"] > 0 and all(found["ppo"]["rooflines"].values())


def test_results_are_shares_of_the_limits(quick, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(gpu, "ask", lambda command, seconds: ANSWER)
  file = tmp_path / "gpu.json"
  content = gpu.run(gpu.Config(**TINY, torch_python="python", json=str(file)))
  assert json.loads(file.read_text()) == content and not content["skipped"]
  require_results(content)
  found, shape = content["works"], gpu.Config(**TINY).train_shape
  trained = 3 * gpu.forward(shape, scored=8)  # In 4 seconds.
  assert found["train"]["share"] == pytest.approx(trained / 4 / LIMITS.flops)
  # Three tokens after the first one, in 3 seconds; the others of torch in 6.
  assert found["decode 4"]["decode"] == 3 and found["decode 4"]["tokens_per_second"] == 4
  assert found["torch decode 4"]["tokens_per_second"] == 2
  assert found["torch decode 4"]["ratio"] == 2
  sizes = 2 * 16 * 32 + 3 * 16 * 32 + 64 * 16  # Weights of attention, MLP and output.
  per_token = 2 * 8 * (4 + 2)  # Keys and values of a row in the middle of its response.
  reads = 4 * (sizes - 2 * 16 * 8 + 4 * per_token)
  assert found["decode 4"]["share"] == pytest.approx(reads / LIMITS.bandwidth, rel=0.1)
  shown = capsys.readouterr().err
  assert max(len(line) for line in shown.splitlines() if line.startswith("  ")) <= 80
  for text in ("600 s left", ">= 50%", ">= 65%", "<= 1.6", "x rooflines", "ours is 2.00 x"):
    assert text in shown


@full
def test_parts_of_an_iteration_are_all_of_it():
  """With a copy that takes no time, the rooflines are the operations of the iteration."""
  setup = set_up(gpu.Config(**TINY).shape())
  parts = gpu.ppo_rooflines(setup, measure.Limits(1.0, float("inf")))
  assert sum(parts.values()) == pytest.approx(works.ppo_iteration(setup).flops)
  slow = gpu.ppo_rooflines(setup, measure.Limits(1.0, 1e-3))
  assert slow["sampling"] > parts["sampling"] and slow["update"] == parts["update"]


def test_parts_without_time_are_dropped(capsys):
  now = iter([0.0, 0.0, 50.0, 50.0, 50.0, 60.0, 60.0])
  clock = gpu.Clock(100, lambda: next(now))
  assert clock.run("first", lambda: 1) == 1
  assert clock.run("second", lambda: 2) == 2  # It took 50 of 50 seconds.
  with pytest.raises(turns.Unavailable, match="40 s left are too few"):
    clock.run("third", lambda: 3)
  assert "first: 100 s left" in capsys.readouterr().err


@full
def test_a_budget_that_is_spent_is_said(quick, monkeypatch, capsys):
  monkeypatch.setattr(gpu.Clock, "left", property(lambda clock: -1.0))
  content = gpu.run(gpu.Config(**TINY))
  assert not content["works"] and set(content["skipped"]) == {"torch", "train", "decode", "ppo"}
  assert "ppo: left out: -1 s left are too few" in capsys.readouterr().err


@pytest.mark.parametrize(
  "program, seconds, reason",
  [
    ("import sys; sys.exit('torch sees no GPU')", 60, "torch sees no GPU"),
    ("import time; time.sleep(60)", 0, "takes more than 1 s"),
    ("print('noise'); print('[1]')", 60, ""),
  ],
)
def test_a_program_that_does_not_answer_is_left_out(program, seconds, reason):
  command = [sys.executable, "-S", "-c", program]
  if not reason:
    assert gpu.ask(command, seconds) == [1]
    return
  with pytest.raises(turns.Unavailable, match=reason):
    gpu.ask(command, seconds)


def test_no_torch_is_a_reason(tmp_path):
  with pytest.raises(turns.Unavailable, match="no --torch_python"):
    gpu.torch_side(gpu.Config(**TINY), 1.0)
  absent = str(tmp_path / "python")
  with pytest.raises(turns.Unavailable, match="No such file"):
    gpu.torch_side(gpu.Config(**TINY, torch_python=absent), 1.0)


def test_too_few_tokens_are_said():
  assert gpu.without_prefill(3.0, 1.0) == 2.0
  with pytest.raises(turns.Unavailable, match="raise --response"):
    gpu.without_prefill(1.0, 1.0)


@full
def test_all_parts_run_on_a_cpu():
  content = gpu.run(gpu.Config(**TINY | {"response": 64, "rounds": 5}))
  require_results(content)
