import json
import re

import pytest

from experiments.lab import methods
from experiments.lab.methods import METHODS, Result
from tests.testing import read_flags

PAGES = ("README.md", "experiments/METHODS.md")


def table(text, name):
  """Rows of a table of a page, as lists of cells."""
  (found,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end of {name} -->", text, re.DOTALL)
  return [re.split(r" \| ", line.strip("| ")) for line in found.splitlines()]


@pytest.mark.parametrize("name", [*METHODS, "reward_model"])
def test_the_script_of_a_line_accepts_its_flags(name, tmp_path):
  script, *flags = methods.words(name, tmp_path, seed=1)
  read = read_flags(script, flags)
  assert read.workdir == str(tmp_path / name)
  assert read.init_from == ("" if name == "sft" else str(tmp_path / "sft"))
  sources = [flag for flag in flags if flag.startswith(("--reward.path", "--preference.path"))]
  assert all(flag.endswith(f"={tmp_path}/reward_model") for flag in sources)


def test_stages_of_all_seeds_draw_rows_of_their_own(tmp_path):
  stages = [(name, seed) for name in ("sft", "reward_model", "ppo") for seed in range(3)]
  drawn = {methods.words(name, tmp_path, seed)[2] for name, seed in stages}
  assert len(drawn) == len(stages)
  # Methods are compared on the same rows, and PPO is that of the chain with the same seed.
  assert methods.words("dpo", tmp_path, 2)[2] == methods.words("ppo", tmp_path, 2)[2] == "--seed=23"


def test_the_tests_of_the_table_exist(repository):
  for method in METHODS.values():
    file, _, test = method.test.partition("::")
    assert f"def {test}(" in (repository / "tests" / file).read_text(encoding="utf-8"), method


def test_pages_show_the_table(repository):
  """With the measured results, whatever they are."""
  readme, page = ((repository / name).read_text(encoding="utf-8") for name in PAGES)
  empty = methods.fill(page, {}), methods.fill(readme, {})
  assert table(page, "methods") == table(empty[0], "methods")
  commands = [[row[:2] for row in table(text, "short")] for text in (readme, empty[1])]
  assert commands[0] == commands[1]
  titles = [method.title for method in METHODS.values()]
  assert {row[0] for row in table(page, "results")[2:]} <= set(titles)


def write(folder, name, minutes, summary=None):
  folder.mkdir(exist_ok=True)
  record = {"command": name, "minutes": minutes, "code": 0 if summary else 70}
  (folder / f"{name}.json").write_text(json.dumps(record))
  if summary:
    (folder / name).mkdir()
    (folder / name / "summary.json").write_text(json.dumps(summary))


def summary(gold, rate):
  rates = {
    "gold/win_rate": rate,
    "gold/win_rate_low": rate - 0.03,
    "gold/win_rate_high": rate + 0.03,
  }
  return {"gold/mean": gold, "gold/mean_before": 4.0, "kl": 5.0, **rates}


def test_results_are_those_of_finished_runs(tmp_path):
  for seed, rate in ((0, 0.7), (1, 0.8)):
    write(tmp_path / f"seed_{seed}", "sft", 1.5, {"eval/loss": 1.0})
    write(tmp_path / f"seed_{seed}", "dpo", 2.0, summary(5.0 + seed, rate))
  write(tmp_path / "seed_0", "kto", 2.0)  # It failed.
  write(tmp_path / "seed_1", "ppo", 3.0, summary(6.0, 0.75))
  results = methods.read(tmp_path)
  assert results["dpo"][1] == pytest.approx(Result(6.0, 0.8, 0.77, 0.83, 5.0, 2.0))
  assert results["sft"][0] == Result(4.0, 0.5, 0.5, 0.5, 0.0, 1.5)
  assert not results["kto"]
  page = methods.fill("a\n<!-- results -->\nold\n<!-- end of results -->\nb\n", results)
  assert page.startswith("a\n") and page.endswith("\nb\n")
  head, _, sft, dpo, ppo = table(page, "results")
  assert head[1] == "gold reward, seeds 0 / 1"
  assert sft == ["SFT", "4.00 / 4.00", "0.50 / 0.50", "0.50", "0.0 / 0.0", "1.5 / 1.5"]
  # The mean of two means with intervals of 0.03 is known to 0.03 / sqrt(2).
  assert dpo == ["DPO", "5.00 / 6.00", "0.70 / 0.80", "0.75 ± 0.02", "5.0 / 5.0", "2.0 / 2.0"]
  assert ppo == ["PPO", "– / 6.00", "– / 0.75", "0.75 ± 0.03", "– / 5.0", "– / 3.0"]


def test_other_places_of_a_page_stay_as_they_are():
  page = "<!-- other -->\n| a |\n<!-- end of other -->\n"
  assert methods.fill(page, {}) == page
