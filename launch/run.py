"""Runs a script here or on a cluster: the same command after a launcher.

  python -m launch.run --to=local -- experiments.sft --workdir=runs/sft
  python -m launch.run --to=slurm --dry_run -- experiments.sft --workdir=runs/sft

After the -- come the module and the flags of the script, each as --name=value. --dry_run shows the
files and commands and does nothing. launch/README.md helps to choose a target.
"""

import difflib
import importlib.util
import os
import pathlib
import pkgutil
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence

from absl import app, flags

from . import names
from .job import Job, JobError, Plan
from .targets import local, sky, slurm, tpu_vm, xpk

TARGETS = {
  "local": local.render,
  "slurm": slurm.render,
  "tpu_vm": tpu_vm.render,
  "xpk": xpk.render,
  "sky": sky.render,
}

TO = flags.DEFINE_enum("to", None, list(TARGETS), "Target that runs the job. Required.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show files and commands, and do nothing.")
PREFLIGHT = flags.DEFINE_bool(
  "preflight",
  False,
  "First compile the job for its TPU slice on this machine, and stop if it does not fit into the"
  " memory of the chips. Needs rlhf_jax[tpu] and takes minutes.",
)

_NAME = flags.DEFINE_string("name", "", "Name of the job; by default the last folder of --workdir.")
_ACCELERATOR = flags.DEFINE_string(
  "accelerator", "", "TPU slice such as v5litepod-16, or GPUs of a host such as H100:8."
)
_SLICES = flags.DEFINE_integer("slices", 1, "Number of TPU slices, or of hosts.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes per host without an accelerator.")
_DEVICES = flags.DEFINE_integer(
  "devices", 0, "CPU devices per process without an accelerator; 0 uses the existing ones."
)
_SHARED = flags.DEFINE_string(
  "shared", "", "Folder of a file system that all hosts mount; it must contain --workdir."
)
_MOUNT = flags.DEFINE_string(
  "mount", "", "HOST:/EXPORT of a Filestore or NFS server, for the hosts to mount on --shared."
)
_RESTARTS = flags.DEFINE_integer(
  "restarts", 10, "Maximum number of restarts after preemptions or lost hosts."
)
_SPOT = flags.DEFINE_bool("spot", False, "Use cheap capacity that may be preempted.")
_ENV = flags.DEFINE_multi_string(
  "env", [], "Environment variable of the processes, NAME=VALUE; not for secrets."
)
_SOURCE = flags.DEFINE_string(
  "source",
  "",
  "Package that a TPU VM installs: git+https://HOST/REPOSITORY@COMMIT, or a wheel on --shared.",
)
_IMAGE = flags.DEFINE_string("image", "", "Container image, for xpk.")
_PROJECT = flags.DEFINE_string("project", "", "Google Cloud project.")
_ZONE = flags.DEFINE_string("zone", "", "Google Cloud zone.")
_CLUSTER = flags.DEFINE_string("cluster", "", "GKE cluster, for xpk.")
_EXTRA = flags.DEFINE_string(
  "extra", "", "More flags for sbatch, gcloud, xpk or sky, such as '--partition=gpu --time=1-0'."
)

_SEEN_FROM_HERE = ("local", "slurm")  # Targets whose hosts have the files of this machine.
# Flags that name files or folders, which may be several, separated by commas.
_PATHS = (
  *("init_from", "model.path", "reward.path", "preference.path", "opponent", "teacher"),
  *("dense.path", "ptx_path", "data.path", "data.eval_path"),
)
# End of a name that is no part of the path: a weight of data, or the step of a run.
_BEHIND_PATH = re.compile(r":[-+.\deE]+$|@(\d+|best)$")
# Flags that experiments.compile does not have.
_SESSION_FLAGS = ("workdir", "seed", "trackers", "grace_seconds", "hang_seconds")
_SESSION_FLAGS += ("replay_step", "profile_steps", "token_cache")


def read_job(words: Sequence[str]) -> Job:
  """Builds the job from the flags and the words after the --."""
  if not words:
    raise JobError("no script is given; write it after --, such as: -- experiments.sft")
  try:
    extra = tuple(shlex.split(_EXTRA.value))
  except ValueError as error:
    raise JobError(f"--extra={_EXTRA.value} cannot be read: {error}") from None
  return Job(
    module=names.module_of(words[0]),
    flags=tuple(words[1:]),
    name=_NAME.value,
    accelerator=_ACCELERATOR.value,
    slices=_SLICES.value,
    processes=_PROCESSES.value,
    devices=_DEVICES.value,
    shared=_SHARED.value,
    mount=_MOUNT.value,
    restarts=_RESTARTS.value,
    spot=_SPOT.value,
    env=tuple(_ENV.value),
    source=_SOURCE.value,
    image=_IMAGE.value,
    project=_PROJECT.value,
    zone=_ZONE.value,
    cluster=_CLUSTER.value,
    extra=extra,
  )


def check_module(module: str) -> None:
  """Refuses a module that its package does not have, if the package is installed here."""
  module = module.removesuffix(".py")
  package, _, name = module.rpartition(".")
  try:
    spec = importlib.util.find_spec(package or module)
  except ModuleNotFoundError:
    spec = None
  if not package and spec is not None:
    return
  if package == "rlhf_jax.experiments":
    known = names.scripts()
  elif spec is not None and spec.submodule_search_locations:
    known = [each.name for each in pkgutil.iter_modules(spec.submodule_search_locations)]
  elif package in ("", "experiments"):
    known = names.scripts()
  else:
    return  # The hosts may have it.
  close = difflib.get_close_matches(name, known, n=1)
  if name in known or (not package and not close):
    return
  outer = f"{package}." if package else ""
  hint = f"did you mean {outer}{close[0]}?" if close else f"there are {', '.join(known)}"
  raise JobError(f"there is no module {module}; {hint}")


