"""Short names of folders."""

import pytest

from experiments.lab import line_files
from rlhf_jax import flags


def test_short_names_tell_paths_apart():
  assert line_files.short_names("runs", ["a/ppo", "a/dpo/"]) == ["ppo", "dpo"]
  assert line_files.short_names("runs", ["a/ppo", "b/ppo", "b/dpo"]) == ["a/ppo", "b/ppo", "b/dpo"]
  with pytest.raises(flags.UsageError, match="--policy names a folder twice"):
    line_files.short_names("policy", ["a/../ppo", "ppo"])
