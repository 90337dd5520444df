"""Rewards of segments: from characters of a text to the tokens that earn them."""

import itertools

import numpy as np
import pytest

from rlhf_jax import rewards, simulation, user
from rlhf_jax.algorithms import ppo
from rlhf_jax.rewards import segments, text_reward
from tests.rewards.rollouts_test import EOS, PROMPTS, ROWS, TOKENIZER, make_rollout

GOOD, BAD, THE, SOUP, STOP = 7, 8, 4, 5, 9
RESPONSES = [[THE, GOOD, STOP, SOUP, BAD, STOP, EOS], [SOUP, STOP, EOS], [EOS]]


def by_sentence(prompts, responses, rows):
  """Each full stop ends a sentence, which earns the number of its characters."""
  found = []
  for response in responses:
    ends = [i + 1 for i, c in enumerate(response) if c == "."]
    found.append([(end, end - start) for start, end in zip([0, *ends], ends, strict=False)])
  return found


def test_a_score_is_on_the_token_that_ends_its_segment():
  rollout = make_rollout(PROMPTS, RESPONSES, length=8)
  parts = text_reward(by_sentence, ROWS, TOKENIZER.batch_decode)(rollout, np.arange(3))
  texts = ["the good . soup bad .", "soup .", ""]
  assert rewards.response_texts(rollout, TOKENIZER.batch_decode) == texts
  want = np.zeros((3, 8))
  want[0, [2, 5]] = 10, 11
  want[1, 1] = 6
  np.testing.assert_array_equal(parts.tokens, want)
  np.testing.assert_array_equal(parts.scores, np.zeros(3))
  # Their sum is the reward of the response.
  totals = rewards.ask(by_sentence, [""] * 3, texts, rows=ROWS[:3])
  np.testing.assert_allclose(rewards.total(parts), totals, atol=1e-5)
  np.testing.assert_array_equal(totals, [21, 6, 0])


@pytest.mark.parametrize("seed", range(3))
def test_any_split_of_any_characters(seed):
  """Tokens are bytes or several of them, so that one may hold a part of a character."""
  rng = np.random.default_rng(seed)
  text = "".join(rng.choice(list("aé。😀 b\n"), 40))
  raw = text.encode()
  cuts = [0, *sorted(rng.choice(np.arange(1, len(raw)), len(raw) // 2, replace=False)), len(raw)]
  pieces = [raw[a:b] for a, b in itertools.pairwise(cuts)]
  tokens = [list(range(len(pieces))), [0]]
  decode = lambda rows: [  # noqa: E731
    b"".join(pieces[i] for i in row).decode(errors="replace") for row in rows
  ]
  responses = [text, decode([[0]])[0]]
  ends = [*rng.integers(0, len(text) + 1, 12), len(text)]
  given = segments.read([[(int(e), 1.0) for e in ends], []], "f", responses)
  earned = segments.on_tokens(given, tokens, responses, decode, len(pieces) + 2)
  want = np.zeros_like(earned)
  for end in ends:
    needed = len(text[:end].encode())
    want[0, next(i for i, cut in enumerate(cuts[1:]) if cut >= needed)] += 1
  np.testing.assert_array_equal(earned, want)


@pytest.mark.parametrize("score", [np.nan, None, 1e30])
def test_a_segment_without_a_number_leaves_out_its_response(score):
  given = lambda prompts, responses, rows: [[(3, 1.0)], [(2, score), (4, 1)], []]  # noqa: E731
  rollout = make_rollout(PROMPTS, RESPONSES, length=8)
  parts = text_reward(given, ROWS, TOKENIZER.batch_decode)(rollout, np.arange(3))
  np.testing.assert_array_equal(rewards.total(parts), [1, np.nan, 0])


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (
      [[(3, 1)], [], [(1, 1)]],
      r"gave a segment that ends at character 1 of response 2, which has 0: ''",
    ),
    ([[(-1, 1)], [], []], r"gave a segment that ends at character -1 of response 0, which has 21"),
    ([[], []], r"gave segments of 2 responses, for 3"),
    ([[(3,)], [], []], r"gave \(3,\) as a segment of response 0; a segment is"),
    ([[], [(1, 2, 3)], []], r"gave \(1, 2, 3\) as a segment of response 1"),
    ([[("3", 1)], [], []], r"gave \('3', 1\) as a segment"),
    ([[(2.5, 1)], [], []], r"gave \(2.5, 1\) as a segment"),
    ([[(True, 1)], [], []], r"gave \(True, 1\) as a segment"),
    ([[(float("inf"), 1)], [], []], r"gave \(inf, 1\) as a segment"),
    ([[(10**400, 1)], [], []], r"gave \(10+, 1\) as a segment|gave \(10+ as a segment"),
    ([[(3, 10**400)], [], []], r"gave \(3, 10+ as a segment"),
    ([[(3, "good")], [], []], r"gave \(3, 'good'\) as a segment"),
    ([[(3, "1")], [], []], r"gave \(3, '1'\) as a segment"),
    (
      [0.5, [(3, 1)], []],
      r"gave a list without numbers; it must return one number per response, or",
    ),
    ([[0.5], [0.5], [0.5]], r"gave shape \(3, 1\) for 3 responses"),
  ],
)
def test_what_is_no_segment_is_refused_in_words(given, message):
  def careless(prompts, responses, rows):
    return given

  reward = text_reward(careless, ROWS, TOKENIZER.batch_decode)
  with pytest.raises(user.ResultError, match=f"careless {message}"):
    reward(make_rollout(PROMPTS, RESPONSES, length=8), np.arange(3))


def test_a_preference_has_no_segments():
  prefer = lambda prompts, a, b, rows: [[(0, 1.0)]] * 3  # noqa: E731
  with pytest.raises(user.ResultError, match="it must return one probability per pair$"):
    rewards.ask(prefer, [""] * 3, [""] * 3, [""] * 3, rows=ROWS[:3])


def test_credit_reaches_the_sentence_that_earned_it():
  """Advantages of PPO at the first token of a sentence, by parts and as one number."""
  prompt = simulation.prompts("train", 1, seed=0)[0]["prompt"]
  words = [row["response"] for row in simulation.demonstrations("train", 64, seed=0)]
  responses = [f"{a} {b}" for a, b in zip(words[::2], words[1::2], strict=True)]
  rows, length = [{"prompt_text": prompt}] * 32, 80
  vocabulary = sorted({word for response in responses for word in response.split()})
  decode = lambda ids: [" ".join(vocabulary[i] for i in row) for row in ids]  # noqa: E731
  tokens = [[vocabulary.index(word) for word in response.split()] for response in responses]
  rollout = make_rollout([[0]] * 32, tokens, prompt_length=1, length=length)
  dense, whole = (
    rewards.parts_of(text_reward(rewards.REWARDS[name], rows, decode)(rollout, np.arange(32)))
    for name in ("sentences", "gold")
  )
  np.testing.assert_allclose(rewards.total(dense), whole.scores, atol=1e-5)
  config = ppo.PPOConfig(kl_coef=0.0)
  zeros = np.zeros((32, length), np.float32)
  correlations = []
  for parts in (dense, whole):
    inputs = rollout, parts.scores, zeros, rollout.logprobs, config
    batch, _ = ppo.make_batch(*inputs, token_rewards=parts.tokens)
    at = [(b, end) for b, row in enumerate(dense.tokens) for end in np.flatnonzero(row)]
    earned = [dense.tokens[b, end] for b, end in at]
    correlations.append(np.corrcoef(earned, [batch.advantages[b, end] for b, end in at])[0, 1])
  assert correlations[0] > correlations[1] + 0.3, correlations
