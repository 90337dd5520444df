"""The HTML report: what is in it, and that nothing from outside gets out of its text."""

import html.parser
import json
import re

import numpy as np
import pytest

from experiments import plot
from experiments.lab import charts as run_charts
from experiments.records import report
from rlhf_jax import flags, plots, writers

ATTACK = "<script>alert(1)</script><img src='http://example.org/x'>\"&{{ 7 * 7 }}\u202e"


class Page(html.parser.HTMLParser):
  """Tags, their attributes, and the text of a page."""

  def __init__(self, text: str):
    super().__init__()
    self.source = text
    self.tags: list[tuple[str, dict]] = []
    self.open: list[str] = []
    self.texts: list[str] = []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in ("meta", "img", "source"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != "style":
      self.texts.append(data)

  @property
  def text(self) -> str:
    return " ".join(" ".join(self.texts).split())


def write_run(folder, *, lr=0.1, seed=0, responses=(), init_from=""):
  writer = writers.make_writer(folder)
  for step in range(1, 5):
    writer.write(step, {"loss": 1 / step + lr, "kl/ref": step, "reward/mean": step + seed})
  rows = [{"prompt": p, "response": r, "gold": 1.5} for p, r in responses]
  writer.table(4, "samples", rows)
  writer.close()
  settings = {"--seed": seed, "--optim.lr": lr, "--steps": 4, "--init_from": init_from}
  identity = {"script": "ppo", **settings, "data": "d1g35t"}
  (folder / "identity.json").write_text(json.dumps(identity))
  (folder / "summary.json").write_text(json.dumps({"gold/mean": 2.0 + seed, "note": ATTACK}))
  return str(folder)


def write_evaluation(folder, names):
  figures = {"kl": 2.0, "kl_low": 1.5, "kl_high": 2.5}
  summary = dict.fromkeys(names, figures)
  summary["preference/win_rates"] = {
    a: {b: {"value": 0.75 if a < b else 0.25, "low": 0.2, "high": 0.8} for b in names if b != a}
    for a in names
  }
  folder.mkdir()
  (folder / "summary.json").write_text(json.dumps(summary))
  for step, name in enumerate(names):
    rows = [{"policy": name, "prompt": "p", "response": f"answer of {name}", "gold": 1.0}]
    writers.write_table(folder, step, "samples", rows)
  return folder


@pytest.fixture(scope="module")
def charts():
  return {"loss": [plots.Chart("Loss", "Step", "Loss", [plots.Line("a", *np.eye(2))])]}


@pytest.fixture
def page_of(charts):
  """The page of runs, with one chart in place of theirs: those take time."""

  def make(*runs, evaluation=None):
    folders = run_charts.group_runs(runs)
    ends = {label: {"loss": 0.5} for label in folders}
    return Page(report.render(report.Comparison(folders, charts, ends, evaluation)))

  return make


def test_a_report_of_two_settings(tmp_path, page_of):
  start = write_run(tmp_path / "start")
  low = write_run(tmp_path / "low", responses=[("q1", "a low"), ("q2", "b")], init_from=start)
  more = write_run(tmp_path / "low_1", seed=1, init_from=start)
  high = write_run(tmp_path / "high", lr=0.5, responses=[("q2", "c high")])
  page = page_of(f"low={low}", more, f"high={high}")
  assert "3 runs" in page.text
  assert "optim.lr 0.1 0.5" in page.text and "seed 0, 1 0" in page.text
  assert "steps" not in page.text.partition("Settings that differ")[2].partition("Samples")[0]
  assert "gold/mean 2.5 (2 to 3) 2" in page.text  # The mean of two seeds, and one.
  samples = page.text.partition("Answers to the same held-out prompts.")[2]
  assert samples.index("q2 low b") < samples.index("q1 low a low")  # Both have answered q2.
  assert "high c high" in samples and "gold 1.500" in samples
  lineage = page.text.partition("What each run builds on")[2]
  assert lineage.count(f"started from {start} by ppo") == 2 and "d1g35t" in lineage


def test_it_needs_no_network_and_no_script(tmp_path, page_of):
  page = page_of(write_run(tmp_path / "a", responses=[("p", "r")]))
  tags = {tag for tag, _ in page.tags}
  assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
  images = [of for tag, of in page.tags if tag in ("img", "source")]
  assert len(images) == 1
  assert all(
    value.startswith("data:image/png;base64,")
    for of in images
    for k, value in of.items()
    if k in ("src", "srcset")
  )
  links = [of["href"] for tag, of in page.tags if tag == "a"]
  assert links and all(link.startswith("#") for link in links)
  assert {link[1:] for link in links} <= {of["id"] for _, of in page.tags if "id" in of}
  assert not re.search(r"https?:|url\(|@import", page.source)


def test_text_from_outside_stays_text(tmp_path, page_of):
  harmless = write_run(tmp_path / "a", responses=[("p", "r")])
  runs = tmp_path / "b"
  write_run(runs, responses=[(ATTACK, ATTACK)], init_from=ATTACK)
  evil, fine = page_of(f"{ATTACK.replace('=', ':')}={runs}"), page_of(f"fine={harmless}")
  kept = [[(tag, sorted(of)) for tag, of in page.tags] for page in (evil, fine)]
  lineage = kept[0].index(("h2", ["id"]), kept[0].index(("article", ["class"])))
  assert kept[0][:lineage] == kept[1][:lineage]
  assert {tag for tag, _ in evil.tags} <= {tag for tag, _ in fine.tags} | {"ul", "li"}
  assert "<script>alert(1)</script>" in evil.text and "{{ 7 * 7 }}\\u202e" in evil.text


def test_an_evaluation_adds_win_rates_figures_and_answers(tmp_path):
  run, evaluation = write_run(tmp_path / "run"), write_evaluation(tmp_path / "eval", ("ppo", "sft"))
  plot.plot(plot.Config(str(tmp_path / "out"), (run,), str(evaluation)))
  page = Page((tmp_path / "out" / "report.html").read_text())
  assert "kl 2 (1.5 to 2.5) 2 (1.5 to 2.5)" in page.text
  assert "ppo sft ppo – 0.750 sft 0.250 –" in page.text
  assert "ppo answer of ppo gold 1.000 sft answer of sft gold 1.000" in page.text
  assert (tmp_path / "out" / "plots" / "win_rates.png").read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_of_one_policy(tmp_path):
  folder = tmp_path / "eval"
  folder.mkdir()
  (folder / "summary.json").write_text('{"kl": 1.0, "gold/mean": 2}')
  found = report.read_evaluation(folder)
  assert found == {"policy": {"kl": 1.0, "gold/mean": 2}} and report.win_rates(found) == {}
  assert report.policy_table(found)["gold/mean"] == {"policy": "2"}


def test_what_cannot_be_read_is_named(tmp_path, page_of):
  run = write_run(tmp_path / "run", responses=[("p", "r")])
  with pytest.raises(flags.UsageError, match="--evaluation=.*nowhere is no workdir"):
    plot.plot(plot.Config(str(tmp_path / "out"), (run,), str(tmp_path / "nowhere")))
  assert not (tmp_path / "out").exists()
  (samples,) = (tmp_path / "run" / "samples").iterdir()
  samples.write_text('{"prompt": "p"}\n{"pro\n')
  with pytest.raises(flags.UsageError, match=r"step_00000004\.jsonl:2: .*delete"):
    page_of(run)
