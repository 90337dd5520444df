"""Adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors.

An adapter of a linear layer W [out, in] is `lora_A.weight` [rank, in] and `lora_B.weight`
[out, rank], and stands for `W + scale lora_B lora_A`. A folder of adapters names the folder of its
base model. It is read as data, and a setting that changes the computation is refused by name.
"""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax import processes, sharding, workdir
from rlhf_jax.models.errors import ModelFolderError
from rlhf_jax.models.families import Family
from rlhf_jax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Settings that change the computation -> the values that are implemented.
_ONLY: Mapping[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none", None),
  "use_dora": (False, None),
  "lora_bias": (False, None),
  "modules_to_save": (None, []),
  "layer_replication": (None, []),
  "target_parameters": (None, []),
  "trainable_token_indices": (None, [], {}),
  # PiSSA, OLoRA, CorDA and LoftQ also change the weights of the base.
  "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
  "use_qalora": (False, None),
  "alora_invocation_tokens": (None, []),
  "arrow_config": (None, {}),
}


class Adapter(NamedTuple):
  """Adapter of one linear layer.

  Attributes:
    a: [rank, in] factor.
    b: [out, rank] factor.
    scale: Factor of their product.
    source: Tensor and file, for messages.
  """

  a: np.ndarray
  b: np.ndarray
  scale: float
  source: str

  def add_to(self, kernel: np.ndarray) -> np.ndarray:
    """Returns a kernel [in, out] with the adapter merged into it, in float32."""
    if (self.a.shape[1], self.b.shape[0]) != kernel.shape:
      raise ModelFolderError(f"{self.source}: the adapter does not fit a kernel {kernel.shape}")
    return kernel.astype(np.float32) + np.float32(self.scale) * (self.a.T @ self.b.T)


def is_adapter(folder: pathlib.Path) -> bool:
  """True if a folder holds adapters, and no model of their own."""
  has = {name: (folder / name).exists() for name in (CONFIG, WEIGHTS, "config.json")}
  return has[CONFIG] and has[WEIGHTS] and not has["config.json"]


def base_of(folder: pathlib.Path) -> pathlib.Path:
  """Returns the folder of the base model of adapters; any other folder or file as it is.

  Raises:
    ModelFolderError: The base model is not there, or has adapters itself.
  """
  if not is_adapter(folder):
    return folder
  name = _settings(folder).get("base_model_name_or_path")
  base = pathlib.Path(name) if isinstance(name, str) and name else None
  if base is None or not (base / "config.json").exists():
    raise ModelFolderError(
      f"{folder / CONFIG}: base_model_name_or_path is {name!r}, which is no folder of a model here;"
      " set it to the folder of the model that the adapters are for"
    )
  return base