def check_paths(job: Job) -> None:
  """Refuses a file or folder that is missing, for hosts that see the files of this machine."""
  if any(word.startswith(("--dependency", "-d")) for word in job.extra):
    return  # An earlier job may write it.
  for name in _PATHS:
    value = job.flag(name)
    for path in [value] if os.path.exists(value) else map(str.strip, value.split(",")):
      pattern = "://" in path or re.search(r"[*?\[]", path)
      found = map(os.path.exists, (path, _BEHIND_PATH.sub("", path)))
      if path and not pattern and not any(found):
        raise JobError(f"--{name}={path}: there is no such file or folder; nothing was submitted")


def check_flags(job: Job) -> None:
  """Lets the script check its flags, if jax is installed here."""
  if importlib.util.find_spec("jax") is None:
    return
  command = job.command(sys.executable, "--only_check_args")
  done = subprocess.run(command, check=False, capture_output=True, text=True)
  if done.returncode:
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    raise JobError(f"{job.module}: {lines[-1]}; nothing was submitted")


def preflight_command(job: Job) -> tuple[str, ...]:
  """Command that compiles the programs of the job for its absent slice."""
  algorithm = names.module_of(job.module).removeprefix("rlhf_jax.experiments.")
  if not job.hardware.is_tpu or job.slices > 1:
    raise JobError("--preflight compiles for one slice of TPUs; leave it out")
  session = tuple(f"--{name}=" for name in _SESSION_FLAGS)
  kept = [flag for flag in job.flags if not flag.startswith(session)]
  target = (f"--algorithm={algorithm}", f"--topology={job.hardware.topology}")
  return (sys.executable, "-m", names.module_of("compile"), *target, *kept)


def describe(job: Job) -> str:
  """Describes the script and its hardware in one line."""
  hardware = job.hardware
  times = f"{job.slices} x " if job.slices > 1 else ""
  chips = f", {job.slices * hardware.chips} chips, hosts: {job.hosts}" if hardware.is_tpu else ""
  return f"{job.name}: {job.module} on {times}{hardware.name}{chips}"


def show(plan: Plan) -> str:
  """Formats a plan as text: files, commands, and commands for later."""
  parts = [f"# {path}\n{text}" for path, text in plan.files.items()]
  if plan.commands:
    parts.append("".join(f"$ {shlex.join(command)}\n" for command in plan.commands))
  if plan.later:
    parts.append("".join(f"{what}:\n  {command}\n" for what, command in plan.later.items()))
  return "\n".join(parts)


def submit(plan: Plan) -> int:
  """Writes the files and runs the commands; returns the first nonzero exit code, or 0."""
  for path, text in plan.files.items():
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(text, encoding="utf-8")
  for command in plan.commands:
    try:
      process = subprocess.Popen(command)
    except FileNotFoundError:
      raise JobError(
        f"{command[0]} is not installed here; launch/README.md says how to get it"
      ) from None
    # A script that runs here saves its state when the launcher is told to stop. The terminal sends
    # Ctrl-C to the script too, and the script reports how it ended.
    signal.signal(signal.SIGTERM, lambda *unused, to=process: to.terminate())
    signal.signal(signal.SIGINT, lambda *unused: None)
    code = process.wait()
    if code:
      return 128 - code if code < 0 else code  # Signals are encoded as in a shell.
  return 0


def launch(words: Sequence[str]) -> int:
  """Checks, shows and submits; returns the exit code."""
  if TO.value is None:
    raise JobError(f"--to is needed, one of {', '.join(TARGETS)}; see --help")
  job = read_job(words)
  check_module(job.module)
  plan = TARGETS[TO.value](job)
  compiling = [preflight_command(job)] if PREFLIGHT.value else []
  if TO.value in _SEEN_FROM_HERE:
    check_paths(job)
  if TO.value != "local" or DRY_RUN.value:  # Else the script itself is about to check them.
    check_flags(job)
  if DRY_RUN.value:
    plan = plan._replace(commands=(*compiling, *plan.commands))
    print(f"# {describe(job)}\n\n{show(plan)}", end="")
    return 0
  if compiling and (code := subprocess.run(compiling[0], check=False).returncode):
    return code
  code = submit(plan)
  if not code and plan.later:
    print(show(plan._replace(files={}, commands=())), end="")
  return code


def parse(argv: Sequence[str]) -> list[str]:
  """Reads the flags of the launcher; exits if they are invalid."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    strayed = isinstance(error, flags.UnrecognizedFlagError) and "--" not in argv
    hint = "; the script and its flags come after --" if strayed else ""
    print(f"{error}{hint}", file=sys.stderr)
    sys.exit(os.EX_USAGE)


def main(argv: Sequence[str]) -> int:
  """Runs the launcher; returns the exit code."""
  try:
    return launch(argv[1:])
  except JobError as error:
    print(error, file=sys.stderr)
    return os.EX_USAGE


if __name__ == "__main__":
  __doc__ = names.as_typed(__doc__)
  app.run(main, flags_parser=parse)
