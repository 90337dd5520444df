"""Folders of models, and models that are written and read again."""

import dataclasses
import json
import shutil
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import records
from experiments.lab import averaging, models
from rlhf_jax import data, flags, generation
from rlhf_jax import workdir as workdir_lib
from rlhf_jax.losses.logprobs import over_tokens
from rlhf_jax.models import hf, lora, quantized
from rlhf_jax.models.lora import LoRAConfig
from rlhf_jax.models.transformer import COMPUTATION
from rlhf_jax.train_step import join


def test_folders_that_hold_no_model(tmp_path):
  with pytest.raises(hf.ModelFolderError, match="neither the workdir of a finished run nor"):
    models.model_folder(str(tmp_path))
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(hf.ModelFolderError, match="this run has not finished"):
    models.model_folder(str(tmp_path))
  assert models.model_folder("") is None


@pytest.mark.parametrize("name", ["path", "preset"])
def test_one_source_of_params(name):
  options = models.ModelOptions(**{name: "llama3_8b"})
  with pytest.raises(flags.UsageError, match=f"--init_from and --model.{name} are both given"):
    models.source_folder(options, "runs/sft")


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"layers": 0}, "layers must be at least 1"),
    ({"preset": "gpt5"}, "preset must be one of"),
    ({"preset": "llama3_8b", "path": "x"}, "preset"),
    ({"width": 30, "heads": 4}, "must be a multiple of 2 . heads = 8"),
  ],
)
def test_options_that_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    models.ModelOptions(**settings)


def test_a_model_with_adapters_is_exported_merged(open_bench, tmp_path, sft_run):
  bench = open_bench("dpo", "preferences", f"--init_from={sft_run}")
  params = models.add_adapters(bench.run, LoRAConfig(rank=2), bench.start)
  params = jax.tree.map(lambda x: x + 0.01, params)  # The factors start with a product of 0.
  tokens = jnp.arange(12).reshape(2, 6)
  expected = over_tokens(jnp.asarray, bench.model.apply(params, tokens))
  folder = models.export(tmp_path / "export", params, bench.model, bench.tokenizer)
  model, read = models.open_model(bench.run, bench.config.model, folder, bench.tokenizer)
  assert "lora_a" not in str(jax.tree.structure(read))
  found = over_tokens(jnp.asarray, model.apply(read, tokens))
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert models.open_tokenizer(folder).digest == bench.tokenizer.digest


def test_each_way_to_compute_has_a_flag_that_leaves_the_export_as_it_is(open_bench, tmp_path):
  bench = open_bench("sft", "demonstrations")
  hints, written = typing.get_type_hints(models.ModelOptions), set()
  for name in COMPUTATION:
    for value in typing.get_args(hints[name]):
      options = dataclasses.replace(bench.config.model, **{name: value})
      try:
        model, params = models.open_model(bench.run, options, None, bench.tokenizer)
      except ValueError:  # Attention that this device cannot do.
        assert name == "attention"
        continue
      assert getattr(model.config, name) == value
      folder = models.export(tmp_path / name / value, params, model, bench.tokenizer)
      written.add((folder / "config.json").read_text())
  assert len(written) == 1


def test_adapters_have_a_tokenizer_of_their_own_or_that_of_their_base(tmp_path, sft_run):
  base, adapter = sft_run / "export", tmp_path / "adapter"
  adapter.mkdir()
  write_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
  (adapter / "adapter_model.safetensors").touch()
  of_base = models.open_tokenizer(base)
  assert models.open_tokenizer(adapter).digest == of_base.digest
  ending = data.load_tokenizer(base, ".")
  assert ending.digest != of_base.digest
  ending.save(adapter)
  own = models.open_tokenizer(adapter)
  assert own.digest == ending.digest and own.stop_ids[0] == own.token_id(".")
  assert of_base.eos_id in own.stop_ids, "an end that only the configs of the base name"
  with pytest.raises(hf.ModelFolderError, match="its tokenizer is not that of the policy"):
    models.require_tokens_of(adapter, of_base)
  assert averaging.kind_of(adapter) == "a language model"
  models.require_other_folder(str(tmp_path / "run"), adapter)
  with pytest.raises(flags.UsageError, match="holds the model to start from"):
    models.require_other_folder(str(tmp_path), adapter)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_what_was_learnt_over_codes_is_not_rounded_away(form, open_bench, sft_run, tmp_path):
  frozen = f"--model.frozen_dtype={form}"
  bench = open_bench("sft", "demonstrations", f"--init_from={sft_run}", frozen, "--lora.rank=2")
  run, options, tokenizer = bench.run, bench.config.model, bench.tokenizer
  given = bench.model, tokenizer
  assert quantized.format_of(bench.start) == form
  base, adapters = lora.split(bench.trained())
  adapted = join(base, jax.tree.map(lambda x: x + 1e-4, adapters))
  folders = [tmp_path / "run" / name for name in ("adapted", "tuned", "plain")]
  models.export(folders[0], adapted, *given)
  trained = models.open_model(run, models.ModelOptions(), folders[0], tokenizer)[1]
  # Its codes are those of before: what the adapters add is less than half a step.
  both = [quantized.encode(of, form) for of in (trained, quantized.decode(bench.start))]
  codes = [[x for x in jax.tree.leaves(of) if jnp.issubdtype(x.dtype, jnp.integer)] for of in both]
  assert len(codes[0]) == 7 and all(map(np.array_equal, *codes))
  models.export(folders[1], trained, *given, sources=[folders[0]])
  models.export(folders[2], trained, *given)
  for folder in folders[:2]:
    with pytest.raises(flags.UsageError, match=f"{frozen} would round away what {folder} has"):
      models.open_model(run, options, folder, tokenizer, frozen=True)
    other = dataclasses.replace(options, frozen_dtype="bfloat16")
    models.open_model(run, other, folder, tokenizer, frozen=True)
  models.open_model(run, options, folders[2], tokenizer, frozen=True)


