import pytest

from rlhf_jax.data.schema import Example, comparison_kind, parse_row, prompt_columns
from rlhf_jax.data.sources import DataError, Row


def user(text):
  return {"role": "user", "content": text}


def bot(text):
  return {"role": "assistant", "content": text}


def parse_all(kind, fields, prefer_messages=False, **judging):
  row = Row("f.jsonl:7", fields)
  return parse_row(kind, row, prefer_messages=prefer_messages, **judging)


def parse(kind, fields, prefer_messages=False):
  (example,) = parse_all(kind, fields, prefer_messages)
  return example


def ranked(*ranks):
  return [{"text": f"t{i}", "rank": rank} for i, rank in enumerate(ranks)]


def scored(*scores):
  return [{"text": f"t{i}", "score": score, "model": "m"} for i, score in enumerate(scores)]


def checked(*correct):
  return [{"text": f"t{i}", "correct": right} for i, right in enumerate(correct)]


def voted(*preferred, names="abc"):
  votes = [
    {"annotator": name, "preferred": index} for name, index in zip(names, preferred, strict=False)
  ]
  return {"prompt": "p", "responses": ["t0", "t1"], "annotations": votes}


def compared(*preferred):
  """Comparisons of three responses: 0 with 1, 0 with 2, 1 with 2."""
  pairs = [
    {"a": a, "b": b, "preferred": index}
    for (a, b), index in zip([(0, 1), (0, 2), (1, 2)], preferred, strict=True)
  ]
  return {"question": "p", "responses": ["t0", "t1", "t2"], "preferences": pairs}


@pytest.mark.parametrize(
  ("fields", "prompt", "response"),
  [
    ({"prompt": "p", "response": "r"}, "p", "r"),
    ({"prompt": "p", "completion": "r"}, "p", "r"),
    ({"prompt": "p", "output": "r"}, "p", "r"),
    ({"question": "p", "solution": "r", "answer": "4"}, "p", "r"),
    ({"prompt": "p", "chosen": "r", "rejected": "s"}, "p", "r"),
    ({"prompt": "p", "response": "r", "output": "r"}, "p", "r"),
    ({"question": "p", "response": "r"}, "p", "r"),
    ({"instruction": "p", "output": "r"}, "p", "r"),
    ({"instruction": "p", "input": "", "output": "r"}, "p", "r"),
    ({"instruction": "p", "input": None, "output": "r"}, "p", "r"),
    ({"instruction": "p", "input": "i", "output": "r"}, "p\n\ni", "r"),
    ({"messages": [user("p"), bot("r")]}, [user("p")], "r"),
    (
      {"messages": [user("p"), bot("q"), user("s"), bot("r")]},
      [user("p"), bot("q"), user("s")],
      "r",
    ),
    ({"messages": [user("p")], "response": "r"}, [user("p")], "r"),
    ({"prompt": [user("p")], "completion": [bot("r")]}, [user("p")], "r"),
    ({"chosen": [user("p"), bot("r")]}, [user("p")], "r"),
    ({"text": "r"}, "", "r"),
    ({"text": "r", "mean": 1.0, "prompt": None}, "", "r"),
    ({"prompt": "p", "response": "r", "responses": ranked(1, 0)}, "p", "r"),
    ({"prompt": "p", "responses": ranked(1, 0, 2)}, "p", "t1"),
    ({"prompt": "p", "responses": scored(1e-7, 0.5, 0.5)}, "p", "t1"),
    ({"messages": [user("p")], "responses": ranked(2, 1, 0)}, [user("p")], "t2"),
    (compared(1, None, 1), "p", "t1"),
    (voted(1, 0, 1), "p", "t1"),
  ],
)
def test_demonstrations(fields, prompt, response):
  assert parse("demonstrations", fields) == Example(prompt, (response,))
  assert parse("demonstrations", {**fields, "extra": 1}).answers == (response,)


