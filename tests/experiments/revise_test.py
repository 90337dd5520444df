"""Answers that a model revises, and flags that are refused."""

import json

import pytest

from rlhf_jax import flags, simulation
from tests.testing import read_flags


@pytest.mark.slow
def test_a_model_revises_its_answers(tmp_path, run_script, shared):
  model = shared / "models" / "stories260k"
  prompts = tmp_path / "prompts.jsonl"
  rows = simulation.preferences("eval", 24, 0)
  prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
  words = (
    f"--judge.path={model}",
    "--data.end_token=<s>",
    f"--data.path={prompts}",
    "--sampling.max_new_tokens=12",
    "--revisions=2",
    "--batch_size=2",
    "--limit=4",
  )
  finished = run_script("revise", tmp_path / "out", *words)
  assert finished.code == 0, finished.output
  path = tmp_path / "out" / "revised.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert len({row["prompt"] for row in rows}) == 4
  for row in rows:
    assert [set(step) for step in row["steps"]] == [{"principle", "critique", "revision"}] * 2
    assert row["response"] in (row["steps"][-1]["revision"], row["draft"])
  # What was killed after the first two rows is continued with the same ones.
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[:2]))
  again = run_script("revise", tmp_path / "out", *words)
  assert again.code == 0, again.output
  assert path.read_text() == "".join(lines)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([], "--judge.path is needed"),
    (["--judge.path=x", "--revisions=0"], "--revisions must be at least 1"),
    (["--judge.path=x", "--batch_size=0"], "--batch_size must be at least 1"),
    (["--judge.path=x", "--limit=-1"], "--limit must not be negative"),
  ],
)
def test_flags_that_are_refused(words, message):
  with pytest.raises(flags.UsageError, match=message):
    read_flags("experiments.revise", ["--workdir=x", *words])
