"""Control tokens: an encoder that finds those that a template wrote, and none that a text spells.

A chat is rendered as one text, in which a template and its users write. In the encoder, every
control token has a private name, made of characters that no text may hold. What the template wrote
is renamed before encoding; what a user spelled is not, so it is a row of plain characters. All else
is as in the tokenizer itself: spaces, merges and what a control token does to its neighbours.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
  import tokenizers

# Unicode reserves these for internal use, so they are in no text for interchange.
_OPEN, _CLOSE, _BREAK, _SPLIT = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_FAR = 64  # Characters.
MARKS = ("\ufdd4", "\ufdd5")  # Before and after an answer, where a template marks it.
_RESERVED = re.compile("[\ufdd0-\ufdd5]")
# Tokens that look like markers: in brackets, with a letter. Of words such as <table> or <b>, only
# those that a template writes are markers.
_BRACKETED = re.compile(r"(?=.*[A-Za-z])(<[^<>\s]+>|\[[^\[\]\s]+\]|\{[^{}\s]+\})")
_TAG = re.compile(r"</?[a-z0-9]+/?>")


class Encoded(NamedTuple):
  """A marked text as ids.

  Attributes:
    ids: Ids of the text.
    places: Place of each id in the encoding.
    encoding: Encoding of the text.
  """

  ids: list[int]
  places: Sequence[int]
  encoding: "tokenizers.Encoding"

  def span(self, index: int) -> tuple[int, int]:
    """Returns the characters [start, end) of an id in the marked text."""
    return self.encoding.token_to_chars(self.places[index]) or (0, 0)


class Controls:
  """Encoder of texts with protected control tokens.

  Args:
    backend: Tokenizer.
    controls: Text -> id of the added tokens that are control tokens.
    spelled: Further words of the vocabulary that a template writes and no user may.
  """

  def __init__(
    self,
    backend: "tokenizers.Tokenizer",
    controls: Mapping[str, int],
    spelled: Collection[str] = (),
  ):
    import tokenizers

    self._ids = dict(controls)
    added = {t.content: t for t in backend.get_added_tokens_decoder().values()}
    alone = {text for text in controls if added[text].single_word}
    self._written = re.compile(f"(?<!{_BREAK})(?:{_alternatives(controls, alone)})")
    self._typed = re.compile(f"{_BREAK}(?:{_alternatives(spelled)})")
    self._encoder = _renamed(backend, controls)
    split = tokenizers.AddedToken(_SPLIT, special=True, normalized=False)
    self._encoder.add_special_tokens([split])
    self._split_id = self._encoder.token_to_id(_SPLIT)

  def mark(self, text: str) -> str:
    """Returns a text of template and users with the private names of what the template wrote."""
    text = self._written.sub(lambda match: f"{_OPEN}{self._ids[match[0]]}{_CLOSE}", text)
    if _BREAK in text:
      text = self._typed.sub(lambda match: match[0][1] + _SPLIT + match[0][2:], text)
    return text.replace(_BREAK, "")

  def before_first(self, text: str) -> str:
    """Returns the part of a template's text before its first control token."""
    return self.mark(text).partition(_OPEN)[0]

  def ids(self, marked: Sequence[str]) -> list[list[int]]:
    """Returns the ids of marked texts, with nothing added."""
    encoded = self._encoder.encode_batch_fast(list(marked), add_special_tokens=False)
    return [[i for i in e.ids if i != self._split_id] for e in encoded]

  def encode(self, marked: Sequence[str]) -> list[Encoded]:
    """Encodes marked texts, with nothing added."""
    encoded = self._encoder.encode_batch(list(marked), add_special_tokens=False)
    return [self._without_splits(e) for e in encoded]

  def _without_splits(self, encoded: "tokenizers.Encoding") -> Encoded:
    ids = encoded.ids
    if self._split_id not in ids:
      return Encoded(ids, range(len(ids)), encoded)
    places = [place for place, token in enumerate(ids) if token != self._split_id]
    return Encoded([ids[place] for place in places], places, encoded)


