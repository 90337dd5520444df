"""Data sets of a few rows of ids."""

import numpy as np

from rlhf_jax import data


def dataset(kind, *examples, texts=None):
  arrays = [{name: np.int32(ids) for name, ids in example.items()} for example in examples]
  rows = [{"prompt_text": text} for text in texts or ["p"] * len(examples)]
  return data.from_examples(kind, arrays, rows)


# Three responses and two; the first of each is the best.
RANKINGS = dataset(
  "rankings",
  {
    "prompt": [1],
    "response_0": [1],
    "response_1": [1, 2],
    "response_2": [1, 2, 3],
    "ranks": [0, 1, 1],
  },
  {"prompt": [1], "response_0": [1, 2, 3], "response_1": [1, 2], "ranks": [0, 1]},
)
