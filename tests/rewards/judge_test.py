"""The AI judge on a model whose opinion and whose bias are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import rewards
from tests.data import chats


class Characters:
  """A tokenizer whose ids are code points."""

  has_chat_template = False
  pad_id = 0

  def encode_text(self, text):
    return [ord(char) for char in text]

  def encode_prompts(self, texts):
    return [self.encode_text(text) for text in texts]


def between(text, start, end):
  return text.split(start)[1].split(end)[0]


def judge_with(bias, *, favour="good", asked=None, **options):
  """Each `favour` in a response is worth 0.8 nats, the first place `bias`."""

  def opinion(tokens, mask):
    logits = np.zeros((len(tokens), 1, 256), np.float32)
    for row, (ids, on) in enumerate(zip(np.asarray(tokens), np.asarray(mask), strict=True)):
      text = "".join(map(chr, ids[on > 0]))
      if "[Response 1]" not in text:
        continue  # A row that fills the batch.
      if asked is not None:
        asked.append(text)
      first = between(text, "[Response 1]\n", "\n\n[Response 2]")
      second = between(text, "[Response 2]\n", "\n\n")
      logits[row, 0, ord("1")] = bias + 0.8 * first.count(favour)
      logits[row, 0, ord("2")] = 0.8 * second.count(favour)
    return logits

  def apply_fn(params, tokens, *, segment_ids, last):
    assert last == 1
    shape = jax.ShapeDtypeStruct((tokens.shape[0], 1, 256), jnp.float32)
    return jax.pure_callback(opinion, shape, tokens, segment_ids)

  return rewards.JudgeModel(apply_fn, {}, Characters(), batch_size=3, **options)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def test_both_orders_cancel_the_preference_for_a_place():
  judge = judge_with(1.5, principles=["Which is better?"])
  verdicts = judge.verdicts(["p", "p"], ["good", "x"], ["y", "x"])
  np.testing.assert_allclose(verdicts.first[:, 0], [sigmoid(1.5 + 0.8), sigmoid(1.5)], rtol=1e-5)
  np.testing.assert_allclose(
    verdicts.second[:, 0], [1 - sigmoid(1.5 - 0.8), 1 - sigmoid(1.5)], rtol=1e-5
  )
  np.testing.assert_allclose(verdicts.preference[1], 0.5, atol=1e-6)
  np.testing.assert_allclose(verdicts.preference[0], 0.62, atol=0.01)  # One order alone says .91.
  assert verdicts.position_bias > 0.5
  assert verdicts.consistency == 0.0
  fair = judge_with(0.0, principles=["Which is better?"])
  assert fair.verdicts(["p"], ["good"], ["y"]).position_bias == pytest.approx(0.0, abs=1e-6)
  np.testing.assert_allclose(fair(["p"], ["good"], ["y"]), sigmoid(0.8), rtol=1e-5)


def test_exchanging_the_responses_exchanges_the_verdict():
  judge = judge_with(0.7)
  prompts, a, b = ["p"] * 4, ["good", "good good", "", "x"], ["y", "good", "good", "x"]
  np.testing.assert_allclose(judge(prompts, a, b) + judge(prompts, b, a), 1.0, atol=1e-6)


def test_every_principle_is_asked_in_both_orders():
  asked = []
  judge = judge_with(0.0, asked=asked, principles=["Is it kind?", "Is it true?"])
  judge(["the request"], ["one answer"], ["another"])
  assert len(asked) == 4
  assert sum("Is it kind?" in text for text in asked) == 2
  assert all("the request" in text and text.endswith("Answer: ") for text in asked)
  first = [between(text, "[Response 1]\n", "\n\n") for text in asked]
  assert sorted(first) == ["another", "another", "one answer", "one answer"]


def test_long_texts_are_cut():
  asked = []
  judge = judge_with(0.0, asked=asked, principles=["?"], max_characters=4)
  judge(["start end"], ["abcdef"], ["x"])
  assert between(asked[0], "[Request]\n", "\n\n") == " end"
  assert between(asked[0], "[Response 1]\n", "\n\n") == "abcd"


def test_the_longest_question_is_known_before_it_is_asked():
  asked = []
  judge = judge_with(0.0, asked=asked, principles=["?", "Is it true?"], max_characters=40)
  pairs = ["p", "prompt " * 9], ["x" * 50, "a"], ["y", "bc"]
  real, padded = judge.longest(*pairs)
  assert not asked
  judge(*pairs)
  assert real == max(map(len, asked)) and padded % 64 == 0 and 0 <= padded - real < 64


def test_the_verdict_follows_the_thoughts_that_the_template_opens():
  tokenizer, asked = chats.chat(chats.byte_level(), chats.OPENED), []

  def read(tokens, mask):
    asked.extend(np.asarray(ids)[np.asarray(on) > 0] for ids, on in zip(tokens, mask, strict=True))
    logits = np.zeros((len(tokens), 1, tokenizer.vocab_size), np.float32)
    logits[..., tokenizer.encode_text("1")[0]] = 3.0
    return logits

  def apply_fn(params, tokens, *, segment_ids, last):
    shape = jax.ShapeDtypeStruct((len(tokens), last, tokenizer.vocab_size), jnp.float32)
    return jax.pure_callback(read, shape, tokens, segment_ids)

  judge = rewards.JudgeModel(apply_fn, {}, tokenizer, ["Which is better?"], batch_size=2)
  verdicts = judge.verdicts(["p"], ["good"], ["bad"])
  np.testing.assert_allclose(verdicts.first, sigmoid(3.0), rtol=1e-5)
  assert len(asked) == 2
  for ids in asked:
    text = tokenizer.decode(ids.tolist(), skip_special=False)
    assert text.endswith(
      "Answer with 1 or 2.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert np.sum(ids == tokenizer.token_id("</think>")) == 1


def test_verdicts_must_have_tokens():
  class Mute(Characters):
    def encode_text(self, text):
      return [0]

  with pytest.raises(ValueError, match="verdicts 1 and 2"):
    rewards.JudgeModel(None, {}, Mute())
  with pytest.raises(ValueError, match="principle"):
    rewards.JudgeModel(None, {}, Characters(), [])
