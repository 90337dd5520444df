"""Schema of rows: turns the columns of common formats into prompts and answers.

| kind           | columns                                                                         |
|----------------|---------------------------------------------------------------------------------|
| demonstrations | a prompt and `response`, `completion`, `output`, `solution` or `chosen` (first  |
|                | one present)                                                                    |
|                | or `messages` that end with an assistant turn                                   |
|                | or `text` alone: an empty prompt, plain language modelling                      |
|                | or judged answers: the best one                                                 |
|                | (one with the `label` false or 0 is left out and counted)                       |
| preferences    | judged answers: every pair of them, unless it is a tie                          |
| comparisons    | judged answers: every pair that was compared, and the share of the verdicts     |
|                | that prefer the first answer; a tie counts as half                              |
| rankings       | judged answers: all of them, best first                                         |
| unpaired       | a demonstration and `label`: true if desirable, else false                      |
|                | or judged answers: each one. It is desirable if it is `correct`, or, without    |
|                | `correct`, if it wins more often than it loses                                  |
| prompts        | a prompt                                                                        |

A prompt is `prompt`, `question` or `instruction` (text, or `prompt` as messages), or `messages`
that end with a turn of the user or of a tool, or with the answer of another column (for the kind
prompts, a final assistant turn is dropped). `system`, `system_prompt` or `system_message` is its
system turn, or stands before it, and `history`, a list of turns or of pairs of texts, has the turns
before it.
`chosen`, `rejected` and the other answers may be messages. Then the last turn is the answer, and
the turns before it are the prompt. If a row has both a text and messages, they must agree; the
messages are used if the tokenizer has a chat template or if they have more turns, else the text. A
null counts as an absent column.

`formats.FORMATS` has the published formats that are read as well. A column that changes the prompt
and is not read, such as `tools`, is refused by name, and so are columns that contradict each other.
Other columns are named when a run starts, and kept for reward functions.

Judged answers are a prompt and

- `chosen` and `rejected`; or
- `responses`, a list of texts or of objects with `text`, judged in one of these ways:
  - each has a `rank` (lower is better), a `score` (higher is better) or `correct` (true or false);
  - `annotations` or `preferences` list votes: `preferred` is the index of the better response, or
    null for a tie; `a` and `b` are the indices of the compared responses (0 and 1 by default if
    there are just two); `annotator` names the judge; `probability`, if given, is the judge's
    probability that `a` is better, a soft label for comparisons. Rows without votes are skipped.

Several votes on the same two answers are decided by majority: the verdict with the most votes (ties
are a verdict too), or a tie if there is no such verdict. Votes of different annotators on the same
responses to the same prompt count together even if each has a row of its own. With `votes="each"`
every vote is a separate verdict; a model trained on them sees the share of the votes as a soft
label. In a ranking, answers are ordered by wins minus losses. An `annotator` restricts all this to
the votes of one annotator or group. For rows judged as a whole, the column `annotator` names the
judge.
"""

import collections
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

from rlhf_jax.data import formats
from rlhf_jax.data.formats import Skip, fail
from rlhf_jax.data.formats import given as _given
from rlhf_jax.data.sources import Row
from rlhf_jax.data.tokenizer import Messages, Prompt

KindName = Literal[
  "demonstrations", "preferences", "comparisons", "rankings", "unpaired", "prompts"
]
Votes = Literal["majority", "each"]
ROLES = ("system", "user", "assistant", "tool")
# Names that other tools give the roles.
_ROLE_NAMES = {
  **{role: role for role in ROLES},
  "developer": "system",
  **dict.fromkeys(("human", "prompter"), "user"),
  **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "claude", "bot", "model"), "assistant"),
}
_TOOL_ROLES = ("function", "function_call", "observation", "ipython")
_ANSWERS = ("response", "completion", "output", "solution", "chosen")
_TEXT_PROMPTS = ("prompt", "question", "instruction")
_SYSTEMS = ("system", "system_prompt", "system_message")
# Columns of a row, and keys of a turn, that change what a model should read.
_CHANGE_PROMPT = (
  *(
    "conversation",
    "conversations",
    "context",
    "contexts",
    "document",
    "documents",
    "history",
    "input",
    *_SYSTEMS,
  ),
  "chat_template_kwargs",
  *("tools", "tool_calls", "functions", "image", "images", "audio", "audios", "video", "videos"),
)
_CHANGE_TURN = (
  *("tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking"),
  *("image", "images", "audio", "audios", "video", "videos"),
)
# Fixes of columns that are no text for a prompt.
_FIXES = {
  "chat_template_kwargs": "the chat template has the same variables in all rows: set them as in"
  " data.template_args=enable_thinking:false, and data.ignore=chat_template_kwargs"
}
# Columns that make the prompt of a row, or are refused as they would change it; and of an answer.
PROMPT_COLUMNS = (*_TEXT_PROMPTS, "messages", *_CHANGE_PROMPT)
ANSWER_COLUMNS = (*_ANSWERS, "label")
# Start of a list of turns, or of one, that JSON or Python wrote; then their keys.
_WRITTEN_CHAT = re.compile(r"""\s*\[?\s*\{\s*(["'])(role|content|from|value)\1\s*:""")
_WRITTEN_ROLE = re.compile(r"""[{,]\s*(["'])(?:role|from)\1\s*:\s*(["'])(?P<role>\w+)\2\s*[,}]""")
_WRITTEN_CONTENT = re.compile(r"""[{,]\s*(["'])(content|value)\1\s*:""")
VOTE_COLUMNS = ("annotations", "preferences")
_SCORES = ("score_{}", "{}_score", "{}_rating", "{}-rating")
_OF_CHAT = ("role", "parent_id")  # Columns of a row that is a message, as in OASST.
_MARKED = re.compile(r"\A\s*Assistant:")
_VALUES = {"rank": -1, "score": 1, "correct": 1}  # Name -> sign, 1 if more is better.


