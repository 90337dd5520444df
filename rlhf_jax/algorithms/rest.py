"""ReST: fine-tuning on a policy's own scored samples, of which ever fewer and better ones are kept.

Gulcehre et al., 2023, https://arxiv.org/abs/2308.08998. Grow samples N responses to each prompt and
scores them once; each Improve step keeps what passes a higher threshold and fine-tunes on it.
Keeping the best of the N is RAFT (https://arxiv.org/abs/2304.06767), with a forward KL to the start
it is SuperHF (https://arxiv.org/abs/2310.16763).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import ranges
from rlhf_jax.algorithms import selection
from rlhf_jax.losses import kl, logprobs, masked, packing, supervised
from rlhf_jax.train_step import jit_step, update
from rlhf_jax.types import ApplyFn, Metrics, Params, TokenBatch, TrainState

# (state, batch, ref_params, key) -> (state, metrics)
RestStep = Callable[[TrainState, "RestBatch", Params, jax.Array], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class RestConfig:
  """Choice and weights of the grown responses.

  Attributes:
    keep: Key of rlhf_jax.algorithms.selection.RULES. `advantage` keeps the responses that are the
      furthest above the mean reward of their prompt. It suits reward models: pairs of one prompt do
      not tell them how good its responses are beside those to another. `threshold` keeps the
      highest rewards of all prompts together, as the paper does. It suits rewards that mean the
      same everywhere, such as a right answer. `best` keeps the best response to each prompt.
    quantiles: Share of the responses below the threshold, rising; one Improve step each. With
      `keep=best` it is the share of the prompts whose best response lies below.
    temperature: Temperature of the weights exp(reward / temperature), in standard deviations of the
      grown rewards; 0 gives all that is kept the same weight.
    trust: Further weight of each token, its probability under the policy: offline RL by GOLD.
    kappa: Weight of the forward KL from the start to the policy, over the whole vocabulary.
    microbatches: Pieces of a batch; saves memory, does not change the result.
  """

  keep: str = "advantage"
  quantiles: tuple[float, ...] = (0.5, 0.7, 0.85)
  temperature: float = 0.0
  trust: bool = False
  kappa: float = 0.0
  microbatches: int = 1

  def __post_init__(self):
    ranges.check(
      self,
      non_negative=("temperature", "kappa"),
      at_least_one=("microbatches",),
      one_of={"keep": selection.RULES},
    )
    rising = all(a < b for a, b in zip(self.quantiles, self.quantiles[1:], strict=False))
    if not self.quantiles or not rising or not 0 <= self.quantiles[0] <= self.quantiles[-1] < 1:
      raise ValueError(f"quantiles must rise from 0 or more to below 1, got {self.quantiles}")


class RestBatch(NamedTuple):
  """Kept responses.

  Attributes:
    sequences: B of them, right padded.
    weights: [B] float32, at least 0; what a response counts beside the others.
  """

  sequences: TokenBatch
  weights: jax.Array


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

  With `config.trust` a token's weight is also the policy's probability of it, as a constant (Pang
  and He, 2021, https://arxiv.org/abs/2009.07839): tokens that the policy finds unlikely get little
  weight.

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
  trust = jnp.exp(-jax.lax.stop_gradient(nll)) if config.trust else 1.0
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
