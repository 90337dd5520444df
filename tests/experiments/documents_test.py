"""The commands of README and of the launch documents are accepted as they are written."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest

from launch import run, sweep
from tests.testing import define_flags, full, read_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXTS = [
  (ROOT / name).read_text(encoding="utf-8")
  for name in ("README.md", "launch/README.md", "launch/SWEEPS.md")
]
# What stands in them for files of the reader.
VARIABLES = {
  "D": "data",
  "FOLDER": "model",
  "HH": "data/preference",
  "M": "model",
  "MODEL": "model",
  "PROMPTS": "data/prompts",
}
# Bash shows what it would call, after its own expansion of words, variables and functions. A call
# is one write, for those in the background share the pipe.
SHOW = r"""
set -eu
python() { local IFS=$'\x1f'; printf '%s\x1e' "$*"; }
python3() { :; }
pip() { :; }
docker() { :; }
"""


def calls(text: str) -> list[list[str]]:
  """Arguments of each `python` in a piece of bash."""
  env = {"PATH": os.environ["PATH"], "HOME": "/home/me", **VARIABLES}
  command = ["bash", "-c", SHOW + text]
  output = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
  return [call.split("\x1f") for call in output.split("\x1e") if call.strip()]


def commands() -> list[list[str]]:
  """Module and flags of each command of the documents."""
  found = []
  for text in TEXTS:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    blocks = [re.sub(r"\S*\.venv/bin/(python|pip|pytest)", r"\1", block) for block in blocks]
    (function,) = [block for block in blocks if block.startswith("data()")] or [""]
    cells = re.findall(r"\| `(python -m experiments\.[^`]*)` \|", text)
    for block in [*blocks, *(f"{function}{cell} --workdir=runs/cell" for cell in cells)]:
      if "pytest" not in block and not block.rstrip().endswith("..."):
        found += [call[1:] for call in calls(block)]
  return found


COMMANDS = commands()
SCRIPTS = [command for command in COMMANDS if command[0].startswith("experiments.")]
DATA = {
  flag.split("=", 1)[1]
  for command in SCRIPTS
  for flag in command
  if flag.startswith(("--data.path=data/", "--data.eval_path=data/"))
}


def name_of(command: list[str]) -> str:
  """`dpo-runs/dpo`, say."""
  named = [flag.split("=", 1)[1] for flag in command if flag.startswith(("--workdir=", "--to="))]
  return "-".join([command[0].split(".")[1], *named[:1]])


def value_of(command: list[str], name: str) -> str:
  return "".join(f.split("=", 1)[1] for f in command if f.startswith(f"--{name}="))


def test_commands_are_found():
  assert len(SCRIPTS) > 30
  assert len(COMMANDS) - len(SCRIPTS) > 7
  assert len(DATA) > 15


@pytest.mark.parametrize("command", SCRIPTS, ids=name_of)
def test_a_script_accepts(command):
  read_flags(command[0], command[1:])


@pytest.mark.parametrize("command", SCRIPTS, ids=name_of)
def test_what_it_reads_was_made_before(command):
  """Runs by an earlier command, data and models by the reader."""
  earlier = SCRIPTS[: SCRIPTS.index(command)]
  made = {f"runs/rlhf/{stage}" for stage in ("sft", "reward_model", "ppo")}
  made |= {value_of(other, "workdir") for other in earlier} | {"runs/sft"}
  for flag in command[1:]:
    name, _, value = flag.partition("=")
    if name in ("--workdir", "--runs"):
      continue
    for path in re.findall(r"runs/[\w/.]*", value):
      assert path.removesuffix("/labels.jsonl") in made, flag


@pytest.mark.parametrize("path", sorted(DATA))
def test_data_are_of_the_layout_that_is_named(path, shared):
  assert (shared / path).is_file()


@pytest.mark.parametrize(
  "command", [command for command in COMMANDS if command[0] == "launch.run"], ids=name_of
)
def test_the_launcher_accepts(command):
  """Shown and not done: the engines are met in tests/launch."""
  line = [sys.executable, "-m", command[0], "--dry_run", *command[1:]]
  shown = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
  assert shown.returncode == 0, shown.stderr
  assert "experiments." in shown.stdout


@pytest.mark.parametrize(
  "command", [command for command in COMMANDS if command[0] == "launch.sweep"], ids=str
)
def test_a_sweep_accepts(command, monkeypatch):
  monkeypatch.chdir(ROOT)
  args, space = sweep.parse(command[1:])
  script, *flags = args.script
  drawn = [sweep.flag(name, value) for name, value in space.defaults.items()]
  read_flags(script, [*flags, *drawn, "--workdir=runs/trial"])


# So that each takes seconds; the rest of a command is as it is written.
SHORT = {
  "steps": 1,
  "batch_size": 2,
  "grow_steps": 1,
  "critic_warmup": 0,
  "data.rows": 64,
  "data.eval_rows": 8,
  "sampling.max_new_tokens": 4,
}
# Other tests have a judge, a person, several processes and a compiler for TPUs.
ELSEWHERE = r"experiments\.(label|revise)|=runs/(ai|hand)\b|--coordinator|experiments\.compile"
FILES = r"=(data/|model\b)"
RUNNING = [command for command in SCRIPTS if not re.search(ELSEWHERE, " ".join(command))]


@pytest.fixture
def run_short(tmp_path, monkeypatch, run_script):
  """Runs commands, shortened, in a folder that is empty at first."""
  monkeypatch.chdir(tmp_path)
  pathlib.Path("runs").mkdir()

  def run(command: list[str], **more) -> None:
    script, *flags = command
    named = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
    workdir = named.pop("workdir")
    known = define_flags(script)[0]
    named |= {name: value for name, value in (SHORT | more).items() if name in known}
    given = [f"--{name}={value}" if value != "" else f"--{name}" for name, value in named.items()]
    finished = run_script(script.removeprefix("experiments."), workdir, *given)
    assert finished.code == 0, f"{command}\n{finished.output}"

  return run


@pytest.mark.slow
def test_commands_run_one_after_the_other(run_short):
  commands = [command for command in RUNNING if not re.search(FILES, " ".join(command))]
  assert len(commands) > 12
  for command in commands:
    run_short(command)


def groups() -> list[list[list[str]]]:
  """Commands that read files, each with those that go on from its run."""
  found: list[list[list[str]]] = []
  for command in RUNNING:
    if value_of(command, "init_from").startswith("runs/hh"):
      found[-1].append(command)
    elif re.search(FILES, " ".join(command)):
      found.append([command])
  return found


@pytest.mark.slow
@full
@pytest.mark.parametrize("commands", groups(), ids=lambda commands: name_of(commands[0]))
def test_commands_on_files_run(commands, run_short, shared):
  pathlib.Path("data").symlink_to(shared / "data")
  pathlib.Path("model").symlink_to(shared / "models/stories260k")
  for command in commands:
    run_short(command, **{"data.end_token": "<s>", "data.rows": 16})


def test_every_flag_that_is_named_exists():
  known = {"flagfile", "help"}
  for file in (ROOT / "experiments").glob("*.py"):
    script = f"experiments.{file.stem}"
    if hasattr(importlib.import_module(script), "Config"):
      known |= set(define_flags(script)[0])
  known |= set(define_flags("experiments.compile", ["--algorithm=ppo"])[0])
  known |= {flag.name for flag in run.flags.FLAGS.get_flags_for_module(run)}
  known |= set(re.findall(r"--(\w+)", sweep.make_parser().format_help()))
  spans = [span for text in TEXTS for span in re.findall(r"`([^`\n]+)`", text)]
  spans = [span.partition("--extra=")[0] for span in spans]  # Flags of other programs.
  named = {name for span in spans for name in re.findall(r"--([a-z][\w.]*)(?![\w.-])", span)}
  assert named - known == set()