class Example(NamedTuple):
  """One training example, as text.

  Attributes:
    prompt: Text or messages; "" for plain language modelling.
    answers: The response, or the chosen and the rejected one, or the two of a comparison, or a
      ranking from best to worst, or nothing.
    labels: For rankings, the rank of each answer; for unpaired, 1 if it is desirable, else 0; for
      comparisons, the share of the verdicts that prefer the first answer.
    skip: Reason to skip the example: "ties", "not_judged" by the requested annotator, or
      "undesirable" by its label.
  """

  prompt: Prompt
  answers: tuple[str, ...]
  labels: tuple[float, ...] = ()
  skip: str = ""

  @property
  def key(self) -> str:
    """Key of a split into training and held-out rows: equal keys stay on one side."""
    if self.prompt == "":
      return self.answers[0]
    if isinstance(self.prompt, str):
      return self.prompt
    return self.prompt[0]["content"] if len(self.prompt) == 1 else json.dumps(self.prompt)


class Parsed(NamedTuple):
  """Examples of a row.

  Attributes:
    examples: One or more examples that share the prompt.
    unread: Columns of the row that were not read.
    heard: True if judgements of annotators were read.
  """

  examples: list[Example]
  unread: frozenset[str]
  heard: bool = False


def is_answer(turn: Any) -> bool:
  """Returns True for a turn of the assistant in a list of messages."""
  if not isinstance(turn, dict):
    return False
  role = turn.get("from", turn.get("role"))
  return isinstance(role, str) and _ROLE_NAMES.get(role) == "assistant"


class _Fields(dict[str, Any]):
  """Columns of a row that remember which of them were read; `get` does not count as reading."""

  def __init__(self, fields: Mapping[str, Any]):
    super().__init__(fields)
    self.read: set[str] = set()
    self.unread: set[str] = set()  # Keys inside columns.
    self.names: dict[str, str] = {}  # Column -> its name in the file, where they differ.

  def __getitem__(self, name: str) -> Any:
    self.read.add(name)
    return super().__getitem__(name)


def parse_row(kind: KindName, row: Row, **options: Any) -> list[Example]:
  """Returns the examples of a row; see `parse`."""
  return parse(kind, row, **options).examples


def parse(
  kind: KindName,
  row: Row,
  *,
  prefer_messages: bool,
  annotator: str = "",
  votes: Votes = "majority",
) -> Parsed:
  """Reads the columns that `kind` needs.

  Args:
    kind: Kind of examples.
    row: The row.
    prefer_messages: Use `messages` even if the row also has a prompt as text.
    annotator: Annotator whose judgements count; "" counts those of all.
    votes: Rule for several judgements of the same two answers.

  Raises:
    DataError: If a column is missing, has the wrong type or contradicts another one, a text is
      empty, or a column that changes the prompt is not read.
  """
  try:
    plain, taken = formats.normalized(row, prefer_messages)
    fields = _Fields(plain.fields)
    fields.names = {
      new: old
      for new in plain.fields.keys() - row.fields.keys()
      for old in taken
      if row.fields.get(old) is plain.fields[new]
    }
    examples, heard = _examples(
      kind, row._replace(fields=fields), prefer_messages, annotator, votes
    )
  except Skip as skip:
    return Parsed([Example("", ("",), skip=skip.reason)], frozenset(), True)
  values = {name for name, value in row.fields.items() if not _is_empty(value)}
  unread = values - fields.read - taken
  for name in _CHANGE_PROMPT:
    if name in unread:
      problem = "this column changes the prompt, and nothing says how"
      fix = f"write it into the prompt, or leave it out: data.ignore={name}"
      fail(row, name, problem, _FIXES.get(name, fix))
  examples = [_with_turns(_unmarked(example), prefer_messages) for example in examples]
  return Parsed(examples, frozenset(unread | fields.unread), heard)


