"""What the scripts share: opening models, sampling policies on held-out prompts, exporting."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import records
from rlhf_jax import (
  data,
  evaluation,
  flags,
  generation,
  loop,
  plots,
  processes,
  reporting,
  rewards,
  sharding,
  simulation,
)
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.algorithms import reward_model, rollouts
from rlhf_jax.losses import masked
from rlhf_jax.models import Model, ModelConfig, build, count_params, hf, lora, presets
from rlhf_jax.train_step import freeze, init_state, join, make_optimizer, make_schedule
from rlhf_jax.types import Metrics, Params, Rollout, TrainState, TrainStep

EXPORT = "export"  # Folder of the final model in a workdir, in the Hugging Face format.
PREFERENCE = "preference"  # Label of the scalar of a preference model in its config.json.

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  """Which model.

  Attributes:
    path: Hugging Face folder (config.json, safetensors, tokenizer). Empty makes a new model for
      the built-in task with the sizes below, unless --init_from gives one.
    preset: Architecture of a new model, by its name in rlhf_jax.models.presets, in place of the
      sizes below.
    layers: Blocks of a new model.
    width: Width of a new model.
    heads: Attention heads of a new model.
    mlp_width: Width of the MLP of a new model.
    dtype: Type of the computation; params and optimizer state stay float32.
    attention: What computes attention over whole sequences: XLA, the kernel splash of TPUs, or
      cuDNN; auto takes the kernel of the device where it can, and sampling always XLA.
    remat: What the backward pass computes again instead of keeping it: full each block, for the
      least memory and a third more work; dots all but the products with weights; none nothing.
    logit_chunk: Logits of each row that a loss holds at a time, tokens times vocabulary. Gradients
      compute them again if a row has more.
  """

  path: str = ""
  preset: str = ""
  layers: int = 4
  width: int = 128
  heads: int = 4
  mlp_width: int = 256
  dtype: Literal["float32", "bfloat16"] = "float32"
  attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
  remat: Literal["none", "full", "dots"] = "none"
  logit_chunk: int = 2**22

  def __post_init__(self):
    for name in ("layers", "width", "heads", "mlp_width", "logit_chunk"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
    if self.preset and self.path:
      raise ValueError("preset is for a new model; leave path empty, or preset")
    if self.preset and self.preset not in presets.PRESETS:
      known = ", ".join(sorted(presets.PRESETS))
      raise ValueError(f"preset must be one of {known}, got {self.preset!r}")
    if self.width % (2 * self.heads):
      raise ValueError(f"width {self.width} must be a multiple of 2 * heads = {2 * self.heads}")


@dataclasses.dataclass(frozen=True)
class RewardOptions:
  """What responses are judged by; give one of the two.

  Attributes:
    path: Workdir or Hugging Face folder of a reward model with the policy's tokenizer; several,
      separated by commas, are an ensemble.
    name: Name of a Python reward in rlhf_jax.rewards.REWARDS, such as sentiment or gold.
    ensemble: What the scores of an ensemble are reduced to: their mean, the worst one, or the mean
      less `ensemble_coef` times their variance.
    ensemble_coef: Weight of the variance.
  """

  path: str = ""
  name: str = ""
  ensemble: Literal["mean", "min", "uwo"] = "mean"
  ensemble_coef: float = 0.5

  def __post_init__(self):
    if self.path and self.name:
      raise ValueError("name and path are both given; keep one")
    if self.name and self.name not in rewards.REWARDS:
      known = ", ".join(sorted(rewards.REWARDS))
      raise ValueError(f"name must be one of {known}, got {self.name!r}")

  @property
  def paths(self) -> tuple[str, ...]:
    """The folders that `path` names."""
    return tuple(part for part in self.path.split(",") if part)

  def require(self) -> None:
    """Refuses options that name no reward."""
    if not (self.path or self.name):
      known = ", ".join(sorted(rewards.REWARDS))
      raise flags.UsageError(f"no reward: give --reward.path=DIR or --reward.name, one of {known}")


@dataclasses.dataclass(frozen=True)
class PreferenceOptions:
  """What pairs of responses are judged by; give one of the two.

  Attributes:
    path: Workdir or Hugging Face folder of a preference model with the policy's tokenizer, or of a
      reward model, whose scores are then compared as Bradley and Terry do.
    name: Name of a Python function in rlhf_jax.rewards.PREFERENCES, such as panel.
  """

  path: str = ""
  name: str = ""

  def __post_init__(self):
    if self.path and self.name:
      raise ValueError("name and path are both given; keep one")
    if self.name and self.name not in rewards.PREFERENCES:
      known = ", ".join(sorted(rewards.PREFERENCES))
      raise ValueError(f"name must be one of {known}, got {self.name!r}")

  def require(self) -> None:
    """Refuses options that name no judge."""
    if not (self.path or self.name):
      known = ", ".join(sorted(rewards.PREFERENCES))
      raise flags.UsageError(
        f"no preference: give --preference.path=DIR or --preference.name, one of {known}"
      )


def require_random(sampling: generation.SamplingConfig) -> None:
  """Refuses to learn from samples of another distribution than the one that is trained."""
  if sampling.temperature == 0:
    raise ValueError("sampling.temperature must be positive: this learns from random samples")
  if sampling.top_k or sampling.top_p < 1:
    raise ValueError(
      "sampling.top_k and top_p must be off: they sample from another distribution than the one"
      " that is trained"
    )


def model_folder(path: str) -> pathlib.Path | None:
  """The Hugging Face folder behind `--init_from` or `--model.path`; None for an empty path."""
  if not path:
    return None
  folder = workdir_lib.local_path(path)
  if (folder / EXPORT / "config.json").exists():
    return folder / EXPORT
  if (folder / "config.json").exists():
    return folder
  if (folder / "checkpoints").exists():
    raise hf.ModelFolderError(f"{folder}: this run has not finished; start it again, then use it")
  raise hf.ModelFolderError(
    f"{folder}: neither the workdir of a finished run nor a folder with config.json"
  )


def source_folder(options: ModelOptions, init_from: str) -> pathlib.Path | None:
  """The folder to start from, given by one of two flags."""
  for name in ("path", "preset"):
    if getattr(options, name) and init_from:
      raise flags.UsageError(f"--init_from and --model.{name} are both given; keep one")
  return model_folder(init_from or options.path)


def open_tokenizer(folder: pathlib.Path | None, end_token: str = "") -> data.Tokenizer:
  """The tokenizer of a model folder; of the built-in task without one."""
  if folder is None:
    return data.word_level_tokenizer(simulation.WORDS)
  return data.load_tokenizer(folder, end_token or None)


def build_model(
  run: loop.Run,
  options: ModelOptions,
  config: ModelConfig,
  tokenizer: data.Tokenizer,
  head: Literal["language", "scalar", "both"] = "language",
) -> Model:
  """A model of some architecture on the mesh of the run."""
  return build(
    config,
    head,
    known_tokens=tokenizer.vocab_size,
    logit_chunk=options.logit_chunk,
    mesh=run.mesh,
  )


def open_model(
  run: loop.Run,
  options: ModelOptions,
  folder: pathlib.Path | None,
  tokenizer: data.Tokenizer,
  head: Literal["language", "scalar"] = "language",
) -> tuple[Model, Params]:
  """A model and its params, created or loaded in place on the mesh of the run."""
  if folder is None and options.preset:
    config = presets.PRESETS[options.preset]
  elif folder is None:
    config = ModelConfig(
      # Rows that no token uses let the embedding split evenly.
      vocab_size=tokenizer.vocab_size + -tokenizer.vocab_size % run.mesh.shape["fsdp"],
      width=options.width,
      layers=options.layers,
      heads=options.heads,
      kv_heads=options.heads,
      head_dim=options.width // options.heads,
      mlp_width=options.mlp_width,
      init_std=options.width**-0.5,  # Narrow models learn to copy much sooner than from 0.02.
    )
  else:
    config, _ = hf.parse_config(folder)
    if tokenizer.vocab_size > config.vocab_size:
      raise hf.ModelFolderError(
        f"{folder}: the tokenizer has {tokenizer.vocab_size} ids but the embedding has"
        f" {config.vocab_size} rows; they do not belong together"
      )
  config = dataclasses.replace(
    config, dtype=options.dtype, attention=options.attention, remat=options.remat
  )
  model = build_model(run, options, config, tokenizer, head)
  key = run.key_for(1)
  if folder is None or sharding.is_absent(run.mesh):
    return model, create(run, model.init, key)
  shapes = jax.eval_shape(model.init, key)
  shardings = sharding.named_shardings(shapes, run.mesh, sharding.DECODER_RULES)
  flat = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)
  }
  place = lambda path, value: sharding.put(value, flat[path])  # noqa: E731
  return model, hf.load_params(folder, model, key=key, place=place)


def open_policy(
  run: loop.Run, path: str, options: ModelOptions, tokenizer: data.Tokenizer
) -> Params:
  """Params of another policy of the same architecture, which must read the same tokens."""
  folder = model_folder(path)
  if folder is None or hf.parse_config(folder)[1] != "language":
    raise hf.ModelFolderError(f"{path}: not a language model")
  require_tokens_of(folder, tokenizer)
  return open_model(run, options, folder, tokenizer)[1]


def require_tokens_of(folder: pathlib.Path, tokenizer: data.Tokenizer) -> None:
  """Refuses a model that would read the policy's tokens as others."""
  if data.load_tokenizer(folder).digest != tokenizer.digest:
    raise hf.ModelFolderError(
      f"{folder}: its tokenizer is not that of the policy; train it from the same base model"
    )


