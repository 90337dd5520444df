"""Folders in and out: real models against reference outputs, round trips, and bad folders."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from absl import logging

from rlhf_jax import checkpoint, sharding, workdir
from rlhf_jax.data import load_tokenizer
from rlhf_jax.generation import SamplingConfig, make_generate
from rlhf_jax.models import ModelConfig, build, hf, round_matrices
from rlhf_jax.models.transformer import COMPUTATION, RopeScaling
from tests.testing import FAMILY_MODELS

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TINY = ModelConfig(
  vocab_size=16, width=8, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_width=12, max_length=64
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


build_once = functools.cache(build)


@functools.cache
def param_shapes(config, head):
  return jax.eval_shape(build_once(config, head).init, jax.random.key(0))


def random_params(config, head="language", seed=0):
  """Params in which every leaf is random, biases and scales too."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), param_shapes(config, head)
  )


def load(folder, head=None, **kwargs):
  config, stored = hf.parse_config(folder)
  return hf.load_params(folder, build_once(config, head or stored), **kwargs)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


def greedy(model, params, prompt, length, stop_id):
  generate = make_generate(
    model.decode,
    model.init_cache,
    SamplingConfig(max_new_tokens=length, temperature=0.0),
    stop_ids=[stop_id],
    pad_id=0,
  )
  tokens = jnp.asarray(prompt, jnp.int32)[None]
  mask = jnp.ones_like(tokens, bool)
  out = generate(params, tokens, mask, jnp.zeros(1, jnp.int32), jax.random.key(0))
  return np.asarray(out.tokens)[0]


# Real models.


def test_stories260k_equals_transformers(shared):
  folder = shared / "models/stories260k"
  golden = np.load(folder / "golden.npz")
  config, head = hf.parse_config(folder)
  assert head == "language" and (config.heads, config.kv_heads) == (8, 4)
  model = build(config)
  params = hf.load_params(folder, model)
  logits = jax.jit(model.apply)(params, golden["input_ids"])
  np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
  # The end of a story is BOS in this model, and the golden text goes on to its full length.
  expected = golden["greedy_from_bos"]
  text = greedy(model, params, [1], len(expected) - 1, stop_id=2)
  np.testing.assert_array_equal(text, expected)


GOLDEN = pathlib.Path(__file__).parent / "golden"  # torch_parity_test.py says how it is made.


@pytest.mark.parametrize("name", [*hf.FAMILIES])
def test_golden_folder_computes_what_transformers_did(name, monkeypatch):
  lines = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
  config, head = hf.parse_config(GOLDEN / name)
  assert (config.family, head) == (name, "language")
  assert lines == [], "transformers writes no field that is not known here"
  model = build(config)
  params = hf.load_params(GOLDEN / name, model)
  golden = np.load(GOLDEN / name / "expected.npz")
  segments = golden["mask"].astype(np.int32)
  logits = jax.jit(model.apply)(params, golden["tokens"], segment_ids=segments)
  np.testing.assert_allclose(logits[golden["mask"]], golden["logits"], atol=1e-4)


@pytest.fixture(scope="module")
def smol(smollm2):
  config, _ = hf.parse_config(smollm2)
  model = build(config)
  return model, hf.load_params(smollm2, model)


def test_smollm2_equals_transformers(smol, shared):
  model, params = smol
  golden = np.load(shared / "models/smollm2_f32_golden.npz")

  @jax.jit
  def read(params, tokens):
    logits = model.apply(params, tokens)
    return *jax.lax.top_k(logits, 10), jax.nn.logsumexp(logits, axis=-1)

  top, ids, logsumexp = read(params, golden["input_ids"])
  np.testing.assert_array_equal(ids, golden["top_ids"])
  np.testing.assert_allclose(top, golden["top_logits"], atol=2e-4)
  np.testing.assert_allclose(logsumexp, golden["logsumexp"], atol=2e-4)


def test_smollm2_answers_in_chat(smol, smollm2, shared):
  model, params = smol
  golden = np.load(shared / "models/smollm2_f32_golden.npz")
  prompt, expected = golden["chat_ids"], golden["chat_greedy"]
  tokenizer = load_tokenizer(smollm2)
  assert tokenizer.encode_prompt("What is the capital of France?") == prompt.tolist()
  out = greedy(model, params, prompt, 12, tokenizer.eos_id)
  np.testing.assert_array_equal(out[: len(expected)], expected)
  assert tokenizer.decode(out[len(prompt) :]) == "The capital of France is Paris."


# Round trips.


VARIANTS = {
  "tied": (TINY, "language"),
  "untied": (dataclasses.replace(TINY, tied=False), "language"),
  "reward": (TINY, "scalar"),
  "untied_reward": (dataclasses.replace(TINY, tied=False), "scalar"),
  "biases": (dataclasses.replace(TINY, qkv_bias=True, out_bias=True, mlp_bias=True), "language"),
  "linear": (dataclasses.replace(TINY, rope_scaling=RopeScaling("linear", 2.0)), "language"),
  "llama3": (
    dataclasses.replace(
      TINY, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 1.5, 5.0, 32), kv_heads=1
    ),
    "language",
  ),
  "others": (dataclasses.replace(TINY, norm_eps=3e-6, init_std=0.5, max_length=7), "language"),
}
for _name, _config in FAMILY_MODELS.items():
  VARIANTS[_name] = (_config, "language")
  VARIANTS[_name + "_reward"] = (dataclasses.replace(_config, tied=not _config.tied), "scalar")
