"""Inputs that are read, with the values that are read."""

import bz2
import csv
import dataclasses
import gzip
import io
import json
import lzma
import pathlib

import pytest

from rlhf_jax import data, rewards
from rlhf_jax.data import DataConfig, Example
from tests.data.rows import TOKENIZER, text, write

HELLO = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
HI = [{"role": "user", "content": "Hi"}]
TALK = [*HI, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]


def turns(*contents, first="user"):
  roles = ("user", "assistant") if first == "user" else ("assistant", "user")
  return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


def shares(*names_and_values):
  return [{"from": name, "value": value} for name, value in names_and_values]


def system(content):
  return {"role": "system", "content": content}


HH = {"chosen": f"{HELLO} See you", "rejected": f"{HELLO} No"}
PAIRED = [{"input": "Hi", "output": "Hello"}, {"input": "Bye", "output": "a"}]
LISTS = {"prompt": "Q?", "chosen": ["good"], "rejected": ["bad", "worse"], "num_rejected": 2}
STEER = "Hi\n\n<extra_id_1>Assistant\nHello\n\n<extra_id_1>User\nBye"  # Of HelpSteer.
WEBGPT = {
  "question": {"dataset": "eli5", "id": "x", "full_text": "Why?"},
  "quotes_0": {"title": ["t"], "extract": ["e"]},
  "answer_0": "a0",
  "tokens_0": {"prefix": [1]},
  "score_0": -0.5,
  "quotes_1": {"title": [], "extract": []},
  "answer_1": "a1",
  "tokens_1": {"prefix": [1]},
  "score_1": 0.5,
}
TLDR = {
  "info": {"id": "t3", "post": "Long.", "title": "T", "subreddit": "aww", "site": None},
  "summaries": [{"text": " s0", "policy": "sup", "note": None}, {"text": " s1", "policy": "ppo"}],
  "choice": 1,
  "worker": "w1",
  "batch": "b",
  "split": "train",
}
TLDR_PROMPT = "SUBREDDIT: r/aww\n\nTITLE: T\n\nPOST: Long.\n\nTL;DR:"
SHP = {
  "post_id": "p",
  "domain": "askbaking_train",
  "upvote_ratio": 0.98,
  "history": "How to bake?",
  "score_A": 3,
  "score_B": 9,
  "human_ref_A": "Cold.",
  "human_ref_B": "Hot.",
  "labels": 0,
}
HELPSTEER = {
  "prompt": "Q?",
  "response": "r",
  "helpfulness": 3,
  "correctness": 4,
  "coherence": 4,
  "complexity": 1,
  "verbosity": 2,
}
STRENGTH = {"split": "train", "prompt": "Q?", "response_1": "r1", "response_2": "r2"}
ULTRA = {
  "source": "evol",
  "instruction": "Do it",
  "models": ["a", "b"],
  "completions": [
    {"response": "r0", "overall_score": 6.5, "model": "a", "critique": "c"},
    {"response": "r1", "overall_score": 8.0, "model": "b", "critique": "c"},
  ],
  "correct_answers": ["None"],
}
BINARIZED = {
  "prompt": "Hi",
  "prompt_id": "x",
  "chosen": turns("Hi", "good"),
  "rejected": turns("Hi", "bad"),
  "messages": turns("Hi", "good"),
  "score_chosen": 8.5,
  "score_rejected": 7.0,
}
DOLLY = {"instruction": "Who?", "context": "It was Ada.", "response": "Ada", "category": "qa"}
GSM8K = {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
ORCA = {"id": "niv.1", "system_prompt": "Be brief.", "question": "Who?", "response": "Ada"}
ORCA_PAIR = {"system": "Be brief.", "question": "Who?", "chosen": "Ada", "rejected": "You"}
NECTAR = {
  "prompt": "\n\nHuman: Hi\n\nAssistant: ",
  "answers": [{"answer": "a0", "model": "m", "rank": 2.0}, {"answer": "a1", "rank": 1.0}],
  "turns": 1,
}
SAFE = {
  "prompt": "Q?",
  "response_0": "r0",
  "response_1": "r1",
  "is_response_0_safe": True,
  "better_response_id": 1,
  "safer_response_id": 0,
}
PARTS = [{"type": "text", "text": "Look"}, {"type": "text", "text": "here"}]

# Format or way to write a row, kind, columns, prompt and answers without a chat template, labels.
# A prompt as messages is what a chat template gets; None if that is the text as a user turn.
ROWS = [
  ("HH-RLHF", "preferences", HH, HELLO, (" See you", " No"), (), TALK),
  ("HH-RLHF", "demonstrations", HH, HELLO, (" See you",), (), TALK),
  ("HH-RLHF", "prompts", HH, HELLO, (), (), TALK),
  ("HH-RLHF", "preferences", {"prompt": HELLO, **HH}, HELLO, (" See you", " No"), (), TALK),
  ("HH-RLHF", "preferences", {"prompt": HELLO.strip(), **HH}, HELLO, (" See you", " No"), (), TALK),
  ("HH-RLHF", "preferences", {"prompt": "Hi", **HH}, HELLO, (" See you", " No"), (), TALK),
  ("HH-RLHF", "preferences", {n: t.strip() for n, t in HH.items()}, HELLO, (" See you", " No"), (),
   TALK),
  # Published transcripts have speakers that go on after an empty turn, or after another one.
  ("HH-RLHF", "preferences",
   {n: t.replace("Bye", "Bye\n\nAssistant:") for n, t in HH.items()}, HELLO, (" See you", " No"),
   (), TALK),
  ("HH-RLHF", "preferences",
   {n: t.replace("Bye", "Bye\n\nAssistant: So") for n, t in HH.items()}, HELLO,
   (" So\n\nSee you", " So\n\nNo"), (), TALK),
  ("MATH", "demonstrations", {"problem": "2 + 2?", "solution": "It is 4", "level": "5"}, "2 + 2?",
   ("It is 4",), (), None),
  ("MATH", "prompts", {"problem": "2 + 2?", "answer": "4"}, "2 + 2?", (), (), None),
  ("MATH", "preferences", {"problem": "2 + 2?", "chosen": "4", "rejected": "5"}, "2 + 2?",
   ("4", "5"), (), None),
  ("TRL", "demonstrations", {"problem": "2 + 2?", "messages": turns("2 + 2?", "a")},
   turns("2 + 2?"), ("a",), (), None),
  ("GSM8K", "demonstrations", GSM8K, "2 + 2?", (GSM8K["answer"],), (), None),
  ("GSM8K", "prompts", GSM8K, "2 + 2?", (), (), None),
  (
    "ShareGPT",
    "demonstrations",
    {"id": "1", "conversations": shares(("human", "Hi"), ("gpt", "Hello"))},
    HI,
    ("Hello",),
    (),
    HI,
  ),
  (
    "ShareGPT",
    "demonstrations",
    {"conversations": shares(("system", "S"), ("user", "Hi"), ("chatgpt", "Hello"))},
    [system("S"), *HI],
    ("Hello",),
    (),
    [system("S"), *HI],
  ),
  (
    "ShareGPT",
    "preferences",
    {
      "conversations": shares(("human", "Hi")),
      "chosen": {"from": "gpt", "value": "good"},
      "rejected": {"from": "gpt", "value": "bad"},
    },
    HI,
    ("good", "bad"),
    (),
    HI,
  ),
  ("ShareGPT", "prompts", {"conversations": turns("Hi", "Hello", "Bye")}, TALK, (), (), TALK),
  ("conversation", "demonstrations", {"conversation": PAIRED}, TALK, ("a",), (), None),
  ("conversation", "prompts", {"conversation": PAIRED}, TALK, (), (), None),
  ("conversation", "demonstrations", {"conversation": turns("Hi", "a")}, HI, ("a",), (), HI),
  ("SHP", "preferences", SHP, "How to bake?", ("Hot.", "Cold."), (), None),
  ("SHP", "preferences", SHP | {"labels": 1}, "How to bake?", ("Cold.", "Hot."), (), None),
  ("SHP", "prompts", SHP, "How to bake?", (), (), None),
  ("TL;DR comparisons", "preferences", TLDR, TLDR_PROMPT, (" s1", " s0"), (), None),
  (
    "TL;DR comparisons",
    "preferences",
    TLDR | {"info": {"article": "News."}, "choice": 0},
    "Article:\n\nNews.\n\nTL;DR:",
    (" s0", " s1"),
    (),
    None,
  ),
  ("WebGPT comparisons", "rankings", WEBGPT, "Why?", ("a1", "a0"), (0, 1), None),
  ("WebGPT comparisons", "preferences", WEBGPT, "Why?", ("a1", "a0"), (), None),
  ("HelpSteer 2 preference", "preferences", STRENGTH | {"preference_strength": 3}, "Q?",
   ("r2", "r1"), (), None),
  ("HelpSteer 2 preference", "comparisons", STRENGTH | {"preference_strength": -1}, "Q?",
   ("r1", "r2"), (1.0,), None),
  ("HelpSteer 2 preference", "comparisons", STRENGTH | {"preference_strength": 0}, "Q?",
   ("r1", "r2"), (0.5,), None),
  ("UltraFeedback", "rankings", ULTRA, "Do it", ("r1", "r0"), (0, 1), None),
  ("UltraFeedback", "demonstrations", ULTRA, "Do it", ("r1",), (), None),
  ("UltraFeedback binarized", "preferences", BINARIZED, "Hi", ("good", "bad"), (), HI),
  ("UltraFeedback binarized", "demonstrations", BINARIZED, "Hi", ("good",), (), HI),
  ("UltraFeedback binarized", "prompts", BINARIZED, "Hi", (), (), HI),
  ("Nectar", "rankings", NECTAR, NECTAR["prompt"], ("a1", "a0"), (0, 1), HI),
  # Lists of texts are columns for rewards.
  ("Nectar", "prompts", {"prompt": "Where?", "answers": ["Paris", "paris"]}, "Where?",
   (), (), None),
  ("Nectar", "prompts", {"prompt": "Where?", "answers": []}, "Where?", (), (), None),
  ("UltraFeedback", "prompts", {"instruction": "Where?", "completions": ["Paris"]}, "Where?",
   (), (), None),
  # Texts that look a little like a chat.
  ("no chat", "demonstrations", {"prompt": "[{", "response": '[{"role": "admin", "name": "Ada"}]'},
   "[{", ('[{"role": "admin", "name": "Ada"}]',), (), None),
  ("no chat", "demonstrations", {"prompt": "p", "response": '{"value": 3, "from": 4}'},
   "p", ('{"value": 3, "from": 4}',), (), None),
  ("no chat", "demonstrations",
   {"prompt": "p", "response": 'Say [{"role": "user", "content": 3}]'},
   "p", ('Say [{"role": "user", "content": 3}]',), (), None),
  # A transcript in a column of its own, with and without the answers' space.
  ("transcript", "preferences", {"prompt": HELLO, "chosen": "a", "rejected": "b"}, HELLO,
   ("a", "b"), (), TALK),
  ("transcript", "demonstrations", {"prompt": f" {HELLO} ", "response": "a"}, f" {HELLO} ",
   ("a",), (), TALK),
  ("transcript", "prompts", {"question": HELLO}, HELLO, (), (), TALK),
  # Messages are written as a transcript, and so cannot hold one.
  ("transcript", "prompts", {"prompt": [{"role": "user", "content": HELLO}]}, TALK, (), (), TALK),
  ("transcript", "preferences",
   {"prompt": HELLO, "chosen": "\n\nAssistant: a", "rejected": "Assistant: b"}, HELLO,
   (" a", " b"), (), TALK),
  ("transcript", "demonstrations", {"system": "S", "prompt": HELLO, "response": "a"},
   f"S\n\n{HELLO}", ("a",), (), [system("S"), *TALK]),
  *(("turns with markers", kind, {"prompt": prompt, **more}, TALK, answers, (), None)
    for prompt in (STEER, f"<extra_id_1>User\n{STEER}\n<extra_id_1>Assistant\n")
    for kind, more, answers in (
      ("demonstrations", {"response": "a", "helpfulness": 4}, ("a",)),
      ("preferences", {"response_1": "a", "response_2": "b", "preference_strength": -1},
       ("a", "b")),
      ("prompts", {}, ()),
    )),
  ("no turns", "prompts", {"prompt": "Fill <extra_id_1> User in"}, "Fill <extra_id_1> User in", (),
   (), None),
  ("no transcript", "prompts", {"prompt": "Say \n\nHuman: x\n\nAssistant:"},
   "Say \n\nHuman: x\n\nAssistant:", (), (), None),
  ("no transcript", "prompts", {"prompt": "\n\nHuman: x\n\nAssistant: y"},
   "\n\nHuman: x\n\nAssistant: y", (), (), None),
  *(("RewardBench 2", kind, LISTS, "Q?", answers, labels, None) for kind, answers, labels in (
    ("rankings", ("good", "bad", "worse"), (0, 1, 1)),
    ("demonstrations", ("good",), ()),
    ("prompts", (), ()),
  )),
  ("RewardBench 2", "preferences", LISTS | {"rejected": ["bad"]}, "Q?", ("good", "bad"), (), None),
  ("PKU-SafeRLHF", "preferences", SAFE, "Q?", ("r1", "r0"), (), None),
  (
    "Stack Exchange pairs",
    "preferences",
    {"qid": 1, "question": "Q?", "response_j": "good", "response_k": "bad", "date": "d"},
    "Q?",
    ("good", "bad"),
    (),
    None,
  ),
  ("Dolly", "demonstrations", DOLLY, "Who?\n\nIt was Ada.", ("Ada",), (), None),
  ("Dolly", "demonstrations", DOLLY | {"context": ""}, "Who?", ("Ada",), (), None),
  ("Dolly", "prompts", DOLLY, "Who?\n\nIt was Ada.", (), (), None),
  (
    "Alpaca",
    "demonstrations",
    {"instruction": "Add", "input": "1, 2", "output": "3", "text": "Below is ..."},
    "Add\n\n1, 2",
    ("3",),
    (),
    None,
  ),
  ("input and output", "demonstrations", {"input": "1", "output": "3"}, "1", ("3",), (), None),
  # Columns beside a prompt.
  ("system_prompt", "demonstrations", ORCA, "Be brief.\n\nWho?", ("Ada",), (),
   [system("Be brief."), *turns("Who?")]),
  ("system", "preferences", ORCA_PAIR, "Be brief.\n\nWho?", ("Ada", "You"), (),
   [system("Be brief."), *turns("Who?")]),
  ("system", "demonstrations", ORCA | {"system_prompt": ""}, "Who?", ("Ada",), (), None),
  ("system", "demonstrations", {"system": "S", "messages": turns("Hi", "a")},
   [system("S"), *HI], ("a",), (), [system("S"), *HI]),
  ("system", "prompts", {"system": "S", "messages": [system("S"), *HI]},
   [system("S"), *HI], (), (), [system("S"), *HI]),
  (
    "history",
    "demonstrations",
    {"instruction": "Bye", "input": "", "output": "a", "history": [["Hi", "Hello"]]},
    TALK,
    ("a",),
    (),
    TALK,
  ),
  ("history", "demonstrations", {"prompt": "Bye", "response": "a", "history": TALK[:2]},
   TALK, ("a",), (), TALK),
  ("history", "demonstrations", {"prompt": "Hi", "response": "a", "history": []},
   "Hi", ("a",), (), None),
  # Turns.
  ("role", "prompts", {"messages": [{"role": "developer", "content": "S"}, *HI]},
   [system("S"), *HI], (), (), [system("S"), *HI]),
  ("role", "prompts", {"messages": [{"role": "human", "content": "Hi"}]}, HI, (), (), HI),
  ("parts", "prompts", {"messages": [{"role": "user", "content": PARTS}]},
   turns("Look\nhere"), (), (), turns("Look\nhere")),
  ("first turn", "demonstrations", {"prompt": "Hi", "messages": [*TALK, *turns("a", first="bot")]},
   TALK, ("a",), (), TALK),
  ("text and messages", "prompts", {"prompt": HELLO, "messages": TALK}, HELLO, (), (), TALK),
  ("no text", "prompts", {"chosen": turns("Hi", "a"), "rejected": turns("Hi", "b")},
   HI, (), (), HI),
  ("the same twice", "demonstrations", {"prompt": "p", "response": "r", "completion": "r"},
   "p", ("r",), (), None),
  ("no variables", "prompts", {"prompt": "p", "chat_template_kwargs": {"x": None}}, "p", (), (),
   None),
  ("empty tools", "prompts", {"prompt": "p", "tools": [], "documents": None}, "p", (), (), None),
  # Messages that repeat the answer of another column, as in NuminaMath.
  ("the same twice", "demonstrations",
   {"problem": "Hi", "solution": "a", "messages": turns("Hi", "a")}, HI, ("a",), (), HI),
  ("the same twice", "demonstrations",
   {"prompt": "Hi", "completion": "a", "messages": turns("Hi", "a")}, "Hi", ("a",), (), HI),
  ("the same twice", "preferences",
   {"prompt": "Hi", "chosen": "a", "rejected": "b", "messages": turns("Hi", "a")},
   "Hi", ("a", "b"), (), HI),
  ("system_message", "demonstrations", {"system_message": "S", "prompt": "Hi", "response": "a"},
   "S\n\nHi", ("a",), (), [system("S"), *HI]),
  ("weight", "demonstrations",
   {"conversations": [share | {"weight": i} for i, share in
                      enumerate(shares(("human", "Hi"), ("gpt", "a")))]}, HI, ("a",), (), HI),
  ("scores", "preferences",
   {"prompt": "Hi", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 2.0},
   "Hi", ("a", "b"), (), None),
  # Labels.
  *(
    ("label", "unpaired", {"prompt": "p", "completion": "r", "label": label}, "p", ("r",),
     (int(label),), None)
    for label in (1, 0, 1.0, False)
  ),
  ("label", "unpaired", {"prompt": HI, "completion": turns("r", first="bot"), "label": True},
   HI, ("r",), (1,), HI),
]  # fmt: skip


@pytest.mark.parametrize(
  ("name", "kind", "fields", "prompt", "answers", "labels", "messages"),
  ROWS,
  ids=[f"{row[0]}-{row[1]}-{i}" for i, row in enumerate(ROWS)],
)
def test_rows(tmp_path, name, kind, fields, prompt, answers, labels, messages):
  path = write(tmp_path, [fields])  # What a file gives, not what Python holds.
  (row,) = data.read_file(path)
  read = {on: data.parse_row(kind, row, prefer_messages=on) for on in (False, True)}
  assert read[False] == [Example(prompt, answers, labels)]
  if name in ("HH-RLHF", "transcript"):  # The transcript has a space that no turn has.
    answers = tuple(answer.strip() for answer in answers)
  assert read[True] == [Example(messages or prompt, answers, labels)]


def test_every_format_has_a_row_and_a_line_in_the_page():
  assert {row[0] for row in ROWS} >= set(data.FORMATS)
  page = pathlib.Path(__file__).parents[2] / "experiments" / "README.md"
  lines = page.read_text().splitlines()
  assert {line.split(" | ")[0].removeprefix("| ") for line in lines} >= set(data.FORMATS)


def rows_of(tmp_path, name, content):
  path = tmp_path / name
  path.write_bytes(content)
  return [row.fields for row in data.read_file(path)]


PAIRS = [{"prompt": "é, a", "response": 'say "b"\nthen c'}, {"prompt": "d", "response": "e"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PAIRS).encode()
ARRAY = json.dumps(PAIRS, indent=1).encode()


def table(delimiter):
  file = io.StringIO()
  writer = csv.DictWriter(file, ["prompt", "response"], delimiter=delimiter)
  writer.writeheader()
  writer.writerows(PAIRS)
  return file.getvalue().encode()


def parquet():
  import pyarrow
  import pyarrow.parquet

  file = io.BytesIO()
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), file)
  return file.getvalue()


