"""The entry point of a script: its flags, its exit code, and settings of the process it runs in."""

import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import logging as standard_logging
import os
import pathlib
import platform
import re
import resource
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, logging
from absl import flags as absl_flags

from rlhf_jax import flags, hub, processes, reporting, watch, workdir

# The flags that `run_script` defines belong to the script, whose --help then lists them.
absl_flags.disclaim_key_flags()


def run_script(train: Callable[..., Any], *classes: type[Any], keep_flags: bool = True) -> None:
  """Runs `train(*configs)` with one config per dataclass, each read from the command line.

  The first dataclass has a field `workdir`, in which the flags are kept for `--flagfile`. If it is
  a `processes.Group`, its processes meet before anything else happens. With --only_check_args the
  configs are only read, and those with a method `require` say what they lack.

  Args:
    train: Function of the configs.
    *classes: Dataclasses of the configs.
    keep_flags: False for a script that works on the workdir of another one, whose flags stay.
  """
  readers = [flags.define(cls) for cls in classes]

  def check() -> None:
    flags.refuse_both("epochs", "steps")
    for config in [read() for read in readers]:
      getattr(config, "require", lambda: None)()

  def main(argv: Sequence[str]) -> None:
    del argv
    tune(quiet=not absl_flags.FLAGS["verbosity"].present)
    flags.refuse_both("epochs", "steps")
    configs = [read() for read in readers]

    def save(path: pathlib.Path) -> None:
      for name in ("steps", "epochs"):  # The number of rows may have settled them.
        if name in absl_flags.FLAGS and hasattr(configs[-1], name):
          absl_flags.FLAGS[name].value = getattr(configs[-1], name)
      flags.save_flags(path)

    start(train, configs, save if keep_flags else lambda path: None)

  run(main, check=check)


def start(
  train: Callable[..., Any],
  configs: Sequence[Any],
  save: Callable[[pathlib.Path], None],
) -> Any:
  """Runs `train(*configs)` and keeps the flags, which `save(path)` writes, in its workdir.

  Raises:
    DeviceError: JAX finds no device of the platform that it was told to use.
    LockedError: The workdir cannot be made or written.
  """
  first: Any = configs[0]
  if isinstance(first, processes.Group):
    first.connect()
  require_devices()
  # Process 0 goes first, so that all end with its error where it can neither read nor write.
  processes.agree(lambda: workdir.make(workdir.run_folder(first.workdir)))
  folder = workdir.run_folder(first.workdir)
  settings = [flags.flatten(flags.to_dict(config)) for config in configs]
  hub.settle(folder, [value for values in settings for value in values.values()])
  result = train(*configs)
  # The flags of another run stay until this one has been accepted and has finished.
  processes.agree(lambda: save(folder / "flags"))
  return result


class DeviceError(RuntimeError):
  """JAX has no device to compute on."""

  exit_code = os.EX_UNAVAILABLE


def require_devices() -> None:
  """Refuses a platform without devices, before anything is read.

  Raises:
    DeviceError: JAX finds no device of the platform that it was told to use.
  """
  try:
    jax.devices()
  except Exception as error:  # Of various types, one of them an assertion.
    wanted = os.environ.get("JAX_PLATFORMS") or jax.config.values.get("jax_platforms") or ""
    reason = next(iter(str(error).splitlines()), "") or "no plugin for it is installed"
    given = f"JAX_PLATFORMS={wanted}" if wanted else "jax"
    raise DeviceError(
      f"{given} finds no device here ({_short(reason)}); leave JAX_PLATFORMS unset to use what is"
      " there, or install the plugin: pip install 'jax[tpu]' or 'jax[cuda13]'"
    ) from error


def tune(*, quiet: bool = True) -> None:
  """Sets up a process as scripts do; call it once, before the first computation.

  A script or a notebook that calls `train` of another script is slower without it, no different.

  Args:
    quiet: True to hide what libraries log below warnings; Orbax narrates every save.
  """
  if quiet:
    logging.set_verbosity(logging.WARNING)
  _tune_for_cpu()
  _keep_programs()
  # What was imported stays, and rows and traces are many objects with hardly any garbage.
  gc.freeze()
  gc.set_threshold(100_000, 20, 20)


def run(
  main: Callable[[Sequence[str]], Any],
  argv: Sequence[str] | None = None,
  *,
  check: Callable[[], None] | None = None,
) -> None:
  """Runs a script: parses the flags, calls `main([program])`, exits with its return value.

  For an error that `verdict` knows, it exits with that code, and the message is the last line on
  stderr. Every other exception propagates with its traceback. With --only_check_args `check` is
  called in place of `main`. What a file, a model or a library wrote can not control the terminal,
  in none of these nor in a line that is logged.
  """
  sys.excepthook = _show_error
  _log_harmlessly()

  def flags_parser(args: Sequence[str]) -> list[str]:
    if {"--help", "-help", "-h", "--helpshort"} & set(args[1:]):
      sys.stdout.write(flags.help_text(_usage()))
      sys.exit(0)
    try:
      flags.parse(args)
      if check is not None and absl_flags.FLAGS.only_check_args:
        check()
    except Exception as error:
      _exit(error)
    return list(args[:1])

  def checked_main(args: Sequence[str]) -> Any:
    try:
      return main(args)
    except (Exception, KeyboardInterrupt) as error:
      _exit(error)

  app.run(checked_main, argv=list(argv) if argv is not None else None, flags_parser=flags_parser)


