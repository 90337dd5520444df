r"""Measures training, decoding and PPO on one GPU against its limits, in one call of ten minutes.

  python -m experiments.bench.gpu --torch_python=/path/to/python --json=gpu.json

The limits are a matrix product and a copy, measured in the same process. The parts, in this order:
  torch     SFT and decoding in torch with the Llama of transformers, if --torch_python has CUDA
  train     SFT: MFU, without the operations of recomputation (goal: 50 % and more)
  decode    sampling at each of --decode_batches, without the prefill: share of the floor that the
            bytes of weights and caches set (goal: 65 % and more)
  ppo       iteration, over the sum of the least times of its parts: sampling, scoring, reference
            and update (goal: 1.6 and less)

A part for which --budget_s leaves no time is dropped. The default shape is a Llama of 1.5B params
with rows of 2,048 tokens. On other devices give smaller sizes.
"""

import dataclasses
import gc
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from rlhf_jax import preflight, ranges, reporting
from rlhf_jax.models.transformer import RematName
from . import measure, turns, works
from .shapes import Setup, Shape, set_up

PROGRAM = pathlib.Path(__file__).resolve().parent / "peers" / "torch_on_device.py"
GOALS = {"train": 0.5, "decode": 0.65, "ppo": 1.6}


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the parts.

  Attributes:
    vocab_size: Size of the vocabulary.
    layers: Number of transformer blocks.
    width: Width of the model.
    heads: Number of attention heads.
    kv_heads: Number of key and value heads.
    mlp_width: Width of the MLPs.
    dtype: Dtype of the computation; params and optimizer state stay float32.
    remat: Activations that the backward pass recomputes; see experiments.sft.
    train_rows: Rows per SFT step.
    length: Tokens of a row of SFT.
    decode_batches: Numbers of responses sampled at once.
    prompt: Tokens of a prompt.
    response: Tokens of a response.
    ppo_rows: Responses of a PPO iteration.
    ppo_epochs: Passes over them.
    ppo_minibatches: Optimizer steps per pass.
    rounds: Timed runs of each part.
    budget_s: Seconds that the call may take.
    torch_python: Python with torch and transformers; empty leaves torch out.
    json: File to write the results to; empty writes none.
  """

  vocab_size: int = 128256
  layers: int = 16
  width: int = 2048
  heads: int = 32
  kv_heads: int = 8
  mlp_width: int = 8192
  dtype: Literal["float32", "bfloat16"] = "bfloat16"
  remat: RematName = "none"
  train_rows: int = 8
  length: int = 2048
  decode_batches: tuple[int, ...] = (64, 256)
  prompt: int = 256
  response: int = 256
  ppo_rows: int = 64
  ppo_epochs: int = 1
  ppo_minibatches: int = 4
  rounds: int = 5
  budget_s: float = 600.0
  torch_python: str = ""
  json: str = ""

  def __post_init__(self):
    ranges.check(self, at_least_one=("rounds", "train_rows"), positive=("budget_s",))
    if self.length < 2 or self.response < 2:
      raise ValueError("length and response must be at least 2")
    self.shape()

  def shape(self, **changes: Any) -> Shape:
    """Shape of the model, with the batches of a part."""
    names = ("vocab_size", "layers", "width", "heads", "kv_heads", "mlp_width", "dtype", "remat")
    sizes: dict[str, Any] = {"prompt": self.prompt, "response": self.response}
    sizes |= {"batch_size": self.ppo_rows, "epochs": self.ppo_epochs}
    sizes |= {"minibatches": self.ppo_minibatches, "samples_per_prompt": 1} | changes
    return Shape(**{name: getattr(self, name) for name in names}, **sizes)

  @property
  def train_shape(self) -> Shape:
    """Shape of SFT."""
    half = self.length // 2
    return self.shape(
      batch_size=self.train_rows, prompt=self.length - half, response=half, minibatches=1
    )


def timed(setup: Setup, make: Callable[[Setup], measure.Work], rounds: int) -> dict[str, Any]:
  """Times a piece of work; returns the fields of `measure.interleaved`."""
  return measure.interleaved({"work": make(setup)}, rounds)["work"]


def forward(shape: Shape, *, scored: int | None = None) -> float:
  """Operations of a forward pass over the rows of a shape."""
  return preflight.forward_flops(shape.model, shape.batch_size, shape.length, scored=scored)


def train(config: Config, limits: measure.Limits) -> dict[str, dict[str, Any]]:
  """SFT against the product."""
  shape = config.train_shape
  row = timed(set_up(shape), works.sft_step, config.rounds)
  flops = 3 * forward(shape, scored=shape.length)
  return {"train": row | {"flops": flops, "share": flops / row["median"] / limits.flops}}


def sampling(setup: Setup) -> preflight.Work:
  """Least work of sampling one response per prompt."""
  s = setup.shape
  return preflight.sampling(s.model, setup.run.mesh, s.batch_size, 1, s.prompt, s.response)


def without_prefill(seconds: float, prefill: float) -> float:
  """Seconds of all tokens but the first.

  Raises:
    Unavailable: They are too few to measure.
  """
  if prefill >= seconds:
    raise turns.Unavailable("sampling takes no longer than its first token; raise --response")
  return seconds - prefill


def decode(config: Config, limits: measure.Limits) -> dict[str, dict[str, Any]]:
  """Sampling without the prefill, which is the time of sampling one token, against the copy."""
  rows = {}
  for size in config.decode_batches:
    setup = set_up(config.shape(batch_size=size, minibatches=1))
    first = setup._replace(shape=dataclasses.replace(setup.shape, response=1))
    row = timed(setup, works.generate, config.rounds)
    prefill = timed(first, works.generate, config.rounds)["median"]
    work, steps = sampling(setup), config.response - 1
    seconds = without_prefill(row["median"], prefill)
    row |= {
      "prefill": prefill,
      "decode": seconds,
      "tokens_per_second": size * steps / seconds,
      "share": steps * work.bytes_per_step / limits.bandwidth / seconds,
    }
    rows[f"decode {size}"] = row
    del setup, first
    gc.collect()
  return rows


def ppo_rooflines(setup: Setup, limits: measure.Limits) -> dict[str, float]:
  """Least seconds of the parts of a PPO iteration: for its operations or its bytes."""
  shape, work = setup.shape, sampling(setup)
  policy, scalar = forward(shape, scored=shape.response), forward(shape)
  prefill = preflight.forward_flops(shape.model, shape.batch_size, shape.prompt, scored=1)
  steps = work.steps * work.bytes_per_step / limits.bandwidth
  return {
    "sampling": prefill / limits.flops + max(steps, (work.flops - prefill) / limits.flops),
    "scoring": 2 * scalar / limits.flops,  # Reward model and critic.
    "reference": policy / limits.flops,
    "update": 3 * shape.epochs * (policy + scalar) / limits.flops,
  }


def ppo(config: Config, limits: measure.Limits) -> dict[str, dict[str, Any]]:
  """PPO iteration over the sum of the rooflines of its parts."""
  setup = set_up(config.shape())
  row = timed(setup, works.ppo_iteration, config.rounds)
  parts = ppo_rooflines(setup, limits)
  return {"ppo": row | {"rooflines": parts, "times": row["median"] / sum(parts.values())}}


def torch_side(config: Config, seconds: float) -> dict[str, dict[str, Any]]:
  """SFT and decoding in torch, each in a process that ends before ours uses the device.

  Raises:
    Unavailable: It is not there, sees no GPU, fails or takes too long.
  """
  if not config.torch_python:
    raise turns.Unavailable("no --torch_python")
  deadline, rows = time.monotonic() + seconds, {}
  shapes = {"train": config.train_shape}
  shapes |= {
    f"decode {n}": config.shape(batch_size=n, minibatches=1) for n in config.decode_batches
  }
  with tempfile.TemporaryDirectory() as folder:
    for name, shape in shapes.items():
      path = pathlib.Path(folder) / "spec.json"
      spec = {"shape": dataclasses.asdict(shape), "optimizer": dataclasses.asdict(works.OPTIM)}
      path.write_text(json.dumps(spec | {"rounds": config.rounds}), encoding="utf-8")
      work = "sft" if name == "train" else "generate"
      command = [config.torch_python, str(PROGRAM), str(path), work]
      answer = ask(command, deadline - time.monotonic())
      median = statistics.median(answer["seconds"])
      tokens = shape.batch_size * (shape.length if work == "sft" else shape.response - 1)
      median = median if work == "sft" else without_prefill(median, answer["prefill"])
      rows[f"torch {name}"] = answer | {"median": median, "tokens_per_second": tokens / median}
  return rows


def ask(command: list[str], seconds: float) -> dict[str, Any]:
  """Runs a program of `peers/` and returns the JSON object in its last line.

  Raises:
    Unavailable: It cannot be started, fails or takes too long.
  """
  variables = dict(os.environ)
  variables.pop("PYTHONPATH", None)
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, check=False, timeout=max(seconds, 1), env=variables
    )
  except subprocess.TimeoutExpired as error:
    raise turns.Unavailable(f"takes more than {error.timeout:.0f} s") from error
  except OSError as error:
    raise turns.Unavailable(str(error)) from error
  if done.returncode:
    raise turns.Unavailable(turns.last_line(done.stderr))
  return json.loads(turns.last_line(done.stdout))


class Clock:
  """Time that is left. A part is dropped if less is left than the longest part so far took."""

  def __init__(self, budget: float, now: Callable[[], float] = time.monotonic):
    self._now, self._end = now, now() + budget
    self._longest = 0.0

  @property
  def left(self) -> float:
    """Seconds until the end of the budget."""
    return self._end - self._now()

  def run(self, name: str, part: Callable[[], Any]) -> Any:
    """Runs a part.

    Raises:
      Unavailable: There is too little time for it.
    """
    left = self.left
    if left < self._longest or left <= 0:
      raise turns.Unavailable(f"{left:.0f} s left are too few")
    reporting.note(f"{name}: {left:.0f} s left")
    try:
      return part()
    finally:
      self._longest = max(self._longest, left - self.left)


class Part(NamedTuple):
  """Part with its goal."""

  name: str
  measure: Callable[[Config, measure.Limits], dict[str, dict[str, Any]]]


PARTS = (Part("train", train), Part("decode", decode), Part("ppo", ppo))


def run(config: Config) -> dict[str, Any]:
  """Measures all parts that the budget allows; returns the content of the JSON file."""
  clock = Clock(config.budget_s)
  rows: dict[str, dict[str, Any]] = {}
  skipped: dict[str, str] = {}
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # Nothing else uses the device.
  try:  # Before JAX takes the memory of the device.
    reporting.note(f"torch: {clock.left:.0f} s left")
    rows |= torch_side(config, 0.3 * config.budget_s)
  except turns.Unavailable as error:
    skipped["torch"] = str(error)
  limits = measure.measure_limits(config.dtype)
  content = measure.content_of(
    config, limits=limits._asdict(), goals=GOALS, works=rows, skipped=skipped
  )
  for part in PARTS:
    try:
      rows |= clock.run(part.name, lambda part=part: part.measure(config, limits))
    except turns.Unavailable as error:
      skipped[part.name] = str(error)
    gc.collect()  # The next part needs the memory.
    measure.write_json(config.json, content)
  for name, row in rows.items():
    if name.startswith("torch") and (ours := rows.get(name.removeprefix("torch "))):
      row["ratio"] = ours["tokens_per_second"] / row["tokens_per_second"]
  measure.write_json(config.json, content)
  show(content)
  return content


def show(content: Mapping[str, Any]) -> None:
  """Shows the table, in at most 80 columns."""
  limits = measure.Limits(**content["limits"])
  reporting.note(
    f"limits: {limits.flops / 1e12:.3g} TFLOP/s of a matrix product,"
    f" {limits.bandwidth / 1e12:.3g} TB/s of a copy"
  )
  rows = {name: _cells(name, row) for name, row in content["works"].items()}
  reporting.show_summary(content["environment"]["device"], rows)
  if "ppo" in content["works"]:
    parts = content["works"]["ppo"]["rooflines"]
    least = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in parts.items())
    reporting.note(f"rooflines of PPO: {least}")
  for name, reason in content["skipped"].items():
    reporting.note(f"{name}: left out: {reason}")


def _cells(name: str, row: Mapping[str, Any]) -> dict[str, str]:
  result, goal = "", ""
  if name == "train":
    result, goal = f"{row['share']:.0%} MFU", f">= {GOALS['train']:.0%}"
  elif name == "ppo":
    result, goal = f"{row['times']:.2f} x rooflines", f"<= {GOALS['ppo']}"
  elif name.startswith("decode"):
    result, goal = f"{row['share']:.0%} of floor", f">= {GOALS['decode']:.0%}"
  elif "ratio" in row:
    result = f"ours is {row['ratio']:.2f} x"
  return {
    "seconds": f"{row.get('decode', row['median']):.3g}",
    "tokens/s": f"{row['tokens_per_second']:.0f}",
    "GiB so far": f"{row['peak_bytes'] / 2**30:.1f}",  # A GPU cannot forget its peak.
    "result": result,
    "goal": goal,
  }


if __name__ == "__main__":
  measure.run_script(run, Config)
