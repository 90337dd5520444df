"""Rows that are parts of one: which are joined, and what is learnt from them."""

import pytest

from rlhf_jax import data
from rlhf_jax.data import Row
from tests.data.rows import TOKENIZER, load, text


def user(content):
  return {"role": "user", "content": content}


def bot(content):
  return {"role": "assistant", "content": content}


def rows_of(columns):
  return [Row(f"rows.jsonl:{i + 1}", fields) for i, fields in enumerate(columns)]


def scored(prompt, response, score, **columns):
  return {"prompt": prompt, "response": response, "score": score, **columns}


def read(kind, columns, ignored=(), **options):
  """Returns the prompt and the answers of each example, as a model with a chat template reads."""
  examples = [
    example
    for row in data.joined(kind, rows_of(columns), ignored)
    for example in data.parse_row(kind, row.without(ignored), prefer_messages=True, **options)
    if not example.skip
  ]
  return [(example.prompt, example.answers) for example in examples]


def learnt(dataset):
  """Returns the texts of the responses of each example, better first."""
  return [
    tuple(TOKENIZER.decode(ids) for ids in data.responses_of(example))
    for example in dataset.examples
  ]


@pytest.mark.parametrize(
  "columns",
  [
    ({"history": [["a", "b"]]}, {"history": [["c", "d"]]}),
    ({"history": [user("a"), bot("b")]}, {}),
    ({"system": "s"}, {"system": "t"}),
    ({"system_prompt": "s"}, {"system_prompt": None}),
    ({"system_message": "s"}, {"system_message": ""}),
    ({"messages": [user("a"), bot("b"), user("Why?")]}, {"messages": [user("Why?")]}),
  ],
)
def test_scores_are_joined_for_each_conversation(columns):
  """The last turns are the same, and each conversation has a better and a worse response."""
  rows = [
    scored("Why?", f"{quality} {i}", score, **of)
    for quality, score in (("bad", 1), ("good", 2))
    for i, of in enumerate(columns)
  ]
  wanted = [
    (data.parse_row("prompts", row, prefer_messages=True)[0].prompt, (f"good {i}", f"bad {i}"))
    for i, row in enumerate(rows_of(rows[:2]))
  ]
  assert wanted[0][0] != wanted[1][0]
  for kind in ("rankings", "preferences"):
    assert read(kind, rows) == wanted
  # Columns that are left out tell nothing apart.
  ((_, answers),) = read("rankings", rows, ignored=("history", "messages", *SYSTEMS))
  assert len(answers) == 4


SYSTEMS = ("system", "system_prompt", "system_message")


def test_what_no_prompt_tells_joins_the_rows_of_a_prompt():
  rows = [
    scored("Why?", "a", 1, coherence=4, system=None),
    scored("Why?", "b", 2, coherence=0, system="", history=[]),
    scored("Who?", "c", 2),
    scored("Why?", "d", 3, annotator=None),
  ]
  assert read("rankings", rows) == [("Why?", ("d", "b", "a"))]


def test_what_changes_the_prompt_is_refused_in_every_row(tmp_path):
  rows = [
    scored(text(1), text(2 + i), i, **columns) for columns in ({}, {"context": "c"}) for i in (0, 1)
  ]
  with pytest.raises(data.DataError, match=r"rows\.jsonl:3: context: this column changes"):
    load("preferences", tmp_path, rows)


def test_scores_of_two_columns_are_not_compared():
  rows = [scored("Why?", "a", 9), {"prompt": "Why?", "response": "b", "helpfulness": 1}]
  assert read("preferences", rows) == []


