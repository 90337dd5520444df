"""Model cards, from records written by hand and from small runs."""

import json
import shutil

import jax
import markdown_it
import numpy as np
import pytest
import yaml

from experiments.records import card, record
from rlhf_jax import data
from rlhf_jax.models import build, hf
from tests.data import chats

CONFIG = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "num_hidden_layers": 2,
  "hidden_size": 32,
  "vocab_size": 64,
}
TOKENIZER = data.word_level_tokenizer(["yes", "no"])
HOSTILE = [
  "---",
  "runs/a`b",
  "``` ```",
  "a\n\n# Injected\n",
  "a\n---\nlicense: mit\n",
  "x | y || z",
  "<script>alert(1)</script><img src=x>",
  "[click](javascript:alert)",
  "*a* _b_ ~~c~~ https://example.org",
  "\u202eevil\x1b[2J\ud800",
  "`",
  " \\ ",
  "'\": {}[]&*!%@",
]


def record_of(text: str) -> record.Record:
  """A record in which everything that can come from outside is `text`."""
  source = {
    "path": text,
    "script": text,
    "role": "started from",
    "summary": {"gold/mean": 1.5, text: 2.0},
    "digests": {"data": text},
    "changed": {"data.path": text},
    "sources": [{"path": text, "role": "started from", "pretrained": True}],
  }
  return {
    "path": text,
    "script": text,
    "method": text,
    "seed": text,
    "settings": {"data.path": text},
    "changed": {"data.path": text, "reward.path": text, text: text},
    "summary": {"kl": 0.5, "kl_low": 0.25, "kl_high": 0.75, f"m{text}": 3},
    "software": {"rlhf_jax": text, "jax": text},
    "data": {
      "training": {"kind": text, "examples": text, "columns": [text], "counts": {text: text}},
    },
    "sources": [source],
  }


def structure(text: str) -> list[tuple[str, str]]:
  """The tree of a Markdown text without its words."""

  def flat(tokens):
    for token in tokens:
      if token.type not in ("text", "inline"):
        yield token.type, token.tag
      yield from flat(token.children or ())

  return list(
    flat(markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text))
  )


def split(text: str) -> tuple[dict, str]:
  _, front, body = text.split("---\n", 2)
  return yaml.safe_load(front), body


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_comes_from_outside_stays_where_it_is_put(text):
  """The card of any record has the outline of a harmless one, and front matter of its shape."""
  config = {**CONFIG, "model_type": text}
  front, body = split(card.card(record_of(text), config, TOKENIZER))
  fine_front, fine_body = split(card.card(record_of("fine"), CONFIG, TOKENIZER))
  assert structure(body) == structure(fine_body)
  assert front.keys() == fine_front.keys()
  names = [name for value in front.values() for name in (value if isinstance(value, list) else [])]
  assert all(card.plain(name) == name for name in names)
  assert "\x1b" not in body and "\u202e" not in body
  body.encode("utf-8")


def test_a_card_says_what_its_record_does():
  of_run = record_of("fine") | {"seed": 3, "changed": {"optim.b1": 0.5, "lora.targets": ["q", "k"]}}
  front, body = split(card.card(of_run, CONFIG, TOKENIZER))
  assert front == {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["rlhf", "jax", "rlhf_jax", "fine"],
    "base_model": ["fine"],
    "base_model_relation": "finetune",
    "datasets": ["fine"],
  }
  assert "| `kl` | 0.5 (0.25 to 0.75) |" in body and "kl_low" not in body
  assert "\n--seed=3\n--optim.b1=0.5\n--lora.targets=q,k\n" in body
  assert "--flagfile=RUN/flags" in body
  assert "AutoModelForCausalLM" in body and "2 layers, width 32" in body
  unreplayable = card.card(of_run, CONFIG, TOKENIZER, replayable=False)
  assert "--flagfile" not in unreplayable
  scorer = {**CONFIG, "architectures": ["LlamaForSequenceClassification"]}
  front, body = split(card.card(of_run | {"script": "reward_model"}, scorer, TOKENIZER))
  assert front["pipeline_tag"] == "text-classification" and "reward-model" in front["tags"]
  assert "AutoModelForSequenceClassification" in body and "--reward.path=FOLDER" in body
  assert "# Reward model from" in body
  _, body = split(card.card(of_run, scorer | {"id2label": {"0": card.PREFERENCE}}, TOKENIZER))
  assert "# Preference model from" in body and "--preference.path=FOLDER" in body
  assert "transformers" not in body


