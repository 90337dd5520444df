"""The terminal: start panel, progress, samples and summary.

Messages go to stderr. On a terminal they are drawn with rich; anywhere else (a log file, a pod's
log collector, a notebook) the same facts are plain lines. Only the first process speaks. Text that
a model or a data file wrote is made harmless before it is shown: it can neither move the cursor nor
be read as markup.
"""

import json
import math
import sys
import time
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Self

from etils import epath
from rich import box, table
from rich.console import Console
from rich.panel import Panel as RichPanel
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from rlhf_jax import processes, writers
from rlhf_jax import workdir as workdir_lib

Cell = str | float

# rich looks up sys.stderr at each use, and one console for everything lets it print above a bar.
_CONSOLE = Console(stderr=True, markup=False, highlight=False, emoji=False)


def _on_terminal() -> bool:
  return sys.stderr.isatty() and not _CONSOLE.is_dumb_terminal


def _plain(line: str) -> None:
  # A notebook shows stderr as if something had gone wrong.
  print(line, file=sys.stdout if _CONSOLE.is_jupyter else sys.stderr, flush=True)


def note(text: str) -> None:
  """Writes a plain line to the terminal."""
  if processes.is_first():
    _plain(escape(text))


def escape(text: str, *, newlines: bool = False) -> str:
  r"""`text` with every character that a terminal might obey written as `\n`, `\x1b`, `\u202e`.

  Those are the control characters, the invisible ones that reorder or hide text, and halves of
  surrogate pairs.

  Args:
    text: Text from outside.
    newlines: True to keep line feeds.
  """

  def visible(char: str) -> str:
    if char == "\n" and newlines:
      return char
    # Cc control, Cf format (bidirectional overrides, zero width), Cs surrogate, Co private,
    # Zl and Zp line and paragraph separator.
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp"):
      return char.encode("unicode_escape", "surrogatepass").decode("ascii")
    return char

  return "".join(map(visible, text))


def human(n: float) -> str:
  """A count in three digits: 512, 1.05M, 8.03B."""
  if abs(n) < 1000:
    return f"{n:.3g}"
  for unit in ("K", "M", "B", "T"):
    n /= 1000
    if abs(n) < 999.5 or unit == "T":
      break
  decimals = max(0, 2 - math.floor(math.log10(max(abs(n), 1))))
  return f"{n:.{decimals}f}{unit}"


def human_bytes(n: float) -> str:
  """A size in binary units: 512 B, 1.50 KiB, 15.75 GiB."""
  if abs(n) < 1024:
    return f"{n:.0f} B"
  for unit in ("KiB", "MiB", "GiB", "TiB"):
    n /= 1024
    if abs(n) < 1023.995 or unit == "TiB":
      break
  return f"{n:.2f} {unit}"


def duration(seconds: float) -> str:
  """A time in its two largest units: 42s, 3m 05s, 2h 10m, 3d 04h."""
  if not math.isfinite(seconds):
    return "?"
  seconds = round(max(seconds, 0))
  if seconds < 60:
    return f"{seconds}s"
  if seconds < 3600:
    return f"{seconds // 60}m {seconds % 60:02d}s"
  if seconds < 86400:
    return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
  return f"{seconds // 86400}d {seconds % 86400 // 3600:02d}h"


def cell(value: Cell) -> str:
  """A cell of a table as text: made harmless, numbers in four digits."""
  if isinstance(value, str):
    return escape(value, newlines=True)
  if isinstance(value, int):
    return str(value)
  value = float(value)
  if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
    return f"{value:.3e}"
  return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3f}"


def start_panel(title: str, rows: Mapping[str, object]) -> None:
  """Shows what is about to run: model, parameters, mesh, tokens per step, memory."""
  if not processes.is_first():
    return
  if not _on_terminal():
    _plain(f"== {escape(title)} ==")
    for name, value in rows.items():
      _plain(f"  {escape(name)}: {escape(str(value))}")
    return
  grid = table.Table.grid(padding=(0, 2))
  grid.add_column(style="bold")
  grid.add_column(overflow="fold")
  for name, value in rows.items():
    grid.add_row(Text(escape(name)), Text(escape(str(value), newlines=True)))
  _CONSOLE.print(
    RichPanel(grid, title=Text(escape(title)), title_align="left", expand=False, box=box.ROUNDED)
  )