@pytest.mark.parametrize(
  ("fields", "prompt"),
  [
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p"),
    ({"messages": [user("p")], "chosen": "c", "rejected": "r"}, [user("p")]),
    ({"chosen": [user("p"), bot("c")], "rejected": [user("p"), bot("r")]}, [user("p")]),
    ({"prompt": "p", "chosen": [bot("c")], "rejected": [bot("r")]}, "p"),
    ({"prompt": [user("p")], "chosen": [bot("c")], "rejected": [bot("r")]}, [user("p")]),
    ({"prompt": "p", "chosen": [user("p"), bot("c")], "rejected": [user("p"), bot("r")]}, "p"),
  ],
)
def test_preferences(fields, prompt):
  assert parse("preferences", fields) == Example(prompt, ("c", "r"))


@pytest.mark.parametrize(
  ("fields", "pairs", "ties"),
  [
    ({"prompt": "p", "responses": ranked(1, 0)}, ["10"], 0),
    ({"prompt": "p", "responses": ranked(0, 1, 2)}, ["01", "02", "12"], 0),
    ({"prompt": "p", "responses": ranked(1, 1, 0)}, ["20", "21"], 1),
    ({"prompt": "p", "responses": scored(0.2, 3, -1.5)}, ["10", "02", "12"], 0),
    ({"prompt": "p", "responses": scored(1e-7, 2e-7)}, ["10"], 0),
    ({"prompt": "p", "responses": scored(5, 5)}, [], 1),
    ({"prompt": "p", "responses": checked(False, True, False)}, ["10", "12"], 1),
    ({"prompt": "p", "responses": checked(True, True)}, [], 1),
    (compared(0, 2, 1), ["01", "20", "12"], 0),  # A cycle.
    (compared(None, 2, None), ["20"], 2),
    (voted(0), ["01"], 0),
    (voted(1, 1, 0), ["10"], 0),
    (voted(0, 1), [], 1),
    (voted(0, 1, None), [], 1),
    (voted(0, None, None), [], 1),
    (voted(0, 0, None), ["01"], 0),
  ],
)
def test_preferences_of_judged_answers(fields, pairs, ties):
  examples = parse_all("preferences", fields)
  found = ["".join(answer[1] for answer in e.answers) for e in examples if not e.skip]
  assert sorted(found) == sorted(pairs)
  assert [e.skip for e in examples if e.skip] == ["ties"] * ties
  assert {e.prompt for e in examples} == {"p"}


def test_every_vote_can_be_a_pair():
  examples = parse_all("preferences", voted(1, 0, 1), votes="each")
  assert [e.answers for e in examples] == [("t1", "t0"), ("t0", "t1"), ("t1", "t0")]
  examples = parse_all("preferences", voted(1, None, 0), votes="each")
  assert [e.skip for e in examples] == ["", "ties", ""]


@pytest.mark.parametrize(
  ("fields", "votes", "shares"),
  [
    ({"prompt": "p", "chosen": "t0", "rejected": "t1"}, "majority", [("t0", "t1", 1.0)]),
    (voted(0, 1, 1), "majority", [("t0", "t1", 0.0)]),
    (voted(0, 1, 1), "each", [("t0", "t1", 1 / 3)]),
    (voted(0, None, names="ab"), "each", [("t0", "t1", 0.75)]),
    (voted(None), "majority", [("t0", "t1", 0.5)]),
    (
      compared(1, 0, None),
      "majority",
      [("t0", "t1", 0.0), ("t0", "t2", 1.0), ("t1", "t2", 0.5)],
    ),
    (
      {"prompt": "p", "responses": scored(1, 3, 1)},
      "majority",
      [("t0", "t1", 0.0), ("t0", "t2", 0.5), ("t1", "t2", 1.0)],
    ),
  ],
)
def test_comparisons(fields, votes, shares):
  examples = parse_all("comparisons", fields, votes=votes)
  assert [(*e.answers, *e.labels) for e in examples] == shares
  assert not any(example.skip for example in examples)


