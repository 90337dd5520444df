"""Judge behind an OpenAI-compatible HTTP API, as a reward and as a preference.

It is asked by `POST URL/chat/completions`, as vLLM, SGLang, llama.cpp and hosted models are. A
reply without a number or a letter is asked for again, and else gives NaN.
"""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import math
import os
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from rlhf_jax import data
from rlhf_jax.rewards import checks
from rlhf_jax.rewards.functions import TextReward
from rlhf_jax.rewards.preferences import TextPreference

BEST = 10.0  # Score of the best response; that of the worst one is 0.
_LONGEST_REPLY = 2**20  # Bytes.
_LATER = (408, 409, 425)  # Statuses, besides 429 and those of 500 and above, that may pass.
_KEY = "key_variable names the environment variable with the key"
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 8.0  # Seconds between two tries.
_FIRST_LIMITED, _LONGEST_LIMITED = 15.0, 120.0  # The same for a service that limits requests.

_SCORE = """Judge the response of an assistant to a prompt. Is it right, helpful, clear, harmless?

[Prompt]
{prompt}

[Response]
{response}

Give a number from 0 (worst) to 10 (best). Reply with the number alone."""
_CHOICE = """Judge two responses of an assistant to a prompt. Which is the better one: more right,
helpful, clear and harmless?

[Prompt]
{prompt}

[Response A]
{a}

[Response B]
{b}

Reply with the letter alone, A or B."""
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
# With the best number, where a reply says it: 8/10, 8 out of 10.
_NUMBER = re.compile(
  r"(?<![\w.-])(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(\d+))?(?![\w%]|\.\d)", re.I
)
_LETTER = re.compile(
  r"\W*(?:(?:the )?(?:better |best )?(?:answer|response|choice)\W*(?:is\W*)?)?([AB])\W*", re.I
)


class ServiceError(RuntimeError):
  """A service does not answer, or refuses to."""

  exit_code = os.EX_UNAVAILABLE


