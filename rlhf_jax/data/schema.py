"""What a row must hold: columns of the formats in use, turned into a prompt and its answers.

| kind           | columns                                                                        |
|----------------|--------------------------------------------------------------------------------|
| demonstrations | a prompt and `response`, `completion`, `output` or `chosen` (first one present) |
|                | or `messages` that end with an assistant turn                                   |
|                | or `text` alone: an empty prompt, plain language modelling                      |
| preferences    | a prompt, `chosen` and `rejected`                                              |
| prompts        | a prompt                                                                       |

A prompt is `prompt` or `question` (text, or `prompt` as messages), or `instruction` with an
optional `input`, or `messages` that end with a user turn (for prompts, a last assistant turn is
cut off). `chosen`, `rejected` and the other answers may be messages whose last turn is the answer;
the turns before it are the prompt. Where a row has both a text and messages, the messages count if
the tokenizer has a chat template, else the text. A null counts as an absent column. Other columns
are ignored here and kept for reward functions.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, NoReturn

from rlhf_jax.data.sources import DataError, Row
from rlhf_jax.data.tokenizer import Messages, Prompt

Kind = Literal["demonstrations", "preferences", "prompts"]
# Names of the token columns of each kind, the prompt first.
COLUMNS: dict[str, tuple[str, ...]] = {
  "demonstrations": ("prompt", "response"),
  "preferences": ("prompt", "chosen", "rejected"),
  "prompts": ("prompt",),
}
ROLES = ("system", "user", "assistant")
_ANSWERS = ("response", "completion", "output", "chosen")
_TEXT_PROMPTS = ("prompt", "question", "instruction")


class Example(NamedTuple):
  """A row as text.

  Attributes:
    prompt: Text or messages; "" for plain language modelling.
    answers: The response, or the chosen and the rejected one, or nothing.
  """

  prompt: Prompt
  answers: tuple[str, ...]

  @property
  def key(self) -> str:
    """Rows with the same key must stay on one side of a split into training and held-out."""
    if self.prompt == "":
      return self.answers[0]
    if isinstance(self.prompt, str):
      return self.prompt
    return self.prompt[0]["content"] if len(self.prompt) == 1 else json.dumps(self.prompt)


def parse_row(kind: Kind, row: Row, *, prefer_messages: bool) -> Example:
  """Reads the columns that `kind` needs.

  Args:
    kind: What the row is for.
    row: The row.
    prefer_messages: Take `messages` where the row has a prompt as text too.

  Returns:
    The example.

  Raises:
    DataError: A missing column, another type than text, or an empty text.
  """
  if kind == "demonstrations":
    return _demonstration(row, prefer_messages)
  if kind == "preferences":
    chosen_turns, chosen = _answer(row, "chosen")
    rejected_turns, rejected = _answer(row, "rejected")
    if chosen_turns != rejected_turns:
      _fail(
        row,
        "rejected",
        "its turns before the answer differ from those of `chosen`",
        "give both answers the same prompt",
      )
    return Example(_prompt(row, prefer_messages, chosen_turns or None), (chosen, rejected))
  return Example(_prompt(row, prefer_messages, cut_answer=True), ())


def _demonstration(row: Row, prefer_messages: bool) -> Example:
  fields = row.fields
  name = next((name for name in _ANSWERS if _given(fields, name)), None)
  if name:
    turns, answer = _answer(row, name)
    return Example(_prompt(row, prefer_messages, turns or None), (answer,))
  if _given(fields, "messages"):
    turns, answer = _answer(row, "messages")
    if not turns:
      _fail(row, "messages", "an answer without a question", "put text without a prompt in `text`")
    return Example(_checked_turns(row, "messages", turns), (answer,))
  if _given(fields, "text") and not any(_given(fields, name) for name in _TEXT_PROMPTS):
    return Example("", (_text(row, "text"),))
  _fail_missing(row, (*_ANSWERS, "messages", "text"))


def _prompt(
  row: Row, prefer_messages: bool, turns: Messages | None = None, cut_answer: bool = False
) -> Prompt:
  """The prompt of a row; `turns` are those before an answer that was given as messages."""
  fields = row.fields
  name = "messages"
  if _given(fields, "messages"):
    turns = _messages(row, "messages")
    if cut_answer and turns[-1]["role"] == "assistant":
      turns = turns[:-1]
  elif isinstance(fields.get("prompt"), list):
    name, turns = "prompt", _messages(row, "prompt")
  text_name = next(
    (n for n in _TEXT_PROMPTS if _given(fields, n) and not isinstance(fields[n], list)), None
  )
  if turns is not None and (prefer_messages or text_name is None):
    return _checked_turns(row, name, turns)
  if text_name is None:
    _fail_missing(row, (*_TEXT_PROMPTS, "messages"))
  text = _text(row, text_name)
  if text_name == "instruction" and _given(fields, "input"):
    extra = fields["input"]
    if not isinstance(extra, str):
      _fail(row, "input", f"expected text, found {_describe(extra)}", "write it as text")
    text = f"{text}\n\n{extra}" if extra.strip() else text
  return text


def _answer(row: Row, name: str) -> tuple[Messages, str]:
  """The turns before an answer, if it is given as messages, and its text."""
  if not _given(row.fields, name):
    _fail_missing(row, (name,))
  if not isinstance(row.fields[name], list):
    if name == "messages":
      _messages(row, name)
    return [], _text(row, name)
  turns = _messages(row, name)
  if turns[-1]["role"] != "assistant":
    _fail(
      row,
      name,
      f"the last turn is of the {turns[-1]['role']}, so there is no answer",
      "end with an assistant turn, or add the answer as `response`",
    )
  if not turns[-1]["content"].strip():
    _fail(row, f"{name}[{len(turns) - 1}].content", "the answer is empty", "remove the row")
  return turns[:-1], turns[-1]["content"]


def _checked_turns(row: Row, name: str, turns: Messages) -> Messages:
  """Turns that can be answered: the last one is a user's and says something."""
  if not turns or turns[-1]["role"] != "user":
    last = f"ends with a turn of the {turns[-1]['role']}" if turns else "has no user turn"
    _fail(
      row, name, f"the prompt {last}", "end it with a user turn; answers go in their own column"
    )
  if not turns[-1]["content"].strip():
    _fail(row, f"{name}[{len(turns) - 1}].content", "the prompt is empty", "remove the row")
  return turns


