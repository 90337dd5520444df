"""Batches of a data set, in fixed shapes.

`batches` runs over a data set forever, from a position that can be saved. `eval_batches` runs over
it once, in order.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from rlhf_jax.data.kinds import KINDS, SCORED, Arrays, Dataset, responses_of
from rlhf_jax.types import PackedBatch


def batches(
  dataset: Dataset,
  batch_size: int,
  *,
  seed: int,
  pad_id: int,
  shuffle: bool = True,
  epochs: int | None = None,
  columns: np.ndarray | None = None,
  packed_length: int = 0,
) -> grain.DatasetIterator:
  """Runs over a data set in batches of one shape.

  Every epoch has its own order. A batch may hold the end of one epoch and the start of the next,
  so that no row is left out; only after the last epoch are rows that do not fill a batch dropped.
  With `dataset.mixture` each share has epochs of its own, and an epoch of all has as many rows as
  there are examples.
  The order depends on `seed` alone. Each of several processes reads whole batches, of which
  `sharding.place_batch` keeps the part that its devices hold.

  Args:
    dataset: The rows.
    batch_size: Rows of a batch.
    seed: Seed of the order.
    pad_id: Id to pad with; masks do not depend on it.
    shuffle: False keeps the order of the rows.
    epochs: Number of passes; None never ends.
    columns: [rows, ...] values known about each row; batches are then pairs `(batch, [B, ...])`.
    packed_length: Tokens of a row that holds several sequences; 0 gives each a row of its own. The
      next sequence goes to the first row with room for it, and if there is none the batch is full.

  Returns:
    An iterator of numpy batches of B = batch_size rows: `TokenBatch` with [B, T] arrays
    (demonstrations) or [B, 2, T] ones (preferences: 0 is chosen, 1 rejected), `SharedBatch` for
    preferences with `dataset.shared_length`, `ComparisonBatch`, `RankingBatch`, `UnpairedBatch` or
    `PromptBatch`; with `packed_length` `PackedBatch`, and `columns` [B, S, ...] with zeros where
    `real` is not. `get_state()` is a small JSON-compatible dict; `set_state()` continues from it.

  Raises:
    ValueError: The data set is smaller than a batch.
  """
  rows = len(dataset.examples)
  if batch_size < 1 or rows < batch_size:
    raise ValueError(
      f"--batch_size={batch_size} does not fit a data set of {rows} rows; "
      f"choose between 1 and {rows}, or give more rows"
    )
  order = _order(dataset, seed, shuffle, epochs)
  # Padding a batch takes microseconds; reading ahead would only add threads to stop.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  if packed_length:
    filled = _packed_rows(dataset, order.to_iter_dataset(options), batch_size, packed_length)
    packed = filled.batch(batch_size, drop_remainder=True)
    return iter(packed.map(lambda rows: _packed_batch(rows, dataset.width, pad_id, columns)))
  order = order.batch(batch_size, drop_remainder=True)
  mapped = order.map(lambda indices: _with_columns(dataset, indices, pad_id, columns))
  return iter(mapped.to_iter_dataset(options))


def _order(
  dataset: Dataset, seed: int, shuffle: bool = True, epochs: int | None = None
) -> grain.MapDataset:
  """Returns the order of the rows; each source of a mixture has epochs of its own."""

  def rows(start: int, stop: int, seed: int) -> grain.MapDataset:
    order = grain.MapDataset.range(start, stop).seed(seed % 2**32)
    return order.shuffle() if shuffle else order

  if not dataset.mixture:
    return rows(0, len(dataset.examples), seed).repeat(epochs)
  stops = list(itertools.accumulate(share.examples for share in dataset.mixture))
  if stops[-1] != len(dataset.examples):
    raise ValueError(f"a mixture of {stops[-1]} examples, and there are {len(dataset.examples)}")
  bounds = itertools.pairwise([0, *stops])
  parts = [rows(*bound, seed + i).repeat() for i, bound in enumerate(bounds)]
  mixed = grain.MapDataset.mix(parts, [share.weight for share in dataset.mixture])
  return mixed if epochs is None else mixed[: epochs * len(dataset.examples)]


def first_rows(
  dataset: Dataset, batch_size: int, steps: int, *, seed: int, packed_length: int = 0
) -> np.ndarray:
  """Returns the sorted indices of the rows in the first batches of `batches`.

  With packing they are an upper bound: all rows that could have been met by then.

  Args:
    dataset: The rows.
    batch_size: Rows of a batch.
    steps: Number of batches.
    seed: Seed of the order.
    packed_length: Tokens of a packed row, as in `batches`.
  """
  rows, count = len(dataset.examples), steps * batch_size
  if packed_length:
    shortest = min(max(lengths) for lengths in _lengths(dataset))
    count = (steps + 1) * batch_size * (packed_length // shortest)
  if count >= rows:
    return np.arange(rows)
  order = _order(dataset, seed)
  return np.unique(np.asarray([order[i] for i in range(count)]))


def padding_fraction(dataset: Dataset, batch_size: int, packed_length: int = 0) -> float:
  """Returns the share of the tokens of `batches` that are padding.

  Args:
    dataset: Demonstrations, preferences, rankings or single responses.
    batch_size: Rows of a batch.
    packed_length: Tokens of a packed row, as in `batches`; the share is then estimated from the
      first few batches.
  """
  if packed_length:
    packed = batches(dataset, batch_size, seed=0, pad_id=0, packed_length=packed_length)
    return float(np.mean([batch.segment_ids == 0 for batch in itertools.islice(packed, 8)]))
  tokens = sum(map(sum, _lengths(dataset)))
  if dataset.shared_length:
    tokens -= sum((len(responses_of(e)) - 1) * len(e["prompt"]) for e in dataset.examples)
  return 1 - tokens / (len(dataset.examples) * dataset.batch_length)


def packed_scored(dataset: Dataset, packed_length: int) -> int:
  """Returns the most response tokens that a packed row of `batches` holds.

  It is a tenth above the usual share of responses, so that few rows are closed early because of it.
  """
  responses = [len(ids) for e in dataset.examples for ids in responses_of(e)]
  share = 1.1 * sum(responses) / sum(map(sum, _lengths(dataset)))
  scored = max(max(responses), math.ceil(share * packed_length))
  return min(packed_length, -(-scored // 8) * 8)


def eval_batches(
  dataset: Dataset,
  batch_size: int,
  pad_id: int,
  *,
  columns: np.ndarray | None = None,
  only: np.ndarray | None = None,
) -> Iterator[tuple[Any, np.ndarray]]:
  """Runs over a data set once, in order.

  Args:
    dataset: The rows.
    batch_size: Rows of a batch; may be larger than the data set.
    pad_id: Id to pad with.
    columns: Values known about each row, as in `batches`.
    only: Indices of the rows to run over; None takes all.

  Yields:
    A batch as from `batches`, and [B] bool: False on rows that repeat earlier ones to fill the
    last batch.

  Raises:
    ValueError: `batch_size` is not positive.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size must be positive, got {batch_size}")
  only = np.arange(len(dataset.examples)) if only is None else only
  for start in range(0, len(only), batch_size):
    positions = np.arange(start, start + batch_size)
    indices = only[positions % len(only)]
    yield _with_columns(dataset, indices, pad_id, columns), positions < len(only)


