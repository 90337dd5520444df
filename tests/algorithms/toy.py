"""A model that compiles at once, for tests whose subject is not the model.

It sees a token and a mean of those up to it in its sequence, with more weight on later ones: order,
prompt and segments matter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms import reading
from rlhf_jax.types import Rollout, TokenBatch

V, WIDTH = 16, 8
P, R = 4, 6  # Columns of prompts and responses of the rollouts.
FIRST = 3  # Smaller ids are special.


def _hidden(params, tokens, segment_ids):
  x = params["embedding"][tokens]
  ids = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids)
  at = np.arange(tokens.shape[1])
  recent = np.tril(0.8 ** np.abs(at[:, None] - at).astype(np.float32))
  seen = jnp.where(ids[:, :, None] == ids[:, None, :], recent[None], 0.0)
  return jnp.tanh(x + seen @ x / jnp.sum(seen, axis=2, keepdims=True))


def language(params, tokens, *, segment_ids=None, last=None):
  """Logits [B, last, V]."""
  logits = _hidden(params, tokens, segment_ids) @ params["head"]
  return logits if last is None else logits[:, -last:]


def scores(params, tokens, *, segment_ids=None, last=None):
  """Scores [B, last]."""
  return language(params, tokens, segment_ids=segment_ids, last=last)[..., 0]


def actor_critic(params, tokens, **kwargs):
  """Logits of the policy and values of the critic."""
  return language(params["policy"], tokens, **kwargs), scores(params["value"], tokens, **kwargs)


def params_of(seed=0, outputs=V):
  """Params of `language`, or of `scores` with one output; no step can donate numpy arrays."""
  rng = np.random.default_rng(seed)
  shapes = {"embedding": (V, WIDTH), "head": (WIDTH, outputs)}
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def score_params(seed=0):
  """Params of `scores`."""
  return params_of(seed, 1)


def actor_critic_params(seed=0):
  """Params of `actor_critic`."""
  return {"policy": params_of(seed), "value": score_params(seed + 100)}


def near(params, scale=0.9):
  """Params of another model that is not far from this one."""
  return jax.tree.map(lambda x: np.float32(scale) * x, params)


def token_batch(*leading, seed=0, prompt=3, length=9):
  """Right-padded prompts with responses of one token or more."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(FIRST, V, (*leading, length)).astype(np.int32)
  end = rng.integers(prompt + 1, length + 1, (*leading, 1))
  return TokenBatch(tokens, (np.arange(length) >= prompt) & (np.arange(length) < end))


@functools.cache
def _read(temperature):
  return jax.jit(reading.make_read(language, temperature))


def rollout_of(params, rows=16, seed=0, temperature=1.0, noise=0.1):
  """Responses of unequal lengths whose log-probabilities are near those under `params`."""
  rng = np.random.default_rng(seed)
  at = np.arange(P + R)
  prompt_mask = (at < P) & (at >= P - rng.integers(1, P + 1, (rows, 1)))
  response_mask = (at >= P) & (at < P + rng.integers(1, R + 1, (rows, 1)))
  tokens = rng.integers(FIRST, V, (rows, P + R)).astype(np.int32)
  rollout = Rollout(tokens, prompt_mask, response_mask, np.zeros((rows, R), np.float32))
  logprobs = np.asarray(_read(temperature)(params, rollout).logprobs)
  logprobs = logprobs + noise * rng.normal(size=logprobs.shape).astype(np.float32)
  return rollout._replace(logprobs=np.where(response_mask[:, P:], logprobs, np.float32(0)))
