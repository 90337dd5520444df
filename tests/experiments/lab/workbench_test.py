"""The table of a script: its data sets, references and identity."""

import json
import types

import numpy as np
import pytest

from experiments.lab import workbench
from rlhf_jax import data, workdir


def test_further_data_sets_are_part_of_the_identity(open_bench, tmp_path):
  extra = {"ptx": ("demonstrations", "")}
  bench = open_bench("ppo_max", "prompts", "--reward.name=gold", "--steps=6", extra=extra)
  assert bench.train_set.kind == "prompts"
  assert bench.extra["ptx"].kind == "demonstrations"
  identity = json.loads((tmp_path / "run" / "identity.json").read_text())
  assert identity["ptx data"] == bench.extra["ptx"].digest


@pytest.mark.parametrize("packed", [0, 64])
def test_held_out_responses_may_be_longer_than_those_trained_on(packed):
  def rows(length):
    example = {"prompt": np.ones(30, np.int32), "response": np.ones(length, np.int32)}
    return data.from_examples("demonstrations", [example] * 4, [{"prompt_text": ""}] * 4)

  train_set = rows(3)._replace(scored=rows(40).scored)  # Shared with the held-out set.
  config = types.SimpleNamespace(data=data.DataConfig(packed_length=packed))
  scored = workbench.scored_tokens(config, [train_set])
  assert scored >= 40
  if packed:
    assert scored >= data.packed_scored(train_set, packed)


def test_a_workdir_is_for_one_run_at_a_time(open_bench):
  open_bench("sft", "demonstrations")
  with pytest.raises(workdir.LockedError):
    open_bench("sft", "demonstrations")


def test_references_of_all_rows_in_their_order(open_bench):
  flags = ("--data.eval_rows=8", "--batch_size=6", "--steps=99")
  bench = open_bench("dpo", "preferences", *flags)

  def first_token(params, batch):
    assert params is bench.start
    return {"ref": batch.tokens[:, :, 0]}

  train, heldout = bench.references(first_token)
  for dataset, column in ((bench.train_set, train), (bench.heldout, heldout)):
    expected = [[example["prompt"][0]] * 2 for example in dataset.examples]
    np.testing.assert_array_equal(column, expected)
  empty = bench._replace(heldout=bench.heldout._replace(examples=[], rows=[]))
  assert empty.references(first_token)[1] is None


@pytest.mark.parametrize("rows", [1, 5, 7, 8])
def test_held_out_metrics_see_every_row_once_and_all_at_once(open_bench, rows):
  bench = open_bench("dpo", "preferences", "--eval_every=0", "--batch_size=7")
  bench = bench._replace(heldout=bench.heldout._replace(examples=bench.heldout.examples[:rows]))
  trainer = type("Trainer", (), {"params": staticmethod(lambda state: state)})

  def measure(params, batch):
    return [params * batch.mask[:, 0].sum(axis=-1)], {"both": batch.mask.sum(axis=-1)}

  def summarize(measured):
    (lengths,), both = measured
    assert both["both"].shape == (rows, 2)
    metrics = {"length": np.max(lengths), "missing": np.nan, "tokens": 1.0, "weight/length": 2.0}
    return np.median(lengths), metrics

  evaluate = bench.evaluator(trainer, measure, summarize, lambda: pytest.fail("opens the judge"))
  lengths = [2 * len(example["chosen"]) for example in bench.heldout.examples]
  want = {"eval/loss": np.median(lengths), "eval/length": max(lengths)}
  assert evaluate(2.0, 3) == want
  undefined = bench.evaluator(trainer, measure, lambda measured: (np.nan, {}))
  assert np.isnan(undefined(2.0, 3)["eval/loss"])
  empty = bench._replace(heldout=bench.heldout._replace(examples=[]))
  assert empty.evaluator(trainer, measure, summarize)(2.0, 3) == {}


def test_win_rates_are_between_independent_samples(open_bench):
  """A policy meets itself as it would meet another one; its checkpoints share random numbers."""
  bench = open_bench("sft", "demonstrations", "--sampling.max_new_tokens=4")

  def reward_of(prompts):
    del prompts
    return lambda rollout, ids: np.sin(rollout.tokens).sum(axis=1)

  judge = bench.judge(reward_of)
  bench.run.writer.open(resume_step=0, config={})
  again = judge.measure(bench.start, 2)["eval/reward"]
  summary = judge.finish(bench.start, 1, "policy")
  assert again == summary["reward/mean"] != summary["reward/mean_before"]
  assert 0 < summary["reward/win_rate"] < 1 and summary["reward/win_rate"] != 0.5
