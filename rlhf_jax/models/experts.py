"""Mixtures of experts: a router sends every token through a few MLPs.

Shazeer et al., 2017, https://arxiv.org/abs/1701.06538, as in Mixtral (Jiang et al., 2024,
https://arxiv.org/abs/2401.04088) and Qwen 3. Experts have no capacity limit and no token is
dropped. The output of a token does not depend on other tokens, so sampler and trainer agree.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax import sharding
from rlhf_jax.models.transformer import ACTIVATIONS, ModelConfig

# (x [B, T, D], chosen [B, T, k] int32, weights [B, T, k], gate and up [E, D, F], down [E, F, D])
# -> [B, T, D]
Mix = Callable[..., jax.Array]


def mix_local(
  x: jax.Array,
  chosen: jax.Array,
  weights: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
  *,
  activation: str,
  first: jax.Array | None = None,
) -> jax.Array:
  """Weighted sum of the outputs of the chosen experts for each token.

  The tokens are sorted by expert, so that each expert is one matrix product.

  Args:
    x: [B, T, D].
    chosen: [B, T, k] int32, indices of experts.
    weights: [B, T, k].
    gate: [E, D, F] weights of the local experts.
    up: [E, D, F].
    down: [E, F, D].
    activation: Name of the activation.
    first: [] int32, index of the first local expert; the others contribute nothing. None if all are
      local.

  Returns:
    [B, T, D], dtype of `x`.
  """
  count, k = gate.shape[0], chosen.shape[-1]
  expert = chosen.reshape(-1)
  if first is not None:
    expert = expert - first
    expert = jnp.where((expert >= 0) & (expert < count), expert, count)  # Remote experts last.
  order = jnp.argsort(expert)
  sizes = jnp.bincount(expert, length=count).astype(jnp.int32)

  def permute(rows: jax.Array, order: jax.Array) -> jax.Array:
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")

  rows = permute(jnp.repeat(x.reshape(-1, x.shape[-1]), k, axis=0), order)
  hidden = ACTIVATIONS[activation](jax.lax.ragged_dot(rows, gate, sizes))
  out = jax.lax.ragged_dot(hidden * jax.lax.ragged_dot(rows, up, sizes), down, sizes)
  if first is not None:
    out = jnp.where(jnp.arange(out.shape[0])[:, None] < jnp.sum(sizes), out, 0)
  out = permute(out, jnp.argsort(order)).reshape(*chosen.shape, -1)
  return jnp.sum(out * weights[..., None].astype(out.dtype), axis=-2)


def make_mix(config: ModelConfig, mesh: Mesh | None = None) -> Mix:
  """Builds `mix_local` for a mesh: each device has its own rows and, along `tensor`, experts.

  Args:
    config: Architecture.
    mesh: Devices that the model runs on; None for one device.
  """
  mix = functools.partial(mix_local, activation=config.activation)
  if mesh is None or mesh.size == 1:
    return mix

  def on_mesh(x, chosen, weights, gate, up, down):
    rows = sharding.fitting(mesh, x.shape, sharding.ROWS)
    here = jax.P("tensor")

    def part(x, chosen, weights, gate, up, down):
      first = jax.lax.axis_index("tensor") * gate.shape[0]
      return jax.lax.psum(mix(x, chosen, weights, gate, up, down, first=first), "tensor")

    # With check_vma JAX 0.10 forgets to sum the gradient of x over the experts' devices.
    split = jax.shard_map(
      part, mesh=mesh, in_specs=(rows,) * 3 + (here,) * 3, out_specs=rows, check_vma=False
    )
    return split(x, chosen, weights, gate, up, down)

  return on_mesh
