"""Losses of pairs by their names, and those that compare the pairs of a batch."""

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.algorithms import pairwise
from rlhf_jax.losses import preference


def of_one_pair(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta):
  return jnp.exp(-beta * (policy_chosen - policy_rejected - ref_chosen + ref_rejected))


def of_the_largest(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta):
  return beta * (policy_chosen / jnp.max(jnp.abs(policy_chosen)) - policy_rejected)


def of_a_running_mean(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta):
  return policy_chosen - jax.lax.stop_gradient(jnp.mean(ref_chosen)) * beta


def of_arrays(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta):
  return beta * policy_chosen.at[:].add(-policy_rejected)  # NumPy has no such method.


def summed(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta):
  return jnp.sum(policy_chosen)


def both(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta):
  return policy_chosen, policy_rejected


def signs(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta):
  return jnp.int32(policy_chosen > policy_rejected)


def test_keys_and_functions_of_a_user():
  assert pairwise.find("ipo") is preference.ipo_loss
  assert pairwise.find(f"{__name__}:of_one_pair") is of_one_pair
  with pytest.raises(ValueError, match="^loss must be one of .*dpo.*, or module:function"):
    pairwise.find("no_such_loss")


@pytest.mark.parametrize(
  ("name", "word"),
  [
    ("summed", r"gave float32\[\] for 3 pairs"),
    ("both", "gave tuple for 3 pairs"),
    ("signs", r"gave int32\[3\] for 3 pairs"),
    ("of_one_pair.x", "must be a key"),
  ],
)
def test_losses_that_cannot_be_used_are_refused(name, word):
  with pytest.raises(ValueError, match=word):
    pairwise.check_traceable(f"{__name__}:{name}", 0.1)


@pytest.mark.parametrize("name", preference.PAIRWISE_LOSSES)
def test_published_losses_that_compare_pairs(name):
  assert pairwise.compares_rows(name, 0.1) == (name in preference.OF_BATCHES)


@pytest.mark.parametrize(
  ("function", "compares"),
  [(of_one_pair, False), (of_the_largest, True), (of_a_running_mean, True), (of_arrays, False)],
)
def test_losses_of_a_user_that_compare_pairs(function, compares):
  assert pairwise.compares_rows(f"{__name__}:{function.__name__}", 0.1) == compares
