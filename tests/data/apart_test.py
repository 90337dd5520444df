"""Templates and tokenizers that take too much time or memory, or end their reader."""

import json
import os
import signal

import pytest

from rlhf_jax.data import apart, load_tokenizer, word_level_tokenizer, worker
from rlhf_jax.data.sources import DataError

FOR = "{%% for i in range(%s) %%}"
END = "{% endfor %}"


@pytest.fixture(autouse=True)
def low_limits(monkeypatch):
  monkeypatch.setitem(worker.LIMITS, "render", (1, 300_000_000))
  monkeypatch.setitem(worker.LIMITS, "tokenizer", (1, 1_000_000_000))


@pytest.fixture
def folder(tmp_path):
  word_level_tokenizer(["the", "soup", "was", "good"]).save(tmp_path)
  return tmp_path


def edit(folder, **changes):
  path = folder / "tokenizer.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def template(folder, source):
  (folder / "chat_template.jinja").write_text(source)


TEMPLATES = {
  "loops": FOR % 99999 + FOR % 99999 + END + END,
  "output": FOR % 99999 + "x" * 300 + END,
  "range": FOR % "10**9" + "x" + END,
  "text": "{{ 'a' * 10**10 }}",
  "list": "{{ ([0] * 10**9) | length }}",
  "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
  "doubling": "{% set n = namespace(x='ab') %}" + FOR % 40 + "{% set n.x = n.x ~ n.x %}" + END,
  "width": "{{ 'a' | center(10**10) }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_takes_too_much_is_refused(folder, name):
  template(folder, TEMPLATES[name])
  with pytest.raises(DataError, match=r"tokenizer.json: .*the chat template") as e:
    load_tokenizer(folder)
  assert e.value.exit_code == 65 and "\n" not in str(e.value)


def test_a_template_that_takes_too_much_for_one_row_is_refused_there(folder):
  """Chats before and after it are rendered, by a new process."""
  trap = (
    "{% if 'soup' in messages[0].content %}{{ (messages | length + 9) ** (10 ** 9) }}{% endif %}"
  )
  template(folder, trap + "{{ messages[0].content }}")
  tokenizer = load_tokenizer(folder)
  assert tokenizer.render_prompt("the") == "the"
  with pytest.raises(DataError, match=r"takes more than 1 s or 286 MiB \(its process ended by SIG"):
    tokenizer.encode_prompts(["the", "the soup"])
  assert tokenizer.render_prompt("good") == "good"


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TOKENIZERS = {
  "doubling": {"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 40}},
  "regex": {
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(?<=a*"}}
    | {"behavior": "Isolated", "invert": False}
  },
  "panic": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(" * 9}, "content": ""}},
  "deep": {"normalizer": json.loads('{"type": "Sequence", "normalizers": [' * 200 + "]}" * 200)},
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_takes_too_much_is_refused(folder, name):
  edit(folder, **TOKENIZERS[name])
  with pytest.raises(DataError, match="tokenizer.json: ") as e:
    load_tokenizer(folder)
  assert e.value.exit_code == 65 and "\n" not in str(e.value)


@pytest.mark.parametrize("number", [2**31, 2**32 - 1])
def test_a_vocabulary_with_a_huge_id_is_refused(folder, number):
  path = folder / "tokenizer.json"
  raw = json.loads(path.read_text())
  raw["model"]["vocab"]["soup"] = number
  path.write_text(json.dumps(raw))
  with pytest.raises(DataError, match="tokenizer.json: "):
    load_tokenizer(folder)


def test_usual_folders_are_read_and_tried_once(folder, monkeypatch):
  load_tokenizer(folder)
  monkeypatch.setattr(apart._Process, "send", lambda *unused: pytest.fail("tried again"))
  assert load_tokenizer(folder).encode_prompt("soup") == [1, 5]


def test_the_process_ends_with_the_input_of_its_own(folder):
  process = apart._Process()
  result = process.ask(
    {"task": "render", "source": "{{ x }}", "variables": {"x": 1}, "chats": [{}]}
  )
  assert result == {"texts": ["1"]}
  child = process._child
  assert child is not None
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    os.kill(child.pid, number)  # As whoever stops all processes of a run does.
  again = {"task": "render", "source": "{{ x }}", "variables": {}, "chats": [{"x": 2}]}
  assert process.ask(again) == {"texts": ["2"]}
  assert process._child is child
  process.stop()
  assert child.returncode == 0
