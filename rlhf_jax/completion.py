"""Completion of the command `rlhf-jax` for shells: the names of commands and of their flags."""

import dataclasses
import importlib
import importlib.util
import pathlib
import re
from collections.abc import Mapping

from rlhf_jax import flags, loop

_BASH = """\
# Completion of rlhf-jax, written by `rlhf-jax completion bash`.
_rlhf_jax() {
  local first=1 words='' i
  for ((i = 2; i < COMP_CWORD; i++)); do  # The script of a job is after --.
    [[ ${COMP_WORDS[i]} != -- ]] || first=$((i + 1))
  done
  if ((COMP_CWORD == first)); then
    words='COMMANDS'
  else
    case ${COMP_WORDS[first]#experiments.} in
CASES
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
  [[ ${COMPREPLY[0]-} != *= ]] || compopt -o nospace
}
complete -o default -F _rlhf_jax rlhf-jax
"""
_ZSH = """\
#compdef rlhf-jax
# Completion of rlhf-jax, written by `rlhf-jax completion zsh`.
local first=2 flags='' i
for ((i = 3; i < CURRENT; i++)); do  # The script of a job is after --.
  [[ ${words[i]} != -- ]] || first=$((i + 1))
done
if ((CURRENT == first)); then
  compadd -- COMMANDS
elif compset -P '--*='; then
  _files
else
  case ${words[first]#experiments.} in
CASES
  esac
  compadd -S '' -- ${=flags}
fi
"""
# Name -> text, and the variable that it keeps the flags of a command in.
SHELLS = {"bash": (_BASH, "words"), "zsh": (_ZSH, "flags")}


def render(shell: str, known: Mapping[str, str]) -> str:
  """Returns the completion of a shell.

  Args:
    shell: Key of `SHELLS`.
    known: Module of each command.
  """
  text, variable = SHELLS[shell]
  cases = [
    f"    {name}) {variable}='{' '.join(flags_of(module))}' ;;" for name, module in known.items()
  ]
  names = " ".join([*known, "completion"])
  return text.replace("CASES", "\n".join(cases)).replace("COMMANDS", names)


def flags_of(module: str) -> list[str]:
  """Returns the flags of a command as they are typed: `--steps=`, and `--extragradient` alone."""
  if module.startswith("rlhf_jax.launch."):
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    # Not imported: launchers share names of flags, and the sweep needs an extra.
    source = pathlib.Path(spec.origin).read_text(encoding="utf-8")
    found = re.findall(r'\b(?:DEFINE_(\w+)|add)\(\s*"(?:--)?(\w+)"', source)
    return sorted({"--help", *(f"--{name}{'=' * (kind != 'bool')}" for kind, name in found)})
  page = importlib.import_module(module)
  classes = [getattr(page, "Config", None) or page.Options]
  if hasattr(page, "Config") and "workdir" not in {f.name for f in dataclasses.fields(page.Config)}:
    classes.append(loop.Session)
  return sorted({*flags.names(*classes), "--flagfile=", "--help", "--helpfull"})
