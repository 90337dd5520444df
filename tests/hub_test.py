"""Models and data by the names of a hub, against a small one at 127.0.0.1."""

import hashlib
import http.server
import json
import threading

import huggingface_hub
import pytest

from experiments.lab import models
from experiments.records import card, record
from rlhf_jax import data, hub
from rlhf_jax.data import DataConfig
from tests.data.rows import TOKENIZER, prompts

FIRST, SECOND, BRANCH = "1" * 40, "2" * 40, "3" * 40
ROWS = "".join(json.dumps(row) + "\n" for row in prompts(8)).encode()
MODEL = {
  "config.json": b'{"model_type": "llama"}',
  "model.safetensors": b"weights",
  "tokenizer.json": b"{}",
  "pytorch_model.bin": b"\x80 a pickle",
  "modeling.py": b"raise SystemExit",
  "original/params.json": b"{}",
  "consolidated.safetensors": b"weights",
  "consolidated.safetensors.index.json": b"{}",
}
DATA = {"data/train-0.jsonl": ROWS, "data/train-1.jsonl": ROWS, "script.py": b"raise SystemExit"}


class Hub(http.server.ThreadingHTTPServer):
  """The parts of a hub that downloads need.

  Attributes:
    repos: Address of a repository -> revision -> (commit, files).
    gated: Addresses that need a login.
    asked: Paths that were asked for.
  """

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.repos, self.gated, self.asked = {}, set(), []

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Hub

  def log_message(self, *args):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    self.server.asked.append(self.path)
    path = self.path.partition("?")[0].strip("/")
    parts = path.removeprefix("api/models/").removeprefix("api/").split("/")
    at = 1 if parts[0] == "datasets" else 0
    address, (what, *rest) = "/".join(parts[: at + 2]), parts[at + 2 :] or ["revision", "main"]
    revisions = self.server.repos.get(address)
    if revisions is None:
      return self._refuse(404, "RepoNotFound")
    if address in self.server.gated and what != "revision":
      return self._refuse(403, "GatedRepo")
    known = revisions | {commit: (commit, files) for commit, files in revisions.values()}
    if rest[0] not in known:
      return self._refuse(404, "RevisionNotFound")
    commit, files = known[rest[0]]
    if what == "revision":
      siblings = [{"rfilename": name} for name in files]
      return self._send(json.dumps({"id": address, "sha": commit, "siblings": siblings}).encode())
    if what == "tree":
      entries = [
        {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
        for name, content in files.items()
      ]
      return self._send(json.dumps(entries).encode())
    if (name := "/".join(rest[1:])) not in files:
      return self._refuse(404, "EntryNotFound")
    content = files[name]
    return self._send(content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit})

  def _send(self, content, headers=None):
    self.send_response(200)
    for name, value in {"Content-Length": len(content), **(headers or {})}.items():
      self.send_header(name, str(value))
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(content)

  def _refuse(self, status, code):
    self.send_response(status)
    self.send_header("X-Error-Code", code)
    self.send_header("Content-Length", "0")
    self.end_headers()


def _etag(content):
  return hashlib.sha1(content).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
  monkeypatch.setattr(hub, "_COMMITS", {})
  monkeypatch.setattr(hub, "_SETTLED", {})
  with Hub() as server:
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    server.repos["me/model"] = {"main": (FIRST, MODEL), "v2": (BRANCH, MODEL)}
    server.repos["datasets/me/rows"] = {"main": (FIRST, DATA)}
    yield server
    server.shutdown()


def forget():
  """Does what a new process does."""
  hub._COMMITS.clear()
  hub._SETTLED.clear()


@pytest.mark.parametrize(
  ("name", "commit"),
  [("hf://me/model", FIRST), ("hf://me/model@v2", BRANCH), (f"hf://me/model@{BRANCH}", BRANCH)],
)
def test_a_model_is_downloaded_without_code(server, name, commit):
  folder = models.finished_folder(name)
  assert folder.name == commit
  files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
  assert files == {"config.json", "model.safetensors", "tokenizer.json"}
  assert (folder / "model.safetensors").read_bytes() == b"weights"
  unread = ("pytorch_model.bin", ".py", "consolidated")
  assert not any(name in path for name in unread for path in server.asked)


