"""Our folders in transformers with torch, and its folders here.

Needs TORCH_PYTHON, a Python that has both:

TORCH_PYTHON=/path/to/venv/bin/python python -m pytest tests/models/torch_parity_test.py -s

The same child writes tests/models/golden, which hf_test.py reads where there is no torch:

TORCH_PYTHON=/path/to/venv/bin/python python -m tests.models.torch_parity_test
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import ModelConfig, build, hf
from rlhf_jax.models.transformer import RopeScaling
from tests.testing import FAMILY_MODELS

GOLDEN = pathlib.Path(__file__).parent / "golden"

# Argument: a folder. Makes models with random weights by specs.json, writes them to theirs/NAME,
# loads ours/NAME, and writes beside each what it computes of inputs.npz.
_CHILD = """
import json, pathlib, sys, numpy, torch, transformers
root = pathlib.Path(sys.argv[1])
inputs = numpy.load(root / "inputs.npz")
tokens, mask = torch.tensor(inputs["tokens"]), torch.tensor(inputs["mask"]).long()
positions = (mask.cumsum(1) - 1).clamp(min=0)
torch.set_num_threads(1)
# What multiplies all experts at once wants sizes of 16 bytes.
plain = {"attn_implementation": "eager", "experts_implementation": "eager"}

def run(model, folder):
  model.eval()
  is_scalar = type(model).__name__.endswith("Classification")
  with torch.no_grad():
    if is_scalar and model.config.get_text_config().pad_token_id is None:  # One text at a time.
      texts = [row[on.bool()][None] for row, on in zip(tokens, mask)]
      out = torch.cat([model(text).logits for text in texts])
    else:
      out = model(tokens, attention_mask=mask, position_ids=positions).logits
  numpy.save(folder / "logits.npy", out.float().numpy())

for name, (kind, model_type, fields) in json.loads((root / "specs.json").read_text()).items():
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(model_type, **fields)
  model = getattr(transformers, kind)._from_config(config, **plain)
  with torch.no_grad():
    for value in model.parameters():
      value += 0.1 * torch.randn_like(value)
  model.save_pretrained(root / "theirs" / name)
  run(model, root / "theirs" / name)

for folder in sorted(root.glob("ours/*")):
  kind = json.loads((folder / "config.json").read_text())["architectures"][0]
  model, info = getattr(transformers, kind).from_pretrained(
    folder, output_loading_info=True, **plain
  )
  assert not info["missing_keys"], (folder, info)
  assert set(info["unexpected_keys"]) <= {"score.bias"}, (folder, info)
  run(model, folder)
