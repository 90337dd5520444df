"""Files, rows, data sets and model folders that are refused, each by a line with the fix."""

import csv
import gzip
import io
import json
import pathlib
import pickle
import shutil
import tarfile
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments.lab import models
from rlhf_jax import data, simulation
from rlhf_jax.data import DataConfig
from rlhf_jax.models import ModelConfig, build, hf
from tests.data.rows import TOKENIZER, prompts, text, write
from tests.inputs.refused import refusal

BUILTIN = data.word_level_tokenizer(simulation.WORDS)
GOOD = b'{"prompt": "w1", "response": "w2"}\n'


def user(content):
  return {"role": "user", "content": content}


def bot(content):
  return {"role": "assistant", "content": content}


def assert_refused(found, code, *words):
  got, message = found
  assert got == code, message
  assert "\n" not in message and "Traceback" not in message
  for word in words:
    assert word in message


def archive(content):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as tar:
    entry = tarfile.TarInfo("rows.jsonl")
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
  return file.getvalue()


# Files: name, content, words of the message.
FILES = [
  ("rows.jsonl", GOOD + b'{"prompt": "a", "prompt": "b"}\n', ":2", "'prompt' is there twice"),
  ("rows.jsonl", GOOD + b'{"m": [{"role": "a", "role": "b"}]}\n', ":2", "'role' is there twice"),
  ("rows.jsonl", GOOD + b'{"a": 1, "a": 1}\n', "twice"),
  ("rows.json", b'[{"prompt": "a", "prompt": "b"}]', "twice"),
  ("rows.jsonl", GOOD + b'{"prompt": "a"\n', ":2", "malformed JSON"),
  ("rows.jsonl", GOOD + b'{"prompt": "a', "cut off"),
  ("rows.jsonl", GOOD + b'{"score": NaN}\n', "NaN"),
  ("rows.jsonl", GOOD + b'{"score": Infinity}\n', "Infinity"),
  ("rows.jsonl", GOOD + b'"text"\n', ":2", "found text"),
  ("rows.jsonl", GOOD + b"[1]\n", ":2", "found a list"),
  ("rows.jsonl", b'[{"prompt": "a"}]\n[{"prompt": "b"}]\n', ":1", "found a list"),
  ("rows.jsonl", GOOD + b'{"prompt": "a\\u0000"}\n', "NUL"),
  ("rows.jsonl", GOOD + b'{"prompt": "\\ud800"}\n', "surrogate"),
  ("latin1.jsonl", '{"prompt": "é"}\n'.encode("latin-1"), "not UTF-8", "save the file as UTF-8"),
  ("utf16.jsonl", GOOD.decode().encode("utf-16"), "not UTF-8"),
  ("rows.json", b'[{"prompt": "a"},]', "malformed JSON", "JSON Lines"),
  ("rows.json", b'[{"prompt": "a"}', "malformed JSON"),
  ("rows.json", b'[{"prompt": "w1", "response": "w2"}, 3]', "[1]", "found a number"),
  ("rows.json", b'[{"prompt": "\xff"}]', "not UTF-8"),
  ("rows.json", b"[" * 100_000, "nested too deeply"),
  ("rows.json", b'{\n  "prompt": "a"\n}\n', "several lines", "jq -c"),
  ("rows.csv", b"prompt,response\na\n", ":2", "1 values for 2 columns"),
  ("rows.csv", b"prompt,response\na,b,c\n", ":2", "3 values for 2 columns"),
  ("rows.csv", b"prompt,prompt\na,b\n", "twice"),
  ("rows.csv", b"prompt,\na,b\n", "empty"),
  ("rows.csv", b'prompt,response\na,"b', "not CSV"),
  ("rows.csv", "prompt\né\n".encode("latin-1"), ":2", "not UTF-8"),
  ("rows.tsv", b"prompt\tresponse\na,b\n", ":2", "1 values for 2 columns"),
  ("rows.jsonl.gz", gzip.compress(GOOD)[:-12], "broken or cut off"),
  ("rows.jsonl.gz", b"\x1f\x8b" + b"x" * 50, "cannot be read|broken"),
  ("rows.bz2", b"BZh9" + b"x" * 50, "cannot be read|broken"),
  ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"x" * 50, "zstd -d"),
  ("rows.parquet", b"PAR1" + b"x" * 50, "not a readable Parquet file"),
  ("rows.jsonl", pickle.dumps([{"prompt": "a"}]), "pickle", "JSON Lines"),
  ("rows.arrow", b"ARROW1\0\0" + b"x" * 50, "Arrow"),
  ("rows.db", b"SQLite format 3\0" + b"x" * 50, "SQLite"),
  ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
  ("rows.jsonl", b"<!DOCTYPE html><html></html>", "web page"),
  ("rows.npy", b"\x93NUMPY\x01\0" + b"x" * 50, "NumPy"),
  ("rows.jsonl", b"prompt: a\nresponse: b\n", "malformed JSON", '{"prompt": "..."}'),
  ("rows.jsonl.gz", gzip.compress(gzip.compress(GOOD)), "packed twice"),
  ("rows.tar", archive(GOOD), "a tar archive", "tar -xf"),
  ("rows.tar.gz", gzip.compress(archive(GOOD)), "a tar archive", "tar -xf"),
  ("rows.csv", b"prompt,response,label\na,b,maybe\n,c,1\n", "prompt: the text is empty"),
]


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [(name, content, words) for name, content, *words in FILES],
  ids=[f"{i}-{file[0]}" for i, file in enumerate(FILES)],
)
def test_files(tmp_path, name, content, words, record_property):
  record_property("bad inputs", 1)
  path = tmp_path / name
  path.write_bytes(content)
  config = DataConfig(path=str(path), eval_fraction=0)
  code, message = refusal(data.load, "demonstrations", config, TOKENIZER)
  one = next((word for word in words if "|" in word), None)
  assert one is None or any(word in message for word in one.split("|"))
  assert_refused((code, message), 65, name, *(word for word in words if word != one))


