"""Tokens that are kept in files: the same bits, for what they were made of and nothing else."""

import concurrent.futures
import dataclasses
import datetime
import hashlib
import itertools
import pathlib
import threading

import jax
import numpy as np
import pytest

from experiments.lab import given_rows, models
from rlhf_jax import data, loop
from rlhf_jax.data import DataConfig, Tokenizer, datasets, stored, word_level_tokenizer
from tests.data.rows import TOKENIZER, WORDS, prompts, text, write

_N = 24
_EXTRA = {"answer": [1, 2.5, None, True], "about": {"é\u2028": "<|x|>", "big": 10**30}, "x": -0.0}
_RESPONSES = [{"text": text(i, i), "score": i} for i in range(3)]
ROWS = {
  "demonstrations": [
    {**row, **_EXTRA, "response": text(i % 7)} for i, row in enumerate(prompts(_N))
  ],
  "preferences": [
    {**row, "responses": _RESPONSES[: 2 + i % 2], "n": i} for i, row in enumerate(prompts(_N))
  ],
  "comparisons": [
    {
      **row,
      "responses": [text(i), text(2, 1)],
      "annotations": [{"preferred": None}, {"preferred": 1}],
    }
    for i, row in enumerate(prompts(_N))
  ],
  "rankings": [{**row, "responses": _RESPONSES[: 2 + i % 2]} for i, row in enumerate(prompts(_N))],
  "unpaired": [{**row, "response": text(i), "label": i % 2} for i, row in enumerate(prompts(_N))],
  "prompts": [{**row, **_EXTRA} for row in prompts(_N)],
}
KINDS = [*ROWS]


def listed(dataset):
  """A data set with plain lists, and bits in place of arrays."""
  examples = [
    {name: (ids.dtype.str, ids.tolist()) for name, ids in example.items()}
    for example in dataset.examples
  ]
  named = {name: listed(of) for name, of in dataset.named.items()}
  # `repr` tells 1 from True and from 1.0.
  return dataset._replace(examples=examples, rows=[repr(row) for row in dataset.rows], named=named)


def both(*args, **options):
  return [listed(dataset) for dataset in data.load(*args, **options)]


def files_in(folder):
  return sorted(path.name for path in pathlib.Path(folder).glob("*"))


@pytest.fixture
def read(monkeypatch):
  """Counts the times that rows were read."""
  times = []
  real = datasets._load

  def load(*args):
    times.append(args)
    return real(*args)

  monkeypatch.setattr(datasets, "_load", load)
  return times


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["plain", "sets", "mixed", "short"])
def test_mapped_rows_are_those_that_were_read(tmp_path, read, kind, options):
  path = write(tmp_path, ROWS[kind])
  more = write(tmp_path, ROWS[kind][:9], "more.jsonl")
  config = {
    "plain": DataConfig(path, eval_fraction=0.2),
    "sets": DataConfig(path, eval_path=more, eval_sets=(f"a={more}", f"b={path}"), eval_rows=4),
    "mixed": DataConfig(f"{path}:3,{more}:1", eval_fraction=0.0, ignore=("x",)),
    "short": DataConfig(path, max_prompt_length=2, overlong="truncate_prompt"),
  }[options]
  expected = both(kind, config, TOKENIZER)
  for _ in range(3):
    assert both(kind, config, TOKENIZER, cache=tmp_path / "tokens") == expected
  assert len(read) == 2 and len(files_in(tmp_path / "tokens")) == 1
  sets = [
    data.load(kind, config, TOKENIZER, cache=cache)[0] for cache in (None, tmp_path / "tokens")
  ]
  for packed in (0, 64) if options == "mixed" and data.KINDS[kind].packable else (0,):
    drawn = [
      list(itertools.islice(data.batches(of, 4, seed=3, pad_id=0, packed_length=packed), 4))
      for of in sets
    ]
    jax.tree.map(np.testing.assert_array_equal, *drawn)


