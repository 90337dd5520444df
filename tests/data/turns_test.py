"""Chats with several answers, turns of tools, and variables of chat templates."""

import os

import jax
import numpy as np
import pytest

from experiments.lab import models
from rlhf_jax import data, flags
from rlhf_jax.data import DataConfig, DataError, Tokenizer, load_tokenizer
from tests.data import chats
from tests.data.rows import TOKENIZER, write

_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_ASKED = (
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
  "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
  "{% endif %}{% endif %}"
)
# In the style of Qwen 3: tools answer as the user, and what earlier answers thought is left out.
_QWEN3 = (
  "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
  "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
  "{% if m.role == 'tool' %}"
  "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
  "{% elif m.role == 'assistant' and loop.index0 > ns.last %}"
  "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
  "{% else %}" + _TURN + "{% endif %}{% endfor %}" + _ASKED
)
_STABLE = (  # The same, with all that was thought.
  "{% for m in messages %}{% if m.role == 'tool' %}"
  "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
  "{% else %}" + _TURN + "{% endif %}{% endfor %}" + _ASKED
)
_GENERATION = (
  "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
  "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
  + _TURN
  + "{% endif %}{% endfor %}"
  + _ASKED
)
_WITH_HEADERS = _GENERATION.replace(
  "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content",
  "{%- generation -%}{{ '<|im_start|>assistant\n' + m.content",
)

# Refuses two turns of the user in a row, and the answer `odd`.
_REFUSING = (
  "{% for m in messages %}{% if m.content == 'odd' or not loop.first and m.role == 'user' and"
  " loop.previtem.role == 'user' %}{{ raise_exception('odd') }}{% endif %}{% endfor %}"
)
_NO_TOOLS = "{% for m in messages %}{% if m.role != 'tool' %}" + _TURN + "{% endif %}{% endfor %}"


def turn(role, content):
  return {"role": role, "content": content}


CHATS = {
  "one": [turn("user", "hello"), turn("assistant", "the a")],
  "two": [
    *(turn("user", "hello\n"), turn("assistant", "the the")),
    *(turn("user", " a"), turn("assistant", "h")),
  ],
  "system": [
    *(turn("system", "he"), turn("user", "a"), turn("assistant", "\n\nhello")),
    *(turn("user", "l\n\n"), turn("assistant", "INST é")),
    *(turn("user", "漢"), turn("assistant", " the")),
  ],
  "typed": [
    *(turn("user", "x<|im_end|>\n<|im_start|>assistant\ny"), turn("assistant", "<|im_end|>the")),
    *(turn("user", "</s><|eot_id|>"), turn("assistant", "a<|im_start|>")),
  ],
}
TOOLS = [
  *(turn("user", "sum"), turn("assistant", "call(1)"), turn("tool", '{"x": 2}')),
  *(turn("assistant", "two"), turn("tool", "again"), turn("assistant", "three")),
]


def smollm2(template=None):
  if not os.environ.get("SMOLLM2_PATH"):
    pytest.skip("needs SMOLLM2_PATH, a SmolLM2-135M-Instruct folder")
  tokenizer = load_tokenizer(os.environ["SMOLLM2_PATH"])
  if template is None:
    return tokenizer
  tokenizer.hf.chat_template = template
  return Tokenizer(tokenizer.hf)


def encoded(tokenizer, messages):
  """Ids of a chat, and a score for each."""
  (found,) = tokenizer.encode_chats([messages[:-1]], [messages[-1]["content"]])
  return [*found.prompt, *found.response], [0] * len(found.prompt) + found.scored


def turn_by_turn(tokenizer, messages):
  """The same, from each answer alone, as it is learnt with `turns=last`."""
  ids, scored = [], []
  for i, message in enumerate(messages):
    if message["role"] == "assistant":
      exchange = tokenizer.encode_exchanges([messages[:i]], [[message["content"]]])[0]
      # What follows the end of the answer before: its own ids may be merged with its header.
      ends = [place for place, token in enumerate(exchange.prompt) if token == tokenizer.eos_id]
      seen = ids.count(tokenizer.eos_id)
      tail = exchange.prompt[ends[seen - 1] + 1 if seen else 0 :]
      scored += [0] * len(tail) + [1] * len(exchange.responses[0])
      ids += [*tail, *exchange.responses[0]]
  return ids, scored


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", ["chatml", "llama3", "gemma", "zephyr", "newline", "stable"])
def test_all_answers_are_those_of_each_turn(template, chat):
  if template == "gemma" and chat == "system":
    pytest.skip("the template refuses a system turn")
  tokenizer = chats.chat(chats.byte_level(), _STABLE if template == "stable" else template)
  assert encoded(tokenizer, CHATS[chat]) == turn_by_turn(tokenizer, CHATS[chat])


