"""What several test files share."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Literal

import jax

from rlhf_jax.models import ModelConfig, build
from rlhf_jax.types import Params

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
  remat=False,
)


@functools.cache
def tiny_params(head: Literal["language", "scalar"] = "language", seed: int = 0) -> Params:
  """Params of the tiny model; do not donate them."""
  return jax.jit(build(TINY_MODEL, head).init)(jax.random.key(seed))


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
