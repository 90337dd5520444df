"""ReST: fine-tuning on a policy's own scored samples, of which ever fewer and better ones are kept.

Gulcehre et al., 2023, https://arxiv.org/abs/2308.08998. Grow samples N responses to each prompt and
scores them once; each Improve step keeps what passes a higher threshold and fine-tunes on it.
Keeping the best of the N is RAFT (https://arxiv.org/abs/2304.06767), with a forward KL to the start
it is SuperHF (https://arxiv.org/abs/2310.16763).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.losses import kl, logprobs, masked, packing, shaping, supervised
from rlhf_jax.train_step import jit_step, update
from rlhf_jax.types import ApplyFn, Metrics, Params, TokenBatch, TrainState

# (state, batch, ref_params, key) -> (state, metrics)
RestStep = Callable[[TrainState, "RestBatch", Params, jax.Array], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class RestConfig:
  """What is kept of the grown responses, and how it is learnt from.

  Attributes:
    keep: advantage keeps the responses that are the furthest above the mean reward of their prompt,
      which suits reward models: pairs of the same prompt do not tell them how good a prompt's
      responses are beside those of another. threshold keeps the highest rewards of all prompts
      together, as the paper does, and suits rewards that mean the same everywhere, such as a right
      answer. best keeps the best response to each prompt.
    quantiles: One Improve step each: the share of the responses that lie below the threshold,
      rising. With keep=best, the share of the prompts whose best response does.
    loss: bc is the likelihood of what is kept; weighted weighs it by exp(reward / temperature);
      gold is offline RL: also by the policy's own probability of each token.
    temperature: Of the weights, in standard deviations of the grown rewards.
    kappa: Weight of the forward KL from the start to the policy, over the whole vocabulary.
    microbatches: Pieces each batch is cut into; saves memory, does not change the result.
  """

  keep: Literal["advantage", "threshold", "best"] = "advantage"
  quantiles: tuple[float, ...] = (0.5, 0.7, 0.85)
  loss: Literal["bc", "weighted", "gold"] = "bc"
  temperature: float = 1.0
  kappa: float = 0.0
  microbatches: int = 1

  def __post_init__(self):
    known_values = {
      "keep": ("advantage", "threshold", "best"),
      "loss": ("bc", "weighted", "gold"),
    }
    for name, known in known_values.items():
      if getattr(self, name) not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
    rising = all(a < b for a, b in zip(self.quantiles, self.quantiles[1:], strict=False))
    if not self.quantiles or not rising or not 0 <= self.quantiles[0] <= self.quantiles[-1] < 1:
      raise ValueError(f"quantiles must rise from 0 or more to below 1, got {self.quantiles}")
    if not self.temperature > 0:
      raise ValueError(f"temperature must be positive, got {self.temperature}")
    if not self.kappa >= 0:
      raise ValueError(f"kappa must not be negative, got {self.kappa}")


class RestBatch(NamedTuple):
  """Kept responses.

  Attributes:
    sequences: B of them, right padded.
    weights: [B] float32, at least 0; what a response counts beside the others.
  """

  sequences: TokenBatch
  weights: jax.Array


def kept_weights(rewards: np.ndarray, quantile: float, config: RestConfig) -> np.ndarray:
  """What each grown response counts in an Improve step.

  A reward that many responses share, such as 0 for a wrong answer, can be the threshold itself.
  Those at it are left out if any lies above.

  Args:
    rewards: [P, N] of N responses to each of P prompts; those that are not finite are left out.
    quantile: One of `config.quantiles`.
    config: Which to keep, and how to weigh them.

  Returns:
    [P, N] float32, 0 on those left out; the largest is 1. All 0 only if no reward is finite.
  """
  rewards = np.asarray(rewards, np.float64)
  fine = np.isfinite(rewards)
  if not fine.any():
    return np.zeros(rewards.shape, np.float32)
  rewards = np.where(fine, rewards, 0.0)
  if config.keep == "advantage":
    rewards -= rewards.sum(axis=1, keepdims=True) / np.maximum(fine.sum(axis=1, keepdims=True), 1)
  candidates = fine
  if config.keep == "best":
    candidates = shaping.selection_weights(jnp.asarray(rewards), jnp.asarray(fine), "best") > 0
    candidates = np.asarray(candidates)
  spread = max(float(np.std(rewards[fine])), 1e-9)
  threshold = np.quantile(rewards[candidates], quantile)
  kept = candidates & (rewards > threshold + 1e-9 * spread)  # Equal ones may be rounded apart.
  if quantile == 0 or not kept.any():
    kept = candidates & (rewards >= threshold)
  if config.loss == "bc":
    return kept.astype(np.float32)
  excess = np.where(kept, rewards - rewards[kept].max(), -np.inf)
  return np.exp(excess / (spread * config.temperature)).astype(np.float32)


def loss_fn(
  params: Params,
  batch: RestBatch,
  key: jax.Array,
  *,
  ref_params: Params,
  apply_fn: ApplyFn,
  config: RestConfig,
  ref_apply_fn: ApplyFn | None = None,
) -> tuple[jax.Array, Metrics]:
  """Weighted mean over the response tokens of their negative log-likelihood.

  With `loss=gold` a token's weight is also the policy's probability of it, as a constant (Pang and
  He, 2021, https://arxiv.org/abs/2009.07839): what the policy would not say is not imitated.

  Args:
    params: Policy.
    batch: B weighted responses; all weights 0 give a gradient of 0.
    key: Unused.
    ref_params: Start of the policy, read if `config.kappa` is not 0.
    apply_fn: `(params, tokens) -> logits [B, T, V]`.
    config: Settings.
    ref_apply_fn: Of the reference, if it has no adapters and the policy does.

  Returns:
    Loss in nats per token, and metrics; `weight` is the sum of the weights of the tokens.
  """
  del key
  tokens, mask = batch.sequences
  mask = packing.predicted(mask)
  logits = apply_fn(params, tokens)
  nll = supervised.nll(logits, tokens)
  weights = jnp.where(mask, batch.weights[:, None], 0.0)
  total = jnp.maximum(jnp.sum(weights), 1e-9)
  trust = jnp.exp(-jax.lax.stop_gradient(nll)) if config.loss == "gold" else 1.0
  loss = masked.masked_sum(trust * weights * nll, mask) / total
  metrics = {
    "nll": masked.masked_sum(weights * nll, mask) / total,
    "weight": jnp.sum(weights),
    "tokens": jnp.sum(mask).astype(jnp.float32),
  }
  if config.kappa:
    ref_logits = jax.lax.stop_gradient((ref_apply_fn or apply_fn)(ref_params, tokens))
    divergence = logprobs.over_next_tokens(
      lambda targets, *logits: kl.full_kl(*logits), tokens, ref_logits, logits
    )
    forward = masked.masked_sum(weights * divergence, mask) / total
    loss += config.kappa * forward
    metrics["kl/forward"] = forward
  return loss, metrics


def make_rest_step(
  apply_fn: ApplyFn,
  tx: optax.GradientTransformation,
  config: RestConfig,
  *,
  ref_apply_fn: ApplyFn | None = None,
  state_shardings: Any = None,
) -> RestStep:
  """Jitted `step(state, RestBatch, ref_params, key) -> (state, metrics)` with a donated state."""
  apply = {"apply_fn": apply_fn, "ref_apply_fn": ref_apply_fn}

  def step(state: TrainState, batch: RestBatch, ref_params: Params, key: jax.Array):
    loss = functools.partial(loss_fn, ref_params=ref_params, config=config, **apply)
    return update(loss, tx, state, batch, key, microbatches=config.microbatches)

  return jit_step(step, state_shardings)
