"""Page on which people compare responses by keys or buttons; nothing leaves this machine.

`Desk` decides what a key means and needs no gradio; `build` draws it; `serve` runs it on 127.0.0.1.
Only who has the token of its address gets anything, neither another site nor another user.
"""

import contextlib
import functools
import hmac
import html
import http.cookies
import json
import math
import os
import pathlib
import re
import secrets
import socket
import stat
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rlhf_jax import data, flags, reporting
from rlhf_jax import workdir as workdir_lib
from .agreement import Agreement, agreements
from .items import Item, answer_row, check_annotator, shown_order
from .store import Store

_PAIR_KEYS = ("a", "b")
_TOKEN = ".label_page_token"  # File in the workdir.
_MAX_RESPONSES = 9  # A digit each.
_ORDINALS = ("best", "2nd", "3rd", *(f"{n}th" for n in range(4, _MAX_RESPONSES + 1)))


class Asked(NamedTuple):
  """State of a browser, which it sends with every key: the server keeps no state per browser.

  Attributes:
    annotator: Name of the annotator; "" until one is given.
    item: Id of the item; "" if none is left.
    placed: `(place on the page, rank)` of the responses that have been ranked, best first.
    level: True if the next response is tied with the one before.
    since: Time at which the item was first shown, in seconds since the epoch.
  """

  annotator: str = ""
  item: str = ""
  placed: tuple[tuple[int, int], ...] = ()
  level: bool = False
  since: float = 0.0


class Desk:
  """Applies each key to the store, for any number of annotators at once."""

  def __init__(self, items: Sequence[Item], store: Store):
    for item in items:
      if len(item.responses) > _MAX_RESPONSES:
        raise data.DataError(
          f"the row {item.id!r} has {len(item.responses)} responses; a page shows up to"
          f" {_MAX_RESPONSES}"
        )
    self.items = {item.id: item for item in items}
    self.store = store

  def ask(self, annotator: str) -> Asked:
    """The first item that an annotator has not answered.

    Raises:
      ValueError: The name is not fit.
      WorkdirError: The name is that of a judge.
    """
    check_annotator(annotator)
    self.store.require_same(annotator)
    answered = self.store.answered(annotator)
    left = (item for item in self.items if item not in answered)
    return Asked(annotator, next(left, ""), since=time.time())

  def answered(self, annotator: str) -> int:
    """Number of items that an annotator has answered or skipped."""
    return len(self.items.keys() & self.store.answered(annotator))

  def press(self, asked: Asked, key: str) -> Asked:
    """Returns the state after a key; keys without a meaning are ignored.

    An answer that the annotator gave meanwhile in another window is kept.
    """
    check_annotator(asked.annotator)
    if key == "u":
      if asked.placed:
        return asked._replace(placed=asked.placed[:-1], level=False)
      self.store.undo(asked.annotator)
      return self.ask(asked.annotator)
    item = self.items.get(asked.item)
    if item is None:
      return asked
    count, keys = len(item.responses), keys_of(item)
    if key == "s":
      return self._answer(asked, None)
    if key == "t" and asked.placed:
      return asked._replace(level=not asked.level)
    if key == "t":
      return self._answer(asked, [0] * count)
    if key not in keys or keys.index(key) in dict(asked.placed):
      return asked
    rank = asked.placed[-1][1] + (not asked.level) if asked.placed else 0
    placed = (*asked.placed, (keys.index(key), rank))
    if count > 2 and len(placed) < count:
      return asked._replace(placed=placed, level=False)
    ranks = [dict(placed).get(place, rank + 1) for place in range(count)]
    return self._answer(asked, ranks)

  def _answer(self, asked: Asked, ranks: Sequence[int] | None) -> Asked:
    """Stores an answer, `ranks` by place on the page, and goes on to the next item."""
    item = self.items[asked.item]
    order = shown_order(item.prompt, item.responses)
    in_row = None if ranks is None else [ranks[order.index(i)] for i in range(len(order))]
    seconds = round(max(0.0, time.time() - asked.since), 1)
    row = answer_row(item, asked.annotator, in_row, shown=list(order), seconds=seconds)
    self.store.add([row])
    return self.ask(asked.annotator)


def keys_of(item: Item) -> tuple[str, ...]:
  """Returns the key of each response, in the order in which they are shown."""
  count = len(item.responses)
  return _PAIR_KEYS if count == 2 else tuple(str(n + 1) for n in range(count))


# HTML of the page. Texts of prompts and responses are untrusted: they are shown, never run.


