import dataclasses

import pytest

from experiments.lab import given_rows, models
from rlhf_jax import loop, simulation
from rlhf_jax.data import DataConfig
from tests.data.rows import TOKENIZER, prompts, text, write

SESSION = loop.Session("run", token_cache="none")


@pytest.mark.parametrize(
  ("options", "asked", "count", "said"),
  [
    ({}, {"every": True, "limit": 64}, 20, "answered: 20 of 20 different prompts"),
    ({"eval_fraction": 0.0}, {"every": True, "limit": 64}, 20, "answered: 20 of 20"),
    ({}, {"every": True, "limit": 5}, 5, "answered: 5 of 20 different prompts"),
    ({"eval_rows": 7}, {"every": True}, 20, "answered: 20 of 20 different prompts"),
    ({"eval_path": "eval"}, {"every": True, "limit": 64}, 3, "answered: 3 of 3"),
    ({"eval_path": "eval"}, {}, 3, "answered: 3 of 3"),
    ({"eval_fraction": 0.0}, {}, 20, "answered: 20 of 20"),
    ({"eval_fraction": 0.0, "eval_rows": 7}, {}, 7, "answered: 7 of 20"),
    (
      {"eval_fraction": 0.001, "eval_rows": 7},
      {},
      1,
      "1 held-out prompts; the other 19 are for training, and data.eval_fraction=0 takes all, up to"
      " data.eval_rows=7",
    ),
  ],
)
def test_prompts_of_a_file(tmp_path, capsys, options, asked, count, said):
  if "eval_path" in options:
    options = options | {"eval_path": write(tmp_path, prompts(3, start=30), "eval.jsonl")}
  config = DataConfig(path=write(tmp_path, prompts(20)), **options)
  found = given_rows.prompts(SESSION, "Title", config, TOKENIZER, model="m", **asked)
  assert len(found.examples) == len(found.rows) == count
  shown = capsys.readouterr().err
  assert said in shown and "model: m" in shown and config.path in shown


def test_equal_prompts_are_answered_once(tmp_path, capsys):
  config = DataConfig(path=write(tmp_path, [*prompts(4), *prompts(4)]))
  found = given_rows.prompts(SESSION, "Title", config, TOKENIZER, every=True, limit=9)
  assert len(found.examples) == 4
  assert "noticed: 4 repeated" in capsys.readouterr().err


def test_much_that_is_left_out_is_a_warning(tmp_path, capsys):
  rows = [*prompts(6), {"prompt": text(*range(9))}]
  config = DataConfig(path=write(tmp_path, rows), max_prompt_length=5)
  given_rows.prompts(SESSION, "Title", config, TOKENIZER, every=True, limit=9)
  shown = capsys.readouterr().err
  assert "left out: 1 too long (data.max_prompt_length=5" in shown
  assert "warning: 14% of the data is left out: 1 too long" in shown


@pytest.mark.parametrize("source", [{}, {"split": "shift"}, {"tfds": "x:train", "tfds_dir": "y"}])
def test_demonstrations_of_a_file_whatever_the_prompts_are(tmp_path, source):
  rows = [{**row, "response": text(1, 2)} for row in prompts(9)]
  path = write(tmp_path, rows, "demonstrations.jsonl")
  for most, count in ((512, 9), (4, 4)):
    config = DataConfig(eval_rows=most, **source)
    (found,) = given_rows.demonstrations(SESSION, config, path, TOKENIZER)
    assert (found.kind, len(found.examples)) == ("demonstrations", count)


def test_prompts_of_a_file_have_no_demonstrations(tmp_path):
  config = DataConfig(path=write(tmp_path, prompts(9)))
  assert given_rows.demonstrations(SESSION, config, "", TOKENIZER) == []


def test_demonstrations_of_the_built_in_task_are_those_that_are_held_out():
  tokenizer = models.open_tokenizer(None)
  for split in ("eval", "shift"):
    config = DataConfig(eval_rows=5, split=split)
    (found,) = given_rows.demonstrations(
      dataclasses.replace(SESSION, seed=3), config, "", tokenizer
    )
    expected = simulation.demonstrations(split, 5, 3)
    assert [row["response"] for row in found.rows] == [row["response"] for row in expected]
