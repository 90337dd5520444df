import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest

from rlhf_jax import data
from rlhf_jax.data import DataConfig, datasets, read_file, sources, word_level_tokenizer
from rlhf_jax.data.sources import DataError, read_builtin, read_tfds

GOOD = b'{"prompt": "a"}\n'


def write(tmp_path, content):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(content)
  return path


def test_reads_rows_with_their_line_numbers(tmp_path):
  path = write(tmp_path, GOOD + b"\n  \r\n" + b'{"prompt": "\xc3\xa9", "n": [1, null]}\r\n{"x": 1}')
  rows = list(read_file(path))
  assert [row.where for row in rows] == [f"{path}:1", f"{path}:4", f"{path}:5"]
  assert rows[1].fields == {"prompt": "é", "n": [1, None]}


def test_byte_order_mark_is_accepted(tmp_path):
  path = write(tmp_path, b"\xef\xbb\xbf" + GOOD)
  assert next(read_file(path)).fields == {"prompt": "a"}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_unicode_line_separators_do_not_cut_lines(tmp_path, separator):
  escaped = json.dumps({"prompt": f"a{separator}b"})
  raw = escaped.replace(json.dumps(separator)[1:-1], separator) if separator > " " else escaped
  rows = list(read_file(write(tmp_path, raw.encode() + b"\n" + GOOD)))
  assert [row.fields["prompt"] for row in rows] == [f"a{separator}b", "a"]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b'{"prompt": "\xff"}\n', r"rows\.jsonl:2: byte 13: not UTF-8 \(0xff\); save the file"),
    (b'{"prompt": "\xe2\x82', r"rows\.jsonl:2: byte 13: not UTF-8 .*cut off"),
    (b'{"prompt": "a', r"rows\.jsonl:2: column \d+: malformed JSON .*cut off"),
    (b'{"prompt": "a}\n', r"rows\.jsonl:2: column \d+: malformed JSON .*; fix or remove"),
    (b'{"prompt" "a"}\n', r"rows\.jsonl:2: column 11: malformed JSON .*delimiter"),
    (b'{"prompt": "a"} {"prompt": "b"}\n', r"rows\.jsonl:2: column 17: malformed JSON"),
    (b'{"prompt": "a\0b"}\n', r"rows\.jsonl:2: byte 14: a NUL byte; remove it"),
    (b'{"prompt": "a\\u0000b"}\n', r"rows\.jsonl:2: prompt: the text has a NUL"),
    (b'{"prompt": "\\ud83d"}\n', r"rows\.jsonl:2: prompt: .*unpaired surrogate \(U\+D83D"),
    (
      b'{"messages": [{"role": "user", "content": "\\udc00"}]}\n',
      r"rows\.jsonl:2: messages\[0\]\.content: .*unpaired surrogate",
    ),
    (b'["a", "b"]\n', r"rows\.jsonl:2: expected a JSON object .*found a list"),
    (b'"a"\n', r"rows\.jsonl:2: expected a JSON object .*found text"),
    (b"null\n", r"rows\.jsonl:2: expected a JSON object .*found null"),
    (b'{"score": NaN}\n', r"rows\.jsonl:2: malformed JSON \(NaN is not"),
    (b'{"n": ' + b"9" * 5000 + b"}\n", r"rows\.jsonl:2: malformed JSON"),
    (b"[" * 100_000 + b"\n", r"rows\.jsonl:2: nested too deeply"),
    (b'{"a": "' + b"x" * sources.MAX_LINE_BYTES + b'"}\n', r"rows\.jsonl:2: the line is longer"),
  ],
)
def test_bad_lines(tmp_path, line, message):
  path = write(tmp_path, GOOD + line)
  with pytest.raises(DataError, match=message):
    list(read_file(path))
  # A skipped line does not shift the lines behind it.
  path = write(tmp_path, GOOD + line.rstrip(b"\n") + b"\n" + GOOD)
  errors = []
  rows = list(read_file(path, errors.append))
  assert [row.where for row in rows] == [f"{path}:1", f"{path}:3"]
  assert len(errors) == 1


def test_surrogate_pairs_are_characters(tmp_path):
  path = write(tmp_path, b'{"prompt": "\\ud83d\\ude00"}\n')
  assert next(read_file(path)).fields["prompt"] == "\U0001f600"


def test_missing_file(tmp_path):
  with pytest.raises(DataError, match=r"none\.jsonl: cannot be read .*data\.path"):
    list(read_file(tmp_path / "none.jsonl"))
  with pytest.raises(DataError, match="cannot be read"):
    list(read_file(tmp_path))


