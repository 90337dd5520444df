"""Chat templates of the usual kinds, and small tokenizers of the usual kinds, for tests."""

import json
import pathlib

import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from rlhf_jax.data import Tokenizer

_LOOP = "{% for m in messages %}"
_ASKED = "{% if add_generation_prompt %}"
TEMPLATES = {
  "chatml": _LOOP
  + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
  + _ASKED
  + "{{ '<|im_start|>assistant\n' }}{% endif %}",
  "llama2": "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
  "{% set system = messages[0]['content'] %}{% else %}{% set turns = messages %}"
  "{% set system = false %}{% endif %}{% for m in turns %}{% if loop.index0 == 0 and system %}"
  "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}{% else %}"
  "{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
  "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
  "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
  "mistral": "{{ bos_token }}" + _LOOP + "{% if m['role'] == 'user' %}"
  "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
  "{{ m['content'] + eos_token }}{% else %}{{ raise_exception('no system') }}{% endif %}"
  "{% endfor %}",
  "llama3": _LOOP + "{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
  " + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
  "{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
  + _ASKED
  + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
  "gemma": "{{ bos_token }}" + _LOOP + "{% if m['role'] == 'system' %}"
  "{{ raise_exception('no system') }}{% endif %}{% set role = m['role'] %}"
  "{% if role == 'assistant' %}{% set role = 'model' %}{% endif %}"
  "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
  + _ASKED
  + "{{ '<start_of_turn>model\n' }}{% endif %}",
  "zephyr": _LOOP
  + "\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n{% endfor %}"
  + _ASKED
  + "\n{{ '<|assistant|>' }}\n{% endif %}",
  "plain": _LOOP
  + "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
  + _ASKED
  + "{{ 'assistant:' }}{% endif %}",
  "newline": "{{ bos_token }}" + _LOOP + "{{ '### ' + m['role'] + '\n' + m['content'] }}"
  "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
  + _ASKED
  + "{{ '### assistant\n' }}{% endif %}",
  "thinking": _LOOP + "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
  "{% set parts = m['content'].split('</think>') %}{% if loop.last %}"
  "{% if parts | length > 1 %}{{ parts[0] + '</think>' }}{% else %}{{ '<think>\n\n</think>\n\n' }}"
  "{% endif %}{% endif %}{{ parts[-1] }}{% else %}{{ m['content'] }}{% endif %}"
  "{{ '<|im_end|>\n' }}{% endfor %}" + _ASKED + "{{ '<|im_start|>assistant\n' }}{% endif %}",
}
# Of reasoning models: the prompt opens a tag, and the template leaves out what an answer has in it.
OPENED = (
  _LOOP + "{% set text = m['content'].split('</think>')[-1] %}"
  "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
  + _ASKED
  + "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
MARKERS = (
  "<|im_start|>",
  "<|im_end|>",
  "<|start_header_id|>",
  "<|end_header_id|>",
  "<|eot_id|>",
  "<start_of_turn>",
  "<end_of_turn>",
)
WORDS = ("<think>", "</think>")  # Tokens of a model's own answers.
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MERGES = "Ċ Ċ|Ġ t|h e|Ġt he|Ġ a|l l|he ll|hell o|Ġ h|Ġh e|Ġhe ll|Ġhell o|Ġ Ġ|I N|S T|IN ST"


def byte_level(special: bool = True) -> tokenizers.Tokenizer:
  """A tokenizer like that of Llama 3."""
  vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  pairs = [tuple(pair.split(" ")) for pair in _MERGES.split("|")]
  for one, two in pairs:
    vocab.setdefault(one + two, len(vocab))
  backend = tokenizers.Tokenizer(models.BPE(vocab, pairs))
  split = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3), "isolated")
  bytes_of_parts = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of_parts])
  backend.decoder = decoders.ByteLevel()
  return _with_markers(backend, special)


def sentencepiece(
  stories: pathlib.Path, scheme: str = "", special: bool = True
) -> tokenizers.Tokenizer:
  """The tokenizer of stories260k, like those of Llama 2, Mistral and Gemma.

  Args:
    stories: Folder of stories260k.
    scheme: Rule for the space before a text, as newer files have it: first, always or never.
    special: True if markers are flagged as special.
  """
  raw = json.loads((stories / "tokenizer.json").read_text(encoding="utf-8"))
  if scheme:
    raw["normalizer"] = None
    raw["pre_tokenizer"] = {
      "type": "Metaspace",
      "replacement": "▁",
      "prepend_scheme": scheme,
      "split": False,
    }
  return _with_markers(tokenizers.Tokenizer.from_str(json.dumps(raw)), special)


def chat(backend: tokenizers.Tokenizer, template: str, **options) -> Tokenizer:
  """Wraps a tokenizer with the template of a name."""
  hf = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
  )
  hf.chat_template = TEMPLATES.get(template, template)
  return Tokenizer(hf, **options)


def _with_markers(backend: tokenizers.Tokenizer, special: bool) -> tokenizers.Tokenizer:
  ends = [t for t in ("<s>", "</s>") if t not in backend.get_vocab()]
  backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ends])
  add = backend.add_special_tokens if special else backend.add_tokens
  add([AddedToken(t, special=special, normalized=False) for t in MARKERS])
  backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in WORDS])
  return backend
