"""Encoding and decoding with a Hugging Face fast tokenizer read from a local folder.

Three rules. First, text from a dataset or a user never becomes a control id: `"<|im_end|>"` typed
by a user is encoded as plain characters (`controls`). Control tokens are the added tokens that are
special, that the chat template writes, or that have the form of a marker, such as `<|tool|>`. An
answer may hold those that the template knows but no turn is made of, unless they are special:
`<think>` is a word of the model. Second, a response has the ids that follow the prompt's in the
whole text, as the chat template writes it, up to the end of the turn. Third, a folder is read as
data: no class is picked by name and no code is run (chat templates render in a sandbox, in a
process apart with little time and memory).
"""

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from absl import logging

from rlhf_jax import workdir
from rlhf_jax.data import apart, controls
from rlhf_jax.data.sources import DataError

if TYPE_CHECKING:
  import transformers

Messages: TypeAlias = list[
  dict[str, str]
]  # Turns with `role` (system, user, assistant, tool), `content`.
Prompt: TypeAlias = str | Messages

_SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
_SPEAKER = re.compile(f"\\n\\n({'|'.join(_SPEAKERS.values())}): ?")
_MARKED_LINE = re.compile(r"[#<|\[]")
_MARKER = re.compile(r"<\|[^|<>]+\|>|<+/?[A-Za-z_]+>+|\[/?[A-Z_]+\]")
_OPENING = re.compile(r"\s*<[A-Za-z_]+>\s*")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_PROBE = "\ue000"  # Text of a turn that no template writes.
# Texts after which one is encoded as if in the middle of a text; most merge with none of them.
_ANCHORS = ("\n", "a", ":")
_LONGEST_WORD = 40  # Characters.


_NO_TOOLS = (
  "turns of the role 'tool' need a chat template, which this tokenizer has not; write them into a"
  " user turn, or remove the row"
)
# Variables of a chat template that rows and the tokenizer set.
RESERVED = ("messages", "add_generation_prompt", "tools", "documents")


class Chat(NamedTuple):
  """Variables of a chat template."""

  messages: Messages
  add_generation_prompt: bool


class Exchange(NamedTuple):
  """Ids of a prompt and of responses to it, each with its end token."""

  prompt: list[int]
  responses: list[list[int]]


class Conversation(NamedTuple):
  """Ids of a chat with any number of answers.

  Attributes:
    prompt: Ids before the first answer.
    response: Ids from the first answer to the end of the last one.
    scored: 1 for each id of the response that is one of an answer, else 0.
  """

  prompt: list[int]
  response: list[int]
  scored: list[int]


class Shortened(NamedTuple):
  """A prompt that was cut to a number of tokens.

  Attributes:
    prompt: The prompt that is kept.
    turns: Number of turns that were left out.
    tokens: Number of tokens that were left out.
  """

  prompt: Prompt
  turns: int
  tokens: int


