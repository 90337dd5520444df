"""A bigram model that loops can follow in float64, and the gradient that a step takes.

`check` holds a step to an oracle: a double loop over rows and tokens, written from the paper. An
oracle takes two sets of params. The loss reads the first one, and what the paper treats as a
constant reads the second one, `held`. So the derivative with respect to the first is the gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.train_step import init_state
from rlhf_jax.types import Rollout, TokenBatch

V, P, R = 5, 2, 4  # Tokens, and columns of the prompts and the responses of a rollout.
ROWS = 8
TEMPERATURE = 0.7
POISON = np.nan  # What padding holds.

Tables = dict[str, np.ndarray]  # "policy" [V, V] logits of the next token, "value" [V] of a prefix.
Pair = tuple[int, int]  # A token and the one before it, which is read first.


def language(params, tokens, *, segment_ids=None, last=None):
  """Logits of the next token, from a table of the token at hand."""
  del segment_ids
  logits = params["policy"][tokens]
  return logits if last is None else logits[:, -last:]


def scores(params, tokens, *, segment_ids=None, last=None):
  """Scores or values, from a table of the token at hand."""
  del segment_ids
  values = params["value"][tokens]
  return values if last is None else values[:, -last:]


def actor_critic(params, tokens, **kwargs):
  """Logits of the policy and values of the critic."""
  return language(params, tokens, **kwargs), scores(params, tokens, **kwargs)


def tables(seed: int = 0) -> Tables:
  """Random params."""
  rng = np.random.default_rng(seed)
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in (("policy", (V, V)), ("value", (V,)))
  }


def log_softmax(logits: np.ndarray) -> np.ndarray:
  """Log-probabilities of one distribution."""
  top = np.max(logits)
  return logits - top - np.log(np.sum(np.exp(logits - top)))


def logprob(params: Tables, pair: Pair, temperature: float = 1.0) -> float:
  """Log-probability of the second token after the first one."""
  return log_softmax(np.float64(params["policy"][pair[0]]) / temperature)[pair[1]]


def entropy(params: Tables, pair: Pair, temperature: float = 1.0) -> float:
  """Entropy of the distribution that the second token of a pair is drawn from."""
  table = log_softmax(np.float64(params["policy"][pair[0]]) / temperature)
  return -np.sum(np.exp(table) * table)


def log_sigmoid(x: float) -> float:
  """Logarithm of the sigmoid."""
  return -np.logaddexp(0.0, -x)


def sigmoid(x: float) -> float:
  """Logistic function."""
  return 1 / (1 + np.exp(-x))


def scored_pairs(tokens: np.ndarray, mask: np.ndarray) -> list[Pair]:
  """Tokens [T] that the mask scores, each behind the one before it."""
  return [(int(tokens[t - 1]), int(tokens[t])) for t in range(1, len(tokens)) if mask[t]]


def sequences(*leading: int, seed: int = 0, length: int = 7) -> TokenBatch:
  """Right-padded prompts with responses of one to five tokens."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, V, (*leading, length)).astype(np.int32)
  end = rng.integers(P + 1, length + 1, (*leading, 1))
  return TokenBatch(tokens, (np.arange(length) >= P) & (np.arange(length) < end))


def rollout_of(params: Tables, rows: int = ROWS, seed: int = 0, noise: float = 0.5) -> Rollout:
  """Responses of one to four tokens that another policy than `params` has sampled."""
  rng = np.random.default_rng(seed)
  at = np.arange(P + R)
  tokens = rng.integers(0, V, (rows, P + R)).astype(np.int32)
  prompt_mask = (at < P) & (at >= P - rng.integers(1, P + 1, (rows, 1)))
  response_mask = (at >= P) & (at < P + rng.integers(1, R + 1, (rows, 1)))
  logprobs = np.zeros((rows, R), np.float32)
  for b, pairs in enumerate(responses(Rollout(tokens, prompt_mask, response_mask, logprobs))):
    logprobs[b, : len(pairs)] = [logprob(params, pair, TEMPERATURE) for pair in pairs]
  logprobs += np.where(response_mask[:, P:], noise * rng.normal(size=(rows, R)), 0)
  return Rollout(tokens, prompt_mask, response_mask, logprobs)


def responses(rollout: Rollout) -> list[list[Pair]]:
  """Tokens of every response, each behind the one before it."""
  return [scored_pairs(*row) for row in zip(rollout.tokens, rollout.response_mask, strict=True)]


def beside(rollout: Rollout, seed: int, scale: float = 1.0) -> np.ndarray:
  """Random numbers [B, R] of the tokens of a rollout; padding is poisoned."""
  numbers = scale * np.random.default_rng(seed).normal(size=rollout.logprobs.shape)
  return np.where(rollout.response_mask[:, P:], numbers, POISON).astype(np.float32)


# Takes no step and keeps the gradient.
RECORD = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def taken(step: Callable[..., Any], params: Tables, batch: Any) -> tuple[dict[str, Any], Tables]:
  """Metrics of a step with the optimizer `RECORD`, and the gradient that reaches the optimizer."""
  state = init_state(jax.tree.map(jnp.asarray, params), RECORD)
  state, metrics = step(state, jax.tree.map(jnp.asarray, batch), jax.random.key(0))
  assert metrics["skipped_steps"] == 0
  return jax.device_get((metrics, state.opt_state))


def check(
  step: Callable[..., Any],
  params: Tables,
  batch: Any,
  oracle: Callable[[Tables, Tables], float],
  *,
  moved: Sequence[str] = ("policy",),
) -> dict[str, Any]:
  """Compares loss and gradient of a step with an oracle; returns the metrics of the step.

  The gradient is compared along random directions, by central differences.

  Args:
    step: Step with the optimizer `RECORD`.
    params: Params of the step.
    batch: Batch of the step.
    oracle: `(params, held) -> loss`.
    moved: Tables that have a gradient; it is exactly 0 for others.
  """
  metrics, grads = taken(step, params, batch)
  exact = {name: np.float64(table) for name, table in params.items()}
  np.testing.assert_allclose(metrics["loss"], oracle(exact, exact), rtol=2e-5, atol=2e-6)
  for name in exact:
    assert np.any(grads[name]) == (name in moved), name
  rng, h = np.random.default_rng(99), 1e-5
  for name in moved:
    for _ in range(2):
      direction = rng.normal(size=exact[name].shape)
      ahead, behind = (
        oracle(exact | {name: exact[name] + sign * h * direction}, exact) for sign in (1, -1)
      )
      slope = (ahead - behind) / (2 * h)
      assert abs(slope) > 1e-4, "the direction says nothing"
      np.testing.assert_allclose(np.sum(grads[name] * direction), slope, rtol=1e-4, atol=1e-5)
  return metrics