def test_examples_and_rows_are_sequences(tmp_path):
  config = DataConfig(write(tmp_path, ROWS["rankings"]), eval_fraction=0.0)
  cache = tmp_path / "tokens"
  train, heldout = data.load("rankings", config, TOKENIZER, cache=cache)
  assert not heldout.examples and not heldout.rows and len(train.rows) == _N
  assert [row["n"] for row in train.rows[2:9:3]] == [2, 5, 8]
  assert train.rows[-1] == train.rows[_N - 1] and train.rows[-1] is not train.rows[-1]
  assert train.examples[-1].keys() == train.examples[_N - 1].keys()
  assert len(train.examples[-3:]) == 3 and len([*train.examples]) == len([*train.rows]) == _N
  for sequence, outside in itertools.product((train.rows, train.examples), (_N, -_N - 1)):
    with pytest.raises(IndexError):
      sequence[outside]
  with pytest.raises(ValueError, match="read-only"):
    train.examples[0]["prompt"][0] = 7


def test_one_row_is_kept_once_for_all_of_its_examples(tmp_path):
  row = {
    "prompt": text(1),
    "about": "z" * 9999,
    "responses": [{"text": text(i, i), "score": i} for i in range(9)],
  }
  config = DataConfig(write(tmp_path, [row]), eval_fraction=0.0)
  train, _ = data.load("preferences", config, TOKENIZER, cache=tmp_path / "tokens")
  assert len(train.rows) == 36
  (file,) = (tmp_path / "tokens").iterdir()
  assert file.stat().st_size < 2 * 9999


_EACH = "{% for m in messages %}{{ m.content }}{% endfor %}"


def _tokenizer(**changes):
  hf = word_level_tokenizer(WORDS).hf
  hf.chat_template = changes.pop("template", "{{ bos_token }} " + _EACH)
  stop_ids = changes.pop("stop_ids", ())
  for name, value in changes.items():
    setattr(hf, name, value)
  return Tokenizer(hf, stop_ids=stop_ids)


@pytest.mark.parametrize(
  "change",
  [
    {"config": {"max_prompt_length": 99}},
    {"config": {"max_response_length": 99}},
    {"config": {"overlong": "truncate_prompt"}},
    {"config": {"rows": 20}},
    {"config": {"eval_fraction": 0.3}},
    {"config": {"eval_rows": 2}},
    {"config": {"bad_rows": 3}},
    {"config": {"ignore": ("x",)}},
    {"config": {"votes": "each"}},
    {"config": {"packed_length": 99}},
    {"kind": "prompts"},
    {"file": "one row more"},
    {"file": "one letter"},
    {"file": "other columns"},
    {"tokenizer": {"template": _EACH}},
    {"tokenizer": {"bos_token": "w7"}},
    {"tokenizer": {"stop_ids": (7,)}},
    {"words": WORDS[::-1]},
    {"code": True},
  ],
  ids=str,
)
def test_other_rows_or_settings_are_read_anew(tmp_path, read, monkeypatch, change):
  rows, cache = ROWS["demonstrations"], tmp_path / "tokens"
  config, kind, tokenizer = DataConfig(write(tmp_path, rows)), "demonstrations", _tokenizer()
  data.load(kind, config, tokenizer, cache=cache)
  config = dataclasses.replace(config, **change.get("config", {}))
  if "file" in change:
    changed = {
      "one row more": [*rows, rows[0]],
      "one letter": [{**rows[0], "response": text(9)}, *rows[1:]],
      "other columns": [{**row, "y": 1} for row in rows],
    }
    write(tmp_path, changed[change["file"]])
  if "code" in change:
    monkeypatch.setattr(stored, "__file__", str(tmp_path / "other" / "stored.py"))
  if "words" in change:
    tokenizer = word_level_tokenizer(change["words"])
  tokenizer = _tokenizer(**change["tokenizer"]) if "tokenizer" in change else tokenizer
  kind = change.get("kind", kind)
  for times in (2, 2):
    found = both(kind, config, tokenizer, cache=cache)
    assert len(read) == times and len(files_in(cache)) == 2
  assert found == both(kind, config, tokenizer)