@pytest.mark.parametrize("chat", CHATS)
def test_all_answers_of_a_real_model(chat):
  tokenizer = smollm2()
  assert encoded(tokenizer, CHATS[chat]) == turn_by_turn(tokenizer, CHATS[chat])


@pytest.mark.parametrize("model", ["bytes", "smollm2"])
@pytest.mark.parametrize("chat", ["one", "two", "system"])
@pytest.mark.parametrize("template", [_GENERATION, _WITH_HEADERS])
def test_blocks_of_a_template_are_masked_as_in_transformers(model, template, chat):
  is_real = model == "smollm2"
  tokenizer = smollm2(template) if is_real else chats.chat(chats.byte_level(), template)
  ids, scored = encoded(tokenizer, CHATS[chat])
  theirs = tokenizer.hf.apply_chat_template(
    CHATS[chat], return_assistant_tokens_mask=True, return_dict=True
  )
  end = len(theirs["assistant_masks"]) - theirs["assistant_masks"][::-1].index(1)
  assert ids == theirs["input_ids"][:end] and scored == theirs["assistant_masks"][:end]
  assert tokenizer.encode_prompt(CHATS[chat][:1]) == tokenizer.hf.apply_chat_template(
    CHATS[chat][:1], add_generation_prompt=True, return_dict=False
  )


def test_typed_controls_are_text_in_marked_answers_too():
  tokenizer = chats.chat(chats.byte_level(), _GENERATION)
  plain = chats.chat(chats.byte_level(), "chatml")
  odd = [*CHATS["typed"][:3], turn("assistant", "\ufdd4\ufdd5a")]
  assert encoded(tokenizer, CHATS["typed"]) == encoded(plain, CHATS["typed"])
  assert encoded(tokenizer, odd) == encoded(plain, odd)


@pytest.mark.parametrize("template", [_QWEN3, _STABLE, "llama3"])
def test_turns_of_tools(template):
  tokenizer = chats.chat(chats.byte_level(), template)
  text = tokenizer.render_prompt(TOOLS[:3])
  assert '{"x": 2}' in text and text.endswith(tokenizer.render_prompt("x").rpartition("x")[2][-9:])
  ids, scored = encoded(tokenizer, TOOLS)
  if template != _QWEN3:  # Which leaves nothing out of answers after the last question.
    assert (ids, scored) == turn_by_turn(tokenizer, TOOLS)
  learnt = tokenizer.decode([i for i, s in zip(ids, scored, strict=True) if s])
  for content in ("call(1)", "two", "three"):
    assert content in learnt
  assert "again" not in learnt and "x" not in learnt


def _rows(*messages):
  return [{"messages": list(turns)} for turns in messages]


def _load(folder, rows, tokenizer, **config):
  config = DataConfig(write(folder, rows), **{"eval_fraction": 0.0} | config)
  return data.load("demonstrations", config, tokenizer)[0]


@pytest.mark.parametrize("template", ["chatml", _GENERATION], ids=["prefix", "blocks"])
def test_batches_score_all_answers(tmp_path, template):
  tokenizer = chats.chat(chats.byte_level(), template)
  rows = _rows(*(CHATS[name] for name in ("two", "system", "one", "typed")))
  train = _load(tmp_path, rows, tokenizer, turns="all")
  (batch,) = (b for b, _ in data.eval_batches(train, 4, 0))
  for tokens, mask, row in zip(batch.tokens, batch.mask, rows, strict=True):
    ids, scored = encoded(tokenizer, row["messages"])
    assert tokens[: len(ids)].tolist() == ids and mask[: len(ids)].tolist() == scored
    assert not mask[len(ids) :].any()
  assert train.scored >= batch.mask.sum(axis=1).max()
  # Packed rows hold the same tokens, each scored as often.
  packed = next(data.batches(train, 1, seed=0, pad_id=0, epochs=1, packed_length=1024))
  assert packed.mask.sum() == batch.mask.sum() and (packed.segment_ids > 0).sum() > 0
  scored = sorted(packed.tokens[packed.mask].tolist())
  assert scored == sorted(batch.tokens[batch.mask].tolist())
  cached = [
    data.load(
      "demonstrations",
      DataConfig(write(tmp_path, rows), eval_fraction=0.0, turns="all"),
      tokenizer,
      cache=tmp_path / "tokens",
    )[0]
    for _ in range(2)
  ]
  for of in cached:
    jax.tree.map(np.testing.assert_array_equal, next(data.eval_batches(of, 4, 0))[0], batch)
  # Samples are answers to the first question.
  assert [row["prompt_text"] for row in train.rows] == [
    tokenizer.render_prompt(row["messages"][: 2 if len(row["messages"]) == 7 else 1])
    for row in rows
  ]


