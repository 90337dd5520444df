"""Counts of the operations of a script."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval

from experiments import grpo as grpo_script
from experiments.lab import costs
from rlhf_jax import preflight
from rlhf_jax.algorithms import epochs, gkd, grpo, kto
from rlhf_jax.algorithms.reading import Packing
from rlhf_jax.algorithms.terms import WithSequences
from rlhf_jax.models import ModelConfig, build
from rlhf_jax.train_step import init_state
from rlhf_jax.types import Rollout, SharedBatch, TokenBatch, UnpairedBatch
from tests.experiments.bench_test import count_dots

CONFIG = ModelConfig(
  vocab_size=50, width=16, layers=2, heads=2, kv_heads=2, head_dim=8, mlp_width=32
)


def rollout(rows, length, new):
  on = np.zeros((rows, length + new), bool)
  return Rollout(on.astype(np.int32), on, on, np.zeros((rows, new), np.float32))


@pytest.mark.parametrize(
  ("batch", "options", "forward", "times"),
  [
    (rollout(6, 5, 4), {"scored": 4, "updates": epochs.UpdateConfig(2)}, [(6, 9, 4)], 6),
    ((rollout(6, 5, 4), np.zeros(6)), {"scored": 40, "frozen": True}, [(6, 9, 9)], 2),
    (rollout(6, 5, 4), {"scored": 4, "critic": CONFIG}, [(6, 9, 4), (6, 9, None)], 3),
    (
      WithSequences(rollout(6, 5, 4), TokenBatch(np.zeros((6, 7), np.int32), 0)),
      {"scored": 9, "critic": CONFIG},  # Which does not read demonstrations.
      [(6, 9, 9), (6, 9, None), (6, 7, 7)],
      3,
    ),
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


# Attention, of which only the causal half is counted, weighs little in these.
WIDE = dataclasses.replace(
  CONFIG, vocab_size=512, width=128, head_dim=64, mlp_width=256, remat="none"
)
WIDER = dataclasses.replace(WIDE, width=256)
ROWS, P, R = 8, 16, 16


def kto_batch():
  row = TokenBatch(*(np.zeros((ROWS, P + R), dtype) for dtype in (np.int32, bool)))
  rows = UnpairedBatch(*row, np.zeros(ROWS, bool), row)
  return kto.KTOBatch(rows, np.zeros((ROWS, 2), np.float32))


def grpo_batch(sampled=None, count=4):
  sampled = rollout(ROWS, P, R) if sampled is None else sampled
  scores = np.arange(len(sampled.tokens), dtype=np.float32)
  settings = grpo.GRPOConfig()
  made = grpo.make_batch(sampled, scores, sampled.logprobs, settings, samples_per_prompt=count)
  return made[0]


def kto_case(apply, tx):
  return kto.make_kto_step(apply, tx, kto.KTOConfig()), kto_batch(), (), {}


def gkd_case(apply, tx):
  teacher = build(WIDER)
  params = jax.eval_shape(teacher.init, jax.random.key(0))
  step = gkd.make_gkd_step(apply, tx, gkd.GKDConfig(), teacher_apply_fn=teacher.apply)
  return step, rollout(ROWS, P, R), (params,), {"scored": R + 1, "teacher": WIDER}


def packed_case(apply, tx):
  settings, packed = grpo.GRPOConfig(epochs=2, minibatches=2), Packing(P + R, 3)
  step = grpo.make_grpo_step(apply, tx, settings, packed=packed)
  return step, grpo_batch(), (), {"updates": settings, "packed": packed}


@pytest.mark.parametrize("case", [kto_case, gkd_case, packed_case])
def test_counted_operations_are_those_of_the_products_of_a_step(case):
  model, tx = build(WIDE), optax.sgd(1.0)
  step, batch, inputs, options = case(model.apply, tx)
  init = lambda key: init_state(model.init(key), tx)  # noqa: E731
  state = jax.eval_shape(init, jax.random.key(0))
  jaxpr = jax.make_jaxpr(step)(state, batch, *inputs, jax.random.key(0)).jaxpr
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # As compilers do.
  counted = costs.training_flops(WIDE, batch, **({"scored": P + R} | options))
  assert count_dots(jaxpr, 0) == pytest.approx(counted, rel=0.04)


def test_packed_responses_are_counted_in_the_rows_that_hold_them(open_bench):
  """Their number is that of the tokens without the padding which the step reports."""
  flags = ("--reward.name=gold", "--rollout.packed_length=64", "--grpo.epochs=2")
  bench = open_bench("grpo", "prompts", *flags)
  trainer, length, new = grpo_script.make_trainer(bench), 40, 8
  sampled, places = rollout(16, length - new, new), np.arange(length)
  prompt = np.zeros((16, length), bool) | ((places >= 24) & (places < 32))
  sampled = sampled._replace(
    prompt_mask=prompt, response_mask=np.zeros_like(prompt) | (places == 32)
  )
  batch = jax.tree.map(jax.numpy.asarray, grpo_batch(sampled, 2))
  _, metrics = trainer.step(trainer.state, batch, jax.random.key(0))
  rows = 16 * 9 / (1 - float(metrics["padding"])) / 64
  assert rows == pytest.approx(round(rows), abs=1e-3) and rows <= 4
  forward = functools.partial(preflight.forward_flops, bench.model.config)
  assert metrics["model_flops"] == 3 * 2 * forward(round(rows), 64, scored=64)
  assert metrics["model_flops"] < 3 * 2 * forward(16, length, scored=new)
