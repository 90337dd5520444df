"""Merged models that other scripts open, and models that are refused."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy

from experiments import merge
from experiments.lab import averaging
from rlhf_jax import flags, loop
from rlhf_jax.data import DataConfig
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import hf
from tests.testing import full, read_flags


def weights_of(folder):
  return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.fixture(scope="session")
def tuned(tmp_path_factory, sft_run):
  """Another model of the architecture and vocabulary of `sft_run`."""
  folder = tmp_path_factory.mktemp("tuned") / "export"
  shutil.copytree(sft_run / "export", folder)
  rng = np.random.default_rng(0)
  noisy = {
    name: w + 0.1 * rng.normal(size=w.shape).astype(w.dtype)
    for name, w in weights_of(folder).items()
  }
  safetensors.numpy.save_file(noisy, folder / "model.safetensors")
  return folder


def run(workdir, models, **settings):
  config = merge.Config(models=tuple(map(str, models)), **settings)
  summary = merge.run_merge(loop.Session(str(workdir)), config)
  return summary, weights_of(workdir / "export")


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_a_policy_and_its_start(tmp_path, sft_run, tuned, weight):
  _, merged = run(tmp_path, [tuned], base=str(sft_run), weight_on_base=(weight,))
  base, other = weights_of(sft_run / "export"), weights_of(tuned)
  assert merged.keys() == base.keys()
  for name, value in merged.items():
    np.testing.assert_allclose(value, weight * base[name] + (1 - weight) * other[name], atol=1e-6)
    if weight in (0, 1):
      assert value.tobytes() == (base if weight else other)[name].tobytes()
  assert hf.parse_config(tmp_path / "export") == hf.parse_config(sft_run / "export")
  card = (tmp_path / "export" / "README.md").read_text()
  assert "- merged: " in card and "method: `Merges models" in card


def test_averages_and_tasks(tmp_path, sft_run, tuned):
  base, other = weights_of(sft_run / "export"), weights_of(tuned)
  _, mean = run(tmp_path / "mean", [sft_run, tuned], weights=(1.0, 3.0))
  _, task = run(tmp_path / "task", [tuned], base=str(sft_run), weights=(-0.5,))
  for name in base:
    np.testing.assert_allclose(mean[name], 0.25 * base[name] + 0.75 * other[name], atol=1e-6)
    np.testing.assert_allclose(task[name], 1.5 * base[name] - 0.5 * other[name], atol=1e-6)


def test_a_reward_model_stays_one(tmp_path, reward_run):
  other = shutil.copytree(reward_run / "export", tmp_path / "other")
  run(tmp_path / "mean", [reward_run, other])
  assert averaging.kind_of(tmp_path / "mean" / "export") == "a reward model"
  same = weights_of(tmp_path / "mean" / "export")
  assert all(np.array_equal(same[name], w) for name, w in weights_of(other).items())


@full
def test_weights_of_blocks_are_learned_with_the_mean_that_is_asked_for(tmp_path, tuned, sft_run):
  layers = hf.parse_config(tuned)[0].layers
  summary, _ = run(
    tmp_path / "learned",
    [tuned],
    base=str(sft_run),
    weight_on_base=(0.3,),
    blocks=averaging.BlockOptions(count=layers, steps=8, batch_size=32),
    data=DataConfig(rows=64, eval_rows=8),
    sampling=SamplingConfig(max_new_tokens=8),
  )
  blocks = [summary[f"weight_on_base/{i}"] for i in range(layers)]
  assert abs(np.mean(blocks) - 0.3) < 1e-6
  assert all(np.isfinite([summary["nll/equal"], summary["nll/blocks"]]))
  assert summary["nll/blocks"] <= summary["nll/equal"] + 1e-3


class Sampled(Exception):
  """Answers were asked for."""


@pytest.mark.parametrize(
  ("rows", "size", "wanted"),
  [
    (50, 64, 48),
    (9, 64, 8),
    (50, 20, 16),
    (50, 6, "--blocks.batch_size=6: fewer than the 8 devices of data and fsdp; give 8 or more"),
    (5, 64, "--data.path has 5 prompts: fewer than the 8 devices of data and fsdp; give 8 or more"),
  ],
)
def test_a_batch_of_answers_fits_the_devices(rows, size, wanted, tmp_path, tuned, sft_run):
  def make_sampler(*_):
    def sample(params, tokens, *_):
      raise Sampled(len(tokens))

    return sample

  settings = {"base": str(sft_run), "weight_on_base": (0.3,), "data": DataConfig(rows=rows)}
  blocks = averaging.BlockOptions(count=1, batch_size=size)
  error = flags.UsageError if isinstance(wanted, str) else Sampled
  with (
    mock.patch.object(averaging.models, "make_sampler", make_sampler),
    pytest.raises(error, match=f"^{wanted}$"),
  ):
    run(tmp_path / "out", [tuned], blocks=blocks, **settings)


@pytest.mark.parametrize("name", ["weights", "weight_on_base"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(name, value):
  with pytest.raises(ValueError, match=f"^{name} must be finite"):
    merge.Config(models=("a",), base="b", **{name: (value,)})


def refused(tmp_path, *models, **settings):
  with pytest.raises(flags.UsageError) as error:
    run(tmp_path / "out", models, **settings)
  assert not (tmp_path / "out").exists()
  return str(error.value)


def test_models_that_cannot_be_merged_are_named(
  tmp_path, sft_run, reward_run, preference_run, tuned
):
  kind = "is a language model: merge models of one kind"
  assert kind in refused(tmp_path, sft_run, reward_run)
  assert "is a preference model, and" in refused(tmp_path, reward_run, preference_run)
  assert "twice" in refused(tmp_path, sft_run, sft_run)
  other = shutil.copytree(tuned, tmp_path / "other")
  config = json.loads((other / "config.json").read_text())
  (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
  assert "architecture than" in (text := refused(tmp_path, sft_run, other))
  assert "rope_theta 5.0 and not" in text
  tokens = shutil.copytree(tuned, tmp_path / "tokens")
  text = (tokens / "tokenizer.json").read_text()
  (tokens / "tokenizer.json").write_text(text.replace('"superb"', '"superber"'))
  assert f"{tokens} has another tokenizer" in refused(tmp_path, tuned, tokens)
  nine = {"base": str(sft_run), "weight_on_base": (0.1,) * 9}
  assert "--weight_on_base gives 9 blocks to a model of 1 layers" in refused(
    tmp_path, tuned, **nine
  )
  blocks = averaging.BlockOptions(count=1)
  one = {"base": str(reward_run), "weight_on_base": (0.1,), "blocks": blocks}
  other = shutil.copytree(reward_run / "export", tmp_path / "reward")
  assert "learns from answers" in refused(tmp_path, other, **one)
  with pytest.raises(flags.UsageError, match="holds the model to start from"):
    run(sft_run, [sft_run, tuned])


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ("--models=a", "--models must name two models or more, or one with a base"),
    ("--models=", "--models must name"),
    ("--models=a --base=b", "--base needs --weight_on_base, or --weights"),
    ("--models=a,b --weight_on_base=0.2", "--weight_on_base is the weight of a base"),
    ("--models=a --base=b --weight_on_base=0.2 --weights=1", "keep one"),
    ("--models=a,b --weights=1", "--weights has 1 numbers for 2 models"),
    ("--models=a,b --weights=1,-1", "0 or more"),
    ("--models=a,b --weights=0,0", "0 or more"),
    ("--models=a,b --base=c --weights=1", "--weights has 1 numbers for 2 models"),
    ("--models=a --base=b --weight_on_base=0.1,0.2 --blocks.count=3", "give one number"),
    ("--models=a --base=b --weights=1 --blocks.count=3", "give one number"),
    ("--models=a,b --blocks.count=-1", "--blocks.count must not be negative"),
  ],
)
def test_flags_that_do_not_go_together(given, message):
  with pytest.raises(flags.UsageError, match=message):
    read_flags("experiments.merge", ["--workdir=x", *given.split()])