def open_scorer(
  run: loop.Run, path: str, options: ModelOptions, tokenizer: data.Tokenizer
) -> tuple[Model, Params, str]:
  """A model with a scalar head that reads the policy's tokens, and what its scalar is called."""
  folder = model_folder(path)
  if folder is None or hf.parse_config(folder)[1] != "scalar":
    raise hf.ModelFolderError(
      f"{path}: not a reward model; train one with experiments.reward_model"
    )
  require_tokens_of(folder, tokenizer)
  model, params = open_model(run, options, folder, tokenizer, "scalar")
  return model, params, hf.scalar_label(folder)


def open_reward_model(
  run: loop.Run, path: str, options: ModelOptions, tokenizer: data.Tokenizer
) -> tuple[Model, Params]:
  """The reward model behind `--reward.path`, which must read the policy's tokens."""
  model, params, label = open_scorer(run, path, options, tokenizer)
  if label == PREFERENCE:
    raise hf.ModelFolderError(
      f"{path}: a preference model, which scores no single response; train a reward model with"
      " experiments.reward_model"
    )
  return model, params


def open_preference(
  run: loop.Run, options: PreferenceOptions, model_options: ModelOptions, tokenizer: data.Tokenizer
) -> Callable[[data.Dataset], rewards.PreferenceFn]:
  """The judge that the options name, opened once: prompts -> preference between responses."""
  options.require()
  if options.path:
    model, params, label = open_scorer(run, options.path, model_options, tokenizer)
    if label == PREFERENCE:
      prefer = rewards.model_preference(model.apply, params, eos_id=tokenizer.eos_id)
    else:
      prefer = rewards.reward_preference(rewards.model_reward(model.apply, params))
    return lambda prompts: prefer  # A model reads the tokens, whatever the prompts are.
  function = rewards.PREFERENCES[options.name]
  return lambda prompts: rewards.text_preference(function, prompts.rows, tokenizer.batch_decode)