_FULL = ("qwen2", "mistral", "mixtral", "gemma2", "phi3")
for _name in _FULL:  # Without windows.
  VARIANTS[_name + "_full"] = (dataclasses.replace(FAMILY_MODELS[_name], windows=()), "language")


@pytest.mark.parametrize("shard_bytes", [2**30, 700], ids=["single", "sharded"])
@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_is_exact(tmp_path, name, shard_bytes):
  config, head = VARIANTS[name]
  params = random_params(config, head)
  hf.save_folder(tmp_path / "m", params, config, token_ids=IDS, shard_bytes=shard_bytes)
  assert hf.parse_config(tmp_path / "m") == (config, head)
  assert hf.parse_config(tmp_path / "m/config.json") == (config, head)
  assert_same(load(tmp_path / "m"), params)
  files = sorted(p.name for p in (tmp_path / "m").iterdir())
  if shard_bytes > 2**20:
    assert files == ["config.json", "generation_config.json", WEIGHTS]
  else:
    assert INDEX in files and WEIGHTS not in files
    shards = list((tmp_path / "m").glob("model-*-of-*.safetensors"))
    assert len(shards) == int(shards[0].stem[-5:]) > 3
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    assert set(index["weight_map"].values()) == {p.name for p in shards}
    sizes = [sum(v.nbytes for v in safetensors.numpy.load_file(p).values()) for p in shards]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert all(
      size <= 700 or len(safetensors.numpy.load_file(p)) == 1
      for size, p in zip(sizes, shards, strict=True)
    )
  assert json.loads((tmp_path / "m/generation_config.json").read_text()) == IDS


def test_no_host_holds_a_whole_model(tmp_path, monkeypatch):
  config, limit = FAMILY_MODELS["mixtral"], 2**13
  mesh = sharding.make_mesh("fsdp:4,tensor:2")
  params = random_params(config)
  placed = jax.device_put(params, sharding.named_shardings(params, mesh, sharding.DECODER_RULES))
  to_host, gathered = sharding.to_host, []

  def gather(tree):
    files = len([*tmp_path.glob("m/*.safetensors")])
    got = to_host(tree)
    gathered.append((files, sum(x.nbytes for x in jax.tree.leaves(got))))
    return got

  hf.save_folder(tmp_path / "whole", params, config, token_ids=IDS)
  monkeypatch.setattr(sharding, "to_host", gather)
  hf.save_folder(tmp_path / "m", placed, config, token_ids=IDS, shard_bytes=limit)
  files = [*(tmp_path / "m").glob("*.safetensors")]
  read = [safetensors.numpy.load_file(file) for file in files]
  whole = safetensors.numpy.load_file(tmp_path / "whole" / WEIGHTS)
  assert_same({name: value for of in read for name, value in of.items()}, whole)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  layers = [x.nbytes / (len(x) if path[0].key == "layers" else 1) for path, x in leaves]
  assert max(size for _, size in gathered) == max(layers)
  held = [sum(n for at, n in gathered if at == written) for written in range(len(files))]
  assert len(files) > 3
  assert max(held) <= limit + max(layers)


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_transformers_reads_a_score_at_the_end_token(family, tmp_path):
  """It takes the last token that is not the padding of its config, or without padding the last."""

  def padding(pad, ends, head="scalar"):
    ids = {"eos_token_id": ends, "pad_token_id": pad}
    raw = hf.config_json(FAMILY_MODELS[family], head, ids)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return transformers.AutoConfig.from_pretrained(tmp_path).get_text_config().pad_token_id

  assert padding(2, 2) is None and padding(2, [2, 3]) is None
  assert padding(0, 2) == 0 and padding(3, [2, 3]) == 3
  assert padding(2, 2, "language") == 2


def test_the_folder_is_in_the_hugging_face_layout(tmp_path):
  params = random_params(TINY)
  hf.save_folder(tmp_path, params, TINY, token_ids=IDS)
  tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS)
  assert len(tensors) == 2 + 2 * 9
  # Their linear layers are [out, in].
  np.testing.assert_array_equal(
    tensors["model.layers.1.self_attn.k_proj.weight"],
    params["layers"]["attention"]["k"]["kernel"][1].T,
  )
  np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embed"]["embedding"])
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
  assert {k: config[k] for k in IDS} == IDS and config["head_dim"] == 6


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize("written", ["float32", "bfloat16"])
def test_a_folder_has_the_dtype_that_is_asked_for(held, written, tmp_path):
  params = round_matrices(random_params(TINY), held)
  hf.save_folder(tmp_path, params, TINY, token_ids=IDS, dtype=written)
  tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS)
  assert {str(x.dtype) for x in tensors.values()} == {written}
  assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == written
  want = jax.tree.map(lambda x: x.astype(written).astype(np.float32), params)
  jax.tree.map(np.testing.assert_array_equal, hf.load_params(tmp_path, build(TINY)), want)