def test_one_answer_is_learnt_as_the_last_one(tmp_path):
  tokenizer = chats.chat(chats.byte_level(), "chatml")
  rows = [*_rows(CHATS["one"]), {"prompt": "a", "response": "the"}, {"text": "hello"}]
  last, both = (_load(tmp_path, rows, tokenizer, turns=turns) for turns in ("last", "all"))
  assert last.digest == both.digest
  several = _rows(CHATS["two"])
  last, both = (_load(tmp_path, several, tokenizer, turns=turns) for turns in ("last", "all"))
  assert last.digest != both.digest


@pytest.mark.parametrize(
  ("template", "rows", "said"),
  [
    (
      _QWEN3,
      _rows(CHATS["one"], CHATS["two"]),
      ("rows.jsonl:2: data.turns=all", "turn 1", "last"),
    ),
    (chats.OPENED, _rows(CHATS["two"]), ("rows.jsonl:1", "turn 1 in another way")),
    (None, _rows(CHATS["one"]), ("data.turns=all needs a chat template",)),
    ("plain", _rows(CHATS["two"]), ("rows.jsonl:1", "ends an answer", "data.turns=last")),
    (
      _GENERATION.replace("'assistant' %}", "'critic' %}"),
      _rows(CHATS["two"]),
      ("rows.jsonl:1", "blocks `generation`"),
    ),
    (
      "chatml",
      [{"messages": [*CHATS["two"][:1], CHATS["two"][1] | {"weight": 0}, *CHATS["two"][2:]]}],
      ("rows.jsonl:1: messages[1].weight", "data.turns=last"),
    ),
    (
      "chatml",
      _rows(CHATS["one"], [*CHATS["two"][:1], turn("assistant", " \n"), *CHATS["two"][2:]]),
      ("rows.jsonl:2: messages: turn 1 is an empty answer", "data.turns=last"),
    ),
    *(
      (template, _rows(CHATS["one"], chat), ("rows.jsonl:2: messages", "refused the turns", "odd"))
      for template in (_REFUSING + _STABLE, _REFUSING + _GENERATION)
      for chat in (
        [*CHATS["two"][:2], *CHATS["two"][2:3] * 2, *CHATS["two"][3:]],
        [turn("user", "a"), turn("assistant", "odd")],
        [*CHATS["two"][:3], turn("assistant", "odd")],
      )
    ),
    (None, _rows(TOOLS), ("rows.jsonl:1", "role 'tool'", "chat template")),
    (_NO_TOOLS, _rows(TOOLS), ("rows.jsonl:1", "does not write turns of the role 'tool'")),
  ],
)
def test_chats_that_are_refused(tmp_path, template, rows, said):
  tokenizer = chats.chat(chats.byte_level(), template) if template else TOKENIZER
  with pytest.raises(DataError) as e:
    _load(tmp_path, rows, tokenizer, turns="all")
  assert all(word in str(e.value) for word in said), str(e.value)


def test_the_row_of_a_refused_answer_is_named_with_the_last_answer_too(tmp_path):
  tokenizer = chats.chat(chats.byte_level(), _REFUSING + _STABLE)
  with pytest.raises(DataError, match=r"rows.jsonl:3: messages: .*refused the turns"):
    _load(
      tmp_path,
      [{"text": "a"}, *_rows(CHATS["one"], [*CHATS["one"][:1], turn("assistant", "odd")])],
      tokenizer,
    )


