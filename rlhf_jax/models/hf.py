"""Hugging Face folders in and out: config.json, safetensors, nothing that runs code.

A folder is read as data. Every field of config.json that could change what the model computes is
either understood or refused by name; weights come from safetensors only.
"""

import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from rlhf_jax import processes, sharding
from rlhf_jax.models.build import Model
from rlhf_jax.models.transformer import ModelConfig, RopeScaling
from rlhf_jax.types import Params

Head = Literal["language", "scalar"]

ARCHITECTURES: Mapping[str, Head] = {
  "LlamaForCausalLM": "language",
  "LlamaForSequenceClassification": "scalar",
}

# Field of config.json -> field of ModelConfig. Without a default the field must be there; the
# defaults are those that the format itself gives to an absent field.
_REQUIRED = object()
_FIELDS: Mapping[str, tuple[str, type, Any]] = {
  "vocab_size": ("vocab_size", int, _REQUIRED),
  "hidden_size": ("width", int, _REQUIRED),
  "num_hidden_layers": ("layers", int, _REQUIRED),
  "num_attention_heads": ("heads", int, _REQUIRED),
  "num_key_value_heads": ("kv_heads", int, None),
  "head_dim": ("head_dim", int, None),
  "intermediate_size": ("mlp_width", int, _REQUIRED),
  "max_position_embeddings": ("max_length", int, 2048),
  "rope_theta": ("rope_theta", float, None),
  "rms_norm_eps": ("norm_eps", float, 1e-6),
  "tie_word_embeddings": ("tied", bool, False),
  "attention_bias": ("attention_bias", bool, False),
  "mlp_bias": ("mlp_bias", bool, False),
  "initializer_range": ("init_std", float, 0.02),
}
# Kind of rope scaling -> its fields -> fields of RopeScaling.
_ROPE_FIELDS: Mapping[str, Mapping[str, str]] = {
  "default": {},
  "linear": {"factor": "factor"},
  "llama3": {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_length",
  },
}
# Fields that change the computation and for which only one value is implemented.
_ONLY: Mapping[str, tuple[Any, ...]] = {
  "hidden_act": ("silu",),
  "sliding_window": (None,),
  "use_sliding_window": (False, None),
  "partial_rotary_factor": (1.0, 1, None),
  "rope_interleaved": (False, None),
  "quantization_config": (None,),
  "num_labels": (1, None),
  "is_encoder_decoder": (False, None),
  "add_cross_attention": (False, None),
  "attention_multiplier": (None,),
  "embedding_multiplier": (None,),
  "residual_multiplier": (None,),
  "logits_scaling": (None,),
  "final_logit_softcapping": (None,),
  "attn_logit_softcapping": (None,),
  "num_local_experts": (None,),
  "num_experts": (None,),
}
# Fields that say nothing about the forward pass.
_IGNORED = frozenset(
  {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_llama_config",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "rope_parameters",
    "rope_scaling",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_cache",
  }
)


class ModelFolderError(ValueError):
  """A model folder that cannot be loaded as asked; the message names the file and the fix."""

  exit_code = 78


def _refuse(path: pathlib.Path, problem: str) -> ModelFolderError:
  return ModelFolderError(f"{path}: {problem}")


def _typed(path: pathlib.Path, name: str, value: Any, kind: type) -> Any:
  """The value of a field, which must be of type `kind`, and positive if a number."""
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    raise _refuse(path, f"{name} is {value!r}, expected {kind.__name__}")
  if kind is not bool and not 0 < value < math.inf:
    raise _refuse(path, f"{name} is {value!r}, expected a positive number")
  return value


def _parse_rope(
  path: pathlib.Path, raw: Mapping[str, Any]
) -> tuple[float | None, RopeScaling | None]:
  """Base and scaling from `rope_theta` + `rope_scaling`, or from the newer `rope_parameters`."""
  found: dict[str, Any] = {}
  for field in ("rope_scaling", "rope_parameters"):
    part = raw.get(field) or {}
    if not isinstance(part, dict):
      raise _refuse(path, f"{field} is {part!r}, expected an object")
    older = {"rope_type": part["type"]} if "type" in part else {}
    part = older | {name: value for name, value in part.items() if name != "type"}
    if any(found[name] != part[name] for name in found.keys() & part.keys()):
      raise _refuse(path, "rope_scaling and rope_parameters differ; keep one")
    found |= part
  theta = found.pop("rope_theta", raw.get("rope_theta"))
  if raw.get("rope_theta") not in (None, theta):
    raise _refuse(path, f"rope_theta is both {raw['rope_theta']} and {theta}; keep one")
  if theta is not None:
    theta = _typed(path, "rope_theta", theta, float)
  kind = found.pop("rope_type", None) or "default"
  if found.pop("partial_rotary_factor", 1.0) != 1.0:
    raise _refuse(path, "rope_parameters.partial_rotary_factor: only 1.0 is supported")
  if kind not in _ROPE_FIELDS:
    known = ", ".join(_ROPE_FIELDS)
    raise _refuse(path, f"rope scaling {kind!r} is not supported; {known} are")
  names = _ROPE_FIELDS[kind]
  if set(found) != set(names):
    raise _refuse(
      path, f"rope scaling {kind!r} needs exactly {sorted(names)}, found {sorted(found)}"
    )
  if not names:
    return theta, None
  values = {
    ours: _typed(path, theirs, found[theirs], int if ours == "original_length" else float)
    for theirs, ours in names.items()
  }
  if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
    raise _refuse(path, "high_freq_factor must be greater than low_freq_factor")
  return theta, RopeScaling(kind=kind, **values)  # pyrefly: ignore[bad-argument-type]


