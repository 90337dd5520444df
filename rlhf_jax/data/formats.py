r"""Published formats: each is a function from the columns of a row to the columns of `schema`.

A row has the first format in `FORMATS` whose columns it has and whose condition holds; most rows
have none and are read as they are.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from rlhf_jax.data.sources import DataError, Row
from rlhf_jax.data.tokenizer import transcript

Fields = Mapping[str, Any]
# (row, True if a chat template renders the prompt) -> columns of `schema`.
Reader = Callable[[Row, bool], dict[str, Any]]

# Columns with answers; a row that has one is not a question with its `answer`.
_ANSWERED = ("response", "completion", "output", "solution", "chosen", "responses")
_ASKED = ("prompt", "question", "instruction", "messages")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_CHAT = re.compile(r"\n\nHuman:|Human:.*\n\nAssistant:", re.DOTALL)
_STEER_TURN = re.compile(r"<extra_id_[01]>(System|User|Assistant)\n")
_SPEAKER = re.compile(r"\n\n(?:System|Human|Assistant):|\A(?:System|Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class Skip(Exception):
  """Row that is left out and counted: published files have a few that cannot be used."""

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


class Format(NamedTuple):
  """Published format.

  Attributes:
    columns: Columns that a row of the format has; `read` replaces them.
    read: Function of a row that returns columns of `schema`; see `Reader`.
    when: Condition on the columns of the row.
    optional: Further columns that `read` replaces, if the row has them.
  """

  columns: tuple[str, ...]
  read: Reader
  when: Callable[[Fields], bool] = lambda fields: True
  optional: tuple[str, ...] = ()


def given(fields: Fields, name: str) -> bool:
  """Returns True if a row has a value in a column; null is no value."""
  return fields.get(name) is not None


def none_of(*names: str) -> Callable[[Fields], bool]:
  """Returns the condition that a row has none of the columns."""
  return lambda fields: not any(given(fields, name) for name in names)


def has_objects(name: str) -> Callable[[Fields], bool]:
  """Returns the condition that a column is a list with an object in it."""
  return lambda fields: (
    isinstance(fields[name], list) and any(isinstance(item, dict) for item in fields[name])
  )


def find(fields: Fields) -> str | None:
  """Returns the name of the format of a row in `FORMATS`; None for a row that has none."""
  for name, of in FORMATS.items():
    if all(given(fields, column) for column in of.columns) and of.when(fields):
      return name
  return None


def normalized(row: Row, chat: bool) -> tuple[Row, frozenset[str]]:
  """Returns a row with columns of `schema`, and the original columns that they were made of.

  Args:
    row: The row.
    chat: True if a chat template renders the prompt.

  Raises:
    DataError: A column of the format holds something else.
    Skip: The row is left out.
  """
  name = find(row.fields)
  if name is None:
    return row, frozenset()
  of = FORMATS[name]
  taken = frozenset((*of.columns, *of.optional))
  rest = {column: value for column, value in row.fields.items() if column not in taken}
  return row._replace(fields={**rest, **of.read(row, chat)}), taken


def score_of(fields: Fields) -> str | None:
  """Returns the column with the score of the single response of a row; None without one."""
  is_text = all(isinstance(fields.get(name), str) for name in ("prompt", "response"))
  if not is_text or any(given(fields, name) for name in ("chosen", "responses", "label")):
    return None
  numbers = (name for name in ("score", "helpfulness") if type(fields.get(name)) in (int, float))
  return next(numbers, None)


def _renamed(**names: str) -> Reader:
  """Returns the reader that renames columns, `new="old"`."""
  return lambda row, chat: {
    new: row.fields[old] for new, old in names.items() if given(row.fields, old)
  }


def _texts(row: Row, *names: str) -> list[str]:
  for name in names:
    if not isinstance(row.fields[name], str):
      fail(row, name, f"expected text, found {describe(row.fields[name])}", "write it as text")
  return [row.fields[name] for name in names]


def _pair(row: Row, columns: Sequence[str], share: float | None) -> dict[str, Any]:
  """Columns of a prompt and two responses, of which the first won, lost (0) or tied (None)."""
  prompt, a, b = _texts(row, *columns)
  if not (a.strip() and b.strip()):
    raise Skip("empty")
  preferred = None if share is None else int(share == 0)
  return {"prompt": prompt, "responses": [a, b], "annotations": [{"preferred": preferred}]}


def _with_extra(name: str) -> Reader:
  """Returns the reader of an instruction with further text in the column `name`."""

  def read(row: Row, chat: bool) -> dict[str, Any]:
    del chat
    instruction, extra = _texts(row, "instruction", name)
    if any(not str(row.fields.get(column, " x")).strip() for column in ("output", "response")):
      raise Skip("empty")  # Alpaca has a few.
    return {"instruction": f"{instruction}\n\n{extra}" if extra.strip() else instruction}

  return read


def _hh(row: Row, chat: bool) -> dict[str, Any]:
  """Reads two transcripts that differ in their last turn."""
  chosen, rejected = (_hh_turns(row, name) for name in ("chosen", "rejected"))
  if chosen[:-1] != rejected[:-1]:
    raise Skip("different_prompts")
  if not (chosen[-1]["content"] and rejected[-1]["content"]):
    raise Skip("empty")
  *turns, _ = chosen
  # As plain text, prompt and answer are the transcript, with its space between them. It is written
  # anew: published ones have speakers that go on after an empty turn, or after another one.
  space = "" if chat else " "
  answers = {
    name: space + side[-1]["content"] for name, side in (("chosen", chosen), ("rejected", rejected))
  }
  return {"prompt": transcript(turns), "messages": turns, **answers}


def transcript_turns(text: str) -> list[dict[str, str]]:
  """Returns the turns of a text from "Human:" to "Assistant:"; none if it is not one."""
  text = f"\n\n{text.strip()}"
  if not (text.startswith("\n\nHuman:") and text.endswith("\n\nAssistant:")):
    return []
  *turns, last = _split(text)
  return turns if last["role"] == "assistant" and not last["content"] else []


def marked_turns(text: str) -> list[dict[str, str]]:
  """Returns the turns of a prompt with the markers of HelpSteer; none if it has no markers."""
  first, *parts = _STEER_TURN.split(text)
  pairs = zip(["User", *parts[::2]], [first, *parts[1::2]], strict=True)
  turns = [{"role": role.lower(), "content": content.strip()} for role, content in pairs]
  if turns[-1] == {"role": "assistant", "content": ""}:
    turns.pop()
  turns = turns if first.strip() else turns[1:]
  return turns if parts and turns and turns[-1]["role"] == "user" else []


def _hh_turns(row: Row, name: str) -> list[dict[str, str]]:
  turns = _split(f"\n\n{row.fields[name].strip()}")
  if len(turns) < 2 or turns[-1]["role"] != "assistant":
    raise Skip("empty")
  return turns


def _split(text: str) -> list[dict[str, str]]:
  """Returns the turns of a transcript."""
  _, *parts = _HH_TURN.split(text)
  roles, contents = parts[::2], parts[1::2]
  turns: list[dict[str, str]] = []
  for role, content in zip(roles, contents, strict=True):
    turn = {"role": _HH_ROLES[role], "content": content.strip()}
    if turns and turns[-1]["role"] == turn["role"]:  # The same speaker goes on.
      turns[-1]["content"] = f"{turns[-1]['content']}\n\n{turn['content']}".strip()
    else:
      turns.append(turn)
  return turns


def _is_hh(fields: Fields) -> bool:
  sides = [fields["chosen"], fields["rejected"]]
  if not all(isinstance(side, str) and _HH_CHAT.match(side) for side in sides):
    return False
  prompt = fields.get("prompt")
  if isinstance(prompt, str):  # It repeats how they start, or there is another prompt.
    return all(starts_with(side, prompt) for side in sides)
  return none_of(*_ASKED)(fields)


def words(text: str) -> list[str]:
  """Returns the words of a text without the names of speakers."""
  return _SPEAKER.sub(" ", text).split()


def starts_with(text: str, start: str) -> bool:
  """Returns True if a text begins with the words of another one."""
  wanted = words(start)
  return words(text)[: len(wanted)] == wanted


def _shp(row: Row, chat: bool) -> dict[str, Any]:
  del chat
  label = row.fields["labels"]
  if label not in (0, 1):
    fail(row, "labels", f"expected 1 or 0, found {label!r}", "write 1 if A is better, else 0")
  return _pair(row, ("history", "human_ref_A", "human_ref_B"), label)


def _tldr(row: Row, chat: bool) -> dict[str, Any]:
  """Reads a choice between summaries, with the prompt of https://arxiv.org/abs/2009.01325."""
  del chat
  info, summaries, choice = (row.fields[name] for name in ("info", "summaries", "choice"))
  if not isinstance(info, dict):
    fail(row, "info", "expected an object with `post` or `article`", "copy the file again")
  if isinstance(info.get("post"), str):
    for key in ("subreddit", "title"):
      if not isinstance(info.get(key), str):
        fail(row, f"info.{key}", f"expected text, found {describe(info.get(key))}", "write it")
    prompt = (
      f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\n"
      f"POST: {info['post']}\n\nTL;DR:"
    )
  elif isinstance(info.get("article"), str):
    prompt = f"Article:\n\n{info['article']}\n\nTL;DR:"
  else:
    fail(row, "info", "has neither `post` nor `article`", "copy the file again")
  vote = {"annotator": row.fields.get("worker"), "preferred": choice}
  return {"prompt": prompt, "responses": summaries, "annotations": [vote]}


