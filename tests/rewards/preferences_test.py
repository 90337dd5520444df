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