def test_spreadsheets(tmp_path):
  with zipfile.ZipFile(tmp_path / "rows.xlsx", "w") as file:
    file.writestr("sheet", "x")
  config = DataConfig(path=str(tmp_path / "rows.xlsx"))
  assert_refused(refusal(data.load, "prompts", config, TOKENIZER), 65, "spreadsheet", "CSV")


@pytest.mark.parametrize(
  ("path", "words"),
  [
    ("none.jsonl", ("none.jsonl", "No such file", "data.path")),
    ("none*.jsonl", ("no file matches",)),
    ("{folder}", ("Is a directory", "such as inside.jsonl")),
    ("{folder}/empty", ("the folder is empty",)),
    ("{folder}/inside.jsonl,none.jsonl", ("none.jsonl", "No such file")),
    ("Anthropic/hh-rlhf", ("hub", "hf download --repo-type dataset Anthropic/hh-rlhf")),
    ("https://example.org/rows.jsonl", ("download the file first",)),
    ("hf://datasets/a/b.jsonl", ("names no file", "hf://datasets/ORG/NAME[@REVISION]/FILE")),
    ("{folder}/inside.jsonl/x.jsonl", ("Not a directory",)),
    ("{folder}/inside.jsonl,", ("the name of a file is empty", "one comma between")),
    (",{folder}/inside.jsonl", ("the name of a file is empty",)),
    (" ", ("the name of a file is empty",)),
  ],
)
def test_paths(tmp_path, path, words):
  (tmp_path / "empty").mkdir()
  write(tmp_path, prompts(3), "inside.jsonl")
  config = DataConfig(path=path.format(folder=tmp_path))
  found = refusal(data.load, "prompts", config, TOKENIZER)
  words = [w.replace("inside.jsonl", "empty") if w.startswith("such as") else w for w in words]
  assert_refused(found, 65, *words)
  config = DataConfig(path=f"{tmp_path}/inside.jsonl", eval_path=path.format(folder=tmp_path))
  assert_refused(refusal(data.load, "prompts", config, TOKENIZER), 65, *words)


PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}
SHP = {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
TLDR = {
  "info": {"post": "p", "title": "t", "subreddit": "s"},
  "summaries": [{"text": "a"}, {"text": "b"}],
  "choice": 0,
}

# Kind, columns, words of the message: columns that contradict each other, ...
ROWS = [
  ("prompts", {"prompt": "p", "messages": [user("q")]}, "prompt: it and `messages`", "differ"),
  ("prompts", {"prompt": "p", "question": "q"}, "prompt: it and `question`", "data.ignore="),
  ("prompts", {"prompt": "p", "instruction": "q"}, "prompt: it and `instruction`"),
  ("prompts", {"prompt": [user("p")], "messages": [user("q")]}, "messages: it and `prompt`"),
  ("demonstrations", {"prompt": "p", "response": "r", "completion": "s"}, "`completion`", "differ"),
  ("demonstrations", {"prompt": "p", "response": "r", "output": "s"}, "`output`", "differ"),
  ("demonstrations", {**PAIR, "response": "r"}, "response: it and `chosen`"),
  ("demonstrations", {"prompt": "p", "messages": [user("q"), bot("r")]}, "prompt: it and `messag"),
  ("preferences", {**PAIR, "chosen": [user("q"), bot("c")], "rejected": [user("q"), bot("r")]},
   "prompt: it and `chosen`"),
  ("preferences", {**PAIR, "chosen": [user("p"), bot("c")], "rejected": [user("q"), bot("r")]},
   "rejected", "differ from those of `chosen`"),
  ("prompts", {"prompt": "p", "system": "s", "system_prompt": "t"}, "system: it and `system_pro"),
  ("prompts", {"system": "s", "messages": [{"role": "system", "content": "t"}, user("p")]},
   "system", "another system turn"),
  ("prompts", {"history": [["a", "b"]], "messages": [user("a"), bot("b"), user("c")]}, "history"),
  # ... that change the prompt, ...
  *(
    ("demonstrations", {"prompt": "p", "response": "r", name: value}, name, "changes the prompt")
    for name, value in [
      ("context", "c"), ("contexts", ["c"]), ("documents", ["d"]), ("document", "d"),
      ("input", "i"), ("history", "h"), ("tools", [{"name": "f"}]), ("tool_calls", [{}]),
      ("functions", [{}]), ("image", "x.png"), ("images", ["x.png"]), ("audio", "x"),
    ]
  ),
  ("preferences", {**PAIR, "context": "c"}, "context", "data.ignore=context"),
  ("prompts", {"prompt": "p", "chat_template_kwargs": {"enable_thinking": False}},
   "changes the prompt", "data.template_args=enable_thinking:false",
   "data.ignore=chat_template_kwargs"),
  ("prompts", {"instruction": "p", "input": "i", "context": "c"}, "changes the prompt"),
  # ... turns, ...
  ("prompts", {"messages": [user("p"), {"role": "tool", "content": "t"}]}, "'tool'", "template"),
  ("prompts", {"messages": [user("p"), {"role": "function", "content": "t"}]}, "'function'"),
  ("prompts", {"conversations": [{"from": "observation", "value": "t"}]}, "'observation'"),
  ("prompts", {"messages": [{"role": "narrator", "content": "t"}]}, "unknown role 'narrator'"),
  ("demonstrations", {"messages": [user("p"), bot("a") | {"tool_calls": [{"id": 1}]}]},
   "messages[1].tool_calls"),
  ("demonstrations", {"messages": [user("p"), bot("a") | {"reasoning_content": "r"}]},
   "reasoning_content"),
  ("demonstrations", {"messages": [user("p"), {"role": "assistant", "content": None}]},
   "messages[1].content", "null"),
  ("prompts", {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]},
   "messages[0].content[0]", "image_url"),
  ("prompts", {"messages": [user([{"type": "text", "text": "a"}, {"type": "image"}])]},
   "content[1]", "image"),
  ("prompts", {"messages": [user([])]}, "messages[0].content"),
  ("prompts", {"messages": [user(3)]}, "messages[0].content", "int 3"),
  ("prompts", {"messages": "hello"}, "expected a list of messages"),
  ("prompts", {"conversations": [{"from": "human", "value": None}]}, "[0].value"),
  ("prompts", {"conversations": [{"from": "human", "text": "x"}]}, "[0].value"),
  ("prompts", {"conversations": ["a", "b"]}, "[0]", "expected a message"),
  ("demonstrations", {"conversations": [{"from": "human", "value": "p"}]}, "there is no answer"),
  ("prompts", {"prompt": "p", "history": ["a", "b"]}, "history[0]", "two texts"),
  ("prompts", {"prompt": "p", "history": [["a"]]}, "history[0]"),
  ("prompts", {"prompt": "p", "system": 3}, "system", "int 3"),
  # ... columns of published formats, ...
  ("preferences", HH | {"rejected": "b"}, "prompt: missing"),
  ("demonstrations", {"conversation": [3, {"input": "a"}]}, "conversation[0]",
   "expected a message"),
  ("demonstrations", {"conversation": [{"input": "a", "output": "b"}, {"input": "c"}]},
   "conversation[1].output", "null"),
  ("preferences", {"prompt": "p", "chosen": ["a"], "rejected": ["b", None]}, "rejected[1]", "null"),
  ("prompts", {"problem": 3}, "problem: expected text", "int 3"),
  ("demonstrations", {"problem": "p", "answer": "4"}, "response: missing", "rename the column"),
  ("prompts", {"query": "p"}, "prompt: missing", "are query", "rename the column"),
  ("preferences", SHP | {"labels": 2}, "labels", "1 or 0"),
  ("preferences", SHP | {"history": 3}, "history", "int 3"),
  ("preferences", TLDR | {"choice": 2}, "preferred", "int 2"),
  ("preferences", TLDR | {"info": {"id": "x"}}, "info", "post"),
  ("preferences", {"instruction": "p", "completions": [{"response": "a"}, {"response": "b"}]},
   "nobody has judged it"),
  ("preferences", {"instruction": "p", "completions": ["a", {"response": "b"}]}, "completions",
   "list of objects"),
  ("preferences", {"instruction": "p", "completions": ["a"]}, "chosen: missing", "`responses`"),
  ("preferences", {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 3},
   "better_response_id", "0 or 1"),
  ("demonstrations", {"instruction": "p", "context": 4, "response": "r"}, "context", "int 4"),
  ("demonstrations", {"question": {"a": 1}, "answer": "r"}, "question", "an object"),
  # ... labels and judgements, ...
  *(
    ("unpaired", {"prompt": "p", "completion": "r", "label": label}, "label", "true or false")
    for label in (2, -1, 0.5, "true", "1", "good", [True])
  ),
  ("rankings", {"prompt": "p", "responses": [{"text": "a", "rank": "1"}, {"text": "b", "rank": 2}]},
   "rank", "str '1'"),
  ("preferences", {"prompt": "p", "responses": ["a", "b"], "annotations": [{"preferred": 2}]},
   "annotations[0].preferred", "int 2"),
  ("preferences", {"prompt": "p", "responses": ["a", "b"]}, "nobody has judged it"),
  ("rankings", {"prompt": "p", "responses": [{"text": "a", "rank": 0, "score": 1},
   {"text": "b", "rank": 1, "score": 2}]}, "responses: `rank` and `score`", "differently"),
  ("rankings", {"prompt": "p", "responses": [{"text": "a", "score": 1, "correct": True},
   {"text": "b", "score": 2, "correct": False}]}, "`score` and `correct`"),
  ("preferences", {"prompt": "p", "responses": ["a", "b"], "annotations": [{"preferred": 0}],
   "preferences": [{"a": 0, "b": 1, "preferred": 1}]}, "annotations: it and `preferences`"),
  ("prompts", {"messages": [user("a")], "conversations": [user("b")]}, "conversations"),
  # ... and what is missing.
  ("prompts", {"query": "p"}, "prompt: missing", "columns are query"),
  ("demonstrations", {"prompt": "p"}, "response: missing", "`completion`"),
  ("demonstrations", {"prompt": "p", "response": " "}, "response: the text is empty"),
  ("demonstrations", {"prompt": "", "response": "r"}, "prompt: the text is empty"),
  ("demonstrations", {"prompt": None, "response": "r"}, "prompt: is null"),
  ("demonstrations", {"prompt": "p", "response": 3}, "response: expected text, found int 3"),
  ("preferences", {"prompt": "p", "chosen": "c"}, "rejected: missing"),
  ("preferences", {"prompt": "p", "response": "r"}, "chosen: missing"),
  ("preferences", {**PAIR, "rejected": ""}, "rejected: the text is empty"),
  *(
    ("unpaired", {"prompt": "p", "completion": "r"} | other, "label: ", "label")
    for other in ({}, {"label": None}, {"desirable": True}, {"kto_tag": False})
  ),
  # A column has the name that it has in the file.
  ("demonstrations", {"question": "p", "answer": 4}, ": answer: expected text, found int 4"),
  ("demonstrations", {"input": 3, "output": "r"}, ": input: expected text"),
  *(
    ("demonstrations", {column: [{"from": "human", "value": "p"}, {"from": "x"}]},
     f": {column}[1].from: unknown role 'x'")
    for column in ("conversations", "conversation")
  ),
  ("demonstrations", {"conversations": [{"from": "human", "value": "p"}]}, ": conversations: "),
  ("preferences", {"question": "p", "response_j": 1, "response_k": "b"}, ": response_j: expected"),
  # What turns the meaning of a row around.
  ("demonstrations", {"text": "t", "role": "prompter", "parent_id": None}, "role: the row"),
  ("demonstrations", {"text": "t", "role": "assistant", "parent_id": "x"}, "ignore=role,parent_id"),
  *(
    ("demonstrations", {"messages": [user("p"), bot("r") | {"weight": weight}]},
     "messages[1].weight: is 0", "nothing is to be learnt")
    for weight in (0, 0.0, False)
  ),
  *(
    ("preferences", {**PAIR, side.format("chosen"): 1, side.format("rejected"): 2.5},
     f"{side.format('chosen')}: 1 is less than that of `rejected`, 2.5", "data.ignore=")
    for side in ("score_{}", "{}_score", "{}_rating", "{}-rating")
  ),
  ("demonstrations", {"problem": "p", "solution": "s", "messages": [user("p"), bot("t")]},
   "solution: it and `messages`"),
  ("preferences", {**PAIR, "messages": [user("p"), bot("t")]}, "chosen: it and `messages`"),
  ("demonstrations", {"messages": [user("p"), bot("a") | {"reasoning": "r"}]}, "[1].reasoning"),
  ("demonstrations", {"prompt": "p", "response": "r", "system": "s", "system_message": "t"},
   "system: it and `system_message`"),
  ("preferences", TLDR | {"info": {"post": "p", "title": None}}, "info.subreddit", "null"),
  ("preferences", TLDR | {"info": {"post": "p", "subreddit": "s"}}, "info.title", "null"),
]  # fmt: skip


