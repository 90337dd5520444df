import io
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import reporting
from rlhf_jax import workdir as workdir_lib

# Clears the screen, rings, hides text, turns it around: what a model may have learnt to write.
HOSTILE = "a\x1b[2Jb\x07c\u202ed\u200be\x9bf\ud800 [red]bold[/red] :smile:\r\nnext"


@pytest.fixture
def terminal(monkeypatch):
  """Output on a terminal of 100 columns, without colours and cursor movements."""
  stream = io.StringIO()
  console = reporting.Console(
    file=stream,
    width=100,
    force_terminal=True,
    color_system=None,
    markup=False,
    highlight=False,
    emoji=False,
  )
  monkeypatch.setattr(reporting, "_CONSOLE", console)
  monkeypatch.setattr(reporting, "_on_terminal", lambda: True)
  return stream


def test_a_real_terminal_gets_bars_and_boxes():
  pty = pytest.importorskip("pty")
  code = (
    "from rlhf_jax import reporting\n"
    "reporting.start_panel('PPO', {'model': '[red]tiny'})\n"
    "with reporting.Progress(3, description='[red]ppo') as progress:\n"
    "  for step in range(1, 4): progress.update(step, {'loss': 0.25})\n"
    "  reporting.show_samples([{'prompt': 'a\\x1b[2Jb'}])\n"
  )
  ours, theirs = pty.openpty()
  env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
  process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=env)
  os.close(theirs)
  shown = b""
  try:
    while chunk := os.read(ours, 65536):
      shown += chunk
  except OSError:  # Linux reports the end of a terminal as an input/output error.
    pass
  os.close(ours)
  assert process.wait() == 0
  text = shown.decode()
  assert (
    "╭" in text and "[red]tiny" in text and "[red]ppo" in text and "━" in text and "3/3" in text
  )
  assert r"a\x1b[2Jb" in text and "\x1b[2J" not in text


@pytest.mark.parametrize(
  "n, text",
  [
    (0, "0"),
    (512, "512"),
    (999, "999"),
    (1234, "1.23K"),
    (999_499, "999K"),
    (999_999, "1.00M"),
    (1_050_000, "1.05M"),
    (134_515_008, "135M"),
    (8.03e9, "8.03B"),
    (2.5e15, "2500T"),
    (-1500, "-1.50K"),
  ],
)
def test_human(n, text):
  assert reporting.human(n) == text


@pytest.mark.parametrize(
  "n, text",
  [
    (0, "0 B"),
    (1023, "1023 B"),
    (1536, "1.50 KiB"),
    (2**20 - 1, "1.00 MiB"),
    (15.75 * 2**30, "15.75 GiB"),
    (2**52, "4096.00 TiB"),
  ],
)
def test_human_bytes(n, text):
  assert reporting.human_bytes(n) == text


@pytest.mark.parametrize(
  "seconds, text",
  [
    (0.4, "0s"),
    (59.6, "1m 00s"),
    (185, "3m 05s"),
    (7800, "2h 10m"),
    (273600, "3d 04h"),
    (math.inf, "?"),
  ],
)
def test_duration(seconds, text):
  assert reporting.duration(seconds) == text


def test_escape_leaves_nothing_that_a_terminal_obeys():
  text = reporting.escape(HOSTILE)
  assert text == (r"a\x1b[2Jb\x07c\u202ed\u200be\x9bf\ud800 [red]bold[/red] :smile:\r\nnext")
  assert reporting.escape("a\nb\t", newlines=True) == "a\nb\\t"
  assert reporting.escape("Größe, 漢字, 🙂") == "Größe, 漢字, 🙂"


def test_start_panel_in_a_log_is_plain_lines(capsys):
  reporting.start_panel("PPO", {"model": "tiny [1.05M]", "mesh": "4 x 2", "tokens": 4096})
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err == "== PPO ==\n  model: tiny [1.05M]\n  mesh: 4 x 2\n  tokens: 4096\n"


def test_start_panel_on_a_terminal_is_a_box(terminal):
  reporting.start_panel("PPO [bold]", {"model": "tiny [red]1.05M[/red]"})
  text = terminal.getvalue()
  assert "PPO [bold]" in text and "tiny [red]1.05M[/red]" in text and "╭" in text


def test_samples_in_a_log_are_harmless_and_whole(capsys):
  rows = [{"prompt": "p" * 300, "response": HOSTILE, "reward": 0.25}, {"prompt": "second"}]
  reporting.show_samples(rows, title="step 10")
  text = capsys.readouterr().err
  assert text.isprintable() or all(c == "\n" or c.isprintable() for c in text)
  lines = text.splitlines()
  assert lines[0] == "== step 10 =="
  assert lines[1] == "  [1] prompt: " + "p" * 300
  assert r"\x1b[2J" in lines[2] and "[red]bold[/red] :smile:" in lines[2] and r"\nnext" in lines[2]
  assert lines[3:] == ["  [1] reward: 0.250", "  [2] prompt: second"]


