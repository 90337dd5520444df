"""Every training script: what it writes, that it resumes bitwise, and how it refuses."""

import importlib
import json
import math
import os
import pathlib
import re
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments import evaluate, generate
from experiments.lab import models, plans
from launch.space import load_space
from rlhf_jax import loop, writers
from rlhf_jax.data import DataConfig, word_level_tokenizer
from rlhf_jax.flags import UsageError
from rlhf_jax.generation import SamplingConfig
from rlhf_jax.models import build, hf
from tests.experiments.small_runs import METHODS, SETTINGS, judges_of, whole_runs
from tests.testing import full, read_configs, refusal, wait_for

STEPS = 6


@pytest.fixture(scope="session")
def flags_of(sft_run, reward_run, teacher_run):
  """`flags_of(script)`: flags that put a training script behind those before it."""

  def flags(script) -> list[str]:
    given = [f"--steps={STEPS}", "--checkpoint_every=3", "--log_every=1"]
    runs = {"reward": reward_run, "sft": sft_run, "teacher": teacher_run}
    given += [word.format(**runs) for word in SETTINGS.get(script, ())]
    if script != "sft":
      given.append(f"--init_from={sft_run}")
    if not any(word.startswith(("--reward.", "--preference.")) for word in given):
      names = {"reward": "gold", "preference": "expert"}
      given += [f"--{judge}.name={names[judge]}" for judge in judges_of(script)[:1]]
    return given

  return flags


def saved_3(walked):
  """Returns whether a folder, as `os.walk` gives it, is that of a run whose third step is saved."""
  folder, _, files = walked
  path = pathlib.Path(folder, "checkpoints.json")
  return path.name in files and json.loads(path.read_text())["newest"] == 3


@pytest.fixture(scope="session")
def whole(shared_root, shared_run, flags_of):
  """`whole(script)`: workdir of a run that nothing stops; see `middle` and `compiled`."""

  def run(script) -> pathlib.Path:
    name, write = f"whole_{script}", writers.RunWriter.write
    functions = []

    def listen(event, _, **about):
      if event.endswith("backend_compile_duration"):
        functions.append(about.get("fun_name", ""))

    def write_and_copy(writer, step, scalars):
      write(writer, step, scalars)
      if step == 3:
        functions.append("later:")
      elif step == STEPS - 1:  # Written after the last step and before its evaluation.
        compiled(shared_root / name).write_text(json.dumps(functions))
      copy = middle(shared_root / name)
      if step == 4 and not copy.exists():
        # The checkpoint is written while the run goes on.
        # Folders may go while they are searched, which `os.walk` does not mind.
        wait_for(lambda: any(map(saved_3, os.walk(shared_root / name))), 60)
        shutil.copytree(shared_root / name, copy)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      with mock.patch.object(writers.RunWriter, "write", write_and_copy):
        return shared_run(name, script, *flags_of(script))
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)

  return run


def middle(workdir):
  """Copy of the workdir of a whole run as a kill in its fifth step would leave it."""
  return workdir.with_name(f"{workdir.name}.middle")


def compiled(workdir):
  """File with the functions that a whole run compiled; those of its last steps are `later:`."""
  return workdir.with_name(f"{workdir.name}.compiled.json")


