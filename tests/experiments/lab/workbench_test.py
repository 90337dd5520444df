"""The table of a script: its data sets, references and identity."""

import json

import numpy as np
import pytest

from rlhf_jax import workdir


def test_further_data_sets_are_part_of_the_identity(open_bench, tmp_path):
  extra = {"ptx": ("demonstrations", "")}
  bench = open_bench("ppo_max", "prompts", "--reward.name=gold", "--steps=6", extra=extra)
  assert bench.train_set.kind == "prompts"
  assert bench.extra["ptx"].kind == "demonstrations"
  identity = json.loads((tmp_path / "run" / "identity.json").read_text())
  assert identity["ptx data"] == bench.extra["ptx"].digest


def test_a_workdir_is_for_one_run_at_a_time(open_bench):
  open_bench("sft", "demonstrations")
  with pytest.raises(workdir.LockedError):
    open_bench("sft", "demonstrations")


def test_references_of_all_rows_in_their_order(open_bench):
  bench = open_bench("dpo", "preferences", "--data.eval_rows=8", "--batch_size=6")

  def first_token(params, batch):
    assert params is bench.start
    return {"ref": batch.tokens[:, :, 0]}

  train, heldout = bench.references(first_token)
  for dataset, column in ((bench.train_set, train), (bench.heldout, heldout)):
    expected = [[example["prompt"][0]] * 2 for example in dataset.examples]
    np.testing.assert_array_equal(column, expected)
  empty = bench._replace(heldout=bench.heldout._replace(examples=[], rows=[]))
  assert empty.references(first_token)[1] is None


def test_evaluation_is_a_mean_over_rows_where_it_is_defined(open_bench):
  bench = open_bench("dpo", "preferences", "--eval_every=0")
  trainer = type("Trainer", (), {"params": staticmethod(lambda state: state)})

  def measure(params, batch):
    length = np.asarray(batch.mask[:, 0].sum(axis=-1))
    first = np.where(np.arange(len(length)) % 2, np.nan, params)
    return {"length": length, "first": first}

  evaluate = bench.evaluator(trainer, measure, None, lambda: pytest.fail("opens the judge"))
  metrics = evaluate(2.0, 3)
  lengths = [len(example["chosen"]) for example in bench.heldout.examples]
  assert metrics == {"eval/length": pytest.approx(np.mean(lengths)), "eval/first": 2.0}
  empty = bench._replace(heldout=bench.heldout._replace(examples=[]))
  assert empty.evaluator(trainer, measure, None, lambda: None)(2.0, 3) == {}