def _unmarked(example: Example) -> Example:
  """Returns an example whose answers do not repeat the "Assistant:" that its prompt ends with."""
  prompt, matches = example.prompt, [_MARKED.match(answer) for answer in example.answers]
  if isinstance(prompt, str) and prompt.rstrip().endswith("\n\nAssistant:") and all(matches):
    return example._replace(answers=tuple(_MARKED.sub("", text) for text in example.answers))
  return example


def _with_turns(example: Example, chat: bool) -> Example:
  """Returns an example whose prompt has the turns of a transcript instead of its text.

  Without a chat template the text of a transcript stays as it is, but in messages: they are written
  as a transcript, and one in another would have its markers twice.
  """
  prompt, before = example.prompt, []
  if not isinstance(prompt, str):
    *before, last = prompt
    prompt, chat = last["content"], True
  turns = formats.marked_turns(prompt) or (formats.transcript_turns(prompt) if chat else [])
  if not turns or any(turn["role"] != "system" for turn in before):
    return example
  answers = tuple(answer.strip() for answer in example.answers)
  return example._replace(prompt=[*before, *turns], answers=answers)


def _examples(
  kind: KindName, row: Row, prefer_messages: bool, annotator: str, votes: Votes
) -> tuple[list[Example], bool]:
  """Returns the examples of a row, and whether annotators judged it."""
  if kind == "prompts":
    return [Example(_prompt_alone(row, prefer_messages), ())], False
  answered = _first_given(row.fields, _ANSWERS) or not _given(row.fields, "responses")
  if kind == "demonstrations" and answered:
    example = _demonstration(row, prefer_messages)
    # Text without a prompt answers nothing: its label is another matter, such as a sentiment.
    judged = bool(example.prompt) and row.fields.get("label") in (0, 1)
    undesirable = judged and not row.fields["label"]
    return [example._replace(skip="undesirable" if undesirable else "")], False
  if kind == "unpaired" and (labelled := _labelled(row, prefer_messages)):
    return labelled, False
  if kind == "unpaired" and not any(_given(row.fields, n) for n in ("chosen", "responses")):
    _fail_missing(row, ("label", "chosen", "responses"))
  judged = _judged(row, prefer_messages, annotator, votes)
  if not judged.verdicts:
    return [Example(judged.prompt, tuple(judged.answers), skip="not_judged")], True
  return _FROM_JUDGED[kind](judged), True


def _prompt_alone(row: Row, prefer_messages: bool) -> Prompt:
  """Returns the prompt of a row of any kind, whose answer may be there or not."""
  # The turns before an answer are the prompt in every kind, so that all kinds split alike.
  chosen = row.fields.get("chosen")
  turns = _answer(row, "chosen")[0] if isinstance(chosen, list) else []
  if isinstance(chosen, str):
    _require_no_chat(row, "chosen", chosen)
  return _prompt(row, prefer_messages, ("chosen", turns), cut_answer=True)


def prompt_columns(row: Row) -> dict[str, Any]:
  """Returns `prompt`, `messages`, or both, which are read as the prompt of a row is.

  Raises:
    DataError: The row has no prompt.
    Skip: The row is left out.
  """
  text, turns = (_prompt_alone(formats.normalized(row, on)[0], on) for on in (False, True))
  if not isinstance(text, str):
    return {"messages": text}
  return {"prompt": text} | ({} if isinstance(turns, str) else {"messages": turns})


def comparison_kind(row: Row) -> KindName:
  """Returns "rankings" if a row orders a list of responses, "preferences" if it compares two."""
  if formats.score_of(row.fields):
    return "rankings"
  try:
    fields = formats.normalized(row, chat=True)[0].fields
  except Skip:
    return "preferences"
  ranked = _given(fields, "responses") and not _given(fields, "annotations")
  return "rankings" if ranked else "preferences"


class Verdict(NamedTuple):
  """A comparison of the answers `a` and `b`; `preferred` is one of the two, or None for a tie.

  `probability` is the judge's probability that `a` is better, if given.
  """

  a: int
  b: int
  preferred: int | None
  annotator: str | None = None
  probability: float | None = None

  @property
  def share(self) -> float:
    """Share of the vote that goes to `a`."""
    if self.probability is not None:
      return self.probability
    return 0.5 if self.preferred is None else float(self.preferred == self.a)


class _Judged(NamedTuple):
  """A prompt, its answers, and the verdicts on them that count."""

  prompt: Prompt
  answers: list[str]
  verdicts: list[Verdict]

  @property
  def merits(self) -> list[int]:
    """Wins minus losses of each answer."""
    merits = [0] * len(self.answers)
    for a, b, preferred, *_ in self.verdicts:
      if preferred is not None:
        merits[preferred] += 1
        merits[a + b - preferred] -= 1
    return merits