def test_fused_tensors_are_in_the_layout_of_their_family(tmp_path):
  for name in ("phi3", "gpt2"):
    config = FAMILY_MODELS[name]
    params = random_params(config)
    hf.save_folder(tmp_path / name, params, config, token_ids=IDS)
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    tensors = safetensors.numpy.load_file(tmp_path / name / WEIGHTS)

    def side_by_side(part, names, leaf="kernel"):
      return np.concatenate([part[name][leaf][1] for name in names], axis=-1)

    if name == "phi3":  # [out, in]
      qkv = tensors["model.layers.1.self_attn.qkv_proj.weight"]
      np.testing.assert_array_equal(qkv.T, side_by_side(attention, "qkv"))
      gate_up = tensors["model.layers.1.mlp.gate_up_proj.weight"]
      np.testing.assert_array_equal(gate_up.T, side_by_side(mlp, ("gate", "up")))
    else:  # [in, out]
      for leaf, theirs in (("kernel", "weight"), ("bias", "bias")):
        qkv = tensors[f"transformer.h.1.attn.c_attn.{theirs}"]
        np.testing.assert_array_equal(qkv, side_by_side(attention, "qkv", leaf))


def test_old_gpt2_folders_lack_the_prefix_and_hold_masks(tmp_path):
  config = FAMILY_MODELS["gpt2"]
  params = random_params(config)
  hf.save_folder(tmp_path, params, config, token_ids=IDS)

  def age(tensors):
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    return tensors | {"h.0.attn.bias": np.tri(8, dtype=np.float32)[None, None]}

  edit_tensors(tmp_path, age)
  assert_same(load(tmp_path), params)


@pytest.mark.parametrize(
  "config, words",
  [
    (dataclasses.replace(TINY, logit_softcap=30.0), "'llama' cannot say logit_softcap=30.0"),
    (dataclasses.replace(TINY, family="mistral", windows=(3, None)), "cannot say windows"),
    (dataclasses.replace(FAMILY_MODELS["qwen2"], windows=(2, 3)), "cannot say windows"),
    (dataclasses.replace(FAMILY_MODELS["gpt2"], kv_heads=2), "cannot say kv_heads=2"),
    (dataclasses.replace(FAMILY_MODELS["gemma3"], rope_local_theta=None), "rope_local_theta=None"),
    (dataclasses.replace(FAMILY_MODELS["gemma2"], query_width=None), "query_width=None"),
    (dataclasses.replace(TINY, family="jamba"), "family 'jamba' is none of llama, qwen2"),
  ],
)
def test_what_a_folder_cannot_say_is_not_written(tmp_path, config, words):
  folder = tmp_path / "m"
  with pytest.raises(hf.ModelFolderError, match=words):
    hf.save_folder(folder, random_params(config), config, token_ids=IDS)
  assert not folder.exists()


HOW = [
  (name, value)
  for name in COMPUTATION
  for value in typing.get_args(typing.get_type_hints(ModelConfig)[name])
]


@pytest.mark.parametrize("name, value", HOW, ids=str)
def test_how_a_model_computes_is_not_in_its_folder(tmp_path, name, value):
  config = dataclasses.replace(TINY, **{name: value})
  hf.save_folder(tmp_path, random_params(TINY), config, token_ids=IDS)
  assert hf.parse_config(tmp_path) == (TINY, "language")


@pytest.mark.parametrize("first, second", [(700, 2**30), (2**30, 700), (400, 700)])
def test_saving_again_replaces_the_weights(tmp_path, first, second):
  for seed, shard_bytes in ((0, first), (1, second)):
    params = random_params(TINY, seed=seed)
    hf.save_folder(tmp_path, params, TINY, token_ids=IDS, shard_bytes=shard_bytes)
  assert_same(load(tmp_path), params)
  names = {p.name for p in tmp_path.glob("*.safetensors")}
  index = tmp_path / INDEX
  used = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {WEIGHTS}
  assert names == used


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights(tmp_path, dtype):
  params = jax.tree.map(lambda x: x.astype(dtype), random_params(TINY))
  hf.save_folder(tmp_path, params, TINY, token_ids=IDS)
  assert_same(load(tmp_path), jax.tree.map(lambda x: x.astype(jnp.float32), params))
  assert_same(load(tmp_path, dtype=jnp.dtype(dtype)), params)


def test_placement_gets_every_leaf_once(tmp_path):
  params = random_params(TINY)
  hf.save_folder(tmp_path, params, TINY, token_ids=IDS)
  seen = []

  def place(path, value):
    assert isinstance(value, np.ndarray)
    seen.append(path)
    return jnp.asarray(value)

  assert_same(load(tmp_path, place=place), params)
  paths = jax.tree_util.tree_leaves_with_path(params)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
  assert sorted(seen) == sorted(names)


@pytest.mark.parametrize("tied", [True, False])
def test_scalar_head_from_a_language_model(tmp_path, tied):
  config = dataclasses.replace(TINY, tied=tied)
  language = random_params(config)
  hf.save_folder(tmp_path, language, config, token_ids=IDS)
  model = build(config, "scalar")
  with pytest.raises(hf.ModelFolderError, match="no scalar head; give a key"):
    hf.load_params(tmp_path, model)
  params, again, other = (
    hf.load_params(tmp_path, model, key=jax.random.key(seed)) for seed in (3, 3, 4)
  )
  assert_same(params, again)
  assert not np.array_equal(params["score"]["kernel"], other["score"]["kernel"])
  score = params.pop("score")
  assert score["kernel"].shape == (8, 1) and np.abs(score["kernel"]).min() > 0
  language.pop("lm_head", None)
  assert_same(params, language)


