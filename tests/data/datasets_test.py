import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest

from rlhf_jax import data
from rlhf_jax.data import DataConfig, DataError, PromptBatch, word_level_tokenizer
from rlhf_jax.types import TokenBatch

SHARED = pathlib.Path(__file__).resolve().parents[2].parent / "shared"
WORDS = tuple(f"w{i}" for i in range(40))
TOKENIZER = word_level_tokenizer(WORDS)


def text(*numbers):
  return " ".join(f"w{i}" for i in numbers)


def ids(*numbers):
  return [i + 4 for i in numbers]


def write(folder, rows, name="rows.jsonl"):
  path = folder / name
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  return str(path)


def prompts(n, start=0):
  return [{"prompt": text(i % 40, i // 40), "n": i} for i in range(start, start + n)]


def load(kind, folder, rows, /, **config):
  path = write(folder, rows)
  return data.load(kind, DataConfig(path=path, **{"eval_fraction": 0.0} | config), TOKENIZER)


def leaves(batch):
  return [np.asarray(x) for x in batch]


def assert_same(a, b):
  assert type(a) is type(b)
  for x, y in zip(leaves(a), leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


# Config.


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"max_prompt_length": 0}, "max_prompt_length must be positive, got 0"),
    ({"max_response_length": -1}, "max_response_length must be positive, got -1"),
    ({"eval_fraction": 1.0}, "eval_fraction must be"),
    ({"eval_fraction": float("nan")}, "eval_fraction must be"),
    ({"rows": -1}, "rows must be at least 0"),
    ({"bad_rows": -1}, "bad_rows must be at least 0"),
    ({"eval_rows": 0}, "eval_rows must be at least 1"),
    ({"overlong": "cut"}, "overlong must be one of drop, truncate_prompt"),
    ({"path": "a", "tfds": "b"}, "tfds cannot be used together with path"),
    ({"tfds": "../b"}, "tfds: '../b' is not NAME"),
    ({"tfds_dir": "b"}, "tfds_dir needs"),
  ],
)
def test_config_refuses(config, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    DataConfig(**config)


def test_every_config_field_is_described():
  attributes = DataConfig.__doc__.split("Attributes:")[1]
  for field in dataclasses.fields(DataConfig):
    assert f"    {field.name}: " in attributes


# Shapes and masks.


def test_demonstrations(tmp_path):
  rows = [{"prompt": text(1, 2), "response": text(3)}, {"text": text(4, 5, 6)}]
  train, heldout = load("demonstrations", tmp_path, rows)
  assert heldout.examples == []
  assert train.padded_length == 8
  assert train.rows[0]["prompt_text"] == "w1 w2"
  assert train.rows[1]["prompt_text"] == ""
  batch = next(data.batches(train, 2, seed=0, pad_id=2, shuffle=False))
  assert isinstance(batch, TokenBatch)
  assert batch.tokens.dtype == np.int32
  assert batch.mask.dtype == bool
  np.testing.assert_array_equal(
    batch.tokens, [[1, *ids(1, 2), *ids(3), 2, 2, 2, 2], [1, *ids(4, 5, 6), 2, 2, 2, 2]]
  )
  # The end token is scored although it equals the padding.
  np.testing.assert_array_equal(
    batch.mask, np.array([[0, 0, 0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0]], bool)
  )


def test_preferences(tmp_path):
  rows = [{"prompt": text(1), "chosen": text(2, 3), "rejected": text(4)}]
  train, _ = load("preferences", tmp_path, rows)
  batch = next(data.batches(train, 1, seed=0, pad_id=0))
  assert batch.tokens.shape == batch.mask.shape == (1, 2, 8)
  np.testing.assert_array_equal(
    batch.tokens[0], [[1, *ids(1, 2, 3), 2, 0, 0, 0], [1, *ids(1, 4), 2, 0, 0, 0, 0]]
  )
  np.testing.assert_array_equal(
    batch.mask[0], np.array([[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]], bool)
  )


def test_prompts(tmp_path):
  train, _ = load("prompts", tmp_path, [{"prompt": text(1), "n": 5}, {"prompt": text(2, 3)}])
  batch = next(data.batches(train, 2, seed=0, pad_id=0, shuffle=False))
  assert isinstance(batch, PromptBatch)
  np.testing.assert_array_equal(
    batch.tokens, [[0, 0, 0, 0, 0, 0, 1, *ids(1)], [0, 0, 0, 0, 0, 1, *ids(2, 3)]]
  )
  np.testing.assert_array_equal(batch.mask.sum(1), [2, 3])
  assert batch.mask[:, -1].all()
  np.testing.assert_array_equal(batch.prompt_id, [0, 1])
  assert train.rows[batch.prompt_id[0]] == {"prompt": "w1", "n": 5, "prompt_text": "w1"}


def test_both_sets_have_one_padded_length(tmp_path):
  long = write(tmp_path, [{"prompt": text(*range(20))}], "eval.jsonl")
  train, heldout = load("prompts", tmp_path, prompts(3), eval_path=long)
  assert train.padded_length == heldout.padded_length == 24


def test_typed_specials_never_become_ids(tmp_path):
  rows = [{"prompt": "w1 <eos> <bos>", "response": "<eos><pad>w2 <eos>"}]
  train, _ = load("demonstrations", tmp_path, rows)
  assert not {0, 1, 2} & set(train.examples[0]["prompt"][1:].tolist())
  assert not {0, 1, 2} & set(train.examples[0]["response"][:-1].tolist())


# Which rows are kept.


def test_overlong_rows_are_dropped_and_counted(tmp_path):
  rows = [*prompts(4), {"prompt": text(*range(9))}]
  train, _ = load("prompts", tmp_path, rows, max_prompt_length=9)
  assert (train.report["kept"], train.report["dropped_overlong"]) == (4, 1)
  assert train.report["rows_read"] == 5


def test_truncated_prompts_keep_bos_and_the_end(tmp_path):
  rows = [*prompts(4), {"prompt": text(*range(9))}]
  train, _ = load("prompts", tmp_path, rows, max_prompt_length=4, overlong="truncate_prompt")
  assert train.examples[4]["prompt"].tolist() == [1, *ids(6, 7, 8)]
  assert train.rows[4]["prompt_text"] == text(*range(9))
  assert (train.report["kept"], train.report["truncated_prompts"]) == (5, 1)


@pytest.mark.parametrize("overlong", ["drop", "truncate_prompt"])
def test_overlong_responses_are_never_cut(tmp_path, overlong):
  pair = {"prompt": text(1), "chosen": text(2), "rejected": text(3, 4)}
  rows = [pair, {**pair, "chosen": text(2, 3)}, {**pair, "rejected": text(5, 6, 7)}]
  train, _ = load("preferences", tmp_path, rows, max_response_length=3, overlong=overlong)
  assert (train.report["kept"], train.report["dropped_overlong"]) == (2, 1)


def test_mostly_overlong_names_the_limits(tmp_path):
  rows = [{"prompt": text(*range(9)), "response": text(1)} for _ in range(4)]
  with pytest.raises(DataError, match=r"4 of 4 rows are too long.*data\.max_prompt_length=8.*10"):
    load("demonstrations", tmp_path, rows, max_prompt_length=8)
  with pytest.raises(DataError, match=r"data\.max_response_length=1 .*median 2") as error:
    load("demonstrations", tmp_path, rows, max_response_length=1)
  assert "max_prompt_length" not in str(error.value)


def test_identical_pairs_are_dropped(tmp_path):
  rows = [
    {"prompt": text(1), "chosen": text(2), "rejected": text(3)},
    {"prompt": text(1), "chosen": text(2), "rejected": text(2)},
    {"prompt": text(1), "chosen": "unknown", "rejected": "words"},  # The same ids.
  ]
  train, _ = load("preferences", tmp_path, rows)
  assert (train.report["kept"], train.report["dropped_identical_pairs"]) == (1, 2)


def test_repeated_and_flipped_pairs_are_counted(tmp_path):
  pair = {"prompt": text(1), "chosen": text(2), "rejected": text(3)}
  flipped = {"prompt": text(1), "chosen": text(3), "rejected": text(2)}
  train, _ = load("preferences", tmp_path, [pair, pair, flipped])
  assert (train.report["duplicates"], train.report["flipped_pairs"]) == (1, 1)


def test_bad_rows_name_the_line_and_can_be_skipped(tmp_path):
  rows = [*prompts(3), {"prompt": None}, *prompts(2), {"prompt": 3}]
  with pytest.raises(DataError, match=r"rows\.jsonl:4: prompt: is null.*data\.bad_rows"):
    load("prompts", tmp_path, rows)
  with pytest.raises(DataError, match=r"rows\.jsonl:7: prompt: expected text"):
    load("prompts", tmp_path, rows, bad_rows=1)
  train, _ = load("prompts", tmp_path, rows, bad_rows=2)
  assert (train.report["kept"], train.report["bad_rows"]) == (5, 2)


def test_bad_bytes_count_as_bad_rows(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b'{"prompt": "w1"}\n{"prompt": "\xff"}\n{"prompt": "w2"}\n{"pro')
  config = DataConfig(path=str(path), eval_fraction=0.0, bad_rows=2)
  train, _ = data.load("prompts", config, TOKENIZER)
  assert (train.report["kept"], train.report["bad_rows"]) == (2, 2)


def test_empty_file(tmp_path):
  with pytest.raises(DataError, match=r"rows\.jsonl: no rows are left of 0 read"):
    load("prompts", tmp_path, [])


def test_rows_limits_the_rows(tmp_path):
  train, _ = load("prompts", tmp_path, prompts(9), rows=4)
  assert [row["n"] for row in train.rows] == [0, 1, 2, 3]


def test_digest_sees_order_and_content(tmp_path):
  rows = prompts(3)
  digest = load("prompts", tmp_path, rows)[0].digest
  assert load("prompts", tmp_path, rows)[0].digest == digest
  assert load("prompts", tmp_path, rows[::-1])[0].digest != digest
  assert load("prompts", tmp_path, prompts(4))[0].digest != digest


def test_ids_outside_the_vocabulary_are_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(TOKENIZER.__dict__, "vocab_size", 5)
  with pytest.raises(DataError, match=r"rows\.jsonl:2: token ids .* vocabulary of 5"):
    load("prompts", tmp_path, prompts(3))


def test_end_token_must_be_that_of_the_tokenizer(tmp_path):
  with pytest.raises(ValueError, match=r"^end_token is 'w1' but"):
    load("prompts", tmp_path, prompts(3), end_token="w1")
  with pytest.raises(ValueError, match=r"^end_token: 'nope' is not a token"):
    load("prompts", tmp_path, prompts(3), end_token="nope")
  load("prompts", tmp_path, prompts(3), end_token="<eos>")


# Held-out rows.


def test_hash_split_is_stable_and_disjoint(tmp_path):
  rows = [*prompts(400), *prompts(100)]  # Some prompts twice.
  train, heldout = load("prompts", tmp_path, rows, eval_fraction=0.2)
  ours = {row["n"] for row in train.rows}
  theirs = {row["n"] for row in heldout.rows}
  assert not ours & theirs
  assert ours | theirs == set(range(400))
  assert 50 <= len(theirs) <= 110
  assert heldout.report["eval_prompts_in_train"] == 0
  # Neither order, nor other rows, nor other columns move a prompt to the other side.
  more = [{**row, "response": text(1)} for row in [*prompts(100, start=400), *rows[::-1]]]
  _, again = load("demonstrations", tmp_path, more, eval_fraction=0.2)
  assert {row["n"] for row in again.rows if row["n"] < 400} == theirs


def test_split_of_texts_depends_on_the_text(tmp_path):
  rows = [{"text": text(i % 40, i // 40)} for i in range(200)]
  train, heldout = load("demonstrations", tmp_path, rows, eval_fraction=0.2)
  assert 15 <= len(heldout.examples) <= 70
  assert len(train.examples) + len(heldout.examples) == 200


def test_small_file_still_holds_out_a_prompt(tmp_path):
  for n in (2, 3, 5):
    train, heldout = load("prompts", tmp_path, prompts(n), eval_fraction=0.001)
    assert (len(train.examples), len(heldout.examples)) == (n - 1, 1)
  with pytest.raises(DataError, match="no rows are left"):
    load("prompts", tmp_path, prompts(1), eval_fraction=0.05)


def test_eval_rows_limits_the_held_out_rows(tmp_path):
  train, heldout = load("prompts", tmp_path, prompts(400), eval_fraction=0.2, eval_rows=7)
  assert len(heldout.examples) == 7
  assert len(train.examples) < 390  # Held out means held out, used or not.


def test_eval_file_and_its_overlap(tmp_path):
  eval_path = write(tmp_path, prompts(10, start=5), "eval.jsonl")
  train, heldout = load("prompts", tmp_path, prompts(8), eval_path=eval_path)
  assert (len(train.examples), len(heldout.examples)) == (8, 10)
  assert heldout.report["eval_prompts_in_train"] == 3


@pytest.mark.parametrize("kind", ["demonstrations", "preferences", "prompts"])
def test_builtin_task(kind):
  from rlhf_jax import simulation

  tokenizer = word_level_tokenizer(simulation.WORDS)
  config = DataConfig(rows=50, eval_rows=20)
  train, heldout = data.load(kind, config, tokenizer, seed=1)
  assert train.report["rows_read"] == 50
  assert heldout.report["rows_read"] == 20
  unknown = tokenizer.token_id("<unk>")
  for example in train.examples + heldout.examples:
    assert all(unknown not in tokens for tokens in example.values())
  assert data.load(kind, config, tokenizer, seed=1)[0].digest == train.digest
  assert data.load(kind, config, tokenizer, seed=2)[0].digest != train.digest


# Order and position.


@pytest.fixture
def dataset(tmp_path):
  return load("prompts", tmp_path, prompts(13))[0]


def order(batches, n):
  return [batch.prompt_id.tolist() for batch in itertools.islice(batches, n)]


def test_every_epoch_has_all_rows_in_another_order(dataset):
  seen = np.concatenate(order(data.batches(dataset, 4, seed=3, pad_id=0), 13)).reshape(4, 13)
  for epoch in seen:
    assert sorted(epoch) == list(range(13))
  assert len({tuple(epoch) for epoch in seen}) == 4
  other = np.concatenate(order(data.batches(dataset, 4, seed=4, pad_id=0), 13))
  assert (other != seen.ravel()).any()


def test_finite_epochs_and_no_shuffle(dataset):
  seen = order(data.batches(dataset, 4, seed=3, pad_id=0, shuffle=False, epochs=2), 100)
  assert np.concatenate(seen).tolist() == [*range(13), *range(11)]


def test_resume_at_every_step_of_two_epochs(dataset):
  steps = 8  # 32 rows: past the end of the second epoch of 13.
  iterator = data.batches(dataset, 4, seed=3, pad_id=0)
  states, expected = [], []
  for _ in range(steps):
    states.append(json.loads(json.dumps(iterator.get_state())))
    expected.append(next(iterator))
  for start, state in enumerate(states):
    resumed = data.batches(dataset, 4, seed=3, pad_id=0)
    resumed.set_state(state)
    for batch in expected[start:]:
      assert_same(next(resumed), batch)


@pytest.mark.parametrize("shard_count", [1, 2, 4])
def test_shards_together_are_the_global_batch(dataset, shard_count):
  whole = data.batches(dataset, 4, seed=3, pad_id=0)
  shards = [
    data.batches(dataset, 4, seed=3, pad_id=0, shard_index=i, shard_count=shard_count)
    for i in range(shard_count)
  ]
  for _ in range(8):
    parts = [leaves(next(shard)) for shard in shards]
    joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
    assert_same(PromptBatch(*joined), next(whole))


def test_batches_refuses(dataset):
  with pytest.raises(ValueError, match="--batch_size=14 does not fit a data set of 13 rows"):
    data.batches(dataset, 14, seed=0, pad_id=0)
  with pytest.raises(ValueError, match="--batch_size=0 does not fit"):
    data.batches(dataset, 0, seed=0, pad_id=0)
  with pytest.raises(ValueError, match="batch_size 6 cannot be cut into 4"):
    data.batches(dataset, 6, seed=0, pad_id=0, shard_count=4)
  with pytest.raises(ValueError, match="shard_index 2"):
    data.batches(dataset, 6, seed=0, pad_id=0, shard_index=2, shard_count=2)


@pytest.mark.parametrize("batch_size", [1, 4, 13, 40])
def test_eval_batches_count_every_row_once(dataset, batch_size):
  counted = []
  for batch, valid in data.eval_batches(dataset, batch_size, pad_id=0):
    assert batch.tokens.shape == (batch_size, 8)
    assert valid.shape == (batch_size,)
    assert batch.mask.any(axis=1).all()
    counted.extend(batch.prompt_id[valid].tolist())
  assert counted == list(range(13))


def test_eval_batches_shards(dataset):
  whole = list(data.eval_batches(dataset, 4, 0))
  parts = [list(data.eval_batches(dataset, 4, 0, shard_index=i, shard_count=2)) for i in (0, 1)]
  for (batch, valid), (a, valid_a), (b, valid_b) in zip(whole, *parts, strict=True):
    np.testing.assert_array_equal(batch.tokens, np.concatenate([a.tokens, b.tokens]))
    np.testing.assert_array_equal(valid, np.concatenate([valid_a, valid_b]))


# Real rows.


@pytest.mark.parametrize(
  ("kind", "file"),
  [
    ("preferences", "preference/hh_helpful_test"),
    ("demonstrations", "preference/hh_harmless_test"),
    ("demonstrations", "sft/alpaca_demo_test"),
    ("demonstrations", "stories/tinystories_test"),
    ("prompts", "prompts/mixed_test"),
    ("prompts", "verifiable/gsm8k_test"),
    ("prompts", "ranking/oasst_test"),
  ],
)
def test_real_rows(kind, file):
  path = SHARED / "data" / f"{file}.jsonl"
  folder = SHARED / "models" / "stories260k"
  if not path.is_file() or not folder.is_dir():
    pytest.skip(f"needs {path.name} and the stories260k folder in {SHARED}")
  tokenizer = data.load_tokenizer(folder, eos_token="<s>")
  config = DataConfig(
    path=str(path), max_prompt_length=4096, max_response_length=4096, end_token="<s>"
  )
  train, heldout = data.load(kind, config, tokenizer)
  assert len(train.examples) + len(heldout.examples) == len(path.read_bytes().splitlines())
  assert heldout.report["eval_prompts_in_train"] == 0
  for example, row in zip(train.examples, train.rows, strict=True):
    prompt, *answers = example.values()
    assert prompt[0] == 1
    assert not np.isin(prompt[1:], [0, 1, 2]).any()
    assert tokenizer.decode(prompt) == row["prompt_text"]
    for answer in answers:
      assert answer[-1] == 1
      assert not np.isin(answer[:-1], [0, 1, 2]).any()


def test_transcript_of_messages_is_the_prompt_of_hh():
  path = SHARED / "data" / "preference" / "hh_helpful_test.jsonl"
  if not path.is_file():
    pytest.skip(f"needs {path}")
  for row in data.read_jsonl(path):
    assert data.transcript(row.fields["messages"]).split() == row.fields["prompt"].split()