def _pairs(judged: _Judged) -> list[Example]:
  """Makes an example of every verdict."""
  examples = []
  for a, b, preferred, *_ in judged.verdicts:
    chosen, rejected = (b, a) if preferred == b else (a, b)
    pair = judged.answers[chosen], judged.answers[rejected]
    examples.append(Example(judged.prompt, pair, skip="ties" if preferred is None else ""))
  return examples


def _shares(judged: _Judged) -> list[Example]:
  """Makes an example of every pair of answers that was compared, ties included."""
  shares: dict[tuple[int, int], list[float]] = {}
  for verdict in judged.verdicts:
    pair = min(verdict[:2]), max(verdict[:2])
    share = verdict.share if verdict.a == pair[0] else 1 - verdict.share
    shares.setdefault(pair, []).append(share)
  return [
    Example(judged.prompt, (judged.answers[a], judged.answers[b]), (sum(votes) / len(votes),))
    for (a, b), votes in shares.items()
  ]


def _ranking(judged: _Judged) -> list[Example]:
  """Makes one example of all answers, best first."""
  merits = judged.merits
  levels = sorted(set(merits), reverse=True)
  order = sorted(range(len(merits)), key=lambda i: -merits[i])
  answers = tuple(judged.answers[i] for i in order)
  ranks = tuple(levels.index(merits[i]) for i in order)
  return [Example(judged.prompt, answers, ranks, skip="" if any(ranks) else "ties")]


def _best(judged: _Judged) -> list[Example]:
  """Makes an example of the best answer, the first one if several are."""
  (ranking,) = _ranking(judged)
  return [ranking._replace(answers=ranking.answers[:1], labels=())]


def _good_and_bad(judged: _Judged) -> list[Example]:
  """Makes an example of every answer."""
  return [
    Example(judged.prompt, (answer,), (int(merit > 0),), skip="" if merit else "ties")
    for answer, merit in zip(judged.answers, judged.merits, strict=True)
  ]


_FROM_JUDGED: dict[str, Callable[[_Judged], list[Example]]] = {
  "demonstrations": _best,
  "preferences": _pairs,
  "comparisons": _shares,
  "rankings": _ranking,
  "unpaired": _good_and_bad,
}


def _judged(row: Row, prefer_messages: bool, annotator: str, votes: Votes) -> _Judged:
  """Reads the judged answers of a row and the verdicts of the requested annotator."""
  fields = row.fields
  if _given(fields, "chosen") or not _given(fields, "responses"):
    prompt, answers = _chosen_and_rejected(row, prefer_messages)
    verdicts = [Verdict(0, 1, 0, _annotator(row))]
  else:
    prompt, answers = _prompt(row, prefer_messages), _responses(row)
    if len(answers) < 2:
      raise Skip("single_responses")
    verdicts = _verdicts(row, len(answers))
  if annotator:
    if any(verdict.annotator is None for verdict in verdicts):
      fail(row, "annotator", "missing", f"data.annotator={annotator} needs to know who judged")
    verdicts = [verdict for verdict in verdicts if str(verdict.annotator) == annotator]
  return _Judged(prompt, answers, _majority(verdicts) if votes == "majority" else verdicts)


def _majority(votes: Sequence[Verdict]) -> list[Verdict]:
  """Reduces votes to one verdict per pair of compared answers; a single vote is kept."""
  votes_on: dict[tuple[int, int], list[Verdict]] = {}
  for vote in votes:
    votes_on.setdefault((min(vote[:2]), max(vote[:2])), []).append(vote)
  verdicts = []
  for (a, b), ballots in votes_on.items():
    (preferred, most), *rest = collections.Counter(v.preferred for v in ballots).most_common(2)
    tied = rest and rest[0][1] == most
    majority = Verdict(a, b, None if tied else preferred)
    verdicts.append(ballots[0] if len(ballots) == 1 else majority)
  return verdicts


def _chosen_and_rejected(row: Row, prefer_messages: bool) -> tuple[Prompt, list[str]]:
  if not _given(row.fields, "chosen"):
    _fail_missing(row, ("chosen", "responses"))
  chosen_turns, chosen = _answer(row, "chosen")
  rejected_turns, rejected = _answer(row, "rejected")
  if chosen_turns != rejected_turns:
    fail(
      row,
      "rejected",
      "its turns before the answer differ from those of `chosen`",
      "give both answers the same prompt",
    )
  for side in _SCORES:
    scores: list[Any] = [row.fields.get(side.format(n)) for n in ("chosen", "rejected")]
    if all(type(score) in (int, float) for score in scores) and scores[0] < scores[1]:
      name = side.format("chosen")
      problem = f"{scores[0]} is less than that of `rejected`, {scores[1]}"
      fail(
        row, name, problem, f"swap the two responses, or leave the score out: data.ignore={name}"
      )
  cut_answer = _repeats(row, "chosen", chosen)
  return _prompt(row, prefer_messages, ("chosen", chosen_turns), cut_answer), [chosen, rejected]