@pytest.mark.parametrize("kind", ["preferences", "rankings"])
def test_each_annotator_orders_by_own_scores(tmp_path, kind):
  scores = {"ada": (1, 3), "bob": (9, 7)}  # All of bob's are above all of ada's.
  rows = [
    scored(text(1), text(2 + i), of[i], annotator=name)
    for i in range(2)
    for name, of in scores.items()
  ]
  up, down = (text(3), text(2)), (text(2), text(3))
  for name, wanted in {"ada": [up], "bob": [down], "": [up, down]}.items():
    train, _ = load(kind, tmp_path, rows, annotator=name)
    assert learnt(train) == wanted
  with pytest.raises(data.DataError, match="not_judged 2"):
    load(kind, tmp_path, rows, annotator="eve")
  # Whoever does not want to know who judged leaves the column out.
  train, _ = load("rankings", tmp_path, rows, ignore=("annotator",))
  assert [len(answers) for answers in learnt(train)] == [4]


def voted(name, preferred, responses=(2, 3), prompt=1, **columns):
  """Returns a row as `labels.jsonl` has it: the vote of one annotator."""
  vote = {"annotator": name, "a": 0, "b": 1, "preferred": preferred}
  answers = [text(i) for i in responses]
  return {"prompt": text(prompt), "responses": answers, "annotations": [vote], **columns}


VOTES = [
  voted("ada", 0, id="x", by="ada"),
  voted("eve", 0, responses=(4, 5), prompt=6),
  voted("bob", 1, responses=(3, 2), id="x", by="bob"),  # The same responses in the other order.
  voted("eve", 1, id="x", by="eve"),
]
FIRST, SECOND, OTHER = (text(2), text(3)), (text(3), text(2)), (text(4), text(5))


def test_votes_on_one_pair_count_by_majority_though_each_has_a_row(tmp_path):
  for kind in ("preferences", "rankings"):
    train, _ = load(kind, tmp_path, VOTES)
    assert learnt(train) == [FIRST, OTHER]
    assert not train.report["flipped_pairs"] and not train.report["duplicates"]
  train, _ = load("demonstrations", tmp_path, VOTES)
  assert learnt(train) == [FIRST[:1], OTHER[:1]]
  train, _ = load("unpaired", tmp_path, VOTES)
  assert [int(example["desirable"][0]) for example in train.examples] == [1, 0, 1, 0]
  train, _ = load("comparisons", tmp_path, VOTES)
  assert [float(example["preference"][0]) for example in train.examples] == [1, 1]


def test_votes_are_joined_in_the_column_that_is_read(tmp_path):
  others = {"annotations": "preferences", "preferences": "annotations"}
  for column, ignored in others.items():
    rows = [{**row, column: row["annotations"], ignored: [{"note": "?"}]} for row in VOTES]
    train, _ = load("preferences", tmp_path, rows, ignore=(ignored,))
    assert learnt(train) == [FIRST, OTHER]


def test_votes_without_a_majority_are_a_tie(tmp_path):
  train, _ = load("preferences", tmp_path, VOTES[:3])
  assert learnt(train) == [FIRST, OTHER]
  rows = [VOTES[0], VOTES[1], VOTES[3]]
  train, _ = load("preferences", tmp_path, rows)
  assert learnt(train) == [OTHER] and train.dropped == "ties 1"


def test_every_vote_counts_where_the_share_is_learnt(tmp_path):
  train, _ = load("preferences", tmp_path, VOTES, votes="each")
  assert sorted(learnt(train)) == sorted([FIRST, FIRST, SECOND, OTHER])
  train, _ = load("comparisons", tmp_path, VOTES, votes="each")
  assert learnt(train)[0] == FIRST
  assert float(train.examples[0]["preference"][0]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
  ("name", "wanted"), [("ada", [FIRST]), ("bob", [FIRST]), ("eve", [SECOND, OTHER])]
)
def test_votes_of_one_annotator_are_found_in_every_row(tmp_path, name, wanted):
  for votes in ("majority", "each"):
    train, _ = load("preferences", tmp_path, VOTES, annotator=name, votes=votes)
    assert learnt(train) == wanted


