"""Comparing several policies, and the over-optimisation experiment."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import safetensors.numpy

from experiments import evaluate, overoptimization, ppo
from experiments.lab import evaluating, judges
from rlhf_jax import evaluation, flags, loop, writers
from rlhf_jax.data import Dataset

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
    *SMALL,
  )
  assert finished.code == 0, finished.output
  summary = json.loads((tmp_path / "out" / "summary.json").read_text())
  assert summary.keys() == {"sft", "near", "far"}
  assert 0 < summary["near"]["kl"] < summary["far"]["kl"]
  assert abs(summary["sft"]["kl"]) < 1e-4
  assert summary["sft"]["gold/win_rate"] == 0.5
  for of in summary.values():
    for name in ("gold/mean", "gold/win_rate", "kl"):
      assert of[f"{name}_low"] <= of[name] <= of[f"{name}_high"]
    assert of["diversity/ead"] > 0 and 0 <= of["diversity_per_input/self_similarity"] <= 1
  rows = [line.split()[0] for line in finished.output.splitlines() if "±" in line]
  assert rows == ["sft", "near", "far"]
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
  with pytest.raises(ValueError, match="policy must name a folder"):
    evaluate.Config(policy=(), baseline="x")


def samples_of(rewards, **fields):
  size = len(next(iter(rewards.values())))
  same = {"kl": np.zeros(size), "lengths": np.ones(size), "ended": np.ones(size, bool)}
  texts = {"prompts": ["p"] * size, "responses": ["r"] * size}
  return evaluating.Samples(rewards=rewards, **(same | texts | fields))


def test_intervals_are_over_prompts_and_not_over_samples():
  rng = np.random.default_rng(0)
  of_prompt = rng.normal(size=40)
  gold = np.repeat(of_prompt, 4) + 1e-3 * rng.normal(size=160)
  before = samples_of({"gold": np.zeros(160)})
  found = evaluate.intervals(before, samples_of({"gold": gold}, kl=gold + 2), 4)
  expected = evaluation.mean(of_prompt)
  names = ("gold/mean", "gold/mean_low", "gold/mean_high")
  np.testing.assert_allclose([found[name] for name in names], expected, atol=1e-3)
  assert found["kl"] == pytest.approx(expected.value + 2, abs=1e-3)
  wins = evaluation.mean(1.0 * (of_prompt > 0))
  assert found["gold/win_rate_low"] == pytest.approx(wins.low, abs=1e-6)
  assert "reward/accuracy" not in found


def test_agreement_of_proxy_and_gold():
  before = samples_of({"reward": np.zeros(6), "gold": np.zeros(6)})
  after = samples_of(
    {"reward": np.array([1, 1, -1, 0, 5, 5]), "gold": np.array([2.0, -2, -3, 1, 0, 0])}
  )
  # Right, wrong, right, a tie of the proxy; where the gold reward ties nothing can be right.
  assert evaluate.intervals(before, after, 1)["reward/accuracy"] == 2.5 / 4
  assert "reward/accuracy" not in evaluate.intervals(before, before, 1)


def test_best_of_n_line_is_chosen_by_the_proxy():
  proxy, gold = np.array([[1.0, 2, 3, 4], [4, 3, 2, 1]]), np.array([[0.0, 0, 0, 8], [4, 0, 0, 0]])
  lines = evaluate.best_of_n(samples_of({"reward": proxy.ravel(), "gold": gold.ravel()}), 4)
  np.testing.assert_allclose(lines["reward"].y, [2.5, (2 * 1 + 3 * 2 + 4 * 3) / 6, 4])
  np.testing.assert_allclose(lines["gold"].y, [1.5, 3, 6])
  np.testing.assert_allclose(lines["gold"].x, [0, math.log(2) - 0.5, math.log(4) - 0.75])
  assert evaluate.best_of_n(samples_of({"gold": gold.ravel()}), 1) == {}


def test_diversity_across_and_per_input():
  # Four prompts; the samples of a prompt are alike, those of two prompts are not.
  tokens = [[10 * prompt + i for i in range(5)] + [0] for prompt in range(4) for _ in range(3)]
  found = evaluate.diversity(tokens, 3, 50)
  assert found["diversity/self_similarity"] == pytest.approx(0)
  assert found["diversity_per_input/self_similarity"] == pytest.approx(1)
  assert found["diversity/distinct_1"] == 1
  assert found["diversity_per_input/distinct_1"] == pytest.approx(1 / 3)
  assert evaluate.diversity([[1, 0]], 1, 50) == {}


def test_repeated_prompts_stay_together():
  prompts = Dataset(**dict.fromkeys(Dataset._fields))
  prompts = prompts._replace(examples=[{"prompt": np.array([i])} for i in (5, 7)], rows=["a", "b"])
  repeated = evaluate.repeat(prompts, 3)
  assert repeated.rows == ["a"] * 3 + ["b"] * 3
  assert [int(example["prompt"][0]) for example in repeated.examples] == [5] * 3 + [7] * 3


def test_overoptimization_runs_every_stage_once_per_seed(tmp_path, monkeypatch):
  stages = []

  def train(session, config):
    stages.append((session, config))
    writer = writers.make_writer(session.workdir)
    for step in range(1, 31):
      gold = 5 - step / 10 if "no_kl" in session.workdir else 5 + step / 10
      writer.write(step, {"reward/mean": step, "gold_reward/mean": gold, "kl/ref": step / 3})
    writer.close()
    return {"accuracy": 0.6}

  for script in ("sft", "reward_model", "ppo"):
    monkeypatch.setattr(getattr(overoptimization, script), "train", train)
  config = overoptimization.Config(seeds=2)
  summary = overoptimization.train(loop.Session(str(tmp_path), seed=1), config)
  names = ["sft"] + [f"{kind}_{s}" for s in (0, 1) for kind in ("reward_model", "kl", "no_kl")]
  assert [session.workdir for session, _ in stages] == [str(tmp_path / name) for name in names]
  by_name = dict(zip(names, stages, strict=True))
  for kind, coef in (("kl", 0.3), ("no_kl", 0.0)):
    session, stage = by_name[f"{kind}_1"]
    assert stage.ppo.kl_coef == coef
    assert stage.init_from == str(tmp_path / "sft")
    assert stage.reward.path == str(tmp_path / "reward_model_1")
    # The two kinds differ in nothing but the penalty.
    assert session.seed == by_name["kl_1"][0].seed != by_name[f"{kind}_0"][0].seed
    assert dataclasses.replace(stage, ppo=config.ppo.ppo) == dataclasses.replace(
      config.ppo, init_from=stage.init_from, reward=stage.reward
    )
  assert summary["reward_model/accuracy"] == [0.6, 0.6]
  assert summary["no KL penalty"]["diverged"] == 2
  assert summary["KL penalty 0.3"]["diverged"] == 0
  assert json.loads((tmp_path / "summary.json").read_text()).keys() == summary.keys()
  assert (tmp_path / "plots" / "overoptimization.png").stat().st_size > 0


def test_overoptimization_refuses_what_it_sets_itself():
  config = overoptimization.Config()
  for changes, message in (
    ({"seeds": 0}, "seeds must be"),
    ({"ppo": dataclasses.replace(config.ppo, init_from="x")}, "ppo.init_from"),
    ({"ppo": ppo.Config(reward=judges.RewardOptions(name="gold"))}, "ppo.reward"),
    ({"ppo": ppo.Config(ppo=dataclasses.replace(config.ppo.ppo, kl_coef=0.0))}, "kl_coef"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(config, **changes)