def _responses(row: Row) -> list[str]:
  """Texts of a list of judged answers; empty ones are valid, since silence can be judged too."""
  responses = _list(row, "responses")
  texts = []
  for i, response in enumerate(responses):
    text = response.get("text") if isinstance(response, dict) else response
    if not isinstance(text, str):
      problem = f"expected text or an object with `text`, found {formats.describe(response)}"
      fail(row, f"responses[{i}]", problem, "write it as text")
    _require_no_chat(row, f"responses[{i}]", text)
    texts.append(text)
  return texts


def votes_of(row: Row) -> tuple[list[str], list[Verdict]] | None:
  """Returns the texts of the `responses` of a row and the votes on them; None without votes.

  Raises:
    DataError: A column of the two holds something else.
  """
  if not _first_given(row.fields, VOTE_COLUMNS):
    return None
  texts = _responses(row)
  return texts, _verdicts(row, len(texts))


def _verdicts(row: Row, count: int) -> list[Verdict]:
  """Lists all comparisons of the `count` responses of a row."""
  for name, other in itertools.pairwise(name for name in VOTE_COLUMNS if _given(row.fields, name)):
    if row.fields[other] != row.fields[name]:
      _contradict(row, name, other)
  column = _first_given(row.fields, VOTE_COLUMNS)
  if column and row.fields[column] == []:
    return []
  if column:
    return [_vote(row, column, i, vote, count) for i, vote in enumerate(_list(row, column))]
  _, values = _values(row)
  verdicts = []
  for a, b in itertools.combinations(range(count), 2):
    better = a if values[a] > values[b] else b
    preferred = None if values[a] == values[b] else better
    verdicts.append(Verdict(a, b, preferred, _annotator(row)))
  return verdicts


def _vote(row: Row, column: str, i: int, vote: Any, count: int) -> Verdict:
  """Reads entry `i` of a column of votes on `count` responses."""
  at = f"{column}[{i}]"
  fix = 'write {"annotator": "...", "a": 0, "b": 1, "preferred": 0, 1 or null}'
  if not isinstance(vote, dict):
    fail(row, at, f"expected a vote, found {formats.describe(vote)}", fix)
  pair: tuple[Any, Any] = (vote.get("a"), vote.get("b"))
  if count == 2 and pair == (None, None):
    pair = (0, 1)
  for name, index in zip("ab", pair, strict=True):
    if type(index) is not int or not 0 <= index < count or pair[0] == pair[1]:
      problem = (
        f"expected one of two different indices below {count}, found {formats.describe(index)}"
      )
      fail(row, f"{at}.{name}", problem, fix)
  if "preferred" not in vote:
    fail(row, f"{at}.preferred", f"missing; the vote has only {sorted(vote)}", fix)
  preferred = vote["preferred"]
  if preferred is not None and (type(preferred) is not int or preferred not in pair):
    problem = f"expected {pair[0]}, {pair[1]} or null, found {formats.describe(preferred)}"
    fail(row, f"{at}.preferred", problem, fix)
  probability = vote.get("probability")
  if probability is not None and (
    type(probability) not in (int, float) or not 0 <= probability <= 1
  ):
    problem = f"expected a number from 0 to 1, found {formats.describe(probability)}"
    fail(row, f"{at}.probability", problem, "write the probability that `a` is better")
  annotator = vote["annotator"] if "annotator" in vote else _annotator(row)
  return Verdict(*pair, preferred, annotator, probability)


def _annotator(row: Row) -> Any:
  """Returns the annotator of a row that was judged as a whole."""
  return row.fields["annotator"] if _given(row.fields, "annotator") else None


def _values(row: Row) -> tuple[str, list[float]]:
  """Name of the field that judges the responses, and a value for each, higher if better."""
  responses = _list(row, "responses")
  first = responses[0] if isinstance(responses[0], dict) else {}
  name = _first_given(first, tuple(_VALUES))
  if name is None:
    wanted = ", ".join(f"`{name}`" for name in _VALUES)
    fix = f"give every response one of {wanted}, or the row `{'` or `'.join(VOTE_COLUMNS)}`"
    fail(row, "responses[0]", "nobody has judged it", fix)
  values = []
  for i, response in enumerate(responses):
    value: Any = response.get(name) if isinstance(response, dict) else None
    at = f"responses[{i}].{name}"
    if name == "correct":
      value = _flag(row, at, value)
    elif type(value) not in (int, float) or not -math.inf <= value <= math.inf:  # Not a NaN.
      fail(
        row, at, f"expected a number, found {formats.describe(value)}", "give every response one"
      )
    values.append(_VALUES[name] * value)
  for other, sign in _VALUES.items():
    also = [response.get(other) for response in responses]
    if other == name or not all(type(value) in (int, float, bool) for value in also):
      continue
    for (a, x), (b, y) in itertools.combinations(zip(values, also, strict=True), 2):
      if (a - b) * (x - y) * sign < 0:
        problem = f"`{name}` and `{other}` order them differently"
        fail(row, "responses", problem, "keep one of the two")
  return name, values


