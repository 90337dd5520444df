"""PPO-max: PPO with additions that keep long runs stable, composed from `ppo`.

Zheng et al., 2023, https://arxiv.org/abs/2307.04964. The KL coefficient follows a target (Ziegler
et al., 2019, https://arxiv.org/abs/1909.08593, section 2.2), the critic predicts normalised
returns, and a loss on demonstrations is added (PPO-ptx: Ouyang et al., 2022,
https://arxiv.org/abs/2203.02155, eq. 2). Scores are normalised by `rewards.shaped`. Advantages may
be those of `macro_actions` (MA-RLHF).
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import ranges
from rlhf_jax.algorithms import epochs, macro_actions, ppo, reading, terms
from rlhf_jax.losses import advantages, kl, masked, reward
from rlhf_jax.types import LossFn, Metrics, Rollout, TrainStep


@dataclasses.dataclass(frozen=True)
class PPOMaxConfig(ppo.PPOConfig):
  """PPO-max.

  Attributes:
    kl_target: Target KL to the reference, in nats per response, that `kl_coef` is adapted to; 0
      keeps `kl_coef` fixed.
    kl_horizon: Number of responses over which `kl_coef` is adapted; more adapt it more slowly.
    normalize_values: Normalisation of the critic's targets by the running mean and standard
      deviation of the returns. The critic then starts at 0, also if it is the reward model.
    segment: Tokens per macro action, the unit of credit; 1 is ordinary PPO.
    cut: Ends of macro actions: after `segment` tokens, at the end of a `sentence`, or where the
      `perplexity` under the reference rises from a token to the next.
    ptx_coef: Weight of the loss on demonstrations.
  """

  kl_target: float = 0.0
  kl_horizon: int = 10000
  normalize_values: bool = False
  segment: int = 1
  cut: Literal["ngram", "sentence", "perplexity"] = "ngram"
  ptx_coef: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    ranges.check(self, non_negative=("kl_target", "ptx_coef"), one_of={"cut": macro_actions.CUTS})
    ranges.check(self, at_least_one=("kl_horizon", "segment"))
    if self.segment > 1 and self.cut != "ngram":
      raise ValueError(f"segment must be 1 with cut={self.cut}, which has a length of its own")


class Control(NamedTuple):
  """State of the KL controller and of the value scale, carried between iterations.

  Attributes:
    kl_coef: [] float32, weight of the KL penalty.
    returns: Running moments of the returns.
  """

  kl_coef: jax.Array
  returns: reward.RunningMoments

  @classmethod
  def init(cls, config: PPOMaxConfig) -> "Control":
    """Returns the state before the first iteration."""
    return cls(jnp.float32(config.kl_coef), reward.RunningMoments.zero())


def adapt_kl_coef(
  kl_coef: jax.Array, sequence_kl: jax.Array, responses: int | jax.Array, config: PPOMaxConfig
) -> jax.Array:
  """Moves the coefficient to the target KL by up to a fifth; a no-op without one or responses."""
  if not config.kl_target:
    return kl_coef
  error = jnp.clip(sequence_kl / config.kl_target - 1, -0.2, 0.2)
  return kl_coef * (1 + error * jnp.minimum(responses / config.kl_horizon, 1))


def _units(moments: reward.RunningMoments, config: PPOMaxConfig) -> tuple[Any, Any]:
  """Size and origin of the critic's unit, in reward: 1 and 0 before there are any returns."""
  if not config.normalize_values:
    return 1.0, 0.0
  variance = moments.variance
  return jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), moments.mean


def make_batch(
  rollout: Rollout,
  scores: jax.Array,
  values: jax.Array,
  ref_logprobs: jax.Array,
  control: Control,
  config: PPOMaxConfig,
  token_rewards: jax.Array | None = None,
  ends: jax.Array | None = None,
) -> tuple[ppo.PPOBatch, Control, Metrics]:
  """Turns scored responses into advantages and returns; see `ppo.make_batch`.

  `values` are in the units of `control`, the returns in those of the next one, which is returned
  too. `ends` [B, R] are tokens that end a sentence, which `config.cut` may read.
  """
  scale, shift = _units(control.returns, config)

  def estimate(rewards, values, mask, **discounts):
    segments = macro_actions.CUTS[config.cut](mask, ends, ref_logprobs, config.segment)
    return advantages.macro_gae(rewards, values, segments, mask, **discounts)

  inputs = rollout, scores, values * scale + shift, ref_logprobs, config
  options = {"kl_coef": control.kl_coef, "token_rewards": token_rewards}
  batch, metrics = ppo.make_batch(*inputs, estimate=estimate, **options)
  mask, returns = batch.mask, batch.returns
  moments = reward.update_moments(control.returns, returns.reshape(-1), mask.reshape(-1))
  scale, shift = _units(moments, config)  # The critic is next read after it has learnt these.
  batch = batch._replace(
    values=jnp.where(mask, values, 0.0), returns=jnp.where(mask, (returns - shift) / scale, 0.0)
  )
  sequence_kl = masked.masked_sum(kl.k1(batch.rollout.logprobs, ref_logprobs), mask, axis=1)
  rows = mask.any(axis=1)
  mean_kl = masked.masked_mean(sequence_kl, rows)
  seen = jnp.where(rows.any(), rows.shape[0], 0)
  kl_coef = adapt_kl_coef(control.kl_coef, mean_kl, seen, config)
  return batch, Control(kl_coef, moments), metrics | {"kl/coef": control.kl_coef}


def make_ppo_max_step(
  apply_fn: reading.ActorCriticFn,
  tx: optax.GradientTransformation,
  config: PPOMaxConfig,
  *,
  demonstration_loss: LossFn | None = None,
  temperature: float = 1.0,
  packed: reading.Packing | None = None,
  state_shardings: Any = None,
) -> TrainStep:
  """Jitted `step(state, PPOBatch, key) -> (state, metrics)`; see `make_epochs_step`.

  With `config.ptx_coef` the batch is a `terms.WithSequences`, whose demonstrations go to
  `demonstration_loss(params, sequences, key)`, such as `sft.loss_fn`.
  """
  entropy = config.entropy_coef > 0
  read = reading.make_actor_critic_read(apply_fn, temperature, packed, entropy=entropy)
  loss: LossFn = functools.partial(ppo.loss_fn, read=read, config=config)
  if config.ptx_coef:
    if demonstration_loss is None:
      raise ValueError("ptx_coef needs a demonstration_loss")
    loss = terms.with_term(loss, demonstration_loss, config.ptx_coef, "loss/ptx")
  return epochs.make_epochs_step(loss, tx, config, packed=packed, state_shardings=state_shardings)
