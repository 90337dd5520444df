import dataclasses
import itertools
import json
import pathlib
import typing

import numpy as np
import pytest

from rlhf_jax import data
from rlhf_jax.data import DataConfig, DataError, PromptBatch, word_level_tokenizer
from rlhf_jax.types import ComparisonBatch, PackedBatch, RankingBatch, TokenBatch, UnpairedBatch

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
    ({"votes": "one"}, "votes must be one of majority, each"),
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


def test_rankings(tmp_path):
  rows = [
    {
      "prompt": text(1),
      "responses": [{"text": text(2), "rank": 1}, {"text": text(3, 4), "rank": 0}],
    },
    {
      "prompt": text(5, 6),
      "responses": [
        {"text": text(7), "score": 0.1},
        {"text": "", "score": 2},
        {"text": text(8, 9), "score": 0.1},
      ],
    },
  ]
  train, _ = load("rankings", tmp_path, rows)
  assert (train.width, train.padded_length) == (3, 8)
  assert [len(data.responses_of(example)) for example in train.examples] == [2, 3]
  batch = next(data.batches(train, 2, seed=0, pad_id=0, shuffle=False))
  assert isinstance(batch, RankingBatch)
  want = [
    [[1, *ids(1, 3, 4), 2], [1, *ids(1, 2), 2], []],
    [[1, *ids(5, 6), 2], [1, *ids(5, 6, 7), 2], [1, *ids(5, 6, 8, 9), 2]],
  ]
  prompts = [2, 3]
  for b, row in enumerate(want):
    for k, sequence in enumerate(row):
      assert batch.tokens[b, k].tolist() == sequence + [0] * (8 - len(sequence))
      scored = [bool(sequence) and prompts[b] <= t < len(sequence) for t in range(8)]
      assert batch.mask[b, k].tolist() == scored
  np.testing.assert_array_equal(batch.ranks, [[0, 1, 0], [0, 1, 1]])
  np.testing.assert_array_equal(batch.real, [[True, True, False], [True] * 3])
  assert (batch.ranks.dtype, batch.real.dtype) == (np.int32, bool)


def test_comparisons(tmp_path):
  votes = lambda *preferred: [{"annotator": "a", "preferred": p} for p in preferred]  # noqa: E731
  rows = [
    {"prompt": text(1), "responses": [text(2), text(3, 4)], "annotations": votes(0, 0, 1)},
    {"prompt": text(5, 6), "responses": [text(7), text(8)], "annotations": votes(None)},
    {"prompt": text(9), "responses": [text(7), text(7)], "annotations": votes(0)},
    {"prompt": text(9), "responses": [text(7), text(8)], "annotations": []},
  ]
  train, _ = load("comparisons", tmp_path, rows, votes="each")
  assert train.report["dropped_identical_pairs"] == 1
  assert train.report["dropped_not_judged"] == 1
  assert (train.padded_length, train.width) == (8, 2)
  ((batch, valid),) = data.eval_batches(train, 2, TOKENIZER.pad_id)
  assert isinstance(batch, ComparisonBatch)
  assert valid.all()
  np.testing.assert_array_equal(batch.preference, np.float32([2 / 3, 0.5]))
  end = TOKENIZER.eos_id
  first, second = [*ids(2), end], [*ids(3, 4), end]
  for order, answers in enumerate(([*first, *second], [*second, *first])):
    want = [*train.examples[0]["prompt"].tolist(), *answers]
    assert batch.tokens[0, order, : len(want)].tolist() == want
    assert batch.tokens[0, order][batch.mask[0, order]].tolist() == answers
  changed, _ = load("comparisons", tmp_path, rows)  # Other labels are other data.
  assert changed.digest != train.digest


