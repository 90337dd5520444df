import io
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from rlhf_jax import metrics, reporting

# Clears the screen, rings, hides text, turns it around: what a model may have learnt to write.
HOSTILE = "a\x1b[2Jb\x07c\u202ed\u200be\x9bf\ud800 [red]bold[/red] :smile:\r\nnext"


@pytest.fixture
def terminal(monkeypatch):
  """What is shown on a terminal of 100 columns, without colours and cursor movements."""
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

  monkeypatch.setattr(metrics.os, "replace", fail)
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
  reporting.start_panel("PPO", {"a": "b"})
  reporting.show_samples([{"prompt": "p"}])
  reporting.save_samples(tmp_path, 1, [{"prompt": "p"}])
  reporting.write_summary(tmp_path, {"a": 1})
  reporting.show_summary("Result", SUMMARY)
  with reporting.Progress(1) as progress:
    progress.update(1, {"loss": 1.0})
  assert capsys.readouterr().err == "" and not list(tmp_path.iterdir())


@pytest.fixture
def workdir(tmp_path):
  writer = metrics.make_writer(tmp_path)
  for step in range(1, 101):
    writer.write(step, {"loss": math.nan if step == 7 else 1 / step, "kl/ref": step / 10})
    writer.write(step, {"reward/mean": step / 100})  # Same step, a line of its own.
    if step % 10 == 0:
      writer.write(step, {"gold_reward/mean": 1 - (step - 50) ** 2 / 2500})
  writer.write(101, {"win_rate": 0.5})  # A single point is no curve.
  writer.close()
  return tmp_path


def test_plots_of_what_the_run_has(workdir):
  written = reporting.plot_metrics(workdir)
  names = {path.stem for path in written}
  assert names == {"loss", "reward", "kl", "gold_vs_proxy"}
  assert {path.name for path in (workdir / "plots").iterdir()} == {f"{n}.png" for n in names}
  for path in written:
    image = matplotlib.image.imread(path)[..., :3]  # [height, width, RGB] in [0, 1]
    assert image.shape == (600, 960, 3)
    coloured = np.ptp(image, axis=-1) > 0.2
    assert 0.001 < coloured.mean() < 0.5  # Lines are there, and mostly background.


def test_plots_are_the_same_bytes_again(workdir):
  rows = metrics.read_metrics(workdir / "metrics.jsonl")
  render = lambda: reporting.render_panel(reporting.PANELS["reward"], {"a": rows})  # noqa: E731
  assert render() == render()


def test_panels_of_several_runs(workdir):
  rows = metrics.read_metrics(workdir / "metrics.jsonl")
  runs = {"ppo": rows, "$x_{": rows[:50], "empty": []}  # `$` would start a formula.
  written = reporting.save_panels(runs, workdir / "both", {"r": reporting.PANELS["reward"]})
  assert [path.name for path in written] == ["r.png"]


def test_panel_names_are_file_names(workdir):
  with pytest.raises(ValueError, match="plain file name"):
    reporting.plot_metrics(workdir, {"../x": reporting.PANELS["loss"]})


def test_points_join_rows_of_a_step_and_skip_what_is_not_finite():
  rows = [
    {"step": 2, "x": 1.0},
    {"step": 2, "y": 10.0},
    {"step": 1, "x": 3.0, "y": 30.0},
    {"step": 3, "x": 2.0, "y": math.inf},
    {"step": 4, "x": 2.0},
  ]
  np.testing.assert_array_equal(reporting._points(rows, "x", "y"), [[1.0, 10.0], [3.0, 30.0]])
  assert reporting._points(rows, "x", "z").shape == (0, 2)


def test_smoothing_is_centred_and_keeps_lines_and_means():
  line = np.arange(200.0)
  np.testing.assert_allclose(reporting._smooth(line)[5:-5], line[5:-5])
  np.testing.assert_allclose(reporting._smooth(np.full(200, 3.0)), 3.0)
  noise = np.random.default_rng(0).normal(size=400)
  assert reporting._smooth(noise).std() < 0.4 and len(reporting._smooth(noise[:3])) == 3


def _rows(x, y):
  pairs = zip(x, y, strict=True)
  return [{"step": i, "x": float(a), "y": float(b)} for i, (a, b) in enumerate(pairs)]