def question_html(desk: Desk, asked: Asked, problem: str = "") -> str:
  """Renders the prompt and the responses, or instructions if there is nothing to compare."""
  if not asked.annotator:
    wrong = f'<span class="wrong">{html.escape(problem)}</span>' if problem else ""
    return _message("Who is labelling?", wrong or "Type a name above, then press Enter.")
  if not asked.item:
    return _message("All done, thank you.", "U takes the last answer back.")
  item = desk.items[asked.item]
  order = shown_order(item.prompt, item.responses)
  places = dict(asked.placed)
  cards = []
  for place, key in enumerate(keys_of(item)):
    rank = places.get(place)
    mark = "" if rank is None else f'<span class="rank">{_ORDINALS[rank]}</span>'
    cards.append(
      f'<section class="response{"" if rank is None else " ranked"}">'
      f"<h3><kbd>{key.upper()}</kbd>{mark}</h3>{_text(item.responses[order[place]])}</section>"
    )
  return (
    f'<section class="prompt"><h3>Prompt</h3>{_text(item.prompt)}</section>'
    f'<div class="responses">{"".join(cards)}</div><p class="hint">{_hint(item, asked)}</p>'
  )


def _hint(item: Item, asked: Asked) -> str:
  count = len(item.responses)
  if count == 2:
    return "Which response is better? Press a key or a button."
  if asked.level:
    return "Which one is as good as the one before?"
  if asked.placed:
    return "Which one is next? T first if it is as good as the one before."
  return f"Press 1 to {count} from the best response to the worst."


def _text(text: str) -> str:
  return f'<div class="text" dir="auto">{html.escape(text) or "<em>empty</em>"}</div>'


def _message(title: str, text: str) -> str:
  return f'<section class="message"><h2>{title}</h2><p>{text}</p></section>'


def progress_html(done: int, total: int) -> str:
  """Renders the progress of an annotator."""
  return (
    f'<div class="count"><b>{done}</b> of {total} answered</div>'
    f'<div class="bar"><div style="width: {100 * done / max(total, 1):.1f}%"></div></div>'
  )


def agreement_html(pairs: Sequence[Agreement]) -> str:
  """Renders a table of the agreement of annotators."""
  if not pairs:
    return "<p>Nobody else has judged any of these responses yet.</p>"

  def number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"

  names = {"label": "the labels of the file"}
  rows = "".join(
    f"<tr><td>{html.escape(one)} and {html.escape(names.get(other, other))}</td>"
    f"<td>{count}</td><td>{number(share)}</td><td>{number(kappa)}</td></tr>"
    for one, other, count, share, kappa in pairs
  )
  head = "<th>Who</th><th>Pairs</th><th>Agreement</th><th>Cohen's kappa</th>"
  return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


_CSS = """
.gradio-container { width: 100%; max-width: 76rem !important; margin: 0 auto;
  overflow: visible !important; }
#top { align-items: end; flex-wrap: nowrap; }
#top > .form { flex: 0 1 14rem !important; border: 0; background: none; }
#annotator { padding: 0; background: none; }
#progress > *, #question > * { padding: 0; }
#progress .count { margin-bottom: .5rem; }
#progress .bar { height: .5rem; border-radius: .25rem; overflow: hidden;
  background: var(--border-color-primary); }
#progress .bar div { height: 100%; background: var(--color-accent); }
#question h3 { margin: 0 0 .5rem; font-size: .85rem; color: var(--body-text-color);
  display: flex; justify-content: space-between; align-items: center; }
#question section { border: 1px solid var(--border-color-primary); border-radius: .6rem;
  background: var(--block-background-fill); padding: .9rem 1.1rem; min-width: 0; }
#question .text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font-size: 1.05rem; line-height: 1.55; color: var(--body-text-color);
  max-height: 60vh; overflow-y: auto; }
#question .prompt { border-left: .3rem solid var(--color-accent); }
#question .responses { display: grid; gap: .9rem; margin-top: .9rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
#question .ranked { border-color: var(--color-accent); }
#question .rank { color: var(--color-accent); }
#question .hint, #question .message { text-align: center; color: var(--body-text-color); }
#question .hint { margin: .9rem 0 0; }
#question .message { padding: 3rem 1rem; }
#question .wrong { color: var(--error-text-color); }
kbd, #keys button::before { font: 600 .8rem/1.5 ui-monospace, monospace; padding: 0 .45rem;
  border: 1px solid var(--border-color-primary); border-bottom-width: 2px; border-radius: .3rem;
  background: var(--background-fill-secondary); color: var(--body-text-color); }
#keys { position: sticky; bottom: 0; z-index: 2; padding: .6rem 0; gap: .5rem; flex-wrap: wrap;
  background: var(--body-background-fill); }
#keys button { flex: 1 1 5.5rem; min-width: 0; padding: .55rem .3rem; gap: .5rem; }
#agreement table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
#agreement table, #agreement th, #agreement td { text-align: left; border: 0 !important; }
#agreement th, #agreement td { padding: .35rem .5rem;
  border-bottom: 1px solid var(--border-color-primary) !important; }
@media (max-width: 640px) {
  .gradio-container > .main { padding: 1rem !important; }
  #keys button { flex-basis: 28%; }
  #question .text { max-height: none; font-size: 1rem; }
}
"""

