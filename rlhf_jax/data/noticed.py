"""Lines about a data set for the start of a run: its source, and what was left out or noticed."""

from collections.abc import Callable

from rlhf_jax.data.datasets import DataConfig, is_given
from rlhf_jax.data.kinds import Dataset

# A larger share of lost examples is worth a warning.
_MUCH = 0.1
_UNITS = {
  "demonstrations": "demonstrations",
  "preferences": "pairs",
  "comparisons": "comparisons",
  "rankings": "rankings",
  "unpaired": "responses",
  "prompts": "prompts",
}
# Counts of the report, in words.
_LEFT_OUT = {
  "bad_rows": "unusable",
  "dropped_overlong": "too long",
  "dropped_overlong_responses": "too long responses of rankings",
  "dropped_empty": "with an empty response or none",
  "dropped_different_prompts": "with different prompts on the two sides",
  "dropped_single_responses": "with a single response to compare",
  "dropped_identical_pairs": "with two equal responses",
  "dropped_ties": "ties",
  "dropped_not_judged": "not judged",
  "dropped_undesirable": "with the label false or 0 (data.ignore=label learns them)",
}
_NOTICED: dict[str, Callable[[int], str]] = {
  "duplicates": lambda n: f"{n} repeated",
  "flipped_pairs": lambda n: f"{n} pairs in both orders, A over B and B over A",
  "truncated_prompts": lambda n: f"{n} prompts cut to data.max_prompt_length",
  "truncated_turns": lambda n: f"{n} oldest turns left out of them",
  "spelled_markers": lambda n: f"{n} rows that spell markers of a chat, read as plain text",
  "joined_words": lambda n: f"{n} rows whose response follows the prompt without a space",
  "unopened": lambda n: f"{n} rows learnt inside the <think> that the template opens",
  "repeated_prompts": lambda n: f"{n} rows whose answers repeat the prompt",
  "unknown_tokens": lambda n: f"{n} tokens unknown to the tokenizer",
  "eval_prompts_in_train": lambda n: f"{n} held-out rows with a prompt of the training set",
  "split_by_rows": lambda n: "all rows have one prompt, so rows are held out instead of prompts",
  "nothing_to_hold_out": lambda n: "all rows are the same, so none is held out",
}


def describe(config: DataConfig, train: Dataset, heldout: Dataset) -> dict[str, str]:
  """Returns titled lines for the panel at the start of a run.

  Args:
    config: Sources and limits.
    train: Training set.
    heldout: Held-out set.
  """
  lines = {
    "data": _contents(config, train, heldout),
    "left out": _left_out(config, train, heldout) or "nothing",
  }
  if train.mixture:
    lines["mixture"] = ", ".join(
      f"{share.weight:.0%} from {share.examples} of {share.name}" for share in train.mixture
    )
  if noticed := _noticed(config, train, heldout):
    lines["noticed"] = noticed
  return lines


def warning(config: DataConfig, train: Dataset, heldout: Dataset) -> str:
  """Returns a warning if more than a tenth of the examples were left out; empty otherwise."""
  lost, kept = (_sum(names, train, heldout) for names in (_unwanted(), ("kept",)))
  if lost <= _MUCH * (lost + kept):
    return ""
  share = lost / (lost + kept)
  return f"warning: {share:.0%} of the data is left out: {_left_out(config, train, heldout)}"


def _unwanted() -> tuple[str, ...]:
  # Those of other annotators were left out by a flag, and responses are parts of examples.
  expected = ("dropped_not_judged", "dropped_overlong_responses")
  return tuple(name for name in _LEFT_OUT if name not in expected)


def _sum(names: tuple[str, ...], *datasets: Dataset) -> int:
  return sum(dataset.report.get(name, 0) for dataset in datasets for name in names)


def _contents(config: DataConfig, train: Dataset, heldout: Dataset) -> str:
  source = config.path or (f"tfds:{config.tfds}" if config.tfds else "")
  unit = _UNITS[train.kind] + (f" of {train.width} responses" if train.kind == "rankings" else "")
  if source and config.rows and _sum(("rows_read",), train) >= config.rows:
    unit += f" of the first rows (data.rows={config.rows})"
  held = f"{len(heldout.examples)} held out"
  if config.eval_path:
    held += f" from {config.eval_path}"
  if source and _sum(("rows_read",), heldout) >= config.eval_rows:
    held += f", no more by data.eval_rows={config.eval_rows}"
  held += "".join(f", {len(of.examples)} of {name}" for name, of in heldout.named.items())
  source = source or "built-in task, toy reviews"
  return f"{source}: {len(train.examples)} {unit}, {held}"


def _left_out(config: DataConfig, train: Dataset, heldout: Dataset) -> str:
  counts = {text: _sum((name,), train, heldout) for name, text in _LEFT_OUT.items()}
  counts = {text: count for text, count in counts.items() if count}
  if not counts:
    return ""
  limits = ""
  if any("too long" in text for text in counts):
    limits = (
      f" (data.max_prompt_length={config.max_prompt_length},"
      f" data.max_response_length={config.max_response_length})"
    )
  return ", ".join(f"{count} {text}" for text, count in counts.items()) + limits


def _noticed(config: DataConfig, train: Dataset, heldout: Dataset) -> str:
  parts = [
    words(count)
    for name, words in _NOTICED.items()
    if (count := _sum((name,), train, heldout)) and is_given(config)
  ]
  labels = {int(label) for e in train.examples for label in e.get("desirable", ())}
  if len(labels) == 1:
    parts.append(f"all labels are {'true' if labels == {1} else 'false'}")
  columns = sorted({*train.unread, *heldout.unread})
  if columns and is_given(config):
    shown = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
    use = ", but by rewards that name them" if train.kind == "prompts" else ""
    parts.append(f"columns that are not read{use}: {shown}")
  return "; ".join(parts)