def _webgpt(row: Row, chat: bool) -> dict[str, Any]:
  del chat
  question = row.fields["question"]
  prompt = question.get("full_text") if isinstance(question, dict) else question
  if not isinstance(prompt, str):
    fail(row, "question", "expected text or an object with `full_text`", "copy the file again")
  answers = [
    {"text": row.fields[f"answer_{i}"], "score": row.fields[f"score_{i}"]} for i in range(2)
  ]
  return {"prompt": prompt, "responses": answers}


def _helpsteer_preference(row: Row, chat: bool) -> dict[str, Any]:
  del chat
  strength = row.fields["preference_strength"]
  if type(strength) not in (int, float):
    fail(row, "preference_strength", f"expected a number, found {strength!r}", "write -3 to 3")
  share = None if strength == 0 else float(strength < 0)
  return _pair(row, ("prompt", "response_1", "response_2"), share)


def _ultrafeedback(row: Row, chat: bool) -> dict[str, Any]:
  del chat
  return {"instruction": row.fields["instruction"]} | _listed(
    row, "completions", "response", score="overall_score"
  )


def _nectar(row: Row, chat: bool) -> dict[str, Any]:
  del chat
  return {"prompt": row.fields["prompt"]} | _listed(row, "answers", "answer", rank="rank")