def test_data_sets_of_rows_and_examples_at_hand(tmp_path):
  rows = [{"prompt": text(i), "chosen": text(i, 2), "rejected": text(3)} for i in range(5)]
  want, _ = load("preferences", tmp_path, rows)
  path = write(tmp_path, rows)
  got = data.from_rows("preferences", list(data.read_jsonl(path)), DataConfig(), TOKENIZER)
  again = data.from_examples("preferences", want.examples, want.rows)
  assert want.digest == got.digest == again.digest
  assert want.padded_length == got.padded_length == again.padded_length
  assert data.from_rows("preferences", [], DataConfig(), TOKENIZER).examples == []


def test_unpaired(tmp_path):
  rows = [
    {"prompt": text(1), "response": text(2), "label": True},
    {"prompt": text(3, 4), "chosen": text(5), "rejected": text(6, 7, 8)},
  ]
  train, _ = load("unpaired", tmp_path, rows)
  batch = next(data.batches(train, 3, seed=0, pad_id=0, shuffle=False))
  assert isinstance(batch, UnpairedBatch)
  assert train.padded_length == 8  # For the longest response behind the longest prompt.
  answers = [
    [1, *ids(1), *ids(2), 2],
    [1, *ids(3, 4), *ids(5), 2],
    [1, *ids(3, 4), *ids(6, 7, 8), 2],
  ]
  # The next response to another prompt: that of the third row for the first, not for the second.
  others = [[1, *ids(1), *ids(5), 2], [1, *ids(3, 4), *ids(2), 2], [1, *ids(3, 4), *ids(2), 2]]
  for got, want in ((batch, answers), (batch.mismatched, others)):
    for b, sequence in enumerate(want):
      assert got.tokens[b].tolist() == sequence + [0] * (8 - len(sequence))
      start = 2 if b == 0 else 3
      assert got.mask[b].tolist() == [start <= t < len(sequence) for t in range(8)]
  assert batch.desirable.tolist() == [True, True, False]
  assert batch.desirable.dtype == bool


def test_the_only_prompt_has_no_mismatched_response(tmp_path):
  rows = [{"prompt": text(1), "response": text(i), "label": True} for i in range(3)]
  train, _ = load("unpaired", tmp_path, rows)
  batch = next(data.batches(train, 3, seed=0, pad_id=0))
  np.testing.assert_array_equal(batch.mismatched.tokens, batch.tokens)


def test_mismatched_responses_do_not_depend_on_the_batch(tmp_path):
  rows = [{"prompt": text(i), "response": text(i, i), "label": True} for i in range(7)]
  train, _ = load("unpaired", tmp_path, rows)
  whole = next(data.batches(train, 7, seed=0, pad_id=0, shuffle=False))
  np.testing.assert_array_equal(
    whole.mismatched.tokens[:, 2:4], np.roll(whole.tokens[:, 2:4], -1, axis=0)
  )
  order = np.argsort(whole.tokens[:, 1])
  for batch in itertools.islice(data.batches(train, 2, seed=3, pad_id=0), 5):
    same = order[np.searchsorted(whole.tokens[order, 1], batch.tokens[:, 1])]
    np.testing.assert_array_equal(batch.mismatched.tokens, whole.mismatched.tokens[same])


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


def votes(*preferred, names="abc"):
  return [{"annotator": n, "preferred": p} for n, p in zip(names, preferred, strict=False)]


def test_ties_are_dropped_and_counted(tmp_path):
  row = {"prompt": text(1), "responses": [text(2), text(3)]}
  rows = [{**row, "annotations": votes(*v)} for v in [(0, 0, 1), (0, 1), (1, 1, None), (None,)]]
  train, _ = load("preferences", tmp_path, rows)
  assert train.report["rows_read"] == 4
  assert (train.report["kept"], train.report["dropped_ties"]) == (2, 2)
  assert train.dropped == "ties 2"
  train, _ = load("preferences", tmp_path, rows, votes="each")
  assert (train.report["kept"], train.report["dropped_ties"]) == (7, 2)
  assert len(train.rows) == 7
  train, _ = load("preferences", tmp_path, rows, annotator="c")
  assert (train.report["kept"], train.dropped) == (1, "ties 1, not_judged 2")
  with pytest.raises(DataError, match="dropped_not_judged 4.*choose another data.annotator"):
    load("preferences", tmp_path, rows, annotator="nobody")