def test_a_vote_may_say_how_sure_it_is():
  row = voted(0, names="a")
  row["annotations"][0]["probability"] = 0.7
  for votes in ("majority", "each"):
    (example,) = parse_all("comparisons", row, votes=votes)
    assert example.labels == (0.7,)
  (pair,) = parse_all("preferences", row)  # Here the verdict alone counts.
  assert pair.answers == ("t0", "t1")
  # The order of the two in the vote does not matter.
  row["annotations"][0] |= {"a": 1, "b": 0}
  (example,) = parse_all("comparisons", row)
  assert example.labels == (1 - 0.7,)


@pytest.mark.parametrize("kind", ["preferences", "comparisons", "rankings"])
def test_a_row_without_a_vote_is_left_out(kind):
  row = {"prompt": "p", "responses": ["t0", "t1"], "annotations": []}
  (example,) = parse_all(kind, row)
  assert example.skip == "not_judged"


def test_votes_of_one_annotator():
  row = voted(1, 0, None, names=["human", "ai-helpfulness", "human"])
  (example,) = parse_all("preferences", row, annotator="ai-helpfulness")
  assert example.answers == ("t0", "t1")
  (example,) = parse_all("preferences", row, annotator="human")  # One for t1, one for neither.
  assert example.skip == "ties"
  (example,) = parse_all("preferences", row, annotator="ai-harmlessness")
  assert example.skip == "not_judged"
  pair = {"prompt": "p", "chosen": "c", "rejected": "r", "annotator": "expert"}
  assert parse_all("preferences", pair, annotator="expert")[0].skip == ""
  assert parse_all("preferences", pair, annotator="novice")[0].skip == "not_judged"
  ranking = {"prompt": "p", "responses": ranked(0, 1), "annotator": "gpt-4"}
  assert parse_all("rankings", ranking, annotator="gpt-4")[0].labels == (0, 1)
  assert parse_all("rankings", ranking, annotator="gpt-3")[0].skip == "not_judged"
  del pair["annotator"]
  with pytest.raises(DataError, match=r"^f\.jsonl:7: annotator: missing; data\.annotator=x needs"):
    parse_all("preferences", pair, annotator="x")


@pytest.mark.parametrize(
  ("fields", "order", "ranks"),
  [
    ({"prompt": "p", "responses": ranked(2, 0, 1)}, "120", (0, 1, 2)),
    ({"prompt": "p", "responses": ranked(7, 3, 7, 3)}, "1302", (0, 0, 1, 1)),
    ({"prompt": "p", "responses": scored(0.1, 0.9, 0.1, 0.5)}, "1302", (0, 1, 2, 2)),
    ({"prompt": "p", "responses": checked(False, True, True)}, "120", (0, 0, 1)),
    (compared(1, 2, 1), "120", (0, 1, 2)),
    (compared(1, None, None), "120", (0, 1, 2)),  # Wins minus losses: -1, 1 and 0.
    (voted(1, 1, 0), "10", (0, 1)),
    ({"prompt": "p", "chosen": "t0", "rejected": "t1"}, "01", (0, 1)),
  ],
)
def test_rankings(fields, order, ranks):
  example = parse("rankings", fields)
  assert example == Example("p", tuple(f"t{i}" for i in order), ranks)


@pytest.mark.parametrize(
  "fields", [compared(0, 2, 1), voted(0, 1), {"prompt": "p", "responses": ranked(3, 3, 3)}]
)
def test_a_ranking_without_order_is_a_tie(fields):
  assert parse("rankings", fields).skip == "ties"
  assert parse("demonstrations", fields).skip == "ties"


