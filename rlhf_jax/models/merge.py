"""Merges of models in the space of their params: interpolation, averages, task arithmetic.

All are pure functions of nested dicts of arrays with the same structure and shapes. They compute in
float32 and return the dtypes of the first model. They need no data and can be jitted and
differentiated, as adaptive averaging does for its weights.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.types import Params

# A number, an array [L] with a weight per layer, or a function of the path of a leaf, such as
# "layers/attention/q/kernel", to a number or an array that broadcasts against the leaf.
Weight = jax.typing.ArrayLike | Callable[[str], jax.typing.ArrayLike]

LAYERS = "layers"  # Leaves below it are stacked, [L, ...].


def require_alike(*models: Params) -> None:
  """Refuses models of other structures or shapes.

  Raises:
    ValueError: The message names the first leaf that differs.
  """
  if not models:
    raise ValueError("a merge needs at least one model")
  first, *others = (
    {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
    for model in models
  )
  for number, other in enumerate(others, start=2):
    for name in sorted(first.keys() | other.keys()):
      if first.get(name) != other.get(name):
        one, two = (str(of.get(name, "absent")) for of in (first, other))
        raise ValueError(f"{name} is {one} in model 1 and {two} in model {number}")


def interpolate(base: Params, tuned: Params, weight_on_base: Weight) -> Params:
  """Interpolates two models: `w * base + (1 - w) * tuned`.

  Model averaging (Lin et al., 2023, https://arxiv.org/abs/2309.06256; the text of the paper weights
  the tuned model, its code the base). Weights outside [0, 1] extrapolate.

  Args:
    base: Params of the model before a fine-tuning, any shapes.
    tuned: Params after it, the same shapes.
    weight_on_base: Weight w of `base`. An array [L] is one per layer: leaves that are in no layer
      (embedding, last norm, head) then take its mean.

  Returns:
    Params with the dtypes of `base`. Where w is a number, 0 gives `tuned` and 1 gives `base`, bit
    for bit.

  Raises:
    ValueError: If the models differ in shapes, or an array of weights has not L entries.
  """
  require_alike(base, tuned)
  weight_of = weight_on_base if callable(weight_on_base) else _by_layer(weight_on_base)

  def mix(path: jax.tree_util.KeyPath, a: jax.Array, b: jax.Array) -> jax.Array:
    weight = weight_of(_name(path))
    if isinstance(weight, int | float) and weight in (0, 1):
      return a if weight else b.astype(a.dtype)
    weight = jnp.asarray(weight, jnp.float32)
    weight = weight.reshape(weight.shape + (1,) * (a.ndim - weight.ndim))
    try:
      shape = jnp.broadcast_shapes(weight.shape, a.shape)
    except ValueError:
      shape = None
    if shape != a.shape:
      raise ValueError(f"weights of shape {weight.shape} do not fit {_name(path)} of {a.shape}")
    return (weight * _wide(a) + (1 - weight) * _wide(b)).astype(a.dtype)

  return jax.tree_util.tree_map_with_path(mix, base, tuned)


def average(models: Sequence[Params], weights: Sequence[float] = ()) -> Params:
  """Averages models, in the proportion of `weights`.

  Equal weights are those of model soups (Wortsman et al., 2022, https://arxiv.org/abs/2203.05482)
  and of weight-averaged reward models (Ramé et al., 2024, https://arxiv.org/abs/2401.12187).

  Args:
    models: Params of one shape, of models that started from the same one.
    weights: A number of 0 or more per model, divided by their sum; none makes all equal.

  Returns:
    Params with the dtypes of the first model.

  Raises:
    ValueError: If the models differ in shapes, or the weights do not match them.
  """
  require_alike(*models)
  require_match(models, weights or [1.0] * len(models))
  if weights and (min(weights) < 0 or sum(weights) <= 0):
    raise ValueError(f"weights of an average are 0 or more, and one is above 0, got {[*weights]}")
  shares = np.asarray(weights or [1.0] * len(models), np.float64)
  return _sum(models, (shares / shares.sum()).tolist())


def add_tasks(base: Params, tuned: Sequence[Params], weights: Sequence[float]) -> Params:
  """Adds what models have learned since a common start: `base + sum_i w_i (tuned_i - base)`.

  Task arithmetic (Ilharco et al., 2022, https://arxiv.org/abs/2212.04089). A negative
  weight unlearns a task.

  Args:
    base: Params of the common start.
    tuned: Params of the models that were tuned from it, the same shapes.
    weights: Weight of each of them.

  Returns:
    Params with the dtypes of `base`.

  Raises:
    ValueError: If the models differ in shapes, or the weights do not match them.
  """
  require_alike(base, *tuned)
  require_match(tuned, weights)
  return _sum([base, *tuned], [1 - sum(weights), *weights])


def require_match(models: Sequence[Params], weights: Sequence[float]) -> None:
  """Refuses weights that are not one finite number per model."""
  if len(weights) != len(models):
    raise ValueError(f"{len(weights)} weights do not match {len(models)} models: give one for each")
  if not np.isfinite(weights).all():
    raise ValueError(f"weights must be finite numbers, got {[*weights]}")


def block_weights(logits: jax.Array, mean: float, eps: float = 0.2) -> jax.Array:
  """Weights of blocks of layers with a given mean, as heterogeneous model averaging learns them.

  Lin et al., 2023, https://arxiv.org/abs/2309.06256, as in their code:
  `mean * (sigmoid(c_k) + eps) / mean_j(sigmoid(c_j) + eps)`.

  Args:
    logits: [K] float, a free number c_k per block. Equal ones give `mean` to each.
    mean: Mean of the weights.
    eps: Bound of the ratio of two weights, which is at most (1 + eps) / eps.

  Returns:
    [K] float32.
  """
  shares = jax.nn.sigmoid(jnp.asarray(logits, jnp.float32)) + eps
  return mean * shares / jnp.mean(shares)


def layer_weights(blocks: jax.typing.ArrayLike, layers: int) -> jax.Array:
  """Spreads weights [K] of consecutive blocks, as equal in size as possible, over [L] layers.

  Raises:
    ValueError: If there are more blocks than layers.
  """
  blocks = jnp.asarray(blocks, jnp.float32)
  if not 1 <= len(blocks) <= layers:
    raise ValueError(f"{len(blocks)} blocks do not divide a model of {layers} layers")
  return blocks[np.arange(layers) * len(blocks) // layers]


def _by_layer(weight: jax.typing.ArrayLike) -> Callable[[str], jax.typing.ArrayLike]:
  if np.ndim(weight) == 0:
    return lambda path: weight
  if np.ndim(weight) != 1:
    raise ValueError(f"weight_on_base must be a number or [L], got {np.shape(weight)}")
  return lambda path: weight if path.startswith(f"{LAYERS}/") else jnp.mean(jnp.asarray(weight))


def _sum(models: Sequence[Params], weights: Sequence[float]) -> Params:
  def add(*leaves: jax.Array) -> jax.Array:
    total = sum(weight * _wide(leaf) for weight, leaf in zip(weights, leaves, strict=True))
    return jnp.asarray(total).astype(leaves[0].dtype)

  return jax.tree.map(add, *models)


def _wide(x: jax.Array) -> jax.Array:
  return jnp.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def _name(path: jax.tree_util.KeyPath) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