def test_all_pairs_of_a_row_stay_on_one_side(tmp_path):
  rows = [
    {
      "prompt": text(i),
      "responses": [{"text": text(i, k), "rank": k} for k in range(4)],
    }
    for i in range(40)
  ]
  train, heldout = load("preferences", tmp_path, rows, eval_fraction=0.3)
  assert len(train.examples) + len(heldout.examples) == 40 * 6
  assert len(heldout.examples) % 6 == 0 and heldout.examples
  assert heldout.report["eval_prompts_in_train"] == 0
  rankings, _ = load("rankings", tmp_path, rows, eval_fraction=0.3)
  assert len(rankings.examples) * 6 == len(train.examples)


def test_overlong_responses_leave_a_ranking(tmp_path):
  row = {"prompt": text(1)}

  def responses(*lengths):
    return [{"text": text(*range(n)), "rank": i} for i, n in enumerate(lengths)]

  rows = [
    {**row, "responses": responses(9, 2, 1, 3)},
    {**row, "responses": responses(2, 1)},
    {**row, "responses": responses(2, 9)},
  ]
  train, _ = load("rankings", tmp_path, rows, max_response_length=4)
  assert [e["ranks"].tolist() for e in train.examples] == [[0, 1, 2], [0, 1]]
  assert train.width == 3
  assert train.dropped == "overlong 1, overlong_responses 1"


def test_kind_of_comparisons(tmp_path):
  ranking = {"prompt": text(1), "responses": [{"text": text(2), "rank": 0}] * 2}
  pair = {"prompt": text(1), "chosen": text(2), "rejected": text(3)}
  for rows, kind in (([ranking, pair], "rankings"), ([pair, ranking], "preferences")):
    config = DataConfig(path=write(tmp_path, rows))
    assert data.comparison_kind(config) == kind
  assert data.comparison_kind(DataConfig()) == "preferences"


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
  with pytest.raises(
    DataError, match=r"4 of 4 examples are too long.*data\.max_prompt_length=8.*10"
  ):
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


@pytest.mark.parametrize("kind", typing.get_args(data.Kind))
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
  assert len(train.examples) == (100 if kind == "unpaired" else 50)
  assert data.load(kind, config, tokenizer, seed=1)[0].digest == train.digest
  assert data.load(kind, config, tokenizer, seed=2)[0].digest != train.digest


def test_annotators_of_the_builtin_task():
  from rlhf_jax import simulation

  tokenizer = word_level_tokenizer(simulation.WORDS)

  def chosen(annotator):
    config = DataConfig(rows=200, eval_rows=100, annotator=annotator)
    train, heldout = data.load("preferences", config, tokenizer)
    return [np.mean([len(e["chosen"]) for e in part.examples]) for part in (train, heldout)]

  assert chosen("") == chosen("expert")
  for terse, lavish in zip(chosen("terse"), chosen("lavish"), strict=True):
    assert terse < lavish - 1
  with pytest.raises(DataError, match="data.annotator: 'me' does not judge.*expert, novice, terse"):
    chosen("me")


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


def test_batches_refuses(dataset):
  with pytest.raises(ValueError, match="--batch_size=14 does not fit a data set of 13 rows"):
    data.batches(dataset, 14, seed=0, pad_id=0)
  with pytest.raises(ValueError, match="--batch_size=0 does not fit"):
    data.batches(dataset, 0, seed=0, pad_id=0)


def packable(tmp_path, kind):
  """Rows of unequal lengths, each with a prompt of its own."""
  rng = np.random.default_rng(0)
  names = {"demonstrations": ("response",), "preferences": ("chosen", "rejected")}[kind]
  rows = [
    {"prompt": text(n)} | {name: text(*rng.integers(0, 40, rng.integers(1, 12))) for name in names}
    for n in range(23)
  ]
  return load(kind, tmp_path, rows)[0]