SYSTEM = "{% if terse %}<|im_start|>system\nbe brief<|im_end|>\n{% endif %}"


@pytest.mark.parametrize(
  "template, options",
  [
    ("chatml", {}),
    ("chatml", {"eos_token": "</s>"}),
    (SYSTEM + chats.TEMPLATES["chatml"], {"template_args": {"terse": True}}),
    ("thinking", {}),
    (chats.OPENED, {}),
    ("", {"eos_token": "<|im_end|>"}),
  ],
)
def test_the_code_reads_what_the_model_has_learnt(template, options, tmp_path):
  chats.chat(chats.byte_level(), template, **options).save(tmp_path)
  tokenizer = data.load_tokenizer(tmp_path)
  answer = "RESPONSE" if template else " RESPONSE"
  ((prompt, (response,)),) = tokenizer.encode_exchanges(["PROMPT"], [[answer]])
  for kind, ids in (("CausalLM", prompt), ("SequenceClassification", [*prompt, *response])):
    text = card.card(record_of("fine"), {**CONFIG, "architectures": [f"LlamaFor{kind}"]}, tokenizer)
    code = text.partition("```python\n")[2].partition("\n```")[0]
    code = code.partition('.from_pretrained("FOLDER")\nmodel')[2].partition("\n")[2]
    code = code.rpartition("\nprint")[0].replace('"pt"', "None")
    names = {"tokenizer": tokenizer.hf}
    exec(code, names)
    assert names["inputs"]["input_ids"] == ids, (kind, code)


def test_scores_of_transformers_lack_the_shift():
  scorer = {**CONFIG, "architectures": ["LlamaForSequenceClassification"]}
  assert "score.bias" in card.card(record_of("fine"), scorer, TOKENIZER)
  assert "score.bias" not in card.card(record_of("fine"), CONFIG, TOKENIZER)
  is_alone = "one text at a time"
  assert is_alone in card.card(record_of("fine"), scorer | {"pad_token_id": None}, TOKENIZER)
  assert is_alone not in card.card(record_of("fine"), scorer | {"pad_token_id": 0}, TOKENIZER)


def test_the_method_is_that_of_the_record_or_its_script():
  of_run = record_of("fine")
  assert "- method: `fine`" in card.card(of_run | {"method": ""}, CONFIG, TOKENIZER)
  assert "- method: `KTO: a, b`" in card.card(of_run | {"method": "KTO: a, b"}, CONFIG, TOKENIZER)


def test_a_finished_run_exports_its_card(sft_run, reward_run, tmp_path):
  front, body = split((reward_run / "export" / "README.md").read_text())
  assert front["pipeline_tag"] == "text-classification"
  summary = json.loads((reward_run / "summary.json").read_text())
  assert f"| `accuracy` | {summary['accuracy']:.4g} |" in body
  identity = json.loads((reward_run / "identity.json").read_text())
  assert identity["data"] in body and "- source: `the built-in task`" in body
  assert f"--init_from={sft_run}" in body and "--steps=4" in body and "--data.rows=64" in body
  assert f"started from: `{sft_run}` (`sft`)" in body
  # What the run says of its sources outlives them.
  moved = tmp_path / "moved"
  shutil.copytree(reward_run, moved)
  (source,) = record.read(moved)["sources"]
  assert source["summary"] == json.loads((sft_run / "summary.json").read_text())


def test_model_hubs_read_the_card(sft_run):
  hub = pytest.importorskip("huggingface_hub")
  loaded = hub.ModelCard.load(sft_run / "export" / "README.md", ignore_metadata_errors=False)
  assert loaded.data.library_name == "transformers" and "sft" in loaded.data.tags


def test_an_export_with_a_card_loads_as_it_was_saved(sft_run, tmp_path):
  export = sft_run / "export"
  config, head = hf.parse_config(export)
  loaded = hf.load_params(export, build(config, head), key=jax.random.key(0))
  bare = tmp_path / "bare"
  shutil.copytree(export, bare, ignore=shutil.ignore_patterns("README.md"))
  without = hf.load_params(bare, build(config, head), key=jax.random.key(1))
  jax.tree.map(np.testing.assert_array_equal, loaded, without)
  assert data.load_tokenizer(export).digest == data.load_tokenizer(bare).digest