def test_samples_on_a_terminal_are_harmless(terminal):
  rows = [{"prompt": "say\nhi", "response": HOSTILE, "reward": -1.5}, {"prompt": "second"}]
  reporting.show_samples(rows, title="[blink]step 10")
  text = terminal.getvalue()
  assert all(c == "\n" or c.isprintable() for c in text)
  assert "[blink]step 10" in text and "[red]bold[/red]" in text and "-1.500" in text


def test_samples_limit(capsys):
  reporting.show_samples([{"prompt": str(i)} for i in range(9)], limit=2)
  assert len(capsys.readouterr().err.splitlines()) == 3
  reporting.show_samples([])
  assert capsys.readouterr().err == ""


def test_save_samples(tmp_path):
  rows = [{"prompt": "p", "response": HOSTILE, "reward": jnp.float32(0.1)}, {"reward": math.nan}]
  reporting.save_samples(tmp_path, 100, rows)
  path = tmp_path / "samples" / "step_00000100.jsonl"
  assert all(c == "\n" or " " <= c <= "~" for c in path.read_text())
  first, second = map(json.loads, path.read_text().splitlines())
  assert first["response"] == HOSTILE and first["reward"] == np.float32(0.1)
  assert second == {"reward": "NaN"}


def _run(progress, now, steps, seconds_per_step, **scalars):
  with progress:
    for step in steps:
      now[0] += seconds_per_step
      progress.update(step, scalars)


def test_progress_in_a_log_has_a_line_every_tenth(capsys):
  now = [0.0]
  progress = reporting.Progress(1000, description="ppo", clock=lambda: now[0])
  _run(progress, now, range(1, 1001), 0.01, **{"loss": 0.5, "kl/ref": 1.0, "time/x": 3.0})
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 11  # The first step and ten tenths.
  assert lines[0] == "ppo: step 1/1000 (0%)  loss 0.500  kl/ref 1.000"
  assert lines[5] == "ppo: step 500/1000 (50%)  100 steps/s  5s left  loss 0.500  kl/ref 1.000"
  assert lines[-1].startswith("ppo: step 1000/1000 (100%)  100 steps/s  0s left")


def test_progress_of_slow_steps_has_a_line_a_minute(capsys):
  now = [0.0]
  progress = reporting.Progress(10_000, clock=lambda: now[0])
  _run(progress, now, range(1, 31), 20.0)
  lines = capsys.readouterr().err.splitlines()
  assert [line.split()[2] for line in lines] == [f"{n}/10000" for n in range(1, 31, 3)]
  assert "20 s/step" in lines[-1] and "2d 07h left" in lines[-1]


def test_progress_of_a_short_pass_has_its_first_and_last_line(capsys):
  now = [0.0]
  progress = reporting.Progress(50, description="reference", tenths=False, clock=lambda: now[0])
  _run(progress, now, range(1, 51), 0.1)
  lines = capsys.readouterr().err.splitlines()
  assert [line.split()[2] for line in lines] == ["1/50", "50/50"]


def test_progress_of_a_resumed_run_times_only_its_own_steps(capsys):
  now = [0.0]
  progress = reporting.Progress(100, initial=90, clock=lambda: now[0])
  _run(progress, now, range(91, 101), 1.0)
  assert "1 steps/s" in capsys.readouterr().err.splitlines()[-1]


def test_progress_on_a_terminal_is_a_bar(terminal):
  now = [0.0]
  progress = reporting.Progress(4, description="dpo [red]", clock=lambda: now[0])
  _run(progress, now, range(1, 5), 1.0, loss=0.25)
  text = terminal.getvalue()
  assert "dpo [red]" in text and "4/4" in text and "loss 0.250" in text and "━" in text


PPO = {
  "loss": -0.0123,
  "reward/mean": 1.234,
  "gold_reward/mean": 0.987,
  "reward/accuracy": 0.5,
  "kl/ref": 12.345,
}


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
@pytest.mark.parametrize("title, total", [("ppo", 45), ("reference, held out", 12_500)])
def test_progress_fits_on_the_terminal(title, total, width, monkeypatch):
  stream = io.StringIO()
  console = reporting.Console(file=stream, force_terminal=True, width=width, color_system=None)
  monkeypatch.setattr(reporting, "_CONSOLE", console)
  monkeypatch.setattr(reporting, "_on_terminal", lambda: True)
  now = [0.0]
  with reporting.Progress(total, description=title, clock=lambda: now[0]) as progress:
    for step in range(1, 4):
      now[0] += 100.0
      progress.update(step, PPO)
  last = [line for line in re.split(r"[\r\n]+", stream.getvalue()) if title in line][-1]
  last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", last)
  assert len(last.rstrip()) <= width
  assert last.startswith(f"{title} ") and f" 3/{total} " in f"{last} "
  assert "…" not in last
  values = [name for name in PPO if f"{name} {reporting.cell(PPO[name])}" in last]
  assert values == list(PPO)[: len(values)]  # The most wanted first, and whole.
  if width >= 80 and title == "ppo":
    assert "100 s/step" in last and "1h 10m left" in last and values


