"""Adapters of PEFT out and in, against `W + scale B A` by hand."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax.models import build, hf, lora, peft
from rlhf_jax.models.families import FAMILIES
from tests.testing import FAMILY_MODELS

IDS = {"eos_token_id": 2}
RANK, ALPHA = 3, 5.0
# Family -> a layer with an adapter, its tensor, and its parts.
LAYERS = {
  "qwen2": ("model.layers.1.self_attn.q_proj", ("q",)),
  "phi3": ("model.layers.1.self_attn.qkv_proj", ("q", "k", "v")),
  "gpt2": ("transformer.h.1.attn.c_attn", ("q", "k", "v")),
}


def drawn(shapes, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.fixture(params=LAYERS)
def written(request, tmp_path):
  """Folders of a base model and of its adapters, of q and down, and the params of both."""
  config = dataclasses.replace(FAMILY_MODELS[request.param], dtype="float32")
  model = build(config)
  params = drawn(jax.eval_shape(model.init, jax.random.key(0)), 0)
  hf.save_folder(tmp_path / "base", params, config, token_ids=IDS)
  targets = ("q", "down", "v")
  adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(RANK, ALPHA, targets))
  filled = jax.tree.map(np.array, adapters)
  for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(filled)):
    if path[-1].key != "lora_scale":
      leaf[...] = np.random.default_rng(i).normal(size=leaf.shape)
  full = join(params, filled)
  peft.write(tmp_path / "adapter", full, FAMILIES[config.family], str(tmp_path / "base"))
  return request.param, model, full, tmp_path


def join(left, right):
  """Nested dicts, merged."""
  names = left.keys() | right.keys()
  both = lambda n: join(left[n], right[n]) if n in left and n in right else None  # noqa: E731
  return {n: both(n) or left.get(n, right.get(n)) for n in names}


def test_a_layer_is_its_weight_plus_the_scaled_product(written):
  family, _, full, root = written
  settings = json.loads((root / "adapter" / "adapter_config.json").read_text())
  assert (settings["peft_type"], settings["task_type"], settings["bias"]) == (
    "LORA",
    "CAUSAL_LM",
    "none",
  )
  assert settings["base_model_name_or_path"] == str(root / "base")
  module, parts = LAYERS[family]
  end = module.rpartition(".")[2]
  assert any(f".{module}".endswith(f".{target}") for target in settings["target_modules"])
  tensors = safetensors.numpy.load_file(root / "adapter" / "adapter_model.safetensors")
  a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
  rank = settings["rank_pattern"].get(end, settings["r"])
  alpha = settings["alpha_pattern"].get(end, settings["lora_alpha"])
  assert len(a) == b.shape[1] == rank == RANK * len([x for x in parts if x != "k"])
  layers = full["layers"]["attention"]
  want = [
    np.zeros_like(layers[x]["kernel"][1])
    if x == "k"
    else ALPHA / RANK * layers[x]["lora_a"][1] @ layers[x]["lora_b"][1]
    for x in parts
  ]
  np.testing.assert_allclose((alpha / rank * b @ a).T, np.concatenate(want, axis=1), atol=1e-5)
  others = {name.split(".lora_")[0] for name in tensors}
  assert len(others) == 2 * (3 if family == "qwen2" else 2)


def test_adapters_are_read_over_their_base(written):
  _, model, full, root = written
  got = hf.load_params(root / "adapter", model)
  want = lora.merge(jax.tree.map(np.asarray, full))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
  assert hf.parse_config(root / "adapter") == hf.parse_config(root / "base")
  assert hf.scalar_label(root / "adapter") == hf.scalar_label(root / "base") == ""


def edit(folder, settings=None, tensors=None):
  if settings:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
  if tensors:
    path = folder / "adapter_model.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(path) | tensors, path)


def test_another_scale_is_followed(written):
  _, model, full, root = written
  before = hf.load_params(root / "adapter", model)
  settings = json.loads((root / "adapter" / "adapter_config.json").read_text())
  twice = {name: 2 * of for name, of in settings["alpha_pattern"].items()}
  edit(root / "adapter", {"lora_alpha": 2 * settings["lora_alpha"], "alpha_pattern": twice})
  after, base = hf.load_params(root / "adapter", model), lora.base(full)
  change = jax.tree.map(lambda a, b: np.asarray(a) - b, before, base)
  want = jax.tree.map(lambda a, b: a + 2 * b, base, change)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), after, want)


ZEROS = np.zeros((2, 2), np.float32)
BAD = [
  ({"settings": {"use_dora": True}}, "use_dora is True; only False is read"),
  ({"settings": {"peft_type": "IA3"}}, "peft_type is 'IA3'; only 'LORA' is read"),
  ({"settings": {"modules_to_save": ["score"]}}, "modules_to_save is"),
  ({"settings": {"init_lora_weights": "pissa"}}, "init_lora_weights is 'pissa'; only True is read"),
  ({"settings": {"init_lora_weights": "olora"}}, "init_lora_weights is 'olora'"),
  ({"settings": {"alora_invocation_tokens": [1]}}, "alora_invocation_tokens is"),
  ({"settings": {"lora_alpha": "much"}}, "lora_alpha is 'much', expected a number"),
  ({"settings": {"base_model_name_or_path": "org/model"}}, "is no folder of a model here"),
  ({"tensors": {"base_model.model.x.weight": ZEROS}}, "is no factor of a linear layer"),
  (
    {"tensors": {"base_model.model.x.lora_A.weight": ZEROS.astype(np.int8)}},
    r"x.lora_A.weight, int8\[2, 2\], is no factor",
  ),
  ({"tensors": {"base_model.model.x.lora_A.weight": ZEROS}}, "x needs two factors of one rank"),
  (
    {"tensors": {f"base_model.model.x.lora_{side}.weight": ZEROS for side in "AB"}},
    "adapters that this model has no place for",
  ),
]


@pytest.mark.parametrize("written", ["qwen2"], indirect=True)
@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: str(x)[:40])
def test_what_cannot_be_followed_is_refused(change, message, written):
  _, model, _, root = written
  edit(root / "adapter", **change)
  with pytest.raises(hf.ModelFolderError, match=message):
    hf.load_params(root / "adapter", model)


@pytest.mark.parametrize("family", sorted(FAMILY_MODELS))
def test_a_target_names_no_layer_that_was_not_asked_for(family, tmp_path):
  config = FAMILY_MODELS[family]
  params = drawn(jax.eval_shape(build(config).init, jax.random.key(0)), 0)
  asked = {module.format(0) for at, module in FAMILIES[family].modules.items() if at.endswith("/o")}
  adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(RANK, ALPHA, ("o",)))
  peft.write(tmp_path, join(params, adapters), FAMILIES[family], "base")
  targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
  layers = {module.format(0, 0) for module in FAMILIES[family].modules.values()}
  # PEFT adapts a layer that is a target or ends in a dot and one.
  assert {x for x in layers if any(f".{x}".endswith(f".{t}") for t in targets)} == asked
