"""What a run says about itself: `run.json`, where it comes from, and the card of its model.

`run.json` is written when a run starts: script, seed, settings, data, software, and under `sources`
the same of every run that it builds on, with its final figures. It is a copy, so it stays true
when these runs are moved or deleted.

The card is the README.md of an exported folder, with the front matter that model hubs read. Paths,
names and settings come from outside: in the front matter they are reduced to plain names, in the
text they stand in code spans that they cannot end.
"""

import importlib.metadata
import json
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rlhf_jax import data, flags, loop, processes, reporting, writers
from rlhf_jax import workdir as workdir_lib

RECORD = "run.json"
# Flags that name what a run builds on.
SOURCES = {
  "init_from": "started from",
  "start": "started from",
  "model.path": "started from",
  "reward.path": "reward model",
  "preference.path": "judge",
  "opponent": "opponent",
}
_DEEPEST = 16  # A longer chain of runs is cut off.
# What the scripts train, and what people who look for it call the method.
_METHODS = {
  "sft": "supervised fine-tuning",
  "reward_model": "reward modelling (Bradley and Terry)",
  "preference_model": "preference modelling of pairs of responses",
  "dpo": "direct preference optimisation",
  "kto": "KTO",
  "ppo": "reinforcement learning from a reward (PPO and relatives)",
  "nash_md": "Nash-MD",
  "online_dpo": "online DPO",
  "rest": "ReST",
  "improve": "an Improve step of ReST",
}

Record = dict[str, Any]


def identify(
  run: loop.Run,
  script: str,
  config: Any,
  tokenizer: data.Tokenizer,
  train_set: data.Dataset,
  heldout: data.Dataset | None = None,
  *,
  more: Mapping[str, Any] | None = None,
  **digests: str,
) -> None:
  """Refuses a workdir that holds another run, and writes `run.json`.

  Args:
    run: The run being opened or continued.
    script: Its name.
    config: Of the script.
    tokenizer: Of the model.
    train_set: What is learnt from.
    heldout: What is measured on.
    more: Settings that the config does not have.
    **digests: Fingerprints of what else the config only points to.
  """
  settings = flags.to_dict(config) | dict(more or {})
  digests = {"data": train_set.digest, "tokenizer": tokenizer.digest, **digests}
  loop.identify(run, script, settings, **digests)
  if not processes.is_first():
    return
  flat = flags.flatten(settings)
  record = {
    "script": script,
    "seed": run.session.seed,
    "settings": flat,
    "changed": flags.changed(config) | dict(more or {}),
    "digests": digests,
    "data": {"training": facts(train_set), "held out": facts(heldout) if heldout else {}},
    "software": software(run.mesh),
    "sources": sources_of(flat),
  }
  workdir_lib.atomic_write(run.workdir / RECORD, json.dumps(record, indent=2) + "\n")


def facts(dataset: data.Dataset) -> Record:
  """What can be said of a data set without showing it."""
  columns = sorted({str(name) for row in dataset.rows for name in row} - {"prompt_text"})
  counts = {name: count for name, count in dataset.report.items() if count}
  return {
    "kind": dataset.kind,
    "examples": len(dataset.examples),
    "digest": dataset.digest,
    "columns": columns,
    "counts": counts,
  }


def software(mesh: jax.sharding.Mesh) -> dict[str, str]:
  """Versions and devices."""
  try:
    version = importlib.metadata.version("rlhf_jax")
  except importlib.metadata.PackageNotFoundError:  # Run from its source alone.
    version = "unknown"
  return {
    "rlhf_jax": version,
    "jax": jax.__version__,
    "python": platform.python_version(),
    "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
  }


def read(path: str | pathlib.Path, depth: int = 0) -> Record:
  """The record of a run, with its `path` and its final figures as `summary`.

  Of a Hugging Face folder, of a folder that is gone and of one that no script of ours wrote there
  is just the path.
  """
  folder = workdir_lib.local_path(path)
  if folder.name == "export" and (folder.parent / "identity.json").exists():
    folder = folder.parent
  record = _read_json(folder / RECORD)
  if not record:
    # A run that was stopped before it wrote one, or an older one.
    record = _read_json(folder / "identity.json")
    settings = record.get("settings")
    record["settings"] = flags.flatten(settings) if isinstance(settings, dict) else {}
    record["digests"] = {k: v for k, v in record.items() if k in ("data", "tokenizer", "frozen")}
    record["data"] = {}
    if not record.get("script") and (folder / "config.json").exists():
      record["pretrained"] = True
    record["sources"] = sources_of(record["settings"], depth)
  summary = numbers(_read_json(folder / "summary.json"))
  return _tidy(record | {"path": str(path), "summary": summary})


