"""Direct preference optimisation: a policy from comparisons, without a reward model.

Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, and the losses that followed it. The
log-probabilities of the reference are computed once per pair, before training.
"""

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.losses import logprobs as logprobs_lib
from rlhf_jax.losses import masked, packing, preference
from rlhf_jax.train_step import make_train_step
from rlhf_jax.types import ApplyFn, Metrics, PackedBatch, Params, TokenBatch, TrainStep

# Losses that look at the policy alone. Two of them are made for means over tokens.
REFERENCE_FREE = {
  "cpo": preference.cpo_loss,
  "simpo": preference.simpo_loss,
  "orpo": preference.orpo_loss,
}
_OF_MEANS = ("simpo", "orpo")
# Losses of the difference of two log-ratios, in whose place another divergence puts its scores.
_OF_MARGINS = ("dpo", "ipo", "hinge", "robust_dpo", "exo_pair", "discopop")
LOSSES = (*preference.PAIRWISE_LOSSES, *REFERENCE_FREE)


@dataclasses.dataclass(frozen=True)
class DPOConfig:
  """DPO and its relatives.

  Attributes:
    loss: A key of rlhf_jax.losses.preference.PAIRWISE_LOSSES, or one without a reference: cpo,
      simpo, orpo. simpo and orpo take mean log-probabilities per token, the others sums.
    beta: Strength of the pull to the reference, or scale of the margin.
    label_smoothing: Assumed probability that a pair is labelled the wrong way round.
    divergence: What the implied penalty to the reference measures.
    sft_coef: Weight of the mean negative log-likelihood of a token of the chosen responses.
    length_alpha: Weight of the tokens beyond the length of the shorter response (LD-DPO).
    reweight: Weigh pairs by how likely the policy is to write them (WPO).
    bonus_coef: Weight of the log-probability of the calibration responses of a batch, if it has
      any: optimism with responses of the reference (XPO; online VPO with its alpha times beta),
      pessimism if negative, with those of the data (offline VPO).
    microbatches: Pieces each batch is cut into; saves memory.
  """

  loss: str = "dpo"
  beta: float = 0.1
  label_smoothing: float = 0.0
  divergence: str = "reverse_kl"
  sft_coef: float = 0.0
  length_alpha: float = 1.0
  reweight: bool = False
  bonus_coef: float = 0.0
  microbatches: int = 1

  def __post_init__(self):
    for name, known in (("loss", LOSSES), ("divergence", preference.DIVERGENCE_SCORES)):
      if getattr(self, name) not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
    if self.beta <= 0:
      raise ValueError(f"beta must be positive, got {self.beta}")
    if self.sft_coef < 0:
      raise ValueError(f"sft_coef must not be negative, got {self.sft_coef}")
    if not 0 <= self.label_smoothing < 0.5:
      raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
    if not 0 <= self.length_alpha <= 1:
      raise ValueError(f"length_alpha must be in [0, 1], got {self.length_alpha}")
    if self.label_smoothing and not self.smooths_labels:
      raise ValueError(f"label_smoothing is not defined for loss={self.loss}; set it to 0")
    if self.divergence != "reverse_kl" and self.loss not in _OF_MARGINS:
      raise ValueError(
        f"divergence is not defined for loss={self.loss}; it is for {', '.join(_OF_MARGINS)}"
      )

  @property
  def function(self):
    """The loss that `loss` names."""
    return {**preference.PAIRWISE_LOSSES, **REFERENCE_FREE}[self.loss]

  @property
  def needs_reference(self) -> bool:
    """Whether the loss reads the reference."""
    return self.loss not in REFERENCE_FREE

  @property
  def compares_pairs(self) -> bool:
    """Whether the loss of a pair depends on the other pairs, so that it takes a mask."""
    return "mask" in inspect.signature(self.function).parameters

  @property
  def smooths_labels(self) -> bool:
    """Whether the loss takes label smoothing."""
    return "label_smoothing" in inspect.signature(self.function).parameters


class DPOBatch(NamedTuple):
  """Pairs.

  Attributes:
    pairs: tokens [B, 2, T] right padded, index 0 chosen and 1 rejected; mask [B, 2, T] on
      responses. Or up to S of them packed in a row.
    ref_logprobs: [B, 2] float32 of `reference_logprobs`, [B, S, 2] of packed pairs; unread by a
      loss without one.
    calibration: B responses, [B, T] each, for `bonus_coef`, or None.
  """

  pairs: TokenBatch | PackedBatch
  ref_logprobs: jax.Array
  calibration: TokenBatch | None = None