@pytest.mark.parametrize(
  ("fields", "labels"),
  [
    ({"prompt": "p", "response": "t0", "label": True}, {"t0": 1}),
    ({"prompt": "p", "completion": "t0", "label": False}, {"t0": 0}),
    ({"prompt": "p", "chosen": "t0", "rejected": "t1"}, {"t0": 1, "t1": 0}),
    ({"prompt": "p", "responses": checked(False, True)}, {"t0": 0, "t1": 1}),
    ({"prompt": "p", "responses": checked(True, True)}, {"t0": 1, "t1": 1}),
    ({"prompt": "p", "responses": ranked(2, 0, 1)}, {"t0": 0, "t1": 1, "t2": None}),
    (voted(1, 1, None), {"t0": 0, "t1": 1}),
    (voted(0, 1), {"t0": None, "t1": None}),
  ],
)
def test_unpaired(fields, labels):
  examples = parse_all("unpaired", fields)
  assert {e.prompt for e in examples} == {"p"}
  assert {e.answers[0]: None if e.skip == "ties" else e.labels[0] for e in examples} == labels
  assert len(examples) == len(labels)


@pytest.mark.parametrize(
  ("label", "skip"),
  [
    (False, "undesirable"),
    (0, "undesirable"),
    (True, ""),
    (1, ""),
    (2, ""),
    ("no", ""),
    (None, ""),
  ],
)
def test_undesirable_responses_are_no_demonstrations(label, skip):
  fields = {"prompt": "p", "completion": "r", "label": label}
  assert parse("demonstrations", fields) == Example("p", ("r",), skip=skip)
  # As in IMDb, where it is the sentiment of the text.
  assert parse("demonstrations", {"text": "r", "label": label}) == Example("", ("r",))


@pytest.mark.parametrize(
  ("fields", "kind"),
  [
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preferences"),
    ({"prompt": "p", "responses": ranked(0, 1)}, "rankings"),
    (compared(0, 0, 1), "rankings"),
    (voted(1, 1, 1), "preferences"),
  ],
)
def test_what_a_reward_model_reads_a_row_as(fields, kind):
  assert comparison_kind(Row("f.jsonl:7", fields)) == kind


@pytest.mark.parametrize(
  ("fields", "prompt"),
  [
    ({"prompt": "p"}, "p"),
    ({"question": "p", "answer": "4"}, "p"),
    ({"instruction": "p", "input": "i"}, "p\n\ni"),
    ({"messages": [user("p")]}, [user("p")]),
    ({"messages": [user("p"), bot("r")]}, [user("p")]),
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p"),
  ],
)
def test_prompts(fields, prompt):
  assert parse("prompts", fields) == Example(prompt, ())


HELLO = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
TALK = [user("Hi"), bot("Hello"), user("Bye")]
TOOL = [user("sum"), bot("call"), {"role": "tool", "content": "result"}]
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
  "fields",
  [
    {"prompt": "p"},
    {"prompt": " p\n"},
    {"question": HELLO},
    {"instruction": "p", "input": "i"},
    {"prompt": "p", "system": "s"},
    {"prompt": HELLO, "system": "s"},
    {"prompt": HELLO, "messages": TALK},
    {"prompt": "Hi", "messages": TALK},
    {"prompt": "p", "messages": [user("p")]},
    {"prompt": "Bye", "history": [["Hi", "Hello"]], "system_prompt": "s"},
    {"messages": [user("p")]},
    {"messages": [SYSTEM, *TALK]},
    {"messages": [*TALK, bot("c")]},
    {"prompt": TOOL},
    {"prompt": [user(HELLO)]},
    {"conversations": [{"from": "human", "value": "p"}]},
    {"chosen": [*TALK, bot("c")], "rejected": [*TALK, bot("r")]},
    {"chosen": f"{HELLO} c", "rejected": f"{HELLO} r"},
  ],
)
def test_columns_of_a_prompt(fields):
  """Beside another answer they are the same prompt, with a chat template and without."""
  row = Row("f.jsonl:7", fields)
  columns = prompt_columns(row)
  assert columns.keys() <= {"prompt", "messages"}
  answers = {"responses": ["a", "b"], "annotations": [{"preferred": 0}]}
  for on in (False, True):
    (wanted,) = parse_row("prompts", row, prefer_messages=on)
    for kind, more in (
      ("prompts", {}),
      ("preferences", answers),
      ("demonstrations", {"output": "c"}),
    ):
      assert parse(kind, {**columns, **more}, prefer_messages=on).prompt == wanted.prompt


