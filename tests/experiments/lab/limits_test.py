"""Sequences beyond the positions of a model, for every way to make them too long."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from experiments.lab import limits, models
from rlhf_jax import data, flags
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import hf
from tests.testing import FAMILY_MODELS


@dataclasses.dataclass(frozen=True)
class Judge:
  path: str = ""

  @property
  def paths(self):
    return tuple(filter(None, self.path.split(",")))


@dataclasses.dataclass(frozen=True)
class Rollout:
  packed_length: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
  model: models.ModelOptions = models.ModelOptions()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig(max_new_tokens=8)
  reward: Judge = Judge()
  preference: Judge = Judge()
  rollout: Rollout = Rollout()


def folder_of(tmp_path, family, max_length, head="language", label="reward"):
  folder = tmp_path / f"{family}-{max_length}-{head}-{label}"
  folder.mkdir()
  config = dataclasses.replace(FAMILY_MODELS[family], max_length=max_length)
  (folder / "config.json").write_text(json.dumps(hf.config_json(config, head, {}, label)))
  return folder


def rows(kind, prompt, *responses):
  names = data.KINDS[kind].responses
  example = {"prompt": np.ones(prompt, np.int32)}
  example |= {n: np.ones(r, np.int32) for n, r in zip(names, responses, strict=True)}
  return data.from_examples(kind, [example], [{"prompt_text": ""}])


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize(
  ("kind", "lengths", "changes", "tokens", "names"),
  [
    ("demonstrations", (20, 13), {}, 33, "--data.max_prompt_length or --data.max_response_length"),
    ("preferences", (20, 3, 13), {}, 33, "--data.max_response_length"),
    ("comparisons", (20, 6, 7), {}, 33, "--data.max_response_length"),
    (
      "prompts",
      (20,),
      {"sampling": SamplingConfig(max_new_tokens=13)},
      33,
      "--sampling.max_new_to",
    ),
    ("prompts", (33,), {}, 41, "--sampling.max_new_tokens or --data.max_prompt_length"),
    ("demonstrations", (8, 8), {"sampling": SamplingConfig(max_new_tokens=25)}, 33, "--sampling"),
  ],
)
def test_beyond_the_positions_of_a_model(tmp_path, family, kind, lengths, changes, tokens, names):
  config, dataset = Config(**changes), rows(kind, *lengths)
  folder = folder_of(tmp_path, family, 32)
  with pytest.raises(flags.UsageError, match=r"made for 32 tokens .*max_position_embed") as error:
    limits.require_length(config, folder, [dataset], [dataset])
  assert names in str(error.value) and str(folder) in str(error.value)
  limits.require_length(config, folder_of(tmp_path, family, 48), [dataset], [dataset])
  onwards = dataclasses.replace(config, model=models.ModelOptions(extrapolate=True))
  if family == "qwen2":  # The exact length; a model with learned positions reads the padding too.
    assert f"has {tokens}; " in str(error.value)
    limits.require_length(config, folder_of(tmp_path, family, tokens), [dataset], [dataset])
    assert "--model.extrapolate" in str(error.value)
    limits.require_length(onwards, folder, [dataset], [dataset])
  else:
    with pytest.raises(flags.UsageError, match="its positions are learned") as error:
      limits.require_length(onwards, folder, [dataset], [dataset])
    assert "extrapolate" not in str(error.value)


@pytest.mark.parametrize(
  ("changes", "name"),
  [
    ({"data": DataConfig(packed_length=64)}, "--data.packed_length"),
    ({"rollout": Rollout(64)}, "--rollout.packed_length"),
  ],
)
def test_packed_rows_need_learned_positions(tmp_path, changes, name):
  dataset, config = rows("demonstrations", 8, 8), Config(**changes)
  limits.require_length(config, folder_of(tmp_path, "qwen2", 32), [dataset], [dataset])
  with pytest.raises(flags.UsageError, match=f"lower {name};"):
    limits.require_length(config, folder_of(tmp_path, "gpt2", 32), [dataset], [dataset])


@pytest.mark.parametrize("field", ["reward", "preference"])
def test_judges_read_what_was_sampled(tmp_path, field):
  judge = folder_of(tmp_path, "qwen2", 24, "scalar")
  config: Any = Config(**{field: Judge(str(judge))})
  policy = folder_of(tmp_path, "qwen2", 32)
  limits.require_length(config, policy, [rows("demonstrations", 16, 16)])
  limits.require_length(config, policy, answered=[rows("prompts", 16)])
  with pytest.raises(flags.UsageError, match=f"{judge} was made for 24 tokens .* has 25"):
    limits.require_length(config, policy, answered=[rows("prompts", 17)])


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_preference_model_reads_two_responses(tmp_path, family):
  policy = folder_of(tmp_path, family, 40)
  for length in (34, 33):  # 16 of the prompt, and twice 8 with an end token.
    judge = folder_of(tmp_path, family, length, "scalar", "preference")
    config: Any = Config(preference=Judge(str(judge)))
    if length == 34:
      limits.require_length(config, policy, answered=[rows("prompts", 16)])
  with pytest.raises(flags.UsageError, match=f"{judge} was made for 33 tokens .* has 34"):
    limits.require_length(config, policy, answered=[rows("prompts", 16)])


def test_judges_read_no_packed_rows(tmp_path):
  judge, policy = folder_of(tmp_path, "gpt2", 24, "scalar"), folder_of(tmp_path, "qwen2", 24)
  config: Any = Config(reward=Judge(str(judge)), rollout=Rollout(64))
  limits.require_length(config, policy, answered=[rows("prompts", 16)])


def test_new_models_and_presets():
  dataset = rows("prompts", 1100)
  with pytest.raises(flags.UsageError, match="the model was made for 1024 tokens"):
    limits.require_length(Config(), None, answered=[dataset])
  preset = Config(model=models.ModelOptions(preset="llama3_8b"))
  limits.require_length(preset, None, answered=[dataset])
  with pytest.raises(flags.UsageError, match="--model.extrapolate"):
    limits.require_length(preset, None, answered=[rows("prompts", 200_000)])
  empty = data.from_examples("prompts", [], [])
  limits.require_length(Config(), None, [empty], [empty])


def test_scripts_refuse_before_anything_is_opened(open_bench, tmp_path):
  for script, kind in (("sft", "demonstrations"), ("ppo", "prompts"), ("dpo", "preferences")):
    needed = [] if script == "sft" else [f"--init_from={whole_folder(tmp_path, script)}"]
    needed += ["--reward.name=gold"] if script == "ppo" else []
    with pytest.raises(flags.UsageError, match="lower --sampling.max_new_tokens"):
      open_bench(script, kind, "--sampling.max_new_tokens=2000", *needed)
    assert not (tmp_path / "run").exists()


def whole_folder(tmp_path, name):
  folder = tmp_path / name
  models.open_tokenizer(None).save(folder)
  config = dataclasses.replace(FAMILY_MODELS["qwen2"], vocab_size=512)
  (folder / "config.json").write_text(json.dumps(hf.config_json(config, "language", {})))
  return folder