def open_reward(
  run: loop.Run, options: RewardOptions, model_options: ModelOptions, tokenizer: data.Tokenizer
) -> Callable[[data.Dataset], rewards.RewardFn]:
  """The reward that the options name, opened once: prompts -> reward of responses to them."""
  options.require()
  if options.paths:
    scorers = [
      rewards.model_reward(model.apply, params)
      for model, params in (
        open_reward_model(run, path, model_options, tokenizer) for path in options.paths
      )
    ]
    score = scorers[0]
    if len(scorers) > 1:
      score = rewards.ensemble_reward(scorers, options.ensemble, options.ensemble_coef)
    return lambda prompts: score  # A reward model reads the tokens, whatever the prompts are.
  function = rewards.REWARDS[options.name]

  def of_prompts(prompts: data.Dataset) -> rewards.RewardFn:
    for row in prompts.rows[:1]:
      function([row["prompt_text"]], [""], [row])  # A missing column is found before compiling.
    return rewards.text_reward(function, prompts.rows, tokenizer.batch_decode)

  return of_prompts


@functools.lru_cache(maxsize=16)
def make_sampler(
  model: Model,
  tokenizer: data.Tokenizer,
  config: generation.SamplingConfig,
  *,
  mixture: bool = False,
) -> Callable[..., Rollout]:
  """`generation.make_generate` for a model and its tokenizer; of a mixture with `MixtureParams`.

  The same function for the same arguments: training and evaluation compile it once.
  """
  decoder = model.decode, model.init_cache
  return generation.make_generate(
    *(generation.make_mixture(*decoder) if mixture else decoder),
    config,
    stop_ids=(tokenizer.eos_id,),
    pad_id=tokenizer.pad_id,
  )


def create(run: loop.Run, make: Callable[..., Any], *args: Any) -> Any:
  """`make(*args)` in buffers of its own, placed by `DECODER_RULES`; shapes for absent devices."""
  shapes = jax.eval_shape(make, *args)
  shardings = sharding.named_shardings(shapes, run.mesh, sharding.DECODER_RULES)
  if sharding.is_absent(run.mesh):
    return sharding.abstract(shapes, shardings)
  return jax.jit(make, out_shardings=shardings)(*args)


def copy(run: loop.Run, params: Params) -> Params:
  """Params that a step which donates its state leaves alone."""
  return create(run, lambda params: jax.tree.map(jnp.copy, params), params)


def frozen_digest(config: lora.LoRAConfig, *folders: pathlib.Path | None) -> dict[str, str]:
  """For `loop.identify`: what a run with adapters reads again when it continues.

  Args:
    config: Adapters.
    *folders: Of the models that get them.
  """
  if not config.rank:
    return {}
  if not all(folders):
    raise flags.UsageError("--lora.rank adapts a trained model; give --init_from or --model.path")
  files = [path for folder in folders if folder for path in sorted(folder.glob("*.safetensors"))]
  return {"frozen": workdir_lib.files_digest(files)}


def add_adapters(run: loop.Run, config: lora.LoRAConfig, params: Params) -> Params:
  """The params with fresh adapters beside them, if there are to be any."""
  if not config.rank:
    return params
  init = functools.partial(lora.init, params=params, config=config)
  return join(params, create(run, init, run.key_for(3)))


def place_state(run: loop.Run, params: Params, tx: optax.GradientTransformation) -> TrainState:
  """Train state with buffers of its own, each moment sharded like its parameter."""
  return create(run, lambda params: init_state(params, tx), params)


class Trainer(NamedTuple):
  """What trains a model.

  Attributes:
    state: Before the first step, in buffers of its own.
    step: `(state, ...) -> (state, metrics)`.
    frozen: Params that no step changes, which the state lacks.
  """

  state: TrainState
  step: Callable[..., Any]
  frozen: Params

  def params(self, state: TrainState) -> Params:
    """The whole params of a state."""
    return join(self.frozen, state.params)


