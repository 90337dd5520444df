"""Records of runs and their lineage, from files written by hand."""

import json
import pathlib
import sys
import types

import pytest

from experiments import sft
from experiments.records import card, record
from rlhf_jax import bucket, data, flags

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
TOKENIZER = data.word_level_tokenizer(["yes", "no"])


def write_run(folder: pathlib.Path, script: str, summary: dict, **settings) -> str:
  """Writes the files of a run without its `run.json`; returns the folder."""
  folder.mkdir(parents=True)
  named = {f"--{name}": value for name, value in flags.flatten(settings).items()}
  identity = {"script": script, "--seed": 1, **named, "data": "d1g35t"}
  (folder / "identity.json").write_text(json.dumps(identity))
  (folder / "summary.json").write_text(json.dumps(summary))
  return str(folder)


def test_lineage_goes_back_to_the_pretrained_model(tmp_path):
  base = tmp_path / "models--org--base-1B" / "snapshots" / "0a1b"
  base.mkdir(parents=True)
  (base / "config.json").write_text("{}")
  sft = write_run(tmp_path / "sft", "sft", {"eval/loss": 1.25}, model={"path": str(base)})
  reward = write_run(tmp_path / "rm", "reward_model", {"accuracy": 0.75}, init_from=sft)
  ppo = write_run(
    tmp_path / "ppo", "ppo", {"kl": 2.0}, init_from=f"{sft}/export", reward={"path": reward}
  )
  found = record.read(ppo)
  assert found["settings"]["reward.path"] == reward and found["summary"] == {"kl": 2.0}
  start, judge = found["sources"]
  assert (start["script"], start["summary"]) == ("sft", {"eval/loss": 1.25})
  assert (judge["role"], judge["summary"]) == ("reward model", {"accuracy": 0.75})
  assert judge["sources"][0]["path"] == sft
  assert card.base_model(found) == card.base_model(judge) == "org/base-1B"
  lineage = card.card(found, CONFIG, TOKENIZER).partition("## Lineage")[2]
  assert lineage.count(f"started from: `{base}`") == 2
  assert "accuracy` 0.75" in lineage and "`d1g35t`" in lineage


@pytest.mark.parametrize("name", ["@3", "@best", "/exports/3", "/adapter", "/export", ""])
@pytest.mark.parametrize("address", ["", "gs://runs/team/"])
def test_lineage_through_any_model_of_a_run(tmp_path, monkeypatch, name, address):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

  def copied(folder):  # As from a bucket, where a pull makes a folder even of what is not there.
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".bucket.json").touch()
    return folder

  monkeypatch.setattr(record.workdir_lib, "_copied", copied)
  base = tmp_path / "models--org--base-1B" / "snapshots" / "0a1b"
  base.mkdir(parents=True)
  (base / "config.json").write_text("{}")
  folder = bucket.folder_of(f"{address}sft") if address else tmp_path / "sft"
  write_run(folder, "sft", {"eval/loss": 1.25}, model={"path": str(base)})
  start = f"{address or tmp_path}{'' if address else '/'}sft{name}"
  found = record.read(write_run(tmp_path / "dpo", "dpo", {"kl": 2.0}, init_from=start))
  (source,) = found["sources"]
  assert (source["script"], source["path"]) == ("sft", start)
  is_final = name in ("/adapter", "/export", "")
  assert source["summary"] == ({"eval/loss": 1.25} if is_final else {})
  assert card.base_model(found) == "org/base-1B"


def test_a_model_that_began_at_random_has_no_base_model(tmp_path):
  sft = write_run(tmp_path / "sft", "sft", {})
  found = record.read(write_run(tmp_path / "dpo", "dpo", {}, init_from=sft))
  assert card.base_model(found) == ""
  assert "base_model" not in card.card(found, CONFIG, TOKENIZER)


def test_runs_that_name_each_other_end(tmp_path):
  a = write_run(tmp_path / "a", "rest", {}, init_from=str(tmp_path / "b"))
  write_run(tmp_path / "b", "rest", {}, init_from=a)
  card.card(record.read(a), CONFIG, TOKENIZER)


@pytest.mark.parametrize(
  "content",
  ["", "{", "[1]", '{"settings": 3, "sources": {"a": 1}, "changed": [], "data": {"training": 2}}'],
)
def test_an_unreadable_record_is_a_folder_without_one(tmp_path, content):
  (tmp_path / "run.json").write_text(content)
  (tmp_path / "summary.json").write_text('{"a": 1, "b": "NaN", "c": {"d": 2}, "e": true}')
  found = record.read(tmp_path)
  assert found["summary"] == {"a": 1} and found["sources"] == [] and found["changed"] == {}
  card.card(found, CONFIG, TOKENIZER)


def test_the_method_is_the_summary_of_the_script(monkeypatch):
  assert record.method_of("sft") == sft.__doc__.partition("\n")[0].rstrip(".")
  assert record.method_of("improve") == "improve"
  main = types.ModuleType("__main__", "Trains\nsomething new.\n\nMore of it.\n")
  main.__file__ = "/elsewhere/mine.py"
  monkeypatch.setitem(sys.modules, "__main__", main)
  assert record.method_of("mine") == "Trains something new"