def test_tied_model_may_store_the_head_that_equals_the_embedding(tmp_path):
  params = random_params(TINY)
  hf.save_folder(tmp_path, params, TINY, token_ids=IDS)
  edit_tensors(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})
  assert_same(load(tmp_path), params)


# config.json.


def edit_config(folder: pathlib.Path, **changes) -> None:
  """Changes fields; `...` removes one."""
  path = folder / "config.json"
  raw = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def write_config(folder: pathlib.Path, family: str, **changes) -> None:
  """The config.json of the small model of a family, changed."""
  raw = hf.config_json(FAMILY_MODELS[family], "language", IDS)
  (folder / "config.json").write_text(json.dumps(raw))
  edit_config(folder, **changes)


def edit_tensors(folder: pathlib.Path, edit) -> None:
  path = folder / WEIGHTS
  safetensors.numpy.save_file(edit(safetensors.numpy.load_file(path)), path)


@pytest.fixture
def folder(tmp_path):
  hf.save_folder(tmp_path, random_params(TINY), TINY, token_ids=IDS)
  return tmp_path


LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
  "old, new",
  [
    ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
    ({"rope_theta": 500000}, {"rope_parameters": {"rope_theta": 5e5}}),
    (
      {"rope_theta": 5e5, "rope_scaling": LLAMA3},
      {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    ),
    (
      {"rope_theta": 10.0, "rope_scaling": {"type": "linear", "factor": 2}},
      {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10.0}},
    ),
    # What transformers writes while both styles are in use.
    (
      {"rope_theta": 5e5, "rope_scaling": LLAMA3},
      {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    ),
  ],
)
def test_both_spellings_of_rope_mean_the_same(folder, old, new):
  configs = []
  for style in (old, new):
    edit_config(
      folder, **({"rope_theta": ..., "rope_scaling": ..., "rope_parameters": ...} | style)
    )
    configs.append(hf.parse_config(folder)[0])
  assert configs[0] == configs[1]
  assert configs[0].rope_theta == float(old["rope_theta"])
  assert (configs[0].rope_scaling is None) == ("rope_scaling" not in old)


def test_absent_fields_have_the_defaults_of_the_format(folder):
  needed = "architectures model_type hidden_act vocab_size hidden_size num_hidden_layers"
  needed = [*needed.split(), "num_attention_heads", "intermediate_size"]
  raw = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({name: raw[name] for name in needed}))
  config, _ = hf.parse_config(folder)
  assert config == ModelConfig(
    vocab_size=16,
    width=8,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=2,
    mlp_width=12,
    max_length=2048,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tied=False,
    init_std=0.02,
  )
  edit_config(folder, num_key_value_heads=None, head_dim=None)
  assert hf.parse_config(folder)[0] == config


