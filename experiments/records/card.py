"""Model card: the README.md of an exported folder, with the front matter of model hubs.

Paths, names and settings are untrusted: in the front matter they are reduced to plain names, and in
the text they are in code spans that they cannot end.
"""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax import data, flags, hub, reporting, writers
from rlhf_jax import workdir as workdir_lib
from ..lab import scripts
from .record import (
  SOURCES,
  Record,
  list_in,
  mapping_in,
  metric_texts,
  numbers,
  read,
  read_json,
  source_name,
)

PREFERENCE = "preference"  # Label of the scalar of a preference model in its config.json.


def write_card(
  run_folder: pathlib.Path,
  export: pathlib.Path,
  tokenizer: data.Tokenizer,
  summary: Mapping[str, Any],
) -> None:
  """Writes the README.md of an exported folder.

  Args:
    run_folder: Workdir of the run, which has written `run.json`.
    export: The exported folder.
    tokenizer: Tokenizer that has been saved into it.
    summary: Content of summary.json.
  """
  config = read_json(export / "config.json")
  replayable = (run_folder / "flags").exists()
  final = numbers(writers.json_ready(summary))
  record = read(run_folder) | {"path": run_folder.name, "summary": final}
  text = card(record, config, tokenizer, replayable=replayable)
  workdir_lib.atomic_write(export / "README.md", text)


def card(
  record: Record,
  config: Mapping[str, Any],
  tokenizer: data.Tokenizer,
  *,
  replayable: bool = True,
) -> str:
  """Renders the card of a model.

  Args:
    record: Record of the run that trained the model.
    config: Content of the model's config.json.
    tokenizer: Tokenizer of the model.
    replayable: False if the run has no file of its flags.
  """
  is_policy = not any(str(a).endswith("Classification") for a in config.get("architectures", ()))
  is_pairwise = not is_policy and scalar_name(config) == PREFERENCE
  kind = "Language" if is_policy else "Preference" if is_pairwise else "Reward"
  script = str(record.get("script", ""))
  software_of = mapping_in(record, "software")
  lines = [
    *_front_matter(record, script, is_policy),
    f"# {kind} model from `{_module(record)}`",
    "",
    f"- method: {span(record.get('method') or script)}",
    f"- architecture: {span(config.get('model_type', '?'))},"
    f" {_count(config, 'num_hidden_layers', 'n_layer')} layers, width"
    f" {_count(config, 'hidden_size', 'n_embd')}, vocabulary {_count(config, 'vocab_size')}",
    f"- made with: rlhf_jax {span(software_of.get('rlhf_jax', '?'))}",
    "",
    "## Use",
    "",
    *_usage(config, tokenizer, is_policy, is_pairwise),
    "",
    "## Final metrics, on held-out rows",
    "",
    *_metric_table(record),
    "",
    "## Data",
    "",
    *_data(record),
    "",
    "## Settings",
    "",
    *_settings(record, replayable),
    "",
    "## Lineage",
    "",
    *_lineage(record),
    "",
  ]
  return "\n".join(lines)


def scalar_name(config: Mapping[str, Any]) -> str:
  """Returns the name of a model's scalar in its config.json; empty without a scalar."""
  return str(mapping_in(config, "id2label").get("0", ""))


def plain(text: Any) -> str:
  """Replaces all but letters, digits, dots, dashes and underscores by dashes."""
  return re.sub(r"[^A-Za-z0-9._-]+", "-", str(text)).strip("-._") or "unnamed"


def span(text: Any) -> str:
  """Formats text as an inline code span, which it cannot end."""
  text = reporting.escape(str(text)) or "(empty)"
  ticks = max(map(len, re.findall("`+", text)), default=0)
  fence = "`" * (ticks + 1)
  padding = " " if not text.strip() or "`" in (text[0], text[-1]) else ""
  return f"{fence}{padding}{text}{padding}{fence}"


def block(lines: Sequence[str], language: str = "text") -> list[str]:
  """Formats lines as a fenced block, which they cannot end."""
  lines = [reporting.escape(line) for line in lines]
  ticks = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
  fence = "`" * max(ticks + 1, 3)
  return [fence + language, *lines, fence]


def _front_matter(record: Record, script: str, is_policy: bool) -> list[str]:
  fields: dict[str, Any] = {
    "library_name": "transformers",
    "pipeline_tag": "text-generation" if is_policy else "text-classification",
    "tags": ["rlhf", "jax", "rlhf_jax", plain(script).replace("_", "-")],
  }
  base = base_model(record)
  if base:
    fields |= {"base_model": [base], "base_model_relation": "finetune"}
  source = source_name(record)
  if source != "the built-in task":
    fields["datasets"] = [plain(pathlib.PurePath(source).name)]
  # JSON is YAML; all texts in it are plain names.
  return ["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---", ""]


def base_model(record: Mapping[str, Any]) -> str:
  """Name of the pretrained model at the start of the chain; empty if it started from scratch."""
  sources = [s for s in list_in(record, "sources") if s.get("role") == SOURCES["init_from"]]
  if sources:
    return base_model(sources[0])
  if not record.get("pretrained"):
    return ""
  path = pathlib.PurePath(str(record["path"]))
  if hub.is_name(str(record["path"])):
    return hub.parse(str(record["path"])).repo
  for part in path.parts:  # The cache of the hub: models--OWNER--NAME/snapshots/...
    if match := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part, re.ASCII):
      return f"{match[1]}/{match[2]}"
  return plain(path.name)


def _count(config: Mapping[str, Any], *names: str) -> str:
  counts = (config[name] for name in names if isinstance(config.get(name), int))
  return str(next(counts, "?"))


