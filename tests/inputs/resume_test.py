"""Workdirs that are opened a second time after something that the run depends on has changed."""

import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from experiments.lab import workbench
from rlhf_jax import flags, processes
from rlhf_jax.workdir import WorkdirError
from tests.testing import on_devices, read_configs


@pytest.fixture
def inputs(tmp_path, model_folder, rows_file, monkeypatch) -> Callable[..., None]:
  """`inputs(script, kind, words)`: opens the run of a script, as it does before it trains."""
  for name in ("start", "judge", "judge_2", "rival"):
    shutil.copytree(model_folder, tmp_path / name)
  for name in ("rows", "heldout", "ptx"):
    shutil.copy(rows_file, tmp_path / f"{name}.jsonl")
  (tmp_path / "my_scores.py").write_text("def score(prompts, responses, rows):\n  return [0.0]\n")
  monkeypatch.chdir(tmp_path)

  def start(script: str, kind: str, *words: str) -> None:
    size = [] if any("batch_size" in word for word in words) else ["--batch_size=4"]
    configs = read_configs(f"experiments.{script}", ["--workdir=run", *size, *words])
    extra = {"ptx": ("demonstrations", "ptx.jsonl")} if script == "ppo_max" else {}
    with on_devices(1), workbench.open(*configs, script, kind, extra=extra):
      pass

  return start


START, ROWS = "--init_from=start", "--data.path=rows.jsonl"
RUNS = {
  "sft": ("demonstrations", START, ROWS, "--data.eval_path=heldout.jsonl"),
  "dpo": ("preferences", START, ROWS, "--data.eval_path=heldout.jsonl", "--reward.path=judge"),
  "reward_model": ("preferences", "--model.path=start", ROWS),
  "ppo": ("prompts", START, ROWS, "--reward.path=judge,judge_2"),
  "ppo_max": ("prompts", START, ROWS, "--reward.path=judge", "--ptx_path=ptx.jsonl"),
  "nash_md": ("prompts", START, ROWS, "--preference.path=judge", "--opponent=rival"),
}


def _weights(path: str) -> None:
  file = pathlib.Path(path) / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  name = sorted(tensors)[0]
  tensors[name] = np.full_like(tensors[name], 0.5)
  safetensors.numpy.save_file(tensors, file, {"format": "pt"})


def _field(path: str) -> None:
  file = pathlib.Path(path)
  file.write_text(json.dumps(json.loads(file.read_text()) | {"initializer_range": 0.5}))


def _column(path: str) -> None:
  """Adds a column that only a reward could read."""
  file = pathlib.Path(path)
  rows = [json.loads(line) | {"answer": "7"} for line in file.read_text().splitlines()]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))


CHANGES = [
  ("sft", _weights, "start", "files of --init_from"),
  ("sft", _field, "start/config.json", "files of --init_from"),
  ("sft", _field, "start/generation_config.json", "files of --init_from"),
  ("sft", _field, "start/tokenizer_config.json", "files of --init_from"),
  ("sft", _column, "rows.jsonl", "file of --data.path"),
  ("sft", _column, "heldout.jsonl", "file of --data.eval_path"),
  ("dpo", _weights, "start", "files of --init_from"),
  ("dpo", _weights, "judge", "files of --reward.path"),
  ("dpo", _column, "rows.jsonl", "file of --data.path"),
  ("reward_model", _weights, "start", "files of --model.path"),
  ("ppo", _weights, "judge", "files of --reward.path"),
  ("ppo", _weights, "judge_2", "files of --reward.path"),
  ("ppo_max", _column, "ptx.jsonl", "file of --ptx_path"),
  ("nash_md", _weights, "judge", "files of --preference.path"),
  ("nash_md", _weights, "rival", "files of --opponent"),
  ("nash_md", _field, "rival/config.json", "files of --opponent"),
]


@pytest.mark.parametrize(("script", "change", "path", "name"), CHANGES)
def test_a_file_that_changed_is_named_by_its_flag(script, change, path, name, inputs, tmp_path):
  inputs(script, *RUNS[script])
  change(path)
  with pytest.raises(WorkdirError) as e:
    inputs(script, *RUNS[script])
  start, _, rest = str(e.value).partition(f"{name} was ")
  assert start == f"--workdir={tmp_path / 'run'} holds another run: "
  was, _, now = rest.partition("; use another --workdir")[0].partition(", now ")
  assert len(was) == len(now) == 8 and was != now and "\n" not in str(e.value)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--optim.learning_rate=0.5"], "--optim.learning_rate was 0.003, now 0.5"),
    (["--batch_size=2"], "--batch_size was 4, now 2"),
    (["--seed=5"], "--seed was 0, now 5"),
    (["--init_from=rival"], '--init_from was "start", now "rival"'),
    (["--data.path=ptx.jsonl"], '--data.path was "rows.jsonl", now "ptx.jsonl"'),
    (["--data.path=changed.jsonl"], '--data.path was "rows.jsonl", now "changed.jsonl"; file of'),
    (["--seed=5", "--optim.b1=0.5"], "--seed was 0, now 5; --optim.b1 was 0.9, now 0.5"),
  ],
)
def test_a_flag_that_changed_is_named_and_nothing_else(words, message, inputs, tmp_path):
  inputs("sft", *RUNS["sft"])
  shutil.copy("rows.jsonl", "changed.jsonl")
  _column("changed.jsonl")
  names = {word.partition("=")[0] for word in words}
  usual = [word for word in RUNS["sft"][1:] if word.partition("=")[0] not in names]
  with pytest.raises(WorkdirError) as e:
    inputs("sft", "demonstrations", *usual, *words)
  assert f"holds another run: {message}" in str(e.value)
  assert len(str(e.value)) < len(str(tmp_path)) + 240


def test_what_does_not_matter_may_change(inputs):
  inputs("dpo", *RUNS["dpo"])
  pathlib.Path("start/README.md").write_text("about this model")
  pathlib.Path("start/optimizer.pt").write_bytes(b"x")
  pathlib.Path("rows.jsonl").touch()
  free = ("--steps=9", "--log_every=2", "--eval_every=3", "--checkpoint_every=4", "--trackers=")
  inputs("dpo", *RUNS["dpo"], *free)


def test_a_function_of_the_user_that_changed_is_named(inputs):
  words = ("prompts", START, ROWS, "--reward.name=my_scores:score")
  inputs("ppo", *words)
  pathlib.Path("my_scores.py").write_text("def score(prompts, responses, rows):\n  return [1.0]\n")
  with pytest.MonkeyPatch.context() as patch:
    patch.delitem(__import__("sys").modules, "my_scores")
    with pytest.raises(WorkdirError, match="run: file of --reward.name was .{8}, now .{8}; use"):
      inputs("ppo", *words)


def test_process_0_reads_the_files_for_all(inputs, monkeypatch):
  from experiments.lab import models

  read = []
  monkeypatch.setattr(models.workdir_lib, "files_digest", lambda files: read.append(files) or "x")
  settings = flags.flatten({"init_from": "start", "data": {"path": "rows.jsonl"}})
  monkeypatch.setattr(processes, "agree", lambda function: {"files of --init_from": "of process 0"})
  assert models.digests(settings) == {"files of --init_from": "of process 0"} and not read
