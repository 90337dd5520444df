"""Rows of numbered words, for tests of data sets."""

import json

from rlhf_jax import data
from rlhf_jax.data import DataConfig, word_level_tokenizer

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