@pytest.mark.parametrize(
  ("spec", "expected"),
  [
    ("imdb", ("imdb", "train")),
    ("imdb:test", ("imdb", "test")),
    ("imdb/plain:1.0.0", ("imdb/plain:1.0.0", "train")),
    ("imdb/plain:1.0.0:train[:10%]", ("imdb/plain:1.0.0", "train[:10%]")),
    ("imdb:train[10:20]+test", ("imdb", "train[10:20]+test")),
  ],
)
def test_tfds_names(spec, expected):
  assert sources.parse_tfds(spec) == expected


@pytest.mark.parametrize("spec", ["", ":train", "../x", "huggingface:a/b:train x", "a/b/c", "a:"])
def test_tfds_refuses_other_names(spec):
  with pytest.raises(DataError, match=r"tfds: .* is not NAME"):
    sources.parse_tfds(spec)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
  import tensorflow_datasets as tfds

  text = tfds.features.Text()

  class SmallPairs(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # Where TFDS would look for checksums of downloads; a test module has none.

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          {
            "prompt": text,
            "messages": tfds.features.Sequence({"role": text, "content": text}),
            "ids": tfds.features.Sequence(np.int32),
            "score": np.float32,
          }
        ),
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(range(20)), "bad": self._generate_examples([-1])}

    def _generate_examples(self, numbers):
      for i in numbers:
        yield (
          i,
          {
            "prompt": f"é {i}" if i >= 0 else b"\xff",
            "messages": [{"role": "user", "content": f"é {i}"}],
            "ids": [i, i],
            "score": i / 2,
          },
        )

  folder = tmp_path_factory.mktemp("tfds")
  builder = SmallPairs(data_dir=folder, file_format="array_record")
  builder.download_and_prepare(file_format="array_record")
  return str(folder)


def test_tfds_without_tensorflow(tfds_dir):
  rows = list(read_tfds("small_pairs", tfds_dir))
  assert "tensorflow" not in sys.modules
  assert len(rows) == 20
  assert rows[3].where == "tfds:small_pairs:train[3]"
  assert sorted(row.fields["ids"][0] for row in rows) == list(range(20))
  fields = rows[3].fields
  i = fields["ids"][0]
  assert fields == {
    "prompt": f"é {i}",
    "messages": [{"role": "user", "content": f"é {i}"}],
    "ids": [i, i],
    "score": i / 2,
  }
  assert all(type(value) is int for value in fields["ids"])
  assert len(list(read_tfds("small_pairs:train[:10%]", tfds_dir))) == 2


def test_tokens_of_tfds_are_kept_for_the_files_of_their_split(tfds_dir, tmp_path, monkeypatch):
  folder = shutil.copytree(tfds_dir, tmp_path / "copy")
  tokenizer = word_level_tokenizer(["é", *map(str, range(20))])
  config = DataConfig(tfds="small_pairs:train", tfds_dir=str(folder))
  reads, real = [], datasets._load
  monkeypatch.setattr(datasets, "_load", lambda *args: reads.append(args) or real(*args))

  def read(of=config):
    return data.load("prompts", of, tokenizer, cache=tmp_path / "tokens")

  def change(pattern):
    (path,) = folder.rglob(pattern)
    path.write_bytes(path.read_bytes() + b" ")

  first, again = read(), read()
  for found, mapped in zip(first, again, strict=True):
    assert [*map(repr, found.rows)] == [*map(repr, mapped.rows)]
    jax.tree.map(np.testing.assert_array_equal, [*found.examples], [*mapped.examples])
  assert len(reads) == 1
  change("*bad.array_record*")
  read()
  assert len(reads) == 1
  read(dataclasses.replace(config, tfds="small_pairs:train[:50%]"))
  assert len(reads) == 2
  change("dataset_info.json")
  read()
  assert len(reads) == 3
  key = datasets._key("prompts", config, tokenizer, {})
  change("*train.array_record*")
  assert datasets._key("prompts", config, tokenizer, {}) != key


def test_tfds_errors(tfds_dir):
  with pytest.raises(DataError, match=r"tfds:small_pairs:bad\[0\]: prompt: not UTF-8"):
    list(read_tfds("small_pairs:bad", tfds_dir))
  with pytest.raises(DataError, match=r"tfds:small_pairs:test: cannot be read .*data\.tfds_dir"):
    list(read_tfds("small_pairs:test", tfds_dir))
  with pytest.raises(DataError, match=r"tfds build no_such_data --file_format=array_record"):
    list(read_tfds("no_such_data", tfds_dir))


@pytest.mark.parametrize(
  ("kind", "columns"),
  [
    ("demonstrations", {"prompt", "response"}),
    ("preferences", {"prompt", "chosen", "rejected"}),
    ("prompts", {"prompt"}),
  ],
)
def test_builtin(kind, columns):
  rows = list(read_builtin(kind, "eval", 3, seed=0))
  assert len(rows) == 3
  assert all(columns <= set(row.fields) for row in rows)
  assert rows[2].where == f"built-in {kind}:eval[2]"
