"""The command `rlhf-jax`: scripts, launcher and sweep by name, in any folder.

  rlhf-jax sft --workdir=runs/sft
  rlhf-jax ppo --help
  rlhf-jax launch --to=slurm -- sft --workdir=runs/sft
  rlhf-jax sweep --study=runs/sweep --space=dpo -- dpo --init_from=runs/sft

Completion of commands and of their flags, to write again after an update:
  rlhf-jax completion bash > FILE  # And `source FILE` in ~/.bashrc.
  rlhf-jax completion zsh > FOLDER/_rlhf-jax  # A folder of $fpath.
"""

import ast
import difflib
import importlib
import importlib.util
import os
import pathlib
import re
import runpy
import shutil
import sys
import textwrap
from collections.abc import Sequence

import rlhf_jax

SCRIPTS = "rlhf_jax.experiments"
LAUNCHERS = {
  "launch": "rlhf_jax.launch.run",
  "pod": "rlhf_jax.launch.pod",
  "sweep": "rlhf_jax.launch.sweep",
}


def modules() -> dict[str, str]:
  """Returns the module of each command."""
  (folder,) = importlib.import_module(SCRIPTS).__path__
  names = sorted(path.stem for path in pathlib.Path(folder).glob("*.py"))
  return {name: f"{SCRIPTS}.{name}" for name in names if name != "__init__"} | LAUNCHERS


def summary(module: str) -> str:
  """Returns the first sentence of the docstring of a module, which is not imported."""
  spec = importlib.util.find_spec(module)
  assert spec is not None and spec.origin is not None
  tree = ast.parse(pathlib.Path(spec.origin).read_bytes())
  return " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split()).rstrip(".")


def help_text(width: int) -> str:
  """Returns the text of --help: a table of the commands, one line each.

  Args:
    width: Columns of the terminal.
  """
  known = modules() | {"completion": __name__}
  column = max(map(len, known)) + 4
  lines = []
  for name, module in known.items():
    words = "Writes the completion of bash or of zsh" if module == __name__ else summary(module)
    if len(words) > width - column:
      words = textwrap.shorten(re.split("[:,;]", words)[0], width - column, placeholder=" ...")
    lines.append(f"  {name:{column - 2}}{words}")
  table = "\n".join(["Commands; --help after one lists its flags:", *lines])
  return f"{(__doc__ or '').strip()}\n\n{table}\n"


def main() -> int:
  """Runs the command line; returns the exit code, unless the command ends the process."""
  name, *words = sys.argv[1:] or ["--help"]
  known = modules()
  if name in ("--help", "-h", "help"):
    sys.stdout.write(help_text(max(shutil.get_terminal_size().columns, 40)))
  elif name == "--version":
    print(f"rlhf_jax {rlhf_jax.__version__}")
  elif name == "completion":
    return _complete(words, known)
  elif name in known:
    # Last: no file of the working directory hides what is installed.
    if "" not in sys.path and os.getcwd() not in sys.path:
      sys.path.append(os.getcwd())
    sys.argv = [name, *words]
    # What `python -m` does: the module is `__main__` of this process and of those it starts.
    runpy.run_module(known[name], run_name="__main__", alter_sys=True)
  else:
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    hint = f"did you mean {near[0]}?" if near else "rlhf-jax --help lists them"
    print(f"there is no command {name}; {hint}", file=sys.stderr)
    return os.EX_USAGE
  return 0


def _complete(words: Sequence[str], known: dict[str, str]) -> int:
  from rlhf_jax import completion  # Imports jax and every script.

  if len(words) != 1 or words[0] not in completion.SHELLS:
    print(f"give a shell: rlhf-jax completion {'|'.join(completion.SHELLS)}", file=sys.stderr)
    return os.EX_USAGE
  sys.stdout.write(completion.render(words[0], known))
  return 0


if __name__ == "__main__":
  sys.exit(main())
