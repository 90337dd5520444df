"""Judges that options name."""

import jax
import numpy as np
import optax
import pytest

from experiments.lab import judges, pairing, responses, workbench
from rlhf_jax import data, flags, rewards
from rlhf_jax.rewards.shaped import ShapingConfig
from rlhf_jax.train_step import init_state
from tests.experiments.lab.rollouts import rollout_of


@pytest.mark.parametrize("options", [judges.RewardOptions, judges.PreferenceOptions])
def test_one_judge_is_named(options):
  with pytest.raises(ValueError, match="name and path are both given; keep one"):
    options(path="runs/rm", name="gold" if options is judges.RewardOptions else "panel")
  with pytest.raises(ValueError, match="name must be one of"):
    options(name="nobody")
  assert not options().is_given
  with pytest.raises(flags.UsageError, match="path=DIR or --"):
    options().require()
  options(path="runs/rm").require()


def test_an_ensemble_is_a_list_of_folders():
  assert judges.RewardOptions(path="a,b,").paths == ("a", "b")
  assert judges.RewardOptions().paths == ()


def test_the_gold_reward_is_that_of_the_built_in_task(open_bench):
  bench = open_bench("grpo", "prompts", "--reward.name=gold")
  (name,) = bench.gold(bench.train_set)
  assert name == "gold"
  config = data.DataConfig(path="prompts.jsonl")
  assert judges.gold_rewards(config, bench.train_set, bench.tokenizer) == {}


def test_a_reward_reads_the_rows_of_its_prompts(open_bench):
  bench = open_bench("grpo", "prompts", "--reward.name=exact_answer")
  with pytest.raises(Exception, match="answer: missing"):
    bench.open_reward()(bench.train_set)
  rows = [{**row, "answer": "7"} for row in bench.train_set.rows]
  bench.open_reward()(bench.train_set._replace(rows=rows))


def test_a_reward_is_not_tried_without_prompts(open_bench, monkeypatch):
  def refuses_nothing(prompts, responses, rows):
    return np.stack([np.float32(len(response)) for response in responses])

  monkeypatch.setitem(rewards.REWARDS, "gold", refuses_nothing)
  bench = open_bench("grpo", "prompts", "--reward.name=gold")
  bench.open_reward()(bench.train_set)
  bench.open_reward()(bench.heldout._replace(examples=[], rows=[]))


class Sampled:
  """Rollouts and scores of a `Responder` without a model."""

  def __init__(self, bench, score, monkeypatch):
    rollout = rollout_of([[1, 2]] * 40)
    monkeypatch.setattr(workbench.Workbench, "sampler", lambda self, **changes: lambda *_: rollout)
    monkeypatch.setattr(workbench.Workbench, "reshard", lambda self: lambda params: params)
    shaping = ShapingConfig(function="center")
    self.respond = responses.Responder(bench, lambda prompts: score, shaping)
    self.prompts = next(bench.batches())
    self.state = self.respond.init(init_state(bench.start, optax.sgd(1.0)), None)

  def __call__(self):
    return self.respond({}, self.state, self.prompts, jax.random.key(0))


def test_a_reward_that_is_no_number_stops_a_run(open_bench, monkeypatch):
  bench = open_bench("grpo", "prompts", "--reward.name=gold", "--batch_size=40")
  values = np.ones(40, np.float32)
  calls = []

  def score(rollout, ids):
    calls.append(1)
    return values if len(calls) % 2 else np.ones(40, np.float32)  # Every second is the reference.

  judge = judges.Named("--reward.name=my:score", score)
  run = Sampled(bench, judge, monkeypatch)
  values[3] = np.nan
  for _ in range(2):
    scored, _, _ = run()
    assert np.flatnonzero(np.isnan(scored.scores)).tolist() == [3]
  with pytest.raises(rewards.UnusableScoresError, match="^--reward.name=my:score: 3 batches in a"):
    run()
  calls.clear()
  values[:5] = -1e30
  with pytest.raises(rewards.UnusableScoresError, match="^--reward.name=my:score: 5 of 40 scores"):
    run()
  values[:] = 1
  calls.clear()
  run()


def test_judges_are_named_by_their_flags(open_bench):
  bench = open_bench("nash_md", "prompts", "--preference.name=expert")
  named = bench.open_preference()(bench.train_set)
  assert judges.name_of(named) == "--preference.name=expert"
  assert judges.name_of(pairing.tournament(lambda prompts: named, 2)(bench.train_set)) == named.name
  assert judges.name_of(lambda rollout, ids: 0) == "the judge"


def test_a_preference_reads_both_texts(open_bench):
  bench = open_bench("nash_md", "prompts", "--preference.name=expert")
  prefer = bench.open_preference()(bench.train_set)
  ids = bench.tokenizer.encode_responses(["i loved the film .", "bad ."])
  good, bad = (rollout_of([tokens] * 2) for tokens in ids)
  wins = np.asarray(prefer(good, bad, np.array([0, 1])))
  losses = np.asarray(prefer(bad, good, np.array([0, 1])))
  assert wins.shape == (2,)
  np.testing.assert_allclose(wins + losses, 1, atol=1e-6)