def parse_config(path: str | pathlib.Path) -> tuple[ModelConfig, Head]:
  """Reads config.json by an allow-list of fields.

  Args:
    path: The folder or the file itself.

  Returns:
    The architecture, and which head the weights carry.

  Raises:
    ModelFolderError: Unknown architecture, missing field, or a value that is not implemented.
  """
  path = pathlib.Path(path)
  path = path / "config.json" if path.is_dir() else path
  try:
    raw = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise _refuse(path, "not found; give a folder with config.json and safetensors") from None
  except (ValueError, RecursionError) as error:
    raise _refuse(path, f"not JSON: {error}") from None
  if not isinstance(raw, dict):
    raise _refuse(path, "not a JSON object")
  names = raw.get("architectures")
  if not isinstance(names, list) or len(names) != 1 or names[0] not in list(ARCHITECTURES):
    raise _refuse(path, f"architectures is {names!r}; one of {sorted(ARCHITECTURES)} can be loaded")
  if raw.get("model_type") != "llama":
    raise _refuse(path, f"model_type is {raw.get('model_type')!r}, expected 'llama'")
  for name, allowed in _ONLY.items():
    if name in raw and raw[name] not in allowed:
      raise _refuse(path, f"{name} is {raw[name]!r}; only {allowed[0]!r} is implemented")
  if "hidden_act" not in raw:
    raise _refuse(path, "hidden_act is missing; 'silu' is implemented")
  labels = raw.get("id2label") or {"0": ""}
  if not isinstance(labels, dict):
    raise _refuse(path, f"id2label is {labels!r}, expected an object")
  if len(labels) != 1 and ARCHITECTURES[names[0]] == "scalar":
    raise _refuse(path, f"a reward model has one label, this one has {len(labels)}")

  fields: dict[str, Any] = {}
  for name, (ours, kind, default) in _FIELDS.items():
    value = raw.get(name)
    if value is None:
      if default is _REQUIRED:
        raise _refuse(path, f"{name} is missing")
      fields[ours] = default
      continue
    fields[ours] = _typed(path, name, value, kind)
  theta, fields["rope_scaling"] = _parse_rope(path, raw)
  fields["rope_theta"] = 10000.0 if theta is None else float(theta)
  fields["kv_heads"] = fields["kv_heads"] or fields["heads"]
  if fields["head_dim"] is None:
    if fields["width"] % fields["heads"]:
      raise _refuse(path, "hidden_size is no multiple of num_attention_heads; give head_dim")
    fields["head_dim"] = fields["width"] // fields["heads"]
  unknown = sorted(set(raw) - set(_FIELDS) - set(_ONLY) - _IGNORED)
  if unknown:
    logging.warning("%s: fields not used: %s", path, ", ".join(unknown))
  try:
    return ModelConfig(**fields), ARCHITECTURES[names[0]]
  except ValueError as error:
    raise _refuse(path, str(error)) from None


class _Leaf(NamedTuple):
  """How one of our leaves is spelt in the folder. `{}` stands for the layer number."""

  path: tuple[str, ...]
  name: str
  transpose: bool = False

  @property
  def stacked(self) -> bool:
    return "{}" in self.name


