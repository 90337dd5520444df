"""Cost of a run: a trace of a few steps, operations per second, memory of the devices."""

import contextlib
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax

from rlhf_jax import processes, reporting

FOLDER = "profile"

# Peak operations per second in bfloat16 without sparsity, by the name that JAX gives the device:
# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and the data sheets of NVIDIA. A chip
# of TPU7x is two devices.
PEAK_FLOPS = {
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU7x": 1153e12,
  "NVIDIA A100-PCIE-40GB": 312e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA L4": 121e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2250e12,
}


def parse_steps(text: str) -> range:
  """Steps of `FIRST:END`, of which the first is traced and the end is not; empty for no text.

  Raises:
    ValueError: The text is no such range, or no step is in it.
  """
  if not text:
    return range(0)
  match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
  if match is None:
    raise ValueError(f"profile_steps must be FIRST:END, such as 20:23, got {text!r}")
  first, end = map(int, match.groups())
  if not 1 <= first < end:
    raise ValueError(
      f"profile_steps={text} has no step: steps count from 1, and 20:23 are the steps 20, 21 and 22"
    )
  return range(first, end)


class Profiler:
  """Traces steps into `WORKDIR/profile`, for xprof and Perfetto; changes nothing in the run.

  The files of all processes of a run are in one folder, which xprof shows as one trace.
  """

  def __init__(self, workdir: pathlib.Path, steps: range):
    self._folder, self._steps, self._name = workdir / FOLDER, steps, ""
    self._own: tempfile.TemporaryDirectory[str] | None = None

  def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
    """Returns the context of a step, counted from 1; starts the trace with the first of them."""
    if number not in self._steps:
      return contextlib.nullcontext()
    if self._own is None:
      self._name = processes.agree(lambda: time.strftime(f"%Y_%m_%d_%H_%M_%S_step_{number}"))
      self._folder.mkdir(parents=True, exist_ok=True)
      # JAX names files by the host and the second, which processes may have in common.
      self._own = tempfile.TemporaryDirectory(prefix=".trace.", dir=self._folder)
      jax.profiler.start_trace(self._own.name, create_perfetto_trace=True)
    return jax.profiler.StepTraceAnnotation("step", step_num=number)

  def after(self, number: int, state: Any) -> None:
    """Ends the trace after the last of its steps, once the devices have finished it."""
    if self._own is not None and number + 1 not in self._steps:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    """Writes what was traced so far."""
    own, self._own = self._own, None
    if own is None:
      return
    self._steps = range(0)
    with own:
      jax.profiler.stop_trace()
      folder = self._folder / "plugins" / "profile" / self._name
      folder.mkdir(parents=True, exist_ok=True)
      process = f"process_{jax.process_index()}." if jax.process_count() > 1 else ""
      for file in pathlib.Path(own.name).glob("plugins/profile/*/*"):
        os.replace(file, folder / f"{process}{file.name}")
    reporting.note(f"trace: {self._folder}, for xprof --logdir or https://ui.perfetto.dev")


def rates(
  metrics: Mapping[str, float], seconds: float, mesh: jax.sharding.Mesh
) -> dict[str, float]:
  """Metrics per second of a step: tokens, those of rollout and update apart, operations, MFU.

  The update is what is neither sampling nor scoring. MFU is its share of `PEAK_FLOPS`, undefined
  for devices without an entry.

  Args:
    metrics: Metrics of the step, with `tokens`, `tokens/drawn` (of responses that were left out
      too) and `model_flops` where they are known.
    seconds: Duration of the step.
    mesh: Devices that train.
  """
  found, tokens = {}, metrics.get("tokens")
  judged = metrics.get("time/reward", metrics.get("time/preference"))
  apart = "time/generate" in metrics and judged is not None and "staleness" not in metrics
  update = seconds
  if apart:
    update = max(seconds - metrics["time/generate"] - judged, 1e-9)
  if tokens is not None:
    found["tokens_per_second"] = tokens / max(seconds, 1e-9)
    if apart:
      drawn = metrics.get("tokens/drawn", tokens)
      found["tokens_per_second/rollout"] = drawn / max(metrics["time/generate"], 1e-9)
      found["tokens_per_second/update"] = tokens / update
  if "model_flops" in metrics:
    speed = metrics["model_flops"] / max(update, 1e-9)
    found["model_flops_per_second"] = speed
    peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
    if peak is not None:
      found["mfu"] = speed / (peak * mesh.size)
  return found


def memory(mesh: jax.sharding.Mesh) -> dict[str, float]:
  """Bytes in use and their peak on the fullest local device; empty where a backend does not say."""
  local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
  stats = [s for d in local if (s := d.memory_stats())]
  names = {"memory/in_use": "bytes_in_use", "memory/peak": "peak_bytes_in_use"}
  return {
    name: float(max(s[key] for s in stats))
    for name, key in names.items()
    if stats and all(key in s for s in stats)
  }
