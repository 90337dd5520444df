"""Encoding and decoding with a Hugging Face fast tokenizer read from a local folder.

Two rules keep outside text harmless. First, text from a dataset or a user never becomes a control
id: `"<|im_end|>"` typed by a user is encoded as plain characters. Second, a folder is read as data:
no class is picked by name and no code is run (chat templates render in a sandbox).

Control ids are the added tokens that the tokenizer declares special.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from rlhf_jax.data.sources import DataError

if TYPE_CHECKING:
  import transformers

Messages: TypeAlias = list[
  dict[str, str]
]  # Turns with `role` (system, user, assistant), `content`.
Prompt: TypeAlias = str | Messages

_SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
# Characters of a private-use area cannot be part of a template's own text.
_PLACEHOLDER = "\ue000{}\ue001"
_PLACEHOLDER_PATTERN = re.compile("\ue000([0-9]+)\ue001")
# Some templates write today's date. The same file would give other tokens tomorrow, and a resumed
# run would refuse its own data. So the date is pinned.
_PINNED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


class Tokenizer:
  """A fast tokenizer with the conventions of this package.

  A prompt starts with the tokenizer's own prefix (usually BOS) and has no end token. A response has
  no special tokens except one end token. It is scored: this is how the model learns to stop.
  """

  def __init__(self, hf: "transformers.PreTrainedTokenizerFast", eos_token: str | None = None):
    """Wraps a transformers fast tokenizer.

    Args:
      hf: The tokenizer.
      eos_token: The token that ends a response; by default the one that ends an assistant turn
        of the chat template, or else the tokenizer's EOS.

    Raises:
      DataError: If `eos_token` is not one token of the vocabulary.
    """
    import tokenizers

    self.hf = hf
    backend = hf.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    self._template_encoder = backend
    # The switch is a property of the object, so outside text gets a separate object.
    self._text_encoder = tokenizers.Tokenizer.from_str(backend.to_str())
    self._text_encoder.encode_special_tokens = True
    self._vocab = backend.get_vocab(with_added_tokens=True)
    special = {str(t): i for i, t in backend.get_added_tokens_decoder().items() if t.special}
    self._control_ids = frozenset(special.values()) - {hf.unk_token_id}
    self._control_text = re.compile("|".join(map(re.escape, special)) or r"(?!)")
    self._prefix = self._added_prefix()
    self._end_id = self._find_end(eos_token or hf.init_kwargs.get("response_end"))

  @functools.cached_property
  def vocab_size(self) -> int:
    """One more than the largest id, added tokens included: the rows that an embedding needs."""
    return max(self._vocab.values()) + 1

  @property
  def bos_id(self) -> int | None:
    """The id that starts a text, if there is one."""
    return self.hf.bos_token_id

  @property
  def eos_id(self) -> int:
    """The id that ends a response and stops generation.

    Raises:
      DataError: If the tokenizer names no end token.
    """
    if self._end_id is None:
      raise DataError("the tokenizer names no end token; choose one with data.end_token")
    return self._end_id

  @property
  def pad_id(self) -> int:
    """The id for padding. It may equal `eos_id`: masks come from lengths, never from ids."""
    candidates = (self.hf.pad_token_id, self._end_id, 0)
    return next(i for i in candidates if i is not None)

  @property
  def has_chat_template(self) -> bool:
    """True if prompts are rendered as chats."""
    return bool(self.hf.chat_template)

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of all that determines the ids: vocabulary, rules, chat template, end token."""
    parts = [self._template_encoder.to_str(), self.hf.chat_template, self._end_id]
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
    """Ids of plain text, with nothing added and no control ids."""
    return self._encode_texts([text])[0]

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
    pieces = [self._pieces(prompt) for prompt in prompts]
    flat = [piece for row in pieces for piece in row]
    template = iter(self._encode_templates([text for text, from_user in flat if not from_user]))
    outside = iter(self._encode_texts([text for text, from_user in flat if from_user]))
    encoded = []
    for prompt, row in zip(prompts, pieces, strict=True):
      ids = self._start(prompt)
      for _, from_user in row:
        ids.extend(next(outside if from_user else template))
      encoded.append(ids)
    return encoded

  def encode_response(self, text: str) -> list[int]:
    """Ids of a response and its end token, without a prefix. The text is not changed."""
    return self.encode_responses([text])[0]

  def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode_response` for many texts at once."""
    end = self.eos_id
    return [[*ids, end] for ids in self._encode_texts(texts)]

  def render_prompt(self, prompt: Prompt) -> str:
    """Text of a prompt as the model sees it, without the tokenizer's prefix."""
    return "".join(text for text, _ in self._pieces(prompt))

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Text of ids. Ids outside the vocabulary are dropped."""
    return self._template_encoder.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  def batch_decode(self, rows: Iterable[Iterable[int]], skip_special: bool = True) -> list[str]:
    """`decode` for each row."""
    return [self.decode(row, skip_special) for row in rows]

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes the tokenizer in Hugging Face form; `load_tokenizer` restores the same digest."""
    if self._end_id is not None:
      self.hf.init_kwargs["response_end"] = self.hf.convert_ids_to_tokens(self._end_id)
    self.hf.save_pretrained(str(folder))

  def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
    encoded = [e.ids for e in self._text_encoder.encode_batch_fast(texts, add_special_tokens=False)]
    # A model whose own vocabulary lists "</s>" can still produce its id from plain characters.
    return [
      ids if self._control_ids.isdisjoint(ids) else self._without_controls(ids) for ids in encoded
    ]

  def _encode_templates(self, texts: Sequence[str]) -> list[list[int]]:
    return [
      e.ids for e in self._template_encoder.encode_batch_fast(texts, add_special_tokens=False)
    ]

  def _without_controls(self, ids: list[int]) -> list[int]:
    unknown = self.hf.unk_token_id
    replaced = [unknown if i in self._control_ids else i for i in ids]
    return [i for i in replaced if i is not None and i not in self._control_ids]

  def _added_prefix(self) -> list[int]:
    """Ids that the tokenizer's post-processor puts before a text."""
    bare = self._template_encoder.encode("a", add_special_tokens=False).ids
    full = self._template_encoder.encode("a", add_special_tokens=True).ids
    starts = range(len(full) - len(bare) + 1)
    start = next((i for i in starts if full[i : i + len(bare)] == bare), 0)
    return full[:start]

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

  def _pieces(self, prompt: Prompt) -> list[tuple[str, bool]]:
    """Splits a prompt into (text, from_user) pieces."""
    if prompt == "":
      return []
    if not self.has_chat_template:
      return [(prompt if isinstance(prompt, str) else transcript(prompt), True)]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    contents = [message["content"] for message in messages]
    if not any(self._control_text.search(content) for content in contents):
      # As one piece, this chat gets the same ids as in every other tool.
      return [(self._render(messages, add_generation_prompt=True), False)]
    marked = [
      {"role": message["role"], "content": _PLACEHOLDER.format(i)}
      for i, message in enumerate(messages)
    ]
    rendered = self._render(marked, add_generation_prompt=True)
    parts = _PLACEHOLDER_PATTERN.split(rendered)  # Text, index, text, index, ..., text.
    pieces = [
      (contents[int(part)], True) if i % 2 else (part, False) for i, part in enumerate(parts)
    ]
    return [(text, from_user) for text, from_user in pieces if text]

  def _render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
    import jinja2

    template = self.hf.get_chat_template()
    if "strftime_now" in template:
      template = _PINNED_DATE + template
    turns = [{"role": m["role"], "content": m["content"]} for m in messages]
    try:
      rendered = self.hf.apply_chat_template(
        turns,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
      )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
      roles = ", ".join(turn["role"] for turn in turns)
      raise DataError(
        f"messages: the chat template refused the turns ({roles}): {error}; "
        "reorder the turns or use another template"
      ) from error
    return str(rendered)

  def _find_end(self, token: str | None) -> int | None:
    if token:
      return self.token_id(token)
    turn_end = self._template_turn_end() if self.has_chat_template else None
    return self.hf.eos_token_id if turn_end is None else turn_end

  def _template_turn_end(self) -> int | None:
    """First control id after an assistant turn: some templates do not end turns with EOS."""
    answer = _PLACEHOLDER.format(0)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    try:
      _, rendered, tail = self._render(turns, add_generation_prompt=False).rpartition(answer)
    except DataError:
      return None
    ids = self._encode_templates([tail])[0] if rendered else []
    return next((i for i in ids if i in self._control_ids), None)


def transcript(messages: Messages) -> str:
  r"""Messages as plain text, for tokenizers without a chat template.

  Args:
    messages: The turns up to and including the last user turn.

  Returns:
    "\n\nHuman: ...\n\nAssistant: ..." that ends in "\n\nAssistant:".
  """
  turns = [f"\n\n{_SPEAKERS[message['role']]}: {message['content']}" for message in messages]
  return "".join(turns) + "\n\nAssistant:"


def load_tokenizer(path: str | os.PathLike[str], eos_token: str | None = None) -> Tokenizer:
  """Reads a tokenizer from a local Hugging Face folder.

  Args:
    path: A folder with tokenizer.json (and usually tokenizer_config.json).
    eos_token: The token that ends a response, for models that do not use their tokenizer's EOS
      (stories260k ends stories with "<s>"); None or "" uses the folder's.

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
  fast_tokenizer = _fast_tokenizer_class()
  try:
    # Not AutoTokenizer: a config.json must not choose the code that runs.
    hf = fast_tokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return Tokenizer(hf, eos_token)
  except DataError as error:
    raise DataError(f"{folder / 'tokenizer.json'}: {error}") from error
  except Exception as error:  # The Rust parser raises bare Exception.
    raise DataError(
      f"{folder / 'tokenizer.json'}: not a readable tokenizer ({error}); copy the folder again"
    ) from error


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
