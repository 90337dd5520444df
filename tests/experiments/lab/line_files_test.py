"""Lines that survive a kill, and short names of folders."""

import pytest

from experiments.lab import line_files
from rlhf_jax import flags


def test_short_names_tell_paths_apart():
  assert line_files.short_names("runs", ["a/ppo", "a/dpo/"]) == ["ppo", "dpo"]
  assert line_files.short_names("runs", ["a/ppo", "b/ppo", "b/dpo"]) == ["a/ppo", "b/ppo", "b/dpo"]
  with pytest.raises(flags.UsageError, match="--policy names a folder twice"):
    line_files.short_names("policy", ["a/../ppo", "ppo"])


def test_a_torn_line_is_cut_off(tmp_path):
  path = tmp_path / "responses.jsonl"
  line_files.append_lines(path, [{"a": 1}, {"a": 2}])
  path.write_text(path.read_text() + '{"a"')
  assert line_files.read_lines(path) == [{"a": 1}, {"a": 2}]
  assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
  assert line_files.read_lines(tmp_path / "none") == []
