"""GKD against loops, and against a teacher that a student of tables can equal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import gkd
from rlhf_jax.algorithms.gkd import GKDConfig
from rlhf_jax.losses.logprobs import LazyLogits
from rlhf_jax.train_step import init_state
from tests.algorithms import bigrams, tabular, toy
from tests.algorithms.case import ROWS, Case

TEMPERATURE = 0.7


def with_teacher(apply, teacher_params, teacher_apply=None):
  """Builds `make_step(apply_fn, tx, config, ...)` of a step that holds the teacher."""

  def make_step(apply_fn, tx, config, **options):
    step = gkd.make_gkd_step(
      apply_fn, tx, config, teacher_apply_fn=teacher_apply or apply, **options
    )
    return lambda state, batch, key: step(state, batch, teacher_params, key)

  return make_step


def case(**settings):
  return Case(
    with_teacher(toy.language, toy.params_of(1)),
    GKDConfig(**settings),
    lambda seed: toy.rollout_of(toy.params_of(), ROWS, seed),
  )


CASES = {"": case(), "forward": case(divergence="forward_kl"), "mix": case(mix=0.1)}


def divergence(p, q):
  return np.sum(p * (np.log(p) - np.log(q)))


def jensen_shannon(teacher, student, mix):
  m = mix * teacher + (1 - mix) * student
  return mix * divergence(teacher, m) + (1 - mix) * divergence(student, m)


# Name -> the divergence of the paper, of probabilities in float64.
ORACLES = {
  "forward_kl": lambda teacher, student, mix: divergence(teacher, student),
  "reverse_kl": lambda teacher, student, mix: divergence(student, teacher),
  "jsd": jensen_shannon,
}


@pytest.mark.parametrize(
  ("name", "mix"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
)
def test_loss_and_gradient_are_those_of_loops(name, mix):
  params, teacher = bigrams.tables(0), bigrams.tables(1)
  rollout = bigrams.rollout_of(params)
  rollout = rollout._replace(logprobs=np.full_like(rollout.logprobs, np.nan))  # Not read.
  pairs = bigrams.responses(rollout)

  def probs(params, last):
    return np.exp(bigrams.log_softmax(np.float64(params["policy"][last]) / TEMPERATURE))

  def per_response(params, of):
    return [[of(probs(teacher, last), probs(params, last)) for last, _ in row] for row in pairs]

  def oracle(params, held):
    del held
    rows = per_response(params, lambda *sides: ORACLES[name](*sides, mix))
    return np.mean([np.mean(row) for row in rows])

  config = GKDConfig(divergence=name, mix=mix if name == "jsd" else None)
  make_step = with_teacher(bigrams.language, teacher)
  step = make_step(bigrams.language, bigrams.RECORD, config, temperature=TEMPERATURE)
  metrics = bigrams.check(step, params, rollout, oracle)
  reverse = per_response(params, lambda teacher, student: divergence(student, teacher))
  np.testing.assert_allclose(metrics["kl/teacher"], np.mean([sum(r) for r in reverse]), rtol=1e-5)
  assert metrics["weight"] == bigrams.ROWS
  assert metrics["tokens"] == sum(map(len, pairs))


@pytest.mark.parametrize("name", gkd.DIVERGENCES)
def test_reaches_the_teacher(name):
  teacher, student = (tabular.policy_params(jax.random.key(i)) for i in (5, 6))
  sides = [tabular.sequence_logprobs(x) for x in (student, teacher)]
  assert tabular.divergence(*sides) > 0.3, "the problem must not start at its solution"
  steps = 150
  tx = optax.adam(optax.linear_schedule(0.1, 0.0, steps))
  make_step = with_teacher(tabular.table_apply, teacher)
  step = make_step(tabular.table_apply, tx, GKDConfig(divergence=name))

  def iteration(state, i):
    key = jax.random.fold_in(jax.random.key(2), i)
    rollout = tabular.sample_rollout(state.params, key, 64)
    return step(state, rollout, jax.random.key(3))

  run = jax.jit(lambda state: jax.lax.scan(iteration, state, jnp.arange(steps)))
  state, metrics = run(init_state(student, tx))
  end = tabular.sequence_logprobs(state.params)
  assert tabular.divergence(end, sides[1]) < 1e-3
  assert tabular.divergence(sides[1], end) < 1e-3
  np.testing.assert_allclose(metrics["kl/teacher"][0], tabular.divergence(*sides), rtol=0.1)


def test_logits_are_computed_for_a_few_tokens_at_a_time():
  """Of both models, whose embeddings are padded to unequal numbers of rows."""
  known, params = 5, bigrams.tables(0)
  rollout = bigrams.rollout_of(params)
  rng = np.random.default_rng(0)
  sizes, sides = [], []
  for width, padded in ((4, 8), (6, known)):
    shapes = {"hidden": (known, width), "head": (width, padded)}
    sides.append({name: rng.normal(size=x).astype(np.float32) for name, x in shapes.items()})

  def read_out(head, hidden):
    sizes.append(hidden.shape[1])
    logits = hidden @ head
    return jnp.where(jnp.arange(logits.shape[-1]) < known, logits, -jnp.inf)

  def apply(lazy, params, tokens, *, segment_ids, last):
    hidden = params["hidden"][tokens][:, -last:]
    return (
      LazyLogits(hidden, params["head"], read_out, 2) if lazy else read_out(params["head"], hidden)
    )

  def run(lazy):
    model = functools.partial(apply, lazy)
    loss = functools.partial(gkd.loss_fn, config=GKDConfig(), teacher_params=sides[0])
    return jax.jit(
      jax.value_and_grad(
        lambda params: loss(params, rollout, None, apply_fn=model, teacher_apply_fn=model),
        has_aux=True,
      )
    )(sides[1])

  want, got = run(False), run(True)
  assert max(sizes[2:]) == 2 and max(sizes) == bigrams.R + 1
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)
  assert want[0][0] > 0.1


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"divergence": "kl"}, "divergence must be one of forward_kl, reverse_kl, jsd"),
    ({"mix": 0.0}, "mix must be positive"),
    ({"mix": 0.5, "divergence": "forward_kl"}, "mix is not read by divergence=forward_kl, only"),
    ({"mix": 0.1, "divergence": "reverse_kl"}, "mix is not read by divergence=reverse_kl, only"),
    ({"mix": 1.0}, r"mix must be in \[0, 1\)"),
    ({"student_share": 1.5}, "student_share must be in"),
    ({"microbatches": 0}, "microbatches must be at least 1"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    GKDConfig(**settings)
