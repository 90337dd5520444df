import itertools

import numpy as np
import pytest

from rlhf_jax import data
from rlhf_jax.data import PromptBatch, kinds
from rlhf_jax.types import ComparisonBatch, RankingBatch, TokenBatch, UnpairedBatch
from tests.data.rows import TOKENIZER, ids, load, text


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
  # The next response to another prompt.
  others = [[1, *ids(1), *ids(5), 2], [1, *ids(3, 4), *ids(2), 2], [1, *ids(3, 4), *ids(2), 2]]
  for got, want in ((batch, answers), (batch.mismatched, others)):
    for b, sequence in enumerate(want):
      assert got.tokens[b].tolist() == sequence + [0] * (8 - len(sequence))
      start = 2 if b == 0 else 3
      assert got.mask[b].tolist() == [start <= t < len(sequence) for t in range(8)]
  assert batch.desirable.tolist() == [True, True, False]
  assert batch.desirable.dtype == bool


def unpaired(*rows):
  """Examples from pairs of a prompt and a response."""
  return [{"prompt": np.int32([p]), "response": np.int32([r])} for p, r in rows]


@pytest.mark.parametrize(
  "rows",
  [
    [(1, 5), (1, 6), (1, 7)],  # One prompt.
    [(1, 5), (2, 5), (3, 6)],  # Equal responses, such as yes and no.
    [(1, 5), (2, 6)],
    [(1, 5), (1, 5), (1, 6)],
    [(1, 5), (2, 6), (1, 7), (2, 8), (1, 9)],
    [(i % 3, i % 4) for i in range(11)],
    [(i // 4, i % 5) for i in range(13)],
  ],
  ids=str,
)
def test_a_mismatched_response_is_never_the_own_one(rows):
  prompts, responses = zip(*rows, strict=True)
  for i, (prompt, response) in enumerate(rows):
    place = kinds.partner(unpaired(*rows), i)
    assert responses[place] != response
    # Another prompt's, if there is one with another response.
    if any(p != prompt and r != response for p, r in rows):
      assert prompts[place] != prompt


@pytest.mark.parametrize("answers", [2, 3, 4])
def test_mismatched_responses_are_good_as_often_as_the_data(answers):
  """The first response to each prompt is the good one, as in pairs."""
  rows = [(prompt, 100 * prompt + n) for prompt in range(9) for n in range(answers)]
  examples = unpaired(*rows)
  places = [kinds.partner(examples, i) for i in range(len(rows))]
  assert sorted(places) == list(range(len(rows)))  # Each is used once.


@pytest.mark.parametrize("count", [1, 3])
def test_rows_with_one_response_have_no_mismatched_one(tmp_path, count):
  rows = [{"prompt": text(i), "response": text(9), "label": True} for i in range(count)]
  with pytest.raises(data.DataError, match=f"rows.jsonl: {count} rows without two different resp"):
    load("unpaired", tmp_path, rows)


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
