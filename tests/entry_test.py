import ctypes
import logging as standard_logging
import os
import pathlib
import runpy
import subprocess
import sys
import time

import jax
import pytest
from absl import logging

from rlhf_jax import data, entry, reporting
from tests.testing import forked

_FATAL = "FATAL Flags parsing error:"
_SCRIPT = '''
"""Trains a toy to 98 % of nothing.

  python toy.py --workdir=DIR
"""

import dataclasses
import threading
import time

import jax
from absl import flags as absl_flags

from rlhf_jax import entry, flags
{dataclasses}
_WORKDIR = absl_flags.DEFINE_string("workdir", None, "Where the run lives.")
config = flags.define(Config)


class DiskFull(Exception):
  exit_code = 74


def main(argv):
  print(argv[1:], config().dpo.beta)
  if config().steps in (75, 76):
    threading.Thread(target=time.sleep, args=[60]).start()  # As those of a save that failed.
  if config().steps == 76:
    raise RuntimeError("a bug")
  if config().steps in (74, 75):
    raise DiskFull("no space")
  if config().steps == 69:
    jax.numpy.zeros(2**47)
  if config().steps == 99:
    raise RuntimeError("a bug")
  flags.save_flags(_WORKDIR.value + "/flags")


if __name__ == "__main__":
  entry.run(main)
'''
_DATACLASSES = '''
@dataclasses.dataclass(frozen=True)
class DPO:
  beta: float = 0.1

  def __post_init__(self):
    if self.beta <= 0:
      raise ValueError("beta must be positive")

@dataclasses.dataclass(frozen=True)
class Config:
  """Options.

  Attributes:
    steps: Number of updates.
  """
  steps: int = 10
  batch_size: int = 8
  shuffle: bool = True
  dpo: DPO = DPO()
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
  path = tmp_path_factory.mktemp("script") / "toy.py"
  path.write_text(_SCRIPT.format(dataclasses=_DATACLASSES).lstrip())
  return path


@pytest.fixture(scope="module")
def started_script(toy, repository):
  """Runs the script as a user does."""

  def run(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(toy), *args]
    env = os.environ | {"PYTHONPATH": str(repository)}
    return subprocess.run(command, capture_output=True, text=True, env=env)

  return run


def _main(*args: str) -> None:
  """In the forked process: what `python ARGS` does in the folder of its output."""
  for number, name in ((1, "stdout"), (2, "stderr")):
    with open(pathlib.Path(args[0]).with_name(name), "wb") as file:
      os.dup2(file.fileno(), number)
  sys.argv = list(args)
  runpy.run_path(args[0], run_name="__main__")


@pytest.fixture(scope="module")
def script(toy):
  """Runs the script in a process that has imported what it imports."""

  def run(*args: str) -> subprocess.CompletedProcess:
    process = forked(_main, str(toy), *args)
    process.join()
    output = [toy.with_name(name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(args, process.exitcode, *output)

  return run


def test_script_help_lists_its_own_flags(script):
  done = script("--help")
  assert done.returncode == 0
  out = done.stdout
  assert out.startswith("Trains a toy to 98 % of nothing.\n")
  assert "  --steps=10\n      Number of updates.\n" in out
  assert "  --[no]shuffle (" in out
  assert "  --workdir=\n      Where the run lives.\n" in out
  assert "--verbosity" not in out
  assert out.count("--dpo.beta=0.1\n") == 1
  assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
  "args, code, last_line",
  [
    ("--dpo.beta=-1", 64, "--dpo.beta must be positive"),
    ("--shuffle False", 64, "stray word 'False': write --noshuffle or --shuffle=false"),
    ("--steps=1 --steps=2", 64, "--steps is given 2 times; keep one"),
    ("--dpo.beta=inf", 64, f"{_FATAL} flag --dpo.beta=inf: must be a finite number"),
    ("--stesp=3", 1, "unknown flag --stesp; did you mean --steps?"),
    ("--steps=74", 74, "DiskFull: no space"),
    ("--steps=75", 74, "DiskFull: no space"),
    ("--steps=76", 1, "RuntimeError: a bug"),
    (
      "--steps=69",
      69,
      "A device has too little memory for 562949953421312 bytes. Less is taken by a smaller"
      " --batch_size, a smaller model",
    ),
    (
      "--steps=69 --batch_size=1",
      69,
      "A device has too little memory for 562949953421312 bytes. Less is taken by a smaller model",
    ),
    ("--steps=99", 1, "RuntimeError: a bug"),
  ],
)
def test_script_exit_codes(script, args, code, last_line):
  begin = time.monotonic()
  result = script(*args.split())
  assert time.monotonic() - begin < 30, "it waits for nobody"
  assert result.returncode == code
  assert result.stderr.splitlines()[-1] == last_line
  assert ("Traceback" in result.stderr) == (code == 1 and "bug" in last_line)


def test_script_flags_replay(started_script, tmp_path):
  first = started_script(f"--workdir={tmp_path}", "--dpo.beta=0.5", "--verbosity=0")
  assert (first.returncode, first.stdout) == (0, "[] 0.5\n"), first.stderr
  lines = pathlib.Path(tmp_path, "flags").read_text().splitlines()
  assert lines == [
    "--batch_size=8",
    "--dpo.beta=0.5",
    "--shuffle=true",
    "--steps=10",
    f"--workdir={tmp_path}",
  ]
  assert started_script(f"--flagfile={tmp_path}/flags").stdout == first.stdout


_FAULTS = """
import resource, sys
import numpy as np
from rlhf_jax import entry
if sys.argv[1] == "keep":
  entry._keep_freed_memory()
for step in range(6):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  blocks = [np.ones(2**25, np.int8) for _ in range(4)]
  after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  del blocks
print(after - before)
"""


_LARGE_PAGES = """
import pathlib, re, sys
from rlhf_jax import entry
if sys.argv[1] == "large":
  entry._keep_freed_memory()
  entry._use_large_pages()
blocks = [b"x" * 2**25 for _ in range(4)]
text = pathlib.Path("/proc/self/smaps_rollup").read_text()
print(*(re.search(rf"^{name}: +([0-9]+) kB", text, re.M)[1] for name in ("Rss", "AnonHugePages")))
"""


HOSTILE = [
  "\x1b[2J\x1b[31mred",
  "\x1b]0;title\x07",
  "\x9b2J",
  "one\rtwo",
  "a\u202eb\u200bc",
  "\ud800",
  "bell\x07\x08",
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_nothing_that_is_said_controls_a_terminal(text, capsys, caplog, monkeypatch):
  """Text from outside reaches a terminal as a refusal, a line of a log, a traceback or a note."""
  monkeypatch.setattr(sys, "excepthook", sys.excepthook)
  monkeypatch.setattr(entry.app, "run", lambda *args, **kwargs: None)
  factory = standard_logging.getLogRecordFactory()
  bad = f"{text}.jsonl:3: field {text}"
  try:
    entry._log_harmlessly.cache_clear()
    entry.run(lambda argv: None)
    standard_logging.getLogger("a.library").warning("%s: fields not used: %s", bad, text)
    logging.warning("Rejected %s", bad)
  finally:
    standard_logging.setLogRecordFactory(factory)
  error = data.DataError(bad)
  sys.excepthook(type(error), error, error.__traceback__)
  reporting.note(bad)
  _, refused = entry.verdict(error) or (0, bad)
  for shown in (refused, *caplog.messages, *capsys.readouterr().err.splitlines()):
    assert shown.isprintable() and reporting.escape(bad) in shown
  assert len(caplog.messages) == 2


def test_freed_memory_is_reused(repository):
  if not hasattr(ctypes.CDLL(None), "mallopt"):
    pytest.skip("the C library is not glibc")
  faults = {}
  for mode in ("keep", "default"):
    command = [sys.executable, "-c", _FAULTS, mode]
    env = os.environ | {"PYTHONPATH": str(repository)}
    faults[mode] = int(subprocess.run(command, capture_output=True, env=env, check=True).stdout)
  assert faults["keep"] < 100  # Of 32,768 pages.
  assert faults["keep"] < faults["default"]


def test_large_pages_are_used_for_what_is_touched(repository):
  setting = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
  if not setting.exists() or "[madvise]" not in setting.read_text():
    pytest.skip("the system gives large pages to all memory, or to none")
  found = {}
  for mode in ("large", "default"):
    command = [sys.executable, "-c", _LARGE_PAGES, mode]
    env = os.environ | {"PYTHONPATH": str(repository)}
    result = subprocess.run(command, capture_output=True, env=env, check=True)
    found[mode] = [int(x) / 1024 for x in result.stdout.split()]
  assert found["large"][1] > 100 > 50 > found["default"][1]  # Of 128 MiB.
  assert found["large"][0] < found["default"][0] + 50


@pytest.mark.parametrize("plugins", [(), ("cuda13",)], ids=["cpu", "accelerator"])
def test_the_cpu_is_tuned_where_there_is_no_accelerator(monkeypatch, plugins):
  kept = []
  monkeypatch.setattr(entry, "_keep_freed_memory", lambda: kept.append(True))
  monkeypatch.setattr(entry, "_use_large_pages", lambda: kept.append(True))
  monkeypatch.setattr(entry.importlib.metadata, "entry_points", lambda group: plugins)
  monkeypatch.setattr(entry.importlib.util, "find_spec", lambda name: None)
  given = "--xla_backend_optimization_level=3"
  monkeypatch.setenv("XLA_FLAGS", given)
  entry._tune_for_cpu()
  before = "" if plugins else "--xla_backend_optimization_level=1 "
  assert os.environ["XLA_FLAGS"] == before + given  # What was given comes last, and wins.
  assert len(kept) == (0 if plugins else 2)


@pytest.fixture
def no_programs(tmp_path, monkeypatch):
  """Cache folder of a user, with JAX keeping no programs."""
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: jax.config.values[name] for name in names}
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  jax.config.update("jax_compilation_cache_dir", None)
  yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)


def test_programs_are_kept_where_nobody_else_writes(no_programs, monkeypatch):
  entry._keep_programs()
  folder = pathlib.Path(jax.config.values["jax_compilation_cache_dir"])
  assert folder.parent == no_programs / "rlhf_jax" / "programs"
  assert folder.stat().st_mode & 0o777 == 0o700
  for i in range(4):
    (folder / f"{i}-cache").write_bytes(bytes(100))
    os.utime(folder / f"{i}-cache", (i, i))
  monkeypatch.setattr(entry, "_PROGRAM_BYTES", 200)
  jax.config.update("jax_compilation_cache_dir", None)
  entry._keep_programs()
  assert sorted(file.name for file in folder.iterdir()) == ["2-cache", "3-cache"]
  jax.config.update("jax_compilation_cache_dir", "elsewhere")
  entry._keep_programs()
  assert jax.config.values["jax_compilation_cache_dir"] == "elsewhere"


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_folder_that_others_may_write_to_keeps_no_programs(no_programs, depth):
  entry._keep_programs()
  folder = pathlib.Path(jax.config.values["jax_compilation_cache_dir"])
  [folder, *folder.parents][depth].chmod(0o775)
  jax.config.update("jax_compilation_cache_dir", None)
  entry._keep_programs()
  assert jax.config.values["jax_compilation_cache_dir"] is None


def test_without_a_place_programs_are_not_kept(no_programs):
  (no_programs / "rlhf_jax").write_text("a file")
  entry._keep_programs()
  assert jax.config.values["jax_compilation_cache_dir"] is None
