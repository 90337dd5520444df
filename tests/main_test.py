"""The command `rlhf-jax` by itself; tests/packaging_test.py runs it where it is installed."""

import pathlib
import sys

import pytest

import rlhf_jax
from rlhf_jax import __main__ as command

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(monkeypatch, *words: str) -> int:
  monkeypatch.setattr(sys, "argv", ["rlhf-jax", *words])
  return command.main()


@pytest.mark.parametrize(
  "words, columns", [((), 80), (("--help",), 80), (("-h",), 200), (("help",), 20)]
)
def test_help_is_a_table_of_every_command(monkeypatch, capsys, words, columns):
  monkeypatch.setenv("COLUMNS", str(columns))
  assert run(monkeypatch, *words) == 0
  lines = capsys.readouterr().out.splitlines()
  table = dict(line.split(maxsplit=1) for line in lines[lines.index("") :] if line[:2] == "  ")
  scripts = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__"}
  assert scripts | {"launch", "sweep", "pod", "completion"} <= set(table)
  assert not scripts & {"launch", "sweep", "pod", "completion", "help"}
  assert max(map(len, lines)) <= max(columns, 80)
  if columns >= 80:
    assert table["sft"] == "Fine-tunes a language model on demonstrations"


@pytest.mark.parametrize(
  "words, message",
  [
    (("ppoo",), "there is no command ppoo; did you mean ppo?"),
    (("reward-model",), "there is no command reward-model; did you mean reward_model?"),
    (("--workdir=x",), "there is no command --workdir=x; rlhf-jax --help lists them"),
    (("../ppo",), "there is no command ../ppo; did you mean ppo?"),
    (("completion",), "give a shell: rlhf-jax completion bash|zsh"),
    (("completion", "fish"), "give a shell: rlhf-jax completion bash|zsh"),
  ],
)
def test_refuses_in_one_line(monkeypatch, capsys, words, message):
  assert run(monkeypatch, *words) == 64
  assert capsys.readouterr().err == message + "\n"


def test_the_version(monkeypatch, capsys):
  assert run(monkeypatch, "--version") == 0
  assert capsys.readouterr().out == f"rlhf_jax {rlhf_jax.__version__}\n"
  project = (ROOT / "pyproject.toml").read_text()
  assert f'version = "{rlhf_jax.__version__}"' in project
  assert f"version: {rlhf_jax.__version__}\n" in (ROOT / "rlhf_jax" / "CITATION.cff").read_text()
