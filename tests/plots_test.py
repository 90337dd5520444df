import io
import math

import matplotlib.axes
import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from rlhf_jax import plots, writers


@pytest.fixture
def workdir(tmp_path):
  writer = writers.make_writer(tmp_path)
  for step in range(1, 101):
    writer.write(step, {"loss": math.nan if step == 7 else 1 / step, "kl/ref": step / 10})
    writer.write(step, {"reward/mean": step / 100})  # Same step, a line of its own.
    if step % 10 == 0:
      writer.write(step, {"gold_reward/mean": 1 - (step - 50) ** 2 / 2500})
  writer.write(101, {"win_rate": 0.5})  # A single point is no curve.
  writer.close()
  return tmp_path


def test_plots_of_what_the_run_has(workdir):
  written = plots.plot_metrics(workdir)
  names = {path.stem for path in written}
  assert names == {"loss", "reward", "kl", "gold_vs_proxy"}
  assert {path.name for path in (workdir / "plots").iterdir()} == {f"{n}.png" for n in names}
  for path in written:
    image = matplotlib.image.imread(path)[..., :3]  # [height, width, RGB] in [0, 1]
    assert image.shape == (600, 960, 3)
    coloured = np.ptp(image, axis=-1) > 0.2
    assert 0.001 < coloured.mean() < 0.5  # Lines are there, and mostly background.


def test_plots_are_the_same_bytes_again(workdir):
  rows = writers.read_metrics(workdir / "metrics.jsonl")
  render = lambda: plots.render_panel(plots.PANELS["reward"], {"a": rows})  # noqa: E731
  assert render() == render()


def test_panels_of_several_runs(workdir):
  rows = writers.read_metrics(workdir / "metrics.jsonl")
  runs = {"ppo": rows, "$x_{": rows[:50], "empty": []}  # `$` would start a formula.
  written = plots.save_panels(runs, workdir / "both", {"r": plots.PANELS["reward"]})
  assert [path.name for path in written] == ["r.png"]


def test_panel_names_are_file_names(workdir):
  with pytest.raises(ValueError, match="plain file name"):
    plots.plot_metrics(workdir, {"../x": plots.PANELS["loss"]})


def test_points_join_rows_of_a_step_and_skip_what_is_not_finite():
  rows = [
    {"step": 2, "x": 1.0},
    {"step": 2, "y": 10.0},
    {"step": 1, "x": 3.0, "y": 30.0},
    {"step": 3, "x": 2.0, "y": math.inf},
    {"step": 4, "x": 2.0},
  ]
  np.testing.assert_array_equal(plots._points(rows, "x", "y"), [[1.0, 10.0], [3.0, 30.0]])
  assert plots._points(rows, "x", "z").shape == (0, 2)


def test_smoothing_is_centred_and_keeps_lines_and_means():
  line = np.arange(200.0)
  np.testing.assert_allclose(plots._smooth(line)[5:-5], line[5:-5])
  np.testing.assert_allclose(plots._smooth(np.full(200, 3.0)), 3.0)
  noise = np.random.default_rng(0).normal(size=400)
  assert plots._smooth(noise).std() < 0.4 and len(plots._smooth(noise[:3])) == 3


def _rows(x, y):
  pairs = zip(x, y, strict=True)
  return [{"step": i, "x": float(a), "y": float(b)} for i, (a, b) in enumerate(pairs)]


def test_mean_line_is_the_mean_in_a_band_over_seeds():
  step = np.arange(30.0)
  runs = [_rows(step, 2 * step + shift) for shift in (-1.0, 0.0, 4.0)]
  line = plots.mean_line("a", runs, "x", "y", peak="top")
  assert line.label == "a" and line.peak == "top" and len(line.x) == 10
  np.testing.assert_allclose(line.x, step.reshape(10, 3).mean(1))
  np.testing.assert_allclose(line.y, 2 * line.x + 1)
  np.testing.assert_allclose([line.low, line.high], [2 * line.x - 1, 2 * line.x + 4])
  alone = plots.mean_line("a", runs[:1], "x", "y")
  assert alone.low is None and alone.high is None


def test_mean_line_ends_with_the_first_run():
  long, short = np.linspace(0, 16, 48), np.linspace(0, 8.9, 48)
  line = plots.mean_line("a", [_rows(long, long), _rows(short, short)], "x", "y", root_x=True)
  # Sixteen intervals of a quarter in the square root; the short run reaches into the twelfth.
  assert 10 <= len(line.x) <= 12 and np.all(np.diff(line.x) > 0) and line.x[-1] < 9
  np.testing.assert_allclose(line.x, line.y)
  # Negative estimates of a KL near 0 fall into the first interval.
  assert plots.mean_line("a", [_rows([-0.1, 0.0, 1.0], [0, 0, 1])], "x", "y", root_x=True)


