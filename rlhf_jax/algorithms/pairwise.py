"""Losses of the four log-probabilities of a pair, by the name on the command line."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import user
from rlhf_jax.losses import preference

_ARGUMENTS = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")


def find(name: str) -> Callable[..., jax.Array]:
  """Returns the loss of four log-probabilities that a key or `module:function` names."""
  return user.resolve("loss", name, preference.PAIRWISE_LOSSES, _ARGUMENTS, ["beta"])


def check_traceable(name: str, beta: float) -> None:
  """Refuses a `module:function` that gives no loss per pair, before anything is compiled."""
  function = find(name)
  if ":" not in name:
    return
  pairs = [jax.ShapeDtypeStruct((3,), jnp.float32)] * len(_ARGUMENTS)
  try:
    result = jax.eval_shape(functools.partial(function, beta=beta), *pairs)
  except Exception as error:
    raise ValueError(f"loss={name} cannot be traced: {user.describe(error)}") from error
  shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", None)
  if shape != (3,) or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    given = type(result).__name__ if dtype is None else f"{dtype}{list(shape or ())}"
    raise ValueError(
      f"loss={name} gave {given} for 3 pairs; it must return float[3], one loss per pair, and"
      " leave their mean to the method"
    )


@functools.cache
def compares_rows(name: str, beta: float) -> bool:
  """True if the loss of a pair depends on the other pairs of its batch.

  A function of the user is called on a few pairs, together and one by one.
  """
  if name in preference.OF_BATCHES:
    return True
  if ":" not in name:
    return False
  function = functools.partial(find(name), beta=beta)
  numbers = np.random.default_rng(0).normal(-20, 3, (len(_ARGUMENTS), 4))
  with jax.ensure_compile_time_eval():  # It may be asked while a step is traced.
    rows = jnp.asarray(numbers, jnp.float32)
    together = function(*rows)
    one_by_one = [function(*rows[:, n : n + 1])[0] for n in range(rows.shape[1])]
  return not np.allclose(together, one_by_one, rtol=1e-4, atol=1e-6, equal_nan=True)
