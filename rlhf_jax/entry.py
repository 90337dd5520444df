"""The entry point of a script: its flags, its exit code, and settings of the process it runs in."""

import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, logging
from absl import flags as absl_flags

from rlhf_jax import flags, processes

# The flags that `run_script` defines belong to the script, whose --help then lists them.
absl_flags.disclaim_key_flags()

EX_UNAVAILABLE = 69  # sysexits.h


def run_script(train: Callable[..., Any], *classes: type[Any]) -> None:
  """Runs `train(*configs)` with one config per dataclass, each read from the command line.

  The first dataclass has a field `workdir`, in which the flags are kept for `--flagfile`. If it is
  a `processes.Group`, its processes meet before anything else happens.
  """
  readers = [flags.define(cls) for cls in classes]

  def main(argv: Sequence[str]) -> None:
    del argv
    tune(quiet=not absl_flags.FLAGS["verbosity"].present)
    configs = [read() for read in readers]
    path = pathlib.Path(configs[0].workdir) / "flags"
    if isinstance(configs[0], processes.Group):
      configs[0].connect()
    # The flags of another run stay until this one has been accepted and has finished.
    if processes.is_first() and not path.exists():
      flags.save_flags(path)
    train(*configs)
    if processes.is_first():
      flags.save_flags(path)

  run(main)


def tune(*, quiet: bool = True) -> None:
  """Sets up a process as scripts do; call it once, before the first computation.

  A script or a notebook that calls `train` of another script is slower without it, no different.

  Args:
    quiet: True to hide what libraries log below warnings; Orbax narrates every save.
  """
  if quiet:
    logging.set_verbosity(logging.WARNING)
  _tune_for_cpu()
  # What was imported stays, and rows and traces are many objects with hardly any garbage.
  gc.freeze()
  gc.set_threshold(100_000, 20, 20)


def run(main: Callable[[Sequence[str]], Any], argv: Sequence[str] | None = None) -> None:
  """Runs a script: parses the flags, calls `main([program])`, exits with its return value.

  For an error that `verdict` knows, it exits with that code, and the message is the last line on
  stderr. Every other exception propagates with its traceback.
  """

  def flags_parser(args: Sequence[str]) -> list[str]:
    if {"--help", "-help", "-h", "--helpshort"} & set(args[1:]):
      sys.stdout.write(flags.help_text(sys.modules["__main__"].__doc__ or ""))
      sys.exit(0)
    try:
      flags.parse(args)
    except Exception as error:
      _exit(error)
    return list(args[:1])

  def checked_main(args: Sequence[str]) -> Any:
    try:
      return main(args)
    except Exception as error:
      _exit(error)

  app.run(checked_main, argv=list(argv) if argv is not None else None, flags_parser=flags_parser)


def verdict(error: Exception) -> tuple[int, str] | None:
  """Exit code and message of an error that is not a bug; None for every other one.

  The code is 1 for an unknown flag, 64 for a wrong value, 69 if a device has too little memory, and
  `error.exit_code` for an exception with that attribute.
  """
  if isinstance(error, flags.UsageError):
    return error.exitcode, str(error)
  if isinstance(error, absl_flags.Error):
    code = 1 if isinstance(error, absl_flags.UnrecognizedFlagError) else flags.EX_USAGE
    return code, f"FATAL Flags parsing error: {error}"
  if isinstance(error, ValueError) and str(error).startswith("--"):
    return flags.EX_USAGE, str(error)  # By convention the message of a wrong flag starts with it.
  if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
    return EX_UNAVAILABLE, f"{error}\n{_less_memory(absl_flags.FLAGS)}"
  code = getattr(error, "exit_code", None)
  return (code, f"{type(error).__name__}: {error}") if isinstance(code, int) else None


def _less_memory(flag_values: absl_flags.FlagValues) -> str:
  """Names the flags that would make the script take less memory than it does now."""
  micro = [name for name in flag_values if name.endswith(".microbatches")]
  ways = {
    "model.remat": (lambda remat: remat != "full", "--model.remat=full"),
    **{name: (bool, f"--{name}={2 * getattr(flag_values, name)}") for name in micro},
    "batch_size": (lambda size: size > 1, "a smaller --batch_size"),
    "lora.rank": (lambda rank: not rank, "--lora.rank=16"),
    "mesh": (lambda _: True, "--mesh over more devices"),
  }
  found = [
    way
    for name, (is_left, way) in ways.items()
    if name in flag_values and is_left(getattr(flag_values, name))
  ]
  return f"A device has too little memory. Less is taken by {', '.join(found) or 'a smaller model'}"


def _tune_for_cpu() -> None:
  """Sets what speeds up programs on the CPU; a no-op if an accelerator plugin is installed.

  It has an effect only before the first computation.
  """
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  if not plugins and not importlib.util.find_spec("libtpu"):
    _keep_freed_memory()
    _compile_quickly()


def _keep_freed_memory() -> None:
  """Lets the C library reuse freed memory, up to 1 GiB, instead of returning it to the system.

  XLA's CPU backend allocates the temporaries of a program anew in every call. glibc maps such
  blocks afresh, and their page faults take up to a fifth of a training step. A no-op with
  other C libraries.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return
  # The names in malloc.h; blocks above 64 MiB have to come from the one main arena.
  m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
  mallopt(m_mmap_max, 0)
  mallopt(m_arena_max, 1)
  mallopt(m_trim_threshold, 1 << 30)


def _compile_quickly() -> None:
  """Takes the first of LLVM's three levels of optimisation, unless XLA_FLAGS names another.

  Programs compile in two thirds of the time and run as fast: they spend most of it in matrix
  products, which come from a library.
  """
  given = os.environ.get("XLA_FLAGS", "")  # The last of two equal flags wins.
  os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=1 {given}".strip()


def _exit(error: Exception) -> NoReturn:
  known = verdict(error)
  if known is None:
    raise error
  code, message = known
  sys.stderr.write(message + "\n")
  sys.exit(code)
