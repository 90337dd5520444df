"""Prompts of Grow steps, and grown responses as demonstrations."""

import numpy as np
import pytest

from experiments.lab import growing, improving
from rlhf_jax import data, flags, loop
from rlhf_jax.data import kinds


def test_each_step_takes_other_prompts_while_there_are_any():
  examples = [{"prompt": np.int32([i])} for i in range(5)]
  prompts = data.from_examples("prompts", examples, [{"prompt_text": str(i)} for i in range(5)])
  taken = [
    [row["prompt_text"] for row in growing.take_prompts(prompts, step, 2).rows] for step in range(3)
  ]
  assert taken == [["0", "1"], ["2", "3"], ["4", "0"]]
  assert len(growing.take_prompts(prompts, 1, 9).examples) == 5
  weighted = prompts._replace(mixture=(kinds.Share("a", 2, 0.7), kinds.Share("b", 3, 0.3)))
  with pytest.raises(flags.UsageError, match="--data.path gives weights to files"):
    growing.take_prompts(weighted, 0, 2)


def test_kept_responses_become_demonstrations_with_their_weights():
  rows = [
    {"prompt": "p", "response": "r", "prompt_tokens": [9, i], "tokens": [i] * (i + 1)}
    for i in range(4)
  ]
  weights = np.array([[0.0, 0.5], [1.0, 0.0]])
  kept, of_kept = growing.kept_examples(growing.Grown(rows, np.zeros((2, 2))), weights)
  assert kept.kind == "demonstrations"
  assert [example["response"].tolist() for example in kept.examples] == [[1, 1], [2, 2, 2]]
  assert [example["prompt"].tolist() for example in kept.examples] == [[9, 1], [9, 2]]
  np.testing.assert_array_equal(of_kept, np.float32([0.5, 1.0]))


def test_each_stage_is_a_run_of_its_own(tmp_path):
  session = loop.Session(str(tmp_path), seed=3)
  stages = [
    improving.stage(session, tmp_path, grow=g, improve=i) for g in range(3) for i in range(-1, 3)
  ]
  assert len({stage.workdir for stage in stages}) == len({stage.seed for stage in stages}) == 12
  assert stages[0].workdir == str(tmp_path / "grow_0")
  assert stages[-1].workdir == str(tmp_path / "grow_2_improve_2")