def sources_of(settings: Mapping[str, Any], depth: int = 0) -> list[Record]:
  """The records of the runs that the settings of a run name, each with its `role`."""
  if depth > _DEEPEST:
    return []
  found = []
  for flag, role in SOURCES.items():
    given = settings.get(flag)
    for path in given.split(",") if isinstance(given, str) else ():
      if path and "://" not in path:
        record = read(path, depth + 1)
        record.pop("settings", None)  # `changed` says what is worth saying.
        found.append(record | {"role": role})
  return found


def numbers(summary: Mapping[str, Any]) -> dict[str, float]:
  """The figures of a summary."""
  return {
    name: value
    for name, value in summary.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
  }


def figures(summary: Mapping[str, float]) -> dict[str, str]:
  """Figures as text, each with the interval that its `_low` and `_high` give."""
  shown = {}
  for name, value in summary.items():
    base = re.sub(r"_(low|high)$", "", name)
    if base != name and base in summary:
      continue
    shown[name] = str(value) if isinstance(value, int) else f"{value:.4g}"
    if {f"{name}_low", f"{name}_high"} <= summary.keys():
      shown[name] += f" ({summary[f'{name}_low']:.4g} to {summary[f'{name}_high']:.4g})"
  return shown


def source_name(record: Mapping[str, Any]) -> str:
  """Where the rows of a run are from."""
  settings = {**_mapping(record, "changed"), **_mapping(record, "settings")}
  return str(settings.get("data.path") or settings.get("data.tfds") or "") or "the built-in task"


def write_card(run_folder: pathlib.Path, export: pathlib.Path, summary: Mapping[str, Any]) -> None:
  """Writes the README.md of an exported folder.

  Args:
    run_folder: Workdir of its run, which has written `run.json`.
    export: The folder.
    summary: What summary.json will hold.
  """
  config = _read_json(export / "config.json")
  replayable = (run_folder / "flags").exists()
  final = numbers(writers.json_ready(summary))
  record = read(run_folder) | {"path": run_folder.name, "summary": final}
  workdir_lib.atomic_write(export / "README.md", card(record, config, replayable=replayable))


def card(record: Record, config: Mapping[str, Any], *, replayable: bool = True) -> str:
  """The card of a model.

  Args:
    record: Of its run.
    config: Its config.json.
    replayable: Whether the run has a file of its flags.
  """
  is_policy = not any(str(a).endswith("Classification") for a in config.get("architectures", ()))
  script = str(record.get("script", ""))
  kind = {"reward_model": "Reward model", "preference_model": "Preference model"}
  software_of = _mapping(record, "software")
  lines = [
    *_front_matter(record, script, is_policy),
    f"# {kind.get(script, 'Language model')} from `experiments.{plain(script)}`",
    "",
    f"- method: {_METHODS.get(script, span(script))}",
    f"- architecture: {span(config.get('model_type', '?'))},"
    f" {_count(config, 'num_hidden_layers', 'n_layer')} layers, width"
    f" {_count(config, 'hidden_size', 'n_embd')}, vocabulary {_count(config, 'vocab_size')}",
    f"- made with: rlhf_jax {span(software_of.get('rlhf_jax', '?'))}",
    "",
    "## Use",
    "",
    *_usage(is_policy, script),
    "",
    "## Final figures, on held-out rows",
    "",
    *_figure_table(record),
    "",
    "## Data",
    "",
    *_data_list(record),
    "",
    "## Settings",
    "",
    *_settings(record, script, replayable),
    "",
    "## Lineage",
    "",
    *_lineage(record),
    "",
  ]
  return "\n".join(lines)


def plain(text: Any) -> str:
  """A name of letters, digits, dots, dashes and underscores; everything else becomes a dash."""
  return re.sub(r"[^A-Za-z0-9._-]+", "-", str(text)).strip("-._") or "unnamed"


def span(text: Any) -> str:
  """Text as an inline code span, which it cannot end."""
  text = reporting.escape(str(text)) or "(empty)"
  ticks = max(map(len, re.findall("`+", text)), default=0)
  fence = "`" * (ticks + 1)
  padding = " " if not text.strip() or "`" in (text[0], text[-1]) else ""
  return f"{fence}{padding}{text}{padding}{fence}"


def block(lines: Sequence[str], language: str = "text") -> list[str]:
  """Lines as a fenced block, which they cannot end."""
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
  """Name of the pretrained model at the start of the chain; empty if all began at random."""
  sources = [s for s in _list(record, "sources") if s.get("role") == SOURCES["init_from"]]
  if sources:
    return base_model(sources[0])
  if not record.get("pretrained"):
    return ""
  path = pathlib.PurePath(str(record["path"]))
  for part in path.parts:  # The cache of the hub: models--OWNER--NAME/snapshots/...
    if match := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part, re.ASCII):
      return f"{match[1]}/{match[2]}"
  return plain(path.name)