def _leaves(config: ModelConfig, head: Head) -> list[_Leaf]:
  layer = "model.layers.{}."
  leaves = [
    _Leaf(("embed", "embedding"), "model.embed_tokens.weight"),
    _Leaf(("final_norm", "scale"), "model.norm.weight"),
    _Leaf(("layers", "attention_norm", "scale"), layer + "input_layernorm.weight"),
    _Leaf(("layers", "mlp_norm", "scale"), layer + "post_attention_layernorm.weight"),
  ]
  for part, folder, names, bias in (
    ("attention", "self_attn", "qkvo", config.attention_bias),
    ("mlp", "mlp", ("gate", "up", "down"), config.mlp_bias),
  ):
    for name in names:
      stem = f"{layer}{folder}.{name}_proj."
      leaves.append(_Leaf(("layers", part, name, "kernel"), stem + "weight", True))
      if bias:
        leaves.append(_Leaf(("layers", part, name, "bias"), stem + "bias"))
  if head == "scalar":
    leaves.append(_Leaf(("score", "kernel"), "score.weight", True))
    leaves.append(_Leaf(("score", "bias"), "score.bias"))
  elif not config.tied:
    leaves.append(_Leaf(("lm_head", "kernel"), "lm_head.weight", True))
  return leaves


def _open_tensors(folder: pathlib.Path) -> dict[str, Callable[[], np.ndarray]]:
  """Name -> reader, for a single file or for the shards of an index."""
  index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
  if index.exists():
    try:
      weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
      files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
      raise _refuse(index, f"not a safetensors index: {error!r}") from None
    for name in files:
      if not isinstance(name, str) or not re.fullmatch(
        r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", name
      ):
        raise _refuse(index, f"shard {name!r} is not a bare .safetensors file name")
  elif single.exists():
    weight_map, files = None, [single.name]
  else:
    other = [p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
    hint = f"; {other[0]} may hold code and is not read, convert it first" if other else ""
    raise _refuse(folder, f"no model.safetensors and no index of shards{hint}")

  tensors: dict[str, Callable[[], np.ndarray]] = {}
  for file in files:
    try:
      handle = safetensors.safe_open(folder / file, framework="np")
    except (OSError, safetensors.SafetensorError) as error:
      raise _refuse(folder / file, f"not a readable safetensors file: {error}") from None
    for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
      if weight_map is None or weight_map.get(name) == file:
        tensors[name] = lambda handle=handle, name=name: handle.get_tensor(name)
  if weight_map is not None and set(weight_map) != set(tensors):
    lost = sorted(set(weight_map) - set(tensors))
    raise _refuse(index, f"tensors named by the index are not in their shards: {lost[:3]}")
  return tensors


def _get(tree: Params, path: tuple[str, ...]):
  for name in path:
    tree = tree[name]
  return tree


def _set(tree: dict[str, Any], path: tuple[str, ...], value) -> None:
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = value


def load_params(
  folder: str | pathlib.Path,
  model: Model,
  *,
  key: jax.Array | None = None,
  dtype: Any = jnp.float32,
  place: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> Params:
  """Reads the weights of `model` from a folder, one stacked leaf at a time.

  A model with a scalar head can be started from a language model: the trunk is read and the head
  is initialised from `key`.

  Args:
    folder: Folder with config.json and safetensors.
    model: Model built from `parse_config(folder)`, with either head.
    key: Random key for a scalar head that the folder does not have.
    dtype: Type of the returned params.
    place: `(path, array) -> jax.Array` puts a leaf on devices; default `jnp.asarray`.

  Returns:
    Params for `model.apply`.

  Raises:
    ModelFolderError: Missing, unexpected, misshapen or non-finite tensors.
  """
  folder = pathlib.Path(folder)
  _, stored_head = parse_config(folder)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  head: Head = "scalar" if "score" in shapes else "language"
  if head == "language" and stored_head == "scalar":
    raise _refuse(folder, "holds a reward model; a language model was asked for")
  tensors = _open_tensors(folder)
  unread = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
  params: dict[str, Any] = {}

  def read(name: str, shape: tuple[int, ...], transpose: bool) -> np.ndarray:
    if name not in tensors:
      raise _refuse(folder, f"tensor {name} is missing")
    try:
      value = tensors[name]()
    except (AttributeError, KeyError, TypeError) as error:
      raise _refuse(folder, f"tensor {name} is of a type that is not read: {error}") from None
    value = value.T if transpose else value
    if value.shape != shape:
      raise _refuse(folder, f"tensor {name} gives shape {value.shape}, config.json says {shape}")
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise _refuse(folder, f"tensor {name} is of type {value.dtype}; weights must be floats")
    value = np.ascontiguousarray(value).astype(jnp.dtype(dtype))
    if not np.isfinite(value.astype(np.float32)).all():
      raise _refuse(folder, f"tensor {name} holds NaN or Inf")
    unread.discard(name)
    return value

  for leaf in _leaves(model.config, head):
    shape = _get(shapes, leaf.path).shape
    if leaf.path[0] == "score" and stored_head == "language":
      if key is None:
        raise _refuse(folder, "has no scalar head; give a key to initialise one")
      # Returned alone, so that the compiler drops the trunk that is made with it.
      fresh = jax.jit(lambda key, path=leaf.path: _get(model.init(key), path))(key)
      value = np.asarray(fresh).astype(jnp.dtype(dtype))
    elif leaf.name == "score.bias" and leaf.name not in tensors:
      value = np.zeros(shape, jnp.dtype(dtype))  # The classification format has no bias.
    elif leaf.stacked:
      value = np.stack(
        [read(leaf.name.format(i), shape[1:], leaf.transpose) for i in range(shape[0])]
      )
    else:
      value = read(leaf.name, shape, leaf.transpose)
    path = "/".join(leaf.path)
    _set(params, leaf.path, jnp.asarray(value) if place is None else place(path, value))

  if "lm_head.weight" in unread:
    # Some tied checkpoints store the embedding twice; a trunk alone has no use for a head.
    tied = model.config.tied
    if head == "language" and tied:
      embedding = sharding.to_host(params["embed"]["embedding"])
      if not np.array_equal(tensors["lm_head.weight"]().astype(embedding.dtype), embedding):
        raise _refuse(folder, "tie_word_embeddings is true but lm_head.weight differs")
    unread.discard("lm_head.weight")
  if unread:
    raise _refuse(folder, f"tensors that this model has no place for: {sorted(unread)[:5]}")
  return params


def scalar_label(folder: str | pathlib.Path) -> str:
  """What the scalar of a folder is called, such as "reward" or "preference"; "" without a name."""
  raw = json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))
  return str((raw.get("id2label") or {}).get("0", ""))


