"""Timing of work on one device: interleaved runs, compiles, peak memory, limits to compare with.

Benchmarks run several pieces of work in turn, so that a busy machine slows all of them alike.
"""

import contextlib
import json
import pathlib
import resource
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax import entry, flags, reporting, workdir
from . import turns

MIB = 2**20


class Work(NamedTuple):
  """Piece of work.

  Attributes:
    run: Function that does it once and returns arrays that depend on all of it.
    tokens: Number of tokens that it trains on or samples.
    flops: Operations that it needs at least, counted from the architecture.
    bytes: Bytes that it reads at least, if reading bounds it; else 0.
  """

  run: Callable[[], Any]
  tokens: int
  flops: float
  bytes: float = 0.0


class Limits(NamedTuple):
  """Operations and bytes per second of this device, measured in this process."""

  flops: float
  bandwidth: float


class Recompiled(RuntimeError):
  """A program was compiled after the warm-up."""


@contextlib.contextmanager
def compilations() -> Generator[list[str]]:
  """Names of the functions that are compiled inside, also those read from the compilation cache."""
  names: list[str] = []

  def listen(event: str, duration_secs: float, **about: Any) -> None:
    del duration_secs
    if event.endswith("backend_compile_duration"):
      names.append(str(about.get("fun_name", "")))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def reset_peak() -> None:
  """Makes `peak_bytes` start anew, where the system allows it: Linux, on a CPU."""
  with contextlib.suppress(OSError):
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
  """Peak memory of the device since it was first used; on a CPU, of the process."""
  statistics_of = jax.devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in statistics_of:
    return int(statistics_of["peak_bytes_in_use"])
  with contextlib.suppress(OSError):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
      if line.startswith("VmHWM:"):
        return 1024 * int(line.split()[1])
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _best_seconds(run: Callable[[], Any], seconds: float = 0.3) -> float:
  """Shortest time of a short program."""
  jax.block_until_ready(run())
  times: list[float] = []
  start = time.perf_counter()
  while len(times) < 3 or time.perf_counter() - start < seconds:
    before = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - before)
  return min(times)


def measure_limits(dtype: Any = jnp.float32, size: int = 0) -> Limits:
  """Measures the rate of a matrix product, and of a copy that is larger than caches.

  Args:
    dtype: Dtype of both.
    size: Side of the square matrices; 0 chooses by the device.
  """
  size = size or (1024 if jax.devices()[0].platform == "cpu" else 8192)
  product = jax.jit(lambda a, b: a @ b)
  square = jnp.ones((size, size), dtype)
  flops = 2 * size**3 / _best_seconds(lambda: product(square, square))
  copy = jax.jit(lambda x: x + 1)
  block = jnp.ones((64 * size * size // 4,), dtype)  # 64 MiB in float32 on a CPU.
  return Limits(flops, 2 * block.nbytes / _best_seconds(lambda: copy(block)))


def interleaved(works: Mapping[str, Work], rounds: int) -> dict[str, dict[str, Any]]:
  """Runs each piece of work once per round, in turn, after a warm-up of two runs.

  Args:
    works: Work by name.
    rounds: Number of rounds.

  Returns:
    Name -> the fields of JSON: `seconds` and `cpu_seconds` of each run, `median`, `min`, `cpu` (the
    median of `cpu_seconds`), `tokens_per_second`, `peak_bytes`, `compiles` and `first_seconds` of
    the warm-up, and the numbers of `Work`.

  Raises:
    Recompiled: A program was compiled after the warm-up.
  """
  rows: dict[str, dict[str, Any]] = {}
  for name, work in works.items():
    with compilations() as compiled:
      start = time.perf_counter()
      jax.block_until_ready(work.run())
      first = time.perf_counter() - start
      reset_peak()
      jax.block_until_ready(work.run())
    rows[name] = {
      "tokens": work.tokens,
      "flops": work.flops,
      "bytes": work.bytes,
      "compiles": len(compiled),
      "first_seconds": first,
      "peak_bytes": peak_bytes(),
      "seconds": [],
      "cpu_seconds": [],
    }
  for _ in range(rounds):
    for name, work in works.items():
      with compilations() as compiled:
        start, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(work.run())
        rows[name]["cpu_seconds"].append(time.process_time() - cpu)
        rows[name]["seconds"].append(time.perf_counter() - start)
      if compiled:
        raise Recompiled(f"{name} compiled {', '.join(compiled)} after the warm-up")
  for row in rows.values():
    median = statistics.median(row["seconds"])
    row |= {
      "median": median,
      "min": min(row["seconds"]),
      "cpu": statistics.median(row["cpu_seconds"]),
      "tokens_per_second": row["tokens"] / median,
    }
  return rows


def compare_with(limits: Limits, rows: Mapping[str, dict[str, Any]]) -> None:
  """Adds to each row its share of the limits: `mfu`, and `bandwidth_share` if it has `bytes`."""
  for row in rows.values():
    row["mfu"] = row["flops"] / row["median"] / limits.flops
    if row["bytes"]:
      row["bandwidth_share"] = row["bytes"] / row["median"] / limits.bandwidth


def environment() -> dict[str, Any]:
  """Returns what the numbers depend on besides the work: device and versions."""
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "jax": jax.__version__,
    "cores": len(turns.available_cores()),
  }


def show(title: str, rows: Mapping[str, Mapping[str, Any]], limits: Limits) -> None:
  """Shows the table of `interleaved` rows, in at most 80 columns."""
  reporting.note(
    f"limits: {limits.flops / 1e9:.0f} GFLOP/s of a matrix product, {limits.bandwidth / 1e9:.1f}"
    " GB/s of a copy"
  )
  reporting.show_summary(title, {name: _cells(row) for name, row in rows.items()})


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
  cells = {
    "median s": f"{row['median']:.3g}",
    "min s": f"{row['min']:.3g}",
    "CPU s": f"{row['cpu']:.3g}",
    "tokens/s": f"{row['tokens_per_second']:.0f}",
    "MiB": f"{row['peak_bytes'] / MIB:.0f}",
    "programs": str(row["compiles"]),
    "MFU": f"{row['mfu']:.0%}",
  }
  if "bandwidth_share" in row:
    cells["floor"] = f"{row['bandwidth_share']:.0%}"
  return cells


def largest_program() -> dict[str, Any]:
  """Bytes of the largest program of this process: arguments, temporaries, and all together."""
  largest: dict[str, Any] = {"arguments": 0, "temporaries": 0, "program": 0}
  for program in jax.devices()[0].client.live_executables():
    sizes = program.get_compiled_memory_stats()
    written = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    total = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + written
    if total > largest["program"]:
      largest = {
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "program": total,
      }
  return largest


def content_of(config: Any, **results: Any) -> dict[str, Any]:
  """Returns the content of a JSON file: the config, the environment, and results."""
  return {"config": flags.to_dict(config), "environment": environment(), **results}


def write_json(path: str, content: Mapping[str, Any]) -> None:
  """Writes the results, if there is a path."""
  if path:
    workdir.atomic_write(workdir.local_path(path), json.dumps(content, indent=2) + "\n")


def keep(config: Any, **results: Any) -> dict[str, Any]:
  """Writes the results to the file `config.json`, if it is given; returns the content."""
  content = content_of(config, **results)
  write_json(config.json, content)
  return content


def run_script(run: Callable[[Any], Any], config: type[Any]) -> None:
  """Runs a benchmark with its config, read from the command line."""
  read = flags.define(config)

  def main(argv: Sequence[str]) -> None:
    del argv
    entry.tune()
    run(read())

  entry.run(main)
