"""The table of a script: its data sets, references and identity."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from experiments.lab import evaluating, models, workbench
from rlhf_jax import checkpoint, data, rewards, simulation, workdir
from rlhf_jax.flags import UsageError


def test_further_data_sets_are_part_of_the_identity(open_bench, tmp_path):
  extra = {"ptx": ("demonstrations", "")}
  bench = open_bench("ppo_max", "prompts", "--reward.name=gold", "--steps=6", extra=extra)
  assert bench.train_set.kind == "prompts"
  assert bench.extra["ptx"].kind == "demonstrations"
  identity = json.loads((tmp_path / "run" / "identity.json").read_text())
  assert identity["ptx data"] == bench.extra["ptx"].digest


@pytest.mark.parametrize(
  "prompts",
  [("--data.path={prompts}", "--data.rows=7"), ("--data.rows=7", "--data.split=shift")],
)
def test_a_further_file_is_read_whole_whatever_the_prompts_are(open_bench, tmp_path, prompts):
  files = {"prompts": tmp_path / "prompts.jsonl", "ptx": tmp_path / "demonstrations.jsonl"}
  for path in files.values():
    rows = simulation.demonstrations("train", 30, 0)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  words = (flag.format(**files) for flag in prompts)
  extra = {"ptx": ("demonstrations", str(files["ptx"]))}
  bench = open_bench(
    "ppo_max",
    "prompts",
    "--reward.name=gold",
    "--steps=6",
    *words,
    f"--ptx_path={files['ptx']}",
    extra=extra,
  )
  assert len(bench.train_set.examples) <= 7
  assert len(bench.extra["ptx"].examples) == 30


def test_a_warm_up_of_the_critic_is_shorter_than_the_epochs(open_bench, tmp_path):
  flags = ("--reward.name=gold", "--data.rows=40", "--batch_size=8")
  message = "--critic.warmup=5 takes all 5 steps of --epochs=1 over 40 rows"
  with pytest.raises(UsageError, match=message):
    open_bench("ppo_max", "prompts", *flags, "--epochs=1", "--critic.warmup=5")
  assert not (tmp_path / "run" / "flags").exists()
  bench = open_bench("ppo_max", "prompts", *flags, "--epochs=20", "--critic.warmup=50")
  assert bench.config.steps == 100


@pytest.mark.parametrize("packed", [0, 64])
def test_held_out_responses_may_be_longer_than_those_trained_on(packed):
  def rows(length):
    example = {"prompt": np.ones(30, np.int32), "response": np.ones(length, np.int32)}
    return data.from_examples("demonstrations", [example] * 4, [{"prompt_text": ""}] * 4)

  train_set = rows(3)._replace(scored=rows(40).scored)  # Shared with the held-out set.
  config = types.SimpleNamespace(data=data.DataConfig(packed_length=packed))
  scored = workbench.scored_tokens(config, [train_set])
  assert scored >= 40
  if packed:
    assert scored >= data.packed_scored(train_set, packed)


def test_a_workdir_is_for_one_run_at_a_time(open_bench):
  open_bench("sft", "demonstrations")
  with pytest.raises(workdir.LockedError):
    open_bench("sft", "demonstrations")


def test_references_of_all_rows_in_their_order(open_bench):
  flags = ("--data.eval_rows=8", "--batch_size=6", "--steps=99", "--nodata.share_prompts")
  bench = open_bench("dpo", "preferences", *flags)

  def first_token(params, batch):
    assert params is bench.start
    return batch.tokens[:, :, 0]

  train, heldout = bench.references(first_token)
  for dataset, column in ((bench.train_set, train), (bench.heldout, heldout)):
    expected = [[example["prompt"][0]] * 2 for example in dataset.examples]
    np.testing.assert_array_equal(column, expected)
  empty = bench._replace(heldout=bench.heldout._replace(examples=[], rows=[]))
  assert empty.references(first_token)[1] is None


def test_a_run_that_goes_on_reads_the_references_that_it_has(open_bench):
  flags = ("--data.rows=48", "--batch_size=6", "--steps=2", "--nodata.share_prompts")
  bench = open_bench("dpo", "preferences", *flags)
  bench = bench._replace(heldout=bench.heldout._replace(examples=[], rows=[]))
  read = []

  def lengths(params, batch):
    read.extend(batch.tokens.tolist())
    return batch.mask.sum(axis=-1)

  expected = [bench.references(lengths)[0] for _ in range(2)]
  assert len(read) == 24  # Without a checkpoint nothing has been trained with them.
  with checkpoint.Checkpointer(bench.run.workdir / "checkpoints") as saver:
    saver.save(2, {"state": {"x": np.zeros(1, np.float32)}}, {})
  expected.append(bench.references(lengths)[0])
  assert len(read) == 24
  for other in expected[1:]:
    np.testing.assert_array_equal(expected[0], other)
  longer = bench._replace(config=dataclasses.replace(bench.config, steps=4))
  more, _ = longer.references(lengths)
  assert len(read) == 36 and np.isfinite(more).all(axis=1).sum() == 24
  known = np.isfinite(expected[0])
  np.testing.assert_array_equal(more[known], expected[0][known])


@pytest.mark.parametrize("rows", [1, 5, 7, 8])
def test_held_out_metrics_see_every_row_once_and_all_at_once(open_bench, rows):
  bench = open_bench("dpo", "preferences", "--eval_every=0", "--batch_size=7")
  bench = bench._replace(heldout=bench.heldout._replace(examples=bench.heldout.examples[:rows]))
  trainer = type("Trainer", (), {"params": staticmethod(lambda state: state)})

  def measure(params, batch):
    return [params * batch.mask[:, 0].sum(axis=-1)], {"both": batch.mask.sum(axis=-1)}

  def summarize(measured):
    (lengths,), both = measured
    assert both["both"].shape == (rows, 2)
    metrics = {"length": np.max(lengths), "missing": np.nan, "tokens": 1.0, "weight/length": 2.0}
    return np.median(lengths), metrics

  evaluate = bench.evaluator(trainer, measure, summarize, lambda: pytest.fail("opens the judge"))
  lengths = [2 * len(example["chosen"]) for example in bench.heldout.examples]
  want = {"eval/loss": np.median(lengths), "eval/length": max(lengths)}
  assert evaluate(2.0, 3) == want
  undefined = bench.evaluator(trainer, measure, lambda measured: (np.nan, {}))
  assert np.isnan(undefined(2.0, 3)["eval/loss"])
  empty = bench._replace(heldout=bench.heldout._replace(examples=[]))
  assert empty.evaluator(trainer, measure, summarize)(2.0, 3) == {}


def test_win_rates_are_between_independent_samples(open_bench):
  """A policy meets itself as it would meet another one; its checkpoints share random numbers."""
  bench = open_bench("sft", "demonstrations", "--sampling.max_new_tokens=4")

  def reward_of(prompts):
    del prompts
    return lambda rollout, ids: np.sin(rollout.tokens).sum(axis=1)

  judge = bench.judge(reward_of)
  bench.run.writer.open(resume_step=0, config={})
  again = judge.measure(bench.start, 2)["eval/reward"]
  summary = judge.finish(bench.start, 1, "policy")
  assert again == summary["reward/mean"] != summary["reward/mean_before"]
  assert 0 < summary["reward/win_rate"] < 1 and summary["reward/win_rate"] != 0.5


@pytest.fixture
def named(tmp_path):
  rows = simulation.preferences("train", 60, 0)
  for name, part in (("a", rows[:40]), ("b", rows[40:45]), ("c", rows[45:])):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
  files = {name: tmp_path / f"{name}.jsonl" for name in "abc"}
  sets = f"--data.eval_sets=b={files['b']},c={files['c']}"
  return f"--data.path={files['a']}", "--data.eval_fraction=0.3", sets


def test_named_sets_have_metrics_of_their_own(open_bench, named):
  bench = open_bench("dpo", "preferences", *named)
  trainer = type("Trainer", (), {"params": staticmethod(lambda state: state)})
  _, refs = bench.references(lambda params, batch: batch.mask.sum(axis=-1))
  sets = {"eval": bench.heldout} | {f"eval/{n}": of for n, of in bench.heldout.named.items()}
  assert [*sets] == ["eval", "eval/b", "eval/c"]

  def summarize(rows, refs):
    np.testing.assert_array_equal(rows, refs)
    return np.mean(rows), {"rows": float(len(rows))}

  evaluate = bench.evaluator(
    trainer, lambda params, batch: batch.mask.sum(axis=-1), summarize, refs=refs
  )
  values = evaluate(0, 1)
  for prefix, of in sets.items():
    assert values[f"{prefix}/rows"] == len(of.examples)
    lengths = [[len(e["chosen"]), len(e["rejected"])] for e in of.examples]
    assert values[f"{prefix}/loss"] == np.mean(lengths)
  assert len(values) == 6


def test_prompts_of_named_sets_are_judged(open_bench, named, monkeypatch):
  bench = open_bench("grpo", "prompts", *named, "--reward.name=gold")

  def scorer(model, prompts, *args, reward_fns, **options):
    rewards = {"reward": reward_fns["reward"] + np.arange(len(prompts.examples))}
    return lambda answers: evaluating.Samples([], [], rewards, *np.ones([3, 2]))

  monkeypatch.setattr(evaluating, "heldout_responder", lambda *args: lambda *of: [])
  monkeypatch.setattr(evaluating, "heldout_scorer", scorer)
  monkeypatch.setattr(evaluating, "sample_rows", lambda samples: [])
  judge = bench.judge(lambda prompts: 100 * len(prompts.examples))
  bench.run.writer.open(resume_step=0, config={})
  sets = {"eval": bench.heldout} | {f"eval/{n}": of for n, of in bench.heldout.named.items()}
  counts = {prefix: len(of.examples) for prefix, of in sets.items()}
  want = {f"{prefix}/reward": 100 * n + (n - 1) / 2 for prefix, n in counts.items()}
  assert judge.measure(bench.start, 2) == want | {f"{prefix}/kl": 1.0 for prefix in sets}


def test_each_policy_answers_the_held_out_prompts_once(open_bench, monkeypatch):
  def longer(prompts, a, b, rows):
    return [0.5 + (len(x) - len(y)) / 1000 for x, y in zip(a, b, strict=True)]

  monkeypatch.setitem(rewards.PREFERENCES, "longer", longer)
  bench = open_bench("nash_md", "prompts", "--preference.name=longer", "--data.eval_rows=24")
  make_sampler, answered = models.make_sampler, []

  def counted(*args):
    generate = make_sampler(*args)

    def call(params, *of_batch):
      answered.append(params)
      return generate(params, *of_batch)

    return call

  monkeypatch.setattr(models, "make_sampler", counted)
  judge = bench.judge(prefer_of=bench.open_preference(), batch_size=8)
  bench.run.writer.open(resume_step=0, config={})
  trained, opponent = (jax.tree.map(lambda x, by=by: by * x, bench.start) for by in (1.1, 5))
  judge.measure(trained, 2)
  over = judge.preference(trained, 2, opponent)
  summary = judge.finish(trained, 2, "Nash-MD")
  assert len(answered) == 3 * 3  # Batches of the policy, its opponent and the start.
  assert summary["preference/win_rate"] != over.value
  prefer = bench.open_preference()(bench.heldout)
  respond = evaluating.heldout_responder(
    bench.run, bench.model, bench.heldout, bench.tokenizer, bench.config.sampling
  )
  answers = respond(trained, 0), respond(bench.start, evaluating.BASELINE)
  rate = evaluating.preferences(prefer, *answers).mean()
  assert summary["preference/win_rate"] == pytest.approx(rate, abs=1e-6)


@pytest.mark.parametrize(
  ("flags", "steps"),
  [(("--epochs=2",), 10), (("--epochs=0.5",), 3), (("--epochs=1e-3",), 1)],
)
def test_epochs_are_another_way_to_say_steps(open_bench, flags, steps, tmp_path, capfd):
  words = ("--steps=540", "--data.rows=40", "--batch_size=8", *flags)
  bench = open_bench("sft", "demonstrations", *words)
  assert (bench.config.steps, bench.config.epochs) == (steps, 0)
  assert f"over 40 rows: {steps} steps" in capfd.readouterr().err
  assert f"--steps={steps}\n" in (tmp_path / "run" / "flags").read_text()


def test_epochs_of_packed_rows(open_bench):
  bench = open_bench(
    "sft",
    "demonstrations",
    "--steps=540",
    "--epochs=3",
    "--batch_size=2",
    "--data.packed_length=96",
  )
  one = bench.batches(epochs=1, packed_length=96)
  assert bench.config.steps == 3 * sum(1 for _ in one) > 0