def _labelled(row: Row, prefer_messages: bool) -> list[Example]:
  """Reads answers that were judged separately: by `label`, or by `correct` in `responses`."""
  if _given(row.fields, "label"):
    label = int(_flag(row, "label", row.fields["label"]))
    return [_demonstration(row, prefer_messages)._replace(labels=(label,))]
  if not _given(row.fields, "responses") or _first_given(row.fields, VOTE_COLUMNS):
    return []
  name, values = _values(row)
  if name != "correct":
    return []
  prompt = _prompt(row, prefer_messages)
  return [
    Example(prompt, (answer,), (int(value),))
    for answer, value in zip(_responses(row), values, strict=True)
  ]


def _demonstration(row: Row, prefer_messages: bool) -> Example:
  fields = row.fields
  name = _first_given(fields, _ANSWERS)
  if name:
    turns, answer = _answer(row, name)
    for other in _ANSWERS:
      if other != name and _given(fields, other) and _answer(row, other)[1] != answer:
        _contradict(row, name, other)
    cut_answer = _repeats(row, name, answer)
    return Example(_prompt(row, prefer_messages, (name, turns), cut_answer), (answer,))
  if _given(fields, "messages"):
    turns, answer = _answer(row, "messages")
    if not turns:
      fail(row, "messages", "an answer without a question", "put text without a prompt in `text`")
    return Example(_prompt(row, prefer_messages, cut_answer=True), (answer,))
  if _given(fields, "text") and not any(_given(fields, name) for name in _TEXT_PROMPTS):
    if parts := [name for name in _OF_CHAT if _given(fields, name)]:
      problem = "the row is one message of a chat, not a text"
      fix = f"write each chat as `messages`, or set data.ignore={','.join(parts)}"
      fail(row, parts[0], problem, fix)
    return Example("", (_text(row, "text"),))
  _fail_missing(row, (*_ANSWERS, "messages", "text"))


def _repeats(row: Row, name: str, answer: str) -> bool:
  """Returns True if `messages` end with an answer, which must be that of the column `name`."""
  if name == "messages" or not _given(row.fields, "messages"):
    return False
  last = _messages(row, "messages")[-1]
  if last["role"] == "assistant" and last["content"].strip() != answer.strip():
    _contradict(row, name, "messages")
  return last["role"] == "assistant"


def _prompt(
  row: Row,
  prefer_messages: bool,
  before_answer: tuple[str, Messages] = ("", []),
  cut_answer: bool = False,
) -> Prompt:
  """Reads the prompt of a row.

  Args:
    row: The row.
    prefer_messages: True to take messages where the row also has the same as text.
    before_answer: Column of an answer, and the turns before it if it is given as messages.
    cut_answer: True if `messages` may end with an answer.
  """
  name, turns = _prompt_turns(row, before_answer, cut_answer)
  text_name, text = _prompt_text(row)
  if text is not None and turns:
    if not _covers(turns, text):
      _contradict(row, text_name, name)
    # The text may be one of several turns.
    if not prefer_messages and formats.words(text) == formats.words(
      " ".join(t["content"] for t in turns)
    ):
      turns = []
  if not turns and text is None:
    _fail_missing(row, (*_TEXT_PROMPTS, "messages"))
  turns = _checked_turns(row, name, turns) if turns else turns
  return _after(row, turns or str(text), prefer_messages)


def _prompt_turns(
  row: Row, before_answer: tuple[str, Messages], cut_answer: bool
) -> tuple[str, Messages]:
  """Reads the prompt as messages, and the name of their column; none if there are none."""
  found: list[tuple[str, Messages]] = []
  if _given(row.fields, "messages"):
    turns = _messages(row, "messages")
    if cut_answer and turns[-1]["role"] == "assistant":
      turns = turns[:-1]
    found.append(("messages", _checked_turns(row, "messages", turns)))
  if isinstance(row.fields.get("prompt"), list):
    found.append(("prompt", _checked_turns(row, "prompt", _messages(row, "prompt"))))
  if before_answer[1]:
    found.append(before_answer)
  if not found:
    return "", []
  for other, turns in found[1:]:
    if turns != found[0][1]:
      _contradict(row, found[0][0], other)
  return found[0]


