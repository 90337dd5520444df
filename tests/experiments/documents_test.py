"""The commands of all pages are accepted as they are written, and run.

Those on the built-in task run shortened, in three groups that need nothing of each other; with
FULL=1 the lines of the tables of methods and papers, too, and the runs that claims need.
"""

import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from experiments.lab import stages
from experiments.lab.methods import METHODS
from launch import run, sweep
from launch.space import flag
from tests.testing import define_flags, full, read_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = (".", "experiments", "rlhf_jax", "launch")
PAGES = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]
# The changelog names flags that are gone; the other pages have files of their own, and a test.
PAGES = [page for page in PAGES if page.name not in ("CHANGELOG.md", "EXTENDING.md", "PYTHON.md")]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
# Values of the variables that stand for files of the reader.
VARIABLES = {
  "D": "data",
  "FOLDER": "model",
  "HH": "hh",
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
source() { :; }
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
  """Module and flags of each command of the pages, in order."""
  found = []
  for text in TEXTS.values():
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
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


def read_by(command: list[str]) -> list[str]:
  """The runs that a command reads."""
  values = [flag.partition("=")[2] for flag in command[1:] if not flag.startswith("--workdir=")]
  paths = [path for value in values for path in re.findall(r"runs/[\w/.]*", value)]
  return [path.removesuffix("/labels.jsonl") for path in paths]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder to start in, with the pages that a command writes, and no run."""
  monkeypatch.chdir(tmp_path)
  pathlib.Path("runs").mkdir()
  for page in ("README.md", "experiments/METHODS.md"):
    pathlib.Path(page).parent.mkdir(exist_ok=True)
    pathlib.Path(page).write_text(TEXTS[page], encoding="utf-8")
  return tmp_path


def test_commands_are_found():
  assert len(SCRIPTS) > 30
  assert len(COMMANDS) - len(SCRIPTS) > 7
  assert len(DATA) > 15


@pytest.mark.parametrize("command", SCRIPTS, ids=name_of)
def test_a_script_accepts(command, folder):
  read_flags(command[0], command[1:])


@pytest.mark.parametrize("command", SCRIPTS, ids=name_of)
def test_runs_that_are_read_were_made_before(command):
  earlier = SCRIPTS[: SCRIPTS.index(command)]
  made = {f"runs/rlhf/{stage}" for stage in ("sft", "reward_model", "ppo")}
  made |= {value_of(other, "workdir") for other in earlier} | {"runs/sft"}
  assert set(read_by(command)) <= made


@pytest.mark.parametrize("path", sorted(DATA))
def test_data_are_of_the_layout_that_is_named(path, shared):
  assert (shared / path).is_file()


@pytest.mark.parametrize(
  "command", [command for command in COMMANDS if command[0] == "launch.run"], ids=name_of
)
def test_the_launcher_accepts(command, launch_here, capsys):
  """Shown and not done: the engines are met in tests/launch."""
  assert launch_here("--dry_run", *command[1:]) == (0, "")
  assert "experiments." in capsys.readouterr().out


@pytest.mark.parametrize(
  "command", [command for command in COMMANDS if command[0] == "launch.sweep"], ids=str
)
def test_a_sweep_accepts(command, monkeypatch):
  monkeypatch.chdir(ROOT)
  args, space = sweep.parse(command[1:])
  script, *flags = args.script
  drawn = [flag(name, value) for name, value in space.defaults.items()]
  read_flags(script, [*flags, *drawn, "--workdir=runs/trial"])


# So that each takes seconds; the rest of a command is as it is written.
SHORT = {
  "steps": 1,
  "batch_size": 2,
  "grow_steps": 1,
  "prompts": 8,
  "limit": 2,
  "critic.warmup": 0,
  "data.rows": 64,
  "data.eval_rows": 8,
  "sampling.max_new_tokens": 4,
}
# Other tests have a judge, a person, several processes, a bucket, the chain, a compiler for TPUs.
ELSEWHERE = (
  r"experiments\.(label|revise|rlhf|methods|compile)\b|=runs/(ai|hand)\b|--coordinator|gs:"
)
FILES = r"=(data/|model\b)"
RUNNING = [command for command in SCRIPTS if not re.search(ELSEWHERE, " ".join(command))]
# Group -> the scripts that train in it. What only reads runs is in the group of those.
GROUPS = {
  "offline": {"sft", "reward_model", "dpo", "simpo", "kto", "gkd"},
  "policy gradients": {
    "ppo",
    "ppo_max",
    "pf_ppo",
    "p3o",
    "rloo",
    "cgpo",
    "reinforce_pp",
    "grpo",
    "gspo",
    "cispo",
  },
  "games and samples": {"nash_md", "ipo_md", "preference_model", "online_dpo", "rest"},
}


# Commands of the map of papers that need files or devices of the reader, or that run elsewhere.
NOT_HERE = (
  r"\$FOLDER|runs/rm_|\.(jsonl|parquet)|--rollout\.devices|^(rlhf|overoptimization|compile)\b"
)


def of_methods() -> list[list[str]]:
  """Commands of the tables of methods and papers; other tests run each script as well."""
  if "FULL" not in os.environ:
    return []
  commands = {name: method.command for name, method in METHODS.items()}
  papers = TEXTS["experiments/METHODS.md"].partition("<!-- papers -->")[2]
  for number, command in re.findall(r"^\| (C?\d+) \| [^|]* \| `([^`]+)` \|", papers, re.M):
    if not re.search(NOT_HERE, command) and command not in commands.values():
      commands[f"paper_{number}"] = command
  return [from_sft(f"runs/methods/{name}", with_runs(line)) for name, line in commands.items()]


def with_runs(command: str, **made: str) -> str:
  """Puts runs in the place of `$NAME`: one that was made, the reward model, or else the policy."""
  known = {"RM": "reward_model", "SFT": "sft"}
  runs = lambda name: made.get(name.lower()) or f"runs/rlhf/{known.get(name, 'ppo')}"  # noqa: E731
  return re.sub(r"\$(\w+)", lambda found: runs(found[1]), command)


def from_sft(workdir: str, command: str) -> list[str]:
  """Module and flags of a command that starts from the SFT policy, if it starts from any."""
  script, *flags = command.split()
  known = define_flags(f"experiments.{script}")[0]
  start = ["--init_from=runs/rlhf/sft"] if "init_from" in known and script != "sft" else []
  return [f"experiments.{script}", f"--workdir={workdir}", *start, *flags]


def of_claims() -> list[list[str]]:
  """Commands of the runs that only claims need, behind those that they read."""
  arms = {line["name"]: f"runs/claims/{line['name']}" for line in stages.lines("arms.csv")}
  del arms["reward_model"]
  names = [name for name in stages.with_needed([*arms]) if name in arms]
  return [from_sft(arms[name], with_runs(stages.COMMANDS[name], **arms)) for name in names]


def group_of(command: list[str], groups: dict[str, list[list[str]]]) -> str:
  script = command[0].removeprefix("experiments.")
  (group,) = (
    [name for name, scripts in GROUPS.items() if script in scripts]
    or {
      name
      for name, members in groups.items()
      for member in members
      if value_of(member, "workdir") in read_by(command)
    }
    or ["offline"]
  )
  return group


def goes_on(command: list[str]) -> bool:
  """Returns True for a command that goes on from a run on published files."""
  return value_of(command, "init_from").startswith("runs/hh")


def grouped() -> dict[str, list[list[str]]]:
  """Group -> commands on the built-in task, none that does what another one does."""
  groups: dict[str, list[list[str]]] = {name: [] for name in GROUPS}
  seen = []
  for command in [*RUNNING, *of_methods()]:
    deed = sorted(word for word in command if not word.startswith("--workdir="))
    on_file = re.search(FILES, " ".join(command)) or goes_on(command)
    if deed not in seen and not on_file:
      seen.append(deed)
      groups[group_of(command, groups)].append(command)
  return groups


@pytest.fixture
def run_short(folder, run_script):
  """Runs commands, shortened."""

  def run(command: list[str], **more) -> None:
    script, *flags = command
    named = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
    workdir = named.pop("workdir")
    known = define_flags(script)[0]
    named |= {name: value for name, value in (SHORT | more).items() if name in known}
    if "blocks.count" in named:
      named["blocks.count"] = 1  # The model of the tests has one layer.
    given = [f"--{name}={value}" if value != "" else f"--{name}" for name, value in named.items()]
    finished = run_script(script.removeprefix("experiments."), workdir, *given)
    assert finished.code == 0, f"{command}\n{finished.output}"

  return run


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_commands_run_one_after_the_other(group, run_short, chain_run):
  commands = grouped()[group]
  assert len(commands) > 1
  pathlib.Path("runs/rlhf").symlink_to(chain_run)
  for command in commands:
    run_short(command)


@pytest.mark.slow
@full
def test_the_runs_of_claims_run(run_short, chain_run):
  pathlib.Path("runs/rlhf").symlink_to(chain_run)
  for command in of_claims():
    run_short(command)


# One command on pairs, and on prompts with either kind of reward always runs.
KINDS = r"hh_harmless|story_openings|gsm8k_train.*exact_answer"


def on_files() -> list:
  """Commands that read files, each with those that go on from its run."""
  found: list[list[list[str]]] = []
  for command in RUNNING:
    if goes_on(command):
      found[-1].append(command)
    elif re.search(FILES, " ".join(command)):
      found.append([command])
  return [
    pytest.param(group, marks=[] if re.search(KINDS, " ".join(group[0])) else full)
    for group in found
  ]


def publish_hh(shared, folder):
  """Writes rows of HH-RLHF as they are published, without a column for the prompt."""
  folder.mkdir()
  for part in ("train", "test"):
    lines = (shared / f"data/preference/hh_helpful_{part}.jsonl").read_text("utf-8").splitlines()
    with (folder / f"{part}.jsonl").open("w") as file:
      for row in map(json.loads, lines[:500]):
        sides = {side: f"{row['prompt']} {row[side]}" for side in ("chosen", "rejected")}
        file.write(json.dumps(sides) + "\n")


# Of a model that may think before each answer.
TEMPLATE = """{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}
{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}
{{ message.role }}: {{ message.content }}{% if not enable_thinking %} Quick!{% endif %}{% endif %}
{% endfor %}"""


def write_chats(shared, model):
  """Writes chats of three answers, and a model whose template marks them."""
  shutil.copytree(shared / "models/stories260k", model)
  (model / "chat_template.jinja").write_text(TEMPLATE.replace("\n", ""))
  asked, told = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}
  rows = [{"messages": [asked, told] * 3, "number": i} for i in range(16)]
  pathlib.Path("chats.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.slow
@pytest.mark.parametrize("commands", on_files(), ids=lambda commands: name_of(commands[0]))
def test_commands_on_files_run(commands, run_short, shared):
  pathlib.Path("data").symlink_to(shared / "data")
  if "--data.path=chats.jsonl" in commands[0]:
    write_chats(shared, pathlib.Path("model"))
  else:
    pathlib.Path("model").symlink_to(shared / "models/stories260k")
  # The model of the tests was made for 512 tokens.
  more: dict[str, str | int] = {"data.end_token": "<s>", "data.rows": 16, "model.extrapolate": 1}
  if "hh/train.jsonl" in " ".join(commands[0]):
    publish_hh(shared, pathlib.Path("hh"))
    more["data.max_response_length"] = 512  # A vocabulary of 512 makes many tokens.
  for command in commands:
    run_short(command, **more)


def test_a_script_explains_itself(run_script, tmp_path):
  shown = run_script("compile", tmp_path / "none", "--help")
  assert "--algorithm=" in shown.output


@pytest.mark.parametrize(
  "script", [path.stem for path in sorted(ROOT.glob("experiments/[!_]*.py"))]
)
def test_every_flag_has_a_help_text(script):
  words = ["--algorithm=ppo"] if script == "compile" else []
  registry = define_flags(f"experiments.{script}", words)[0]
  texts = {name: registry[name].help or "" for name in registry}
  silent = {name for name, text in texts.items() if re.match(r"(Default for|Required|$)", text)}
  assert silent == set()


def test_every_flag_that_is_named_exists():
  known = {"flagfile", "help", "helpfull", "check", "basetemp", "logdir"}  # Of ruff, pytest, xprof
  known |= {"xla_gpu_deterministic_ops"}  # and XLA.
  for file in (ROOT / "experiments").glob("*.py"):
    script = f"experiments.{file.stem}"
    if hasattr(importlib.import_module(script), "Config"):
      known |= set(define_flags(script)[0])
  known |= set(define_flags("experiments.compile", ["--algorithm=ppo"])[0])
  known |= {flag.name for flag in run.flags.FLAGS.get_flags_for_module(run)}
  known |= set(re.findall(r"--(\w+)", sweep.make_parser().format_help()))
  spans = [span for text in TEXTS.values() for span in re.findall(r"`([^`\n]+)`", text)]
  spans = [span.partition("--extra=")[0] for span in spans]  # Flags of other programs.
  named = {name for span in spans for name in re.findall(r"--([a-z][\w.]*)(?![\w.-])", span)}
  assert {name for name in named - known if name.removeprefix("no") not in known} == set()