class Spelling:
  """Finds control tokens that a text spells.

  Args:
    texts: The control tokens.
  """

  def __init__(self, texts: Collection[str]):
    self.pattern = re.compile(_alternatives(texts))
    self._starts = re.compile(f"(?={_alternatives(texts)})")

  def find(self, text: str) -> str:
    """Returns the first control token that a text spells, or an empty text."""
    match = self.pattern.search(text)
    return match[0] if match else ""

  def protect(self, text: str) -> str:
    """Returns a user's text such that `Controls.mark` renames nothing in it."""
    text = _RESERVED.sub("\ufffd", text)
    return self._starts.sub(_BREAK, text) if self.pattern.search(text) else text


def unprotected(text: str) -> str:
  """Returns a text of template and users for readers."""
  return text.replace(_BREAK, "")


def unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
  """Returns a text without `MARKS`, and the characters [start, end) that were between them."""
  parts = re.split(f"([{MARKS[0]}{MARKS[1]}])", text)
  plain, spans, starts = "", [], []
  for part in parts:
    if part == MARKS[0]:
      starts.append(len(plain))
    elif part == MARKS[1]:
      spans.append((starts.pop(), len(plain)))
    else:
      plain += part
  return plain, spans


def context(marked: str) -> str:
  """Returns the end of a marked text on which the ids of what follows it depend.

  It starts with the last control token, or with a word that is much further from the end than any
  token is long.
  """
  word = marked.rfind(" ", 0, max(len(marked) - _FAR, 0))
  return marked[max(marked.rfind(_OPEN), word, 0) :]


def is_marker(text: str, *, of_template: bool) -> bool:
  """Returns True for an added token that separates parts of a text rather than being a word.

  Args:
    text: Text of the token.
    of_template: True if the chat template writes it.
  """
  text = text.strip()
  if of_template:
    return bool(text) and not text.isalnum()
  return bool(_BRACKETED.fullmatch(text)) and not _TAG.fullmatch(text)


def is_bracketed(text: str) -> bool:
  """Returns True for a word of the vocabulary that has the form of a marker."""
  return bool(_BRACKETED.fullmatch(text.strip()))


def _alternatives(texts: Collection[str], alone: Collection[str] = ()) -> str:
  """Returns a regular expression that finds the longest of the texts."""
  longest_first = sorted(texts, key=lambda text: (-len(text), text))
  patterns = [
    rf"(?<!\w){re.escape(text)}(?!\w)" if text in alone else re.escape(text)
    for text in longest_first
  ]
  return "|".join(patterns) or "(?!)"


def _renamed(
  backend: "tokenizers.Tokenizer", controls: Mapping[str, int]
) -> "tokenizers.Tokenizer":
  """Returns a copy of a tokenizer in which control tokens have private names."""
  import tokenizers

  names = {text: f"{_OPEN}{token_id}{_CLOSE}" for text, token_id in controls.items()}
  raw = json.loads(backend.to_str())
  raw["post_processor"] = None  # It would shift the offsets.
  for token in raw["added_tokens"]:
    text = token["content"]
    if text not in names:
      continue
    token["content"] = names[text]
    if token["normalized"]:
      # A normalizer that changes a token's own text keeps the token from being found in a text.
      token["normalized"] = controls[text] in backend.encode("a" + text).ids
  model: dict[str, Any] = raw["model"]
  vocab = model.get("vocab")
  if isinstance(vocab, dict):
    model["vocab"] = {names.get(text, text): token_id for text, token_id in vocab.items()}
  elif vocab:
    model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
  if model.get("unk_token") in names:
    model["unk_token"] = names[model["unk_token"]]
  if "merges" in model:
    # Plain characters never merge into a control token.
    inner = model.get("continuing_subword_prefix") or ""
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    model["merges"] = [
      [one, two]
      for one, two in pairs
      if names.keys().isdisjoint((one, two, one + two.removeprefix(inner)))
    ]
  return tokenizers.Tokenizer.from_str(json.dumps(raw))