@pytest.mark.parametrize(
  ("kind", "fields", "words"),
  [(kind, fields, words) for kind, fields, *words in ROWS],
  ids=[f"{i}-{row[0]}-{row[2][:24]}" for i, row in enumerate(ROWS)],
)
def test_rows(tmp_path, kind, fields, words, record_property):
  record_property("bad inputs", 1)
  path = write(tmp_path, [fields])
  for eval_fraction in (0.05, 0):
    config = DataConfig(path=path, eval_fraction=eval_fraction)
    assert_refused(refusal(data.load, kind, config, TOKENIZER), 65, "rows.jsonl:1", *words)


CHAT, WORSE = [user("p"), bot("c")], [user("p"), bot("r")]


def written(fields, write_list):
  """Returns columns whose lists are texts."""
  return {
    name: write_list(value) if isinstance(value, list) else value for name, value in fields.items()
  }


@pytest.mark.parametrize("write_list", [str, json.dumps, lambda turns: json.dumps(turns, indent=2)])
@pytest.mark.parametrize(
  ("kind", "fields", "column"),
  [
    # UltraFeedback binarized, ...
    ("preferences", {"prompt": "p", "chosen": CHAT, "rejected": WORSE, "messages": CHAT}, "chosen"),
    ("demonstrations", {"prompt": "p", "chosen": CHAT, "messages": CHAT}, "chosen"),
    ("prompts", {"prompt": "p", "chosen": CHAT, "rejected": WORSE}, "chosen"),
    # ... and the columns of TRL.
    ("demonstrations", {"prompt": CHAT[:1], "completion": CHAT[1:]}, "completion"),
    ("demonstrations", {"prompt": "p", "completion": CHAT[1:]}, "completion"),
    ("prompts", {"prompt": CHAT[:1]}, "prompt"),
    ("unpaired", {"prompt": "p", "completion": CHAT[1:], "label": 1}, "completion"),
    ("demonstrations", {"text": [{"from": "human", "value": "p"}]}, "text"),
    ("demonstrations", {"prompt": "p", "response": {"content": "r", "role": "assistant"}}, "resp"),
  ],
)
def test_chats_that_a_table_holds_as_texts(tmp_path, kind, fields, column, write_list):
  fields = written(
    {name: [of] if isinstance(of, dict) else of for name, of in fields.items()}, write_list
  )
  path = tmp_path / "rows.csv"
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, list(fields))
    writer.writeheader()
    writer.writerow(fields)
  with path.open() as file:  # A text may have lines.
    line = sum(1 for _ in file)
  words = (column, "list of messages", "save it as JSON Lines")
  config = DataConfig(path=str(path), eval_fraction=0)
  assert_refused(refusal(data.load, kind, config, TOKENIZER), 65, f"rows.csv:{line}: ", *words)
  config = DataConfig(path=write(tmp_path, [fields]), eval_fraction=0)  # As Parquet may have them.
  assert_refused(refusal(data.load, kind, config, TOKENIZER), 65, "rows.jsonl:1: ", *words)


