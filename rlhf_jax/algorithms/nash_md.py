"""Nash-MD: learning from preferences between a policy and an opponent.

Munos et al., 2023, https://arxiv.org/abs/2312.00886. One iteration samples responses of the policy
and of the opponent to the same prompts, has a judge give `P(y > y')`, and takes one policy-gradient
step. The opponent is `policy^(1 - mix) ref^mix`. Related methods have another opponent:

| method        | opponent                     | settings                                |
|---------------|------------------------------|-----------------------------------------|
| Nash-MD       | policy^(1 - mix) ref^mix     | 0 < mix < 1                             |
| self-play     | the policy                   | mix = 0                                 |
| best response | the reference                | mix = 1                                 |
| Nash-EMA      | moving average of the policy | ema > 0, mix = 0                        |
| Mirror Prox   | the policy, one step ahead   | mix = 0, in `opponents.extragradient`   |

No gradient flows through the sampling of responses or through the preference.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import ranges
from rlhf_jax.algorithms import opponents, reading
from rlhf_jax.losses import game, masked
from rlhf_jax.train_step import make_train_step
from rlhf_jax.types import ApplyFn, Metrics, Params, TrainStep

NashMDBatch = opponents.OpponentBatch  # With K = 1.


@dataclasses.dataclass(frozen=True)
class NashMDConfig(opponents.OpponentConfig):
  """Nash-MD.

  Attributes:
    ema: Decay of the moving average used as the opponent; 0 plays against the current policy.
  """

  ema: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, below_one=("ema",))


def loss_fn(
  params: Params, batch: NashMDBatch, key: jax.Array, *, read: reading.Read
) -> tuple[jax.Array, Metrics]:
  """Policy-gradient loss of the regularised game, averaged over responses with a preference."""
  del key  # The loss is deterministic given the batch.
  now = opponents.read_batch(read, params, batch)
  judged, gain = now.judged.reshape(-1), now.preference.reshape(-1)
  losses = game.nash_md_loss(now.logprobs, now.ref_logprobs, now.mask, gain, tau=batch.tau[0])
  weight = jnp.sum(judged).astype(jnp.float32)
  return masked.masked_mean(jnp.sum(losses, axis=1), judged), now.metrics | {"weight": weight}


def make_nash_md_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: NashMDConfig,
  *,
  temperature: float = 1.0,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, NashMDBatch, key) -> (state, metrics)`."""
  loss = functools.partial(loss_fn, read=reading.make_read(apply_fn, temperature))
  return make_train_step(
    loss, tx, microbatches=config.microbatches, state_shardings=state_shardings
  )
