import contextlib
import importlib.util
import json
import math
import os
import sqlite3
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import writers


def _write(path, steps, resume_step=None):
  writer = writers.JsonlWriter(path, resume_step=resume_step)
  for step in steps:
    writer.write(step, {"loss": float(step)})
  writer.close()


def _steps(path):
  return [row["step"] for row in writers.read_metrics(path)]


def test_lines_are_strict_json_with_step_first(tmp_path):
  path = tmp_path / "run" / "metrics.jsonl"
  writer = writers.JsonlWriter(path, resume_step=None)
  writer.write(3, {"loss": jnp.float32(0.1), "tokens": 512, "x": np.float64(2.5)})
  writer.close()
  assert path.read_text() == '{"step": 3, "loss": 0.10000000149011612, "tokens": 512, "x": 2.5}\n'
  assert writers.read_metrics(path) == [
    {"step": 3, "loss": np.float32(0.1), "tokens": 512, "x": 2.5}
  ]


def test_a_line_is_in_the_file_before_the_next_is_written(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = writers.JsonlWriter(path, resume_step=None)
  for step in range(3):
    writer.write(step, {"loss": 1.0})
    assert _steps(path) == list(range(step + 1))
  writer.close()


def test_a_killed_process_loses_no_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  code = (
    "import os, sys; from rlhf_jax import writers\n"
    "writer = writers.JsonlWriter(sys.argv[1], resume_step=None)\n"
    "for step in range(5): writer.write(step, {'loss': 1.0})\n"
    "os.kill(os.getpid(), 9)"
  )
  assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -9
  assert _steps(path) == [0, 1, 2, 3, 4]


def test_non_finite_values_survive(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = writers.JsonlWriter(path, resume_step=None)
  writer.write(1, {"a": math.nan, "b": math.inf, "c": jnp.float32(-jnp.inf)})
  writer.close()

  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  raw = json.loads(path.read_text(), parse_constant=refuse)
  assert raw == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
  (row,) = writers.read_metrics(path)
  assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf


@pytest.mark.parametrize(
  "resume_step, kept", [(None, []), (0, [0]), (3, [0, 1, 2, 3]), (9, range(6))]
)
def test_resume_drops_the_steps_after_the_checkpoint(tmp_path, resume_step, kept):
  path = tmp_path / "metrics.jsonl"
  _write(path, range(6))
  _write(path, [100], resume_step)
  assert _steps(path) == [*kept, 100]


def test_resume_without_a_file_starts_one(tmp_path):
  _write(tmp_path / "metrics.jsonl", [5], resume_step=4)
  assert _steps(tmp_path / "metrics.jsonl") == [5]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "loss": 1.0}', b'{"a": "\xc3'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
  path = tmp_path / "metrics.jsonl"
  _write(path, range(3))
  with open(path, "ab") as file:
    file.write(torn)
  assert _steps(path) == [0, 1, 2]
  _write(path, [3], resume_step=3)
  assert _steps(path) == [0, 1, 2, 3]


def test_an_unreadable_line_is_named_by_the_reader_and_dropped_on_resume(tmp_path):
  path = tmp_path / "metrics.jsonl"
  _write(path, range(2))
  with open(path, "ab") as file:
    file.write(b'{"step": 2, "lo{"step": 3}\n[1]\n{"loss": 1}\n{"step": 4, "loss": null}\n')
    file.write(b'{"step": 5, "loss": ' + b"[" * 100_000 + b"\n")
  with pytest.raises(ValueError, match=r"metrics\.jsonl:3: "):
    writers.read_metrics(path)
  _write(path, [5], resume_step=9)
  assert _steps(path) == [0, 1, 5]


@pytest.mark.parametrize("value", [jnp.zeros(2), "0.5", None, 1j, {}])
def test_a_value_that_is_not_a_number_is_refused_by_name(tmp_path, value):
  writer = writers.JsonlWriter(tmp_path / "metrics.jsonl", resume_step=None)
  with pytest.raises(TypeError, match="'reward/mean'"):
    writer.write(1, {"loss": 1.0, "reward/mean": value})
  writer.close()
  assert _steps(tmp_path / "metrics.jsonl") == []  # Not even a part of the line.


def test_a_metric_called_step_is_refused(tmp_path):
  writer = writers.JsonlWriter(tmp_path / "metrics.jsonl", resume_step=None)
  with pytest.raises(ValueError, match="'step'"):
    writer.write(1, {"step": 2.0})
  writer.close()


def test_the_copy_in_a_bucket_is_renewed_now_and_then(tmp_path, monkeypatch):
  now, copied = [0.0], []
  monkeypatch.setattr(writers.bucket, "push", lambda path, **_: copied.append(_steps(path)))
  monkeypatch.setattr(writers.time, "monotonic", lambda: now[0])
  path = tmp_path / "metrics.jsonl"
  _write(path, range(3))
  copied.clear()
  writer = writers.JsonlWriter(path, resume_step=1)
  for step, seconds in ((2, 1.0), (3, 31.0), (4, 60.0), (5, 62.0)):
    now[0] = seconds
    writer.write(step, {"loss": 0.0})
  writer.close()
  assert copied == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


class _List:
  def __init__(self, fail=False):
    self.rows, self.fail, self.closed, self.calls = [], fail, False, 0

  def write(self, step, scalars):
    self.calls += 1
    if self.fail:
      raise RuntimeError("dashboard is down")
    self.rows.append((step, dict(scalars)))

  def table(self, step, name, rows):
    self.write(step, {name: len(rows)})

  def close(self):
    self.closed = True


def test_a_failing_tracker_is_switched_off_and_the_others_go_on():
  record, broken, fine = _List(), _List(fail=True), _List()
  writer = writers.CompositeWriter([record, broken, fine])
  writer.write(1, {"loss": 1.0})
  writer.write(2, {"loss": 2.0})
  writer.close()
  assert record.rows == fine.rows == [(1, {"loss": 1.0}), (2, {"loss": 2.0})]
  assert broken.calls == 1 and record.closed and fine.closed


def test_a_table_goes_to_all_and_a_failure_to_none_twice(caplog):
  record, broken, fine = _List(), _List(fail=True), _List()
  writer = writers.CompositeWriter([record, broken, fine])
  for step in (1, 2):
    writer.table(step, "samples", [{"prompt": "p"}])
    writer.write(step, {"loss": 1.0})
  assert record.rows == fine.rows and record.rows[0] == (1, {"samples": 1})
  assert broken.calls == 1
  (entry,) = caplog.records
  assert entry.message.startswith("_List failed and is switched off: ") and not entry.exc_info


def test_a_tracker_that_cannot_be_opened_is_left_out(tmp_path, monkeypatch, caplog):
  def down(*args, **kwargs):
    raise OSError("no route to the service")

  monkeypatch.setitem(writers.TRACKERS, "wandb", down)
  writer = writers.make_writer(tmp_path, ["wandb"])
  writer.write(1, {"loss": 1.0})
  writer.close()
  assert _steps(tmp_path / "metrics.jsonl") == [1]
  assert "the tracker wandb cannot be opened" in caplog.text


def test_a_failing_record_stops_the_run():
  other = _List()
  with pytest.raises(RuntimeError, match="down"):
    writers.CompositeWriter([_List(fail=True), other]).write(1, {"loss": 1.0})
  assert not other.rows


def test_composite_writer_needs_a_writer():
  with pytest.raises(ValueError, match="at least one"):
    writers.CompositeWriter([])


def test_make_writer_always_writes_jsonl(tmp_path):
  writer = writers.make_writer(tmp_path)
  writer.write(1, {"loss": 1.0})
  writer.close()
  assert _steps(tmp_path / "metrics.jsonl") == [1]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  writer = writers.RunWriter(tmp_path)
  writer.table(0, "samples", [{"prompt": "p"}])
  writer.open(resume_step=None, config={})
  writer.write(1, {"loss": 1.0})
  writer.table(1, "samples", [{"prompt": "p"}])
  writer.close()
  assert not list(tmp_path.iterdir())


def test_an_unknown_tracker_is_refused_before_anything_is_written(tmp_path):
  with pytest.raises(ValueError, match=r"'wndb': choose from tensorboard, trackio, wandb"):
    writers.make_writer(tmp_path, ["wndb"])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "tracker, package, extra",
  [
    ("tensorboard", "tensorboardX", "track"),
    ("wandb", "wandb", "wandb"),
    ("trackio", "trackio", "trackio"),
  ],
)
def test_a_missing_package_is_named_with_the_fix(monkeypatch, tracker, package, extra):
  monkeypatch.setitem(sys.modules, package, None)  # Makes the import fail.
  with pytest.raises(ValueError, match=rf"--trackers={tracker}: .*pip install 'rlhf_jax\[{extra}"):
    writers.require_packages([tracker])


def test_a_line_that_the_disk_has_no_room_for_is_an_error(tmp_path, monkeypatch):
  writer = writers.JsonlWriter(tmp_path / "metrics.jsonl", resume_step=None)

  class Short:
    def write(self, content):
      return len(content) - 1

    def close(self):
      pass

  writer.close()
  monkeypatch.setattr(writer, "_file", Short())
  with pytest.raises(OSError, match="No space left") as e:
    writer.write(1, {"loss": 1.0})
  assert e.value.filename == str(tmp_path / "metrics.jsonl")


def test_tensorboard_writes_event_files(tmp_path):
  pytest.importorskip("tensorboardX")
  writer = writers.make_writer(tmp_path, ["tensorboard"], resume_step=3)
  writer.write(4, {"loss": 1.0})
  writer.close()
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"loss" in events.read_bytes()


ROWS = [
  {"prompt": "a | b\n# c", "response": "<script>x</script>", "gold": np.float32(1.5)},
  {"prompt": "q", "response": "NaN", "gold": math.nan, "more": 1},
]


def test_a_table_is_a_file_with_an_object_a_row(tmp_path):
  writers.write_table(tmp_path, 12, "samples", ROWS)
  lines = (tmp_path / "samples" / "step_00000012.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {**ROWS[0], "gold": 1.5},
    {**ROWS[1], "gold": "NaN"},
  ]


def test_a_run_writer_writes_tables_before_it_is_opened_and_nothing_else(tmp_path):
  writer = writers.RunWriter(tmp_path, ["tensorboard"])
  writer.table(0, "samples", ROWS)
  with pytest.raises(ValueError, match="open the writer first"):
    writer.write(1, {"loss": 1.0})
  writer.close()
  assert [path.name for path in tmp_path.iterdir()] == ["samples"]


def _texts(folder) -> dict[str, tuple[int, str]]:
  """The texts in the event files of a folder: tag -> step and text."""
  event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
  texts = {}
  for path in folder.iterdir():
    content = path.read_bytes()
    while content:  # Length, its checksum, event, its checksum.
      (size,) = struct.unpack("<Q", content[:8])
      event = event_pb2.Event.FromString(content[12 : 12 + size])
      content = content[16 + size :]
      for value in event.summary.value:
        if value.tensor.string_val:
          texts[value.tag] = event.step, value.tensor.string_val[0].decode()
  return texts


def test_tensorboard_gets_settings_and_tables_as_text(tmp_path):
  writer = writers.RunWriter(tmp_path, ["tensorboard"])
  writer.open(resume_step=None, config={"optim.learning_rate": 0.5, "data.path": "a|b\n|x"})
  writer.table(3, "samples", ROWS)
  writer.close()
  texts = _texts(tmp_path / "tensorboard")
  _, settings = texts["config/text_summary"]
  assert "| optim.learning_rate | 0.5 |" in settings and settings.count("\n") == 3
  step, samples = texts["samples/text_summary"]
  header, _, first, second = samples.splitlines()  # A row of a table is a line.
  assert step == 3 and header == "| prompt | response | gold | more |"
  assert first == "| a &#124; b # c | &lt;script&gt;x&lt;/script&gt; | 1.5 |  |"
  assert second == "| q | NaN |  | 1 |"


def test_dashboards_get_the_first_rows_only(tmp_path):
  writer = writers.RunWriter(tmp_path, ["tensorboard"])
  writer.open(resume_step=None, config={})
  writer.table(1, "samples", [{"prompt": str(i)} for i in range(100)])
  writer.close()
  assert len(_texts(tmp_path / "tensorboard")["samples/text_summary"][1].splitlines()) == 34
  assert len((tmp_path / "samples" / "step_00000001.jsonl").read_text().splitlines()) == 100


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_dashboards_without_a_network(tmp_path, name):
  """A run, killed and resumed; in a process of its own, for both read their folders on import."""
  if importlib.util.find_spec(name) is None:
    pytest.skip(f"{name} is not installed")
  code = (
    "import sys; from rlhf_jax import writers\n"
    "for resume in (None, 2):\n"
    "  writer = writers.RunWriter(sys.argv[1], [sys.argv[2]])\n"
    "  writer.open(resume_step=resume, config={'optim.learning_rate': 0.5, 'mesh': ''})\n"
    "  for step in range(1, 4) if resume is None else (3, 4):\n"
    "    writer.write(step, {'loss': 1 / step, 'bad': float('nan')})\n"
    "  writer.table(step, 'samples', [{'prompt': 'a', 'gold': 1.5}, {'prompt': 'b'}])\n"
    "  writer.close()\n"
  )
  own = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "db"), "HOME": str(tmp_path)}
  done = subprocess.run(
    [sys.executable, "-c", code, tmp_path / "run", name],
    env=os.environ | own,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0 and "switched off" not in done.stderr, done.stderr
  assert "cannot be opened" not in done.stderr, done.stderr
  if name == "wandb":
    tables = list((tmp_path / "run" / "wandb").rglob("*.table.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table == {"columns": ["prompt", "gold"], "data": [["a", 1.5], ["b", None]]}
    logs = list((tmp_path / "run" / "wandb").rglob("*.wandb"))
    assert all(b"optim.learning_rate" in path.read_bytes() for path in logs)
    return
  with contextlib.closing(sqlite3.connect(tmp_path / "db" / "rlhf_jax.db")) as base:
    rows = [
      (step, json.loads(row)) for step, row in base.execute("SELECT step, metrics FROM metrics")
    ]
    (settings,) = base.execute("SELECT config FROM configs").fetchone()
  assert (4, {"loss": 0.25, "bad": "NaN"}) in rows
  tables = [row["samples"]["_value"] for _, row in rows if "samples" in row]
  assert tables == [[{"prompt": "a", "gold": 1.5}, {"prompt": "b", "gold": None}]] * 2
  assert json.loads(settings)["optim.learning_rate"] == 0.5


class _FakeTracker:
  """Stands in for wandb and trackio, whose `init` returns a run with `log` and `finish`."""

  def __init__(self):
    self.settings, self.rows, self.finished = [], [], 0

  def init(self, **settings):
    self.settings.append(settings)
    return self

  def Table(self, columns, data):
    return columns, data

  def log(self, row, step):
    self.rows.append((step, row))

  def finish(self):
    self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_dashboards_get_rows_and_settings_and_keep_the_run_on_resume(tmp_path, monkeypatch, name):
  fake = _FakeTracker()
  monkeypatch.setitem(sys.modules, name, fake)
  for resume_step in (None, 1):
    writer = writers.make_writer(tmp_path, [name], resume_step=resume_step, config={"seed": 1})
    writer.write(2, {"loss": jnp.float32(0.5)})
    writer.table(2, "samples", ROWS[:1])
    writer.close()
  table = (["prompt", "response", "gold"], [["a | b\n# c", "<script>x</script>", 1.5]])
  assert fake.rows == [(2, {"loss": 0.5}), (2, {"samples": table})] * 2 and fake.finished == 2
  first, second = fake.settings
  assert first == second
  assert first["name"] == tmp_path.name and first["config"] == {"seed": 1}
  assert first["resume"] == "allow"