def _with_columns(
  dataset: Dataset, indices: np.ndarray, pad_id: int, columns: np.ndarray | None
) -> Any:
  batch = KINDS[dataset.kind].collate(dataset, indices, pad_id)
  return batch if columns is None else (batch, columns[indices])


def _lengths(dataset: Dataset) -> list[list[int]]:
  """Returns the lengths of the sequences of each example, prompt included."""
  return [[len(e["prompt"]) + len(ids) for ids in responses_of(e)] for e in dataset.examples]


def _packed_rows(
  dataset: Dataset, order: grain.IterDataset, rows: int, length: int
) -> grain.IterDataset:
  """Packs examples, in the `order` of their indices, into rows; `rows` are filled at a time.

  Every row is a dict: "tokens_k" and "mask_k" [T] of the k-th responses with their prompts,
  "scored_k" with an entry for each of their response tokens, and "index" [S] of the examples.
  """
  lengths = [max(some) for some in _lengths(dataset)]
  # More sequences than twice the usual number take a row of short ones; it is then closed early.
  most = min(length // min(lengths), -(-2 * length * len(lengths) // sum(lengths)))
  sides = range(dataset.width)
  masks = tuple(f"mask_{side}" for side in sides)
  scored = packed_scored(dataset, length)

  def example(index: int) -> Arrays:
    prompt = dataset.examples[index]["prompt"]
    columns: dict[str, Any] = {"index": np.asarray([index], np.int32)}
    for side, response in enumerate(responses_of(dataset.examples[index])):
      columns[f"tokens_{side}"] = np.concatenate([prompt, response])
      mask = np.zeros(len(prompt) + len(response), bool)
      mask[len(prompt) :] = dataset.examples[index].get(SCORED, True)
      columns[f"mask_{side}"] = mask
      columns[f"scored_{side}"] = np.zeros(len(response), bool)
    return columns

  return grain.experimental.FirstFitPackIterDataset(
    order.map(example),
    length_struct={f"{name}_{side}": length for name in ("tokens", "mask") for side in sides}
    | {f"scored_{side}": scored for side in sides}
    | {"index": most},
    num_packing_bins=rows,
    shuffle_bins=False,  # They are one batch.
    meta_features=masks,
  )


def _packed_batch(rows: dict[str, Any], width: int, pad_id: int, columns: np.ndarray | None) -> Any:
  """Returns batched `_packed_rows` as a `PackedBatch`, with its columns if there are any."""

  def of_sides(name: str, suffix: str = "") -> Any:
    sides = [rows[f"{name}_{side}{suffix}"] for side in range(width)]
    return sides[0] if width == 1 else np.stack(sides, axis=1)

  segment_ids = of_sides("tokens", "_segment_ids")
  tokens: Any = np.where(segment_ids > 0, of_sides("tokens"), np.int32(pad_id))
  real = rows["index_segment_ids"] > 0
  batch = PackedBatch(tokens, of_sides("mask"), segment_ids, real)
  if columns is None:
    return batch
  known = columns[rows["index"]]
  return batch, np.where(real.reshape(*real.shape, *(1,) * (known.ndim - 2)), known, 0)
