"""Preference optimisation without a reference: SimPO, ORPO and CPO.

Meng et al., 2024, https://arxiv.org/abs/2405.14734; Hong et al., 2024,
https://arxiv.org/abs/2403.07691; Xu et al., 2024, https://arxiv.org/abs/2401.08417. SimPO and ORPO
compare log-probabilities per token, CPO compares those of responses.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from rlhf_jax import ranges
from rlhf_jax.algorithms import pairs as pairs_lib
from rlhf_jax.losses import preference
from rlhf_jax.train_step import make_train_step
from rlhf_jax.types import ApplyFn, Metrics, PairBatch, Params, TrainStep

SimPOBatch = PairBatch


@dataclasses.dataclass(frozen=True)
class SimPOConfig:
  """SimPO and other losses without a reference.

  Attributes:
    loss: Loss: `simpo`, `orpo` or `cpo`.
    beta: Scale of the margin; for `orpo` the weight of the odds-ratio term. Unset it is that of the
      paper: 2 for `simpo`, 0.1 for the others.
    margin: Target margin of `simpo` in nats per token, the paper's gamma / beta of 0.25 to 0.8;
      unset it is 0.25.
    sft_coef: Weight of an SFT term, the negative log-likelihood per token of the chosen responses.
      Unset it is that of the paper: 0 for `simpo`, 1 for the others. The paper of `cpo` takes the
      sum over tokens, which weighs more.
    microbatches: Micro-batches per batch; more of them save memory and give the same result.
  """

  loss: str = "simpo"
  beta: float | None = None
  margin: float | None = None
  sft_coef: float | None = None
  microbatches: int = 1

  def __post_init__(self):
    not_negative = ("margin", "sft_coef")
    ranges.check(self, positive=("beta",), non_negative=not_negative, one_of={"loss": LOSSES})
    ranges.check(self, at_least_one=("microbatches",))
    if self.margin is not None and self.loss != "simpo":
      raise ValueError(f"margin is not read by loss={self.loss}, only by simpo; leave it out")

  def value(self, name: str) -> float:
    """Returns a setting that `loss` reads, that of the paper of `loss` if it is unset."""
    value = getattr(self, name)
    return PUBLISHED[self.loss][name] if value is None else value


def simpo(policy: pairs_lib.Pairs, config: SimPOConfig) -> tuple[jax.Array, jax.Array]:
  """SimPO's loss [N] and the log-probabilities [N, 2] that it compares."""
  beta = config.value("beta")
  loss = preference.simpo_loss(*policy.means.T, beta=beta, gamma=beta * config.value("margin"))
  return loss, policy.means


def orpo(policy: pairs_lib.Pairs, config: SimPOConfig) -> tuple[jax.Array, jax.Array]:
  """ORPO's odds-ratio term [N] and the log-probabilities [N, 2] that it compares."""
  return preference.orpo_loss(*policy.means.T, beta=config.value("beta")), policy.means


def cpo(policy: pairs_lib.Pairs, config: SimPOConfig) -> tuple[jax.Array, jax.Array]:
  """CPO's preference term [N] and the log-probabilities [N, 2] that it compares."""
  return preference.cpo_loss(*policy.totals.T, beta=config.value("beta")), policy.totals


LOSSES: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
  "simpo": simpo,
  "orpo": orpo,
  "cpo": cpo,
}


# Settings of the papers, where they differ.
PUBLISHED: dict[str, dict[str, float]] = {
  "simpo": {"beta": 2.0, "margin": 0.25, "sft_coef": 0.0},
  "orpo": {"beta": 0.1, "sft_coef": 1.0},
  "cpo": {"beta": 0.1, "sft_coef": 1.0},
}


def row_metrics(policy: pairs_lib.Pairs, *, config: SimPOConfig) -> tuple[Metrics, jax.Array]:
  """Loss and metrics of each pair; the rewards are `beta` times the compared log-probabilities."""
  loss, logprobs = LOSSES[config.loss](policy, config)
  rows, real = pairs_lib.row_metrics(loss, policy, logprobs, config.value("beta") * logprobs)
  if sft_coef := config.value("sft_coef"):
    rows["loss"] += sft_coef * policy.nll
  return rows, real


def loss_fn(
  params: Params,
  batch: SimPOBatch,
  key: jax.Array,
  *,
  read: pairs_lib.ReadPairs,
  config: SimPOConfig,
) -> tuple[jax.Array, Metrics]:
  """Mean of `row_metrics` over the pairs; the metric `weight` counts them."""
  del key  # The loss is deterministic given the batch.
  return pairs_lib.mean_metrics(*row_metrics(read(params, batch), config=config), batch.mask)


def make_simpo_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: SimPOConfig,
  *,
  weighting: pairs_lib.PairConfig | None = None,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, SimPOBatch, key) -> (state, metrics)`."""
  read = pairs_lib.make_read_pairs(apply_fn, weighting)
  loss = functools.partial(loss_fn, read=read, config=config)
  return make_train_step(
    loss, tx, microbatches=config.microbatches, state_shardings=state_shardings
  )
