"""Prompts for critique and revision, and the model that answers them."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from rlhf_jax import data, loop, rewards, sharding
from rlhf_jax.models import Model
from rlhf_jax.types import Params
from ..lab import given_rows, limits, models

CRITIQUE = """Here is a request and a response to it.

[Request]
{prompt}

[Response]
{response}

Say how the response could be better by this standard: {principle}"""
REVISION = """{critique_request}

[Critique]
{critique}

Now write a better response to the request, and nothing else."""


def distinct_prompts(prompts: data.Dataset) -> list[dict[str, Any]]:
  """Returns the columns of each prompt of a data set, once."""
  asked = given_rows.prompt_columns(prompts)
  return list({json.dumps(columns): columns for columns in asked}.values())


def require_length(
  config: Any,
  folder: pathlib.Path | None,
  tokenizer: data.Tokenizer,
  prompts: Sequence[str],
  principles: Sequence[str],
) -> None:
  """Refuses prompts whose last question may be beyond the positions of a model.

  Args:
    config: Config with `model`, `data` and `sampling`.
    folder: Folder of the model.
    tokenizer: Tokenizer of the model.
    prompts: Prompts to answer.
    principles: Principles to criticise by.
  """
  principle = max(principles, key=len)
  asked = [CRITIQUE.format(prompt=p, response="", principle=principle) for p in prompts]
  texts = [REVISION.format(critique_request=request, critique="") for request in asked]
  # A response and a critique are in the question, and a revision follows.
  new = config.sampling.max_new_tokens
  question = max(map(len, tokenizer.encode_prompts(texts))) + 2 * new
  names = "--sampling.max_new_tokens or --data.max_prompt_length"
  length = limits.Length(question + new, _padded(question) + new, names)
  limits.require(config, folder, [length])


def _padded(length: int) -> int:
  return length + -length % 64


def make_answer(
  run: loop.Run,
  model: Model,
  params: Params,
  tokenizer: data.Tokenizer,
  config: Any,
  folder: pathlib.Path | None,
) -> Callable[[Sequence[data.Prompt], int, int], list[str]]:
  """Builds `answer(prompts, number, turn) -> texts`; its random key depends on number and turn.

  Args:
    run: Opened run.
    model: Model that answers.
    params: Params of the model.
    tokenizer: Tokenizer of the model.
    config: Config with `model`, `data`, `sampling` and `batch_size`.
    folder: Folder of the model.
  """
  params = sharding.make_reshard(run.mesh, model.config.dtype)(params)
  generate = models.make_sampler(
    model, tokenizer, dataclasses.replace(config.sampling, samples_per_prompt=1)
  )

  def answer(prompts: Sequence[data.Prompt], number: int, turn: int) -> list[str]:
    dataset = data.from_prompts(prompts, tokenizer)
    dataset = dataset._replace(padded_length=_padded(dataset.padded_length))
    limits.require_length(config, folder, answered=[dataset])
    key = jax.random.fold_in(jax.random.fold_in(run.key_for(3), number), turn)
    responses: list[str] = []
    for batch, valid in data.eval_batches(dataset, config.batch_size, tokenizer.pad_id):
      rollout = generate(params, batch.tokens, batch.mask, batch.prompt_id, key)
      drawn = rewards.response_texts(rollout, tokenizer.batch_decode)
      responses += [text for text, on in zip(drawn, valid, strict=True) if on]
    return responses

  return answer