@pytest.mark.parametrize("kind", ["demonstrations", "preferences"])
def test_packed_rows_are_those_of_first_fit(tmp_path, kind):
  dataset = packable(tmp_path, kind)
  columns = np.arange(2 * 23.0).reshape(23, 2) + 1
  rows, length = 3, 32
  stream = data.batches(
    dataset, rows, seed=1, pad_id=7, shuffle=False, columns=columns, packed_length=length
  )
  order = itertools.cycle(range(23))
  nxt = next(order)
  for batch, known in itertools.islice(stream, 9):
    assert type(batch) is PackedBatch
    sides = [x[:, None] if kind == "demonstrations" else x for x in batch[:3]]
    tokens, mask, segments = sides
    assert tokens.dtype == segments.dtype == np.int32 and mask.dtype == batch.real.dtype == bool
    members = [[] for _ in range(rows)]
    while True:
      sequences = [
        np.concatenate([dataset.examples[nxt]["prompt"], response])
        for response in data.responses_of(dataset.examples[nxt])
      ]
      fits = [
        all(
          sum(map(len, [m[side] for m in row])) + len(sequences[side]) <= length
          for side in range(len(sequences))
        )
        for row in [[m[1] for m in row] for row in members]
      ]
      if not any(fits):
        break
      members[fits.index(True)].append((nxt, sequences))
      nxt = next(order)
    for r, row in enumerate(members):
      assert batch.real[r].sum() == len(row) and batch.real[r, : len(row)].all()
      np.testing.assert_array_equal(known[r, : len(row)], columns[[n for n, _ in row]])
      assert (known[r, len(row) :] == 0).all()
      for side in range(tokens.shape[1]):
        whole = np.concatenate([sequences[side] for _, sequences in row])
        ids = np.repeat(np.arange(len(row)) + 1, [len(s[side]) for _, s in row])
        np.testing.assert_array_equal(tokens[r, side, : len(whole)], whole)
        assert (tokens[r, side, len(whole) :] == 7).all()
        np.testing.assert_array_equal(segments[r, side, : len(whole)], ids)
        assert (segments[r, side, len(whole) :] == 0).all()
        prompts_of = [len(dataset.examples[n]["prompt"]) for n, _ in row]
        scored = [
          np.arange(len(s[side])) >= prompt for (_, s), prompt in zip(row, prompts_of, strict=True)
        ]
        np.testing.assert_array_equal(mask[r, side, : len(whole)], np.concatenate(scored))
        assert not mask[r, side, len(whole) :].any()


def test_packed_batches_resume_at_every_step(tmp_path):
  dataset = packable(tmp_path, "demonstrations")
  make = lambda: data.batches(dataset, 2, seed=3, pad_id=0, packed_length=40)  # noqa: E731
  iterator, states, expected = make(), [], []
  for _ in range(8):
    states.append(json.loads(json.dumps(iterator.get_state())))
    expected.append(next(iterator))
  seen = sum(int(batch.real.sum()) for batch in expected)
  assert seen > 2 * 23, "not past the end of the second epoch"
  for start, state in enumerate(states):
    resumed = make()
    resumed.set_state(state)
    for batch in expected[start : start + 3]:
      assert_same(next(resumed), batch)


def test_short_sequences_close_a_row_early(tmp_path):
  # The places of a row are of a fixed number, too: twice the usual one.
  rows = [{"prompt": text(n), "response": text(*[0] * (1 if n < 20 else 30))} for n in range(30)]
  dataset = load("demonstrations", tmp_path, rows)[0]
  stream = data.batches(dataset, 1, seed=0, pad_id=0, shuffle=False, packed_length=60)
  counts = [int(batch.real.sum()) for batch in itertools.islice(stream, 2)]
  lengths = [len(e["prompt"]) + len(e["response"]) for e in dataset.examples]
  assert counts[0] == np.ceil(2 * 60 / np.mean(lengths)) < 60 // min(lengths)