def _prompt_text(row: Row) -> tuple[str, str | None]:
  """Reads the prompt as text, and the name of its column."""
  names = [n for n in _TEXT_PROMPTS if _given(row.fields, n)]
  names = [n for n in names if n != "prompt" or not isinstance(row.fields.get(n), list)]
  texts = [_text(row, name) for name in names]
  for name, text in zip(names[1:], texts[1:], strict=True):
    if text != texts[0]:
      _contradict(row, names[0], name)
  return (names[0], texts[0]) if texts else ("", None)


def _after(row: Row, prompt: Prompt, prefer_messages: bool) -> Prompt:
  """Puts the system turn and the history of a row before its prompt."""
  system, history = _system(row), _history(row)
  if not (system or history):
    return prompt
  if isinstance(prompt, str) and not (history or prefer_messages):
    return f"{system}\n\n{prompt}"
  turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
  if history and len(turns) > 1:
    fail(row, "history", "the prompt has several turns of its own", "keep one of the two")
  if system and turns[0]["role"] == "system":
    if turns[0]["content"] != system:
      fail(row, "system", "the messages start with another system turn", "keep one of the two")
    return turns
  return [*([{"role": "system", "content": system}] if system else []), *history, *turns]


def _system(row: Row) -> str:
  names = [name for name in _SYSTEMS if _given(row.fields, name)]
  for name in names:
    if not isinstance(row.fields[name], str):
      fail(
        row, name, f"expected text, found {formats.describe(row.fields[name])}", "write it as text"
      )
  if len({row.fields[name] for name in names}) > 1:
    _contradict(row, *names)
  return row.fields[names[0]] if names and row.fields[names[0]].strip() else ""