def test_mean_line_is_the_mean_in_a_band_over_seeds():
  step = np.arange(30.0)
  runs = [_rows(step, 2 * step + shift) for shift in (-1.0, 0.0, 4.0)]
  line = reporting.mean_line("a", runs, "x", "y", peak="top")
  assert line.label == "a" and line.peak == "top" and len(line.x) == 10
  np.testing.assert_allclose(line.x, step.reshape(10, 3).mean(1))
  np.testing.assert_allclose(line.y, 2 * line.x + 1)
  np.testing.assert_allclose([line.low, line.high], [2 * line.x - 1, 2 * line.x + 4])
  alone = reporting.mean_line("a", runs[:1], "x", "y")
  assert alone.low is None and alone.high is None


def test_mean_line_ends_with_the_first_run():
  long, short = np.linspace(0, 16, 48), np.linspace(0, 8.9, 48)
  line = reporting.mean_line("a", [_rows(long, long), _rows(short, short)], "x", "y", root_x=True)
  # Sixteen intervals of a quarter in the square root; the short run reaches into the twelfth.
  assert 10 <= len(line.x) <= 12 and np.all(np.diff(line.x) > 0) and line.x[-1] < 9
  np.testing.assert_allclose(line.x, line.y)
  # Negative estimates of a KL near 0 fall into the first interval.
  assert reporting.mean_line("a", [_rows([-0.1, 0.0, 1.0], [0, 0, 1])], "x", "y", root_x=True)


def test_mean_line_needs_two_points_of_every_run():
  full, single = _rows([0, 1], [0, 1]), _rows([0], [0])
  assert reporting.mean_line("a", [full, single], "x", "y") is None
  assert reporting.mean_line("a", [full, full], "x", "z") is None


CHART = reporting.Chart(
  "Gold [reward]",
  "KL",
  "Reward",
  lines=[
    reporting.Line("$x_{", np.array([0.0, 1.0, 4.0, 9.0]), np.array([0.0, 1.0, 2.0, 1.0])),
    reporting.Line(
      "band",
      np.array([0.0, 2.0]),
      np.array([0.0, 1.0]),
      np.array([-1.0, 0.0]),
      np.array([1.0, 2.0]),
      peak="peak {y:.1f} at {x:.1f}",
    ),
  ],
  points=[
    reporting.Point("sft\x1b[2J", -0.01, 0.5),
    reporting.Point("ppo", 5.0, 1.5, (4.0, 6.0), (1.2, 1.8)),
    reporting.Point("ppo again", 5.05, 1.51, None, (1.2, 1.8)),
  ],
  root_x=True,
)


def test_charts_are_two_in_a_row(tmp_path):
  path = reporting.save_chart(tmp_path / "plots" / "a.png", CHART, CHART._replace(root_x=False))
  image = matplotlib.image.imread(path)[..., :3]
  assert image.shape == (600, 1920, 3)
  assert 0.001 < (np.ptp(image, axis=-1) > 0.2).mean() < 0.5
  assert path.read_bytes() == reporting.render_charts([CHART, CHART._replace(root_x=False)])
  three = matplotlib.image.imread(io.BytesIO(reporting.render_charts([CHART] * 3)))
  assert three.shape[:2] == (1200, 1920) and np.all(three[700:, 1000:, :3] == 1)


def test_labels_cover_neither_each_other_nor_a_point():
  figure = matplotlib.figure.Figure(figsize=(6.4, 4.0), layout="tight")
  matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  points = [(x, y) for x in (0.0, 5.0, 5.1, 5.2) for y in (1.0, 1.04)]
  for x, y in points:
    axes.plot(x, y, "o")
  labels = [reporting._Label(x, y, f"policy {i}", "black") for i, (x, y) in enumerate(points)]
  reporting._write_labels(axes, labels)
  assert [text.get_text() for text in axes.texts] == [label.text for label in labels]
  boxes = [text.get_window_extent() for text in axes.texts]
  centres = axes.transData.transform(points)
  for i, box in enumerate(boxes):
    assert not any(box.overlaps(other) for other in boxes[:i])
    assert not any(box.contains(*centre) for centre in centres)


def test_a_matrix_of_win_rates():
  def mean_colour(share):
    rates = {"a": {"b": share}, "b": {"a": 1 - share}}
    png = reporting.render_matrix("Win rates", rates)
    return matplotlib.image.imread(io.BytesIO(png))[..., :3].mean()

  even, clear = mean_colour(0.5), mean_colour(1.0)
  assert clear < even  # The stronger the preference, the stronger the colour.
