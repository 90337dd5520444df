"""Kinds of data: the columns of an example, and the batch that examples become.

`KINDS` is the one place that tells kinds apart after a row has been parsed (`schema`).
"""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.data.schema import KindName
from rlhf_jax.data.sources import DataError
from rlhf_jax.types import (
  ComparisonBatch,
  PairBatch,
  RankingBatch,
  SharedBatch,
  TokenBatch,
  UnpairedBatch,
)

Arrays = dict[str, np.ndarray]  # Column -> token ids or label; see `Dataset`.

SCORED = "scored"  # Column of a demonstration with further turns between its answers.
_NEAR = 256  # Examples among which another prompt is looked for; thousands may share one.

# Counts that the report of a data set holds even where they are 0.
COUNTS = (
  "dropped_ties",
  "dropped_not_judged",
  "dropped_undesirable",
  "dropped_single_responses",
  "dropped_different_prompts",
  "dropped_empty",
  "dropped_overlong",
  "dropped_overlong_responses",
  "dropped_identical_pairs",
  "truncated_prompts",
  "truncated_turns",
  "spelled_markers",
  "joined_words",
  "unopened",
  "repeated_prompts",
)


class Share(NamedTuple):
  """Part of the examples that has a weight, whatever its size.

  Attributes:
    name: Name of its source.
    examples: Number of its examples, which follow those of the shares before it.
    weight: Share of its examples among those of batches.
  """

  name: str
  examples: int
  weight: float


class Dataset(NamedTuple):
  """Tokenised rows. Count the examples with `len(dataset.examples)`; a row may give several.

  Attributes:
    kind: Name of the kind in `KINDS`.
    examples: One dict of int32 [length] ids each: "prompt" and, by kind, "response"; "chosen" and
      "rejected"; "response_a" and "response_b"; or "response_0", "response_1" and so on, the best
      one first. A ranking also has "ranks", one per response, an unpaired response "desirable",
      [1] or [0], a demonstration with several answers "scored", 1 for each token of its response
      that is one of an answer and else 0, and a comparison "preference", float32 [1], the share of
      the verdicts for the first response.
    rows: Original columns of the row of each example, plus "prompt_text", the prompt as the
      tokenizer renders it.
    padded_length: Length to pad to, shared by the training and the held-out set. It covers the
      prompt for the kind "prompts", prompt and both responses for comparisons, else prompt and
      response.
    width: Number K of responses per example: 2 for pairs, the maximum in both sets for rankings.
    scored: Number of tokens of the longest response, rounded up, shared by both sets.
    digest: sha256 of all token ids in order: two runs with the same digest see the same data.
    report: Counts: `rows_read`, `bad_rows` (training set only), `kept` examples, those dropped as
      `dropped_ties`, `dropped_not_judged` (by the annotator asked for), `dropped_undesirable`
      (demonstrations with the label false), `dropped_single_responses` (nothing to compare with),
      `dropped_different_prompts` (of the two sides), `dropped_empty`,
      `dropped_overlong` and `dropped_identical_pairs`, single responses left out of rankings as
      `dropped_overlong_responses`, `truncated_prompts` and the `truncated_turns` that were left out
      of them, `spelled_markers` (rows with markers of a chat as text), `joined_words` (rows whose
      response follows the prompt without a space), `unopened` (rows whose response is inside a
      tag such as <think>, which the template opens), `repeated_prompts` (rows whose responses start
      with the prompt), `duplicates` (repeated examples), `flipped_pairs` (pairs that are there the
      other way round too), `unknown_tokens` and, for the held-out set, `eval_prompts_in_train`,
      `split_by_rows` (1 if all rows have the same prompt) and `nothing_to_hold_out` (1 if all rows
      are the same).
    columns: Columns of the rows.
    unread: Columns that were not read; rewards still see them.
    ignored: Columns that are left out, `DataConfig.ignore`; the prompt of a row is read without
      them. Rewards see them.
    checked: Names of the further checks that all rows have passed.
    shared_length: Length of the rows of batches that hold a prompt once, with all of its responses;
      0 gives each response a row of `padded_length`.
    mixture: Shares of the examples in `batches.batches`; empty draws all examples alike.
    named: Further held-out sets by their names, of a held-out set.
  """

  kind: KindName
  examples: Sequence[Arrays]
  rows: Sequence[dict[str, Any]]
  padded_length: int
  width: int
  scored: int
  digest: str
  report: dict[str, int]
  columns: tuple[str, ...] = ()
  unread: tuple[str, ...] = ()
  ignored: tuple[str, ...] = ()
  checked: tuple[str, ...] = ()
  shared_length: int = 0
  mixture: tuple[Share, ...] = ()
  named: "Mapping[str, Dataset]" = types.MappingProxyType({})

  @property
  def batch_length(self) -> int:
    """Tokens of a batch per example, with padding."""
    return self.shared_length or max(self.width, 1) * self.padded_length

  @property
  def dropped(self) -> str:
    """Names the reasons for dropped examples and their counts, such as "ties 36, overlong 2"."""
    prefix = "dropped_"
    counts = {name.removeprefix(prefix): self.report[name] for name in COUNTS if prefix in name}
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


