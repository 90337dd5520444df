"""Online preference optimisation: pairs of the policy's own responses, judged as they are sampled.

Guo et al., 2024, https://arxiv.org/abs/2402.04792; in rounds against the policy of the round before
it is the RLHF Workflow (https://arxiv.org/abs/2405.07863). The loss is any of `algorithms.dpo`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.rollouts import move_padding_right
from rlhf_jax.types import Rollout, TokenBatch


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
  """Which pairs, against which reference.

  Attributes:
    pick: best_worst takes the two samples of a prompt with the highest and the lowest score,
      best_random the highest and another one, first_two the first two whatever the others are.
    reference: What the log-ratios are taken against: the initial policy, or the previous one, that
      of `round_steps` steps ago at most.
    round_steps: Steps between two previous policies.
  """

  pick: Literal["best_worst", "best_random", "first_two"] = "best_worst"
  reference: Literal["initial", "previous"] = "initial"
  round_steps: int = 20

  def __post_init__(self):
    for name, known in (
      ("pick", ("best_worst", "best_random", "first_two")),
      ("reference", ("initial", "previous")),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
    if self.round_steps < 1:
      raise ValueError(f"round_steps must be at least 1, got {self.round_steps}")


def pick_pairs(scores: jax.Array, key: jax.Array, rule: str) -> tuple[jax.Array, jax.Array]:
  """Chooses a better and a worse sample of each prompt.

  Args:
    scores: [B, N] float, N >= 2.
    key: Random key, for `best_random`.
    rule: See `OnlineConfig.pick`.

  Returns:
    Index of the chosen and of the rejected sample, [B] int32 each. They are the same where the two
    samples that were picked are tied: no loss of a difference then learns anything.
  """
  rows, samples = scores.shape
  if samples < 2:
    raise ValueError(f"pairs need at least 2 samples per prompt, got {samples}")
  if rule == "first_two":
    scores = scores[:, :2]
  chosen = jnp.argmax(scores, axis=1)
  rejected = jnp.argmin(scores, axis=1)
  if rule == "best_random":
    step = jax.random.randint(key, [rows], 1, samples)
    rejected = (chosen + step) % samples
  at = lambda index: jnp.take_along_axis(scores, index[:, None], axis=1)[:, 0]  # noqa: E731
  rejected = jnp.where(at(chosen) > at(rejected), rejected, chosen)
  return chosen.astype(jnp.int32), rejected.astype(jnp.int32)


def right_padded(rollout: Rollout) -> TokenBatch:
  """Prompts and responses without the padding in front of and between them.

  Args:
    rollout: B responses; prompts are left padded.

  Returns:
    tokens [B, P + R] and mask [B, P + R] on the responses.
  """
  real = rollout.prompt_mask | rollout.response_mask
  return TokenBatch(*move_padding_right(real, rollout.tokens, rollout.response_mask))


def make_pairs(rollout: Rollout, chosen: jax.Array, rejected: jax.Array) -> TokenBatch:
  """The picked samples of every prompt as pairs.

  Args:
    rollout: B * N responses, those of a prompt next to each other.
    chosen: [B] index among the N.
    rejected: [B].

  Returns:
    tokens [B, 2, T] and mask [B, 2, T], 0 chosen and 1 rejected.
  """
  samples = right_padded(rollout)
  rows = chosen.shape[0]
  picked = jnp.stack([chosen, rejected], axis=1)

  def gather(x: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x.reshape(rows, -1, x.shape[-1]), picked[..., None], axis=1)

  return TokenBatch(gather(samples.tokens), gather(samples.mask))