@pytest.mark.parametrize("side", ["score_{}", "{}_score", "{}_rating", "{}-rating"])
def test_scores_of_a_table_that_contradict_the_order(tmp_path, side):
  names = [side.format(name) for name in ("chosen", "rejected")]
  path = tmp_path / "rows.csv"
  path.write_text(f"prompt,chosen,rejected,{','.join(names)}\nw1,w2,w3,8,10.5\n")
  found = refusal(data.load, "preferences", DataConfig(path=str(path)), TOKENIZER)
  assert_refused(found, 65, f"rows.csv:2: {names[0]}: 8 is less than", f"data.ignore={names[0]}")


def demonstrations(count, **columns):
  return [{"prompt": text(i), "response": text(i, 1)} | columns for i in range(count)]


def pairs(count, chosen="w1", rejected="w2"):
  return [{"prompt": text(i), "chosen": chosen, "rejected": rejected} for i in range(count)]


@pytest.mark.parametrize(
  ("kind", "rows", "options", "words"),
  [
    ("prompts", [], {}, ["no rows are left of 0 read", "empty"]),
    ("preferences", pairs(9, "w1", "w1"), {}, ["of 9 read", "identical_pairs 9"]),
    ("demonstrations", demonstrations(9), {"max_response_length": 1}, ["9 of 9", "response_leng"]),
    ("prompts", prompts(9), {"max_prompt_length": 1}, ["max_prompt_length=1 is too short"]),
    ("demonstrations", demonstrations(9), {"annotator": "ada"}, ["no annotator judged it", "ada"]),
    ("prompts", prompts(9), {"annotator": "ada"}, ["data.annotator=ada"]),
    (
      "unpaired",
      demonstrations(9, label=True),
      {"annotator": "ada"},
      ["data.annotator=ada"],
    ),
    ("preferences", pairs(9), {"annotator": "ada"}, ["annotator: missing"]),
    ("demonstrations", demonstrations(9), {"ignore": ("response",)}, ["response: missing"]),
    (
      "prompts",
      [{"prompt": "What is the capital of France?"}],
      {},
      ["unknown to the tokenizer", "--model.path"],
    ),
    ("prompts", [*prompts(3), {"prompt": "one unknown"}], {}, ["unknown", "--init_from"]),
    ("prompts", [*prompts(3), {"prompt": 3}, {"prompt": 4}], {"bad_rows": 1}, [":5", "1 earlier"]),
    ("rankings", demonstrations(9, score=1), {}, ["of 9 read", "single_responses 9"]),
    ("preferences", [HH | {"chosen": "\n\nHuman: Hi"}], {}, ["of 1 read", "empty 1"]),
    ("preferences", [HH | {"rejected": f"{HH['chosen'][:-1]} "}], {}, ["of 1 read", "empty 1"]),
    (
      "preferences",
      [HH | {"rejected": "\n\nHuman: Ho\n\nAssistant: b"}],
      {},
      ["of 1 read", "different_prompts 1"],
    ),
    (
      "demonstrations",
      [{"instruction": "p", "input": "", "output": ""}],
      {},
      ["of 1 read", "empty 1"],
    ),
  ],
)
def test_data_sets(tmp_path, kind, rows, options, words):
  config = DataConfig(path=write(tmp_path, rows), **options)
  assert_refused(refusal(data.load, kind, config, TOKENIZER), 65, *words)