_NEIGHBOUR = re.compile("Gloo .* failed|closed by peer|reset by peer|coordination service")


def verdict(error: BaseException) -> tuple[int, str] | None:
  """Exit code and message, of one line, of an error that is not a bug; None for every other one.

  The code is 1 for an unknown flag and 64 for a wrong value. It is 69 if memory does not suffice,
  73 if a file cannot be created, 74 if the disk is full or fails, 75 if another process of the run
  has gone, and 130 for Ctrl-C. It is `error.exit_code` for an exception with that attribute.
  """
  known = _verdict(error)
  return known and (known[0], reporting.escape(" ".join(known[1].split("\n"))))


def _verdict(error: BaseException) -> tuple[int, str] | None:
  if isinstance(error, watch.Interrupted):
    return error.exit_code, str(error)
  if isinstance(error, KeyboardInterrupt):
    return watch.EX_INTERRUPTED, "stopped; the same command starts again from the last checkpoint"
  if isinstance(error, flags.UsageError):
    return error.exitcode, str(error)
  if isinstance(error, absl_flags.Error):
    return os.EX_USAGE, f"FATAL Flags parsing error: {error}"
  if isinstance(error, ValueError) and str(error).startswith("--"):
    return os.EX_USAGE, str(error)  # By convention the message of a wrong flag starts with it.
  if _has_lost_a_neighbour(error):
    reason = _short(str(error).split("\n")[0])
    gone = f"another process of this run has gone ({reason}); start all of them again"
    return os.EX_TEMPFAIL, gone
  if processes.lacks_memory(error):
    return os.EX_UNAVAILABLE, _less_memory(absl_flags.FLAGS, str(error))
  code = getattr(error, "exit_code", None)
  if isinstance(code, int):
    return code, f"{type(error).__name__}: {error}"
  if isinstance(error, OSError) and (code := processes.code_of(error)) is not None:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return code, f"{where}{error.strerror}{_CONTINUES if code == os.EX_IOERR else ''}"
  if reason := workdir.no_room(error):  # Of a library that has an exception of its own.
    return os.EX_IOERR, f"{reason}{_CONTINUES}"
  return None


def _has_lost_a_neighbour(error: BaseException) -> bool:
  return jax.distributed.is_initialized() and bool(_NEIGHBOUR.search(str(error)))


_CONTINUES = "; make room, then start the same command again"


def _short(text: str) -> str:
  return text if len(text) <= 160 else f"{text[:157]}..."


def _less_memory(flag_values: absl_flags.FlagValues, error: str) -> str:
  """Names the flags that would make the script take less memory than it does now."""
  micro = [name for name in flag_values if name.endswith(".microbatches")]
  ways = {
    "model.remat": (lambda remat: remat != "full", "--model.remat=full"),
    **{name: (bool, f"--{name}={2 * getattr(flag_values, name)}") for name in micro},
    "batch_size": (lambda size: size > 1, "a smaller --batch_size"),
    "lora.rank": (lambda rank: not rank and _is_pretrained(flag_values), "--lora.rank=16"),
    "mesh": (lambda _: True, "--mesh over more devices"),
  }
  found = [
    way
    for name, (is_left, way) in ways.items()
    if name in flag_values and is_left(getattr(flag_values, name))
  ]
  amount = re.search(r"(?:allocat\w+|allocate) ([0-9][0-9.]* ?(?:bytes|[KMGTP]i?B))", error)
  size = f" for {amount[1]}" if amount else ""
  less = ", ".join([*found, "a smaller model"])
  return f"A device has too little memory{size}. Less is taken by {less}"


def _is_pretrained(flag_values: absl_flags.FlagValues) -> bool:
  """Returns whether the flags name a model to start from."""
  names = [name for name in ("init_from", "model.path") if name in flag_values]
  return any(getattr(flag_values, name) for name in names)


def _tune_for_cpu() -> None:
  """Sets what speeds up programs on the CPU; a no-op if an accelerator plugin is installed.

  It has an effect only before the first computation.
  """
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  if not plugins and not importlib.util.find_spec("libtpu"):
    _keep_freed_memory()
    _use_large_pages()
    _compile_quickly()


