"""Sources with weights, and held-out sets with names."""

import itertools
import json

import numpy as np
import pytest

from rlhf_jax import data
from rlhf_jax.data import DataConfig, DataError, files
from tests.data.rows import TOKENIZER, prompts, text, write


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write(tmp_path, prompts(30), "a.jsonl")
  write(tmp_path, prompts(10, start=100), "b.jsonl")
  write(tmp_path, prompts(10, start=200), "c:0.5.jsonl")
  write(tmp_path, prompts(2, start=300), "d:0.5")
  return tmp_path


def load(path, **config):
  return data.load("prompts", DataConfig(path, **{"eval_fraction": 0.0} | config), TOKENIZER)


def drawn(dataset, rows, **options):
  batches = data.batches(dataset, 10, seed=3, pad_id=0, **options)
  ids = itertools.islice(batches, rows // 10)
  return [dataset.rows[i]["n"] for batch in ids for i in batch.prompt_id]


@pytest.mark.parametrize(
  ("path", "shares"),
  [
    ("a.jsonl:0.7,b.jsonl:0.3", (0.7, 0.3)),
    ("a.jsonl:7, b.jsonl:3.0", (0.7, 0.3)),
    ("a.jsonl:1e-1,b.jsonl:.1", (0.5, 0.5)),
    ("b.jsonl:1,a.jsonl:1,c*.jsonl:2", (0.25, 0.25, 0.5)),
  ],
)
def test_batches_have_the_shares_of_the_weights(folder, path, shares):
  train, _ = load(path)
  assert [share.weight for share in train.mixture] == pytest.approx(shares)
  names = [part.rpartition(":")[0].strip()[0] for part in path.split(",")]
  first = [{"a": 0, "b": 100, "c": 200}[name] for name in names]
  seen = drawn(train, 300)
  counts = [sum(start <= n < start + 100 for n in seen) / 300 for start in first]
  assert counts == pytest.approx(shares, abs=0.02)
  for start in first:  # Each has epochs of its own.
    of = [n for n in seen if start <= n < start + 100]
    size = 30 if start == 0 else 10
    assert len(set(of[:size])) == size and of[:size] != of[size : 2 * size]


def test_a_mixture_is_deterministic_and_resumes(folder):
  train, _ = load("a.jsonl:0.7,b.jsonl:0.3", eval_fraction=0.2)
  assert drawn(train, 200) == drawn(train, 200)
  batches = data.batches(train, 4, seed=5, pad_id=0)
  for _ in range(11):
    next(batches)
  state, want = json.loads(json.dumps(batches.get_state())), next(batches)
  again = data.batches(train, 4, seed=5, pad_id=0)
  again.set_state(state)
  np.testing.assert_array_equal(next(again).prompt_id, want.prompt_id)
  met = {i for batch in itertools.islice(data.batches(train, 4, seed=5, pad_id=0), 3)
         for i in batch.prompt_id}  # fmt: skip
  assert sorted(met) == data.first_rows(train, 4, 3, seed=5).tolist()
  assert len(drawn(train, 200, epochs=2)) == 2 * len(train.examples) // 10 * 10


def test_files_without_weights_are_joined(folder):
  train, _ = load("a.jsonl,b.jsonl")
  assert not train.mixture
  assert sorted(drawn(train, 40)) == [*range(30), *range(100, 110)]
  assert not load("d:0.5")[0].mixture  # The name of a file.
  assert [source.weight for source in files.sources_of("d:0.5:2,a.jsonl:1")] == [2, 1]


def test_rows_of_each_source_are_limited_and_joined_apart(folder):
  assert [share.examples for share in load("a.jsonl:1,b.jsonl:1", rows=4)[0].mixture] == [4, 4]
  scored = [{"prompt": text(1), "response": text(i), "score": i} for i in (2, 3)]
  path = f"{write(folder, scored, 'x.jsonl')}:1,{write(folder, scored, 'y.jsonl')}:2"
  train, _ = data.load("preferences", DataConfig(path, eval_fraction=0.0), TOKENIZER)
  assert [share.examples for share in train.mixture] == [1, 1]


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"path": "a.jsonl:0.7,b.jsonl"}, "b.jsonl has no weight"),
    ({"path": "a.jsonl:0,b.jsonl:1"}, "must be a positive number, got 0"),
    ({"path": "a.jsonl:-1,b.jsonl:1"}, "must be a positive number, got -1"),
    ({"path": "a.jsonl:nan,b.jsonl:1"}, "must be a positive number, got nan"),
    ({"path": "a.jsonl:1,x.jsonl:1"}, "x.jsonl: cannot be read"),
    ({"path": "a.jsonl:x,b.jsonl:1"}, "a.jsonl:x has no weight"),
    ({"path": "a.jsonl", "eval_path": "a.jsonl:1,b.jsonl:1"}, "weights are for training rows"),
    ({"path": "a.jsonl", "eval_sets": ("b=x.jsonl",), "eval_fraction": 0.1}, "x.jsonl: cannot be"),
    ({"path": "a.jsonl", "eval_sets": ("b",), "eval_fraction": 0.1}, "write NAME=FILE"),
    ({"path": "a.jsonl", "eval_sets": ("a/b=c",), "eval_fraction": 0.1}, "write NAME=FILE"),
    ({"path": "a.jsonl", "eval_sets": ("b=c", "b=d"), "eval_fraction": 0.1}, "two sets named b"),
    ({"path": "a.jsonl", "eval_sets": ("b=b.jsonl",)}, "leaves no first ones"),
    ({"eval_sets": ("b=b.jsonl",), "path": ""}, "give path or tfds as well"),
  ],
)
def test_refuses(folder, config, message):
  with pytest.raises((DataError, ValueError), match=message):
    load(**config)


def test_a_source_without_training_rows_is_refused(folder):
  write(folder, [], "empty.jsonl")
  with pytest.raises(DataError, match=r"empty\.jsonl: no row of it is left"):
    load("a.jsonl:1,empty.jsonl:1")


def test_named_sets_have_the_shape_and_the_checks_of_the_others(folder):
  long = write(folder, [{"prompt": text(*range(30))}], "long.jsonl")
  sets = (f"long={long}", "b=b.jsonl")
  train, heldout = load("a.jsonl", eval_sets=sets, eval_path="a.jsonl", eval_rows=8)
  assert {name: len(of.examples) for name, of in heldout.named.items()} == {"long": 1, "b": 8}
  lengths = {of.padded_length for of in (train, heldout, *heldout.named.values())}
  assert lengths == {32}
  assert heldout.named["b"].report["eval_prompts_in_train"] == 0
  lines = data.describe(DataConfig("a.jsonl", eval_path="a.jsonl"), train, heldout)
  assert "8 held out from a.jsonl, 1 of long, 8 of b" in lines["data"]
