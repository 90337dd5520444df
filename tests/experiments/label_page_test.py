"""Labelling in a browser: a page in Chromium, and twenty answers across a kill."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import sqlite3
import time
import urllib.error
import urllib.request

import pytest

from experiments.annotation.page import Asked
from rlhf_jax import flags as rlhf_flags
from rlhf_jax import simulation
from tests.testing import INJECTION, read_flags


def need(*modules, programs=()):
  """Skips a test where something it needs is not installed."""
  missing = [name for name in modules if importlib.util.find_spec(name) is None]
  missing += [name for name in programs if shutil.which(name) is None]
  if missing:
    pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--port=0", "--port must be from 1 to 65535"),
    ("--annotator=a b", "--annotator must be up to 64 letters"),
    ("--annotator=label", "--annotator must not be 'label'"),
    ("--limit=-1", "--limit must not be negative"),
  ],
)
def test_flags_that_are_refused(flag, message):
  with pytest.raises(rlhf_flags.UsageError, match=message):
    read_flags("experiments.label_page", ["--workdir=x", flag])


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def get(port, token="", host="127.0.0.1"):
  url = f"http://127.0.0.1:{port}/?token={token}"
  request = urllib.request.Request(url, headers={"Host": f"{host}:{port}"})
  with urllib.request.urlopen(request, timeout=30) as response:
    return response.headers, response.read().decode()


class Server:
  """The script on a port, once it answers."""

  def __init__(self, start_script, workdir, port, *flags):
    self.port = port
    self.running = start_script("label_page", workdir, f"--port={port}", *flags)
    deadline = time.monotonic() + 300
    while True:
      try:
        get(port)
      except urllib.error.HTTPError as error:  # It answers, but not without a token.
        assert error.code == 403
        self.token = (workdir / ".label_page_token").read_text().strip()
        return
      except urllib.error.URLError:
        alive = self.running.process.is_alive() and time.monotonic() < deadline
        assert alive, self.running.end(0).output
        time.sleep(0.05)

  def kill(self):
    self.running.process.kill()
    self.running.process.join()


@pytest.fixture
def server(tmp_path, start_script):
  """A page with an injection, a ranking and a pair; nobody is named."""
  need("gradio")
  path = tmp_path / "rows.jsonl"
  rows = [
    {"prompt": INJECTION, "responses": [INJECTION, "**y**"]},
    {"prompt": "q", "responses": ["w", "x", "long " * 2000]},
    {"prompt": "r", "chosen": "x", "rejected": "y"},
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  server = Server(start_script, tmp_path / "run", free_port(), f"--data.path={path}")
  server.labels = tmp_path / "run" / "labels.jsonl"
  yield server
  server.kill()


# The page.


class Page:
  """A browser, and what it shows."""

  def __init__(self, driver):
    self.driver = driver

  def open(self, server):
    self.driver.get(f"http://127.0.0.1:{server.port}/?token={server.token}")

  def wait(self, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(self.driver, 60, poll_frequency=0.05).until(lambda unused: condition())

  def run(self, script):
    return self.driver.execute_script(f"return {script}")

  def asked(self):
    value = self.run("document.querySelector('#asked textarea, #asked input')?.value")
    return Asked(*json.loads(value)) if value else Asked()

  def texts(self):
    found = "[...document.querySelectorAll('#question .response .text')].map(e => e.textContent)"
    return self.run(found)

  def press(self, key):
    """Presses a key once the page offers it, and waits until something else is asked."""
    self.wait(lambda: self.run(f"!isAsking && !!document.getElementById('key-{key}')"))
    before = self.asked()
    self.driver.switch_to.active_element.send_keys(key)
    self.wait(lambda: self.asked() != before)

  def width(self, pixels, height=844):
    self.driver.execute_cdp_cmd(
      "Emulation.setDeviceMetricsOverride",
      {"width": pixels, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  need("gradio", "selenium", programs=("chromium", "chromedriver"))
  from selenium import webdriver

  options = webdriver.ChromeOptions()
  options.binary_location = shutil.which("chromium")
  for flag in (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
  ):
    options.add_argument(f"--{flag}")
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  service = webdriver.ChromeService(shutil.which("chromedriver"))
  driver = webdriver.Chrome(options, service)
  yield Page(driver)
  driver.quit()


def test_the_page_shows_text_as_text_and_ranks(page, server):
  headers, source = get(server.port, server.token)
  assert "default-src 'self'" in headers["Content-Security-Policy"]
  assert '"analytics_enabled":false' in source.replace(" ", "")
  with pytest.raises(urllib.error.HTTPError, match="400"):
    get(server.port, server.token, host="elsewhere.example")

  page.open(server)
  page.wait(lambda: "Who is labelling?" in page.driver.page_source)
  name = page.driver.find_element("css selector", "#annotator input, #annotator textarea")
  name.send_keys("not a name\n")
  page.wait(lambda: "annotator must" in page.driver.page_source)
  name.clear()
  name.send_keys("bab\n")  # Keys that are typed into a field answer nothing.
  page.wait(lambda: page.asked().annotator == "bab")
  page.wait(lambda: page.driver.current_url.endswith("?annotator=bab"))

  page.wait(lambda: len(page.texts()) == 2)
  assert sorted(page.texts()) == sorted([INJECTION, "**y**"])
  assert page.run("document.querySelector('#question .prompt .text').textContent") == INJECTION
  assert page.run("document.querySelectorAll('#question :is(img, script, a, strong)').length") == 0
  assert page.run("window.hurt") is None

  page.press("t")
  for width in (1280, 390):
    page.width(width)
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    # The keys stay in sight beside a long response.
    bottom = page.run("document.getElementById('keys').getBoundingClientRect().bottom")
    assert bottom <= page.run("innerHeight")
  texts = page.texts()
  best, middle = texts.index("x"), texts.index("w")
  page.press(str(best + 1))
  page.press(str(middle + 1))
  assert page.run("[...document.querySelectorAll('.rank')].map(e => e.textContent)") == [
    ("best" if place == best else "2nd") for place in sorted((best, middle))
  ]
  page.press(str(6 - best - middle - 2))
  page.driver.find_element("id", "key-a").click()
  page.wait(lambda: "All done" in page.driver.page_source)

  rows = [json.loads(line) for line in server.labels.read_text().splitlines()]
  votes = {(vote["a"], vote["b"]): vote["preferred"] for vote in rows[1]["annotations"]}
  assert votes == {(0, 1): 1, (0, 2): 0, (1, 2): 1}
  page.driver.find_element("css selector", "#agreement button").click()
  page.wait(lambda: "bab and the labels of the file" in page.driver.page_source)

  # Nothing came from elsewhere, nor would have.
  loaded = page.run("performance.getEntriesByType('resource').map(e => e.name)")
  assert loaded
  assert all(url.startswith(f"http://127.0.0.1:{server.port}/") for url in loaded)
  log = [entry["message"] for entry in page.driver.get_log("browser")]
  assert not [message for message in log if "Content Security Policy" in message]


def test_twenty_answers_by_keyboard_and_a_kill(tmp_path, page, start_script, train_on_labels):
  source = simulation.preferences("eval", 24, 0)
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in source))
  workdir, port = tmp_path / "out", free_port()
  flags = ("--annotator=ada", f"--data.path={path}")
  seen = []

  def answer(keys):
    for key in keys:
      item, texts = page.asked().item, page.texts()
      page.press(key)
      if key == "u":
        seen.pop()
      else:
        seen.append((item, {"a": texts[0], "b": texts[1], "t": None, "s": "skipped"}[key]))

  first = Server(start_script, workdir, port, *flags)
  try:
    page.open(first)
    page.wait(lambda: len(page.texts()) == 2)
    answer("abtabsbaabu")
  finally:
    first.kill()
  second = Server(start_script, workdir, port, *flags)
  try:
    page.driver.refresh()
    page.wait(lambda: len(page.texts()) == 2)
    assert page.asked().item == source[9].get("id", "9")  # The one that was undone.
    assert "<b>9</b> of 24" in page.driver.page_source
    answer("babababababa")
    os.kill(second.running.process.pid, signal.SIGINT)
    finished = second.running.end(60)
  finally:
    second.kill()
  assert finished.code == 0, finished.output

  # What was preferred is the text that stood on that side.
  assert len(seen) == 21 and len(set(seen)) == 21
  with sqlite3.connect(workdir / "labels.sqlite") as connection:
    lines = [line for (line,) in connection.execute("SELECT line FROM answers ORDER BY number")]
  connection.close()
  assert (workdir / "labels.jsonl").read_text().splitlines() == lines
  rows = [json.loads(line) for line in lines]
  found = []
  for row in rows:
    assert row["by"] == "ada"
    votes = row["annotations"]
    preferred = votes[0]["preferred"] if votes else "skipped"
    text = row["responses"][preferred] if isinstance(preferred, int) else preferred
    found.append((row["id"], text))
  assert found == seen
  for number, row in enumerate(rows):
    assert row["responses"] == [source[number]["chosen"], source[number]["rejected"]]
  assert {tuple(row["shown"]) for row in rows} == {(0, 1), (1, 0)}
  summary = json.loads((workdir / "summary.json").read_text())
  assert (summary["answers"], summary["ties"], summary["skipped"]) == (20, 1, 1)
  assert -1 <= summary["kappa/ada/label"] <= 1

  assert "1 not judged" in train_on_labels("reward_model", workdir / "labels.jsonl")
