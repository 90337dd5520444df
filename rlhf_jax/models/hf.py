"""Reading and writing Hugging Face folders: config.json and safetensors, nothing that runs code.

A folder is read as data. Every field of config.json that could change the computation is either
understood or refused by name. Weights come from safetensors only.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from rlhf_jax import processes, sharding, workdir
from rlhf_jax.models import peft
from rlhf_jax.models.build import Model
from rlhf_jax.models.errors import ModelFolderError
from rlhf_jax.models.families import FAMILIES, REQUIRED, Family, Head
from rlhf_jax.models.transformer import COMPUTATION, ModelConfig, RopeScaling
from rlhf_jax.types import Params

ARCHITECTURES: Mapping[str, tuple[str, Head]] = {
  name: (family, head)
  for family, spelling in FAMILIES.items()
  for name, head in spelling.architectures.items()
}
# Fields where null differs from absent: it means not set, or (the first two) derived from others.
_NULLABLE = frozenset({"kv_heads", "head_dim", "attention_softcap", "logit_softcap"})
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
# Fields that change the computation and for which only one value is implemented, unless a family
# overrides this.
_ONLY: Mapping[str, tuple[Any, ...]] = {
  "use_sliding_window": (False, None),
  "sliding_window": (None,),
  "use_bidirectional_attention": (False, None),
  "original_max_position_embeddings": (None,),
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
# Tensors that hold no weights: rotary frequencies, and the causal mask of old GPT-2 folders.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
# Field of config.json with the name of the codes in `quantized.FORMATS` that adapters, which are
# merged into the weights, were trained over.
_TRAINED_OVER = "trained_over"
_KINDS = {"sliding_attention": True, "full_attention": False}
# Fields that do not affect the forward pass.
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
    "layer_types",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "partial_rotary_factor",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
    _TRAINED_OVER,
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_cache",
  }
)


def _refuse(path: pathlib.Path, problem: str) -> ModelFolderError:
  return ModelFolderError(f"{path}: {problem}")


def _typed(path: pathlib.Path, name: str, value: Any, kind: type) -> Any:
  """Checks that a field has type `kind` and, if a number, is positive; returns the value."""
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    raise _refuse(path, f"{name} is {value!r}, expected {kind.__name__}")
  if kind is not bool and not 0 < value < math.inf:
    raise _refuse(path, f"{name} is {value!r}, expected a positive number")
  return value


class _Rope(NamedTuple):
  theta: float | None
  scaling: RopeScaling | None
  fraction: float


def _parse_rope(path: pathlib.Path, raw: Mapping[str, Any], kinds: Sequence[str]) -> _Rope:
  """Reads rope_theta, rope_scaling, partial_rotary_factor, or the newer rope_parameters."""
  merged: dict[str, Any] = {}
  for field in ("rope_scaling", "rope_parameters"):
    part = raw.get(field) or {}
    if not isinstance(part, dict):
      raise _refuse(path, f"{field} is {part!r}, expected an object")
    older = {"rope_type": part["type"]} if "type" in part else {}
    part = older | {name: value for name, value in part.items() if name != "type"}
    if any(merged[name] != part[name] for name in merged.keys() & part.keys()):
      raise _refuse(path, "rope_scaling and rope_parameters differ; keep one")
    merged |= part
  numbers: dict[str, float | None] = {}
  for name in ("rope_theta", "partial_rotary_factor"):
    value = merged.pop(name, raw.get(name))
    if raw.get(name) not in (None, value):
      raise _refuse(path, f"{name} is both {raw[name]} and {value}; keep one")
    numbers[name] = None if value is None else _typed(path, name, value, float)
  theta, fraction = numbers.values()
  fraction = 1.0 if fraction is None else fraction
  kind = merged.pop("rope_type", None) or "default"
  if kind not in kinds:
    raise _refuse(path, f"rope scaling {kind!r} is not supported, only {', '.join(kinds)}")
  names = _ROPE_FIELDS[kind]
  if set(merged) != set(names):
    raise _refuse(
      path, f"rope scaling {kind!r} needs exactly {sorted(names)}, found {sorted(merged)}"
    )
  if not names:
    return _Rope(theta, None, fraction)
  values = {
    ours: _typed(path, theirs, merged[theirs], int if ours == "original_length" else float)
    for theirs, ours in names.items()
  }
  if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
    raise _refuse(path, "high_freq_factor must be greater than low_freq_factor")
  scaling = RopeScaling(kind=kind, **values)  # pyrefly: ignore[bad-argument-type]
  return _Rope(theta, scaling, fraction)


def _rope_fields(path: pathlib.Path, raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
  """Reads the rotary fields of ModelConfig."""
  if family.rope == "none":
    return {}
  local = None
  if family.rope == "by_layer":
    parts = raw.get("rope_parameters") or {}
    if not isinstance(parts, dict) or not set(parts) <= set(_KINDS):
      raise _refuse(
        path, f"rope_parameters is {parts!r}, expected one object for each of {[*_KINDS]}"
      )
    base = raw.get("rope_local_base_freq")
    if base is not None:
      base = _typed(path, "rope_local_base_freq", base, float)
    local_raw = {"rope_theta": base, "rope_parameters": parts.get("sliding_attention")}
    raw = {**raw, "rope_parameters": parts.get("full_attention")}
    local = _parse_rope(path, local_raw, ("default",))
  rope = _parse_rope(path, raw, family.rope_kinds)
  for part in (rope, local):
    if part is not None and part.fraction != 1 and not family.partial_rotary:
      raise _refuse(path, f"partial_rotary_factor is {part.fraction}; only 1.0 is implemented")
  default, local_default = family.rope_theta
  fields = {
    "rope_theta": default if rope.theta is None else rope.theta,
    "rope_scaling": rope.scaling,
    "rotary_fraction": rope.fraction,
  }
  if local is not None:
    fields["rope_local_theta"] = local_default if local.theta is None else local.theta
  return fields


def _parse_windows(
  path: pathlib.Path, raw: Mapping[str, Any], family: Family, layers: int
) -> tuple[int | None, ...]:
  """Reads the windows of all layers; empty if no layer has one."""
  if layers > 10_000:  # The code below loops over all of them.
    raise _refuse(path, f"{layers} layers are more than any model has")
  window = raw.get("sliding_window", family.window)
  if window is not None:
    window = _typed(path, "sliding_window", window, int)
  switch = raw.get("use_sliding_window")
  if "use_sliding_window" in family.parsed and not (
    switch is not None and _typed(path, "use_sliding_window", switch, bool)
  ):
    window = None
  for name, least in (("max_window_layers", 0), ("sliding_window_pattern", 1)):
    value = raw.get(name, least)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
      raise _refuse(path, f"{name} is {value!r}, expected a number of layers")
  is_local = family.is_local or (lambda layer, window, raw: False)
  local = [is_local(layer, window, raw) for layer in range(layers)]
  kinds = raw.get("layer_types")
  if kinds is not None:
    if not isinstance(kinds, list) or len(kinds) != layers or not {*map(str, kinds)} <= {*_KINDS}:
      raise _refuse(path, f"layer_types is {kinds!r}, expected {layers} of {[*_KINDS]}")
    named = [_KINDS[kind] for kind in kinds]
    if named != local and "layer_types" not in family.parsed:
      raise _refuse(path, f"layer_types is {kinds!r}, which {family.model_type} does not read")
    local = named
  if any(local) and window is None:
    raise _refuse(path, "some layers have a window, but sliding_window is not set")
  return tuple(window if here else None for here in local) if any(local) else ()


def parse_config(path: str | pathlib.Path) -> tuple[ModelConfig, Head]:
  """Reads config.json with an allow-list of fields.

  Args:
    path: The folder or the file itself; of adapters, that of their base model.

  Returns:
    The architecture, and the head of the weights.

  Raises:
    ModelFolderError: If the architecture is unknown, a field is missing or a value is not
      implemented.
  """
  path = peft.base_of(pathlib.Path(path))
  path = path / "config.json" if path.is_dir() else path
  if problem := workdir.irregular(path.parent):
    raise _refuse(path.parent, problem)
  try:
    raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
  except FileNotFoundError:
    raise _refuse(path, "not found; give a folder with config.json and safetensors") from None
  except (ValueError, RecursionError) as error:
    raise _refuse(path, f"not JSON: {error}") from None
  if not isinstance(raw, dict):
    raise _refuse(path, "not a JSON object")
  return _parse(path, raw)


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  """Builds an object of JSON, of which each key may be given once."""
  values: dict[str, Any] = {}
  for key, value in pairs:
    if values.setdefault(key, value) is not value:
      raise ValueError(f"the key {key!r} is given twice; keep one")
  return values


def _parse(path: pathlib.Path, raw: Mapping[str, Any]) -> tuple[ModelConfig, Head]:
  """Parses the fields of a config.json; `path` is for messages."""
  names = raw.get("architectures")
  if not isinstance(names, list) or len(names) != 1 or names[0] not in list(ARCHITECTURES):
    raise _refuse(path, f"architectures is {names!r}; one of {sorted(ARCHITECTURES)} can be loaded")
  name, head = ARCHITECTURES[names[0]]
  family = FAMILIES[name]
  for other, usual in family.aliases.items():
    if other in raw:
      if raw.get(usual, raw[other]) != raw[other]:
        raise _refuse(path, f"{other} is {raw[other]!r} but {usual} is {raw[usual]!r}")
      rest = {field: value for field, value in raw.items() if field != other}
      raw = rest | {usual: raw[other]}
  if raw.get("model_type") != family.model_type:
    raise _refuse(path, f"model_type is {raw.get('model_type')!r}, expected {family.model_type!r}")
  activation, implemented = family.activation
  read = set(family.fields) | family.parsed
  only = {field: allowed for field, allowed in _ONLY.items() if field not in read | family.ignored}
  only |= {**family.only, activation: (implemented,)}
  for field, allowed in only.items():
    if field in raw and raw[field] not in allowed:
      raise _refuse(path, f"{field} is {raw[field]!r}; only {allowed[0]!r} is implemented")
  if activation not in raw:
    raise _refuse(path, f"{activation} is missing; {implemented!r} is implemented")
  labels = raw.get("id2label") or {"0": ""}
  if not isinstance(labels, dict):
    raise _refuse(path, f"id2label is {labels!r}, expected an object")
  if len(labels) != 1 and head == "scalar":
    raise _refuse(path, f"a reward model has one label, this one has {len(labels)}")

  fields: dict[str, Any] = {"family": name, **family.fixed}
  for theirs, field in family.fields.items():
    value = raw.get(theirs)
    if value is not None:
      value = _typed(path, theirs, value, field.kind)
    elif field.default is REQUIRED:
      raise _refuse(path, f"{theirs} is missing")
    elif theirs not in raw or not _NULLABLE.intersection(field.ours):
      value = field.default
    fields |= dict.fromkeys(field.ours, value)
  fields["kv_heads"] = fields.get("kv_heads") or fields["heads"]
  fields["mlp_width"] = fields["mlp_width"] or 4 * fields["width"]
  if fields.get("head_dim") is None:
    if fields["width"] % fields["heads"]:
      theirs = {field.ours[0]: name for name, field in family.fields.items()}
      fix = "; give head_dim" if "head_dim" in family.fields else ""
      raise _refuse(path, f"{theirs['width']} is no multiple of {theirs['heads']}{fix}")
    fields["head_dim"] = fields["width"] // fields["heads"]
  fields["windows"] = _parse_windows(path, raw, family, fields["layers"])
  fields |= _rope_fields(path, raw, family)
  if not fields["windows"]:
    fields.pop("rope_local_theta", None)
  unknown = sorted(set(raw) - read - set(only) - _IGNORED - family.ignored)
  if unknown:
    logging.warning("%s: fields not used: %s", path, ", ".join(unknown))
  try:
    return ModelConfig(**fields), head
  except ValueError as error:
    raise _refuse(path, str(error)) from None


class _Tensor(NamedTuple):
  """A tensor, or one tensor per layer or expert, of a folder.

  Attributes:
    name: Name in the folder. `{}` is the index of the layer, a second one that of the expert.
    paths: Our leaves that it holds, side by side on their last axis.
    transpose: True if the tensor is [out, in].
  """

  name: str
  paths: tuple[tuple[str, ...], ...]
  transpose: bool

  @property
  def stacked(self) -> int:
    """Number of leading axes of our leaves that are indices in the name."""
    return self.name.count("{}")


def _tensors(family: Family, tree: Params) -> list[_Tensor]:
  """Lists the tensors that hold the leaves of `tree`, in the order of `family.modules`."""
  tensors: dict[str, _Tensor] = {}
  for module, theirs in family.modules.items():
    *path, last = module.split("/")
    node = tree
    for name in path:
      node = node.get(name, {})
    leaves = node.get(last)
    if leaves is None:
      continue
    if isinstance(leaves, Mapping):
      paths = [(*path, last, leaf) for leaf in ("kernel", "scale", "bias") if leaf in leaves]
    else:
      paths = [(*path, last)]
    for path in paths:
      name = theirs + (".bias" if path[-1] == "bias" else ".weight")
      transpose = path[-1] == "kernel" and (family.transposed or path[0] != "layers")
      before = tensors[name].paths if name in tensors else ()
      tensors[name] = _Tensor(name, (*before, tuple(path)), transpose)
  return list(tensors.values())


def _other_weights(folder: pathlib.Path) -> str:
  """Returns a hint about weights that are not read; empty if there are none."""
  for path in sorted(folder.glob("*")):
    if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}:
      return f"; {path.name} may hold code and is not read, convert it first"
    if path.suffix == ".gguf":
      return f"; {path.name} is not read: GGUF is quantized, give the folder that it was made of"
    if path.name == "model.safetensors" and path.is_symlink():
      return f"; it is a broken link to {os.readlink(path)}: copy the file that it stands for"
    if path.suffix == ".safetensors":
      return f"; the name of {path.name} is unusual, rename it to model.safetensors"
  return ""


def _pointer(path: pathlib.Path) -> str:
  """Returns a hint if a file is a pointer of Git LFS; empty if it is not."""
  with contextlib.suppress(OSError), open(path, "rb") as file:
    if file.read(30).startswith(b"version https://git-lfs"):
      return "it is a pointer of Git LFS; run `git lfs pull` in the folder"
  return ""


def _open_tensors(folder: pathlib.Path) -> dict[str, Callable[[], np.ndarray]]:
  """Opens a single file or the shards of an index; returns name -> reader."""
  index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
  adapter = folder / "adapter_config.json"
  if adapter.exists() and (index.exists() or single.exists()):
    raise _refuse(
      folder, f"holds weights and an adapter, {adapter.name}; keep one, or merge the two"
    )
  if index.exists():
    try:
      text = index.read_text(encoding="utf-8")
      weight_map = json.loads(text, object_pairs_hook=_each_once)["weight_map"]
      files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
      raise _refuse(index, f"not a safetensors index: {error!r}") from None
    for name in files:
      if not isinstance(name, str) or not re.fullmatch(
        r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", name
      ):
        raise _refuse(index, f"shard {name!r} is not a bare .safetensors file name")
    if single.exists() and single.name not in files:
      raise _refuse(
        folder,
        f"holds two sets of weights, {single.name} and the shards of {index.name}; remove the one"
        " that is out of date",
      )
  elif single.exists():
    weight_map, files = None, [single.name]
  else:
    raise _refuse(folder, f"no model.safetensors and no index of shards{_other_weights(folder)}")

  tensors: dict[str, Callable[[], np.ndarray]] = {}
  for file in files:
    try:
      handle = safetensors.safe_open(folder / file, framework="np")
    except (OSError, safetensors.SafetensorError) as error:
      raise _refuse(
        folder / file, f"not a readable safetensors file: {_pointer(folder / file) or error}"
      ) from None
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

  A model with a scalar head can start from a language model: the trunk is read and the head is
  initialised from `key`.

  Args:
    folder: Folder with config.json and safetensors, or adapters of PEFT, which are merged into the
      weights of their base model.
    model: Model built from `parse_config(folder)`, with either head.
    key: Random key for a scalar head that the folder does not have.
    dtype: Dtype of the returned params.
    place: `(path, array) -> jax.Array` puts a leaf on devices; `jnp.asarray` by default.

  Returns:
    Params for `model.apply`.

  Raises:
    ModelFolderError: If a tensor is missing, unexpected, of the wrong shape or not finite.
  """
  folder = pathlib.Path(folder)
  _, stored_head = parse_config(folder)
  adapters = peft.read(folder)
  folder = peft.base_of(folder)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  head: Head = "scalar" if "score" in shapes else "language"
  if head == "language" and stored_head == "scalar":
    raise _refuse(folder, "holds a reward model; a language model was asked for")
  family = FAMILIES[model.config.family]
  tensors = _open_tensors(folder)
  if not any(name.startswith(family.prefix) for name in tensors):
    heads = ("lm_head.", "score.")
    tensors = {
      name if name.startswith(heads) else family.prefix + name: read
      for name, read in tensors.items()
    }
  unread = {name for name in tensors if not _BUFFERS.search(name)}
  params: dict[str, Any] = {}

  def read(name: str, shape: tuple[int, ...], transpose: bool) -> np.ndarray:
    if name not in tensors:
      raise _refuse(folder, f"tensor {name} is missing")
    try:
      value = tensors[name]()
    except (AttributeError, KeyError, TypeError) as error:
      raise _refuse(folder, f"tensor {name} is of a type that cannot be read: {error}") from None
    value = value.T if transpose else value
    if value.shape != shape:
      raise _refuse(folder, f"tensor {name} gives shape {value.shape}, config.json says {shape}")
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise _refuse(folder, f"tensor {name} is of type {value.dtype}; weights must be floats")
    if (adapter := adapters.pop(name.removesuffix(".weight"), None)) is not None:
      value = adapter.add_to(value)
    value = np.ascontiguousarray(value).astype(jnp.dtype(dtype))
    if not np.isfinite(value.astype(np.float32)).all():
      raise _refuse(folder, f"tensor {name} holds NaN or Inf")
    unread.discard(name)
    return value

  for tensor in _tensors(family, shapes):
    parts = [_get(shapes, path).shape for path in tensor.paths]
    shape = (*parts[0][:-1], sum(part[-1] for part in parts))
    if tensor.name.startswith("score.") and stored_head == "language":
      if key is None:
        raise _refuse(folder, "has no scalar head; give a key to initialise one")
      # Only the head is returned, so that the compiler drops the trunk.
      fresh = jax.jit(lambda key, path=tensor.paths[0]: _get(model.init(key), path))(key)
      value = np.asarray(fresh).astype(jnp.dtype(dtype))
    elif tensor.name == "score.bias" and tensor.name not in tensors:
      value = np.zeros(shape, jnp.dtype(dtype))  # The classification format has no bias.
    else:
      numbers, inner = shape[: tensor.stacked], shape[tensor.stacked :]
      values = [read(tensor.name.format(*i), inner, tensor.transpose) for i in np.ndindex(numbers)]
      value = values[0] if not numbers else np.stack(values).reshape(shape)
    ends = np.cumsum([part[-1] for part in parts])
    for path, part in zip(tensor.paths, np.split(value, ends[:-1], axis=-1), strict=True):
      part = np.ascontiguousarray(part)
      name = "/".join(path)
      _set(params, path, jnp.asarray(part) if place is None else place(name, part))

  if "lm_head.weight" in unread:
    # Some tied checkpoints store the embedding twice; a scalar model does not need a language head.
    tied = model.config.tied
    if head == "language" and tied:
      embedding = sharding.to_host(params["embed"]["embedding"])
      if not np.array_equal(tensors["lm_head.weight"]().astype(embedding.dtype), embedding):
        raise _refuse(folder, "tie_word_embeddings is true but lm_head.weight differs")
    unread.discard("lm_head.weight")
  if unread:
    raise _refuse(folder, f"tensors that this model has no place for: {sorted(unread)[:5]}")
  if adapters:
    raise _refuse(folder, f"adapters that this model has no place for: {sorted(adapters)[:5]}")
  return params