@dataclasses.dataclass(frozen=True)
class Service:
  """Model behind an HTTP API.

  Attributes:
    url: Address up to the version, such as http://host:8000/v1.
    model: Name of the model.
    key_variable: Environment variable with the API key; empty sends none.
    request_timeout: Seconds that a request may take.
    retries: Number of further tries of a request that failed, or whose reply cannot be read, which
      are at temperature 1. They follow within seconds, or after 15 seconds, 30 and so on up to two
      minutes where the service limits requests, or after the time that it asks for.
    workers: Number of requests at the same time.
  """

  url: str
  model: str
  key_variable: str = ""
  request_timeout: float = 60.0
  retries: int = 3
  workers: int = 8

  def __post_init__(self):
    wanted = f"url must be http://HOST/v1 or https://HOST/v1, got {self.url!r}"
    try:
      parts = urllib.parse.urlsplit(self.url)
      known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
      (parts.hostname or "").encode("idna")
    except ValueError as error:  # Of the port, or of a part of the name of the host.
      raise ValueError(f"{wanted}: {error}") from error
    if not known or re.search(r"\s", self.url) or not parts.path.isascii():
      raise ValueError(wanted)
    if parts.username or parts.password or parts.query or parts.fragment:
      raise ValueError("url must be an address alone; give a key by key_variable")
    if not self.model:
      raise ValueError("model must name the model of url")
    if self.key_variable and not self._key():
      raise ValueError(f"key_variable: the environment has no variable {self.key_variable}")
    if not re.fullmatch(r"[!-~]*", self._key()):  # A message with the key in it would follow.
      raise ValueError(
        f"key_variable: the key in {self.key_variable} has a character that no key has, such as a"
        " space; set the variable again"
      )

  def _key(self) -> str:
    return os.environ.get(self.key_variable, "").strip() if self.key_variable else ""

  def ask(
    self, texts: Sequence[str], is_readable: Callable[[str], bool] = lambda reply: True
  ) -> list[str | None]:
    """Returns the reply to each text; None where no try had one.

    Args:
      texts: Texts of the requests.
      is_readable: Function that returns False for a reply that is asked for again.

    Raises:
      ServiceError: The service refuses, or more than `checks.MAX_SHARE` of the texts have no reply.
        The texts that are left are then not asked about.
    """
    ended = threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(self.workers, "judge")
    lost: list[str] = []
    try:
      asked = [pool.submit(self._reply, text, is_readable, ended) for text in texts]
      for done in concurrent.futures.as_completed(asked):
        if isinstance(error := done.result(), Exception):
          lost.append(str(error))
        if len(lost) > checks.MAX_SHARE * len(texts):
          raise ServiceError(
            f"{self.url}: {len(lost)} of {len(texts)} requests failed, more than"
            f" {checks.MAX_SHARE:.0%}, each in {1 + self.retries} tries of at most"
            f" {self.request_timeout:g} seconds; the last one: {lost[-1]}; see that the service"
            " runs, raise retries or request_timeout, or lower workers"
          )
    finally:  # After an error the others are not waited for longer than their present try takes.
      ended.set()
      pool.shutdown(cancel_futures=True)
    if lost:
      logging.warning("%s: %d of %d requests failed: %s", self.url, len(lost), len(texts), lost[-1])
    replies = [done.result() for done in asked]
    return [None if isinstance(reply, Exception) else reply for reply in replies]

  def _reply(
    self, text: str, is_readable: Callable[[str], bool], ended: threading.Event
  ) -> str | Exception:
    """Returns the last reply to a text, or the last error if there is none; see `ask`."""
    found: str | Exception = Exception()
    wait = 0.0
    for i in range(1 + self.retries):
      if ended.wait(wait):
        break
      try:  # At 0 the reply would be the same again.
        found = self._try(text, temperature=float(isinstance(found, str)))
        if is_readable(found):
          break
        wait = 0.0
      except (OSError, http.client.HTTPException, _UnreadableError) as error:
        wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2**i)
        if isinstance(error, _LimitedError):
          wait = min(_LONGEST_LIMITED, error.wait or _FIRST_LIMITED * 2**i)
        if isinstance(found, Exception):
          found = error if str(error) else type(error)(type(error).__name__)
    return found

  def _try(self, text: str, temperature: float) -> str:
    """Sends a request once, and follows no redirect: a key is for one host."""
    parts = urllib.parse.urlsplit(self.url)
    address: dict[str, Any] = {
      "host": parts.hostname,
      "port": parts.port,
      "timeout": self.request_timeout,
    }
    if parts.scheme == "https":
      connection = http.client.HTTPSConnection(**address, context=ssl.create_default_context())
    else:
      connection = http.client.HTTPConnection(**address)
    messages = [{"role": "user", "content": text}]
    body = {"model": self.model, "messages": messages, "temperature": temperature}
    headers = {"Content-Type": "application/json"}
    key = self._key()
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    end = time.monotonic() + self.request_timeout
    # The timeout of the connection is for each part that arrives.
    alarm = threading.Timer(self.request_timeout, _shut, [connection])
    alarm.daemon = True
    alarm.start()
    try:
      path = f"{parts.path.rstrip('/')}/chat/completions"
      connection.request("POST", path, json.dumps(body).encode(), headers)
      with connection.getresponse() as response:
        status, content, place = response.status, b"", response.getheader("Location", "")
        pause = response.getheader("Retry-After", "")
        while part := response.read1(2**16):
          content += part
          if len(content) > _LONGEST_REPLY:
            raise _UnreadableError(f"an answer of more than {_LONGEST_REPLY} bytes")
          if time.monotonic() > end:
            break
      if time.monotonic() > end:  # What has arrived may look like a whole answer.
        raise TimeoutError("timed out")
    except (OSError, http.client.HTTPException) as error:
      if time.monotonic() > end:
        raise TimeoutError("timed out") from error
      raise
    finally:
      alarm.cancel()
      connection.close()
    if key:  # A service may repeat it.
      content, place = content.replace(key.encode(), b"***"), place.replace(key, "***")
    if status == 200:
      return _content(content)
    problem = f"status {status}: {content[:200].decode(errors='replace')}"
    if status == 429 or (pause and status == 503):
      raise _LimitedError(problem, pause)
    if status >= 500 or status in _LATER:
      raise _UnreadableError(problem)
    fixes = {401: _KEY, 403: _KEY, 404: "url ends before /chat/completions, often in /v1"}
    fix = fixes.get(status, "")
    if 300 <= status < 400:
      fix = f"no redirect is followed, as the key is for one host: give url as of {place[:200]!r}"
    raise ServiceError(f"{self.url}: {problem}{'; ' if fix else ''}{fix}")


def _shut(connection: http.client.HTTPConnection) -> None:
  """Ends what another thread waits for on a connection."""
  with contextlib.suppress(OSError):
    if connection.sock is not None:
      connection.sock.shutdown(socket.SHUT_RDWR)


