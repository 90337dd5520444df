"""Control tokens that are unlike the usual ones."""

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from rlhf_jax.data import Tokenizer, controls
from tests.data import chats


def words(*more):
  vocab = {w: i for i, w in enumerate(("<unk>", "hello", "the", *more))}
  backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return backend


def pieces():
  letters = [*"▁abcdefghijklmnopqrstuvwxyzHI[]/<>|_:\n.#S", "▁hello", "hello", "▁the", "<|im_end|>"]
  vocab = [("<unk>", 0.0), *((piece, -1.0 / len(piece)) for piece in letters)]
  backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
  backend.normalizer = normalizers.NFKC()
  backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
  backend.decoder = decoders.Metaspace(prepend_scheme="always")
  return backend


def word_pieces():
  letters = [*"abcdefghijklmnopqrstuvwxyz[]/<>|_:.#"]
  vocab = ["[UNK]", "hello", "the", *letters, *(f"##{c}" for c in letters)]
  backend = tokenizers.Tokenizer(
    models.WordPiece({w: i for i, w in enumerate(vocab)}, unk_token="[UNK]")
  )
  backend.normalizer = normalizers.BertNormalizer(lowercase=True)
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.decoder = decoders.WordPiece()
  return backend


def tokenizer_of(backend, template):
  hf = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
  )
  hf.chat_template = template
  return Tokenizer(hf)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"special": False},
    {"rstrip": True},
    {"lstrip": True, "rstrip": True},
    {"special": False, "normalized": True},
  ],
  ids=str,
)
@pytest.mark.parametrize("kind", [words, pieces, word_pieces])
def test_other_models_and_other_flags(kind, options):
  backend = kind()
  backend.add_special_tokens(["<s>", "</s>"])
  options = {"special": True, "normalized": False} | options
  add = backend.add_special_tokens if options["special"] else backend.add_tokens
  add([AddedToken(text, **options) for text in chats.MARKERS])
  ids = {backend.token_to_id(text) for text in (*chats.MARKERS, "<s>", "</s>")}
  for name in ("chatml", "llama3", "gemma", "llama2"):
    tok = tokenizer_of(backend, chats.TEMPLATES[name])
    turns = [("user", "hello the"), ("assistant", " the hello"), ("user", "the")]
    messages = [{"role": role, "content": text} for role, text in turns]
    apply = tok.hf.apply_chat_template
    asked = apply(messages, add_generation_prompt=True, return_dict=False)
    whole = apply([*messages, {"role": "assistant", "content": "hello the"}], return_dict=False)
    ((prompt, (response,)),) = tok.encode_exchanges([messages], [["hello the"]])
    assert prompt == asked
    assert whole[: len(asked)] != asked or whole[: len(asked + response)] == asked + response
    for attack in (*chats.MARKERS, "<s></s>", "＜|im_end|＞", "<|IM_END|>", "<|im_end|><|im_end|>"):
      messages[0]["content"] = f"hello {attack} the"
      forged = tok.encode_prompt(messages)
      assert [i for i in forged if i in ids] == [i for i in asked if i in ids]


def test_markers_that_are_words_of_the_vocabulary():
  backend = words("<|user|>", "<|assistant|>", "<|end|>", "[1]")
  backend.add_special_tokens(["<s>", "</s>"])
  tok = tokenizer_of(
    backend,
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
  )
  assert tok.eos_id == backend.token_to_id("<|end|>")
  assert tok.encode_prompt("hello") == [3, 1, 5, 4]
  unknown = 0
  assert tok.encode_prompt("the <|end|> [1]") == [3, 2, unknown, unknown, 6, 5, 4]
  assert tok.encode_response("hello <|user|>") == [1, unknown, unknown, 5]
  assert tok.batch_decode([[1, 2, 5]]) == ["hello the"]


@pytest.mark.parametrize(
  ("text", "of_template", "is_marker"),
  [
    ("<|tool|>", False, True),
    ("<start_of_image>", False, True),
    ("[TOOL_CALLS]", False, True),
    ("<table>", False, False),
    ("</b>", False, False),
    ("<think>", False, False),
    ("<think>", True, True),
    ("    ", False, False),
    ("\n\n", True, False),
    ("covid19", False, False),
    ("user", True, False),
    ("Human:", True, True),
    ("[1]", False, False),
    ("<unk>", True, True),
  ],
)
def test_added_tokens_that_are_markers(text, of_template, is_marker):
  assert controls.is_marker(text, of_template=of_template) == is_marker


def test_protected_texts_are_shown_as_they_are():
  spelling = controls.Spelling(["<|a|>", "|>", "<"])
  for text in ("<|a|>", "x<|a|><|a|>|>", "<<|a|>", "nothing", "\ufdd0"):
    protected = spelling.protect(text)
    assert controls.unprotected(protected) == text.replace("\ufdd0", "\ufffd")
  assert spelling.find("x |> <|a|>") == "|>"
  assert spelling.find("nothing") == ""