def test_messages_count_only_with_a_chat_template():
  for text in ("q", "\n\nHuman: q\n\nAssistant:", "Human: q "):
    fields = {"prompt": text, "messages": [user("q")], "chosen": "c", "rejected": "r"}
    for kind in ("preferences", "prompts", "demonstrations"):
      assert parse(kind, fields).prompt == text
      assert parse(kind, fields, prefer_messages=True).prompt == [user("q")]


@pytest.mark.parametrize(
  ("kind", "fields", "message"),
  [
    ("prompts", {}, r"prompt: missing; the row's columns are none; add `prompt` or"),
    ("prompts", {"id": 1, "query": "p"}, r"prompt: missing; the row's columns are id, query"),
    ("prompts", {"prompt": None}, r"prompt: is null; write a text"),
    ("prompts", {"prompt": 3}, r"prompt: expected text, found int 3"),
    ("prompts", {"prompt": True}, r"prompt: expected text, found bool True"),
    ("prompts", {"prompt": {"a": 1}}, r"prompt: expected text, found an object"),
    ("prompts", {"prompt": []}, r"prompt: expected a list of messages, found an empty list"),
    ("prompts", {"prompt": " \n"}, r"prompt: the text is empty; remove the row"),
    ("prompts", {"instruction": "p", "input": 4}, r"input: expected text, found int 4"),
    ("prompts", {"messages": "p"}, r"messages: expected a list of messages, found str 'p'"),
    ("prompts", {"messages": []}, r"messages: expected a list of messages, found an empty list"),
    ("prompts", {"messages": ["p"]}, r"messages\[0\]: expected a message, found str 'p'"),
    ("prompts", {"messages": [{"content": "p"}]}, r"messages\[0\]\.role: .*only \['content'\]"),
    ("prompts", {"messages": [user(None)]}, r"messages\[0\]\.content: expected text, found null"),
    (
      "prompts",
      {"messages": [{"role": "narrator", "content": "p"}]},
      r"messages\[0\]\.role: unknown role 'narrator'; use one of system, user, assistant",
    ),
    ("prompts", {"messages": [bot("r")]}, r"messages: the prompt has no user turn"),
    ("prompts", {"messages": [user(" ")]}, r"messages\[0\]\.content: the prompt is empty"),
    ("demonstrations", {"prompt": "p"}, r"response: missing.*add `response` or `completion`"),
    ("demonstrations", {"prompt": "p", "response": None}, r"response: is null"),
    ("demonstrations", {"prompt": "p", "response": ""}, r"response: the text is empty"),
    ("demonstrations", {"prompt": "p", "output": 1.5}, r"output: expected text, found float 1.5"),
    ("demonstrations", {"prompt": "", "response": "r"}, r"prompt: the text is empty.*`text` alone"),
    ("demonstrations", {"response": "r"}, r"prompt: missing"),
    ("demonstrations", {"prompt": "p", "text": "r"}, r"response: missing"),
    ("demonstrations", {"text": "\t"}, r"text: the text is empty; remove the row"),
    ("demonstrations", {"messages": [user("p")]}, r"messages: the last turn is of the user"),
    ("demonstrations", {"messages": [bot("r")]}, r"messages: an answer without a question"),
    (
      "demonstrations",
      {"messages": [user("p"), bot(" ")]},
      r"messages\[1\]\.content: the answer is empty",
    ),
    (
      "demonstrations",
      {"messages": [user("p"), bot("r")], "response": "s"},
      r"response: it and `messages` are both there and differ",
    ),
    ("preferences", {"prompt": "p", "chosen": "c"}, r"rejected: missing"),
    ("preferences", {"prompt": "p", "chosen": "c", "rejected": 0}, r"rejected: .*found int 0"),
    ("preferences", {"chosen": "c", "rejected": "r"}, r"prompt: missing"),
    (
      "preferences",
      {"chosen": [user("p"), bot("c")], "rejected": [user("q"), bot("r")]},
      r"rejected: its turns before the answer differ",
    ),
    ("preferences", {"prompt": "p", "chosen": [user("c")], "rejected": "r"}, r"chosen: the last"),
    ("preferences", {"prompt": "p"}, r"chosen: missing.*; add `chosen` or `responses`"),
    ("rankings", {"responses": ranked(0, 1)}, r"prompt: missing"),
    ("rankings", {"prompt": "p", "responses": "t"}, r"responses: expected a list, found str 't'"),
    ("rankings", {"prompt": "p", "responses": []}, r"responses: expected a list, found an empty"),
    ("rankings", {"prompt": "p", "responses": ["t", "u"]}, r"responses\[0\]: nobody has judged it"),
    (
      "rankings",
      {"prompt": "p", "responses": ["t", 3]},
      r"responses\[1\]: expected text or an obj",
    ),
    (
      "rankings",
      {"prompt": "p", "responses": [*ranked(0), {"text": "t"}]},
      r"responses\[1\]\.rank: expected a number, found null; give every response one",
    ),
    (
      "rankings",
      {"prompt": "p", "responses": scored(1, "2")},
      r"responses\[1\]\.score: .*found str",
    ),
    (
      "rankings",
      {"prompt": "p", "responses": scored(True, 1)},
      r"responses\[0\]\.score: .*found bool",
    ),
    (
      "rankings",
      {"prompt": "p", "responses": scored(1, float("nan"))},
      r"responses\[1\]\.score: expected a number, found float nan",
    ),
    (
      "unpaired",
      {"prompt": "p", "responses": checked(True, 2)},
      r"responses\[1\]\.correct: .*int 2",
    ),
    (
      "unpaired",
      {"prompt": "p", "response": "r", "label": "good"},
      r"label: expected true or false",
    ),
    ("unpaired", {"prompt": "p", "label": True}, r"response: missing"),
    (
      "preferences",
      voted("t1"),
      r"annotations\[0\]\.preferred: expected 0, 1 or null, found str 't1'",
    ),
    ("preferences", voted(0, True), r"annotations\[1\]\.preferred: .*found bool True"),
    (
      "preferences",
      voted(0) | {"annotations": [1]},
      r"annotations\[0\]: expected a vote, found int 1",
    ),
    ("preferences", voted(0) | {"annotations": [{}]}, r"annotations\[0\]\.preferred: missing"),
    (
      "preferences",
      voted(0) | {"annotations": {}},
      r"annotations: expected a list, found an empty",
    ),
    (
      "preferences",
      compared(2, 0, 1),
      r"preferences\[0\]\.preferred: expected 0, 1 or null, found int 2",
    ),
    (
      "preferences",
      compared(0, 0, 1) | {"preferences": [{"a": 0, "b": 3, "preferred": 0}]},
      r"preferences\[0\]\.b: expected one of two different indices below 3, found int 3",
    ),
    (
      "preferences",
      compared(0, 0, 1) | {"preferences": [{"preferred": 0}]},
      r"preferences\[0\]\.a: expected one of two different indices below 3, found null",
    ),
  ],
)
def test_bad_rows(kind, fields, message):
  with pytest.raises(DataError, match=r"^f\.jsonl:7: " + message):
    parse(kind, fields)


def test_key_is_the_prompt_however_it_is_written():
  texts = [
    parse("prompts", {"prompt": "p"}),
    parse("prompts", {"messages": [user("p")]}),
    parse("demonstrations", {"prompt": "p", "response": "r"}),
  ]
  assert len({example.key for example in texts}) == 1
  assert parse("demonstrations", {"text": "a"}).key != parse("demonstrations", {"text": "b"}).key