def pair_logprobs(
  logprobs: jax.Array, mask: jax.Array, config: DPOConfig
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of the chosen and of the rejected response, [B] each.

  Args:
    logprobs: [B, 2, T] of the tokens.
    mask: [B, 2, T] bool, True on response tokens.
    config: Says whether they are means and how a longer response counts.
  """
  chosen, rejected = preference.length_desensitized_logprobs(
    logprobs[:, 0], logprobs[:, 1], mask[:, 0], mask[:, 1], alpha=config.length_alpha
  )
  if config.loss not in _OF_MEANS:
    return chosen, rejected
  lengths = jnp.maximum(jnp.sum(mask, axis=-1), 1)
  return chosen / lengths[:, 0], rejected / lengths[:, 1]


def score_tokens(
  apply_fn: ApplyFn, params: Params, batch: TokenBatch | PackedBatch
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What a policy says about given responses.

  Args:
    apply_fn: `(params, tokens [B, T]) -> logits [B, T, V]`; packed rows come with `segment_ids`.
    params: Policy.
    batch: tokens and mask of any leading shape, [..., T].

  Returns:
    Log-probability of each token [..., T], the mask without positions that nothing predicts
    [..., T], and log sum_v pi(v)^2 at each token [..., T]. Those of packed sequences are unpacked,
    with B * S rows; the mask of a row without sequence is empty.
  """
  *lead, length = batch.tokens.shape
  flat = batch.tokens.reshape(-1, length)

  def figures(targets: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    squared = jax.nn.logsumexp(2 * jax.nn.log_softmax(masked.widen(logits)), axis=-1)
    return logprobs_lib.token_logprobs(logits, targets), jax.lax.stop_gradient(squared)

  packed = isinstance(batch, PackedBatch)
  inputs = {"segment_ids": batch.segment_ids.reshape(flat.shape)} if packed else {}
  logits = apply_fn(params, flat, **inputs)
  logprobs, collision = logprobs_lib.over_next_tokens(figures, flat, logits)
  logprobs, collision = logprobs.reshape(*lead, length), collision.reshape(*lead, length)
  if not packed:
    return logprobs, packing.predicted(batch.mask), collision
  ids = batch.segment_ids
  mask = packing.predicted(batch.mask, ids)
  mask, logprobs, collision = packing.unpack(ids, batch.real.shape[1], mask, logprobs, collision)
  return logprobs, mask, collision


def reference_logprobs(
  apply_fn: ApplyFn, params: Params, pairs: TokenBatch, config: DPOConfig
) -> jax.Array:
  """[B, 2] log-probabilities of pairs under the reference, for `DPOBatch`."""
  logprobs, mask, _ = score_tokens(apply_fn, params, pairs)
  return jnp.stack(pair_logprobs(logprobs, mask, config), axis=1)


def row_figures(
  params: Params, batch: DPOBatch, *, apply_fn: ApplyFn, config: DPOConfig
) -> Metrics:
  """Loss and metrics of each pair, [B] each; [B * S] of packed pairs, anything where there is none.

  `reward/*` are the implicit rewards `beta * (log pi - log ref)`, without a reference
  `beta * log pi`.

  Args:
    params: Policy.
    batch: B pairs with the log-probabilities of the reference.
    apply_fn: `(params, tokens) -> logits [B, T, V]`.
    config: Which loss.
  """
  logprobs, mask, collision = score_tokens(apply_fn, params, batch.pairs)
  policy = pair_logprobs(logprobs, mask, config)
  ref = batch.ref_logprobs[..., 0].reshape(-1), batch.ref_logprobs[..., 1].reshape(-1)
  options: dict[str, Any] = {"beta": config.beta}
  if isinstance(batch.pairs, PackedBatch) and config.compares_pairs:
    options["mask"] = batch.pairs.real.reshape(-1)
  if config.label_smoothing:  # Else the loss's own default: EXO is infinite without any.
    options["label_smoothing"] = config.label_smoothing
  rewards = policy
  if not config.needs_reference:
    losses = config.function(*policy, **options)
  else:
    rewards = policy[0] - ref[0], policy[1] - ref[1]
    if config.divergence == "reverse_kl":
      losses = config.function(*policy, *ref, **options)
    else:
      score = preference.DIVERGENCE_SCORES[config.divergence]
      scores = [score(p, r) for p, r in zip(policy, ref, strict=True)]
      zeros = jnp.zeros_like(ref[0])
      losses = config.function(*scores, zeros, zeros, **options)
  if config.reweight:
    for i in range(2):
      losses *= preference.wpo_weights(logprobs[:, i], collision[:, i], mask[:, i])
  if config.bonus_coef:
    if batch.calibration is None:
      raise ValueError("bonus_coef needs calibration responses")
    free, free_mask, _ = score_tokens(apply_fn, params, batch.calibration)
    free = masked.masked_sum(free, free_mask, axis=1)
    losses += preference.value_bonus(free, coef=config.bonus_coef)
  nll = -masked.masked_mean(logprobs[:, 0], mask[:, 0], axis=1)
  chosen, rejected = (config.beta * x for x in rewards)
  return {
    "loss": losses + config.sft_coef * nll if config.sft_coef else losses,
    "nll/chosen": nll,
    "logprobs/chosen": policy[0],
    "logprobs/rejected": policy[1],
    "reward/chosen": chosen,
    "reward/rejected": rejected,
    "reward/margin": chosen - rejected,
    "reward/accuracy": (chosen > rejected) + 0.5 * (chosen == rejected),
  }


def loss_fn(
  params: Params,
  batch: DPOBatch,
  key: jax.Array,
  *,
  apply_fn: ApplyFn,
  config: DPOConfig,
) -> tuple[jax.Array, Metrics]:
  """Mean of `row_figures`: the loss, and the metrics with the number of response tokens."""
  del key  # The loss is deterministic given the batch.
  figures = row_figures(params, batch, apply_fn=apply_fn, config=config)
  if isinstance(batch.pairs, PackedBatch):
    real = batch.pairs.real.reshape(-1)
    means = {name: masked.masked_mean(values, real) for name, values in figures.items()}
    means["weight"] = jnp.sum(real).astype(jnp.float32)
  else:
    means = {name: jnp.mean(values) for name, values in figures.items()}
  loss = means.pop("loss")
  return loss, means | {"tokens": jnp.sum(batch.pairs.mask).astype(jnp.float32)}


def make_dpo_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: DPOConfig,
  *,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, DPOBatch, key) -> (state, metrics)`."""
  loss = functools.partial(loss_fn, apply_fn=apply_fn, config=config)
  return make_train_step(
    loss, tx, microbatches=config.microbatches, state_shardings=state_shardings
  )
