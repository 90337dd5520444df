import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import user
from rlhf_jax.algorithms import given
from rlhf_jax.data import word_level_tokenizer
from rlhf_jax.models import ModelConfig, build
from rlhf_jax.rewards import (
  ENSEMBLES,
  Parts,
  columns,
  constrained_reward,
  ensemble_reward,
  model_reward,
  response_texts,
  text_reward,
  weighted_reward,
)
from rlhf_jax.types import Rollout, TokenBatch

WORDS = ("the", "soup", "was", "good", "bad", ".")  # Ids 4 to 9, behind pad, bos, eos, unk.
TOKENIZER = word_level_tokenizer(WORDS)
BOS, EOS = 1, 2


def make_rollout(prompts, responses, prompt_length=4, length=5, padding=0):
  """Left-padded prompts and right-padded responses; `padding` is the id of padded positions."""
  batch = len(prompts)
  tokens = np.full((batch, prompt_length + length), padding, np.int32)
  prompt_mask, response_mask = np.zeros((2, *tokens.shape), bool)
  for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
    at = slice(prompt_length - len(prompt), prompt_length)
    tokens[i, at], prompt_mask[i, at] = prompt, True
    at = slice(prompt_length, prompt_length + len(response))
    tokens[i, at], response_mask[i, at] = response, True
  logprobs = np.zeros((batch, length), np.float32)
  return Rollout(*map(jnp.asarray, (tokens, prompt_mask, response_mask, logprobs)))


PROMPTS = [[BOS, 4, 5], [BOS, 6], [BOS, 4, 5, 6]]
RESPONSES = [[7, 9, EOS], [8, 4, 5, 6, 8], [EOS]]
ROWS = [{"prompt_text": f"prompt {i}", "answer": i} for i in range(10)]


def test_text_without_special_tokens_prompt_and_padding():
  expected = ["good .", "bad the soup was bad", ""]
  for padding in (0, 7):  # Padding is what the mask says, whatever its id.
    rollout = make_rollout(PROMPTS, RESPONSES, padding=padding)
    assert response_texts(rollout, TOKENIZER.batch_decode) == expected


def test_text_reward_gets_the_rows_of_its_prompts_in_order():
  seen = []

  def function(prompts, responses, rows):
    seen.append((prompts, responses, rows))
    return [row["answer"] + len(text) / 100 for row, text in zip(rows, responses, strict=True)]

  score = text_reward(function, ROWS, TOKENIZER.batch_decode)
  scores = score(make_rollout(PROMPTS, RESPONSES), np.array([7, 0, 7], np.int32))
  ((prompts, responses, rows),) = seen
  assert prompts == ["prompt 7", "prompt 0", "prompt 7"]
  assert responses == ["good .", "bad the soup was bad", ""]
  assert rows == [ROWS[7], ROWS[0], ROWS[7]]
  np.testing.assert_allclose(scores, [7.06, 0.20, 7.0])
  assert scores.dtype == np.float32
  # On device arrays of ids are as good.
  score(make_rollout(PROMPTS, RESPONSES), jnp.array([7, 0, 7]))
  assert seen[1] == seen[0]


@pytest.mark.parametrize(
  "value, shape",
  [([1.0, 2.0], r"\(2,\)"), (3.0, r"\(\)"), ([[1.0], [2.0], [3.0]], r"\(3, 1\)")],
)
def test_text_reward_must_give_one_number_per_response(value, shape):
  def careless(prompts, responses, rows):
    return value

  rollout, ids = make_rollout(PROMPTS, RESPONSES), np.arange(3)
  score = text_reward(careless, ROWS, TOKENIZER.batch_decode)
  with pytest.raises(ValueError, match=f"careless gave shape {shape} for 3"):
    score(rollout, ids)
  # A function that has no name.
  score = text_reward(functools.partial(careless), ROWS, TOKENIZER.batch_decode)
  with pytest.raises(ValueError, match=f"careless.* gave shape {shape} for 3"):
    score(rollout, ids)


@pytest.fixture(scope="module")
def reward_model():
  config = ModelConfig(
    vocab_size=10, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_width=24, init_std=0.3
  )
  model = build(config, "scalar")
  return model, jax.jit(model.init)(jax.random.key(0))


