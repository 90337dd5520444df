"""Prompts for critique and revision, and the model that answers them."""

import dataclasses
from collections.abc import Callable, Sequence

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


def make_answer(
  run: loop.Run,
  model: Model,
  params: Params,
  tokenizer: data.Tokenizer,
  config: SamplingConfig,
  batch_size: int,
) -> Callable[[Sequence[str], int, int], list[str]]:
  """Builds `answer(texts, number, turn) -> texts`, whose random key depends on number and turn."""
  params = sharding.make_reshard(run.mesh, model.config.dtype)(params)
  generate = models.make_sampler(
    model, tokenizer, dataclasses.replace(config, samples_per_prompt=1)
  )

  def answer(texts: Sequence[str], number: int, turn: int) -> list[str]:
    dataset = data.prompts_from_texts(list(texts), tokenizer)
    dataset = dataset._replace(padded_length=dataset.padded_length + -dataset.padded_length % 64)
    key = jax.random.fold_in(jax.random.fold_in(run.key_for(3), number), turn)
    responses: list[str] = []
    for batch, valid in data.eval_batches(dataset, batch_size, tokenizer.pad_id):
      rollout = generate(params, batch.tokens, batch.mask, batch.prompt_id, key)
      drawn = rewards.response_texts(rollout, tokenizer.batch_decode)
      responses += [text for text, on in zip(drawn, valid, strict=True) if on]
    return responses

  return answer