def test_the_held_out_rows_are_named_when_they_are_unknown_or_missing(tmp_path):
  train = write(tmp_path, demonstrations(9))
  other = write(tmp_path, [{"prompt": "Who?", "response": "Ada"}], "eval.jsonl")
  config = DataConfig(path=train, eval_path=other)
  found = refusal(data.load, "demonstrations", config, TOKENIZER)
  assert_refused(found, 65, "eval.jsonl", "unknown")
  empty = write(tmp_path, [], "none.jsonl")
  config = DataConfig(path=train, eval_path=empty)
  found = refusal(data.load, "demonstrations", config, TOKENIZER)
  assert_refused(found, 65, "none.jsonl: no rows are left of 0 read", "empty")


@pytest.mark.parametrize("kind", data.KINDS)
def test_the_built_in_task_is_not_for_the_model_of_another(kind):
  config = DataConfig(rows=8, eval_rows=4)
  assert_refused(refusal(data.load, kind, config, TOKENIZER), 65, "data.path is not given")
  data.load(kind, config, BUILTIN)


# Model folders: what is done to a good one, words of the message.

TINY = ModelConfig(
  vocab_size=44, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp_width=12, max_length=64
)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models") / "good"
  model = build(TINY)
  params = jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), jax.eval_shape(model.init, KEY))
  TOKENIZER.save(folder)
  hf.save_folder(folder, params, TINY, token_ids={"eos_token_id": 2, "pad_token_id": 0})
  return folder


