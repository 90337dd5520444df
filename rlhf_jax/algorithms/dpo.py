"""Direct preference optimisation: trains a policy on preference pairs, without a reward model.

Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, and later losses of the same four
log-probabilities. The log-probabilities under the reference are computed once, before training.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import ranges
from rlhf_jax.algorithms import pairs as pairs_lib
from rlhf_jax.algorithms import pairwise
from rlhf_jax.losses import preference as losses
from rlhf_jax.train_step import make_train_step
from rlhf_jax.types import ApplyFn, Metrics, PairBatch, Params, TrainStep


@dataclasses.dataclass(frozen=True)
class DPOConfig:
  """DPO and other losses of the same four log-probabilities.

  Attributes:
    loss: Loss: a key of rlhf_jax.losses.preference.PAIRWISE_LOSSES, such as `dpo`, or your own
      `module:function`, such as my_losses:squared for my_losses.py in the working directory or on
      PYTHONPATH: `(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta) -> [B]
      losses` of [B] log-probabilities.
    beta: Strength of the implicit KL penalty to the reference.
    label_smoothing: Assumed probability that the label of a pair is flipped.
    divergence: Divergence from the reference that is implicitly penalised: a key of
      rlhf_jax.losses.preference.DIVERGENCE_SCORES.
    sft_coef: Weight of an SFT term, the negative log-likelihood per token of the chosen responses.
    bonus_coef: Weight of the log-probability of the chosen responses, 0 or less. Minus alpha times
      beta is offline VPO (https://arxiv.org/abs/2405.19320), which stays near the data.
    microbatches: Micro-batches per batch; more of them save memory and give the same result. A loss
      that compares the pairs of a batch, such as `aot`, has only one.
  """

  loss: str = "dpo"
  beta: float = 0.1
  label_smoothing: float = 0.0
  divergence: str = "reverse_kl"
  sft_coef: float = 0.0
  bonus_coef: float = 0.0
  microbatches: int = 1

  def __post_init__(self):
    ranges.check(
      self,
      positive=("beta",),
      non_negative=("sft_coef",),
      at_least_one=("microbatches",),
      one_of={"divergence": losses.DIVERGENCE_SCORES},
    )
    pairwise.check_traceable(self.loss, self.beta)
    if self.microbatches > 1 and pairwise.compares_rows(self.loss, self.beta):
      raise ValueError(
        f"microbatches must be 1 for loss={self.loss}, which compares the pairs of a batch, got"
        f" {self.microbatches}"
      )
    if not self.bonus_coef <= 0:
      raise ValueError(
        f"bonus_coef must be 0 or less, got {self.bonus_coef}: above 0 it lowers the probability of"
        " the chosen responses; the bonus of XPO is --online.bonus_coef of experiments.online_dpo"
      )
    if not 0 <= self.label_smoothing < 0.5:
      raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
    if self.label_smoothing and self.loss not in losses.SMOOTHED:
      raise ValueError(f"label_smoothing is not defined for loss={self.loss}; set it to 0")
    if self.divergence != "reverse_kl" and self.loss not in losses.OF_MARGINS:
      known = ", ".join(losses.OF_MARGINS)
      raise ValueError(f"divergence is not defined for loss={self.loss}; it is for {known}")


class DPOBatch(NamedTuple):
  """Pairs of responses to the same prompt.

  Attributes:
    pairs: Pairs, index 0 chosen and 1 rejected. A row of a packed batch holds up to S pairs.
    ref_logprobs: [B, 2] float32, `Pairs.totals` under the reference; [B, S, 2] for packed pairs.
  """

  pairs: PairBatch
  ref_logprobs: jax.Array


def row_metrics(
  policy: pairs_lib.Pairs, ref: jax.Array, *, config: DPOConfig
) -> tuple[Metrics, jax.Array]:
  """Loss and metrics of each pair; the implicit rewards are `beta * (log pi - log ref)`.

  Args:
    policy: N pairs under the policy.
    ref: [N, 2] log-probabilities of their responses under the reference.
    config: DPO settings.

  Returns:
    See `pairs.row_metrics`.
  """
  options: dict[str, Any] = {}
  if config.label_smoothing:  # Else the default of the loss: EXO is infinite without smoothing.
    options["label_smoothing"] = config.label_smoothing
  if config.loss in losses.OF_BATCHES:
    options["mask"] = policy.real
  scores = *policy.totals.T, *ref.T
  if config.divergence != "reverse_kl":
    score = losses.DIVERGENCE_SCORES[config.divergence](policy.totals, ref)
    scores = *score.T, *jnp.zeros_like(score).T
  loss = pairwise.find(config.loss)(*scores, beta=config.beta, **options)
  rows, real = pairs_lib.row_metrics(
    loss, policy, policy.totals, config.beta * (policy.totals - ref)
  )
  if config.sft_coef:
    rows["loss"] += config.sft_coef * policy.nll
  if config.bonus_coef:
    rows["loss"] += losses.value_bonus(-policy.nll * policy.lengths[:, 0], coef=config.bonus_coef)
  return rows, real


def loss_fn(
  params: Params, batch: DPOBatch, key: jax.Array, *, read: pairs_lib.ReadPairs, config: DPOConfig
) -> tuple[jax.Array, Metrics]:
  """Mean of `row_metrics` over the pairs; the metric `weight` counts them."""
  del key  # The loss is deterministic given the batch.
  policy, ref = read(params, batch.pairs), batch.ref_logprobs.reshape(-1, 2)
  loss, metrics = pairs_lib.mean_metrics(*row_metrics(policy, ref, config=config), batch.pairs.mask)
  if pairwise.compares_rows(config.loss, config.beta):
    metrics["whole_batch"] = jnp.ones(())
  return loss, metrics


def make_dpo_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: DPOConfig,
  *,
  weighting: pairs_lib.PairConfig | None = None,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, DPOBatch, key) -> (state, metrics)`."""
  read = pairs_lib.make_read_pairs(apply_fn, weighting)
  loss = functools.partial(loss_fn, read=read, config=config)
  return make_train_step(
    loss, tx, microbatches=config.microbatches, state_shardings=state_shardings
  )
