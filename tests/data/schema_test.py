import pytest

from rlhf_jax.data.schema import Example, parse_row
from rlhf_jax.data.sources import DataError, Row


def user(text):
  return {"role": "user", "content": text}


def bot(text):
  return {"role": "assistant", "content": text}


def parse(kind, fields, prefer_messages=False):
  return parse_row(kind, Row("f.jsonl:7", fields), prefer_messages=prefer_messages)


@pytest.mark.parametrize(
  ("fields", "prompt", "response"),
  [
    ({"prompt": "p", "response": "r"}, "p", "r"),
    ({"prompt": "p", "completion": "r"}, "p", "r"),
    ({"prompt": "p", "output": "r"}, "p", "r"),
    ({"prompt": "p", "chosen": "r", "rejected": "s"}, "p", "r"),
    ({"prompt": "p", "response": "r", "output": "s"}, "p", "r"),
    ({"question": "p", "response": "r"}, "p", "r"),
    ({"instruction": "p", "output": "r"}, "p", "r"),
    ({"instruction": "p", "input": "", "output": "r"}, "p", "r"),
    ({"instruction": "p", "input": None, "output": "r"}, "p", "r"),
    ({"instruction": "p", "input": "i", "output": "r"}, "p\n\ni", "r"),
    ({"messages": [user("p"), bot("r")]}, [user("p")], "r"),
    (
      {"messages": [user("p"), bot("q"), user("s"), bot("r")]},
      [user("p"), bot("q"), user("s")],
      "r",
    ),
    ({"messages": [user("p")], "response": "r"}, [user("p")], "r"),
    ({"prompt": [user("p")], "completion": [bot("r")]}, [user("p")], "r"),
    ({"chosen": [user("p"), bot("r")]}, [user("p")], "r"),
    ({"text": "r"}, "", "r"),
    ({"text": "r", "mean": 1.0, "prompt": None}, "", "r"),
  ],
)
def test_demonstrations(fields, prompt, response):
  assert parse("demonstrations", fields) == Example(prompt, (response,))
  assert parse("demonstrations", {**fields, "extra": 1}).answers == (response,)


@pytest.mark.parametrize(
  ("fields", "prompt"),
  [
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p"),
    ({"messages": [user("p")], "chosen": "c", "rejected": "r"}, [user("p")]),
    ({"chosen": [user("p"), bot("c")], "rejected": [user("p"), bot("r")]}, [user("p")]),
    ({"prompt": "p", "chosen": [bot("c")], "rejected": [bot("r")]}, "p"),
    ({"prompt": [user("p")], "chosen": [bot("c")], "rejected": [bot("r")]}, [user("p")]),
    ({"prompt": "p", "chosen": [user("p"), bot("c")], "rejected": [user("p"), bot("r")]}, "p"),
  ],
)
def test_preferences(fields, prompt):
  assert parse("preferences", fields) == Example(prompt, ("c", "r"))


@pytest.mark.parametrize(
  ("fields", "prompt"),
  [
    ({"prompt": "p"}, "p"),
    ({"question": "p", "answer": "4"}, "p"),
    ({"instruction": "p", "input": "i"}, "p\n\ni"),
    ({"messages": [user("p")]}, [user("p")]),
    ({"messages": [user("p"), bot("r")]}, [user("p")]),
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p"),
  ],
)
def test_prompts(fields, prompt):
  assert parse("prompts", fields) == Example(prompt, ())


def test_messages_count_only_with_a_chat_template():
  fields = {"prompt": "p", "messages": [user("q")], "chosen": "c", "rejected": "r"}
  for kind in ("preferences", "prompts", "demonstrations"):
    assert parse(kind, fields).prompt == "p"
    assert parse(kind, fields, prefer_messages=True).prompt == [user("q")]


