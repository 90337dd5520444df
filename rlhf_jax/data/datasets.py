"""Rows to token arrays: read, checked and tokenised before anything is compiled, then batched.

`load` gives a training set and a held-out set. `batches` runs over one of them forever in fixed
shapes, from a position that can be saved; `eval_batches` runs over it once, in order.
"""

import collections
import dataclasses
import hashlib
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

from rlhf_jax.data import schema, sources
from rlhf_jax.data.schema import Example, Kind, Votes
from rlhf_jax.data.sources import DataError, Row
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.types import ComparisonBatch, PackedBatch, RankingBatch, TokenBatch, UnpairedBatch

_BUILTIN_ROWS = 8192
# Padded lengths are multiples of this: small changes of the data keep the compiled shapes.
_LENGTH_MULTIPLE = 8
_OVERLONG = ("drop", "truncate_prompt")
# Names of the responses of an example; those of a ranking are numbered.
_RESPONSES = {
  "demonstrations": ("response",),
  "preferences": ("chosen", "rejected"),
  "comparisons": ("response_a", "response_b"),
  "unpaired": ("response",),
  "prompts": (),
}
# Names of what is known about the responses of an example.
_LABELS = {"rankings": "ranks", "unpaired": "desirable", "comparisons": "preference"}
_PACKED = ("demonstrations", "preferences")  # Kinds of which a row may hold several.
_COUNTS = (
  "dropped_ties",
  "dropped_not_judged",
  "dropped_overlong",
  "dropped_overlong_responses",
  "dropped_identical_pairs",
  "truncated_prompts",
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where rows come from and which of them are used.

  Attributes:
    path: JSON Lines file with one row per line; empty together with tfds means the built-in task.
    tfds: Prepared TFDS data set, NAME[/CONFIG][:VERSION][:SPLIT]; the split is train if not given.
    tfds_dir: Folder in which the TFDS data set was prepared; empty is the TFDS default.
    eval_path: JSON Lines file of held-out rows; empty holds out a part of the rows themselves.
    eval_fraction: Part of the prompts to hold out, chosen by a hash of the prompt, if there is no
      eval_path; 0 holds out nothing.
    rows: Use only the first so many rows; 0 uses all. For the built-in task, the number to write
      (0 writes 8192).
    eval_rows: Use at most this many held-out rows.
    max_prompt_length: Longest prompt in tokens.
    max_response_length: Longest response in tokens, its end token included.
    overlong: What to do with a longer prompt: drop the row, or truncate_prompt to keep the end of
      the prompt. A row with a longer response is always dropped.
    packed_length: Train on rows of so many tokens that hold several sequences, one behind the
      other, as many as fit; batch_size then counts such rows. 0 gives each sequence a row of its
      own, padded to the longest. For SFT, and for pairs of a reward model or DPO.
    bad_rows: Skip and count up to this many unusable rows; with 0 the first one is an error.
    end_token: Token that ends a response, such as <s>; empty takes the tokenizer's own.
    annotator: Learn preferences from the votes of this annotator or group alone; empty takes those
      of all. For the built-in task, a key of simulation.ANNOTATORS (empty is the expert).
    votes: How several votes on one pair count: by majority, ties dropped; or each as a pair of its
      own, which teaches a model the share of the votes.
  """

  path: str = ""
  tfds: str = ""
  tfds_dir: str = ""
  eval_path: str = ""
  eval_fraction: float = 0.05
  rows: int = 0
  eval_rows: int = 512
  max_prompt_length: int = 256
  max_response_length: int = 256
  overlong: Literal["drop", "truncate_prompt"] = "drop"
  packed_length: int = 0
  bad_rows: int = 0
  end_token: str = ""
  annotator: str = ""
  votes: Votes = "majority"

  def __post_init__(self):
    if self.path and self.tfds:
      raise ValueError("tfds cannot be used together with path; give one of the two")
    if self.tfds_dir and not self.tfds:
      raise ValueError("tfds_dir needs the name of a data set; set tfds as well")
    if self.tfds:
      sources.parse_tfds(self.tfds)
    if not 0 <= self.eval_fraction < 1:
      raise ValueError(
        f"eval_fraction must be at least 0 and below 1, got {self.eval_fraction}; "
        "0.05 holds out one prompt in twenty"
      )
    for name, least in (("rows", 0), ("bad_rows", 0), ("packed_length", 0), ("eval_rows", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
    for name in ("max_prompt_length", "max_response_length"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"{name} must be positive, got {getattr(self, name)}; it counts tokens, 256 is usual"
        )
    for name, known in (("overlong", _OVERLONG), ("votes", schema.VOTES)):
      if getattr(self, name) not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


class Dataset(NamedTuple):
  """Tokenised rows. Count the examples with `len(dataset.examples)`; a row may give several.

  Attributes:
    kind: One of `schema.KINDS`.
    examples: One dict of int32 [length] ids each: "prompt" and, by kind, "response"; "chosen" and
      "rejected"; "response_a" and "response_b"; or "response_0", "response_1" and so on, the best
      one first. A ranking also has "ranks", one per response, an unpaired response "desirable",
      [1] or [0], and a comparison "preference", float32 [1], the share of the verdicts for the
      first response.
    rows: The original columns of the row of each example, and under "prompt_text" the whole prompt
      as text, as the tokenizer renders it.
    padded_length: Length to pad to, shared by the training and the held-out set: of prompts for
      the kind "prompts", of prompt and both responses for comparisons, else of prompt and response.
    width: Responses of an example, K: 2 of pairs, of rankings the most in both sets.
    digest: sha256 of all token ids in order: two runs with the same digest see the same data.
    report: Counts: `rows_read`, `bad_rows` (training set only), `kept` examples, those dropped as
      `dropped_ties`, `dropped_not_judged` (by the annotator asked for), `dropped_overlong` and
      `dropped_identical_pairs`, single responses left out of rankings as
      `dropped_overlong_responses`, `truncated_prompts`, `duplicates` (repeated examples),
      `flipped_pairs` (pairs that are there the other way round too) and, for the held-out set,
      `eval_prompts_in_train`.
  """

  kind: Kind
  examples: list[dict[str, np.ndarray]]
  rows: list[dict[str, Any]]
  padded_length: int
  width: int
  digest: str
  report: dict[str, int]

  @property
  def dropped(self) -> str:
    """What was left out and how often, such as "ties 36, overlong 2"."""
    prefix = "dropped_"
    counts = {name.removeprefix(prefix): self.report[name] for name in _COUNTS if prefix in name}
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def responses_of(example: dict[str, np.ndarray]) -> list[np.ndarray]:
  """Token ids of the responses of an example, in their order."""
  return [ids for name, ids in example.items() if name not in ("prompt", *_LABELS.values())]


class PromptBatch(NamedTuple):
  """Prompts to sample from.

  Attributes:
    tokens: [B, P] int32, left padded.
    mask: [B, P] bool, True on prompt tokens.
    prompt_id: [B] int32, index into `dataset.rows`.
  """

  tokens: np.ndarray
  mask: np.ndarray
  prompt_id: np.ndarray


Batch = TokenBatch | PackedBatch | ComparisonBatch | RankingBatch | UnpairedBatch | PromptBatch


def load(
  kind: Kind, config: DataConfig, tokenizer: Tokenizer, *, seed: int = 0
) -> tuple[Dataset, Dataset]:
  """Reads, checks and tokenises all rows.

  Args:
    kind: What the rows are for; see `schema` for the columns.
    config: Sources and limits.
    tokenizer: Made with `config.end_token`.
    seed: Seed of the built-in task; data from outside does not depend on it.

  Returns:
    The training set and the held-out set.

  Raises:
    DataError: A bad row beyond `config.bad_rows`, no rows left, or most rows too long.
  """
  if kind not in schema.KINDS:
    raise ValueError(f"kind must be one of {', '.join(schema.KINDS)}, got {kind!r}")
  if config.end_token and tokenizer.token_id(config.end_token) != tokenizer.eos_id:
    raise ValueError(
      f"end_token is {config.end_token!r} but the tokenizer ends with id {tokenizer.eos_id}; "
      "load it with load_tokenizer(path, eos_token=config.end_token)"
    )
  if config.packed_length and kind not in _PACKED:
    raise DataError(
      f"data.packed_length={config.packed_length} is for {' and '.join(_PACKED)}, and this reads"
      f" {kind}; leave it out"
    )
  bad: list[DataError] = []

  def on_bad_row(error: DataError):
    if len(bad) >= config.bad_rows:
      hint = f" ({len(bad)} earlier ones skipped)" if bad else ""
      raise DataError(f"{error}; or skip some with data.bad_rows{hint}") from error
    bad.append(error)

  def read(rows: Iterator[Row], limit: int) -> list[_Parsed]:
    return _parse(kind, itertools.islice(rows, limit or None), config, tokenizer, on_bad_row)

  train_rows, source = _open(kind, config, seed, on_bad_row)
  train = read(train_rows, config.rows)
  if config.eval_path:
    heldout = read(sources.read_jsonl(config.eval_path, on_bad_row), config.eval_rows)
  elif config.path or config.tfds:
    train, heldout = _split(train, config.eval_fraction)
  else:
    rows = sources.read_builtin(kind, "eval", config.eval_rows, seed, config.annotator)
    heldout = read(rows, 0)
  heldout = heldout[: config.eval_rows]

  train_part = _tokenize(kind, train, config, tokenizer)
  heldout_part = _tokenize(kind, heldout, config, tokenizer)
  _check_lengths(train_part, heldout_part, config, source)
  wants_heldout = config.eval_path or config.eval_fraction > 0
  for part, name in (
    (train_part, source),
    (heldout_part, config.eval_path or f"held-out {source}"),
  ):
    if not part.examples and (part is train_part or wants_heldout):
      raise DataError(
        f"{name}: no rows are left of {part.report['rows_read']} read ({_summary(part.report)}); "
        f"{'choose another data.annotator' if config.annotator else 'give more rows'}, "
        "or raise the limits"
      )
  train_part.report["bad_rows"] = len(bad)
  train_keys = set(train_part.keys)
  heldout_part.report["eval_prompts_in_train"] = sum(k in train_keys for k in heldout_part.keys)
  shape = _shape(kind, train_part.examples + heldout_part.examples)
  if 0 < config.packed_length < shape[0]:
    raise DataError(
      f"data.packed_length={config.packed_length} is too short for the longest sequence, of up to"
      f" {shape[0]} tokens; raise it, or lower data.max_prompt_length or data.max_response_length"
    )
  return _finish(kind, train_part, *shape), _finish(kind, heldout_part, *shape)


def comparison_kind(config: DataConfig) -> Kind:
  """The kind of data for a reward model: "rankings" or "preferences", by the first row.

  Raises:
    DataError: The rows cannot be read.
  """
  if not config.path and not config.tfds:
    return "preferences"
  # Bad rows are for `load` to report.
  rows, _ = _open("preferences", config, 0, lambda error: None)
  first = next(rows, None)
  return schema.comparison_kind(first) if first else "preferences"


def prompts_from_texts(texts: Sequence[str], tokenizer: Tokenizer) -> Dataset:
  """Prompts given directly, as a data set for `eval_batches`.

  Raises:
    DataError: A prompt is empty.
  """
  for i, text in enumerate(texts):
    if not text.strip():
      raise DataError(f"prompt {i} is empty; write something to answer")
  examples = [{"prompt": np.array(ids, np.int32)} for ids in tokenizer.encode_prompts(texts)]
  rows = [{"prompt": text, "prompt_text": tokenizer.render_prompt(text)} for text in texts]
  padded = max(len(example["prompt"]) for example in examples)
  return _finish("prompts", _Part(examples, rows, list(texts), np.zeros((0, 2)), {}), padded, 0)


def from_rows(kind: Kind, rows: Sequence[Row], config: DataConfig, tokenizer: Tokenizer) -> Dataset:
  """A data set of rows at hand, for `eval_batches`; it may turn out empty.

  Args:
    kind: What the rows are for.
    rows: The rows.
    config: Limits; its sources are not read.
    tokenizer: Made with `config.end_token`.

  Raises:
    DataError: A bad row.
  """

  def on_bad_row(error: DataError):
    raise error

  part = _tokenize(kind, _parse(kind, iter(rows), config, tokenizer, on_bad_row), config, tokenizer)
  return _finish(kind, part, *_shape(kind, part.examples))


def from_examples(
  kind: Kind, examples: list[dict[str, np.ndarray]], rows: list[dict[str, Any]]
) -> Dataset:
  """A data set of tokenised examples at hand, such as sampled responses; see `Dataset`."""
  part = _Part(examples, rows, [], np.zeros((0, 2)), {})
  return _finish(kind, part, *_shape(kind, examples))


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
  The order depends on `seed` alone. Each of several processes reads whole batches, of which
  `sharding.place_batch` keeps the part that its devices hold.

  Args:
    dataset: The rows.
    batch_size: Rows of a batch.
    seed: Seed of the order.
    pad_id: Id to pad with; masks do not depend on it.
    shuffle: False keeps the order of the rows.
    epochs: Number of passes; None never ends.
    columns: [rows, ...] figures known about each row; batches are then pairs `(batch, [B, ...])`.
    packed_length: Tokens of a row that holds several sequences; 0 gives each a row of its own. The
      next sequence goes to the first row with room for it, and if there is none the batch is full.

  Returns:
    An iterator of numpy batches of B = batch_size rows: `TokenBatch` with [B, T]
    arrays (demonstrations) or [B, 2, T] ones (preferences: 0 is chosen, 1 rejected),
    `ComparisonBatch`, `RankingBatch`, `UnpairedBatch` or `PromptBatch`; with `packed_length`
    `PackedBatch`, and `columns` [B, S, ...] with zeros where `real` is not. `get_state()` is a
    small JSON-compatible dict; `set_state()` continues from it.

  Raises:
    ValueError: The data set is smaller than a batch.
  """
  rows = len(dataset.examples)
  if batch_size < 1 or rows < batch_size:
    raise ValueError(
      f"--batch_size={batch_size} does not fit a data set of {rows} rows; "
      f"choose between 1 and {rows}, or give more rows"
    )
  order = grain.MapDataset.range(rows).seed(seed % 2**32)
  if shuffle:
    order = order.shuffle()
  order = order.repeat(epochs)
  # Padding a batch takes microseconds; reading ahead would only add threads to stop.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  if packed_length:
    filled = _packed_rows(dataset, order.to_iter_dataset(options), batch_size, packed_length)
    packed = filled.batch(batch_size, drop_remainder=True)
    return iter(packed.map(lambda rows: _packed_batch(rows, dataset.width, pad_id, columns)))
  order = order.batch(batch_size, drop_remainder=True)
  mapped = order.map(lambda indices: _with_columns(dataset, indices, pad_id, columns))
  return iter(mapped.to_iter_dataset(options))


def padding_fraction(dataset: Dataset, batch_size: int, packed_length: int = 0) -> float:
  """Part of the tokens of `batches` that are padding.

  Args:
    dataset: Demonstrations, preferences, rankings or single responses.
    batch_size: Rows of a batch.
    packed_length: As for `batches`; the figure is then that of the first batches of some order.
  """
  if packed_length:
    packed = batches(dataset, batch_size, seed=0, pad_id=0, packed_length=packed_length)
    return float(np.mean([batch.segment_ids == 0 for batch in itertools.islice(packed, 8)]))
  rows = len(dataset.examples) * dataset.width
  return 1 - sum(map(sum, _lengths(dataset))) / (rows * dataset.padded_length)


def eval_batches(
  dataset: Dataset,
  batch_size: int,
  pad_id: int,
  *,
  columns: np.ndarray | None = None,
) -> Iterator[tuple[Any, np.ndarray]]:
  """Runs over a data set once, in order.

  Args:
    dataset: The rows.
    batch_size: Rows of a batch; may be larger than the data set.
    pad_id: Id to pad with.
    columns: As for `batches`.

  Yields:
    A batch as from `batches`, and [B] bool: False on rows that repeat earlier ones to fill the
    last batch.

  Raises:
    ValueError: `batch_size` is not positive.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size must be positive, got {batch_size}")
  rows = len(dataset.examples)
  for start in range(0, rows, batch_size):
    positions = np.arange(start, start + batch_size)
    yield _with_columns(dataset, positions % rows, pad_id, columns), positions < rows


class _Part(NamedTuple):
  """Tokenised rows before the padded length is known.

  Attributes:
    examples, rows: As in `Dataset`.
    keys: `Example.key` of each kept row.
    lengths: [examples, 2] int, prompt and longest response, overlong examples included.
    report: As in `Dataset`.
  """

  examples: list[dict[str, np.ndarray]]
  rows: list[dict[str, Any]]
  keys: list[str]
  lengths: np.ndarray
  report: dict[str, int]


def _open(
  kind: Kind, config: DataConfig, seed: int, on_bad_row: sources.OnBadRow
) -> tuple[Iterator[Row], str]:
  """The training rows, and the name of their source for messages."""
  if config.path:
    return sources.read_jsonl(config.path, on_bad_row), config.path
  if config.tfds:
    rows = sources.read_tfds(config.tfds, config.tfds_dir, on_bad_row)
    return rows, f"tfds:{config.tfds}"
  count = config.rows or _BUILTIN_ROWS
  rows = sources.read_builtin(kind, "train", count, seed, config.annotator)
  return rows, f"built-in {kind}"


class _Parsed(NamedTuple):
  """A row and its examples, of which there is at least one."""

  row: Row
  examples: list[Example]


def _parse(
  kind: Kind,
  rows: Iterator[Row],
  config: DataConfig,
  tokenizer: Tokenizer,
  on_bad_row: sources.OnBadRow,
) -> list[_Parsed]:
  """The readable rows, with the prompt as rendered text added to their columns."""
  parsed = []
  for row in rows:
    try:
      examples = schema.parse_row(
        kind,
        row,
        prefer_messages=tokenizer.has_chat_template,
        annotator=config.annotator,
        votes=config.votes,
      )
      try:
        text = tokenizer.render_prompt(examples[0].prompt)
      except DataError as error:
        raise DataError(f"{row.where}: {error}") from error
    except DataError as error:
      on_bad_row(error)
      continue
    parsed.append(_Parsed(row._replace(fields={**row.fields, "prompt_text": text}), examples))
  return parsed


def _split(parsed: list[_Parsed], fraction: float) -> tuple[list[_Parsed], list[_Parsed]]:
  """Holds out a part of the prompts.

  The choice depends on the prompt alone, so the stages of a chain that read the same prompts from
  different files hold out the same ones.
  """
  if not fraction:
    return parsed, []
  places = [_place(examples[0].key) for _, examples in parsed]
  # A file too small for its share still gives one prompt.
  limit = max(fraction, min(places, default=0.0))
  train = [item for item, place in zip(parsed, places, strict=True) if place > limit]
  heldout = [item for item, place in zip(parsed, places, strict=True) if place <= limit]
  return train, heldout


def _place(key: str) -> float:
  """A number in [0, 1) that looks random and depends on the text alone."""
  return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def _tokenize(kind: Kind, parsed: list[_Parsed], config: DataConfig, tokenizer: Tokenizer) -> _Part:
  """Tokenises examples and drops those that cannot be trained on."""
  report = collections.Counter(dict.fromkeys(_COUNTS, 0) | {"rows_read": len(parsed)})
  report.update(f"dropped_{e.skip}" for _, examples in parsed for e in examples if e.skip)
  prompts = tokenizer.encode_prompts([examples[0].prompt for _, examples in parsed])
  usable = [
    (row, prompt, example)
    for (row, examples), prompt in zip(parsed, prompts, strict=True)
    for example in examples
    if not example.skip
  ]
  # The pairs of a row share answers. Where there are none, there may be no end token either.
  texts = list(dict.fromkeys(answer for *_, example in usable for answer in example.answers))
  encoded = dict(zip(texts, tokenizer.encode_responses(texts) if texts else [], strict=True))
  part = _Part([], [], [], np.zeros([len(usable), 2], np.int64), report)
  for i, (row, prompt, example) in enumerate(usable):
    answers, labels = [encoded[answer] for answer in example.answers], list(example.labels)
    _check_ids(row, (prompt, *answers), tokenizer.vocab_size)
    part.lengths[i] = len(prompt), max(map(len, answers), default=0)
    prompt_too_long, answer_too_long = part.lengths[i] > _limits(config)
    if kind == "rankings":
      answers, labels = _fitting(answers, labels, config.max_response_length)
      answer_too_long = not any(labels)
    if answer_too_long or (prompt_too_long and config.overlong == "drop"):
      report["dropped_overlong"] += 1
      continue
    if kind in ("preferences", "comparisons") and answers[0] == answers[1]:
      report["dropped_identical_pairs"] += 1
      continue
    if prompt_too_long:
      report["truncated_prompts"] += 1
      prompt = _keep_end(prompt, config.max_prompt_length, tokenizer.bos_id)
    report["dropped_overlong_responses"] += len(example.answers) - len(answers)
    part.examples.append(_arrays(kind, prompt, answers, labels))
    part.rows.append(row.fields)
    part.keys.append(example.key)
  report.update(kept=len(part.examples), **_repeats(kind, part.examples))
  return part


def _fitting(
  answers: list[list[int]], ranks: list[float], max_length: int
) -> tuple[list[list[int]], list[float]]:
  """The responses of a ranking that are short enough, their ranks counted from 0 again."""
  short = [
    (answer, rank) for answer, rank in zip(answers, ranks, strict=True) if len(answer) <= max_length
  ]
  levels = sorted({rank for _, rank in short})
  return [answer for answer, _ in short], [levels.index(rank) for _, rank in short]


def _arrays(
  kind: Kind, prompt: list[int], answers: list[list[int]], labels: list[float]
) -> dict[str, np.ndarray]:
  """An example as `Dataset` holds it."""
  if kind == "rankings":
    names = [f"response_{i}" for i in range(len(answers))]
  else:
    names = _RESPONSES[kind]
  columns = {"prompt": prompt, **dict(zip(names, answers, strict=True))}
  example: dict[str, Any] = {name: np.asarray(ids, np.int32) for name, ids in columns.items()}
  if kind in _LABELS:
    dtype = np.float32 if kind == "comparisons" else np.int32
    example[_LABELS[kind]] = np.asarray(labels, dtype)
  return example


def _check_ids(row: Row, columns: Sequence[Sequence[int]], vocab_size: int) -> None:
  for ids in columns:
    # An id outside the embedding would be clamped silently on the device.
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
      raise DataError(
        f"{row.where}: token ids {min(ids)} to {max(ids)} do not fit a vocabulary of {vocab_size}; "
        "the tokenizer files do not belong together"
      )


def _limits(config: DataConfig) -> np.ndarray:
  return np.asarray([config.max_prompt_length, config.max_response_length])


def _keep_end(ids: list[int], length: int, bos_id: int | None) -> list[int]:
  """The last `length` ids; a BOS in front stays in front, as models expect to see it."""
  if ids[0] == bos_id and length > 1:
    return [ids[0], *ids[len(ids) - length + 1 :]]
  return ids[len(ids) - length :]


def _repeats(kind: Kind, examples: list[dict[str, np.ndarray]]) -> dict[str, int]:
  """Counts repeated examples, and pairs that are there with both labels."""
  seen: set[tuple[bytes, ...]] = set()
  counts = {"duplicates": 0, "flipped_pairs": 0}
  for example in examples:
    prompt, *rest = key = tuple(ids.tobytes() for ids in example.values())
    counts["duplicates"] += key in seen
    counts["flipped_pairs"] += kind == "preferences" and (prompt, *reversed(rest)) in seen
    seen.add(key)
  return counts


def _check_lengths(train: _Part, heldout: _Part, config: DataConfig, source: str) -> None:
  """Refuses data of which most would be dropped: then a limit is wrong, not the rows."""
  lengths = np.concatenate([train.lengths, heldout.lengths])
  dropped = train.report["dropped_overlong"] + heldout.report["dropped_overlong"]
  if 2 * dropped <= len(lengths):
    return
  over = np.mean(lengths > _limits(config), axis=0)
  described = []
  for i, name in enumerate(("max_prompt_length", "max_response_length")):
    if not over[i]:
      continue
    p50, p90, p99, most = np.percentile(lengths[:, i], [50, 90, 99, 100]).astype(int)
    described.append(
      f"data.{name}={_limits(config)[i]} is too short for {over[i]:.0%} (lengths in tokens: "
      f"median {p50}, 90 % below {p90}, 99 % below {p99}, longest {most})"
    )
  raise DataError(
    f"{source}: {dropped} of {len(lengths)} examples are too long: {'; '.join(described)}; raise "
    "the limits, or set data.overlong=truncate_prompt if the prompts are what is long"
  )


def _summary(report: dict[str, int]) -> str:
  return ", ".join(f"{name} {count}" for name, count in sorted(report.items()) if count) or "none"


def _shape(kind: Kind, examples: list[dict[str, np.ndarray]]) -> tuple[int, int]:
  """The `padded_length` and the `width` that all examples fit."""
  if not examples:
    return 0, 0
  prompts = [len(example["prompt"]) for example in examples]
  responses = [responses_of(example) for example in examples]
  longest = [max(map(len, some), default=0) for some in responses]
  if kind == "unpaired":  # Any response is put behind any prompt.
    length = max(prompts) + max(longest)
  elif kind == "comparisons":  # One response is put behind the other.
    length = max(map(operator.add, prompts, (sum(map(len, some)) for some in responses)))
  else:
    length = max(map(operator.add, prompts, longest))
  return -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, max(map(len, responses))


def _finish(kind: Kind, part: _Part, padded_length: int, width: int) -> Dataset:
  digest = hashlib.sha256(kind.encode())
  for example in part.examples:
    for ids in example.values():
      digest.update(
        len(ids).to_bytes(8, "little") + ids.astype(ids.dtype.newbyteorder("<")).tobytes()
      )
  return Dataset(
    kind, part.examples, part.rows, padded_length, width, digest.hexdigest(), dict(part.report)
  )


def _with_columns(
  dataset: Dataset, indices: np.ndarray, pad_id: int, columns: np.ndarray | None
) -> Any:
  batch = _collate(dataset, indices, pad_id)
  return batch if columns is None else (batch, columns[indices])


def _collate(dataset: Dataset, indices: np.ndarray, pad_id: int) -> Batch:
  """The rows at `indices` [B] as arrays."""
  examples = [dataset.examples[i] for i in indices]
  if dataset.kind == "prompts":
    padded = _pad_left(examples, dataset.padded_length, pad_id)
    return PromptBatch(*padded, np.asarray(indices, np.int32))
  responses = [responses_of(example) for example in examples]
  if dataset.kind == "comparisons":
    both_ways = [[np.concatenate([a, b]), np.concatenate([b, a])] for a, b in responses]
    preference: Any = np.asarray([example["preference"][0] for example in examples], np.float32)
    return ComparisonBatch(*_pad_right(dataset, examples, both_ways, pad_id), preference)
  tokens, mask = _pad_right(dataset, examples, responses, pad_id)
  if dataset.kind == "preferences":
    return TokenBatch(tokens, mask)
  if dataset.kind == "rankings":
    ranks: Any = np.zeros(tokens.shape[:2], np.int32)
    for row, example in zip(ranks, examples, strict=True):
      row[: len(example["ranks"])] = example["ranks"]
    # Every real response has at least its end token.
    return RankingBatch(tokens, mask, ranks, mask.any(axis=-1))
  tokens, mask = tokens[:, 0], mask[:, 0]
  if dataset.kind == "demonstrations":
    return TokenBatch(tokens, mask)
  others = [responses_of(dataset.examples[_partner(dataset, i)]) for i in indices]
  mismatched = TokenBatch(*(x[:, 0] for x in _pad_right(dataset, examples, others, pad_id)))
  desirable: Any = np.asarray([example["desirable"][0] for example in examples], bool)
  return UnpairedBatch(tokens, mask, desirable, mismatched)


def _lengths(dataset: Dataset) -> list[list[int]]:
  """Tokens of the sequences of each example, the prompt included."""
  return [[len(e["prompt"]) + len(ids) for ids in responses_of(e)] for e in dataset.examples]


def _packed_rows(
  dataset: Dataset, order: grain.IterDataset, rows: int, length: int
) -> grain.IterDataset:
  """Rows of whole examples, of which `rows` at a time are filled from the `order` of indices.

  Every row is a dict: "tokens_k" and "mask_k" [T] of the k-th responses with their prompts, and
  "index" [S] of the examples.
  """
  lengths = [max(some) for some in _lengths(dataset)]
  # More sequences than twice the usual number take a row of short ones; it is then closed early.
  most = min(length // min(lengths), -(-2 * length * len(lengths) // sum(lengths)))
  sides = range(dataset.width)
  masks = tuple(f"mask_{side}" for side in sides)

  def example(index: int) -> dict[str, np.ndarray]:
    prompt = dataset.examples[index]["prompt"]
    columns: dict[str, Any] = {"index": np.asarray([index], np.int32)}
    for side, response in enumerate(responses_of(dataset.examples[index])):
      columns[f"tokens_{side}"] = np.concatenate([prompt, response])
      columns[f"mask_{side}"] = np.arange(len(prompt) + len(response)) >= len(prompt)
    return columns

  return grain.experimental.FirstFitPackIterDataset(
    order.map(example),
    length_struct={f"{name}_{side}": length for name in ("tokens", "mask") for side in sides}
    | {"index": most},
    num_packing_bins=rows,
    shuffle_bins=False,  # They are one batch.
    meta_features=masks,
  )


def _packed_batch(rows: dict[str, Any], width: int, pad_id: int, columns: np.ndarray | None) -> Any:
  """Batched `_packed_rows` as a `PackedBatch`, with its columns if there are any."""

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


def _partner(dataset: Dataset, index: int) -> int:
  """The next example, after the last the first, that has another prompt."""
  size, prompt = len(dataset.examples), dataset.examples[index]["prompt"]
  following = ((index + step) % size for step in range(1, size))
  other = (i for i in following if not np.array_equal(dataset.examples[i]["prompt"], prompt))
  return next(other, index)


def _pad_left(
  examples: Sequence[dict[str, np.ndarray]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens and mask of the prompts, [B, P] each."""
  tokens = np.full([len(examples), length], pad_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, example in enumerate(examples):
    start = length - len(example["prompt"])
    tokens[row, start:] = example["prompt"]
    mask[row, start:] = True
  return tokens, mask


def _pad_right(
  dataset: Dataset,
  examples: Sequence[dict[str, np.ndarray]],
  responses: Sequence[list[np.ndarray]],
  pad_id: int,
) -> tuple[Any, Any]:
  """Tokens and mask of each prompt with each of its responses, [B, K, T] each."""
  tokens = np.full([len(examples), dataset.width, dataset.padded_length], pad_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, (example, answers) in enumerate(zip(examples, responses, strict=True)):
    prompt = example["prompt"]
    for column, answer in enumerate(answers):
      end = len(prompt) + len(answer)
      tokens[row, column, : len(prompt)] = prompt
      tokens[row, column, len(prompt) : end] = answer
      mask[row, column, len(prompt) : end] = True
  return tokens, mask