def lines_of(workdir):
  """Lines of metrics.jsonl without times."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [{k: v for k, v in row.items() if "second" not in k and "time/" not in k} for row in lines]


def assert_same_end(workdir, whole):
  assert lines_of(workdir) == lines_of(whole)
  for name in ("export/model.safetensors", "summary.json"):
    assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("script", whole_runs(METHODS))
def test_a_run_that_stopped_ends_with_the_same_bits(
  script, tmp_path, flags_of, whole, start_here, capsys
):
  expected = whole(script)
  shutil.copytree(middle(expected), tmp_path / "run")
  assert not (tmp_path / "run" / "export").exists()
  start_here(script, tmp_path / "run", *flags_of(script))
  shown = capsys.readouterr().err
  assert "continuing from step 3" in shown
  assert f"\n{'improve' if script == 'rest' else script}: step 4/{STEPS}" in shown
  assert ("\n  judge: " in shown) == hasattr(plans.script_of(script).Config, "judge")
  assert_same_end(tmp_path / "run", expected)


@pytest.mark.slow
@pytest.mark.parametrize("script", whole_runs(METHODS))
def test_a_run_writes_what_the_next_one_reads(script, whole, sft_run, repository):
  workdir = whole(script)
  files = ("flags", "metrics.jsonl", "summary.json", "identity.json", "run.json")
  for name in (*files, "export/README.md", "export/config.json", "export/tokenizer.json"):
    assert (workdir / name).stat().st_size > 0, name
  assert list((workdir / "plots").glob("*.png"))
  weights = [run / "export" / "model.safetensors" for run in (workdir, sft_run)]
  assert weights[0].read_bytes() != weights[1].read_bytes()
  for row in lines_of(workdir):
    assert all(map(math.isfinite, row.values())), row
  space = load_space(str(repository / "launch" / "spaces" / f"{script}.py"))
  assert space.metric in json.loads((workdir / "summary.json").read_text())
  session, config = read_configs(f"experiments.{script}", [f"--flagfile={workdir / 'flags'}"])
  assert (session.workdir, config.steps) == (str(workdir), STEPS)
  if hasattr(config, "sampling"):
    assert list((workdir / "samples").glob("step_*.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("script", whole_runs(METHODS))
def test_the_page_explains_what_a_run_writes(script, whole, repository):
  page = (repository / "experiments" / "README.md").read_text(encoding="utf-8")
  (left,) = re.findall(r"^## What a run leaves\n(.*?)\n\n## ", page, re.M | re.S)
  files = {path.name for path in whole(script).iterdir() if path.name[0] != "."}
  assert {name for name in files if not name.startswith(("grow_", "improve_"))} <= {
    *re.findall(r"`([\w.]+)`", left)
  }
  rows = map(json.loads, (whole(script) / "metrics.jsonl").read_text().splitlines())
  logged = {name for row in rows for name in row} - {"step"}
  summary = json.loads((whole(script) / "summary.json").read_text())
  for file, names in (("metrics.jsonl", logged), ("summary.json", summary)):
    (lines,) = re.findall(rf"^\| `{file}` \| meaning \|\n(.*?)\n\n", page, re.M | re.S)
    cells = [line.split("|")[1] for line in lines.splitlines()]
    known = [re.escape(name) for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    known = [name.replace(r"\.\.\.", ".+").replace("NAME", "[^/]+") for name in known]
    assert [name for name in names if not any(re.fullmatch(of, name) for of in known)] == []


@pytest.mark.slow
@pytest.mark.parametrize("script", whole_runs([name for name in METHODS if name != "rest"]))
def test_nothing_is_compiled_after_the_first_steps(script, whole):
  both = json.loads(compiled(whole(script)).read_text())
  functions = both[1 + both.index("later:") :]
  assert both[0] != "later:"  # What is compiled before is counted.
  if any(word.startswith("--rollout.packed_length") for word in SETTINGS.get(script, ())):
    functions = [name for name in functions if "step" not in name]  # For a new number of rows.
  assert functions == []


@pytest.mark.parametrize(
  "script",
  whole_runs([name for name in METHODS if hasattr(plans.script_of(name).Config(), "rollout")]),
)
def test_a_policy_gradient_starts_at_the_reference(script, whole):
  rows = lines_of(whole(script))
  assert abs(rows[0]["kl/ref"]) < 1e-4  # With adapters, too.
  assert abs(rows[-1]["kl/ref"]) > 1e-4  # The reference stays where it is.
  assert rows[0]["ratio/first_deviation"] < 1e-5
  names = {"reward/mean", "kl/ref", "entropy", "eos_fraction", "response_length/mean", "lr"}
  assert names <= rows[-1].keys()
  summary = json.loads((whole(script) / "summary.json").read_text())
  by_pairs = any(word.startswith("--preference.") for word in SETTINGS.get(script, ()))
  judged = "preference/win_rate" if by_pairs else "reward/mean"
  assert {"kl", "gold/mean", "gold/win_rate", judged} <= summary.keys()


def test_the_critic_of_ppo_max_learns_before_the_policy(whole):
  rows = lines_of(whole("ppo_max"))
  # Normalised, so that it starts without the scores of the reward model.
  assert rows[0]["value/explained_variance"] == pytest.approx(0, abs=1e-6)
  assert {"loss/value", "loss/ptx", "importance/mean"} <= rows[0].keys()
  assert [row["lr"] for row in rows[:3]] == [0.0, 0.0, pytest.approx(1e-3, rel=0.5)]
  assert abs(rows[2]["kl/ref"]) < 1e-4  # In the third iteration the policy still is the reference.
  assert rows[2]["importance/mean"] == pytest.approx(1, abs=1e-5)


def test_an_opponent_by_schedules(whole):
  rows = lines_of(whole("nash_md"))
  assert [row["mix"] for row in rows] == pytest.approx([0.25, 0.3, 0.35, 0.4, 0.45, 0.5])
  assert [row["tau"] for row in rows] == pytest.approx([0.01, 0.03, 0.05, 0.07, 0.09, 0.11])


@pytest.mark.parametrize("script", ["nash_md", "ipo_md"])
def test_a_match_starts_at_the_reference(script, whole):
  rows = lines_of(whole(script))
  assert 0 < rows[0]["preference/mean"] < 1
  assert abs(rows[0]["kl/ref"]) < 1e-4
  summary = json.loads((whole(script) / "summary.json").read_text())
  assert summary["preference/win_rate_low"] <= summary["preference/win_rate"]


def test_dpo_is_judged_while_it_learns(whole):
  rows = lines_of(whole("dpo"))
  summary = json.loads((whole("dpo") / "summary.json").read_text())
  assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # It starts as the reference.
  assert 0 < summary["eval/length_baseline"] < 1
  judged = [(row["step"], row["eval/gold"]) for row in rows if "eval/gold" in row]
  assert [step for step, _ in judged] == [3, 6]
  assert judged[-1][1] == pytest.approx(summary["gold/mean"], rel=1e-5)


def test_adapters_of_a_run_are_those_of_its_export(whole, sft_run):
  folder = whole("dpo") / "adapter"
  settings = json.loads((folder / "adapter_config.json").read_text())
  assert (settings["r"], settings["lora_alpha"]) == (4, 16.0)
  assert settings["base_model_name_or_path"] == str((sft_run / "export").resolve())
  assert models.model_folder(str(folder)) == folder
  config, _ = hf.parse_config(folder)
  got, want, base = (
    hf.load_params(of, build(config))
    for of in (folder, whole("dpo") / "export", sft_run / "export")
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
  moved = [x["attention"]["q"]["kernel"] for x in (got["layers"], base["layers"])]
  assert np.abs(np.subtract(*moved)).max() > 1e-5
  assert models.open_tokenizer(folder).digest == models.open_tokenizer(sft_run / "export").digest


def test_kto_on_pairs_as_single_responses(whole):
  rows = lines_of(whole("kto"))
  assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-4)  # It starts as the reference.
  summary = json.loads((whole("kto") / "summary.json").read_text())
  assert {"eval/loss", "eval/reward/chosen", "gold/win_rate", "kl"} <= summary.keys()


def test_a_student_learns_on_samples_of_either(whole):
  rows = lines_of(whole("gkd"))
  assert {row["student_share"] for row in rows} == {0.0, 1.0}
  assert all("gold_reward/mean" in row for row in rows if row["student_share"])
  assert all(("kl/teacher" in row) == bool(row["student_share"]) for row in rows)
  assert max(row["kl/teacher"] for row in rows if row["student_share"]) > 0
  summary = json.loads((whole("gkd") / "summary.json").read_text())
  assert {"gold/mean", "gold/mean_teacher", "gold/win_rate", "kl"} <= summary.keys()


def test_a_model_that_cannot_teach_is_refused(tmp_path, sft_run, reward_run, teacher_run):
  other = tmp_path / "other"
  shutil.copytree(teacher_run, other)
  word_level_tokenizer(["of", "another", "vocabulary"]).save(other)
  for folder, words in (
    (reward_run, "not a language model"),
    (other, "its vocabulary is not that of the student"),
  ):
    flags = (f"--init_from={sft_run}", f"--teacher={folder}", "--data.rows=64")
    code, message = refusal("gkd", f"--workdir={tmp_path / folder.name}_student", *flags)
    assert code == 78
    assert words in message


def test_a_judge_is_exported_with_a_scalar_head(whole):
  for script in ("reward_model", "preference_model"):
    config = json.loads((whole(script) / "export" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert 0 <= json.loads((whole(script) / "summary.json").read_text())["accuracy"] <= 1


def kill_and_continue(script, flags, tmp_path, run_script, kill_script, after_step, devices=1):
  """Runs a script, and again with a SIGKILL in between; returns the first run."""
  run = run_script(script, tmp_path / "whole", *flags, devices=devices)
  assert run.code == 0, run.output
  kill_script(script, tmp_path / "killed", *flags, after_step=after_step, devices=devices)
  again = run_script(script, tmp_path / "killed", *flags, devices=devices)
  assert again.code == 0, again.output
  assert "continuing from step" in again.output
  assert_same_end(again.workdir, run.workdir)
  return run


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path, run_script, kill_script):
  flags = ("--steps=12", "--checkpoint_every=3", "--log_every=1")
  kill_and_continue("sft", flags, tmp_path, run_script, kill_script, after_step=3)


@pytest.mark.slow
def test_samples_drawn_while_the_others_learn(tmp_path, run_script, kill_script, sft_run):
  """The policy waits for the critic, so that it first changes in the third iteration."""
  flags = (
    f"--init_from={sft_run}",
    "--reward.name=gold",
    "--mesh=data:2",
    "--rollout.devices=1",
    "--rollout.importance_cap=2",
    "--critic.warmup=2",
    "--lora.rank=4",
    "--optim.learning_rate=3e-3",
    "--steps=8",
    "--checkpoint_every=2",
  )
  run = kill_and_continue(
    "ppo_max", flags, tmp_path, run_script, kill_script, after_step=2, devices=3
  )
  rows = lines_of(run.workdir)
  assert [row["staleness"] for row in rows] == [0, 1, 1, 1, 1, 1, 1, 1]
  importance = np.array([row["importance/mean"] for row in rows])
  np.testing.assert_allclose(importance[:3], 1, atol=1e-5)
  assert (np.abs(importance[3:] - 1) > 1e-4).all()


@pytest.mark.slow
def test_the_chain(tmp_path, start_here):
  summary = start_here("rlhf", tmp_path / "rlhf")
  written = json.loads((tmp_path / "rlhf" / "summary.json").read_text())
  assert written == pytest.approx(summary, abs=1e-6)
  names = {"reward_model/accuracy", "sft/gold_reward", "ppo/gold_reward", "ppo/win_rate", "ppo/kl"}
  assert names <= set(summary)
  for stage in ("sft", "reward_model", "ppo"):
    assert (tmp_path / "rlhf" / stage / "export" / "config.json").exists()
    assert list((tmp_path / "rlhf" / "plots" / stage).glob("*.png"))


def test_a_best_response_and_who_beats_whom(tmp_path, start_here, sft_run):
  judge = "--preference.name=panel"
  best = (f"--init_from={sft_run}", f"--opponent={sft_run}", "--nash_md.mix=0", "--lora.rank=2")
  summary = start_here("nash_md", tmp_path / "best", judge, *best, "--steps=2")
  assert 0 <= summary["preference/over_opponent"] <= 1
  words = [f"--workdir={tmp_path / 'matrix'}", f"--policy={tmp_path / 'best'},{sft_run}", judge]
  words += [f"--baseline={sft_run / 'export'}", "--data.rows=64", "--data.eval_rows=8"]
  evaluate.evaluate(*read_configs("experiments.evaluate", [*words, "--sampling.max_new_tokens=8"]))
  rates = json.loads((tmp_path / "matrix/summary.json").read_text())["preference/win_rates"]
  for one, of in rates.items():
    assert len(of) == 2
    for other, rate in of.items():
      assert rate["value"] + rates[other][one]["value"] == pytest.approx(1.0)
      assert rate["low"] <= rate["value"] <= rate["high"]


@pytest.mark.parametrize("judge", ["reward", "preference"])
def test_a_reward_model_judges_the_pairs_of_online_dpo(
  judge, tmp_path, start_here, sft_run, reward_run
):
  flags = (f"--init_from={sft_run}", f"--{judge}.path={reward_run}", "--steps=2")
  start_here("online_dpo", tmp_path, *flags, "--batch_size=8", "--sampling.samples_per_prompt=4")
  rows = lines_of(tmp_path)
  assert len(rows) == 2 and all(0 <= row["ties"] < 1 for row in rows)
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    tokens = row["tokens_per_second"] * row["step_seconds"]  # Of all samples, not of the pairs.
    assert tokens == pytest.approx(8 * 4 * row["response_length/mean"], rel=1e-3)


@pytest.mark.parametrize("script", ["ppo", "online_dpo"])
def test_a_preference_model_scores_nothing(script, tmp_path, sft_run, preference_run):
  flags = (f"--init_from={sft_run}", f"--reward.path={preference_run}", "--data.rows=64")
  code, message = refusal(script, f"--workdir={tmp_path}", *flags)
  assert code == 78
  assert "a preference model" in message


def test_a_trained_policy_answers_and_is_judged(tmp_path, whole, sft_run):
  ppo, sampling = str(whole("ppo")), SamplingConfig(max_new_tokens=8, samples_per_prompt=3)
  prompt = "write a brief review of the film"
  config = generate.Config(ppo, prompt=prompt, sampling=sampling)
  rows = generate.generate(loop.Session(str(tmp_path / "generate")), config)
  assert [row["prompt"] for row in rows] == [prompt] * 3
  assert len({row["response"] for row in rows}) > 1
  config = evaluate.Config(
    (ppo,), str(sft_run), data=DataConfig(rows=64, eval_rows=8), sampling=sampling
  )
  summary = evaluate.evaluate(loop.Session(str(tmp_path / "evaluate")), config)
  assert {"gold/mean", "gold/win_rate", "kl"} <= summary.keys()


@full
def test_sft_on_a_mesh_of_eight_devices(tmp_path, start_here):
  flags = ("--mesh=data:2,fsdp:2,tensor:2", "--steps=2")
  assert 0 < start_here("sft", tmp_path, *flags, devices=8)["eval/loss"] < 20


GOLD, PANEL = "--reward.name=gold", "--preference.name=panel"


@full
@pytest.mark.parametrize(
  ("script", "flags"),
  [("ppo", ("--dense.path={dpo}", "--dense.scale=1", "--reward.name=sentences")), ("p3o", (GOLD,))],
)
def test_rewards_with_parts_and_pairs_on_a_mesh(
  script, flags, tmp_path, start_here, whole, sft_run
):
  flags = [flag.format(dpo=whole("dpo")) for flag in flags]
  flags += [f"--init_from={sft_run}", "--steps=3", "--rollout.packed_length=64", "--log_every=1"]
  rows = []
  for mesh, devices in (("data:1", 1), ("data:4", 4)):
    start_here(script, tmp_path / str(devices), *flags, f"--mesh={mesh}", devices=devices)
    rows.append(lines_of(tmp_path / str(devices)))
  for name in ("reward/mean", "kl/ref", "loss", "grad_norm"):
    one, many = ([row[name] for row in of] for of in rows)
    np.testing.assert_allclose(many, one, rtol=1e-3, atol=1e-4, err_msg=name)


START = "--init_from={sft}"
MAXMIN = ("--reward.path=a,b", "--reward.ensemble=worst_group")
BAD_FLAGS = [
  (("sft", "--steps=0"), 64, "--steps must be at least 1"),
  (("sft", "--optim.learning_rate=nan"), 64, "--optim.learning_rate=nan: must be a finite number"),
  (("sft", "--optim.learning_rate=-1"), 64, "--optim.learning_rate"),
  (("sft", "--optim.name=sgd"), 64, "--optim.name must be one of adamw"),
  (("sft", "--optim.name=lion", "--optim.b1=0.8"), 64, "--optim.b1 is not read by lion"),
  (("sft", START, "--optim.name=muon", "--lora.rank=2"), 64, "--optim.name=muon is for the"),
  (("sft", "stray"), 64, "stray"),
  (("sft", "--init_from=nowhere"), 78, "nowhere"),
  (("sft", "--init_from=any", "--model.preset=llama3_8b"), 64, "--model.preset"),
  (("sft", "--lora.rank=4"), 64, "--init_from"),
  (("sft", "--mesh=data:64"), 64, "--mesh"),
  (("sft", "--processes=2"), 64, "--coordinator"),
  (("dpo", "--dpo.loss=best"), 64, "--dpo.loss must be one of"),
  (("dpo", "--dpo.loss=nowhere:loss"), 64, "--dpo.loss=nowhere:loss"),
  (("dpo", "--dpo.loss=math:best"), 64, "has no function best"),
  (("dpo", "--dpo.loss=math:sqrt"), 64, "--dpo.loss=math:sqrt must take ("),
  (("dpo", "--pairs.length_alpha=2"), 64, "--pairs.length_alpha must be in [0, 1]"),
  (("simpo", "--simpo.loss=dpo"), 64, "--simpo.loss must be one of"),
  (("simpo", "--simpo.loss=cpo", "--simpo.margin=0.5"), 64, "--simpo.margin is not read by loss="),
  (("ppo", "--sampling.top_k=5", GOLD), 64, "top_k"),
  (("ppo", "--ppo.minibatches=3", GOLD), 64, "minibatches"),
  (("ppo",), 64, "--reward.path"),
  (("ppo", "--reward.name=best"), 64, "sentiment"),
  (("ppo", "--reward.name=nowhere:score"), 64, "--reward.name=nowhere:score"),
  (("ppo", START, "--reward.name=exact_answer"), 65, "answer: missing"),
  (("ppo", GOLD), 64, "--init_from is needed"),
  (("nash_md", PANEL), 64, "--init_from is needed"),
  (("ppo", GOLD, "--data.packed_length=64"), 64, "rollout.packed_length packs"),
  (("ppo", START, GOLD, "--rollout.packed_length=8"), 64, "--rollout.packed_length=8 is too short"),
  (("ppo", GOLD, "--rollout.devices=1"), 64, "set rollout.importance_cap"),
  (("ppo", START, GOLD, "--rollout.devices=8", "--rollout.importance_cap=2"), 64, "to learn with"),
  (("ppo", GOLD, "--rollout.importance_cap=-1"), 64, "--rollout.importance_cap must not be"),
  (("ppo_max", GOLD, "--critic.warmup=45"), 64, "--critic.warmup"),
  (("ppo_max", GOLD, "--ppo_max.ptx_coef=0", "--ptx_path=x"), 64, "--ptx_path is not read"),
  (("ppo_max", GOLD, "--data.path=x"), 64, "--ptx_path must name a file"),
  (("grpo", GOLD, "--grpo.average=best"), 64, "--grpo.average=best: must be one of responses"),
  (("grpo", GOLD, "--sampling.samples_per_prompt=1"), 64, "--sampling.samples_per_prompt must"),
  (("grpo", GOLD, "--shaping.reference_samples=2"), 64, "--shaping.reference_samples is not read"),
  (("grpo", GOLD, "--shaping.function=best"), 64, "--shaping.function must be one of par"),
  (
    (
      *("grpo", GOLD, "--shaping.function=par"),
      *("--rollout.devices=1", "--rollout.importance_cap=2"),
    ),
    64,
    "--rollout.devices does not go with shaping.function=par",
  ),
  (("p3o", GOLD, "--sampling.samples_per_prompt=3", "--batch_size=4"), 64, "must be even"),
  (("p3o", GOLD, "--rollout.importance_cap=2"), 64, "--rollout.importance_cap weighs tokens"),
  (("p3o", GOLD, "--p3o.minibatches=5"), 64, "--batch_size 32 * 1 does not split into 5"),
  (("pf_ppo", GOLD, "--pf_ppo.keep=worst"), 64, "--pf_ppo.keep=worst: must be one of best_worst"),
  (("pf_ppo", GOLD, "--pf_ppo.minibatches=3"), 64, "--batch_size 32 * 2 does not split"),
  (("pf_ppo", GOLD, "--sampling.samples_per_prompt=1"), 64, "--sampling.samples_per_prompt must"),
  (("ppo", GOLD, "--dense.scale=0"), 64, "--dense.scale must be positive"),
  (("ppo", GOLD, START, "--dense.path=nowhere"), 78, "nowhere"),
  (("ppo_max", GOLD, "--ppo_max.cut=word"), 64, "--ppo_max.cut=word: must be one of ngram"),
  (
    ("ppo_max", GOLD, "--ppo_max.cut=sentence", "--ppo_max.segment=2"),
    64,
    "--ppo_max.segment must",
  ),
  (("nash_md",), 64, "--preference.path"),
  (("nash_md", "--preference.name=nobody"), 64, "panel"),
  (("nash_md", PANEL, "--opponent=x", "--nash_md.ema=0.5"), 64, "opponent"),
  (("nash_md", PANEL, "--extragradient", "--nash_md.ema=0.5"), 64, "extragradient"),
  (("nash_md", PANEL, "--lora.rank=2", "--nash_md.ema=0.5"), 64, "lora.rank"),
  (("ipo_md", PANEL, "--sampling.samples_per_prompt=2"), 64, "--sampling.samples_per_prompt must"),
  (("ipo_md", PANEL, "--ipo_md.tau=0"), 64, "--ipo_md.tau must be positive"),
  (("online_dpo",), 64, "--reward.path"),
  (("online_dpo", GOLD, PANEL), 64, "give a reward or a preference"),
  (("online_dpo", "--sampling.samples_per_prompt=1"), 64, "samples_per_prompt"),
  (("online_dpo", PANEL, "--shaping.function=par"), 64, "--shaping.function must be empty"),
  (("online_dpo", GOLD, "--online.pick=best"), 64, "--online.pick must be one of"),
  (("gkd", START), 64, "--teacher is needed"),
  (("gkd", "--teacher=x"), 64, "--init_from is needed"),
  (("gkd", "--teacher=x", "--gkd.divergence=kl"), 64, "--gkd.divergence must be one of"),
  (
    ("gkd", "--teacher=x", "--gkd.divergence=forward_kl", "--gkd.mix=0.1"),
    64,
    "--gkd.mix is not read by divergence=forward_kl, only by jsd",
  ),
  (("rest", GOLD), 64, "--init_from"),
  (
    ("rest", GOLD, "--lora.rank=2", "--model.frozen_dtype=nf4"),
    64,
    "--model.frozen_dtype=nf4 does",
  ),
  (("rest", *MAXMIN), 64, "--reward.ensemble=worst_group chooses a group for each batch"),
  (
    ("grpo", *MAXMIN, "--rollout.redraws=1"),
    64,
    "--rollout.redraws joins the responses of several",
  ),
  (("rest", GOLD, "--rest.quantiles=0.9,0.99", "--prompts=16"), 64, "rest.quantiles"),
  (("rest", GOLD, "--rest.keep=all"), 64, "--rest.keep must be one of"),
  (("rest", GOLD, "--eval_every=10"), 64, "--eval_every=10 does not apply"),
  (("rest", GOLD, "--keep_best=eval/reward"), 64, "--keep_best=eval/reward does not apply"),
  *(
    ((name, "--sampling.samples_per_prompt=4"), 64, "--sampling.samples_per_prompt must be 1: held")
    for name in ("sft", "dpo", "simpo", "kto")
  ),
  (
    ("revise", "--judge.path=x", "--sampling.samples_per_prompt=4"),
    64,
    "--sampling.samples_per_prompt must be 1: each prompt is answered once",
  ),
]


@pytest.mark.parametrize(("command", "code", "message"), BAD_FLAGS, ids=lambda x: str(x)[:60])
def test_bad_flags_are_refused_in_words(command, code, message, tmp_path, request):
  script, *words = command
  if START in words:
    words[words.index(START)] = START.format(sft=request.getfixturevalue("sft_run"))
  given, said = refusal(script, f"--workdir={tmp_path / 'run'}", *words)
  assert given == code, said
  assert message in said
  assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("script", [name for name in METHODS if judges_of(name)])
def test_a_script_that_samples_asks_for_a_judge(script, tmp_path):
  code, message = refusal(script, f"--workdir={tmp_path}")
  assert code == 64
  assert all(f"--{judge}.path" in message for judge in judges_of(script))


# Functions of scripts without training steps, and the flags that they cannot do without.
STEPLESS = {
  "generate.generate": ("--init_from=x",),
  "evaluate.evaluate": ("--policy=x", "--baseline=x"),
  "merge.run_merge": ("--models=x,y",),
  "revise.revise": ("--judge.path=x",),
  "label.label": ("--annotator=x",),
  "label_page.label": (),
  "label_studio.exchange": (),
}


@pytest.mark.parametrize("function", STEPLESS)
@pytest.mark.parametrize(
  "flag",
  ["trackers=wandb", "hang_seconds=9", "grace_seconds=9", "replay_step=2", "profile_steps=2:3"],
)
def test_a_script_without_training_steps_refuses_flags_of_steps(function, flag, tmp_path):
  name, _, run = f"experiments.{function}".rpartition(".")
  words = [f"--workdir={tmp_path / 'run'}", *STEPLESS[function], f"--{flag}"]
  configs = read_configs(name, words)
  message = f"--{flag.partition('=')[0]} is for a script that trains; leave it out here"
  with pytest.raises(UsageError, match=message):
    getattr(importlib.import_module(name), run)(*configs)
  assert not (tmp_path / "run").exists()


BAD_COMMANDS = [
  (("sft", "--stesp=3"), 1, "steps"),
  (("sft", "--data.path=nowhere.jsonl"), 65, "nowhere.jsonl"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "code", "message"), BAD_COMMANDS, ids=lambda x: str(x)[:40])
def test_a_process_that_refuses_ends_with_the_code(command, code, message, tmp_path, run_script):
  script, *flags = command
  finished = run_script(script, tmp_path / "run", *flags)
  assert finished.code == code, finished.output
  assert "Traceback" not in finished.output
  assert message in finished.output


def test_a_model_that_the_mesh_does_not_divide_is_refused(tmp_path, sft_run):
  words = (f"--workdir={tmp_path}", f"--init_from={sft_run}", "--mesh=fsdp:3", "--data.rows=64")
  code, message = refusal("sft", *words, "--batch_size=6", devices=3)
  assert code == 64
  assert message.startswith("--mesh: dimension 1 of layers/attention/")


@pytest.mark.parametrize("devices", [(1, 2), pytest.param((2, 1), marks=full)])
def test_a_run_and_its_model_go_on_on_another_mesh(devices, tmp_path, start_here):
  """The built-in task has an odd number of ids, which `fsdp` does not divide."""
  run = tmp_path / "run"
  for steps, count in zip((2, 4), devices, strict=True):
    words = (f"--mesh=fsdp:{count}", f"--steps={steps}", "--checkpoint_every=2", "--log_every=1")
    start_here("sft", run, *words, devices=count)
  start_here("sft", tmp_path / "one", *words[1:])
  losses = [[row["loss"] for row in lines_of(folder)] for folder in (run, tmp_path / "one")]
  np.testing.assert_allclose(*losses, rtol=1e-4)
  words = (f"--init_from={run}", f"--mesh=fsdp:{devices[0]}", "--steps=2")
  start_here("reward_model", tmp_path / "next", *words, devices=devices[0])


def test_a_bad_row_is_named_before_anything_is_compiled(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": 3}\n')
  code, message = refusal("sft", f"--workdir={tmp_path / 'run'}", f"--data.path={path}")
  assert code == 65
  assert "rows.jsonl:2" in message and "response" in message
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_run_is_refused(sft_run):
  flags = [f"--flagfile={sft_run / 'flags'}", "--optim.learning_rate=0.5"]
  code, message = refusal("sft", *flags)
  assert code == 78
  assert "learning_rate" in message


def test_adapters_from_a_base_that_changed_are_refused(tmp_path, start_here, sft_run):
  base = tmp_path / "base"
  shutil.copytree(sft_run / "export", base)
  flags = (f"--model.path={base}", "--lora.rank=2", "--checkpoint_every=2")
  start_here("sft", tmp_path / "run", *flags)
  tensors = safetensors.numpy.load_file(base / "model.safetensors")
  name = next(iter(tensors))
  safetensors.numpy.save_file(tensors | {name: tensors[name] + 1}, base / "model.safetensors")
  words = [f"--flagfile={tmp_path / 'run' / 'flags'}", "--steps=8"]
  code, message = refusal("sft", *words)
  assert code == 78
  assert "files of --model.path was" in message
