"""Models to merge, checked against each other, and adaptive averaging of their blocks of layers."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import data, flags, generation, loop, ranges, reporting, sharding
from rlhf_jax.algorithms import reading
from rlhf_jax.losses import masked
from rlhf_jax.models import Model, hf, merge
from rlhf_jax.models.families import Head
from rlhf_jax.types import Params, Rollout
from . import models

KINDS: dict[Head, str] = {"language": "a language model", "scalar": "a reward model"}


def kind_of(folder: pathlib.Path) -> str:
  """Names the kind of a model by its head."""
  head = hf.parse_config(folder)[1]
  label = hf.scalar_label(folder)
  return KINDS[head] if label in ("", "reward") else f"a {label} model"


def open_alike(
  paths: Sequence[str], config: data.DataConfig
) -> tuple[list[pathlib.Path], data.Tokenizer]:
  """Returns the folders of models that can be merged, and their tokenizer.

  Raises:
    UsageError: One is of another kind, architecture or tokenizer than the first.
  """
  folders = [models.finished_folder(path) for path in paths]
  first = folders[0]
  tokenizer = models.open_tokenizer(first, config)
  for path, folder in zip(paths[1:], folders[1:], strict=True):
    if kind_of(folder) != kind_of(first):
      raise flags.UsageError(
        f"{path} is {kind_of(folder)}, and {paths[0]} is {kind_of(first)}: merge models of one kind"
      )
    one, two = (vars(hf.parse_config(of)[0]) for of in (first, folder))
    if differ := [name for name in one if one[name] != two[name]]:
      values = ", ".join(f"{name} {two[name]} and not {one[name]}" for name in differ[:3])
      raise flags.UsageError(
        f"{path} has another architecture than {paths[0]}: {values}; models can be merged that were"
        " tuned from one model"
      )
    if models.open_tokenizer(folder, config).digest != tokenizer.digest:
      raise flags.UsageError(
        f"{path} has another tokenizer than {paths[0]}, by its vocabulary, its chat template, the"
        " variables of that or the token that ends a response: models can be merged that were tuned"
        " from one model; --data.template_args and --data.end_token are taken for all"
      )
  return folders, tokenizer


@dataclasses.dataclass(frozen=True)
class BlockOptions:
  """Adaptive averaging: a weight for each block of layers, learned.

  Attributes:
    count: Number of blocks of layers, lower to upper; the paper takes 3. 0 gives all layers the
      same weight.
    steps: Batches of answers of the tuned model to learn from.
    batch_size: Answers in a batch; fewer if there are fewer prompts, as many on each device.
    learning_rate: Learning rate of Adam.
    eps: Bound of the ratio of two weights, which is at most (1 + eps) / eps.
  """

  count: int = 0
  steps: int = 30
  batch_size: int = 64
  learning_rate: float = 0.1
  eps: float = ranges.rare(0.2)

  def __post_init__(self):
    ranges.check(
      self,
      non_negative=("count",),
      at_least_one=("steps", "batch_size"),
      positive=("learning_rate", "eps"),
    )


def weight_by_path(blocks: jax.typing.ArrayLike, layers: int) -> merge.Weight:
  """Returns the weight of a leaf by its path.

  Args:
    blocks: [K] weights of blocks of layers, lower to upper; what is in no layer has their mean.
    layers: Number of layers of the model.
  """
  if isinstance(blocks, np.ndarray) and len(blocks) == 1:
    return float(blocks[0])  # Of 0 and 1 the merged model is one of the two.
  per_layer, mean = merge.layer_weights(blocks, layers), jnp.mean(jnp.asarray(blocks))
  return lambda path: per_layer if path.startswith(f"{merge.LAYERS}/") else mean


def learn_blocks(
  run: loop.Run,
  model: Model,
  tokenizer: data.Tokenizer,
  base: Params,
  tuned: Params,
  weight_on_base: float,
  prompts: data.Dataset,
  options: BlockOptions,
  sampling: generation.SamplingConfig,
) -> tuple[np.ndarray, dict[str, float]]:
  """Learns weights of blocks of layers on answers of the tuned model.

  Lin et al., 2023, https://arxiv.org/abs/2309.06256: the weights have a fixed mean, the embedding
  and the head keep it, and the loss is the negative log-likelihood of the answers under the merged
  model. Only the weights are trained.

  Returns:
    Weights [K] on the base, and the loss on the last answers, which no step has learned from,
    with equal weights and with the learned ones.
  """
  parts, rows = sharding.row_parts(run.mesh), len(prompts.examples)
  batch_size = min(options.batch_size, rows) // parts * parts
  if not batch_size:
    few = f"--data.path has {rows} prompts"
    if rows >= parts:
      few = f"--blocks.batch_size={options.batch_size}"
    raise flags.UsageError(
      f"{few}: fewer than the {parts} devices of data and fsdp; give {parts} or more"
    )
  sample = models.with_distinct_ids(models.make_sampler(model, tokenizer, sampling), run.mesh)
  read, layers = reading.make_read(model.apply, sampling.temperature), model.config.layers

  def weights_of(logits: jax.Array) -> jax.Array:
    return merge.block_weights(logits, weight_on_base, options.eps)

  def loss_fn(logits: jax.Array, base: Params, tuned: Params, rollout: Rollout) -> jax.Array:
    weight = weight_by_path(weights_of(logits), layers)
    logprobs = read(merge.interpolate(base, tuned, weight), rollout).logprobs
    return -masked.masked_mean(logprobs, rollout.response_mask[:, -logprobs.shape[1] :])

  tx = optax.adam(options.learning_rate)

  @jax.jit
  def step(logits, state, *inputs):
    loss, gradient = jax.value_and_grad(loss_fn)(logits, *inputs)
    updates, state = tx.update(gradient, state)
    return optax.apply_updates(logits, updates), state, loss

  sampled_from = sharding.make_reshard(run.mesh, model.config.dtype)(tuned)
  batches = data.batches(prompts, batch_size, seed=run.session.seed, pad_id=tokenizer.pad_id)

  def answers(index: int) -> Rollout:
    batch = sharding.place_batch(next(batches), run.mesh)
    return sample(sampled_from, *batch, jax.random.fold_in(run.key_for(2), index))

  logits = start = jnp.zeros(options.count)
  state = tx.init(logits)
  with reporting.Progress(options.steps, description="blocks", tenths=False) as bar:
    for index in range(options.steps):
      logits, state, _ = step(logits, state, base, tuned, answers(index))
      bar.update(index + 1)
  last = answers(options.steps)
  losses = [float(step(at, state, base, tuned, last)[2]) for at in (start, logits)]
  return np.asarray(weights_of(logits)), {"nll/equal": losses[0], "nll/blocks": losses[1]}
