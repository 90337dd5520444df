"""Cases for the tests that hold for every loss: see common_test.py.

Each test file of a losses module lists its functions in `CASES`, under "function" or
"function/variant".
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from rlhf_jax.losses import masked

B, T, V, K = 8, 6, 7, 4


@dataclasses.dataclass(frozen=True)
class Case:
  """A scalar function of arrays and a mask.

  Attributes:
    call: `(mask, *arrays, **hyper) -> scalar`, differentiable in the arrays.
    shapes: Shapes of the arrays, with B in front.
    padded: Indices of the arrays that the mask is about; all if None.
    mask_shape: Shape of the mask.
    hyper: Hyperparameters with a value each; they may be traced arrays.
  """

  call: Callable[..., jax.Array]
  shapes: tuple[tuple[int, ...], ...]
  padded: tuple[int, ...] | None = None
  mask_shape: tuple[int, ...] = (B, T)
  hyper: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.padded is None:
      object.__setattr__(self, "padded", tuple(range(len(self.shapes))))


def per_token(function: Callable[..., jax.Array], n: int, *, options=None, **hyper: float) -> Case:
  """A function of n arrays [B, T] to losses [B, T], used under a mask of tokens."""

  def call(mask, *x, **hyper):
    return masked.masked_mean(function(*x, **(options or {}), **hyper), mask)

  return Case(call, ((B, T),) * n, hyper=hyper)


def per_row(function: Callable[..., jax.Array], n: int, *, options=None, **hyper: float) -> Case:
  """A function of n arrays [B] to losses [B], used under a mask of rows."""

  def call(mask, *x, **hyper):
    return masked.masked_mean(function(*x, **(options or {}), **hyper), mask)

  return Case(call, ((B,),) * n, mask_shape=(B,), hyper=hyper)


def squash(x: jax.Array) -> jax.Array:
  """A scalar that depends on every entry, differently, and stays finite."""
  scale = 1 + jnp.arange(x.shape[-1], dtype=x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
  return jnp.sum(jnp.tanh(x / scale))
