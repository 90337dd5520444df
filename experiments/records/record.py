"""Record of a run, `run.json`: its settings, the runs that it builds on, and their final metrics.

It is written when a run starts, with script, seed, settings, data and software. `sources` has the
records of the runs that it builds on, with their final metrics. They are copies, so they stay valid
when these runs are moved or deleted.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import platform
import re
import sys
import types
from collections.abc import Mapping
from typing import Any

import jax

from rlhf_jax import bucket, data, flags, hub, loop, processes, user
from rlhf_jax import workdir as workdir_lib
from ..lab import scripts

RECORD = "run.json"
# Flags that name what a run builds on.
SOURCES = {
  "init_from": "started from",
  "start": "started from",
  "model.path": "started from",
  "reward.path": "reward model",
  "dense.path": "dense rewards",
  "preference.path": "judge",
  "opponent": "opponent",
  "teacher": "teacher",
  "base": "merged",
  "models": "merged",
}
_DEEPEST = 16  # A longer chain of runs is cut off.

Record = dict[str, Any]


def identify(
  run: loop.Run,
  script: str,
  config: Any,
  tokenizer: data.Tokenizer,
  train_set: data.Dataset | None,
  heldout: data.Dataset | None = None,
  *,
  extra: Mapping[str, Any] | None = None,
  digests: Mapping[str, str] | None = None,
) -> None:
  """Refuses a workdir that holds another run, and writes `run.json`.

  Args:
    run: Run that is opened or resumed.
    script: Name of the script.
    config: Config of the script.
    tokenizer: Tokenizer of the model.
    train_set: Rows to train on, if there are any.
    heldout: Rows to evaluate on.
    extra: Settings that are not in the config.
    digests: Digests of further content that the config only refers to; see `lab.models.digests`.
  """
  settings = flags.to_dict(config) | dict(extra or {})
  flat = flags.flatten(settings)
  digests = {
    **user.digests(flat),
    **(digests or {}),
    **script_digest(script),
    "data": train_set.digest if train_set else "",
    "held-out data": heldout.digest if heldout else "",
    "tokenizer": tokenizer.digest,
  }
  if train_set and flat.get("data.tfds"):  # A file has a digest of its own, with all its columns.
    digests["rows of --data.tfds"] = rows_digest(train_set)
  loop.identify(run, script, settings, digests)

  def write() -> None:
    record = {
      "script": script,
      "module": module_name(script),
      "method": method_of(script),
      "seed": run.session.seed,
      "settings": flat,
      "changed": flags.changed(config) | dict(extra or {}),
      "digests": digests,
      "data": {
        "training": facts(train_set) if train_set else {},
        "held out": facts(heldout) if heldout else {},
      },
      "software": software(run.mesh),
      "sources": sources_of(flat),
    }
    workdir_lib.atomic_write(run.workdir / RECORD, json.dumps(record, indent=2) + "\n")

  processes.agree(write)


def rows_digest(dataset: data.Dataset) -> str:
  """Returns the SHA-256 of the rows of a data set, with all columns, which a reward may read."""
  digest = hashlib.sha256()
  for row in dataset.rows:
    digest.update(json.dumps(row, sort_keys=True, default=str).encode())
  return digest.hexdigest()


def module_of(script: str) -> types.ModuleType | None:
  """Returns the module of a script that runs or is imported; None if there is none."""
  main = sys.modules["__main__"]
  if pathlib.Path(getattr(main, "__file__", None) or "").stem == script:
    return main
  return sys.modules.get(scripts.module_name(script)) or sys.modules.get(script)


def module_name(script: str) -> str:
  """Returns the name by which `python -m` runs a script."""
  module = module_of(script)
  if module is None or _is_ours(module):
    return scripts.module_name(script)
  name = module.__spec__.name if module.__spec__ else script
  return name.removesuffix(".__main__")


def script_digest(script: str) -> dict[str, str]:
  """SHA-256 of the file of a script of the user; empty for the scripts of `experiments`."""
  module = module_of(script)
  if module is None or not module.__file__ or _is_ours(module):
    return {}
  return {"file of the script": workdir_lib.file_digest(pathlib.Path(module.__file__))}


def _is_ours(module: types.ModuleType) -> bool:
  return pathlib.Path(module.__file__ or "").resolve().is_relative_to(scripts.FOLDER)


def method_of(script: str) -> str:
  """Returns the first line of the docstring of a script, if it is imported; else its name."""
  summary = (getattr(module_of(script), "__doc__", None) or script).strip().partition("\n\n")[0]
  return " ".join(summary.split()).rstrip(".")


def facts(dataset: data.Dataset) -> Record:
  """Facts about a data set that reveal none of its rows."""
  counts = {name: count for name, count in dataset.report.items() if count}
  return {
    "kind": dataset.kind,
    "examples": len(dataset.examples),
    "digest": dataset.digest,
    "columns": [*dataset.columns],
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


def _run_of(path: str | pathlib.Path) -> tuple[pathlib.Path, bool]:
  """Returns the folder of the run that a model is from, and whether the model is its final one."""
  folder, step = workdir_lib.split_step(path)
  if step is not None:
    return folder, False
  ends = {"export": True, "adapter": True, "exports": False}
  for run, inside in ((folder.parent, folder.name), (folder.parent.parent, folder.parent.name)):
    if inside in ends and (run / "identity.json").exists():
      return run, ends[inside]
  return folder, True


def read(path: str | pathlib.Path, depth: int = 0) -> Record:
  """Reads the record of a run, with its `path` and its final metrics as `summary`.

  A model of one of its steps has none of these metrics. The record has only the path for a Hugging
  Face folder, a missing folder, or a folder that these scripts did not write.
  """
  folder, is_final = _run_of(path)
  record = read_json(folder / RECORD)
  if not record:
    # A run that was stopped before it wrote one, or an older one.
    record = read_json(folder / "identity.json")
    record["settings"] = {k[2:]: value for k, value in record.items() if k.startswith("--")}
    if "seed" in record["settings"]:
      record["seed"] = record["settings"].pop("seed")
    record["digests"] = {k: v for k, v in record.items() if k in ("data", "tokenizer")}
    record["data"] = {}
    if not record.get("script") and (folder / "config.json").exists():
      record["pretrained"] = True
    record["sources"] = sources_of(record["settings"], depth)
  summary = numbers(read_json(folder / "summary.json")) if is_final else {}
  return _tidy(record | {"path": str(path), "summary": summary})


def paths_in(settings: Mapping[str, Any], flag: str) -> list[str]:
  """Returns the folders that a flag names: a list, or text with commas."""
  given = settings.get(flag) or []
  parts = given.split(",") if isinstance(given, str) else given
  return [part for part in parts if isinstance(part, str) and part]


def sources_of(settings: Mapping[str, Any], depth: int = 0) -> list[Record]:
  """Reads the records of the runs that the settings of a run refer to, each with its `role`."""
  if depth > _DEEPEST:
    return []
  sources = []
  for flag, role in SOURCES.items():
    for path in paths_in(settings, flag):
      if hub.is_name(path):
        sources.append(_tidy({"path": hub.pinned(path), "pretrained": True}) | {"role": role})
      elif "://" not in path or bucket.is_address(path):
        record = read(path, depth + 1)
        record.pop("settings", None)  # `changed` says what is worth saying.
        sources.append(record | {"role": role})
  return sources


def numbers(summary: Mapping[str, Any]) -> dict[str, float]:
  """Returns the metrics of a summary."""
  return {
    name: value
    for name, value in summary.items()
    if isinstance(value, int | float) and not isinstance(value, bool)
  }


def metric_texts(summary: Mapping[str, float]) -> dict[str, str]:
  """Formats metrics as text, each with the interval from its `_low` and `_high`."""
  texts = {}
  for name, value in summary.items():
    base = re.sub(r"_(low|high)$", "", name)
    if base != name and base in summary:
      continue
    texts[name] = str(value) if isinstance(value, int) else f"{value:.4g}"
    if {f"{name}_low", f"{name}_high"} <= summary.keys():
      texts[name] += f" ({summary[f'{name}_low']:.4g} to {summary[f'{name}_high']:.4g})"
  return texts


def source_name(record: Mapping[str, Any]) -> str:
  """Returns the source of the rows of a run."""
  settings = {**mapping_in(record, "changed"), **mapping_in(record, "settings")}
  return str(settings.get("data.path") or settings.get("data.tfds") or "") or "the built-in task"


def read_json(path: pathlib.Path) -> Record:
  """Reads the object in a JSON file; returns an empty one if there is none."""
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}


def _tidy(record: Record) -> Record:
  """Returns a record with all its parts, of the right types, from any content of a file."""
  parts = ("settings", "changed", "digests", "data", "software", "summary")
  names = ("path", "script", "module", "method", "role")
  tidy: Record = {name: str(record.get(name, "")) for name in names}
  tidy |= {name: mapping_in(record, name) for name in parts}
  tidy["digests"] = {name: str(value) for name, value in tidy["digests"].items()}
  tidy["data"] = {name: of for name, of in tidy["data"].items() if isinstance(of, dict)}
  tidy["summary"] = numbers(tidy["summary"])
  tidy["sources"] = [_tidy(source) for source in list_in(record, "sources")]
  return tidy | {name: record[name] for name in ("seed", "pretrained") if name in record}


def mapping_in(record: Mapping[str, Any], name: str) -> dict[str, Any]:
  value = record.get(name)
  return value if isinstance(value, dict) else {}


def list_in(record: Mapping[str, Any], name: str, kind: type = dict) -> list[Any]:
  value = record.get(name)
  return [item for item in value if isinstance(item, kind)] if isinstance(value, list) else []