# A key counts for what is on the screen: those pressed before the next question are dropped.
_SCRIPT = """<script>
window.isAsking = false;
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || window.isAsking) return;
  if (event.target.closest("input, textarea, [contenteditable=true]")) return;
  const button = document.getElementById("key-" + event.key.toLowerCase());
  if (!button || button.disabled) return;
  event.preventDefault();
  button.click();
});
</script>"""
_BEGIN, _END = "(asked) => { window.isAsking = true; return asked; }", "() => { isAsking = false; }"
_NAMED = """(asked) => {
  const name = JSON.parse(asked)[0];
  if (!name) return;
  document.activeElement?.blur();
  history.replaceState(null, "", "?annotator=" + encodeURIComponent(name));
}"""


def build(desk: Desk, annotator: str = "") -> Any:
  """Builds the page as gradio blocks; a name in the URL or on the page overrides `annotator`."""
  gr = _gradio()
  count = max((len(item.responses) for item in desk.items.values()), default=2)
  numbers = [str(n + 1) for n in range(count)] if count > 2 else []
  captions = {"a": "better", "b": "better", "t": "tie", "s": "skip", "u": "undo"}

  with gr.Blocks(title="Which response is better?", analytics_enabled=False) as blocks:
    with gr.Row(elem_id="top"):
      progress = gr.HTML(elem_id="progress")
      name = gr.Textbox(
        label="Annotator", placeholder="your name, Enter", elem_id="annotator", max_lines=1
      )
    question = gr.HTML(elem_id="question")
    state = gr.Textbox(visible="hidden", elem_id="asked")
    with gr.Row(elem_id="keys"):
      buttons = {
        key: gr.Button(
          captions.get(key, ""),
          elem_id=f"key-{key}",
          variant="secondary" if key in "tsu" else "primary",
          visible=False,
        )
        for key in ("a", *numbers, "t", "b", "s", "u")
      }
    with gr.Accordion("Agreement", open=False, elem_id="agreement") as drawer:
      table = gr.HTML()

    def draw(asked: Asked, problem: str = "") -> dict[Any, Any]:
      item = desk.items.get(asked.item)
      meant = {*keys_of(item), "t", "s", "u"} if item else {"u"} if asked.annotator else set()
      done = desk.answered(asked.annotator) if asked.annotator else 0
      return {
        state: json.dumps(asked),
        question: question_html(desk, asked, problem),
        progress: progress_html(done, len(desk.items)),
      } | {button: gr.update(visible=key in meant) for key, button in buttons.items()}

    def on_load(request: gr.Request) -> dict[Any, Any]:
      named = request.query_params.get("annotator") or annotator
      return {name: named} | on_name(named)

    def on_name(named: str) -> dict[Any, Any]:
      if not named.strip():
        return draw(Asked())
      try:
        return draw(desk.ask(named.strip()))
      except (ValueError, workdir_lib.WorkdirError) as error:
        return draw(Asked(), str(error))

    def on_key(key: str, state: str) -> dict[Any, Any]:
      return draw(desk.press(Asked(*json.loads(state)), key))

    drawn = [state, question, progress, *buttons.values()]
    quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    blocks.load(on_load, None, [name, *drawn], **quick)
    name.submit(on_name, name, drawn, **quick).then(None, state, None, js=_NAMED)
    for key, button in buttons.items():
      press = functools.partial(on_key, key)
      button.click(press, state, drawn, js=_BEGIN, **quick).then(None, None, None, js=_END)
    drawer.expand(
      lambda: agreement_html(agreements([*desk.items.values()], desk.store.rows())),
      None,
      table,
      **quick,
    )
  return blocks


def _gradio() -> Any:
  """Imports gradio, which only the page needs."""
  os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
  os.environ["GRADIO_RUN_HISTORY"] = "False"  # Would keep texts and answers in the browser.
  try:
    import gradio
  except ImportError as error:
    raise flags.UsageError(
      "the page needs gradio: pip install 'rlhf_jax[annotate]'; or label in the terminal with"
      " experiments.label"
    ) from error
  return gradio


def read_token(workdir: pathlib.Path) -> str:
  """Returns the secret of the address of a page, which only the owner of its file can read.

  It stays the same over restarts, so that a page that is open in a browser goes on.
  """
  path = workdir / _TOKEN
  try:
    status = path.lstat()
    is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    if is_ours and not status.st_mode & 0o077:
      kept = path.read_text(encoding="ascii", errors="replace").strip()
      if re.fullmatch(r"[A-Za-z0-9_-]{43}", kept):
        return kept
    path.unlink()
  except FileNotFoundError:
    pass
  token = secrets.token_urlsafe(32)
  with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
    file.write(token + "\n")
  return token


