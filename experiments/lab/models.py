"""Opens, creates, places and exports the models of a script."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import (
  bucket,
  data,
  flags,
  generation,
  hub,
  loop,
  processes,
  ranges,
  sharding,
  simulation,
)
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.models import (
  Model,
  ModelConfig,
  build,
  hf,
  lora,
  peft,
  presets,
  quantized,
  round_matrices,
)
from rlhf_jax.models.families import FAMILIES, Head
from rlhf_jax.models.transformer import COMPUTATION, AttentionName, PrecisionName, RematName
from rlhf_jax.train_step import join
from rlhf_jax.types import Params, Rollout
from .. import records
from ..records import record

_SIZES = ("layers", "width", "heads", "mlp_width")  # Of a new model.
EXPORT = "export"  # Folder of the final model in a workdir, in the Hugging Face format.
ADAPTER = "adapter"  # Folder of the final adapters in a workdir, in the format of PEFT.
EXPORTS = "exports"  # Folder of the models of single steps.


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  """Model.

  Attributes:
    path: Hugging Face folder (config.json, safetensors, tokenizer), or `hf://ORG/NAME[@REVISION]`
      of a hub, as in all flags that name a model. Empty creates a model for the built-in task with
      the sizes below, unless --init_from gives one.
    preset: Architecture of a new model, by its name in rlhf_jax.models.presets, instead of the
      sizes below.
    layers: Number of transformer blocks of a new model.
    width: Width of a new model.
    heads: Number of attention heads of a new model.
    mlp_width: Width of the MLPs of a new model.
    dtype: Dtype of the computation; params and optimizer state stay float32.
    frozen_dtype: Dtype of the matrices of what is not trained: the reference, reward models,
      judges, teachers, opponents, the model below adapters, and all models of a script that trains
      none. `bfloat16` halves their memory.
      With --model.dtype=bfloat16 it changes no result. `int8` takes half of that for the matrices
      of layers, whose weights are rounded to 255 levels, with hardly a loss. `nf4` takes a quarter,
      with 16 levels and a loss; it is meant for the model below adapters, as in QLoRA.
    precision: Precision of matrix products in float32: those of a float32 model, and scores and
      values of any model. `high` is three bfloat16 passes on TPUs and float32 on other devices,
      `highest` float32 on all. `default` leaves it to the device: one bfloat16 pass on TPUs, TF32
      on NVIDIA GPUs.
    attention: Implementation of attention over full sequences: `xla`, the TPU kernel `splash`, or
      `cudnn`. `auto` takes the kernel of the device where possible. Sampling always uses `xla`.
    remat: Activations that the backward pass recomputes to save memory. `none` recomputes nothing,
      `dots` everything but products with weights. `full` recomputes each block, which takes the
      least memory and a third more work.
    logit_chunk: Maximum number of logits per row (tokens x vocabulary) held at once. Longer rows
      are processed in chunks and rematerialized in the backward pass.
    extrapolate: Accept sequences longer than those that a model with rotary positions was made for.
  """

  path: str = ""
  preset: str = ""
  layers: int = 4
  width: int = 128
  heads: int = 4
  mlp_width: int = 256
  dtype: Literal["float32", "bfloat16"] = "float32"
  frozen_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
  precision: PrecisionName = ranges.rare("high")
  attention: AttentionName = "auto"
  remat: RematName = "none"
  logit_chunk: int = ranges.rare(2**22)
  extrapolate: bool = ranges.rare(False)

  def __post_init__(self):
    for name in (*_SIZES, "logit_chunk"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
    if self.preset and self.path:
      raise ValueError("preset is for a new model; leave path empty, or preset")
    if self.preset and self.sizes:
      raise ValueError(
        f"{self.sizes[0]} is a size of a new model, and preset gives another; keep one"
      )
    if self.preset and self.preset not in presets.PRESETS:
      known = ", ".join(sorted(presets.PRESETS))
      raise ValueError(f"preset must be one of {known}, got {self.preset!r}")
    if self.width % (2 * self.heads):
      raise ValueError(f"width {self.width} must be a multiple of 2 * heads = {2 * self.heads}")

  @property
  def sizes(self) -> list[str]:
    """Names of the sizes of a new model that were set."""
    fields = {field.name: field.default for field in dataclasses.fields(self)}
    return [name for name in _SIZES if getattr(self, name) != fields[name]]


def model_folder(path: str) -> pathlib.Path | None:
  """Returns the Hugging Face folder of `--init_from` or `--model.path`; None for an empty path."""
  return finished_folder(path) if path else None


def finished_folder(path: str) -> pathlib.Path:
  """Returns the Hugging Face folder at a path, or the exported model of a finished run there.

  A name hf://ORG/NAME[@REVISION] is that of a model of the hub, which is downloaded.
  `RUN@STEP` and `RUN@best` are checkpoints of a run, which are exported first.

  Raises:
    HubError: There is no such model, or it cannot be downloaded.
    ModelFolderError: The path is neither, or both.
  """
  if hub.is_name(path):
    folder = hub.model_folder(path)
  else:
    folder, step = workdir_lib.split_step(path)
    if step is not None:
      return _folder_of_step(folder, step)
  has_run, has_model = ((f / "config.json").exists() for f in (folder / EXPORT, folder))
  has_model = has_model or peft.is_adapter(folder)
  shown = bucket.name_of(folder)
  if has_run and has_model:
    raise hf.ModelFolderError(
      f"{shown}: holds a model, and in {EXPORT}/ that of a finished run; give {folder / EXPORT},"
      " or move the other one out"
    )
  if has_run or has_model:
    found = folder / EXPORT if has_run else folder
    if problem := workdir_lib.irregular(found):
      raise hf.ModelFolderError(f"{found}: {problem}")
    return found
  raise hf.ModelFolderError(f"{shown}: {_why_no_model(path, folder)}")


def _folder_of_step(workdir: pathlib.Path, step: str) -> pathlib.Path:
  """Returns the folder of the model of `RUN@STEP`, exported now if it is not there."""
  from . import exporting  # It imports the scripts, and they import this.

  number = exporting.number_of(workdir, step)
  folder = workdir / EXPORTS / str(number)
  if jax.process_count() > 1 and not (folder / "config.json").exists():
    name = bucket.name_of(workdir)
    raise hf.ModelFolderError(
      f"{name}@{step}: with several processes, first run python -m experiments.export"
      f" --workdir={name} --step={number}"
    )
  return exporting.export_step(workdir, number)


def _why_no_model(path: str, folder: pathlib.Path) -> str:
  """Says why a path is not that of a model, and what to give instead."""
  if (folder / "checkpoints").exists() or (folder / "identity.json").exists():
    return "this run has not finished; start it again, then use it, or use a step: RUN@STEP"
  if (folder / "adapter_config.json").exists():
    return (
      "an adapter without its model; merge the two (merge_and_unload() and save_pretrained() of"
      " PEFT), and give the merged folder, or put adapter_model.safetensors beside its config"
    )
  if folder.is_dir() and bucket.is_there(folder):
    inner = sorted(path.parent for path in folder.glob("**/config.json"))
    if inner:
      return f"no config.json here; there is one in {inner[-1]}, give that folder"
    if (gguf := next(folder.glob("*.gguf"), None)) is not None:
      return f"{gguf.name} is not read: GGUF is quantized, give the folder that it was made of"
    return "neither the workdir of a finished run nor a folder with config.json"
  if folder.is_file():
    return "a file; give the folder that it is in, with config.json, safetensors and tokenizer.json"
  if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
    return (
      "there is no such folder, and nothing is downloaded from a hub by this name; write"
      f" hf://{path}, or get the model by hf download {path} --local-dir=FOLDER, and give FOLDER"
    )
  return "there is no such folder"


def require_other_folder(workdir: str, folder: pathlib.Path | None) -> None:
  """Refuses a workdir that is the folder, or the finished run, that the model is read from."""
  if folder is None:
    return
  folder = folder.resolve()
  taken = (folder, folder.parent) if folder.name in (EXPORT, ADAPTER) else (folder,)
  if folder.parent.name == EXPORTS:
    taken += (folder.parents[1],)
  if workdir_lib.local_path(workdir).resolve() in taken:
    raise flags.UsageError(
      f"--workdir={workdir} holds the model to start from; give another folder"
    )


def source_folder(options: ModelOptions, init_from: str) -> pathlib.Path | None:
  """Returns the folder of the initial model, given by one of two flags."""
  for name in ("path", "preset"):
    if getattr(options, name) and init_from:
      raise flags.UsageError(f"--init_from and --model.{name} are both given; keep one")
  if (init_from or options.path) and options.sizes:
    given = "--init_from" if init_from else "--model.path"
    raise flags.UsageError(
      f"--model.{options.sizes[0]} is for a new model, and the model of {given} has sizes of its"
      f" own; leave out --model.{options.sizes[0]}, or {given}"
    )
  return model_folder(init_from or options.path)


def open_tokenizer(
  folder: pathlib.Path | None, config: data.DataConfig | None = None
) -> data.Tokenizer:
  """Opens the tokenizer of a model folder; without a folder, that of the built-in task.

  Args:
    folder: Folder of the model.
    config: End token and variables of the chat template; None takes those of the folder.
  """
  config = config or data.DataConfig()
  if folder is None:
    if config.template_args:
      raise flags.UsageError("--data.template_args is for a chat template; give a model with one")
    return data.word_level_tokenizer(simulation.WORDS)
  return tokenizer_of(folder, config.end_token or None, config.variables())


def tokenizer_of(
  folder: pathlib.Path,
  end_token: str | None = None,
  template_args: Mapping[str, Any] | None = None,
) -> data.Tokenizer:
  """Reads the tokenizer of a model folder; adapters without a tokenizer have that of their base.

  Args:
    folder: Folder of the model or of adapters.
    end_token: Token that ends a response; None takes that of the folder.
    template_args: Variables of the chat template; None takes those of the folder.
  """
  base = peft.base_of(folder)
  own = folder if (folder / "tokenizer.json").exists() else base
  return data.load_tokenizer(own, end_token, template_args, model=base)


def build_model(
  run: loop.Run,
  options: ModelOptions,
  config: ModelConfig,
  tokenizer: data.Tokenizer,
  head: Literal["language", "scalar", "both"] = "language",
) -> Model:
  """Builds a model of an architecture on the mesh of the run."""
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
  head: Head = "language",
  *,
  frozen: bool = False,
) -> tuple[Model, Params]:
  """Opens a model and its params, created or loaded in place on the mesh of the run.

  Args:
    run: Opened run.
    options: Model.
    folder: Folder of the model; None makes a new one.
    tokenizer: Tokenizer of the model.
    head: Head of the model.
    frozen: True for a model that is not trained, whose dtype is `options.frozen_dtype`.

  Raises:
    UsageError: The codes of `options.frozen_dtype` would round away what the model has learnt.
  """
  if folder is None and options.preset:
    config = presets.PRESETS[options.preset]
  elif folder is None:
    config = ModelConfig(
      vocab_size=tokenizer.vocab_size,
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
  config = dataclasses.replace(config, **{name: getattr(options, name) for name in COMPUTATION})
  model = build_model(run, options, config, tokenizer, head)
  key, dtype = run.key_for(1), options.frozen_dtype if frozen else "float32"
  if folder is None or sharding.is_absent(run.mesh):
    return model, create(run, lambda key: round_matrices(model.init(key), dtype), key)
  read = "bfloat16" if dtype in quantized.FORMATS else dtype
  if dtype in quantized.FORMATS and hf.trained_over(folder) == dtype:
    # Its weights lie next to those of the codes, which are thus encoded as they were.
    raise flags.UsageError(
      f"--model.frozen_dtype={dtype} would round away what {folder} has learnt: adapters over such"
      " codes, merged into them; give another one, such as bfloat16"
    )
  init = lambda key: round_matrices(model.init(key), read)  # noqa: E731
  shapes = jax.eval_shape(init, key)
  shardings = sharding.named_shardings(shapes, run.mesh, sharding.DECODER_RULES)
  flat = {
    jax.tree_util.keystr(path, simple=True, separator="/"): (shape.dtype, place)
    for (path, shape), place in zip(
      jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    )
  }

  def place(path: str, value: np.ndarray) -> jax.Array:
    dtype, sharded = flat[path]
    return sharding.put(value.astype(dtype, copy=False), sharded)

  params = hf.load_params(folder, model, key=key, place=place)
  if read != dtype:
    params = create(run, lambda params: round_matrices(params, dtype), params)
  return model, params


def open_policy(
  run: loop.Run,
  path: str,
  options: ModelOptions,
  tokenizer: data.Tokenizer,
  like: Params,
  flag: str,
) -> Params:
  """Opens the params of another policy of the same architecture and with the same tokenizer.

  Args:
    run: Opened run.
    path: Path of the policy.
    options: Model.
    tokenizer: Tokenizer of the policy of the run.
    like: Params of the policy of the run, or their shapes.
    flag: Name of the flag that gives the path.
  """
  folder = model_folder(path)
  if folder is None or hf.parse_config(folder)[1] != "language":
    raise hf.ModelFolderError(f"{path}: not a language model")
  require_tokens_of(folder, tokenizer)
  params = open_model(run, options, folder, tokenizer, frozen=True)[1]
  shapes = [jax.tree.map(lambda x: x.shape, of) for of in (like, params)]
  if shapes[0] != shapes[1]:
    raise flags.UsageError(
      f"--{flag}={path} has another architecture than the policy of --init_from"
    )
  return params


def require_tokens_of(folder: pathlib.Path, tokenizer: data.Tokenizer) -> None:
  """Refuses a model whose tokenizer is not that of the policy."""
  if tokenizer_of(folder).digest != tokenizer.digest:
    raise hf.ModelFolderError(
      f"{folder}: its tokenizer is not that of the policy, by its vocabulary, chat template,"
      " template variables or end token; train it from the same base model, with the same"
      " --data.template_args and --data.end_token"
    )


class Scorer(NamedTuple):
  """Model with a scalar head.

  Attributes:
    model: Model.
    params: Params of the model.
    label: Name of the scalar.
    tokenizer: Tokenizer by which the model reads the text of responses; None if it reads the tokens
      of the policy.
  """

  model: Model
  params: Params
  label: str
  tokenizer: data.Tokenizer | None


def open_scorer(
  run: loop.Run,
  path: str,
  options: ModelOptions,
  tokenizer: data.Tokenizer,
  *,
  frozen: bool = True,
) -> Scorer:
  """Opens a model with a scalar head.

  A preference model must have the policy's tokenizer, because it reads the sampled tokens. So does
  a reward model of this package with that tokenizer. Another one reads whole texts, which may go on
  after the end of the response, as its template has them.
  `frozen` is False if it is trained; see `open_model`.
  """
  folder = model_folder(path)
  if folder is None or hf.parse_config(folder)[1] != "scalar":
    raise hf.ModelFolderError(
      f"{path}: not a reward model; train one with experiments.reward_model"
    )
  label = hf.scalar_label(folder)
  if label == records.PREFERENCE:
    require_tokens_of(folder, tokenizer)
  own = tokenizer_of(folder)
  other = None if own.is_exported and own.digest == tokenizer.digest else own
  model, params = open_model(run, options, folder, other or tokenizer, "scalar", frozen=frozen)
  return Scorer(model, params, label, other)


def reads_tokens_of(path: str, tokenizer: data.Tokenizer) -> bool:
  """Returns whether the model of a path has a tokenizer and a template, both of the policy."""
  return tokenizer_of(finished_folder(path)).digest == tokenizer.digest


def open_reward_model(
  run: loop.Run,
  path: str,
  options: ModelOptions,
  tokenizer: data.Tokenizer,
  *,
  frozen: bool = True,
) -> Scorer:
  """Opens the reward model of `--reward.path`.

  `frozen` is False if it is trained; see `open_model`.
  """
  scorer = open_scorer(run, path, options, tokenizer, frozen=frozen)
  if scorer.label == records.PREFERENCE:
    raise hf.ModelFolderError(
      f"{path}: a preference model, which scores no single response; train a reward model with"
      " experiments.reward_model"
    )
  return scorer


def judge_shapes(config: Any) -> dict[str, Params]:
  """Returns the shapes of the models that a config names besides the one that is trained."""
  named = (getattr(config, name, "") for name in ("teacher", "opponent"))
  judged = (getattr(getattr(config, name, None), "path", "") for name in ("reward", "preference"))
  paths = [path for given in (*named, *judged) for path in given.split(",") if path]
  return {f"{i}": _shapes(config.model, finished_folder(path)) for i, path in enumerate(paths)}


def _shapes(options: ModelOptions, folder: pathlib.Path) -> Params:
  config, head = hf.parse_config(folder)
  init = build(config, head).init
  return jax.eval_shape(lambda: round_matrices(init(jax.random.key(0)), options.frozen_dtype))


def create(
  run: loop.Run, make: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()
) -> Any:
  """Runs `make(*args)` into buffers placed by `DECODER_RULES`; shapes for absent devices.

  The buffers are new, but for those of the arguments numbered in `donate`, which are taken over.
  """
  shapes = jax.eval_shape(make, *args)
  shardings = sharding.named_shardings(shapes, run.mesh, sharding.DECODER_RULES)
  if sharding.is_absent(run.mesh):
    return sharding.abstract(shapes, shardings)
  return jax.jit(make, out_shardings=shardings, donate_argnums=donate)(*args)


def copy(run: loop.Run, params: Params) -> Params:
  """Returns a copy of `params` that survives donation."""
  return create(run, lambda params: jax.tree.map(jnp.copy, params), params)


def freeze(run: loop.Run, options: ModelOptions, params: Params) -> Params:
  """Returns a copy in `options.frozen_dtype`, or the params themselves if they have it."""
  if options.frozen_dtype == "float32":
    return params
  return create(run, lambda params: round_matrices(params, options.frozen_dtype), params)


def require_base(config: lora.LoRAConfig, *folders: pathlib.Path | None) -> None:
  """Refuses adapters of a model that nothing has trained.

  Args:
    config: Settings of the adapters.
    *folders: Folders of the models that get adapters; None is a new model.
  """
  if config.rank and not all(folders):
    raise flags.UsageError("--lora.rank adapts a trained model; give --init_from or --model.path")


# Flags that name files of rows or of text, besides those that name models.
_FILES = ("data.path", "data.eval_path", "ptx_path", "judge.principles")
# What is read from a model folder; a card or an optimizer state may change.
_OF_MODELS = (".json", ".jinja", ".safetensors")


def digests(settings: Mapping[str, Any]) -> dict[str, str]:
  """Returns digests of the files that a run reads, for `loop.identify`.

  Process 0 reads the files for all processes. The time is about that of loading them.

  Args:
    settings: Values of the settings by the names of their flags.
  """

  def read() -> dict[str, str]:
    found = {}
    for flag in (*record.SOURCES, "judge.path", "reference"):
      folders = [finished_folder(path) for path in record.paths_in(settings, flag)]
      folders += [peft.base_of(folder) for folder in folders if peft.is_adapter(folder)]
      files = [path for folder in folders for path in sorted(folder.iterdir())]
      files = [path for path in files if path.suffix in _OF_MODELS and path.is_file()]
      files = [path for path in files if not path.match(hub.COPIES)]
      if folders:
        found[f"files of --{flag}"] = workdir_lib.files_digest(files)
    for flag in _FILES:
      if given := settings.get(flag):
        found[f"file of --{flag}"] = workdir_lib.files_digest(_data_files(given))
    return found | hub.commits(settings.values())

  return processes.agree(read)


def _data_files(given: str) -> list[pathlib.Path]:
  """Returns the files that a flag names: one or several, a pattern, or those of a folder."""
  path = pathlib.Path(given).expanduser()
  if path.is_dir():
    return sorted(file for file in path.rglob("*") if file.is_file())
  return [path for path in map(pathlib.Path, data.paths_of(given)) if path.exists()]


def add_adapters(run: loop.Run, config: lora.LoRAConfig, params: Params) -> Params:
  """Returns the params with new adapters, or as they are if the rank is 0."""
  if not config.rank:
    return params
  init = functools.partial(lora.init, params=params, config=config)
  return join(params, create(run, init, run.key_for(3)))


@functools.lru_cache(maxsize=16)
def stops(
  tokenizer: data.Tokenizer, config: generation.SamplingConfig
) -> tuple[tuple[int, ...], generation.StopText | None]:
  """Returns the ids that end a response, and the automaton of the stop strings if there are any."""
  if not config.stop:
    return tokenizer.stop_ids, None
  return tokenizer.stop_ids, generation.stop_text(config.stop_strings, tokenizer.token_bytes())


def require_one_sample(sampling: generation.SamplingConfig, why: str) -> None:
  """Refuses several samples per prompt where one is taken; for `__post_init__` of a config."""
  if sampling.samples_per_prompt != 1:
    raise ValueError(f"sampling.samples_per_prompt must be 1: {why}")


def make_sampler(
  model: Model,
  tokenizer: data.Tokenizer,
  config: generation.SamplingConfig,
  *,
  mixture: bool = False,
) -> Callable[..., Rollout]:
  """Builds a sampler for a model and its tokenizer; a mixture samples from `MixtureParams`.

  The same arguments give the same function, so training and evaluation compile it once.
  """
  return _sampler(model, tokenizer, config, mixture)


@functools.lru_cache(maxsize=16)
def _sampler(
  model: Model, tokenizer: data.Tokenizer, config: generation.SamplingConfig, mixture: bool
) -> Callable[..., Rollout]:
  decoder = model.decode, model.init_cache
  stop_ids, stop_text = stops(tokenizer, config)
  return generation.make_generate(
    *(generation.make_mixture(*decoder) if mixture else decoder),
    config,
    stop_ids=stop_ids,
    pad_id=tokenizer.pad_id,
    stop_text=stop_text,
  )


def with_distinct_ids(
  sample: Callable[..., Rollout], mesh: jax.sharding.Mesh
) -> Callable[..., Rollout]:
  """Builds a sampler that answers a prompt that is in a batch several times anew each time.

  Args:
    sample: `(params, tokens, mask, prompt_id, key) -> rollout` of prompts whose ids differ.
    mesh: Mesh of the prompts.
  """
  if sharding.is_absent(mesh):
    return sample  # It is compiled, not called.
  distinct = jax.jit(generation.distinct_ids, out_shardings=sharding.batch_sharding(mesh))

  def sample_anew(params: Any, tokens: Any, mask: Any, prompt_id: Any, key: jax.Array) -> Rollout:
    return sample(params, tokens, mask, distinct(prompt_id), key)

  return sample_anew


def export(
  folder: pathlib.Path,
  params: Params,
  model: Model,
  tokenizer: data.Tokenizer,
  label: str = "reward",
  dtype: str = "float32",
  base: pathlib.Path | None = None,
  sources: Sequence[pathlib.Path | None] = (),
) -> pathlib.Path:
  """Writes a folder that `--init_from` and transformers can read, with adapters merged.

  Args:
    folder: Folder to write.
    params: Params of the model.
    model: Model.
    tokenizer: Tokenizer of the model.
    label: Name of the scalar of a judge.
    dtype: Dtype of the weights in the folder.
    base: Folder of the model below adapters, to write these beside the folder as well.
    sources: Folders of the models that the params come from.
  """
  first, *others = tokenizer.stop_ids
  token_ids: dict[str, int | list[int]] = {
    "eos_token_id": [first, *others] if others else first,
    "pad_token_id": tokenizer.pad_id,
  }
  if tokenizer.bos_id is not None:
    token_ids["bos_token_id"] = tokenizer.bos_id
  processes.agree(lambda: workdir_lib.require_lock(folder))
  processes.agree(lambda: tokenizer.save(folder))
  has_adapters = any(True for _ in lora.leaves(params))
  if has_adapters and "score" not in params and base is not None and not peft.is_adapter(base):
    adapter = folder.with_name(ADAPTER)
    peft.write(adapter, params, FAMILIES[model.config.family], str(base.resolve()))
    processes.agree(lambda: tokenizer.save(adapter))
  over = [quantized.format_of(params), *(hf.trained_over(source) for source in sources if source)]
  hf.save_folder(
    folder,
    lora.merge(params),
    model.config,
    token_ids=token_ids,
    label=label,
    dtype=dtype,
    trained_over=next(filter(None, over), ""),
  )
  return folder
