import itertools
import json

import numpy as np
import pytest

from rlhf_jax import data
from rlhf_jax.types import PackedBatch
from tests.data.rows import load, prompts, text


def leaves(batch):
  return [np.asarray(x) for x in batch]


def assert_same(a, b):
  assert type(a) is type(b)
  for x, y in zip(leaves(a), leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


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


def packable(tmp_path, kind, prompt=0, **config):
  """Rows of unequal lengths, each with a prompt of its own, of `prompt` more tokens than one."""
  rng = np.random.default_rng(0)
  names = {"demonstrations": ("response",), "preferences": ("chosen", "rejected")}[kind]
  rows = [
    {"prompt": text(n, *range(prompt))}
    | {name: text(*rng.integers(0, 40, rng.integers(1, 12))) for name in names}
    for n in range(23)
  ]
  return load(kind, tmp_path, rows, **config)[0]


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


@pytest.mark.parametrize("batch_size", [1, 4, 13, 40])
def test_eval_batches_count_every_row_once(dataset, batch_size):
  counted = []
  for batch, valid in data.eval_batches(dataset, batch_size, pad_id=0):
    assert batch.tokens.shape == (batch_size, 8)
    assert valid.shape == (batch_size,)
    assert batch.mask.any(axis=1).all()
    counted.extend(batch.prompt_id[valid].tolist())
  assert counted == list(range(13))


def test_shared_rows_hold_the_tokens_of_separate_rows(tmp_path):
  shared = packable(tmp_path, "preferences", 20, share_prompts=True)
  separate = packable(tmp_path, "preferences", 20)
  longest = max(sum(map(len, example.values())) for example in shared.examples)
  assert shared.shared_length == -(-longest // 8) * 8 <= 2 * separate.padded_length
  indices, pad_id, real = np.arange(23), 3, 0
  for n in indices:
    (row,), (mask,), (places,) = data.KINDS["preferences"].collate(shared, [n], pad_id)
    (tokens,), (want,) = data.KINDS["preferences"].collate(separate, [n], pad_id)
    np.testing.assert_array_equal(mask, want)
    np.testing.assert_array_equal(np.append(row, pad_id)[places], tokens)
    here = np.unique(places[places < len(row)])
    np.testing.assert_array_equal(here, np.arange(sum(map(len, shared.examples[n].values()))))
    assert (row[len(here) :] == pad_id).all()
    real += len(here)
  padding = data.padding_fraction(shared, 4)
  np.testing.assert_allclose(padding, 1 - real / (23 * shared.shared_length))
  assert shared.digest == separate.digest and separate.shared_length == 0


@pytest.mark.parametrize("packed_length", [0, 24])
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_the_first_batches_have_the_first_rows(tmp_path, steps, packed_length):
  rows = [{"prompt": text(i), "response": text(*range(i % 7 + 1))} for i in range(40)]
  dataset, _ = load("demonstrations", tmp_path, rows)
  first = data.first_rows(dataset, 4, steps, seed=3, packed_length=packed_length)
  number = np.arange(40, dtype=np.float32)[:, None]
  met = set()
  source = data.batches(dataset, 4, seed=3, pad_id=0, columns=number, packed_length=packed_length)
  for _ in range(steps):
    batch, numbers = next(source)
    real = batch.real if packed_length else np.ones(4, bool)
    met |= {int(n) for n in numbers[..., 0][real]}
  assert met <= set(first.tolist())
  if not packed_length:
    assert met == set(first.tolist())
  only = [
    n for b, on in data.eval_batches(dataset, 4, 0, columns=number, only=first) for n in b[1][on, 0]
  ]
  assert only == first.tolist()