FILES = [
  ("lines.jsonl", LINES),
  ("lines.csv", LINES),  # The content says what it is.
  ("bom.jsonl", b"\xef\xbb\xbf" + LINES),
  ("crlf.jsonl", LINES.replace(b"\n", b"\r\n")),
  ("array.json", ARRAY),
  ("array.jsonl", b"\xef\xbb\xbf\n " + ARRAY),
  ("line.jsonl", json.dumps(PAIRS).encode()),
  ("lines.jsonl.gz", gzip.compress(LINES)),
  ("two.gz", gzip.compress(LINES[:40]) + gzip.compress(LINES[40:])),
  ("lines.jsonl", bz2.compress(LINES)),
  ("lines.xz", lzma.compress(LINES)),
  ("array.json.gz", gzip.compress(ARRAY)),
  ("table.csv", table(",")),
  ("table.CSV", b"\xef\xbb\xbf" + table(",")),
  ("table.tsv", table("\t")),
  ("table.csv", b'\xef\xbb\xbf"prompt"' + table(",").removeprefix(b"prompt")),
  ("table.csv.gz", gzip.compress(table(","))),
]


@pytest.mark.parametrize(
  ("name", "content"), FILES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(FILES)]
)
def test_files(tmp_path, name, content):
  assert rows_of(tmp_path, name, content) == PAIRS