def test_model_reward_is_the_score_at_the_last_real_token(reward_model):
  model, params = reward_model
  apply = jax.jit(model.apply)
  expected = [
    apply(params, np.array([prompt + response]))[0, -1]
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
  ]
  assert np.ptp(expected) > 0.1
  score = model_reward(model.apply, params)
  for prompt_length, length, padding in ((4, 5, 0), (4, 5, 7), (9, 5, 3), (4, 11, 0)):
    rollout = make_rollout(PROMPTS, RESPONSES, prompt_length, length, padding)
    scores = score(rollout, np.arange(3))
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scores.shape == (3,) and scores.dtype == jnp.float32
  order = np.array([2, 0, 1])
  mixed = jax.tree.map(lambda x: x[order], rollout)
  np.testing.assert_allclose(score(mixed, order), np.array(expected)[order], atol=1e-5)


def test_model_reward_of_a_row_without_response_is_finite(reward_model):
  model, params = reward_model
  scores = model_reward(model.apply, params)(make_rollout([[], [BOS]], [[], []]), np.arange(2))
  np.testing.assert_array_equal(scores, [0.0, 0.0])


@pytest.mark.parametrize("left, right", [(0, 0), (4, 0), (0, 4), (3, 5)])
def test_model_reward_is_the_score_in_training_whatever_the_side_of_the_padding(
  reward_model, left, right
):
  model, params = reward_model
  rng = np.random.default_rng(3)
  rows, prompt, length = 6, 3, 9
  end = rng.integers(prompt + 1, length + 1, (rows, 1))
  mask = (np.arange(length) >= prompt) & (np.arange(length) < end)
  batch = TokenBatch(rng.integers(10, size=(rows, length)).astype(np.int32), mask)
  want = jax.jit(functools.partial(given.read_scores, model.apply))(params, batch)
  tokens = rng.integers(10, size=(rows, left + length + right)).astype(np.int32)
  prompt_mask, response_mask = np.zeros((2, *tokens.shape), bool)
  tokens[:, left : left + length] = batch.tokens
  prompt_mask[:, left : left + prompt] = True
  response_mask[:, left : left + length] = mask
  logprobs = np.zeros((rows, length + right - prompt), np.float32)
  rollout = Rollout(*map(jnp.asarray, (tokens, prompt_mask, response_mask, logprobs)))
  scores = model_reward(model.apply, params)(rollout, np.arange(rows))
  np.testing.assert_allclose(scores, want, atol=1e-5)


def judged(rule, coef, scores, ids):
  """Parts that an ensemble of the columns of `scores` gives the responses `ids`."""
  scorers = {f"m{i}": lambda rollout, ids, x=x: x[ids] for i, x in enumerate(scores)}
  return ensemble_reward(scorers, rule, coef)(make_rollout(PROMPTS, RESPONSES), ids)


@pytest.mark.parametrize("rule", ENSEMBLES)
def test_an_ensemble_reduces_the_scores_of_its_models(rule):
  scores = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  ids = np.array([4, 1, 1, 0])
  mean, least = scores.mean(axis=0), scores.min(axis=0)
  want = {
    "mean": mean,
    "min": least,
    "uwo": mean - 0.3 * scores.var(axis=0),  # Coste et al., 2023, eq. 4.
    "nominal_min": 0.3 * mean + 0.7 * least,
    "worst_group": scores[np.argmin(scores[:, ids].mean(axis=1))],
  }[rule]
  result = judged(rule, 0.3, scores, ids)
  np.testing.assert_allclose(result.scores, want[ids], rtol=1e-5, atol=1e-6)
  assert list(result.named) == ["m0", "m1", "m2"]
  np.testing.assert_array_equal([*result.named.values()], scores[:, ids])


@pytest.mark.parametrize("members", [2, 3, 5])
def test_rules_are_their_ends_bitwise(members):
  scores = np.random.default_rng(members).normal(size=(members, 64)).astype(np.float32)
  ids = np.arange(64)
  of = lambda rule, coef: np.asarray(judged(rule, coef, scores, ids).scores)  # noqa: E731
  np.testing.assert_array_equal(of("nominal_min", 1.0), of("mean", 0.5))
  np.testing.assert_array_equal(of("nominal_min", 0.0), of("min", 0.5))
  np.testing.assert_array_equal(of("uwo", 0.0), of("mean", 0.5))
  single = [judged(rule, 0.5, scores[:1], ids).scores for rule in ENSEMBLES]
  np.testing.assert_array_equal(single, [scores[0]] * len(ENSEMBLES))