def _listed(row: Row, column: str, text: str, **judged: str) -> dict[str, Any]:
  """Columns of a list of objects with their text and their judgement, `new="old"`."""
  objects = row.fields[column]
  ((new, old),) = judged.items()
  if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
    fail(row, column, "expected a list of objects", f"give each `{text}` and `{old}`")
  return {"responses": [{"text": item.get(text), new: item.get(old)} for item in objects]}


def _conversation(row: Row, chat: bool) -> dict[str, Any]:
  """Reads turns, or pairs of them with `input` and `output`, as Capybara has."""
  del chat
  value = row.fields["conversation"]
  first = value[0] if isinstance(value, list) and value else None
  if not isinstance(first, dict) or "input" not in first:
    return {"messages": value}
  turns = []
  for i, pair in enumerate(value):
    for key, role in (("input", "user"), ("output", "assistant")):
      text = pair.get(key) if isinstance(pair, dict) else None
      if not isinstance(text, str):
        at = f"conversation[{i}].{key}"
        fail(row, at, f"expected text, found {describe(text)}", "give each `input` and `output`")
      turns.append({"role": role, "content": text})
  return {"messages": turns}


def _lists(row: Row, chat: bool) -> dict[str, Any]:
  """Reads lists of right and of wrong answers: each of the first won over each of the second."""
  del chat
  right, wrong = row.fields["chosen"], row.fields["rejected"]
  for name, side in (("chosen", right), ("rejected", wrong)):
    for i, text in enumerate(side):
      if not isinstance(text, str):
        fail(row, f"{name}[{i}]", f"expected text, found {describe(text)}", "write it as text")
  votes = [
    {"a": a, "b": len(right) + b, "preferred": a}
    for a in range(len(right))
    for b in range(len(wrong))
  ]
  return {"responses": [*right, *wrong], "annotations": votes}


