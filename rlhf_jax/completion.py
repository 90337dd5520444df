"""Completion of the command `rlhf-jax` for shells: the names of commands and of their flags."""

import dataclasses
import importlib
import re
import types
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
  """Returns the flags of a command as they are typed: `--steps=`, and `--extragradient` alone.

  A launcher whose extra is not installed has none.
  """
  try:
    page = importlib.import_module(module)
  except ImportError:
    return []
  if hasattr(page, "make_parser"):
    names = re.findall(r"^ +(--\w+)", page.make_parser().format_help(), re.MULTILINE)
    return sorted({f"{name}=" for name in names} | {"--help"})
  registry = _registry(page)
  found = registry.get_flags_for_module(page) or [registry[name] for name in registry]
  named = {f"--{flag.name}{'' if flag.boolean else '='}" for flag in found}
  return sorted(named | {"--flagfile=", "--help", "--helpfull"})


def _registry(page: types.ModuleType) -> flags.flags.FlagValues:
  """Returns the flags of a script, which it defines when it is run, or those of a launcher."""
  config = getattr(page, "Config", None)
  options = config or getattr(page, "Options", None)
  if options is None:
    return flags.flags.FLAGS
  registry = flags.flags.FlagValues()
  flags.define(options, flag_values=registry)
  if config and "workdir" not in {field.name for field in dataclasses.fields(config)}:
    flags.define(loop.Session, flag_values=registry)
  return registry