def read(folder: pathlib.Path) -> dict[str, Adapter]:
  """Returns the adapters of a folder by the name of their layer; none if it holds a model."""
  if not is_adapter(folder):
    return {}
  settings, path = _settings(folder), folder / WEIGHTS
  for name, allowed in _ONLY.items():
    if settings.get(name, allowed[0]) not in allowed:
      found = settings[name]
      raise ModelFolderError(f"{folder / CONFIG}: {name} is {found!r}; only {allowed[0]!r} is read")
  try:
    tensors = safetensors.numpy.load_file(path)
  except (OSError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
    raise ModelFolderError(f"{path}: not a readable safetensors file: {error}") from None
  factors: dict[str, dict[str, np.ndarray]] = {}
  for name, value in tensors.items():
    match = _NAME.fullmatch(name)
    if match is None or value.ndim != 2 or not jnp.issubdtype(value.dtype, jnp.floating):
      of = f"{value.dtype}{[*value.shape]}"
      raise ModelFolderError(f"{path}: {name}, {of}, is no factor of a linear layer")
    factors.setdefault(match["module"], {})[match["side"]] = value.astype(np.float32)
  found = {}
  for module, sides in factors.items():
    if sides.keys() != {"A", "B"} or len(sides["A"]) != sides["B"].shape[1]:
      raise ModelFolderError(f"{path}: {module} needs two factors of one rank")
    scale = _alpha(folder, settings, module) / len(sides["A"]) ** (
      0.5 if settings.get("use_rslora") else 1.0
    )
    found[module] = Adapter(sides["A"], sides["B"], scale, f"{path}: {module}")
  return found


def _settings(folder: pathlib.Path) -> dict[str, Any]:
  if problem := workdir.irregular(folder):
    raise ModelFolderError(f"{folder}: {problem}")
  try:
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ModelFolderError(f"{folder / CONFIG}: not JSON: {error}") from None
  if not isinstance(settings, dict):
    raise ModelFolderError(f"{folder / CONFIG}: not a JSON object")
  return settings


def _alpha(folder: pathlib.Path, settings: Mapping[str, Any], module: str) -> float:
  """Returns the alpha of a layer: that of its name, or of all."""
  pattern = settings.get("alpha_pattern") or {}
  if not isinstance(pattern, dict):
    raise ModelFolderError(f"{folder / CONFIG}: alpha_pattern is {pattern!r}, expected an object")
  ends = [name for name in pattern if module == name or module.endswith(f".{name}")]
  unmatched = [name for name in pattern if not re.fullmatch(r"[\w.]+", name)]
  if unmatched:
    raise ModelFolderError(
      f"{folder / CONFIG}: alpha_pattern has {unmatched[0]!r}; only names of layers are read"
    )
  alpha = pattern[ends[0]] if ends else settings.get("lora_alpha")
  if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
    raise ModelFolderError(f"{folder / CONFIG}: lora_alpha is {alpha!r}, expected a number")
  return float(alpha)


def write(folder: pathlib.Path, params: Params, family: Family, base: str) -> None:
  """Writes the adapters among the params of a language model, for `PeftModel.from_pretrained`.

  With several processes, all must call it, and process 0 writes.

  Args:
    folder: Output folder; created if needed.
    params: Params with adapters.
    family: Family of the model.
    base: Folder of the base model.
  """
  tensors = dict(_tensors(params, family))
  if not processes.is_first():
    return
  ranks = {name.split(".lora_A.")[0]: len(x) for name, x in tensors.items() if ".lora_A." in name}
  rank, scale = min(ranks.values()), _scale(params)
  # PEFT adapts every layer whose name ends in a target: one part, or two where layers share it.
  ends = [module.rpartition(".")[2] for module in {*family.modules.values()}]
  depth = {end: 1 + (ends.count(end) > 1) for end in ends}
  parts = {name: name.split(".") for name in ranks}
  target = {name: ".".join(of[-depth[of[-1]] :]) for name, of in parts.items()}
  # Layers that PEFT sees as one, such as qkv_proj, have the ranks of their parts together.
  wide = {target[name]: of for name, of in ranks.items() if of != rank}
  settings = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": rank,
    "lora_alpha": scale * rank,
    "rank_pattern": wide,
    "alpha_pattern": {name: scale * of for name, of in wide.items()},
    "target_modules": sorted({*target.values()}),
    "fan_in_fan_out": not family.transposed,
    "lora_dropout": 0.0,
    "bias": "none",
    "inference_mode": True,
  }
  folder.mkdir(parents=True, exist_ok=True)
  (folder / CONFIG).unlink(missing_ok=True)  # A folder with it is complete.
  safetensors.numpy.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
  (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def _scale(params: Params) -> float:
  """Returns alpha / rank, which all adapters have in common."""
  groups = params["layers"].values()
  scales = (layer["lora_scale"] for group in groups for layer in group.values() if _has(layer))
  return float(sharding.to_host(next(scales))[0])


def _has(layer: Any) -> bool:
  return isinstance(layer, Mapping) and "lora_a" in layer


def _tensors(params: Params, family: Family) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the factors of each layer of the family, of parts that it stores side by side too."""
  parts: dict[str, list[Mapping[str, jax.Array]]] = {}
  for module, theirs in family.modules.items():
    group, _, name = module.removeprefix("layers/").partition("/")
    layer = params["layers"].get(group, {}).get(name) if module.startswith("layers/") else None
    if isinstance(layer, Mapping) and "kernel" in layer:
      parts.setdefault(theirs, []).append(layer)
  for theirs, layers in parts.items():
    adapted = [_has(layer) for layer in layers]
    if not any(adapted):
      continue
    widths = [layer["kernel"].shape[-1] for layer in layers]
    starts = np.cumsum([0, *widths])
    sides = [sharding.to_host((x["lora_a"], x["lora_b"])) for x in layers if _has(x)]
    places = [slice(*starts[i : i + 2]) for i, has in enumerate(adapted) if has]
    ranks = np.cumsum([0, *(a.shape[-1] for a, _ in sides)])
    for i in range(len(sides[0][0])):
      b = np.zeros((starts[-1], ranks[-1]), np.float32)
      for n, (place, (_, of_part)) in enumerate(zip(places, sides, strict=True)):
        b[place, ranks[n] : ranks[n + 1]] = of_part[i].T
      name = f"base_model.model.{theirs.format(i)}"
      a = np.ascontiguousarray(np.concatenate([a[i].T for a, _ in sides]), np.float32)
      yield f"{name}.lora_A.weight", a
      yield f"{name}.lora_B.weight", b
