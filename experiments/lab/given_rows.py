"""Rows that a script reads without training on them, and their lines in the panel at the start."""

import dataclasses
import types
from typing import Any

from rlhf_jax import data, loop, reporting
from rlhf_jax.data import DataConfig
from . import evaluating


def read(
  session: loop.Session,
  kind: data.KindName,
  config: DataConfig,
  tokenizer: data.Tokenizer,
  checks: data.Checks = types.MappingProxyType({}),
) -> tuple[data.Dataset, data.Dataset]:
  """Reads the training and the held-out rows, from the tokens of an earlier run if it has any."""
  return data.load(kind, config, tokenizer, seed=session.seed, cache=session.tokens, checks=checks)


def show(
  title: str, config: DataConfig, train_set: data.Dataset, heldout: data.Dataset, **rows: object
) -> None:
  """Shows a panel with the source of the data, and what was left out or noticed."""
  named = {name.replace("_", " "): value for name, value in rows.items()}
  reporting.start_panel(title, named | data.describe(config, train_set, heldout))
  warn(config, train_set, heldout)


def warn(config: DataConfig, train_set: data.Dataset, heldout: data.Dataset) -> None:
  """Writes a warning if more than a tenth of the data was left out."""
  if warning := data.warning(config, train_set, heldout):
    reporting.note(warning)


def prompt_columns(prompts: data.Dataset) -> list[dict[str, Any]]:
  """Returns the columns of each prompt as they were given, which no template has rendered."""
  rows = [data.Row("row", dict(fields)).without(prompts.ignored) for fields in prompts.rows]
  return [data.prompt_columns(row) for row in rows]


def of_file(config: DataConfig, path: str, rows: int) -> DataConfig:
  """Returns the settings of another source, none of which is held out.

  Args:
    config: Sources and limits of a script.
    path: File of the source; empty is the built-in task.
    rows: Number of rows to use; see `DataConfig`.
  """
  return dataclasses.replace(
    config,
    path=path,
    tfds="",
    tfds_dir="",
    eval_path="",
    eval_fraction=0.0,
    eval_sets=(),
    rows=rows,
    split="eval",
  )


def demonstrations(
  session: loop.Session, config: DataConfig, path: str, tokenizer: data.Tokenizer
) -> list[data.Dataset]:
  """Reads demonstrations on which a loss is measured: of a file, or of the built-in task.

  Args:
    session: Seed of the built-in task, and the folder of tokens.
    config: Sources and limits of the prompts.
    path: File of demonstrations; without one, prompts of a file have none.
    tokenizer: Tokenizer of the model.

  Returns:
    One data set, or none.
  """
  if path:
    file = of_file(config, path, config.eval_rows)
    return [read(session, "demonstrations", file, tokenizer)[0]]
  if data.is_given(config):
    return []
  few = dataclasses.replace(config, rows=1)  # The held-out rows are another set.
  return [read(session, "demonstrations", few, tokenizer)[1]]


def prompts(
  session: loop.Session,
  title: str,
  config: DataConfig,
  tokenizer: data.Tokenizer,
  checks: data.Checks = types.MappingProxyType({}),
  *,
  limit: int = 0,
  every: bool = False,
  **rows: object,
) -> data.Dataset:
  """Reads the prompts to answer and shows them in a panel.

  Args:
    session: Seed of the built-in task, and the folder of tokens.
    title: Title of the panel.
    config: Sources and limits. Without held-out rows, the first `eval_rows` rows are taken.
    tokenizer: Tokenizer of the model.
    checks: Further checks of the rows; see `data.load`.
    limit: Maximum number of prompts, each of which is then taken once; 0 takes all held-out rows.
    every: True to hold out nothing of a file, and to take each of its prompts once.
    **rows: Further rows of the panel.
  """
  if every and data.is_given(config) and not config.eval_path:
    config = dataclasses.replace(config, eval_fraction=0.0)
  train_set, heldout = read(session, "prompts", config, tokenizer, checks)
  chosen = source = heldout if heldout.examples else train_set
  if limit or every:
    chosen = evaluating.as_prompts(source, limit or len(source.rows))
  elif source is train_set:
    most = config.eval_rows
    chosen = source._replace(examples=source.examples[:most], rows=source.rows[:most])
  different = evaluating.as_prompts(source, len(source.rows))
  answered = f"{len(chosen.examples)} of {len(different.examples)} different prompts"
  if chosen is heldout and data.is_given(config) and not config.eval_path:
    answered = (
      f"{len(chosen.examples)} held-out prompts; the other {len(train_set.examples)} are for"
      f" training, and data.eval_fraction=0 takes all, up to data.eval_rows={config.eval_rows}"
    )
  show(title, config, train_set, heldout, **rows, answered=answered)
  return chosen