def test_a_vote_without_a_name_is_of_the_annotator_of_its_row(tmp_path):
  rows = [
    {**voted("", preferred), "annotations": [{"preferred": preferred}], "annotator": name}
    for name, preferred in (("ada", 0), ("bob", 1))
  ]
  for name, wanted in (("ada", FIRST), ("bob", SECOND)):
    train, _ = load("preferences", tmp_path, rows, annotator=name)
    assert learnt(train) == [wanted]


def test_groups_of_the_results_are_not_mixed(tmp_path):
  train, _ = load("preferences", tmp_path, VOTES, group="by")
  assert learnt(train) == [FIRST, OTHER, FIRST, SECOND]
  assert [row.get("by") for row in train.rows] == ["ada", None, "bob", "eve"]


def test_votes_on_other_responses_or_of_other_conversations_stay_apart():
  rows = [
    voted("ada", 0),
    voted("bob", 1, responses=(2, 4)),
    voted("eve", 1, system="s"),
    voted("dan", 1, prompt=5),
  ]
  assert len(data.joined("preferences", rows_of(rows))) == 4


def test_rankings_of_several_people_are_joined():
  """Three responses in three orders; two of three people put the same one first."""

  def ranked(name, order):
    places = {answer: i for i, answer in enumerate(order)}
    shown = list(reversed(order))  # As that person saw them.
    pairs = [(0, 1), (0, 2), (1, 2)]
    votes = [
      {"annotator": name, "a": a, "b": b, "preferred": min(a, b, key=lambda i: places[shown[i]])}
      for a, b in pairs
    ]
    return {"prompt": "p", "responses": shown, "annotations": votes}

  rows = [ranked("ada", "zxy"), ranked("bob", "zyx"), ranked("eve", "xyz")]
  assert read("rankings", rows) == [("p", ("z", "x", "y"))]


def test_workers_of_a_published_format_are_people_too(tmp_path):
  def choice(worker, first, second, index):
    info = {"post": text(1), "title": text(2), "subreddit": text(3)}
    summaries = [{"text": text(first)}, {"text": text(second)}]
    return {"info": info, "summaries": summaries, "choice": index, "worker": worker}

  rows = [choice("w1", 4, 5, 0), choice("w2", 5, 4, 1), choice("w3", 4, 5, 1)]
  found = [answers for _, answers in read("preferences", rows)]
  assert found == [(text(4), text(5))]
  assert [a for _, a in read("preferences", rows, annotator="w3")] == [(text(5), text(4))]


def test_who_votes_again_judges_another_row(tmp_path):
  """The same two texts may be of other models; everybody has judged each of the rows."""
  rows = [voted(name, preferred) for preferred in (0, 1) for name in ("ada", "bob")]
  train, _ = load("preferences", tmp_path, rows)
  assert learnt(train) == [FIRST, SECOND]
  both = [
    {**rows[i], "annotations": rows[i]["annotations"] + rows[i + 1]["annotations"]} for i in (0, 2)
  ]
  train, _ = load("preferences", tmp_path, [*both, voted("eve", 0)])
  assert learnt(train) == [FIRST, SECOND]
  unnamed = [{**voted("", i), "annotations": [{"preferred": i}]} for i in (0, 1)]
  train, _ = load("preferences", tmp_path, unnamed)
  assert learnt(train) == [FIRST, SECOND]


def test_a_row_of_bad_votes_is_refused_by_its_own_line(tmp_path):
  rows = [voted("ada", 0), voted("bob", 2), voted("eve", 1)]
  with pytest.raises(
    data.DataError, match=r"rows\.jsonl:2: annotations\[0\]\.preferred: expected 0"
  ):
    load("preferences", tmp_path, rows)


def test_a_row_that_nobody_judged_does_not_hide_votes(tmp_path):
  skipped = {**voted("bob", None), "annotations": []}
  train, _ = load("preferences", tmp_path, [skipped, voted("ada", 1), skipped])
  assert learnt(train) == [SECOND] and train.dropped == "not_judged 2"