@pytest.mark.parametrize("bad, shown", [(0, False), (3, True)])
def test_progress_shows_scores_that_are_no_number_first(bad, shown, capsys):
  metrics = {"loss": 0.5, "reward/mean": 1.0, "kl/ref": 2.0, "reward/nonfinite": float(bad)}
  with reporting.Progress(2) as progress:
    progress.update(1, metrics)
  line = capsys.readouterr().err
  assert ("reward/nonfinite 3.000  loss 0.500" in line) == shown
  assert ("nonfinite" in line) == shown and "kl/ref 2.000" in line


@pytest.mark.parametrize("sampled", [True, False])
def test_progress_shows_each_of_several_rewards_behind_their_sum(sampled, capsys):
  metrics = {"loss": 0.5, "reward/mean": 1.0, "reward/std": 2.0, "reward/shaped": 3.0}
  metrics |= {"reward/rm": 4.0, "reward/my:rule": -1.0, "reward/violations": 0.25}
  with reporting.Progress(2) as progress:
    progress.update(1, metrics | ({"reward/nonfinite": 0.0} if sampled else {}))
  line = capsys.readouterr().err
  named = "reward/rm 4.000  reward/my:rule -1.000  reward/violations 0.250"
  assert (f"loss 0.500  reward/mean 1.000  {named}" in line) == sampled
  assert "std" not in line and "shaped" not in line and ("reward/rm" in line) == sampled


def test_progress_of_an_empty_run(capsys):
  with reporting.Progress(0) as progress:
    progress.update(0)
  assert "step 0/0 (100%)" in capsys.readouterr().err


def test_summary_file(tmp_path):
  reporting.write_summary(
    tmp_path,
    {
      "win_rate": 0.123456789,
      "steps": np.int64(100),
      "ok": True,
      "loss": jnp.float32(jnp.nan),
      "curve": np.asarray([0.5, 1 / 3]),
      "PPO": {"reward": 1e-9 / 3, "name": "x"},
      "none": None,
    },
  )
  text = (tmp_path / "summary.json").read_text()
  assert json.loads(text) == {
    "win_rate": 0.123457,
    "steps": 100,
    "ok": True,
    "loss": "NaN",
    "curve": [0.5, 0.333333],
    "PPO": {"reward": 3.33333e-10, "name": "x"},
    "none": None,
  }
  assert list(json.loads(text)) == sorted(json.loads(text)) and text.endswith("}\n")


def test_summary_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  reporting.write_summary(tmp_path, {"a": 1})
  with pytest.raises(TypeError):
    reporting.write_summary(tmp_path, {"a": object()})

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(workdir_lib.os, "replace", fail)
  with pytest.raises(OSError, match="disk full"):
    reporting.write_summary(tmp_path, {"a": 2})
  assert json.loads((tmp_path / "summary.json").read_text()) == {"a": 1}
  assert len(list(tmp_path.iterdir())) == 1


SUMMARY = {"gold reward": {"SFT": 0.41, "PPO": 0.734}, "KL (nats)": {"PPO": 12.0}, "n": {"SFT": 64}}


def test_summary_in_a_log_is_aligned(capsys):
  reporting.show_summary("Result", SUMMARY)
  assert capsys.readouterr().err.splitlines() == [
    "== Result ==",
    "                 SFT     PPO",
    "  gold reward  0.410   0.734",
    "  KL (nats)        –  12.000",
    "  n               64       –",
  ]


def test_summary_on_a_terminal_is_a_table(terminal):
  reporting.show_summary("Result", SUMMARY)
  text = terminal.getvalue()
  assert "gold reward" in text and "0.734" in text and "╭" in text


def test_only_the_first_process_speaks(capsys, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(reporting.processes, "agree", lambda function: None)
  reporting.start_panel("PPO", {"a": "b"})
  reporting.show_samples([{"prompt": "p"}])
  reporting.save_samples(tmp_path, 1, [{"prompt": "p"}])
  reporting.write_summary(tmp_path, {"a": 1})
  reporting.show_summary("Result", SUMMARY)
  with reporting.Progress(1) as progress:
    progress.update(1, {"loss": 1.0})
  assert capsys.readouterr().err == "" and not list(tmp_path.iterdir())