def make_trainer(
  run: loop.Run,
  config: Any,
  model: Model,
  params: Params,
  make_step: Callable[..., Any],
  settings: Any,
  **options: Any,
) -> Trainer:
  """Opens the training of a model.

  Args:
    run: Where to run.
    config: Of the script: RunConfig, `optim`, and `lora`, the adapters that are trained in place of
      the params if they have a rank.
    model: What is trained.
    params: Its start.
    make_step: `(apply_fn, tx, config, *, state_shardings, **options) -> step`.
    settings: Of the algorithm.
    **options: Further ones of `make_step`.
  """
  frozen, trained = lora.split(add_adapters(run, config.lora, params))
  tx = make_optimizer(config.optim, config.steps)
  state = place_state(run, trained, tx)
  make_step = functools.partial(make_step, tx=tx, config=settings, **options)
  step = freeze(make_step, model.apply, frozen, state_shardings=shardings_of(state))
  return Trainer(state, step, frozen)


def shardings_of(tree: Any) -> Any:
  """Where each array of a tree is."""
  return jax.tree.map(lambda x: x.sharding, tree)


def describe(
  run: loop.Run,
  title: str,
  model: Model,
  state: Any,
  rows: Mapping[str, object],
  *,
  frozen: Params | None = None,
) -> None:
  """The panel at the start of a run; `frozen` are params that no step changes."""
  params = state.params if isinstance(state, TrainState) else state
  state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((state, frozen)))
  gradient_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  config = model.config
  experts = ""
  if config.experts:
    experts = f" {config.experts} experts, {config.experts_per_token} per token,"
  mesh = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items() if size > 1)
  devices = f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
  if jax.process_count() > 1:
    devices += f" in {jax.process_count()} processes"
  reporting.start_panel(
    title,
    {
      "workdir": run.workdir,
      "model": f"{config.layers} layers, width {config.width}, {config.heads} heads,{experts}"
      f" vocabulary {config.vocab_size}, {config.dtype}",
      "parameters": reporting.human(count_params((params, frozen)))
      + (f", {reporting.human(count_params(params))} of them trained" if frozen else ""),
      "mesh": f"{devices}{' (' + mesh + ')' if mesh else ''}",
      "memory": f"{reporting.human_bytes(state_bytes + gradient_bytes)} for parameters, gradients"
      " and optimizer state, activations not counted",
      **rows,
    },
  )


def step_tokens(config: Any, dataset: data.Dataset) -> str:
  """Tokens of a batch of a script, and what part of them is padding, for the panel at the start."""
  packed = config.data.packed_length
  tokens = config.batch_size * max(dataset.width, 1) * (packed or dataset.padded_length)
  return f"{tokens}, {data.padding_fraction(dataset, config.batch_size, packed):.0%} padding"


def export(
  folder: pathlib.Path,
  params: Params,
  model: Model,
  tokenizer: data.Tokenizer,
  label: str = "reward",
) -> pathlib.Path:
  """Writes a folder that `--init_from` and transformers read; `label` names a scalar.

  Adapters are merged into the weights.
  """
  token_ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
  if tokenizer.bos_id is not None:
    token_ids["bos_token_id"] = tokenizer.bos_id
  if processes.is_first():
    tokenizer.save(folder)
  hf.save_folder(folder, lora.merge(params), model.config, token_ids=token_ids, label=label)
  return folder


def run_stage(train: Callable[..., dict[str, Any]], session: loop.Session, config: Any) -> Any:
  """Runs a script as a stage of another one, with the flags that repeat it alone in its workdir."""
  path = workdir_lib.local_path(session.workdir) / "flags"
  if processes.is_first() and not path.exists():
    flags.save_configs(path, session, config)
  summary = train(session, config)
  if processes.is_first():
    flags.save_configs(path, session, config)
  return summary


def finish(run: loop.Run, summary: Mapping[str, Any]) -> None:
  """Ends a run whose model has been exported: plots, the card of the model, summary.json last."""
  plots.plot_metrics(run.workdir)
  if processes.is_first():
    records.write_card(run.workdir, run.workdir / EXPORT, summary)
  reporting.write_summary(run.workdir, summary)


def append_lines(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Adds a line per row to a file and returns when they are on disk."""
  if not processes.is_first():
    return
  with open(path, "a", encoding="utf-8") as file:
    file.write("".join(json.dumps(row) + "\n" for row in rows))
    file.flush()
    os.fsync(file.fileno())


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a file; a last line that was not written to its end is cut off the file."""

  def read() -> list[dict[str, Any]]:
    if not path.exists():
      return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
      os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]

  return processes.agree(read)


