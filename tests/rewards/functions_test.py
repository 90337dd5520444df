import sys

import numpy as np
import pytest

from rlhf_jax import rewards, simulation, user
from rlhf_jax.data import DataError, read_file
from rlhf_jax.rewards import CONSTRAINTS, REWARDS, ask, functions
from rlhf_jax.rewards.functions import final_number


def test_gold_reward_of_the_built_in_task():
  prompts = [row["prompt"] for row in simulation.prompts("eval", 2, seed=0)]
  responses = ["i loved it .", "it was bad ."]
  scores = REWARDS["gold"](prompts, responses, [{}, {}])
  np.testing.assert_array_equal(scores, simulation.gold_reward(prompts, responses))
  assert len(scores) == 2


@pytest.mark.parametrize(("name", "order"), [("terse", [0, 1]), ("lavish", [1, 0])])
def test_annotators_of_the_built_in_task_value_other_lengths(name, order):
  prompts = [row["prompt"] for row in simulation.prompts("eval", 1, seed=0)] * 2
  responses = ["i loved it .", "i loved it . i loved it . i loved it . i loved it ."]
  scores = REWARDS[name](prompts, responses, [{}, {}])
  assert np.argsort(scores)[::-1].tolist() == order
  np.testing.assert_allclose(scores, simulation.value(name, prompts, responses), rtol=1e-6)


def test_constraints_of_the_built_in_task():
  filler, other = "i do not know what else to write .", "the film was good ."
  texts = [filler, other, f"{other} {filler}", filler[:-2], "", f"{other} the", 'So he said "Go!" ']
  ask = lambda of: [bool(x) for x in of([""] * len(texts), texts, [{}] * len(texts))]  # noqa: E731
  with_filler = [True, False, True, False, False, False, False]
  assert ask(REWARDS["filler"]) == with_filler
  assert ask(CONSTRAINTS["no_filler"]) == [not x for x in with_filler]
  assert ask(CONSTRAINTS["finished"]) == [True, True, True, False, False, False, True]


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


MATH = [  # Reference, response, score.
  ("72", "So it is \\boxed{72}.", 1),
  ("6 * 12 = 72\n#### 72", "72 dollars", 1),
  (0.5, "The answer is $\\frac{2}{4}$.", 1),
  ("\\frac{1}{2}", "\\boxed{0.5}", 1),
  ("x^2+1", "It is $1 + x^2$.", 1),
  ("x^2+1", "It is $1 - x^2$.", 0),
  ("72", "27", 0),
  ("72", "", 0),
]


def test_math_compares_expressions():
  pytest.importorskip("math_verify")
  references, responses, scores = zip(*MATH, strict=True)
  rows = [{"answer": reference} for reference in references]
  np.testing.assert_array_equal(ask(REWARDS["math"], [""] * 8, responses, rows=rows), scores)
  for row, problem in (({"id": "q7"}, "row q7: answer: missing"), ({"answer": ""}, "row 0: .* no")):
    with pytest.raises(DataError, match=f"{problem}.*the reward math compares"):
      REWARDS["math"]([""], ["72"], [row])


def test_math_needs_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "math_verify", None)
  functions._math_verifier.cache_clear()
  with pytest.raises(user.RaisedError, match=r"math-verify: pip install 'rlhf_jax\[math\]'"):
    ask(REWARDS["math"], [""], ["72"], rows=[{"answer": "72"}])


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
  for row in read_file(path):
    texts = [response["text"] for response in row.fields["responses"]]
    labels = [response["correct"] for response in row.fields["responses"]]
    scores = REWARDS["exact_answer"]([""] * 4, texts, [row.fields] * 4)
    np.testing.assert_array_equal(scores, labels, err_msg=row.where)


def test_exact_answer_reads_solutions_that_announce_nothing(shared):
  path = shared / "data" / "verifiable" / "gsm8k_test.jsonl"
  rows = [row.fields for row in read_file(path)]
  scores = REWARDS["exact_answer"]([""] * len(rows), [row["solution"] for row in rows], rows)
  assert np.mean(scores) > 0.98


@pytest.mark.parametrize("code", [0, 3, "stopped"])
def test_a_function_that_ends_the_process_is_an_error(code):
  def leave(prompts, responses, rows):
    raise SystemExit(code)

  with pytest.raises(user.ResultError, match="reward function .*leave raised .*SystemExit"):
    rewards.ask(leave, ["p"], ["r"], rows=[{}])


def test_a_function_may_change_what_it_is_given():
  def score(prompts, responses, rows):
    numbers = [row.pop("number") for row in rows]
    responses.sort()
    prompts.clear()
    return numbers

  prompts, responses, rows = ["p", "q"], ["b", "a"], [{"number": 1}, {"number": 2}]
  for _ in range(2):
    np.testing.assert_array_equal(rewards.ask(score, prompts, responses, rows=rows), [1, 2])
  assert (prompts, responses) == (["p", "q"], ["b", "a"])