class PromptBatch(NamedTuple):
  """Prompts to sample from.

  Attributes:
    tokens: [B, P] int32, left padded.
    mask: [B, P] bool, True on prompt tokens.
    prompt_id: [B] int32, index into `dataset.rows`.
  """

  tokens: jax.Array | np.ndarray
  mask: jax.Array | np.ndarray
  prompt_id: jax.Array | np.ndarray


Batch = PairBatch | ComparisonBatch | RankingBatch | UnpairedBatch | PromptBatch


class Kind(NamedTuple):
  """Kind of data.

  Attributes:
    responses: Names of the responses of an example; None for any number of responses, named
      response_0, response_1 and so on.
    longest: Most tokens of a sequence in a batch, from the [examples] lengths of the prompts and
      the lengths of each example's responses.
    collate: Function of a data set, the [B] indices of examples and the padding id that returns
      their batch.
    label: Name of the label of an example; empty if it has none.
    label_dtype: Dtype of the label.
    packable: True if a row of a batch may hold several sequences.
    shareable: True if a row of a batch may hold a prompt once, with all of its responses.
    drops_equal: True if an example with two equal responses is dropped.
    flippable: True if the order of the responses is the label, so that two examples may contradict
      each other.
    drops_responses: True if only an overlong response is dropped, not its example.
  """

  responses: tuple[str, ...] | None
  longest: Callable[[Sequence[int], Sequence[Sequence[int]]], int]
  collate: Callable[[Dataset, np.ndarray, int], Batch]
  label: str = ""
  label_dtype: type[np.generic] = np.int32
  packable: bool = False
  shareable: bool = False
  drops_equal: bool = False
  flippable: bool = False
  drops_responses: bool = False


def _one_response(prompts: Sequence[int], responses: Sequence[Sequence[int]]) -> int:
  """Returns the longest prompt with one of its own responses."""
  return max(p + max(r, default=0) for p, r in zip(prompts, responses, strict=True))


def all_responses(prompts: Sequence[int], responses: Sequence[Sequence[int]]) -> int:
  """Returns the longest prompt with all of its responses, one behind the other."""
  return max(p + sum(r) for p, r in zip(prompts, responses, strict=True))


def shared_length(pair_length: int, length: int) -> int:
  """Returns the length of rows that hold a prompt once, or 0 where two rows are not much longer.

  Args:
    pair_length: Length of each of two rows that hold the prompt and one response.
    length: Length of a row with both responses.
  """
  return length if length <= 0.9 * 2 * pair_length else 0


def _any_response(prompts: Sequence[int], responses: Sequence[Sequence[int]]) -> int:
  """Returns the length of the longest response behind the longest prompt."""
  return max(prompts) + max(map(max, responses))


def _prompts(dataset: Dataset, indices: np.ndarray, pad_id: int) -> PromptBatch:
  examples = _at(dataset, indices)
  padded = _pad_left(examples, dataset.padded_length, pad_id)
  return PromptBatch(*padded, np.asarray(indices, np.int32))


def _demonstrations(dataset: Dataset, indices: np.ndarray, pad_id: int) -> TokenBatch:
  tokens, mask = _sequences(dataset, indices, pad_id)
  return TokenBatch(tokens[:, 0], mask[:, 0])


def _preferences(dataset: Dataset, indices: np.ndarray, pad_id: int) -> TokenBatch | SharedBatch:
  if dataset.shared_length:
    return _shared(dataset, indices, pad_id)
  return TokenBatch(*_sequences(dataset, indices, pad_id))


def _comparisons(dataset: Dataset, indices: np.ndarray, pad_id: int) -> ComparisonBatch:
  examples = _at(dataset, indices)
  both_ways = [
    [np.concatenate([a, b]), np.concatenate([b, a])] for a, b in map(responses_of, examples)
  ]
  preference: Any = np.asarray([example["preference"][0] for example in examples], np.float32)
  return ComparisonBatch(*_pad_right(dataset, examples, both_ways, pad_id), preference)


def _rankings(dataset: Dataset, indices: np.ndarray, pad_id: int) -> RankingBatch:
  tokens, mask = _sequences(dataset, indices, pad_id)
  ranks: Any = np.zeros(tokens.shape[:2], np.int32)
  for row, example in zip(ranks, _at(dataset, indices), strict=True):
    row[: len(example["ranks"])] = example["ranks"]
  # Every real response has at least its end token.
  return RankingBatch(tokens, mask, ranks, mask.any(axis=-1))


def _unpaired(dataset: Dataset, indices: np.ndarray, pad_id: int) -> UnpairedBatch:
  examples = _at(dataset, indices)
  tokens, mask = (x[:, 0] for x in _sequences(dataset, indices, pad_id))
  others = [responses_of(dataset.examples[partner(dataset.examples, i)]) for i in indices]
  mismatched = TokenBatch(*(x[:, 0] for x in _pad_right(dataset, examples, others, pad_id)))
  desirable: Any = np.asarray([example["desirable"][0] for example in examples], bool)
  return UnpairedBatch(tokens, mask, desirable, mismatched)


