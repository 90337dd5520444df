"""Samples to held-out prompts, and flags that are refused."""

import json

import pytest

from experiments import generate
from rlhf_jax import flags, loop
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from tests.testing import read_flags


def test_held_out_prompts_are_answered(tmp_path, sft_run):
  config = generate.Config(
    str(sft_run),
    limit=5,
    batch_size=4,
    data=DataConfig(rows=64, eval_rows=8),
    sampling=SamplingConfig(max_new_tokens=4, samples_per_prompt=2),
  )
  rows = generate.generate(loop.Session(str(tmp_path)), config)
  lines = (tmp_path / "samples" / "step_00000000.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == rows
  prompts = [row["prompt"] for row in rows]
  assert len(set(prompts)) == 5 and prompts[::2] == prompts[1::2]
  assert all(row["logprob"] < 0 for row in rows)


@pytest.mark.parametrize("name", ["limit", "batch_size"])
def test_flags_that_are_refused(name):
  with pytest.raises(flags.UsageError, match=f"--{name} must be at least 1, got 0"):
    read_flags("experiments.generate", ["--workdir=x", "--init_from=x", f"--{name}=0"])
