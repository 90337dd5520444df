"""Traces and rates of a run."""

import gzip
import json

import jax
import numpy as np
import pytest

from rlhf_jax import loop, profiling, sharding, writers
from tests import loop_test

MESH = sharding.make_mesh("", jax.devices()[:1])


class FakeMesh:
  """Two devices of a kind."""

  size = 2

  def __init__(self, kind, stats=()):
    def device(stat):
      made = type("Device", (), {"device_kind": kind, "process_index": 0})()
      made.memory_stats = lambda: stat
      return made

    self.devices = np.array([device(stat) for stat in stats or (None, None)])


@pytest.mark.parametrize(
  ("metrics", "kind", "expected"),
  [
    ({"tokens": 60.0}, "cpu", {"tokens_per_second": 6}),
    ({"tokens": 60.0, "model_flops": 1e15}, "cpu", {"model_flops_per_second": 1e14}),
    (
      {"tokens": 60.0, "model_flops": 6e14, "time/generate": 3.0, "time/reward": 1.0},
      "NVIDIA H200",
      {
        "tokens_per_second": 6,
        "tokens_per_second/rollout": 20,
        "tokens_per_second/update": 10,
        "model_flops_per_second": 1e14,
        "mfu": 1e14 / (2 * 989e12),
      },
    ),
    (
      {"tokens": 60.0, "time/generate": 0.1, "time/reward": 1.0, "staleness": 1.0},
      "TPU v5 lite",
      {"tokens_per_second": 6},
    ),
    ({}, "TPU v4", {}),
  ],
)
def test_rates(metrics, kind, expected):
  found = profiling.rates(metrics, 10.0, FakeMesh(kind))
  for name, value in expected.items():
    assert found[name] == pytest.approx(value), name
  assert found.keys() - expected.keys() <= {"tokens_per_second"}


def test_memory_is_that_of_the_fullest_device_and_absent_where_nobody_says():
  stats = [{"bytes_in_use": 3, "peak_bytes_in_use": 9}, {"bytes_in_use": 5, "peak_bytes_in_use": 7}]
  found = profiling.memory(FakeMesh("NVIDIA H200", stats))
  assert found == {"memory/in_use": 5, "memory/peak": 9}
  assert profiling.memory(FakeMesh("cpu")) == {}


@pytest.mark.parametrize("text", ["23:20", "5:5", "0:3", "3", "a:b", "3:", "-1:3", "1:2:3"])
def test_impossible_ranges_are_refused(text):
  with pytest.raises(ValueError, match="^profile_steps"):
    loop.Session("run", profile_steps=text)


def test_a_trace_changes_nothing_and_goes_on_in_a_run_that_is_continued(tmp_path):
  expected = loop_test.fit(tmp_path / "plain")
  seen = []

  def run(steps):
    session = loop.Session(str(tmp_path / "run"), profile_steps="3:6")
    with loop.open_run(session) as opened:
      config = loop.RunConfig(steps=steps, batch_size=8, log_every=3, checkpoint_every=2)
      state = loop.fit(
        opened, config, loop_test.quadratic, loop_test.start_state(), loop_test.Batches()
      )
    folder = tmp_path / "run" / profiling.FOLDER
    seen.append(sorted(folder.glob("plugins/profile/*/perfetto_trace.json.gz")))
    return jax.device_get(state)

  run(4)  # It ends within the range: what it has traced is written.
  end = run(loop_test.STEPS)
  run(loop_test.STEPS)  # It has finished: nothing to trace.
  jax.tree.map(np.testing.assert_array_equal, end, expected)
  rows = [row["step"] for row in writers.read_metrics(tmp_path / "run" / "metrics.jsonl")]
  assert rows == sorted(set(rows))
  assert [len(paths) for paths in seen] == [1, 2, 2]
  steps = set()
  for path in seen[-1]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps |= {int(e["args"]["step_num"]) for e in events if "step_num" in e.get("args", {})}
  assert steps == {3, 4, 5}
  assert [p.name for p in (tmp_path / "run" / profiling.FOLDER).iterdir()] == ["plugins"]