def scalar_label(folder: str | pathlib.Path) -> str:
  """Label of a folder's scalar head, such as "reward" or "preference"; "" if it has none."""
  return str((_config_of(folder).get("id2label") or {}).get("0", ""))


def trained_over(folder: str | pathlib.Path) -> str:
  """Name of the codes that a folder's weights lie next to; see `save_folder`."""
  return str(_config_of(folder).get(_TRAINED_OVER) or "")


def _config_of(folder: str | pathlib.Path) -> dict[str, Any]:
  path = peft.base_of(pathlib.Path(folder)) / "config.json"
  return json.loads(path.read_text(encoding="utf-8"))


def config_json(
  config: ModelConfig, head: Head, token_ids: Mapping[str, int | list[int]], label: str = "reward"
) -> dict[str, Any]:
  """Writes the fields of the config.json from which `parse_config` reads `config`.

  A scalar head has no padding id if that ends responses: transformers reads the last token that is
  another one, and so would not read the end. Without the id it reads the last token of one text.

  Raises:
    ModelFolderError: If the format of `config.family` cannot represent a field of `config`.
  """
  if config.family not in FAMILIES:
    raise ModelFolderError(f"family {config.family!r} is none of {', '.join(FAMILIES)}")
  family = FAMILIES[config.family]
  architecture = next(name for name, kind in family.architectures.items() if kind == head)
  raw: dict[str, Any] = {"architectures": [architecture], "model_type": family.model_type}
  raw |= {theirs: getattr(config, field.ours[0]) for theirs, field in family.fields.items()}
  raw |= {"torch_dtype": "float32", "use_cache": True, **token_ids}
  raw |= dict([family.activation])
  if family.rope != "none":
    raw |= {"rope_theta": config.rope_theta, "rope_scaling": None}
  if config.rope_local_theta is not None:
    raw["rope_local_base_freq"] = config.rope_local_theta
  if family.partial_rotary:
    raw["partial_rotary_factor"] = config.rotary_fraction
  scaling = config.rope_scaling
  if scaling is not None:
    names = _ROPE_FIELDS[scaling.kind]
    raw["rope_scaling"] = {"rope_type": scaling.kind} | {
      theirs: getattr(scaling, ours) for theirs, ours in names.items()
    }
  local = [size is not None for size in config.windows] or [False] * config.layers
  if "sliding_window" in family.parsed:
    raw["sliding_window"] = max(size or 0 for size in config.windows) if any(local) else None
  if "use_sliding_window" in family.parsed:
    raw["use_sliding_window"] = any(local)
    raw["max_window_layers"] = local.index(True) if any(local) else config.layers
  if "layer_types" in family.parsed:
    raw["layer_types"] = ["sliding_attention" if here else "full_attention" for here in local]
    if not any(local) and "use_sliding_window" not in family.parsed:
      raw["sliding_window"] = config.max_length  # Required, though no layer has a window.
  if head == "scalar":
    raw |= {"id2label": {"0": label}, "label2id": {label: 0}}
    ends, pad = token_ids.get("eos_token_id"), token_ids.get("pad_token_id")
    if pad is not None and pad == (ends[0] if isinstance(ends, list) else ends):
      raw["pad_token_id"] = None  # Not absent, as a family may have an id of its own.
  again, _ = _parse(pathlib.Path("config.json"), raw)
  lost = [
    f"{field.name}={getattr(config, field.name)!r}"
    for field in dataclasses.fields(config)
    if field.name not in COMPUTATION and getattr(config, field.name) != getattr(again, field.name)
  ]
  if lost:
    raise ModelFolderError(f"a folder of family {config.family!r} cannot say {', '.join(lost)}")
  return raw