def test_padding_is_counted(tmp_path):
  dataset = packable(tmp_path, "preferences")
  lengths = [len(e["prompt"]) + len(r) for e in dataset.examples for r in data.responses_of(e)]
  padded = data.padding_fraction(dataset, 4)
  assert padded == pytest.approx(1 - np.mean(lengths) / dataset.padded_length)
  packed = data.padding_fraction(dataset, 4, packed_length=256)
  assert 0 < packed < padded / 2


@pytest.mark.parametrize(
  ("kind", "length", "message"),
  [
    ("demonstrations", 16, "data.packed_length=16 is too short .* up to 24 tokens"),
    ("unpaired", 64, "data.packed_length=64 is for demonstrations and preferences.*reads unpaired"),
  ],
)
def test_impossible_packing_is_refused(tmp_path, kind, length, message):
  rows = [{"prompt": text(1), "response": text(*range(19)), "label": True}]
  with pytest.raises(DataError, match=message):
    load(kind, tmp_path, rows, packed_length=length)


@pytest.mark.parametrize("batch_size", [1, 4, 13, 40])
def test_eval_batches_count_every_row_once(dataset, batch_size):
  counted = []
  for batch, valid in data.eval_batches(dataset, batch_size, pad_id=0):
    assert batch.tokens.shape == (batch_size, 8)
    assert valid.shape == (batch_size,)
    assert batch.mask.any(axis=1).all()
    counted.extend(batch.prompt_id[valid].tolist())
  assert counted == list(range(13))


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


def decided_and_tied(row):
  """Comparisons of a judged row, counted from its columns by rules of their own."""
  if "chosen" in row:
    return 1, 0
  if "annotations" in row:
    preferred = [vote["preferred"] for vote in row["annotations"]]
    counts = sorted((preferred.count(x) for x in (0, 1, None)), reverse=True)
    winner = counts[0] > counts[1] and preferred.count(None) < counts[0]
    return int(winner), int(not winner)
  if "preferences" in row:
    ties = sum(pair["preferred"] is None for pair in row["preferences"])
    return len(row["preferences"]) - ties, ties
  values = [r.get("rank", r.get("score", r.get("correct"))) for r in row["responses"]]
  ties = sum(a == b for a, b in itertools.combinations(values, 2))
  return len(values) * (len(values) - 1) // 2 - ties, ties


def everything(shared, kind, family, **config):
  """All rows of a data set of which the test split is held out."""
  tokenizer = data.load_tokenizer(shared / "models" / "stories260k", eos_token="<s>")
  paths = [str(shared / "data" / f"{family}_{split}.jsonl") for split in ("train", "test")]
  limits = {"max_prompt_length": 10**6, "max_response_length": 10**6, "eval_rows": 10**6}
  config = DataConfig(path=paths[0], eval_path=paths[1], end_token="<s>", **limits, **config)
  rows = [[row.fields for row in data.read_jsonl(path)] for path in paths]
  return data.load(kind, config, tokenizer), rows


@pytest.mark.parametrize(
  ("family", "digest"),
  [
    ("preference/hh_helpful", "f60b7651"),
    ("preference/hh_harmless", "7f4340bd"),
    ("annotators/hh_groups", "ec23e387"),
    ("annotators/pandalm", "6a27567a"),
    ("ranking/alpaca_eval_k6", "54572609"),
    ("ranking/qa_feedback", "e5cdaebb"),
    ("ranking/oasst", "e7be44d2"),
  ],
)
def test_real_comparisons(shared, family, digest):
  datasets, rows = everything(shared, "preferences", family)
  for dataset, part in zip(datasets, rows, strict=True):
    decided, tied = np.sum([decided_and_tied(row) for row in part], axis=0)
    report = dataset.report
    assert report["rows_read"] == len(part)
    assert report["kept"] == len(dataset.examples) == decided
    assert (report["dropped_ties"], report["dropped_overlong"]) == (tied, 0)
    assert all(e["chosen"].tolist() != e["rejected"].tolist() for e in dataset.examples)
  assert datasets[1].report["eval_prompts_in_train"] == 0
  assert datasets[1].digest.startswith(digest)


