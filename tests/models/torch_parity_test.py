"""Exported folders in transformers with torch. Needs TORCH_PYTHON, a Python that has both.

TORCH_PYTHON=/path/to/venv/bin/python python -m pytest tests/models/torch_parity_test.py -s
"""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import ModelConfig, build, hf
from rlhf_jax.models.transformer import RopeScaling

# Argument: folder. Reads tokens and lengths of tokens.npz, prints the largest difference.
_COMPARE = """
import sys, numpy, torch, transformers
folder = sys.argv[1]
z = numpy.load(folder + "/tokens.npz")
name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
kind = getattr(transformers, name)
model, info = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
assert not info["missing_keys"], info
assert set(info["unexpected_keys"]) <= {"score.bias"}, info
tokens = torch.tensor(z["tokens"])
mask = torch.arange(tokens.shape[1])[None] < torch.tensor(z["lengths"])[:, None]
with torch.no_grad():
  out = model.eval()(tokens, attention_mask=mask.long()).logits.float().numpy()
expected = z["expected"]
real = mask.numpy() if out.ndim == 3 else slice(None)
if out.ndim == 2:
  out = out[:, 0]
print(numpy.abs(out[real] - expected[real]).max(), numpy.abs(expected[real]).max())
"""
_BASE = ModelConfig(
  vocab_size=40, width=32, layers=3, heads=4, kv_heads=4, head_dim=8, mlp_width=48, init_std=0.2
)
VARIANTS = {
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
  "biases": (dataclasses.replace(_BASE, attention_bias=True, mlp_bias=True), "language"),
  "reward": (dataclasses.replace(_BASE, kv_heads=1), "scalar"),
}


@pytest.fixture(scope="module")
def torch_python():
  if python := os.environ.get("TORCH_PYTHON"):
    return python
  if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is absent and TORCH_PYTHON is not set")
  return sys.executable


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_computes_the_same(torch_python, tmp_path, name):
  config, head = VARIANTS[name]
  model = build(config, head)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32),
    jax.jit(model.init)(jax.random.key(0)),
  )
  if head == "scalar":  # The classification format has no bias.
    params["score"]["bias"] = jnp.zeros(1)
  hf.save_folder(
    tmp_path,
    params,
    config,
    token_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    shard_bytes=2**14,
  )
  lengths = np.array([40, 25, 7])
  tokens = rng.integers(3, config.vocab_size, (3, 40))
  tokens[np.arange(40)[None] >= lengths[:, None]] = 0
  segments = (np.arange(40)[None] < lengths[:, None]).astype(np.int32)
  expected = np.asarray(jax.jit(model.apply)(params, tokens, segment_ids=segments))
  if head == "scalar":
    expected = expected[np.arange(3), lengths - 1]
  np.savez(tmp_path / "tokens.npz", tokens=tokens, lengths=lengths, expected=expected)
  child = subprocess.run(
    [torch_python, "-c", _COMPARE, str(tmp_path)],
    env=os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
    capture_output=True,
    text=True,
  )
  assert child.returncode == 0, child.stderr[-2000:]
  error, scale = map(float, child.stdout.split())
  print(f"{name}: largest difference {error:.2e}, largest value {scale:.1f}")
  assert error < 1e-4
  assert scale > 0.5
