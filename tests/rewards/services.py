"""Local stand-in of an OpenAI-compatible API."""

import contextlib
import http.server
import json
import socket
import threading
import time


@contextlib.contextmanager
def serving(reply, delay=0.0):
  """Serves `(text, try) -> reply`, text or (status, body, [headers]).

  Yields its address and its requests.
  """
  seen, tries, busy, lock = [], {}, [0, 0], threading.Lock()

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      text = body["messages"][0]["content"]
      with lock:
        seen.append((self.path, dict(self.headers), body))
        tries[text] = tries.get(text, 0) + 1
        nth = tries[text]
        busy[0] += 1
        busy[1] = max(busy)
      time.sleep(delay)
      answer = reply(text, nth)
      with lock:
        busy[0] -= 1
      if answer is None:  # Closed without an answer.
        self.connection.shutdown(socket.SHUT_RDWR)
        return
      answer = answer if isinstance(answer, tuple) else (200, completion(answer))
      status, content, *headers = answer
      with contextlib.suppress(OSError):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or [{}])[0]}.items():
          self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *unused):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}/v1", seen, busy
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def completion(text):
  return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
