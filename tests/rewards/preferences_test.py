import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import data, rewards, simulation
from rlhf_jax.data import DataConfig, word_level_tokenizer
from rlhf_jax.models import build
from rlhf_jax.types import Rollout
from tests.testing import TINY_MODEL as CONFIG
from tests.testing import tiny_params

WORDS = tuple(f"w{i}" for i in range(20))
TOKENIZER = word_level_tokenizer(WORDS)
EOS, P, R = TOKENIZER.eos_id, 5, 4


def rollout_of(prompts, responses, eos_id=EOS, end=True):
  """Left-padded prompts and right-padded responses, each with its end token if it fits."""
  tokens = np.full((len(prompts), P + R), 9, np.int32)  # Padding is what the mask says.
  prompt_mask, response_mask = np.zeros((2, *tokens.shape), bool)
  for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
    ids = [*response, eos_id][:R] if end else response
    tokens[row, P - len(prompt) : P], prompt_mask[row, P - len(prompt) : P] = prompt, True
    tokens[row, P : P + len(ids)], response_mask[row, P : P + len(ids)] = ids, True
  logprobs = np.zeros((len(prompts), R), np.float32)
  return Rollout(*map(jnp.asarray, (tokens, prompt_mask, response_mask, logprobs)))


def test_pairs_are_joined_as_the_data_set_has_them():
  """The preference model sees samples in the form it was trained on."""
  texts = [("w1 w2", "w3", "w4 w5"), ("w6", "w7 w8 w9", "w10"), ("w1 w2 w3", "w4", "w4 w4")]
  rows = [
    data.Row(f"row {i}", {"prompt": prompt, "chosen": a, "rejected": b})
    for i, (prompt, a, b) in enumerate(texts)
  ]
  dataset = data.from_rows("comparisons", rows, DataConfig(), TOKENIZER)
  ((batch, _),) = data.eval_batches(dataset, 3, TOKENIZER.pad_id)
  prompts = [example["prompt"].tolist() for example in dataset.examples]
  a, b = (
    rollout_of(prompts, [TOKENIZER.encode_text(text[side]) for text in texts]) for side in (1, 2)
  )
  tokens, mask = map(np.asarray, rewards.join_pairs(a, b, (EOS,)))
  for row in range(3):
    for order in range(2):
      want_mask = batch.mask[row, order]
      length = int(np.flatnonzero(want_mask)[-1]) + 1
      np.testing.assert_array_equal(tokens[row, order, :length], batch.tokens[row, order, :length])
      np.testing.assert_array_equal(mask[row, order, :length], want_mask[:length])
      assert not mask[row, order, length:].any()


def test_a_response_that_was_cut_gets_an_end():
  prompts, responses = [[5], [5]], [[6, 7, 8, 10], [6]]
  a, b = rollout_of(prompts, responses, end=False), rollout_of(prompts, responses)
  tokens, mask = map(np.asarray, rewards.join_pairs(a, b, (EOS,)))
  joined = tokens[0, 0][: mask[0, 0].sum() + 1].tolist()
  # The second one was cut by the longest length, so its end is added as well.
  assert joined == [5, 6, 7, 8, 10, EOS, 6, 7, 8, 10, EOS]
  assert tokens[1, 0][: mask[1, 0].sum() + 1].tolist() == [5, 6, EOS, 6, EOS]


def test_models_are_antisymmetric_and_rewards_compare():
  model = build(CONFIG, "scalar")
  params = tiny_params("scalar")
  rng = np.random.default_rng(0)
  a, b = (
    rollout_of([[5, 6]] * 6, rng.integers(3, CONFIG.vocab_size, (6, 2)).tolist(), eos_id=2)
    for _ in range(2)
  )
  ids = np.zeros(6, np.int32)
  judge = rewards.model_preference(model.apply, params, stop_ids=(2,))
  np.testing.assert_allclose(judge(a, b, ids) + judge(b, a, ids), 1.0, atol=1e-6)
  assert np.std(judge(a, b, ids)) > 1e-4
  score = rewards.model_reward(model.apply, params)
  compare = rewards.reward_preference(score)
  want = 1 / (1 + np.exp(np.asarray(score(b, ids)) - np.asarray(score(a, ids))))
  np.testing.assert_allclose(compare(a, b, ids), want, rtol=1e-5)


def test_functions_of_text():
  rows = [{"prompt_text": "w1"}, {"prompt_text": "w2"}]
  a = rollout_of([[5], [5]], [TOKENIZER.encode_text("w3"), TOKENIZER.encode_text("w4 w4")])
  b = rollout_of([[5], [5]], [TOKENIZER.encode_text("w5"), []])
  seen = []

  def judge(prompts, first, second, of_rows):
    seen.append((prompts, first, second, of_rows))
    return [0.2, 0.9]

  prefer = rewards.text_preference(judge, rows, TOKENIZER.batch_decode)
  np.testing.assert_allclose(prefer(a, b, np.array([1, 0])), [0.2, 0.9])
  assert seen == [(["w2", "w1"], ["w3", "w4 w4"], ["w5", ""], [rows[1], rows[0]])]
  for answer, message in (([0.5], "one probability per pair"), ([0.5, 1.5], "outside")):
    broken = rewards.text_preference(lambda *_, x=answer: x, rows, TOKENIZER.batch_decode)
    with pytest.raises(ValueError, match=message):
      broken(a, b, np.array([0, 1]))