class Tokenizer:
  """A fast tokenizer with the conventions of this package.

  A prompt starts with the tokenizer's own prefix (usually BOS) and has no end token. A response has
  no special tokens except one end token. It is scored: this is how the model learns to stop.
  """

  def __init__(
    self,
    hf: "transformers.PreTrainedTokenizerFast",
    eos_token: str | None = None,
    stop_ids: Iterable[int] = (),
    template_args: Mapping[str, Any] | None = None,
    rows: int | None = None,
  ):
    """Wraps a transformers fast tokenizer.

    Args:
      hf: The tokenizer.
      eos_token: The token that ends a response; by default the one that ends an assistant turn
        of the chat template, or else the tokenizer's EOS.
      stop_ids: Further ids that end a response in sampling.
      template_args: Variables of the chat template, values of JSON; None takes those that the
        tokenizer was saved with.
      rows: Rows of the embedding of the model, if they are known.

    Raises:
      DataError: If `eos_token` is not one token of the vocabulary, or the chat template does not
        read one of its variables.
    """
    self.hf = hf
    backend = hf.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    self._backend = backend
    self._vocab = backend.get_vocab(with_added_tokens=True)
    saved = hf.init_kwargs.get("template_args") or {}
    self._template_args = dict(saved if template_args is None else template_args)
    self._template = template = _Template(hf, self._template_args)
    prompts, closing = self._ids("".join(template.probes)), self._ids(template.closing)
    added = backend.get_added_tokens_decoder()
    known = {
      token.content: i
      for i, token in added.items()
      if token.special
      or controls.is_marker(
        token.content, of_template=i in prompts + closing or token.content in template.source
      )
    }
    spelled = {
      i: text
      for i in {*prompts, *closing}.difference(added)
      if controls.is_bracketed(text := backend.decode([i]).strip())
    }
    unknown = set() if hf.unk_token_id == hf.eos_token_id else {hf.unk_token_id}
    self._control_ids = frozenset([*known.values(), *spelled]) - unknown
    self._turn_end = next((i for i in closing if i in self._control_ids), None)
    chosen = eos_token or hf.init_kwargs.get("response_end")
    self._chosen_end = self.token_id(chosen) if chosen else None
    ends = [self._chosen_end, self._turn_end, hf.eos_token_id]
    self._end_id = next((i for i in ends if i is not None), None)
    stops = {i for i in (*ends, *stop_ids) if i is not None}
    if absent := sorted(stops.difference(self._vocab.values())):
      logging.warning("eos_token_id: %s not in the vocabulary of the tokenizer, ignored", absent)
    self._stop_ids = tuple(sorted(stops.intersection(self._vocab.values()) - {self._end_id}))
    # Words of the model, such as <think>: the template knows them, and no turn is made of them.
    turns = {*prompts, self._end_id, *self._stop_ids}
    in_answers = [
      text
      for text, i in known.items()
      if added[i].special or i in turns or text not in template.source
    ]
    self._silent = frozenset([*(known[text] for text in in_answers), *spelled]) - unknown
    self._encoder = controls.Controls(backend, known, spelled.values())
    self._control_text = controls.Spelling([*known, *spelled.values()])
    self._answer_text = controls.Spelling([*in_answers, *spelled.values()])
    markers = [*spelled.values(), *template.markers]
    self._markers_in_prompts = controls.Spelling([*known, *markers])
    self._markers_in_answers = controls.Spelling([*in_answers, *markers])
    self._prefix = self._added_prefix()
    written = {*turns, *closing, *self._prefix, hf.bos_token_id}
    written |= {i for text, i in known.items() if text in template.source}
    self._unwritten, self._rows = self._silent - written, rows
    self._anchor = self._find_anchor()
    self._lead = self._decoded_lead()

  @functools.cached_property
  def vocab_size(self) -> int:
    """One more than the largest id, added tokens included: the rows that an embedding needs.

    Ids without a row in the embedding of the model are not counted if they are control tokens that
    neither a text nor the chat template writes, such as those of images.
    """
    ids = self._vocab.values()
    size, needed = max(ids) + 1, max(i for i in ids if i not in self._unwritten) + 1
    return size if self._rows is None or needed > self._rows else min(size, self._rows)

  @property
  def vocabulary(self) -> dict[str, int]:
    """The ids of all tokens, added ones included."""
    return self._vocab

  @property
  def bos_id(self) -> int | None:
    """The id that starts a text, if there is one."""
    return self.hf.bos_token_id

  @property
  def eos_id(self) -> int:
    """The id that ends a response in data.

    Raises:
      DataError: If the tokenizer names no end token.
    """
    if self._end_id is None:
      raise DataError("the tokenizer names no end token; choose one with data.end_token")
    return self._end_id

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """The ids that end a response in sampling, `eos_id` first.

    They are those of generation_config.json and config.json, the tokenizer's EOS, and the token
    that ends an assistant turn of the chat template.
    """
    return (self.eos_id, *self.further_stop_ids)

  @property
  def further_stop_ids(self) -> tuple[int, ...]:
    """The `stop_ids` but for `eos_id`; one that a template writes ends a response in data too."""
    return self._stop_ids

  @property
  def pad_id(self) -> int:
    """The id for padding. It may equal `eos_id`: masks come from lengths, never from ids."""
    candidates = (self.hf.pad_token_id, self._end_id, 0)
    return next(i for i in candidates if i is not None and i < self.vocab_size)

  @property
  def has_chat_template(self) -> bool:
    """True if prompts are rendered as chats."""
    return bool(self.hf.chat_template)

  @property
  def lead(self) -> str:
    """Text that the chat template writes between a prompt and its answer, such as a space."""
    return self._template.lead

  @property
  def closing_tag(self) -> str:
    """Tag such as </think> that responses have to write as prompts open it; empty if none do."""
    return self._template.opening.strip().replace("<", "</", 1)

  @property
  def is_exported(self) -> bool:
    """True if this package has saved the tokenizer beside a model, which reads what it learnt."""
    return "response_end" in self.hf.init_kwargs

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of all that determines the ids: vocabulary, rules, chat template, end token."""
    parts = [self._backend.to_str(), self.hf.chat_template, self._end_id]
    parts += [self._template_args] if self._template_args else []
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

  def token_id(self, token: str) -> int:
    """The id of one token given by its exact name.

    Raises:
      DataError: If it is not in the vocabulary.
    """
    if token not in self._vocab:
      raise DataError(
        f"end_token: {token!r} is not a token of this tokenizer; its special tokens are "
        f"{sorted(self.hf.all_special_tokens)}"
      )
    return self._vocab[token]

  def encode_text(self, text: str) -> list[int]:
    """Ids of plain text in the middle of a text, with nothing added and no control ids."""
    return self._in_the_middle([text])[0]

  def encode_prompt(self, prompt: Prompt) -> list[int]:
    """Ids of a prompt, ready for the model to answer.

    With a chat template, text is one user message. Without one, messages are written as a
    transcript that ends in "Assistant:". The empty text is the start of a document: BOS.

    Args:
      prompt: Text, or the messages up to and including the last user turn.

    Returns:
      Ids, starting with the tokenizer's prefix, without an end token.

    Raises:
      DataError: If the template refuses the messages, or an empty prompt has no token to start
        with.
    """
    return self.encode_prompts([prompt])[0]

  def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
    """`encode_prompt` for many prompts at once."""
    rendered = self._rendered([(prompt, None) for prompt in prompts])
    encoded = self._encoder.ids([self._encoder.mark(text) for text in rendered])
    return [[*self._start(prompt), *ids] for prompt, ids in zip(prompts, encoded, strict=True)]

  def encode_response(self, text: str) -> list[int]:
    """Ids of a response to any prompt, and its end token. The text is not changed.

    With a chat template, these are the ids in the answer to a user; without one, those in the
    middle of a text, so that a text brings the space that it starts with.
    """
    return self.encode_responses([text])[0]

  def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode_response` for many texts at once."""
    end = self.eos_id
    if self.has_chat_template:
      return self.encode_exchanges([_PROBE], [texts])[0].responses
    return [[*ids, end] for ids in self._in_the_middle(texts)]

  def encode_exchanges(
    self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]
  ) -> list[Exchange]:
    """Ids of prompts and of responses to them, as they follow each other in the whole text.

    With a chat template, a response is what the template adds to the prompt, up to the token that
    ends the turn. Without one, it is the text itself, and a transcript writes a space before it.
    Where the whole text would merge the end of the prompt and the start of the response into one
    token, the prompt stays as it is, because it is what a model answers.

    Args:
      prompts: Prompts; see `encode_prompt`.
      answers: Texts of the responses to each prompt.
    """
    mark, rendered = self._encoder.mark, self._rendered([(prompt, None) for prompt in prompts])
    with apart.numbered([i for i, texts in enumerate(answers) for _ in texts]):
      wholes = iter(
        self._rendered(
          [
            (prompt, self._continued(answer))
            for prompt, texts in zip(prompts, answers, strict=True)
            for answer in texts
          ]
        )
      )
    marked = [mark(text) for text in rendered]
    encoded = self._encoder.ids(marked)
    pairs = [
      (before, mark(self._tail(prompt, text, next(wholes), answer)))
      for prompt, text, before, texts in zip(prompts, rendered, marked, answers, strict=True)
      for answer in texts
    ]
    responses = iter(self._continue(pairs))
    return [
      Exchange([*self._start(prompt), *ids], [self._ended(next(responses)) for _ in texts])
      for prompt, ids, texts in zip(prompts, encoded, answers, strict=True)
    ]

  def encode_chats(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Conversation]:
    """Ids of whole chats, in which every answer of the assistant is scored.

    The prompt is what stands before the first answer. If the chat template has blocks `generation`,
    these are the answers. Else an answer is what follows its prompt, up to the token that ends the
    turn, as in `encode_exchanges`, and the template has to write the same text for the start of a
    chat as for the whole chat.

    Args:
      prompts: Prompts; their turns may have answers too.
      answers: Text of the last answer of each chat.

    Raises:
      ChatError: The template refuses a chat, writes a turn in another way when turns follow it,
        marks no answer, or ends answers with no token.
      DataError: There is no chat template.
    """
    if not self.has_chat_template:
      raise DataError(
        "data.turns=all needs a chat template, which this tokenizer has not: nothing says where an"
        " answer ends; use data.turns=last"
      )
    chats = {
      i: [*prompt, {"role": "assistant", "content": answer}]
      for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
      if not isinstance(prompt, str)
    }
    if _GENERATION.search(self._template.source):
      found = self._marked_answers(chats)
    else:
      found = self._following_answers({i: c for i, c in chats.items() if len(answers_in(c)) > 1})
    alone = [i for i in range(len(prompts)) if i not in found]
    with apart.numbered(alone):
      exchanges = self.encode_exchanges([prompts[i] for i in alone], [[answers[i]] for i in alone])
    for i, (prompt, (response,)) in zip(alone, exchanges, strict=True):
      found[i] = Conversation(prompt, response, [1] * len(response))
    return [found[i] for i in range(len(prompts))]

  def _marked_answers(self, chats: Mapping[int, Messages]) -> dict[int, Conversation]:
    """Returns the ids of chats whose answers the template marks; see `encode_chats`."""
    turns = [Chat(self._protected(chat), add_generation_prompt=False) for chat in chats.values()]
    with apart.numbered([*chats]):
      texts = self._template.render(turns, controls.MARKS)
    unmarked = [controls.unmarked(self._encoder.mark(text)) for text in texts]
    encoded = self._encoder.encode([text for text, _ in unmarked])
    found = {}
    for i, whole, (_, spans) in zip(chats, encoded, unmarked, strict=True):
      places = [whole.span(place) for place in range(len(whole.ids))]
      scored = [int(any(max(a, start) < min(b, end) for start, end in spans)) for a, b in places]
      if not any(scored[1:]):
        raise apart.ChatError(
          "data.turns=all: the chat template has blocks `generation`, and none of them writes an"
          " answer of this chat; use data.turns=last or another template",
          i,
        )
      first = scored.index(1, 1)  # Nothing comes before the first id, which so cannot be learnt.
      last = len(scored) - scored[::-1].index(1)
      found[i] = Conversation(whole.ids[:first], whole.ids[first:last], scored[first:last])
    return found

  def _following_answers(self, chats: Mapping[int, Messages]) -> dict[int, Conversation]:
    """Returns the ids of chats whose answers follow their prompts; see `encode_chats`."""
    asked = [
      (i, end)
      for i, chat in chats.items()
      for answer in answers_in(chat)
      for end in (Chat(chat[:answer], True), Chat(chat[: answer + 1], False))
    ]
    with apart.numbered([i for i, _ in asked]):
      rendered = self._template.render(
        [chat._replace(messages=self._protected(chat.messages)) for _, chat in asked]
      )
    texts: dict[int, list[str]] = {i: [] for i in chats}
    for (i, _), text in zip(asked, rendered, strict=True):
      texts[i].append(text)
    pairs, owners = [], []
    for i, parts in texts.items():
      whole, starts = parts[-1], [*parts[::2], parts[-1]]
      for turn, part in zip(answers_in(chats[i]) * 2, parts[::2] + parts[1::2], strict=True):
        if not whole.startswith(part):
          raise apart.ChatError(
            f"data.turns=all: the chat template writes turn {turn} in another way when turns follow"
            " it; use data.turns=last, or a template with blocks `generation`",
            i,
          )
      marked = [self._encoder.mark(text) for text in starts]
      pairs += [
        (before, self._encoder.mark(whole[len(start) : len(end)]))
        for before, start, end in zip(marked, starts, starts[1:], strict=False)
      ]
      owners += [i] * (len(starts) - 1)
    prompts = self._encoder.ids([self._encoder.mark(parts[0]) for parts in texts.values()])
    found = {i: Conversation(ids, [], []) for i, ids in zip(texts, prompts, strict=True)}
    for n, (i, ids) in enumerate(zip(owners, self._continue(pairs), strict=True)):
      is_last = n + 1 == len(owners) or owners[n + 1] != i
      answer = self._ended(ids)
      if not is_last and ids[: len(answer)] != answer:
        raise apart.ChatError(
          "data.turns=all: the chat template ends an answer within a chat with another token than"
          f" {self.hf.convert_ids_to_tokens(self.eos_id)!r}, or with none; use data.turns=last",
          i,
        )
      tail = [] if is_last else ids[len(answer) :]
      found[i].response.extend([*answer, *tail])
      found[i].scored.extend([1] * len(answer) + [0] * len(tail))
    return found

  def encode_texts(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[list[int]]:
    """Ids of whole texts, each a prompt with its response, as a classifier of texts reads them.

    With a chat template they are those of the whole chat, to its last character. Without one, a
    space is between prompt and response unless there is one, and the tokenizer adds what it adds
    to any text. A tokenizer that this package has saved encodes as in training.

    Args:
      prompts: Prompts; see `encode_prompt`.
      answers: Text of the response to each prompt.
    """
    if self.is_exported:
      exchanges = self.encode_exchanges(prompts, [[answer] for answer in answers])
      return [[*of.prompt, *of.responses[0]] for of in exchanges]
    whole = self._rendered(list(zip(prompts, answers, strict=True)))
    chats = [self.has_chat_template and prompt != "" for prompt in prompts]
    texts = [
      text if chat else _spaced(text, self._answer_text.protect(answer))
      for text, answer, chat in zip(whole, answers, chats, strict=True)
    ]
    encoded = self._encoder.ids([self._encoder.mark(text) for text in texts])
    before, after = ([], []) if self.has_chat_template else (self._prefix, self._added_suffix())
    return [[*before, *ids, *after] for ids in encoded]

  def shorten(self, prompt: Prompt, length: int) -> Shortened | None:
    """Cuts a prompt to a number of tokens, without cutting its template.

    The oldest turns are left out first, up to a turn of the user. The system turn stays. If the
    last turn is too long by itself, its text keeps its end. A text that is a transcript is cut in
    the same way.

    Args:
      prompt: A prompt that is longer.
      length: Maximum number of tokens.

    Returns:
      The prompt, or None if not even a part of its last turn fits.
    """
    whole = size = len(self.encode_prompt(prompt))
    kept, (messages, rebuild) = prompt, _turns(prompt)
    head = next((i for i, m in enumerate(messages) if m["role"] in ("user", "assistant")), 0)
    starts = [i for i in range(head, len(messages)) if messages[i]["role"] == "user"]
    for start in starts:
      kept = rebuild(messages[:head] + messages[start:])
      size = len(self.encode_prompt(kept))
      if size <= length:
        return Shortened(kept, start - head, whole - size)
    if not starts:
      return None
    last, rest = messages[starts[-1]]["content"], messages[starts[-1] + 1 :]
    marked = self._encoder.mark(self._control_text.protect(last))
    encoded = self._encoder.encode([marked])[0]
    places = [encoded.span(i)[0] for i in range(len(encoded.ids))]
    cut = 0
    while size > length:
      cut += size - length
      text = _from_word(last, places[cut]) if cut < len(places) else ""
      if not text:
        return None
      kept = rebuild([*messages[:head], {"role": "user", "content": text}, *rest])
      size = len(self.encode_prompt(kept))
    return Shortened(kept, starts[-1] - head, whole - size)

  def spelled_marker(self, prompt: Prompt, answers: Sequence[str]) -> str:
    """Describes a marker of a chat in a text, which is read as plain text; empty if none is."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for turn in turns:
      of_answer = turn["role"] == "assistant"
      markers = self._markers_in_answers if of_answer else self._markers_in_prompts
      if marker := markers.find(turn["content"]):
        return f"the prompt spells {marker!r}, which is read as plain text"
    for text in answers:
      if marker := self._markers_in_answers.find(self._continued(text)):
        return f"the response spells {marker!r}, which is read as plain text"
    return ""

  def unopened(self, prompt: Prompt, answers: Sequence[str]) -> str:
    """Describes a response that is learnt inside what the template opens; empty if none is."""
    tag, end = self._template.opening.strip(), self.closing_tag
    if not tag or prompt == "":
      return ""
    if all(answer.lstrip().startswith(tag) or end in answer for answer in answers):
      return ""
    return f"the template ends the prompt with {tag!r}, and the response has no {end!r} after it"

  def joined_words(self, prompt: Prompt, answers: Sequence[str]) -> str:
    """Describes a prompt and a response without a space between them; empty if none are.

    A chat template and a transcript separate the two.
    """
    if self.has_chat_template or not isinstance(prompt, str) or not prompt[-1:].isalnum():
      return ""
    if not any(answer[:1].isalnum() for answer in answers):
      return ""
    return "prompt and response are joined without a space, as there is no chat template"

  def require_prompt(self, prompt: Prompt) -> None:
    """Refuses a text to which the chat template has been applied already, and turns that it omits.

    Raises:
      DataError: The text has a user's header and ends like the template's prompts, or turns of
        tools are not read.
    """
    if not isinstance(prompt, str) and any(m["role"] == "tool" for m in prompt):
      if not self.has_chat_template:
        raise DataError(f"messages: {_NO_TOOLS}")
      if not self._template.writes_tools:
        raise DataError(
          "messages: the chat template does not write turns of the role 'tool'; write them into a"
          " user turn, or use another template"
        )
    header, closing = self._template.user_header, self._template.prompt_end
    applied = isinstance(prompt, str) and header and closing
    if applied and header in prompt and prompt.rstrip().endswith(closing):
      raise DataError(
        f"prompt: the chat template is in the text already (it ends in {closing!r}), and would be"
        " applied twice; give `messages`, or the text of the user alone"
      )

  def render_prompt(self, prompt: Prompt) -> str:
    """Text of a prompt as the model sees it, without the tokenizer's prefix."""
    return controls.unprotected(self._rendered([(prompt, None)])[0])

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Text of ids, without control tokens. Ids outside the vocabulary are dropped.

    Args:
      ids: Ids of a text.
      skip_special: False to show control tokens.
    """
    shown = [int(i) for i in ids]
    if skip_special:  # The decoder drops those that are flagged as special; not all are.
      shown = [i for i in shown if i not in self._silent]
    return self._backend.decode(shown, skip_special_tokens=skip_special)

  def batch_decode(self, rows: Iterable[Iterable[int]], skip_special: bool = True) -> list[str]:
    """Texts of responses, as they follow their prompts, without what the template adds to them."""
    return [self._answer(list(row), skip_special) for row in rows]

  def token_bytes(self) -> list[bytes]:
    """Bytes that each id of a response adds to its text; none for special tokens."""
    decoder = json.loads(self._backend.to_str())["decoder"] or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}
    special = {i for i, t in self._backend.get_added_tokens_decoder().items() if t.special}
    special |= self._silent
    bytes_of = _byte_characters()
    anchor = self._anchor if self._anchor is not None else self._ids("a")[-1]
    before = len(self.decode([anchor]))
    texts = [b""] * self.vocab_size
    for token, i in self._vocab.items():
      if i in special:
        continue
      if "ByteLevel" in kinds and all(c in bytes_of for c in token):
        texts[i] = bytes(bytes_of[c] for c in token)
      elif "ByteFallback" in kinds and (byte := re.fullmatch("<0x([0-9A-F]{2})>", token)):
        texts[i] = bytes([int(byte[1], 16)])
      else:
        texts[i] = self.decode([anchor, i])[before:].encode()
    return texts

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes the tokenizer in Hugging Face form; `load_tokenizer` restores the same digest.

    The further `stop_ids` are those of generation_config.json, which is written with the model.
    """
    if self._end_id is not None:
      self.hf.init_kwargs["response_end"] = self.hf.convert_ids_to_tokens(self._end_id)
    if self._template_args:
      self.hf.init_kwargs["template_args"] = self._template_args
    self.hf.save_pretrained(str(folder))

  def _ids(self, text: str) -> list[int]:
    return self._backend.encode(text, add_special_tokens=False).ids

  def _added_prefix(self) -> list[int]:
    """Ids that the tokenizer's post-processor puts before a text."""
    bare = self._backend.encode("a", add_special_tokens=False).ids
    full = self._backend.encode("a", add_special_tokens=True).ids
    starts = range(len(full) - len(bare) + 1)
    start = next((i for i in starts if full[i : i + len(bare)] == bare), 0)
    return full[:start]

  def _added_suffix(self) -> list[int]:
    """Ids that the tokenizer's post-processor puts after a text."""
    bare = len(self._ids("a"))
    return self._backend.encode("a", add_special_tokens=True).ids[len(self._prefix) + bare :]

  def _start(self, prompt: Prompt) -> list[int]:
    if prompt == "":
      start = self.bos_id if self.bos_id is not None else self._end_id
      if start is None:
        raise DataError(
          "an empty prompt needs a token to start from, but the tokenizer has neither BOS nor EOS; "
          "give rows a `prompt`"
        )
      return [start]
    # A chat template writes its own start token.
    return [] if self.has_chat_template else list(self._prefix)

  def _rendered(self, pairs: Sequence[tuple[Prompt, str | None]]) -> list[str]:
    """Returns the texts of prompts, with an answer if there is one, with protected user texts."""
    if not self.has_chat_template:
      texts = [prompt if isinstance(prompt, str) else transcript(prompt) for prompt, _ in pairs]
      return [self._control_text.protect(text) for text in texts]
    full = [i for i, (prompt, _) in enumerate(pairs) if prompt != ""]
    with apart.numbered(full):
      rendered = self._template.render([self._chat(*pairs[i]) for i in full])
    texts = dict(zip(full, rendered, strict=True))
    return [texts.get(i, "") for i in range(len(pairs))]

  def _chat(self, prompt: Prompt, answer: str | None) -> Chat:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if answer is not None:
      messages = [*messages, {"role": "assistant", "content": answer}]
    return Chat(self._protected(messages), answer is None)

  def _protected(self, messages: Messages) -> Messages:
    """Returns turns in whose texts `Controls.mark` renames nothing."""
    return [
      {
        "role": m["role"],
        "content": (self._answer_text if m["role"] == "assistant" else self._control_text).protect(
          m["content"]
        ),
      }
      for m in messages
    ]

  def _tail(self, prompt: Prompt, before: str, whole: str, answer: str) -> str:
    """Returns the text that an answer adds to the rendered text of its prompt."""
    if prompt == "":
      return self._answer_text.protect(answer)
    answer = self._continued(answer)
    protected = self._answer_text.protect(answer)
    if not self.has_chat_template:
      # A transcript writes a space after the name of the speaker.
      is_transcript = not isinstance(prompt, str) or prompt.endswith("\n\nAssistant:")
      spaced = is_transcript and not answer[:1].isspace()
      return " " * spaced + protected
    template = self._template
    tail = template.lead + protected + template.closing
    if whole.startswith(before):
      tail = whole[len(before) :]
    return tail if self._turn_end is not None else tail.removesuffix(template.closing)

  def _continued(self, answer: str) -> str:
    """Returns an answer without the tag that the template has opened in its prompt."""
    opening, text = self._template.opening, answer.lstrip()
    tag = opening.strip()
    if not tag or not text.startswith(tag):
      return answer
    return text.removeprefix(tag).removeprefix(opening[len(opening.rstrip()) :])

  def _ended(self, ids: list[int]) -> list[int]:
    """Returns the ids of a response with its end token, without what a template writes after it."""
    stops = self._control_ids.intersection(self.stop_ids)
    end = next((place for place, i in enumerate(ids) if i in stops), None)
    if end is None:
      return [*ids, self.eos_id]
    return [*ids[:end], ids[end] if self._chosen_end is None else self._chosen_end]

  def _in_the_middle(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of texts that do not start a text."""
    tails = [self._encoder.mark(self._answer_text.protect(text)) for text in texts]
    return self._continue([(_ANCHORS[0], tail) for tail in tails])

  def _continue(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Returns the ids of the second of two marked texts after the first."""
    ids: list[list[int] | None] = [None] * len(pairs)
    contexts = [controls.context(before) for before, _ in pairs]
    for anchor in (None, *_ANCHORS):
      left = [i for i, known in enumerate(ids) if known is None]
      if not left:
        break
      starts = {i: contexts[i] if anchor is None else anchor for i in left}
      wholes = {i: starts[i] + pairs[i][1] for i in left}
      texts = dict.fromkeys([*starts.values(), *wholes.values()])
      known = dict(zip(texts, self._encoder.encode([*texts]), strict=True))
      for i in left:
        ids[i] = self._after(known[starts[i]], known[wholes[i]], len(starts[i]))
    return [found or [] for found in ids]

  def _after(
    self, start: controls.Encoded, whole: controls.Encoded, border: int
  ) -> list[int] | None:
    """Returns the ids of a text after the ids of its start, or None if they are merged."""
    count = len(start.ids)
    # A control token may take the spaces that follow it.
    if whole.ids[:count] != start.ids:
      return None
    end = whole.span(count - 1)[1] if count and start.ids[-1] not in self._control_ids else 0
    next_start = whole.span(count)[0] if count < len(whole.ids) else border
    if end > border or next_start < border:
      return None
    return whole.ids[count:]

  def _answer(self, ids: list[int], skip_special: bool) -> str:
    """Returns the text of a response."""
    text = self._decode_after(self._anchor, ids, skip_special)
    if not skip_special:
      return text
    if ids and ids[-1] == self._turn_end:
      text = text.removesuffix(self._encoder.before_first(self._template.closing))
    return text.removeprefix(self._lead)

  def _decode_after(self, anchor: int | None, ids: list[int], skip_special: bool = True) -> str:
    """Returns the text of ids after another one."""
    if anchor is None:
      return self.decode(ids, skip_special)
    return self.decode([anchor, *ids], skip_special)[len(self.decode([anchor])) :]

  def _decoded_lead(self) -> str:
    """Returns the text before an answer, as it is decoded; some tokenizers add spaces to it."""
    if not self.lead or self._end_id is None:
      return ""
    (response,) = self.encode_exchanges([_PROBE], [["a"]])[0].responses
    return self._decode_after(self._anchor, response).rpartition("a")[0]

  def _find_anchor(self) -> int | None:
    """Returns an id to decode a response after, where decoding would else drop a first space."""
    one, two = (self._in_the_middle([text])[0] for text in (" a", "a"))
    if self.decode(one) == " a":
      return None
    for anchor in (i for text in _ANCHORS for i in self._ids(text)[-1:]):
      if [self._decode_after(anchor, ids) for ids in (one, two)] == [" a", "a"]:
        return anchor
    return None


class _Template:
  """Chat template of a tokenizer, and the text that it writes around the turns of a chat.

  Attributes:
    source: Source of the template; empty if there is none.
    probes: Texts that it writes for prompts of all roles.
    lead: Text between a prompt and its answer.
    closing: Text after an answer.
    opening: Tag at the end of a prompt, such as <think>, that is not before a given answer.
    user_header: Last line before the text of a first user turn, without spaces around it.
    prompt_end: Text after the last user turn of a prompt, without spaces around it.
    markers: Markers in these texts.
  """

  def __init__(self, hf: "transformers.PreTrainedTokenizerFast", args: Mapping[str, Any]):
    self._hf, self._args = hf, args
    self.source = ""
    self.probes: tuple[str, ...] = ()
    self.lead = self.closing = self.user_header = self.prompt_end = self.opening = ""
    if hf.chat_template:
      self.source = _default_template(hf)
    if args:
      self._require_read()
    if self.source:
      self._probe()
    self.markers = set(_MARKER.findall("".join(self.probes)))
    lines = (self.user_header, self.prompt_end.rpartition("\n")[2])
    self.markers |= {line for line in lines if _MARKED_LINE.search(line)}

  def _require_read(self) -> None:
    """Refuses variables that the template does not read."""
    names = apart.names_in(self.source) if self.source else []
    names = [name for name in names if name not in RESERVED and not name.endswith("_token")]
    for name in self._args:
      if name not in names:
        known = f"it reads {', '.join(names)}" if names else "it reads none"
        which = "chat template" if self.source else "tokenizer, which has no chat template,"
        raise DataError(f"data.template_args: the {which} does not read {name!r}; {known}")

  @functools.cached_property
  def writes_tools(self) -> bool:
    """True if a turn of the role tool is in the text of a prompt."""
    user, answer = ({"role": role, "content": "a"} for role in ("user", "assistant"))
    return _PROBE in self._try([user, answer, {"role": "tool", "content": _PROBE}])

  def _probe(self) -> None:
    user, answer, system = (
      {"role": role, "content": _PROBE} for role in ("user", "assistant", "system")
    )
    prompt, *others = (self._try(c) for c in ([user], [user, answer, user], [system, user]))
    self.probes = (prompt, *others)
    header, _, end = prompt.rpartition(_PROBE)
    self.user_header = header.removeprefix(self._hf.bos_token or "").strip().rpartition("\n")[2]
    self.prompt_end = end.strip()
    whole = self._try([user, answer], add_generation_prompt=False)
    if prompt and whole.startswith(prompt):
      self.lead, _, self.closing = whole[len(prompt) :].rpartition(_PROBE)
    else:
      self.closing = whole.rpartition(_PROBE)[2]
      differs = (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b)
      opening = prompt[next(differs, len(whole)) :]
      self.opening = opening if _OPENING.fullmatch(opening) else ""

  def render(self, chats: Sequence[Chat], marks: tuple[str, str] = ("", "")) -> list[str]:
    """Renders chats, with marks around what blocks `generation` write.

    Raises:
      RefusedError: The template refuses one of them.
      TemplateError: The template is not valid.
    """
    common = {"tools": None, "documents": None, **self._hf.special_tokens_map, **self._args}
    try:
      return apart.render(self.source, common, [chat._asdict() for chat in chats], marks)
    except apart.TemplateError as error:
      raise apart.TemplateError(
        f"the chat template is not valid Jinja ({error}); correct chat_template of"
        " tokenizer_config.json, or chat_template.jinja"
      ) from error
    except apart.RefusedError as error:
      roles = ", ".join(turn["role"] for turn in chats[error.index].messages)
      raise apart.RefusedError(
        f"messages: the chat template refused the turns ({roles}): {error}; "
        "reorder the turns or use another template",
        error.index,
      ) from error

  def _try(self, turns: Messages, *, add_generation_prompt: bool = True) -> str:
    """Returns an empty text where the template refuses the turns."""
    try:
      return self.render([Chat(turns, add_generation_prompt)])[0]
    except (apart.TemplateError, apart.ExcessError):
      raise
    except DataError:
      return ""


def _default_template(hf: "transformers.PreTrainedTokenizerFast") -> str:
  try:
    return hf.get_chat_template()
  except ValueError as error:
    names = sorted(hf.chat_template) if isinstance(hf.chat_template, dict) else []
    raise DataError(
      f"there are several chat templates ({', '.join(names)}) and none is named `default`; keep one"
    ) from error


def _turns(prompt: Prompt) -> tuple[Messages, Callable[[Messages], Prompt]]:
  """Returns the turns of a prompt, and the function that makes a prompt of turns."""
  if not isinstance(prompt, str):
    return prompt, lambda turns: turns
  roles = {speaker: role for role, speaker in _SPEAKERS.items()}
  preamble, *parts = _SPEAKER.split(prompt)
  turns = [
    {"role": roles[name], "content": text}
    for name, text in zip(parts[::2], parts[1::2], strict=True)
  ]
  if turns and not preamble and transcript(turns[:-1]) == prompt:
    return turns[:-1], transcript
  return [{"role": "user", "content": prompt}], lambda turns: turns[-1]["content"]


def _from_word(text: str, place: int) -> str:
  """Returns the end of a text from a place on, or from the word or turn that follows it."""
  turn = text.find("\n\nHuman:", place)
  if turn >= 0:
    return text[turn:]
  if place and not text[place - 1].isspace() and (space := re.search(r"\s", text[place:])):
    # Some languages have no spaces.
    place += space.start() if space.start() < _LONGEST_WORD else 0
  return text[place:].strip()


def _spaced(before: str, after: str) -> str:
  """Joins two texts, by a space if there is none between them."""
  is_apart = not before or not after or before[-1].isspace() or after[0].isspace()
  return before + " " * (not is_apart) + after


def _byte_characters() -> dict[str, int]:
  """Returns the characters that byte-level tokenizers write for bytes."""
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [i for i in range(256) if i not in shown]
  return {chr(i): i for i in shown} | {chr(256 + n): i for n, i in enumerate(hidden)}


def transcript(messages: Messages) -> str:
  r"""Messages as plain text, for tokenizers without a chat template.

  Args:
    messages: The turns up to and including the last user turn.

  Returns:
    "\n\nHuman: ...\n\nAssistant: ..." that ends in "\n\nAssistant:".

  Raises:
    DataError: There is a turn of a tool.
  """
  if any(message["role"] not in _SPEAKERS for message in messages):
    raise DataError(f"messages: {_NO_TOOLS}")
  return _written(messages, _SPEAKERS)


def readable(prompt: Prompt) -> str:
  """Returns a prompt for a reader, not for a model: its text, or its turns, those of tools too."""
  return prompt if isinstance(prompt, str) else _written(prompt, _SPEAKERS | {"tool": "Tool"})


def _written(messages: Messages, speakers: Mapping[str, str]) -> str:
  turns = [f"\n\n{speakers[message['role']]}: {message['content']}" for message in messages]
  return "".join(turns) + "\n\nAssistant:"


def answers_in(messages: Messages) -> list[int]:
  """Returns the indices of the answers in a chat: turns of the assistant after one of a user."""
  roles = [message["role"] for message in messages]
  first = roles.index("user") if "user" in roles else len(roles)
  return [i for i, role in enumerate(roles) if role == "assistant" and i > first]


def load_tokenizer(
  path: str | os.PathLike[str],
  eos_token: str | None = None,
  template_args: Mapping[str, Any] | None = None,
  model: str | os.PathLike[str] | None = None,
) -> Tokenizer:
  """Reads a tokenizer from a local Hugging Face folder.

  Args:
    path: A folder with tokenizer.json (and usually tokenizer_config.json).
    eos_token: The token that ends a response, for models that do not use their tokenizer's EOS
      (stories260k ends stories with "<s>"); None or "" uses the folder's.
    template_args: Variables of the chat template; None takes those that it was saved with.
    model: Folder of the model, if it is another one. The `eos_token_id` of its
      generation_config.json and config.json end a response too, and the `vocab_size` of its
      config.json is the rows of its embedding.

  Returns:
    The tokenizer.

  Raises:
    DataError: If tokenizer.json is missing or broken, or `eos_token` is not in the vocabulary.
  """
  folder = pathlib.Path(path)
  if not (folder / "tokenizer.json").is_file():
    raise DataError(
      f"no tokenizer.json in {str(path)!r}; give the folder of a model with a fast tokenizer "
      "(names of hub repositories are not looked up: download the folder first)"
    )
  if problem := workdir.irregular(folder):
    raise DataError(f"{folder}: {problem}")
  configs = [
    pathlib.Path(model or path) / name for name in ("generation_config.json", "config.json")
  ]
  settings = {config: _settings(config) for config in configs}
  stop_ids = [i for config in configs for i in _stop_ids(config, settings[config])]
  rows = settings[configs[-1]].get("vocab_size")
  trial = apart.Trial(folder / "tokenizer.json")
  fast_tokenizer = _fast_tokenizer_class()  # Its import takes as long as most trials.
  try:
    trial.require()
    # Not AutoTokenizer: a config.json must not choose the code that runs.
    hf = fast_tokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return Tokenizer(hf, eos_token, stop_ids, template_args, rows if type(rows) is int else None)
  except DataError as error:
    raise DataError(f"{folder / 'tokenizer.json'}: {error}") from error
  except BaseException as error:  # The Rust parser raises bare Exception, and panics.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise DataError(
      f"{folder / 'tokenizer.json'}: not a readable tokenizer ({error}); copy the folder again"
    ) from error


def _settings(path: pathlib.Path) -> dict[str, Any]:
  """Reads the fields of a file of a model; a missing file has none."""
  try:
    raw = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, RecursionError) as error:
    if path.name == "config.json":
      return {}  # Whoever reads the model says what is wrong with it.
    raise DataError(f"{path}: not readable as JSON ({error}); copy the file again") from error
  return raw if isinstance(raw, dict) else {}