def _messages(row: Row, name: str) -> Messages:
  """A list of turns, checked; keys other than role and content are left out."""
  value = row.fields[name]
  fix = 'write [{"role": "user", "content": "..."}, ...]'
  if not isinstance(value, list) or not value:
    _fail(row, name, f"expected a list of messages, found {_describe(value)}", fix)
  turns = []
  for i, turn in enumerate(value):
    at = f"{name}[{i}]"
    if not isinstance(turn, dict):
      _fail(row, at, f"expected a message, found {_describe(turn)}", fix)
    for key in ("role", "content"):
      if not isinstance(turn.get(key), str):
        found = _describe(turn[key]) if key in turn else f"only {sorted(turn)}"
        _fail(row, f"{at}.{key}", f"expected text, found {found}", fix)
    if turn["role"] not in ROLES:
      _fail(row, f"{at}.role", f"unknown role {turn['role']!r}", f"use one of {', '.join(ROLES)}")
    turns.append({"role": turn["role"], "content": turn["content"]})
  return turns


def _text(row: Row, name: str) -> str:
  value = row.fields[name]
  if not isinstance(value, str):
    _fail(row, name, f"expected text, found {_describe(value)}", "write it as text")
  if not value.strip():
    fix = "remove the row"
    if name in _TEXT_PROMPTS:
      fix += ", or give plain text without a prompt in the column `text` alone"
    _fail(row, name, "the text is empty", fix)
  return value


def _given(fields: Mapping[str, Any], name: str) -> bool:
  return fields.get(name) is not None


def _fail_missing(row: Row, names: tuple[str, ...]) -> NoReturn:
  null = next((name for name in names if name in row.fields and not _given(row.fields, name)), None)
  if null:
    _fail(row, null, "is null", "write a text or remove the row")
  wanted = " or ".join(f"`{name}`" for name in names)
  columns = ", ".join(sorted(row.fields)) or "none"
  _fail(row, names[0], f"missing; the row's columns are {columns}", f"add {wanted}")


def _fail(row: Row, field: str, problem: str, fix: str) -> NoReturn:
  raise DataError(f"{row.where}: {field}: {problem}; {fix}")


def _describe(value: Any) -> str:
  """What was found, short enough for a message."""
  if value is None:
    return "null"
  if isinstance(value, (list, dict)):
    kind = "a list" if isinstance(value, list) else "an object"
    return kind if value else f"an empty {kind.split()[1]}"
  shown = repr(value)
  return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
