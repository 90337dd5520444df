"""Rows as token ids: they are read, checked and tokenised before anything is compiled.

`load` gives a training set and a held-out set; `batches.batches` runs over them.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from absl import logging

from rlhf_jax import processes, ranges, workdir
from rlhf_jax.data import apart, files, joining, schema, sources, stored
from rlhf_jax.data.kinds import (
  COUNTS,
  KINDS,
  SCORED,
  Arrays,
  Dataset,
  Share,
  all_responses,
  partner,
  responses_of,
  shared_length,
)
from rlhf_jax.data.schema import Example, KindName, Votes
from rlhf_jax.data.sources import DataError, HeldoutSplit, Row
from rlhf_jax.data.tokenizer import (
  RESERVED,
  Exchange,
  Prompt,
  Tokenizer,
  answers_in,
)

Overlong = Literal["drop", "truncate_prompt"]
Turns = Literal["last", "all"]

_BUILTIN_ROWS = 8192
# Padded lengths are multiples of this: small changes of the data keep the compiled shapes.
_LENGTH_MULTIPLE = 8
# A tokenizer with more unknown tokens than this was made for other texts.
_MOST_UNKNOWN = 0.1
# Name -> function that raises a DataError for the columns of a row that something needs.
Checks = Mapping[str, Callable[[Mapping[str, Any]], object]]
_NO_CHECKS: Checks = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Sources of data, and limits on their rows.

  Attributes:
    path: File of rows: JSON Lines, a JSON array, CSV or Parquet, also compressed; a glob, or
      several files separated by commas, `hf://datasets/ORG/NAME[@REVISION]/FILE` of a hub, or
      `gs://BUCKET/FILE` in a bucket. With weights, as in `a.jsonl:0.7,b.parquet:0.3`, batches take
      their rows from the files in these shares; files without weights are joined. If path and tfds
      are empty, the built-in task generates the rows.
    tfds: Prepared TFDS data set, `NAME[/CONFIG][:VERSION][:SPLIT]`; the default split is train.
    tfds_dir: Folder in which the TFDS data set was prepared; empty is the TFDS default.
    eval_path: File of held-out rows; empty holds out a fraction of the rows.
    eval_fraction: Fraction of the prompts to hold out without an eval_path, chosen by a hash of the
      prompt; 0 holds out nothing.
    eval_sets: Further files of held-out rows, as in `math=math.jsonl,chat=chat.jsonl`. Their
      metrics are eval/math/... and eval/chat/....
    rows: Number of rows to use, from the first one; 0 uses all. It holds for each file that has a
      weight. For the built-in task, the number of rows to generate (0 generates 8192).
    eval_rows: Maximum number of held-out rows, of each set.
    split: Held-out rows of the built-in task: `eval` words its prompts as training does, `shift` as
      no training prompt is worded.
    group: Column, such as language, source or annotator, by whose values `evaluate` and
      `reward_model` also measure the held-out rows: each group, the worst one, and the spread. Of
      the built-in task subject, tone or length, which a prompt asks for.
    max_prompt_length: Maximum length of a prompt in tokens.
    max_response_length: Maximum length of a response in tokens, including its end token. With
      turns=all it is all that follows the first prompt.
    overlong: Treatment of longer prompts. `drop` drops the row; `truncate_prompt` leaves out the
      oldest turns, and then the start of the last one's text, but never a part of the chat template
      or the system turn. Rows with a longer response are always dropped.
    packed_length: Length in tokens of packed rows, each of which holds as many sequences as fit;
      batch_size then counts packed rows. 0 gives each sequence a row, padded to the longest
      sequence. For SFT, and for pairs of a reward model, DPO or SimPO.
    share_prompts: Put the prompt and both responses of a pair into one row, so that the model reads
      the prompt once, where this saves a tenth of the tokens. Packed rows, and data other than
      pairs, stay as they are.
    bad_rows: Maximum number of unusable rows to skip; with 0 the first one is an error.
    ignore: Columns to leave out, separated by commas, such as a `context` that is no part of the
      prompt.
    end_token: Token that ends a response, such as <s>; empty takes that of the tokenizer.
    annotator: Annotator or group whose votes are the preferences; empty takes all votes. For the
      built-in task, a key of simulation.ANNOTATORS (empty is the expert).
    turns: Answers of a chat that are learnt from, in demonstrations: the `last` one, or `all`. All
      need a chat template with blocks `generation`, or one that writes the start of a chat as in
      the whole chat.
    template_args: Variables of the chat template, as in enable_thinking:false,style:brief. They are
      kept with the exported model.
    votes: Treatment of several votes on one pair. `majority` makes one pair and drops ties; `each`
      makes one pair per vote, which teaches a model the share of the votes.
  """

  path: str = ""
  tfds: str = ranges.rare("")
  tfds_dir: str = ranges.rare("")
  eval_path: str = ""
  eval_fraction: float = 0.05
  eval_sets: tuple[str, ...] = ranges.rare(())
  rows: int = 0
  eval_rows: int = 512
  split: HeldoutSplit = ranges.rare("eval")
  group: str = ranges.rare("")
  max_prompt_length: int = 256
  max_response_length: int = 256
  overlong: Overlong = "drop"
  packed_length: int = 0
  share_prompts: bool = ranges.rare(False)
  bad_rows: int = ranges.rare(0)
  ignore: tuple[str, ...] = ranges.rare(())
  end_token: str = ranges.rare("")
  annotator: str = ranges.rare("")
  turns: Turns = ranges.rare("last")
  template_args: tuple[str, ...] = ranges.rare(())
  votes: Votes = ranges.rare("majority")

  def __post_init__(self):
    if self.path and self.tfds:
      raise ValueError("tfds cannot be used together with path; give one of the two")
    if self.tfds_dir and not self.tfds:
      raise ValueError("tfds_dir needs the name of a data set; set tfds as well")
    if self.tfds:
      sources.parse_tfds(self.tfds)
    ranges.check(
      self,
      below_one=("eval_fraction",),
      non_negative=("rows", "bad_rows", "packed_length"),
      at_least_one=("eval_rows", "max_prompt_length", "max_response_length"),
      one_of={
        "overlong": get_args(Overlong),
        "votes": get_args(Votes),
        "split": get_args(HeldoutSplit),
        "turns": get_args(Turns),
      },
    )
    self.variables()
    if self.eval_sets and not is_given(self):
      raise ValueError("eval_sets are for rows of yours; give path or tfds as well")
    if self.eval_sets and not (self.eval_path or self.eval_fraction):
      raise ValueError("eval_sets are further held-out rows; eval_fraction=0 leaves no first ones")
    _named_files(self)
    if self.split != "eval" and is_given(self):
      raise ValueError(
        "split is one of the built-in task; give held-out rows of yours by eval_path"
      )

  def variables(self) -> dict[str, Any] | None:
    """Returns the variables in `template_args`; None without any.

    Raises:
      ValueError: One is malformed, is there twice, or is not the user's to set.
    """
    values: dict[str, Any] = {}
    for text in self.template_args:
      name, colon, value = text.partition(":")
      if not re.fullmatch(r"[A-Za-z_]\w*", name) or not colon:
        raise ValueError(
          f"template_args has {text!r}; write NAME:VALUE, as in enable_thinking:false"
        )
      if name in RESERVED or name.endswith("_token"):
        raise ValueError(f"template_args cannot set {name}, which rows or the tokenizer set")
      if name in values:
        raise ValueError(f"template_args sets {name} twice; keep one")
      values[name] = _value_of(value)
    return values or None