def test_data_of_a_hub(server):
  names = "hf://datasets/me/rows/data/train-0.jsonl:1,hf://datasets/me/rows@main/data/*.jsonl:3"
  train, _ = data.load("prompts", DataConfig(names, eval_fraction=0.0), TOKENIZER)
  assert [(share.examples, share.weight) for share in train.mixture] == [(8, 0.25), (16, 0.75)]
  assert [row["n"] for row in train.rows] == [*range(8)] * 3
  assert not any("script.py" in path for path in server.asked)


@pytest.mark.parametrize("address", ["", "gs://runs/team/ppo"])
def test_a_resumed_run_reads_its_commit(server, tmp_path, monkeypatch, address):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(hub.workdir, "_copied", lambda folder: folder)  # Nothing is in the bucket.
  run = hub.workdir.local_path(address or tmp_path / "run")
  settings = {"model.path": "hf://me/model", "data.path": "x", "steps": 3}
  hub.settle(address or run, settings.values())
  digests = models.digests({"model.path": "hf://me/model"})
  assert digests["commit of hf://me/model"] == FIRST
  assert len(digests["files of --model.path"]) == 64
  run.mkdir(parents=True)
  (run / "identity.json").write_text(json.dumps(digests))
  server.repos["me/model"]["main"] = (SECOND, MODEL)
  for folder, commit in ((address or run, FIRST), (tmp_path / "new", SECOND)):
    forget()
    hub.settle(folder, settings.values())
    assert models.finished_folder("hf://me/model").name == commit
    hub.settle(folder, settings.values())
  source = record.sources_of({"model.path": "hf://me/model"})[0]
  assert source["path"] == f"hf://me/model@{SECOND}"
  assert card.base_model({"sources": [source]}) == "me/model"


def test_the_cache_is_read_without_a_network(server, monkeypatch):
  folder = models.finished_folder("hf://me/model@v2")
  forget()
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
  assert models.finished_folder("hf://me/model@v2") == folder
  for name in ("hf://me/model", "hf://me/other"):
    with pytest.raises(hub.HubError, match=r"not in the cache, and http://127\.0\.0\.1:9 cannot"):
      models.finished_folder(name)


@pytest.mark.parametrize(
  ("read", "name", "message"),
  [
    ("model", "hf://me/other", "no such repository at http://.*/me/other, or it is private"),
    ("model", "hf://me/model@v9", "has no revision v9"),
    ("model", "hf://me", "write hf://ORG/NAME"),
    ("model", "hf://me/model/x", "write hf://ORG/NAME"),
    ("model", "hf://me/model@%2e%2e", "write hf://ORG/NAME"),
    ("model", "hf://me/model@%2Fetc", "write hf://ORG/NAME"),
    ("model", "hf://me/../model", "write hf://ORG/NAME"),
    ("model", "hf://datasets/me/rows", "a data set; give a model"),
    ("model", "hf://me/gated", "gated; accept its terms at http://.*/me/gated"),
    ("data", "hf://me/model", "names no file"),
    ("data", "hf://datasets/me/rows", "names no file"),
    ("data", "hf://datasets/me/rows/script.py", "not a file of JSON Lines"),
    ("data", "hf://datasets/me/rows/data/test.jsonl", "has no such file"),
    ("data", "hf://datasets/me/none/a.jsonl", "no such repository at http://.*/datasets/me/none"),
  ],
)
def test_refuses(server, read, name, message):
  server.repos["me/gated"] = {"main": (FIRST, MODEL)}
  server.gated.add("me/gated")
  with pytest.raises(hub.HubError, match=message) as caught:
    models.finished_folder(name) if read == "model" else [*data.read_file(name)]
  malformed = any(words in message for words in ("ORG", "give a model", "no file", "not a file"))
  assert caught.value.exit_code == (65 if malformed else 69)


def test_a_repository_without_a_model_is_refused(server):
  server.repos["me/empty"] = {"main": (FIRST, {"a.json": b"{}"})}
  with pytest.raises(Exception, match=r"neither the workdir .* nor a folder with config\.json"):
    models.finished_folder("hf://me/empty")


def test_a_digest_is_of_what_is_read(tmp_path):
  def digest():
    return models.digests({"model.path": str(tmp_path)})

  for name in ("config.json", "tokenizer.json", "model-00001-of-00001.safetensors"):
    (tmp_path / name).write_text("{}")
  first = digest()
  (tmp_path / "consolidated.safetensors").write_text("weights")
  assert digest() == first
  (tmp_path / "model-00001-of-00001.safetensors").write_text("others")
  assert digest() != first
