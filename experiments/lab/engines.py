"""Responses from a sampler of the user: `--rollout.engine=module:function`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax import generation, sharding, user
from rlhf_jax.types import Params, Rollout
from . import models
from .workbench import Workbench

ARGUMENTS = ("params", "tokens", "mask", "prompt_ids", "key", "sampling", "stop_ids")
_ROUNDING = 1e-3  # Largest log-probability, in nats.


def resolve(name: str) -> Callable[..., Any]:
  """Returns the engine that `--rollout.engine` names."""
  return user.resolve("engine", name, {}, ARGUMENTS)


def make_sampler(bench: Workbench) -> Callable[..., Rollout]:
  """Builds a sampler like `bench.sampler()` that asks the engine of `--rollout.engine`.

  The engine is called as `engine(params, tokens [B, P], mask [B, P], prompt_ids [B], key, sampling,
  stop_ids)`: params as jax arrays in the layout of the sampler, left-padded prompts as numpy
  arrays, ids of which no two in a batch are equal, `config.sampling`, and the ids that end a
  response. It returns the arrays tokens, mask and logprobs, [B * samples_per_prompt, R] each, with
  the responses to a prompt in adjacent rows.
  """
  config, tokenizer = bench.config, bench.tokenizer
  name, sampling = config.rollout.engine, config.sampling
  engine = resolve(name)
  stop_ids, _ = models.stops(tokenizer, sampling)

  def sample(params: Params, tokens: Any, mask: Any, prompt_ids: Any, key: jax.Array) -> Rollout:
    tokens, mask, prompt_ids = sharding.to_host((tokens, mask, prompt_ids))
    try:
      answers = engine(params, tokens, mask, prompt_ids, key, sampling, stop_ids)
    except Exception as error:
      raise user.RaisedError(f"--rollout.engine={name} raised {user.describe(error)}") from error
    rows = len(tokens) * sampling.samples_per_prompt
    try:
      drawn, on, logprobs = check(answers, rows, sampling, tokenizer.vocab_size, stop_ids)
    except ValueError as error:
      raise user.ResultError(f"--rollout.engine={name}: {error}") from error
    tokens, mask = (np.repeat(x, sampling.samples_per_prompt, axis=0) for x in (tokens, mask))
    drawn = np.where(on, drawn, tokenizer.pad_id)
    rollout = {
      "tokens": np.concatenate([tokens, drawn], axis=1).astype(np.int32),
      "prompt_mask": np.concatenate([mask, np.zeros_like(on)], axis=1),
      "response_mask": np.concatenate([np.zeros_like(mask), on], axis=1),
      "logprobs": np.where(on, logprobs, 0.0).astype(np.float32),
    }
    return Rollout(**sharding.place_batch(rollout, bench.run.mesh))

  return models.with_distinct_ids(sample, bench.run.mesh)


def check(
  answers: Any,
  rows: int,
  sampling: generation.SamplingConfig,
  vocab_size: int,
  stop_ids: Sequence[int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns tokens, mask and log-probabilities of an engine as numpy arrays.

  Args:
    answers: Result of the engine.
    rows: Number of responses asked for.
    sampling: Settings of the sampler.
    vocab_size: Number of ids in the tokenizer.
    stop_ids: Ids that end a response.

  Raises:
    ValueError: If they are no responses.
  """
  shape = (rows, sampling.max_new_tokens)
  try:
    tokens, mask, logprobs = map(np.asarray, answers)
  except (TypeError, ValueError) as error:
    raise ValueError("it must return three arrays: tokens, mask and logprobs") from error
  kinds = {"tokens": (tokens, "iu"), "mask": (mask, "b"), "logprobs": (logprobs, "f")}
  for name, (array, kind) in kinds.items():
    if array.shape != shape or array.dtype.kind not in kind:
      wanted = {"iu": "integers", "b": "bools", "f": "floats"}[kind]
      given = f"{array.dtype} {list(array.shape)}"
      raise ValueError(f"{name} must be {wanted} {list(shape)}, one row per response; got {given}")
  if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
    raise ValueError("mask must be True on the tokens of a response, from its first to its last")
  if not ((tokens >= 0) & (tokens < vocab_size))[mask].all():
    raise ValueError(f"tokens must be ids of the tokenizer, from 0 to {vocab_size - 1}")
  if (np.isin(tokens, list(stop_ids)) & mask)[:, :-1][mask[:, 1:]].any():
    raise ValueError("a response must end at its first stop token")
  if not (np.isfinite(logprobs) & (logprobs <= _ROUNDING))[mask].all():
    raise ValueError("logprobs must be finite log-probabilities of the tokens, of at most 0")
  return tokens, mask, logprobs
