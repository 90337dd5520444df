"""Counts of the operations of a script."""

import jax
import numpy as np
import pytest

from experiments.lab import costs
from rlhf_jax import preflight
from rlhf_jax.models import ModelConfig
from rlhf_jax.types import Rollout, SharedBatch, TokenBatch

CONFIG = ModelConfig(
  vocab_size=50, width=16, layers=2, heads=2, kv_heads=2, head_dim=8, mlp_width=32
)


def rollout(rows, length, new):
  on = np.zeros((rows, length + new), bool)
  return Rollout(on.astype(np.int32), on, on, np.zeros((rows, new), np.float32))


@pytest.mark.parametrize(
  ("batch", "options", "forward", "times"),
  [
    (rollout(6, 5, 4), {"scored": 4, "epochs": 2}, [(6, 9, 4)], 6),
    ((rollout(6, 5, 4), np.zeros(6)), {"scored": 40, "frozen": True}, [(6, 9, 9)], 2),
    (rollout(6, 5, 4), {"scored": 4, "critic": CONFIG}, [(6, 9, 4), (6, 9, None)], 3),
    (TokenBatch(np.zeros((3, 2, 7), np.int32), 0), {"scored": None}, [(6, 7, None)], 3),
    ({"tokens": np.ones((2, 3)), "x": rollout(1, 1, 1)}, {"scored": 1}, [(2, 3, 1), (1, 2, 1)], 3),
  ],
)
def test_each_token_is_counted_once_per_pass(batch, options, forward, times):
  expected = sum(
    preflight.forward_flops(CONFIG, rows, length, scored=scored) for rows, length, scored in forward
  )
  assert costs.training_flops(CONFIG, batch, **options) == times * expected


@pytest.mark.parametrize("wrap", [lambda batch: batch, lambda batch: {"pairs": batch, "x": 1}])
@pytest.mark.parametrize("scored", [None, 3])
def test_a_shared_prompt_is_counted_once_but_for_attention(wrap, scored):
  pairs = TokenBatch(np.zeros((4, 2, 10), np.int32), np.zeros((4, 2, 10), bool))
  shared = SharedBatch(np.zeros((4, 14), np.int32), pairs.mask, pairs.tokens)
  counted = costs.training_flops(CONFIG, wrap(shared), scored=scored)
  saved = 3 * 2 * 4 * (2 * 10 - 14) * preflight.matrices(CONFIG, 0)
  assert counted == costs.training_flops(CONFIG, wrap(pairs), scored=scored) - saved


def test_a_step_is_the_same_but_for_its_metric():
  step = jax.jit(lambda state, batch, key: (state + batch["tokens"].sum(), {"loss": state}))
  batch = {"tokens": np.ones((2, 3), np.int32)}
  state, metrics = costs.Counted(step, lambda of: float(of["tokens"].size))(1, batch, None)
  assert state == 7 and metrics["loss"] == 1 and metrics["model_flops"] == 6
  assert costs.Counted(step, len).lower is not None
