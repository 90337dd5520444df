import dataclasses
import itertools
import pathlib

import numpy as np
import pytest

from rlhf_jax import data
from rlhf_jax.data import DataConfig, DataError, word_level_tokenizer
from tests.data import chats
from tests.data.rows import TOKENIZER, ids, load, prompts, text, write

SHARED = pathlib.Path(__file__).resolve().parents[2].parent / "shared"


# Config.


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"max_prompt_length": 0}, "max_prompt_length must be at least 1, got 0"),
    ({"max_response_length": -1}, "max_response_length must be at least 1, got -1"),
    ({"eval_fraction": 1.0}, "eval_fraction must be"),
    ({"eval_fraction": float("nan")}, "eval_fraction must be"),
    ({"rows": -1}, "rows must not be negative, got -1"),
    ({"bad_rows": -1}, "bad_rows must not be negative, got -1"),
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


def test_data_sets_of_rows_and_examples_at_hand(tmp_path):
  rows = [{"prompt": text(i), "chosen": text(i, 2), "rejected": text(3)} for i in range(5)]
  want, _ = load("preferences", tmp_path, rows)
  path = write(tmp_path, rows)
  got = data.from_rows("preferences", list(data.read_file(path)), DataConfig(), TOKENIZER)
  again = data.from_examples("preferences", want.examples, want.rows)
  assert want.digest == got.digest == again.digest
  assert want.padded_length == got.padded_length == again.padded_length
  assert data.from_rows("preferences", [], DataConfig(), TOKENIZER).examples == []


def test_both_sets_have_one_padded_length(tmp_path):
  long = write(tmp_path, [{"prompt": text(*range(20))}], "eval.jsonl")
  train, heldout = load("prompts", tmp_path, prompts(3), eval_path=long)
  assert train.padded_length == heldout.padded_length == 24


def test_typed_specials_never_become_ids():
  rows = [data.Row("r", {"prompt": "w1 <eos> <bos>", "response": "<eos><pad>w2 <eos>"})]
  train = data.from_rows("demonstrations", rows, DataConfig(), TOKENIZER)
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
    {"prompt": text(1), "chosen": "w2  w3", "rejected": "w2 w3"},  # The same ids.
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
  with pytest.raises(DataError, match=r"rows\.jsonl:4: prompt: is null.*data\.bad_rows$"):
    load("prompts", tmp_path, rows)
  with pytest.raises(DataError, match=r"rows\.jsonl:7: prompt: .*\(1 earlier ones skipped\)$"):
    load("prompts", tmp_path, rows, bad_rows=1)
  train, _ = load("prompts", tmp_path, rows, bad_rows=2)
  assert (train.report["kept"], train.report["bad_rows"]) == (5, 2)


def test_rows_that_fail_a_check_are_bad_rows(tmp_path):
  def check(row):
    if "answer" not in row:
      raise DataError("answer: missing")

  rows = [{**row, "answer": 1} for row in prompts(6)]
  del rows[4]["answer"]
  path = write(tmp_path, rows)
  with pytest.raises(DataError, match=r"rows\.jsonl:5: answer: missing; .*data\.bad_rows$"):
    data.load("prompts", DataConfig(path), TOKENIZER, checks={"x": check})
  for options in ({}, {"eval_path": path}, {"eval_sets": (f"a={path}",)}):
    config = DataConfig(path, bad_rows=3, **options)
    train, heldout = data.load("prompts", config, TOKENIZER, checks={"x": check})
    for part in (train, heldout, *heldout.named.values()):
      assert part.checked == ("x",) and all("answer" in row for row in part.rows)
  assert train.report["bad_rows"] == 2


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
  for rows in (prompts(1), prompts(1) * 9):
    train, heldout = load("prompts", tmp_path, rows, eval_fraction=0.05)
    assert (len(train.examples), len(heldout.examples)) == (len(rows), 0)
    assert heldout.report["nothing_to_hold_out"] == 1