def _keep_freed_memory() -> None:
  """Lets the C library reuse freed memory instead of returning it to the system.

  XLA's CPU backend allocates the temporaries of a program anew in every call. glibc maps such
  blocks afresh, and their page faults take up to a fifth of a training step. A process stays as
  large as its largest program. A no-op with other C libraries.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return
  # The names in malloc.h; blocks above 64 MiB have to come from the one main arena.
  m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
  mallopt(m_mmap_max, 0)
  mallopt(m_arena_max, 1)
  mallopt(m_trim_threshold, -1)  # Never.


def _use_large_pages() -> None:
  """Asks for large pages for what the C library allocates, if `_keep_freed_memory` had an effect.

  Many systems give pages of 2 MiB only to memory that asks for them. They save a step of training
  3 % and one of sampling 10 % of its time. A block of half the memory of the machine is allocated
  and freed at once: the heap has grown by it, and what is not touched takes no memory. That is left
  out where the system counts memory when it is allocated, or limits what may be.
  """
  try:
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    counted = pathlib.Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii")
    libc = ctypes.CDLL(None)
    malloc, free, madvise, _ = libc.malloc, libc.free, libc.madvise, libc.mallopt
  except (AttributeError, OSError, TypeError):
    return
  if counted.strip() == "2" or any(limit != resource.RLIM_INFINITY for limit in limits):
    return
  page = os.sysconf("SC_PAGE_SIZE")
  size = os.sysconf("SC_PHYS_PAGES") // 2 * page
  malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  free.restype, free.argtypes = None, [ctypes.c_void_p]
  madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  block = malloc(size)
  if block is not None:
    madv_hugepage = 14  # The name in sys/mman.h; an error changes nothing.
    madvise(-(-block // page) * page, size - page, madv_hugepage)
    free(block)


def _compile_quickly() -> None:
  """Takes the first of LLVM's three levels of optimisation, unless XLA_FLAGS names another.

  Programs compile in two thirds of the time and run as fast: they spend most of it in matrix
  products, which come from a library.
  """
  given = os.environ.get("XLA_FLAGS", "")  # The last of two equal flags wins.
  os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=1 {given}".strip()


_PROGRAM_BYTES = 4 << 30  # A run of a large model adds about a tenth of it.


def _keep_programs() -> None:
  """Keeps compiled programs for later runs of this user, unless JAX was told where to keep them.

  They are machine code. So they stay in the user's cache folder, which is left alone if another
  user owns it or may write to it, and each kind of CPU has programs of its own.
  """
  if jax.config.values["jax_compilation_cache_dir"]:
    return
  home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
  folder = home / "rlhf_jax" / "programs" / _cpu_digest()
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (folder, folder.parent, folder.parent.parent):
      status = path.stat()
      if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        return
    files = [(file.stat(), file) for file in folder.iterdir()]
    kept = sum(status.st_size for status, _ in files)
    for status, file in sorted(files, key=lambda pair: pair[0].st_mtime):
      if kept <= _PROGRAM_BYTES:
        break
      file.unlink(missing_ok=True)
      kept -= status.st_size
  except OSError:  # No such folder can be made, or another process cleans up.
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _cpu_digest() -> str:
  """Returns a name of the instructions that this CPU has."""
  about = platform.machine()
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
  return hashlib.sha256(about.encode()).hexdigest()[:16]


def _show_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
  """Writes an exception as Python does, but harmless to a terminal."""
  text = "".join(traceback.format_exception(kind, error, trace))
  sys.stderr.write(reporting.escape(text, newlines=True))


@functools.cache
def _log_harmlessly() -> None:
  """Makes the texts of all loggers harmless to a terminal."""
  make = standard_logging.getLogRecordFactory()

  def make_harmless(*args: Any, **kwargs: Any) -> standard_logging.LogRecord:
    record = make(*args, **kwargs)
    with contextlib.suppress(Exception):  # Whoever writes the record says what is wrong with it.
      record.msg, record.args = reporting.escape(record.getMessage(), newlines=True), ()
    return record

  standard_logging.setLogRecordFactory(make_harmless)


def _exit(error: BaseException) -> NoReturn:
  """Ends the process with the code of an error, without waiting for what may never come."""
  known = verdict(error)
  others = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
  waits = others or jax.distributed.is_initialized()
  if known is None and not waits:
    raise error
  code, message = known or (1, "".join(traceback.format_exception(error)).rstrip("\n"))
  sys.stderr.write(message + "\n")
  if waits:  # The threads of a save that failed wait for minutes; so does JAX, for its neighbours.
    sys.stdout.flush()
    sys.stderr.flush()
    if not _has_lost_a_neighbour(error):
      processes.part()
    os._exit(code)
  sys.exit(code)


def _usage() -> str:
  """Returns the docstring of the script, with its commands as they are typed where installed."""
  main = sys.modules["__main__"]
  text, spec = main.__doc__ or "", getattr(main, "__spec__", None)
  is_installed = spec is not None and spec.name.startswith("rlhf_jax.experiments.")
  return text.replace("python -m experiments.", "rlhf-jax ") if is_installed else text