_MINIMAL = {"vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 7, "num_attention_heads": 32}
_MINIMAL |= {"intermediate_size": 12, "hidden_act": "silu"}
_GEMMA = _MINIMAL | {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": ...}
_GPT2 = {"vocab_size": 8, "n_embd": 64, "n_layer": 7, "n_head": 32}
_GPT2 |= {"activation_function": "gelu_new"}
# Family -> the shortest config.json, and what it says beside sizes and `FAMILY_MODELS`.
DEFAULTS = {
  "qwen2": (_MINIMAL, {"kv_heads": 32, "max_length": 32768, "windows": (), "tied": False}),
  "qwen3": (_MINIMAL, {"kv_heads": 32, "max_length": 32768, "head_dim": 128}),
  "mistral": (_MINIMAL, {"kv_heads": 8, "max_length": 131072, "windows": (4096,) * 7}),
  "mixtral": (
    _MINIMAL,
    {"kv_heads": 8, "max_length": 131072, "norm_eps": 1e-5, "windows": (), "experts": 8},
  ),
  "qwen3_moe": (
    _MINIMAL,
    {
      "kv_heads": 4,
      "max_length": 32768,
      "mlp_width": 768,
      "experts": 128,
      "experts_per_token": 8,
      "tied": False,
    },
  ),
  "gemma2": (
    _GEMMA,
    {
      "kv_heads": 4,
      "head_dim": 256,
      "max_length": 8192,
      "query_width": 256,
      "windows": (4096, None) * 3 + (4096,),
      "attention_softcap": 50.0,
      "logit_softcap": 30.0,
    },
  ),
  "gemma3": (
    _GEMMA,
    {
      "kv_heads": 4,
      "head_dim": 256,
      "max_length": 131072,
      "query_width": 256,
      "windows": (4096,) * 5 + (None, 4096),
      "rope_theta": 1e6,
      "rope_local_theta": 10000.0,
      "rope_scaling": None,
    },
  ),
  "gpt2": (_GPT2, {"mlp_width": 256, "max_length": 1024, "norm_eps": 1e-5}),
  "phi3": (_MINIMAL, {"max_length": 4096, "norm_eps": 1e-5, "windows": (), "rotary_fraction": 1.0}),
}


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_absent_fields_have_the_defaults_of_the_family(tmp_path, name):
  raw, says = DEFAULTS[name]
  family = hf.FAMILIES[name]
  raw = raw | {"model_type": family.model_type, "architectures": [next(iter(family.architectures))]}
  (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
  sizes = {"vocab_size": 8, "width": 64, "layers": 7, "heads": 32, "kv_heads": 32, "head_dim": 2}
  usual = {"mlp_width": 12, "norm_eps": 1e-6, "init_std": 0.02}
  expected = dataclasses.replace(FAMILY_MODELS[name], **(sizes | usual | says))
  assert hf.parse_config(tmp_path) == (expected, "language")


@pytest.mark.parametrize(
  "name, changes, expected",
  [
    ("mistral", {"sliding_window": None}, {"windows": ()}),
    ("mistral", {"num_key_value_heads": None}, {"kv_heads": 4}),
    ("phi3", {"sliding_window": 9}, {"windows": (9, 9)}),
    ("phi3", {"partial_rotary_factor": None}, {"rotary_fraction": 1.0}),
    (
      "phi3",
      {
        "rope_theta": ...,
        "partial_rotary_factor": ...,
        "rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.25},
      },
      {"rope_theta": 5.0, "rotary_fraction": 0.25},
    ),
    ("qwen2", {"use_sliding_window": False, "layer_types": ...}, {"windows": ()}),
    ("qwen2", {"layer_types": ..., "max_window_layers": 0}, {"windows": (3, 3)}),
    ("qwen2", {"layer_types": ..., "max_window_layers": 2}, {"windows": ()}),
    ("qwen3_moe", {"num_experts": ..., "num_local_experts": 4}, {"experts": 4}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}, {"windows": (5, 5)}),
    ("gemma2", {"attn_logit_softcapping": None}, {"attention_softcap": None}),
    ("gemma2", {"layer_types": ["full_attention"] * 2, "sliding_window": None}, {"windows": ()}),
    ("gemma3", {"layer_types": ..., "sliding_window_pattern": 2}, {"windows": (3, None, 3)}),
    (
      "gemma3",
      {
        "rope_theta": ...,
        "rope_local_base_freq": ...,
        "rope_scaling": ...,
        "rope_parameters": {
          "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
          "sliding_attention": {"rope_type": "default", "rope_theta": 3.0},
        },
      },
      {
        "rope_theta": 7.0,
        "rope_local_theta": 3.0,
        "rope_scaling": RopeScaling("linear", 2.0),
      },
    ),
  ],
)
def test_fields_of_a_family_are_read(tmp_path, name, changes, expected):
  write_config(tmp_path, name, **changes)
  config, _ = hf.parse_config(tmp_path)
  assert config == dataclasses.replace(FAMILY_MODELS[name], **expected)


def test_unknown_fields_are_named_in_the_log(folder, monkeypatch):
  lines = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
  hf.parse_config(folder)
  assert lines == []
  edit_config(folder, mystery=1, another="x")
  assert hf.parse_config(folder) == (TINY, "language")
  assert len(lines) == 1 and lines[0].endswith("config.json: fields not used: another, mystery")


def test_fields_that_name_code_are_only_data(folder):
  load(folder)  # Imports whatever a load needs.
  before = set(sys.modules)
  code = "import pathlib; pathlib.Path(__file__).with_name('executed').touch()\n"
  (folder / "evil.py").write_text(code)
  (folder / "modeling_llama.py").write_text(code)
  edit_config(
    folder,
    auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    _attn_implementation_internal="evil/kernel:attention",
    _attn_implementation="evil/kernel",
    trust_remote_code=True,
    custom_pipelines={"x": {"impl": "evil.Pipeline"}},
    transformers_version="evil",
    _name_or_path="evil/model",
  )
  assert hf.parse_config(folder) == (TINY, "language")
  load(folder)
  assert set(sys.modules) == before
  assert not (folder / "executed").exists()


# Bad folders.


def scaling(**changes):
  rope = {k: v for k, v in (LLAMA3 | changes).items() if v is not ...}
  return {"rope_scaling": rope}


BAD_CONFIGS = {
  "architecture": ({"architectures": ["JambaForCausalLM"]}, "architectures.*Jamba.*Llama"),
  "no_architecture": ({"architectures": ...}, "architectures is None"),
  "two_architectures": ({"architectures": ["LlamaForCausalLM"] * 2}, "architectures"),
  "architecture_type": ({"architectures": [{}]}, "architectures"),
  "model_type": ({"model_type": "mistral"}, "model_type is 'mistral'"),
  "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
  "no_activation": ({"hidden_act": ...}, "hidden_act is missing"),
  "window": ({"sliding_window": 4096}, "sliding_window is 4096"),
  "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
  "experts": ({"num_local_experts": 8}, "num_local_experts is 8"),
  "softcap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
  "partial_rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
  "partial_rotary_new": (
    {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "partial_rotary_factor",
  ),
  "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
  "theta_twice": ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is both 10000.0 and 50000"),
  "scaling_twice": (
    {
      "rope_scaling": {"rope_type": "linear", "factor": 2.0},
      "rope_parameters": {"rope_type": "linear", "factor": 4.0},
    },
    "rope_scaling and rope_parameters differ; keep one",
  ),
  "theta_type": ({"rope_theta": "10000"}, "rope_theta is '10000', expected float"),
  "theta_type_new": (
    {"rope_theta": ..., "rope_parameters": {"rope_theta": "10000"}},
    "rope_theta is '10000', expected float",
  ),
  "theta_bool": (
    {"rope_theta": ..., "rope_parameters": {"rope_theta": True}},
    "rope_theta is True",
  ),
  "theta_zero": ({"rope_theta": 0.0}, "rope_theta is 0.0, expected a positive"),
  "theta_negative": (
    {"rope_theta": ..., "rope_parameters": {"rope_theta": -1.0}},
    "rope_theta is -1.0, expected a positive",
  ),
  "scaling_not_an_object": ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'"),
  "scaling_missing": (scaling(low_freq_factor=...), "rope scaling 'llama3' needs.*low_freq_factor"),
  "scaling_extra": (scaling(attention_factor=1.0), "attention_factor"),
  "factor_type": (scaling(factor="8"), "factor is '8', expected float"),
  "factor_negative": (scaling(factor=-8.0), "factor is -8.0, expected a positive"),
  "factor_nan": (scaling(factor=float("nan")), "factor is nan, expected a positive"),
  "length_type": (scaling(original_max_position_embeddings=True), "original_max_position_embed"),
  "frequencies_equal": (scaling(high_freq_factor=1.0), "high_freq_factor"),
  "missing": ({"hidden_size": ...}, "hidden_size is missing"),
  "missing_vocabulary": ({"vocab_size": None}, "vocab_size is missing"),
  "string": ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', expected int"),
  "float": ({"hidden_size": 8.0}, "hidden_size is 8.0, expected int"),
  "bool": ({"num_attention_heads": True}, "num_attention_heads is True, expected int"),
  "int_for_bool": ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected bool"),
  "list": ({"head_dim": [6]}, "head_dim is .6., expected int"),
  "negative": ({"intermediate_size": -12}, "intermediate_size is -12, expected a positive"),
  "layers": ({"num_hidden_layers": 10**15}, "1000000000000000 layers are more than any model has"),
  "zero": ({"vocab_size": 0}, "vocab_size is 0, expected a positive"),
  "nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a positive"),
  "infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, expected a positive"),
  "heads": ({"num_key_value_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
  "head_width": ({"head_dim": ..., "hidden_size": 10}, "hidden_size.*num_attention_heads"),
  "labels": (
    {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}},
    "reward model has one label.*2",
  ),
  "labels_type": (
    {"architectures": ["LlamaForSequenceClassification"], "id2label": 2},
    "id2label is 2",
  ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs_are_refused(folder, name):
  changes, words = BAD_CONFIGS[name]
  edit_config(folder, **changes)
  with pytest.raises(hf.ModelFolderError, match=words) as e:
    hf.parse_config(folder)
  assert str(e.value).startswith(f"{folder / 'config.json'}: ")
  assert e.value.exit_code == 78


LOCAL, GLOBAL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
  "name, changes, words",
  [
    ("qwen2", {"model_type": "llama"}, "model_type is 'llama', expected 'qwen2'"),
    ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
    (
      "qwen2",
      {"layer_types": [LOCAL, "chunked_attention"]},
      "layer_types is .*chunked.*expected 2",
    ),
    ("qwen2", {"layer_types": [LOCAL]}, "layer_types is .*expected 2 of"),
    ("qwen2", {"layer_types": LOCAL}, "layer_types is 'sliding_attention'"),
    ("qwen2", {"sliding_window": None}, "some layers have a window, but sliding_window is not set"),
    ("qwen2", {"use_sliding_window": 1}, "use_sliding_window is 1, expected bool"),
    ("qwen2", {"max_window_layers": "1"}, "max_window_layers is '1', expected a number"),
    ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0"),
    ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
    ("qwen2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; only None"),
    ("qwen3", {"num_experts": 8}, "num_experts is 8"),
    ("qwen3", {"architectures": ["Qwen3NextForCausalLM"]}, "architectures is .*Qwen3Next"),
    ("qwen3", {"architectures": ["Qwen3MoeForCausalLM"]}, "model_type is 'qwen3'"),
    ("qwen3", {"num_experts": 4}, "num_experts is 4; only None"),
    ("mixtral", {"num_experts_per_tok": 5}, "experts_per_token is 5 of 4 experts"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1; only 0.0"),
    ("qwen3_moe", {"num_local_experts": 4}, "num_local_experts is 4 but num_experts is 6"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; only \[\]"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; only 1"),
    ("mistral", {"layer_types": [LOCAL, GLOBAL]}, "layer_types is .*which mistral does not read"),
    ("mistral", {"sliding_window": 4.5}, "sliding_window is 4.5, expected int"),
    ("mistral", {"sliding_window": -1}, "sliding_window is -1, expected a positive"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; only 'gelu_pytorch"),
    ("gemma2", {"hidden_activation": ...}, "hidden_activation is missing"),
    ("gemma2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'gelu_pytorch_tanh'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0, expected a pos"),
    ("gemma2", {"query_pre_attn_scalar": "3"}, "query_pre_attn_scalar is '3', expected int"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; only None"),
    (
      "gemma3",
      {"rope_parameters": {"rope_theta": 5.0}},
      "rope_parameters is .*one object for each",
    ),
    (
      "gemma3",
      {"rope_parameters": {LOCAL: {"rope_type": "linear", "factor": 2.0}}},
      "rope scaling 'linear' is not supported, only default",
    ),
    ("gemma3", {"rope_local_base_freq": "10"}, "rope_local_base_freq is '10', expected float"),
    ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    (
      "gemma3",
      {"architectures": ["Gemma3ForConditionalGeneration"]},
      "architectures is .*Gemma3ForConditionalGeneration",
    ),
    ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'; only 'gelu_new'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ("gpt2", {"hidden_size": 16}, "hidden_size is 16; only None"),
    ("gpt2", {"n_embd": 18}, "n_embd is no multiple of n_head$"),
    (
      "phi3",
      {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
      "rope scaling 'longrope' is not supported, only default",
    ),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported"),
    ("phi3", {"partial_rotary_factor": 0.2}, "rotary_fraction 0.2 .* expected an even number"),
    ("phi3", {"layer_types": [GLOBAL] * 2}, "layer_types is .*which phi3 does not read"),
  ],
)
def test_bad_configs_of_families_are_refused(tmp_path, name, changes, words):
  write_config(tmp_path, name)
  assert hf.parse_config(tmp_path)[0].family == name
  edit_config(tmp_path, **changes)
  with pytest.raises(hf.ModelFolderError, match=words) as e:
    hf.parse_config(tmp_path)
  assert str(e.value).startswith(f"{tmp_path / 'config.json'}: ")


@pytest.mark.parametrize(
  "text, words",
  [
    (b"", "not JSON"),
    (b'{"a": ', "not JSON"),
    (b"\xff\xfe{}", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'["LlamaForCausalLM"]', "not a JSON object"),
    (None, "not found; give a folder"),
  ],
)
def test_unreadable_config(folder, text, words):
  path = folder / "config.json"
  path.unlink() if text is None else path.write_bytes(text)
  target = path if text is None else folder
  with pytest.raises(hf.ModelFolderError, match=f"config.json: {words}"):
    hf.parse_config(target)


def change_tensor(name, edit):
  return lambda folder: edit_tensors(folder, lambda t: t | {name: edit(t[name])})


def poison(value):
  value = value.copy()
  value[-1, -1] = np.nan
  return value


def truncate(folder):
  path = folder / WEIGHTS
  path.write_bytes(path.read_bytes()[:-8])


def pickled(folder):
  # A pickle that would create a file; opcodes by hand, nothing here writes or reads pickles.
  payload = f"cpathlib\nPath.touch\n(cpathlib\nPath\n(V{folder / 'executed'}\ntRtR."
  (folder / WEIGHTS).write_bytes(b"\x80\x02" + payload.encode())


def only_pickle(folder):
  (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def shard(folder, edit):
  hf.save_folder(folder, random_params(TINY), TINY, token_ids=IDS, shard_bytes=700)
  index = json.loads((folder / INDEX).read_text())
  (folder / INDEX).write_text(json.dumps(edit(index)))


def reshard(**changes):
  """Changes entries of the map; a function gets the map."""

  def edit(index):
    old = index["weight_map"]
    new = {name: to(old) if callable(to) else to for name, to in changes.items()}
    return index | {"weight_map": old | new}

  return lambda folder: shard(folder, edit)


def overlapping(folder):
  info = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
  header = json.dumps({"a": info, "b": info}).encode()
  (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))


def eight_bit(folder):
  tensors = safetensors.numpy.load_file(folder / WEIGHTS)
  header, start = {}, 0
  for name, value in tensors.items():
    offsets = [start, start := start + value.size]
    header[name] = {"dtype": "F8_E4M3", "shape": value.shape, "data_offsets": offsets}
  header = json.dumps(header).encode()
  (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(start))


def lose_shard(folder):
  shard(folder, lambda index: index)
  next(folder.glob("model-00002-of-*")).unlink()


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
BAD_WEIGHTS = {
  "missing": (
    lambda f: edit_tensors(f, lambda t: {k: v for k, v in t.items() if k != K_PROJ}),
    f"tensor {K_PROJ} is missing",
  ),
  "extra": (
    lambda f: edit_tensors(f, lambda t: t | {"model.layers.2.mlp.up_proj.weight": t[NORM]}),
    "no place for.*model.layers.2.mlp.up_proj.weight",
  ),
  "bias_unknown_to_config": (
    lambda f: edit_tensors(f, lambda t: t | {"model.layers.0.mlp.up_proj.bias": t[NORM]}),
    "no place for.*up_proj.bias",
  ),
  "shape": (change_tensor(K_PROJ, lambda x: x[:-1].copy()), rf"{K_PROJ} gives shape \(8, 11\)"),
  "transposed": (change_tensor(K_PROJ, lambda x: x.T.copy()), rf"{K_PROJ} gives shape \(12, 8\)"),
  "nan": (change_tensor(EMBED, poison), f"{EMBED} holds NaN or Inf"),
  "infinite": (change_tensor(NORM, lambda x: x / 0.0), f"{NORM} holds NaN or Inf"),
  "overflow": (
    change_tensor(NORM, lambda x: x.astype(np.float64) * 1e300),
    f"{NORM} holds NaN or Inf",
  ),
  "integers": (change_tensor(K_PROJ, lambda x: x.astype(np.int8)), f"{K_PROJ} .*int8"),
  "eight_bit": (eight_bit, f"tensor {EMBED} (holds|is of a type)"),
  "truncated": (truncate, f"{WEIGHTS}: not a readable safetensors file"),
  "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), f"{WEIGHTS}: not a readable safetensors"),
  "long_header": (
    lambda f: (f / WEIGHTS).write_bytes((2**63 - 1).to_bytes(8, "little") + bytes(64)),
    f"{WEIGHTS}: not a readable safetensors file",
  ),
  "overlapping": (overlapping, f"{WEIGHTS}: not a readable safetensors file"),
  "pickle": (pickled, f"{WEIGHTS}: not a readable safetensors file"),
  "only_pickle": (only_pickle, "no model.safetensors.*pytorch_model.bin may hold code"),
  "nothing": (lambda f: (f / WEIGHTS).unlink(), "no model.safetensors and no index"),
  "traversal": (reshard(**{NORM: "../../x.safetensors"}), f"{INDEX}: shard '../../x.safetensors'"),
  "absolute": (reshard(**{NORM: "/tmp/x.safetensors"}), f"{INDEX}: shard '/tmp/x.safetensors'"),
  "pickle_shard": (reshard(**{NORM: "pytorch_model.bin"}), f"{INDEX}: shard 'pytorch_model.bin'"),
  "shard_type": (lambda f: shard(f, lambda i: {"weight_map": {NORM: 5}}), f"{INDEX}: "),
  "lost_shard": (lose_shard, "model-00002-of-.*safetensors: not a readable safetensors file"),
  "unnamed_shard": (reshard(**{NORM: "model-00009.safetensors"}), "model-00009.safetensors: not a"),
  "lost_tensor": (
    reshard(**{"model.lost": lambda old: old[NORM]}),
    f"{INDEX}: tensors named by the index are not in their shards: .*model.lost",
  ),
  "wrong_shard": (
    reshard(**{NORM: lambda old: next(file for file in old.values() if file != old[NORM])}),
    f"{INDEX}: tensors named by the index are not in their shards: .*{NORM}",
  ),
  "no_weight_map": (lambda f: shard(f, lambda i: {"metadata": {}}), f"{INDEX}: not a safetensors"),
  "index_type": (lambda f: shard(f, lambda i: [1]), f"{INDEX}: not a safetensors index"),
  "index_not_json": (lambda f: (f / INDEX).write_text("{"), f"{INDEX}: not a safetensors index"),
  "other_head": (
    lambda f: edit_tensors(f, lambda t: t | {"lm_head.weight": t[EMBED] + 1}),
    "tie_word_embeddings is true but lm_head.weight differs",
  ),
  "misshapen_head": (
    lambda f: edit_tensors(f, lambda t: t | {"lm_head.weight": t[EMBED][:1].copy()}),
    "tie_word_embeddings is true but lm_head.weight differs",
  ),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_refused(folder, name):
  spoil, words = BAD_WEIGHTS[name]
  load(folder)
  with np.errstate(all="ignore"):
    spoil(folder)
    with pytest.raises(hf.ModelFolderError, match=words) as e:
      load(folder)
  assert str(e.value).startswith(str(folder))
  assert e.value.exit_code == 78
  assert not (folder / "executed").exists()


def test_reward_model_is_no_language_model(tmp_path):
  params = random_params(TINY, "scalar")
  hf.save_folder(tmp_path, params, TINY, token_ids=IDS)
  with pytest.raises(
    hf.ModelFolderError, match=f"{re.escape(str(tmp_path))}: holds a reward model"
  ):
    load(tmp_path, "language")
  assert_same(load(tmp_path, "scalar"), params)
  # The classification format of transformers has no bias.
  edit_tensors(tmp_path, lambda t: {k: v for k, v in t.items() if k != "score.bias"})
  loaded = load(tmp_path)
  np.testing.assert_array_equal(loaded["score"]["bias"], [0.0])
  np.testing.assert_array_equal(loaded["score"]["kernel"], params["score"]["kernel"])


def test_a_wrong_label_count_shows_in_the_shape(tmp_path):
  hf.save_folder(tmp_path, random_params(TINY, "scalar"), TINY, token_ids=IDS)
  edit_config(tmp_path, id2label=..., label2id=...)
  edit_tensors(tmp_path, lambda t: t | {"score.weight": np.zeros((2, 8), np.float32)})
  with pytest.raises(hf.ModelFolderError, match=r"score.weight gives shape \(8, 2\)"):
    load(tmp_path)


def test_loaded_model_computes_what_the_saved_one_did(tmp_path):
  config = VARIANTS["llama3"][0]
  model = build(config)
  params = jax.jit(model.init)(jax.random.key(0))
  hf.save_folder(tmp_path, params, config, token_ids=IDS)
  again = build(hf.parse_config(tmp_path)[0])
  tokens = np.arange(12).reshape(2, 6)
  logits = jax.jit(functools.partial(model.apply, params))(tokens)
  loaded = hf.load_params(tmp_path, again)
  np.testing.assert_array_equal(jax.jit(functools.partial(again.apply, loaded))(tokens), logits)


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_files_follow_the_umask(tmp_path, umask):
  """Those of a library too: whoever may read one file of a run may read all of them."""
  folder = tmp_path / "export"
  before = os.umask(umask)
  try:
    hf.save_folder(folder, random_params(TINY), TINY, token_ids=IDS)
    sharded = tmp_path / "sharded"
    hf.save_folder(sharded, random_params(TINY), TINY, token_ids=IDS, shard_bytes=2000)
    with workdir.run_lock(tmp_path / "run"), checkpoint.Checkpointer(tmp_path / "run/c") as saver:
      saver.save(1, {"x": {"a": np.ones(2, np.float32)}}, {})
  finally:
    os.umask(before)
  for path in (folder, sharded, tmp_path / "run"):
    for file in (path, *path.rglob("*")):
      assert file.stat().st_mode & 0o777 == (0o777 if file.is_dir() else 0o666) & ~umask, file
