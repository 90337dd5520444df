"""The commands of README and of the launch documents run as written, but shorter and smaller."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
LAUNCH = [
  block
  for name in ("launch/README.md", "launch/SWEEPS.md")
  for block in re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)
]
CELLS = re.findall(r"\| `(python -m experiments\.[^`]*)` \|", README)
# How long a run is and how large, which is what is changed here.
SIZES = {"steps", "batch_size", "data.rows", "data.eval_rows", "sampling.max_new_tokens"}
# Bash shows what it would call, after its own expansion of words, variables and functions: one write
# a call, for calls in the background share the pipe.
SHOW = r"""
set -eu
python() { local IFS=$'\x1f'; printf '%s\x1e' "$*"; }
pip() { :; }
"""


def block_with(*words: str) -> str:
  (found,) = [block for block in BLOCKS if all(word in block for word in words)]
  return found


def calls(text: str, **variables: object) -> list[list[str]]:
  """Arguments of each `python` in a piece of bash."""
  env = {"PATH": os.environ["PATH"]} | {name: str(value) for name, value in variables.items()}
  command = ["bash", "-c", SHOW + text]
  output = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
  return [call.split("\x1f") for call in output.split("\x1e") if call.strip()]


@pytest.fixture
def place(tmp_path, sft_run, reward_run, shared_run):
  """A folder whose `runs` holds what README's first command leaves."""
  ppo = shared_run("documents_ppo", "ppo", f"--init_from={sft_run}", f"--reward.path={reward_run}")
  chain = tmp_path / "runs" / "rlhf"
  chain.mkdir(parents=True)
  for name, run in {"sft": sft_run, "reward_model": reward_run, "ppo": ppo}.items():
    (chain / name).symlink_to(run)
  (tmp_path / "runs" / "sft").symlink_to(sft_run)
  return tmp_path


@pytest.fixture
def follow(place, run_script, start_script):
  """`follow(text, *more, **variables)` runs every command of a piece of bash."""

  def run(text: str, *more: str, **variables: object) -> None:
    text = re.sub(r"\bruns/", f"{place}/runs/", text)
    found = calls(text, **variables)
    assert found
    together = []
    for _, module, *flags in found:
      script = module.removeprefix("experiments.")
      (workdir,) = [flag.split("=", 1)[1] for flag in flags if flag.startswith("--workdir=")]
      other = {*SIZES, "workdir", *(flag[2:].split("=")[0] for flag in more)}
      kept = [flag for flag in flags if flag[2:].split("=")[0] not in other]
      kept = [flag if "critic_warmup" not in flag else "--critic_warmup=1" for flag in kept]
      if any("--process_id" in flag for flag in kept):
        together.append(start_script(script, pathlib.Path(workdir), *kept, *more))
        continue
      finished = run_script(script, workdir, *kept, *more)
      assert finished.code == 0, finished.output
    for finished in [running.end(timeout=300) for running in together]:
      assert finished.code == 0, finished.output

  return run


def test_every_command_is_met_here():
  """A new block needs a test below."""
  assert len(BLOCKS) == 12
  assert len(CELLS) == 9
  assert len(LAUNCH) == 10


def test_the_chain(follow):
  command = BLOCKS[0].rpartition("&&")[2].replace(".venv/bin/python", "python")
  follow(command.replace("runs/rlhf", "runs/whole"))


def test_other_algorithms(follow):
  follow(block_with("experiments.kto", "runs/grpo"))


def test_a_report(follow):
  follow(block_with("experiments.plot"))


def test_without_a_reward(follow):
  follow(block_with("runs/who_beats_whom"))


def test_several_processes(follow):
  follow(block_with("--process_id"))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_an_absent_slice(follow):
  follow(block_with("experiments.compile"))


@pytest.mark.parametrize("command", CELLS, ids=lambda text: text.split("data ")[-1][:24])
def test_real_data(command, follow, shared):
  function = block_with("data()")
  model = shared / "models" / "stories260k"
  small = ("--data.end_token=<s>", "--steps=1", "--batch_size=2", "--data.eval_rows=8")
  text = function + command + " --workdir=runs/x"
  follow(text, *small, M=model, D=shared / "data")


def test_human_preferences(follow, shared):
  text = block_with("FOLDER", "HH")
  follow(
    text,
    *("--data.end_token=<s>", "--steps=1"),
    *("--data.max_prompt_length=256", "--data.max_response_length=256"),  # Of a small vocabulary.
    FOLDER=shared / "models/stories260k",
    HH=shared / "data/preference",
  )


def test_a_python_reward(follow, shared):
  follow(
    block_with("PROMPTS"), MODEL=shared / "models/stories260k", PROMPTS=shared / "data/prompts"
  )


def test_labels(follow, place, shared):
  """People are played in annotate_test and annotate_page_test; here they think as the judge."""
  block = block_with("experiments.annotate")
  by_people = [line for line in block.splitlines() if "--annotator=ada" in line]
  assert len(by_people) == 2
  pairs = place / "pairs.jsonl"
  lines = (shared / "data/preference/hh_helpful_test.jsonl").read_text().splitlines()
  pairs.write_text("\n".join(lines[:16]) + "\n")
  judge, *trained = [line for line in block.splitlines() if line not in by_people]
  model = str(shared / "models/stories260k")
  judge = judge.replace("FOLDER", model).replace("PAIRS.jsonl", str(pairs))
  follow(judge, "--data.end_token=<s>", "--judge.max_characters=80")
  (place / "runs/hand").mkdir()
  shutil.copy(place / "runs/ai/labels.jsonl", place / "runs/hand")
  flags = ("--data.eval_fraction=0", "--data.overlong=drop")
  follow("\n".join(trained), *flags, "--batch_size=4")


@pytest.mark.parametrize("block", [b for b in LAUNCH if "launch.run" in b], ids=range(6))
def test_launches(block):
  """Shown and not done: the engines are met in tests/launch."""
  for _, module, *flags in calls(block):
    command = [sys.executable, "-m", module, "--dry_run", *flags]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "experiments." in shown.stdout


@pytest.mark.parametrize(
  "block", [block_with("launch.sweep"), LAUNCH[-3]], ids=["readme", "launch"]
)
def test_a_sweep(block, place):
  (call,) = calls(re.sub(r"\bruns/", f"{place}/runs/", block))
  command = [sys.executable, *call, "--batch_size=8", "--steps=1", "--sampling.max_new_tokens=4"]
  command += ["--data.rows=64", "--data.eval_rows=8"]
  command[command.index("--trials=40")] = "--trials=2"
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  assert len((place / "runs/sweep/table.csv").read_text().splitlines()) == 3
