"""Helpers of several test files."""

import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal
from unittest import mock

import jax
import numpy as np
import pytest
from absl import flags as absl_flags

from rlhf_jax import entry, flags, sharding
from rlhf_jax.models import ModelConfig, build
from rlhf_jax.models.transformer import RopeScaling
from rlhf_jax.types import PackedBatch, Params, SharedBatch, TokenBatch

_PRELOADED = [
  "experiments.lab.training",
  "rlhf_jax.algorithms.ppo",
  "matplotlib.backends.backend_agg",
  "matplotlib.figure",
  "transformers.tokenization_utils_tokenizers",
]

# For what takes long and differs little from another test.
full = pytest.mark.skipif("FULL" not in os.environ, reason="takes long; FULL=1 runs it")

# Text that a page must show as text.
INJECTION = (
  '<img src=x onerror="window.hurt=1"><script>window.hurt=1</script> ${window.hurt=1}'
  " {{constructor.constructor('window.hurt=1')()}} [a](javascript:window.hurt=1) </div></section>"
)

# Small enough to compile in seconds; large weights, so that its outputs differ between tokens.
TINY_MODEL = ModelConfig(
  vocab_size=16,
  width=16,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=8,
  mlp_width=32,
  init_std=0.3,
  remat="none",
)
_SMALL = ModelConfig(
  vocab_size=24,
  width=16,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=6,
  mlp_width=20,
  max_length=64,
  init_std=0.3,
)
_GEMMA = dataclasses.replace(
  _SMALL,
  norm="rms_plus_one",
  post_norms=True,
  activation="gelu_tanh",
  embed_scale=True,
  query_width=10,
)
# Every family with everything that its folders can say and Llama's cannot. Windows are shorter than
# the sequences of the tests, and the caps bend most scores.
FAMILY_MODELS = {
  "qwen2": dataclasses.replace(_SMALL, family="qwen2", qkv_bias=True, windows=(None, 3)),
  "qwen3": dataclasses.replace(_SMALL, family="qwen3", qk_norm=True, tied=False),
  "mistral": dataclasses.replace(_SMALL, family="mistral", windows=(3, 3), tied=False),
  "gemma2": dataclasses.replace(
    _GEMMA, family="gemma2", windows=(3, None), attention_softcap=2.0, logit_softcap=3.0
  ),
  "gemma3": dataclasses.replace(
    _GEMMA,
    family="gemma3",
    layers=3,
    qk_norm=True,
    rope_scaling=RopeScaling("linear", 4.0),
    rope_local_theta=100.0,
    windows=(3, 3, None),
  ),
  "gpt2": dataclasses.replace(
    _SMALL,
    family="gpt2",
    head_dim=4,
    kv_heads=4,
    max_length=40,
    norm="layer",
    activation="gelu_tanh",
    gated_mlp=False,
    positions="learned",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
  ),
  "mixtral": dataclasses.replace(
    _SMALL, family="mixtral", experts=4, windows=(3, 3), tied=False, rope_theta=1e6
  ),
  "qwen3_moe": dataclasses.replace(
    _SMALL,
    family="qwen3_moe",
    experts=6,
    experts_per_token=3,
    normalized_router=False,
    qk_norm=True,
  ),
  "phi3": dataclasses.replace(
    _SMALL, family="phi3", head_dim=8, rotary_fraction=0.5, windows=(4, 4), tied=False
  ),
}


@functools.cache
def tiny_params(head: Literal["language", "scalar"] = "language", seed: int = 0) -> Params:
  """Params of the tiny model; do not donate them."""
  return jax.jit(build(TINY_MODEL, head).init)(jax.random.key(seed))