def config_json(
  config: ModelConfig, head: Head, token_ids: Mapping[str, int], label: str = "reward"
) -> dict[str, Any]:
  """The config.json that `parse_config` reads back to `config`."""
  architecture = next(name for name, kind in ARCHITECTURES.items() if kind == head)
  raw: dict[str, Any] = {"architectures": [architecture], "model_type": "llama"}
  raw |= {theirs: getattr(config, ours) for theirs, (ours, _, _) in _FIELDS.items()}
  raw |= {"hidden_act": "silu", "torch_dtype": "float32", "use_cache": True, **token_ids}
  scaling = config.rope_scaling
  raw["rope_scaling"] = None
  if scaling is not None:
    raw["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
      raw["rope_scaling"] |= {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
      }
  if head == "scalar":
    raw |= {"id2label": {"0": label}, "label2id": {label: 0}}
  return raw


def _named_tensors(params: Params, leaves: list[_Leaf]) -> Iterator[tuple[str, np.ndarray]]:
  for leaf in leaves:
    value = sharding.to_host(_get(params, leaf.path))
    rows = enumerate(value) if leaf.stacked else [(None, value)]
    for i, row in rows:
      yield leaf.name.format(i), np.ascontiguousarray(row.T if leaf.transpose else row)


def save_folder(
  folder: str | pathlib.Path,
  params: Params,
  config: ModelConfig,
  *,
  token_ids: Mapping[str, int],
  label: str = "reward",
  shard_bytes: int = 5 * 2**30,
) -> None:
  """Writes config.json, generation_config.json and safetensors, sharded above `shard_bytes`.

  With several processes all have to call it, and process 0 writes.

  Args:
    folder: Created if needed.
    params: Params of a model with either head.
    config: Its architecture.
    token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id` as the tokenizer has them.
    label: What the scalar of a scalar head is.
    shard_bytes: Largest size of one file.
  """
  folder = pathlib.Path(folder)
  head: Head = "scalar" if "score" in params else "language"
  tensors = _named_tensors(params, _leaves(config, head))
  if not processes.is_first():
    for _ in tensors:  # Their parts are gathered.
      pass
    return
  folder.mkdir(parents=True, exist_ok=True)
  # The weights of an earlier save could be read in place of these.
  ours = r"config\.json|model\.safetensors\.index\.json|model(-\d{5}-of-\d{5})?\.safetensors"
  for file in folder.iterdir():
    if re.fullmatch(ours, file.name):
      file.unlink()

  shards: list[dict[str, np.ndarray]] = [{}]
  size = 0
  for name, value in tensors:
    if shards[-1] and size + value.nbytes > shard_bytes:
      shards.append({})
      size = 0
    shards[-1][name] = value
    size += value.nbytes
  metadata = {"format": "pt"}
  if len(shards) == 1:
    safetensors.numpy.save_file(shards[0], folder / "model.safetensors", metadata)
  else:
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
      file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
      safetensors.numpy.save_file(shard, folder / file, metadata)
      weight_map |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for shard in shards for value in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
  # Last, so that a folder with a config.json is a whole one.
  _write_json(folder / "generation_config.json", dict(token_ids))
  _write_json(folder / "config.json", config_json(config, head, token_ids, label))


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
