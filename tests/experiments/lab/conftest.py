"""Opened workbenches."""

import contextlib

import pytest

from experiments.lab import workbench
from tests.experiments.small_runs import sizes, small
from tests.testing import on_devices, read_configs


@pytest.fixture
def open_bench(tmp_path):
  """`open_bench(script, kind, *flags, **options)`: workbench with a new tiny model."""
  with contextlib.ExitStack() as stack:
    stack.enter_context(on_devices(1))

    def open_one(script, kind, *flags, **options):
      words = [f"--workdir={tmp_path / 'run'}", *small(script, [*sizes(flags), *flags])]
      configs = read_configs(f"experiments.{script}", words)
      return stack.enter_context(workbench.open(*configs, script, kind, **options))

    yield open_one