def test_the_judges_of_the_built_in_task():
  rows = simulation.preferences("eval", 8, 0)
  prompts, a, b = ([row[name] for row in rows] for name in ("prompt", "chosen", "rejected"))
  for name in ("expert", "panel"):
    there, back = (
      np.asarray(rewards.PREFERENCES[name](prompts, *pair, rows)) for pair in ((a, b), (b, a))
    )
    np.testing.assert_allclose(there, simulation.preference_probability(name, prompts, a, b))
    np.testing.assert_allclose(there + back, 1.0)


def meets(a, b, ids):
  """Preference for the response whose first token is larger, by how much."""
  first, second = (np.asarray(rollout.tokens[:, P], np.float32) for rollout in (a, b))
  return 0.5 + (first - second) / 20


@pytest.mark.parametrize("samples", [2, 3])
def test_a_tournament_scores_by_the_mean_of_all_matches(samples):
  seen = []

  def prefer(a, b, ids):
    seen.append(list(ids))
    return meets(a, b, ids)

  first = np.array([[9, 6, 1], [1, 1, 9]])[:, :samples]
  responses = [[token] for token in first.ravel()]
  score = rewards.tournament_reward(prefer, samples)
  scores = score(rollout_of([[5]] * len(responses), responses), np.repeat([7, 8], samples))
  assert seen == [[7, 8]] * (samples * (samples - 1) // 2)
  expected = [
    np.mean([0.5 + (x - y) / 20 for j, y in enumerate(row) if j != i])
    for row in first
    for i, x in enumerate(row)
  ]
  np.testing.assert_allclose(scores, expected, atol=1e-6)
  # Two samples are each other's anchor: p and 1 - p.
  np.testing.assert_allclose(np.reshape(scores, (2, -1)).sum(axis=1), samples / 2, atol=1e-6)


@pytest.mark.parametrize("samples", [2, 4])
def test_a_reward_scores_each_response_of_a_tournament_once(samples):
  tokens = np.random.default_rng(0).integers(3, 30, (5 * samples, 1))
  asked = []

  def reward(rollout, ids):
    asked.append(list(ids))
    return np.asarray(rollout.tokens[:, P], np.float32) / 10

  ids = np.repeat(np.arange(5), samples)
  rollout = rollout_of([[5]] * len(ids), tokens.tolist())
  compare = rewards.reward_preference(reward)
  scores = rewards.tournament_reward(compare, samples)(rollout, ids)
  assert asked == [list(ids)]
  plain = rewards.tournament_reward(lambda *of: compare(*of), samples)(rollout, ids)
  np.testing.assert_allclose(scores, plain, rtol=1e-6)


def test_an_anchored_response_is_paid_by_its_match_alone():
  a, b = (rollout_of([[5], [6]], [[x], [y]]) for x, y in ((9, 2), (4, 7)))
  ids = np.array([3, 1])
  asked = []

  def anchors(rollout, prompt_ids):
    asked.append(list(prompt_ids))
    return b if rollout is a else a

  score = rewards.anchored_reward(meets, anchors)
  np.testing.assert_allclose(score(a, ids), [0.75, 0.25])
  np.testing.assert_allclose(score(a, ids) + score(b, ids), [1, 1])
  assert asked == [[3, 1]] * 3


def test_a_match_without_a_preference_does_not_count():
  ids = np.arange(8)

  def prefer(a, b, prompt_ids):
    first, second = (np.asarray(rollout.tokens[:, P]) for rollout in (a, b))
    wins = np.where(first > second, 1.0, 0.0)
    return np.where((prompt_ids == 5) & (first == 9), np.nan, wins)  # 9 has no match there.

  rollout = rollout_of([[5]] * 24, [[9], [6], [4]] * 8)
  scores = np.reshape(rewards.tournament_reward(prefer, 3)(rollout, np.repeat(ids, 3)), (8, 3))
  np.testing.assert_array_equal(scores[5], [np.nan, 1, 0])
  np.testing.assert_array_equal(np.delete(scores, 5, axis=0), np.tile([1, 0.5, 0], (7, 1)))
  watch = rewards.Watch("--judge")
  broken = rewards.tournament_reward(lambda a, b, ids: np.full(8, np.nan), 3, watch)
  with pytest.raises(rewards.UnusableScoresError, match="^--judge: 24 of 24"):
    broken(rollout, np.repeat(ids, 3))
  with pytest.raises(ValueError, match="at least 2 samples per prompt, got 1"):
    rewards.tournament_reward(prefer, 1)
