"""ReST as a script: its data, a kill while it samples, and its steps."""

import json

import numpy as np
import pytest

from experiments.lab import line_files

# The gold reward of many short answers is the same, and ties are left out.
FLAGS = ("--reward.name=gold", "--grow_steps=2", "--batch_size=2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run_script, sft_run):
  finished = run_script(
    "rest", tmp_path_factory.mktemp("rest") / "whole", f"--init_from={sft_run}", *FLAGS
  )
  assert finished.code == 0, finished.output
  return finished


def grown(workdir, step):
  return line_files.read_lines(workdir / f"grow_{step}" / "responses.jsonl")


def test_the_grown_data_can_be_read(whole):
  rows = grown(whole.workdir, 0)
  assert len(rows) == 16 * 4
  assert [row["sample"] for row in rows] == [0, 1, 2, 3] * 16
  assert len({row["prompt"] for row in rows}) == 16
  assert all(row["response"] or row["tokens"] for row in rows)
  assert len({row["response"] for row in rows[:4]}) > 1
  other = grown(whole.workdir, 1)
  assert not {row["prompt"] for row in rows} & {row["prompt"] for row in other}


def test_each_step_keeps_fewer_and_better_responses(whole):
  lines = (whole.workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  for g in range(2):
    rewards = np.array([row["reward"] for row in grown(whole.workdir, g)])
    advantages = rewards - rewards.reshape(-1, 4).mean(axis=1).repeat(4)
    for i, quantile in enumerate((0.3, 0.6)):
      row = rows[2 * g + i]
      threshold = np.quantile(advantages, quantile)
      above = advantages > threshold + 1e-6  # Means are rounded.
      kept = rewards[above if above.any() else advantages >= threshold - 1e-6]
      assert row["grown_reward/mean"] == pytest.approx(rewards.mean())
      assert row["kept_reward/mean"] == pytest.approx(kept.mean())
      assert row["kept_share"] == pytest.approx(len(kept) / len(rewards))
      assert np.isfinite(row["eval/gold/mean"])
  assert (whole.workdir / "plots" / "quality.png").stat().st_size > 0
  summary = json.loads((whole.workdir / "summary.json").read_text())
  assert {"gold/win_rate", "kl", "reward/mean"} <= set(summary)


@pytest.mark.slow
def test_a_kill_while_sampling_loses_no_scored_response(tmp_path, run_script, kill_script, sft_run):
  # 64 prompts are sampled in two calls.
  flags = (f"--init_from={sft_run}", "--reward.name=gold", "--grow_steps=1", "--prompts=64")
  one, two = tmp_path / "whole", tmp_path / "killed"
  finished = run_script("rest", one, *flags)
  assert finished.code == 0, finished.output
  path = two / "grow_0" / "responses.jsonl"
  kill_script("rest", two, *flags, mark=path)
  before = path.read_bytes()
  before = before[: before.rfind(b"\n") + 1]
  again = run_script("rest", two, *flags)
  assert again.code == 0, again.output
  assert path.read_bytes().startswith(before)
  for name in ("grow_0/responses.jsonl", "export/model.safetensors", "metrics.jsonl"):
    assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_torn_line_is_cut_off(tmp_path):
  path = tmp_path / "responses.jsonl"
  path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
  assert line_files.read_lines(path) == [{"a": 1}, {"a": 2}]
  assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
  assert line_files.read_lines(tmp_path / "none") == []


def test_the_best_of_each_prompt_with_a_forward_kl(tmp_path, run_script, sft_run):
  finished = run_script(
    "rest",
    tmp_path,
    f"--init_from={sft_run}",
    "--reward.name=gold",
    "--grow_steps=1",
    "--rest.keep=best",
    "--rest.quantiles=0",
    "--rest.kappa=0.3",
    "--lora.rank=2",
  )
  assert finished.code == 0, finished.output
  first, *_ = (tmp_path / "grow_0_improve_0" / "metrics.jsonl").read_text().splitlines()
  assert abs(json.loads(first)["kl/forward"]) < 1e-4  # The policy starts as the reference.
  row = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert row["kept_share"] == 0.25