def _stop_ids(path: pathlib.Path, settings: Mapping[str, Any]) -> list[int]:
  """Returns the `eos_token_id` of the fields of a file, a number or a list."""
  value = settings.get("eos_token_id")
  ids = value if isinstance(value, list) else [] if value is None else [value]
  if not all(type(i) is int and i >= 0 for i in ids):
    raise DataError(f"{path}: eos_token_id is {value!r}, expected an id or a list of ids")
  return ids


def word_level_tokenizer(words: Sequence[str]) -> Tokenizer:
  """Builds a tokenizer of whole words that saves and loads like any other.

  Args:
    words: The vocabulary, without white space and "<". Ids follow the four special tokens `<pad>`
      0, `<bos>` 1, `<eos>` 2, `<unk>` 3 in the given order.

  Returns:
    A tokenizer that splits on white space, puts `<bos>` before prompts and joins words by spaces.

  Raises:
    ValueError: If a word is repeated, empty or unusable.
  """
  import tokenizers
  from tokenizers import models, pre_tokenizers, processors

  specials = ("<pad>", "<bos>", "<eos>", "<unk>")
  vocab = {word: i for i, word in enumerate((*specials, *words))}
  if len(vocab) != len(specials) + len(words):
    raise ValueError("words must be different from each other and from " + ", ".join(specials))
  for word in words:
    if not word or word.split() != [word] or "<" in word:
      raise ValueError(f'words must be free of white space and "<", got {word!r}')
  backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
  # Special tokens are words of the model too; cutting at "<" keeps typed text from matching them.
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("<", "isolated")]
  )
  backend.post_processor = processors.TemplateProcessing(
    single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocab["<bos>"])]
  )
  pad, bos, eos, unk = specials
  hf = _fast_tokenizer_class()(
    tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
  )
  return Tokenizer(hf)


def _fast_tokenizer_class() -> "type[transformers.PreTrainedTokenizerFast]":
  # Only tokenizers are used, so advice to install torch would mislead.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  return transformers.PreTrainedTokenizerFast