def test_rows_are_read_anew_with_other_checks(tmp_path, read):
  config, cache = DataConfig(write(tmp_path, ROWS["prompts"])), tmp_path / "tokens"
  for names in ([], ["x"], ["x"], ["x", "y"]):
    checks = dict.fromkeys(names, lambda row: None)
    for dataset in data.load("prompts", config, TOKENIZER, cache=cache, checks=checks):
      assert dataset.checked == tuple(names)
  assert len(read) == len(files_in(cache)) == 3


def test_a_file_of_the_same_content_keeps_its_tokens(tmp_path, read, monkeypatch):
  for name in "ab":
    (tmp_path / name).mkdir()
    write(tmp_path / name, ROWS["prompts"])
    monkeypatch.chdir(tmp_path / name)
    data.load("prompts", DataConfig("rows.jsonl"), TOKENIZER, cache=tmp_path / "tokens")
  assert len(read) == 1


def _flip(path, place):
  content = bytearray(path.read_bytes())
  content[place] ^= 1
  path.write_bytes(content)


def _forge(path, find, put):
  """Replaces bytes and makes the digest right again."""
  body = path.read_bytes()[:-32].replace(find, put)
  path.write_bytes(body + hashlib.sha256(body).digest())


@pytest.mark.parametrize(
  "damage",
  [
    *(lambda path, at=at: _flip(path, at) for at in (0, 20, 70, 500, -40, -1)),
    lambda path: _flip(path, path.stat().st_size // 2),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"\0" * 500),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    lambda path: path.write_bytes(path.read_bytes()[:31]),
    lambda path: _forge(path, b'"layouts"', b'"layoutz"'),
    lambda path: _forge(path, b'"<i4"', b'"|O8"'),
    lambda path: _forge(path, b'"sets": [', b'"sets": {'),
    lambda path: (path.unlink(), path.symlink_to("nowhere")),
  ],
)
def test_damage_is_seen_and_mended(tmp_path, read, caplog, damage):
  config, cache = DataConfig(write(tmp_path, ROWS["rankings"]), eval_fraction=0.2), tmp_path / "t"
  expected = both("rankings", config, TOKENIZER, cache=cache)
  (path,) = cache.iterdir()
  whole = path.read_bytes()
  damage(path)
  missing = not path.exists()
  for _ in range(2):
    assert both("rankings", config, TOKENIZER, cache=cache) == expected
  assert len(read) == 2 and path.read_bytes() == whole and files_in(cache) == [path.name]
  said = [line for line in caplog.messages if "tokenised again" in line]
  assert len(said) == (not missing) and all(str(path) in line for line in said)


def test_processes_that_start_together_write_one_file(tmp_path, monkeypatch):
  config, cache = DataConfig(write(tmp_path, ROWS["rankings"]), eval_fraction=0.2), tmp_path / "t"
  expected = both("rankings", config, TOKENIZER)
  barrier, real = threading.Barrier(4), stored.write

  def write_together(*args):
    barrier.wait(60)
    return real(*args)

  monkeypatch.setattr(stored, "write", write_together)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    runs = [pool.submit(both, "rankings", config, TOKENIZER, cache=cache) for _ in range(4)]
    assert [run.result() for run in runs] == [expected] * 4
  assert len(files_in(cache)) == 1


def test_a_file_that_is_mapped_is_not_replaced(tmp_path):
  config, cache = DataConfig(write(tmp_path, ROWS["prompts"])), tmp_path / "tokens"
  data.load("prompts", config, TOKENIZER, cache=cache)
  (path,) = cache.iterdir()
  inode = path.stat().st_ino
  assert stored.write(path, stored.Stored(*data.load("prompts", config, TOKENIZER), []))
  assert path.stat().st_ino == inode and files_in(cache) == [path.name]


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
  config, cache = DataConfig(write(tmp_path, ROWS["prompts"])), tmp_path / "tokens"
  real = datasets._load

  def load(*args):
    write(tmp_path, ROWS["prompts"][:12])
    return real(*args)

  monkeypatch.setattr(datasets, "_load", load)
  data.load("prompts", config, TOKENIZER, cache=cache)
  assert not cache.exists()


@pytest.mark.parametrize("values", [{"x": float("nan")}, {"x": float("inf")}])
def test_numbers_that_are_no_json_are_kept(tmp_path, values):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  path, cache = tmp_path / "rows.parquet", tmp_path / "tokens"
  parquet.write_table(pyarrow.Table.from_pylist([{**row, **values} for row in prompts(9)]), path)
  config = DataConfig(str(path))
  expected = both("prompts", config, TOKENIZER)
  for _ in range(2):
    assert both("prompts", config, TOKENIZER, cache=cache) == expected


def test_values_that_are_no_json_are_not_kept(tmp_path, caplog):
  pyarrow = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  path, cache = tmp_path / "rows.parquet", tmp_path / "tokens"
  rows = [{**row, "at": datetime.datetime(2026, 1, 1 + i)} for i, row in enumerate(prompts(9))]
  parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  config = DataConfig(str(path))
  assert both("prompts", config, TOKENIZER, cache=cache) == both("prompts", config, TOKENIZER)
  assert files_in(cache) == [] and "tokens are not kept" in caplog.text


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, caplog):
  config, cache = DataConfig(write(tmp_path, ROWS["prompts"])), tmp_path / "file" / "tokens"
  cache.parent.write_text("not a folder")
  assert both("prompts", config, TOKENIZER, cache=cache) == both("prompts", config, TOKENIZER)
  assert "tokens are not kept" in caplog.text


