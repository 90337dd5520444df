"""Every script: what it writes, that it resumes bitwise after SIGKILL, and how it refuses."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from experiments.lab import evaluating, models
from tests.testing import full

SCRIPTS = ("sft", "reward_model", "dpo", "ppo", "nash_md", "online_dpo")
MORE = {
  "preference_model": ("--lora.rank=2",),
  "dpo": ("--data.packed_length=192", "--lora.rank=4", "--eval_every=6"),
  "ppo": ("--ppo.packed_length=64",),
  "nash_md": ("--preference.name=panel", "--nash_md.mix=0", "--nash_md.ema=0.9"),
  "online_dpo": (
    "--preference.name=expert",
    "--online.reference=previous",
    "--online.round_steps=2",
    "--dpo.bonus_coef=0.01",
    "--lora.rank=2",
  ),
}


def chained(script, sft_run, reward_run):
  """The flags that put a script behind the ones before it."""
  if script == "sft":
    return ()
  first = (f"--init_from={sft_run}", *MORE.get(script, ()))
  return (*first, f"--reward.path={reward_run}") if script == "ppo" else first


@pytest.fixture
def whole_and_killed(tmp_path, run_script, kill_script):
  """A run, and the same killed after a step and continued, which ends with the same weights."""

  def run(script, flags, after_step, devices=1):
    whole = run_script(script, tmp_path / "whole", *flags, devices=devices)
    assert whole.code == 0, whole.output
    kill_script(script, tmp_path / "killed", *flags, after_step=after_step, devices=devices)
    again = run_script(script, tmp_path / "killed", *flags, devices=devices)
    assert again.code == 0, again.output
    assert "continuing from step" in again.output
    exports = [run.workdir / "export" / "model.safetensors" for run in (whole, again)]
    assert exports[0].read_bytes() == exports[1].read_bytes()
    return whole, again

  return run


# A kill of DPO is in multiprocess_test.py, too.
_KILLED = [
  pytest.param(script, marks=full) if script in ("dpo", "nash_md", "preference_model") else script
  for script in (*SCRIPTS, "preference_model")
]


@pytest.mark.slow
@pytest.mark.parametrize("script", _KILLED)
def test_a_killed_run_ends_with_the_same_bits(script, whole_and_killed, sft_run, reward_run):
  flags = (
    *chained(script, sft_run, reward_run),
    "--steps=12",
    "--checkpoint_every=3",
    "--log_every=4",
  )
  whole, again = whole_and_killed(script, flags, after_step=3)
  lines = [
    [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    for run in (whole, again)
  ]
  timeless = [
    [{k: v for k, v in row.items() if "second" not in k and "time/" not in k} for row in rows]
    for rows in lines
  ]
  assert timeless[0] == timeless[1]
  if script == "dpo":
    summary = json.loads((again.workdir / "summary.json").read_text())
    assert 0 < summary["eval/length_baseline"] < 1
    assert f"by length alone: {summary['eval/length_baseline']:.3f}" in again.output
    judged = [(row["step"], row["eval/gold"]) for row in timeless[1] if "eval/gold" in row]
    assert [step for step, _ in judged] == [6, 12]
    np.testing.assert_allclose(judged[-1][1], summary["gold/mean"], rtol=1e-5)


@pytest.mark.slow
def test_samples_drawn_while_the_others_learn(whole_and_killed, sft_run):
  """The policy waits for the critic, so that it first changes in the third iteration."""
  flags = (
    f"--init_from={sft_run}",
    "--reward.name=gold",
    "--mesh=data:2",
    "--rollout.devices=1",
    "--ppo.importance_cap=2",
    "--critic_warmup=2",
    "--lora.rank=4",
    "--optim.learning_rate=3e-3",
    "--steps=8",
    "--checkpoint_every=2",
  )
  whole, _ = whole_and_killed("ppo", flags, after_step=2, devices=3)
  rows = [json.loads(x) for x in (whole.workdir / "metrics.jsonl").read_text().splitlines()]
  assert [row["staleness"] for row in rows] == [0, 1, 1, 1, 1, 1, 1, 1]
  importance = np.array([row["importance/mean"] for row in rows])
  np.testing.assert_allclose(importance[:3], 1, atol=1e-5)
  assert (np.abs(importance[3:] - 1) > 1e-4).all()


def test_adapters_from_a_base_that_changed_are_refused(tmp_path, run_script, sft_run):
  base = tmp_path / "base"
  shutil.copytree(sft_run / "export", base)
  flags = (f"--model.path={base}", "--lora.rank=2", "--checkpoint_every=2")
  first = run_script("sft", tmp_path / "run", *flags)
  assert first.code == 0, first.output
  tensors = safetensors.numpy.load_file(base / "model.safetensors")
  name = next(iter(tensors))
  safetensors.numpy.save_file(tensors | {name: tensors[name] + 1}, base / "model.safetensors")
  again = run_script("sft", tmp_path / "run", *flags, "--steps=6")
  assert again.code == 78, again.output
  assert "frozen" in again.output


def test_the_chain(tmp_path, run_script):
  finished = run_script("rlhf", tmp_path / "rlhf")
  assert finished.code == 0, finished.output
  summary = json.loads((tmp_path / "rlhf" / "summary.json").read_text())
  names = {"reward_model/accuracy", "sft/gold_reward", "ppo/gold_reward", "ppo/win_rate", "ppo/kl"}
  assert names <= set(summary)
  for stage in ("sft", "reward_model", "ppo"):
    assert (tmp_path / "rlhf" / stage / "export" / "config.json").exists()
    assert list((tmp_path / "rlhf" / "plots" / stage).glob("*.png"))


def test_sft_writes_what_it_says(sft_run):
  files = ("flags", "metrics.jsonl", "summary.json", "identity.json", "run.json")
  for name in (*files, "export/README.md"):
    assert (sft_run / name).stat().st_size > 0, name
  assert list((sft_run / "plots").glob("*.png"))
  assert list((sft_run / "samples").glob("step_*.jsonl"))
  rows = [json.loads(line) for line in (sft_run / "metrics.jsonl").read_text().splitlines()]
  assert {"step", "loss", "grad_norm", "lr", "tokens_per_second", "step_seconds"} <= set(rows[0])
  assert rows[-1]["step"] == 4


def test_reward_model_is_centred(reward_run):
  summary = json.loads((reward_run / "summary.json").read_text())
  assert 0 <= summary["accuracy"] <= 1
  config = json.loads((reward_run / "export" / "config.json").read_text())
  assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_kto_on_pairs_as_single_responses(tmp_path, run_script, sft_run):
  finished = run_script("kto", tmp_path, f"--init_from={sft_run}", "--sampling.max_new_tokens=8")
  assert finished.code == 0, finished.output
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert {"eval/loss", "eval/reward/chosen", "gold/win_rate", "kl"} <= set(summary)
  first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
  # The policy starts as the reference, whose log-probabilities are those of another program.
  assert first["loss"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
  "flags",
  [
    (
      "--ppo.advantage=rloo",
      "--ppo.objective=reinforce",
      "--sampling.samples_per_prompt=2",
      "--ppo.shaping=par",
      "--reward.ensemble=min",
      "--lora.rank=4",
    ),
    (
      "--critic_warmup=2",
      "--share_trunk",
      "--ppo.normalize_scores",
      "--ppo.normalize_values",
      "--ppo.ptx_coef=0.1",
      "--ppo.importance_cap=2",
      "--ppo.segment=4",
      "--eval_every=2",
    ),
  ],
  ids=["rloo", "ppo_max"],
)
def test_relatives_of_ppo(flags, tmp_path, run_script, sft_run, reward_run):
  reward = f"--reward.path={reward_run},{reward_run}"
  finished = run_script("ppo", tmp_path, f"--init_from={sft_run}", reward, *flags)
  assert finished.code == 0, finished.output
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert ("loss/value" in rows[0]) == ("loss/ptx" in rows[0]) == ("--critic_warmup=2" in flags)
  assert abs(rows[0]["kl/ref"]) < 1e-4  # With adapters too the policy starts as the reference.
  exports = [run / "export" / "model.safetensors" for run in (tmp_path, sft_run)]
  assert exports[0].read_bytes() != exports[1].read_bytes()
  if "--critic_warmup=2" in flags:
    # The policy waited for the critic: in the third iteration it still is the reference.
    assert [row["lr"] for row in rows] == [0.0, 0.0, pytest.approx(1e-3, rel=0.5)]
    assert abs(rows[2]["kl/ref"]) < 1e-4
    assert rows[2]["importance/mean"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
  "flags",
  [
    pytest.param(
      ("--nash_md.mix=0.25", "--nash_md.mix_end=0.5", "--nash_md.tau_end=0.1", "--eval_every=2"),
      marks=full,
    ),
    (
      "--nash_md.objective=regression",
      "--nash_md.mix=0",
      "--nash_md.extragradient",
      "--lora.rank=2",
    ),
    pytest.param(
      ("--nash_md.objective=regression", "--nash_md.tau=0.1", "--nash_md.normalize_lengths"),
      marks=full,
    ),
  ],
  ids=["schedules", "egpo", "ipo_md"],
)
def test_relatives_of_nash_md(flags, tmp_path, run_script, sft_run, preference_run):
  judge = f"--preference.path={preference_run}"
  finished = run_script("nash_md", tmp_path / "nash", f"--init_from={sft_run}", judge, *flags)
  assert finished.code == 0, finished.output
  rows = [json.loads(line) for line in (tmp_path / "nash/metrics.jsonl").read_text().splitlines()]
  assert 0 < rows[0]["preference/mean"] < 1
  assert abs(rows[0]["kl/ref"]) < 1e-4
  if "--nash_md.mix_end=0.5" in flags:
    assert [row["mix"] for row in rows] == pytest.approx([0.25, 0.375, 0.5])
    assert [row["tau"] for row in rows] == pytest.approx([0.01, 0.055, 0.1])
  summary = json.loads((tmp_path / "nash/summary.json").read_text())
  assert summary["preference/win_rate_low"] <= summary["preference/win_rate"]


@full
def test_a_best_response_and_who_beats_whom(tmp_path, run_script, sft_run, preference_run):
  judge = "--preference.name=panel"
  best = run_script(
    "nash_md",
    tmp_path / "best",
    f"--init_from={sft_run}",
    f"--opponent={sft_run}",
    "--nash_md.mix=0",
    "--lora.rank=2",
    judge,
  )
  assert best.code == 0, best.output
  summary = json.loads((tmp_path / "best/summary.json").read_text())
  assert 0 <= summary["preference/over_opponent"] <= 1
  finished = run_script(
    "evaluate",
    tmp_path / "matrix",
    f"--policy={tmp_path / 'best'},{sft_run}",
    f"--baseline={sft_run / 'export'}",
    judge,
  )
  assert finished.code == 0, finished.output
  rates = json.loads((tmp_path / "matrix/summary.json").read_text())["preference/win_rates"]
  for one, of in rates.items():
    assert len(of) == 2
    for other, rate in of.items():
      assert rate["value"] + rates[other][one]["value"] == pytest.approx(1.0)
      assert rate["low"] <= rate["value"] <= rate["high"]


def test_a_reward_model_judges_pairs_and_a_preference_model_scores_nothing(
  tmp_path, run_script, sft_run, reward_run, preference_run
):
  first = f"--init_from={sft_run}"
  for judge in (f"--preference.path={reward_run}", f"--reward.path={reward_run}"):
    name = judge.split(".")[0].strip("-")
    finished = run_script("online_dpo", tmp_path / name, first, judge)
    assert finished.code == 0, finished.output
  for script in ("ppo", "online_dpo"):
    refused = run_script(script, tmp_path / script, first, f"--reward.path={preference_run}")
    assert refused.code == 78, refused.output
    assert "a preference model" in refused.output
    assert "Traceback" not in refused.output


def test_ppo_with_python_reward_generate_and_evaluate(tmp_path, run_script, sft_run):
  trained = run_script("ppo", tmp_path / "ppo", f"--init_from={sft_run}", "--reward.name=gold")
  assert trained.code == 0, trained.output
  summary = json.loads((tmp_path / "ppo" / "summary.json").read_text())
  assert {"kl", "gold/mean", "gold/win_rate", "reward/mean"} <= set(summary)
  metrics = [
    json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()
  ]
  assert metrics[0]["ratio/first_deviation"] < 1e-5
  assert abs(metrics[0]["kl/ref"]) < 1e-4
  for name in ("reward/mean", "kl/ref", "entropy", "clip_fraction", "eos_fraction"):
    assert name in metrics[-1], name

  judged = run_script(
    "evaluate",
    tmp_path / "evaluate",
    f"--policy={tmp_path / 'ppo'}",
    f"--baseline={sft_run}",
  )
  assert judged.code == 0, judged.output
  assert "gold (mean)" in judged.output

  answered = run_script(
    "generate",
    tmp_path / "generate",
    f"--init_from={tmp_path / 'ppo'}",
    "--prompt=write a brief review of the film",
    "--sampling.samples_per_prompt=3",
    "--sampling.max_new_tokens=8",
  )
  assert answered.code == 0, answered.output
  rows = (tmp_path / "generate" / "samples" / "step_00000000.jsonl").read_text().splitlines()
  assert len(rows) == 3
  assert len({json.loads(row)["response"] for row in rows}) > 1


@full
def test_sft_on_a_mesh_of_eight_devices(tmp_path):
  """In this process, which has eight devices."""
  from experiments import sft
  from rlhf_jax import loop
  from rlhf_jax.data import DataConfig
  from rlhf_jax.generation import SamplingConfig

  config = sft.Config(
    steps=2,
    batch_size=8,
    model=models.ModelOptions(layers=1, width=32, heads=2, mlp_width=32),
    data=DataConfig(rows=64, eval_rows=8),
    sampling=SamplingConfig(max_new_tokens=4),
  )
  summary = sft.train(loop.Session(str(tmp_path), mesh="data:2,fsdp:2,tensor:2"), config)
  assert 0 < summary["eval/loss"] < 20


BAD_FLAGS = [
  (("sft", "--stesp=3"), 1, "steps"),
  (("sft", "--steps=0"), 64, "--steps"),
  (("sft", "--optim.learning_rate=nan"), 64, "optim.learning_rate"),
  (("sft", "--optim.learning_rate=-1"), 64, "--optim.learning_rate"),
  (("sft", "stray"), 64, "stray"),
  (("sft", "--init_from=nowhere"), 78, "nowhere"),
  (("sft", "--init_from=any", "--model.preset=llama3_8b"), 64, "--model.preset"),
  (("sft", "--lora.rank=4"), 64, "--init_from"),
  (("sft", "--data.path=nowhere.jsonl"), 65, "nowhere.jsonl"),
  (("sft", "--mesh=data:64"), 64, "--mesh"),
  (("sft", "--processes=2"), 64, "--coordinator"),
  (("sft", "--coordinator=auto"), 64, "--coordinator=auto"),
  (("ppo", "--sampling.top_k=5", "--reward.name=gold"), 64, "top_k"),
  (("ppo", "--ppo.minibatches=3", "--reward.name=gold"), 64, "minibatches"),
  (("ppo",), 64, "--reward.path"),
  (("ppo", "--reward.name=best"), 64, "sentiment"),
  (("ppo", "--reward.name=exact_answer"), 65, "answer: missing"),
  (("ppo", "--reward.name=gold", "--rollout.devices=1"), 64, "ppo.importance_cap"),
  (("ppo", "--reward.name=gold", "--data.packed_length=64"), 64, "ppo.packed_length"),
  (("ppo", "--reward.name=gold", "--ppo.packed_length=8"), 64, "--ppo.packed_length=8 is too"),
  (
    ("ppo", "--reward.name=gold", "--rollout.devices=1", "--ppo.importance_cap=2"),
    64,
    "learn with",
  ),
  (("nash_md",), 64, "--preference.path"),
  (("nash_md", "--preference.name=nobody"), 64, "panel"),
  (("nash_md", "--preference.name=panel", "--opponent=x", "--nash_md.ema=0.5"), 64, "opponent"),
  (("nash_md", "--preference.name=panel", "--lora.rank=2", "--nash_md.ema=0.5"), 64, "lora.rank"),
  (("online_dpo",), 64, "--reward.path"),
  (("online_dpo", "--sampling.samples_per_prompt=1"), 64, "samples_per_prompt"),
  (("rest", "--reward.name=gold"), 64, "--init_from"),
  (("rest", "--reward.name=gold", "--rest.quantiles=0.9,0.99"), 64, "rest.quantiles"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "code", "message"), BAD_FLAGS, ids=lambda x: str(x)[:40])
def test_bad_input_is_refused_in_words(command, code, message, tmp_path, run_script):
  script, *flags = command
  finished = run_script(script, tmp_path / "run", *flags)
  assert finished.code == code, finished.output
  assert "Traceback" not in finished.output
  assert message in finished.output


def test_a_model_that_the_mesh_does_not_divide_is_refused(tmp_path, run_script, sft_run):
  flags = (f"--init_from={sft_run}", "--mesh=fsdp:2")
  finished = run_script("sft", tmp_path / "run", *flags, devices=2)
  assert finished.code == 64, finished.output
  assert "Traceback" not in finished.output
  assert "--mesh: dimension 0 of embed/embedding has size" in finished.output


def test_a_bad_row_is_named_before_anything_is_compiled(tmp_path, run_script):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": 3}\n')
  finished = run_script("sft", tmp_path / "run", f"--data.path={path}")
  assert finished.code == 65, finished.output
  assert "rows.jsonl:2" in finished.output
  assert "response" in finished.output
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_run_is_refused(tmp_path, run_script, sft_run):
  finished = run_script("sft", sft_run, "--optim.learning_rate=0.5")
  assert finished.code == 78, finished.output
  assert "learning_rate" in finished.output


@pytest.mark.parametrize("rewards", [{}, {"reward": 1.0, "gold": 2.0}], ids=["none", "two"])
def test_answers_side_by_side_with_and_without_a_reward(rewards):

  values = {name: np.array([value]) for name, value in rewards.items()}
  one = np.ones(1)
  samples = evaluating.Samples(["p"], ["r"], values, kl=one, lengths=one, ended=one)
  (row,) = evaluating.side_by_side(samples, samples)
  assert row["start"] == row["trained"] == ("r  [gold 2.00]" if rewards else "r")