def test_parquet_files(tmp_path):
  assert rows_of(tmp_path, "rows.parquet", parquet()) == PAIRS


def test_judgements_in_a_table_are_values(tmp_path):
  content = "prompt,response,label\n4,1.5,True\n7,true,0\nx,0,1.0\ny,-1e2,FALSE\n"
  rows = rows_of(tmp_path, "rows.csv", content.encode())
  assert [row["label"] for row in rows] == [True, 0, 1, False]
  assert [row["prompt"] for row in rows] == ["4", "7", "x", "y"]
  assert [row["response"] for row in rows] == ["1.5", "true", "0", "-1e2"]
  content = "prompt\tresponse\tscore\n" + "".join(
    f"{text(1)}\t{text(i)}\t{score}\n" for i, score in enumerate(("-0.5", "2e0", "1"))
  )
  (tmp_path / "rows.tsv").write_text(content)
  config = DataConfig(path=f"{tmp_path}/rows.tsv", eval_fraction=0)
  train, _ = data.load("rankings", config, TOKENIZER)
  read = [TOKENIZER.decode(ids) for ids in data.responses_of(train.examples[0])]
  assert read == [text(1), text(2), text(0)]


def test_several_files(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  for i in range(3):
    write(tmp_path, [{"prompt": text(i)}], f"part_{i}.jsonl")
  write(tmp_path, [{"prompt": text(9)}], "a,b.jsonl")

  def read(spec):
    return [row.fields["prompt"] for row in data.read_file(spec)]

  assert read(f"{tmp_path}/part_2.jsonl,{tmp_path}/part_0.jsonl") == [text(2), text(0)]
  assert read(f"{tmp_path}/part_*.jsonl") == [text(0), text(1), text(2)]
  assert read("~/part_1.jsonl") == [text(1)]
  (tmp_path / "x" / "y").mkdir(parents=True)
  write(tmp_path / "x" / "y", [{"prompt": text(4)}], "deep.jsonl")
  assert read(f"{tmp_path}/**/deep.jsonl") == [text(4)]
  assert read(f"{tmp_path}/a,b.jsonl") == [text(9)]


def scored(prompt, answer, score, name="helpfulness"):
  return {"prompt": prompt, "response": answer, name: score, "coherence": 4}


def test_rows_with_one_scored_response_each_are_joined(tmp_path):
  """HelpSteer 2 has a row per response; two rows have the same prompt."""
  rows = [
    *(scored(text(1), text(2), 1), scored(text(1), text(3), 4)),
    *(scored(text(4), text(5), 2), scored(text(6), text(7), 0)),
    *(scored(text(6), text(8), 0), scored(text(4), text(9), 3)),
    scored(text(10), text(11), 4),
  ]
  path = write(tmp_path, rows)
  assert data.comparison_kind(DataConfig(path=path)) == "rankings"
  train, _ = data.load("rankings", DataConfig(path=path, eval_fraction=0), TOKENIZER)
  read = [[TOKENIZER.decode(ids) for ids in data.responses_of(e)] for e in train.examples]
  assert read == [[text(3), text(2)], [text(9), text(5)]]
  assert train.dropped == "ties 1, single_responses 1"
  train, _ = data.load("preferences", DataConfig(path=path, eval_fraction=0), TOKENIZER)
  assert [TOKENIZER.decode(e["chosen"]) for e in train.examples] == [text(3), text(9)]
  train, _ = data.load("demonstrations", DataConfig(path=path, eval_fraction=0), TOKENIZER)
  assert len(train.examples) == len(rows)


@pytest.mark.parametrize(("ignore", "best"), [((), 2), (("score",), 3), (("helpfulness",), 2)])
def test_scores_that_are_left_out_order_nothing(tmp_path, ignore, best):
  rows = [{**scored(text(1), text(n), n), "score": -n} for n in (2, 3)]
  config = DataConfig(path=write(tmp_path, rows), eval_fraction=0, ignore=ignore)
  assert data.comparison_kind(config) == "rankings"
  train, _ = data.load("preferences", config, TOKENIZER)
  assert [TOKENIZER.decode(e["chosen"]) for e in train.examples] == [text(best)]
  assert train.rows[0]["prompt"] == text(1)


def test_a_chat_template_gets_the_same_turns_from_published_and_from_clean_rows(shared):
  """The files of real rows were cut from the published ones; cutting them here gives the same."""
  path = shared / "data" / "preference" / "hh_helpful_test.jsonl"
  count = 0
  for row in data.read_file(path):
    fields = row.fields
    both = {name: f"{fields['prompt']} {fields[name]}" for name in ("chosen", "rejected")}
    if not fields["prompt"].startswith("\n\nHuman:"):
      continue
    for on in (False, True):
      (want,) = data.parse_row("preferences", row, prefer_messages=on)
      (got,) = data.parse_row("preferences", data.Row("r", both), prefer_messages=on)
      space = "" if on else " "
      assert [space + answer.strip() for answer in want.answers] == list(got.answers)
      assert got.prompt == want.prompt if not on else len(got.prompt) == len(want.prompt)
    count += 1
  assert count > 150


def test_rows_of_published_transcripts_that_cannot_be_used_are_counted(tmp_path):
  def side(*words):
    return (
      "".join(f"\n\n{'HA'[i % 2]}: {w}" for i, w in enumerate(words))
      .replace("H:", "Human:")
      .replace("A:", "Assistant:")
    )

  rows = [
    *({"chosen": side(text(i), text(1)), "rejected": side(text(i), text(2))} for i in range(9)),
    {"chosen": side(text(1), text(1)), "rejected": side(text(2), text(2))},
    {"chosen": side(text(1), text(1)), "rejected": side(text(1), "")},
    {"chosen": side(text(1), text(1)), "rejected": side(text(1), text(1))},
  ]
  config = DataConfig(path=write(tmp_path, rows), eval_fraction=0)
  parts = [data.load("preferences", config, WITH_NAMES)[0]]
  assert parts[0].dropped == "different_prompts 1, empty 1, identical_pairs 1"
  assert len(parts[0].examples) == 9


NAMES = ("Human:", "Assistant:")
WITH_NAMES = data.word_level_tokenizer([*(f"w{i}" for i in range(40)), *NAMES])


def test_the_number_of_a_published_solution():
  reward = rewards.REWARDS["exact_answer"]
  assert list(reward(["p"] * 2, ["It is 4.", "5"], [GSM8K] * 2)) == [1, 0]


def noticed(lines):
  """Returns the noticed parts but for spaces, which do not count for a tokenizer of words."""
  parts = lines.get("noticed", "").split("; ")
  return "; ".join(part for part in parts if "without a space" not in part)


def test_what_the_panel_says_about_limits(tmp_path):
  rows = [{"prompt": text(i), "response": text(1)} for i in range(30)]
  path = write(tmp_path, rows)
  config = DataConfig(path=path, eval_path=path, rows=20, eval_rows=7)
  sets = data.load("demonstrations", config, TOKENIZER)
  lines = data.describe(config, *sets)
  assert "20 demonstrations of the first rows (data.rows=20)" in lines["data"]
  assert f"7 held out from {path}, no more by data.eval_rows=7" in lines["data"]
  assert noticed(lines) == "7 held-out rows with a prompt of the training set"
  assert lines["left out"] == "nothing" and data.warning(config, *sets) == ""


def labelled(*labels):
  return [
    {"prompt": text(i), "response": text(i, i), "label": label} for i, label in enumerate(labels)
  ]


@pytest.mark.parametrize(
  ("kind", "rows", "options", "left_out", "wanted", "is_much"),
  [
    ("unpaired", labelled(True, True, 1), {}, "", "all labels are true", False),
    ("unpaired", labelled(False, 0), {}, "", "all labels are false", False),
    ("unpaired", labelled(False, True), {}, "", "", False),
    (
      "preferences",
      [
        {"prompt": text(1), "chosen": text(2), "rejected": text(3)},
        {"prompt": text(1), "chosen": text(3), "rejected": text(2)},
        {"prompt": text(1), "chosen": text(3), "rejected": text(2)},
        {"prompt": text(1), "chosen": text(3), "rejected": text(3), "source": "x"},
      ],
      {},
      "1 with two equal responses",
      "1 repeated; 2 pairs in both orders, A over B and B over A; columns that are not read:"
      " source",
      True,
    ),
    (
      "demonstrations",
      [{"prompt": text(i), "response": text(*range(9 if i < 2 else 1))} for i in range(20)],
      {"max_response_length": 4},
      "2 too long (data.max_prompt_length=256, data.max_response_length=4)",
      "",
      False,
    ),
    (
      "demonstrations",
      [{"prompt": text(i), "response": text(*range(9 if i < 3 else 1))} for i in range(20)],
      {"max_response_length": 4},
      "3 too long (data.max_prompt_length=256, data.max_response_length=4)",
      "",
      True,
    ),
    (
      "demonstrations",
      [{"prompt": text(i), "response": text(2), "label": i > 3} for i in range(9)],
      {},
      "4 with the label false or 0 (data.ignore=label learns them)",
      "",
      True,
    ),
    ("prompts", [{"prompt": text(1)}, {"prompt": 3}], {"bad_rows": 1}, "1 unusable", "", True),
    (
      "preferences",
      [{"prompt": text(1), "chosen": text(1, 2), "rejected": text(1, 3)}],
      {},
      "",
      "1 rows whose answers repeat the prompt",
      False,
    ),
    (
      "prompts",
      [{"prompt": text(1), "answer": "4"}],
      {"eval_fraction": 0.05},
      "",
      "all rows are the same, so none is held out; columns that are not read, but by rewards that"
      " name them: answer",
      False,
    ),
    (
      "demonstrations",
      [{"prompt": text(1), "response": text(i)} for i in range(2)],
      {"eval_fraction": 0.05},
      "",
      "1 held-out rows with a prompt of the training set; all rows have one prompt, so rows are"
      " held out instead of prompts",
      False,
    ),
    (
      "demonstrations",
      [{"messages": [{**turn, "name": "x"} for turn in turns(text(1), text(2))]}],
      {},
      "",
      "columns that are not read: messages[].name",
      False,
    ),
  ],
)
def test_what_is_left_out_or_noticed(tmp_path, kind, rows, options, left_out, wanted, is_much):
  config = DataConfig(path=write(tmp_path, rows), **({"eval_fraction": 0.0} | options))
  sets = data.load(kind, config, WITH_NAMES)
  lines = data.describe(config, *sets)
  assert lines["left out"] == (left_out or "nothing")
  assert noticed(lines) == wanted
  assert (left_out in data.warning(config, *sets)) if is_much else not data.warning(config, *sets)


@pytest.mark.parametrize(
  "value", [{"bytes": b"\x89PNG", "path": "a"}, [{"bytes": b"\xff"}], b"\xff", "a\0"]
)
def test_ignored_columns_need_be_no_text(tmp_path, value):
  pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  rows = [{"prompt": text(i), "n": i, "image": value} for i in range(3)]
  path = tmp_path / "rows.parquet"
  parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  config = DataConfig(path=str(path), eval_fraction=0)
  with pytest.raises(data.DataError, match=r"rows.parquet\[0\]: image.*data\.ignore=image"):
    data.load("prompts", config, TOKENIZER)
  train, _ = data.load("prompts", dataclasses.replace(config, ignore=("image",)), TOKENIZER)
  assert [row["n"] for row in train.rows] == [0, 1, 2]


def test_ignored_columns(tmp_path):
  rows = [{"prompt": text(1), "response": text(2), "context": "x", "tools": [1], "n": 3}]
  path = write(tmp_path, rows)
  config = DataConfig(path=path, eval_fraction=0, ignore=("context", "tools"))
  train, heldout = data.load("demonstrations", config, TOKENIZER)
  assert train.rows[0]["context"] == "x"  # For rewards.
  assert train.unread == ("n",)
  assert "columns that are not read: n" in data.describe(config, train, heldout)["noticed"]