def test_mean_line_needs_two_points_of_every_run():
  full, single = _rows([0, 1], [0, 1]), _rows([0], [0])
  assert plots.mean_line("a", [full, single], "x", "y") is None
  assert plots.mean_line("a", [full, full], "x", "z") is None


CHART = plots.Chart(
  "Gold [reward]",
  "KL",
  "Reward",
  lines=[
    plots.Line("$x_{", np.array([0.0, 1.0, 4.0, 9.0]), np.array([0.0, 1.0, 2.0, 1.0])),
    plots.Line(
      "band",
      np.array([0.0, 2.0]),
      np.array([0.0, 1.0]),
      np.array([-1.0, 0.0]),
      np.array([1.0, 2.0]),
      peak="peak {y:.1f} at {x:.1f}",
    ),
  ],
  points=[
    plots.Point("sft\x1b[2J", -0.01, 0.5),
    plots.Point("ppo", 5.0, 1.5, (4.0, 6.0), (1.2, 1.8)),
    plots.Point("ppo again", 5.05, 1.51, None, (1.2, 1.8)),
  ],
  root_x=True,
)


def test_mean_line_needs_an_interval_of_every_run():
  runs = [_rows(of, of) for of in ((0.5, 4.0), (1.5, 6.0))]
  assert plots.mean_line("far apart", runs, "x", "y", root_x=True) is None


def test_charts_are_two_in_a_row(tmp_path):
  path = plots.save_chart(tmp_path / "plots" / "a.png", CHART, CHART._replace(root_x=False))
  image = matplotlib.image.imread(path)[..., :3]
  assert image.shape == (600, 1920, 3)
  assert 0.001 < (np.ptp(image, axis=-1) > 0.2).mean() < 0.5
  assert path.read_bytes() == plots.render_charts([CHART, CHART._replace(root_x=False)])
  three = matplotlib.image.imread(io.BytesIO(plots.render_charts([CHART] * 3)))
  assert three.shape[:2] == (1200, 1920) and np.all(three[700:, 1000:, :3] == 1)


def test_labels_cover_neither_each_other_nor_a_point():
  figure = matplotlib.figure.Figure(figsize=(6.4, 4.0), layout="tight")
  matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  points = [(x, y) for x in (0.0, 5.0, 5.1, 5.2) for y in (1.0, 1.04)]
  for x, y in points:
    axes.plot(x, y, "o")
  labels = [plots._Label(x, y, f"policy {i}", "black") for i, (x, y) in enumerate(points)]
  plots._write_labels(axes, labels)
  assert [text.get_text() for text in axes.texts] == [label.text for label in labels]
  boxes = [text.get_window_extent() for text in axes.texts]
  centres = axes.transData.transform(points)
  for i, box in enumerate(boxes):
    assert not any(box.overlaps(other) for other in boxes[:i])
    assert not any(box.contains(*centre) for centre in centres)


def test_a_matrix_of_win_rates():
  def mean_colour(share):
    rates = {"a": {"b": share}, "b": {"a": 1 - share}}
    png = plots.render_matrix("Win rates", rates)
    return matplotlib.image.imread(io.BytesIO(png))[..., :3].mean()

  even, clear = mean_colour(0.5), mean_colour(1.0)
  assert clear < even  # The stronger the preference, the stronger the colour.


def test_panels_say_which_rows_they_are_of():
  for name, panel in plots.PANELS.items():
    labels = panel.labels or (panel.title,) * len(panel.metrics)
    for metric, label in zip(panel.metrics, labels, strict=True):
      heldout = "held-out" in f"{panel.title} {label}".lower()
      assert heldout == metric.startswith("eval/"), name


def test_a_line_of_a_panel_of_several_keeps_its_label(workdir, monkeypatch):
  shown = []
  legend = matplotlib.axes.Axes.legend
  monkeypatch.setattr(
    matplotlib.axes.Axes, "legend", lambda axes, **k: shown.append(legend(axes, **k)) or shown[-1]
  )
  rows = writers.read_metrics(workdir / "metrics.jsonl")
  assert plots.render_panel(plots.PANELS["loss"], {"a": rows}) is not None
  assert [text.get_text() for text in shown[0].get_texts()] == ["Training batches"]
