"""Stages of a seed: the methods and the arms of claims, each a command in a workdir of its own.

`$NAME` in a command is the workdir of the stage `name`, which is run first; `$RM` is that of
`reward_model`.
"""

import csv
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from rlhf_jax import flags
from rlhf_jax import workdir as workdir_lib
from . import scripts

START, JUDGE = "sft", "reward_model"  # Stages that come before all others.


def lines(file: str) -> list[dict[str, str]]:
  """Returns the lines of a table of this folder, by the names of its columns."""
  path = pathlib.Path(__file__).with_name(file)
  return [*csv.DictReader(path.read_text(encoding="utf-8").splitlines())]


# Stage -> script with its flags.
COMMANDS: dict[str, str] = {
  line["name"]: line["command"] for file in ("methods.csv", "arms.csv") for line in lines(file)
}
# Seeds of a chain end in the number of the stage, so that each draws rows of its own. Methods are
# compared on the same ones.
_JUDGES = [name for name, line in COMMANDS.items() if line.split()[0] == JUDGE and name != JUDGE]
NUMBERS = {START: 1, JUDGE: 2, **{name: 4 + i for i, name in enumerate(_JUDGES)}}


def read_by(name: str) -> list[str]:
  """Returns the stages that a command names."""
  variables = re.findall(r"\$(\w+)", COMMANDS[name])
  return [JUDGE if variable == "RM" else variable.lower() for variable in variables]


def with_needed(rows: Sequence[str]) -> list[str]:
  """Returns the stages of a seed: start, judge, and each row behind those that it reads."""
  stages = [START, JUDGE]
  for name in rows:
    needed = [] if name in stages else [*with_needed(read_by(name)), name]
    stages += [stage for stage in needed if stage not in stages]
  return stages


def words(name: str, folder: pathlib.Path, seed: int) -> list[str]:
  """Returns module and flags of a stage of a seed.

  Args:
    name: Key of `COMMANDS`.
    folder: Folder of the seed, with a workdir for each stage.
    seed: Seed of the chain.
  """
  workdirs = iter(read_by(name))
  command = re.sub(r"\$\w+", lambda _: str(folder / next(workdirs)), COMMANDS[name])
  script, *flags = command.split()
  if name != START and START not in read_by(name):
    flags.append(f"--init_from={folder / START}")
  session = [f"--workdir={folder / name}", f"--seed={10 * seed + NUMBERS.get(name, 3)}"]
  return [scripts.module_name(script), *session, *flags]


def commands_behind(name: str) -> dict[str, str]:
  """Returns the commands that the numbers of a stage follow from, its own among them, by stage."""
  behind = {name: COMMANDS[name]}
  for before in [START, *read_by(name)] if name != START else []:
    behind |= commands_behind(before)
  return behind


def read_record(folder: pathlib.Path, name: str) -> dict[str, Any]:
  """Returns commands, CPU minutes and exit code of a stage; empty if its commands were others.

  The minutes are null if they are not known, and so is the code of a stage that has not ended.
  """
  path = folder / f"{name}.json"
  record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  return record if record.get("commands") == commands_behind(name) else {}


def write_record(folder: pathlib.Path, name: str, minutes: float | None, code: int | None) -> None:
  """Keeps the commands of a stage with its CPU minutes and exit code, None for unknown ones."""
  record = {"commands": commands_behind(name), "cpu_minutes": minutes, "code": code}
  workdir_lib.atomic_write(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")


def refuse_others(workdir: pathlib.Path, seeds: Sequence[int], names: Sequence[str]) -> None:
  """Refuses workdirs of stages that other commands have made.

  Raises:
    UsageError: There are some; the message names all of them.
  """
  folders = [workdir / f"seed_{seed}" for seed in seeds]
  found = [of / name for of in folders for name in names if (of / name).exists()]
  old = [str(path) for path in found if not read_record(path.parent, path.name)]
  if old:
    raise flags.UsageError(
      "commands have changed since these were measured, or those of runs that they start from:"
      f" delete {' '.join(old)}, or take another --workdir"
    )


def read_summary(folder: pathlib.Path, name: str) -> dict[str, Any] | None:
  """Returns summary.json of a stage; None if it has not finished with the present commands."""
  if read_record(folder, name).get("code") != 0:
    return None
  return json.loads((folder / name / "summary.json").read_text(encoding="utf-8"))


def seeds(workdir: pathlib.Path) -> dict[int, pathlib.Path]:
  """Returns the folders of the seeds below a workdir, in order."""
  names = [folder.name.removeprefix("seed_") for folder in workdir.glob("seed_*")]
  numbers = sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))
  return {number: workdir / f"seed_{number}" for number in numbers}