class Progress:
  """A progress bar on a terminal; elsewhere a plain line now and then.

  Use it as a context manager around the loop and call `update` after each step. The rate leaves
  out the first step, most of which is compilation.
  """

  # What a line has room for, most wanted first.
  SHOWN = ("loss", "reward/mean", "gold_reward/mean", "reward/accuracy", "kl/ref", "win_rate")
  MAX_SHOWN = 4
  # What a method that samples says of its rewards in any run. Others are behind what is shown: each
  # of several rewards, and violations of constraints.
  OF_ALL = tuple(f"reward/{name}" for name in ("mean", "nonfinite", "shaped", "std", "tokens"))

  def __init__(
    self,
    total: int,
    initial: int = 0,
    description: str = "train",
    *,
    every_seconds: float = 60.0,
    tenths: bool = True,
    clock=time.monotonic,
  ):
    """Prepares the bar; nothing is shown before `__enter__`.

    Args:
      total: Number of steps of the run.
      initial: Number of steps taken before, for a resumed run.
      description: Name of the bar.
      every_seconds: Longest time between two lines off a terminal; the first and the last step have
        a line too.
      tenths: True for a line at every tenth of the run.
      clock: Clock in seconds, replaced in tests.
    """
    self._total, self._step, self._description = total, initial, escape(description)
    self._every_seconds, self._tenths, self._clock = every_seconds, tenths, clock
    self._timed_from: tuple[int, float] | None = None
    self._last_line: tuple[int, float] | None = None
    self._bar: RichProgress | None = None
    self._task: Any = None

  def __enter__(self) -> Self:
    if processes.is_first() and _on_terminal():
      self._bar = RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24 if _CONSOLE.width >= 120 else 10),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
        TextColumn("{task.fields[rate]}", markup=False, style="cyan"),
        TextColumn("{task.fields[left]}", markup=False),
        TextColumn("{task.fields[shown]}", markup=False, style="green"),
        console=_CONSOLE,
        refresh_per_second=4,
      )
      self._task = self._bar.add_task(
        self._description, total=self._total, completed=self._step, rate="", left="", shown=""
      )
      self._bar.start()
    return self

  def __exit__(self, *exception: object) -> None:
    if self._bar is not None:
      self._bar.stop()
      self._bar = None

  def _rate(self, now: float) -> float:
    """Steps a second, 0 while unknown."""
    if self._timed_from is None:
      self._timed_from = (self._step, now)
    step, then = self._timed_from
    return (self._step - step) / (now - then) if self._step > step and now > then else 0.0

  def _due(self, now: float) -> bool:
    if self._last_line is None or self._step >= self._total:
      return True
    step, then = self._last_line
    tenth = 10 * self._step // self._total > 10 * step // self._total
    return (self._tenths and tenth) or now - then >= self._every_seconds

  def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
    """Shows that `step` steps have been taken, and a few of `metrics`."""
    if not processes.is_first():
      return
    metrics = metrics or {}
    now, self._step = self._clock(), step
    rate = self._rate(now)
    names = [name for name, x in metrics.items() if name.endswith("/nonfinite") and x > 0]
    names += [name for name in self.SHOWN if name in metrics][: self.MAX_SHOWN]
    if "reward/nonfinite" in metrics:
      of_reward = [name for name in metrics if name.startswith("reward/")]
      names += [name for name in of_reward if name not in self.OF_ALL][: self.MAX_SHOWN]
    values = [f"{name} {cell(float(metrics[name]))}" for name in names]
    per_second = ""
    left = ""
    if rate:
      per_second = f"{rate:.3g} steps/s" if rate >= 0.1 else f"{1 / rate:.3g} s/step"
      left = f"{duration((self._total - step) / rate)} left"
    if self._bar is not None:
      rate_shown, left_shown, shown = self._fitting(per_second, left, values)
      self._bar.update(self._task, completed=step, rate=rate_shown, left=left_shown, shown=shown)
    elif self._due(now):
      self._last_line = (step, now)
      percent = 100 * step // self._total if self._total else 100
      parts = [f"{self._description}: step {step}/{self._total} ({percent}%)", per_second, left]
      _plain("  ".join(part for part in [*parts, *values] if part))

  def _fitting(self, rate: str, left: str, values: Sequence[str]) -> tuple[str, str, str]:
    """Drops metrics, then the rate, then the time, so that the line fits on the terminal."""
    bar = 24 if _CONSOLE.width >= 120 else 10
    count = f"{self._step}/{self._total}"
    room = _CONSOLE.width - len(self._description) - bar - len(count) - len(rate) - len(left) - 5
    shown: list[str] = []
    for value in values:
      needed = len(value) + 2 * bool(shown)
      if needed > room:
        break
      shown.append(value)
      room -= needed
    if room < 0:
      room, rate = room + len(rate), ""
    return rate, left if room >= 0 else "", "  ".join(shown)


