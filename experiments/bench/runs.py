r"""Times several runs in one program, beside the same runs one after the other.

Eight seeds of SFT with a tiny model (ten seconds on one core):
  python -m experiments.bench.runs
Larger models, whose arithmetic takes longer than what is between the steps:
  python -m experiments.bench.runs --layers=2 --width=64 --mlp_width=128

`step by step` places each batch and calls the train step, as scripts do.
`scanned` makes each run one program, and `vmapped` all runs together. Their
losses have to be the same.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import preflight, ranges, reporting, train_step
from rlhf_jax.algorithms import sft
from rlhf_jax.types import TokenBatch
from . import measure, works
from .shapes import Setup, Shape, set_up

TOLERANCE = 1e-4  # Relative.


@dataclasses.dataclass(frozen=True)
class Config(Shape):
  """Sizes, and the runs.

  Attributes:
    runs: Number of runs, which differ in their seed.
    steps: Steps of each run.
    rounds: Timed repetitions.
    json: File to write the results to; empty writes none.
  """

  vocab_size: int = 64
  layers: int = 1
  width: int = 16
  heads: int = 2
  mlp_width: int = 32
  prompt: int = 4
  response: int = 8
  runs: int = 8
  steps: int = 100
  rounds: int = 5
  json: str = ""

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, at_least_one=("runs", "steps", "rounds"))


def ways(setup: Setup, runs: int, steps: int) -> dict[str, Callable[[], jax.Array]]:
  """Builds functions that train all runs, and return their losses [runs, steps]."""
  shape = setup.shape
  # A rate at which losses that are equal to the tolerance are those of the same updates.
  tx = train_step.make_optimizer(dataclasses.replace(works.OPTIM, learning_rate=1e-3), steps)
  apply = functools.partial(setup.policy.apply, scored=shape.length)
  step = sft.make_sft_step(apply, tx, sft.SFTConfig())
  rng = np.random.default_rng(shape.seed)
  sizes = (steps, shape.batch_size, shape.length)
  fields: Any = rng.integers(0, shape.vocab_size, sizes, np.int32), np.ones(sizes, bool)
  batches = TokenBatch(*fields)
  on_host = [TokenBatch(*batch) for batch in zip(*fields, strict=True)]
  seeds = jnp.arange(runs)

  def start(seed: jax.Array) -> Any:
    key = jax.random.key(seed)
    return train_step.init_state(setup.policy.init(key), tx), key

  def train(seed: jax.Array) -> jax.Array:
    state, key = start(seed)
    _, metrics = jax.lax.scan(lambda state, batch: step(state, batch, key), state, batches)
    return metrics["loss"]

  begin, scanned, vmapped = jax.jit(start), jax.jit(train), jax.jit(jax.vmap(train))

  def by_step(seed: jax.Array) -> jax.Array:
    state, key = begin(seed)
    losses = []
    for batch in on_host:
      state, metrics = step(state, setup.place(batch), key)
      losses.append(metrics["loss"])
    return jnp.stack(losses)

  return {
    "step by step": lambda: jnp.stack([by_step(seed) for seed in seeds]),
    "scanned": lambda: jnp.stack([scanned(seed) for seed in seeds]),
    "vmapped": lambda: vmapped(seeds),
  }


def run(config: Config) -> dict[str, Any]:
  """Times the three ways, shows them, and returns the content of the JSON file."""
  setup = set_up(config)
  table = ways(setup, config.runs, config.steps)
  losses = {name: np.asarray(train()) for name, train in table.items()}
  for name, found in losses.items():
    if not np.allclose(found, losses["step by step"], rtol=TOLERANCE, atol=0):
      raise ArithmeticError(f"the losses of the runs {name} are not those of the runs step by step")
  times, count = config.runs * config.steps, config.batch_size
  forward = preflight.forward_flops(config.model, count, config.length, scored=config.length)
  tokens = times * count * config.length
  flops = times * preflight.training(config.model, forward).flops
  rows = measure.interleaved(
    {name: measure.Work(train, tokens, flops) for name, train in table.items()}, config.rounds
  )
  for row in rows.values():
    row["ratio"] = rows["step by step"]["median"] / row["median"]
  reporting.show_summary(
    f"{config.runs} runs of {config.steps} steps",
    {
      name: {
        "median s": f"{row['median']:.3g}",
        "CPU s": f"{row['cpu']:.3g}",
        "steps/s": f"{times / row['median']:.0f}",
        "times as fast": f"{row['ratio']:.2f}",
      }
      for name, row in rows.items()
    },
  )
  return measure.keep(config, works=rows)


if __name__ == "__main__":
  measure.run_script(run, Config)