def _usage(
  config: Mapping[str, Any], tokenizer: data.Tokenizer, is_policy: bool, is_pairwise: bool
) -> list[str]:
  flag = "init_from" if is_policy else "preference.path" if is_pairwise else "reward.path"
  lines = [f"The scripts of rlhf_jax take this folder as `--{flag}=FOLDER`."]
  if is_pairwise:
    return lines  # It reads two responses at once, in a format that a line of code cannot make.
  if is_policy:
    name = "AutoModelForCausalLM"
    last = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"
  else:
    name, last = "AutoModelForSequenceClassification", "print(model(**inputs).logits[0, 0])"
  code = [
    f"from transformers import {name}, AutoTokenizer",
    "",
    'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    f'model = {name}.from_pretrained("FOLDER")',
    *_text(tokenizer, is_policy),
    "inputs = tokenizer(",
    f"  text, add_special_tokens={not tokenizer.has_chat_template},"
    ' return_tensors="pt", return_token_type_ids=False',
    ")",
    last,
  ]
  lines += ["With transformers:", "", *block(code, "python")]
  if not is_policy:
    lines += [
      "",
      "These scores lack the tensor `score.bias` of the weights, which transformers does not read."
      " Add it for the scores of training; it is the same for all responses.",
    ]
    if config.get("pad_token_id") is None:
      lines += [
        "",
        "Give it one text at a time. Its config has no `pad_token_id`, because the token that pads"
        " also ends responses: transformers would then read the score one token before the end.",
      ]
  return lines


def _text(tokenizer: data.Tokenizer, is_policy: bool) -> list[str]:
  """Returns lines of code that make the `text` which a model has learnt to read."""
  end = str(tokenizer.hf.convert_ids_to_tokens(tokenizer.eos_id))
  if not tokenizer.has_chat_template:
    return ['text = "PROMPT"' if is_policy else f"text = {'PROMPT RESPONSE' + end!r}"]
  options = "tokenize=False, add_generation_prompt=True"
  if args := tokenizer.hf.init_kwargs.get("template_args"):
    options += f", **{args!r}"
  lines = [
    'chat = [{"role": "user", "content": "PROMPT"}]',
    f"text = tokenizer.apply_chat_template(chat, {options})",
  ]
  return lines if is_policy else [*lines, f"text += {tokenizer.lead + 'RESPONSE' + end!r}"]


def _metric_table(record: Mapping[str, Any]) -> list[str]:
  shown = metric_texts(numbers(mapping_in(record, "summary")))
  if not shown:
    return ["None: the run held out no rows."]
  # Names of metrics are ours, but for that of a reward function.
  names = {re.sub(r"[^\w/@.-]", "-", name): text for name, text in shown.items()}
  lines = [
    "| metric | value (95 % interval) |",
    "|---|---|",
    *(f"| `{name}` | {text} |" for name, text in names.items()),
  ]
  if "kl" in names:
    lines += [
      "",
      "`kl` is the distance from the start of the run, in nats per response. `before` means that"
      " start, and a `win_rate` is against it.",
    ]
  return lines


def _data(record: Mapping[str, Any]) -> list[str]:
  lines = [f"- source: {span(source_name(record))}"]
  parts = mapping_in(record, "data")
  for name in ("training", "held out"):
    part = mapping_in(parts, name)
    if not part:
      continue
    columns = ", ".join(span(column) for column in list_in(part, "columns", str))
    counts = ", ".join(span(f"{k} {v}") for k, v in mapping_in(part, "counts").items())
    lines += [
      f"- {name}: {span(part.get('examples'))} examples of the kind {span(part.get('kind'))}",
      f"  - columns: {columns or 'none'}",
      f"  - counts: {counts or 'none'}",
      f"  - SHA-256 of the token ids: {span(part.get('digest'))}",
    ]
  return lines


def _module(record: Mapping[str, Any]) -> str:
  """The name by which `python -m` runs the script of a run."""
  return plain(record.get("module") or scripts.module_name(record.get("script", "")))


def _settings(record: Mapping[str, Any], replayable: bool) -> list[str]:
  changed = {"seed": record.get("seed", 0), **mapping_in(record, "changed")}
  lines = [
    "The flags that differ from their defaults:",
    "",
    *block([flags.as_line(name, value) for name, value in changed.items()]),
  ]
  if replayable:
    lines += [
      "",
      "`flags` in the folder of the run has all of them, and repeats it:",
      "",
      *block([f"python -m {_module(record)} --flagfile=RUN/flags --workdir=NEW"], "bash"),
    ]
  software_of = mapping_in(record, "software")
  if software_of:
    versions = ", ".join(span(f"{name} {value}") for name, value in software_of.items())
    lines += ["", f"Run with {versions}."]
  return lines


def _lineage(record: Mapping[str, Any], indent: str = "") -> list[str]:
  """Renders a run and, indented below it, the runs that it builds on."""
  role = f"{record['role']}: " if record.get("role") in SOURCES.values() else ""
  script = f" ({span(record['script'])})" if record.get("script") else ""
  lines = [f"{indent}- {role}{span(record.get('path', '?'))}{script}"]
  texts = metric_texts(numbers(mapping_in(record, "summary")))
  if texts and role:
    first = list(texts.items())[:6]
    lines.append(f"{indent}  - " + ", ".join(f"{span(name)} {text}" for name, text in first))
  digest = mapping_in(record, "digests").get("data")
  if digest and role:
    lines.append(f"{indent}  - data: {span(source_name(record))}, {span(str(digest)[:16])}")
  for source in list_in(record, "sources"):
    lines += _lineage(source, indent + "  ")
  return lines
