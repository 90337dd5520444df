"""Judges that options name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.lab import judges, models, responses, workbench
from rlhf_jax import data, flags, processes, rewards
from rlhf_jax.rewards.shaped import ShapingConfig
from rlhf_jax.train_step import init_state
from tests.experiments.lab.rollouts import rollout_of
from tests.rewards.services import serving
from tests.testing import read_configs


@pytest.mark.parametrize("options", [judges.RewardOptions, judges.PreferenceOptions])
def test_one_judge_is_named(options):
  if options is judges.PreferenceOptions:
    with pytest.raises(ValueError, match="name and path are both given; keep one"):
      options(path="runs/rm", name="panel")
  with pytest.raises(ValueError, match="name must be one of"):
    options(name="nobody")
  assert not options().is_given
  with pytest.raises(flags.UsageError, match="path=DIR or --"):
    options().require()
  options(path="runs/rm").require()


def test_an_ensemble_is_a_list_of_folders():
  assert judges.RewardOptions(path="a,b,").paths == ("a", "b")
  assert judges.RewardOptions().paths == ()


@pytest.mark.parametrize(
  "options, message",
  [
    ({"path": "a,b,a"}, "^path names a twice"),
    ({"name": "gold,filler,gold"}, "^name names gold twice"),
    ({"name": "gold", "constraints": "finished,finished"}, "^constraints names finished twice"),
    ({"constraints": "finished"}, "^constraints judge responses that a reward pays for"),
    ({"name": "gold", "constraints": "polite"}, "^constraints must be one of finished, no_filler"),
    ({"name": "gold,nobody"}, "^name must be one of .*got 'nobody'"),
    ({"path": "a", "name": "gold", "weights": (1.0,)}, "^weights has 1 numbers for 2 rewards"),
    ({"name": "gold", "weights": (1.0, 2.0)}, "^weights has 2 numbers for 1 rewards"),
    ({"name": "gold", "weights": (float("nan"),)}, "^weights must be finite"),
    ({"path": "a,b", "weights": (1.0, 2.0), "ensemble": "min"}, "^weights add up .* keep one"),
    ({"path": "a", "ensemble": "uwo"}, "^ensemble=uwo needs several folders in path"),
    ({"name": "gold,filler", "ensemble": "min"}, "^ensemble=min needs several folders in path"),
    ({"path": "a,b", "ensemble": "median"}, "^ensemble must be one of mean, min, uwo, nominal_min"),
    ({"path": "a,b", "ensemble": "nominal_min", "ensemble_coef": 1.5}, "^ensemble_coef must be in"),
    ({"url": "http://host/v1"}, "^model must name the model of url"),
    ({"model": "tiny"}, "^model and key_variable are those of url"),
    ({"url": "host", "model": "tiny"}, "^url must be http://HOST/v1"),
    (
      {"url": "http://host/v1", "model": "m", "request_timeout": 0.0},
      "^request_timeout must be positive",
    ),
    (
      {"url": "http://host/v1", "model": "m", "weights": (1.0, 2.0)},
      "^weights has 2 numbers for 1",
    ),
  ],
  ids=str,
)
def test_rewards_that_do_not_add_up_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    judges.RewardOptions(**options)


class Model:
  """Reward model that gives each response the number of its folder."""

  def __init__(self, path):
    self.value = float(path.rpartition("_")[2])

  def apply(self, params, tokens, *, segment_ids):
    return jnp.full(tokens.shape, self.value)


MANY = [  # Flags, total of a response without filler, names.
  (["path=x/m_3,x/m_5"], 4.0, ["m_3", "m_5"]),
  (["path=x/m_3,x/m_5", "ensemble=min"], 3.0, ["m_3", "m_5"]),
  (["path=x/m_3,x/m_5", "ensemble=worst_group"], 3.0, ["group_0", "group_1"]),
  (["path=x/m_3,x/m_5", "weights=2,-1"], 1.0, ["m_3", "m_5"]),
  (["path=x/m_3,y/m_3", "weights=2,-1"], 3.0, ["x/m_3", "y/m_3"]),
  (["path=x/m_3,x/m_5", "name=filler"], 4.0, ["m_3", "m_5", "filler"]),
  (["path=x/m_3", "name=filler,gold", "weights=1,0.5,0"], 3.0, ["m_3", "filler", "gold"]),
  (["path=x/m_3", "weights=0.5"], 1.5, ["m_3"]),
  (["path=x/m_3"], 3.0, []),
]


def test_several_rewards_are_one(open_bench, monkeypatch):
  opened = lambda run, path, *_: models.Scorer(Model(path), {}, "", None)  # noqa: E731
  monkeypatch.setattr(judges.models, "open_reward_model", opened)
  bench = open_bench("grpo", "prompts", "--reward.name=gold")
  ids = bench.tokenizer.encode_responses(["i do not know what else to write .", "bad ."])
  rollout = rollout_of([*ids])
  for given, total, names in MANY:
    words = [f"--reward.{flag}" for flag in (*given, "constraints=no_filler")]
    words = ["--workdir=it", "--init_from=sft", *words]
    options = read_configs("experiments.grpo", words)[1].reward
    assert options.label == " ".join(w for w in words if "path=" in w or "name=" in w)
    reward_of = judges.open_reward(bench.run, options, bench.config.model, bench.tokenizer)
    result = rewards.parts_of(reward_of(bench.train_set)(rollout, np.array([0, 1])))
    np.testing.assert_array_equal(result.satisfied, [False, True])
    assert list(result.named or {}) == names
    filler = 0.5 if "weights=1,0.5,0" in given else float("name=filler" in given)
    np.testing.assert_allclose(result.scores, [total + filler, total])


def test_a_judge_at_an_address(open_bench):
  bench = open_bench("grpo", "prompts", "--reward.name=gold")
  texts = ["i do not know what else to write .", "what to write"]
  rollout = rollout_of(bench.tokenizer.encode_responses(texts))
  ids, opened = np.array([0, 1]), (bench.config.model, bench.tokenizer)

  def reply(text, nth):
    if "Response A" in text:
      return "A" if "know" in text.partition("[Response B]")[0] else "B"
    return "8" if "know" in text else "2"

  train_set = bench.train_set._replace(
    rows=[{**row, "context": "left out"} for row in bench.train_set.rows], ignored=("context",)
  )
  with serving(reply) as (url, seen, _):
    words = [f"--reward.url={url}", "--reward.model=tiny", "--reward.name=filler"]
    words = ["--workdir=it", "--init_from=sft", *words, "--reward.weights=2,0.5"]
    options = read_configs("experiments.grpo", words)[1].reward
    reward = judges.open_reward(bench.run, options, *opened)(train_set)
    assert judges.name_of(reward) == f"--reward.name=filler --reward.url={url}" and reward.remote
    result = rewards.parts_of(reward(rollout, ids))
    options = judges.PreferenceOptions(url=url, model="tiny")
    prefer = judges.open_preference(bench.run, options, *opened)(train_set)
    assert judges.name_of(prefer) == f"--preference.url={url}" and prefer.remote
    probabilities = prefer(rollout, rollout_of(bench.tokenizer.encode_responses(texts[::-1])), ids)
  np.testing.assert_allclose(result.scores, [6, 1])
  np.testing.assert_allclose(result.named["judge"], [8, 2])
  np.testing.assert_array_equal(probabilities, [1, 0])
  asked = "".join(body["messages"][0]["content"] for _, _, body in seen)
  assert all(row["prompt"] in asked for row in bench.train_set.rows[:2])
  assert "left out" not in asked


def test_process_0_asks_a_function_for_all(monkeypatch):
  monkeypatch.setattr(processes, "agree", lambda call: json.loads(json.dumps(call())))
  scores = lambda prompts, responses, rows: [0.1, float("nan")]  # noqa: E731
  given = rewards.ask(scores, ["", ""], ["a", "b"], rows=[{}, {}])
  np.testing.assert_array_equal(given, np.array([0.1, np.nan], np.float32))
  parts = lambda prompts, responses, rows: [[(1, 0.1), (2, 1)], []]  # noqa: E731
  np.testing.assert_allclose(rewards.ask(parts, ["", ""], ["ab", "b"], rows=[{}, {}]), [1.1, 0])
  monkeypatch.setattr(processes, "agree", lambda call: [[0.5, 0.25]])  # Those of process 0.
  refused = lambda prompts, responses, rows: 1 / 0  # noqa: E731
  np.testing.assert_array_equal(rewards.ask(refused, [""], ["a"], rows=[{}]), [0.5, 0.25])


def test_a_folder_with_the_name_of_a_metric_is_refused(open_bench):
  bench = open_bench("grpo", "prompts", "--reward.name=gold")
  for options, name in (
    (judges.RewardOptions(path="runs/rm,runs/std"), "std"),
    (judges.RewardOptions(path="runs/rm,runs/gold", name="filler,gold"), "gold"),
    (judges.RewardOptions(path="judge", url="http://host/v1", model="tiny"), "judge"),
  ):
    with pytest.raises(flags.UsageError, match=f"reward/{name} is another metric"):
      judges.open_reward(bench.run, options, bench.config.model, bench.tokenizer)


def test_the_gold_reward_is_that_of_the_built_in_task(open_bench):
  bench = open_bench("grpo", "prompts", "--reward.name=gold")
  (name,) = bench.gold(bench.train_set)
  assert name == "gold"
  config = data.DataConfig(path="prompts.jsonl")
  assert judges.gold_rewards(config, bench.train_set, bench.tokenizer) == {}


def test_a_reward_reads_the_rows_of_its_prompts(open_bench):
  bench = open_bench("grpo", "prompts", "--reward.name=gold")
  options = judges.RewardOptions(name="exact_answer")
  reward_of = judges.open_reward(bench.run, options, bench.config.model, bench.tokenizer)
  with pytest.raises(data.DataError, match="answer: missing"):
    reward_of(bench.train_set)
  rows = [{**row, "answer": "7"} for row in bench.train_set.rows]
  rollout = rollout_of(bench.tokenizer.encode_responses(["bad ."]))
  np.testing.assert_array_equal(reward_of(bench.train_set._replace(rows=rows))(rollout, [0]), [0])


def test_a_row_without_a_reference_is_refused_before_a_reward_is_paid(open_bench, tmp_path):
  """Wherever it is: by its line as prompts are read, and else as the reward is opened."""
  rows = [{"prompt": "write " * n, "answer": str(n)} for n in range(1, 31)]
  rows[20]["answer"] = "N/A"
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  words = ("--reward.name=exact_answer", f"--data.path={path}")
  with pytest.raises(data.DataError, match=r"rows\.jsonl:21: answer: no number.*data\.bad_rows$"):
    open_bench("grpo", "prompts", *words)
  bench = open_bench("grpo", "prompts", *words, "--data.bad_rows=1")
  reward_of = bench.open_reward()
  reward_of(bench.train_set)
  unread = bench.train_set._replace(rows=rows, checked=())
  unread.rows[20]["prompt_text"] = "how many"
  message = "^--reward.name=exact_answer: the row of the prompt 'how many': answer: no number"
  with pytest.raises(data.DataError, match=message):
    reward_of(unread)


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
  values[3] = np.nan  # A judge at an address may have a few of them in every batch.
  calls.clear()
  run = Sampled(bench, judge._replace(remote=True), monkeypatch)
  for _ in range(5):
    run()


def test_each_of_several_rewards_is_a_metric_and_is_named_when_it_fails(open_bench, monkeypatch):
  bench = open_bench("grpo", "prompts", "--reward.name=gold", "--batch_size=40")
  named = {"good": np.arange(40, dtype=np.float32), "my:bad": np.ones(40, np.float32)}
  satisfied = np.arange(40) >= 10
  judge = judges.Named(
    "--reward.name=good,my:bad",
    lambda rollout, ids: rewards.weighted_reward(
      {name: lambda *_, x=x: rewards.Parts(x, satisfied=satisfied) for name, x in named.items()},
      [1, -2],
    )(rollout, ids),
  )
  run = Sampled(bench, judge, monkeypatch)
  named["my:bad"][:2] = np.nan
  scored, _, metrics = run()
  assert (metrics["reward/good"], metrics["reward/my:bad"]) == (19.5, 1)
  assert np.isnan(scored.scores).sum() == 2
  assert responses.part_metrics(rewards.Parts(None, None, scored.satisfied)) == {
    "reward/violations": 0.25
  }
  named["my:bad"][:5] = np.inf
  with pytest.raises(
    rewards.UnusableScoresError, match=r"^--reward.name=good,my:bad \(my:bad\): 5"
  ):
    run()
  named["my:bad"][:] = np.nan
  alone = responses.means_by_name(rewards.Parts(None, named={"none": named["my:bad"]}))
  assert np.isnan(alone["reward/none"])


def test_judges_are_named_by_their_flags(open_bench):
  bench = open_bench("grpo", "prompts", "--preference.name=expert")
  named = bench.open_preference()(bench.train_set)
  assert judges.name_of(named) == "--preference.name=expert" and not named.remote
  known = named._replace(remote=True, groups=("group_0",))
  assert judges.like(known, min) == (named.name, min, True, ("group_0",))
  scores = bench.open_scores()
  assert judges.name_of(scores.score_of(bench.train_set)) == named.name
  assert scores.reward_of is None
  assert judges.name_of(lambda rollout, ids: 0) == "the judge"


def test_a_single_sample_meets_a_response_of_the_start(open_bench):
  """The same response each time, so that a run that is resumed goes on with the same bits."""
  bench = open_bench("ppo", "prompts", "--preference.name=expert", "--batch_size=4")
  score = bench.open_scores().score_of(bench.train_set)
  prompts = next(bench.batches())
  rollout = bench.sampler()(bench.reshard()(bench.start), *prompts, bench.run.key_for(9))
  ids = np.asarray(prompts.prompt_id)
  scores = np.asarray(score(rollout, ids))
  assert scores.shape == (4,) and ((scores >= 0) & (scores <= 1)).all()
  np.testing.assert_array_equal(score(rollout, ids), scores)
  anchors = bench.sampler()(bench.reshard()(bench.start), *prompts, bench.run.key_for(4))
  np.testing.assert_array_equal(score(anchors, ids), 0.5)
  swapped = bench.open_preference()(bench.train_set)(anchors, rollout, ids)
  np.testing.assert_allclose(scores + np.asarray(swapped), 1, atol=1e-6)


def test_a_preference_reads_both_texts(open_bench):
  bench = open_bench("nash_md", "prompts", "--preference.name=expert")
  prefer = bench.open_preference()(bench.train_set)
  ids = bench.tokenizer.encode_responses(["i loved the film .", "bad ."])
  good, bad = (rollout_of([tokens] * 2) for tokens in ids)
  wins = np.asarray(prefer(good, bad, np.array([0, 1])))
  losses = np.asarray(prefer(bad, good, np.array([0, 1])))
  assert wins.shape == (2,)
  np.testing.assert_allclose(wins + losses, 1, atol=1e-6)