def show_samples(
  rows: Sequence[Mapping[str, Cell]], title: str = "Samples", limit: int = 4
) -> None:
  """Shows the first `limit` rows: one column per key, such as prompt, response, reward."""
  if not processes.is_first() or not rows:
    return
  rows = rows[:limit]
  columns = list(dict.fromkeys(name for row in rows for name in row))
  if not _on_terminal():
    _plain(f"== {escape(title)} ==")
    for i, row in enumerate(rows, start=1):
      for name in columns:
        if name in row:
          _plain(f"  [{i}] {escape(name)}: {cell(row[name])}".replace("\n", "\\n"))
    return
  out = table.Table(title=Text(escape(title)), box=box.ROUNDED, show_lines=True, title_style="bold")
  for name in columns:
    is_text = any(isinstance(row.get(name), str) for row in rows)
    out.add_column(
      Text(escape(name)),
      justify="left" if is_text else "right",
      no_wrap=not is_text,
      overflow="fold",
      ratio=None if not is_text else (1 if name == "prompt" else 2),
    )
  for row in rows:
    out.add_row(*[Text(cell(row[name])) if name in row else Text("–") for name in columns])
  _CONSOLE.print(out)


def show_pair(prompt: str, left: str, right: str, title: str, keys: Mapping[str, str]) -> None:
  """Shows two responses side by side, and the keys that answer the question which is better."""
  if not processes.is_first():
    return
  hint = "   ".join(f"[{key}] {meaning}" for key, meaning in keys.items())
  if not _on_terminal():
    _plain(f"== {escape(title)} ==")
    for name, text in (("request", prompt), ("a", left), ("b", right), ("keys", hint)):
      _plain(f"  {name}: {escape(text)}")
    return
  responses = table.Table.grid(expand=True, padding=(0, 1))
  responses.add_column(ratio=1)
  responses.add_column(ratio=1)
  responses.add_row(
    *(
      RichPanel(Text(escape(text, newlines=True)), title=name, title_align="left")
      for name, text in (("a", left), ("b", right))
    )
  )
  _CONSOLE.clear()
  _CONSOLE.print(
    RichPanel(Text(escape(prompt, newlines=True)), title=Text(escape(title)), title_align="left")
  )
  _CONSOLE.print(responses)
  _CONSOLE.print(Text(hint))


def save_samples(workdir: epath.PathLike, step: int, rows: Sequence[Mapping[str, Cell]]) -> None:
  """Writes all rows to `WORKDIR/samples/step_00000100.jsonl`; see `writers.write_table`."""
  if processes.is_first():
    writers.write_table(workdir, step, "samples", rows)


def write_summary(workdir: epath.PathLike, summary: Mapping[str, Any]) -> None:
  """Writes the final metrics to `WORKDIR/summary.json`, atomically.

  Keys are sorted and floats keep six digits, so that summaries can be compared line by line. All
  processes of a run call it.
  """

  def write() -> None:
    ready = writers.json_ready(summary, digits=6)
    text = json.dumps(ready, indent=2, sort_keys=True, allow_nan=False)
    workdir_lib.atomic_write(epath.Path(workdir) / "summary.json", text + "\n")

  processes.agree(write)


def show_summary(title: str, rows: Mapping[str, Mapping[str, Cell]]) -> None:
  """Shows the final table, for example `{"gold reward": {"SFT": 0.41, "PPO": 0.73}}`.

  Args:
    title: Heading.
    rows: Metric -> policy -> value; a policy without a value gets a dash.
  """
  if not processes.is_first():
    return
  policies = list(dict.fromkeys(name for row in rows.values() for name in row))
  cells = [
    [escape(metric), *[escape(cell(row[name])) if name in row else "–" for name in policies]]
    for metric, row in rows.items()
  ]
  header = ["", *map(escape, policies)]
  if not _on_terminal():
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    _plain(f"== {escape(title)} ==")
    for first, *rest in [header, *cells]:
      values = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
      _plain("  ".join(["", first.ljust(widths[0]), *values]).rstrip())
    return
  out = table.Table(title=Text(escape(title)), box=box.ROUNDED, title_style="bold")
  out.add_column("")
  for name in policies:
    out.add_column(Text(escape(name)), justify="right")
  for row in cells:
    out.add_row(*map(Text, row))
  _CONSOLE.print(out)
