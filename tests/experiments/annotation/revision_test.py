"""Prompts for critique and revision, and models that are too short for them."""

import dataclasses
import json

import jax
import pytest

from experiments import revise
from experiments.annotation import revision
from experiments.annotation.judge import CriticOptions
from experiments.lab import models
from rlhf_jax import data, flags, loop
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import build, hf
from tests.testing import FAMILY_MODELS

WORDS = ("0", "1", "2", "good", "bad", "response", "request", "to", "it.", "a", "and", "is", "Here")


@pytest.fixture
def ask(tmp_path):
  """`ask(family, max_length, new, extrapolate=False) -> summary`, of a run of its own."""
  path = tmp_path / "prompts.jsonl"
  path.write_text("".join(json.dumps({"prompt": f"good {i}"}) + "\n" for i in range(3)))

  def ask(family, max_length, new, extrapolate=False):
    name = f"{family}-{max_length}-{new}-{extrapolate}"
    folder = tmp_path / name
    folder.mkdir()
    tokenizer = data.word_level_tokenizer(WORDS)
    tokenizer.save(folder)
    config = dataclasses.replace(
      FAMILY_MODELS[family], vocab_size=tokenizer.vocab_size, max_length=max_length
    )
    params = jax.jit(build(config, "language").init)(jax.random.key(0))
    hf.save_folder(folder, params, config, token_ids={"eos_token_id": tokenizer.eos_id})
    options = revise.Config(
      model=models.ModelOptions(extrapolate=extrapolate),
      data=data.DataConfig(path=str(path)),
      judge=CriticOptions(path=str(folder)),
      sampling=SamplingConfig(max_new_tokens=new),
    )
    return revise.revise(loop.Session(str(tmp_path / f"out-{name}")), options)

  return ask


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("is_bounded", [True, False])
def test_questions_beyond_the_positions_of_a_model(ask, monkeypatch, family, is_bounded):
  if not is_bounded:  # As if responses had more tokens when they are read than when they are drawn.
    monkeypatch.setattr(revision, "require_length", lambda *unused: None)
  words = r"made for 48 tokens .*lower --sampling.max_new_tokens or --data.max_prompt_length"
  with pytest.raises(flags.UsageError, match=words) as error:
    ask(family, 48, 16)
  assert ("--model.extrapolate" in str(error.value)) == (family == "qwen2")
  if family == "qwen2":
    assert ask(family, 48, 16, extrapolate=True)["rows"] == 3


def test_the_longest_question_fits(ask):
  with pytest.raises(flags.UsageError, match="the longest sequence has") as error:
    ask("qwen2", 48, 4)
  length = int(str(error.value).split("has ")[1].split(";")[0])
  assert ask("qwen2", length, 4)["rows"] == 3
  with pytest.raises(flags.UsageError, match=f"has {length};"):
    ask("qwen2", length - 1, 4)
