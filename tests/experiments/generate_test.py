"""Samples to held-out prompts, and flags that are refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from experiments import generate
from experiments.lab import models
from rlhf_jax import data, flags, loop, simulation
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from tests.testing import read_flags


def test_held_out_prompts_are_answered(tmp_path, sft_run):
  config = generate.Config(
    str(sft_run),
    limit=5,
    batch_size=4,
    data=DataConfig(rows=64, eval_rows=8),
    sampling=SamplingConfig(max_new_tokens=4, samples_per_prompt=2),
  )
  rows = generate.generate(loop.Session(str(tmp_path)), config)
  lines = (tmp_path / "samples" / "step_00000000.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == rows
  prompts = [row["prompt"] for row in rows]
  assert len(set(prompts)) == 5 and prompts[::2] == prompts[1::2]
  assert all(row["logprob"] < 0 for row in rows)


@pytest.mark.parametrize("limit, count", [(0, 70), (3, 3)])
def test_all_prompts_of_a_file_are_answered_or_as_many_as_are_asked_for(
  limit, count, tmp_path, sft_run
):
  file = tmp_path / "prompts.jsonl"
  prompts = [row["prompt"] for row in simulation.preferences("eval", 70, 0)]
  assert len(set(prompts)) == 70
  file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts * 2))
  config = generate.Config(
    str(sft_run),
    limit=limit,
    batch_size=64,
    data=DataConfig(str(file), eval_rows=8),
    sampling=SamplingConfig(max_new_tokens=2),
  )
  rows = generate.generate(loop.Session(str(tmp_path / "run")), config)
  assert [row["prompt"] for row in rows] == prompts[:count]


def test_what_was_answered_before_a_kill_is_not_sampled_again(tmp_path, sft_run, monkeypatch):
  config = generate.Config(
    str(sft_run),
    limit=20,
    batch_size=8,
    data=DataConfig(rows=64, eval_rows=32),
    sampling=SamplingConfig(max_new_tokens=4, samples_per_prompt=2),
  )
  whole = generate.generate(loop.Session(str(tmp_path / "whole")), config)
  make, calls = models.make_sampler, []

  def make_sampler(*args):
    sample = make(*args)

    def killed_in_the_third(*inputs):
      calls.append(inputs)
      if len(calls) == 3:
        raise KeyboardInterrupt
      return sample(*inputs)

    return killed_in_the_third

  monkeypatch.setattr(models, "make_sampler", make_sampler)
  session = loop.Session(str(tmp_path / "run"))
  with pytest.raises(KeyboardInterrupt):
    generate.generate(session, config)
  [part] = (tmp_path / "run" / "samples").iterdir()
  lines = part.read_text().splitlines(keepends=True)
  assert len(lines) == 32
  part.write_text("".join(lines[:27]) + lines[27][:20])  # It was written when the power went.
  other = dataclasses.replace(config, sampling=SamplingConfig(max_new_tokens=3), limit=4)
  assert len(generate.generate(session, other)) == 4 and len(calls) == 4
  assert generate.generate(session, config) == whole
  assert len(calls) == 6  # Of the second batch, of which a part was lost, and of the third.
  assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["step_00000000.jsonl"]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "nf4"])
def test_the_model_is_held_in_the_dtype_of_what_is_not_trained(
  tmp_path, sft_run, monkeypatch, dtype
):
  held = []
  make = models.make_sampler

  def make_sampler(*args):
    sample = make(*args)
    return lambda params, *rest: (held.append(params), sample(params, *rest))[1]

  monkeypatch.setattr(models, "make_sampler", make_sampler)
  config = generate.Config(
    str(sft_run),
    limit=8,
    model=models.ModelOptions(frozen_dtype=dtype),
    sampling=SamplingConfig(max_new_tokens=2),
  )
  assert len(generate.generate(loop.Session(str(tmp_path)), config)) == 8
  codes = {"bfloat16": {"bfloat16"}, "int8": {"int8"}, "nf4": {"uint4"}}[dtype]
  assert codes <= {str(x.dtype) for x in jax.tree.leaves(held[0])}


def test_few_prompts_of_the_built_in_task_are_answered(tmp_path, sft_run):
  config = generate.Config(
    str(sft_run),
    data=DataConfig(rows=8, eval_rows=80),
    sampling=SamplingConfig(max_new_tokens=2),
  )
  assert len(generate.generate(loop.Session(str(tmp_path)), config)) == 64


def test_answers_are_demonstrations_and_tell_which_are_cut(tmp_path, sft_run, capsys):
  model = tmp_path / "model"
  shutil.copytree(sft_run / "export", model)
  (model / "chat_template.jinja").write_text(
    "{% for m in messages %}<bos> {{ m['content'] }} <eos> {% endfor %}"
  )
  asked = "write a brief review of the {} ."
  file = tmp_path / "prompts.jsonl"
  rows = [{"messages": [{"role": "user", "content": asked.format(x)}]} for x in ("film", "burger")]
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = generate.Config(
    str(model),
    data=DataConfig(str(file), eval_fraction=0),
    sampling=SamplingConfig(max_new_tokens=3, samples_per_prompt=64, stop=("e",)),
  )
  rows = generate.generate(loop.Session(str(tmp_path / "run")), config)
  cut = sum(not row["ended"] for row in rows)
  assert 0 < cut < len(rows) == 128
  assert all(row["ended"] for row in rows if "e" in row["response"])
  assert all(len(row["response"].split()) == 3 for row in rows if not row["ended"])
  said = f"{cut} of 128 responses are cut at --sampling.max_new_tokens=3: their `ended` is false"
  assert said in capsys.readouterr().err
  written = DataConfig(
    str(tmp_path / "run/samples/step_00000000.jsonl"), eval_fraction=0, bad_rows=9
  )
  tokenizer = models.open_tokenizer(model)
  (read, _), (given, _) = (
    data.load(kind, of, tokenizer, seed=0)
    for kind, of in (("demonstrations", written), ("prompts", config.data))
  )
  np.testing.assert_array_equal(read.examples[0]["prompt"], given.examples[0]["prompt"])


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--batch_size=0", "--batch_size must be at least 1, got 0"),
    ("--limit=-1", "--limit must not be negative, got -1"),
  ],
)
def test_flags_that_are_refused(flag, message):
  with pytest.raises(flags.UsageError, match=message):
    read_flags("experiments.generate", ["--workdir=x", "--init_from=x", flag])
