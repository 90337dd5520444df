import json
import math
import re

import pytest

from experiments.lab import claims, front, methods, stages

EMPTY = "a\n<!-- claims -->\n<!-- end of claims -->\nb\n"


def cells(page):
  """Rows of the table of claims, without its head."""
  (text,) = re.findall(r"<!-- claims -->\n(.*?)<!-- end of claims -->", page, re.DOTALL)
  return methods.read_rows(text)[2:]


def finish(folder, name, summary, **metrics):
  """Writes a run that has finished: summary.json, and metrics.jsonl from lists of values."""
  (folder / name).mkdir(parents=True)
  stages.write_record(folder, name, minutes=1.0, code=0)
  (folder / name / "summary.json").write_text(json.dumps(summary))
  rows = [
    dict(zip(metrics, row, strict=True), step=i)
    for i, row in enumerate(zip(*metrics.values(), strict=True), start=1)
  ]
  (folder / name / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda of: f"{of.paper}: {of.claim}")
def test_a_claim_compares_runs_that_there_are(claim):
  assert re.fullmatch(r"\d{4}\.\d{5}", claim.arxiv)
  assert {claim.plain, claim.method} <= {*stages.COMMANDS} and claim.plain != claim.method
  assert "when" not in claim.metric or re.fullmatch(r"\S+ when \S+>=[\d.]+", claim.metric)
  if claim.judgement:
    assert {claim.plain, claim.method} <= {*stages.read_by(claim.judgement)}


def test_every_arm_is_in_a_claim_or_read_by_one():
  used = {name for of in claims.CLAIMS for name in (of.plain, of.method, of.judgement) if name}
  used |= {front.COMPARED, front.SHIFTED}
  arms = {line["name"] for line in stages.lines("arms.csv")}
  assert arms <= {*stages.with_needed([*used])}
  assert not arms & {*methods.METHODS}


@pytest.mark.parametrize(
  ("key", "of", "level", "expected"),
  [
    ("step", "gold", 6.0, 9),  # The mean of 4 to 8, of steps 5 to 9.
    ("gold", "step", 7.0, 4.0),
    ("kl", "gold", 6.0, 0.7),
    ("step", "gold", 0.0, 5),  # No earlier than the first window.
    ("step", "gold", 50.0, math.inf),
    ("kl", "gold", math.inf, math.inf),
  ],
)
def test_a_metric_is_read_at_the_step_that_reaches_a_level(key, of, level, expected):
  rows = [{"step": i, "gold": i - 1.0, "kl": i / 10} for i in range(1, 21)]
  # A continued run repeats steps, the last of which counts; other rows lack the metrics.
  rows = [{"step": 3, "gold": 99.0, "kl": 9.0}, *rows, {"step": 21, "eval/gold": 1.0}]
  assert claims.when(rows, key, of, level) == pytest.approx(expected)


def test_the_table_has_the_numbers_of_finished_runs(tmp_path):
  for seed, last in ((0, 7.0), (2, 5.0)):
    folder = tmp_path / f"seed_{seed}"
    finish(folder, "ppo", {}, **{"gold_reward/mean": [6.0] * 9, "kl/ref": [2.0] * 9})
    rising = [1.0] * 4 + [last] * 5
    finish(folder, "rto", {}, **{"gold_reward/mean": rising, "kl/ref": rising})
    finish(folder, "pf_ppo", {"gold/mean": 6.25})
  finish(tmp_path / "seed_0", "pf_best", {"gold/mean": 5.5})
  finish(tmp_path / "seed_1", "ppo", {}, **{"gold_reward/mean": [6.0] * 9, "kl/ref": [2.0] * 9})
  judged = {name: {"nll": loss} for name, loss in (("no_ptx", 1.5), ("ppo_max", 1.25))}
  judged = {name: of | {"gold/mean": 6.0} for name, of in judged.items()}
  for name in ("no_ptx", "ppo_max"):
    finish(tmp_path / "seed_0", name, {"nll": 9.0})
  finish(tmp_path / "seed_0", "forgetting", judged)
  table = cells(claims.fill(EMPTY, claims.read(tmp_path)))
  assert [row[0].partition("]")[0] for row in table] == [
    "[RTO",
    "[PF-PPO",
    "[InstructGPT",
    "[InstructGPT",
  ]
  # Seed 1 has no run of RTO, so it says nothing of it.
  assert table[0][2:] == ["PPO", "5 / – / 5", "5.0", "RTO", "9 / – / never", "never"]
  assert table[1][2:] == ["PF-PPO, the best alone", "5.50", "5.50", "PF-PPO", "6.25", "6.25"]
  assert table[2][2:] == ["PPO-max without ptx", "1.50", "1.50", "PPO-max", "1.25", "1.25"]


def test_a_claim_without_both_runs_keeps_its_row(tmp_path):
  first, second, *_ = claims.CLAIMS
  page = claims.fill(EMPTY, {first: {0: (20.0, 10.0)}, second: {0: (9.0, 8.0)}})
  assert claims.fill(page, {}) == page
  finish(tmp_path / "seed_0", first.plain, {}, **{"gold_reward/mean": [9.0] * 9})
  assert claims.fill(page, claims.read(tmp_path)) == page
  other = claims.fill(page, {second: {0: (9.0, 4.0), 1: (9.0, 6.0)}})
  assert cells(other)[0] == cells(page)[0]
  assert cells(other)[1][-2:] == ["4 / 6", "5.0"]


def test_the_page_shows_the_tables(repository):
  text = (repository / "experiments" / "METHODS.md").read_text(encoding="utf-8")
  assert claims.fill(text, {}) == text
  for name in ("claims", "arms"):
    assert text.count(f"<!-- {name} -->\n") == 1


def test_the_front_is_the_mean_over_the_seeds_that_have_both_comparisons(tmp_path):
  page = "<!-- tax -->\n| old |\n<!-- end of tax -->\n"
  assert front.fill(page, front.read(tmp_path)) == page
  names = ["sft", *stages.read_by(front.COMPARED)]
  for seed in range(3):
    for stage in (front.COMPARED, front.SHIFTED)[: 1 if seed == 2 else 2]:
      gold = {"sft": 4.0, "ppo": 7.0}
      summary = {
        name: dict.fromkeys(front.COLUMNS.values(), 0.5 + seed)
        | {"gold/mean": (x := gold.get(name, 6.0) + seed), "gold/mean_low": x - 0.3}
        | {"gold/mean_high": x + 0.3}
        for name in names
      }
      finish(tmp_path / f"seed_{seed}", stage, summary)
  filled = front.fill(page, front.read(tmp_path))
  assert "| PPO | 7.50 ± 0.21 | 7.50 ± 0.21 | 1.0 | 1.00 | 1.00 | 1.00 |" in filled
  assert "| PPO with 0.2 of SFT | 6.50 ± 0.21 |" in filled and filled.count("\n") == 9
