import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import simulation
from rlhf_jax.data import DataError, read_jsonl, word_level_tokenizer
from rlhf_jax.models import ModelConfig, build
from rlhf_jax.rewards import REWARDS, model_reward, response_texts, text_reward
from rlhf_jax.rewards.functions import final_number
from rlhf_jax.types import Rollout

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
  with pytest.raises(ValueError, match=f"reward function careless gave shape {shape} for 3"):
    score(rollout, ids)
  # A function that has no name.
  score = text_reward(functools.partial(careless), ROWS, TOKENIZER.batch_decode)
  with pytest.raises(ValueError, match=f"careless.* gave shape {shape} for 3"):
    score(rollout, ids)


def test_gold_reward_of_the_built_in_task():
  prompts = [row["prompt"] for row in simulation.prompts("eval", 2, seed=0)]
  responses = ["i loved it .", "it was bad ."]
  scores = REWARDS["gold"](prompts, responses, [{}, {}])
  np.testing.assert_array_equal(scores, simulation.gold_reward(prompts, responses))
  assert len(scores) == 2


def test_sentiment():
  pytest.importorskip("vaderSentiment")
  texts = ["What a wonderful, happy day!", "A horrible, sad failure.", "The table is here.", ""]
  scores = REWARDS["sentiment"](["That was bad."] * 4, texts, [{}] * 4)
  good, bad, plain, empty = scores
  assert 0.5 < good <= 1 and -1 <= bad < -0.5 and plain == 0 and empty == 0
  again = REWARDS["sentiment"](["Other prompts."] * 4, texts[::-1], [{}] * 4)
  np.testing.assert_array_equal(again, scores[::-1])


@pytest.mark.parametrize(
  ("text", "number"),
  [
    ("#### 72", 72),
    ("He has 5 of 6.\n#### 1,234", 1234),
    ("The answer is 72.", 72),
    ("The answer is 72. I hope it helps with all 3 of your questions.", 72),
    ("Answer: $-3 a day", -3),
    ("the ANSWER is: **-$3.50**", -3.5),
    ("$1,234.50", 1234.5),
    (r"so \boxed{72} and not 73", 72),
    (r"\boxed{1{,}234 \text{ cm}^2}", 1234),
    (r"$\boxed{\frac{3}{4}}$", 0.75),
    (r"The answer is 3, as \boxed{4} shows", 4),
    ("#### 3\n#### 4", 4),
    ("A: 7/14", 0.5),
    ("first 12 eggs, then 30 eggs", 30),
    ("It takes 120/24 = 5 hours to read 120 pages.", 5),
    ("5 + 5 = 10\nThat makes 12 with the 2 from before", 2),
    ("The answer is 200-130=70 dollars", 70),
    ("The answer is 5 - 3 = 2", 2),
    ("It fell to -5.", -5),
    ("\N{MINUS SIGN}4", -4),
    ("10-5", 5),
    (".5 kg", 0.5),
    ("3.0", 3),
    ("2e3", 2000),
    ("72 cm2", 72),
    ("5 m^2", 5),
    ("100 %", 100),
    ("1,234,567", 1234567),
    ("3,4", 4),
    ("1/0", 0),
    ("no idea", None),
    ("The answer is unknown", None),
    ("", None),
    ("x1 and e5", None),
  ],
)
def test_final_number(text, number):
  assert final_number(text) == number


def test_exact_answer_compares_numbers():
  rows = [{"answer": "72"}, {"answer": "6 * 12 = 72\n#### 72"}, {"answer": 0.5}, {"answer": "-3"}]
  right = ["So $72.00.", "#### 72", "A: 1/2", "The answer is -3"]
  wrong = ["So $72.01.", "#### 27", "A: 1/3", "none"]
  np.testing.assert_array_equal(REWARDS["exact_answer"]([""] * 4, right, rows), np.ones(4))
  np.testing.assert_array_equal(REWARDS["exact_answer"]([""] * 4, wrong, rows), np.zeros(4))


@pytest.mark.parametrize(
  ("row", "problem"),
  [
    ({"id": "q7"}, "row q7: answer: missing"),
    ({"answer": None}, "row 0: answer: missing"),
    ({"answer": "yard"}, "row 0: answer: no number"),
  ],
)
def test_exact_answer_needs_a_reference(row, problem):
  with pytest.raises(DataError, match=f"{problem}; the reward exact_answer .* column `answer`"):
    REWARDS["exact_answer"]([""], ["72"], [row])


def test_exact_answer_agrees_with_people_on_gsm8k(shared):
  """Model solutions with the verdict of their authors, all of which it must reproduce."""
  path = shared / "data" / "verifiable" / "gsm8k_model_solutions.jsonl"
  for row in read_jsonl(path):
    texts = [response["text"] for response in row.fields["responses"]]
    labels = [response["correct"] for response in row.fields["responses"]]
    scores = REWARDS["exact_answer"]([""] * 4, texts, [row.fields] * 4)
    np.testing.assert_array_equal(scores, labels, err_msg=row.where)


def test_exact_answer_reads_solutions_that_announce_nothing(shared):
  path = shared / "data" / "verifiable" / "gsm8k_test.jsonl"
  rows = [row.fields for row in read_jsonl(path)]
  scores = REWARDS["exact_answer"]([""] * len(rows), [row["solution"] for row in rows], rows)
  assert np.mean(scores) > 0.98


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
