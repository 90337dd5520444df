"""Judges behind an HTTP API, on a local server that also fails."""

import contextlib
import math
import socket
import threading
import time

import numpy as np
import pytest

from rlhf_jax import rewards
from rlhf_jax.rewards import remote
from tests.rewards.services import completion, serving

ROWS = [{"prompt": f"question {i}", "prompt_text": f"<|user|>question {i}"} for i in range(4)]
PROMPTS = [row["prompt_text"] for row in ROWS]
ANSWERS = ["3", "ten", "7.5", "0"]


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
  monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
  monkeypatch.setattr(remote, "_FIRST_LIMITED", 0.05)


def answer_in(text):
  """Answer of the request for a score, which is a number or a word."""
  return text.partition("[Response]\n")[2].partition("\n")[0]


def score(url, responses=ANSWERS, **options):
  service = rewards.Service(url, "tiny", **{"request_timeout": 5.0, "retries": 2, **options})
  return rewards.ask(rewards.remote_reward(service), PROMPTS, responses, rows=ROWS)


def test_scores_are_read_in_order():
  with serving(lambda text, nth: answer_in(text), delay=0.02) as (url, seen, busy):
    scores = score(url, workers=2)
  np.testing.assert_array_equal(scores, np.array([3, np.nan, 7.5, 0], np.float32))
  assert busy[1] == 2, "as many at once as there are workers"
  for path, headers, body in seen:
    assert path == "/v1/chat/completions" and body["model"] == "tiny"
    assert "<|user|>" not in body["messages"][0]["content"]
    assert "Authorization" not in headers


def once(failure):
  return lambda text, nth: failure if nth == 1 else answer_in(text)


@pytest.mark.parametrize(
  "failure",
  [(500, b"oops"), (429, b"slow down"), (200, b"<html>"), (200, b'{"choices": []}'), None],
)
def test_what_fails_once_is_tried_again(failure):
  with serving(once(failure)) as (url, seen, _):
    np.testing.assert_array_equal(score(url)[2:], [7.5, 0])
  assert len(seen) == 8 + 1, "each once more, and again the one that cannot be read"


def test_a_service_that_keeps_failing():
  with serving(lambda text, nth: (503, b"away")) as (url, seen, _):
    with pytest.raises(rewards.ServiceError, match="1 of 4 requests failed.*3 tries.*503: away"):
      score(url)
  assert 3 <= len(seen) <= 12
  with pytest.raises(rewards.ServiceError, match="1 of 4 requests failed.*efused") as caught:
    score(url)  # Nobody listens there any more.
  assert caught.value.exit_code == 69
  with serving(lambda text, nth: "5", delay=0.5) as (url, _, _):
    with pytest.raises(rewards.ServiceError, match="timed out"):
      score(url, request_timeout=0.05, retries=0)


def test_a_service_that_hangs_is_not_asked_about_the_whole_batch():
  """With more than a tenth lost the batch is, and the message names what bounds the requests."""
  texts, options = [f"[Response]\n{i}" for i in range(80)], {"workers": 4, "retries": 1}
  with serving(lambda text, nth: "5", delay=0.4) as (url, seen, _):
    service = rewards.Service(url, "tiny", request_timeout=0.1, **options)
    with pytest.raises(rewards.ServiceError) as caught:
      service.ask(texts)
    assert len(seen) <= 2 * (9 + 4)
  for part in ("9 of 80 requests", "10%", "2 tries", "0.1 sec", "retries or request_t", "workers"):
    assert part in str(caught.value)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("asked", [0.3, 0.5])
def test_a_service_that_asks_to_wait(status, asked):
  limited = (status, b"slow down", {"Retry-After": asked})
  start = time.monotonic()
  with serving(once(limited)) as (url, seen, _):
    np.testing.assert_array_equal(score(url)[2:], [7.5, 0])
  assert len(seen) == 8 + 1 and asked <= time.monotonic() - start < asked + 5


@pytest.mark.parametrize("header", [{}, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}])
def test_a_limit_is_waited_for_longer_than_a_failure(header, monkeypatch):
  limited = lambda text, nth: (429, b"", header) if nth < 4 else "5"  # noqa: E731
  start = time.monotonic()
  with serving(limited) as (url, _, _):
    np.testing.assert_array_equal(score(url, retries=3), np.full(4, 5, np.float32))
  assert time.monotonic() - start >= 0.05 + 0.1 + 0.2
  monkeypatch.undo()
  waits = [min(remote._LONGEST_LIMITED, remote._FIRST_LIMITED * 2**i) for i in range(3)]
  assert sum(waits) > 60, "a limit of each minute is waited out by the default of retries"


