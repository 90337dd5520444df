"""LoRA: low-rank adapters beside frozen weights.

Hu et al., 2021, https://arxiv.org/abs/2106.09685, equation 3: a layer `x W` becomes
`x W + alpha / rank * x A B`. Adapters are leaves beside the kernel in the params of a model,

    lora_a [L, in, rank], lora_b [L, rank, out], lora_scale [L]

and every function of a `Model` applies the adapters in its params. `split` separates frozen from
trained params, and `train_step.join` reverses it. `base` removes the adapters.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from rlhf_jax import ranges
from rlhf_jax.models import quantized
from rlhf_jax.types import Params

_GROUPS = ("attention", "mlp")
_TRAINED = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Low-rank adapters.

  Attributes:
    rank: Rank of the adapters. 0 uses no adapters and trains all params.
    alpha: Scale of the adapters: their output is multiplied by alpha / rank.
    targets: Layers with adapters, among q, k, v, o, gate, up and down. Empty for all of them.
      Experts and routers never have adapters.
  """

  rank: int = 0
  alpha: float = ranges.rare(16.0)
  targets: tuple[str, ...] = ranges.rare(())

  def __post_init__(self):
    ranges.check(self, non_negative=("rank",), positive=("alpha",))


def _filter(tree: Params, keep: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()):
  """Keeps the leaves whose path satisfies `keep`, and drops empty dicts."""
  kept = {}
  for name, value in tree.items():
    at = (*path, name)
    if isinstance(value, dict):
      value = _filter(value, keep, at)
      if value:
        kept[name] = value
    elif keep(at):
      kept[name] = value
  return kept


def init(key: jax.Array, params: Params, config: LoRAConfig) -> Params:
  """Creates adapters: A is normal with standard deviation 1 / sqrt(in), B is 0.

  Args:
    key: Random key.
    params: Params of the model, arrays or shapes.
    config: Rank and target layers.

  Returns:
    Leaves to `join` to the params. The model's outputs do not change.

  Raises:
    ValueError: If a target is not a layer of the model.
  """
  kernels = {
    (group, name): layer["kernel"].shape
    for group in _GROUPS
    for name, layer in sorted(params["layers"][group].items())  # The order must be deterministic.
    if "kernel" in layer and name != "router"
  }
  known = [name for _, name in kernels]
  if unknown := set(config.targets) - set(known):
    raise ValueError(
      f"--lora.targets names {', '.join(sorted(unknown))}; the layers of this model are"
      f" {', '.join(known)}"
    )
  adapters: Params = {group: {} for group in _GROUPS}
  for i, ((group, name), (layers, fan_in, fan_out)) in enumerate(kernels.items()):
    if config.targets and name not in config.targets:
      continue
    shape = (layers, fan_in, config.rank)
    adapters[group][name] = {
      "lora_a": fan_in**-0.5 * jax.random.normal(jax.random.fold_in(key, i), shape),
      "lora_b": jnp.zeros((layers, config.rank, fan_out), jnp.float32),
      "lora_scale": jnp.full((layers,), config.alpha / config.rank, jnp.float32),
    }
  return {"layers": {group: layers for group, layers in adapters.items() if layers}}


def base(params: Params) -> Params:
  """Removes the adapters from params; the arrays are not copied."""
  return _filter(params, lambda path: not path[-1].startswith("lora_"))


def leaves(params: Params) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
  """Yields path and value of every leaf of every adapter."""
  for name, value in params.items():
    if isinstance(value, dict):
      yield from (((name, *path), leaf) for path, leaf in leaves(value))
    elif name.startswith("lora_"):
      yield (name,), value


def split(params: Params) -> tuple[Params, Params]:
  """Splits params into (frozen, trained).

  With adapters, only the adapters and a scalar head are trained; without adapters, everything is.

  Args:
    params: Params of one model, or a dict of the params of several.
  """
  if not any(True for _ in leaves(params)):
    return {}, params

  def is_trained(path: tuple[str, ...]) -> bool:
    return path[-1] in _TRAINED or "score" in path

  return _filter(params, lambda path: not is_trained(path)), _filter(params, is_trained)


@jax.jit
def _merge_kernel(layer: dict[str, jax.Array]) -> jax.Array:
  a, b, kernel = layer["lora_a"], layer["lora_b"], layer["kernel"]
  change = jnp.einsum("lir,lro->lio", a, b, precision="highest")
  return kernel + layer["lora_scale"][:, None, None] * change


def merge(params: Params) -> Params:
  """Merges adapters into the weights: `W + alpha / rank * A B` in place of W.

  The result has the dtype of the adapters if that of W has fewer bits; codes are decoded.
  """
  params = quantized.decode(params)
  if "lora_a" in params:
    rest = {name: value for name, value in params.items() if not name.startswith("lora_")}
    return rest | {"kernel": _merge_kernel(params)}
  return {name: merge(x) if isinstance(x, dict) else x for name, x in params.items()}
