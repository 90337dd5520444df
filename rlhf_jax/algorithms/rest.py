"""ReST: fine-tuning on those of a policy's samples whose score is above a rising threshold.

Gulcehre et al., 2023, https://arxiv.org/abs/2308.08998. A Grow step samples N responses to each
prompt and scores them once. Each Improve step raises the threshold and fine-tunes on the responses
above it. Keeping the best of the N is RAFT (https://arxiv.org/abs/2304.06767). RAFT with a forward
KL to the initial policy is SuperHF (https://arxiv.org/abs/2310.16763).
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
from rlhf_jax.losses import kl, logprobs, masked, packing
from rlhf_jax.train_step import jit_step, reported, update
from rlhf_jax.types import ApplyFn, Metrics, Params, TokenBatch, TrainState

# (state, batch, ref_params, key) -> (state, metrics)
RestStep = Callable[[TrainState, "RestBatch", Params, jax.Array], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class RestConfig:
  """Selection and weights of the sampled responses.

  Attributes:
    keep: Rule that selects responses. `advantage` keeps those furthest above the mean reward of
      their prompt. It suits reward models, whose scores are not comparable between prompts.
      `threshold` keeps the highest rewards of all prompts together, as in the paper. It suits
      comparable rewards, such as 1 for a right answer. `best` keeps the best response per prompt.
    quantiles: Shares of the responses to drop, rising, one per Improve step. 0.7 keeps the top
      30 %. With `best` they are shares of the prompts, ranked by their best response.
    temperature: Temperature of the weights exp(reward / temperature), in standard deviations of the
      sampled rewards; 0 gives all kept responses the same weight.
    trust: Weighting of each token by its probability under the policy, as in GOLD (offline RL).
    kappa: Weight of the forward KL from the initial policy to the policy, over the full vocabulary.
    microbatches: Micro-batches per batch; more of them save memory and give the same result.
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
    sequences: B prompts with their responses, right padded.
    weights: [B] float32, relative weight of each response, not negative.
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
  """Weighted mean negative log-likelihood of the response tokens.

  With `config.trust` a token's weight is also the policy's probability of it, as a constant (Pang
  and He, 2021, https://arxiv.org/abs/2009.07839): tokens that the policy finds unlikely get little
  weight.

  Args:
    params: Policy.
    batch: B weighted responses; all weights 0 give a gradient of 0.
    key: Random key, unused.
    ref_params: Initial policy, used if `config.kappa` is not 0.
    apply_fn: `(params, tokens) -> logits [B, T, V]`.
    config: ReST settings.
    ref_apply_fn: Function of `ref_params`, if only the policy has adapters; None is `apply_fn`.

  Returns:
    Loss in nats per token, and metrics; `weight` is the sum of the weights of the tokens.
  """
  del key
  tokens, mask = batch.sequences.tokens, batch.sequences.mask
  mask = packing.predicted(mask)
  logits = apply_fn(params, tokens)
  nll = -logprobs.next_token_scores(logits, tokens, mask).logprobs
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
    state, metrics = update(loss, tx, state, batch, key, microbatches=config.microbatches)
    return state, reported(metrics)

  return jit_step(step, state_shardings)