def _history(row: Row) -> Messages:
  """Reads the turns before the prompt: messages, or pairs of a question and an answer."""
  value = row.fields.get("history")
  if not isinstance(value, list) or not value:
    return []
  pairs: list[Any] = row.fields["history"]
  if all(isinstance(pair, dict) for pair in pairs):
    return _messages(row, "history")
  turns = []
  for i, pair in enumerate(pairs):
    texts = isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
    if not texts:
      fix = 'write ["question", "answer"] or {"role": "user", "content": "..."}'
      fail(row, f"history[{i}]", f"expected two texts, found {formats.describe(pair)}", fix)
    turns += [
      {"role": role, "content": text}
      for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
  return turns


def _covers(turns: Messages, text: str) -> bool:
  """Returns True if a text is a transcript of turns, or the content of one of them."""
  contents = [turn["content"] for turn in turns]
  return formats.words(text) in [
    formats.words(content) for content in (" ".join(contents), *contents)
  ]


def _answer(row: Row, name: str) -> tuple[Messages, str]:
  """Reads an answer: the turns before it, if it is given as messages, and its text."""
  if not _given(row.fields, name):
    _fail_missing(row, (name,))
  if not isinstance(row.fields[name], (list, dict)):
    if name == "messages":
      _messages(row, name)
    return [], _text(row, name)
  turns = _messages(row, name)
  if turns[-1]["role"] != "assistant":
    fail(
      row,
      name,
      f"the last turn is of the {turns[-1]['role']}, so there is no answer",
      "end with an assistant turn, or add the answer as `response`",
    )
  at = f"{name}[{len(turns) - 1}]"
  if not turns[-1]["content"].strip():
    fail(row, f"{at}.content", "the answer is empty", "remove the row")
  value = row.fields[name]
  if isinstance(value, list) and value[-1].get("weight") == 0:
    fail(row, f"{at}.weight", "is 0: nothing is to be learnt from the answer", "remove the row")
  return turns[:-1], turns[-1]["content"]


def _checked_turns(row: Row, name: str, turns: Messages) -> Messages:
  """Checks that turns can be answered: the last one is of a user or a tool, not empty."""
  if not turns or turns[-1]["role"] not in ("user", "tool"):
    last = f"ends with a turn of the {turns[-1]['role']}" if turns else "has no user turn"
    fail(row, name, f"the prompt {last}", "end it with a user turn; answers go in their own column")
  if not turns[-1]["content"].strip():
    fail(row, f"{name}[{len(turns) - 1}].content", "the prompt is empty", "remove the row")
  return turns


def _messages(row: Row, name: str) -> Messages:
  """Reads and checks a list of turns, or a single one."""
  value = row.fields[name]
  fix = 'write [{"role": "user", "content": "..."}, ...]'
  if isinstance(value, dict):
    value = [value]
  if not isinstance(value, list) or not value:
    fail(row, name, f"expected a list of messages, found {formats.describe(value)}", fix)
  turns = []
  for i, turn in enumerate(value):
    at = f"{name}[{i}]"
    if not isinstance(turn, dict):
      fail(row, at, f"expected a message, found {formats.describe(turn)}", fix)
    for key in _CHANGE_TURN:
      if turn.get(key) not in (None, "", [], {}):
        fail(row, f"{at}.{key}", "not supported: turns are text", "write it into the content")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    if not isinstance(turn.get(role_key), str):
      actual = formats.describe(turn[role_key]) if role_key in turn else f"only {sorted(turn)}"
      fail(row, f"{at}.{role_key}", f"expected text, found {actual}", fix)
    if turn[role_key] in _TOOL_ROLES:
      problem = f"turns of the role {turn[role_key]!r} are not supported"
      fix = "use the role tool for what a tool returned, or remove the row"
      fail(row, f"{at}.{role_key}", problem, fix)
    if turn[role_key] not in _ROLE_NAMES:
      problem = f"unknown role {turn[role_key]!r}"
      fail(row, f"{at}.{role_key}", problem, f"use one of {', '.join(ROLES)}")
    content = _content(row, f"{at}.{content_key}", turn, content_key, fix)
    turns.append({"role": _ROLE_NAMES[turn[role_key]], "content": content})
    if isinstance(row.fields, _Fields):
      others = turn.keys() - {role_key, content_key, *_CHANGE_TURN}
      row.fields.unread |= {f"{name}[].{key}" for key in others if turn[key] is not None}
  return turns


def _content(row: Row, at: str, turn: Mapping[str, Any], key: str, fix: str) -> str:
  """Reads the content of a turn: text, or a list of parts of text, which are joined by lines."""
  value = turn.get(key)
  if not isinstance(value, list) or not value:
    if not isinstance(value, str):
      actual = formats.describe(value) if key in turn else f"only {sorted(turn)}"
      fail(row, at, f"expected text, found {actual}", fix)
    return value
  texts = []
  for i, part in enumerate(value):
    text = part.get("text") if isinstance(part, dict) else part
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    if not isinstance(text, str) or not str(kind).endswith("text"):
      problem = f"a part of the type {kind!r} is not supported: turns are text"
      fail(row, f"{at}[{i}]", problem, "remove the row")
    texts.append(text)
  return "\n".join(texts)


def _text(row: Row, name: str) -> str:
  value = row.fields[name]
  if not isinstance(value, str):
    fail(row, name, f"expected text, found {formats.describe(value)}", "write it as text")
  _require_no_chat(row, name, value)
  if not value.strip():
    fix = "remove the row"
    if name in _TEXT_PROMPTS:
      fix += ", or give plain text without a prompt in the column `text` alone"
    fail(row, name, "the text is empty", fix)
  return value


def _require_no_chat(row: Row, at: str, text: str) -> None:
  """Refuses turns that a table holds as text: they would be learnt as they are written."""
  if not (_WRITTEN_CHAT.match(text) and _WRITTEN_CONTENT.search(text)):
    return
  if any(match["role"] in _ROLE_NAMES for match in _WRITTEN_ROLE.finditer(text)):
    problem = "the text is a list of messages, and would be learnt with its brackets and roles"
    fail(row, at, problem, "save it as JSON Lines, with the list itself")


def _list(row: Row, name: str) -> list[Any]:
  value = row.fields[name]
  if not isinstance(value, list) or not value:
    fail(row, name, f"expected a list, found {formats.describe(value)}", "write [...]")
  return value


def _flag(row: Row, at: str, value: Any) -> bool:
  if not isinstance(value, (bool, int, float)) or value not in (0, 1):
    fail(
      row, at, f"expected true or false, found {formats.describe(value)}", "write one of the two"
    )
  return bool(value)


def _is_empty(value: Any) -> bool:
  """Returns True for nothing, as a table without a value has it too: an object of nulls."""
  if isinstance(value, dict):
    return all(item is None for item in value.values())
  return value in (None, "", [])


def _first_given(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
  return next((name for name in names if _given(fields, name)), None)


def _fail_missing(row: Row, names: tuple[str, ...]) -> NoReturn:
  null = next((name for name in names if name in row.fields and not _given(row.fields, name)), None)
  if null:
    value = "true or false" if null == "label" else "a text"
    fail(row, null, "is null", f"write {value} or remove the row")
  wanted = " or ".join(f"`{name}`" for name in names)
  columns = ", ".join(sorted(row.fields)) or "none"
  fail(
    row,
    names[0],
    f"missing; the row's columns are {columns}",
    f"add {wanted}, or rename the column that has it",
  )


def _contradict(row: Row, name: str, other: str) -> NoReturn:
  problem = f"it and `{other}` are both there and differ"
  fail(row, name, problem, f"keep one of the two, or leave one out: data.ignore={other}")