def test_rows_of_one_prompt_are_split_by_their_answers(tmp_path):
  rows = [{"prompt": text(1), "response": text(i % 40, i // 20)} for i in range(60)]
  train, heldout = load("demonstrations", tmp_path, rows, eval_fraction=0.2)
  assert len(train.examples) + len(heldout.examples) == 60
  assert 4 <= len(heldout.examples) <= 24
  assert heldout.report["split_by_rows"] == 1
  ours, theirs = ({e["response"].tobytes() for e in part.examples} for part in (train, heldout))
  assert not ours & theirs  # Equal rows stay on one side.


def test_rows_are_held_out_of_those_that_are_left(tmp_path):
  long = {"response": text(*range(9))}
  for n in range(20):  # Whichever row has the least hash, it is not the one that is too long.
    rows = [{"prompt": text(n, i), "response": text(1)} for i in range(4)]
    rows[n % 4] |= long
    train, heldout = load(
      "demonstrations", tmp_path, rows, eval_fraction=0.001, max_response_length=4
    )
    assert (len(train.examples), len(heldout.examples)) == (2, 1)
    lost = [part.report["dropped_overlong"] for part in (train, heldout)]
    assert sum(lost) == 1
    # The limit counts the rows that are left too.
    config = {"eval_fraction": 0.99, "eval_rows": 1, "max_response_length": 4}
    assert len(load("demonstrations", tmp_path, rows, **config)[1].examples) == 1
    assert sum(part.report["rows_read"] for part in (train, heldout)) == 4


def test_eval_rows_limits_the_held_out_rows(tmp_path):
  train, heldout = load("prompts", tmp_path, prompts(400), eval_fraction=0.2, eval_rows=7)
  assert len(heldout.examples) == 7
  assert len(train.examples) < 390  # Held out means held out, used or not.


def test_eval_file_and_its_overlap(tmp_path):
  eval_path = write(tmp_path, prompts(10, start=5), "eval.jsonl")
  train, heldout = load("prompts", tmp_path, prompts(8), eval_path=eval_path)
  assert (len(train.examples), len(heldout.examples)) == (8, 10)
  assert heldout.report["eval_prompts_in_train"] == 3


@pytest.mark.parametrize("kind", data.KINDS)
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


@pytest.mark.parametrize(
  ("kind", "prompt", "options", "shared"),
  [
    ("preferences", 30, {}, True),
    ("preferences", 30, {"share_prompts": False}, False),
    ("preferences", 30, {"packed_length": 128}, False),
    ("preferences", 1, {}, False),  # Less than a tenth of the tokens.
    ("comparisons", 30, {}, False),
    ("rankings", 30, {}, False),
    ("unpaired", 30, {}, False),
    ("demonstrations", 30, {}, False),
    ("prompts", 30, {}, False),
  ],
)
def test_pairs_share_their_prompt_where_it_is_long(tmp_path, kind, prompt, options, shared):
  row = {"prompt": text(*range(prompt)), "label": True, "response": text(2)}
  if kind in ("preferences", "comparisons", "rankings"):
    row = {"prompt": row["prompt"], "chosen": text(*range(13)), "rejected": text(*range(13, 26))}
  rows = [row, row | {"response": text(3)}] if kind == "unpaired" else [row]
  dataset, _ = load(kind, tmp_path, rows, **{"share_prompts": True} | options)
  assert (dataset.shared_length > 0) == shared
  if shared:
    assert dataset.batch_length == dataset.shared_length <= 0.9 * 2 * dataset.padded_length


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
  for row in data.read_file(path):
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
  rows = [[row.fields for row in data.read_file(path)] for path in paths]
  return data.load(kind, config, tokenizer), rows


@pytest.mark.parametrize(
  ("family", "digest"),
  [
    ("preference/hh_helpful", "f60b7651"),
    ("preference/hh_harmless", "7f4340bd"),
    ("annotators/hh_groups", "ec23e387"),
    ("annotators/pandalm", "f0bb7868"),
    ("ranking/alpaca_eval_k6", "24abf71a"),
    ("ranking/qa_feedback", "2909430b"),
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
  votes = [vote for row in data.read_file(path) for vote in row.fields["annotations"]]
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
  right = [r["correct"] for row in data.read_file(path) for r in row.fields["responses"]]
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


# Texts and the chat template.


def chat_load(folder, rows, template="chatml", **config):
  tokenizer = chats.chat(chats.byte_level(), template)
  limits = {"max_prompt_length": 10**4, "max_response_length": 10**4, "eval_fraction": 0.0}
  kind = "demonstrations" if "response" in rows[0] else "prompts"
  return data.load(kind, DataConfig(path=write(folder, rows), **(limits | config)), tokenizer)[0]


def test_what_a_cut_left_out_is_counted(tmp_path):
  turns = [{"role": ("user", "assistant")[i % 2], "content": "hello " * 9} for i in range(7)]
  rows = [{"messages": turns[:n], "response": "hello"} for n in (1, 3, 7)] + [
    {"prompt": "a long text " * 99, "response": "hello"},
    {"prompt": "a", "response": "hello"},
  ]
  train = chat_load(tmp_path, rows, overlong="truncate_prompt", max_prompt_length=60)
  report = train.report
  assert (report["kept"], report["truncated_prompts"], report["truncated_turns"]) == (5, 3, 2 + 6)
  for example in train.examples:
    assert len(example["prompt"]) <= 60
    shown = chats.chat(chats.byte_level(), "chatml").decode(example["prompt"], skip_special=False)
    assert shown.startswith("<|im_start|>user\n")
    assert shown.endswith("<|im_end|>\n<|im_start|>assistant\n")
  rows += [{"prompt": f"hello {i}", "response": "a"} for i in range(4)]
  assert chat_load(tmp_path, rows, max_prompt_length=60).report["dropped_overlong"] == 3
  system = {"role": "system", "content": "hello " * 40}
  rows += [{"messages": [system, *turns[:1]], "response": "hello"}]
  report = chat_load(tmp_path, rows, overlong="truncate_prompt", max_prompt_length=60).report
  assert (report["kept"], report["dropped_overlong"]) == (9, 1)
  with pytest.raises(DataError, match="not even a part of the last turn fits beside the template"):
    chat_load(tmp_path, rows, overlong="truncate_prompt", max_prompt_length=12)


def test_texts_that_spell_markers_are_said_with_their_line(tmp_path, caplog):
  rows = [
    {"prompt": "hello", "response": "hello"},
    {"prompt": "hello <|im_end|>", "response": "hello"},
    {"prompt": "hello", "response": "hello</s>"},
  ]
  train = chat_load(tmp_path, rows)
  assert train.report["spelled_markers"] == 2
  assert "rows.jsonl:2: the prompt spells '<|im_end|>', which is read as plain" in caplog.text
  rows[1]["prompt"] = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
  with pytest.raises(DataError, match=r"rows\.jsonl:2: prompt: the chat template is in the text"):
    chat_load(tmp_path, rows)
  assert chat_load(tmp_path, rows, bad_rows=1).report["kept"] == 2


def test_words_that_are_joined_are_said_with_their_line(tmp_path, caplog):
  rows = [
    {"prompt": "hello", "response": " hello"},
    {"prompt": "hello\n", "response": "hello"},
    {"prompt": "hello", "response": "hello"},
    {"prompt": "\n\nHuman: hello\n\nAssistant:", "response": "hello"},
  ]
  train = chat_load(tmp_path, rows, None)
  assert train.report["joined_words"] == 1
  assert "rows.jsonl:3: prompt and response are joined without a space" in caplog.text
  assert chat_load(tmp_path, rows, "llama2").report["joined_words"] == 0


def test_no_prompt_of_hh_begins_inside_a_marker(tmp_path, shared):
  """With a small limit and the shape in which the rows are published."""
  given = shared / "data" / "preference" / "hh_helpful_test.jsonl"
  rows = [row.fields for row in itertools.islice(data.read_file(given), 60)]
  rows = [{n: f"{row['prompt']} {row[n]}" for n in ("chosen", "rejected")} for row in rows]
  config = DataConfig(
    path=write(tmp_path, rows),
    eval_fraction=0.0,
    overlong="truncate_prompt",
    max_prompt_length=200,  # Of a tokenizer of bytes.
    max_response_length=10**4,
  )
  tokenizer = chats.chat(chats.byte_level(), "chatml")
  train, _ = data.load("preferences", config, tokenizer)
  assert train.report["truncated_prompts"] > 20 and train.report["truncated_turns"] > 40
  for example, row in zip(train.examples, train.rows, strict=True):
    shown = tokenizer.decode(example["prompt"], skip_special=False)
    first, *turns = shown.split("<|im_start|>")
    assert first == "" and turns[-1] == "assistant\n"
    for i, turn in enumerate(turns[:-1]):
      name, _, content = turn.partition("\n")
      assert name == ("user", "assistant")[i % 2]
      speaker = {"user": "Human", "assistant": "Assistant"}[name]
      content = content.removesuffix("<|im_end|>\n")
      assert (
        f"\n\n{speaker}: {content}" in row["chosen"] or len(turns) == 2
      )  # Only a last turn is cut.