def _value_of(text: str) -> Any:
  """Returns a value of the command line: true, false, null, a number, or else a text."""
  words = {"true": True, "false": False, "null": None, "none": None}
  if text.lower() in words:
    return words[text.lower()]
  try:
    value = sources.load_json(text)
  except ValueError:
    return text
  return value if isinstance(value, int | float | str) else text


def _named_files(config: DataConfig) -> dict[str, str]:
  """Returns the files of `eval_sets` by their names."""
  files_of: dict[str, str] = {}
  for text in config.eval_sets:
    name, _, path = text.partition("=")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or not path:
      raise ValueError(f"eval_sets has {text!r}; write NAME=FILE, as in math=math.jsonl")
    if name in files_of:
      raise ValueError(f"eval_sets has two sets named {name}; rename one")
    files_of[name] = path
  return files_of


def load(
  kind: KindName,
  config: DataConfig,
  tokenizer: Tokenizer,
  *,
  seed: int = 0,
  cache: str | os.PathLike[str] | None = None,
  checks: Checks = _NO_CHECKS,
) -> tuple[Dataset, Dataset]:
  """Reads, checks and tokenises all rows.

  Args:
    kind: Name of the kind of data; see `schema` for the columns.
    config: Sources and limits.
    tokenizer: Tokenizer that was made with `config.end_token`.
    seed: Seed of the built-in task; data from outside does not depend on it.
    cache: Folder of tokenised files, from which the same rows are mapped into memory the next time;
      None for no folder. Nothing else depends on it.
    checks: Further checks of the columns of a row by their names, such as those of a reward.

  Returns:
    The training set and the held-out set.

  Raises:
    DataError: A bad row beyond `config.bad_rows`, no rows left, or most rows too long.
  """
  if kind not in KINDS:
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
  if config.end_token and tokenizer.token_id(config.end_token) != tokenizer.eos_id:
    raise ValueError(
      f"end_token is {config.end_token!r} but the tokenizer ends with id {tokenizer.eos_id}; "
      "load it with load_tokenizer(path, eos_token=config.end_token)"
    )
  if config.packed_length and not KINDS[kind].packable:
    packed = [name for name in KINDS if KINDS[name].packable]
    raise DataError(
      f"data.packed_length={config.packed_length} is for {' and '.join(packed)}, and this reads"
      f" {kind}; leave it out"
    )
  if config.turns == "all" and kind != "demonstrations":
    raise DataError(f"data.turns=all is for demonstrations, and this reads {kind}; leave it out")
  if cache is None or not (key := _key(kind, config, tokenizer, checks)):
    return _load(kind, config, tokenizer, seed, checks)[:2]
  path = workdir.local_path(cache) / f"{key}.tokens"
  if found := stored.read(path):
    for notice in found.notices:
      logging.warning("%s", notice)
    return found[:2]
  found = _load(kind, config, tokenizer, seed, checks)
  unchanged = _key(kind, config, tokenizer, checks) == key  # Since the files were digested.
  if processes.is_first() and unchanged and stored.write(path, found):
    found = stored.read(path) or found
  return found[:2]


