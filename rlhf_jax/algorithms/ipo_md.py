"""IPO-MD: a regression on pairs of samples, judged against an opponent; online IPO and EGPO.

Calandriello et al., 2024, https://arxiv.org/abs/2403.08635. Each prompt gets two responses of the
sampler and one of the opponent. The loss regresses the difference of the two log-ratios to the
reference on the difference of the two probabilities to beat the opponent, divided by `tau`.

| method     | sampler and opponent             | settings                              |
|------------|----------------------------------|---------------------------------------|
| IPO-MD     | policy^(1 - mix) ref^mix         | 0 < mix < 1                           |
| online IPO | the policy                       | mix = 0                               |
| EGPO       | the policy, one step ahead       | mix = 0, in `opponents.extragradient` |

EGPO is Zhou et al., 2025, https://arxiv.org/abs/2503.08942.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algorithms import opponents, reading
from rlhf_jax.losses import masked, preference
from rlhf_jax.train_step import make_train_step
from rlhf_jax.types import ApplyFn, Metrics, Params, TrainStep

IPOMDBatch = opponents.OpponentBatch  # With K = 2.


@dataclasses.dataclass(frozen=True)
class IPOMDConfig(opponents.OpponentConfig):
  """IPO-MD. `tau` must be positive.

  Attributes:
    normalize_lengths: Division of log-ratios by the number of tokens, as in EGPO's code; `tau` is
      then per token.
  """

  tau: float = 0.1
  normalize_lengths: bool = False

  def __post_init__(self):
    super().__post_init__()
    if not min(self.tau, self.last_tau) > 0:
      raise ValueError("tau must be positive: the regression divides by it")


def loss_fn(
  params: Params, batch: IPOMDBatch, key: jax.Array, *, read: reading.Read, config: IPOMDConfig
) -> tuple[jax.Array, Metrics]:
  """Squared error of each pair's difference of log-ratios, averaged over prompts.

  A pair is left out if one of its responses has no preference.
  """
  del key  # The loss is deterministic given the batch.
  now = opponents.read_batch(read, params, batch)
  total = masked.masked_mean if config.normalize_lengths else masked.masked_sum
  policy, ref = (
    total(x, now.mask, axis=1).reshape(batch.preference.shape)
    for x in (now.logprobs, now.ref_logprobs)
  )
  target = (now.preference[:, 0] - now.preference[:, 1]) / batch.tau
  losses = preference.pair_regression_loss(policy[:, 0], policy[:, 1], ref[:, 0], ref[:, 1], target)
  judged = jnp.all(now.judged, axis=1)
  weight = jnp.sum(judged).astype(jnp.float32)
  return masked.masked_mean(losses, judged), now.metrics | {"weight": weight}


def make_ipo_md_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: IPOMDConfig,
  *,
  temperature: float = 1.0,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, IPOMDBatch, key) -> (state, metrics)`."""
  read = reading.make_read(apply_fn, temperature)
  loss = functools.partial(loss_fn, read=read, config=config)
  return make_train_step(
    loss, tx, microbatches=config.microbatches, state_shardings=state_shardings
  )
