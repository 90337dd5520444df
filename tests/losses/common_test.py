"""What holds for every loss: padding changes nothing, and every mesh gives the same.

A function that takes no mask is used the way the algorithms use it, under `masked_mean`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.losses import (
  advantages,
  kl,
  logprobs,
  masked,
  policy_gradient,
  reward,
  supervised,
)

B, T, V, K = 8, 6, 7, 4
MEAN = masked.masked_mean


class Case(NamedTuple):
  """A scalar function of arrays and a mask.

  Attributes:
    call: `(mask, *arrays) -> scalar`.
    shapes: Of the arrays.
    padded: Indices of the arrays that the mask is about.
    mask_shape: Of the mask.
    takes_mask: Whether the function itself reads the mask, and so owes a zero gradient to the
      masked positions as well.
  """

  call: Callable[..., jax.Array]
  shapes: tuple[tuple[int, ...], ...]
  padded: tuple[int, ...]
  mask_shape: tuple[int, ...] = (B, T)
  takes_mask: bool = True


def per_token(function, n, *, takes_mask=False, **kwargs) -> Case:
  def call(mask, *x):
    return MEAN(function(*x, **kwargs), mask)

  return Case(call, ((B, T),) * n, tuple(range(n)), takes_mask=takes_mask)


def per_row(function, n, **kwargs) -> Case:
  def call(mask, *x):
    return MEAN(function(*x, **kwargs), mask)

  return Case(call, ((B,),) * n, tuple(range(n)), (B,), takes_mask=False)


def weigh(x):
  """A scalar that depends on every entry differently."""
  return jnp.sum(
    jnp.sin(x + jnp.arange(x.shape[-1], dtype=x.dtype).reshape((1,) * (x.ndim - 1) + (-1,)))
  )


def squash(x):
  """As `weigh`, for entries all over the place."""
  return jnp.sum(jnp.tanh(x))


def gae(mask, rewards, values):
  a, r = advantages.gae(rewards, values, mask, gamma=0.9, lam=0.8)
  return squash(a) + jnp.sum(jnp.cos(r))


def whitened_ppo(mask, logprobs, old, rewards, values):
  a, _ = advantages.gae(rewards, values, mask)
  return MEAN(policy_gradient.ppo_policy_loss(logprobs, old, masked.whiten(a, mask)), mask)


def shaped(mask, scores, logprobs, ref):
  r = policy_gradient.kl_shaped_rewards(scores, logprobs, ref, mask, kl_coef=0.3)
  return jnp.sum(jnp.cos(r) * jnp.where(mask, logprobs, 0.0))


def moments(mask, x):
  start = reward.RunningMoments(jnp.float32(3), jnp.float32(0.5), jnp.float32(2))
  after = reward.update_moments(start, x, mask)
  return after.mean + after.m2 * after.count


def normalized(mask, x):
  constants = reward.RunningMoments(jnp.float32(3), jnp.float32(0.5), jnp.float32(2))
  return MEAN(jnp.square(reward.normalize_scores(x, constants)), mask)


def ranking(mask, scores):
  ranks = jax.lax.broadcasted_iota(jnp.int32, (B, K), 1) % 3
  return jnp.mean(reward.ranking_loss(scores, ranks, mask))


def tokens_for(logits):
  return jax.lax.broadcasted_iota(jnp.int32, logits.shape[:-1], 1) % V


CASES = {
  "masked_sum": Case(lambda m, x: squash(masked.masked_sum(x, m, 1)), ((B, T),), (0,)),
  "masked_mean": Case(lambda m, x: squash(masked.masked_mean(x, m, 1)), ((B, T),), (0,)),
  "masked_var": Case(lambda m, x: masked.masked_var(x, m, ddof=1), ((B, T),), (0,)),
  "masked_var_rows": Case(lambda m, x: squash(masked.masked_var(x, m, 1)), ((B, T),), (0,)),
  "whiten": Case(lambda m, x: jnp.sum(jnp.sin(masked.whiten(x, m))), ((B, T),), (0,)),
  "last_real": Case(lambda m, x: squash(masked.last_real(x, m)), ((B, T),), (0,)),
  "gae": Case(gae, ((B, T),) * 2, (0, 1)),
  "gae_whitened_ppo": Case(whitened_ppo, ((B, T),) * 4, (0, 1, 2, 3), takes_mask=False),
  "kl_shaped_rewards": Case(shaped, ((B,), (B, T), (B, T)), (1, 2)),
  "explained_variance": Case(
    lambda m, v, r: policy_gradient.explained_variance(v, r, m), ((B, T),) * 2, (0, 1)
  ),
  "ranking_loss": Case(ranking, ((B, K),), (0,), (B, K)),
  "update_moments": Case(moments, ((B,),), (0,), (B,)),
  "normalize_scores": Case(normalized, ((B,),), (0,), (B,), takes_mask=False),
  "bradley_terry_loss": per_row(reward.bradley_terry_loss, 2, margin=0.1, label_smoothing=0.1),
  "centering_penalty": per_row(reward.centering_penalty, 2),
  "k1": per_token(kl.k1, 2),
  "k2": per_token(kl.k2, 2),
  "k3": per_token(kl.k3, 2),
  "ppo_policy_loss": per_token(policy_gradient.ppo_policy_loss, 3),
  "ppo_policy_loss_dual": per_token(policy_gradient.ppo_policy_loss, 3, dual_clip=3.0),
  "ppo_value_loss": per_token(policy_gradient.ppo_value_loss, 3),
  "reinforce_loss": per_token(policy_gradient.reinforce_loss, 2),
  "token_logprobs": Case(
    lambda m, x: MEAN(logprobs.token_logprobs(x, tokens_for(x)), m),
    ((B, T, V),),
    (0,),
    takes_mask=False,
  ),
  "entropy": Case(lambda m, x: MEAN(logprobs.entropy(x), m), ((B, T, V),), (0,), takes_mask=False),
  # Scored positions t read the logits at t - 1: here the mask is that of the logits.
  "nll": Case(
    lambda m, x: MEAN(supervised.nll(x, tokens_for(x))[:, 1:], m[:, :-1]),
    ((B, T, V),),
    (0,),
    takes_mask=False,
  ),
}
CASE = pytest.mark.parametrize("name", CASES)


def inputs_of(case: Case):
  rng = np.random.default_rng(0)
  if len(case.mask_shape) == 1:
    mask = np.arange(B) % 3 != 0
  else:  # Right padding, from full rows to an empty one.
    length = case.mask_shape[1]
    mask = np.arange(length) < (np.arange(B) % (length + 1))[::-1, None]
  return mask, [rng.normal(size=shape).astype(np.float32) for shape in case.shapes]


def poison(case: Case, mask, arrays, value):
  poisoned = [x.copy() for x in arrays]
  for i in case.padded:
    poisoned[i][~mask] = value
  return poisoned


def value_and_grads(case: Case):
  return jax.jit(jax.value_and_grad(case.call, argnums=tuple(range(1, 1 + len(case.shapes)))))


@CASE
def test_padding_changes_nothing(name):
  case = CASES[name]
  mask, arrays = inputs_of(case)
  assert mask.any() and not mask.all()
  function = value_and_grads(case)
  want, want_grads = function(mask, *arrays)
  assert np.isfinite(want) and want != 0
  for bad in (np.nan, 1e30, -1e30, np.inf):
    value, grads = function(mask, *poison(case, mask, arrays, bad))
    np.testing.assert_array_equal(value, want)
    for i, (grad, want_grad) in enumerate(zip(grads, want_grads, strict=True)):
      grad, want_grad = np.asarray(grad), np.asarray(want_grad)
      real = mask if i in case.padded else np.ones(grad.shape, bool)
      np.testing.assert_array_equal(grad[real], want_grad[real])
      if case.takes_mask and i in case.padded:
        assert (grad[~mask] == 0).all(), f"gradient at padding of argument {i}"


@CASE
def test_gradients_are_finite_when_everything_is_masked(name):
  case = CASES[name]
  mask, arrays = inputs_of(case)
  value, grads = value_and_grads(case)(np.zeros_like(mask), *arrays)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in grads)


@CASE
def test_vmap_is_a_loop(name):
  case = CASES[name]
  mask, arrays = inputs_of(case)
  stacked = [np.stack([x, 0.5 * x, -x]) for x in arrays]
  many = jax.jit(jax.vmap(functools.partial(case.call, mask)))(*stacked)
  each = [case.call(mask, *(x[i] for x in stacked)) for i in range(3)]
  np.testing.assert_allclose(many, each, rtol=1e-5, atol=1e-6)


@CASE
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_rows(name, axis_type):
  case = CASES[name]
  mask, arrays = inputs_of(case)
  function = value_and_grads(case)
  want = jax.device_get(function(mask, *arrays))
  mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
  with jax.set_mesh(mesh):
    place = NamedSharding(mesh, P("data"))
    result = value_and_grads(case)(*jax.device_put((mask, *arrays), place))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result, want)