def _count(config: Mapping[str, Any], *names: str) -> str:
  found = next((config[name] for name in names if isinstance(config.get(name), int)), "?")
  return str(found)


def _usage(is_policy: bool, script: str) -> list[str]:
  ours = {"reward_model": "--reward.path", "preference_model": "--preference.path"}
  flag = ours.get(script, "--init_from")
  lines = [f"The scripts of rlhf_jax take this folder as `{flag}=FOLDER`."]
  if script == "preference_model":
    return lines  # It reads two responses at once, in a format that a line of code cannot make.
  if is_policy:
    name, text = "AutoModelForCausalLM", '"PROMPT"'
    last = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"
  else:
    name, text = "AutoModelForSequenceClassification", '"PROMPT RESPONSE" + tokenizer.eos_token'
    last = "print(model(**inputs).logits[0, 0])"
  code = [
    f"from transformers import {name}, AutoTokenizer",
    "",
    'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    f'model = {name}.from_pretrained("FOLDER")',
    f'inputs = tokenizer({text}, return_tensors="pt", return_token_type_ids=False)',
    last,
  ]
  return [*lines, "With transformers:", "", *block(code, "python")]


def _figure_table(record: Mapping[str, Any]) -> list[str]:
  shown = figures(numbers(_mapping(record, "summary")))
  if not shown:
    return ["None: the run held out no rows."]
  # Names of metrics are ours, but for that of a reward function.
  names = {re.sub(r"[^\w/@.-]", "-", name): text for name, text in shown.items()}
  lines = [
    "| figure | value (95 % interval) |",
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


def _data_list(record: Mapping[str, Any]) -> list[str]:
  lines = [f"- source: {span(source_name(record))}"]
  parts = _mapping(record, "data")
  for name in ("training", "held out"):
    part = _mapping(parts, name)
    if not part:
      continue
    columns = ", ".join(span(column) for column in _list(part, "columns", str))
    counts = ", ".join(span(f"{k} {v}") for k, v in _mapping(part, "counts").items())
    lines += [
      f"- {name}: {span(part.get('examples'))} examples of the kind {span(part.get('kind'))}",
      f"  - columns: {columns or 'none'}",
      f"  - counts: {counts or 'none'}",
      f"  - SHA-256 of the token ids: {span(part.get('digest'))}",
    ]
  return lines


def _settings(record: Mapping[str, Any], script: str, replayable: bool) -> list[str]:
  changed = {"seed": record.get("seed", 0), **_mapping(record, "changed")}
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
      *block([f"python -m experiments.{plain(script)} --flagfile=RUN/flags --workdir=NEW"], "bash"),
    ]
  software_of = _mapping(record, "software")
  if software_of:
    told = ", ".join(span(f"{name} {value}") for name, value in software_of.items())
    lines += ["", f"Run with {told}."]
  return lines


def _lineage(record: Mapping[str, Any], indent: str = "") -> list[str]:
  """The run and, under it, what it builds on."""
  role = f"{record['role']}: " if record.get("role") in SOURCES.values() else ""
  script = f" ({span(record['script'])})" if record.get("script") else ""
  lines = [f"{indent}- {role}{span(record.get('path', '?'))}{script}"]
  told = figures(numbers(_mapping(record, "summary")))
  if told and role:
    some = list(told.items())[:6]
    lines.append(f"{indent}  - " + ", ".join(f"{span(name)} {text}" for name, text in some))
  digest = _mapping(record, "digests").get("data")
  if digest and role:
    lines.append(f"{indent}  - data: {span(source_name(record))}, {span(str(digest)[:16])}")
  for source in _list(record, "sources"):
    lines += _lineage(source, indent + "  ")
  return lines


def _read_json(path: pathlib.Path) -> Record:
  """The object in a file; an empty one if there is none."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}


def _tidy(record: Record) -> Record:
  """A record whose parts are there and of their types, whatever a file held."""
  parts = ("settings", "changed", "digests", "data", "software", "summary")
  tidy: Record = {name: str(record.get(name, "")) for name in ("path", "script", "role")}
  tidy |= {name: _mapping(record, name) for name in parts}
  tidy["digests"] = {name: str(value) for name, value in tidy["digests"].items()}
  tidy["data"] = {name: of for name, of in tidy["data"].items() if isinstance(of, dict)}
  tidy["summary"] = numbers(tidy["summary"])
  tidy["sources"] = [_tidy(source) for source in _list(record, "sources")]
  return tidy | {name: record[name] for name in ("seed", "pretrained") if name in record}


def _mapping(record: Mapping[str, Any], name: str) -> dict[str, Any]:
  value = record.get(name)
  return value if isinstance(value, dict) else {}


def _list(record: Mapping[str, Any], name: str, kind: type = dict) -> list[Any]:
  value = record.get(name)
  return [item for item in value if isinstance(item, kind)] if isinstance(value, list) else []