"""
_BASE = ModelConfig(
  vocab_size=40, width=32, layers=3, heads=4, kv_heads=4, head_dim=8, mlp_width=48, init_std=0.2
)
OURS = {
  "tied": (_BASE, "language"),
  "untied": (dataclasses.replace(_BASE, tied=False), "language"),
  "grouped": (dataclasses.replace(_BASE, kv_heads=2, head_dim=12, norm_eps=1e-3), "language"),
  "llama3": (
    dataclasses.replace(
      _BASE, rope_theta=100.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16), max_length=128
    ),
    "language",
  ),
  "linear": (dataclasses.replace(_BASE, rope_scaling=RopeScaling("linear", 3.0)), "language"),
  "biases": (dataclasses.replace(_BASE, qkv_bias=True, out_bias=True, mlp_bias=True), "language"),
  "llama_reward": (dataclasses.replace(_BASE, kv_heads=1), "scalar"),
}
for _name, _config in FAMILY_MODELS.items():
  _config = dataclasses.replace(_config, vocab_size=40)
  OURS[_name] = (_config, "language")
  OURS[_name + "_other"] = (dataclasses.replace(_config, tied=not _config.tied), "language")
  OURS[_name + "_reward"] = (_config, "scalar")
  OURS[_name + "_reward_padded_by_end"] = (_config, "scalar")

_SIZES = {
  "vocab_size": 40,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "initializer_range": 0.3,
  "pad_token_id": 0,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
_LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 100.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8,
}
# Name -> class, model type, fields of the config. As transformers' own classes are made.
THEIRS = {
  "llama": ("LlamaForCausalLM", "llama", _SIZES | {"rope_parameters": _LLAMA3, "head_dim": 6}),
  "qwen2": (
    "Qwen2ForCausalLM",
    "qwen2",
    _SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
  ),
  "qwen3": ("Qwen3ForCausalLM", "qwen3", _SIZES | {"head_dim": 6, "tie_word_embeddings": True}),
  "mistral": ("MistralForCausalLM", "mistral", _SIZES | {"sliding_window": 5}),
  "mixtral": (
    "MixtralForCausalLM",
    "mixtral",
    _SIZES | {"sliding_window": 5, "num_local_experts": 4},
  ),
  "qwen3_moe": (
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    _SIZES
    | {"head_dim": 6, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 10},
  ),
  "gemma2": (
    "Gemma2ForCausalLM",
    "gemma2",
    _SIZES
    | {
      "head_dim": 6,
      "query_pre_attn_scalar": 3,
      "attn_logit_softcapping": 2.0,
      "final_logit_softcapping": 5.0,
      "sliding_window": 5,
    },
  ),
  "gemma3": (
    "Gemma3ForCausalLM",
    "gemma3_text",
    _SIZES
    | {
      "num_hidden_layers": 3,
      "head_dim": 6,
      "query_pre_attn_scalar": 3,
      "final_logit_softcapping": 5.0,
      "sliding_window": 5,
      "sliding_window_pattern": 3,
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
      },
    },
  ),
  "gpt2": (
    "GPT2LMHeadModel",
    "gpt2",
    {
      "vocab_size": 40,
      "n_embd": 16,
      "n_layer": 2,
      "n_head": 4,
      "n_inner": 24,
      "n_positions": 32,
      "initializer_range": 0.3,
      "pad_token_id": 0,
      "bos_token_id": 1,
      "eos_token_id": 2,
    },
  ),
  "phi3": (
    "Phi3ForCausalLM",
    "phi3",
    _SIZES
    | {
      "sliding_window": 5,
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1000.0,
        "partial_rotary_factor": 0.5,
      },
    },
  ),
}
_REWARDS = {name: kind for kind, (name, head) in hf.ARCHITECTURES.items() if head == "scalar"}
THEIR_REWARDS = {
  name + "_reward": (_REWARDS[name], model_type, fields | {"num_labels": 1})
  for name, (_, model_type, fields) in THEIRS.items()
}


def make_inputs(length: int) -> dict[str, np.ndarray]:
  """A row without padding, two with padding at the right and two at the left.

  Token 0 is padding, and 2 the end of each row.
  """
  index = np.arange(length)[None]
  ends = np.array([length, length * 2 // 3, 5, length, length])[:, None]
  starts = np.array([0, 0, 0, length // 4, length - 5])[:, None]
  mask = (index >= starts) & (index < ends)
  tokens = np.random.default_rng(0).integers(3, 40, mask.shape)
  tokens = np.where(index == ends - 1, 2, tokens)
  return {"tokens": np.where(mask, tokens, 0), "mask": mask}


def run_child(python: str, root: pathlib.Path, specs) -> None:
  (root / "specs.json").write_text(json.dumps(specs))
  child = subprocess.run(
    [python, "-c", _CHILD, str(root)],
    env=os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
    capture_output=True,
    text=True,
  )
  assert child.returncode == 0, child.stderr[-4000:]


def compare(name: str, model, params, inputs, folder: pathlib.Path) -> None:
  """Our logits or scores of every real token, or of the last, against those of the child."""
  segments = inputs["mask"].astype(np.int32)
  ours = np.asarray(jax.jit(model.apply)(params, inputs["tokens"], segment_ids=segments))
  theirs = np.load(folder / "logits.npy")
  if "score" in params:
    last = inputs["mask"].shape[1] - 1 - np.argmax(inputs["mask"][:, ::-1], axis=1)
    ours, theirs = ours[np.arange(len(last)), last], theirs[:, 0]
  else:
    ours, theirs = ours[inputs["mask"]], theirs[inputs["mask"]]
  error, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
  print(f"{name}: largest difference {error:.2e}, largest value {scale:.1f}")
  assert error < 1e-4
  assert scale > 0.5


@pytest.fixture(scope="module")
def child(tmp_path_factory):
  """The folder that a child has worked on, our params by name, and the inputs."""
  python = os.environ.get("TORCH_PYTHON")
  if not python:
    if importlib.util.find_spec("torch") is None:
      pytest.skip("torch is absent and TORCH_PYTHON is not set")
    python = sys.executable
  root = tmp_path_factory.mktemp("parity")
  params = {}
  for name, (config, head) in OURS.items():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(build(config, head).init, jax.random.key(0))
    # Biases and scales are not as initialised.
    params[name] = jax.tree.map(
      lambda x, rng=rng: jnp.asarray(rng.normal(size=x.shape) * 0.5, jnp.float32), shapes
    )
    if head == "scalar":  # The classification format has no bias.
      params[name]["score"]["bias"] = jnp.zeros(1)
    hf.save_folder(
      root / "ours" / name,
      params[name],
      config,
      token_ids={
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2 if name.endswith("_padded_by_end") else 0,
      },
      shard_bytes=2**14,
    )
  inputs = make_inputs(24)
  np.savez(root / "inputs.npz", **inputs)
  run_child(python, root, THEIRS | THEIR_REWARDS)
  return root, params, inputs


@pytest.mark.parametrize("name", OURS)
def test_transformers_computes_the_same(child, name):
  root, params, inputs = child
  model = build(*OURS[name])
  compare(name, model, params[name], inputs, root / "ours" / name)


@pytest.mark.parametrize("name", THEIRS | THEIR_REWARDS)
def test_a_folder_of_transformers_computes_the_same(child, name):
  root, _, inputs = child
  folder = root / "theirs" / name
  model = build(*hf.parse_config(folder))
  assert folder.name.startswith(model.config.family)
  compare(name, model, hf.load_params(folder, model), inputs, folder)


def write_golden() -> None:
  """Makes tests/models/golden anew."""
  shutil.rmtree(GOLDEN, ignore_errors=True)
  inputs = make_inputs(12)
  with tempfile.TemporaryDirectory() as name:
    root = pathlib.Path(name)
    np.savez(root / "inputs.npz", **inputs)
    run_child(os.environ["TORCH_PYTHON"], root, THEIRS)
    for folder in (root / "theirs").iterdir():
      (GOLDEN / folder.name).mkdir(parents=True)
      for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / file, GOLDEN / folder.name)
      logits = np.load(folder / "logits.npy")[inputs["mask"]]
      np.savez_compressed(GOLDEN / folder.name / "expected.npz", **inputs, logits=logits)


if __name__ == "__main__":
  write_golden()
