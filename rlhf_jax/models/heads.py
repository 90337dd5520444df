"""Heads over the final hidden states: logits over the vocabulary, or one score per token."""

import jax
import jax.numpy as jnp
from flax import nnx

from rlhf_jax.models.transformer import Matmul, ModelConfig
from rlhf_jax.types import Params


class LanguageHead(nnx.Module):
  """Output projection of an untied model, accumulated in float32."""

  def __init__(self, config: ModelConfig, matmul: Matmul = jnp.matmul, *, rngs: nnx.Rngs):
    self.matmul = matmul
    shape = (config.width, config.vocab_size)
    self.kernel = nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape))

  def __call__(self, hidden: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T, V] float32."""
    kernel = self.kernel[...].astype(hidden.dtype)
    if hidden.dtype == jnp.float32:
      return self.matmul(hidden, kernel)
    return jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32)


class ScalarHead(nnx.Module):
  """One score per token for reward and value models, computed in float32.

  The kernel starts at std 1 / sqrt(D + 1) (Stiennon et al., 2020,
  https://arxiv.org/abs/2009.01325, appendix B.1). The bias centres a trained reward model.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    std = (config.width + 1) ** -0.5
    self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (config.width, 1)))
    self.bias = nnx.Param(jnp.zeros((1,), jnp.float32))

  def __call__(self, hidden: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, T] float32."""
    kernel = self.kernel[...].astype(jnp.float32)
    return (hidden.astype(jnp.float32) @ kernel)[..., 0] + self.bias[...].reshape(1, 1)


def shift_scores(params: Params, offset: jax.Array) -> Params:
  """Adds a constant to every score of a model with a scalar head."""
  score = params["score"]
  return params | {"score": score | {"bias": score["bias"] + offset}}


def zero_scores(params: Params) -> Params:
  """Zeroes the scalar head, so that all scores are 0: the start of a fresh critic."""
  return params | {"score": jax.tree.map(jnp.zeros_like, params["score"])}