def test_a_service_that_asks_to_wait_for_a_day_is_tried_sooner(monkeypatch):
  monkeypatch.setattr(remote, "_LONGEST_LIMITED", 0.1)
  start = time.monotonic()
  with serving(once((429, b"", {"Retry-After": 86400}))) as (url, _, _):
    np.testing.assert_array_equal(score(url)[2:], [7.5, 0])
  assert time.monotonic() - start < 5


def test_a_service_that_answers_a_few_bytes_at_a_time():
  def trickle(server):
    with contextlib.suppress(OSError):
      connection, _ = server.accept()
      with connection:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        for i in range(60):
          connection.sendall(b"X-%d: 1\r\n" % i)
          time.sleep(0.05)

  with socket.create_server(("127.0.0.1", 0)) as server:
    thread = threading.Thread(target=trickle, args=(server,), daemon=True)
    thread.start()
    start = time.monotonic()
    with pytest.raises(rewards.ServiceError, match="timed out"):
      service = rewards.Service(
        f"http://127.0.0.1:{server.getsockname()[1]}", "tiny", request_timeout=0.2, retries=0
      )
      service.ask(["x"])
    assert time.monotonic() - start < 2
    thread.join(5)


def test_one_lost_answer_of_many_is_not_a_number():
  lost = lambda text, nth: (500, b"") if answer_in(text) == "9" else answer_in(text)  # noqa: E731
  with serving(lost) as (url, _, _):
    function = rewards.remote_reward(rewards.Service(url, "tiny", retries=0))
    responses = ["9", *["1"] * 10]
    scores = rewards.ask(function, [""] * 11, responses, rows=[ROWS[0]] * 11)
  np.testing.assert_array_equal(np.isnan(scores), [True] + [False] * 10)


def test_the_key_is_sent_and_never_shown(monkeypatch, caplog):
  monkeypatch.setenv("MY_KEY", "sk-secret")
  with serving(lambda text, nth: (401, b"bad key sk-secret")) as (url, seen, _):
    with pytest.raises(
      rewards.ServiceError, match=r"status 401: bad key \*\*\*; key_var"
    ) as caught:
      score(url, key_variable="MY_KEY")
  assert seen[0][1]["Authorization"] == "Bearer sk-secret"
  assert "secret" not in str(caught.value) + caplog.text
  assert "secret" not in repr(rewards.Service(url, "tiny", key_variable="MY_KEY"))
  assert len(seen) <= 4, "a refusal is not tried again"


@pytest.mark.parametrize(
  "answer",
  [
    (401, 195 * b"x" + b"sk-secret"),
    (200, b"<html>Bearer sk-secret"),
    (500, b"sk-secret"),
    (200, completion("the key is sk-secret")),
  ],
)
def test_a_key_that_a_service_repeats_is_not_shown(monkeypatch, caplog, answer):
  monkeypatch.setenv("MY_KEY", "sk-secret")
  with serving(lambda text, nth: answer) as (url, _, _):
    try:
      scores = score(url, key_variable="MY_KEY", retries=0)
      assert np.isnan(scores).all()
    except rewards.ServiceError as error:
      assert "sk-" not in str(error)
  assert "sk-" not in caplog.text


def test_a_redirect_is_not_followed(monkeypatch):
  with serving(lambda text, nth: (307, b"elsewhere")) as (url, _, _):
    with pytest.raises(rewards.ServiceError, match="status 307: elsewhere; no redirect is"):
      score(url)


def test_both_orders_make_a_preference():
  def reply(text, nth):
    a, b = (text.partition(f"[Response {x}]\n")[2].partition("\n")[0] for x in "AB")
    if "unsure" in (a, b):
      return "Neither."
    return "A" if "first" in a + b else "B" if len(b) > len(a) else "Answer: A."

  pairs = [("long one", "it"), ("it", "long one"), ("first", "other"), ("unsure", "it")]
  with serving(reply) as (url, seen, _):
    prefer = rewards.remote_preference(rewards.Service(url, "tiny"))
    a, b = zip(*pairs, strict=True)
    found = rewards.ask(prefer, PROMPTS, list(a), list(b), rows=ROWS)
  np.testing.assert_array_equal(found, np.array([1, 0, 0.5, np.nan], np.float32))
  assert len(seen) == 8 + 2 * 3, "the pair without a letter is asked about again"


