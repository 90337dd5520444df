"""A small server of the API of Cloud Storage at 127.0.0.1, for tests."""

import http.server
import json
import threading
import urllib.parse

BUCKET = "runs"


class Server(http.server.ThreadingHTTPServer):
  """The parts of the API that tensorstore needs.

  Attributes:
    objects: Name -> (generation, content).
    history: Objects after each change.
    refuses: Code of the answer to everything; 0 answers.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.objects: dict[str, tuple[int, bytes]] = {}
    self.history: list[dict[str, tuple[int, bytes]]] = []
    self.mutex, self.refuses, self._generation = threading.Lock(), 0, 100

  def start(self):
    threading.Thread(target=self.serve_forever, daemon=True).start()

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_port}"

  def put(self, name, content):
    """Writes an object as another machine does; None deletes it. Returns its generation."""
    self._generation += 1
    self.objects.pop(name, None)
    if content is not None:
      self.objects[name] = self._generation, content
    self.history.append(dict(self.objects))
    return self._generation


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Server
  protocol_version = "HTTP/1.1"
  wbufsize = -1  # An answer is one packet.

  def log_message(self, *args):
    pass

  def _handle(self):
    content = self.rfile.read(int(self.headers.get("content-length") or 0))
    url = urllib.parse.urlsplit(self.path)
    query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
    with self.server.mutex:
      code, body, headers = self._answer(url.path, query, content)
    self.send_response(code)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("content-length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  do_GET = do_POST = do_DELETE = _handle

  def _answer(self, path, query, content):
    server, objects = self.server, self.server.objects
    if server.refuses:
      return server.refuses, b"{}", {}
    if not path.removeprefix("/upload").startswith(f"/storage/v1/b/{BUCKET}/o"):
      return 404, b"{}", {}
    name = urllib.parse.unquote(path.partition("/o/")[2]) or query.get("name", "")
    if self.command == "GET" and not name:
      return 200, json.dumps(self._page(query)).encode(), {}
    generation, found = objects.get(name, (0, b""))
    if int(query.get("ifGenerationMatch", generation)) != generation:
      return 412, b"{}", {}
    if self.command == "POST":
      generation = server.put(name, content)
      return 200, json.dumps({"name": name, "generation": str(generation)}).encode(), {}
    if not generation:
      return 404, b"{}", {}
    if self.command == "DELETE":
      server.put(name, None)
      return 204, b"", {}
    if query.get("ifGenerationNotMatch") == str(generation):
      return 304, b"", {}
    return 200, found, {"x-goog-generation": str(generation)}

  def _page(self, query):
    start, end = query.get("pageToken", query.get("startOffset", "")), query.get("endOffset")
    names = sorted(n for n in self.server.objects if start <= n and (not end or n < end))
    page, rest = names[:5], names[5:6]  # Small pages, so that there are several.
    return {"items": [{"name": n} for n in page]} | ({"nextPageToken": rest[0]} if rest else {})