def serve(store: Store, items: Sequence[Item], annotator: str, port: int, token: str) -> None:
  """Serves the page, to those who know the token, until it is interrupted."""
  with _listen(port) as listener:
    app = _Guard(_make_app(Desk(items, store), annotator, port), port, token)
    import uvicorn

    who = f"&annotator={annotator}" if annotator else ""
    reporting.note(
      f"http://127.0.0.1:{port}/?token={token}{who} is open; Ctrl-C ends it, all answers are kept"
    )
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
    try:
      uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
      reporting.note("closed")


def _make_app(desk: Desk, annotator: str, port: int) -> Any:
  """Makes an ASGI application of the page."""
  gr = _gradio()
  import fastapi

  app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
  theme = gr.themes.Default(
    primary_hue="blue",
    font=[gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")],
    font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
  )
  return gr.mount_gradio_app(
    app,
    build(desk, annotator),
    "/",
    server_name="127.0.0.1",
    server_port=port,
    footer_links=[],
    ssr_mode=False,
    theme=theme,
    css=_CSS + _key_css(),
    head=_SCRIPT,
  )


def _key_css() -> str:
  keys = ("a", "b", "t", "s", "u", *(str(n + 1) for n in range(_MAX_RESPONSES)))
  return "".join(f'#key-{key}::before {{ content: "{key.upper()}"; }}\n' for key in keys)


def _listen(port: int) -> socket.socket:
  """Opens a socket on 127.0.0.1."""
  listener = socket.socket()
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind(("127.0.0.1", port))
  except OSError as error:
    listener.close()
    raise flags.UsageError(
      f"--port={port} cannot be used ({error.strerror}); take another"
    ) from error
  return listener


class _Guard:
  """Middleware that answers only who has the token, and what the page itself asks for.

  A page of another site has no token and another origin, or reaches this one under a name that it
  points to 127.0.0.1. The page can load nothing from elsewhere.
  """

  _POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self';"
    " form-action 'self'; frame-ancestors 'none'"
  )
  # Gradio has many more routes, such as one that takes files.
  _PAGE = re.compile(
    r"/|/(config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt)|/(assets|static|svelte)/.*"
  )
  _EVENTS = re.compile(r"/gradio_api/run/\w+/?")

  def __init__(self, app: Callable, port: int, token: str):
    self._app, self._token = app, token
    self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
    self._cookie = f"label_page_{port}"

  async def __call__(self, scope, receive, send) -> None:
    if scope["type"] == "lifespan":
      return await self._app(scope, receive, send)
    headers = {name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]}
    given = urllib.parse.parse_qs(scope.get("query_string", b"").decode("latin1")).get(
      "token", [""]
    )
    invited = hmac.compare_digest(given[-1].encode(), self._token.encode())
    status, reason = self._refusal(scope, headers, invited)
    if status and scope["type"] != "http":
      return await send({"type": "websocket.close", "code": 1008})
    if status:
      start = {"type": "http.response.start", "status": status}
      await send(start | {"headers": [(b"content-type", b"text/plain; charset=utf-8")]})
      return await send({"type": "http.response.body", "body": reason.encode()})

    async def send_more(message) -> None:
      if message["type"] == "http.response.start":
        more = {"content-security-policy": self._POLICY, "referrer-policy": "no-referrer"}
        if invited:
          more["set-cookie"] = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"
        new = [(name.encode(), value.encode()) for name, value in more.items()]
        message = {**message, "headers": [*message["headers"], *new]}
      await send(message)

    return await self._app(scope, receive, send_more)

  def _refusal(self, scope, headers, invited: bool) -> tuple[int, str]:
    """Returns the status and the reason of a request that is refused, else 0."""
    if headers.get("host") not in self._hosts:
      return 400, "another host was asked for"
    origin = headers.get("origin")
    if origin is not None and origin.removeprefix("http://") not in self._hosts:
      return 403, "a page of another site asks"
    cookie = http.cookies.SimpleCookie()
    with contextlib.suppress(http.cookies.CookieError):
      cookie.load(headers.get("cookie", ""))
    held = cookie[self._cookie].value if self._cookie in cookie else ""
    if not invited and not hmac.compare_digest(held.encode(), self._token.encode()):
      return 403, "open the address that the terminal shows"
    method = scope.get("method", "")
    paths = {"GET": self._PAGE, "HEAD": self._PAGE, "POST": self._EVENTS}.get(method)
    if scope["type"] != "http" or paths is None or not paths.fullmatch(scope["path"]):
      return 404, "there is no such page"
    return 0, ""
