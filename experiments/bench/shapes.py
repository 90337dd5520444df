"""Sizes of the model and of the batches, the same in all benchmarks, and their random inputs."""

import dataclasses
import functools
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from rlhf_jax import loop, ranges, sharding
from rlhf_jax.models import Model, ModelConfig, build
from rlhf_jax.models.transformer import RematName
from rlhf_jax.types import Params
from ..lab import models


@dataclasses.dataclass(frozen=True)
class Shape:
  """Model and batches.

  Attributes:
    vocab_size: Size of the vocabulary.
    layers: Number of transformer blocks.
    width: Width of the model.
    heads: Number of attention heads.
    kv_heads: Number of key and value heads; 0 is that of attention heads.
    mlp_width: Width of the MLPs.
    dtype: Dtype of the computation; params and optimizer state stay float32.
    remat: Activations that the backward pass recomputes; see experiments.sft.
    logit_chunk: Maximum number of logits per row held at once.
    batch_size: Sequences, pairs or responses per step.
    prompt: Tokens of a prompt.
    response: Tokens of a response.
    share_prompts: Run the prompt of a pair once for both responses, in DPO and reward models.
    samples_per_prompt: Responses per prompt in GRPO; divides the batch.
    epochs: Passes over the responses of a PPO iteration.
    minibatches: Optimizer steps per pass.
    seed: Seed of weights and tokens.
  """

  vocab_size: int = 32000
  layers: int = 4
  width: int = 256
  heads: int = 4
  kv_heads: int = 0
  mlp_width: int = 1024
  dtype: Literal["float32", "bfloat16"] = "float32"
  remat: RematName = "none"
  logit_chunk: int = 2**22
  batch_size: int = 8
  prompt: int = 128
  response: int = 128
  share_prompts: bool = True
  samples_per_prompt: int = 4
  epochs: int = 4
  minibatches: int = 1
  seed: int = 0

  def __post_init__(self):
    names = [field.name for field in dataclasses.fields(Shape) if field.type in (int, "int")]
    ranges.check(self, at_least_one=[n for n in names if n not in ("seed", "kv_heads")])
    if self.width % (2 * self.heads):
      raise ValueError(f"width {self.width} must be a multiple of 2 * heads = {2 * self.heads}")
    if self.kv_heads and self.heads % self.kv_heads:
      raise ValueError(f"kv_heads {self.kv_heads} must divide heads={self.heads}")
    for name in ("samples_per_prompt", "minibatches"):
      if self.batch_size % getattr(self, name):
        raise ValueError(f"{name} must divide batch_size={self.batch_size}")

  @property
  def length(self) -> int:
    """Tokens of a prompt with a response."""
    return self.prompt + self.response

  @property
  def model(self) -> ModelConfig:
    """Architecture of the models."""
    return ModelConfig(
      vocab_size=self.vocab_size,
      layers=self.layers,
      width=self.width,
      heads=self.heads,
      kv_heads=self.kv_heads or self.heads,
      head_dim=self.width // self.heads,
      mlp_width=self.mlp_width,
      max_length=2 * self.length,
      tied=False,
      dtype=self.dtype,
      remat=self.remat,
    )


class Setup(NamedTuple):
  """Models with random weights, and random inputs, on one device.

  Attributes:
    shape: Sizes.
    run: Run without a workdir, on a mesh of one device.
    policy: Language model; `apply` computes logits of responses only, as in the scripts.
    scorer: Model of scores: reward model, critic, judge.
    params: Params of the policy, which are also the reference; no step may donate them.
    reward_params: Params of the reward model.
    tokens: [B, 2, T] int32, pairs of two responses to a prompt.
  """

  shape: Shape
  run: loop.Run
  policy: Model
  scorer: Model
  params: Params
  reward_params: Params
  tokens: jax.Array

  def place(self, tree: Any) -> Any:
    """Places a tree of numpy arrays [B, ...] on the device."""
    return sharding.place_batch(tree, self.run.mesh)


def set_up(shape: Shape) -> Setup:
  """Creates the models and the inputs of a shape."""
  mesh = sharding.make_mesh("", jax.devices()[:1])
  nothing: Any = None  # Neither session nor writer: nothing is logged.
  run = loop.Run(pathlib.Path(), nothing, mesh, jax.random.key(shape.seed), nothing)
  policy = build(shape.model, "language", logit_chunk=shape.logit_chunk, mesh=mesh)
  policy = policy._replace(apply=functools.partial(policy.apply, scored=shape.response))
  scorer = build(shape.model, "scalar", logit_chunk=shape.logit_chunk, mesh=mesh)
  params, reward_params = (
    models.create(run, model.init, run.key_for(n)) for n, model in enumerate((policy, scorer))
  )
  rng = np.random.default_rng(shape.seed)
  tokens = rng.integers(0, shape.vocab_size, (shape.batch_size, 2, shape.length), np.int32)
  tokens[:, 1, : shape.prompt] = tokens[:, 0, : shape.prompt]
  placed = sharding.place_batch({"tokens": tokens}, mesh)["tokens"]
  return Setup(shape, run, policy, scorer, params, reward_params, placed)


def part_of(config: Shape) -> Shape:
  """Returns the sizes of a config that has further fields."""
  return Shape(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Shape)})