KEY = jax.eval_shape(lambda: jax.random.key(0))


def open_folder(folder):
  """Reads a folder as the scripts do, but for placing the weights on devices."""
  folder = models.finished_folder(str(folder))
  tokenizer = data.load_tokenizer(folder)
  assert tokenizer.eos_id is not None
  config, _ = hf.parse_config(folder)
  if tokenizer.vocab_size > config.vocab_size:
    raise hf.ModelFolderError(f"{folder}: vocabulary")
  return hf.load_params(folder, build(config))


def edit(**changes):
  def apply(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

  return apply


def replace(name, content):
  def apply(folder):
    (folder / name).write_bytes(content)

  return apply


def remove(name):
  return lambda folder: (folder / name).unlink()


def weights(change):
  def apply(folder):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    safetensors.numpy.save_file(change(tensors), folder / WEIGHTS, {"format": "pt"})

  return apply


def index(shards):
  def apply(folder):
    names = list(safetensors.numpy.load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    content = {"metadata": {}, "weight_map": dict.fromkeys(names, shards)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))

  return apply


def cut(name, size):
  def apply(folder):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:size])

  return apply


def first_nan(tensors):
  name = min(tensors)
  return tensors | {name: np.full_like(tensors[name], np.nan)}


FOLDERS = [
  ("without a config", remove("config.json"), 78, "config.json"),
  ("without a tokenizer", remove("tokenizer.json"), 65, "tokenizer.json"),
  ("without weights", remove(WEIGHTS), 78, "no model.safetensors"),
  ("a config that is no JSON", replace("config.json", b"{"), 78, "not JSON"),
  ("a config that is a list", replace("config.json", b"[]"), 78, "config.json"),
  ("an empty config", replace("config.json", b"{}"), 78, "config.json"),
  ("an encoder", edit(architectures=["BertModel"], model_type="bert"), 78, "BertModel"),
  ("no architecture", edit(architectures=None, model_type=None), 78, "architectures"),
  ("other layers", edit(num_hidden_layers=3), 78, "missing"),
  ("fewer layers", edit(num_hidden_layers=1), 78, "no place"),
  ("another width", edit(hidden_size=16), 78, "shape|hidden|head"),
  ("heads that do not fit", edit(num_attention_heads=3, num_key_value_heads=2), 78, "multiple"),
  ("a vocabulary of negative size", edit(vocab_size=-3), 78, "vocab"),
  ("layers as text", edit(num_hidden_layers="two"), 78, "num_hidden_layers"),
  ("an unknown scaling", edit(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), 78, "dynamic"),
  ("an unknown activation", edit(hidden_act="tanhh"), 78, "tanhh"),
  ("cut weights", cut(WEIGHTS, 400), 78, "not a readable safetensors file"),
  ("empty weights", replace(WEIGHTS, b""), 78, "not a readable safetensors file"),
  ("weights of text", replace(WEIGHTS, b"<html>" * 99), 78, "not a readable safetensors file"),
  ("weights that are NaN", weights(first_nan), 78, "NaN"),
  ("no tensor", weights(lambda tensors: {"x": np.zeros(1)}), 78, "tensor"),
  ("a further tensor", weights(lambda t: t | {"model.x": np.zeros(1)}), 78, "model.x"),
  ("a shard that is missing", index("model-2-of-2.safetensors"), 78, "model-2-of-2"),
  ("a shard elsewhere", index("../../x.safetensors"), 78, "bare"),
  ("a tokenizer of text", replace("tokenizer.json", b"hello"), 65, "not a readable tokenizer"),
  ("an empty tokenizer", replace("tokenizer.json", b""), 65, "not a readable tokenizer"),
  ("a tokenizer that is a list", replace("tokenizer.json", b"[]"), 65, "tokenizer"),
]  # fmt: skip


@pytest.mark.parametrize(
  ("change", "code", "words"),
  [(change, code, words) for _, change, code, *words in FOLDERS],
  ids=[folder[0].replace(" ", "_") for folder in FOLDERS],
)
def test_model_folders(tmp_path, good, change, code, words):
  folder = tmp_path / "model"
  shutil.copytree(good, folder)
  change(folder)
  found = refusal(open_folder, folder)
  assert found[0] == code, found[1]
  assert any(word in found[1] for word in words[0].split("|")), found[1]


def test_a_good_model_folder_opens(good):
  assert open_folder(good)


@pytest.mark.parametrize("path", ["nowhere", "a/b", "{file}", "~/nowhere", ""])
def test_paths_of_models(tmp_path, monkeypatch, path):
  monkeypatch.chdir(tmp_path)
  file = pathlib.Path("file")
  file.write_text("x")
  code, message = refusal(models.finished_folder, path.format(file=file))
  assert code == 78 and "\n" not in message