def forked(target: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
  """Starts `target(*args)` in a process forked from one that has imported what all scripts import.

  Half of the time of a short run would be these imports.
  """
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(_PRELOADED)
  process = context.Process(target=target, args=args)
  process.start()
  return process


def wait_for(
  what: Callable[[], Any],
  seconds: float,
  *,
  or_say: Callable[[], str] = str,
  pause: float = 0.2,  # Most of what is asked starts a program.
) -> Any:
  """Returns the first true result of `what()`; fails with `or_say()` after `seconds`."""
  deadline = time.monotonic() + seconds
  while not (found := what()):
    assert time.monotonic() < deadline, or_say()
    time.sleep(pause)
  return found


def pack(batch: TokenBatch, layout: Sequence[Sequence[int]], length: int) -> PackedBatch:
  """Packs right-padded sequences or pairs, whose masks end where they do, into fewer rows.

  Args:
    batch: [N, T] or [N, 2, T].
    layout: Indices of the sequences in each row, in order.
    length: Length of the rows; padding is filled with any tokens.
  """
  tokens, mask = (np.asarray(x) for x in batch)
  sides = tokens.shape[1:-1]
  shape = (len(layout), *sides, length)
  packed = np.random.default_rng(9).integers(1, 16, shape, np.int32), np.zeros(shape, bool)
  segments = np.zeros(shape, np.int32)
  real = np.zeros((len(layout), max(map(len, layout)) + 1), bool)  # One place is always free.
  for row, members in enumerate(layout):
    real[row, : len(members)] = True
    for side in np.ndindex(sides):
      start = 0
      for number, n in enumerate(members, 1):
        size = np.flatnonzero(mask[(n, *side)])[-1] + 1
        here = (row, *side, slice(start, start + size))
        packed[0][here], packed[1][here] = tokens[n, *side, :size], mask[n, *side, :size]
        segments[here] = number
        start += size
  return PackedBatch(*packed, segments, real)


def share(batch: TokenBatch) -> SharedBatch:
  """Puts right-padded responses to the same prompt, [N, K, T], in one row behind it."""
  given, mask = (np.asarray(x) for x in batch)
  prompts, sizes = np.argmax(mask[:, 0], axis=-1), mask.sum(axis=-1)
  length = int(np.max(prompts + sizes.sum(axis=1))) + 1  # Padding is any token.
  tokens = np.random.default_rng(9).integers(1, 16, (len(given), length), np.int32)
  places = np.full(mask.shape, length, np.int32)
  for n, prompt in enumerate(prompts):
    end = prompt
    for side, size in enumerate(sizes[n]):
      start, end = end, end + size
      tokens[n, start:end] = given[n, side, prompt : prompt + size]
      places[n, side, : prompt + size] = [*range(prompt), *range(start, end)]
    tokens[n, :prompt] = given[n, 0, :prompt]
  return SharedBatch(tokens, mask, places)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
  """The names of the functions that are compiled inside, in their order.

  The size of the cache of a jitted function would not tell: all of them share one, which drops the
  programs that were not called lately.
  """
  names: list[str] = []

  def listen(event: str, seconds: float, **about) -> None:
    del seconds
    if event.endswith("backend_compile_duration"):
      names.append(str(about["fun_name"]).removeprefix("jit(").removesuffix(")"))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def define_flags(
  script: str, words: Sequence[str] = ()
) -> tuple[absl_flags.FlagValues, list[Callable[[], Any]]]:
  """Flags of a script, such as `experiments.dpo`, and readers of its dataclasses, in order.

  The first dataclass is that of the session, if the script has one.
  """
  module = importlib.import_module(script)
  classes = [module.Config] if hasattr(module, "Config") else [module.Options]
  if script.endswith("experiments.compile"):
    name = module.algorithm_of(words)
    classes += [module.plans.script_of(name).Config] if name else []
  elif "workdir" not in {field.name for field in dataclasses.fields(classes[0])}:
    classes.insert(0, module.loop.Session)
  registry = absl_flags.FlagValues()
  return registry, [flags.define(cls, flag_values=registry) for cls in classes]


def read_flags(script: str, words: Sequence[str]) -> absl_flags.FlagValues:
  """Flags of a script, read and checked as it does before it starts."""
  return _read(script, words)[0]


def read_configs(script: str, words: Sequence[str]) -> list[Any]:
  """Dataclasses of a script, read and checked as it does before it starts."""
  return _read(script, words)[1]


def _read(script: str, words: Sequence[str]) -> tuple[absl_flags.FlagValues, list[Any]]:
  registry, readers = define_flags(script, words)
  flags.parse([script, *words], registry)
  return registry, [read() for read in readers]


@contextlib.contextmanager
def on_devices(count: int) -> Iterator[None]:
  """Runs that are opened inside use the first devices, not all of this process."""
  make_mesh = sharding.make_mesh

  def make(spec: str = "", devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    every = jax.devices()
    if devices is None:
      devices = every[:count]
    elif devices[0] == every[0]:  # Those that do not only sample.
      devices = devices[: count + len(devices) - len(every)]
    return make_mesh(spec, devices)

  with mock.patch.object(sharding, "make_mesh", make):
    yield


def start(script: str, *words: str, devices: int = 1) -> Any:
  """Runs `experiments.SCRIPT` in this process, on some of its devices; returns what it returns."""
  name = f"experiments.{script}"
  module = importlib.import_module(name)
  registry, configs = _read(name, words)
  train = getattr(module, "train", None) or getattr(module, script)
  with on_devices(devices):
    return entry.start(train, configs, lambda path: flags.save_flags(path, registry))


def refusal(script: str, *words: str, devices: int = 1) -> tuple[int, str]:
  """Exit code and message, of one line, of `experiments.SCRIPT`, which refuses to run."""
  try:
    start(script, *words, devices=devices)
  except (Exception, KeyboardInterrupt) as error:
    known = entry.verdict(error)
    if known is None:
      raise
    assert "\n" not in known[1] and "\x1b" not in known[1]
    return known
  raise AssertionError(f"{script} {' '.join(words)} was not refused")