def test_what_is_no_policy_and_what_is_no_judge(
  open_bench, sft_run, reward_run, preference_run, tmp_path
):
  bench = open_bench("ppo", "prompts", f"--init_from={sft_run}", "--reward.name=gold")
  run, options, tokenizer = bench.run, bench.config.model, bench.tokenizer
  given = options, tokenizer, bench.start, "opponent"
  with pytest.raises(hf.ModelFolderError, match="not a language model"):
    models.open_policy(run, str(reward_run), *given)
  assert jax.tree.structure(models.open_policy(run, str(sft_run), *given))
  deeper = dataclasses.replace(bench.model.config, layers=bench.model.config.layers + 1)
  model = models.build_model(run, options, deeper, tokenizer)
  folder = tmp_path / "deeper"
  with workdir_lib.run_lock(tmp_path):
    models.export(folder, model.init(jax.random.key(0)), model, tokenizer)
  with pytest.raises(flags.UsageError, match=f"--opponent={folder} has another architecture"):
    models.open_policy(run, str(folder), *given)
  with pytest.raises(hf.ModelFolderError, match="not a reward model"):
    models.open_scorer(run, str(sft_run), options, tokenizer)
  with pytest.raises(hf.ModelFolderError, match="a preference model, which scores no"):
    models.open_reward_model(run, str(preference_run), options, tokenizer)
  scorer = models.open_scorer(run, str(preference_run), options, tokenizer)
  assert scorer.tokenizer is None and scorer.label == records.PREFERENCE


def test_models_that_read_other_tokens_are_refused(sft_run):
  folder = models.model_folder(str(sft_run))
  models.require_tokens_of(folder, models.open_tokenizer(None))
  with pytest.raises(hf.ModelFolderError, match="its tokenizer is not that of the policy"):
    models.require_tokens_of(folder, data.word_level_tokenizer(["another"]))


def test_adapters_need_a_trained_model():
  models.require_base(LoRAConfig(), None)
  with pytest.raises(flags.UsageError, match="--lora.rank adapts a trained model"):
    models.require_base(LoRAConfig(rank=2), None)


def write_json(path, **fields):
  path.write_text(json.dumps(fields))