def _are_lists(fields: Fields) -> bool:
  sides: list[Any] = [fields["chosen"], fields["rejected"]]
  return all(isinstance(side, list) and side and isinstance(side[0], str) for side in sides)


def _safe_rlhf(row: Row, chat: bool) -> dict[str, Any]:
  del chat
  better = row.fields["better_response_id"]
  if better not in (0, 1):
    fail(row, "better_response_id", f"expected 0 or 1, found {better!r}", "write one of the two")
  return _pair(row, ("prompt", "response_0", "response_1"), 1 - better)


def fail(row: Row, column: str, problem: str, fix: str) -> NoReturn:
  """Refuses a row by one of its columns."""
  names: Mapping[str, str] = getattr(row.fields, "names", {})
  column = re.sub(r"^\w+", lambda match: names.get(match[0], match[0]), column)
  raise DataError(f"{row.where}: {column}: {problem}; {fix}")


def describe(value: Any) -> str:
  """Describes a value in a few words, for a message."""
  if value is None:
    return "null"
  if isinstance(value, (list, dict)):
    kind = "a list" if isinstance(value, list) else "an object"
    return kind if value else f"an empty {kind.split()[1]}"
  shown = repr(value)
  return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


FORMATS: dict[str, Format] = {
  "HH-RLHF": Format(("chosen", "rejected"), _hh, _is_hh, optional=("prompt",)),
  "UltraFeedback binarized": Format(
    ("messages", "chosen", "rejected"),
    _renamed(chosen="chosen", rejected="rejected"),
    lambda fields: isinstance(fields["chosen"], list) and fields["messages"] == fields["chosen"],
  ),
  "ShareGPT": Format(
    ("conversations",), _renamed(messages="conversations"), none_of("messages", "conversation")
  ),
  "conversation": Format(("conversation",), _conversation, none_of("messages")),
  "RewardBench 2": Format(("chosen", "rejected"), _lists, _are_lists),
  "SHP": Format(("history", "human_ref_A", "human_ref_B", "labels"), _shp),
  "TL;DR comparisons": Format(("info", "summaries", "choice"), _tldr),
  "WebGPT comparisons": Format(("question", "answer_0", "answer_1", "score_0", "score_1"), _webgpt),
  "HelpSteer 2 preference": Format(
    ("prompt", "response_1", "response_2", "preference_strength"), _helpsteer_preference
  ),
  "UltraFeedback": Format(
    ("instruction", "completions"), _ultrafeedback, has_objects("completions")
  ),
  "Nectar": Format(("prompt", "answers"), _nectar, has_objects("answers")),
  "PKU-SafeRLHF": Format(("prompt", "response_0", "response_1", "better_response_id"), _safe_rlhf),
  "Stack Exchange pairs": Format(
    ("question", "response_j", "response_k"),
    _renamed(question="question", chosen="response_j", rejected="response_k"),
  ),
  "Dolly": Format(("instruction", "context"), _with_extra("context"), none_of("input")),
  "Alpaca": Format(("instruction", "input"), _with_extra("input"), none_of("context")),
  "GSM8K": Format(
    ("question", "answer"),
    _renamed(question="question", response="answer"),
    none_of(*_ANSWERED),
  ),
  "MATH": Format(("problem",), _renamed(question="problem"), none_of(*_ASKED)),
  "input and output": Format(
    ("input", "output"), _renamed(prompt="input", output="output"), none_of(*_ASKED)
  ),
}