def _sizes(params: Params, tensors: list[_Tensor], dtype: np.dtype) -> dict[str, int]:
  """Returns the bytes of the tensors by their names, in the order of `_named_tensors`."""
  sizes = {}
  for tensor in tensors:
    shapes = [_get(params, path).shape for path in tensor.paths]
    size = dtype.itemsize * sum(math.prod(shape[tensor.stacked :]) for shape in shapes)
    sizes |= {tensor.name.format(*i): size for i in np.ndindex(shapes[0][: tensor.stacked])}
  return sizes


@jax.jit
def _layer(leaf: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)


def _named_tensors(
  params: Params, tensors: list[_Tensor], dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
  """Gathers the tensors layer by layer, as no host may hold all layers; all processes call it."""
  for tensor in tensors:
    leaves = [_get(params, path) for path in tensor.paths]
    for layer in np.ndindex(leaves[0].shape[: min(tensor.stacked, 1)]):
      parts = leaves
      if layer:
        parts = [_layer(x, *layer) if isinstance(x, jax.Array) else x[layer] for x in leaves]
      parts = sharding.to_host(parts)
      value = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
      value = value.astype(dtype, copy=False)
      for i in np.ndindex(value.shape[: tensor.stacked - len(layer)]):
        part = value[i].T if tensor.transpose else value[i]
        yield tensor.name.format(*layer, *i), np.ascontiguousarray(part)


def save_folder(
  folder: str | pathlib.Path,
  params: Params,
  config: ModelConfig,
  *,
  token_ids: Mapping[str, int | list[int]],
  label: str = "reward",
  dtype: str = "float32",
  trained_over: str = "",
  shard_bytes: int = 5 * 2**30,
) -> None:
  """Writes config.json, generation_config.json and safetensors, sharded above `shard_bytes`.

  With several processes, all must call it, and process 0 writes. It holds the tensors of one file
  at a time, and no process gathers more than one layer of a stacked leaf at once.

  Args:
    folder: Output folder; created if needed.
    params: Params of a model with either head.
    config: Architecture of the model.
    token_ids: `bos_token_id`, `eos_token_id` (one, or a list of which the first ends responses in
      data), `pad_token_id` of the tokenizer.
    label: Label of a scalar head.
    dtype: Dtype of the weights in the folder.
    trained_over: Name of the codes that adapters, merged into the params, were trained over; empty
      for none.
    shard_bytes: Maximum size of one file.

  Raises:
    ModelFolderError: If the format of `config.family` cannot represent a field of `config`.
  """
  folder = pathlib.Path(folder)
  head: Head = "scalar" if "score" in params else "language"
  described = config_json(config, head, token_ids, label) | {"torch_dtype": dtype}
  described |= {_TRAINED_OVER: trained_over} if trained_over else {}
  given = params, _tensors(FAMILIES[config.family], params), jnp.dtype(dtype)
  named, sizes = _named_tensors(*given), _sizes(*given)
  if not processes.is_first():
    for _ in named:  # Gathering the tensors needs every process.
      pass
    return
  folder.mkdir(parents=True, exist_ok=True)
  # Weights of an earlier save could be read instead of these.
  ours = r"config\.json|model\.safetensors\.index\.json|model(-\d{5}-of-\d{5})?\.safetensors"
  for file in folder.iterdir():
    if re.fullmatch(ours, file.name):
      file.unlink()

  shards: list[list[str]] = [[]]
  size = 0
  for name, of in sizes.items():
    if shards[-1] and size + of > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += of
  weight_map: dict[str, str] = {}
  for i, names in enumerate(shards, start=1):
    file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
    file = file if len(shards) > 1 else "model.safetensors"
    _save_tensors(folder / file, dict(itertools.islice(named, len(names))), {"format": "pt"})
    weight_map |= dict.fromkeys(names, file)
  if len(shards) > 1:
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
  # Written last: a folder with a config.json is complete.
  _write_json(folder / "generation_config.json", dict(token_ids))
  _write_json(folder / "config.json", described)


def _save_tensors(
  path: pathlib.Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
  safetensors.numpy.save_file(tensors, path, metadata)
  workdir.follow_umask(path)  # The library lets only the owner read it.


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