def test_a_reply_that_cannot_be_read_is_asked_for_again():
  replies = ["I cannot judge this.", (500, b""), "8"]
  with serving(lambda text, nth: replies[nth - 1]) as (url, seen, _):
    np.testing.assert_array_equal(score(url), np.full(4, 8, np.float32))
  temperatures = [body["temperature"] for _, _, body in seen]
  assert temperatures.count(0) == 4 and temperatures.count(1) == 8
  with serving(lambda text, nth: [*replies[:2], None][nth - 1]) as (url, seen, _):
    np.testing.assert_array_equal(score(url), np.full(4, np.nan, np.float32))
  assert len(seen) == 12, "a reply that cannot be read is no request that was lost"


@pytest.mark.parametrize(
  "reply, value",
  [
    ("7", 7),
    (" 7.5\n", 7.5),
    ("Score: 8/10", 8),
    ("8 out of 10.", 8),
    ("4/5", math.nan),
    ("I say 4 out of 5.", math.nan),
    ("8 / 100", math.nan),
    ("good, so 8/10 it is", 8),
    ("**9**", 9),
    ("<think>3 or 4?</think>\n4", 4),
    ("It is 2 pages and 3 lines.\n6", 6),
    ("", math.nan),
    ("between 3 and 4", math.nan),
    ("11", math.nan),
    ("-1", math.nan),
    ("80%", math.nan),
    ("nan", math.nan),
    ("1e5", math.nan),
  ],
)
def test_numbers_in_replies(reply, value):
  np.testing.assert_equal(remote.read_score(reply), value)


@pytest.mark.parametrize(
  "reply, value",
  [
    ("A", 1),
    ("b.", 0),
    ("**B**", 0),
    ("The better response is A", 1),
    ("Response B", 0),
    ("<think>A?</think>B", 0),
    ("Both are short.\nA", 1),
    ("A good one is B", math.nan),
    ("AB", math.nan),
    ("", math.nan),
  ],
)
def test_letters_in_replies(reply, value):
  np.testing.assert_equal(remote.read_choice(reply), value)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"url": "ftp://host"}, "^url must be http"),
    ({"url": "host:80/v1"}, "^url must be http"),
    ({"url": "http://me:pw@host/v1"}, "^url must be an address alone"),
    ({"url": "http://host/v1?key=1"}, "^url must be an address alone"),
    *(
      ({"url": url}, "^url must be http://HOST/v1 or https://HOST/v1, got 'http")
      for url in (
        *("http://host:99999/v1", "http://host:0/v1", "http://host:port/v1", "http://[::1/v1"),
        *("http://ho st/v1", "http://host/v 1", "http://host/vé", "http://a..b/v1"),
        f"http://{70 * 'a'}.com/v1",
      )
    ),
    ({"model": ""}, "^model must name"),
    (
      {"key_variable": "NOT_SET_ANYWHERE"},
      "^key_variable: the environment has no variable NOT_SET",
    ),
  ],
)
def test_services_that_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    rewards.Service(**{"url": "http://host/v1", "model": "tiny", **fields})


@pytest.mark.parametrize("key", ["sk-\nsecret", "sk secret", "sk-secret\u2019"])
def test_a_key_that_no_header_holds_is_not_shown(key, monkeypatch):
  monkeypatch.setenv("MY_KEY", key)
  with pytest.raises(ValueError, match="^key_variable: the key in MY_KEY") as caught:
    rewards.Service("http://host/v1", "tiny", key_variable="MY_KEY")
  assert "secret" not in str(caught.value)


TOOLS = [
  *({"role": "user", "content": "sum"}, {"role": "assistant", "content": "call"}),
  {"role": "tool", "content": "result"},
]


@pytest.mark.parametrize(
  ("row", "ignored", "shown"),
  [
    ({"prompt": "p", "context": "left out", "tools": ["left out"]}, ("context", "tools"), "p"),
    ({"prompt": "p", "messages": [{"role": "user", "content": "left out"}]}, ("messages",), "p"),
    ({"messages": TOOLS}, (), "Human: sum\n\nAssistant: call\n\nTool: result"),
  ],
)
def test_a_prompt_is_read_as_it_was_for_training(row, ignored, shown):
  with serving(lambda text, nth: "A" if "Response A" in text else "5") as (url, seen, _):
    service = rewards.Service(url, "tiny")
    rewards.ask(rewards.remote_reward(service, ignored), [""], ["r"], rows=[row])
    prefer = rewards.remote_preference(service, ignored)
    rewards.ask(prefer, [""], ["r"], ["s"], rows=[row])
  for _, _, body in seen:
    assert shown in body["messages"][0]["content"]
    assert "left out" not in body["messages"][0]["content"]
