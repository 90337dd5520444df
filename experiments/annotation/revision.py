"""Prompts for critique and revision, and the model that answers them."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax

from rlhf_jax import data, loop, rewards, sharding
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import Model
from rlhf_jax.types import Params
from ..lab import models

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
  rows = [data.Row("row", dict(fields)).without(prompts.ignored) for fields in prompts.rows]
  asked = [data.prompt_columns(row) for row in rows]
  return list({json.dumps(columns): columns for columns in asked}.values())


def make_answer(
  run: loop.Run,
  model: Model,
  params: Params,
  tokenizer: data.Tokenizer,
  config: SamplingConfig,
  batch_size: int,
) -> Callable[[Sequence[data.Prompt], int, int], list[str]]:
  """Builds `answer(prompts, number, turn) -> texts`; its random key depends on number and turn."""
  params = sharding.make_reshard(run.mesh, model.config.dtype)(params)
  generate = models.make_sampler(
    model, tokenizer, dataclasses.replace(config, samples_per_prompt=1)
  )

  def answer(prompts: Sequence[data.Prompt], number: int, turn: int) -> list[str]:
    dataset = data.from_prompts(prompts, tokenizer)
    dataset = dataset._replace(padded_length=dataset.padded_length + -dataset.padded_length % 64)
    key = jax.random.fold_in(jax.random.fold_in(run.key_for(3), number), turn)
    responses: list[str] = []
    for batch, valid in data.eval_batches(dataset, batch_size, tokenizer.pad_id):
      rollout = generate(params, batch.tokens, batch.mask, batch.prompt_id, key)
      drawn = rewards.response_texts(rollout, tokenizer.batch_decode)
      responses += [text for text, on in zip(drawn, valid, strict=True) if on]
    return responses

  return answer