def merits(row):
  """A number of each response that is higher for the better ones."""
  return row.get("wins") or [r.get("score", -r.get("rank", 0)) for r in row["responses"]]


@pytest.mark.parametrize("family", ["alpaca_eval_k6", "qa_feedback", "oasst"])
def test_real_rankings(shared, family):
  datasets, rows = everything(shared, "rankings", f"ranking/{family}")
  tokenizer = data.load_tokenizer(shared / "models" / "stories260k", eos_token="<s>")
  for dataset, part in zip(datasets, rows, strict=True):
    ordered = sum(len(set(merits(row))) > 1 for row in part)
    assert dataset.report["kept"] == len(dataset.examples) == ordered
    assert dataset.report["dropped_ties"] == len(part) - ordered
    assert datasets[1].report["eval_prompts_in_train"] == 0
    for example, row in zip(dataset.examples, dataset.rows, strict=True):
      texts = [r if isinstance(r, str) else r["text"] for r in row["responses"]]
      merit = merits(row)
      # The best first, and where two are tied, in the order of the file.
      want = [texts[i] for i in sorted(range(len(texts)), key=lambda i: (-merit[i], i))]
      assert [tokenizer.decode(ids) for ids in data.responses_of(example)] == want
      levels = sorted(set(merit), reverse=True)
      assert example["ranks"].tolist() == [levels.index(x) for x in sorted(merit, reverse=True)]


def test_groups_of_annotators(shared):
  """The humans judged all rows, each of the two groups a part of them."""
  tokenizer = data.load_tokenizer(shared / "models" / "stories260k", eos_token="<s>")
  path = str(shared / "data" / "annotators" / "hh_groups_test.jsonl")
  votes = [vote for row in data.read_jsonl(path) for vote in row.fields["annotations"]]
  config = DataConfig(
    path=path,
    end_token="<s>",
    eval_fraction=0.0,
    max_prompt_length=10**6,
    max_response_length=10**6,
  )
  sizes = {}
  for name in ("human", "ai-helpfulness", "ai-harmlessness"):
    own = dataclasses.replace(config, annotator=name)
    train, _ = data.load("preferences", own, tokenizer)
    sizes[name] = len(train.examples)
    assert sizes[name] == sum(vote["annotator"] == name for vote in votes) > 0
    assert train.report["dropped_not_judged"] == 365 - sizes[name]
  assert sizes["human"] == sizes["ai-helpfulness"] + sizes["ai-harmlessness"] == 365
  train, _ = data.load("preferences", dataclasses.replace(config, votes="each"), tokenizer)
  assert len(train.examples) == len(votes)


def test_real_unpaired_rows(shared):
  tokenizer = data.load_tokenizer(shared / "models" / "stories260k", eos_token="<s>")
  path = shared / "data" / "verifiable" / "gsm8k_model_solutions.jsonl"
  config = DataConfig(
    path=str(path), end_token="<s>", max_prompt_length=10**6, max_response_length=10**6
  )
  train, heldout = data.load("unpaired", config, tokenizer)
  right = [r["correct"] for row in data.read_jsonl(path) for r in row.fields["responses"]]
  desirable = [e["desirable"][0] for part in (train, heldout) for e in part.examples]
  assert (len(desirable), sum(desirable)) == (len(right), sum(right))
  (train, heldout), rows = everything(shared, "unpaired", "preference/hh_harmless")
  assert [len(train.examples), len(heldout.examples)] == [2 * len(part) for part in rows]
  assert sum(e["desirable"][0] for e in train.examples) == len(rows[0])
  for batch, valid in data.eval_batches(heldout, 16, pad_id=0):
    tokens, mask, _, mismatched = batch
    prompt = np.cumprod(~mask & ~mismatched.mask, axis=1).astype(bool)
    np.testing.assert_array_equal(tokens[prompt], mismatched.tokens[prompt])
    assert valid.sum() and (tokens != mismatched.tokens).any(axis=1).all()