def test_every_end_that_a_folder_names_ends_a_response_and_is_exported(tmp_path, open_bench):
  """The tokenizer, both configs and the chat template each name another end."""
  words = ("the", "soup", "was", "good", "bad", ".")
  hf_tokenizer = data.word_level_tokenizer(words).hf
  hf_tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
  hf_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
  hf_tokenizer.save_pretrained(str(tmp_path))
  for given, ids in (([8, 4], [4, 8]), (4, [4]), (None, []), ([], []), ([4, 999], [4])):
    write_json(tmp_path / "generation_config.json", eos_token_id=given)
    write_json(tmp_path / "config.json", eos_token_id=5)
    tokenizer = data.load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 10 == tokenizer.encode_response("good")[-1]
    assert tokenizer.stop_ids == (10, 2, *sorted({5, *ids}))
    assert models.open_tokenizer(tmp_path, data.DataConfig(end_token=".")).stop_ids == (
      9,
      2,
      *sorted({5, *ids}),
      10,
    )
  for broken in ("2", True, -1, [2, "a"], 1.5):
    write_json(tmp_path / "generation_config.json", eos_token_id=broken)
    with pytest.raises(data.DataError, match=r"generation_config\.json: eos_token_id is .* an id"):
      data.load_tokenizer(tmp_path)
  (tmp_path / "generation_config.json").write_text("{")
  with pytest.raises(data.DataError, match=r"generation_config\.json: not readable as JSON"):
    data.load_tokenizer(tmp_path)

  write_json(tmp_path / "generation_config.json", eos_token_id=[8, 4])
  tokenizer = data.load_tokenizer(tmp_path)
  bench = open_bench("sft", "demonstrations")
  folder = models.export(tmp_path / "export", bench.start, bench.model, tokenizer)
  again = data.load_tokenizer(folder)
  assert (again.stop_ids, again.digest) == (tokenizer.stop_ids, tokenizer.digest)
  written = json.loads((folder / "generation_config.json").read_text())
  assert written["eos_token_id"] == list(tokenizer.stop_ids)
  assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [10, 2, 4, 5, 8]


def test_sampling_stops_at_every_end(open_bench, sft_run):
  bench = open_bench("dpo", "preferences", f"--init_from={sft_run}")
  ends = [bench.tokenizer.token_id(word) for word in ("the", "a")]
  tokenizer = data.Tokenizer(bench.tokenizer.hf, stop_ids=ends)
  config = generation.SamplingConfig(max_new_tokens=12, samples_per_prompt=8, stop=("was g", "oo"))
  sample = models.make_sampler(bench.model, tokenizer, config)
  assert sample is models.make_sampler(bench.model, tokenizer, dataclasses.replace(config))
  prompts = jnp.asarray([tokenizer.encode_prompt("Write a review")] * 4, jnp.int32)
  rollout = sample(
    bench.start, prompts, jnp.ones_like(prompts, bool), jnp.arange(4), jax.random.key(0)
  )
  ended = np.asarray(generation.ended(rollout, *models.stops(tokenizer, config)))
  reasons = set()
  for n in range(32):
    ids = np.asarray(rollout.tokens[n])[np.asarray(rollout.response_mask[n])].tolist()
    places = [i for i, token in enumerate(ids) if token in tokenizer.stop_ids]
    texts = [any(s in tokenizer.decode(ids[: i + 1]) for s in config.stop) for i in range(len(ids))]
    assert places in ([], [len(ids) - 1])
    assert not any(texts[:-1])
    assert ended[n] == bool(places or texts[-1])
    assert ended[n] or len(ids) == 12
    reasons |= {ids[-1]} if places else {"text"} if texts[-1] else {"length"}
  assert len(reasons) >= 3


def test_a_token_without_a_row_that_nothing_writes(open_bench, tmp_path, sft_run):
  bench = open_bench("dpo", "preferences", f"--init_from={sft_run}")
  folder = shutil.copytree(sft_run / "export", tmp_path / "model")
  rows = hf.parse_config(folder)[0].vocab_size
  more = bench.tokenizer.hf
  spare = [f"<|unused_{i}|>" for i in range(rows - len(more))]
  more.add_special_tokens(
    {"additional_special_tokens": [*spare, "<image>"], "pad_token": "<|pad|>"}
  )
  more.save_pretrained(folder)
  tokenizer = models.tokenizer_of(folder)
  assert max(tokenizer.vocabulary.values()) == rows + 1
  model, params = models.open_model(bench.run, bench.config.model, folder, tokenizer)
  config = generation.SamplingConfig(max_new_tokens=8, temperature=9.0)
  prompts = jnp.asarray([tokenizer.encode_prompt("Write a review")] * 64, jnp.int32)
  inputs = (prompts, jnp.ones_like(prompts, bool), jnp.arange(64), jax.random.key(0))
  rollout = models.make_sampler(model, tokenizer, config)(params, *inputs)
  assert int(rollout.tokens.max()) < rows
  again = models.export(tmp_path / "export", params, model, tokenizer)
  assert models.tokenizer_of(again).digest == tokenizer.digest
  assert models.tokenizer_of(again).vocabulary == tokenizer.vocabulary
  assert json.loads((again / "config.json").read_text())["pad_token_id"] < rows
  models.open_model(bench.run, bench.config.model, again, models.tokenizer_of(again))
  more.add_tokens(["zyzzyva"])  # A text may have it.
  more.save_pretrained(folder)
  with pytest.raises(hf.ModelFolderError, match="do not belong together"):
    models.open_model(bench.run, bench.config.model, folder, models.tokenizer_of(folder))