def _key(kind: KindName, config: DataConfig, tokenizer: Tokenizer, checks: Checks) -> str:
  """Returns the name of the tokens of files; empty for rows that are not of files."""
  if not is_given(config):
    return ""
  specs = [config.path, config.eval_path, *_named_files(config).values()]
  paths = [pathlib.Path(path) for spec in specs if spec for path in files.paths_of(spec)]
  if config.tfds:
    paths += sources.tfds_files(config.tfds, config.tfds_dir)
  return stored.key(kind, config, [path.expanduser() for path in paths], tokenizer, [*checks])


def _load(
  kind: KindName, config: DataConfig, tokenizer: Tokenizer, seed: int, checks: Checks
) -> stored.Stored:
  """Reads, checks and tokenises all rows; see `load`."""
  bad: list[DataError] = []
  notices: list[str] = []

  def on_bad_row(error: DataError):
    if len(bad) >= config.bad_rows:
      hint = f" ({len(bad)} earlier ones skipped)" if bad else ""
      raise DataError(f"{error}; or skip some with data.bad_rows{hint}") from error
    bad.append(error)

  def read(rows: Iterator[Row]) -> _Part:
    parsed = _parse(kind, rows, config, tokenizer, on_bad_row, checks)
    return _tokenize(kind, parsed, config, tokenizer, notices)

  def read_heldout(path: str) -> _Part:
    if len(files.sources_of(path)) > 1:
      raise DataError(f"{path}: weights are for training rows; give held-out rows without them")
    return read(files.read_file(path, on_bad_row, config.eval_rows, config.ignore))

  train_rows, source = _open(kind, config, seed, on_bad_row)
  heldout_source = config.eval_path or f"held-out {source}"
  whole = read(train_rows)
  if config.eval_path:
    train, heldout = whole, read_heldout(config.eval_path)
    _check_lengths([train, heldout], config, source)
  elif is_given(config):
    _check_lengths([whole], config, source)
    _require_rows(whole, source, config)
    train, heldout = _split(kind, whole, config)
  else:
    rows = sources.read_builtin(kind, config.split, config.eval_rows, seed, config.annotator)
    train, heldout = whole, read(rows)
    _check_lengths([train, heldout], config, source)
  _require_rows(train, source, config)
  if config.eval_path or not is_given(config):
    _require_rows(heldout, heldout_source, config)
  named = {name: read_heldout(path) for name, path in _named_files(config).items()}
  for name, part in named.items():
    _require_rows(part, f"data.eval_sets={name}", config)
  named_parts = [(part, f"data.eval_sets={name}") for name, part in named.items()]
  for part, name in ((train, source), (heldout, heldout_source), *named_parts):
    _check_unknown(part, name, tokenizer, config)
    if part.examples and kind == "unpaired":
      try:
        partner(part.examples, 0)
      except DataError as error:
        raise DataError(f"{name}: {error}") from error
  train.report["bad_rows"] = len(bad)
  train_keys = set(train.keys)
  for part in (heldout, *named.values()):
    part.report["eval_prompts_in_train"] = sum(key in train_keys for key in part.keys)
  examples = train.examples + heldout.examples
  examples += [example for part in named.values() for example in part.examples]
  shape = _shape(kind, examples)
  if 0 < config.packed_length < shape[0]:
    raise DataError(
      f"data.packed_length={config.packed_length} is too short for the longest sequence, of up to"
      f" {shape[0]} tokens; raise it, or lower data.max_prompt_length or data.max_response_length"
    )
  shared = 0
  if config.share_prompts and KINDS[kind].shareable and not config.packed_length:
    shared = shared_length(shape[0], _round_up(all_responses(*_lengths(examples))))

  def finish(part: _Part) -> Dataset:
    ignored, checked = tuple(config.ignore), tuple(checks)
    finished = _finish(kind, part, shape)
    return finished._replace(shared_length=shared, ignored=ignored, checked=checked)

  further = {name: finish(part) for name, part in named.items()}
  mixed = finish(train)._replace(mixture=_mixture(train, config))
  return stored.Stored(mixed, finish(heldout)._replace(named=further), notices)