def test_the_worst_group_is_that_of_the_batch_not_of_a_response():
  """MaxMin: a response that the other group dislikes more keeps the score of the worst one."""
  scores = np.float32([[1, -5, 1, 3], [-1, 0, -1, -3], [2, np.nan, 9, 9]])
  ids = np.arange(4)
  result = judged("worst_group", 0.5, scores, ids)
  np.testing.assert_array_equal(result.scores, [-1, np.nan, -1, -3])
  assert not np.array_equal(judged("min", 0.5, scores, ids).scores, result.scores)
  # Row 1 counts for no group: with it the first group would be the worst one.
  result = judged("worst_group", 0.5, scores[:2], ids)
  np.testing.assert_array_equal(result.scores, scores[1])


# Members of `worst_group` are groups with other tastes, not noisy copies of one.
@pytest.mark.parametrize("rule", [rule for rule in ENSEMBLES if rule != "worst_group"])
def test_an_ensemble_beats_its_member_at_equal_proxy_effort(rule):
  """Best of 64 by four noisy linear rewards, and by one of them: gold reward of the choice."""
  rng = np.random.default_rng(7)
  gold = rng.normal(size=8).astype(np.float32)
  members = gold + 1.5 * rng.normal(size=(4, 8)).astype(np.float32)
  candidates = rng.normal(size=(400, 64, 8)).astype(np.float32)
  flat = candidates.reshape(-1, 8)
  scores = judged(rule, 0.3, members @ flat.T, np.arange(len(flat))).scores

  def gold_of(scores):
    best = np.argmax(np.reshape(scores, (400, 64)), axis=1)
    return float(np.mean(candidates[np.arange(400), best] @ gold))

  singles = [gold_of(flat @ member) for member in members]
  assert gold_of(scores) > np.mean(singles) + 0.3


def test_rewards_are_added_with_weights_and_kept_by_name():
  ids = np.arange(3)
  given = {
    "model": lambda rollout, ids: jnp.float32([1, 2, 4]),
    "rule": lambda rollout, ids: np.float32([1, np.nan, 0]),
    "dense": lambda rollout, ids: Parts(
      np.float32([0, 0, 1]), np.ones((3, 5), np.float32), np.array([True, False, True])
    ),
  }
  result = weighted_reward(given, [1, -2, 0.5])(make_rollout(PROMPTS, RESPONSES), ids)
  np.testing.assert_array_equal(result.scores, [-1, np.nan, 4.5])
  np.testing.assert_array_equal(result.tokens, np.full((3, 5), 0.5))
  np.testing.assert_array_equal(result.satisfied, [True, False, True])
  assert list(result.named) == ["model", "rule", "dense"]
  np.testing.assert_array_equal(result.named["rule"], [1, np.nan, 0])
  np.testing.assert_array_equal(result.named["dense"], [5, 5, 6])
  assert list(columns(result, "r")) == ["r", "r/model", "r/rule", "r/dense"]
  np.testing.assert_array_equal(columns(result)["reward"], [1.5, np.nan, 7])
  both = weighted_reward({"sum": lambda *_: result, "again": given["dense"]}, [1, 1])
  joined = both(make_rollout(PROMPTS, RESPONSES), ids)
  assert list(joined.named) == ["model", "rule", "dense", "again"]
  np.testing.assert_array_equal(joined.satisfied, [True, False, True])


def test_constraints_judge_and_change_no_score():
  def short(prompts, responses, rows):
    assert [row["answer"] for row in rows] == [7, 0, 7]
    return [len(response) < 10 for response in responses]

  def of_prompt(prompts, responses, rows):
    return np.array([prompt == "prompt 7" for prompt in prompts])

  reward = lambda rollout, ids: jnp.float32([3, 1, 2])  # noqa: E731
  options = ROWS, TOKENIZER.batch_decode
  rollout, ids = make_rollout(PROMPTS, RESPONSES), np.array([7, 0, 7])
  for constraints, want in (([short], [1, 0, 1]), ([of_prompt, short], [1, 0, 1])):
    result = constrained_reward(reward, constraints, *options)(rollout, ids)
    np.testing.assert_array_equal(result.satisfied, np.array(want, bool))
    np.testing.assert_array_equal(result.scores, [3, 1, 2])
  never = lambda prompts, responses, rows: [False] * 3  # noqa: E731
  inner = constrained_reward(reward, [never, short], *options)
  assert not inner(rollout, ids).satisfied.any()
  for bad in ([0.5, 1, 0], [np.nan, True, True]):
    wrong = constrained_reward(reward, [lambda *_, x=bad: x], *options)
    with pytest.raises(user.ResultError, match="constraint function .* must return True or False"):
      wrong(rollout, ids)