@pytest.mark.parametrize(
  ("kind", "fields", "message"),
  [
    ("prompts", {}, r"prompt: missing; the row's columns are none; add `prompt` or"),
    ("prompts", {"id": 1, "query": "p"}, r"prompt: missing; the row's columns are id, query"),
    ("prompts", {"prompt": None}, r"prompt: is null; write a text"),
    ("prompts", {"prompt": 3}, r"prompt: expected text, found int 3"),
    ("prompts", {"prompt": True}, r"prompt: expected text, found bool True"),
    ("prompts", {"prompt": {"a": 1}}, r"prompt: expected text, found an object"),
    ("prompts", {"prompt": []}, r"prompt: expected a list of messages, found an empty list"),
    ("prompts", {"prompt": " \n"}, r"prompt: the text is empty; remove the row"),
    ("prompts", {"instruction": "p", "input": 4}, r"input: expected text, found int 4"),
    ("prompts", {"messages": "p"}, r"messages: expected a list of messages, found str 'p'"),
    ("prompts", {"messages": []}, r"messages: expected a list of messages, found an empty list"),
    ("prompts", {"messages": ["p"]}, r"messages\[0\]: expected a message, found str 'p'"),
    ("prompts", {"messages": [{"content": "p"}]}, r"messages\[0\]\.role: .*only \['content'\]"),
    ("prompts", {"messages": [user(None)]}, r"messages\[0\]\.content: expected text, found null"),
    (
      "prompts",
      {"messages": [{"role": "gpt", "content": "p"}]},
      r"messages\[0\]\.role: unknown role 'gpt'; use one of system, user, assistant",
    ),
    ("prompts", {"messages": [bot("r")]}, r"messages: the prompt has no user turn"),
    ("prompts", {"messages": [user(" ")]}, r"messages\[0\]\.content: the prompt is empty"),
    ("demonstrations", {"prompt": "p"}, r"response: missing.*add `response` or `completion`"),
    ("demonstrations", {"prompt": "p", "response": None}, r"response: is null"),
    ("demonstrations", {"prompt": "p", "response": ""}, r"response: the text is empty"),
    ("demonstrations", {"prompt": "p", "output": 1.5}, r"output: expected text, found float 1.5"),
    ("demonstrations", {"prompt": "", "response": "r"}, r"prompt: the text is empty.*`text` alone"),
    ("demonstrations", {"response": "r"}, r"prompt: missing"),
    ("demonstrations", {"prompt": "p", "text": "r"}, r"response: missing"),
    ("demonstrations", {"text": "\t"}, r"text: the text is empty; remove the row"),
    ("demonstrations", {"messages": [user("p")]}, r"messages: the last turn is of the user"),
    ("demonstrations", {"messages": [bot("r")]}, r"messages: an answer without a question"),
    (
      "demonstrations",
      {"messages": [user("p"), bot(" ")]},
      r"messages\[1\]\.content: the answer is empty",
    ),
    (
      "demonstrations",
      {"messages": [user("p"), bot("r")], "response": "s"},
      r"messages: the prompt ends with a turn of the assistant",
    ),
    ("preferences", {"prompt": "p", "chosen": "c"}, r"rejected: missing"),
    ("preferences", {"prompt": "p", "chosen": "c", "rejected": 0}, r"rejected: .*found int 0"),
    ("preferences", {"chosen": "c", "rejected": "r"}, r"prompt: missing"),
    (
      "preferences",
      {"chosen": [user("p"), bot("c")], "rejected": [user("q"), bot("r")]},
      r"rejected: its turns before the answer differ",
    ),
    ("preferences", {"prompt": "p", "chosen": [user("c")], "rejected": "r"}, r"chosen: the last"),
  ],
)
def test_bad_rows(kind, fields, message):
  with pytest.raises(DataError, match=r"^f\.jsonl:7: " + message):
    parse(kind, fields)


def test_key_is_the_prompt_however_it_is_written():
  texts = [
    parse("prompts", {"prompt": "p"}),
    parse("prompts", {"messages": [user("p")]}),
    parse("demonstrations", {"prompt": "p", "response": "r"}),
  ]
  assert len({example.key for example in texts}) == 1
  assert parse("demonstrations", {"text": "a"}).key != parse("demonstrations", {"text": "b"}).key