class _UnreadableError(Exception):
  """An answer that may be another one at the next try."""


class _LimitedError(_UnreadableError):
  """An answer that asks to wait.

  Attributes:
    wait: Seconds that the service asks for; 0 if it gives no number.
  """

  def __init__(self, problem: str, pause: str):
    super().__init__(problem)
    self.wait = float(pause) if re.fullmatch(r"\d{1,9}(\.\d+)?", pause) else 0.0


def _content(body: bytes) -> str:
  """Returns the text of the reply in the body of an answer."""
  try:
    content = json.loads(body)["choices"][0]["message"]["content"]
  except (ValueError, KeyError, IndexError, TypeError, RecursionError):
    shown = body[:80].decode(errors="replace")
    raise _UnreadableError(f"an answer that is no chat completion: {shown!r}") from None
  return content if isinstance(content, str) else ""


def read_score(reply: str) -> float:
  """Returns the number from 0 to `BEST` of a reply, NaN without a single one on this scale."""
  text = _THOUGHT.sub("", reply).strip()
  last = _NUMBER.fullmatch(text.rpartition("\n")[2].strip(" .*"))
  numbers = [last.groups("")] if last else _NUMBER.findall(text)
  if len(numbers) != 1:
    return math.nan
  ((number, best),) = numbers
  value = float(number) if float(best or BEST) == BEST else math.nan
  return value if 0 <= value <= BEST else math.nan


def read_choice(reply: str) -> float:
  """Returns 1 for A and 0 for B in a reply, NaN without a plain letter."""
  text = _THOUGHT.sub("", reply).strip()
  found = _LETTER.fullmatch(text) or _LETTER.fullmatch(text.rpartition("\n")[2])
  return math.nan if found is None else float(found[1].upper() == "A")


def _read(
  service: Service, texts: Sequence[str], read: Callable[[str], float], wanted: str
) -> np.ndarray:
  """Returns what is read in the reply to each text."""
  replies = service.ask(texts, lambda reply: not math.isnan(read(reply)))
  values = np.array([math.nan if reply is None else read(reply) for reply in replies], np.float32)
  if strange := [r for r, x in zip(replies, values, strict=True) if r is not None and x != x]:
    logging.warning(
      "%s: %d of %d replies have no %s, such as %r",
      *(service.url, len(strange), len(texts), wanted, strange[0][:80]),
    )
  return values


def _prompts(rows: Sequence[Mapping[str, Any]], ignored: Sequence[str]) -> list[str]:
  """Returns the prompts of rows as a person would write them, without a template."""
  given = data.given_prompts(rows, ignored, prefer_messages=True)
  return [data.readable(prompt) for prompt in given]


def remote_reward(service: Service, ignored: Sequence[str] = ()) -> TextReward:
  """Returns the reward function of a judge: a number from 0 to `BEST` for each response.

  Args:
    service: Judge.
    ignored: Columns of rows that are no part of a prompt, `Dataset.ignored`.
  """

  def score(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
  ) -> np.ndarray:
    del prompts  # Rendered for the policy.
    texts = [
      _SCORE.format(prompt=prompt, response=response)
      for prompt, response in zip(_prompts(rows, ignored), responses, strict=True)
    ]
    return _read(service, texts, read_score, "number from 0 to 10")

  score.__qualname__ = f"{service.model} of {service.url}"
  return score


def remote_preference(service: Service, ignored: Sequence[str] = ()) -> TextPreference:
  """Returns the preference function of a judge, which is asked in both orders.

  The probability is 0, 1, or 0.5 if the judge chooses the first place, or the second, both times.

  Args:
    service: Judge.
    ignored: Columns of rows that are no part of a prompt, `Dataset.ignored`.
  """

  def prefer(
    prompts: Sequence[str],
    a: Sequence[str],
    b: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
  ) -> np.ndarray:
    del prompts
    given = _prompts(rows, ignored)
    texts = [
      _CHOICE.format(prompt=prompt, a=first, b=second)
      for one, other in ((a, b), (b, a))
      for prompt, first, second in zip(given, one, other, strict=True)
    ]
    there, back = np.split(_read(service, texts, read_choice, "letter A or B"), 2)
    return (there + 1 - back) / 2

  prefer.__qualname__ = f"{service.model} of {service.url}"
  return prefer
