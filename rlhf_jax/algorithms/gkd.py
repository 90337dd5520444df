"""GKD: distillation from a teacher on samples of the student, by any divergence of next tokens.

Agarwal et al., 2023, https://arxiv.org/abs/2306.13649. A student learns to predict as the teacher
does, on its own responses, where its mistakes are, on those of the teacher, or both (algorithm 1).
The loss is the divergence of the two next-token distributions (equations 1 and 2). No gradient
flows through the sampling of responses.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import ranges
from rlhf_jax.losses import kl, logprobs, masked, packing
from rlhf_jax.train_step import jit_step, reported, update
from rlhf_jax.types import ApplyFn, Metrics, Params, Rollout, TrainState

GKDBatch = Rollout  # Log-probabilities of the sampler are not read.
# (state, batch, teacher_params, key) -> (state, metrics)
GKDStep = Callable[[TrainState, GKDBatch, Params, jax.Array], tuple[TrainState, Metrics]]

# Name -> function of logits of teacher and student, [..., V] each, and of `mix` -> [...] nats.
DIVERGENCES: dict[str, Callable[[jax.Array, jax.Array, float | None], jax.Array]] = {
  "forward_kl": lambda teacher, student, mix: kl.full_kl(teacher, student),
  "reverse_kl": lambda teacher, student, mix: kl.full_kl(student, teacher),
  "jsd": lambda teacher, student, mix: kl.full_jsd(teacher, student, weight=mix or 0.5),
}


@dataclasses.dataclass(frozen=True)
class GKDConfig:
  """On-policy distillation.

  Attributes:
    divergence: Divergence of the student from the teacher. `forward_kl` covers all that the teacher
      may say, `reverse_kl` avoids what it would not say, `jsd` lies between the two.
    mix: Weight of the teacher in the mixture of `jsd`, the beta of the paper; unset it is 0.5.
    student_share: Probability that the responses of a step are those of the student. The other
      steps take responses of the teacher.
    microbatches: Micro-batches per batch; more of them save memory and give the same result.
  """

  divergence: str = "jsd"
  mix: float | None = None
  student_share: float = 1.0
  microbatches: int = 1

  def __post_init__(self):
    share, known = ("student_share",), {"divergence": DIVERGENCES}
    ranges.check(self, positive=("mix",), below_one=("mix",), fraction=share, one_of=known)
    ranges.check(self, at_least_one=("microbatches",))
    if self.mix is not None and self.divergence != "jsd":
      raise ValueError(
        f"mix is not read by divergence={self.divergence}, only by jsd; leave it out"
      )


def loss_fn(
  params: Params,
  batch: GKDBatch,
  key: jax.Array,
  *,
  teacher_params: Params,
  apply_fn: ApplyFn,
  teacher_apply_fn: ApplyFn,
  config: GKDConfig,
  temperature: float = 1.0,
) -> tuple[jax.Array, Metrics]:
  """Divergence from the teacher, averaged over the tokens of a response, then over responses.

  Args:
    params: Student.
    batch: B responses.
    key: Random key, unused.
    teacher_params: Teacher.
    apply_fn: `(params, tokens, *, segment_ids, last) -> logits` of the student.
    teacher_apply_fn: The same of the teacher. Its embedding may be padded to another size.
    config: GKD settings.
    temperature: Sampling temperature, which divides both logits; 0, which is greedy, counts as 1.

  Returns:
    Loss in nats per token, and metrics. `kl/teacher` is the KL of whole responses to the teacher,
    in nats, if the responses are those of the student.
  """
  del key
  temperature = temperature or 1.0  # As the sampler does.
  scored = batch.logprobs.shape[1] + 1  # The output before a response predicts its first token.
  inputs = {"segment_ids": (batch.prompt_mask | batch.response_mask).astype(jnp.int32)}
  teacher, student = (
    apply(of, batch.tokens, last=scored, **inputs)
    for apply, of in ((teacher_apply_fn, teacher_params), (apply_fn, params))
  )

  def divergences(targets: jax.Array, *logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    del targets  # All tokens count, not only the sampled one.
    known = min(x.shape[-1] for x in logits)
    teacher, student = (x[..., :known] / temperature for x in logits)
    reverse = kl.full_kl(*map(jax.lax.stop_gradient, (student, teacher)))
    return DIVERGENCES[config.divergence](teacher, student, config.mix), reverse

  tokens, logits = batch.tokens[:, -scored:], (jax.lax.stop_gradient(teacher), student)
  losses, reverse = logprobs.over_next_tokens(divergences, tokens, *logits)
  mask = packing.predicted(batch.response_mask[:, -scored:])
  rows = mask.any(axis=1)
  return masked.masked_mean(masked.masked_mean(losses, mask, axis=1), rows), {
    "kl/teacher": masked.masked_mean(masked.masked_sum(reverse, mask, axis=1), rows),
    "weight": jnp.sum(rows).astype(jnp.float32),
    "tokens": jnp.sum(mask).astype(jnp.float32),
  }


def make_gkd_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: GKDConfig,
  *,
  teacher_apply_fn: ApplyFn,
  temperature: float = 1.0,
  state_shardings: Any = None,
) -> GKDStep:
  """Jitted `step(state, GKDBatch, teacher_params, key) -> (state, metrics)` with a donated state.

  Args:
    apply_fn: Function of the student's params.
    tx: Optimizer.
    config: GKD settings.
    teacher_apply_fn: Function of the teacher's params.
    temperature: Sampling temperature.
    state_shardings: See `train_step.jit_step`.
  """

  def step(state: TrainState, batch: GKDBatch, teacher_params: Params, key: jax.Array):
    loss = functools.partial(
      loss_fn,
      teacher_params=teacher_params,
      apply_fn=apply_fn,
      teacher_apply_fn=teacher_apply_fn,
      config=config,
      temperature=temperature,
    )
    state, metrics = update(loss, tx, state, batch, key, microbatches=config.microbatches)
    return state, reported(metrics)

  return jit_step(step, state_shardings)
