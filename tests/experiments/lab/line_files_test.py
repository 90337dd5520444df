"""Lines that survive a kill, and short names of folders."""

import pytest

from experiments.lab import line_files
from rlhf_jax import flags
from tests.inputs.refused import refusal


def test_short_names_tell_paths_apart():
  assert line_files.short_names("runs", ["a/ppo", "a/dpo/"]) == ["ppo", "dpo"]
  assert line_files.short_names("runs", ["a/ppo", "b/ppo", "b/dpo"]) == ["a/ppo", "b/ppo", "b/dpo"]
  with pytest.raises(flags.UsageError, match="--policy names a folder twice"):
    line_files.short_names("policy", ["a/../ppo", "ppo"])


@pytest.mark.parametrize("line", [b'{"a": 1', b"", b"3", b'{"a": "\xe4"}', b"[" * 99999])
def test_a_broken_line_is_named(tmp_path, line):
  path = tmp_path / "revised.jsonl"
  path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\r\n')
  code, said = refusal(line_files.read_lines, path)
  assert code == 65 and f"{path}:2: " in said
  assert "fix the line, or remove it and all lines after it" in said
  path.write_bytes(b'{"a": 1}\n{"a": "\xe2\x80\xa8"}\r\n')
  assert line_files.read_lines(path) == [{"a": 1}, {"a": "\u2028"}]


def test_a_torn_line_is_cut_off(tmp_path):
  path = tmp_path / "responses.jsonl"
  line_files.append_lines(path, [{"a": 1}, {"a": 2}])
  path.write_text(path.read_text() + '{"a"')
  assert line_files.read_lines(path) == [{"a": 1}, {"a": 2}]
  assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
  assert line_files.read_lines(tmp_path / "none") == []
