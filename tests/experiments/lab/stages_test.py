import json
import re

import pytest

from experiments.lab import stages
from experiments.lab.methods import METHODS
from tests.testing import read_flags

# Scripts that read the start by another flag than --init_from.
BASES = {"evaluate": "baseline", "merge": "base"}


@pytest.mark.parametrize("name", stages.COMMANDS)
def test_the_script_of_a_line_accepts_its_flags(name, tmp_path):
  script, *flags = stages.words(name, tmp_path, seed=1)
  read = read_flags(script, flags)
  assert read.workdir == str(tmp_path / name)
  starts = {"sft": [], **{of: [f"--{flag}={tmp_path}/sft"] for of, flag in BASES.items()}}
  expected = starts.get(script.rpartition(".")[2], [f"--init_from={tmp_path}/sft"])
  assert [flag for flag in flags[1:] if flag.endswith(f"={tmp_path}/sft")] == expected
  assert not any("$" in flag for flag in flags)
  named = {path for flag in flags[1:] for path in re.findall(rf"{tmp_path}/(\w+)", flag)}
  assert named - {"sft"} == {*stages.read_by(name)} - {"sft"}


@pytest.mark.parametrize("file", ["methods.csv", "arms.csv", "claims.csv"])
def test_a_line_has_a_cell_for_each_column(file):
  """A comma in a cell needs quotes around it."""
  assert all(isinstance(cell, str) for line in stages.lines(file) for cell in line.values())


def test_variables_are_names_of_stages():
  assert stages.read_by("rto") == ["reward_model", "dpo"]
  assert stages.read_by("hacked_robust") == ["weak_0", "weak_1", "weak_2"]
  assert all({*stages.read_by(name)} <= {*stages.COMMANDS} for name in stages.COMMANDS)


@pytest.mark.parametrize(
  ("rows", "needed"),
  [
    (["rto", "ppo"], ["dpo", "rto", "ppo"]),
    (["rto", "dpo"], ["dpo", "rto"]),
    (["maxmin", "weak_0"], ["terse", "lavish", "maxmin", "weak_0"]),
    (["by_group"], ["terse", "lavish", "pooled", "maxmin", "by_group"]),
    (["sft", "ppo", "reward_model", "ppo"], ["ppo"]),
  ],
)
def test_a_stage_comes_behind_those_that_it_reads(rows, needed):
  assert stages.with_needed(rows) == ["sft", "reward_model", *needed]


def test_numbers_of_other_commands_are_not_read(tmp_path, monkeypatch):
  """Neither those of a line that has changed, nor of a run that starts from such a line."""
  for name in ("sft", "reward_model", "dpo", "ppo", "kto"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "summary.json").write_text(json.dumps({"name": name}))
    stages.write_record(tmp_path, name, minutes=2.0, code=0)

  def read():
    return [name for name in ("sft", "dpo", "ppo", "kto") if stages.read_summary(tmp_path, name)]

  assert read() == ["sft", "dpo", "ppo", "kto"]
  assert stages.read_record(tmp_path, "ppo")["cpu_minutes"] == 2.0
  monkeypatch.setitem(stages.COMMANDS, "dpo", "dpo --steps=7")
  assert read() == ["sft", "ppo", "kto"] and not stages.read_record(tmp_path, "dpo")
  monkeypatch.setitem(stages.COMMANDS, "reward_model", "reward_model --steps=7")
  assert read() == ["sft", "kto"]
  monkeypatch.setitem(stages.COMMANDS, "sft", "sft --steps=7")
  assert read() == []


def test_every_stage_is_run_once():
  names = stages.with_needed([*stages.COMMANDS])
  assert sorted(names) == sorted(stages.COMMANDS)
  for name in names:
    assert {*stages.read_by(name)} <= {*names[: names.index(name)]}


def test_stages_of_all_seeds_draw_rows_of_their_own(tmp_path):
  models = [name for name, line in stages.COMMANDS.items() if line.startswith("reward_model")]
  names = [(name, seed) for name in ("sft", *models, "ppo") for seed in range(3)]
  drawn = {stages.words(name, tmp_path, seed)[2] for name, seed in names}
  assert len(drawn) == len(names)
  assert max(stages.NUMBERS.values()) < 10
  # Methods are compared on the same rows, and PPO is that of the chain with the same seed.
  used = {stages.words(name, tmp_path, 2)[2] for name in METHODS if name != "sft"}
  assert used == {"--seed=23"}
