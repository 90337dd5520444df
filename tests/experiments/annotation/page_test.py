"""The meaning of each key on the page, and texts that stay text."""

import asyncio
import json
import socket
import sys

import pytest

from experiments.annotation import page
from experiments.annotation.agreement import agreements
from experiments.annotation.items import Item, shown_order
from experiments.annotation.store import Store
from rlhf_jax import data, flags
from tests.testing import INJECTION

PAIR = Item("pair", "p", ("x", "y"))
FOUR = Item("four", "q", ("w", "x", "y", "z"))


@pytest.fixture
def desk(tmp_path):
  return page.Desk([PAIR, FOUR, Item("last", "r", ("x", "y"))], Store(tmp_path))


def press(desk, asked, keys):
  for key in keys:
    # As the browser hands it back.
    asked = desk.press(page.Asked(*json.loads(json.dumps(asked))), key)
  return asked


def votes_of(place_ranks, item):
  """`(a, b) -> preferred` that ranks by place on the page should give."""
  order = shown_order(item.prompt, item.responses)
  of = {index: place_ranks[place] for place, index in enumerate(order)}
  count = len(order)
  return {
    (a, b): None if of[a] == of[b] else a if of[a] < of[b] else b
    for a in range(count)
    for b in range(a + 1, count)
  }


@pytest.mark.parametrize(("key", "expected"), [("a", (0, 1)), ("b", (1, 0)), ("t", (0, 0))])
def test_a_pair(desk, key, expected):
  asked = press(desk, desk.ask("ada"), key)
  assert asked.item == "four" and desk.answered("ada") == 1
  (row,) = desk.store.rows()
  (vote,) = row["annotations"]
  assert vote == {
    "annotator": "ada",
    "a": 0,
    "b": 1,
    "preferred": votes_of(expected, PAIR)[0, 1],
  }
  assert row["shown"] == list(shown_order(PAIR.prompt, PAIR.responses))
  assert row["seconds"] >= 0


@pytest.mark.parametrize(
  ("keys", "expected"),
  [
    ("3142", (1, 3, 0, 2)),
    ("31t42", (1, 2, 0, 1)),
    ("2t1t3t4", (0, 0, 0, 0)),
    ("t", (0, 0, 0, 0)),
    ("32u142", (1, 3, 0, 2)),  # Undo takes a place back first.
    ("3314a9q2", (1, 3, 0, 2)),  # What means nothing changes nothing.
    ("3tt142", (1, 3, 0, 2)),
  ],
)
def test_a_ranking(desk, keys, expected):
  asked = press(desk, desk.ask("ada"), "s")
  asked = press(desk, asked, keys)
  assert asked.item == "last"
  row = desk.store.rows()[-1]
  found = {(vote["a"], vote["b"]): vote["preferred"] for vote in row["annotations"]}
  assert found == votes_of(expected, FOUR)


def test_undo_skip_and_the_end(desk):
  asked = press(desk, desk.ask("ada"), "u")
  assert asked.item == "pair"  # There was nothing to undo.
  asked = press(desk, asked, "ss")
  assert asked.item == "last" and desk.answered("ada") == 2
  asked = press(desk, asked, "uu")
  assert asked.item == "pair" and desk.answered("ada") == 0
  asked = press(desk, asked, "asa")
  assert asked.item == "" and desk.answered("ada") == 3
  assert "All done" in page.question_html(desk, asked)
  asked = press(desk, asked, "abt1s")
  assert asked.item == "" and desk.answered("ada") == 3
  assert press(desk, asked, "u").item == "last"


def test_annotators_go_their_own_ways(desk):
  ada, bob = desk.ask("ada"), desk.ask("bob")
  ada = press(desk, ada, "a")
  assert (ada.item, bob.item) == ("four", "pair")
  bob = press(desk, bob, "bs")
  assert (desk.answered("ada"), desk.answered("bob")) == (1, 2)
  (found,) = agreements([*desk.items.values()], desk.store.rows())
  assert (found.one, found.other, found.share) == ("ada", "bob", 0.0)
  assert "ada and bob</td><td>1</td><td>0.00" in page.agreement_html([found])


def test_a_second_window_of_one_annotator_does_not_answer_twice(desk):
  first = second = desk.ask("ada")
  press(desk, first, "a")
  assert press(desk, second, "b").item == "four"
  (row,) = desk.store.rows()
  assert row["annotations"][0]["preferred"] == votes_of((0, 1), PAIR)[0, 1]


def test_texts_are_escaped(tmp_path):
  item = Item("<i>", INJECTION, (INJECTION, ""))
  desk = page.Desk([item], Store(tmp_path))
  drawn = page.question_html(desk, desk.ask("ada"))
  assert "<img" not in drawn and "<script" not in drawn and drawn.count("&lt;img") == 2
  problem = page.question_html(desk, page.Asked(), "<img>")
  assert "&lt;img&gt;" in problem


def test_ten_responses_have_too_few_keys(tmp_path):
  item = Item("7", "p", tuple(str(i) for i in range(10)))
  with pytest.raises(data.DataError, match="'7' has 10 responses"):
    page.Desk([item], Store(tmp_path))