def test_weights_of_other_turns_and_columns_are_no_matter(tmp_path):
  asked, answer = CHATS["two"][:2]
  messages = [asked | {"weight": 0}, answer | {"weight": 1}, *CHATS["two"][2:]]
  rows = [{"messages": messages, "criteria": [{"name": "brief", "weight": 0}]}]
  notes = [{"messages": CHATS["two"], "notes": [answer | {"weight": 0}]}]
  tokenizer = chats.chat(chats.byte_level(), "chatml")
  plain = _load(tmp_path, _rows(CHATS["two"]), tokenizer, turns="all")
  for given, options in ((rows, {}), (notes, {"ignore": ("notes",)})):
    assert _load(tmp_path, given, tokenizer, turns="all", **options).digest == plain.digest


def test_refused_chats_are_bad_rows(tmp_path):
  tokenizer = chats.chat(chats.byte_level(), _REFUSING + _STABLE)
  odd = [*CHATS["two"][:2], *CHATS["two"][2:3] * 2, *CHATS["two"][3:]]
  train = _load(tmp_path, _rows(odd, CHATS["two"]), tokenizer, turns="all", bad_rows=1)
  assert train.report["bad_rows"] == 1 and len(train.examples) == 1


@pytest.mark.parametrize("kind", [kind for kind in data.KINDS if kind != "demonstrations"])
def test_all_answers_are_for_demonstrations(kind):
  with pytest.raises(DataError, match=f"data.turns=all is for demonstrations, .* reads {kind}"):
    data.load(kind, DataConfig("x.jsonl", turns="all"), TOKENIZER)


def test_variables_of_a_template_are_read_and_saved(tmp_path):
  plain = chats.chat(chats.byte_level(), _STABLE)
  off = chats.chat(chats.byte_level(), _STABLE, template_args={"enable_thinking": False})
  on = chats.chat(chats.byte_level(), _STABLE, template_args={"enable_thinking": True})
  assert plain.digest != off.digest != on.digest
  assert off.encode_prompt("a") == [
    *plain.encode_prompt("a"),
    *off.hf.encode("<think>\n\n</think>\n\n", add_special_tokens=False),
  ]
  assert on.encode_prompt("a") == plain.encode_prompt("a")
  theirs = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
  assert off.encode_prompt("a") == off.hf.apply_chat_template([turn("user", "a")], **theirs)
  off.save(tmp_path)
  assert load_tokenizer(tmp_path).digest == off.digest
  assert load_tokenizer(tmp_path, template_args={"enable_thinking": True}).digest == on.digest
  config = DataConfig(template_args=("enable_thinking:True",))
  assert models.open_tokenizer(tmp_path, config).digest == on.digest
  assert models.open_tokenizer(tmp_path, DataConfig()).digest == off.digest


@pytest.mark.parametrize(
  ("template", "args", "said"),
  [
    (
      _STABLE,
      {"enable_thinkin": False},
      "does not read 'enable_thinkin'; it reads enable_t",
    ),
    ("chatml", {"x": 1}, "does not read 'x'; it reads none"),
    (None, {"x": 1}, "has no chat template, does not read 'x'"),
  ],
)
def test_variables_that_nothing_reads(template, args, said):
  with pytest.raises(DataError, match=said):
    chats.chat(chats.byte_level(), template, template_args=args)


@pytest.mark.parametrize(
  ("texts", "values"),
  [
    ((), None),
    (
      ("a:false", "b:True", "c:none", "d:3", "e:0.5"),
      {"a": False, "b": True, "c": None, "d": 3, "e": 0.5},
    ),
    (("a:", "b:x:y", 'c:"false"', "d:[1]"), {"a": "", "b": "x:y", "c": "false", "d": "[1]"}),
    (("enable_thinking",), "write NAME:VALUE"),
    (("a-b:1",), "write NAME:VALUE"),
    (("messages:1",), "cannot set messages"),
    (("bos_token:x",), "cannot set bos_token"),
    (("a:1", "a:2"), "sets a twice"),
  ],
)
def test_variables_on_the_command_line(texts, values):
  if not isinstance(values, str):
    assert repr(DataConfig(template_args=texts).variables()) == repr(values)
    return
  with pytest.raises(ValueError, match=f"^template_args .*{values}"):
    DataConfig(template_args=texts)


def test_the_built_in_task_has_no_variables():
  with pytest.raises(flags.UsageError, match="--data.template_args"):
    models.open_tokenizer(None, DataConfig(template_args=("a:1",)))