def test_what_is_refused_is_refused_again(tmp_path):
  cache = tmp_path / "tokens"
  for bad in ("missing.jsonl", write(tmp_path, [{"prompt": ""}])):
    for _ in range(2):
      with pytest.raises(data.DataError, match=pathlib.Path(bad).name):
        data.load("prompts", DataConfig(bad), TOKENIZER, cache=cache)
  assert not cache.exists()


def test_the_log_says_again_what_was_noticed(tmp_path, caplog):
  rows = [{"prompt": f"<eos> {text(*range(40))}", "n": i} for i in range(9)]
  config = DataConfig(write(tmp_path, rows), eval_fraction=0.0)
  said = []
  for cache in (None, tmp_path / "t", tmp_path / "t"):
    caplog.clear()
    data.load("prompts", config, TOKENIZER, cache=cache)
    said.append([line for line in caplog.messages if "spells" in line])
  assert said[0] and said == [said[0]] * 3


@pytest.mark.parametrize(
  ("given", "folder"), [("", ".tokens"), ("none", None), ("kept/here", "kept/here")]
)
def test_the_folder_is_beside_the_workdir(tmp_path, monkeypatch, read, given, folder):
  monkeypatch.chdir(tmp_path)
  session = loop.Session("run", token_cache=given)
  config = DataConfig(write(tmp_path, ROWS["prompts"]))
  for _ in range(2):
    given_rows.read(session, "prompts", config, TOKENIZER)
  assert len(read) == (1 if folder else 2)
  assert files_in(tmp_path) == sorted({"rows.jsonl", *([folder.split("/")[0]] if folder else [])})
  assert folder is None or len(files_in(tmp_path / folder)) == 1


def test_tokens_are_not_kept_in_a_bucket():
  with pytest.raises(ValueError, match="token_cache must be none or a folder of this machine"):
    loop.Session("run", token_cache="gs://runs/tokens")


def test_the_built_in_task_keeps_nothing(tmp_path):
  session, config = loop.Session(str(tmp_path / "run")), DataConfig(rows=8, eval_rows=4)
  given_rows.read(session, "prompts", config, models.open_tokenizer(None))
  assert files_in(tmp_path) == []


def test_every_script_reads_rows_through_the_folder():
  root = pathlib.Path(__file__).resolve().parents[2] / "experiments"
  readers = [path.name for path in root.rglob("*.py") if "data.load(" in path.read_text("utf-8")]
  assert readers == ["given_rows.py"]