def test_without_gradio_the_message_says_what_to_install(desk, monkeypatch):
  monkeypatch.setitem(sys.modules, "gradio", None)
  with pytest.raises(flags.UsageError, match=r"pip install 'rlhf_jax\[annotate\]'"):
    page.build(desk)


def test_a_port_that_is_taken_is_named():
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(flags.UsageError, match=f"--port={port} cannot be used .*in use"):
      page.serve(None, [], "", port, "token")


TOKEN = "t" * 43
AT_HOME = {"host": "127.0.0.1:7860"}
COOKIE = {"cookie": f"label_page_7860={TOKEN}"}
EVENT = "/gradio_api/run/predict"


def answer(method, path, headers, kind="http"):
  """Status and headers of the answer to a request."""
  sent = []

  async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})

  async def send(message):
    sent.append(message)

  path, _, query = path.partition("?")
  scope = {"type": kind, "method": method, "path": path, "query_string": query.encode()}
  scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
  asyncio.run(page._Guard(app, 7860, TOKEN)(scope, None, send))
  found = {name.decode(): value.decode() for name, value in sent[0].get("headers", [])}
  return sent[0].get("status", sent[0]["type"]), found


@pytest.mark.parametrize(
  ("method", "path", "headers", "status"),
  [
    ("GET", f"/?token={TOKEN}", AT_HOME, 200),
    ("GET", f"/?annotator=ada&token={TOKEN}", {"host": "localhost:7860"}, 200),
    ("GET", "/", AT_HOME | COOKIE, 200),
    ("GET", "/assets/index-1.js", AT_HOME | COOKIE, 200),
    ("POST", EVENT, AT_HOME | COOKIE | {"origin": "http://127.0.0.1:7860"}, 200),
    ("GET", "/", AT_HOME, 403),
    ("GET", "/?token=", AT_HOME, 403),
    ("GET", f"/?token={TOKEN}x", AT_HOME, 403),
    ("GET", "/?token=%ff%00é", AT_HOME, 403),
    ("GET", "/", AT_HOME | {"cookie": f"label_page_7861={TOKEN}"}, 403),
    ("GET", "/", AT_HOME | {"cookie": "label_page_7860="}, 403),
    ("GET", "/", AT_HOME | {"cookie": "=;;\x80"}, 403),
    ("POST", EVENT, AT_HOME, 403),
    ("POST", EVENT, AT_HOME | COOKIE | {"origin": "http://elsewhere.example"}, 403),
    ("POST", EVENT, AT_HOME | COOKIE | {"origin": "null"}, 403),
    ("POST", EVENT, AT_HOME | COOKIE | {"origin": "http://127.0.0.1:7861"}, 403),
    ("POST", EVENT, AT_HOME | COOKIE | {"origin": "https://127.0.0.1:7860"}, 403),
    ("GET", f"/?token={TOKEN}", {"host": "elsewhere.example:7860"}, 400),
    ("GET", f"/?token={TOKEN}", {"host": "127.0.0.1"}, 400),
    ("GET", f"/?token={TOKEN}", {}, 400),
    ("POST", "/gradio_api/upload", AT_HOME | COOKIE, 404),
    ("POST", f"/gradio_api/upload?token={TOKEN}", AT_HOME, 404),
    ("POST", "/upload", AT_HOME | COOKIE, 404),
    ("POST", "/", AT_HOME | COOKIE, 404),
    ("PUT", EVENT, AT_HOME | COOKIE, 404),
    ("OPTIONS", "/", AT_HOME | COOKIE, 404),
    ("GET", "/openapi.json", AT_HOME | COOKIE, 404),
    ("GET", "/docs", AT_HOME | COOKIE, 404),
    ("GET", "/monitoring", AT_HOME | COOKIE, 404),
    ("GET", "/gradio_api/file=/etc/passwd", AT_HOME | COOKIE, 404),
    ("GET", "/gradio_api/openapi.json", AT_HOME | COOKIE, 404),
    ("GET", "/gradio_api/deep_link", AT_HOME | COOKIE, 404),
    ("POST", "/login", AT_HOME | COOKIE, 404),
  ],
)
def test_only_the_page_itself_is_answered(method, path, headers, status):
  given, more = answer(method, path, headers)
  assert given == status
  assert ("content-security-policy" in more) == (status == 200)
  assert (TOKEN in more.get("set-cookie", "")) == (status == 200 and TOKEN in path)
  assert answer(method, path, {}, kind="websocket")[0] == "websocket.close"


def test_the_token_is_kept_from_others(tmp_path):
  token = page.read_token(tmp_path)
  path = tmp_path / ".label_page_token"
  assert page.read_token(tmp_path) == token and len(token) == 43
  assert path.stat().st_mode & 0o777 == 0o600
  for spoil in (
    lambda: path.chmod(0o644),
    lambda: path.write_text("short"),
    lambda: (path.unlink(), path.symlink_to("/etc/hostname")),
  ):
    spoil()
    other = page.read_token(tmp_path)
    assert other != token and path.stat().st_mode & 0o777 == 0o600 and not path.is_symlink()
    token = other
