"""Several policies compared by the script, and policies that it refuses."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from experiments import evaluate
from rlhf_jax import flags, loop
from tests.testing import start

SMALL = ("--data.rows=64", "--data.eval_rows=8", "--sampling.max_new_tokens=8")


@pytest.fixture(scope="session")
def noisy_runs(tmp_path_factory, sft_run):
  """Two policies near that of `sft_run`: its weights with a little and with more noise."""
  folder = tmp_path_factory.mktemp("noisy")
  for name, scale in (("near", 0.02), ("far", 0.2)):
    shutil.copytree(sft_run / "export", folder / name)
    path = folder / name / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    rng = np.random.default_rng(0)
    noisy = {k: w + scale * rng.normal(size=w.shape).astype(w.dtype) for k, w in weights.items()}
    safetensors.numpy.save_file(noisy, path)
  return folder


def test_several_policies_and_samples(tmp_path, run_script, sft_run, noisy_runs):
  finished = run_script(
    "evaluate",
    tmp_path / "out",
    f"--policy={noisy_runs / 'near'},{noisy_runs / 'far'}",
    f"--baseline={sft_run}",
    "--sampling.samples_per_prompt=4",
    "--data.group=tone",
    *SMALL,
  )
  assert finished.code == 0, finished.output
  summary = json.loads((tmp_path / "out" / "summary.json").read_text())
  assert summary.keys() == {"sft", "near", "far", "groups"}
  by_group = summary.pop("groups")
  assert by_group.keys() == summary.keys()
  for policy, groups in by_group.items():
    assert groups.keys() == {"1", "-1"} and sum(of["prompts"] for of in groups.values()) == 8
    means = [of["gold/mean"] for of in groups.values()]
    assert summary[policy]["gold/worst_group"] == min(means)
    np.testing.assert_allclose(summary[policy]["gold/group_spread"], max(means) - min(means))
  trained = json.loads((sft_run / "summary.json").read_text())["eval/loss"]
  np.testing.assert_allclose(summary["sft"]["nll"], trained, rtol=1e-4)
  assert summary["near"]["nll"] != summary["far"]["nll"]
  assert 0 < summary["near"]["kl"] < summary["far"]["kl"]
  assert abs(summary["sft"]["kl"]) < 1e-4
  assert summary["sft"]["gold/win_rate"] == 0.5
  for of in summary.values():
    for name in ("gold/mean", "gold/win_rate", "kl"):
      assert of[f"{name}_low"] <= of[name] <= of[f"{name}_high"]
    assert of["diversity/ead"] > 0 and 0 <= of["diversity_per_input/self_similarity"] <= 1
  rows = [line.split()[0] for line in finished.output.splitlines() if "±" in line]
  assert rows[:3] == ["sft", "near", "far"]
  assert "far by group" in finished.output
  assert (tmp_path / "out" / "plots" / "frontier.png").stat().st_size > 0
  for step in range(3):
    samples = tmp_path / "out" / "samples" / f"step_{step:08d}.jsonl"
    assert len(samples.read_text().splitlines()) == 8 * 4


def refused(tmp_path, baseline, *policies):
  config = evaluate.Config(policy=tuple(map(str, policies)), baseline=str(baseline))
  with pytest.raises(flags.UsageError) as error:
    evaluate.evaluate(loop.Session(str(tmp_path / "out")), config)
  assert not (tmp_path / "out").exists()
  return str(error.value)


def test_policies_that_cannot_be_compared_are_named(tmp_path, sft_run, noisy_runs):
  near = noisy_runs / "near"
  other = shutil.copytree(near, tmp_path / "other")
  config = json.loads((other / "config.json").read_text())
  (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
  assert f"--policy={other} has another architecture" in refused(tmp_path, sft_run, near, other)
  tokens = shutil.copytree(near, tmp_path / "tokens")
  text = (tokens / "tokenizer.json").read_text()
  (tokens / "tokenizer.json").write_text(text.replace('"superb"', '"superber"'))
  assert f"--policy={tokens} has another tokenizer" in refused(tmp_path, sft_run, near, tokens)
  assert "twice" in refused(tmp_path, sft_run, near, near)
  with pytest.raises(flags.UsageError, match="--policy=... is needed"):
    start("evaluate", f"--workdir={tmp_path / 'none'}", "--policy=", "--baseline=x")