def _mixture(part: "_Part", config: DataConfig) -> tuple[Share, ...]:
  """Returns the shares of the files of a part that have weights; their sum is 1."""
  mixed = files.sources_of(config.path) if config.path else []
  if len(mixed) < 2:
    return ()
  total = sum(source.weight or 0 for source in mixed)
  counts = collections.Counter(part.sources)
  for i, source in enumerate(mixed):
    if not counts[i]:
      raise DataError(f"{source.name}: no row of it is left to train on, and it has a weight")
  return tuple(
    Share(source.name, counts[i], (source.weight or 0) / total) for i, source in enumerate(mixed)
  )


def is_given(config: DataConfig) -> bool:
  """Returns True if the rows come from outside, False if the built-in task generates them."""
  return bool(config.path or config.tfds)


def comparison_kind(config: DataConfig) -> KindName:
  """Returns the kind of data for a reward model, "rankings" or "preferences", by a row.

  Raises:
    DataError: The rows cannot be read.
  """
  if not is_given(config):
    return "preferences"
  # Bad rows are for `load` to report.
  rows, _ = _open("preferences", config, 0, lambda error: None)
  for row in rows:
    with contextlib.suppress(DataError):
      return schema.comparison_kind(row.without(config.ignore))
  return "preferences"


def from_prompts(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> Dataset:
  """Makes a data set of prompts at hand, for `eval_batches`.

  Raises:
    DataError: A prompt is empty.
  """
  for i, prompt in enumerate(prompts):
    if isinstance(prompt, str) and not prompt.strip():
      raise DataError(f"prompt {i} is empty; write something to answer")
  examples = [{"prompt": np.array(ids, np.int32)} for ids in tokenizer.encode_prompts(prompts)]
  rows = [{"prompt": of, "prompt_text": tokenizer.render_prompt(of)} for of in prompts]
  padded = max(len(example["prompt"]) for example in examples)
  return _finish("prompts", _part_of(examples, rows), (padded, 0, 0))


def given_prompts(
  rows: Sequence[Mapping[str, Any]], ignore: Sequence[str] = (), *, prefer_messages: bool
) -> list[Prompt]:
  """Returns the prompt of each row as it was given, which no template has rendered.

  Args:
    rows: Rows of any kind.
    ignore: Columns that are not read, `Dataset.ignored`.
    prefer_messages: True to take `messages` even if a row also has a prompt as text.
  """
  prompts = []
  for fields in rows:
    row = Row("row", dict(fields)).without(ignore)
    prompts.append(schema.parse_row("prompts", row, prefer_messages=prefer_messages)[0].prompt)
  return prompts


def require_known(name: str, texts: Sequence[Any], tokenizer: Tokenizer) -> None:
  """Refuses token ids of texts for which the tokenizer was not made.

  Raises:
    DataError: More than a tenth of the ids are those of the unknown token.
  """
  _refuse_unknown(name, _unknown(tokenizer, texts))


def from_rows(
  kind: KindName, rows: Sequence[Row], config: DataConfig, tokenizer: Tokenizer
) -> Dataset:
  """Makes a data set of rows at hand, for `eval_batches`; it may turn out empty.

  Args:
    kind: Name of the kind of data.
    rows: The rows.
    config: Limits; its sources are not read.
    tokenizer: Tokenizer that was made with `config.end_token`.

  Raises:
    DataError: A bad row.
  """

  def on_bad_row(error: DataError):
    raise error

  parsed = _parse(kind, iter(rows), config, tokenizer, on_bad_row)
  part = _tokenize(kind, parsed, config, tokenizer, [])
  return _finish(kind, part, _shape(kind, part.examples))._replace(ignored=tuple(config.ignore))


def from_examples(kind: KindName, examples: list[Arrays], rows: list[dict[str, Any]]) -> Dataset:
  """Makes a data set of tokenised examples, such as sampled responses; see `Dataset`."""
  return _finish(kind, _part_of(examples, rows), _shape(kind, examples))


class _Part(NamedTuple):
  """Tokenised rows before the padded length is known.

  Attributes:
    examples, rows: Examples and their rows; see `Dataset`.
    keys: `Example.key` of each example.
    origins: Index of the row of each example among all that were read.
    sources: Index of the source of each example.
    events: Index of a row, and the name in the report of what happened to it.
    row_keys: `Example.key` of each row that was read, and its answers.
    lengths: [examples, 2] int, prompt and longest response, overlong examples included.
    unknown: Number of unknown tokens, and of all tokens.
    report: Counts; see `Dataset`.
    unread: Columns that were not read.
  """

  examples: list[Arrays]
  rows: list[dict[str, Any]]
  keys: list[str]
  origins: list[int]
  sources: list[int]
  events: list[tuple[int, str]]
  row_keys: list[tuple[str, tuple[str, ...]]]
  lengths: np.ndarray
  unknown: np.ndarray
  report: dict[str, int]
  unread: frozenset[str]


def _part_of(examples: list[Arrays], rows: list[dict[str, Any]]) -> _Part:
  """Returns examples at hand as a part."""
  none = np.zeros([0, 2], np.int64)
  return _Part(examples, rows, [], [], [], [], [], none, np.zeros(2, np.int64), {}, frozenset())


def _open(
  kind: KindName, config: DataConfig, seed: int, on_bad_row: sources.OnBadRow
) -> tuple[Iterator[Row], str]:
  """Returns the training rows, and the name of their source for messages."""
  if config.path:
    return files.read_file(config.path, on_bad_row, config.rows, config.ignore), config.path
  if config.tfds:
    rows = sources.read_tfds(config.tfds, config.tfds_dir, on_bad_row, config.ignore)
    return itertools.islice(rows, config.rows or None), f"tfds:{config.tfds}"
  count = config.rows or _BUILTIN_ROWS
  rows = sources.read_builtin(kind, "train", count, seed, config.annotator)
  return rows, f"built-in {kind}"


class _Parsed(NamedTuple):
  """A row, its examples, of which there is at least one, and the columns that were not read."""

  row: Row
  examples: list[Example]
  unread: frozenset[str]


def _parse(
  kind: KindName,
  rows: Iterator[Row],
  config: DataConfig,
  tokenizer: Tokenizer,
  on_bad_row: sources.OnBadRow,
  checks: Checks = _NO_CHECKS,
) -> list[_Parsed]:
  """Returns the readable rows, with the prompt as rendered text added to their columns."""
  if kind != "prompts":
    of_sources = itertools.groupby(rows, key=lambda row: row.source)
    rows = itertools.chain.from_iterable(
      joining.joined(kind, list(of_source), config.ignore, config.group)
      for _, of_source in of_sources
    )
  parsed = []
  for row in rows:
    kept = row.without(config.ignore)
    try:
      read = schema.parse(
        kind,
        kept,
        prefer_messages=tokenizer.has_chat_template,
        annotator=config.annotator,
        votes=config.votes,
      )
      if config.annotator and is_given(config) and not read.heard:
        raise DataError(
          f"{row.where}: no annotator judged it; leave out data.annotator={config.annotator}"
        )
      try:
        prompt = read.examples[0].prompt
        tokenizer.require_prompt(prompt)
        text = tokenizer.render_prompt(prompt)
        if config.turns == "all":
          _require_answers(kept, prompt)
          text = tokenizer.render_prompt(_first_prompt(prompt))
        for check in checks.values():
          check(row.fields)
      except DataError as error:
        raise DataError(f"{row.where}: {error}") from error
    except DataError as error:
      on_bad_row(error)
      continue
    row = row._replace(fields={**row.fields, "prompt_text": text})
    parsed.append(_Parsed(row, read.examples, read.unread))
  return parsed


def _first_prompt(prompt: Prompt) -> Prompt:
  """Returns the turns of a prompt before the first answer in them."""
  answers = [] if isinstance(prompt, str) else answers_in(prompt)
  return prompt[: answers[0]] if answers else prompt


def _require_answers(row: Row, prompt: Prompt) -> None:
  """Refuses answers from which nothing is to be learnt, where all are learnt from."""
  fix = "and data.turns=all learns from every answer; use data.turns=last, or remove the row"
  for name, value in row.fields.items():
    for i, turn in enumerate(value if isinstance(value, list) else ()):
      if schema.is_answer(turn) and turn.get("weight") == 0:
        raise DataError(f"{name}[{i}].weight: is 0, {fix}")
  turns = [] if isinstance(prompt, str) else prompt
  for i in answers_in(turns):
    if not turns[i]["content"].strip():
      raise DataError(f"messages: turn {i} is an empty answer, {fix}")


def _split(kind: KindName, part: _Part, config: DataConfig) -> tuple[_Part, _Part]:
  """Holds out a fraction of the prompts that are left, or of the rows if all have one prompt.

  The choice depends on the prompt alone, so the stages of a chain that read the same prompts from
  different files hold out the same ones.
  """
  train = np.ones(len(part.row_keys), bool)
  heldout = ~train
  noticed = ""
  if config.eval_fraction:
    kept = sorted(set(part.origins))
    for name, texts in (
      ("", [key for key, _ in part.row_keys]),
      ("split_by_rows", [json.dumps(key) for key in part.row_keys]),
    ):
      places = np.asarray([_place(text) for text in texts])
      levels = np.unique(places[kept])
      noticed = name
      if len(levels) > 1:
        # A file too small for its share still gives one prompt to each side.
        limit = min(max(config.eval_fraction, levels[0]), levels[-2])
        train, heldout = places > limit, places <= limit
        break
    else:
      noticed = "nothing_to_hold_out"
  is_kept = np.isin(np.arange(len(heldout)), part.origins)
  heldout &= np.cumsum(heldout & is_kept) <= config.eval_rows
  parts = _take(kind, part, train), _take(kind, part, heldout)
  if noticed:
    parts[1].report[noticed] = 1
  return parts


def _take(kind: KindName, part: _Part, rows: np.ndarray) -> _Part:
  """Returns the examples of the rows at which the mask `rows` is True, and their counts."""
  kept = [i for i, origin in enumerate(part.origins) if rows[origin]]
  examples = [part.examples[i] for i in kept]
  return part._replace(
    examples=examples,
    rows=[part.rows[i] for i in kept],
    keys=[part.keys[i] for i in kept],
    origins=[part.origins[i] for i in kept],
    sources=[part.sources[i] for i in kept],
    report=_report(kind, examples, int(rows.sum()), [e for e in part.events if rows[e[0]]]),
  )


def _report(
  kind: KindName, examples: list[Arrays], rows: int, events: list[tuple[int, str]]
) -> dict[str, int]:
  """Counts what happened to the rows of a part."""
  report = collections.Counter(dict.fromkeys(COUNTS, 0) | {"rows_read": rows})
  report.update(name for _, name in events)
  report.update(kept=len(examples), **_repeats(kind, examples))
  return report


def _place(key: str) -> float:
  """Returns a pseudorandom number in [0, 1) that depends only on the text."""
  return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def _tokenize(
  kind: KindName,
  parsed: list[_Parsed],
  config: DataConfig,
  tokenizer: Tokenizer,
  notices: list[str],
) -> _Part:
  """Tokenises examples and drops those that cannot be trained on; adds lines of the log."""
  events = [
    (i, f"dropped_{e.skip}") for i, item in enumerate(parsed) for e in item.examples if e.skip
  ]
  usable = [
    (i, item.row, example)
    for i, item in enumerate(parsed)
    for example in item.examples
    if not example.skip
  ]
  asked = {i: example.prompt for i, _, example in usable}
  answers_of: dict[int, dict[str, None]] = {i: {} for i in asked}  # The pairs of a row share them.
  for i, _, example in usable:
    answers_of[i] |= dict.fromkeys(example.answers)
  where = {i: row.where for i, row, _ in usable}
  scored: dict[int, list[int]] = {}  # Scores of the ids of chats with several answers.
  encoded = _encode(asked, answers_of, tokenizer, config, where, scored)
  whole = {i: len(exchange.prompt) for i, exchange in encoded.items()}
  if config.overlong == "truncate_prompt":
    long = {i: asked[i] for i in asked if asked[i] and whole[i] > config.max_prompt_length}
    short = _shortened(long, config, tokenizer, events)
    encoded |= _encode(short, answers_of, tokenizer, config, where, scored)
  if is_given(config):
    notices += _notice(parsed, asked, answers_of, tokenizer, events)
  unread = frozenset().union(*(item.unread for item in parsed))
  row_keys = [(item.examples[0].key, item.examples[0].answers) for item in parsed]
  lengths = np.zeros([len(usable), 2], np.int64)
  unknown = _unknown(tokenizer, [ids for e in encoded.values() for ids in (e.prompt, *e.responses)])
  part = _Part([], [], [], [], [], events, row_keys, lengths, unknown, {}, unread)
  for n, (i, row, example) in enumerate(usable):
    prompt, labels = encoded[i].prompt, list(example.labels)
    ids_of = dict(zip(answers_of[i], encoded[i].responses, strict=True))
    answers = [ids_of[answer] for answer in example.answers]
    _check_ids(row, (prompt, *answers), tokenizer.vocab_size)
    lengths[n] = whole[i], max(map(len, answers), default=0)
    prompt_too_long, answer_too_long = lengths[n] > _limits(config)
    if KINDS[kind].drops_responses:
      answers, labels = _fitting(answers, labels, config.max_response_length)
      answer_too_long = not any(labels)
    if answer_too_long or len(prompt) > config.max_prompt_length:
      events.append((i, "dropped_overlong"))
      continue
    if KINDS[kind].drops_equal and answers[0] == answers[1]:
      events.append((i, "dropped_identical_pairs"))
      continue
    if prompt_too_long:
      events.append((i, "truncated_prompts"))
    events += [(i, "dropped_overlong_responses")] * (len(example.answers) - len(answers))
    arrays = _arrays(kind, prompt, answers, labels)
    if not all(scored.get(i, ())):
      arrays[SCORED] = np.asarray(scored[i], np.int32)
    part.examples.append(arrays)
    part.rows.append(row.fields)
    part.keys.append(example.key)
    part.origins.append(i)
    part.sources.append(row.source)
  return part._replace(report=_report(kind, part.examples, len(parsed), events))


def _encode(
  asked: dict[int, Prompt],
  answers_of: dict[int, dict[str, None]],
  tokenizer: Tokenizer,
  config: DataConfig,
  where: dict[int, str],
  scored: dict[int, list[int]],
) -> dict[int, Exchange]:
  """Encodes prompts with all their answers, or chats, of which `scored` gets the scores.

  Raises:
    DataError: A chat cannot be read; the message says where it is.
  """
  prompts, answers = [*asked.values()], [[*answers_of[i]] for i in asked]
  try:
    if config.turns == "last":
      return dict(zip(asked, tokenizer.encode_exchanges(prompts, answers), strict=True))
    chats = tokenizer.encode_chats(prompts, [texts[0] for texts in answers])
  except apart.ChatError as error:
    raise DataError(f"{where[[*asked][error.index]]}: {error}") from error
  scored |= {i: chat.scored for i, chat in zip(asked, chats, strict=True)}
  return {i: Exchange(of.prompt, [of.response]) for i, of in zip(asked, chats, strict=True)}


def _shortened(
  long: dict[int, Prompt],
  config: DataConfig,
  tokenizer: Tokenizer,
  events: list[tuple[int, str]],
) -> dict[int, Prompt]:
  """Cuts prompts that are too long, where a part of their last turn fits."""
  short = {}
  for i, prompt in long.items():
    if cut := tokenizer.shorten(prompt, config.max_prompt_length):
      short[i] = cut.prompt
      events += [(i, "truncated_turns")] * cut.turns
  return short


def _notice(
  parsed: list[_Parsed],
  asked: dict[int, Prompt],
  answers_of: dict[int, dict[str, None]],
  tokenizer: Tokenizer,
  events: list[tuple[int, str]],
) -> list[str]:
  """Counts the rows whose texts may be meant otherwise; logs and returns where the first are."""
  notices = []
  spelled = {i: tokenizer.spelled_marker(asked[i], [*answers_of[i]]) for i in asked}
  joined = {i: tokenizer.joined_words(asked[i], [*answers_of[i]]) for i in asked}
  unopened = {i: tokenizer.unopened(asked[i], [*answers_of[i]]) for i in asked}
  repeated = {i: _repeated_prompt(asked[i], [*answers_of[i]]) for i in asked}
  for name, noticed in (
    ("spelled_markers", spelled),
    ("joined_words", joined),
    ("unopened", unopened),
    ("repeated_prompts", repeated),
  ):
    rows = [i for i, problem in noticed.items() if problem]
    events += [(i, name) for i in rows]
    for i in rows[:1]:
      notices.append(f"{parsed[i].row.where}: {noticed[i]} ({len(rows)} rows like it)")
      logging.warning("%s", notices[-1])
  return notices


def _repeated_prompt(prompt: Prompt, answers: Sequence[str]) -> str:
  """Describes two or more answers that all start with their prompt; empty if they do not."""
  text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
  repeats = text and len(answers) > 1 and all(answer.startswith(text) for answer in answers)
  return "the answers repeat the prompt, which they follow" if repeats else ""


def _unknown(tokenizer: Tokenizer, texts: Sequence[Any]) -> np.ndarray:
  """Counts the unknown tokens, and all tokens."""
  unknown = tokenizer.hf.unk_token_id
  # Some tokenizers name their end token as the unknown one, which they never need.
  if unknown is None or unknown in (tokenizer.bos_id, tokenizer.hf.eos_token_id, tokenizer.pad_id):
    return np.zeros(2, np.int64)
  count = sum(int(np.count_nonzero(np.asarray(ids) == unknown)) for ids in texts)
  return np.asarray([count, sum(map(len, texts))])


def _check_unknown(part: _Part, source: str, tokenizer: Tokenizer, config: DataConfig) -> None:
  """Refuses texts for which the tokenizer was not made, and tasks for which the model was not."""
  if not is_given(config):
    if part.unknown[0] or not sources.is_builtin(tokenizer.encode_text):
      raise DataError(
        "data.path is not given, and the built-in task, toy reviews, is for the model that its"
        " own stages train; give data.path=FILE or data.tfds=NAME, or leave out the model"
      )
    return
  _refuse_unknown(source, part.unknown)
  part.report["unknown_tokens"] = int(part.unknown[0])


def _refuse_unknown(name: str, counts: np.ndarray) -> None:
  unknown, tokens = counts
  if unknown > _MOST_UNKNOWN * tokens:
    raise DataError(
      f"{name}: {unknown / tokens:.0%} of the tokens are unknown to the tokenizer; without"
      " --model.path or --init_from it is that of the built-in task: give a model for these texts"
    )


def _require_rows(part: _Part, source: str, config: DataConfig) -> None:
  """Refuses a part without examples, with the counts of what was left out."""
  if part.examples:
    return
  lost = {name: count for name, count in part.report.items() if "dropped" in name}
  reasons = f" ({_summary(lost)})" if any(lost.values()) else ""
  fix = "raise the limits" if part.report["dropped_overlong"] else "give other rows"
  if not part.report["rows_read"]:
    fix = "the file is empty" if config.bad_rows == 0 else "give a file with rows"
  elif config.annotator:
    fix = "choose another data.annotator"
  raise DataError(f"{source}: no rows are left of {part.report['rows_read']} read{reasons}; {fix}")


def _fitting(
  answers: list[list[int]], ranks: list[float], max_length: int
) -> tuple[list[list[int]], list[float]]:
  """Returns the responses of a ranking that are short enough, their ranks counted from 0 again."""
  short = [
    (answer, rank) for answer, rank in zip(answers, ranks, strict=True) if len(answer) <= max_length
  ]
  levels = sorted({rank for _, rank in short})
  return [answer for answer, _ in short], [levels.index(rank) for _, rank in short]


def _arrays(
  kind: KindName, prompt: list[int], answers: list[list[int]], labels: list[float]
) -> Arrays:
  """Returns an example as `Dataset` holds it."""
  of_kind = KINDS[kind]
  names = of_kind.responses
  if names is None:
    names = tuple(f"response_{i}" for i in range(len(answers)))
  columns = {"prompt": prompt, **dict(zip(names, answers, strict=True))}
  example: dict[str, Any] = {name: np.asarray(ids, np.int32) for name, ids in columns.items()}
  if of_kind.label:
    example[of_kind.label] = np.asarray(labels, of_kind.label_dtype)
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


def _repeats(kind: KindName, examples: list[Arrays]) -> dict[str, int]:
  """Counts repeated examples, and pairs that are there with both labels."""
  seen: set[tuple[bytes, ...]] = set()
  counts = {"duplicates": 0, "flipped_pairs": 0}
  for example in examples:
    prompt, *rest = key = tuple(ids.tobytes() for ids in example.values())
    counts["duplicates"] += key in seen
    counts["flipped_pairs"] += KINDS[kind].flippable and (prompt, *reversed(rest)) in seen
    seen.add(key)
  return counts


def _check_lengths(parts: Sequence[_Part], config: DataConfig, source: str) -> None:
  """Refuses data of which most would be dropped: then a limit is wrong, not the rows."""
  lengths = np.concatenate([part.lengths for part in parts])
  dropped = sum(part.report["dropped_overlong"] for part in parts)
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
  fix = "raise the limits, or set data.overlong=truncate_prompt if the prompts are what is long"
  if config.overlong == "truncate_prompt":
    fix = "raise the limits: not even a part of the last turn fits beside the template"
    fix = fix if over[0] > over[1] else "raise the limits"
  raise DataError(
    f"{source}: {dropped} of {len(lengths)} examples are too long: {'; '.join(described)}; {fix}"
  )


def _summary(report: dict[str, int]) -> str:
  return ", ".join(f"{name} {count}" for name, count in sorted(report.items()) if count) or "none"


def _shape(kind: KindName, examples: list[Arrays]) -> tuple[int, int, int]:
  """Returns the `padded_length`, the `width` and the `scored` that all examples fit."""
  if not examples:
    return 0, 0, 0
  prompts, responses = _lengths(examples)
  length = KINDS[kind].longest(prompts, responses)
  padded = _round_up(length)
  longest = max((length for lengths in responses for length in lengths), default=0)
  return padded, max(map(len, responses)), min(padded, _round_up(longest))


def _lengths(examples: Sequence[Arrays]) -> tuple[list[int], list[list[int]]]:
  """Returns the lengths of the prompts, and of the responses of each example."""
  prompts = [len(example["prompt"]) for example in examples]
  return prompts, [[len(ids) for ids in responses_of(example)] for example in examples]


def _round_up(length: int) -> int:
  return -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def _finish(kind: KindName, part: _Part, shape: tuple[int, int, int]) -> Dataset:
  digest = hashlib.sha256(kind.encode())
  for example in part.examples:
    for ids in example.values():
      digest.update(
        len(ids).to_bytes(8, "little") + ids.astype(ids.dtype.newbyteorder("<")).tobytes()
      )
  return Dataset(
    kind,
    part.examples,
    part.rows,
    *shape,
    digest.hexdigest(),
    dict(part.report),
    tuple(sorted({name for row in part.rows for name in row} - {"prompt_text"})),
    tuple(sorted(part.unread)),
  )