KINDS: dict[KindName, Kind] = {
  "demonstrations": Kind(("response",), _one_response, _demonstrations, packable=True),
  "preferences": Kind(
    ("chosen", "rejected"),
    _one_response,
    _preferences,
    packable=True,
    shareable=True,
    drops_equal=True,
    flippable=True,
  ),
  "comparisons": Kind(
    ("response_a", "response_b"),
    all_responses,
    _comparisons,
    label="preference",
    label_dtype=np.float32,
    drops_equal=True,
  ),
  "rankings": Kind(None, _one_response, _rankings, label="ranks", drops_responses=True),
  "unpaired": Kind(("response",), _any_response, _unpaired, label="desirable"),
  "prompts": Kind((), _one_response, _prompts),
}


def responses_of(example: Arrays) -> list[np.ndarray]:
  """Returns the token ids of the responses of an example, in their order."""
  others = {"prompt", SCORED, *(kind.label for kind in KINDS.values())}
  return [ids for name, ids in example.items() if name not in others]


def _at(dataset: Dataset, indices: np.ndarray) -> list[Arrays]:
  return [dataset.examples[i] for i in indices]


def _sequences(dataset: Dataset, indices: np.ndarray, pad_id: int) -> tuple[Any, Any]:
  """Returns tokens and mask of the examples at [B] `indices`, [B, K, T] each."""
  examples = _at(dataset, indices)
  return _pad_right(dataset, examples, [responses_of(example) for example in examples], pad_id)


def partner(examples: Sequence[Arrays], index: int) -> int:
  """Finds the example whose response is put behind the prompt of another one, for the KL of KTO.

  Responses to a prompt are often adjacent, the good ones first. The n-th of them gets the n-th one
  behind them, so that mismatched responses are good as often as the data. The first example follows
  the last. Examples with the same prompt or response are passed over; if no other prompt is near,
  only those with the same response are.

  Raises:
    DataError: All responses are the same.
  """
  size = len(examples)
  prompt, (response,) = examples[index]["prompt"], responses_of(examples[index])

  def same_prompt(i: int) -> bool:
    return np.array_equal(examples[i % size]["prompt"], prompt)

  near = min(size, _NEAR)
  before = next((n for n in range(1, near) if not same_prompt(index - n)), near) - 1
  behind = next((n for n in range(1, near) if not same_prompt(index + n)), near)
  first = index + before + behind if behind < near else index + 1
  fallback = None
  for n in range(size):
    place = (first + n) % size
    if np.array_equal(responses_of(examples[place])[0], response):
      continue
    if not same_prompt(place):
      return place
    fallback = place if fallback is None else fallback
    if n > _NEAR:
      break
  if fallback is None:
    raise DataError(
      f"{size} rows without two different responses; KTO estimates its KL from those of other rows"
    )
  return fallback


def _shared(dataset: Dataset, indices: np.ndarray, pad_id: int) -> SharedBatch:
  """Returns rows of a prompt and all of its responses."""
  length = dataset.shared_length
  tokens: Any = np.full([len(indices), length], pad_id, np.int32)
  _, mask = _sequences(dataset, indices, pad_id)
  places: Any = np.full(mask.shape, length, np.int32)
  for row, example in enumerate(_at(dataset, indices)):
    prompt = end = len(example["prompt"])
    tokens[row, :prompt] = example["prompt"]
    for column, answer in enumerate(responses_of(example)):
      start, end = end, end + len(answer)
      tokens[row, start:end] = answer
      places[row, column, :prompt] = np.arange(prompt)
      places[row, column, prompt : prompt + len(answer)] = np.arange(start, end)
  return SharedBatch(tokens, mask, places)


def _pad_left(
  examples: Sequence[Arrays], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns tokens and mask of the prompts, [B, P] each."""
  tokens = np.full([len(examples), length], pad_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, example in enumerate(examples):
    start = length - len(example["prompt"])
    tokens[row, start:] = example["prompt"]
    mask[row, start:] = True
  return tokens, mask


def _pad_right(
  dataset: Dataset,
  examples: Sequence[Arrays],
  responses: Sequence[list[np.ndarray]],
  pad_id: int,
) -> tuple[Any, Any]:
  """Returns tokens and mask of each prompt with each of its responses, [B, K, T] each."""
  tokens = np.full([len(examples), dataset.width, dataset.padded_length], pad_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, (example, answers) in enumerate(zip(examples, responses, strict=True)):
    prompt = example["prompt"]
    for column, answer in enumerate(answers):
      end = len(prompt) + len(answer)
      tokens[row, column, : len(prompt)] = prompt
      tokens[row, column, len(prompt) : end] = answer
      mask[row, column, len(prompt) : end] = example.get(SCORED, True)
  return tokens, mask