def measure_rows(
  run: loop.Run,
  dataset: data.Dataset,
  batch_size: int,
  pad_id: int,
  measure: Callable[[Any], Metrics],
  columns: np.ndarray | None = None,
  show: str = "",
) -> dict[str, np.ndarray]:
  """The [B, ...] arrays that `measure` gives for each batch, for every row of a data set.

  With `show` the progress is shown under that name, outside of another one.
  """
  collected: dict[str, list[np.ndarray]] = {}
  batches = data.eval_batches(dataset, batch_size, pad_id, columns=columns)
  total = -(-len(dataset.examples) // batch_size)
  with contextlib.ExitStack() as stack:
    bar = None
    if show:
      bar = stack.enter_context(reporting.Progress(total, description=show, tenths=False))
    for step, (batch, valid) in enumerate(batches, start=1):
      values = sharding.to_host(measure(sharding.place_batch(batch, run.mesh)))
      for name, value in values.items():
        collected.setdefault(name, []).append(value[valid])
      if bar is not None:
        bar.update(step)
  return {name: np.concatenate(parts) for name, parts in collected.items()}


def compared(dataset: data.Dataset, values: np.ndarray) -> np.ndarray:
  """Values [rows, K] of responses -> [N, 2], of the better and of the worse one of all pairs."""
  pairs = []
  for example, row in zip(dataset.examples, values, strict=True):
    ranks = example.get("ranks", np.arange(2))  # A pair has the better one in front.
    better, worse = np.nonzero(ranks[:, None] < ranks[None, :])
    pairs.append(np.stack([row[better], row[worse]], axis=1))
  return np.concatenate(pairs)


def compared_lengths(dataset: data.Dataset) -> np.ndarray:
  """Tokens of the better and of the worse response of all pairs, [N, 2]."""
  lengths = np.zeros([len(dataset.examples), dataset.width])
  for row, example in zip(lengths, dataset.examples, strict=True):
    responses = data.responses_of(example)
    row[: len(responses)] = [len(response) for response in responses]
  return compared(dataset, lengths)


def once_per_step(measure: Callable[[Any, int], T]) -> Callable[[Any, int], T]:
  """`measure(state, step)` that keeps its last answer: the end of a run asks for it twice."""
  last: dict[int, T] = {}

  def measure_once(state: Any, step: int) -> T:
    if step not in last:
      last.clear()
      last[step] = measure(state, step)
    return last[step]

  return measure_once


def evaluate_batches(
  run: loop.Run,
  dataset: data.Dataset,
  batch_size: int,
  pad_id: int,
  measure: Callable[[Any], Metrics],
) -> dict[str, float]:
  """Means over a held-out set of the [B] arrays that `measure` gives for each batch."""
  rows = measure_rows(run, dataset, batch_size, pad_id, measure)
  return {name: float(np.mean(values)) for name, values in rows.items()}


def as_prompts(dataset: data.Dataset, limit: int) -> data.Dataset:
  """The first prompts of any data set, each once, as something to sample responses to."""
  first = {row["prompt_text"]: i for i, row in reversed(list(enumerate(dataset.rows)))}
  kept = sorted(first.values())[:limit]
  examples, rows = [dataset.examples[i] for i in kept], [dataset.rows[i] for i in kept]
  longest = max((len(example["prompt"]) for example in examples), default=1)
  return dataset._replace(kind="prompts", examples=examples, rows=rows, padded_length=longest)


def gold_rewards(
  config: data.DataConfig, prompts: data.Dataset, tokenizer: data.Tokenizer
) -> dict[str, rewards.RewardFn]:
  """The gold reward, if the prompts are those of the built-in task."""
  if config.path or config.tfds:
    return {}
  gold = rewards.text_reward(rewards.REWARDS["gold"], prompts.rows, tokenizer.batch_decode)
  return {"gold": gold}


class Samples(NamedTuple):
  """One response of a policy to every held-out prompt.

  Attributes:
    prompts: [B] texts.
    responses: [B] texts.
    rewards: Reward name -> [B].
    kl: [B] sum over the response of log pi - log ref, nats.
    lengths: [B] tokens.
    ended: [B] bool, whether a stop token was reached.
  """

  prompts: list[str]
  responses: list[str]
  rewards: dict[str, np.ndarray]
  kl: np.ndarray
  lengths: np.ndarray
  ended: np.ndarray


def sequence_kl(model: Model, temperature: float) -> Callable[..., jax.Array]:
  """Jitted `(ref_params, rollout) -> [B]`: log pi - log ref summed over each response."""

  @jax.jit
  def kl(ref_params: Params, rollout: Rollout) -> jax.Array:
    ref, _ = rollouts.rollout_logprobs(model.apply, ref_params, rollout, temperature)
    mask = rollout.response_mask[:, -ref.shape[1] :]
    return masked.masked_sum(rollout.logprobs - ref, mask, axis=1)

  return kl


def heldout_sampler(
  run: loop.Run,
  model: Model,
  dataset: data.Dataset,
  tokenizer: data.Tokenizer,
  config: generation.SamplingConfig,
  *,
  reward_fns: Mapping[str, rewards.RewardFn],
  ref_params: Params | None = None,
  batch_size: int = 128,
) -> Callable[[Params], Samples]:
  """`sample(params)`: one scored response of a policy per held-out prompt, compiled once.

  Args:
    run: Gives the mesh and the key; every call draws with the same one.
    model: Architecture of the policies (and of the reference).
    dataset: Held-out prompts.
    tokenizer: The policies'.
    config: Sampling rule.
    reward_fns: Rewards to compute, by name.
    ref_params: Reference of the KL; the policy itself if None, which gives 0.
    batch_size: Prompts per call of the model.
  """
  config = dataclasses.replace(config, samples_per_prompt=1)
  stops = (tokenizer.eos_id,)
  generate = make_sampler(model, tokenizer, config)
  reshard = sharding.make_reshard(run.mesh, model.config.dtype)
  kl_fn = sequence_kl(model, config.temperature or 1.0)
  key = heldout_key(run, 0)
  batch_size = heldout_batch_size(run, dataset, batch_size)

  def sample(params: Params) -> Samples:
    parts: list[dict[str, np.ndarray]] = []
    responses: list[str] = []
    params = reshard(params)
    for prompts, valid in data.eval_batches(dataset, batch_size, tokenizer.pad_id):
      placed = sharding.place_batch(prompts, run.mesh)
      rollout = generate(params, placed.tokens, placed.mask, placed.prompt_id, key)
      values = {f"reward/{name}": fn(rollout, prompts.prompt_id) for name, fn in reward_fns.items()}
      values |= {
        "kl": np.zeros(batch_size) if ref_params is None else kl_fn(ref_params, rollout),
        "lengths": jnp.sum(rollout.response_mask, axis=1),
        "ended": generation.ended(rollout, stops),
      }
      parts.append({name: np.asarray(v)[valid] for name, v in sharding.to_host(values).items()})
      texts = rewards.response_texts(rollout, tokenizer.batch_decode)
      responses += [text for text, on in zip(texts, valid, strict=True) if on]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Samples(
      prompts=[row["prompt_text"] for row in dataset.rows],
      responses=responses,
      rewards={name: joined[f"reward/{name}"] for name in reward_fns},
      kl=joined["kl"],
      lengths=joined["lengths"],
      ended=joined["ended"],
    )

  return sample


def heldout_comparer(
  run: loop.Run,
  model: Model,
  dataset: data.Dataset,
  tokenizer: data.Tokenizer,
  config: generation.SamplingConfig,
  prefer: rewards.PreferenceFn,
  *,
  batch_size: int = 128,
) -> Callable[[Params, Params], np.ndarray]:
  """`compare(params, other) -> [B]`: preference for the first policy on each held-out prompt.

  Each policy answers once, with random numbers of its own.
  """
  config = dataclasses.replace(config, samples_per_prompt=1)
  generate = make_sampler(model, tokenizer, config)
  reshard = sharding.make_reshard(run.mesh, model.config.dtype)
  keys = [heldout_key(run, i) for i in range(2)]
  batch_size = heldout_batch_size(run, dataset, batch_size)

  def compare(params: Params, other: Params) -> np.ndarray:
    parts = []
    policies = reshard(params), reshard(other)
    for prompts, valid in data.eval_batches(dataset, batch_size, tokenizer.pad_id):
      placed = sharding.place_batch(prompts, run.mesh)
      first, second = (
        generate(policy, placed.tokens, placed.mask, placed.prompt_id, key)
        for policy, key in zip(policies, keys, strict=True)
      )
      parts.append(sharding.to_host(prefer(first, second, prompts.prompt_id))[valid])
    return np.concatenate(parts)

  return compare


def heldout_key(run: loop.Run, index: int) -> jax.Array:
  """On the mesh, as the keys of training are: a sampler is compiled once for both."""
  on_mesh = sharding.put(np.int32(index), sharding.replicated(run.mesh))
  return jax.random.fold_in(run.key_for(2), on_mesh)


def heldout_batch_size(run: loop.Run, dataset: data.Dataset, most: int) -> int:
  """At most `most` prompts or a few more, in equal parts for the devices."""
  size = min(most, max(len(dataset.examples), 1))
  return size + -size % (run.mesh.shape["data"] * run.mesh.shape["fsdp"])


def sample_rows(samples: Samples) -> Sequence[dict[str, Any]]:
  """Rows for a sample table or file."""
  return [
    {
      "prompt": samples.prompts[i],
      "response": samples.responses[i],
      **{name: float(values[i]) for name, values in samples.rewards.items()},
    }
    for i in range(len(samples.responses))
  ]


def side_by_side(before: Samples, after: Samples, limit: int = 4) -> list[dict[str, Any]]:
  """Both answers to the first prompts, each with its last reward (the gold one), if it has any."""

  def answer(of: Samples, i: int) -> str:
    shown = [f"  [{name} {values[i]:.2f}]" for name, values in of.rewards.items()]
    return of.responses[i] + "".join(shown[-1:])

  return [
    {"prompt": after.prompts[i], "start": answer(before, i), "trained": answer(after, i)}
    for i in range(min(limit, len(after.responses)))
  ]


def compare(before: Samples, after: Samples) -> dict[str, float]:
  """Figures of a trained policy beside those of its start, on the same prompts."""
  figures: dict[str, float] = {
    "kl": float(np.mean(after.kl)),
    "length": float(np.mean(after.lengths)),
    "length_before": float(np.mean(before.lengths)),
    "eos_fraction": float(np.mean(after.ended)),
  }
  for name, values in after.rewards.items():
    start = before.rewards[name]
    figures[f"{name}/mean"] = float(np.mean(values))
    figures[f"{name}/mean_before"] = float(np.mean(start))
    rate = evaluation.win_rate(values, start)
    figures[f"{name}/win_rate"] = rate.value
    figures[f"{name}/win_rate_low"], figures[f"{name}/win_rate_high"] = rate.low, rate.high
  return figures


def comparison_table(before: Samples, after: Samples) -> dict[str, dict[str, float]]:
  """The same figures as rows of the table at the end of a script."""
  rows: dict[str, dict[str, float]] = {}
  for name, values in after.rewards.items():
    start = before.rewards[name]
    rows[f"{name} (mean)"] = {"start": float(np.mean(start)), "trained": float(np.mean(values))}
    rows[f"{name}: win rate against the start"] = {
      "trained": evaluation.win_rate(values, start).value
    }
  rows["KL to the start, nats"] = {"start": 0.0, "trained": float(np.mean(after.kl))}
  rows["length, tokens"] = {
    "start": float(np.mean(before.lengths)),
    "trained": float(np.mean(after.lengths)),
  }
  rows["ended by itself"] = {
    "start": float(np.mean(before.ended)),
    "trained": float(np.mean(after.ended)),
  }
  return rows


class Judge:
  """Compares a policy in training with its start, on held-out prompts.

  Args:
    run: The opened run.
    model: Architecture of both.
    tokenizer: Of both.
    prompts: Held-out prompts; none of what follows happens without them.
    sampling: How responses are sampled.
    reward_fns: What they are judged by.
    ref_params: The start.
    prefer: Compares responses directly, if given.
    batch_size: Prompts per call of the model; that of training is compiled already.
  """

  def __init__(
    self,
    run: loop.Run,
    model: Model,
    tokenizer: data.Tokenizer,
    prompts: data.Dataset,
    sampling: generation.SamplingConfig,
    reward_fns: Mapping[str, rewards.RewardFn],
    ref_params: Params,
    *,
    prefer: rewards.PreferenceFn | None = None,
    batch_size: int = 128,
  ):
    self._run, self._model, self._tokenizer, self._prompts = run, model, tokenizer, prompts
    self._compare = None
    if prefer is not None:
      self._compare = heldout_comparer(
        run, model, prompts, tokenizer, sampling, prefer, batch_size=batch_size
      )
    self._ref_params = ref_params
    self._sample = heldout_sampler(
      run,
      model,
      prompts,
      tokenizer,
      sampling,
      reward_fns=reward_fns,
      ref_params=ref_params,
      batch_size=batch_size,
    )
    self._sample_once = once_per_step(lambda params, step: self._sample(params))

  def preference(self, params: Params, other: Params) -> evaluation.Estimate:
    """How often the first policy is preferred to the second one on the held-out prompts."""
    if self._compare is None:
      raise ValueError("the judge was given no preference")
    return evaluation.mean(self._compare(params, other))

  def measure(self, params: Params, step: int) -> dict[str, float]:
    """Mean rewards and KL of responses to the held-out prompts, which are written beside."""
    samples = self._sample_once(params, step)
    self._run.writer.table(step, "samples", sample_rows(samples))
    means = {f"eval/{name}": float(np.mean(r)) for name, r in samples.rewards.items()}
    return {"eval/kl": float(np.mean(samples.kl)), **means}

  def evaluate(
    self, params_of: Callable[[Any], Params]
  ) -> Callable[[Any, int], dict[str, float]] | None:
    """`(state, step) -> metrics` for `loop.fit`."""
    if not self._prompts.examples:
      return None
    return lambda state, step: self.measure(params_of(state), step)

  def finish(
    self, params: Params, step: int, title: str, more: Mapping[str, float] | None = None
  ) -> dict[str, float]:
    """Exports the trained policy, compares it with its start and writes summary.json."""
    run = self._run
    export(run.workdir / EXPORT, params, self._model, self._tokenizer)
    summary = dict(more or {})
    if self._prompts.examples:
      before, after = self._sample(self._ref_params), self._sample_once(params, step)
      summary |= compare(before, after)
      table = comparison_table(before, after)
      if self._compare is not None:
        rate = self.preference(params, self._ref_params)
        summary |= {
          "preference/win_rate": rate.value,
          "preference/win_rate_low": rate.low,
          "preference/win_rate_high": rate.high,
        }
        table["preferred to the start"] = {"start": 0.5, "trained": rate.value}
      reporting.save_samples(run.workdir, 0, sample_rows(before))
      run.writer.table(step, "samples", sample_rows(after))
      reporting.show_samples(side_by_side(before, after), "Before and after")
      reporting.show_summary(f"{title}, held-out prompts", table)
    finish(run, summary)
    return summary


def make_refer(
  model: Model, reference: Callable[..., jax.Array], settings: Any
) -> Callable[..., Metrics]:
  """Jitted `(params, rows) -> {"ref": log-probabilities}`, see `train_offline`."""
  return jax.jit(lambda params, rows: {"ref": reference(model.apply, params, rows, settings)})


def train_offline(
  session: loop.Session,
  config: Any,
  settings: Any,
  *,
  kind: data.KindName,
  title: str,
  make_batch: Callable[[Any, jax.Array], Any],
  reference: Callable[..., jax.Array],
  row_figures: Callable[..., Metrics],
  make_step: Callable[..., TrainStep],
) -> dict[str, float]:
  """Trains a policy on judged responses against fixed log-probabilities of its start.

  Args:
    session: Where to run.
    config: Of the script: RunConfig, `model`, `lora`, `data`, `optim`, `sampling` and `reward`.
    settings: Of the algorithm.
    kind: Of the data.
    title: Shown; in lower case the name of the script.
    make_batch: `(rows, ref_logprobs [B, ...]) -> batch` of the loss.
    reference: `(apply_fn, params, rows, settings) -> ref_logprobs [B, ...]`.
    row_figures: `(params, batch, *, apply_fn, config) -> metrics`, [B] each, NaN where undefined.
    make_step: `(apply_fn, tx, config, *, state_shardings) -> step`.

  Returns:
    The figures of summary.json.
  """
  folder = source_folder(config.model, config.init_from)
  tokenizer = open_tokenizer(folder, config.data.end_token)
  train_set, heldout = data.load(kind, config.data, tokenizer, seed=session.seed)
  with loop.open_run(session) as run:
    records.identify(
      run,
      title.lower(),
      config,
      tokenizer,
      train_set,
      heldout,
      **frozen_digest(config.lora, folder),
    )
    model, ref_params = open_model(run, config.model, folder, tokenizer)
    trainer = make_trainer(run, config, model, ref_params, make_step, settings)
    state = trainer.state
    describe(
      run,
      title,
      model,
      state,
      {
        "data": f"{len(train_set.examples)} examples ({kind})",
        "tokens per step": step_tokens(config, train_set),
      },
      frozen=trainer.frozen,
    )
    refer = make_refer(model, reference, settings)
    measure = functools.partial(
      measure_rows, run, batch_size=config.batch_size, pad_id=tokenizer.pad_id
    )
    refs = [
      measure(dataset, measure=functools.partial(refer, ref_params), show=name)["ref"]
      for name, dataset in {"reference": train_set, "reference, held out": heldout}.items()
      if dataset.examples
    ]

    @jax.jit
    def figures(params, rows, ref):
      found = row_figures(params, make_batch(rows, ref), apply_fn=model.apply, config=settings)
      return {f"eval/{name}": values for name, values in found.items()}

    @functools.cache
    def judge() -> Judge:  # Opened when first asked: a reward model takes no memory before.
      prompts = as_prompts(heldout, len(heldout.examples))
      reward_fns = gold_rewards(config.data, prompts, tokenizer)
      if config.reward.path or config.reward.name:
        reward_fns["reward"] = open_reward(run, config.reward, config.model, tokenizer)(prompts)
      return Judge(run, model, tokenizer, prompts, config.sampling, reward_fns, ref_params)

    @once_per_step
    def evaluate(state: TrainState, step: int) -> dict[str, float]:
      found = measure(
        heldout, columns=refs[1], measure=lambda batch: figures(trainer.params(state), *batch)
      )
      means = {name: float(np.nanmean(values)) for name, values in found.items()}
      if config.eval_every:
        means |= judge().measure(trainer.params(state), step)
      return means

    batches = data.batches(
      train_set,
      config.batch_size,
      seed=session.seed,
      pad_id=tokenizer.pad_id,
      columns=refs[0],
      packed_length=config.data.packed_length,
    )
    state = loop.fit(
      run,
      config,
      lambda state, batch, key: trainer.step(state, make_batch(*batch), key),
      state,
      batches,
      evaluate=evaluate if heldout.examples else None,
      learning_rate=make_schedule(config.optim, config.steps),
      title=title,
    )
    more = dict(evaluate(state, config.steps)) if heldout.examples else {}
    if heldout.examples and kind == "preferences":
      # What preferring the longer response would reach of `eval/reward/accuracy`.
      by_length = reward_model.pair_metrics(compared_lengths(heldout))
      more["eval/length_baseline"] = float(by_length["reward/accuracy"])
      reporting.note(
        f"held-out pairs in the right order: {more['eval/reward/accuracy']:.3f}, by length alone:"
        f" {more['eval/length_baseline']:.3f}"
      )
    return judge().finish(trainer.params(state), config.steps, title, more)


class Zipped:
  """Batches from several sources at once, as one source with one position to save."""

  def __init__(self, combine: Callable[..., Any], sources: Sequence[Any]):
    self._combine, self._sources = combine, sources

  def __next__(self) -> Any:
    return self._combine(*(next(source) for source in self._sources))

  def get_state(self) -> list[Any]:
    return [source.get_state() for source in self._sources]

  def set_state(self, states: Sequence[Any]) -> None:
    for source, state in zip(self._sources, states, strict=True):
      source.set_state(state)


def short_names(flag: str, paths: Sequence[str]) -> list[str]:
  """The shortest endings of paths that tell them apart: `ppo`, or `seed_0/ppo` and `seed_1/ppo`.

  Raises:
    UsageError: A path is given twice; the message starts with the name of the flag.
  """
  parts = [workdir_lib.local_path(path).resolve().parts for path in paths]
  if len(set(parts)) < len(parts):
    raise flags.UsageError(f"--{flag} names a folder twice: {', '.join(paths)}")
  lengths = range(1, max(map(len, parts)) + 1)
  endings = (["/".join(part[-length:]) for part in parts] for length in lengths)
  return next(names for names in endings if len(set(names)) == len(names))
