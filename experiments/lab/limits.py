"""Longest sequence that a model was made for."""

import contextlib
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from rlhf_jax import data, flags
from rlhf_jax.models import ModelConfig, hf, presets
from .. import records
from . import models


class Length(NamedTuple):
  """Length of the longest sequence, as it is and as it is padded, and the flags that limit it."""

  real: int
  padded: int
  flags: str


def require_length(
  config: Any,
  folder: pathlib.Path | None,
  read: Iterable[data.Dataset] = (),
  answered: Iterable[data.Dataset] = (),
) -> None:
  """Refuses sequences beyond the positions of a model, before anything is loaded or compiled.

  Args:
    config: Config with `model` and `data`, and with `sampling` if prompts are answered.
    folder: Folder of the model; None is a new one.
    read: Data sets that the model reads.
    answered: Data sets whose prompts it answers; judges and a teacher in the config read the
      answers.
  """
  given = [length for dataset in read for length in _read(config, dataset)]
  sampled = [length for dataset in answered for length in _answered(config, dataset)]
  require(config, folder, [*given, *sampled])
  judged = [length for length in sampled if length.real]  # Judges read no packed rows.
  reward = getattr(getattr(config, "reward", None), "paths", ())
  preference = getattr(getattr(config, "preference", None), "path", "")
  for path in (*reward, preference, getattr(config, "teacher", "")):
    if path and judged:
      with contextlib.suppress(hf.ModelFolderError):  # Whoever opens a judge says what is wrong.
        judge = models.finished_folder(path)
        lengths = list(judged)
        if hf.scalar_label(judge) == records.PREFERENCE:
          lengths += [_with_another(config, length) for length in judged]
        try:
          require(config, judge, lengths)
        except flags.UsageError:
          if not _reads_other_tokens(config, judge, folder):
            raise


def _reads_other_tokens(config: Any, judge: pathlib.Path, policy: pathlib.Path | None) -> bool:
  """Returns whether a judge has a tokenizer of its own, so that it counts other tokens."""
  if not (judge / "tokenizer.json").exists():
    return False
  tokenizer = models.open_tokenizer(policy, config.data)
  return not models.reads_tokens_of(str(judge), tokenizer)


def _with_another(config: Any, length: Length) -> Length:
  """Returns the length of a prompt with two sampled responses, each with an end token behind it."""
  more = config.sampling.max_new_tokens + 2
  return length._replace(real=length.real + more, padded=length.padded + more)


def require(config: Any, folder: pathlib.Path | None, lengths: Iterable[Length]) -> None:
  """Refuses sequences beyond the positions of a model.

  Args:
    config: Config with `model`.
    folder: Folder of the model; None is a new one.
    lengths: Lengths of the sequences.
  """
  made_for = _architecture(config.model, folder)
  is_learned = made_for.positions == "learned"
  if config.model.extrapolate and not is_learned:
    return
  for length in lengths:
    tokens = length.padded if is_learned else length.real
    if tokens <= made_for.max_length:
      continue
    rest = ", or set --model.extrapolate: rotary positions go on, but answers mostly get worse"
    if is_learned:
      rest = "; its positions are learned, and there are none beyond"
    raise flags.UsageError(
      f"{folder or 'the model'} was made for {made_for.max_length} tokens (its"
      f" max_position_embeddings), and the longest sequence has {tokens}; lower"
      f" {length.flags}{rest}"
    )


def _architecture(options: models.ModelOptions, folder: pathlib.Path | None) -> ModelConfig:
  if folder is not None:
    return hf.parse_config(folder)[0]
  if options.preset:
    return presets.PRESETS[options.preset]
  return ModelConfig(vocab_size=1, width=2, layers=1, heads=1, kv_heads=1, head_dim=2, mlp_width=1)


def _prompts(dataset: data.Dataset) -> list[int]:
  return [len(example["prompt"]) for example in dataset.examples]


def _read(config: Any, dataset: data.Dataset) -> list[Length]:
  if not dataset.examples or dataset.kind == "prompts":
    return []
  responses = [[len(ids) for ids in data.responses_of(example)] for example in dataset.examples]
  longest = data.KINDS[dataset.kind].longest(_prompts(dataset), responses)
  names = "--data.max_prompt_length or --data.max_response_length"
  lengths = [Length(longest, dataset.padded_length, names)]
  if config.data.packed_length:
    lengths.append(Length(0, config.data.packed_length, "--data.packed_length"))
  return lengths


def _answered(config: Any, dataset: data.Dataset) -> list[Length]:
  if not dataset.examples or not hasattr(config, "sampling"):
    return []
  longest, new = max(_prompts(dataset)), config.sampling.max_new_tokens
  padded = dataset.padded_length if dataset.kind == "prompts" else longest
  names = "--sampling.max_new_tokens or --data.max_prompt_length"
  lengths = [Length(longest + new, padded + new, names)]
  if packed := getattr(getattr(config, "rollout", None), "packed_length", 0):
    lengths.append(Length(0, packed, "--rollout.packed_length"))
  return lengths
