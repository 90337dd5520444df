"""ReST as a script: its data, a kill while it samples, and its steps."""

import json
import shutil

import numpy as np
import pytest

from experiments.lab import line_files
from rlhf_jax import workdir as workdir_lib

# The gold reward of many short answers is the same, and ties are left out.
FLAGS = ("--reward.name=gold", "--grow_steps=2", "--batch_size=2", "--steps=3")


def odd_length(prompts, responses, rows):
  """A constraint that half of the responses satisfy."""
  return [len(response) % 2 == 1 for response in responses]


@pytest.fixture(scope="module")
def whole(shared_run, sft_run):
  return shared_run("rest", "rest", f"--init_from={sft_run}", *FLAGS)


def grown(workdir, step):
  return line_files.read_lines(workdir / f"grow_{step}" / "responses.jsonl")


def test_the_grown_data_can_be_read(whole):
  rows = grown(whole, 0)
  assert len(rows) == 16 * 4
  assert [row["sample"] for row in rows] == [0, 1, 2, 3] * 16
  assert len({row["prompt"] for row in rows}) == 16
  assert all(row["response"] or row["tokens"] for row in rows)
  assert len({row["response"] for row in rows[:4]}) > 1
  other = grown(whole, 1)
  assert not {row["prompt"] for row in rows} & {row["prompt"] for row in other}


def test_each_step_keeps_fewer_and_better_responses(whole):
  rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  for g in range(2):
    # What is kept is chosen by the scores less the penalty of a truncated response.
    rewards = np.array([row["score"] - (not row["ended"]) for row in grown(whole, g)])
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
  assert (whole / "plots" / "quality.png").stat().st_size > 0
  summary = json.loads((whole / "summary.json").read_text())
  assert {"gold/win_rate", "kl", "reward/mean"} <= set(summary)


def test_improve_steps_are_compared_with_the_same_random_numbers(tmp_path, start_here, sft_run):
  flags = (*FLAGS[:1], "--grow_steps=1", *FLAGS[2:3], "--steps=1", "--optim.learning_rate=1e-30")
  start_here("rest", tmp_path, f"--init_from={sft_run}", *flags)
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert len(rows) == 2  # No step has changed the policy.
  assert rows[0]["eval/gold/mean"] == rows[1]["eval/gold/mean"]
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["gold/mean"] == pytest.approx(rows[0]["eval/gold/mean"])


def test_another_number_of_steps_is_another_run(tmp_path, whole, start_here, sft_run):
  """Later Grow steps have sampled from what the Improve steps before them trained."""
  shutil.copytree(whole, tmp_path / "run")
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
  words = (f"--init_from={sft_run}", *FLAGS)
  with pytest.raises(workdir_lib.WorkdirError, match='number of --steps was "3", now "5"') as e:
    start_here("rest", tmp_path / "run", *words[:-1], "--steps=5")
  assert e.value.exit_code == 78
  assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.slow
def test_a_kill_while_sampling_loses_no_scored_response(tmp_path, start_here, sft_run):
  # 64 prompts are sampled in two calls; the kill is in the second one, in the middle of a line.
  flags = (f"--init_from={sft_run}", *FLAGS[:1], *FLAGS[2:], "--grow_steps=1", "--prompts=64")
  one, two = tmp_path / "whole", tmp_path / "killed"
  start_here("rest", one, *flags)
  shutil.copytree(one / "grow_0", two / "grow_0")
  (two / "grow_0" / "summary.json").unlink()
  path = two / "grow_0" / "responses.jsonl"
  lines = path.read_bytes().splitlines(keepends=True)
  before = b"".join(lines[:150])
  path.write_bytes(before + lines[150][:20])
  start_here("rest", two, *flags)
  assert path.read_bytes().startswith(before)
  for name in ("grow_0/responses.jsonl", "export/model.safetensors", "metrics.jsonl"):
    assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_the_best_of_each_prompt_with_a_forward_kl(tmp_path, start_here, sft_run):
  start_here(
    "rest",
    tmp_path,
    f"--init_from={sft_run}",
    "--reward.name=gold",
    f"--reward.constraints={__name__}:odd_length",
    "--grow_steps=1",
    "--batch_size=1",
    "--prompts=32",
    "--steps=3",
    "--rest.keep=best",
    "--rest.quantiles=0",
    "--rest.kappa=0.3",
    "--lora.rank=2",
  )
  first, *_ = (tmp_path / "grow_0_improve_0" / "metrics.jsonl").read_text().splitlines()
  assert abs(json.loads(first)["kl/forward"]) < 1e-4  # The policy starts as the reference.
  row = json.loads((tmp_path / "metrics.jsonl").read_text())
  satisfied = np.array([line["satisfied"] for line in grown(tmp_path, 0)]).reshape(-1, 4)
  assert row["kept_share"] == np.mean(satisfied.any(axis=1)) / 4
  violations = json.loads((tmp_path / "grow_0" / "summary.json").read_text())["reward/violations"]
  assert violations == pytest.approx(1 - satisfied.mean())
  assert all(row["satisfied"] == len(row["response"]) % 2 for row in grown(tmp_path, 0))
